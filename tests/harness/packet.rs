//! The frames of the toy's world: UDP, in fragments too, and TCP over IPv4 over Ethernet, built and read, and nothing else.
//!
//! Small enough to be cheap in a loop of millions. Sums are left to etherparse, so that what the pair has
//! rewritten is judged by code that is not its own.

use std::collections::BTreeMap;

use bytes::Bytes;
use checkpoint::Nic;
use checkpoint::limits::FRAME_HEADER_BYTES;
use etherparse::checksum::Sum16BitWords;

/// The guest's address.
pub const GUEST: u8 = 1;
/// Port at which the guest serves requests, over UDP and TCP.
pub const SERVICE_PORT: u16 = 7;

/// FIN of a TCP header.
pub const FIN: u8 = 1;
/// SYN of a TCP header.
pub const SYN: u8 = 2;
/// RST of a TCP header.
pub const RST: u8 = 4;
/// PSH of a TCP header.
pub const PSH: u8 = 8;
/// ACK of a TCP header.
pub const ACK: u8 = 16;

/// Where Ethernet starts: behind the header that says what is left to do.
const ETHERNET: usize = FRAME_HEADER_BYTES;
/// Where a packet starts in its frame.
pub const IP: usize = ETHERNET + 14;
/// Where a datagram starts in its frame.
pub const TRANSPORT: usize = IP + 20;
const CHECKSUM_AT: usize = 16;
/// What the header before a frame says: the checksum is to be filled in, the segment is to be cut, into such pieces.
const NEEDS_CHECKSUM: u8 = 1;
const SEGMENTS: u8 = 1;
const PIECE: usize = 2;
const TCP_PROTOCOL: u8 = 6;
const UDP_PROTOCOL: u8 = 17;

/// Returns the card by which the guest reaches that address: it has a network behind each of its cards.
#[must_use]
pub fn card_to(address: u8, cards: usize) -> Nic {
    let number = (usize::from(address) + 1) % cards;
    Nic::all(cards).nth(number).expect("one of so many")
}

/// Returns the card at which a client's frame arrives, and by which the guest's leaves; nothing for what is not IPv4.
#[must_use]
pub fn cards_of(frame: &[u8], cards: usize) -> Option<[Nic; 2]> {
    let ip = frame
        .get(IP..TRANSPORT)
        .filter(|_| frame[ETHERNET + 12..IP] == [8, 0])?;
    Some([ip[15], ip[19]].map(|address| card_to(address, cards)))
}

/// One end of a flow: the last byte of its address, and its port.
pub type End = (u8, u16);

/// What says how the rest of a segment is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgement number, meant if the flag is set.
    pub ack: u32,
    /// Flags.
    pub flags: u8,
    /// Bytes that the sender can take.
    pub window: u16,
}

impl Header {
    /// Tells whether a flag is set.
    #[must_use]
    pub fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

/// A frame that could be read.
#[derive(Clone, Copy, Debug)]
pub struct Packet<'a> {
    /// Who sent it.
    pub from: End,
    /// To whom.
    pub to: End,
    /// For TCP.
    pub tcp: Option<Header>,
    /// What it carries.
    pub payload: &'a [u8],
    /// Its sums are right.
    pub intact: bool,
}

/// Reads a frame; anything else than UDP and TCP over plain IPv4 is nothing.
#[must_use]
pub fn parse(frame: &[u8]) -> Option<Packet<'_>> {
    let ip = frame.get(IP..TRANSPORT)?;
    if frame[ETHERNET + 12..IP] != [8, 0] || ip[0] != 0x45 || fragment(frame).is_some() {
        return None;
    }
    let length = usize::from(u16::from_be_bytes([ip[2], ip[3]]));
    let transport = frame.get(TRANSPORT..IP + length)?;
    let word = |at: usize| Some(u16::from_be_bytes(transport.get(at..at + 2)?.try_into().ok()?));
    let long = |at: usize| Some(u32::from_be_bytes(transport.get(at..at + 4)?.try_into().ok()?));
    let (from, to) = ((ip[15], word(0)?), (ip[19], word(2)?));
    let (tcp, payload) = match ip[9] {
        UDP_PROTOCOL => (None, transport.get(8..)?),
        TCP_PROTOCOL => {
            let header = Header {
                seq: long(4)?,
                ack: long(8)?,
                flags: *transport.get(13)?,
                window: word(14)?,
            };
            (Some(header), transport.get(usize::from(transport[12] >> 4) * 4..)?)
        }
        _ => return None,
    };
    let whole = Sum16BitWords::new().add_slice(ip).ones_complement() == 0;
    let intact = whole && rest_is_intact(frame, payload.len(), transport_sum(ip[9], from.0, to.0, transport));
    Some(Packet {
        from,
        to,
        tcp,
        payload,
        intact,
    })
}

