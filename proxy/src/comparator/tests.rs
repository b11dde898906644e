//! The comparator case by case: streams, acknowledgements, epochs and limits.

use bytes::Bytes;
use checkpoint::limits::FRAME_HEADER_BYTES;
use checkpoint::{Duration, Epoch, EpochMode, Role};

use crate::comparator::ComparatorLimits;
use crate::testkit::*;
use crate::verdict::{Difference, Fact, Limit, Reason, Verdict, Why};

pub(super) fn is_held(verdicts: &[Verdict]) -> bool {
    verdicts.is_empty()
}

pub(super) fn difference(verdicts: &[Verdict]) -> Difference {
    match divergence(verdicts).map(|divergence| &divergence.reason) {
        Some(Reason::Mismatch(difference)) => difference.clone(),
        other => panic!("a mismatch is expected, not {other:?}"),
    }
}

/// A bench on which the connection is known: both have sent up to 1000 and acknowledged up to 500.
pub(super) fn connected() -> Bench {
    let mut bench = Bench::new();
    assert!(is_held(&bench.primary(Tcp::data(990, 500, b"0123456789").frame())));
    assert_eq!(released(&bench.checkpoint()).len(), 1);
    bench
}

#[test]
fn case_p23_equal_output_is_released_and_different_output_is_not() {
    let mac = [0x11, 0x22];
    let pairs: Vec<(Bytes, Bytes)> = vec![
        (Tcp::data(10, 5, b"abc").frame(), Tcp::data(10, 5, b"abd").frame()),
        (udp(1, b"abc"), udp(1, b"abd")),
        (arp(1, [10, 0, 0, 1]), arp(2, [10, 0, 0, 1])),
        (ethernet(&[], 0x88cc, &mac), ethernet(&[], 0x88cc, &[0x11, 0x23])),
        (Bytes::from_static(b"short"), Bytes::from_static(b"shart")),
    ];
    for (one, other) in pairs {
        let mut bench = Bench::new();
        assert!(is_held(&bench.primary(one.clone())));
        assert_eq!(
            bench.secondary(one.clone()),
            vec![Verdict::Release(one.clone(), Why::Equal)],
            "equal must be equal"
        );

        let mut bench = Bench::new();
        assert!(is_held(&bench.secondary(one.clone())));
        assert_eq!(
            bench.primary(one.clone()),
            vec![Verdict::Release(one.clone(), Why::Equal)],
            "equal must be equal"
        );

        let mut bench = Bench::new();
        let mut verdicts = bench.primary(one.clone());
        verdicts.extend(bench.secondary(other));
        verdicts.extend(bench.wait(Duration::from_millis(2)));
        assert!(released(&verdicts).is_empty(), "different must not leave");
        assert_eq!(difference(&verdicts).fact, Fact::Bytes);
        assert_eq!(released(&bench.checkpoint()), vec![one], "a commit covers it");
    }
}

#[test]
fn the_first_difference_is_shown_with_both_sides() {
    let mut bench = connected();
    bench.primary(Tcp::data(1000, 500, b"the same then ABC").frame());
    let found = difference(&bench.secondary(Tcp::data(1000, 500, b"the same then AxC").frame()));
    assert_eq!(
        (found.offset, &found.primary[..], &found.secondary[..]),
        (15, &b"BC"[..], &b"xC"[..])
    );
}

#[test]
fn case_p06_p07_segments_cut_elsewhere_are_the_same_stream() {
    let mut bench = connected();
    assert!(is_held(&bench.primary(Tcp::data(1000, 500, b"abcdefgh").frame())));
    assert!(is_held(&bench.secondary(Tcp::data(1000, 500, b"abc").frame())));
    assert!(is_held(&bench.primary(Tcp::data(1008, 500, b"ij").frame())));
    let leaving = released(&bench.secondary(Tcp::data(1003, 500, b"defghij").frame()));
    assert_eq!(leaving.len(), 2);
    assert_eq!(segment(&leaving[0]).1, b"abcdefgh");
    // The secondary is ahead, and starts in the middle.
    assert!(is_held(&bench.secondary(Tcp::data(1010, 500, b"klmnop").frame())));
    assert_eq!(released(&bench.primary(Tcp::data(1010, 500, b"kl").frame())).len(), 1);
    assert_eq!(
        released(&bench.primary(Tcp::data(1011, 500, b"lmnop").frame())).len(),
        1
    );
    assert_eq!(bench.comparator.pending().frames, 0);
}

