//! Sequence translation: openings, takeovers, ends, bounds.

use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::comparator::properties::garbage;
use crate::testkit::*;

/// What the client holds on to: the primary's initial number and its own.
pub(super) const WIRE: u32 = 0xffff_fff0;
pub(super) const CLIENT_ISN: u32 = 0xffff_ff00;
/// The initial number of the secondary's guest.
pub(super) const OWN: u32 = 77;

pub(super) fn out(translator: &mut Translator, tcp: &Tcp) -> Tcp {
    through(tcp, |frame| outbound(translator, frame))
}

pub(super) fn inward(translator: &mut Translator, tcp: &Tcp) -> Tcp {
    through(
        &Tcp {
            inbound: true,
            ..tcp.clone()
        },
        |frame| inbound(translator, frame),
    )
}

/// Passes a segment through and asserts that only numbers have changed.
fn through(tcp: &Tcp, pass: impl FnOnce(&mut [u8])) -> Tcp {
    let mut frame = tcp.frame().to_vec();
    pass(&mut frame);
    let (segment, _) = segment(&frame);
    let options = frame[segment.tcp + 20..segment.payload].to_vec();
    let ack = u32::from_be_bytes(frame[segment.tcp + 8..segment.tcp + 12].try_into().unwrap());
    let passed = Tcp {
        seq: segment.seq.0,
        ack,
        options,
        ..tcp.clone()
    };
    assert_eq!(passed.frame().len(), frame.len());
    passed
}

pub(super) fn numbers(tcp: &Tcp) -> (u32, u32) {
    (tcp.seq, tcp.ack)
}

pub(super) fn plus(base: u32, count: u32) -> u32 {
    base.wrapping_add(count)
}

/// A follower on which a client has connected to the guest.
pub(super) fn accepted() -> Translator {
    let mut translator = Translator::new();
    translator.follow();
    inward(&mut translator, &Tcp::new(CLIENT_ISN, 0, SYN, b""));
    let answer = Tcp::new(OWN, plus(CLIENT_ISN, 1), SYN | ACK, b"");
    assert_eq!(
        numbers(&out(&mut translator, &answer)),
        numbers(&answer),
        "the offset is not known yet"
    );
    let ack = inward(&mut translator, &Tcp::ack(plus(CLIENT_ISN, 1), plus(WIRE, 1)));
    assert_eq!(numbers(&ack), (plus(CLIENT_ISN, 1), OWN + 1));
    translator
}

/// Passes data both ways and asserts that each side sees its own numbers.
fn assert_translates(translator: &mut Translator, sent: u32) {
    let data = out(
        translator,
        &Tcp::data(plus(OWN, 1 + sent), plus(CLIENT_ISN, 9), b"data"),
    );
    assert_eq!(numbers(&data), (plus(WIRE, 1 + sent), plus(CLIENT_ISN, 9)));
    let ack = inward(translator, &Tcp::ack(plus(CLIENT_ISN, 9), plus(WIRE, 5 + sent)));
    assert_eq!(numbers(&ack), (plus(CLIENT_ISN, 9), plus(OWN, 5 + sent)));
}

#[test]
fn a_passive_open_is_translated_before_and_after_a_takeover() {
    let mut translator = accepted();
    assert_translates(&mut translator, 0);
    translator.lead();
    assert_translates(&mut translator, 40);
    // Connections opened from here on are the guest's own.
    let other = Tcp {
        ports: (80, 6000),
        ..Tcp::new(5, 9, SYN | ACK, b"")
    };
    out(&mut translator, &other);
    let ack = Tcp {
        ports: (80, 6000),
        ..Tcp::ack(9, 6)
    };
    assert_eq!(numbers(&inward(&mut translator, &ack)), (9, 6));
    assert_translates(&mut translator, 80);
}

#[test]
fn case_p01_an_active_open_is_translated() {
    let mut translator = Translator::new();
    translator.follow();
    assert_eq!(out(&mut translator, &Tcp::new(OWN, 0, SYN, b"")).seq, OWN);
    let answer = inward(&mut translator, &Tcp::new(CLIENT_ISN, plus(WIRE, 1), SYN | ACK, b""));
    assert_eq!(numbers(&answer), (CLIENT_ISN, OWN + 1));
    assert_translates(&mut translator, 0);
    translator.lead();
    assert_translates(&mut translator, 4);
}

