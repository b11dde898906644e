//! Timestamps: openings, lagging clocks, takeovers, and what ICMP errors quote.

use proptest::prelude::*;

use super::tests::*;
use super::timestamps::SLACK;
use super::*;
use crate::testkit::*;

/// What the client knows of the primary's clock when the connection opens, and what the secondary's guest does.
const WIRE_TIME: u32 = 0xffff_ff80;
const OWN_TIME: u32 = 9_000;

/// Returns the times of a segment of the guest as they leave.
fn out_times(translator: &mut Translator, value: u32, echo: u32) -> (u32, u32) {
    let tcp = Tcp::data(plus(OWN, 1), plus(CLIENT_ISN, 1), b"x").times(value, echo);
    times(&out(translator, &tcp).frame())
}

/// Returns the times of a client's segment as the guest sees them.
fn in_times(translator: &mut Translator, value: u32, echo: u32) -> (u32, u32) {
    let tcp = Tcp::ack(plus(CLIENT_ISN, 1), plus(WIRE, 1)).times(value, echo);
    times(&inward(translator, &tcp).frame())
}

/// A follower on which a client that uses timestamps has connected to the guest.
fn opened() -> Translator {
    let mut translator = Translator::new();
    translator.follow();
    let answer = Tcp::new(OWN, plus(CLIENT_ISN, 1), SYN | ACK, b"").times(OWN_TIME, 70);
    let left = out(&mut translator, &answer);
    assert_eq!(times(&left.frame()), (OWN_TIME, 70), "the shift is not known yet");
    assert_eq!(in_times(&mut translator, 71, WIRE_TIME), (71, OWN_TIME));
    translator
}

#[test]
fn case_p03_the_times_of_a_passive_open_are_translated() {
    let mut translator = opened();
    assert_eq!(
        out_times(&mut translator, OWN_TIME + 200, 71),
        (plus(WIRE_TIME, 200), 71)
    );
    assert_eq!(
        in_times(&mut translator, 75, plus(WIRE_TIME, 150)),
        (75, OWN_TIME + 150)
    );
}

#[test]
fn case_p03_the_times_of_an_active_open_are_translated() {
    let mut translator = Translator::new();
    translator.follow();
    out(&mut translator, &Tcp::new(OWN, 0, SYN, b"").times(OWN_TIME, 0));
    let answer = Tcp::new(CLIENT_ISN, plus(WIRE, 1), SYN | ACK, b"").times(70, WIRE_TIME);
    let seen = inward(&mut translator, &answer).frame();
    assert_eq!(times(&seen), (70, OWN_TIME));
    assert_eq!(
        out_times(&mut translator, OWN_TIME + 200, 70),
        (plus(WIRE_TIME, 200), 70)
    );
}

#[test]
fn case_p03_a_guest_never_hears_back_a_time_that_it_has_not_sent() {
    let mut translator = opened();
    // Only the primary has repeated its segment, or the clock here lags.
    assert_eq!(in_times(&mut translator, 75, plus(WIRE_TIME, 1_000)), (75, OWN_TIME));
    // The same for a SYN that went with the checkpoint.
    let mut primary = Translator::new();
    let answer = Tcp::new(WIRE, plus(CLIENT_ISN, 1), SYN | ACK, b"");
    out(&mut primary, &answer.clone().times(WIRE_TIME, 70));
    let mut secondary = Translator::new();
    secondary.replace(&primary.snapshot().encoded).unwrap();
    secondary.follow();
    assert_eq!(in_times(&mut secondary, 71, plus(WIRE_TIME, 900)), (71, WIRE_TIME));
    out(&mut secondary, &answer.times(plus(WIRE_TIME, 800), 71));
    assert_eq!(
        in_times(&mut secondary, 71, plus(WIRE_TIME, 900)),
        (71, plus(WIRE_TIME, 800))
    );
}

