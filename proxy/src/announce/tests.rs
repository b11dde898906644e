//! What is learned of a guest, and the frames that announce it.

use proptest::prelude::*;

use super::*;
use crate::comparator::properties::garbage;
use crate::testkit::{GUEST, GUEST_MAC, Tcp, arp as arp_frame, ends, ethernet as frame_of, ip, learn, outbound, udp};

fn v6() -> Ipv6Addr {
    "fd00::1".parse().unwrap()
}

fn neighbour(kind: u8, flags: u8, target: Ipv6Addr) -> Bytes {
    let (from, to) = ends(true, false);
    let mut message = vec![kind, 0, 0, 0, flags, 0, 0, 0];
    message.extend(target.octets());
    ip(from, to, ICMPV6, 255, &[], &message)
}

#[test]
fn what_the_guest_claims_is_announced_and_what_it_forwards_is_not() {
    let mut book = AddressBook::new();
    learn(&mut book, &udp(1, b"x"));
    assert_eq!(
        book.addresses().collect::<Vec<_>>(),
        vec![IpAddr::from(GUEST)],
        "for want of a better"
    );
    learn(&mut book, &arp_frame(2, [10, 0, 0, 5]));
    assert_eq!(book.addresses().collect::<Vec<_>>(), vec![IpAddr::from([10, 0, 0, 5])]);
    learn(&mut book, &arp_frame(1, [0, 0, 0, 0]));
    learn(&mut book, &neighbour(NEIGHBOUR_ADVERTISEMENT, FLAG_ROUTER, v6()));
    assert_eq!(book.addresses().count(), 2, "an ARP probe claims nothing");
}

#[test]
fn case_p16_announcements_are_right_for_each_address_family() {
    let mut book = AddressBook::new();
    learn(&mut book, &arp_frame(2, GUEST));
    learn(&mut book, &neighbour(NEIGHBOUR_ADVERTISEMENT, FLAG_ROUTER, v6()));
    let frames = book.announcements();
    assert_eq!(frames.len(), 4);
    let rarp = &frames[0];
    assert_eq!(
        (&rarp[12..18], &rarp[18..24], &rarp[24..26], rarp[33]),
        (&BROADCAST[..], &GUEST_MAC[..], &[0x80, 0x35][..], 3)
    );
    let operations: Vec<u16> = frames[1..3]
        .iter()
        .map(|frame| {
            let packet = SlicedPacket::from_ethernet(&frame[FRAME_HEADER_BYTES..]).unwrap();
            let Some(NetSlice::Arp(arp)) = packet.net else {
                panic!("ARP is expected")
            };
            assert_eq!(
                (
                    arp.sender_hw_addr(),
                    arp.sender_protocol_addr(),
                    arp.target_protocol_addr()
                ),
                (&GUEST_MAC[..], &GUEST[..], &GUEST[..])
            );
            arp.operation().0
        })
        .collect();
    assert_eq!(operations, vec![1, 2]);
    let packet = SlicedPacket::from_ethernet(&frames[3][FRAME_HEADER_BYTES..]).unwrap();
    let (Some(NetSlice::Ipv6(ip)), Some(TransportSlice::Icmpv6(icmp))) = (&packet.net, &packet.transport) else {
        panic!("ICMPv6 is expected")
    };
    assert_eq!(
        (
            ip.header().hop_limit(),
            ip.header().source_addr(),
            ip.header().destination_addr()
        ),
        (255, v6(), ALL_NODES)
    );
    assert!(icmp.is_checksum_valid(ip.header().source(), ip.header().destination()));
    assert_eq!(
        (icmp.slice()[4], &icmp.slice()[24..26]),
        (FLAG_OVERRIDE | FLAG_ROUTER, &[2, 1][..])
    );
}

