//! The loss of the primary: read the link to its end, wait for the lease, win the witness, take over.

use super::{
    Action, CLAIM_RETRY, Claim, Flight, Generation, GoodbyeReason, Instant, LinkEnd, Mutant, Outcome, RecordUpdate,
    Report, Role, Secondary, State, TakenOver, WitnessAnswer, mutants,
};

impl Secondary {
    pub(super) fn closed(&mut self, end: &LinkEnd, data: bool, actions: &mut Vec<Action>) {
        if self.leaving.is_some() {
            return;
        }
        let (until, ended, open) = match self.state {
            // A goodbye may still come on the control connection, whose end follows.
            State::Idle | State::Syncing if data => return,
            State::Idle | State::Syncing => return self.link_lost(&end.to_string(), actions),
            State::Following => {
                actions.push(Action::Report(Report::Note(format!(
                    "a connection of primary {} is gone: {end}",
                    self.primary
                ))));
                (self.liveness.suspect_at(), false, [true; 2])
            }
            State::Draining { until, ended, open } => (until, ended, open),
            State::Severed { .. } | State::Contending { .. } | State::Over => return,
        };
        let ended = ended || *end == LinkEnd::PeerEnded;
        let open = if data { [open[0], false] } else { [false, open[1]] };
        self.state = State::Draining { until, ended, open };
        if ended && open == [false; 2] {
            self.link_lost(&end.to_string(), actions);
        }
    }

    /// Nothing more comes from the primary, and it lets nothing more out: its state is final.
    pub(super) fn link_lost(&mut self, cause: &str, actions: &mut Vec<Action>) {
        if self.leaving.is_some() {
            return;
        }
        match self.state {
            State::Idle | State::Syncing => {
                actions.push(Action::CloseLink);
                let reason = format!("primary {} lost before the first checkpoint: {cause}", self.primary);
                self.finish(Outcome::Unpaired(reason), actions);
            }
            State::Following | State::Draining { .. } | State::Severed { .. } => {
                actions.push(Action::CloseLink);
                actions.push(Action::Report(Report::Note(format!(
                    "primary {} lost: {cause}",
                    self.primary
                ))));
                self.contend(actions);
            }
            State::Contending { .. } | State::Over => {}
        }
    }

    pub(super) fn contend(&mut self, actions: &mut Vec<Action>) {
        let term = self.generation.next();
        self.state = State::Contending {
            term,
            retry: None,
            claim: Claim::Open,
        };
        if self.options.witness {
            actions.push(Action::Claim(term));
        } else {
            actions.push(Action::Report(Report::Alarm(
                "no witness is configured: once the old primary is off for good, run `tandem takeover --old-primary-is-off`"
                    .to_owned(),
            )));
        }
        match self.flight {
            // Committed: the load is finished first, and leaves the VM stopped.
            Flight::Loading(..) if !mutants::on(Mutant::TakeOverInOldState) => {}
            _ => {
                self.flight = Flight::Staging;
                self.staged_network = None;
                actions.push(Action::PauseVm);
                actions.push(Action::DropStage);
            }
        }
        self.report_state(actions);
    }

    pub(super) fn take_over_asked(&mut self, actions: &mut Vec<Action>) {
        if let State::Draining { .. } | State::Severed { .. } = self.state {
            self.link_lost("the operator says that it is off", actions);
        }
        if let State::Contending {
            term,
            claim: Claim::Open,
            ..
        } = self.state
        {
            self.won(term, actions);
        }
    }

    pub(super) fn witness_answered(
        &mut self,
        now: Instant,
        term: Generation,
        answer: WitnessAnswer,
        actions: &mut Vec<Action>,
    ) {
        let State::Contending {
            term: asked,
            claim: Claim::Open,
            ..
        } = self.state
        else {
            return;
        };
        if asked != term {
            return;
        }
        match answer {
            WitnessAnswer::Won => self.won(term, actions),
            WitnessAnswer::LostTo(owner) => {
                let reason =
                    format!("{owner} owns the VM since term {term}: this side's VM and its output are stopped");
                actions.push(Action::Report(Report::State("fenced")));
                self.finish(Outcome::Fenced(reason), actions);
            }
            WitnessAnswer::Unreachable(cause) => {
                // Once in each outage: the claim is repeated many times.
                if !core::mem::replace(&mut self.witness_alarmed, true) {
                    actions.push(Action::Report(Report::Alarm(format!("witness unreachable: {cause}"))));
                }
                self.state = State::Contending {
                    term,
                    retry: Some(now + CLAIM_RETRY),
                    claim: Claim::Open,
                };
            }
        }
    }

    pub(super) fn won(&mut self, term: Generation, actions: &mut Vec<Action>) {
        self.state = State::Contending {
            term,
            retry: None,
            claim: Claim::Won,
        };
        self.generation = term;
        actions.push(Action::StoreRecord(RecordUpdate {
            generation: term,
            role: Role::Primary,
            committed: self.committed,
            complete: true,
            clean: false,
        }));
        self.report_state(actions);
    }

    pub(super) fn recorded(&mut self, now: Instant, record: RecordUpdate, actions: &mut Vec<Action>) {
        if record.clean {
            let reason = self.leaving.take().unwrap_or(GoodbyeReason::Operator);
            actions.push(Action::CloseLink);
            return self.finish(Outcome::Ended(reason), actions);
        }
        if record.generation != self.generation || !record.complete {
            return;
        }
        if let Flight::Recording(mark) = self.flight {
            return self.commit(now, mark, actions);
        }
        if let State::Contending {
            term,
            claim: Claim::Won,
            ..
        } = self.state
        {
            self.state = State::Contending {
                term,
                retry: None,
                claim: Claim::Recorded,
            };
            self.try_take_over(actions);
        }
    }

    /// Takes over once the term is won and recorded, the VM is stopped, and no load is in progress.
    pub(super) fn try_take_over(&mut self, actions: &mut Vec<Action>) {
        let State::Contending {
            claim: Claim::Recorded, ..
        } = self.state
        else {
            return;
        };
        if !self.quiet || matches!(self.flight, Flight::Loading(..)) {
            return;
        }
        assert!(self.later.is_empty(), "a load delivers what came while it was done");
        let taken = TakenOver {
            generation: self.generation,
            last_epoch: if mutants::on(Mutant::ReuseEpochAtTakeover) {
                self.committed
            } else {
                self.running
            },
            network: core::mem::take(&mut self.network),
            inputs: Vec::new(),
            outputs: core::mem::take(&mut self.recent)
                .into_iter()
                .chain(core::mem::take(&mut self.outputs))
                .collect(),
        };
        self.finish(Outcome::TakenOver(Box::new(taken)), actions);
    }
}
