//! The part of the primary in the contest for the right to run: what it hears of it and what it is ordered to do.
//!
//! The decisions are in [`checkpoint::failover::Contest`].

use super::{
    Action, Ahead, Answers, Generation, Instant, Mutant, Order, Outcome, Primary, RecordUpdate, Report, State, Trigger,
    WitnessAnswer, failover, mutants, proxy,
};

impl Primary {
    /// The secondary is gone, or says that it goes: `event` is which.
    pub(super) fn link_lost(&mut self, now: Instant, event: failover::Event, cause: &str, actions: &mut Vec<Action>) {
        if self.liveness.is_some() {
            self.contend(now, event, cause, actions);
        }
    }

    /// Tells the contest and carries out what it orders. `cause` is why the peer counts as lost, if it does.
    pub(super) fn contend(&mut self, now: Instant, event: failover::Event, cause: &str, actions: &mut Vec<Action>) {
        let before = self.state_name();
        let mut orders = Vec::new();
        self.contest.step(now, event, &mut orders);
        for order in orders {
            match order {
                Order::Alarm(cause) => {
                    actions.push(Action::Report(Report::Alarm(format!("witness unreachable: {cause}"))));
                }
                Order::Claim(term) => actions.push(Action::Claim(term)),
                Order::Fence { owner, term } => self.fenced(&owner, term, actions),
                Order::Lose => self.lose_peer(cause, actions),
                Order::Pair => self.begin_sync(now, actions),
                Order::Record(_) => self.store_record(false, actions),
                Order::Run => self.go_alone(now, actions),
                Order::Stop => {
                    self.state = State::Contending;
                    actions.push(Action::PauseVm);
                }
                Order::AskOperator | Order::GiveUp | Order::Sever => unreachable!("{order:?} is for a secondary"),
            }
        }
        if self.state != State::Over && self.state_name() != before {
            self.report_state(actions);
        }
    }

    pub(super) fn witness_answered(
        &mut self,
        now: Instant,
        term: Generation,
        answer: WitnessAnswer,
        actions: &mut Vec<Action>,
    ) {
        let event = failover::Event::Answered(term, answer);
        self.contend(now, event, "the witness can't be asked for the pairing's term", actions);
    }

    pub(super) fn recorded(&mut self, now: Instant, record: RecordUpdate, actions: &mut Vec<Action>) {
        if record.clean {
            return self.goodbye(actions);
        }
        self.contend(now, failover::Event::Recorded(record.generation), "", actions);
    }

    fn lose_peer(&mut self, cause: &str, actions: &mut Vec<Action>) {
        self.liveness = None;
        let peer = self.peer.take().unwrap_or_default();
        actions.push(Action::CloseLink);
        actions.push(Action::Report(Report::Note(format!("secondary {peer} lost: {cause}"))));
        match self.state {
            State::Copying(taken) | State::Sending(taken) | State::Awaiting(taken) => {
                if mutants::on(Mutant::ReuseEpoch) {
                    self.epoch = taken.tag.epoch;
                }
                if self.comparators.mode() == proxy::Mode::Comparing {
                    self.comparators.abandon();
                }
                self.changed.reopen();
                if !mutants::on(Mutant::ForgetAbandonedPages) {
                    actions.push(Action::KeepDirty);
                }
            }
            State::Syncing { .. }
            | State::Stopping {
                trigger: Trigger::Sync, ..
            } => actions.push(Action::KeepDirty),
            State::Protected { .. } | State::Stopping { .. } if self.has_shipped_ahead() => {
                actions.push(Action::KeepDirty);
            }
            _ => {}
        }
        self.ahead = Ahead::default();
        self.answers = Answers::default();
        self.input = self.confirmed;
        self.unconfirmed.clear();
        self.hold_input(actions);
    }

    fn go_alone(&mut self, now: Instant, actions: &mut Vec<Action>) {
        self.state = State::Alone;
        self.comparators.release_all();
        self.act_on_verdicts(now, actions);
        actions.push(Action::SeedEntropy(None));
        if self.ending.is_some() {
            // The VM stands since the loss, or is about to.
            actions.push(Action::PauseVm);
            return;
        }
        actions.push(Action::ResumeVm);
        actions.push(Action::Dial);
    }

    fn fenced(&mut self, owner: &str, term: Generation, actions: &mut Vec<Action>) {
        actions.push(Action::PauseVm);
        actions.push(Action::CloseLink);
        let reason = format!("{owner} owns the VM since term {term}: this side's VM and its output are stopped");
        actions.push(Action::Report(Report::State("fenced")));
        self.finish(Outcome::Fenced(reason), actions);
    }
}