#[test]
fn case_p01_an_active_open_that_is_refused_reaches_the_guest() {
    let mut translator = Translator::new();
    translator.follow();
    out(&mut translator, &Tcp::new(OWN, 0, SYN, b""));
    let refused = inward(&mut translator, &Tcp::new(0, plus(WIRE, 1), RST | ACK, b""));
    assert_eq!(refused.ack, OWN + 1);
    assert!(
        out(&mut translator, &Tcp::ack(OWN, 1)).seq != OWN,
        "a late segment is still translated"
    );
    assert_eq!(
        out(&mut translator, &Tcp::new(9, 0, SYN, b"")).seq,
        9,
        "a new connection is not"
    );
}

#[test]
fn case_p02_a_checkpoint_in_mid_handshake_fixes_the_offset() {
    let mut primary = Translator::new();
    let answer = Tcp::new(WIRE, plus(CLIENT_ISN, 1), SYN | ACK, b"");
    out(&mut primary, &answer);
    let mut secondary = Translator::new();
    secondary.follow();
    // The secondary's own attempt is forgotten by the load.
    out(
        &mut secondary,
        &Tcp {
            seq: OWN,
            ..answer.clone()
        },
    );
    secondary.replace(&primary.snapshot().encoded).unwrap();
    // Its guest, now at the primary's state, repeats the SYN-ACK; then an ACK comes that covers data as well.
    out(&mut secondary, &answer);
    let ack = Tcp::ack(plus(CLIENT_ISN, 1), plus(WIRE, 1));
    assert_eq!(numbers(&inward(&mut secondary, &ack)), numbers(&ack));
    let data = Tcp::data(plus(WIRE, 1), plus(CLIENT_ISN, 1), b"data");
    assert_eq!(numbers(&out(&mut secondary, &data)), numbers(&data));
    assert!(
        secondary.is_empty(),
        "an opened connection without an offset needs no memory"
    );
}

#[test]
fn case_p02_an_offset_goes_through_a_checkpoint() {
    let mut leader = accepted();
    leader.lead();
    let mut follower = Translator::new();
    follower.follow();
    follower.replace(&leader.snapshot().encoded).unwrap();
    assert_translates(&mut follower, 0);
    assert_eq!(follower.translated(), 1);
    // An offset that is still awaited goes with it too.
    let mut leader = Translator::new();
    leader.follow();
    out(&mut leader, &Tcp::new(OWN, plus(CLIENT_ISN, 1), SYN | ACK, b""));
    leader.lead();
    follower.replace(&leader.snapshot().encoded).unwrap();
    inward(&mut follower, &Tcp::ack(plus(CLIENT_ISN, 1), plus(WIRE, 1)));
    assert_translates(&mut follower, 0);
}

#[test]
fn case_p03_sack_blocks_are_translated_whatever_their_alignment() {
    for lead_in in [&[1u8, 1][..], &[1], &[8, 10, 0, 0, 0, 1, 0, 0, 0, 2], &[]] {
        let mut translator = accepted();
        let edges = [plus(WIRE, 100), plus(WIRE, 200), plus(WIRE, 300), plus(WIRE, 400)];
        let mut sack = Tcp::ack(plus(CLIENT_ISN, 1), plus(WIRE, 1));
        sack.options = [lead_in, &[5, 18]].concat();
        edges.iter().for_each(|edge| sack.options.extend(edge.to_be_bytes()));
        let seen = inward(&mut translator, &sack);
        let mut want = [lead_in, &[5, 18]].concat();
        [100, 200, 300, 400]
            .iter()
            .for_each(|edge| want.extend((OWN + edge).to_be_bytes()));
        assert_eq!(seen.options[..want.len()], want);
    }
}

#[test]
fn case_p04_rst_and_fin_without_ack_are_translated() {
    let mut translator = accepted();
    assert_eq!(
        out(&mut translator, &Tcp::new(plus(OWN, 1), 0, FIN, b"")).seq,
        plus(WIRE, 1)
    );
    assert_eq!(
        out(&mut translator, &Tcp::new(plus(OWN, 2), 0, RST, b"")).seq,
        plus(WIRE, 2)
    );
    let mut translator = accepted();
    let reset = Tcp::new(plus(CLIENT_ISN, 1), 0, RST, b"");
    assert_eq!(
        numbers(&inward(&mut translator, &reset)),
        numbers(&reset),
        "there is nothing to translate"
    );
    assert_translates(&mut translator, 0);
}

