//! How long output waits for an equal, and what is known before it has waited for long.

use bytes::Bytes;
use checkpoint::{Duration, Role};

use super::tests::{difference, is_held};
use crate::comparator::ComparatorLimits;
use crate::temper::FlowPatience;
use crate::testkit::*;
use crate::verdict::{Fact, Reason, Verdict};

fn syn(from: u16, to: u16) -> Bytes {
    Tcp {
        ports: (from, to),
        ..Tcp::new(7, 0, SYN, &[])
    }
    .frame()
}

fn datagram(from: u16, to: u16) -> Bytes {
    let mut frame = udp(to, b"who is it").to_vec();
    frame[TRANSPORT_AT..TRANSPORT_AT + 2].copy_from_slice(&from.to_be_bytes());
    frame.into()
}

fn unmatched(verdicts: &[Verdict]) -> Option<(Role, u64)> {
    match divergence(verdicts)?.reason {
        Reason::Unmatched { side, waited } => Some((side, waited.as_millis())),
        _ => None,
    }
}

#[test]
fn case_p13_a_flow_opened_from_other_ports_differs_at_once() {
    type Open = fn(u16, u16) -> Bytes;
    for open in [syn as Open, datagram] {
        for secondary_first in [false, true] {
            let mut bench = Bench::new();
            if secondary_first {
                bench.secondary(open(50_000, 5432));
                bench.primary(open(40_000, 5432));
            } else {
                bench.primary(open(40_000, 5432));
                bench.secondary(open(50_000, 5432));
            }
            assert!(
                is_held(&bench.wait(Duration::from_micros(999))),
                "one of them may be late"
            );
            let verdicts = bench.wait(Duration::from_micros(1));
            let found = difference(&verdicts);
            assert_eq!(
                (found.fact, &found.primary[..], &found.secondary[..]),
                (Fact::Port, &40_000u16.to_be_bytes()[..], &50_000u16.to_be_bytes()[..])
            );
            let text = divergence(&verdicts).unwrap().to_string();
            assert!(
                text.starts_with("opened from port 40000 by the primary and from 50000 by the secondary on "),
                "{text}"
            );
            assert_eq!(released(&bench.checkpoint()), [open(40_000, 5432)]);
            assert!(is_held(&bench.wait(Duration::from_millis(1_000))), "once");
        }
    }
}

#[test]
fn case_p13_flows_of_which_one_is_only_late_do_not_differ() {
    let mut bench = Bench::new();
    bench.primary(syn(40_000, 5432));
    bench.primary(syn(40_001, 5432));
    assert_eq!(
        released(&bench.secondary(syn(40_001, 5432))).len(),
        1,
        "in another order"
    );
    bench.secondary(syn(50_000, 5433));
    assert!(
        is_held(&bench.wait(Duration::from_millis(150))),
        "to another destination"
    );
    assert_eq!(released(&bench.secondary(syn(40_000, 5432))).len(), 1);
    bench.checkpoint();
    // Both cross, and each comes in time.
    bench.primary(syn(41_000, 5432));
    bench.secondary(syn(41_001, 5432));
    assert_eq!(released(&bench.secondary(syn(41_000, 5432))).len(), 1);
    assert_eq!(released(&bench.primary(syn(41_001, 5432))).len(), 1);
    assert!(is_held(&bench.wait(Duration::from_millis(199))));
}

#[test]
fn case_p13_a_repeated_opening_that_a_commit_covers_does_not_differ() {
    let mut bench = Bench::new();
    bench.primary(syn(40_000, 5432));
    bench.checkpoint();
    bench.secondary(syn(40_000, 5432));
    bench.secondary(syn(40_001, 5432));
    bench.primary(syn(40_000, 5432));
    assert_eq!(
        unmatched(&bench.wait(Duration::from_millis(200))),
        Some((Role::Secondary, 200))
    );
}

/// Lets that many datagrams find their equals so late.
fn trail(bench: &mut Bench, matches: u32, lag: Duration) {
    for _ in 0..matches {
        bench.primary(udp(9, b"again"));
        bench.wait(lag);
        assert_eq!(released(&bench.secondary(udp(9, b"again"))).len(), 1);
    }
}

#[test]
fn output_waits_as_long_as_the_secondary_has_been_late_lately() {
    let mut bench = Bench::new();
    trail(&mut bench, 100, Duration::from_millis(7));
    let lag = bench.comparator.lag();
    assert_eq!((lag.most.as_millis(), lag.matches, lag.bound.as_millis()), (7, 100, 28));
    bench.primary(udp(1, b"alone"));
    assert!(is_held(&bench.wait(Duration::from_millis(27))));
    assert_eq!(
        unmatched(&bench.wait(Duration::from_millis(1))),
        Some((Role::Primary, 28))
    );
    // The next waits twice as long.
    bench.checkpoint();
    bench.primary(udp(1, b"alone"));
    assert!(is_held(&bench.wait(Duration::from_millis(55))));
    assert_eq!(
        unmatched(&bench.wait(Duration::from_millis(1))),
        Some((Role::Primary, 56))
    );
}