#[test]
fn case_p03_after_a_takeover_no_time_is_before_one_that_the_client_has_seen() {
    let mut translator = opened();
    out_times(&mut translator, OWN_TIME + 200, 71);
    // The primary's clock is ahead.
    in_times(&mut translator, 75, plus(WIRE_TIME, 900));
    translator.lead();
    let floor = plus(WIRE_TIME, 900 + SLACK);
    assert_eq!(out_times(&mut translator, OWN_TIME + 300, 75), (floor, 75));
    assert_eq!(in_times(&mut translator, 76, floor), (76, OWN_TIME + 300));
    translator.lead();
    assert_eq!(out_times(&mut translator, OWN_TIME + 900 + SLACK, 75), (floor, 75));
    assert_eq!(
        out_times(&mut translator, OWN_TIME + 905 + SLACK, 75),
        (plus(floor, 5), 75)
    );
}

#[test]
fn case_p03_a_connection_from_before_the_load_is_translated_until_the_clock_has_caught_up() {
    for echoes in [true, false] {
        let mut translator = Translator::new();
        translator.follow();
        assert_eq!(out_times(&mut translator, 500, 7), (500, 7));
        if echoes {
            assert_eq!(in_times(&mut translator, 8, 560), (8, 500));
        }
        let latest = if echoes { 560 } else { 500 };
        translator.lead();
        assert_eq!(out_times(&mut translator, 510, 7), (latest + SLACK, 7));
        // The next secondary keeps to it.
        let mut next = Translator::new();
        next.replace(&translator.snapshot().encoded).unwrap();
        next.follow();
        next.lead();
        assert_eq!(out_times(&mut next, 511, 7), (latest + 2 * SLACK, 7));
        let caught_up = latest + SLACK;
        assert_eq!(out_times(&mut translator, caught_up, 7), (caught_up, 7));
        assert!(translator.is_empty(), "nothing is left to translate");
    }
}

#[test]
fn a_shift_goes_through_a_checkpoint_and_another_format_is_refused() {
    let mut translator = opened();
    translator.lead();
    let mut snapshot = translator.snapshot().encoded;
    let mut copy = Translator::new();
    copy.replace(&snapshot).unwrap();
    let clock = |translator: &Translator| translator.connections.values().next().unwrap().clock;
    assert_eq!(clock(&copy), clock(&translator));
    assert!(clock(&copy).floor.is_some() && clock(&copy).shift != 0);
    snapshot[0] = 1;
    assert_eq!(copy.replace(&snapshot), Err(crate::StateError::Version(1)));
}

#[test]
fn a_time_that_nobody_can_have_sent_sets_no_floor() {
    let mut translator = opened();
    in_times(&mut translator, 75, plus(WIRE_TIME, 1 << 30));
    translator.lead();
    assert_eq!(
        out_times(&mut translator, OWN_TIME + 300, 75),
        (plus(WIRE_TIME, 300), 75)
    );
}

#[test]
fn what_returns_no_time_is_not_translated() {
    let mut translator = opened();
    assert_eq!(in_times(&mut translator, 75, 0), (75, 0));
    let mut reset = Tcp::new(plus(CLIENT_ISN, 9), 0, RST, b"").times(5, 6);
    reset.inbound = true;
    let mut frame = reset.frame().to_vec();
    inbound(&mut translator, &mut frame);
    assert_eq!(frame, reset.frame(), "without an ACK the second time means nothing");
    // Neither at an odd place is any other byte changed.
    let mut odd = Tcp::ack(plus(CLIENT_ISN, 1), plus(WIRE, 1));
    odd.options = [&[1, 8, 10][..], &[0; 4], &plus(WIRE_TIME, 5).to_be_bytes()].concat();
    let seen = inward(&mut translator, &odd);
    assert_eq!(seen.options[3..11], [&[0; 4][..], &OWN_TIME.to_be_bytes()].concat());
}