#[test]
fn a_simultaneous_open_is_translated() {
    let mut translator = Translator::new();
    translator.follow();
    out(&mut translator, &Tcp::new(OWN, 0, SYN, b""));
    inward(&mut translator, &Tcp::new(CLIENT_ISN, 0, SYN, b""));
    out(&mut translator, &Tcp::new(OWN, plus(CLIENT_ISN, 1), SYN | ACK, b""));
    let answer = inward(&mut translator, &Tcp::new(CLIENT_ISN, plus(WIRE, 1), SYN | ACK, b""));
    assert_eq!(answer.ack, OWN + 1);
    assert_translates(&mut translator, 0);
}

#[test]
fn case_p20_a_keep_alive_and_a_half_closed_connection_go_on_being_translated() {
    let mut translator = accepted();
    translator.lead();
    assert_eq!(out(&mut translator, &Tcp::ack(OWN, plus(CLIENT_ISN, 1))).seq, WIRE);
    out(
        &mut translator,
        &Tcp::new(plus(OWN, 1), plus(CLIENT_ISN, 1), FIN | ACK, b""),
    );
    inward(&mut translator, &Tcp::ack(plus(CLIENT_ISN, 1), plus(WIRE, 2)));
    // The client goes on sending, and the guest acknowledging.
    let ack = out(&mut translator, &Tcp::ack(plus(OWN, 2), plus(CLIENT_ISN, 50)));
    assert_eq!(ack.seq, plus(WIRE, 2));
    inward(
        &mut translator,
        &Tcp::new(plus(CLIENT_ISN, 50), plus(WIRE, 2), FIN | ACK, b""),
    );
    let last = Tcp::ack(plus(OWN, 2), plus(CLIENT_ISN, 51));
    assert_eq!(out(&mut translator, &last).seq, plus(WIRE, 2));
    assert_eq!(
        out(&mut translator, &last).seq,
        plus(WIRE, 2),
        "also when it is repeated"
    );
    assert_eq!(translator.len(), 1);
    for port in 0..300 {
        end_another(&mut translator, 10_000 + port);
    }
    assert_eq!(translator.len(), ENDED_MAX, "ended connections are forgotten in turn");
    assert_eq!(out(&mut translator, &last).seq, plus(OWN, 2));
}

fn end_another(translator: &mut Translator, port: u16) {
    translator.follow();
    let ports = (80, port);
    out(
        translator,
        &Tcp {
            ports,
            ..Tcp::new(OWN, plus(CLIENT_ISN, 1), SYN | ACK, b"")
        },
    );
    inward(
        translator,
        &Tcp {
            ports,
            ..Tcp::ack(plus(CLIENT_ISN, 1), plus(WIRE, 1))
        },
    );
    inward(
        translator,
        &Tcp {
            ports,
            ..Tcp::new(plus(CLIENT_ISN, 1), plus(WIRE, 1), RST | ACK, b"")
        },
    );
}

#[test]
fn a_reset_that_the_guest_does_not_take_forgets_nothing() {
    let mut translator = accepted();
    inward(&mut translator, &Tcp::new(9, 0, RST, b""));
    assert_translates(&mut translator, 0);
    (0..300).for_each(|port| end_another(&mut translator, 10_000 + port));
    assert_translates(&mut translator, 4);
}

#[test]
fn a_new_syn_on_the_same_ports_is_a_new_connection() {
    let mut translator = accepted();
    translator.lead();
    out(&mut translator, &Tcp::new(500, plus(CLIENT_ISN, 1), SYN | ACK, b""));
    let ack = Tcp::ack(plus(CLIENT_ISN, 1), 501);
    assert_eq!(numbers(&inward(&mut translator, &ack)), numbers(&ack));
}

#[test]
fn an_old_duplicate_does_not_set_the_offset() {
    let mut translator = Translator::new();
    translator.follow();
    out(&mut translator, &Tcp::new(OWN, plus(CLIENT_ISN, 1), SYN | ACK, b""));
    let old = Tcp::ack(plus(CLIENT_ISN, 5_000_000), 123);
    assert_eq!(numbers(&inward(&mut translator, &old)), numbers(&old));
    inward(&mut translator, &Tcp::ack(plus(CLIENT_ISN, 1), plus(WIRE, 1)));
    assert_translates(&mut translator, 0);
}

