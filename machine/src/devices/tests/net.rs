//! The network card, alone and handed over between two cards under load.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::driver::{
    DriverQueue, PAGE, Piece, QUEUE_SIZE, bell, get, put, ram, read32, start, start_with, wait_for, written_pages,
};
use super::telling::is_due;
use super::wire::{CONFIG, Wire};
use crate::devices::net::{CardConfig, FRAME_BYTES_MAX, Net};
use crate::memory::Memory;
use crate::offload::{HEADER_BYTES, Offloads};

fn card(ram: &Memory, wire: &Wire) -> Net {
    Net::new("net", CONFIG, Box::new(wire.clone()), ram.clone(), bell()).unwrap()
}

fn frame(number: u32) -> Vec<u8> {
    let mut frame = vec![0x5a; HEADER_BYTES + 60];
    frame[..HEADER_BYTES].fill(0);
    frame[26..30].copy_from_slice(&number.to_le_bytes());
    frame
}

fn number_of(frame: &[u8]) -> u32 {
    u32::from_le_bytes(frame[26..30].try_into().unwrap())
}

#[test]
fn shows_its_address() {
    let ram = ram();
    let net = card(&ram, &Wire::new());
    let mut mac = [0; 8];
    net.mmio().read(0x100, &mut mac);
    assert_eq!(mac, [2, 0, 0, 0, 0, 1, 0, 0]);
    assert_eq!(read32(net.mmio(), 8), 1);
    assert_eq!(read32(net.mmio(), 0x10), 1 << 5 | 1 << 29);
}

#[test]
fn transmits_from_several_pieces_and_drops_what_is_no_frame() {
    let ram = ram();
    let wire = Wire::new();
    let net = card(&ram, &wire);
    let (receive, mut transmit) = (DriverQueue::new(&ram, 0), DriverQueue::new(&ram, 1));
    start(net.mmio(), &[&receive, &transmit]);
    put(&ram, 0x8000, &frame(1));
    transmit.offer(&[
        Piece::Read(0x8000, 5),
        Piece::Read(0x8005, 7),
        Piece::Read(0x800c, 0),
        Piece::Read(0x800c, 60),
    ]);
    transmit.offer(&[Piece::Read(0x8000, 12 + 13)]);
    transmit.offer(&[Piece::Read(0x8000, 1 + u32::try_from(FRAME_BYTES_MAX).unwrap())]);
    transmit.offer(&[Piece::Read(0x8000, 12 + 60)]);
    transmit.notify(net.mmio());
    for _ in 0..4 {
        assert_eq!(transmit.wait_used().1, 0);
    }
    assert_eq!(wire.sent(), [frame(1), frame(1)]);
}

