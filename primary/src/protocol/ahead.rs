//! Before a stop: when the dirty pages are looked at, what is shipped of them ahead, and when the stop must not wait longer.
//!
//! Only while the guest runs in an epoch on top of one that the secondary has loaded, and no stop is wanted: then what is shipped
//! belongs to the checkpoint that will end this epoch, and builds on what the secondary has committed.
//!
//! Pages can be compared at a stop only. Of two guests that write nearly everything alike, what is left for the stop is cheaper
//! than what is shipped ahead: a hash instead of the content, for a copy in the pause. So nothing is shipped ahead in lockstep
//! after a checkpoint whose answers said so; the pages are looked at all the same.

use super::{
    Action, AheadShipment, Duration, EpochMode, Instant, Look, Mutant, PageMatches, Primary, Report, State, Tag, Taken,
    Trigger, mutants,
};

/// So much of what was asked about must have been alike for the pages to be left for the stop.
const ALIKE_PERCENT: u64 = 75;

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
    /// Pages that count as clean already: queued, or still to be.
    pub(super) taken: u64,
    /// Pages that were dirty at the last look, how many there will be at the next if it goes on like this (before the first: as many as the
    /// last stop had), and how long the look took.
    pub(super) dirty: u64,
    pub(super) expected: u64,
    pub(super) looked: Duration,
    /// Nothing is shipped: it will be alike.
    pub(super) alike: bool,
}

/// The answers about the pages of one checkpoint.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Answers {
    asked: u64,
    alike: u64,
}

impl Answers {
    pub(super) fn add(&mut self, matches: &PageMatches) {
        self.asked += matches.alike.len() as u64;
        self.alike += matches.alike.iter().filter(|alike| **alike).count() as u64;
    }

    /// Tells whether nearly all was alike; None if nothing was asked.
    fn nearly_all(self) -> Option<bool> {
        (self.asked > 0).then(|| self.alike * 100 >= self.asked * ALIKE_PERCENT)
    }
}

impl Primary {
    /// Returns when the next look is due, if one may be taken.
    pub(super) fn look_due(&self) -> Option<Instant> {
        if self.runs_ahead() {
            return self.flight_look_due().filter(|_| self.ending.is_none());
        }
        let quiet = matches!(self.state, State::Protected { .. }) && self.peer_loaded && self.ending.is_none();
        let due = quiet && self.options.ahead.is_some() && self.ahead.round.is_none();
        due.then_some(self.ahead.due)
    }

    /// The epoch's pages may be shipped from now on.
    pub(super) fn begin_ahead(&mut self, now: Instant) {
        // Of this epoch nothing is known yet: it begins like the one before.
        let every = self.look_interval().unwrap_or_default();
        let answers = core::mem::take(&mut self.answers);
        self.ahead = Ahead {
            tag: self.tag(),
            due: now + every,
            alike: answers.nearly_all().unwrap_or(self.ahead.alike),
            expected: self.ahead.expected,
            ..Ahead::default()
        };
    }

    pub(super) fn ship_ahead(&mut self, now: Instant, actions: &mut Vec<Action>) {
        if self.look_due().is_none_or(|due| due > now) {
            return;
        }
        if self.runs_ahead() {
            return self.look_in_flight(actions);
        }
        self.ahead.round = Some(now);
        let alike = self.ahead.alike && self.epoch_mode == EpochMode::Lockstep;
        let budget = self.options.ahead.filter(|_| !alike);
        let pages = budget.map_or(0, |budget| budget.round_pages(self.ahead.expected));
        self.ahead.ordered |= pages > 0;
        let tag = self.ahead.tag;
        actions.push(Action::ShipAhead { tag, pages });
    }

    pub(super) fn looked(&mut self, now: Instant, look: Look, actions: &mut Vec<Action>) {
        if look.tag != self.ahead.tag {
            return self.looked_in_flight(now, look, actions);
        }
        self.ahead.taken += look.ahead;
        self.ahead.expected = look.dirty + look.dirty.saturating_sub(self.ahead.dirty);
        self.ahead.dirty = look.dirty;
        self.ahead.looked = look.took;
        if look.ahead == 0 {
            self.end_round(0, look.took);
        }
        self.keep_memory(now, actions);
        self.keep_budget(now, actions);
    }

    /// Takes a checkpoint if the pause would be too long at the next look.
    fn keep_budget(&mut self, now: Instant, actions: &mut Vec<Action>) {
        let Some(budget) = self.options.pause_budget else {
            return;
        };
        let least = self.predictor.predict(0);
        if least >= budget {
            // Stopping all the time would make it no shorter. Before the first stop it is a guess, and no news.
            if self.predictor.has_learned() && !core::mem::replace(&mut self.budget_told, true) {
                actions.push(Action::Report(Report::Alarm(format!(
                    "the pause budget of {budget} can't be kept: a stop without a dirty page is expected to take {least} on this host; \
                     set a longer --pause-budget"
                ))));
            }
        } else if self.predictor.predict(self.ahead.expected) >= budget {
            self.trigger(now, Trigger::Budget, actions);
        }
    }

    /// Takes note of a pause that has ended.
    pub(super) fn paused_for(&mut self, pause: Duration, taken: &Taken) {
        self.counters.last_predicted = taken.predicted;
        // Also for an epoch that is too short for a look.
        self.ahead.expected = taken.pages;
        if taken.trigger != Trigger::Sync {
            self.predictor.learn(taken.pages, pause);
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
        if let (Some(began), Some(budget), Some(every)) =
            (self.ahead.round.take(), self.options.ahead, self.look_interval())
        {
            self.ahead.due = budget.next(began, every, bytes, busy);
        }
    }

    /// Returns the shortest time from one look to the next. A pause budget is kept as well as looks are frequent.
    fn look_interval(&self) -> Option<Duration> {
        let budget = self.options.ahead?;
        Some(if self.options.pause_budget.is_some() {
            budget.every
        } else {
            budget.interval(self.ahead.expected)
        })
    }

    /// Tells whether pages count as clean because they were shipped ahead in the running epoch.
    pub(super) fn has_shipped_ahead(&self) -> bool {
        self.ahead.ordered && self.ahead.tag.epoch == self.epoch && !mutants::on(Mutant::ForgetPagesAhead)
    }
}
