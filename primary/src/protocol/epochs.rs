//! A checkpoint from its trigger to its commit: stop, ship, await, release.

use super::{
    Action, Ahead, Alike, EpochMode, Instant, Message, Mutant, NetworkState, Primary, Report, Resume, Shipment, State,
    Tag, Taken, Totals, Trigger, failover, mutants,
};

impl Primary {
    pub(super) fn trigger(&mut self, now: Instant, trigger: Trigger, actions: &mut Vec<Action>) {
        if self.ending.is_some() {
            return;
        }
        match self.state {
            State::Protected { .. } => self.stop_when_loaded(now, trigger, actions),
            // The guest runs in the next epoch already, and that one is to end too.
            State::Sending(taken) | State::Awaiting(taken) if taken.resumed => self.want(trigger),
            _ => {}
        }
    }

    pub(super) fn want(&mut self, trigger: Trigger) {
        self.wanted = self.wanted.or(Some(trigger));
    }

    /// A checkpoint is taken only on top of one that the secondary has loaded.
    pub(super) fn stop_when_loaded(&mut self, now: Instant, trigger: Trigger, actions: &mut Vec<Action>) {
        if self.peer_loaded {
            self.stop_for(now, trigger, actions);
        } else {
            self.want(trigger);
        }
    }

    pub(super) fn peer_has_loaded(&mut self, now: Instant, tag: Tag, actions: &mut Vec<Action>) {
        if tag.epoch != self.committed || self.peer_loaded || !matches!(self.state, State::Protected { .. }) {
            return self.misbehaved(now, "it loaded a checkpoint that it had not acknowledged", actions);
        }
        self.peer_loaded = true;
        self.comparators.loaded(now, tag.epoch);
        self.begin_ahead(now);
        if let Some((asked, difference)) = self.loading.take() {
            self.policy.checkpointed(now.since(asked), difference);
        }
        if let Some(trigger) = self.wanted.take() {
            self.stop_for(now, trigger, actions);
        }
    }

    pub(super) fn stop_for(&mut self, now: Instant, trigger: Trigger, actions: &mut Vec<Action>) {
        if mutants::on(Mutant::SwitchAtTheTrigger) && trigger != Trigger::Sync {
            self.epoch_mode = self.next_mode(now, trigger, actions);
        }
        self.state = State::Stopping { trigger, asked: now };
        actions.push(Action::PauseVm);
    }

    pub(super) fn paused(&mut self, now: Instant, actions: &mut Vec<Action>) {
        match self.state {
            State::Stopping { trigger, asked } => self.stopped(now, trigger, asked, actions),
            State::Alone | State::Pairing | State::Syncing { .. } => self.record_end(actions),
            _ => {}
        }
    }

    /// Epoch *n* is over; what the guest does next is *n* + 1.
    pub(super) fn stopped(&mut self, now: Instant, trigger: Trigger, asked: Instant, actions: &mut Vec<Action>) {
        let tag = self.tag();
        let blocks = if trigger == Trigger::Sync {
            self.changed.running_blocks().iter().collect()
        } else {
            Vec::new()
        };
        let both_ran = trigger != Trigger::Sync && self.epoch_mode == EpochMode::Lockstep;
        let difference = self.epoch_mode == EpochMode::Lockstep
            && matches!(trigger, Trigger::Mismatch | Trigger::Unmatched | Trigger::Period);
        let next = self.next_mode(now, trigger, actions);
        if trigger != Trigger::Sync {
            let stopped = self.comparators.stop(next);
            assert_eq!(
                stopped, tag.epoch,
                "the comparators and the protocol are in the same epoch"
            );
        }
        self.keep_network(actions);
        self.changed.close(tag);
        self.epoch = self.epoch.next();
        self.epoch_mode = next;
        self.write_bytes = 0;
        self.is_full = false;
        let totals = Totals::new(self.tag(), Some(tag.epoch), self.streams);
        let totals = core::mem::replace(&mut self.totals, totals);
        self.wanted = None;
        self.state = State::Copying(Taken {
            trigger,
            asked,
            tag,
            next,
            difference,
            input: self.input,
            resumed: false,
            predicted: self.predictor.predict(self.ahead.expected),
            pages: 0,
            alike: Alike::Unasked,
        });
        actions.push(Action::SendCheckpoint {
            tag,
            blocks,
            totals,
            both_ran,
        });
    }

    /// Keeps the network's state of this moment for the checkpoint; tells when it begins to lack connections.
    fn keep_network(&mut self, actions: &mut Vec<Action>) {
        let snapshot = self.network.encode();
        let before = core::mem::replace(&mut self.network_left_out, snapshot.left_out);
        if before == 0 && snapshot.left_out > 0 {
            actions.push(Action::Report(Report::Alarm(format!(
                "a checkpoint has no room for all translated TCP connections: {} of them, those that were used \
                 longest ago, would not survive a takeover",
                snapshot.left_out
            ))));
        }
        self.network_at_stop = snapshot.encoded.into();
    }

