//! The network card with several pairs of queues: what it offers, where frames go, and what a driver must not ask.

use etherparse::PacketBuilder;

use super::driver::{DriverQueue, Piece, bell, get, put, ram, read32, start_with, wait_for, write32};
use super::wire::{CONFIG, Wire};
use crate::devices::net::{CardConfig, Net};
use crate::memory::Memory;
use crate::offload::HEADER_BYTES;
use crate::state::Section;

const ADDRESS: u64 = 1 << 5 | 1 << 32;
/// Every device offers it.
const EVENTS: u64 = 1 << 29;
const CONTROL: u64 = 1 << 17;
const SEVERAL: u64 = 1 << 22;
/// Where buffers lie, behind the rings of all queues.
const BUFFERS: u64 = 0x4_0000;
const DONE: u8 = 0;
const REFUSED: u8 = 1;

fn card(ram: &Memory, wire: &Wire, queues: u16) -> Net {
    let config = CardConfig { queues, ..CONFIG };
    Net::new("net", config, Box::new(wire.clone()), ram.clone(), bell()).unwrap()
}

/// A card whose worker stands still, so that the test takes its turns, and its driver.
struct Driven<'a> {
    ram: &'a Memory,
    wire: Wire,
    net: Net,
    queues: Vec<DriverQueue<'a>>,
}

impl<'a> Driven<'a> {
    /// A card with so many queue pairs and a driver that knows what is in `mask`.
    fn new(ram: &'a Memory, pairs: u16, mask: u64) -> Self {
        let wire = Wire::new();
        let net = card(ram, &wire, pairs);
        let queues: Vec<_> = (0..2 * u32::from(pairs) + 1)
            .map(|number| DriverQueue::new(ram, number))
            .collect();
        start_with(net.mmio(), &queues.iter().collect::<Vec<_>>(), mask);
        net.mmio().freeze().unwrap();
        Self { ram, wire, net, queues }
    }

    /// Asks by the queue `control` and returns the answer.
    fn ask(&mut self, control: usize, command: &[u8]) -> u8 {
        put(self.ram, BUFFERS, command);
        put(self.ram, BUFFERS + 0x100, &[0xff]);
        let length = u32::try_from(command.len()).unwrap();
        self.queues[control].offer(&[Piece::Read(BUFFERS, length), Piece::Write(BUFFERS + 0x100, 1)]);
        self.net.mmio().settle();
        assert_eq!(self.queues[control].take().expect("an answer").1, 1);
        get(self.ram, BUFFERS + 0x100, 1)[0]
    }

    /// Gives each receive queue in `pairs` so many buffers, and returns nothing else.
    fn offer(&mut self, pairs: std::ops::Range<usize>, buffers: usize) {
        for pair in pairs {
            for number in 0..buffers {
                let place = BUFFERS + 0x1000 + u64::try_from(pair * 16 + number).unwrap() * 0x800;
                self.queues[2 * pair].offer(&[Piece::Write(place, 1526)]).unwrap();
            }
        }
    }

    /// How many frames each receive queue has got since it was asked last.
    fn got(&mut self) -> Vec<usize> {
        let receive = self.queues.iter_mut().step_by(2);
        let count = |queue: &mut DriverQueue<'_>| std::iter::from_fn(|| queue.take()).count();
        let pairs = receive.map(count).collect::<Vec<_>>();
        pairs[..pairs.len() - 1].to_vec()
    }
}

/// Asks for so many pairs.
fn pairs(pairs: u16) -> [u8; 4] {
    let [low, high] = pairs.to_le_bytes();
    [4, 0, low, high]
}

/// A datagram of a client's flow.
fn datagram(port: u16) -> Vec<u8> {
    let mut frame = vec![0; HEADER_BYTES];
    let packet = PacketBuilder::ethernet2([2; 6], CONFIG.mac).ipv4([10, 0, 0, 9], [10, 0, 0, 1], 64);
    packet.udp(port, 7).write(&mut frame, &port.to_le_bytes()).unwrap();
    frame
}

#[test]
fn only_a_card_with_several_pairs_offers_them() {
    let ram = ram();
    for (queues, offered, told) in [(1, ADDRESS, [0, 0]), (8, ADDRESS | CONTROL | SEVERAL, [8, 0])] {
        let net = card(&ram, &Wire::new(), queues);
        let mut config = [9; 10];
        net.mmio().read(0x100, &mut config);
        assert_eq!(config, [2, 0, 0, 0, 0, 1, 0, 0, told[0], told[1]]);
        assert_eq!(u64::from(read32(net.mmio(), 0x10)), (offered | EVENTS) & 0xffff_ffff);
        let has = |queue: u32| {
            write32(net.mmio(), 0x30, queue);
            read32(net.mmio(), 0x34) != 0
        };
        let count = if queues == 1 { 2 } else { 17 };
        assert!(has(count - 1) && !has(count));
        assert_eq!(net.mmio().notifiers().unwrap().len(), usize::try_from(count).unwrap());
    }
}

