//! The toy guest and its clients by themselves, over a wire that loses, repeats and reorders: whether the toys are right.

use std::collections::BTreeMap;

use bytes::Bytes;
use checkpoint::wire::Written;

use crate::clients::Clients;
use crate::ops::KEYS;
use crate::packet::{self, SYN};
use crate::random::Random;
use crate::toy_vm::{DISK_BYTES, Effect, ToyVm, value_on_disk};

enum Item {
    ToGuest(Bytes),
    ToClients(Bytes),
    Wake(usize),
    Timer(u64),
    Flushed(u64, bool),
}

struct Wire {
    now: u64,
    serial: u64,
    queue: BTreeMap<(u64, u64), Item>,
    random: Random,
    /// One frame in so many is lost, and one repeated.
    lost: u64,
    vm: ToyVm,
    clients: Clients,
    /// What the disk holds, and what it held at the last flush.
    disk: Vec<u8>,
    durable: Vec<u8>,
    /// Flushes that failed.
    failed: u64,
    /// Connections that wrapped, or may.
    near_the_end: u64,
}

impl Wire {
    fn new(seed: u64, lost: u64) -> Self {
        let mut random = Random::new(seed);
        let disk = vec![0; usize::try_from(DISK_BYTES).expect("small")];
        let mut wire = Self {
            now: 0,
            serial: 0,
            queue: BTreeMap::new(),
            lost,
            vm: ToyVm::default(),
            clients: Clients::new(random.draw()),
            random,
            durable: disk.clone(),
            disk,
            failed: 0,
            near_the_end: 0,
        };
        (0..wire.clients.count()).for_each(|client| wire.schedule(client));
        wire
    }

    fn later(&mut self, delay: u64, item: Item) {
        self.serial += 1;
        self.queue.insert((self.now + delay, self.serial), item);
    }

    fn travel(&mut self, item: impl Fn() -> Item) {
        let copies = match self.random.below(self.lost) {
            0 => 0,
            1 => 2,
            _ => 1,
        };
        for _ in 0..copies {
            let delay = if self.random.one_in(8) {
                self.random.below(40)
            } else {
                1
            };
            self.later(delay, item());
        }
    }

    fn schedule(&mut self, client: usize) {
        let frames: Vec<Bytes> = self.clients.sent().collect();
        for frame in frames {
            self.travel(|| Item::ToGuest(frame.clone()));
        }
        if let Some(at) = self.clients.deadline(client) {
            self.later(at.saturating_sub(self.now), Item::Wake(client));
        }
    }

    fn act(&mut self, act: impl FnOnce(&mut ToyVm, u64, &mut Vec<Effect>)) {
        let mut effects = Vec::new();
        act(&mut self.vm, self.random.draw(), &mut effects);
        for effect in effects {
            match effect {
                Effect::Send { frame, .. } => self.travel(|| Item::ToClients(frame.clone())),
                Effect::Write { offset, written } => {
                    let [at, len] = [offset, written.len()].map(|number| usize::try_from(number).expect("small"));
                    match written {
                        Written::Data(data) => self.disk[at..at + len].copy_from_slice(&data),
                        Written::Zeros(_) => self.disk[at..at + len].fill(0),
                    }
                }
                Effect::Flush(number) => {
                    let (delay, fails) = (self.random.below(5), self.random.one_in(20));
                    self.later(delay, Item::Flushed(number, fails));
                }
            }
        }
        if let (Some(at), Some(wait)) = (self.vm.deadline(), self.vm.wait()) {
            self.later(wait, Item::Timer(at));
        }
    }

