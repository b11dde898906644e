//! The primary's messages: the pairing's begin, inputs, and the parts of a checkpoint.

use super::{
    Action, DiskWrite, Epoch, Flight, Heartbeat, Input, Instant, Message, Mutant, NetworkPicture, PartError, Report,
    Secondary, State, Tag, Totals, limits, mutants,
};

impl Secondary {
    pub(super) fn peer_sent(&mut self, now: Instant, message: Message, actions: &mut Vec<Action>) {
        if self.leaving.is_some()
            || !matches!(
                self.state,
                State::Idle | State::Syncing | State::Following | State::Draining { .. }
            )
        {
            return;
        }
        self.liveness.heard(now);
        if let Message::Begin(tag) = message {
            return self.begin(tag, actions);
        }
        if message
            .generation()
            .is_some_and(|generation| generation != self.generation)
        {
            return self.misbehaved("it speaks of another generation", actions);
        }
        match message {
            Message::Heartbeat(heartbeat) => self.heartbeat(now, heartbeat, actions),
            Message::Goodbye(reason) => self.goodbye(reason, actions),
            Message::SyncBlock(write) if self.state == State::Syncing => actions.push(Action::ApplyWrite(write)),
            Message::Input(input) => self.input(input, actions),
            Message::Write(write) => self.write(write, actions),
            Message::Pages(batch) => {
                if let Err(error) = self.in_flight().and_then(|totals| Ok(totals.pages(&batch)?)) {
                    return self.misbehaved(&error.to_string(), actions);
                }
                self.counters.pages += u64::from(batch.count);
                self.counters.page_bytes += batch.encoded.len() as u64;
                actions.push(
                    if self.state == State::Syncing || mutants::on(Mutant::ApplyPagesEarly) {
                        Action::ApplyPages(batch)
                    } else {
                        Action::StagePages(batch)
                    },
                );
            }
            Message::DeviceState(state) => {
                if let Err(error) = self.in_flight().and_then(|totals| Ok(totals.device_state(&state)?)) {
                    return self.misbehaved(&error.to_string(), actions);
                }
                actions.push(Action::StageDevices(state));
            }
            Message::NetworkState(state) => {
                if let Err(error) = self.in_flight().and_then(|totals| Ok(totals.network_state(&state)?)) {
                    return self.misbehaved(&error.to_string(), actions);
                }
                match NetworkPicture::decode(&state.encoded) {
                    Ok(picture) => self.staged_network = Some(picture),
                    Err(error) => self.misbehaved(&format!("its network state is broken: {error}"), actions),
                }
            }
            Message::End(mark) => self.end_mark(mark, actions),
            _ => self.misbehaved(
                "it sent a message that only a secondary sends, or out of order",
                actions,
            ),
        }
    }

    /// Answers at once, which renews the primary's lease; not after the loss of a connection.
    pub(super) fn heartbeat(&mut self, now: Instant, heartbeat: Heartbeat, actions: &mut Vec<Action>) {
        if let State::Draining { .. } = self.state {
            return;
        }
        if let Err(error) = self.liveness.heartbeat(now, heartbeat) {
            return self.misbehaved(&error.to_string(), actions);
        }
        self.beat(now, actions);
    }

    pub(super) fn beat(&mut self, now: Instant, actions: &mut Vec<Action>) {
        actions.push(Action::SendControl(Message::Heartbeat(self.liveness.beat(now))));
        self.confirm(actions);
    }

    pub(super) fn begin(&mut self, tag: Tag, actions: &mut Vec<Action>) {
        if self.state != State::Idle || tag.generation <= self.generation || tag.epoch.0 == 0 {
            return self.misbehaved("it began a sync out of order, or in an old generation", actions);
        }
        self.generation = tag.generation;
        self.running = tag.epoch;
        self.committed = Epoch(tag.epoch.0 - 1);
        self.durable = self.committed;
        self.state = State::Syncing;
        self.totals = Totals::new(tag, None);
        self.store_record(false, false, actions);
        actions.push(Action::SendBlockHashes(tag));
        self.report_state(actions);
    }

    pub(super) fn input(&mut self, input: Input, actions: &mut Vec<Action>) {
        let begun = !matches!(self.state, State::Idle | State::Syncing);
        if !begun || input.number != self.received.next() {
            return self.misbehaved("its inputs are out of order", actions);
        }
        let loading = matches!(self.flight, Flight::Loading(..));
        let due = if loading { self.running.next() } else { self.running };
        // The primary stops reading its network at the limit; what it had read before may follow.
        let ahead = input.number.0 - self.consumed.0;
        if input.tag.epoch != due || ahead > 2 * limits::INPUTS_UNCONFIRMED_MAX {
            return self.misbehaved("its inputs are of another epoch, or too many", actions);
        }
        self.received = input.number;
        if loading {
            self.later.push(input);
        } else {
            self.deliver(input, actions);
        }
    }

    pub(super) fn deliver(&mut self, input: Input, actions: &mut Vec<Action>) {
        let mut delivery = self.network.arriving(input.frame);
        delivery.number = Some(input.number);
        actions.push(Action::Deliver(delivery));
    }

    pub(super) fn write(&mut self, write: DiskWrite, actions: &mut Vec<Action>) {
        if let Err(error) = self.in_flight().and_then(|totals| Ok(totals.write(&write)?)) {
            return self.misbehaved(&error.to_string(), actions);
        }
        actions.push(if self.state == State::Syncing {
            Action::ApplyWrite(write)
        } else {
            Action::StageWrite(write)
        });
    }

    /// Returns the sums of the checkpoint in flight, if parts of it may arrive now.
    pub(super) fn in_flight(&mut self) -> Result<&mut Totals, PartError> {
        match self.flight {
            _ if self.state == State::Idle => Err(PartError::BeforeBegin),
            Flight::Staging | Flight::Loading(..) => Ok(&mut self.totals),
            Flight::Checking(_) | Flight::Recording(_) => Err(PartError::AfterEnd),
        }
    }

    /// The peer broke the protocol: its connections are closed, and it counts as lost.
    pub(super) fn misbehaved(&mut self, what: &str, actions: &mut Vec<Action>) {
        actions.push(Action::Report(Report::Alarm(format!(
            "the primary broke the protocol: {what}"
        ))));
        let until = match self.state {
            State::Following => self.liveness.suspect_at(),
            State::Draining {
                until, ended: false, ..
            } => until,
            _ => return self.link_lost("it broke the protocol", actions),
        };
        actions.push(Action::CloseLink);
        self.state = State::Severed { until };
        self.report_state(actions);
    }
}
