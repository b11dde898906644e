use bytes::Bytes;
use checkpoint::{Duration, Epoch, Role};

use crate::comparator::{Comparator, ComparatorLimits, Mode};
use crate::testkit::*;
use crate::verdict::{Difference, Fact, Limit, Reason, Verdict};

fn is_held(verdicts: &[Verdict]) -> bool {
    verdicts.is_empty()
}

fn difference(verdicts: &[Verdict]) -> Difference {
    match divergence(verdicts).map(|divergence| &divergence.reason) {
        Some(Reason::Mismatch(difference)) => difference.clone(),
        other => panic!("a mismatch is expected, not {other:?}"),
    }
}

/// A bench on which the connection is known: both have sent up to 1000 and acknowledged up to 500.
fn connected() -> Bench {
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
        (arp(1, [10, 0, 0, 1]), arp(1, [10, 0, 0, 3])),
        (ethernet(&[], 0x88cc, &mac), ethernet(&[], 0x88cc, &[0x11, 0x23])),
        (Bytes::from_static(b"short"), Bytes::from_static(b"shart")),
    ];
    for (one, other) in pairs {
        let mut bench = Bench::new();
        assert!(is_held(&bench.primary(one.clone())));
        assert_eq!(
            bench.secondary(one.clone()),
            vec![Verdict::Release(one.clone())],
            "equal must be equal"
        );

        let mut bench = Bench::new();
        assert!(is_held(&bench.secondary(one.clone())));
        assert_eq!(
            bench.primary(one.clone()),
            vec![Verdict::Release(one.clone())],
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
        released(&bench.primary(Tcp::new(999, 500, ACK, b"9").frame())).len(),
        0,
        "in order"
    );
}

#[test]
fn case_p09_a_keep_alive_passes() {
    let mut bench = connected();
    assert_eq!(released(&bench.primary(Tcp::ack(999, 500).frame())).len(), 1);
    assert_eq!(
        released(&bench.primary(Tcp::data(999, 500, b"\0").frame())).len(),
        1,
        "with a byte of garbage"
    );
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
        other[at] ^= 0x40;
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
        other[at] ^= 1;
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
    assert_eq!(bench.comparator.stop(), Epoch(2));
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
    let epoch = bench.comparator.stop();
    assert!(is_held(
        &bench.secondary_in(epoch.0, Tcp::data(1000, 500, b"aabb").frame())
    ));
    assert_eq!(released(&bench.commit(epoch)).len(), 1);
}

#[test]
fn output_of_a_stopped_epoch_still_matches_while_it_is_sent() {
    let mut bench = connected();
    bench.primary(udp(1, b"a"));
    let epoch = bench.comparator.stop();
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
    let epoch = bench.comparator.stop();
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
        bench.secondary_in(2, vec![0; 10_000])[..],
        [Verdict::Violation(_)]
    ));
}

#[test]
fn case_p13_other_ports_on_an_active_open_end_in_a_checkpoint_not_a_stall() {
    let mut bench = Bench::new();
    let syn = |port| {
        Tcp {
            ports: (port, 5432),
            ..Tcp::new(7, 0, SYN, &[])
        }
        .frame()
    };
    bench.primary(syn(40_000));
    bench.secondary(syn(50_000));
    assert!(is_held(&bench.wait(Duration::from_millis(199))));
    let verdicts = bench.wait(Duration::from_millis(1));
    let reason = &divergence(&verdicts).unwrap().reason;
    assert!(matches!(reason, Reason::Unmatched { side: Role::Primary, waited } if waited.as_millis() == 200));
    assert_eq!(released(&bench.checkpoint()).len(), 1);
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
    let epoch = bench.comparator.stop();
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
    assert!(bench.comparator.counters().flows <= 3, "and room is made");
}

#[test]
fn case_p15_datagrams_in_another_order_find_each_other() {
    let mut bench = Bench::new();
    bench.primary(udp(1, b"a"));
    bench.primary(udp(1, b"b"));
    assert!(
        is_held(&bench.secondary(udp(1, b"b"))),
        "a flow's frames leave in order"
    );
    assert_eq!(
        released(&bench.secondary(udp(1, b"a"))),
        vec![udp(1, b"a"), udp(1, b"b")]
    );
    // Within the reorder window the other order is no difference on the primary's side either.
    bench.primary(udp(1, b"c"));
    bench.secondary(udp(1, b"d"));
    bench.secondary(udp(1, b"c"));
    assert_eq!(released(&bench.primary(udp(1, b"d"))), vec![udp(1, b"d")]);
    assert!(is_held(&bench.wait(Duration::from_millis(1000))));
    // Two equal datagrams need two.
    bench.primary(udp(1, b"e"));
    bench.primary(udp(1, b"e"));
    assert_eq!(released(&bench.secondary(udp(1, b"e"))).len(), 1);
}