    fn step(&mut self) {
        let ((at, _), item) = self.queue.pop_first().expect("somebody always wants something");
        self.now = at;
        match item {
            Item::ToGuest(frame) => {
                if self.vm.has_room() {
                    self.vm.receive(&frame);
                    self.act(ToyVm::turn);
                }
            }
            Item::ToClients(frame) => {
                let header = packet::parse(&frame).and_then(|packet| packet.tcp);
                self.near_the_end +=
                    u64::from(header.is_some_and(|header| header.has(SYN) && header.seq > u32::MAX - 200));
                if let Some(client) = self.clients.hear(&frame, at) {
                    self.schedule(client);
                }
            }
            Item::Wake(client) => {
                if self.clients.deadline(client).is_some_and(|due| due <= at) {
                    self.clients.wake(client, at);
                    self.schedule(client);
                }
            }
            Item::Timer(time) => {
                if self.vm.deadline().is_some_and(|due| due <= time) {
                    self.act(|vm, noise, effects| vm.timer(time, noise, effects));
                }
            }
            Item::Flushed(_, true) => {
                self.failed += 1;
                self.disk.clone_from(&self.durable);
                self.act(|vm, _, effects| vm.flush_failed(effects));
            }
            Item::Flushed(number, false) => {
                self.durable.clone_from(&self.disk);
                self.act(|vm, noise, effects| vm.flushed(number, noise, effects));
            }
        }
    }

    fn run(&mut self, milliseconds: u64) {
        let end = self.now + milliseconds;
        while self.queue.first_key_value().is_some_and(|((at, _), _)| *at <= end) {
            self.step();
        }
        self.now = end;
    }

    /// Everything asked is answered, in the log, and on the disk.
    fn settle(&mut self) {
        self.clients.be_quiet(true);
        self.run(30_000);
        assert!(self.clients.are_answered(), "a client waits for ever");
        assert_eq!(self.clients.missing_line(), None);
        self.clients.history.finish();
        for key in 0..KEYS {
            let value = self.clients.history.value(key).expect("nothing is under way");
            assert_eq!(value_on_disk(&self.durable, key), value);
        }
        self.clients.be_quiet(false);
        (0..self.clients.count()).for_each(|client| self.schedule(client));
    }

    /// The guest loses its memory, and the disk what it had not flushed.
    fn reboot(&mut self) {
        self.disk.clone_from(&self.durable);
        let is_wire = |item: &Item| !matches!(item, Item::Timer(_) | Item::Flushed(..));
        self.queue.retain(|_, item| is_wire(item));
        self.vm = ToyVm::boot(&self.disk, self.random.draw());
        self.clients.vm_rebooted();
        (0..self.clients.count()).for_each(|client| self.schedule(client));
    }
}

#[test]
fn the_toys_understand_each_other_over_a_bad_wire() {
    let mut near_the_end = 0;
    for seed in 0..20 {
        let mut wire = Wire::new(seed, if seed % 2 == 0 { 8 } else { 1_000 });
        wire.run(10_000);
        wire.settle();
        assert!(wire.clients.history.answers > 400, "{}", wire.clients.history.answers);
        assert!(wire.failed > 0);
        near_the_end += wire.near_the_end;
    }
    assert!(near_the_end > 0, "no connection's numbers wrapped");
}

#[test]
fn a_guest_that_lost_its_memory_has_lost_and_repeats_nothing_that_was_answered() {
    for seed in 100..120 {
        let mut wire = Wire::new(seed, 30);
        for _ in 0..4 {
            let pause = 500 + wire.random.below(1_500);
            wire.run(pause);
            wire.reboot();
        }
        wire.run(2_000);
        wire.settle();
    }
}

/// A guest that is put together from what was harvested goes on as the one that was stopped would have.
#[test]
fn a_harvest_has_all_that_was_written() {
    let mut wire = Wire::new(7, 16);
    let mut copy = ToyVm::default();
    for _ in 0..200 {
        wire.run(50);
        for page in wire.vm.memory.harvest().iter() {
            let page = usize::try_from(page).expect("few");
            copy.memory.pages[page] = wire.vm.memory.pages[page].clone();
        }
        copy.registers = wire.vm.registers;
        assert!(copy.memory.pages == wire.vm.memory.pages);
    }
}
