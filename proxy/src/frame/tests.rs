//! The checked view of frames, on good and on damaged bytes.

use proptest::prelude::*;

use super::*;
use crate::comparator::properties::garbage;
use crate::testkit::*;

fn class(frame: &[u8]) -> Class {
    parse(frame).key.class
}

#[test]
fn case_p17_p18_every_frame_class_is_recognised() {
    let (v4, v6) = (ends(false, false), ends(true, false));
    let packet = |ends: (IpAddr, IpAddr), protocol, payload: &[u8]| ip(ends.0, ends.1, protocol, 64, &[], payload);
    let tcp = Tcp::data(1, 1, b"data").frame();
    let mut fragment = tcp.to_vec();
    fragment[IP_AT + 6] = 0x20;
    let hop_by_hop = [&[6, 0, 1, 4, 0, 0, 0, 0][..], &tcp[TRANSPORT_AT..]].concat();
    let atomic = [&[6, 0, 0, 0, 0, 0, 0, 1][..], &tcp[TRANSPORT_AT..]].concat();
    let v6_fragment = [&[17, 0, 0, 1, 0, 0, 0, 1][..], &[0; 16]].concat();
    let cases: Vec<(Vec<u8>, Class)> = vec![
        (tcp.to_vec(), Class::Tcp),
        (
            Tcp {
                vlans: vec![(0x88a8, 1), (0x8100, 2)],
                ..Tcp::data(1, 1, b"x")
            }
            .frame()
            .to_vec(),
            Class::Tcp,
        ),
        (packet(v6, 0, &hop_by_hop).to_vec(), Class::Tcp),
        (packet(v6, 44, &atomic).to_vec(), Class::Tcp),
        (udp(1, b"x").to_vec(), Class::Udp),
        (packet(v4, 1, &[8, 0, 0, 0, 0, 1, 0, 1]).to_vec(), Class::Icmp),
        (packet(v6, 58, &[128, 0, 0, 0, 0, 1, 0, 1]).to_vec(), Class::Icmpv6),
        (packet(v4, 132, &[0; 12]).to_vec(), Class::Sctp),
        (packet(v4, 132, &[0; 3]).to_vec(), Class::Ip(132)),
        (packet(v4, 2, &[0x16, 0, 0, 0, 224, 0, 0, 1]).to_vec(), Class::Ip(2)),
        (fragment, Class::Fragment(6)),
        (packet(v6, 44, &v6_fragment).to_vec(), Class::Fragment(17)),
        (arp(1, GUEST).to_vec(), Class::Arp),
        (ethernet(&[], 0x88cc, b"x").to_vec(), Class::Ethernet(0x88cc)),
        (ethernet(&[], 38, &[0x42; 38]).to_vec(), Class::Ethernet(0)),
        (Tcp::new(1, 1, SYN | FIN, b"").frame().to_vec(), Class::Malformed),
        (
            Tcp {
                options: vec![8, 0],
                ..Tcp::ack(1, 1)
            }
            .frame()
            .to_vec(),
            Class::Malformed,
        ),
        (tcp[..TRANSPORT_AT + 6].to_vec(), Class::Malformed),
        (vec![], Class::Malformed),
    ];
    for (frame, want) in cases {
        assert_eq!(class(&frame), want, "{frame:02x?}");
    }
}

/// A segment with data and SACK blocks behind these bytes of IPv4 options or an IPv6 extension header.
fn behind(v6: bool, more: &[u8]) -> Vec<u8> {
    let tcp = Tcp {
        v6,
        ..Tcp::data(1, 1, b"odd data!")
    };
    let tcp = tcp.sack(&[(5, 9)]).times(7, 8).frame();
    let (from, to) = ends(v6, false);
    if v6 {
        return ip(
            from,
            to,
            more[8],
            64,
            &[],
            &[&more[..8], &tcp[TRANSPORT_V6_AT..]].concat(),
        )
        .to_vec();
    }
    let mut frame = ip(from, to, 6, 64, &[], &[more, &tcp[TRANSPORT_AT..]].concat()).to_vec();
    frame[IP_AT] += u8::try_from(more.len() / 4).unwrap();
    frame[IP_AT + 10..IP_AT + 12].fill(0);
    let sum = checksum::header(&frame[IP_AT..TRANSPORT_AT + more.len()]);
    frame[IP_AT + 10..IP_AT + 12].copy_from_slice(&sum.to_be_bytes());
    frame
}

