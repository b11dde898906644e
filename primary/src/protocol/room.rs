//! A guest that outruns its link: it stands until the checkpoint that takes its output and its writes along.

use checkpoint::limits;

use super::{Action, Mutant, Primary, State, Trigger, mutants};

/// What an epoch may keep waiting before it is to end.
///
/// The guest runs on while a checkpoint is on its way, in an epoch that can't end yet. There it may keep half as much
/// again of the writes, and twice as much of the output; then it stands, or a fast guest in front of a slow link fills
/// this host's memory and the secondary's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Bytes of held output.
    pub held_bytes: usize,
    /// Bytes written to the disk.
    pub written_bytes: u64,
}

impl Default for Room {
    fn default() -> Self {
        Self {
            held_bytes: limits::HELD_BYTES_MAX,
            written_bytes: limits::EPOCH_WRITES_BYTES_MAX / 2,
        }
    }
}

impl Room {
    fn has_no_more_for(&self, written_bytes: u64) -> bool {
        written_bytes >= self.written_bytes + self.written_bytes / 2
    }
}

impl Primary {
    /// Stops the guest if its epoch is full and can't end now.
    pub(super) fn stand_if_full(&mut self, actions: &mut Vec<Action>) {
        let runs_ahead = match self.state {
            State::Sending(taken) | State::Awaiting(taken) => taken.resumed,
            State::Protected { stands, .. } => !stands && !self.peer_loaded,
            _ => false,
        };
        let is_full = self.options.room.has_no_more_for(self.write_bytes) || self.comparator.is_full();
        if !runs_ahead || !is_full || self.is_full || mutants::on(Mutant::OutrunTheLink) {
            return;
        }
        self.is_full = true;
        // Taken as soon as the secondary has loaded the one on its way; the guest goes on after its copy.
        self.want(Trigger::Limit);
        actions.push(Action::PauseVm);
    }
}