#[test]
fn frames_go_to_the_first_pair_until_the_driver_asks_for_more_and_then_each_flow_to_its_own() {
    let ram = ram();
    let mut card = Driven::new(&ram, 2, ADDRESS | CONTROL | SEVERAL);
    let flows: Vec<u16> = (4_000..4_008).collect();
    let push = |card: &Driven<'_>| flows.iter().for_each(|port| card.wire.push(datagram(*port)));
    card.offer(0..2, 16);
    push(&card);
    card.net.mmio().settle();
    assert_eq!(card.got(), [8, 0]);

    assert_eq!(card.ask(4, &pairs(2)), DONE);
    push(&card);
    card.net.mmio().settle();
    let spread = card.got();
    assert!(
        spread[0] > 0 && spread[1] > 0 && spread[0] + spread[1] == 8,
        "{spread:?}"
    );
    // The same flows on another host, or after this one has become the other's: the same queues.
    card.offer(0..1, spread[0]);
    push(&card);
    let section = card.net.mmio().state();
    let other = Driven {
        net: self::card(&ram, &card.wire, 2),
        ..card
    };
    other.net.mmio().freeze().unwrap();
    other.net.mmio().restore(&section).unwrap();
    other.net.mmio().settle();
    let mut card = other;
    assert_eq!(card.got(), spread);

    assert_eq!(card.ask(4, &pairs(1)), DONE);
    card.offer(0..1, 8);
    push(&card);
    card.net.mmio().settle();
    assert_eq!(card.got(), [8, 0]);
    // A reset forgets how many there were.
    assert_eq!(card.ask(4, &pairs(2)), DONE);
    let used = card.net.mmio().state();
    card.net.mmio().reset();
    assert_ne!(used, card.net.mmio().state());
}

#[test]
fn a_frame_waits_for_room_in_its_own_queue_and_is_not_overtaken() {
    let ram = ram();
    let mut card = Driven::new(&ram, 2, ADDRESS | CONTROL | SEVERAL);
    assert_eq!(card.ask(4, &pairs(2)), DONE);
    for port in 4_000..4_008 {
        card.wire.push(datagram(port));
    }
    card.offer(1..2, 8);
    card.net.mmio().settle();
    let before = card.wire.delivered();
    assert!(before < 8, "the first queue has no buffers");
    card.offer(0..1, 8);
    card.net.mmio().settle();
    let delivered = card.wire.0.delivered.lock().unwrap();
    let ports = delivered
        .iter()
        .map(|frame| u16::from_le_bytes([frame[frame.len() - 2], frame[frame.len() - 1]]));
    assert!(ports.eq(4_000..4_008), "in the order in which they came");
}

#[test]
fn a_buffer_for_the_queue_that_waits_wakes_the_card() {
    let ram = ram();
    let mut card = Driven::new(&ram, 2, ADDRESS | CONTROL | SEVERAL);
    assert_eq!(card.ask(4, &pairs(2)), DONE);
    card.net.mmio().thaw();
    for port in 4_000..4_008 {
        card.wire.push(datagram(port));
    }
    for _ in 0..8 {
        for pair in 0..2 {
            card.offer(pair..pair + 1, 1);
            card.queues[2 * pair].notify(card.net.mmio());
        }
    }
    wait_for("all frames", || (card.wire.delivered() == 8).then_some(()));
}

#[test]
fn frames_come_out_of_every_queue() {
    let ram = ram();
    let mut card = Driven::new(&ram, 3, ADDRESS | CONTROL | SEVERAL);
    assert_eq!(card.ask(6, &pairs(3)), DONE);
    for pair in 0..3_u16 {
        let frame = datagram(pair);
        let place = BUFFERS + 0x1000 * u64::from(1 + pair);
        put(&ram, place, &frame);
        let length = u32::try_from(frame.len()).unwrap();
        card.queues[usize::from(2 * pair + 1)].offer(&[Piece::Read(place, length)]);
    }
    // The driver gives two up, with frames still in them.
    assert_eq!(card.ask(6, &pairs(1)), DONE);
    assert_eq!(card.wire.sent(), [0, 1, 2].map(datagram));
}