#[test]
fn case_p18_each_vlan_is_announced_with_its_tags() {
    let mut book = AddressBook::new();
    for vlans in [vec![(0x8100u16, 7u16)], vec![(0x88a8, 1), (0x8100, 2)]] {
        learn(
            &mut book,
            &Tcp {
                vlans,
                ..Tcp::ack(1, 1)
            }
            .frame(),
        );
    }
    let frames = book.announcements();
    assert_eq!(frames.len(), 6);
    assert!(
        frames
            .iter()
            .any(|frame| frame[24..32] == [0x88, 0xa8, 0, 1, 0x81, 0, 0, 2])
    );
    assert!(frames.iter().any(|frame| frame[24..30] == [0x81, 0, 0, 7, 8, 6]));
}

#[test]
fn the_book_is_bounded_and_keeps_what_was_claimed() {
    let mut book = AddressBook::new();
    learn(&mut book, &arp_frame(2, GUEST));
    for number in 0..2000u32 {
        let [_, b, c, d] = number.to_be_bytes();
        let (_, to) = ends(false, false);
        learn(&mut book, &ip(IpAddr::from([172, b, c, d]), to, 200, 64, &[], b"x"));
        let mut frame = frame_of(&[], 0x88cc, b"x").to_vec();
        frame[20..24].copy_from_slice(&number.to_be_bytes());
        learn(&mut book, &frame);
    }
    assert_eq!((book.macs.len(), book.addresses.len()), (MACS_MAX, ADDRESSES_MAX));
    assert!(book.addresses().any(|address| address == IpAddr::from(GUEST)));
}

#[test]
fn the_state_goes_through_a_checkpoint_all_or_nothing() {
    let mut state = NetworkState::default();
    learn(&mut state.addresses, &arp_frame(2, GUEST));
    learn(&mut state.addresses, &neighbour(NEIGHBOUR_SOLICITATION, 0, v6()));
    outbound(&mut state.translator, &mut Tcp::new(1, 0, 2, b"").frame().to_vec());
    let bytes = state.encode().encoded;
    let mut copy = NetworkState::default();
    copy.replace(&bytes).unwrap();
    assert_eq!(copy.encode().encoded, bytes);
    assert_eq!(copy.addresses.announcements(), state.addresses.announcements());
    for end in 0..bytes.len() {
        assert!(NetworkState::check(&bytes[..end]).is_err(), "cut at {end}");
    }
    assert_eq!(
        NetworkState::check(&[&bytes[..], &[0]].concat()),
        Err(StateError::Excess(1))
    );
    assert_eq!(NetworkState::check(&[9]), Err(StateError::Version(9)));
    let mut half = NetworkState::default();
    assert!(half.replace(&bytes[..bytes.len() - 1]).is_err());
    assert!(half.translator.is_empty(), "nothing of a broken state is taken over");
}

#[test]
fn a_tag_that_no_vlan_has_is_refused() {
    let mut book = AddressBook::new();
    learn(&mut book, &frame_of(&[(0x8100, 7)], 0x88cc, b"who"));
    let mut state = book.snapshot();
    let at = state.windows(4).position(|tag| tag == [0x00, 0x81, 7, 0]);
    let at = at.expect("it knows the guest's hardware address on its VLAN");
    // MACsec's, which was announced as if it were a tag of four bytes.
    state[at..at + 2].copy_from_slice(&0x88e5_u16.to_le_bytes());
    assert_eq!(book.replace(&state), Err(StateError::Invalid("VLAN tag protocol")));
}

proptest! {
    #[test]
    fn garbage_teaches_nothing_that_breaks(frames in proptest::collection::vec(garbage(), 1..40)) {
        let mut book = AddressBook::new();
        for frame in frames {
            learn(&mut book, &frame);
        }
        for frame in book.announcements() {
            prop_assert!(SlicedPacket::from_ethernet(&frame[FRAME_HEADER_BYTES..]).is_ok());
        }
        let mut copy = AddressBook::new();
        copy.replace(&book.snapshot()).unwrap();
        prop_assert_eq!(copy.announcements(), book.announcements());
    }

    #[test]
    fn a_damaged_state_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _result = NetworkState::check(&bytes);
        let _result = NetworkState::check(&[&[VERSION, 0, 0, 0, 0][..], &bytes].concat());
    }
}