/// Says whether the sum of a segment is right, or what is to make it right, and to cut it, later.
fn rest_is_intact(frame: &[u8], payload: usize, sum: u16) -> bool {
    let header = &frame[..ETHERNET];
    if header[0] & NEEDS_CHECKSUM == 0 {
        return sum == 0 && *header == [0; ETHERNET];
    }
    let place = [length(TRANSPORT - ETHERNET), length(CHECKSUM_AT)]
        .map(u16::to_le_bytes)
        .concat();
    let is_cut = match header[1] {
        0 => header[4..6] == [0, 0],
        SEGMENTS => usize::from(u16::from_le_bytes([header[4], header[5]])) < payload,
        _ => false,
    };
    // The field holds the sum of the pseudo header; what is summed up later begins with the segment itself.
    let later = Sum16BitWords::new()
        .add_slice(&frame[TRANSPORT..])
        .ones_complement()
        .to_ne_bytes();
    let mut whole = frame[ETHERNET..].to_vec();
    whole[TRANSPORT - ETHERNET + CHECKSUM_AT..][..2].copy_from_slice(&later);
    let ends = (frame[IP + 15], frame[IP + 19]);
    let right = transport_sum(TCP_PROTOCOL, ends.0, ends.1, &whole[TRANSPORT - ETHERNET..]) == 0;
    header[6..10] == place && is_cut && right
}

/// Makes a UDP frame.
#[must_use]
pub fn udp(from: End, to: End, payload: &[u8]) -> Bytes {
    let mut header = [0; 8];
    header[..2].copy_from_slice(&from.1.to_be_bytes());
    header[2..4].copy_from_slice(&to.1.to_be_bytes());
    header[4..6].copy_from_slice(&length(8 + payload.len()).to_be_bytes());
    frame(UDP_PROTOCOL, from.0, to.0, &header, 6, payload)
}

/// Makes a TCP frame.
#[must_use]
pub fn tcp(from: End, to: End, tcp: &Header, payload: &[u8]) -> Bytes {
    let mut header = [0; 20];
    header[..2].copy_from_slice(&from.1.to_be_bytes());
    header[2..4].copy_from_slice(&to.1.to_be_bytes());
    header[4..8].copy_from_slice(&tcp.seq.to_be_bytes());
    header[8..12].copy_from_slice(&tcp.ack.to_be_bytes());
    header[12] = 5 << 4;
    header[13] = tcp.flags;
    header[14..16].copy_from_slice(&tcp.window.to_be_bytes());
    let mut frame: Vec<u8> = frame(TCP_PROTOCOL, from.0, to.0, &header, CHECKSUM_AT, payload).into();
    // Every fourth is left to others to be finished. The two guests' numbers differ, and so do those segments.
    if tcp.seq % 4 == 3 {
        let place = TRANSPORT + CHECKSUM_AT;
        let sum = transport_sum(TCP_PROTOCOL, from.0, to.0, &[]);
        let sum = Sum16BitWords::new()
            .add_2bytes((!sum).to_ne_bytes())
            .add_2bytes(length(frame.len() - TRANSPORT).to_be_bytes());
        frame[place..place + 2].copy_from_slice(&(!sum.ones_complement()).to_ne_bytes());
        frame[0] = NEEDS_CHECKSUM;
        frame[6..8].copy_from_slice(&length(TRANSPORT - ETHERNET).to_le_bytes());
        frame[8..10].copy_from_slice(&length(CHECKSUM_AT).to_le_bytes());
        if payload.len() > PIECE {
            frame[1] = SEGMENTS;
            frame[2..4].copy_from_slice(&length(TRANSPORT - ETHERNET + header.len()).to_le_bytes());
            frame[4..6].copy_from_slice(&length(PIECE).to_le_bytes());
        }
    }
    frame.into()
}