#[test]
fn case_p16_arp_is_compared_and_the_secondarys_never_leaves() {
    let mut bench = Bench::new();
    assert!(is_held(&bench.secondary(arp(1, GUEST))));
    assert!(is_held(&bench.checkpoint()));
    assert!(is_held(&bench.primary(arp(1, GUEST))));
    assert_eq!(released(&bench.secondary(arp(1, GUEST))), vec![arp(1, GUEST)]);
}

#[test]
fn case_p17_ipv6_streams_fragments_and_neighbour_discovery_are_compared() {
    let mut bench = Bench::new();
    let tcp = Tcp {
        v6: true,
        ..Tcp::data(10, 5, b"six")
    }
    .frame();
    bench.primary(tcp.clone());
    assert_eq!(released(&bench.secondary(tcp)).len(), 1);

    let (from, to) = ends(true, false);
    let solicitation = ip(
        from,
        to,
        58,
        255,
        &[],
        &[
            135, 0, 1, 2, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16,
        ],
    );
    bench.primary(solicitation.clone());
    assert_eq!(released(&bench.secondary(solicitation)).len(), 1);

    let fragment = |id: u8, offset: u8, byte: u8| {
        ip(
            from,
            to,
            44,
            64,
            &[],
            &[17, 0, 0, offset | 1, 0, 0, 0, id, byte, 1, 2, 3, 4, 5, 6, 7],
        )
    };
    bench.primary(fragment(1, 0, 9));
    assert_eq!(
        released(&bench.secondary(fragment(2, 0, 9))).len(),
        1,
        "the identification is ignored"
    );
    bench.primary(fragment(1, 8, 9));
    bench.secondary(fragment(1, 16, 9));
    assert!(
        divergence(&bench.wait(Duration::from_millis(1))).is_some(),
        "the offset is not"
    );
}

#[test]
fn case_p18_p22_vlans_and_jumbo_frames_are_flows_of_their_own() {
    let mut bench = Bench::new();
    let tagged = |vlans: &[(u16, u16)]| {
        Tcp {
            vlans: vlans.to_vec(),
            ..Tcp::data(10, 5, &[7; 8_900])
        }
        .frame()
    };
    let qinq = [(0x88a8, 7), (0x8100, 8)];
    bench.primary(tagged(&[(0x8100, 7)]));
    bench.primary(tagged(&qinq));
    assert!(is_held(&bench.secondary(tagged(&[(0x8100, 8)]))), "another VLAN");
    assert_eq!(
        released(&bench.secondary(tagged(&[(0x88a8, 7), (0x8100, 0x2008)]))),
        vec![tagged(&qinq)],
        "priority is ignored"
    );
    assert_eq!(released(&bench.secondary(tagged(&[(0x8100, 7)]))).len(), 1);
}

#[test]
fn case_p20_fin_rst_syn_and_urgent_are_compared_as_facts() {
    let fin = Tcp::new(1004, 500, ACK | FIN, b"").frame();
    let mut bench = connected();
    bench.primary(Tcp::data(1000, 500, b"abcd").frame());
    bench.secondary(Tcp::data(1000, 500, b"abcd").frame());
    assert!(is_held(&bench.primary(fin.clone())));
    assert_eq!(released(&bench.secondary(fin.clone())).len(), 1);
    assert_eq!(
        released(&bench.primary(fin.clone())).len(),
        1,
        "a FIN that matched passes again"
    );

    let mut bench = connected();
    bench.primary(Tcp::new(1000, 500, ACK | FIN, b"abcd").frame());
    let verdicts = bench.secondary(Tcp::data(1000, 500, b"abcde").frame());
    assert_eq!(difference(&verdicts).fact, Fact::StreamEnd);

    let mut bench = connected();
    assert!(is_held(&bench.primary(Tcp::new(1000, 500, RST | ACK, b"").frame())));
    assert!(is_held(&bench.secondary(Tcp::ack(1000, 500).frame())));
    assert_eq!(
        released(&bench.secondary(Tcp::new(1000, 500, RST | ACK, b"").frame())).len(),
        1
    );

    let mut bench = connected();
    let urgent = |urgent| {
        Tcp {
            urgent,
            ..Tcp::new(1000, 500, ACK | URG, b"abcd")
        }
        .frame()
    };
    bench.primary(urgent(2));
    assert!(is_held(&bench.secondary(urgent(3))), "another urgent position");
    assert_eq!(released(&bench.secondary(urgent(2))).len(), 1);
}

