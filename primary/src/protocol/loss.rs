//! The loss of the secondary: who goes on, decided by the witness.

use super::{
    Action, CLAIM_RETRY, Generation, Instant, Mode, Mutant, Outcome, Primary, RecordUpdate, Report, State,
    WitnessAnswer, mutants,
};

impl Primary {
    pub(super) fn link_lost(&mut self, now: Instant, cause: &str, actions: &mut Vec<Action>) {
        if self.liveness.take().is_none() {
            return;
        }
        let peer = self.peer.take().unwrap_or_default();
        actions.push(Action::CloseLink);
        actions.push(Action::Report(Report::Note(format!("secondary {peer} lost: {cause}"))));
        if let State::Sending { tag, .. } | State::Awaiting { tag, .. } = self.state {
            if mutants::on(Mutant::ReuseEpoch) {
                self.epoch = tag.epoch;
            }
            if self.comparator.mode() == Mode::Comparing {
                self.comparator.abandon();
            }
            self.changed.reopen();
            actions.push(Action::KeepDirty);
        }
        self.input = self.confirmed;
        self.hold_input(actions);
        if self.peer_entitled {
            self.contend(actions)
        } else {
            self.go_alone(now, actions)
        }
    }

    pub(super) fn contend(&mut self, actions: &mut Vec<Action>) {
        let term = self.generation.next();
        actions.push(Action::PauseVm);
        self.state = State::Contending {
            term,
            retry: None,
            won: false,
        };
        if self.options.witness {
            actions.push(Action::Claim(term));
        } else {
            self.contest_won(term, actions);
        }
        self.report_state(actions);
    }

    pub(super) fn contest_won(&mut self, term: Generation, actions: &mut Vec<Action>) {
        self.generation = term;
        self.state = State::Contending {
            term,
            retry: None,
            won: true,
        };
        self.store_record(false, actions);
    }

    pub(super) fn go_alone(&mut self, now: Instant, actions: &mut Vec<Action>) {
        self.state = State::Alone;
        self.peer_entitled = false;
        self.comparator.release_all(&mut self.verdicts);
        self.act_on_verdicts(now, actions);
        self.report_state(actions);
        actions.push(Action::SeedEntropy(None));
        if self.ending.is_some() {
            // The VM stands since the loss, or is about to.
            actions.push(Action::PauseVm);
            return;
        }
        actions.push(Action::ResumeVm);
        actions.push(Action::Dial);
    }

    pub(super) fn witness_answered(
        &mut self,
        now: Instant,
        term: Generation,
        answer: WitnessAnswer,
        actions: &mut Vec<Action>,
    ) {
        if term <= self.generation {
            return;
        }
        if !matches!(answer, WitnessAnswer::Unreachable(_)) {
            self.witness_alarmed = false;
        }
        match answer {
            // Whatever this side has come to meanwhile: the VM is the other's.
            WitnessAnswer::LostTo(owner) => self.fenced(&owner, term, actions),
            WitnessAnswer::Won => match self.state {
                State::Pairing { won: false, .. } => self.pairing_won(term, actions),
                State::Contending { won: false, .. } => self.contest_won(term, actions),
                // A pairing that ended before the witness answered: the term is still this side's.
                _ => self.generation = term,
            },
            WitnessAnswer::Unreachable(cause) => self.witness_unreachable(now, &cause, actions),
        }
    }

    pub(super) fn witness_unreachable(&mut self, now: Instant, cause: &str, actions: &mut Vec<Action>) {
        match self.state {
            State::Pairing { won: false, .. } => {
                self.alarm_witness(cause, actions);
                self.link_lost(now, "the witness can't be asked for the pairing's term", actions);
            }
            State::Contending { term, won: false, .. } => {
                self.alarm_witness(cause, actions);
                self.state = State::Contending {
                    term,
                    retry: Some(now + CLAIM_RETRY),
                    won: false,
                };
            }
            _ => {}
        }
    }

    /// Once in each outage: the claim is repeated many times.
    pub(super) fn alarm_witness(&mut self, cause: &str, actions: &mut Vec<Action>) {
        if !core::mem::replace(&mut self.witness_alarmed, true) {
            actions.push(Action::Report(Report::Alarm(format!("witness unreachable: {cause}"))));
        }
    }

    pub(super) fn fenced(&mut self, owner: &str, term: Generation, actions: &mut Vec<Action>) {
        actions.push(Action::PauseVm);
        actions.push(Action::CloseLink);
        let reason = format!("{owner} owns the VM since term {term}: this side's VM and its output are stopped");
        actions.push(Action::Report(Report::State("fenced")));
        self.finish(Outcome::Fenced(reason), actions);
    }

    pub(super) fn recorded(&mut self, now: Instant, record: RecordUpdate, actions: &mut Vec<Action>) {
        if record.clean {
            return self.goodbye(actions);
        }
        if record.generation != self.generation {
            return;
        }
        match self.state {
            State::Pairing { won: true, .. } => self.begin_sync(actions),
            State::Contending { won: true, .. } => self.go_alone(now, actions),
            _ => {}
        }
    }
}
