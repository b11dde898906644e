//! Epochs that the secondary's guest does not run, and flows that are not compared.

use bytes::Bytes;
use checkpoint::{Duration, Epoch, EpochMode};

use crate::comparator::ComparatorLimits;
use crate::temper::FlowPatience;
use crate::testkit::*;
use crate::verdict::Verdict;

/// A connection at 1000/500, in epoch 2.
fn connected(buffers_flows: bool) -> Bench {
    let mut bench = Bench::with(ComparatorLimits {
        flow_patience: buffers_flows.then(FlowPatience::default),
        ..ComparatorLimits::default()
    });
    bench.primary(Tcp::ack(1000, 500).frame());
    bench.checkpoint();
    bench
}

fn data(seq: u32, payload: &[u8]) -> Bytes {
    Tcp::data(seq, 500, payload).frame()
}

fn payloads(verdicts: &[Verdict]) -> Vec<Vec<u8>> {
    released(verdicts).iter().map(|frame| segment(frame).1).collect()
}

#[test]
fn in_a_buffered_epoch_nothing_leaves_before_the_commit_and_nothing_is_late() {
    let mut bench = connected(false);
    bench.checkpoint_to(EpochMode::Buffered);
    assert_eq!(bench.primary(data(1000, b"one")), []);
    assert_eq!(bench.primary(udp(1, b"a")), []);
    assert_eq!(bench.wait(Duration::from_millis(1_000)), []);
    let epoch = bench.comparator.stop(EpochMode::Buffered);
    assert_eq!(bench.primary(data(1003, b"two")), []);
    assert_eq!(released(&bench.commit(epoch)), [data(1000, b"one"), udp(1, b"a")]);
    assert_eq!(payloads(&bench.checkpoint()), [b"two"]);
}

#[test]
fn output_of_a_guest_that_does_not_run_is_a_violation() {
    let mut bench = connected(false);
    let epoch = bench.comparator.stop(EpochMode::Buffered);
    bench.primary(data(1000, b"one"));
    assert_eq!(
        bench.secondary_in(epoch.0, data(1000, b"old")),
        [],
        "it runs until it has loaded"
    );
    bench.commit(epoch);
    let verdicts = bench.secondary_in(epoch.next().0, data(1000, b"one"));
    assert!(matches!(verdicts[..], [Verdict::Violation(_)]));
}

#[test]
fn after_buffered_epochs_both_streams_go_on_from_where_the_primary_stopped() {
    let mut bench = connected(false);
    bench.checkpoint_to(EpochMode::Buffered);
    bench.primary(data(1000, b"abcdef"));
    bench.checkpoint_to(EpochMode::Buffered);
    bench.primary(data(1006, b"ghi"));
    // What is said after the stop belongs to the epoch that is compared again.
    let epoch = bench.comparator.stop(EpochMode::Lockstep);
    bench.primary(data(1009, b"jkl"));
    assert_eq!(payloads(&bench.commit(epoch)), [b"ghi"]);
    assert_eq!(payloads(&bench.secondary(data(1009, b"jkl"))), [b"jkl"]);
    bench.primary(Tcp::data(1012, 510, b"mno").frame());
    assert!(divergence(&bench.secondary(Tcp::data(1012, 510, b"mnX").frame())).is_some());
    assert_eq!(payloads(&bench.checkpoint()), [b"mno"]);
}

/// Lets the flow differ in this many epochs, 10 ms each; returns the next number of the stream.
fn differ(bench: &mut Bench, mut seq: u32, epochs: u32) -> u32 {
    for _ in 0..epochs {
        bench.primary(data(seq, b"mine"));
        assert!(divergence(&bench.secondary(data(seq, b"your"))).is_some());
        bench.wait(Duration::from_millis(10));
        bench.checkpoint();
        seq += 4;
    }
    seq
}

#[test]
fn a_flow_that_keeps_differing_waits_for_commits_and_others_are_compared() {
    let mut bench = connected(true);
    let seq = differ(&mut bench, 1000, 3);
    assert_eq!(
        (bench.comparator.buffered_flows(), bench.comparator.waits_for_commit()),
        (1, false)
    );
    bench.primary(data(seq, b"mine"));
    assert!(bench.comparator.waits_for_commit());
    assert_eq!(bench.secondary(data(seq, b"your")), []);
    assert_eq!(
        bench.wait(Duration::from_millis(1_000)),
        [],
        "neither differs nor is late"
    );
    bench.primary(udp(1, b"a"));
    assert_eq!(released(&bench.secondary(udp(1, b"a"))), [udp(1, b"a")]);
    let epoch = bench.comparator.stop(EpochMode::Lockstep);
    bench.primary(data(seq + 4, b"next"));
    assert!(payloads(&bench.commit(epoch)).contains(&b"mine".to_vec()));
}

#[test]
fn a_flow_is_compared_again_from_an_epochs_begin_and_one_difference_ends_the_trial() {
    let mut bench = connected(true);
    let mut seq = differ(&mut bench, 1000, 3);
    bench.primary(data(seq, b"mine"));
    bench.wait(Duration::from_millis(1_000));
    // Said in the epoch that begins, before the commit that ends the back-off.
    let epoch = bench.comparator.stop(EpochMode::Lockstep);
    bench.primary(data(seq + 4, b"equal"));
    assert_eq!(payloads(&bench.commit(epoch)), [b"mine"]);
    seq += 4;
    assert_eq!(bench.comparator.buffered_flows(), 0);
    assert_eq!(payloads(&bench.secondary(data(seq, b"equal"))), [b"equal"]);
    seq = differ(&mut bench, seq + 5, 1);
    assert_eq!(bench.comparator.buffered_flows(), 1);
    bench.primary(data(seq, b"mine"));
    bench.wait(Duration::from_millis(1_500));
    bench.checkpoint();
    assert_eq!(bench.comparator.buffered_flows(), 1, "twice as long");
}

#[test]
fn without_leave_every_flow_is_compared() {
    let mut bench = connected(false);
    differ(&mut bench, 1000, 20);
    assert_eq!(bench.comparator.buffered_flows(), 0);
}

#[test]
fn what_an_abandoned_buffered_epoch_held_is_never_compared() {
    let mut bench = connected(false);
    bench.checkpoint_to(EpochMode::Buffered);
    bench.primary(data(1000, b"one"));
    bench.comparator.stop(EpochMode::Lockstep);
    bench.primary(data(1003, b"two"));
    bench.comparator.abandon();
    assert_eq!(bench.comparator.deadline(), None);
    assert_eq!(bench.comparator.running(), Epoch(4));
    let mut verdicts = Vec::new();
    bench.comparator.release_all(&mut verdicts);
    assert_eq!(payloads(&verdicts), [b"one", b"two"]);
}
