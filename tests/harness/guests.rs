//! The guests' turns on both hosts, and the clients': what they send goes to the protocols and to the wires.

use bytes::Bytes;
use checkpoint::EpochMode;
use checkpoint::pair::Delivery;
use checkpoint::wire::Written;
use primary::event::Event as PrimaryEvent;
use secondary::event::Event as SecondaryEvent;

use crate::checkers::Checkers;
use crate::node::{Node, Role};
use crate::ops::KEYS;
use crate::packet;
use crate::toy_vm::{Effect, ToyVm, value_on_disk};
use crate::world::{Happening, MILLISECOND, World};

/// One frame in so many is lost between a client and the switch.
const LOST: u64 = 128;

impl World {
    // Guests.

    /// Sees to it that a guest that has something to do, and runs, gets its turn.
    pub(crate) fn wake(&mut self, node: usize) {
        let host = &mut self.nodes[node];
        if !host.running {
            return;
        }
        if !host.serving && (host.vm.is_ready() || !host.inbox.is_empty()) {
            host.serving = true;
            let life = host.life;
            self.soon(Happening::Serve(node, life));
        }
        self.arm_timer(node);
    }

    /// The guest goes on after a stop: what it had asked for is carried.
    pub(crate) fn guest_resumes(&mut self, node: usize) {
        let host = &mut self.nodes[node];
        host.running = true;
        host.timer = None;
        self.ring_goes_on(node);
        let host = &mut self.nodes[node];
        if let Some(number) = host.vm.flush_due() {
            self.ask_flush(node, number);
        }
        self.wake(node);
    }

    pub(crate) fn serve(&mut self, node: usize) {
        self.nodes[node].serving = false;
        if !self.nodes[node].running {
            return;
        }
        if self.nodes[node].disk_is_stuck() || !self.nodes[node].ring.is_empty() {
            self.nodes[node].serving = true;
            let life = self.nodes[node].life;
            return self.later(2 * MILLISECOND, Happening::Serve(node, life));
        }
        // The device's turn: what is in the ring when the guest stops is in its memory.
        while self.nodes[node].vm.has_room()
            && let Some(delivery) = self.next_delivery(node)
        {
            self.nodes[node].vm.receive(&delivery.guest);
            match self.nodes[node].role {
                Role::Primary(_) => self.step_primary(node, PrimaryEvent::InputConsumed(delivery)),
                Role::Secondary(_) => self.step_secondary(node, SecondaryEvent::InputConsumed(delivery)),
                Role::Off | Role::Waiting => return,
            }
        }
        if !self.random.one_in(4) {
            self.guest_acts(node, ToyVm::turn);
        }
        self.wake(node);
    }

    /// Returns what a card puts into the ring next: mostly in the order in which it came, but the cards do not wait for each other.
    fn next_delivery(&mut self, node: usize) -> Option<Delivery> {
        let hurries = self.cards > 1 && self.random.one_in(8);
        let inbox = &mut self.nodes[node].inbox;
        let first = inbox.front()?.nic;
        let other = inbox.iter().position(|delivery| hurries && delivery.nic != first);
        inbox.remove(other.unwrap_or(0))
    }

    pub(crate) fn guest_timer(&mut self, node: usize, time: u64) {
        if self.nodes[node].disk_is_stuck() {
            let life = self.nodes[node].life;
            return self.later(2 * MILLISECOND, Happening::GuestTimer(node, life, time));
        }
        if self.nodes[node].running && self.nodes[node].timer == Some(time) {
            self.nodes[node].timer = None;
            self.guest_acts(node, |vm, noise, effects| vm.timer(time, noise, effects));
            self.wake(node);
        }
    }

    /// A flush that a stopped guest waits for is asked for again when it goes on.
    pub(crate) fn flush_ends(&mut self, node: usize, number: u64) {
        if !self.nodes[node].running {
            return;
        }
        let host = &mut self.nodes[node];
        if host.disk_is_stuck() {
            let life = host.life;
            return self.later(2 * MILLISECOND, Happening::Flushed(node, life, number));
        }
        // What a guest that follows has written is not the pair's state, and is durable when that is.
        let result = match &host.replica {
            Some(_) => Ok(()),
            None => host.flush_image(),
        };
        self.guest_acts(node, |vm, noise, effects| match result {
            Ok(()) => vm.flushed(number, noise, effects),
            Err(_) => vm.flush_failed(effects),
        });
        self.wake(node);
    }