/// A fragment: the number of its datagram, its place in that, whether there is more behind it, and its bytes.
#[must_use]
pub fn fragment(frame: &[u8]) -> Option<(u16, usize, bool, &[u8])> {
    let (ip, bytes) = (frame.get(IP..TRANSPORT)?, frame.get(TRANSPORT..)?);
    let word = |at: usize| u16::from_be_bytes([ip[at], ip[at + 1]]);
    let (place, more) = (usize::from(word(6) & 0x1fff) * 8, word(6) & 0x2000 != 0);
    let is_ip = frame[ETHERNET + 12..IP] == [8, 0] && ip[0] == 0x45;
    (is_ip && (place > 0 || more)).then_some((word(4), place, more, bytes))
}

/// Cuts a datagram in two, before the byte at `place`.
#[must_use]
pub fn cut(frame: &Bytes, number: u16, place: u16) -> [Bytes; 2] {
    let at = TRANSPORT + usize::from(place);
    [(0, TRANSPORT..at, 0x2000), (place / 8, at..frame.len(), 0)].map(|(units, part, more)| {
        let mut out = frame[..TRANSPORT].to_vec();
        out.extend_from_slice(&frame[part]);
        let [ip_length, flags] = [length(out.len() - IP), units | more];
        for (at, word) in [(2, ip_length), (4, number), (6, flags), (10, 0)] {
            out[IP + at..IP + at + 2].copy_from_slice(&word.to_be_bytes());
        }
        let sum = Sum16BitWords::new().add_slice(&out[IP..TRANSPORT]).ones_complement();
        out[IP + 10..IP + 12].copy_from_slice(&sum.to_ne_bytes());
        out.into()
    })
}

/// Puts fragments together.
#[derive(Debug, Default)]
pub struct Assembly {
    /// By the datagram's number, and by place.
    parts: BTreeMap<u16, BTreeMap<usize, (bool, Bytes)>>,
}

impl Assembly {
    /// Adds a fragment; returns the frame that was cut, if all of it has come.
    pub fn add(&mut self, frame: &[u8]) -> Option<Bytes> {
        let (number, place, more, bytes) = fragment(frame)?;
        let parts = self.parts.entry(number).or_default();
        parts.insert(place, (more, Bytes::copy_from_slice(bytes)));
        let mut payload = Vec::new();
        let mut open = true;
        for (at, (more, bytes)) in parts {
            if *at != payload.len() {
                return None;
            }
            payload.extend_from_slice(bytes);
            open = *more;
        }
        if open {
            return None;
        }
        self.parts.remove(&number);
        let from = (frame[IP + 15], u16::from_be_bytes([payload[0], payload[1]]));
        let to = (frame[IP + 19], u16::from_be_bytes([payload[2], payload[3]]));
        let whole = udp(from, to, &payload[8..]);
        // Two datagrams under one number: no receiver takes what they make.
        (whole[TRANSPORT..] == payload[..]).then_some(whole)
    }
}

fn frame(protocol: u8, from: u8, to: u8, header: &[u8], sum_at: usize, payload: &[u8]) -> Bytes {
    let mut out = Vec::with_capacity(TRANSPORT + header.len() + payload.len());
    out.extend([0; ETHERNET]);
    for end in [to, from] {
        out.extend([2, 0, 10, 0, 0, end]);
    }
    let [high, low] = length(20 + header.len() + payload.len()).to_be_bytes();
    out.extend([8, 0, 0x45, 0, high, low, 0, 0, 0x40, 0, 64, protocol, 0, 0]);
    out.extend([10, 0, 0, from, 10, 0, 0, to]);
    let sum = Sum16BitWords::new().add_slice(&out[IP..]).ones_complement();
    out[IP + 10..IP + 12].copy_from_slice(&sum.to_ne_bytes());
    out.extend_from_slice(header);
    out.extend_from_slice(payload);
    let sum = transport_sum(protocol, from, to, &out[TRANSPORT..]);
    let at = TRANSPORT + sum_at;
    out[at..at + 2].copy_from_slice(&sum.to_ne_bytes());
    out.into()
}

