//! Frames as the switch sees them: VLAN tags, and what kind of TCP segment one is.

use std::net::{IpAddr, SocketAddr};

use bytes::{BufMut, Bytes, BytesMut};
use checkpoint::limits::FRAME_HEADER_BYTES;
use etherparse::{NetSlice, SlicedPacket, TransportSlice};

/// Where the two Ethernet addresses end.
const ADDRESSES: usize = FRAME_HEADER_BYTES + 12;
/// Where the header says from where on a checksum is to be computed, if it says that one is.
const CHECKSUM_FROM: std::ops::Range<usize> = 6..8;
const TAG_BYTES: usize = 4;
const CUSTOMER_TAG: u16 = 0x8100;
const SERVICE_TAG: u16 = 0x88a8;

/// What a segment does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// It opens a connection.
    Syn,
    /// It answers one that does.
    SynAck,
    /// It carries bytes.
    Data,
    /// It ends a direction.
    Fin,
}

/// Returns what a frame is, if it is a TCP segment.
pub(crate) fn kinds(frame: &[u8]) -> impl Iterator<Item = Kind> + use<> {
    let tcp = match SlicedPacket::from_ethernet(&frame[FRAME_HEADER_BYTES..])
        .ok()
        .and_then(|packet| packet.transport)
    {
        Some(TransportSlice::Tcp(tcp)) => Some((tcp.syn(), tcp.ack(), tcp.fin(), !tcp.payload().is_empty())),
        _ => None,
    };
    let (syn, ack, fin, data) = tcp.unwrap_or_default();
    [
        (syn && !ack, Kind::Syn),
        (syn && ack, Kind::SynAck),
        (data, Kind::Data),
        (fin, Kind::Fin),
    ]
    .into_iter()
    .filter_map(|(is, kind)| is.then_some(kind))
}

/// Source and destination.
pub(crate) type Ends = (SocketAddr, SocketAddr);

/// Returns which connection a segment belongs to, and whether it resets it; nothing if it is none.
pub(crate) fn is_reset(frame: &[u8]) -> Option<(Ends, bool)> {
    let packet = SlicedPacket::from_ethernet(&frame[FRAME_HEADER_BYTES..]).ok()?;
    let Some(TransportSlice::Tcp(tcp)) = packet.transport else {
        return None;
    };
    let (source, destination): (IpAddr, IpAddr) = match packet.net? {
        NetSlice::Ipv4(ip) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
        NetSlice::Ipv6(ip) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
        NetSlice::Arp(_) => return None,
    };
    let ends = (
        SocketAddr::new(source, tcp.source_port()),
        SocketAddr::new(destination, tcp.destination_port()),
    );
    Some((ends, tcp.rst()))
}

/// Says whether the checksum of a TCP segment or UDP datagram is right, once it is filled in; of others it is not known.
pub(crate) fn is_intact(frame: &Bytes) -> bool {
    let wire = proxy::on_wire(frame);
    let Ok(packet) = SlicedPacket::from_ethernet(&wire) else {
        return true;
    };
    let (told, computed) = match (&packet.transport, &packet.net) {
        (Some(TransportSlice::Tcp(tcp)), Some(NetSlice::Ipv4(ip))) => (
            tcp.checksum(),
            tcp.calc_checksum_ipv4(ip.header().source(), ip.header().destination())
                .ok(),
        ),
        (Some(TransportSlice::Tcp(tcp)), Some(NetSlice::Ipv6(ip))) => (
            tcp.checksum(),
            tcp.calc_checksum_ipv6(ip.header().source(), ip.header().destination())
                .ok(),
        ),
        (Some(TransportSlice::Udp(udp)), Some(NetSlice::Ipv4(ip))) => {
            let (source, destination) = (ip.header().source(), ip.header().destination());
            let computed = udp
                .to_header()
                .calc_checksum_ipv4_raw(source, destination, udp.payload());
            (udp.checksum(), computed.ok())
        }
        _ => return true,
    };
    // Both zeroes mean the same.
    computed.is_some_and(|computed| computed % 0xffff == told % 0xffff)
}

/// Puts tags on a frame, the outermost first.
pub(crate) fn tag(frame: &[u8], vlans: &[u16]) -> Bytes {
    let mut tagged = BytesMut::with_capacity(frame.len() + TAG_BYTES * vlans.len());
    tagged.put_slice(&frame[..ADDRESSES]);
    for (inner, vlan) in vlans.iter().rev().enumerate().rev() {
        tagged.put_u16(if inner == 0 { CUSTOMER_TAG } else { SERVICE_TAG });
        tagged.put_u16(*vlan);
    }
    tagged.put_slice(&frame[ADDRESSES..]);
    move_checksum(&mut tagged, |from| from.wrapping_add(length(vlans)));
    tagged.freeze()
}

/// Takes them off again.
///
/// # Panics
/// Panics if the frame has others.
pub(crate) fn untag(frame: &[u8], vlans: &[u16]) -> Vec<u8> {
    let end = ADDRESSES + TAG_BYTES * vlans.len();
    let found = frame[ADDRESSES..end]
        .chunks(TAG_BYTES)
        .map(|tag| u16::from_be_bytes([tag[2], tag[3]]) & 0x0fff);
    assert!(found.eq(vlans.iter().copied()), "a frame left its VLAN: {frame:02x?}");
    let mut bare = [&frame[..ADDRESSES], &frame[end..]].concat();
    move_checksum(&mut bare, |from| from.wrapping_sub(length(vlans)));
    bare
}

/// Changes from where on a checksum is to be computed, if one is.
fn move_checksum(frame: &mut [u8], change: impl Fn(u16) -> u16) {
    if frame[0] & 1 != 0 {
        let from = &mut frame[CHECKSUM_FROM];
        let moved = change(u16::from_le_bytes([from[0], from[1]]));
        from.copy_from_slice(&moved.to_le_bytes());
    }
}

fn length(vlans: &[u16]) -> u16 {
    u16::try_from(TAG_BYTES * vlans.len()).expect("a few tags")
}

#[test]
fn tags_go_on_and_come_off() {
    let mut frame: Vec<u8> = (0..80).collect();
    frame[0] = 1;
    for vlans in [&[][..], &[7], &[100, 7]] {
        let tagged = tag(&frame, vlans);
        assert_eq!(tagged.len(), frame.len() + 4 * vlans.len());
        assert_eq!(untag(&tagged, vlans), frame);
    }
    let tagged = tag(&frame, &[100, 7]);
    assert_eq!(&tagged[24..32], &[0x88, 0xa8, 0, 100, 0x81, 0, 0, 7]);
    assert_eq!(tagged[6], frame[6] + 8, "what the header points at is where it was");
}
