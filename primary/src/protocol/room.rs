//! A guest that outruns its link: it stands until the checkpoint that takes its output, its writes and its pages along.

use checkpoint::limits;

use super::{Action, Instant, Look, Mutant, Primary, State, Trigger, mutants};

/// What an epoch may keep waiting before it is to end.
///
/// The guest runs on while a checkpoint is on its way, in an epoch that can't end yet. There it may keep half as much
/// again of the writes, as many pages, and twice as much of the output; then it stands, or a fast guest in front of a slow link fills
/// this host's memory and the secondary's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Bytes of held output.
    pub held_bytes: usize,
    /// Bytes written to the disk.
    pub written_bytes: u64,
    /// Pages written: of a checkpoint, those shipped ahead of its stop included.
    pub pages: u64,
    /// Inputs forwarded and not confirmed, and
    pub inputs: u64,
    /// their bytes: at either the clients' frames stay in the TAP until the secondary has confirmed some, or loaded.
    pub input_bytes: u64,
}

impl Default for Room {
    fn default() -> Self {
        Self {
            held_bytes: limits::HELD_BYTES_MAX,
            written_bytes: limits::EPOCH_WRITES_BYTES_MAX / 2,
            pages: u64::MAX,
            inputs: limits::INPUTS_UNCONFIRMED_MAX,
            input_bytes: limits::INPUT_BYTES_UNCONFIRMED_MAX,
        }
    }
}

impl Room {
    fn has_no_more_for(self, written_bytes: u64) -> bool {
        written_bytes >= self.written_bytes + self.written_bytes / 2
    }
}

impl Primary {
    /// Stops the guest if its epoch is full and can't end now.
    pub(super) fn stand_if_full(&mut self, actions: &mut Vec<Action>) {
        if !self.runs_ahead() || !self.has_no_room() || self.is_full || mutants::on(Mutant::OutrunTheLink) {
            return;
        }
        self.is_full = true;
        // Taken as soon as the secondary has loaded the one on its way; the guest goes on after its copy.
        self.want(Trigger::Limit);
        actions.push(Action::PauseVm);
    }

    /// Tells whether the running epoch has as much output and writes as it may have.
    #[must_use]
    pub fn has_no_room(&self) -> bool {
        self.options.room.has_no_more_for(self.write_bytes) || self.comparators.is_full()
    }

    /// Tells whether the secondary has to confirm this share of the inputs that may be on their way.
    pub(super) fn has_inputs(&self, share: u64) -> bool {
        let room = self.options.room;
        self.inputs_unconfirmed() >= room.inputs / share || self.input_bytes_unconfirmed() >= room.input_bytes / share
    }

    /// Tells whether the guest of a pair stands, or has been told to.
    #[must_use]
    pub fn is_held_back(&self) -> bool {
        self.is_full
            || match self.state {
                State::Stopping { .. } | State::Copying(_) => true,
                State::Sending(taken) | State::Awaiting(taken) => !taken.resumed,
                State::Protected { stands, .. } => stands,
                _ => false,
            }
    }

    /// Tells whether the guest runs in an epoch that can't end yet: the checkpoint before is on its way, or being loaded.
    pub(super) fn runs_ahead(&self) -> bool {
        match self.state {
            State::Sending(taken) | State::Awaiting(taken) => taken.resumed,
            State::Protected { stands, .. } => !stands && !self.peer_loaded,
            _ => false,
        }
    }

    /// Stops the guest if it has written as many pages as a checkpoint may have, and its epoch can't end now.
    fn stand_if_outgrown(&mut self, pages: u64, actions: &mut Vec<Action>) {
        if !self.runs_ahead() || self.is_full || !self.is_outgrown(pages) {
            return;
        }
        self.is_full = true;
        self.want(Trigger::Memory);
        actions.push(Action::PauseVm);
    }

    fn is_outgrown(&self, pages: u64) -> bool {
        pages >= self.options.room.pages && !mutants::on(Mutant::OutgrowTheMemory)
    }

    /// Takes a checkpoint before its pages are more than may be at the next look.
    pub(super) fn keep_memory(&mut self, now: Instant, actions: &mut Vec<Action>) {
        if self.is_outgrown(self.ahead.taken + self.ahead.expected) {
            self.trigger(now, Trigger::Memory, actions);
        }
    }

    /// Returns when the next look is due at what the guest writes while the checkpoint before is under way.
    pub(super) fn flight_look_due(&self) -> Option<Instant> {
        self.flight_look
            .filter(|_| self.options.room.pages < u64::MAX && !self.is_full && self.runs_ahead())
    }

    /// The guest runs on, before the checkpoint of its last epoch is safe.
    pub(super) fn begin_flight(&mut self, now: Instant) {
        self.flight_look = self.options.ahead.map(|budget| now + budget.every);
    }

    /// Orders a look that ships nothing.
    pub(super) fn look_in_flight(&mut self, actions: &mut Vec<Action>) {
        self.flight_look = None;
        let tag = self.tag();
        actions.push(Action::ShipAhead { tag, pages: 0 });
    }

    pub(super) fn looked_in_flight(&mut self, now: Instant, look: Look, actions: &mut Vec<Action>) {
        if look.tag != self.tag() || !self.runs_ahead() {
            return;
        }
        self.flight_look = self
            .options
            .ahead
            .map(|budget| budget.next(now, budget.every, 0, look.took));
        self.stand_if_outgrown(look.dirty, actions);
    }
}
