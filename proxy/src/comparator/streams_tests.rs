//! The comparator case by case: where streams begin and end, and what is said again.

use checkpoint::{Duration, Epoch, EpochMode};

use super::tests::{connected, difference, is_held};
use crate::comparator::{Comparator, ComparatorLimits};
use crate::testkit::*;
use crate::verdict::{Fact, Limit, Reason};

/// A side that took over while the connection was being opened, and that another one follows now: its SYN left in its own
/// numbers, a banner of 100 bytes as the client knows the connection.
fn taken_over_in_the_handshake(own: u32, known: u32) -> Bench {
    let mut bench = Bench::new();
    bench.comparator = Comparator::new(ComparatorLimits::default(), Epoch(4));
    for segment in [
        Tcp::new(own, 51, SYN | ACK, b""),
        Tcp::ack(own + 1, 51),
        Tcp::ack(known, 51),
        Tcp::data(known.wrapping_add(1), 51, &[7; 100]),
    ] {
        assert_eq!(released(&bench.primary(segment.frame())).len(), 1, "it is alone");
    }
    assert_eq!(bench.comparator.stop(EpochMode::Lockstep), Epoch(4));
    bench.comparator.protect(Epoch(5), EpochMode::Lockstep);
    bench.comparator.loaded(bench.now, Epoch(4));
    bench
}

#[test]
fn case_p02_a_stream_taken_over_in_its_handshake_is_compared_however_near_the_numbers_are() {
    let own = 1_005_000;
    for known in [own - 5_000, own - 2, own - 1, own, own + 1, own + 5_000, 3_000_000_000] {
        let data = |payload: &[u8]| Tcp::data(known + 101, 51, payload).frame();
        let mut bench = taken_over_in_the_handshake(own, known);
        assert!(is_held(&bench.primary(data(b"mine"))), "from {known}");
        assert_eq!(
            difference(&bench.secondary(data(b"your"))).fact,
            Fact::Bytes,
            "from {known}"
        );
        let mut bench = taken_over_in_the_handshake(own, known);
        assert!(is_held(&bench.primary(data(b"mine"))));
        assert_eq!(
            released(&bench.secondary(data(b"mine"))),
            [data(b"mine")],
            "from {known}"
        );
    }
}

#[test]
fn a_reset_in_the_handshake_says_nothing_of_where_the_stream_begins() {
    let mut bench = Bench::new();
    bench.comparator = Comparator::new(ComparatorLimits::default(), Epoch(4));
    bench.primary(Tcp::new(100, 0, SYN, b"").frame());
    bench.primary(Tcp::new(70_000, 0, RST, b"").frame());
    bench.primary(Tcp::data(101, 51, b"hello").frame());
    bench.comparator.stop(EpochMode::Lockstep);
    bench.comparator.protect(Epoch(5), EpochMode::Lockstep);
    assert!(is_held(&bench.primary(Tcp::data(106, 51, b"mine").frame())));
}

#[test]
fn near_numbers_of_a_side_that_does_not_translate_yet_are_left_to_the_commit() {
    // Equal bytes all along, but the secondary has sent half as many.
    let mut bench = Bench::new();
    bench.primary(Tcp::new(100, 51, SYN | ACK, b"").frame());
    bench.secondary(Tcp::new(105, 51, SYN | ACK, b"").frame());
    assert!(is_held(&bench.primary(Tcp::data(101, 51, b"xxxxx").frame())));
    assert!(is_held(&bench.primary(Tcp::data(106, 51, b"xxxxx").frame())));
    assert!(is_held(&bench.secondary(Tcp::data(106, 51, b"xxxxx").frame())));
    assert!(
        is_held(&bench.secondary(Tcp::data(101, 51, b"xxxxx").frame())),
        "the same again, translated"
    );
    assert_eq!(released(&bench.checkpoint()).len(), 2);
}

#[test]
fn case_p20_a_stream_that_ends_without_a_byte_ends_alike_after_a_commit() {
    let fin = || Tcp::new(101, 51, ACK | FIN, b"").frame();
    let mut bench = Bench::new();
    bench.primary(Tcp::new(100, 51, SYN | ACK, b"").frame());
    bench.primary(fin());
    assert_eq!(released(&bench.checkpoint()).len(), 2);
    assert!(is_held(&bench.secondary(fin())), "it repeats what the primary had said");
    assert_eq!(released(&bench.primary(fin())), [fin()]);

    // Known from its end on.
    let fin = || Tcp::new(9_000, 51, ACK | FIN, b"").frame();
    let mut bench = Bench::new();
    bench.primary(fin());
    assert_eq!(released(&bench.checkpoint()).len(), 1);
    assert!(is_held(&bench.secondary(fin())));
}