    /// What is to be shipped of the VM no longer depends on it.
    pub(super) fn copied(&mut self, now: Instant, tag: Tag, pages: u64, entropy: [u8; 32], actions: &mut Vec<Action>) {
        let State::Copying(mut taken) = self.state else { return };
        if taken.tag != tag {
            return;
        }
        taken.pages = pages;
        actions.push(Action::SeedEntropy(Some(entropy)));
        taken.resumed =
            self.options.resume == Resume::AfterCopy && taken.trigger != Trigger::Sync && self.ending.is_none();
        if taken.resumed {
            self.paused_for(now.since(taken.asked), &taken);
            self.began = now;
            self.begin_flight(now);
            actions.push(Action::ResumeVm);
        }
        self.state = State::Sending(taken);
        if mutants::on(Mutant::ReleaseAtTheCopy) && taken.trigger != Trigger::Sync {
            self.comparators.commit(now, tag.epoch);
            self.act_on_verdicts(now, actions);
        }
    }

    pub(super) fn checkpoint_sent(&mut self, now: Instant, shipment: Shipment, actions: &mut Vec<Action>) {
        let State::Sending(taken) = self.state else { return };
        let tag = taken.tag;
        assert!(
            !taken.alike.is_open(),
            "a checkpoint is sent after the answer about its pages"
        );
        let mut totals = shipment.totals;
        if totals.tag() != tag {
            return;
        }
        let ahead = if self.ahead.tag == tag {
            self.ahead
        } else {
            Ahead::default()
        };
        assert!(
            taken.trigger == Trigger::Sync || totals.pages_counted() == ahead.pages + shipment.pages,
            "the end mark counts what was queued, ahead and at the stop"
        );
        // From here on the secondary may contend.
        if taken.trigger != Trigger::Sync || !mutants::on(Mutant::EntitleLate) {
            self.contend(now, failover::Event::CheckpointSent, "", actions);
        }
        let network = NetworkState {
            tag,
            encoded: core::mem::take(&mut self.network_at_stop),
        };
        totals
            .network_state(&network)
            .expect("the network's state is counted once");
        actions.push(Action::Send(Message::NetworkState(network)));
        let mark = totals.mark(taken.input, taken.next, shipment.entropy);
        actions.push(Action::Send(Message::End(Box::new(mark))));
        self.memory_known.sent(tag);
        self.disk_known.sent(tag);
        self.counters.pages += shipment.pages;
        self.counters.page_bytes += shipment.bytes;
        self.state = State::Awaiting(taken);
        if mutants::on(Mutant::ReleaseBeforeAcknowledgement) {
            self.comparators.commit(now, tag.epoch);
            self.act_on_verdicts(now, actions);
        }
    }

    pub(super) fn acknowledged(&mut self, now: Instant, tag: Tag, actions: &mut Vec<Action>) {
        let State::Awaiting(taken) = self.state else {
            return self.misbehaved(now, "it acknowledged a checkpoint that was not sent", actions);
        };
        if tag != taken.tag && !mutants::on(Mutant::AcceptOldEpoch) {
            return self.misbehaved(now, "it acknowledged another checkpoint than the one sent", actions);
        }
        let tag = taken.tag;
        self.committed = tag.epoch;
        self.memory_known.forget_before(tag);
        if mutants::on(Mutant::ClearChangedOnAcknowledgement) {
            self.changed.clear_committed(tag);
        }
        *self.counters.checkpoints.entry(taken.trigger).or_default() += 1;
        self.counters.last_checkpoint = Some(now);
        self.peer_loaded = false;
        // The first one of a pairing has all that was written during the sync: it says nothing of others.
        self.loading = (taken.trigger != Trigger::Sync).then_some((taken.asked, taken.difference));
        self.state = State::Protected {
            since: now,
            stands: !taken.resumed && self.ending.is_some(),
        };
        if !taken.resumed {
            self.paused_for(now.since(taken.asked), &taken);
            self.began = now;
            self.begin_flight(now);
            if self.ending.is_none() {
                actions.push(Action::ResumeVm);
            }
        } else if self.ending.is_some() {
            // What the guest has done since the stop is to be in the last checkpoint.
            self.stop_when_loaded(now, Trigger::Admin, actions);
        }
        if taken.trigger == Trigger::Sync {
            self.comparators.protect(self.epoch, self.epoch_mode);
            self.report_sync(actions);
        } else {
            self.comparators.commit(now, tag.epoch);
        }
        self.act_on_verdicts(now, actions);
        self.report_state(actions);
    }

    pub(super) fn peer_committed(&mut self, now: Instant, tag: Tag, actions: &mut Vec<Action>) {
        if tag.epoch > self.committed || !self.protected() {
            return self.misbehaved(now, "it committed a checkpoint that it had not acknowledged", actions);
        }
        self.changed.clear_committed(tag);
        self.disk_known.forget_before(tag);
        // The last checkpoint of a run leaves the VM stopped; with its disk epoch durable, both images are equal.
        if tag.epoch == self.committed && matches!(self.state, State::Protected { stands: true, .. }) {
            self.record_end(actions);
        }
    }
}
