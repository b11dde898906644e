//! The comparator case by case: what need not wait for what the guest sent before it.

mod queues;

use bytes::Bytes;
use checkpoint::{Duration, Epoch, EpochMode, Role};

use super::tests::{connected, is_held};
use crate::testkit::*;
use crate::verdict::{Reason, Verdict};

/// When first bytes leave.
const BEGIN: Duration = Duration::from_millis(10);

fn data(seq: u32, payload: &[u8]) -> Bytes {
    Tcp::data(seq, 500, payload).frame()
}

/// Returns sequence number, acknowledgement and payload of what leaves.
fn leaving(verdicts: &[Verdict]) -> Vec<(u32, u32, Vec<u8>)> {
    let frames = released(verdicts);
    let parts = frames.iter().map(|frame| {
        let (segment, payload) = segment(frame);
        (segment.seq.0, segment.ack.unwrap().0, payload)
    });
    parts.collect()
}

#[test]
fn case_p09_a_retransmission_does_not_wait_behind_new_bytes() {
    // The secondary's guest has sent one segment only; it sends the next when the client has acknowledged that, which was lost.
    let mut bench = connected();
    for (seq, payload) in [(1000, b"A"), (1001, b"B"), (1002, b"C")] {
        assert!(is_held(&bench.primary(data(seq, payload))));
    }
    assert_eq!(released(&bench.secondary(data(1000, b"A"))), [data(1000, b"A")]);
    assert_eq!(released(&bench.primary(data(1000, b"A"))), [data(1000, b"A")]);
    assert!(
        is_held(&bench.primary(data(1001, b"B"))),
        "repeated, but never said by the secondary"
    );
    assert_eq!(
        released(&bench.secondary(data(1001, b"BC"))),
        [data(1001, b"B"), data(1002, b"C"), data(1001, b"B")]
    );
    assert_eq!(bench.comparator.held().frames, 0);
}

#[test]
fn case_p08_an_acknowledgement_that_waits_does_not_hold_up_bytes() {
    let mut bench = connected();
    assert!(is_held(&bench.primary(Tcp::ack(1000, 600).frame())));
    assert!(is_held(&bench.primary(Tcp::data(1000, 600, b"answer").frame())));
    assert_eq!(
        leaving(&bench.secondary(data(1000, b"answer"))),
        [(1000, 500, b"answer".to_vec())]
    );
    // The client has the answer already: an acknowledgement from before it would be out of its window.
    assert_eq!(
        leaving(&bench.secondary(Tcp::ack(1006, 600).frame())),
        [(1006, 600, vec![])]
    );
    assert_eq!(bench.comparator.held().frames, 0);
    assert!(
        is_held(&bench.secondary(Tcp::ack(1006, 700).frame())),
        "nothing is owed any more"
    );
}

#[test]
fn case_p08_bytes_that_wait_do_not_hold_up_acknowledgements() {
    for v6 in [false, true] {
        let tcp = |seq, ack, payload: &[u8]| {
            Tcp {
                v6,
                ..Tcp::data(seq, ack, payload)
            }
            .frame()
        };
        let mut bench = Bench::new();
        bench.primary(tcp(990, 500, b"0123456789"));
        bench.checkpoint();
        assert!(is_held(&bench.primary(tcp(1000, 500, b"held"))));
        assert!(is_held(&bench.secondary(tcp(1000, 700, b""))));
        // As the client knows the stream: without a gap.
        assert_eq!(leaving(&bench.primary(tcp(1004, 600, b""))), [(1000, 600, vec![])]);
        assert_eq!(leaving(&bench.primary(tcp(1004, 700, b""))), [(1000, 700, vec![])]);
        assert!(is_held(&bench.primary(tcp(1004, 701, b""))));
        let leaving = leaving(&bench.secondary(tcp(1000, 701, b"held")));
        assert_eq!(leaving, [(1000, 500, b"held".to_vec()), (1004, 701, vec![])]);
    }
}

#[test]
fn an_acknowledgement_overtaken_by_bytes_is_renumbered_by_a_commit_too() {
    let mut bench = connected();
    bench.primary(Tcp::ack(1000, 600).frame());
    bench.primary(data(1000, b"answer"));
    bench.secondary(data(1000, b"answer"));
    assert_eq!(leaving(&bench.checkpoint()), [(1006, 600, vec![])]);
}

#[test]
fn across_the_wrap_too() {
    let base = u32::MAX - 2;
    let mut bench = Bench::new();
    bench.primary(Tcp::data(base - 10, 500, b"0123456789").frame());
    bench.checkpoint();
    bench.primary(Tcp::ack(base, 600).frame());
    bench.primary(data(base, b"answer"));
    bench.secondary(data(base, b"answer"));
    assert_eq!(leaving(&bench.secondary(Tcp::ack(3, 600).frame())), [(3, 600, vec![])]);
}