#[test]
fn case_p20_urgent_bytes_are_compared_both_ways() {
    let plain = |seq, payload: &[u8]| Tcp::data(seq, 500, payload).frame();
    let urgent = |seq, pointer, payload: &[u8]| {
        Tcp {
            urgent: pointer,
            ..Tcp::new(seq, 500, ACK | URG, payload)
        }
        .frame()
    };
    // Only the secondary marks a byte.
    let mut bench = connected();
    assert!(is_held(&bench.primary(plain(1000, b"abc"))));
    assert!(
        is_held(&bench.secondary(urgent(1000, 3, b"abc"))),
        "the primary has not marked it yet"
    );
    assert_eq!(difference(&bench.primary(plain(1003, b"d"))).fact, Fact::Urgent);
    let mut bench = connected();
    assert!(is_held(&bench.secondary(urgent(1000, 2, b"abc"))));
    assert_eq!(difference(&bench.primary(plain(1000, b"abc"))).fact, Fact::Urgent);
    // Only the primary does, or it marks another as well.
    let mut bench = connected();
    assert!(is_held(&bench.primary(urgent(1000, 2, b"ab"))));
    assert!(is_held(&bench.primary(urgent(1002, 2, b"cd"))));
    assert_eq!(
        difference(&bench.secondary(urgent(1000, 4, b"abcd"))).fact,
        Fact::Urgent
    );
    // Both do, cut elsewhere; a mark without bytes counts, and so does one of an earlier epoch.
    let mut bench = connected();
    assert!(is_held(&bench.primary(urgent(1000, 4, b""))));
    assert!(is_held(&bench.primary(urgent(1000, 4, b"abcd"))));
    assert_eq!(released(&bench.secondary(urgent(1000, 4, b""))).len(), 1);
    assert_eq!(released(&bench.secondary(urgent(1000, 4, b"abcd"))).len(), 1);
    bench.checkpoint();
    assert_eq!(released(&bench.primary(urgent(1000, 4, b"abcd"))).len(), 1);
    assert!(is_held(&bench.secondary(urgent(1002, 2, b"cd"))));
    assert!(is_held(&bench.secondary(plain(1004, b"next"))));
    assert_eq!(released(&bench.primary(plain(1004, b"next"))).len(), 1);
    // More marks than are remembered are no way around.
    let mut bench = connected();
    let told = (0u32..6).find_map(|at| {
        let verdicts = bench.secondary(urgent(1000 + at, 1, b"u"));
        divergence(&verdicts).map(|told| told.reason.clone())
    });
    assert!(matches!(told, Some(Reason::Mismatch(found)) if found.fact == Fact::Urgent));
}

#[test]
fn case_p14_output_that_is_lost_while_a_checkpoint_is_under_way_is_told_too() {
    let limits = ComparatorLimits {
        pending_frames: 10,
        ..ComparatorLimits::default()
    };
    let mut bench = Bench::with(limits);
    let epoch = bench.comparator.stop(EpochMode::Lockstep);
    (0..11).for_each(|number| assert!(is_held(&bench.secondary_in(epoch.next().0, udp(1, &[number])))));
    let verdicts = bench.secondary_in(epoch.next().0, udp(1, &[11]));
    let told = divergence(&verdicts).expect("what is lost cannot match any more");
    assert_eq!(
        (told.epoch, &told.reason),
        (epoch.next(), &Reason::Limit(Limit::Pending))
    );
    assert!(is_held(&bench.secondary_in(epoch.next().0, udp(1, &[12]))), "once");
    bench.primary(udp(1, &[12]));
    bench.commit(epoch);
    assert!(
        is_held(&bench.wait(Duration::from_millis(1_000))),
        "its checkpoint is due already"
    );
    assert_eq!(released(&bench.checkpoint()).len(), 1);
}

#[test]
fn case_p09_a_retransmission_with_other_bytes_does_not_leave() {
    let data = |seq, payload: &[u8]| Tcp::data(seq, 500, payload).frame();
    // Of what was equal, and of what was committed; cut elsewhere, and with new bytes behind.
    for (seq, payload) in [
        (1000, &b"abXd"[..]),
        (1002, b"X"),
        (1001, b"bX"),
        (998, b"89abX"),
        (990, b"X"),
        (990, b"0123456X"),
        (1002, b"cXnew"),
    ] {
        let mut bench = connected();
        bench.primary(data(1000, b"abcd"));
        assert_eq!(released(&bench.secondary(data(1000, b"abcd"))).len(), 1);
        let told = difference(&bench.primary(data(seq, payload)));
        assert_eq!((told.fact, told.primary[0]), (Fact::Resent, b'X'), "{seq}");
        assert!(is_held(&bench.secondary(data(1000, b"abcd"))), "{seq}");
        assert!(is_held(&bench.primary(data(seq, payload))), "{seq}: and no more");
        bench.checkpoint();
        assert_eq!(released(&bench.primary(data(1000, b"abcd"))).len(), 1, "{seq}");
        assert_eq!(difference(&bench.primary(data(seq, payload))).fact, Fact::Resent);
    }
}

#[test]
fn case_p09_what_a_commit_released_is_compared_when_it_is_said_again() {
    let data = |seq, payload: &[u8]| Tcp::data(seq, 500, payload).frame();
    let mut bench = connected();
    let epoch = bench.comparator.stop(EpochMode::Lockstep);
    bench.primary(data(1000, b"next"));
    bench.commit(epoch);
    bench.checkpoint_to(EpochMode::Buffered);
    bench.primary(data(1004, b"buffered"));
    bench.checkpoint();
    for _ in 0..3 {
        assert_eq!(released(&bench.primary(data(1002, b"xtbuff"))).len(), 1);
        bench.checkpoint();
    }
    assert_eq!(
        difference(&bench.primary(data(1002, b"xtbufX"))).offset,
        0,
        "before the epoch's part"
    );
}

#[test]
fn case_p09_what_is_not_kept_leaves_when_the_secondary_repeats_it() {
    let data = |seq, payload: &[u8]| Tcp::data(seq, 500, payload).frame();
    let mut bench = connected();
    assert!(
        is_held(&bench.primary(data(985, b"older0123"))),
        "it was said before the flow was known"
    );
    assert_eq!(difference(&bench.secondary(data(985, b"oldeX"))).fact, Fact::Bytes);
    bench.checkpoint();
    assert!(is_held(&bench.primary(data(985, b"older0123"))));
    assert_eq!(released(&bench.secondary(data(980, b"very older"))).len(), 1);
    assert!(is_held(&bench.wait(Duration::from_millis(1_000))));
}
