//! Shipping ahead of a stop: when the dirty pages are looked at, and what is known of them.
//!
//! Only while the guest runs in an epoch on top of one that the secondary has loaded, and no stop is wanted: then what is shipped
//! belongs to the checkpoint that will end this epoch, and builds on what the secondary has committed.

use super::{Action, AheadShipment, Duration, Instant, Look, Mutant, Primary, State, Tag, mutants, pace};

/// What is shipped ahead in one epoch.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Ahead {
    pub(super) tag: Tag,
    /// When the next look is due, unless a round is under way since `round`.
    pub(super) due: Instant,
    pub(super) round: Option<Instant>,
    /// Some pages may count as clean already.
    pub(super) ordered: bool,
    /// Pages and bytes queued.
    pub(super) pages: u64,
    pub(super) bytes: u64,
    /// Pages that were dirty at the last look, and how long it took.
    pub(super) dirty: u64,
    pub(super) looked: Duration,
}

impl Primary {
    /// Returns when the next look is due, if one may be taken.
    pub(super) fn look_due(&self) -> Option<Instant> {
        let quiet = matches!(self.state, State::Protected { .. }) && self.peer_loaded && self.ending.is_none();
        let due = quiet && self.options.ahead.is_some() && self.ahead.round.is_none();
        due.then_some(self.ahead.due)
    }

    /// The epoch's pages may be shipped from now on.
    pub(super) fn begin_ahead(&mut self, now: Instant) {
        let every = self.options.ahead.map(|budget| budget.every).unwrap_or_default();
        self.ahead = Ahead {
            tag: self.tag(),
            due: now + every,
            ..Ahead::default()
        };
    }

    pub(super) fn ship_ahead(&mut self, now: Instant, actions: &mut Vec<Action>) {
        if self.look_due().is_none_or(|due| due > now) {
            return;
        }
        self.ahead.round = Some(now);
        self.ahead.ordered = true;
        actions.push(Action::ShipAhead {
            tag: self.ahead.tag,
            pages: pace::ROUND_PAGES_MAX,
        });
    }

    pub(super) fn looked(&mut self, look: Look) {
        if look.tag != self.ahead.tag {
            return;
        }
        self.ahead.dirty = look.dirty;
        self.ahead.looked = look.took;
        if look.ahead == 0 {
            self.end_round(0, look.took);
        }
    }

    /// Comes before `CheckpointSent` of the same epoch.
    pub(super) fn shipped_ahead(&mut self, shipment: AheadShipment) {
        if shipment.tag != self.ahead.tag {
            return;
        }
        self.ahead.pages += shipment.pages;
        self.ahead.bytes += shipment.bytes;
        self.counters.pages += shipment.pages;
        self.counters.pages_ahead += shipment.pages;
        self.counters.page_bytes += shipment.bytes;
        let busy = Duration(self.ahead.looked.0 + shipment.took.0);
        self.end_round(shipment.bytes, busy);
    }

    fn end_round(&mut self, bytes: u64, busy: Duration) {
        if let (Some(began), Some(budget)) = (self.ahead.round.take(), self.options.ahead) {
            self.ahead.due = budget.next(began, bytes, busy);
        }
    }

    /// Tells whether pages count as clean because they were shipped ahead in the running epoch.
    pub(super) fn has_shipped_ahead(&self) -> bool {
        self.ahead.ordered && self.ahead.tag.epoch == self.epoch && !mutants::on(Mutant::ForgetPagesAhead)
    }
}