#[test]
fn case_p20_a_syn_must_offer_the_same() {
    let syn = |mss: u8| {
        let mut syn = Tcp::new(100, 51, SYN | ACK, b"");
        syn.options = vec![2, 4, 5, mss, 1, 3, 3, 7];
        syn.frame()
    };
    let mut bench = Bench::new();
    bench.primary(syn(180));
    assert_eq!(released(&bench.secondary(syn(180))).len(), 1);
    let mut bench = Bench::new();
    bench.primary(syn(180));
    assert_eq!(difference(&bench.secondary(syn(100))).fact, Fact::Offer);
}

#[test]
fn a_connection_opened_in_the_epoch_is_compared_over_both_initial_numbers() {
    for (mine, theirs) in [
        (100, 3_000_000_000),
        (u32::MAX - 1, 5),
        (4_000_000_000, 100),
        (100, 100),
    ] {
        let mut bench = Bench::new();
        bench.primary(Tcp::new(mine, 51, SYN | ACK, b"").frame());
        assert_eq!(
            released(&bench.secondary(Tcp::new(theirs, 51, SYN | ACK, b"").frame())).len(),
            1
        );
        assert_eq!(
            released(&bench.primary(Tcp::new(mine, 51, SYN | ACK, b"").frame())).len(),
            1,
            "repeated"
        );
        let first = mine.wrapping_add(1);
        bench.primary(Tcp::data(first, 60, b"banner").frame());
        let translated = Tcp::data(first, 60, b"banner").frame();
        assert_eq!(released(&bench.secondary(translated)).len(), 1);
        bench.secondary(Tcp::new(theirs, 51, SYN | ACK, b"").frame());
        assert!(
            is_held(&bench.wait(Duration::from_millis(1000))),
            "the secondary's repeated SYN waits for nothing"
        );
        bench.checkpoint();
        assert_eq!(
            released(&bench.primary(Tcp::new(mine, 51, SYN | ACK, b"").frame())).len(),
            1,
            "committed"
        );
        bench.primary(Tcp::data(first.wrapping_add(6), 60, b"more").frame());
        assert_eq!(
            released(&bench.secondary(Tcp::data(first.wrapping_add(6), 60, b"more").frame())).len(),
            1
        );
    }
}

#[test]
fn data_before_the_offset_is_known_is_compared_over_the_secondarys_own_number() {
    let mut bench = Bench::new();
    bench.primary(Tcp::new(100, 51, SYN | ACK, b"").frame());
    bench.secondary(Tcp::new(3_000_000_000, 51, SYN | ACK, b"").frame());
    bench.primary(Tcp::data(101, 51, b"early").frame());
    assert_eq!(
        released(&bench.secondary(Tcp::data(3_000_000_001, 51, b"early").frame())).len(),
        1
    );
}

#[test]
fn a_new_connection_on_the_same_ports_waits_until_both_have_opened_it() {
    let syn = |seq| Tcp::new(seq, 900, SYN | ACK, b"").frame();
    let data = |seq, ack| Tcp::data(seq, ack, b"new").frame();
    let mut bench = connected();
    assert!(is_held(&bench.primary(syn(70_000))));
    assert!(is_held(&bench.primary(data(70_001, 901))));
    let leaving = released(&bench.secondary(syn(2_000_000_000)));
    assert_eq!(leaving, vec![syn(70_000)]);
    assert_eq!(released(&bench.secondary(data(70_001, 901))).len(), 1);

    // The secondary first.
    let mut bench = connected();
    assert!(is_held(&bench.secondary(syn(2_000_000_000))));
    assert!(is_held(&bench.secondary(data(70_001, 901))));
    assert_eq!(released(&bench.primary(syn(70_000))).len(), 1);
    assert_eq!(released(&bench.primary(data(70_001, 901))).len(), 1);
    assert_eq!(bench.comparator.pending(), crate::Pending::default());

    // The primary still has output of the old one that the secondary never sent.
    let mut bench = connected();
    bench.primary(Tcp::data(1000, 500, b"old").frame());
    bench.primary(syn(70_000));
    assert_eq!(difference(&bench.secondary(syn(2_000_000_000))).fact, Fact::Connection);
    assert_eq!(released(&bench.checkpoint()).len(), 2);
    bench.primary(Tcp::data(70_001, 900, b"on").frame());
    assert_eq!(
        released(&bench.secondary(Tcp::data(70_001, 900, b"on").frame())).len(),
        1
    );
}

#[test]
fn padding_that_nobody_compared_is_cut_off() {
    let mut bench = connected();
    let frame = Tcp::data(1000, 500, b"ab").frame();
    let padded = [&frame[..], &[0xee; 6]].concat();
    bench.primary(padded);
    assert_eq!(released(&bench.secondary(frame.clone())), vec![frame]);
}