#[test]
fn case_p08_an_acknowledgement_waits_for_the_secondarys() {
    let mut bench = connected();
    assert!(
        is_held(&bench.primary(Tcp::ack(1000, 600).frame())),
        "a pure ACK is an output"
    );
    assert!(is_held(&bench.secondary(Tcp::ack(1000, 550).frame())));
    let leaving = released(&bench.secondary(Tcp::ack(1000, 600).frame()));
    assert_eq!(segment(&leaving[0]).0.ack.unwrap().0, 600);
}

#[test]
fn case_p08_equal_segments_with_unequal_acknowledgements_leave_with_the_lower() {
    for v6 in [false, true] {
        let mut bench = Bench::new();
        let tcp = |ack, payload: &[u8]| Tcp {
            v6,
            ..Tcp::data(1000, ack, payload)
        };
        bench.primary(
            Tcp {
                seq: 999,
                ..tcp(500, b"x")
            }
            .frame(),
        );
        bench.checkpoint();
        assert!(is_held(&bench.primary(tcp(600, b"hello").sack(&[(700, 800)]).frame())));
        let leaving = released(&bench.secondary(tcp(550, b"hello").frame()));
        let (lowered, payload) = segment(&leaving[0]);
        assert_eq!((lowered.ack.unwrap().0, &payload[..]), (550, &b"hello"[..]));
        assert_eq!(
            lowered.options.sack, None,
            "SACK blocks above the permitted are blanked"
        );
        assert_eq!(lowered.payload - lowered.tcp, 32, "in place");
        // What was lowered is paid when the secondary has acknowledged as much.
        let paid = released(&bench.secondary(tcp(600, b"").frame()));
        let (ack, payload) = segment(&paid[0]);
        assert_eq!((ack.seq.0, ack.ack.unwrap().0, payload.len()), (1005, 600, 0));
        assert!(is_held(&bench.secondary(tcp(700, b"").frame())), "once");
    }
}

#[test]
fn case_p08_a_commit_pays_a_lowered_acknowledgement_and_permits_it() {
    let mut bench = connected();
    bench.primary(Tcp::data(1000, 600, b"hello").frame());
    assert_eq!(
        released(&bench.secondary(Tcp::data(1000, 500, b"hello").frame())).len(),
        1
    );
    let paid = released(&bench.checkpoint());
    assert_eq!(paid.len(), 1);
    assert_eq!(segment(&paid[0]).0.ack.unwrap().0, 600);
    assert_eq!(released(&bench.primary(Tcp::ack(1005, 600).frame())).len(), 1);
    assert!(is_held(&bench.primary(Tcp::ack(1005, 601).frame())));
}

#[test]
fn case_p08_an_acknowledgement_of_the_epoch_before_does_not_count() {
    let mut bench = connected();
    bench.secondary(Tcp::ack(1000, 900).frame());
    bench.checkpoint();
    // The load has taken the secondary's guest back to what the primary's has acknowledged.
    assert!(is_held(&bench.primary(Tcp::ack(1000, 600).frame())));
}

#[test]
fn case_p08_a_sack_block_waits_like_an_acknowledgement() {
    let mut bench = connected();
    let with_sack = |right| Tcp::ack(1000, 500).sack(&[(600, right)]).frame();
    assert!(is_held(&bench.primary(with_sack(700))));
    assert!(is_held(&bench.secondary(with_sack(650))));
    assert_eq!(released(&bench.secondary(with_sack(700))).len(), 1);
}