    fn guest_acts(&mut self, node: usize, act: impl FnOnce(&mut ToyVm, u64, &mut Vec<Effect>)) {
        if let Role::Secondary(secondary) = &self.nodes[node].role {
            let mode = secondary.epoch_mode();
            assert_eq!(
                mode,
                EpochMode::Lockstep,
                "rule 2: a guest runs in a state that it only holds"
            );
        }
        let noise = self.random.draw();
        let mut effects = core::mem::take(&mut self.effects);
        act(&mut self.nodes[node].vm, noise, &mut effects);
        for effect in effects.drain(..) {
            match effect {
                Effect::Send { frame, first } => self.guest_sends(node, frame, first),
                Effect::Write { offset, written } => self.guest_writes(node, offset, written),
                Effect::Flush(number) => self.ask_flush(node, number),
            }
        }
        self.effects = effects;
    }

    fn guest_sends(&mut self, node: usize, frame: Bytes, first: Option<(u32, u32)>) {
        if self.nodes[node].output_held {
            return self.nodes[node].ring.push_back((frame, first));
        }
        let [_, nic] = packet::cards_of(&frame, self.cards).expect("the guest speaks IPv4");
        match &self.nodes[node].role {
            Role::Primary(primary) => {
                let tag = primary.tag();
                let held = matches!(primary.state_name(), "protected" | "checkpointing" | "contending");
                self.checkers.streams.primary_sent(tag, held, &frame, first);
                self.step_primary(node, PrimaryEvent::GuestSent(nic, frame));
                if let Role::Primary(primary) = &self.nodes[node].role {
                    Checkers::bounded(primary);
                    self.checkers.watch(primary);
                }
            }
            Role::Secondary(secondary) => {
                self.checkers.streams.secondary_sent(secondary.tag(), &frame, first);
                self.step_secondary(node, SecondaryEvent::GuestSent(nic, frame));
                if let Role::Secondary(secondary) = &self.nodes[node].role {
                    Checkers::bounded_secondary(secondary);
                }
            }
            Role::Off | Role::Waiting => {}
        }
    }

    /// The card takes what the guest has queued.
    pub(crate) fn ring_goes_on(&mut self, node: usize) {
        while self.nodes[node].running
            && !self.nodes[node].output_held
            && let Some((frame, first)) = self.nodes[node].ring.pop_front()
        {
            self.guest_sends(node, frame, first);
        }
    }

    fn guest_writes(&mut self, node: usize, offset: u64, written: Written) {
        if self.nodes[node].write_disk(offset, &written).is_err() {
            // The power fails in the middle of it: a disk that only refuses makes the guest wait.
            return;
        }
        if let Role::Primary(_) = self.nodes[node].role {
            self.step_primary(node, PrimaryEvent::GuestWrote { offset, written });
        }
    }

    fn ask_flush(&mut self, node: usize, number: u64) {
        let life = self.nodes[node].life;
        // A guest whose flushes fail does not try as fast as it can.
        let patience = if self.nodes[node].flushes_fail() {
            20 * MILLISECOND
        } else {
            0
        };
        let delay = 10_000 + self.random.below(200_000) + patience;
        self.later(delay, Happening::Flushed(node, life, number));
    }

    fn arm_timer(&mut self, node: usize) {
        let host = &mut self.nodes[node];
        let Some((time, wait)) = host.vm.deadline().zip(host.vm.wait()) else {
            return;
        };
        if host.timer.is_none_or(|timer| timer > time) {
            host.timer = Some(time);
            let life = host.life;
            let delay = wait * MILLISECOND + self.random.below(MILLISECOND);
            self.later(delay, Happening::GuestTimer(node, life, time));
        }
    }

    // Clients.

    /// The VM has lost its memory on both hosts, and starts from a disk; `current` if that disk has all that was flushed.
    ///
    /// It has not if its host was about to take over, or had not finished with it, when it was lost as well.
    pub fn vm_rebooted(&mut self, current: bool) {
        self.clients.vm_rebooted();
        self.checkers.streams.rebooted();
        if !current {
            self.clients.history.forget();
        }
        for client in 0..self.clients.count() {
            self.clients_sent(client);
        }
    }