#[test]
fn a_segment_behind_more_headers_is_rewritten_in_place_and_acknowledged() {
    let hop_by_hop = [6, 0, 1, 4, 0, 0, 0, 0, 0];
    let router_alert = [0x94, 4, 0, 0];
    for (v6, more) in [(true, &hop_by_hop[..]), (false, &router_alert), (false, &[])] {
        let frame = behind(v6, more);
        let Body::Tcp(found) = parse(&frame).body else {
            panic!("a segment is expected")
        };
        let mut changed = frame.clone();
        found.set_seq(&mut changed, Seq(99));
        found.set_time(&mut changed, Seq(0xffff_ffff));
        found.set_echo(&mut changed, Seq(0));
        let (seen, payload) = crate::testkit::segment(&changed);
        assert_eq!((seen.seq.0, &payload[..]), (99, &b"odd data!"[..]));
        assert_eq!(times(&changed), (0xffff_ffff, 0));
        let reply = found.acknowledgement(&frame, Seq(5)).unwrap();
        let (seen, payload) = crate::testkit::segment(&reply);
        assert_eq!((seen.seq.0, seen.ack, payload.len()), (10, Some(Seq(5)), 0));
        assert_eq!((seen.options.sack, seen.end), (None, reply.len()));
        if !v6 {
            assert_eq!(checksum::header(&reply[IP_AT..TRANSPORT_AT + more.len()]), 0);
        }
    }
}

#[test]
fn a_segment_that_ipsec_signs_is_left_alone() {
    let (from, to) = ends(true, false);
    let tcp = Tcp {
        v6: true,
        ..Tcp::data(1, 1, b"data")
    }
    .frame();
    let signed = [
        &[6, 4, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1][..],
        &[0; 12],
        &tcp[TRANSPORT_V6_AT..],
    ]
    .concat();
    let behind_options = [&[51, 0, 1, 4, 0, 0, 0, 0][..], &signed].concat();
    for (next, packet) in [(51, signed), (60, behind_options)] {
        let frame = ip(from, to, next, 64, &[], &packet);
        let Body::Tcp(found) = parse(&frame).body else {
            panic!("a segment is expected")
        };
        assert!(found.options.signed);
        assert_eq!(found.acknowledgement(&frame, Seq(5)), None);
    }
}

proptest! {
    #[test]
    fn parsing_is_total_and_what_it_points_at_is_within_the_frame(frame in garbage()) {
        let parsed = parse(&frame);
        match parsed.body {
            Body::Tcp(found) => {
                prop_assert!(found.ip < found.tcp && found.tcp + 20 <= found.payload);
                prop_assert!(found.payload <= found.end && found.end <= frame.len());
                let mut changed = frame.clone();
                found.blank_sack(&mut changed);
                found.map_sack(&mut changed, |edge| edge.plus(1));
                found.set_ack(&mut changed, Seq(1));
                found.set_time(&mut changed, Seq(1));
                found.set_echo(&mut changed, Seq(1));
                let _reply = found.acknowledgement(&frame, Seq(1));
            }
            Body::Fragment(fragment) => {
                prop_assert!(fragment.payload <= fragment.end && fragment.end <= frame.len());
                prop_assert!(fragment.headers.equal(&frame, &fragment.headers, &frame));
            }
            Body::Whole(shape) => prop_assert!(shape.equal(&frame, &shape, &frame)),
        }
        prop_assert_eq!(parsed.key.reversed().reversed(), parsed.key);
        let _text = parsed.key.to_string();
    }

    #[test]
    fn case_p23_two_frames_are_equal_or_differ_at_a_byte_in_both_directions(one in garbage(), other in garbage()) {
        if let (Body::Whole(shape), Body::Whole(other_shape)) = (parse(&one).body, parse(&other).body) {
            let there = shape.first_difference(&one, &other_shape, &other);
            prop_assert_eq!(there.is_none(), shape.equal(&one, &other_shape, &other));
            prop_assert_eq!(shape.equal(&one, &other_shape, &other), other_shape.equal(&other, &shape, &one));
        }
    }
}
