//! The primary's messages: the pairing's begin, inputs, and the parts of a checkpoint.

use super::{
    Action, Begin, DiskWrite, Epoch, Flight, Heartbeat, Input, Instant, Message, Mutant, PageBatch, PartError,
    Pictures, Report, Secondary, Standing, Totals, failover, limits, mutants,
};

impl Secondary {
    pub(super) fn peer_sent(&mut self, now: Instant, message: Message, actions: &mut Vec<Action>) {
        if !matches!(
            self.standing(),
            Standing::Idle | Standing::Syncing | Standing::Following | Standing::Draining { .. }
        ) {
            return;
        }
        self.liveness.heard(now);
        if let Message::Begin(begin) = message {
            return self.begin(now, begin, actions);
        }
        if message
            .generation()
            .is_some_and(|generation| generation != self.contest.generation())
        {
            return self.misbehaved(now, "it speaks of another generation", actions);
        }
        match message {
            Message::Heartbeat(heartbeat) => self.heartbeat(now, heartbeat, actions),
            Message::Goodbye(reason) => self.goodbye(now, reason, actions),
            Message::SyncBlock(write) if self.standing() == Standing::Syncing => {
                actions.push(Action::ApplyWrite(write))
            }
            Message::Input(input) => self.input(now, input, actions),
            Message::Write(write) => self.write(now, write, actions),
            Message::DeviceState(state) => {
                if let Err(error) = self.in_flight().and_then(|totals| Ok(totals.device_state(&state)?)) {
                    return self.misbehaved(now, &error.to_string(), actions);
                }
                actions.push(Action::StageDevices(state));
            }
            Message::NetworkState(state) => {
                if let Err(error) = self.in_flight().and_then(|totals| Ok(totals.network_state(&state)?)) {
                    return self.misbehaved(now, &error.to_string(), actions);
                }
                match Pictures::decode(&state.encoded, self.options.cards) {
                    Ok(pictures) => self.staged_network = Some(pictures),
                    Err(error) => self.misbehaved(now, &format!("its network state is broken: {error}"), actions),
                }
            }
            Message::Halt(tag) => self.halt(now, tag, actions),
            Message::PageHashes(hashes) => self.page_hashes(now, hashes, actions),
            Message::End(mark) => self.end_mark(now, *mark, actions),
            _ => self.misbehaved(
                now,
                "it sent a message that only a secondary sends, or out of order",
                actions,
            ),
        }
    }

    /// Pages of the checkpoint in flight, in no order with anything but those of the same stream.
    pub(super) fn pages_arrived(&mut self, now: Instant, stream: usize, batch: PageBatch, actions: &mut Vec<Action>) {
        if !matches!(
            self.standing(),
            Standing::Idle | Standing::Syncing | Standing::Following | Standing::Draining { .. }
        ) {
            return;
        }
        self.liveness.heard(now);
        let awaited = match self.flight {
            _ if self.standing() == Standing::Idle => Err(PartError::BeforeBegin),
            Flight::Checking(_) | Flight::Recording(_) => Err(PartError::AfterEnd),
            // What it builds on is not committed yet.
            Flight::Loading(..) => Err(PartError::BeforeLoad),
            Flight::Staging | Flight::Halting | Flight::Standing | Flight::Comparing | Flight::Gathering(_) => Ok(()),
        };
        if let Err(error) = awaited.and_then(|()| Ok(self.totals.pages(stream, &batch)?)) {
            return self.misbehaved(now, &error.to_string(), actions);
        }
        self.counters.pages += u64::from(batch.count);
        self.counters.page_bytes += batch.encoded.len() as u64;
        actions.push(
            if self.standing() == Standing::Syncing || mutants::on(Mutant::ApplyPagesEarly) {
                Action::ApplyPages(stream, batch)
            } else {
                Action::StagePages(stream, batch)
            },
        );
        self.gathered(now, actions);
    }

    /// Answers at once, which renews the primary's lease; not after the loss of a connection.
    pub(super) fn heartbeat(&mut self, now: Instant, heartbeat: Heartbeat, actions: &mut Vec<Action>) {
        if let Standing::Draining { .. } = self.standing()
            && !mutants::on(Mutant::AnswerInTheContest)
        {
            return;
        }
        if let Err(error) = self.liveness.heartbeat(now, heartbeat) {
            return self.misbehaved(now, &error.to_string(), actions);
        }
        self.beat(now, actions);
    }

    pub(super) fn beat(&mut self, now: Instant, actions: &mut Vec<Action>) {
        actions.push(Action::SendControl(Message::Heartbeat(self.liveness.beat(now))));
        self.confirm(actions);
    }

