//! The memory that a pairing takes here: what the own guest wrote, and what is staged of the checkpoint that arrives.

use super::{Action, Duration, EpochMode, Flight, Instant, Message, Mutant, Secondary, Standing, Tag, mutants};

/// Time between two looks at what the own guest has written: short beside the time in which it fills a small room, and long
/// beside what a look costs.
const LOOK_EVERY: Duration = Duration::from_millis(25);

/// What the own guest wrote, as far as it is known.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Own {
    /// Pages that it had written at the last look.
    pages: u64,
    /// When the next look is due; none while one is under way, or the guest stands.
    due: Option<Instant>,
    /// Whether the primary was asked for the checkpoint that ends this epoch.
    asked: bool,
}

impl Secondary {
    /// The guest begins to run in an epoch.
    pub(super) fn begin_own(&mut self, now: Instant) {
        let looks = self.mode == EpochMode::Lockstep && self.options.room < u64::MAX;
        self.own = Own {
            due: looks.then(|| now + LOOK_EVERY),
            ..Own::default()
        };
    }

    /// Returns when the next look at the own guest's pages is due.
    pub(super) fn look_due(&self) -> Option<Instant> {
        self.own
            .due
            .filter(|_| self.standing() == Standing::Following && matches!(self.flight, Flight::Staging))
    }

    /// Orders a look.
    pub(super) fn look(&mut self, actions: &mut Vec<Action>) {
        self.own.due = None;
        actions.push(Action::CountOwn(self.tag()));
    }

    pub(super) fn counted(&mut self, now: Instant, tag: Tag, pages: u64, actions: &mut Vec<Action>) {
        if tag != self.tag() || self.standing() != Standing::Following {
            return;
        }
        let grown = pages.saturating_sub(self.own.pages);
        self.own.pages = pages;
        self.own.due = Some(now + LOOK_EVERY);
        // Before the pages are more than may be at the next look.
        let soon = pages + grown + self.staged_pages();
        if soon >= self.options.room && !self.own.asked && !mutants::on(Mutant::OwnPagesUncounted) {
            self.own.asked = true;
            self.send_tagged(Message::Want, self.running, actions);
        }
    }

    /// Returns the pages that the own guest had written at the last look, those that are staged, and how many both may be.
    #[must_use]
    pub fn room(&self) -> [u64; 3] {
        [self.own.pages, self.staged_pages(), self.options.room]
    }

    /// Those of the initial sync are applied as they arrive.
    fn staged_pages(&self) -> u64 {
        if self.first { 0 } else { self.totals.pages_counted() }
    }
}