#[test]
fn nothing_overtakes_a_syn_a_reset_or_what_is_not_compared_and_a_fin_overtakes_nothing() {
    let reset = || Tcp::new(1000, 500, RST | ACK, b"").frame();
    let mut bench = connected();
    bench.primary(reset());
    assert!(
        is_held(&bench.primary(Tcp::ack(1000, 500).frame())),
        "the reset ends the connection"
    );
    assert!(is_held(&bench.primary(data(990, b"0123456789"))));
    assert_eq!(released(&bench.secondary(reset())).len(), 3);

    let mut bench = Bench::new();
    bench.secondary(Tcp::ack(7, 500).frame());
    assert!(is_held(&bench.primary(data(100, b"x"))));
    assert!(
        is_held(&bench.primary(Tcp::ack(101, 500).frame())),
        "it is not known what the client knows"
    );

    let fin = || Tcp::new(1001, 500, ACK | FIN, b"").frame();
    let mut bench = connected();
    bench.primary(data(1000, b"x"));
    bench.primary(fin());
    assert!(is_held(&bench.secondary(fin())));
    assert_eq!(released(&bench.secondary(data(1000, b"x"))), [data(1000, b"x"), fin()]);

    let mut bench = connected();
    let epoch = bench.comparator.stop(EpochMode::Lockstep);
    assert!(
        is_held(&bench.primary(Tcp::ack(1000, 500).frame())),
        "of an epoch that is not compared yet"
    );
    assert_eq!(released(&bench.commit(epoch)).len(), 1);
}

#[test]
fn a_probe_leaves_as_it_is() {
    let mut bench = connected();
    bench.primary(data(1000, b"held"));
    assert_eq!(
        leaving(&bench.primary(Tcp::ack(999, 500).frame())),
        [(999, 500, vec![])]
    );
}

#[test]
fn a_signed_acknowledgement_keeps_its_place_and_its_number() {
    let signed = |seq, ack| {
        let mut tcp = Tcp::ack(seq, ack);
        tcp.options = [&[19, 18][..], &[7; 16], &[1, 1]].concat();
        tcp.frame()
    };
    let mut bench = connected();
    bench.primary(data(1000, b"held"));
    assert!(is_held(&bench.primary(signed(1004, 500))));
    assert_eq!(released(&bench.secondary(data(1000, b"held"))).len(), 2);
}

#[test]
fn case_p16_an_arp_request_of_one_side_does_not_hold_up_answers() {
    let mut bench = Bench::new();
    assert!(is_held(&bench.primary(arp(1, [10, 0, 0, 1]))), "asked by its own timer");
    bench.primary(arp(2, [10, 0, 0, 2]));
    assert_eq!(
        released(&bench.secondary(arp(2, [10, 0, 0, 2]))),
        [arp(2, [10, 0, 0, 2])]
    );
    // What the secondary's guest asks is another flow: nothing differs, one side is late.
    assert!(is_held(&bench.secondary(arp(1, [10, 0, 0, 3]))));
    assert!(is_held(&bench.wait(Duration::from_millis(199))));
    let verdicts = bench.wait(Duration::from_millis(1));
    let told = &divergence(&verdicts).unwrap().reason;
    assert!(matches!(
        told,
        Reason::Unmatched {
            side: Role::Primary,
            ..
        }
    ));
}

#[test]
fn an_echo_answered_by_one_side_alone_is_not_compared_with_another() {
    let echo = |id: u8| {
        let (from, to) = ends(false, false);
        ip(from, to, 1, 64, &[], &[0, 0, 1, 2, 0, id, 0, 1, 9, 9])
    };
    let mut bench = Bench::new();
    bench.primary(echo(1));
    bench.secondary(echo(2));
    assert!(is_held(&bench.wait(Duration::from_millis(100))));
    assert_eq!(released(&bench.primary(echo(2))), [echo(2)]);
    assert_eq!(released(&bench.secondary(echo(1))), [echo(1)]);
}

#[test]
fn case_p03_what_was_overtaken_leaves_with_the_latest_time_that_has_left() {
    let at = |time: u32, tcp: Tcp| tcp.times(time, 3).frame();
    let mut bench = connected();
    assert!(is_held(&bench.primary(at(100, Tcp::data(1000, 500, b"held")))));
    // Whoever acknowledges in order takes this one's time as the latest, and drops what is older.
    assert!(is_held(&bench.primary(at(150, Tcp::ack(1004, 600)))));
    let left = released(&bench.secondary(at(140, Tcp::ack(1000, 600))));
    assert_eq!(left.iter().map(|frame| times(frame).0).collect::<Vec<_>>(), [150]);
    let left = released(&bench.secondary(at(141, Tcp::data(1000, 500, b"held"))));
    let seen: Vec<_> = left.iter().map(|frame| (times(frame), segment(frame).1)).collect();
    assert_eq!(seen, [((150, 3), b"held".to_vec())]);
    // By a commit, too; a new connection begins with a time of its own.
    assert!(is_held(&bench.primary(at(160, Tcp::data(1004, 500, b"more")))));
    let left = released(&bench.primary(at(170, Tcp::data(1000, 500, b"held"))));
    assert_eq!(times(&left[0]).0, 170, "what is said again need not wait");
    let left = released(&bench.checkpoint());
    assert_eq!(left.iter().map(|frame| times(frame).0).collect::<Vec<_>>(), [170]);
    bench.primary(at(9, Tcp::new(77, 0, SYN, b"")));
    let left = released(&bench.checkpoint());
    assert_eq!(times(&left[0]).0, 9);
}

