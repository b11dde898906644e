//! Before a checkpoint's pages come: which of them does the own VM have alike?
//!
//! ```text
//!   Staging ──Halt: PauseVm──► Halting ──Paused: Halted──► Standing ──PageHashes: Compare──► Comparing
//!                                                             ▲                                 │
//!                                                             └─────Compared: PageMatches───────┘
//! ```
//!
//! From `Halted` on the VM stands until the checkpoint is loaded, so what was compared is what is copied to the stage. If
//! the primary is lost before, the VM goes on from where it stopped: nothing of the checkpoint has touched it.

use super::{
    Action, EpochMode, Flight, Instant, Message, Mutant, PageHashes, PageMatches, Secondary, Standing, Tag, mutants,
};

impl Secondary {
    pub(super) fn halt(&mut self, now: Instant, tag: Tag, actions: &mut Vec<Action>) {
        if self.is_draining() {
            return;
        }
        let runs = !self.first && self.mode == EpochMode::Lockstep;
        if tag != self.tag() || !runs || !matches!(self.flight, Flight::Staging) {
            return self.misbehaved(now, "it wants pages compared out of order", actions);
        }
        if mutants::on(Mutant::CompareRunning) {
            self.flight = Flight::Standing;
            actions.push(Action::Send(Message::Halted(tag)));
            return;
        }
        self.flight = Flight::Halting;
        actions.push(Action::PauseVm);
    }

    pub(super) fn halted(&mut self, actions: &mut Vec<Action>) {
        if matches!(self.flight, Flight::Halting) && self.standing() == Standing::Following {
            self.flight = Flight::Standing;
            actions.push(Action::Send(Message::Halted(self.tag())));
        }
    }

    pub(super) fn page_hashes(&mut self, now: Instant, hashes: PageHashes, actions: &mut Vec<Action>) {
        if self.is_draining() {
            return;
        }
        if hashes.tag != self.tag() || !matches!(self.flight, Flight::Standing) {
            return self.misbehaved(now, "it asked about pages of a VM that does not stand for it", actions);
        }
        self.flight = Flight::Comparing;
        actions.push(Action::Compare(hashes));
    }

    pub(super) fn compared(&mut self, matches: PageMatches, actions: &mut Vec<Action>) {
        if matches!(self.flight, Flight::Comparing) && self.standing() == Standing::Following {
            self.flight = Flight::Standing;
            actions.push(Action::Send(Message::PageMatches(matches)));
        }
    }

    /// Nobody waits for an answer any more.
    fn is_draining(&self) -> bool {
        matches!(self.standing(), Standing::Draining { .. })
    }
}
