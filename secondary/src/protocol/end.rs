//! Orderly ends, and those of a side that can't go on.

use super::{
    Action, Epoch, Flight, GoodbyeReason, Instant, Message, Outcome, RecordUpdate, Role, Secondary, Standing, failover,
};

impl Secondary {
    pub(super) fn leave(&mut self, now: Instant, reason: GoodbyeReason, actions: &mut Vec<Action>) {
        match self.standing() {
            Standing::Contending(_)
            | Standing::Alone
            | Standing::Draining { .. }
            | Standing::Severed { .. }
            | Standing::Fenced => {
                self.finish(Outcome::Ended(reason), actions);
            }
            _ => {
                actions.push(Action::SendControl(Message::Goodbye(reason.clone())));
                self.goodbye(now, reason, actions);
            }
        }
    }

    pub(super) fn goodbye(&mut self, now: Instant, reason: GoodbyeReason, actions: &mut Vec<Action>) {
        if self.standing() == Standing::Idle {
            // Nothing of the image has changed: its record stays as true as it was.
            actions.push(Action::CloseLink);
            return self.finish(Outcome::Ended(reason), actions);
        }
        self.leaving = Some(reason);
        self.contend(now, failover::Event::Goodbye, "", actions);
        if !matches!(self.flight, Flight::Loading(..)) {
            self.flight = Flight::Staging;
            actions.push(Action::PauseVm);
            actions.push(Action::DropStage);
        }
        self.record_end(actions);
    }

    /// Writes the last record, once the image holds what has been committed.
    pub(super) fn record_end(&self, actions: &mut Vec<Action>) {
        let loading = matches!(self.flight, Flight::Loading(..));
        if self.leaving.is_some() && !loading && (self.first || self.durable == self.committed) {
            self.store_record(!self.first, true, actions);
        }
    }

    /// This side can't follow: the primary is told, and goes on alone.
    pub(super) fn fail(&mut self, reason: String, actions: &mut Vec<Action>) {
        actions.push(Action::SendControl(Message::Goodbye(GoodbyeReason::Failed(
            reason.clone(),
        ))));
        actions.push(Action::CloseLink);
        self.finish(Outcome::Failed(reason), actions);
    }

    pub(super) fn finish(&mut self, outcome: Outcome, actions: &mut Vec<Action>) {
        self.contest.end();
        actions.push(Action::End(outcome));
    }

    pub(super) fn store_record(&self, complete: bool, clean: bool, actions: &mut Vec<Action>) {
        self.store_record_for(self.committed, complete, clean, actions);
    }

    pub(super) fn store_record_for(&self, committed: Epoch, complete: bool, clean: bool, actions: &mut Vec<Action>) {
        self.store_record_as(Role::Secondary, committed, complete, clean, actions);
    }

    pub(super) fn store_record_as(
        &self,
        role: Role,
        committed: Epoch,
        complete: bool,
        clean: bool,
        actions: &mut Vec<Action>,
    ) {
        actions.push(Action::StoreRecord(RecordUpdate {
            generation: self.contest.generation(),
            role,
            committed,
            complete,
            clean,
        }));
    }
}

#[cfg(test)]
mod tests {
    use checkpoint::wire::{GoodbyeReason, Held};
    use checkpoint::{Duration, Generation, Instant};

    use crate::event::{Action, Event, Outcome};
    use crate::protocol::{Options, Secondary};

    #[test]
    fn a_goodbye_before_the_sync_leaves_the_record_as_it_was() {
        let goodbye = checkpoint::wire::Message::Goodbye(GoodbyeReason::Operator);
        for event in [Event::StopAsked, Event::PeerSent(goodbye)] {
            let options = Options {
                witness: true,
                takeover_limit: Duration::from_millis(300),
                generation: Generation(7),
                held: Held::default(),
                cards: 1,
                streams: 1,
                unsent_bytes: checkpoint::limits::UNSENT_BYTES_MAX,
                room: u64::MAX,
            };
            let mut secondary = Secondary::new(options, "a".to_owned(), Instant(1));
            let mut actions = Vec::new();
            secondary.step(Instant(2), event, &mut actions);
            let stored = |action: &Action| matches!(action, Action::StoreRecord(_));
            assert!(!actions.iter().any(stored), "the image is still complete");
            assert!(matches!(actions.last(), Some(Action::End(Outcome::Ended(_)))));
        }
    }
}