#[test]
fn case_p22_an_icmp_error_quotes_the_guests_own_number() {
    for v6 in [false, true] {
        let mut translator = Translator::new();
        translator.follow();
        let like = |tcp: Tcp| Tcp { v6, ..tcp };
        out(
            &mut translator,
            &like(Tcp::new(OWN, plus(CLIENT_ISN, 1), SYN | ACK, b"")),
        );
        inward(&mut translator, &like(Tcp::ack(plus(CLIENT_ISN, 1), plus(WIRE, 1))));
        let quoted = like(Tcp::data(plus(WIRE, 100), 1, b"too long for somebody on the way")).frame();
        let header = if v6 { 40 } else { 20 };
        // All that a router must quote.
        let error = icmp_error(v6, &quoted[IP_AT..IP_AT + header + 8]);
        let mut seen = error.clone();
        inbound(&mut translator, &mut seen);
        let at = IP_AT + header + 8 + header + 4;
        assert_eq!(seen[at..at + 4], plus(OWN, 100).to_be_bytes());
        assert_eq!(icmp_checksum(v6, &seen), 0);
        // Of another connection.
        let other = icmp_error(
            v6,
            &like(Tcp {
                ports: (80, 1),
                ..Tcp::ack(1, 1)
            })
            .frame()[IP_AT..IP_AT + header + 8],
        );
        let mut seen = other.clone();
        inbound(&mut translator, &mut seen);
        assert_eq!(seen, other);
    }
}

/// An error of the network about one of the guest's packets.
fn icmp_error(v6: bool, quoted: &[u8]) -> Vec<u8> {
    let (from, to) = ends(v6, true);
    let kind = if v6 { 2 } else { 3 };
    let mut message = [&[kind, if v6 { 0 } else { 4 }, 0, 0, 0, 0, 5, 0][..], quoted].concat();
    let sum = if v6 {
        crate::checksum::transport(from, to, 58, &message)
    } else {
        crate::checksum::header(&message)
    };
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    ip(from, to, if v6 { 58 } else { 1 }, 64, &[], &message).to_vec()
}

fn icmp_checksum(v6: bool, frame: &[u8]) -> u16 {
    let (from, to) = ends(v6, true);
    if v6 {
        crate::checksum::transport(from, to, 58, &frame[TRANSPORT_V6_AT..])
    } else {
        crate::checksum::header(&frame[TRANSPORT_AT..])
    }
}

proptest! {
    /// Two guests, the secondary's clock behind, and a client that drops what is older than what it has seen.
    #[test]
    fn case_p03_no_clock_and_no_lag_lets_the_client_or_the_guest_drop_a_segment(
        primary in 1u32.., secondary: u32, handshake: bool, lag in 0u32..SLACK,
        steps in proptest::collection::vec((0u32..200, any::<bool>(), any::<bool>()), 1..40), takeover in 0usize..40,
    ) {
        // A connection from before the load is of one clock, and the secondary's lags by as much.
        let secondary = if handshake { secondary } else { primary.wrapping_sub(lag) };
        let mut translator = Translator::new();
        translator.follow();
        let mut now = 0u32;
        let mut seen = primary;
        let mut sent = secondary;
        if handshake {
            out(&mut translator, &Tcp::new(OWN, plus(CLIENT_ISN, 1), SYN | ACK, b"").times(secondary, 1));
            let (_, echo) = in_times(&mut translator, 1, primary);
            prop_assert_eq!(echo, secondary, "a guest refuses any other time");
        } else {
            out_times(&mut translator, secondary, 1);
        }
        let mut leads = false;
        for (number, (pause, outward, lost)) in steps.into_iter().enumerate() {
            now += pause;
            if number == takeover {
                translator.lead();
                leads = true;
            }
            if outward {
                sent = secondary.wrapping_add(now);
                let (value, _) = out_times(&mut translator, sent, 1);
                // The primary's is what leaves, and what it sends alone as well, while there is one.
                let value = if leads { value } else { primary.wrapping_add(now) };
                prop_assert!(Seq(seen).at_most(Seq(value)), "PAWS");
                if !lost {
                    seen = value;
                }
            } else if seen != 0 {
                let (_, echo) = in_times(&mut translator, 1, seen);
                prop_assert!(Seq(echo).at_most(Seq(sent)), "a time that was never sent");
            }
        }
    }
}