#[test]
fn a_signed_segment_waits_rather_than_being_lowered() {
    let mut bench = connected();
    let mut signed = Tcp::data(1000, 600, b"hi");
    signed.options = [&[19, 18][..], &[7; 16], &[1, 1]].concat();
    bench.primary(signed.frame());
    assert!(is_held(&bench.secondary(Tcp::data(1000, 500, b"hi").frame())));
    assert_eq!(released(&bench.secondary(Tcp::ack(1002, 600).frame())).len(), 1);
}

#[test]
fn case_p09_retransmitted_bytes_pass_at_once_and_match_once() {
    let mut bench = connected();
    bench.primary(Tcp::data(1000, 500, b"abcd").frame());
    bench.secondary(Tcp::data(1000, 500, b"abcd").frame());
    assert_eq!(
        released(&bench.primary(Tcp::data(1000, 500, b"abcd").frame())).len(),
        1,
        "matched before"
    );
    assert_eq!(
        released(&bench.primary(Tcp::data(990, 500, b"0123456789abcd").frame())).len(),
        1,
        "and committed"
    );
    assert!(is_held(&bench.secondary(Tcp::data(1000, 500, b"abcd").frame())));
    assert_eq!(
        bench.comparator.pending().frames,
        0,
        "the secondary's retransmission waits for nothing"
    );
    assert!(
        is_held(&bench.primary(Tcp::data(1002, 500, b"cdNEW").frame())),
        "new bytes are not covered by old"
    );
    assert_eq!(
        released(&bench.primary(Tcp::data(1000, 500, b"abcd").frame())).len(),
        1,
        "old bytes do not wait for new ones"
    );
}

#[test]
fn case_p09_a_keep_alive_passes() {
    let mut bench = connected();
    assert_eq!(released(&bench.primary(Tcp::ack(999, 500).frame())).len(), 1);
    assert_eq!(
        released(&bench.primary(Tcp::data(999, 500, b"9").frame())).len(),
        1,
        "with the last byte"
    );
    let garbage = || Tcp::data(999, 500, b"\0").frame();
    assert!(is_held(&bench.primary(garbage())), "any other is not what was said");
    assert_eq!(released(&bench.secondary(garbage())).len(), 1);
    bench.checkpoint();
    assert!(is_held(&bench.secondary(garbage())));
    assert_eq!(released(&bench.primary(garbage())).len(), 1);
    assert!(is_held(&bench.primary(Tcp::data(999, 500, b"\x01").frame())));
}

#[test]
fn a_retransmission_with_other_bytes_is_a_difference() {
    let mut bench = connected();
    bench.primary(Tcp::data(1000, 500, b"abcd").frame());
    assert_eq!(
        difference(&bench.primary(Tcp::data(1000, 500, b"abXd").frame())).fact,
        Fact::Resent
    );
}

#[test]
fn case_p10_p11_what_policy_ignores_is_ignored() {
    let mut bench = connected();
    let mut other = Tcp {
        window: 7,
        ttl: 3,
        ..Tcp::data(1000, 500, b"same")
    };
    other.options = vec![1, 1, 8, 10, 0, 0, 0, 9, 0, 0, 0, 8];
    bench.primary(Tcp::data(1000, 500, b"same").frame());
    assert_eq!(released(&bench.secondary(other.frame())).len(), 1);

    let frame = udp(5, b"same").to_vec();
    for (at, _what) in [
        (15, "TOS"),
        (18, "id"),
        (19, "id"),
        (20, "DF"),
        (22, "TTL"),
        (24, "checksum"),
        (40, "UDP checksum"),
    ] {
        let mut other = frame.clone();
        other[FRAME_HEADER_BYTES + at] ^= 0x40;
        bench.primary(Bytes::from(frame.clone()));
        assert_eq!(
            released(&bench.secondary(Bytes::from(other))).len(),
            1,
            "byte {at} is ignored"
        );
    }
    for at in [6, 42, 45] {
        let mut bench = Bench::new();
        let mut other = frame.clone();
        other[FRAME_HEADER_BYTES + at] ^= 1;
        bench.primary(Bytes::from(frame.clone()));
        bench.secondary(Bytes::from(other));
        assert_eq!(
            difference(&bench.wait(Duration::from_millis(1))).offset,
            at as u64,
            "byte {at} is compared"
        );
    }
}