    pub(crate) fn client_wakes(&mut self, client: usize, turn: u64) {
        if self.client_turns[client].0 == turn {
            self.client_turns[client].1 = None;
            self.clients.wake(client, self.now / MILLISECOND);
            self.clients_sent(client);
        }
    }

    pub(crate) fn client_hears(&mut self, frame: &Bytes) {
        self.checkers.streams.heard(frame);
        if let Some(client) = self.clients.hear(frame, self.now / MILLISECOND) {
            self.learn_values();
            self.checkers.answers = self.clients.history.answers;
            self.clients_sent(client);
        }
    }

    /// Reads registers that the history has forgotten out of the owner's guest.
    fn learn_values(&mut self) {
        if !self.clients.history.has_forgotten() {
            return;
        }
        let owner = self
            .nodes
            .iter()
            .filter_map(|node| match &node.role {
                Role::Primary(primary) if primary.state_name() != "contending" => {
                    Some((primary.tag().generation, &node.vm))
                }
                _ => None,
            })
            .max_by_key(|(generation, _)| *generation);
        if let Some((_, vm)) = owner {
            self.clients.history.learn(|key| vm.value(key));
        }
    }

    pub(crate) fn clients_sent(&mut self, client: usize) {
        let mut frames = core::mem::take(&mut self.sent);
        frames.extend(self.clients.sent());
        for frame in frames.drain(..) {
            if let Some(delay) = self.travel() {
                self.later(delay, Happening::Frame(frame));
            }
        }
        self.sent = frames;
        self.schedule_client(client);
    }

    fn schedule_client(&mut self, client: usize) {
        let deadline = self.clients.deadline(client);
        let (turn, scheduled) = &mut self.client_turns[client];
        if *scheduled == deadline {
            return;
        }
        *scheduled = deadline;
        *turn += 1;
        let turn = *turn;
        if let Some(at) = deadline {
            let delay = (at * MILLISECOND).saturating_sub(self.now) + self.random.below(1_000);
            self.later(delay, Happening::ClientWakes(client, turn));
        }
    }

    /// Returns how long a frame travels between a client and a host, if it arrives; some are overtaken.
    fn travel(&mut self) -> Option<u64> {
        match self.random.below(LOST) {
            _ if self.smooth => Some(50_000),
            0 => None,
            1..8 => Some(50_000 + self.random.below(400_000)),
            _ => Some(50_000),
        }
    }

    /// Lets a frame that has left a host travel to its client.
    pub(crate) fn frame_leaves(&mut self, frame: Bytes) {
        if let Some(delay) = self.travel() {
            self.later(delay, Happening::ClientHears(frame));
        }
    }

    // The end.

    /// Lets the clients finish and the pair commit, then cuts the power: what was answered is in the log, and on every disk that counts.
    ///
    /// # Panics
    /// If it is not.
    pub fn finish(&mut self) {
        self.clients.be_quiet(true);
        assert!(
            self.run_until(10_000, |world| world.clients.are_answered()),
            "rule 6: a client waits for an answer 10 s after the last fault"
        );
        // The last lines to the log, and a checkpoint by age.
        self.run(3_000);
        assert_eq!(
            self.clients.missing_line(),
            None,
            "rule 4: an answered request of this client is not in the log"
        );
        self.learn_values();
        self.clients.history.finish();
        let protected = self.is_protected();
        let counts = |host: &&Node| (protected || matches!(host.role, Role::Primary(_))) && host.is_sure();
        let disks: Vec<_> = self
            .nodes
            .iter()
            .filter(counts)
            .map(Node::disk_after_power_loss)
            .collect();
        for key in 0..KEYS {
            let value = self.clients.history.value(key).expect("all are answered");
            assert!(
                disks.iter().all(|disk| value_on_disk(disk, key) == value),
                "rule 4: a disk does not have what was answered for register {key}"
            );
        }
        assert!(
            disks.windows(2).all(|pair| pair[0] == pair[1]),
            "rule 4: the disks of a quiet pair differ"
        );
    }
}