#[test]
fn case_p21_output_leaves_at_most_once_through_an_abandoned_epoch() {
    let mut bench = connected();
    bench.primary(udp(1, b"a"));
    bench.primary(udp(1, b"b"));
    let epoch = bench.comparator.stop();
    bench.primary(udp(1, b"c"));
    assert_eq!(released(&bench.secondary_in(epoch.0, udp(1, b"a"))).len(), 1);
    bench.comparator.abandon();
    assert_eq!(bench.comparator.held().frames, 2);
    assert_eq!(
        released(&bench.secondary_in(epoch.0, udp(1, b"b"))).len(),
        1,
        "the secondary is where it was"
    );
    let mut verdicts = Vec::new();
    bench.comparator.release_all(&mut verdicts);
    assert_eq!(released(&verdicts), vec![udp(1, b"c")]);
    assert_eq!(released(&bench.primary(udp(1, b"d"))), vec![udp(1, b"d")]);
    assert_eq!(bench.comparator.mode(), Mode::Alone);
}

#[test]
fn an_abandoned_epoch_is_covered_by_the_next_commit() {
    let mut bench = connected();
    bench.primary(udp(1, b"a"));
    bench.comparator.stop();
    bench.primary(udp(1, b"b"));
    bench.comparator.abandon();
    bench.primary(udp(1, b"c"));
    assert_eq!(
        released(&bench.checkpoint()),
        vec![udp(1, b"a"), udp(1, b"b"), udp(1, b"c")]
    );
}

#[test]
fn protection_begins_with_what_left_before() {
    let mut comparator = Comparator::new(ComparatorLimits::default(), Epoch(4));
    let mut bench = Bench::new();
    let mut verdicts = Vec::new();
    comparator.primary_output(bench.now, Tcp::data(1000, 500, b"abcd").frame(), &mut verdicts);
    assert_eq!(released(&verdicts).len(), 1, "nobody could take over yet");
    assert_eq!(comparator.stop(), Epoch(4));
    comparator.protect(Epoch(5));
    bench.comparator = comparator;
    assert_eq!(
        released(&bench.primary(Tcp::data(1000, 500, b"abcd").frame())).len(),
        1,
        "a retransmission"
    );
    assert!(is_held(&bench.primary(Tcp::data(1004, 500, b"efgh").frame())));
    bench.comparator.commit(bench.now, Epoch(4), &mut verdicts);
    assert_eq!(
        bench.comparator.held().frames,
        1,
        "the commit of the synchronised state releases nothing"
    );
    assert_eq!(
        released(&bench.secondary(Tcp::data(1004, 500, b"efgh").frame())).len(),
        1
    );
}

#[test]
fn flows_and_counters_tell_what_happened() {
    let mut bench = Bench::new();
    bench.primary(udp(1, b"a"));
    bench.secondary(udp(1, b"a"));
    bench.primary(udp(1, b"b"));
    let report = bench.comparator.flows().next().unwrap();
    assert_eq!(
        (report.matched, report.waits, report.held, report.key.destination.port),
        (1, 0, 1, 1)
    );
    assert_eq!(report.key.to_string(), "UDP 10.0.0.1:53 -> 10.0.0.9:1");
    assert_eq!(bench.comparator.counters().matched, 1);
    assert_eq!(bench.comparator.held().oldest, Some(bench.now));
}

#[test]
fn frames_without_room_in_the_flow_table_keep_their_order_over_a_commit() {
    let limits = ComparatorLimits {
        flows: 4,
        ..ComparatorLimits::default()
    };
    let mut bench = Bench::with(limits);
    (0..4).for_each(|port| drop(bench.primary(udp(port, b"x"))));
    let epoch = bench.comparator.stop();
    let verdicts = bench.primary(udp(9, b"first"));
    assert_eq!(divergence(&verdicts).unwrap().epoch, epoch.next());
    assert_eq!(released(&bench.commit(epoch)).len(), 4);
    bench.primary(udp(9, b"second"));
    assert!(is_held(&bench.secondary(udp(9, b"second"))));
    assert_eq!(
        released(&bench.secondary(udp(9, b"first"))),
        vec![udp(9, b"first"), udp(9, b"second")]
    );
}

#[test]
fn a_reset_forgets_what_was_owed() {
    let mut bench = connected();
    bench.primary(Tcp::data(1000, 600, b"hello").frame());
    bench.secondary(Tcp::data(1000, 500, b"hello").frame());
    bench.primary(Tcp::new(1005, 600, RST | ACK, b"").frame());
    assert_eq!(released(&bench.checkpoint()).len(), 1);
    bench.primary(Tcp::new(70, 0, SYN, b"").frame());
    assert_eq!(
        released(&bench.secondary(Tcp::new(90, 0, SYN, b"").frame())).len(),
        1,
        "a new connection"
    );
}
