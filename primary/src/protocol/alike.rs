//! Before a checkpoint's pages are sent: which of them does the secondary's VM have alike?
//!
//! ```text
//!   Unasked ──CompareAsked: Halt──► Halting ──Halted: AskAlike──► Halted ──Hashed: PageHashes──► Asking
//!                                                                    ▲                             │
//!                                                                    └────PageMatches: Alike───────┘
//! ```
//!
//! The secondary's VM stops before the seed of the hashes is drawn: both contents are fixed by then, this side's by the
//! stop of its own VM. The checkpoint can't be sent while an answer is open, and the loss of the peer abandons all of it.

use super::{Action, Instant, Message, PageHashes, PageMatches, Primary, State, Tag, Taken, Trigger};

/// How far the comparison has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Alike {
    /// Nobody has asked for one.
    Unasked,
    /// The secondary's VM is to stop.
    Halting,
    /// The secondary's VM stands.
    Halted,
    /// It is asked about so many pages.
    Asking(usize),
}

impl Alike {
    /// Tells whether the secondary owes an answer.
    pub(super) fn is_open(self) -> bool {
        matches!(self, Self::Halting | Self::Asking(_))
    }
}

impl Primary {
    pub(super) fn compare_asked(&mut self, tag: Tag, actions: &mut Vec<Action>) {
        let Some(taken) = self.in_flight(tag) else { return };
        assert!(
            taken.alike == Alike::Unasked && taken.trigger != Trigger::Sync,
            "pages are compared once in a checkpoint, and only with a VM that follows"
        );
        taken.alike = Alike::Halting;
        actions.push(Action::Send(Message::Halt(tag)));
    }

    pub(super) fn peer_halted(&mut self, now: Instant, tag: Tag, actions: &mut Vec<Action>) {
        match self.in_flight(tag) {
            Some(taken) if taken.alike == Alike::Halting => {
                taken.alike = Alike::Halted;
                actions.push(Action::AskAlike(tag));
            }
            _ => self.misbehaved(now, "it stopped its VM unasked", actions),
        }
    }

    pub(super) fn hashed(&mut self, hashes: PageHashes, actions: &mut Vec<Action>) {
        let Some(taken) = self.in_flight(hashes.tag) else {
            return;
        };
        assert_eq!(taken.alike, Alike::Halted, "hashes are of stopped VMs");
        taken.alike = Alike::Asking(hashes.pages.len());
        actions.push(Action::Send(Message::PageHashes(hashes)));
    }

    pub(super) fn matches_arrived(&mut self, now: Instant, matches: PageMatches, actions: &mut Vec<Action>) {
        match self.in_flight(matches.tag) {
            Some(taken) if taken.alike == Alike::Asking(matches.alike.len()) => {
                taken.alike = Alike::Halted;
                self.answers.add(&matches);
                actions.push(Action::Alike(matches));
            }
            _ => self.misbehaved(now, "it answered about pages that it was not asked about", actions),
        }
    }

    fn in_flight(&mut self, tag: Tag) -> Option<&mut Taken> {
        match &mut self.state {
            State::Sending(taken) if taken.tag == tag => Some(taken),
            _ => None,
        }
    }
}