#[test]
fn first_bytes_that_may_leave_do_not_wait_for_the_rest() {
    // After a loss the secondary's guest may send one segment, and has cut it shorter than the primary's: it sends the
    // rest when the client has acknowledged that.
    let mut bench = connected();
    let whole = Tcp::new(1000, 500, ACK | FIN, b"one segment").frame();
    assert!(is_held(&bench.primary(whole.clone())));
    assert!(is_held(&bench.secondary(data(1000, b"one"))));
    let due = bench.comparator.deadline().unwrap();
    assert_eq!(due, bench.now + BEGIN);
    assert_eq!(leaving(&bench.wait(BEGIN)), [(1000, 500, b"one".to_vec())]);
    assert!(is_held(&bench.wait(BEGIN)), "once");
    assert!(
        is_held(&bench.secondary(data(1003, b" segment"))),
        "not the end of the stream"
    );
    assert_eq!(
        released(&bench.wait(BEGIN)),
        [data(1003, b" segment")],
        "all of its bytes, without the end; the checksums are right"
    );
    let end = Tcp::new(1011, 500, ACK | FIN, b"").frame();
    assert_eq!(released(&bench.secondary(end.clone())), [end]);
    assert_eq!(bench.comparator.held().frames, 0);
}

#[test]
fn first_bytes_leave_with_an_acknowledgement_that_may() {
    for v6 in [false, true] {
        let mut bench = connected();
        let of = |seq, ack, payload: &[u8]| {
            Tcp {
                v6,
                ..Tcp::data(seq, ack, payload)
            }
            .frame()
        };
        assert!(is_held(&bench.primary(of(1000, 900, b"longer"))));
        assert!(is_held(&bench.secondary(of(1000, 700, b"lon"))));
        assert_eq!(released(&bench.wait(BEGIN)), [of(1000, 700, b"lon")]);
        assert_eq!(
            released(&bench.secondary(of(1003, 900, b"ger"))),
            [of(1003, 900, b"ger")]
        );
    }
}

#[test]
fn nothing_begins_that_the_secondary_has_not_said() {
    let mut bench = connected();
    assert!(is_held(&bench.primary(data(1000, b"one"))));
    assert!(is_held(&bench.secondary(data(1003, b"two"))));
    assert!(is_held(&bench.wait(BEGIN)));
    let urgent = Tcp {
        urgent: 2,
        ..Tcp::new(2000, 500, ACK | URG, b"urgent")
    };
    let mut bench = connected();
    assert!(is_held(&bench.primary(urgent.frame())));
    assert!(is_held(&bench.secondary(data(2000, b"u"))));
    assert!(is_held(&bench.wait(BEGIN)), "what is urgent is not cut");
}

#[test]
fn an_acknowledgement_leaves_as_far_as_the_secondary_has_come() {
    // The client has sent what the secondary's guest had no room for: it must hear of it, to send it again.
    let mut bench = connected();
    let full = Tcp::ack(1000, 900).sack(&[(950, 1_111)]).frame();
    assert!(is_held(&bench.primary(full.clone())));
    assert!(is_held(&bench.secondary(Tcp::ack(1000, 700).frame())));
    let begun = bench.wait(BEGIN);
    assert_eq!(leaving(&begun), [(1000, 700, vec![])]);
    assert!(
        !released(&begun)[0]
            .windows(4)
            .any(|word| word == 1_111_u32.to_be_bytes())
    );
    assert!(is_held(&bench.wait(BEGIN)), "once");
    assert!(is_held(&bench.secondary(Tcp::ack(1000, 900).frame())));
    assert_eq!(
        leaving(&bench.wait(BEGIN)),
        [(1000, 900, vec![])],
        "without its SACK block"
    );
    let whole = Tcp::ack(1000, 1_111).frame();
    assert_eq!(released(&bench.secondary(whole)), [full]);
    assert_eq!(bench.comparator.held().frames, 0);
}