#[test]
fn what_can_not_be_done_is_refused_and_changes_nothing() {
    let ram = ram();
    let mut card = Driven::new(&ram, 2, ADDRESS | CONTROL | SEVERAL);
    assert_eq!(card.ask(4, &pairs(2)), DONE);
    let used = card.net.mmio().state();
    let device = |card: &Driven<'_>| card.net.mmio().state().bytes.last_chunk::<2>().copied();
    for wrong in [
        &pairs(0)[..],
        &pairs(3),
        &pairs(u16::MAX),
        &[4, 1, 2, 0],
        &[4, 0, 2],
        &[4, 0],
        &[4, 0, 2, 0, 0],
        &[0, 0, 1],
        &[0xff; 64],
    ] {
        assert_eq!(card.ask(4, wrong), REFUSED, "{wrong:?}");
        assert_eq!(device(&card), used.bytes.last_chunk::<2>().copied());
    }

    // Who has agreed to the control queue only has it behind the first pair, and one pair.
    let mut card = Driven::new(&ram, 2, ADDRESS | CONTROL);
    assert_eq!(card.ask(2, &pairs(1)), REFUSED);
    assert_eq!(card.ask(2, &pairs(2)), REFUSED);
    // Pairs that were not set up can't be used.
    let wire = Wire::new();
    let net = self::card(&ram, &wire, 2);
    let queues: Vec<_> = [0, 1, 4].map(|number| DriverQueue::new(&ram, number)).into();
    start_with(net.mmio(), &queues.iter().collect::<Vec<_>>(), u64::MAX);
    net.mmio().freeze().unwrap();
    let [receive, transmit, control] = <[DriverQueue<'_>; 3]>::try_from(queues).ok().unwrap();
    let spare = [DriverQueue::new(&ram, 2), DriverQueue::new(&ram, 3)];
    let [spare_receive, spare_transmit] = spare;
    let mut card = Driven {
        ram: &ram,
        wire,
        net,
        queues: vec![receive, transmit, spare_receive, spare_transmit, control],
    };
    assert_eq!(card.ask(4, &pairs(2)), REFUSED);
    assert_eq!(card.ask(4, &pairs(1)), DONE);
}

#[test]
fn what_is_no_command_stops_the_card() {
    for pieces in [
        &[Piece::Read(BUFFERS, 4)][..],
        &[Piece::Read(BUFFERS, 1), Piece::Write(BUFFERS, 1)],
        &[Piece::Write(BUFFERS, 1)],
        &[Piece::Read(1 << 40, 4), Piece::Write(BUFFERS, 1)],
        &[Piece::Read(BUFFERS, 4), Piece::Write(u64::MAX - 3, 16)],
    ] {
        let ram = ram();
        let mut card = Driven::new(&ram, 2, ADDRESS | CONTROL | SEVERAL);
        card.queues[4].offer(pieces);
        card.net.mmio().settle();
        assert_eq!(read32(card.net.mmio(), 0x70) & 0x40, 0x40, "{pieces:?}");
    }
    // A flood of commands does not keep it for ever.
    let ram = ram();
    let mut card = Driven::new(&ram, 2, ADDRESS | CONTROL | SEVERAL);
    for _ in 0..8 {
        card.queues[4].offer(&[Piece::Read(BUFFERS, 4), Piece::Write(BUFFERS + 0x100, 1)]);
    }
    assert!(card.net.mmio().settle() < 10);
    assert_eq!(card.queues[4].used_idx(), 8);
}

#[test]
fn a_frame_stays_when_its_queue_was_broken() {
    let ram = ram();
    let card = &mut Driven::new(&ram, 2, ADDRESS | CONTROL | SEVERAL);
    card.queues[0].offer_head(999);
    card.wire.push(datagram(1));
    card.net.mmio().settle();
    assert_eq!(read32(card.net.mmio(), 0x70) & 0x40, 0x40);
    assert_eq!(
        (card.wire.delivered(), card.wire.0.waiting.lock().unwrap().len()),
        (0, 1)
    );
}

#[test]
fn a_state_that_no_such_card_can_have_is_refused() {
    let ram = ram();
    let mut card = Driven::new(&ram, 2, ADDRESS | CONTROL | SEVERAL);
    assert_eq!(card.ask(4, &pairs(2)), DONE);
    let good = card.net.mmio().state();
    let check = |section: &Section| card.net.mmio().check(section);
    assert_eq!(check(&good), Ok(()));
    for wrong in [0_u16, 3, 0x101] {
        let mut section = good.clone();
        let at = section.bytes.len() - 2;
        section.bytes[at..].copy_from_slice(&wrong.to_le_bytes());
        let error = check(&section).unwrap_err().to_string();
        assert!(error.contains("the number of queue pairs in use"), "{error}");
        assert!(card.net.mmio().restore(&section).is_err());
    }
    assert_eq!(card.net.mmio().state(), good, "a refused state changes nothing");
    // Two pairs in use by a driver that has not agreed to several.
    let plain = Driven::new(&ram, 2, ADDRESS);
    let mut section = plain.net.mmio().state();
    let at = section.bytes.len() - 2;
    section.bytes[at..].copy_from_slice(&2_u16.to_le_bytes());
    assert!(plain.net.mmio().check(&section).is_err());
    // And a card of another shape.
    for other in [1, 3] {
        let other = self::card(&ram, &Wire::new(), other);
        assert!(other.mmio().check(&good).is_err());
    }
}