#[test]
fn an_equal_that_comes_after_its_bound_was_reached_makes_the_next_longer() {
    let mut bench = Bench::new();
    trail(&mut bench, 100, Duration::from_millis(1));
    bench.primary(udp(1, b"late"));
    assert!(divergence(&bench.wait(Duration::from_millis(30))).is_some());
    assert_eq!(released(&bench.secondary(udp(1, b"late"))).len(), 1);
    assert_eq!(bench.comparator.lag().bound.as_millis(), 120);
}

#[test]
fn the_lag_counts_from_the_load_and_the_secondarys_own_output_has_the_whole_limit() {
    let mut bench = Bench::new();
    for _ in 0..100 {
        let epoch = bench.comparator.stop(checkpoint::EpochMode::Lockstep);
        bench.primary(udp(9, b"again"));
        bench.now += Duration::from_millis(100);
        bench.commit(epoch);
        bench.secondary(udp(9, b"again"));
    }
    let lag = bench.comparator.lag();
    assert_eq!(
        (lag.most, lag.bound),
        (Duration(0), ComparatorLimits::default().unmatched_min)
    );
    bench.secondary(udp(1, b"alone"));
    assert!(is_held(&bench.wait(Duration::from_millis(199))));
    assert_eq!(
        unmatched(&bench.wait(Duration::from_millis(1))),
        Some((Role::Secondary, 200))
    );
}

fn tolerant() -> Bench {
    Bench::with(ComparatorLimits {
        flow_patience: Some(FlowPatience::default()),
        ..ComparatorLimits::default()
    })
}

/// A client's connection that is known; its answer differs if the two are unequal.
fn answer(bench: &mut Bench, client: u16, mine: &[u8], theirs: &[u8]) -> Vec<Verdict> {
    let data = |payload| {
        Tcp {
            ports: (80, client),
            ..Tcp::data(1000, 500, payload)
        }
        .frame()
    };
    let mut verdicts = bench.primary(data(mine));
    verdicts.extend(bench.secondary(data(theirs)));
    verdicts
}

#[test]
fn a_service_of_which_one_connection_after_the_other_differs_waits_for_commits() {
    let mut bench = tolerant();
    for client in 5_000..5_003 {
        let verdicts = answer(&mut bench, client, b"it is 12:00:01", b"it is 12:00:02");
        assert!(divergence(&verdicts).is_some());
        bench.wait(Duration::from_millis(10));
        bench.checkpoint();
    }
    assert_eq!(
        (bench.comparator.buffered_services(), bench.comparator.buffered_flows()),
        (1, 0)
    );
    assert_eq!(answer(&mut bench, 5_003, b"mine", b"your"), [], "a new connection");
    assert!(bench.comparator.waits_for_commit());
    assert!(bench.comparator.flows().any(|flow| flow.buffered));
    assert_eq!(released(&answer(&mut bench, 5_003, b"", b"")).len(), 0);
    bench.primary(udp(1, b"a"));
    assert_eq!(
        released(&bench.secondary(udp(1, b"a"))).len(),
        1,
        "another service is compared"
    );
    assert_eq!(released(&bench.checkpoint()).len(), 2);
    // On trial after a second; then what agrees is compared, and leaves at once.
    bench.wait(Duration::from_millis(1_000));
    bench.checkpoint();
    assert_eq!(bench.comparator.buffered_services(), 0);
    assert_eq!(released(&answer(&mut bench, 5_004, b"same", b"same")).len(), 1);
    assert!(divergence(&answer(&mut bench, 5_005, b"mine", b"your")).is_some());
    bench.wait(Duration::from_millis(10));
    bench.checkpoint();
    assert_eq!(bench.comparator.buffered_services(), 1, "one difference ends the trial");
    bench.wait(Duration::from_millis(1_500));
    bench.checkpoint();
    assert_eq!(bench.comparator.buffered_services(), 1, "twice as long");
}

#[test]
fn one_connection_that_keeps_differing_does_not_take_its_service_along() {
    let mut bench = tolerant();
    for _ in 0..3 {
        assert!(divergence(&answer(&mut bench, 5_000, b"mine", b"your")).is_some());
        bench.wait(Duration::from_millis(10));
        bench.checkpoint();
        // The next answer is the next part of its stream.
        bench.primary(
            Tcp {
                ports: (80, 5_000),
                ..Tcp::new(1000, 500, RST | ACK, &[])
            }
            .frame(),
        );
        bench.checkpoint();
    }
    assert_eq!(bench.comparator.buffered_services(), 0);
}
