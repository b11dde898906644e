//! Orderly ends: a last checkpoint, equal images, a goodbye.

use super::{
    Action, ENDING_MAX, Ending, GoodbyeReason, Instant, Message, Outcome, Primary, RecordUpdate, Role, State, Trigger,
};

impl Primary {
    /// Ends in order: a protected pair takes a last checkpoint, so that both disks are equal.
    pub(super) fn end(&mut self, now: Instant, reason: GoodbyeReason, actions: &mut Vec<Action>) {
        if self.ending.is_some() {
            return;
        }
        self.ending = Some(Ending {
            reason,
            by: now + ENDING_MAX,
            recorded: false,
        });
        match self.state {
            State::Protected { .. } => self.stop_when_loaded(now, Trigger::Admin, actions),
            State::Stopping { .. } | State::Copying(_) | State::Sending(_) | State::Awaiting(_) => {}
            State::Contending => self.goodbye(actions),
            State::Alone | State::Pairing | State::Syncing { .. } => actions.push(Action::PauseVm),
            State::Over => {}
        }
    }

    pub(super) fn record_end(&mut self, actions: &mut Vec<Action>) {
        if let Some(ending) = &mut self.ending
            && !ending.recorded
        {
            ending.recorded = true;
            self.store_record(true, actions);
        }
    }

    pub(super) fn goodbye(&mut self, actions: &mut Vec<Action>) {
        let reason = self
            .ending
            .as_ref()
            .map_or(GoodbyeReason::Operator, |ending| ending.reason.clone());
        if self.liveness.is_some() {
            actions.push(Action::SendControl(Message::Goodbye(reason.clone())));
            actions.push(Action::CloseLink);
        }
        self.finish(Outcome::Ended(reason), actions);
    }

    pub(super) fn finish(&mut self, outcome: Outcome, actions: &mut Vec<Action>) {
        self.state = State::Over;
        self.contest.end();
        self.liveness = None;
        self.ending = None;
        self.announce = None;
        actions.push(Action::End(outcome));
    }

    pub(super) fn store_record(&self, clean: bool, actions: &mut Vec<Action>) {
        actions.push(Action::StoreRecord(RecordUpdate {
            generation: self.contest.generation(),
            role: Role::Primary,
            committed: self.committed,
            complete: true,
            clean,
        }));
    }
}
