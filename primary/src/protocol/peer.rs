//! The secondary: pairing with it, the initial sync, and its messages.

use super::{
    Action, BlockHashes, ChangedBlocks, Epoch, InputNumber, Instant, Liveness, Message, Primary, Report, Shipment,
    State, Tag, Totals, Trigger, Welcome, failover,
};

impl Primary {
    pub(super) fn connected(&mut self, now: Instant, welcome: Welcome, actions: &mut Vec<Action>) {
        if self.state != State::Alone || self.ending.is_some() {
            actions.push(Action::CloseLink);
            return;
        }
        self.peer = Some(welcome.node);
        self.liveness = Some(Liveness::new(self.options.takeover_limit, now));
        self.state = State::Pairing;
        self.contend(now, failover::Event::Connected, "", actions);
        self.report_state(actions);
    }

    pub(super) fn begin_sync(&mut self, actions: &mut Vec<Action>) {
        if self.ending.is_some() {
            return;
        }
        let common = Tag {
            generation: self.contest.generation(),
            epoch: Epoch(self.epoch.0 - 1),
        };
        self.changed = ChangedBlocks::new(self.options.disk_bytes, common);
        self.totals = Totals::new(self.tag(), None);
        self.hashed = 0;
        self.write_bytes = 0;
        self.input = InputNumber(0);
        self.confirmed = InputNumber(0);
        self.state = State::Syncing {
            disk: false,
            memory: false,
        };
        let tag = self.tag();
        actions.push(Action::Send(Message::Begin(tag)));
        actions.push(Action::SyncMemory(self.totals.clone()));
    }

    pub(super) fn synced(&mut self, now: Instant, shipment: Option<Shipment>, actions: &mut Vec<Action>) {
        let State::Syncing { disk, memory } = self.state else {
            return;
        };
        if self.ending.is_some() {
            return;
        }
        let (disk, memory) = (disk || shipment.is_none(), memory || shipment.is_some());
        self.state = State::Syncing { disk, memory };
        if let Some(shipment) = shipment {
            self.counters.pages += shipment.pages;
            self.counters.page_bytes += shipment.bytes;
            self.totals = shipment.totals;
        }
        if disk && memory {
            self.stop_for(now, Trigger::Sync, actions);
        }
    }

    /// Hashes come in order and once each, so that the last of them ends the comparison.
    pub(super) fn hashes_arrived(&mut self, now: Instant, hashes: BlockHashes, actions: &mut Vec<Action>) {
        let blocks = storage::verify::block_count(self.options.disk_bytes);
        let end = hashes.first.saturating_add(hashes.hashes.len() as u64);
        let wanted = matches!(self.state, State::Syncing { disk: false, .. }) && hashes.tag == self.tag();
        if !wanted || hashes.first != self.hashed || end > blocks {
            return self.misbehaved(now, "its block hashes are out of order", actions);
        }
        self.hashed = end;
        actions.push(Action::CompareBlocks(hashes));
    }

    pub(super) fn peer_sent(&mut self, now: Instant, message: Message, actions: &mut Vec<Action>) {
        let Some(liveness) = &mut self.liveness else { return };
        liveness.heard(now);
        if let Some(generation) = message.generation()
            && generation != self.contest.generation()
        {
            return self.misbehaved(now, "it speaks of another generation", actions);
        }
        match message {
            Message::Heartbeat(heartbeat) => {
                if let Err(error) = liveness.heartbeat(now, heartbeat) {
                    self.misbehaved(now, &error.to_string(), actions);
                }
            }
            Message::Goodbye(reason) => {
                let cause = format!("it said goodbye: {reason}");
                self.link_lost(now, failover::Event::Goodbye, &cause, actions);
            }
            Message::BlockHashes(hashes) => self.hashes_arrived(now, hashes, actions),
            Message::Output(output) if self.protected() => {
                self.comparator
                    .secondary_output(now, output.tag.epoch, output.frame, &mut self.verdicts);
                self.act_on_verdicts(now, actions);
            }
            Message::Confirm(_, number) if number <= self.input && number >= self.confirmed => {
                self.confirmed = number;
                self.hold_input(actions);
            }
            Message::Want(_) => self.trigger(now, Trigger::Limit, actions),
            Message::Acknowledge(tag) => self.acknowledged(now, tag, actions),
            Message::Loaded(tag) => self.peer_has_loaded(now, tag, actions),
            Message::Committed(tag) => self.peer_committed(now, tag, actions),
            Message::Output(_) => {}
            _ => self.misbehaved(now, "it sent a message that only a primary sends", actions),
        }
    }

    /// The peer broke the protocol: its connections are closed, and it counts as lost.
    pub(super) fn misbehaved(&mut self, now: Instant, what: &str, actions: &mut Vec<Action>) {
        actions.push(Action::Report(Report::Alarm(format!(
            "the secondary broke the protocol: {what}"
        ))));
        self.link_lost(now, failover::Event::Lost, "it broke the protocol", actions);
    }

    pub(super) fn beat(&mut self, now: Instant, actions: &mut Vec<Action>) {
        let Some(liveness) = &mut self.liveness else { return };
        if liveness.is_suspect(now) {
            let limit = self.options.takeover_limit;
            let cause = format!("silent for more than {limit}");
            return self.link_lost(now, failover::Event::Lost, &cause, actions);
        }
        if liveness.heartbeat_due() <= now {
            actions.push(Action::SendControl(Message::Heartbeat(liveness.beat(now))));
        }
    }
}
