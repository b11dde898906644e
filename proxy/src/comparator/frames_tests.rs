//! The comparator case by case: kinds of frames, openings and ends of connections, going alone.

use checkpoint::{Duration, Epoch, EpochMode, limits};

use super::tests::{connected, difference, is_held};
use crate::comparator::{Comparator, ComparatorLimits, Mode};
use crate::counters::{FlowReport, Tally};
use crate::flow::{Class, Traffic};
use crate::testkit::*;
use crate::verdict::Fact;

#[test]
fn case_p15_datagrams_in_another_order_find_each_other() {
    let mut bench = Bench::new();
    bench.primary(udp(1, b"a"));
    bench.primary(udp(1, b"b"));
    assert_eq!(released(&bench.secondary(udp(1, b"b"))), [udp(1, b"b")]);
    assert_eq!(released(&bench.secondary(udp(1, b"a"))), [udp(1, b"a")]);
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
fn case_p17_ipv6_streams_and_neighbour_discovery_are_compared() {
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
}

#[test]
fn sctp_waits_for_commits_by_policy() {
    let (from, to) = ends(false, false);
    let chunk = |port: u8| {
        ip(
            from,
            to,
            132,
            64,
            &[],
            &[0, 80, 0, port, 1, 2, 3, 4, 0, 0, 0, 0, 0, 0, 0, 4],
        )
    };
    let mut bench = Bench::new();
    bench.primary(chunk(1));
    assert!(is_held(&bench.secondary(chunk(1))));
    assert!(bench.comparator.waits_for_commit(), "a checkpoint is due soon");
    assert!(is_held(&bench.wait(Duration::from_millis(1000))), "it is no divergence");
    bench.primary(chunk(2));
    assert_eq!(bench.comparator.flows().count(), 2);
    assert!(bench.comparator.flows().all(|flow| flow.buffered));
    assert_eq!(released(&bench.checkpoint()), [chunk(1), chunk(2)]);
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
    assert_eq!(difference(&bench.secondary(urgent(3))).fact, Fact::Urgent);
    let mut bench = connected();
    bench.primary(urgent(2));
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
    let epoch = bench.comparator.stop(EpochMode::Lockstep);
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
    bench.comparator.stop(EpochMode::Lockstep);
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
    assert_eq!(comparator.stop(EpochMode::Lockstep), Epoch(4));
    comparator.protect(Epoch(5), EpochMode::Lockstep);
    bench.comparator = comparator;
    assert!(
        is_held(&bench.primary(Tcp::data(1000, 500, b"abcd").frame())),
        "a retransmission of what was not kept"
    );
    assert_eq!(
        released(&bench.secondary(Tcp::data(1000, 500, b"abcd").frame())).len(),
        1
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
        (
            report.tally.matched,
            report.tally.waits,
            report.held,
            report.key.destination.port
        ),
        (1, 0, 1, 1)
    );
    assert_eq!(report.key.to_string(), "UDP 10.0.0.1:53 -> 10.0.0.9:1");
    assert_eq!(bench.comparator.counters().total().matched, 1);
    assert_eq!(bench.comparator.held().oldest, Some(bench.now));
}

#[test]
fn what_made_a_checkpoint_necessary_is_told_of_its_flow_and_of_its_kind() {
    let reports = |bench: &Bench| -> Vec<FlowReport> { bench.comparator.flows().collect() };
    // Bytes, the port that it is opened from, and output that waits: by none of the three the other flows are touched.
    let mut bench = Bench::new();
    bench.primary(udp(1, b"one"));
    bench.secondary(udp(1, b"two"));
    bench.wait(Duration::from_millis(1));
    let told = &reports(&bench)[0];
    assert_eq!((told.tally.mismatched, told.tally.unmatched), (1, 0));
    assert_eq!(told.difference.as_ref().unwrap().primary, b"one");
    bench.checkpoint();
    let told = &reports(&bench)[0];
    assert_eq!((told.tally.committed, told.tally.waits), (1, 1));

    let mut syn = Tcp::new(7, 0, SYN, &[]);
    bench.primary(syn.frame());
    syn.ports.0 += 1;
    bench.secondary(syn.frame());
    bench.wait(Duration::from_millis(1));
    let told = reports(&bench).into_iter().find(|told| told.key.class == Class::Tcp);
    let told = told.expect("the flow is known");
    assert_eq!(told.tally.mismatched, 1);
    assert_eq!(told.difference.unwrap().fact, Fact::Port);
    bench.checkpoint();

    bench.primary(udp(2, b"late"));
    bench.wait(limits::UNMATCHED_MAX);
    let told = reports(&bench).into_iter().find(|told| told.key.destination.port == 2);
    assert_eq!(told.expect("the flow is known").tally.unmatched, 1);
    bench.checkpoint();
    bench.comparator.release_all(&mut Vec::new());
    bench.primary(udp(1, b"alone"));
    let told = reports(&bench).into_iter().find(|told| told.key.destination.port == 1);
    assert_eq!(told.expect("the flow is known").tally.unprotected, 1);

    let counters = bench.comparator.counters();
    let of_udp = Tally {
        committed: 2,
        unprotected: 1,
        waits: 2,
        mismatched: 1,
        unmatched: 1,
        ..Tally::default()
    };
    assert_eq!(*counters.of(Traffic::Udp), of_udp);
    assert_eq!(
        (counters.of(Traffic::Tcp).mismatched, counters.total().mismatched),
        (1, 2)
    );
    assert!(counters.of(Traffic::Arp).is_empty());
}

#[test]
fn frames_without_room_in_the_flow_table_keep_their_order_over_a_commit() {
    let limits = ComparatorLimits {
        flows: 4,
        ..ComparatorLimits::default()
    };
    let mut bench = Bench::with(limits);
    (0..4).for_each(|port| drop(bench.primary(udp(port, b"x"))));
    let epoch = bench.comparator.stop(EpochMode::Lockstep);
    let verdicts = bench.primary(udp(9, b"first"));
    assert_eq!(divergence(&verdicts).unwrap().epoch, epoch.next());
    assert_eq!(released(&bench.commit(epoch)).len(), 4);
    bench.primary(udp(9, b"second"));
    assert_eq!(released(&bench.checkpoint()), [udp(9, b"first"), udp(9, b"second")]);
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