#[test]
fn an_acknowledgement_that_may_not_leave_hides_none_that_says_more() {
    // The secondary's guest had no room for what its peer tells in a SACK block, and has gone on without it.
    let mut bench = connected();
    assert!(is_held(
        &bench.primary(Tcp::ack(1000, 600).sack(&[(900, 1_111)]).frame())
    ));
    assert!(is_held(&bench.primary(Tcp::ack(1000, 1_111).frame())));
    assert!(is_held(&bench.secondary(Tcp::ack(1000, 600).frame())));
    assert_eq!(leaving(&bench.wait(BEGIN)), [(1000, 600, vec![])]);
    assert!(is_held(&bench.secondary(Tcp::ack(1000, 900).frame())));
    assert_eq!(leaving(&bench.wait(BEGIN)), [(1000, 900, vec![])]);
}

#[test]
fn a_guest_that_has_only_listened_acknowledges_as_far_as_the_secondary_too() {
    let mut bench = Bench::new();
    let answer = Tcp::new(999, 500, SYN | ACK, b"").frame();
    bench.primary(answer.clone());
    assert_eq!(released(&bench.secondary(answer)).len(), 1);
    assert!(is_held(&bench.primary(Tcp::ack(1000, 800).frame())));
    assert!(is_held(&bench.primary(Tcp::ack(1000, 900).frame())));
    assert!(is_held(&bench.secondary(Tcp::ack(1000, 700).frame())));
    assert_eq!(leaving(&bench.wait(BEGIN)), [(1000, 700, vec![])]);
    assert!(is_held(&bench.wait(BEGIN)), "once");
    assert_eq!(
        leaving(&bench.secondary(Tcp::ack(1000, 900).frame())),
        [(1000, 800, vec![]), (1000, 900, vec![])]
    );
}

#[test]
fn first_bytes_that_were_lost_leave_again_with_each_retransmission() {
    let mut bench = connected();
    let whole = data(1000, b"one segment");
    assert!(is_held(&bench.primary(whole.clone())));
    assert!(is_held(&bench.secondary(data(1000, b"one"))));
    let begun = || vec![(1000, 500, b"one".to_vec())];
    assert_eq!(leaving(&bench.wait(BEGIN)), begun());
    for _ in 0..2 {
        assert!(is_held(&bench.wait(BEGIN)));
        assert!(is_held(&bench.primary(whole.clone())));
        assert_eq!(leaving(&bench.wait(BEGIN)), begun());
    }
    let rest = data(1003, b" segment");
    assert_eq!(released(&bench.secondary(rest.clone())), [rest, whole.clone(), whole]);
}

#[test]
fn what_left_before_the_pairing_begins_again_as_far_as_the_secondary_has_come_each_time() {
    // The client has lost what nobody has compared: the primary's guest says it again, and what it said then is not known.
    let mut bench = connected();
    bench.comparator.release_all(&mut Vec::new());
    assert_eq!(released(&bench.primary(data(1000, b"one segment"))).len(), 1);
    assert_eq!(
        bench.comparator.stop(EpochMode::Lockstep).0 + 1,
        bench.comparator.running().0
    );
    let epoch = bench.comparator.running();
    bench.comparator.protect(epoch, EpochMode::Lockstep);
    bench.comparator.loaded(bench.now, Epoch(epoch.0 - 1));
    let whole = data(1000, b"one segment");
    assert!(is_held(&bench.primary(whole.clone())));
    for (seq, payload, begun) in [(1000, &b"one"[..], &b"one"[..]), (1003, b" seg", b"one seg")] {
        assert!(is_held(&bench.secondary(data(seq, payload))));
        assert_eq!(released(&bench.wait(BEGIN)), [data(1000, begun)]);
        assert!(is_held(&bench.wait(BEGIN)), "once");
    }
    assert_eq!(released(&bench.secondary(data(1007, b"ment"))), [whole]);
}

#[test]
fn every_flow_begins_by_itself_and_its_rest_leaves_by_a_commit_too() {
    let mut bench = connected();
    let other = |seq, payload: &[u8]| {
        Tcp {
            ports: (80, 5_001),
            ..Tcp::data(seq, 500, payload)
        }
        .frame()
    };
    bench.primary(other(990, b"0123456789"));
    bench.checkpoint();
    // Nothing of the oldest may leave.
    assert!(is_held(&bench.primary(data(1000, b"alone"))));
    assert!(is_held(&bench.primary(other(1000, b"abcdef"))));
    assert!(is_held(&bench.secondary(other(1000, b"ab"))));
    assert_eq!(released(&bench.wait(BEGIN)), [other(1000, b"ab")]);
    assert!(divergence(&bench.secondary(other(1002, b"cX"))).is_some());
    assert!(released(&bench.wait(BEGIN)).is_empty(), "other bytes never leave");
    assert_eq!(
        released(&bench.checkpoint()),
        [data(1000, b"alone"), other(1002, b"cdef")]
    );
}