#[test]
fn case_p12_a_divergence_is_told_once_and_nothing_leaves_from_there_on() {
    let mut bench = connected();
    bench.primary(Tcp::data(1000, 500, b"Date: 1").frame());
    assert!(divergence(&bench.secondary(Tcp::data(1000, 500, b"Date: 2").frame())).is_some());
    bench.primary(Tcp::data(1007, 500, b"tail").frame());
    assert!(is_held(&bench.secondary(Tcp::data(1007, 500, b"tail").frame())));
    assert!(is_held(&bench.wait(Duration::from_millis(1000))), "once for an epoch");
    assert_eq!(bench.comparator.stop(EpochMode::Lockstep), Epoch(2));
    bench.primary(Tcp::data(1011, 500, b"next").frame());
    let frames = released(&bench.commit(Epoch(2)));
    assert_eq!(
        frames.iter().map(|frame| segment(frame).1).collect::<Vec<_>>(),
        vec![b"Date: 1".to_vec(), b"tail".to_vec()]
    );
    assert_eq!(
        released(&bench.secondary(Tcp::data(1011, 500, b"next").frame())).len(),
        1,
        "compared again"
    );
}

#[test]
fn a_divergence_of_an_epoch_that_is_being_checkpointed_triggers_nothing() {
    let mut bench = connected();
    bench.primary(Tcp::data(1000, 500, b"aaaa").frame());
    let epoch = bench.comparator.stop(EpochMode::Lockstep);
    assert!(is_held(
        &bench.secondary_in(epoch.0, Tcp::data(1000, 500, b"aabb").frame())
    ));
    assert_eq!(released(&bench.commit(epoch)).len(), 1);
}

#[test]
fn output_of_a_stopped_epoch_still_matches_while_it_is_sent() {
    let mut bench = connected();
    bench.primary(udp(1, b"a"));
    let epoch = bench.comparator.stop(EpochMode::Lockstep);
    bench.primary(udp(1, b"b"));
    assert_eq!(released(&bench.secondary_in(epoch.0, udp(1, b"a"))), vec![udp(1, b"a")]);
    assert!(is_held(&bench.secondary_in(epoch.0, udp(1, b"b"))), "of another epoch");
    assert!(is_held(&bench.commit(epoch)), "not even at the commit");
    assert!(
        is_held(&bench.secondary_in(epoch.0, udp(1, b"b"))),
        "and it is stale after it"
    );
    assert_eq!(released(&bench.secondary(udp(1, b"b"))), vec![udp(1, b"b")]);
}

#[test]
fn output_that_overtakes_its_commit_waits_for_it() {
    let mut bench = connected();
    let epoch = bench.comparator.stop(EpochMode::Lockstep);
    bench.primary(udp(1, b"a"));
    assert!(is_held(&bench.secondary_in(epoch.next().0, udp(1, b"a"))));
    assert_eq!(released(&bench.commit(epoch)), vec![udp(1, b"a")]);
    assert_eq!(bench.comparator.pending(), crate::Pending::default());
}

#[test]
fn output_of_an_epoch_not_reached_is_a_violation() {
    let mut bench = connected();
    assert!(matches!(
        bench.secondary_in(9, udp(1, b"a"))[..],
        [Verdict::Violation(_)]
    ));
    assert!(matches!(
        bench.secondary_in(2, vec![0; checkpoint::limits::FRAME_BYTES_MAX + 1])[..],
        [Verdict::Violation(_)]
    ));
}

