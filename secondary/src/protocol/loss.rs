//! The part of the secondary in the contest for the right to run: what it hears of it and what it is ordered to do.
//!
//! The decisions are in [`checkpoint::failover::Contest`]; a takeover also waits for the VM.

use super::{
    Action, Connection, Flight, GoodbyeReason, Instant, LinkEnd, Mutant, Order, Outcome, Pictures, RecordUpdate,
    Report, Role, Secondary, Standing, Tag, TakenOver, failover, mutants,
};

impl Secondary {
    pub(super) fn closed(&mut self, now: Instant, connection: Connection, end: &LinkEnd, actions: &mut Vec<Action>) {
        if self.standing() == Standing::Following {
            actions.push(Action::Report(Report::Note(format!(
                "a connection of primary {} is gone: {end}",
                self.primary
            ))));
        }
        let event = failover::Event::Closed {
            connection,
            ended: *end == LinkEnd::PeerEnded,
            leased_until: self.liveness.suspect_at(),
        };
        self.contend(now, event, &end.to_string(), actions);
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
                Order::AskOperator => actions.push(Action::Report(Report::Alarm(
                    "no witness is configured: once the old primary is off for good, run \
                     `tandem takeover --old-primary-is-off`"
                        .to_owned(),
                ))),
                Order::Claim(term) => actions.push(Action::Claim(term)),
                Order::Fence { owner, term } => {
                    self.fenced =
                        format!("{owner} owns the VM since term {term}: this side's VM and its output are stopped");
                    actions.push(Action::Report(Report::State("fenced")));
                    self.try_stand_down(actions);
                }
                Order::GiveUp => {
                    actions.push(Action::CloseLink);
                    let reason = format!("primary {} lost before the first checkpoint: {cause}", self.primary);
                    let memory = self.options.held.memory.filter(|_| self.standing() == Standing::Idle);
                    self.finish(Outcome::Unpaired { reason, memory }, actions);
                }
                Order::Lose => {
                    actions.push(Action::CloseLink);
                    let note = format!("primary {} lost: {cause}", self.primary);
                    actions.push(Action::Report(Report::Note(note)));
                }
                Order::Record(_) => self.store_record_as(Role::Primary, self.committed, true, false, actions),
                Order::Run => self.try_take_over(actions),
                Order::Sever => actions.push(Action::CloseLink),
                Order::Stop => self.stop_for_contest(actions),
                Order::Pair => unreachable!("{order:?} is for a primary"),
            }
        }
        if !matches!(self.standing(), Standing::Fenced | Standing::Over) && self.state_name() != before {
            self.report_state(actions);
        }
    }

    fn stop_for_contest(&mut self, actions: &mut Vec<Action>) {
        match self.flight {
            // Committed: the load is finished first, and leaves the VM stopped.
            Flight::Loading(..) if !mutants::on(Mutant::TakeOverInOldState) => {}
            _ => {
                self.flight = Flight::Staging;
                self.staged_network = None;
                // The epoch that they belong to will not come: the guest gets them in the one that goes on.
                for input in core::mem::take(&mut self.later) {
                    self.deliver(input, actions);
                }
                actions.push(Action::PauseVm);
                actions.push(Action::DropStage);
            }
        }
    }

    /// Ends the run as a loser once the VM is stopped and what was committed is loaded, and durable on disk.
    pub(super) fn try_stand_down(&mut self, actions: &mut Vec<Action>) {
        let early = mutants::on(Mutant::StandDownEarly);
        if self.standing() != Standing::Fenced || !early && (!self.quiet || self.durable != self.committed) {
            return;
        }
        let memory = Tag {
            generation: self.contest.generation(),
            epoch: self.committed,
        };
        let reason = core::mem::take(&mut self.fenced);
        self.finish(Outcome::Fenced { reason, memory }, actions);
    }

    pub(super) fn recorded(&mut self, now: Instant, record: RecordUpdate, actions: &mut Vec<Action>) {
        if record.clean {
            let reason = self.leaving.take().unwrap_or(GoodbyeReason::Operator);
            actions.push(Action::CloseLink);
            return self.finish(Outcome::Ended(reason), actions);
        }
        if record.generation != self.contest.generation() || !record.complete {
            return;
        }
        if let Flight::Recording(mark) = self.flight {
            return self.commit(now, mark, actions);
        }
        if record.role == Role::Primary {
            self.contend(now, failover::Event::Recorded(record.generation), "", actions);
        }
    }

    /// Takes over once the term is won and recorded, the VM is stopped, and no load is in progress.
    pub(super) fn try_take_over(&mut self, actions: &mut Vec<Action>) {
        if self.standing() != Standing::Alone || !self.quiet || matches!(self.flight, Flight::Loading(..)) {
            return;
        }
        assert!(self.later.is_empty(), "a load delivers what came while it was done");
        self.network.lead();
        let kept = core::mem::take(&mut self.recent).into_iter();
        let kept = kept.chain(core::mem::take(&mut self.outputs));
        let leaving = |(nic, frame)| Some((nic, self.network.leaving_again(nic, frame)?));
        let outputs = kept.filter_map(leaving).collect();
        let taken = TakenOver {
            generation: self.contest.generation(),
            last_epoch: if mutants::on(Mutant::ReuseEpochAtTakeover) {
                self.committed
            } else {
                self.running
            },
            network: core::mem::replace(&mut self.network, Pictures::new(0)),
            inputs: Vec::new(),
            outputs,
        };
        self.finish(Outcome::TakenOver(Box::new(taken)), actions);
    }
}