#[test]
fn frames_wait_outside_until_the_guest_has_a_buffer() {
    let ram = ram();
    let wire = Wire::new();
    let net = card(&ram, &wire);
    let (mut receive, transmit) = (DriverQueue::new(&ram, 0), DriverQueue::new(&ram, 1));
    start(net.mmio(), &[&receive, &transmit]);
    for number in 0..3 {
        wire.push(frame(number));
    }
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!((wire.delivered(), receive.used_idx()), (0, 0));
    for number in 0..3 {
        receive.offer(&[Piece::Write(0x8000, 12), Piece::Write(0x9000, 1514)]);
        receive.notify(net.mmio());
        assert_eq!(receive.wait_used().1, 72);
        assert_eq!(get(&ram, 0x8000, 12), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        assert_eq!(get(&ram, 0x9000, 60), frame(number)[HEADER_BYTES..]);
    }
    wait_for("the report", || (wire.delivered() == 3).then_some(()));
}

#[test]
fn a_frame_too_long_for_the_buffer_is_lost_and_the_buffer_is_not() {
    let ram = ram();
    let wire = Wire::new();
    let net = card(&ram, &wire);
    let (mut receive, transmit) = (DriverQueue::new(&ram, 0), DriverQueue::new(&ram, 1));
    start(net.mmio(), &[&receive, &transmit]);
    let head = receive.offer(&[Piece::Write(0x8000, 12 + 60)]).unwrap();
    receive.notify(net.mmio());
    wire.push([&[0; HEADER_BYTES][..], &[1; 61]].concat());
    wire.push(frame(9));
    assert_eq!(receive.wait_used(), (head, 72));
    assert_eq!(number_of(&get(&ram, 0x8000, 72)), 9);
    wait_for("the report", || (wire.delivered() == 1).then_some(()));
}

#[test]
fn a_full_network_leaves_frames_with_the_guest_and_goes_on_where_it_was() {
    let ram = ram();
    let wire = Wire::new();
    let net = card(&ram, &wire);
    let (mut receive, mut transmit) = (DriverQueue::new(&ram, 0), DriverQueue::new(&ram, 1));
    start(net.mmio(), &[&receive, &transmit]);
    let turns = net.mmio().turns();
    assert!(!turns.take());
    for number in 1..4 {
        put(&ram, 0x8000 + u64::from(number) * 0x100, &frame(number));
        transmit.offer(&[Piece::Read(0x8000 + u64::from(number) * 0x100, 72)]);
    }
    wire.0.full.store(true, Ordering::Relaxed);
    transmit.notify(net.mmio());
    receive.offer(&[Piece::Write(0x9000, 1526)]);
    wire.push(frame(9));
    assert!(!turns.take(), "a full network is nothing to do at once");
    assert_eq!((wire.sent(), transmit.used_idx()), (vec![], 0));
    assert_eq!(receive.wait_used().1, 72, "the other direction goes on");

    // What stays in the queue is carried with the card.
    net.mmio().freeze().unwrap();
    let other = Wire::new();
    other.0.full.store(true, Ordering::Relaxed);
    drop(net.set_backend(Box::new(other.clone())));
    net.mmio().thaw();
    assert!(!turns.take());
    assert_eq!(transmit.used_idx(), 0);
    other.0.full.store(false, Ordering::Relaxed);
    assert!(!turns.take());
    assert_eq!(other.sent(), [frame(1), frame(2), frame(3)]);
    for _ in 0..3 {
        transmit.wait_used();
    }
    // The guest's next frame makes a turn due, as before.
    is_due(&turns);
    transmit.offer(&[Piece::Read(0x8100, 72)]);
    transmit.notify(net.mmio());
    assert!(is_due(&turns));
}

/// A card that offers all there is.
fn offering(ram: &Memory, wire: &Wire) -> Net {
    let config = CardConfig {
        offloads: true,
        ..CONFIG
    };
    Net::new("net", config, Box::new(wire.clone()), ram.clone(), bell()).unwrap()
}

/// A TCP segment of so many bytes that is to be cut; with what it says of its checksum.
fn segments(length: usize) -> Vec<u8> {
    let mut frame: Vec<u8> = (0..HEADER_BYTES + length).map(|at| at.to_le_bytes()[0]).collect();
    frame[..HEADER_BYTES].copy_from_slice(&[1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0]);
    frame
}

const CHECKSUMS: u64 = 1 << 0 | 1 << 1;
const SEGMENTS: u64 = CHECKSUMS | 0x7f80 & !(1 << 10) & !(1 << 14);
const MERGED: u64 = 1 << 15;
const ADDRESS: u64 = 1 << 5 | 1 << 32;

#[test]
fn case_p10_offers_what_the_standard_has_for_tcp_and_tells_what_was_accepted() {
    let ram = ram();
    let wire = Wire::new();
    let net = offering(&ram, &wire);
    assert_eq!(
        u64::from(read32(net.mmio(), 0x10)),
        SEGMENTS | MERGED | 1 << 5 | 1 << 29
    );
    let accepted = || *wire.0.accepted.lock().unwrap();
    let queues = [DriverQueue::new(&ram, 0), DriverQueue::new(&ram, 1)];
    start_with(net.mmio(), &[&queues[0], &queues[1]], ADDRESS | CHECKSUMS);
    let checksum = Offloads {
        checksum: true,
        ..Offloads::NONE
    };
    assert_eq!(accepted(), Some(checksum));

    // It goes with the card, and every network behind it is told.
    net.mmio().freeze().unwrap();
    let other = Wire::new();
    let copy = offering(&ram, &other);
    copy.mmio().freeze().unwrap();
    copy.mmio().restore(&net.mmio().state()).unwrap();
    assert_eq!(*other.0.accepted.lock().unwrap(), Some(checksum));
    let third = Wire::new();
    drop(copy.set_backend(Box::new(third.clone())));
    assert_eq!(*third.0.accepted.lock().unwrap(), Some(checksum));
    let plain = card(&ram, &Wire::new());
    plain.mmio().freeze().unwrap();
    assert!(
        plain.mmio().check(&net.mmio().state()).is_err(),
        "a card that offers less is another"
    );

    // A reset forgets it.
    copy.mmio().reset();
    assert_eq!(*third.0.accepted.lock().unwrap(), Some(Offloads::NONE));
}

#[test]
fn case_p10_a_guest_sends_what_it_has_agreed_to_leave_and_nothing_else() {
    let long = segments(FRAME_BYTES_MAX - HEADER_BYTES);
    let mut partial = frame(7);
    partial[..HEADER_BYTES].copy_from_slice(&[1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0]);
    let mut verified = frame(8);
    verified[..HEADER_BYTES].copy_from_slice(&[2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 77, 7]);
    for (mask, sent) in [
        (ADDRESS | SEGMENTS, vec![long.clone(), partial.clone(), frame(8)]),
        (ADDRESS | CHECKSUMS, vec![partial.clone(), frame(8)]),
    ] {
        let ram = ram();
        let wire = Wire::new();
        let net = offering(&ram, &wire);
        let (receive, mut transmit) = (DriverQueue::new(&ram, 0), DriverQueue::new(&ram, 1));
        start_with(net.mmio(), &[&receive, &transmit], mask);
        for (place, frame) in [(0x8_0000, &long), (0xa_0000, &partial), (0xb_0000, &verified)] {
            put(&ram, place, frame);
            transmit.offer(&[Piece::Read(place, u32::try_from(frame.len()).unwrap())]);
        }
        transmit.notify(net.mmio());
        for _ in 0..3 {
            transmit.wait_used();
        }
        assert_eq!(wire.sent(), sent);
    }
    // Who has agreed to nothing need not write a header at all.
    let ram = ram();
    let wire = Wire::new();
    let net = offering(&ram, &wire);
    let (receive, mut transmit) = (DriverQueue::new(&ram, 0), DriverQueue::new(&ram, 1));
    start_with(net.mmio(), &[&receive, &transmit], ADDRESS);
    put(
        &ram,
        0x8000,
        &[&[0xff; HEADER_BYTES][..], &frame(3)[HEADER_BYTES..]].concat(),
    );
    transmit.offer(&[Piece::Read(0x8000, 72)]);
    transmit.notify(net.mmio());
    transmit.wait_used();
    assert_eq!(wire.sent(), [frame(3)]);
}

#[test]
fn case_p10_a_long_frame_takes_as_many_buffers_as_it_needs_and_appears_at_once() {
    let ram = ram();
    let wire = Wire::new();
    let net = offering(&ram, &wire);
    let (mut receive, transmit) = (DriverQueue::new(&ram, 0), DriverQueue::new(&ram, 1));
    start_with(net.mmio(), &[&receive, &transmit], ADDRESS | SEGMENTS | MERGED);
    let turns = net.mmio().turns();
    let long = segments(10_000);
    wire.push(long.clone());
    wire.push(frame(5));
    let offer = |receive: &mut DriverQueue<'_>, place: u64| {
        receive
            .offer(&[Piece::Write(place, 1_000), Piece::Write(place + 0x800, 1_500)])
            .unwrap()
    };
    let mut heads: Vec<_> = [0x8000, 0x9000, 0xa000, 0xb000]
        .map(|place| offer(&mut receive, place))
        .into();
    for _ in 0..3 {
        assert!(!turns.take(), "a guest without room is nothing to do at once");
        assert_eq!(
            (receive.used_idx(), wire.delivered()),
            (0, 0),
            "no part of a frame is delivered"
        );
    }
    // A stop in between keeps the frame outside and the buffers with the guest.
    net.mmio().freeze().unwrap();
    let section = net.mmio().state();
    net.mmio().restore(&section).unwrap();
    net.mmio().thaw();
    assert!(!turns.take());
    heads.push(offer(&mut receive, 0xc000));
    receive.notify(net.mmio());
    assert!(is_due(&turns), "the buffer that was missing makes a turn due");
    assert!(!turns.take());
    assert_eq!((receive.used_idx(), wire.delivered()), (5, 1));
    let mut got = Vec::new();
    for (place, head) in [0x8000, 0x9000, 0xa000, 0xb000, 0xc000].into_iter().zip(heads) {
        let (used, written) = receive.take().unwrap();
        assert_eq!(used, head);
        let first = crate::index(written.into()).min(1_000);
        got.extend(get(&ram, place, first));
        got.extend(get(&ram, place + 0x800, crate::index(written.into()) - first));
    }
    let mut expected = long;
    expected[10] = 5;
    assert_eq!(got, expected);
    offer(&mut receive, 0x8000);
    assert!(!turns.take());
    assert_eq!(receive.take().unwrap().1, 72, "and the next follows");
    assert_eq!(get(&ram, 0x8000, 12), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
}

#[test]
fn case_p10_a_frame_that_no_number_of_buffers_holds_is_lost_and_does_not_stop_the_next() {
    let ram = ram();
    let wire = Wire::new();
    let net = offering(&ram, &wire);
    let (mut receive, transmit) = (DriverQueue::new(&ram, 0), DriverQueue::new(&ram, 1));
    start_with(net.mmio(), &[&receive, &transmit], ADDRESS | SEGMENTS | MERGED);
    for place in 0..u64::from(QUEUE_SIZE) {
        receive.offer(&[Piece::Write(0x8000 + place * 0x100, 72)]);
    }
    wire.push(segments(72 * usize::from(QUEUE_SIZE)));
    wire.push(frame(1));
    receive.notify(net.mmio());
    assert_eq!(receive.wait_used().1, 72);
    assert_eq!(number_of(&get(&ram, 0x8000, 72)), 1);
}

#[test]
fn case_p10_a_guest_gets_nothing_that_it_has_not_agreed_to_complete() {
    let ram = ram();
    let wire = Wire::new();
    let net = offering(&ram, &wire);
    let (mut receive, transmit) = (DriverQueue::new(&ram, 0), DriverQueue::new(&ram, 1));
    start_with(net.mmio(), &[&receive, &transmit], ADDRESS | MERGED);
    receive.offer(&[Piece::Write(0x8000, 2_000)]);
    wire.push(segments(1_000));
    let mut verified = frame(4);
    verified[0] = 2;
    wire.push(verified);
    receive.notify(net.mmio());
    assert_eq!(receive.wait_used().1, 72);
    let mut expected = frame(4);
    expected[10] = 1;
    assert_eq!(get(&ram, 0x8000, 72), expected);
}

#[test]
fn pages_that_only_the_device_wrote_are_marked() {
    let ram = ram();
    let wire = Wire::new();
    let net = card(&ram, &wire);
    let (mut receive, mut transmit) = (DriverQueue::new(&ram, 0), DriverQueue::new(&ram, 1));
    start(net.mmio(), &[&receive, &transmit]);
    receive.offer(&[Piece::Write(0x20_000 - 20, 1526)]);
    put(&ram, 0x30_000, &frame(1));
    transmit.offer(&[Piece::Read(0x30_000, 72)]);
    written_pages(&ram);
    wire.push(frame(2));
    receive.notify(net.mmio());
    transmit.notify(net.mmio());
    receive.wait_used();
    transmit.wait_used();
    net.mmio().freeze().unwrap();
    let expected = [receive.used_page(), transmit.used_page(), 0x1f, 0x20];
    assert_eq!(written_pages(&ram), expected);
}

#[test]
fn frozen_means_that_nothing_moves() {
    let ram = ram();
    let wire = Wire::new();
    let net = card(&ram, &wire);
    let (mut receive, mut transmit) = (DriverQueue::new(&ram, 0), DriverQueue::new(&ram, 1));
    start(net.mmio(), &[&receive, &transmit]);
    net.mmio().freeze().unwrap();
    written_pages(&ram);
    wire.push(frame(1));
    put(&ram, 0x8000, &frame(2));
    receive.offer(&[Piece::Write(0x9000, 1526)]);
    transmit.offer(&[Piece::Read(0x8000, 72)]);
    let before = get(&ram, 0, super::driver::RAM_BYTES);
    receive.notify(net.mmio());
    transmit.notify(net.mmio());
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(get(&ram, 0, super::driver::RAM_BYTES), before);
    assert_eq!((wire.sent().len(), wire.delivered()), (0, 0));
    net.mmio().thaw();
    receive.wait_used();
    transmit.wait_used();
}

#[test]
fn another_network_behind_the_card_gets_its_frames() {
    let ram = ram();
    let (old, new) = (Wire::new(), Wire::new());
    let net = card(&ram, &old);
    let (mut receive, mut transmit) = (DriverQueue::new(&ram, 0), DriverQueue::new(&ram, 1));
    start(net.mmio(), &[&receive, &transmit]);
    for _ in 0..4 {
        receive.offer(&[Piece::Write(0x9000, 1526)]);
    }
    receive.notify(net.mmio());
    old.push(frame(1));
    receive.wait_used();
    net.mmio().freeze().unwrap();
    put(&ram, 0x8000, &frame(3));
    transmit.offer(&[Piece::Read(0x8000, 72)]);
    transmit.notify(net.mmio());
    old.push(frame(2));
    new.push(frame(4));
    drop(net.set_backend(Box::new(new.clone())));
    let _ = rustix::io::read(&old.0.ready, &mut [0; 8]);
    net.mmio().thaw();
    receive.wait_used();
    assert_eq!(number_of(&get(&ram, 0x9000, 72)), 4);
    transmit.wait_used();
    assert_eq!((old.sent(), new.sent()), (vec![], vec![frame(3)]));
    // The new one's descriptor is watched too, not only looked at after the thaw.
    std::thread::sleep(Duration::from_millis(10));
    new.push(frame(5));
    receive.wait_used();
    assert_eq!((old.delivered(), new.delivered()), (1, 2));
}

#[test]
fn lent_turns_are_the_holders_until_it_gives_them_back() {
    let ram = ram();
    let wire = Wire::new();
    let net = card(&ram, &wire);
    let (mut receive, transmit) = (DriverQueue::new(&ram, 0), DriverQueue::new(&ram, 1));
    start(net.mmio(), &[&receive, &transmit]);
    for place in [0x9000, 0xa000, 0xb000] {
        receive.offer(&[Piece::Write(place, 1526)]);
    }
    let turns = net.mmio().turns();
    wire.push(frame(1));
    receive.notify(net.mmio());
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(receive.used_idx(), 0, "the card's own thread takes no turn");
    assert!(is_due(&turns));
    assert!(!turns.take());
    assert_eq!(receive.wait_used().1, 72);

    net.mmio().freeze().unwrap();
    wire.push(frame(2));
    assert!(!turns.take());
    assert_eq!(
        (receive.used_idx(), is_due(&turns)),
        (1, false),
        "frozen means frozen for everyone"
    );
    net.mmio().thaw();
    assert!(is_due(&turns), "the turn that was missed is due at the thaw");
    assert!(!turns.take());
    receive.wait_used();
    net.mmio().freeze().unwrap();
    net.mmio().thaw();
    assert!(!is_due(&turns), "nothing was missed");

    drop(turns);
    wire.push(frame(3));
    receive.wait_used();

    // Its thread comes to a frozen gate, as between two roles.
    net.mmio().freeze().unwrap();
    receive.notify(net.mmio());
    std::thread::sleep(Duration::from_millis(20));
    drop(net.mmio().turns());
}

/// How long the thread of this name has computed, once it has begun.
fn computed(thread: &str) -> Duration {
    let nanoseconds = wait_for("the thread", || {
        std::fs::read_dir("/proc/self/task").unwrap().find_map(|task| {
            let task = task.ok()?.path();
            let name = std::fs::read_to_string(task.join("comm")).ok()?;
            let times = std::fs::read_to_string(task.join("schedstat")).ok()?;
            (name.trim() == thread).then(|| times.split(' ').next().unwrap().parse().unwrap())
        })
    });
    Duration::from_nanos(nanoseconds)
}

#[test]
fn a_frame_that_nobody_can_take_costs_nothing() {
    let ram = ram();
    let wire = Wire::new();
    let net = Net::new("waits", CONFIG, Box::new(wire.clone()), ram.clone(), bell()).unwrap();
    let queues = [DriverQueue::new(&ram, 0), DriverQueue::new(&ram, 1)];
    let rest = |when| {
        let before = computed("virtio-waits");
        std::thread::sleep(Duration::from_millis(100));
        let took = computed("virtio-waits") - before;
        assert!(took < Duration::from_millis(10), "{took:?} {when}");
    };
    wire.push(frame(1));
    rest("before the driver is ready");
    start(net.mmio(), &[&queues[0], &queues[1]]);
    rest("without a buffer");
    net.mmio().freeze().unwrap();
    rest("frozen");
}

/// The driver's half of the load test: sends and receives `FRAMES` frames each way, in order.
fn drive(ram: &Memory, cards: [&Net; 2], queues: [DriverQueue<'_>; 2]) {
    let [mut receive, mut transmit] = queues;
    let slot = |base: u64, head: u16| base + u64::from(head) * 2048;
    let begin = Instant::now();
    let (mut received, mut offered, mut completed) = (0, 0, 0);
    let mut places = [0; QUEUE_SIZE as usize];
    let mut spare: Vec<u64> = (0..QUEUE_SIZE).map(|index| slot(0x40_000, index)).collect();
    let mut send_spare: Vec<u64> = (0..QUEUE_SIZE).map(|index| slot(0x80_000, index)).collect();
    let mut send_places = [0; QUEUE_SIZE as usize];
    while received < FRAMES || completed < FRAMES {
        assert!(
            begin.elapsed() < Duration::from_secs(60),
            "{received} received, {completed} sent"
        );
        while let Some(place) = spare.pop() {
            let head = receive.offer(&[Piece::Write(place, 2048)]).unwrap();
            places[usize::from(head)] = place;
        }
        while offered < FRAMES
            && let Some(place) = send_spare.pop()
        {
            put(ram, place, &frame(offered));
            let head = transmit.offer(&[Piece::Read(place, 72)]).unwrap();
            send_places[usize::from(head)] = place;
            offered += 1;
        }
        // Which card is the machine's just now is not the driver's business.
        for card in cards {
            receive.notify(card.mmio());
            transmit.notify(card.mmio());
        }
        while let Some((head, bytes)) = receive.take() {
            let place = places[usize::from(head)];
            assert_eq!(bytes, 72);
            assert_eq!(number_of(&get(ram, place, 72)), received, "received in order, once");
            received += 1;
            spare.push(place);
        }
        while let Some((head, _)) = transmit.take() {
            send_spare.push(send_places[usize::from(head)]);
            completed += 1;
        }
        std::thread::yield_now();
    }
}

const FRAMES: u32 = 5000;

#[test]
fn no_frame_is_lost_or_doubled_while_the_card_moves_to_and_fro_under_load() {
    let ram = ram();
    let wire = Wire::new();
    let cards = [card(&ram, &wire), card(&ram, &wire)];
    let queues = [DriverQueue::new(&ram, 0), DriverQueue::new(&ram, 1)];
    start(cards[0].mmio(), &[&queues[0], &queues[1]]);
    cards[1].mmio().freeze().unwrap();
    let done = AtomicBool::new(false);
    let moves = std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0..FRAMES {
                wire.push(frame(number));
                if number % 64 == 0 {
                    std::thread::sleep(Duration::from_micros(100));
                }
            }
        });
        let mover = scope.spawn(|| {
            let mut moves = 0;
            while !done.load(Ordering::SeqCst) {
                let (from, to) = (&cards[moves % 2], &cards[(moves + 1) % 2]);
                from.mmio().freeze().unwrap();
                let section = from.mmio().state();
                let before = (wire.delivered(), wire.sent().len());
                std::thread::sleep(Duration::from_micros(100));
                assert_eq!(from.mmio().state(), section);
                assert_eq!((wire.delivered(), wire.sent().len()), before);
                to.mmio().restore(&section).unwrap();
                to.mmio().thaw();
                moves += 1;
                std::thread::sleep(Duration::from_micros(200));
            }
            moves
        });
        drive(&ram, [&cards[0], &cards[1]], queues);
        done.store(true, Ordering::SeqCst);
        mover.join().unwrap()
    });
    assert!(moves > 3, "{moves}");
    assert!(
        wire.sent().iter().map(|frame| number_of(frame)).eq(0..FRAMES),
        "sent in order, once"
    );
    let delivered = wire.0.delivered.lock().unwrap();
    assert!(
        delivered.iter().map(|frame| number_of(frame)).eq(0..FRAMES),
        "reported in order, once"
    );
    assert!(
        written_pages(&ram)
            .iter()
            .all(|page| *page < super::driver::RAM_BYTES as u64 / PAGE)
    );
}