    pub(super) fn begin(&mut self, now: Instant, begin: Begin, actions: &mut Vec<Action>) {
        let Begin { tag, base } = begin;
        if self.standing() != Standing::Idle || tag.generation <= self.contest.generation() || tag.epoch.0 == 0 {
            return self.misbehaved(now, "it began a sync out of order, or in an old generation", actions);
        }
        let held = self.options.held;
        if [(base.memory, held.memory), (base.disk, held.disk)]
            .iter()
            .any(|(base, held)| base.is_some() && base != held)
        {
            return self.misbehaved(now, "it builds on a checkpoint that this side does not hold", actions);
        }
        self.contend(now, failover::Event::Begun(tag.generation), "", actions);
        self.running = tag.epoch;
        self.committed = Epoch(tag.epoch.0 - 1);
        self.durable = self.committed;
        self.totals = Totals::new(tag, base.memory.map(|tag| tag.epoch), self.options.streams);
        self.store_record(false, false, actions);
        actions.push(Action::BeginSync(begin));
        self.report_state(actions);
    }

    pub(super) fn input(&mut self, now: Instant, input: Input, actions: &mut Vec<Action>) {
        let begun = !matches!(self.standing(), Standing::Idle | Standing::Syncing);
        if !begun || input.number != self.received.next() {
            return self.misbehaved(now, "its inputs are out of order", actions);
        }
        if input.nic.index() >= self.options.cards {
            let nic = input.nic;
            let what = format!("it sent an input for {nic}, a network card that the VM does not have");
            return self.misbehaved(now, &what, actions);
        }
        // Once the primary has stopped for a checkpoint its guest may run on in the next epoch, before this side knows.
        let next = !self.later.is_empty() || matches!(self.flight, Flight::Loading(..));
        let in_order = input.tag.epoch == self.running.next() || (input.tag.epoch == self.running && !next);
        // The primary stops reading its network at the limit; what it had read before may follow.
        let ahead = input.number.0 - self.consumed.0;
        self.unconsumed.add(input.frame.len());
        let is_much = ahead > 2 * limits::INPUTS_UNCONFIRMED_MAX
            || self.unconsumed.bytes() > 2 * limits::INPUT_BYTES_UNCONFIRMED_MAX;
        if !in_order || is_much {
            return self.misbehaved(now, "its inputs are of another epoch, or too many", actions);
        }
        self.received = input.number;
        if input.tag.epoch == self.running {
            self.deliver(input, actions);
        } else {
            self.later.push(input);
        }
    }

    pub(super) fn deliver(&mut self, input: Input, actions: &mut Vec<Action>) {
        let mut delivery = self.network.arriving(input.nic, input.frame);
        delivery.number = Some(input.number);
        self.inputs.delivered(input.nic, input.number);
        actions.push(Action::Deliver(delivery));
    }

    pub(super) fn write(&mut self, now: Instant, write: DiskWrite, actions: &mut Vec<Action>) {
        // The end mark is no end of them: the primary's guest may run in the next epoch already.
        let ended = matches!(
            self.flight,
            Flight::Gathering(_) | Flight::Checking(_) | Flight::Recording(_)
        );
        let counted = match self.standing() {
            Standing::Idle => Err(PartError::BeforeBegin),
            _ if ended && write.tag.epoch == self.running => Err(PartError::AfterEnd),
            _ => self.totals.write(&write).map_err(PartError::Staging),
        };
        if let Err(error) = counted {
            return self.misbehaved(now, &error.to_string(), actions);
        }
        actions.push(if self.standing() == Standing::Syncing {
            Action::ApplyWrite(write)
        } else {
            Action::StageWrite(write)
        });
    }

    /// Returns the sums of the checkpoint in flight, if parts of it other than pages may arrive now.
    pub(super) fn in_flight(&mut self) -> Result<&mut Totals, PartError> {
        match self.flight {
            _ if self.standing() == Standing::Idle => Err(PartError::BeforeBegin),
            Flight::Staging | Flight::Halting | Flight::Standing | Flight::Comparing | Flight::Loading(..) => {
                Ok(&mut self.totals)
            }
            Flight::Gathering(_) | Flight::Checking(_) | Flight::Recording(_) => Err(PartError::AfterEnd),
        }
    }

    /// The peer broke the protocol: its connections are closed, and it counts as lost.
    pub(super) fn misbehaved(&mut self, now: Instant, what: &str, actions: &mut Vec<Action>) {
        actions.push(Action::Report(Report::Alarm(format!(
            "the primary broke the protocol: {what}"
        ))));
        let event = failover::Event::Misbehaved {
            leased_until: self.liveness.suspect_at(),
        };
        self.contend(now, event, "it broke the protocol", actions);
    }
}