/// Returns 0 over a segment whose sum is right.
fn transport_sum(protocol: u8, from: u8, to: u8, segment: &[u8]) -> u16 {
    Sum16BitWords::new()
        .add_4bytes([10, 0, 0, from])
        .add_4bytes([10, 0, 0, to])
        .add_2bytes([0, protocol])
        .add_2bytes(length(segment.len()).to_be_bytes())
        .add_slice(segment)
        .ones_complement()
}

fn length(bytes: usize) -> u16 {
    u16::try_from(bytes).expect("frames are short")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_what_etherparse_reads() {
        let header = Header {
            seq: 0xffff_fff0,
            ack: 7,
            flags: ACK | PSH,
            window: 2_000,
        };
        for payload in [&b""[..], b"odd", b"even"] {
            let frame = tcp((GUEST, SERVICE_PORT), (100, 4_000), &header, payload);
            let read = parse(&frame).expect("it is TCP");
            assert!(read.intact);
            assert_eq!((read.from, read.to), ((GUEST, SERVICE_PORT), (100, 4_000)));
            assert_eq!((read.tcp, read.payload), (Some(header), payload));
            let sliced = etherparse::SlicedPacket::from_ethernet(&frame[ETHERNET..]).expect("well formed");
            let Some(etherparse::TransportSlice::Tcp(tcp)) = sliced.transport else {
                panic!("a TCP segment is expected")
            };
            assert_eq!((tcp.sequence_number(), tcp.payload()), (header.seq, payload));
            assert_eq!(
                tcp.calc_checksum_ipv4([10, 0, 0, 1], [10, 0, 0, 100]),
                Ok(tcp.checksum())
            );

            let mut unfinished = header;
            unfinished.seq += 3;
            let frame = super::tcp((GUEST, SERVICE_PORT), (100, 4_000), &unfinished, payload);
            assert_eq!((frame[0], frame[1]), (1, u8::from(payload.len() > 2)));
            assert!(parse(&frame).is_some_and(|read| read.intact && read.payload == payload));
            for at in [1, 6, 8, TRANSPORT + 17] {
                let mut broken = frame.to_vec();
                broken[at] ^= 8;
                assert!(parse(&broken).is_some_and(|read| !read.intact), "{at}");
            }

            let frame = udp((100, 4_000), (GUEST, SERVICE_PORT), payload);
            assert!(parse(&frame).is_some_and(|read| read.intact && read.payload == payload && read.tcp.is_none()));
            let mut broken = frame.to_vec();
            broken[TRANSPORT + 1] ^= 1;
            assert!(parse(&broken).is_some_and(|read| !read.intact));
        }
    }

    #[test]
    fn a_datagram_in_fragments_is_put_together_as_it_was() {
        let whole = udp((GUEST, SERVICE_PORT), (100, 4_000), &[7; 20]);
        for place in [8, 16, 24] {
            let mut parts = cut(&whole, 9, place);
            assert!(parts.iter().all(|part| parse(part).is_none()));
            let mut assembly = Assembly::default();
            assert_eq!(assembly.add(&parts[1]), None);
            assert_eq!(assembly.add(&parts[0]), Some(whole.clone()));
            let mut broken = parts[1].to_vec();
            *broken.last_mut().expect("it has bytes") ^= 1;
            parts[1] = broken.into();
            assert_eq!(parts.map(|part| assembly.add(&part)), [None, None]);
            let mut pool = etherparse::defrag::IpDefragPool::<(), ()>::new();
            let payloads: Vec<_> = cut(&whole, 9, place)
                .iter()
                .filter_map(|part| {
                    let packet = etherparse::SlicedPacket::from_ethernet(&part[ETHERNET..]).expect("well formed");
                    pool.process_sliced_packet(&packet, (), ()).expect("no overlap")
                })
                .collect();
            assert_eq!(payloads[0].payload, whole[TRANSPORT..]);
        }
    }
}