#[test]
fn output_of_the_secondary_alone_ends_in_a_checkpoint_too() {
    for frame in [
        udp(1, b"x"),
        Tcp::data(1000, 500, b"x").frame(),
        Tcp::new(1000, 500, RST, b"").frame(),
    ] {
        let mut bench = connected();
        bench.secondary(frame);
        let verdicts = bench.wait(Duration::from_millis(200));
        assert!(matches!(
            divergence(&verdicts).unwrap().reason,
            Reason::Unmatched {
                side: Role::Secondary,
                ..
            }
        ));
    }
}

#[test]
fn the_bound_counts_from_the_load() {
    let mut bench = Bench::new();
    let epoch = bench.comparator.stop(EpochMode::Lockstep);
    bench.primary(udp(1, b"a"));
    assert_eq!(
        bench.comparator.deadline(),
        None,
        "the secondary cannot have produced it"
    );
    let mut verdicts = Vec::new();
    bench.comparator.commit(bench.now, epoch, &mut verdicts);
    assert_eq!(bench.comparator.deadline(), None);
    bench.now += Duration::from_millis(500);
    bench.comparator.loaded(bench.now, epoch);
    assert_eq!(
        bench.comparator.deadline(),
        Some(bench.now + Duration::from_millis(200))
    );
}

#[test]
fn case_p14_a_full_queue_is_a_checkpoint_and_never_a_drop() {
    let limits = ComparatorLimits {
        held_frames: 10,
        pending_frames: 10,
        flows: 4,
        ..ComparatorLimits::default()
    };
    let mut bench = Bench::with(limits);
    let verdicts: Vec<Verdict> = (0..11).flat_map(|number| bench.primary(udp(1, &[number]))).collect();
    assert!(matches!(&verdicts[..], [Verdict::Diverged(told)] if told.reason == Reason::Limit(Limit::Held)));
    assert!(!bench.comparator.is_full());
    (11..21).for_each(|number| drop(bench.primary(udp(1, &[number]))));
    assert!(bench.comparator.is_full());
    assert_eq!(
        released(&bench.checkpoint()),
        (0..21).map(|number| udp(1, &[number])).collect::<Vec<_>>()
    );

    let mut bench = Bench::with(limits);
    let verdicts: Vec<Verdict> = (0..50).flat_map(|number| bench.secondary(udp(1, &[number]))).collect();
    assert!(matches!(&verdicts[..], [Verdict::Diverged(told)] if told.reason == Reason::Limit(Limit::Pending)));
    assert!(bench.comparator.pending().frames <= 11, "bounded");

    let mut bench = Bench::with(limits);
    let verdicts: Vec<Verdict> = (0..6).flat_map(|port| bench.primary(udp(port, b"x"))).collect();
    assert!(matches!(&verdicts[..], [Verdict::Diverged(told)] if told.reason == Reason::Limit(Limit::Flows)));
    assert!(is_held(&bench.secondary(udp(5, b"x"))));
    assert_eq!(
        released(&bench.checkpoint()).len(),
        6,
        "a frame without a flow waits for the commit"
    );
    bench.primary(udp(7, b"x"));
    assert_eq!(released(&bench.secondary(udp(7, b"x"))).len(), 1, "and room is made");
    assert_eq!(bench.comparator.counters().flows, 4);
}

#[test]
fn a_connection_whose_syn_left_untranslated_is_compared_from_its_first_segment() {
    for (syn, known) in [(0x0ee4_1e74, 0xd134_ae40), (0xd134_ae40, 0x0ee4_1e74)] {
        let mut bench = Bench::new();
        bench.primary(Tcp::new(syn, 0, SYN, b"").frame());
        bench.checkpoint();
        // The peer's answer has told by which number it knows the connection: from now on everything is translated.
        let first = Tcp::data(known + 1, 500, b"first").frame();
        assert!(is_held(&bench.primary(first.clone())));
        assert_eq!(released(&bench.secondary(first.clone())), vec![first]);
        let second = Tcp::data(known + 6, 500, b"second").frame();
        assert!(is_held(&bench.primary(second.clone())), "the secondary has not said it");
        assert_eq!(released(&bench.secondary(second.clone())), vec![second]);
    }
}
