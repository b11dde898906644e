//! The secondary: pairing with it, and its messages.

use super::{Action, Instant, Liveness, Message, Output, Place, Primary, Report, State, Trigger, Welcome, failover};

impl Primary {
    pub(super) fn connected(&mut self, now: Instant, welcome: Welcome, actions: &mut Vec<Action>) {
        if self.state != State::Alone || self.ending.is_some() {
            actions.push(Action::CloseLink);
            return;
        }
        self.peer = Some(welcome.node);
        self.held = welcome.held;
        // Judged in the handshake.
        self.streams = welcome.streams as usize;
        self.liveness = Some(Liveness::new(self.options.takeover_limit, now));
        self.state = State::Pairing;
        self.contend(now, failover::Event::Connected, "", actions);
        self.report_state(actions);
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
                let Output { tag, nic, frame } = output;
                if nic.index() >= self.comparators.count() {
                    let what = format!("it sent output on {nic}, a network card that the VM does not have");
                    return self.misbehaved(now, &what, actions);
                }
                let comment = || format!("sent in epoch {}", tag.epoch);
                self.seen.see(now, nic, &frame, Place::Secondary, comment);
                self.comparators.secondary_output(now, nic, tag.epoch, frame);
                self.act_on_verdicts(now, actions);
            }
            Message::Confirm(_, number) if number <= self.input && number >= self.confirmed => {
                self.unconfirmed.settle(number.0 - self.confirmed.0);
                self.confirmed = number;
                self.hold_input(actions);
            }
            Message::Want(_) => self.trigger(now, Trigger::Limit, actions),
            Message::Halted(tag) => self.peer_halted(now, tag, actions),
            Message::PageMatches(matches) => self.matches_arrived(now, matches, actions),
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