#[test]
fn case_p17_p18_p22_ipv6_and_vlans_are_translated_apart() {
    for (v6, vlans) in [
        (true, vec![]),
        (false, vec![(0x8100, 5)]),
        (true, vec![(0x88a8, 5), (0x8100, 6)]),
    ] {
        let mut translator = Translator::new();
        translator.follow();
        let like = |tcp: Tcp| Tcp {
            v6,
            vlans: vlans.clone(),
            ..tcp
        };
        out(
            &mut translator,
            &like(Tcp::new(OWN, plus(CLIENT_ISN, 1), SYN | ACK, b"")),
        );
        inward(&mut translator, &like(Tcp::ack(plus(CLIENT_ISN, 1), plus(WIRE, 1))));
        assert_eq!(
            out(&mut translator, &like(Tcp::data(OWN + 1, 1, b"x"))).seq,
            plus(WIRE, 1)
        );
        assert_eq!(
            out(&mut translator, &Tcp::data(OWN + 1, 1, b"x")).seq,
            OWN + 1,
            "another flow"
        );
        let mut copy = Translator::new();
        copy.replace(&translator.snapshot().encoded).unwrap();
        assert_eq!(out(&mut copy, &like(Tcp::data(OWN + 1, 1, b"x"))).seq, plus(WIRE, 1));
    }
}

#[test]
fn eviction_prefers_connections_without_an_offset() {
    let mut translator = Translator::with_limit(32);
    for port in 0..200 {
        let ports = (80, 1000 + port);
        if port < 8 {
            translator.follow()
        } else {
            translator.lead()
        }
        out(
            &mut translator,
            &Tcp {
                ports,
                ..Tcp::new(OWN, plus(CLIENT_ISN, 1), SYN | ACK, b"")
            },
        );
        if port < 8 {
            inward(
                &mut translator,
                &Tcp {
                    ports,
                    ..Tcp::ack(plus(CLIENT_ISN, 1), plus(WIRE, 1))
                },
            );
        }
        assert!(translator.len() <= 32);
    }
    assert_eq!(translator.translated(), 8);
}

#[test]
fn what_is_not_a_whole_tcp_segment_passes_untouched() {
    let mut translator = accepted();
    let mut fragment = Tcp::data(OWN + 1, 1, b"x").frame().to_vec();
    fragment[IP_AT + 6] = 0x20;
    for frame in [Bytes::from(fragment), udp(80, b"x"), arp(1, GUEST)] {
        let mut passed = frame.to_vec();
        outbound(&mut translator, &mut passed);
        inbound(&mut translator, &mut passed);
        assert_eq!(passed, frame);
    }
}

#[test]
fn a_snapshot_says_how_many_connections_it_has_no_room_for() {
    let mut translator = Translator::new();
    translator.follow();
    for port in 0..40_000 {
        let like = |tcp: Tcp| {
            Tcp {
                ports: (80, port),
                ..tcp
            }
            .frame()
            .to_vec()
        };
        outbound(
            &mut translator,
            &mut like(Tcp::new(OWN, plus(CLIENT_ISN, 1), SYN | ACK, b"")),
        );
        let ack = Tcp {
            inbound: true,
            ..Tcp::ack(plus(CLIENT_ISN, 1), plus(WIRE, 1))
        };
        inbound(&mut translator, &mut like(ack));
    }
    let snapshot = translator.snapshot();
    let mut copy = Translator::new();
    copy.replace(&snapshot.encoded).unwrap();
    assert!(snapshot.left_out > 0);
    assert_eq!(copy.translated() + snapshot.left_out, 40_000);
}

#[test]
fn a_kept_syn_is_not_sent_again_once_the_client_has_acknowledged_one() {
    let answer = Tcp::new(OWN, plus(CLIENT_ISN, 1), SYN | ACK, b"");
    let mut translator = Translator::new();
    translator.follow();
    out(&mut translator, &answer);
    translator.lead();
    assert!(
        again(&translator, &mut answer.frame().to_vec()),
        "the client may wait for it"
    );
    inward(&mut translator, &Tcp::ack(plus(CLIENT_ISN, 1), plus(WIRE, 1)));
    assert!(!again(&translator, &mut answer.frame().to_vec()));
    let data = Tcp::data(plus(WIRE, 1), 1, b"x").frame();
    let mut repeated = data.to_vec();
    assert!(again(&translator, &mut repeated));
    assert_eq!(repeated, data, "it was translated before");
    assert!(again(&translator, &mut udp(80, b"x").to_vec()));
}

