//! A checkpoint from its end mark to the resumption: verify, commit, load.

use super::{
    Action, Arrival, EndMark, Epoch, EpochMode, Flight, InputNumber, Instant, Message, Mutant, Secondary, Standing,
    Tag, failover, mutants,
};

impl Secondary {
    pub(super) fn end_mark(&mut self, now: Instant, mark: EndMark, actions: &mut Vec<Action>) {
        let arrival = match self.in_flight().and_then(|totals| Ok(totals.verify(&mark)?)) {
            Ok(arrival) => arrival,
            Err(error) => return self.misbehaved(now, &error.to_string(), actions),
        };
        let inputs = InputNumber(self.received.0 - self.later.len() as u64);
        let early = matches!(self.flight, Flight::Loading(..) | Flight::Halting | Flight::Comparing);
        if mark.input != inputs || early {
            return self.misbehaved(
                now,
                "its end mark names inputs that it did not send, or comes too early",
                actions,
            );
        }
        self.counters.last_shipment = (mark.pages.pages(), mark.pages.bytes());
        match arrival {
            Arrival::Complete => self.complete(mark, actions),
            Arrival::PagesMissing => self.flight = Flight::Gathering(mark),
        }
    }

    /// Pages may have been the last that the checkpoint lacked.
    pub(super) fn gathered(&mut self, now: Instant, actions: &mut Vec<Action>) {
        let Flight::Gathering(mark) = self.flight else { return };
        match self.totals.verify(&mark) {
            Ok(Arrival::Complete) => self.complete(mark, actions),
            Ok(Arrival::PagesMissing) => {}
            Err(error) => self.misbehaved(now, &error.to_string(), actions),
        }
    }

    fn complete(&mut self, mark: EndMark, actions: &mut Vec<Action>) {
        self.flight = Flight::Checking(mark);
        if mutants::on(Mutant::AcknowledgeEarly) {
            actions.push(Action::Send(Message::Acknowledge(mark.tag)));
        }
        actions.push(Action::Check(mark.tag));
    }

    pub(super) fn checked(&mut self, now: Instant, tag: Tag, result: Result<(), String>, actions: &mut Vec<Action>) {
        let Flight::Checking(mark) = self.flight else { return };
        if mark.tag != tag
            || !matches!(
                self.standing(),
                Standing::Syncing | Standing::Following | Standing::Draining { .. }
            )
        {
            return;
        }
        if let Err(reason) = result {
            return self.fail(format!("checkpoint {tag} can't be loaded here: {reason}"), actions);
        }
        if self.first && !mutants::on(Mutant::CommitUnrecorded) {
            self.flight = Flight::Recording(mark);
            self.store_record_for(tag.epoch, true, false, actions);
        } else {
            self.commit(now, mark, actions);
        }
    }

    /// The commit point: from here on a takeover is in the new state.
    pub(super) fn commit(&mut self, now: Instant, mark: EndMark, actions: &mut Vec<Action>) {
        self.committed = mark.tag.epoch;
        self.flight = Flight::Loading(mark, now);
        self.totals.advance();
        self.quiet = false;
        // What the guest sent in an execution that this checkpoint replaces must not leave.
        if !mutants::on(Mutant::KeepReplacedOutput) {
            self.outputs.clear();
            self.recent.clear();
        }
        self.contend(now, failover::Event::Committed, "", actions);
        if !mutants::on(Mutant::AcknowledgeEarly) {
            actions.push(Action::Send(Message::Acknowledge(mark.tag)));
        }
        actions.push(Action::Load(mark.tag));
    }

    pub(super) fn loaded(&mut self, now: Instant, tag: Tag, actions: &mut Vec<Action>) {
        let Flight::Loading(mark, since) = self.flight else {
            return;
        };
        assert_eq!(mark.tag, tag, "one checkpoint is loaded at a time");
        self.flight = Flight::Staging;
        self.running = tag.epoch.next();
        self.mode = mark.next;
        let network = self.staged_network.take();
        if !mutants::on(Mutant::KeepOwnNetwork) {
            self.network = network.expect("a checkpoint is committed only with its network state");
        }
        self.network.follow();
        self.consume(mark.input);
        self.inputs.loaded(mark.input);
        self.counters.checkpoints += 1;
        self.counters.last_checkpoint = Some(now);
        self.counters.last_pause = now.since(since);
        actions.push(Action::CommitDisk(tag.epoch));
        actions.push(Action::DropDeliveries);
        actions.push(Action::SeedEntropy(mark.entropy));
        for input in core::mem::take(&mut self.later) {
            self.deliver(input, actions);
        }
        self.quiet = true;
        let started = core::mem::take(&mut self.first);
        if self.standing() == Standing::Following {
            self.quiet = false;
            if self.mode == EpochMode::Lockstep {
                actions.push(Action::ResumeVm);
            }
            self.begin_own(now);
            self.confirm(actions);
            actions.push(Action::Send(Message::Loaded(tag)));
            if started {
                self.report_state(actions);
            }
        }
        self.try_take_over(actions);
    }

    pub(super) fn disk_committed(&mut self, epoch: Epoch, actions: &mut Vec<Action>) {
        self.durable = epoch;
        self.send_tagged(Message::Committed, epoch, actions);
        self.record_end(actions);
        self.try_stand_down(actions);
    }
}