#[test]
fn a_signed_segment_is_never_changed() {
    for signature in [19, 29] {
        let mut translator = accepted();
        let mut tcp = Tcp::data(plus(OWN, 1), plus(CLIENT_ISN, 1), b"x").times(5, 6);
        tcp.options.extend([&[signature, 18][..], &[0; 16]].concat());
        assert_eq!(numbers(&out(&mut translator, &tcp)), numbers(&tcp));
        let ack = Tcp {
            ack: plus(WIRE, 1),
            ..tcp
        };
        assert_eq!(numbers(&inward(&mut translator, &ack)), numbers(&ack));
    }
}

#[test]
fn a_snapshot_stays_below_its_bound_and_keeps_the_offsets() {
    let mut translator = Translator::new();
    translator.follow();
    out(&mut translator, &Tcp::new(OWN, 1, SYN | ACK, b""));
    inward(&mut translator, &Tcp::ack(1, 500));
    translator.lead();
    for port in 0..60_000 {
        let mut frame = Tcp {
            v6: true,
            ports: (port, 80),
            ..Tcp::new(1, 0, SYN, b"")
        }
        .frame()
        .to_vec();
        outbound(&mut translator, &mut frame);
    }
    let snapshot = translator.snapshot();
    assert!(snapshot.encoded.len() <= snapshot::BYTES_MAX);
    assert_eq!(snapshot.left_out, 0, "only such that need no translation");
    let mut copy = Translator::new();
    copy.replace(&snapshot.encoded).unwrap();
    assert_eq!(copy.translated(), 1);
}

proptest! {
    #[test]
    fn case_p05_any_initial_numbers_and_lengths_survive_a_takeover(
        wire: u32, own: u32, client: u32,
        pieces in proptest::collection::vec((1u32..3000, 0u32..3000, any::<bool>()), 1..40), takeover in 0usize..40,
    ) {
        let mut translator = Translator::new();
        translator.follow();
        out(&mut translator, &Tcp::new(own, plus(client, 1), SYN | ACK, b""));
        let first = inward(&mut translator, &Tcp::ack(plus(client, 1), plus(wire, 1)));
        prop_assert_eq!(first.ack, plus(own, 1));
        let (mut sent, mut received) = (1u32, 1u32);
        for (number, (more, acked, outward)) in pieces.into_iter().enumerate() {
            if number == takeover {
                translator.lead();
            }
            if outward {
                let data = out(&mut translator, &Tcp::data(plus(own, sent), plus(client, received), b"x"));
                prop_assert_eq!(numbers(&data), (plus(wire, sent), plus(client, received)));
                sent += more;
            } else {
                let ack = plus(wire, sent - acked.min(sent - 1));
                let data = inward(&mut translator, &Tcp::data(plus(client, received), ack, b"x").sack(&[(ack, plus(ack, 5))]));
                prop_assert_eq!(data.ack.wrapping_sub(own), ack.wrapping_sub(wire));
                received += more;
            }
        }
    }

    #[test]
    fn garbage_passes_without_a_panic_and_keeps_its_length(
        frames in proptest::collection::vec((any::<bool>(), any::<bool>(), garbage()), 1..50),
    ) {
        let mut translator = accepted();
        for (outward, following, mut frame) in frames {
            let length = frame.len();
            if following { translator.follow() } else { translator.lead() }
            if outward { outbound(&mut translator, &mut frame) } else { inbound(&mut translator, &mut frame) }
            prop_assert_eq!(frame.len(), length);
            let mut copy = Translator::new();
            copy.replace(&translator.snapshot().encoded).unwrap();
            prop_assert_eq!(copy.len(), translator.len());
        }
    }

    #[test]
    fn a_damaged_snapshot_is_refused_or_read_but_never_panics(
        changes in proptest::collection::vec((any::<usize>(), any::<u8>()), 0..4), cut in any::<usize>(),
    ) {
        let mut translator = accepted();
        out(&mut translator, &Tcp { v6: true, ..Tcp::new(1, 0, SYN, b"") });
        let mut bytes = translator.snapshot().encoded;
        for (at, byte) in changes {
            let at = at % bytes.len();
            bytes[at] = byte;
        }
        bytes.truncate(cut % (bytes.len() + 1));
        let mut copy = accepted();
        let before = copy.connections.clone();
        if copy.replace(&bytes).is_err() {
            prop_assert_eq!(copy.connections, before, "all or nothing");
        }
    }
}
