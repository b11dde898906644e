//! A checked view of an Ethernet frame behind its header.
//!
//! [`parse`] looks at a frame once and says to which flow it belongs and how it is compared: as a
//! [`Segment`] of a TCP stream, as a [`Fragment`] of an IP datagram, or whole, as a [`Shape`] that names the few bytes which
//! policy ignores. It is total: whatever does not parse is [`Class::Malformed`] and compared byte for byte.
//! Used by the comparator and the translator on bytes of either guest, of the peer and of the
//! network; it never panics and never allocates.

mod cut;

use std::net::IpAddr;

use checkpoint::limits::FRAME_HEADER_BYTES;
use checkpoint::mutants::{self, Mutant};
use etherparse::{
    IpPayloadSlice, Ipv4Slice, Ipv6ExtensionSlice, Ipv6Slice, LinkExtSlice, NetSlice, SlicedPacket, TcpSlice,
    TransportSlice,
};

use crate::checksum;
use crate::flow::{Class, FlowKey, Vlans};
use crate::offload::Offload;
use crate::seq::Seq;

/// Offset of the acknowledgement number in a TCP header.
pub(crate) const TCP_ACK_AT: usize = 8;
/// Offset of the sequence number in a TCP header.
pub(crate) const TCP_SEQ_AT: usize = 4;
/// Offset of the checksum in a TCP header.
pub(crate) const TCP_CHECKSUM_AT: usize = 16;
/// Offset of the flags in a TCP header, and some of them.
const TCP_FLAGS_AT: usize = 13;
const TCP_FIN: u8 = 1;
const TCP_PSH: u8 = 8;
const TCP_ACK: u8 = 16;
/// Offset of the checksum in a UDP header.
const UDP_CHECKSUM_AT: usize = 6;
/// Length of a TCP header without options.
const TCP_HEADER: usize = 20;
/// Length of an IPv6 header without extensions.
const IPV6_HEADER: usize = 40;
/// Most ranges that policy ignores in one frame: three VLAN tags, four IPv4 fields and the UDP checksum.
const IGNORED_MAX: usize = 8;

/// Protocol numbers of IPv6 extension headers, one of which IPv4 has as well.
const AUTHENTICATION: u8 = 51;
const FRAGMENT: u8 = 44;
/// Number of a protocol that has its ports where TCP has them.
const SCTP: u8 = 132;

const OPTION_END: u8 = 0;
const OPTION_NOP: u8 = 1;
const OPTION_MSS: u8 = 2;
const OPTION_WINDOW_SCALE: u8 = 3;
const OPTION_SACK_PERMITTED: u8 = 4;
const OPTION_SACK: u8 = 5;
const OPTION_TIMESTAMP: u8 = 8;
const OPTION_MD5: u8 = 19;
const OPTION_AO: u8 = 29;

/// What [`parse`] found.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Frame {
    pub(crate) key: FlowKey,
    pub(crate) body: Body,
}

/// How a frame is compared.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Body {
    /// By its place in a byte stream.
    Tcp(Segment),
    /// As a part of a datagram.
    Fragment(Fragment),
    /// Whole, but for the ignored ranges.
    Whole(Shape),
}

/// A TCP segment: offsets into its frame and what its header says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    /// Where the IP header starts.
    pub(crate) ip: usize,
    /// Where the TCP header starts.
    pub(crate) tcp: usize,
    /// Where the payload starts.
    pub(crate) payload: usize,
    /// Where the payload, and the IP packet, ends; what follows is padding.
    pub(crate) end: usize,
    pub(crate) seq: Seq,
    pub(crate) ack: Option<Seq>,
    pub(crate) syn: bool,
    pub(crate) fin: bool,
    pub(crate) rst: bool,
    /// The urgent pointer if the URG flag is set.
    pub(crate) urgent: Option<u16>,
    pub(crate) options: Options,
    /// Its checksum is still to be filled in: until then no number in its header counts in it.
    pub(crate) partial: bool,
}

/// What the options of a segment say.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Options {
    /// Signed (MD5, TCP-AO, IPsec): must not be changed on the way.
    pub(crate) signed: bool,
    pub(crate) timestamps: Option<Timestamps>,
    /// The highest right edge of the SACK blocks.
    pub(crate) sack: Option<Seq>,
    /// What a SYN offers; after a takeover the client holds the secondary to it.
    pub(crate) offer: Offer,
}

/// The times in a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Timestamps {
    /// Where the sender's is, counted from the start of the TCP header; the other follows it.
    at: usize,
    /// The sender's time.
    pub(crate) value: Seq,
    /// The time that it returns; without an ACK it means nothing.
    pub(crate) echo: Seq,
}

/// The options of a SYN that bind for the life of the connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Offer {
    mss: Option<u16>,
    window_scale: Option<u8>,
    sack: bool,
    timestamps: bool,
}

/// The length of a frame compared whole, and the ranges that policy ignores in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    /// The first byte that is compared: behind the header that says what is left to do, unless that itself matters.
    first: usize,
    length: usize,
    ignored: [(u16, u16); IGNORED_MAX],
    count: usize,
}

/// A fragment of an IP datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fragment {
    /// Its sender's number for the datagram.
    pub(crate) datagram: u32,
    pub(crate) protocol: u8,
    /// Where its bytes are in the datagram.
    pub(crate) at: usize,
    /// Whether the datagram goes on behind it.
    pub(crate) more: bool,
    /// Where its bytes start in the frame.
    pub(crate) payload: usize,
    /// Where they end; what follows is padding.
    pub(crate) end: usize,
    /// What comes before them in the frame.
    pub(crate) headers: Shape,
}

/// Looks at a frame.
pub(crate) fn parse(bytes: &[u8]) -> Frame {
    sliced(bytes).unwrap_or_else(|| Frame {
        key: FlowKey::unaddressed(Class::Malformed, Vlans::NONE),
        body: Body::Whole(Shape::new(bytes)),
    })
}

impl Segment {
    /// Returns the number of payload bytes.
    pub(crate) fn length(&self) -> u32 {
        u32::try_from(self.end - self.payload).unwrap_or(0)
    }

    /// Returns the sequence number of the first payload byte.
    pub(crate) fn data_seq(&self) -> Seq {
        if self.syn { self.seq.plus(1) } else { self.seq }
    }

    /// Returns the sequence number after everything in this segment.
    pub(crate) fn end_seq(&self) -> Seq {
        self.data_seq().plus(self.length()).plus(u32::from(self.fin))
    }

    /// Writes another sequence number and mends the checksum.
    pub(crate) fn set_seq(&self, frame: &mut [u8], seq: Seq) {
        self.replace(frame, TCP_SEQ_AT, seq.0.to_be_bytes());
    }

    /// Writes another acknowledgement number and mends the checksum.
    pub(crate) fn set_ack(&self, frame: &mut [u8], ack: Seq) {
        self.replace(frame, TCP_ACK_AT, ack.0.to_be_bytes());
    }

    /// Writes another time of the sender and mends the checksum.
    pub(crate) fn set_time(&self, frame: &mut [u8], time: Seq) {
        if let Some(Timestamps { at, .. }) = self.options.timestamps {
            self.replace(frame, at, time.0.to_be_bytes());
        }
    }

    /// Writes another returned time and mends the checksum.
    pub(crate) fn set_echo(&self, frame: &mut [u8], echo: Seq) {
        if let Some(Timestamps { at, .. }) = self.options.timestamps {
            self.replace(frame, at + 4, echo.0.to_be_bytes());
        }
    }

    /// Applies `change` to both edges of every SACK block and mends the checksum.
    pub(crate) fn map_sack(&self, frame: &mut [u8], change: impl Fn(Seq) -> Seq) {
        for edge in self.sack_edges(frame).into_iter().flatten() {
            let mut old = [0; 4];
            old.copy_from_slice(&frame[edge..edge + 4]);
            let new = change(Seq(u32::from_be_bytes(old)));
            self.replace(frame, edge - self.tcp, new.0.to_be_bytes());
        }
    }

    /// Overwrites the SACK options with no-operations and mends the checksum.
    pub(crate) fn blank_sack(&self, frame: &mut [u8]) {
        let (start, end) = (self.tcp + TCP_HEADER, self.payload);
        let mut at = start;
        while let Some((kind, length)) = option_at(&frame[..end], at) {
            if kind == OPTION_SACK {
                self.blank(frame, at, length);
            }
            at += length;
        }
    }

    /// Replaces four bytes of the TCP header and mends the checksum, if it is there.
    fn replace(&self, frame: &mut [u8], at: usize, new: [u8; 4]) {
        if self.partial {
            frame[self.tcp + at..][..4].copy_from_slice(&new);
        } else {
            checksum::replace_u32(frame, self.tcp, at, TCP_CHECKSUM_AT, new);
        }
    }

    fn sack_edges(&self, frame: &[u8]) -> [Option<usize>; 20] {
        let mut edges = [None; 20];
        let mut next = 0;
        let mut at = self.tcp + TCP_HEADER;
        while let Some((kind, length)) = option_at(&frame[..self.payload], at) {
            if kind == OPTION_SACK {
                for edge in (at + 2..at + length).step_by(4).filter(|edge| edge + 4 <= at + length) {
                    if let Some(slot) = edges.get_mut(next) {
                        *slot = Some(edge);
                        next += 1;
                    }
                }
            }
            at += length;
        }
        edges
    }

    fn blank(&self, frame: &mut [u8], at: usize, length: usize) {
        // The checksum is mended in groups of four bytes; the last group overlaps bytes that stay as they are.
        let end = at + length;
        let mut from = at;
        while from < end {
            let start = from.min(self.payload - 4);
            let mut group = [0; 4];
            group.copy_from_slice(&frame[start..start + 4]);
            for (offset, byte) in group.iter_mut().enumerate() {
                if (from..end).contains(&(start + offset)) {
                    *byte = OPTION_NOP;
                }
            }
            self.replace(frame, start - self.tcp, group);
            from = start + 4;
        }
    }
}

impl Shape {
    fn new(bytes: &[u8]) -> Self {
        Self {
            first: 0,
            length: bytes.len(),
            ignored: [(0, 0); IGNORED_MAX],
            count: 0,
        }
    }

    /// Ignores the header before the frame if it says nothing but, perhaps, that the checksum of this datagram, which is
    /// ignored itself, is still to be filled in.
    fn ignore_header(&mut self, bytes: &[u8], datagram: Option<(usize, usize)>) {
        if Offload::of(bytes).is_some_and(|offload| offload.fits(datagram)) {
            self.first = FRAME_HEADER_BYTES;
        }
    }

    /// Ignores these bytes, which come after all that it ignores already.
    fn ignore(&mut self, from: usize, length: usize) {
        assert!(
            self.count < IGNORED_MAX,
            "a frame has at most {IGNORED_MAX} ignored ranges"
        );
        let (Ok(start), Ok(end)) = (u16::try_from(from), u16::try_from(from + length)) else {
            return;
        };
        self.ignored[self.count] = (start, end);
        self.count += 1;
    }

    /// Returns the offset of the first byte in which two frames differ for the policy, or nothing if they are equal.
    pub(crate) fn first_difference(&self, bytes: &[u8], other: &Self, other_bytes: &[u8]) -> Option<usize> {
        let common = self.length.min(other.length);
        let mut from = self.first.min(other.first).min(common);
        let ignored = self.ignored[..self.count].iter();
        let ignored = ignored.map(|&(start, end)| (usize::from(start), usize::from(end)));
        for (start, end) in ignored.chain([(common, common)]) {
            let until = start.min(common);
            if from < until && bytes[from..until] != other_bytes[from..until] {
                let same = bytes[from..until]
                    .iter()
                    .zip(&other_bytes[from..until])
                    .take_while(|(a, b)| a == b)
                    .count();
                return Some(from + same);
            }
            from = from.max(end).min(common);
        }
        if self.length != other.length {
            return Some(common);
        }
        let is_alike = self.ignored == other.ignored && self.first == other.first;
        if is_alike { None } else { Some(0) }
    }

    /// Says whether two frames are equal for the policy.
    pub(crate) fn equal(&self, bytes: &[u8], other: &Self, other_bytes: &[u8]) -> bool {
        self.length == other.length
            && self.first == other.first
            && self.ignored == other.ignored
            && (self.first_difference(bytes, other, other_bytes).is_none() || mutants::on(Mutant::CompareLengths))
    }
}

fn sliced(bytes: &[u8]) -> Option<Frame> {
    let ethernet = bytes.get(FRAME_HEADER_BYTES..)?;
    let packet = SlicedPacket::from_ethernet(ethernet).ok()?;
    let mut shape = Shape::new(bytes);
    shape.ignore_header(bytes, None);
    let mut vlans = Vlans::NONE;
    let mut tpid = u16::from_be_bytes([*ethernet.get(12)?, *ethernet.get(13)?]);
    for extension in &packet.link_exts {
        match extension {
            LinkExtSlice::Vlan(vlan) => {
                vlans.push(tpid, vlan.vlan_identifier().value());
                shape.ignore(offset(bytes, vlan.slice())?, 2);
                tpid = vlan.ether_type().0;
            }
            LinkExtSlice::Macsec(_) => return Some(whole(FlowKey::unaddressed(Class::Ethernet(tpid), vlans), shape)),
        }
    }
    match &packet.net {
        Some(NetSlice::Arp(arp)) => {
            let ends = (v4(arp.sender_protocol_addr()), v4(arp.target_protocol_addr()));
            let key = match ends {
                (Some(sender), Some(target)) => FlowKey::addressed(Class::Arp, vlans, (sender, target), (0, 0)),
                _ => FlowKey::unaddressed(Class::Arp, vlans),
            };
            Some(whole(key, shape))
        }
        Some(NetSlice::Ipv4(ip)) => ipv4(bytes, ip, packet.transport.as_ref(), vlans, shape),
        Some(NetSlice::Ipv6(ip)) => ipv6(bytes, ip, packet.transport.as_ref(), vlans, shape),
        // A length instead of an EtherType (802.3 with LLC) is one class.
        None => Some(whole(
            FlowKey::unaddressed(Class::Ethernet(if tpid < 0x600 { 0 } else { tpid }), vlans),
            shape,
        )),
    }
}

fn ipv4(
    bytes: &[u8],
    ip: &Ipv4Slice<'_>,
    transport: Option<&TransportSlice<'_>>,
    vlans: Vlans,
    mut shape: Shape,
) -> Option<Frame> {
    let header = ip.header();
    let at = offset(bytes, header.slice())?;
    let ends = (IpAddr::V4(header.source_addr()), IpAddr::V4(header.destination_addr()));
    shape.ignore(at + 1, 1);
    let is_fragment = header.is_fragmenting_payload();
    if is_fragment {
        shape.ignore(at + 2, 6);
    } else {
        shape.ignore(at + 4, 4);
    }
    shape.ignore(at + 8, 1);
    shape.ignore(at + 10, 2);
    if is_fragment {
        // What follows the header need not begin with one of the next protocol, so nothing of that is trusted.
        let fragment = Fragment {
            datagram: u32::from(header.identification()),
            protocol: header.protocol().0,
            at: usize::from(header.fragments_offset().value()) * 8,
            more: header.more_fragments(),
            payload: at + header.slice().len(),
            end: at + usize::from(header.total_len()),
            headers: shape,
        };
        return Some(fragmented(fragment, vlans, ends));
    }
    transported(bytes, at, ip.payload(), ends, transport, vlans, shape)
}

fn ipv6(
    bytes: &[u8],
    ip: &Ipv6Slice<'_>,
    transport: Option<&TransportSlice<'_>>,
    vlans: Vlans,
    mut shape: Shape,
) -> Option<Frame> {
    let header = ip.header();
    let at = offset(bytes, header.slice())?;
    // Without a length the packet's end is a guess (RFC 2675 needs frames larger than ours).
    if header.payload_length() == 0 && header.next_header().0 != 59 {
        return None;
    }
    let ends = (IpAddr::V6(header.source_addr()), IpAddr::V6(header.destination_addr()));
    let is_part = ip.payload().fragmented;
    shape.ignore(at, if is_part { 6 } else { 4 });
    shape.ignore(at + 7, 1);
    let mut fragment = None;
    for extension in ip.extensions().clone() {
        let Ipv6ExtensionSlice::Fragment(header) = extension else {
            continue;
        };
        // One fragment is not cut again.
        if fragment.is_some() {
            return None;
        }
        let from = offset(bytes, header.slice())?;
        shape.ignore(from + if is_part { 2 } else { 4 }, if is_part { 6 } else { 4 });
        fragment = Some((from, header));
    }
    if is_part {
        let (from, header) = fragment?;
        let fragment = Fragment {
            datagram: header.identification(),
            protocol: header.next_header().0,
            at: usize::from(header.fragment_offset().value()) * 8,
            more: header.more_fragments(),
            payload: from + header.slice().len(),
            end: at + 40 + usize::from(ip.header().payload_length()),
            headers: shape,
        };
        return Some(fragmented(fragment, vlans, ends));
    }
    transported(bytes, at, ip.payload(), ends, transport, vlans, shape)
}

fn fragmented(mut fragment: Fragment, vlans: Vlans, ends: (IpAddr, IpAddr)) -> Frame {
    fragment.headers.length = fragment.payload;
    Frame {
        key: FlowKey::addressed(Class::Fragment(fragment.protocol), vlans, ends, (0, 0)),
        body: Body::Fragment(fragment),
    }
}

fn transported(
    bytes: &[u8],
    ip: usize,
    payload: &IpPayloadSlice<'_>,
    ends: (IpAddr, IpAddr),
    transport: Option<&TransportSlice<'_>>,
    vlans: Vlans,
    mut shape: Shape,
) -> Option<Frame> {
    let protocol = match transport {
        Some(TransportSlice::Tcp(tcp)) => {
            let key = FlowKey::addressed(Class::Tcp, vlans, ends, (tcp.source_port(), tcp.destination_port()));
            return Some(match segment(bytes, ip, tcp) {
                Some(segment) => Frame {
                    key,
                    body: Body::Tcp(segment),
                },
                None => Frame {
                    key: FlowKey {
                        class: Class::Malformed,
                        ..key
                    },
                    body: Body::Whole(Shape::new(bytes)),
                },
            });
        }
        Some(TransportSlice::Udp(udp)) => {
            let at = offset(bytes, udp.slice())?;
            shape.ignore(at + UDP_CHECKSUM_AT, 2);
            shape.ignore_header(bytes, Some((at, UDP_CHECKSUM_AT)));
            let ports = (udp.source_port(), udp.destination_port());
            return Some(whole(FlowKey::addressed(Class::Udp, vlans, ends, ports), shape));
        }
        Some(TransportSlice::Icmpv4(icmp)) => {
            return Some(whole(
                FlowKey::addressed(Class::Icmp, vlans, ends, echo(icmp.slice(), &[0, 8])),
                shape,
            ));
        }
        Some(TransportSlice::Icmpv6(icmp)) => {
            return Some(whole(
                FlowKey::addressed(Class::Icmpv6, vlans, ends, echo(icmp.slice(), &[128, 129])),
                shape,
            ));
        }
        _ => payload.ip_number,
    };
    let (class, ports) = match (protocol.0, payload.payload) {
        (SCTP, &[a, b, c, d, ..]) => (Class::Sctp, (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]))),
        (protocol, _) => (Class::Ip(protocol), (0, 0)),
    };
    Some(whole(FlowKey::addressed(class, vlans, ends, ports), shape))
}

/// Reads a segment; nothing if its flags make no sense or its options are broken.
fn segment(bytes: &[u8], ip: usize, tcp: &TcpSlice<'_>) -> Option<Segment> {
    let at = offset(bytes, tcp.slice())?;
    let payload = at + tcp.header_slice().len();
    let (syn, fin, rst) = (tcp.syn(), tcp.fin(), tcp.rst());
    if (syn && (fin || rst)) || (fin && rst) || !(syn || fin || rst || tcp.ack()) {
        return None;
    }
    let options = options(&bytes[..payload], at + TCP_HEADER)?;
    let offload = Offload::of(bytes).filter(|offload| offload.fits_tcp(bytes[ip] >> 4, at, TCP_CHECKSUM_AT))?;
    Some(Segment {
        ip,
        tcp: at,
        payload,
        end: at + tcp.slice().len(),
        seq: Seq(tcp.sequence_number()),
        ack: tcp.ack().then(|| Seq(tcp.acknowledgment_number())),
        syn,
        fin,
        rst,
        urgent: tcp.urg().then(|| tcp.urgent_pointer()),
        options: Options {
            signed: options.signed || is_authenticated(&bytes[..at], ip),
            ..options
        },
        partial: offload.needs_checksum(),
    })
}

/// Says whether an authentication header (IPsec) stands between the IP header and what follows it.
fn is_authenticated(headers: &[u8], ip: usize) -> bool {
    if headers[ip] >> 4 == 4 {
        return headers[ip + 9] == AUTHENTICATION;
    }
    let (mut next, mut at) = (headers[ip + 6], ip + IPV6_HEADER);
    while next != AUTHENTICATION
        && let Some(&[following, length]) = headers.get(at..at + 2)
    {
        at += if next == FRAGMENT {
            8
        } else {
            (usize::from(length) + 1) * 8
        };
        next = following;
    }
    next == AUTHENTICATION
}

fn options(headers: &[u8], start: usize) -> Option<Options> {
    let mut found = Options::default();
    let mut at = start;
    while at < headers.len() {
        let Some((kind, length)) = option_at(headers, at) else {
            return (headers[at] == OPTION_END).then_some(found);
        };
        let value = &headers[at + usize::from(length > 1) * 2..at + length];
        match (kind, value) {
            (OPTION_MSS, &[high, low]) => found.offer.mss = Some(u16::from_be_bytes([high, low])),
            (OPTION_WINDOW_SCALE, &[shift]) => found.offer.window_scale = Some(shift),
            (OPTION_SACK_PERMITTED, _) => found.offer.sack = true,
            (OPTION_TIMESTAMP, &[a, b, c, d, e, f, g, h]) => {
                found.offer.timestamps = true;
                found.timestamps = Some(Timestamps {
                    at: at + 2 - (start - TCP_HEADER),
                    value: Seq(u32::from_be_bytes([a, b, c, d])),
                    echo: Seq(u32::from_be_bytes([e, f, g, h])),
                });
            }
            (OPTION_MD5 | OPTION_AO, _) => found.signed = true,
            (OPTION_SACK, blocks) => {
                for block in blocks.chunks_exact(8) {
                    let right = Seq(u32::from_be_bytes([block[4], block[5], block[6], block[7]]));
                    found.sack = Seq::later_known(found.sack, Some(right));
                }
            }
            _ => {}
        }
        at += length;
    }
    Some(found)
}

/// Returns kind and length of the option at `at`; nothing at the end of the list or if the list is broken there.
fn option_at(headers: &[u8], at: usize) -> Option<(u8, usize)> {
    match *headers.get(at)? {
        OPTION_END => None,
        OPTION_NOP => Some((OPTION_NOP, 1)),
        kind => {
            let length = usize::from(*headers.get(at + 1)?);
            (length >= 2 && at + length <= headers.len()).then_some((kind, length))
        }
    }
}

fn whole(key: FlowKey, shape: Shape) -> Frame {
    Frame {
        key,
        body: Body::Whole(shape),
    }
}

/// Returns where `part`, a slice of `whole`, starts.
pub(crate) fn offset(whole: &[u8], part: &[u8]) -> Option<usize> {
    let at = (part.as_ptr() as usize).checked_sub(whole.as_ptr() as usize)?;
    (at + part.len() <= whole.len()).then_some(at)
}

/// Returns an ICMP echo's identifier as a port.
fn echo(message: &[u8], kinds: &[u8]) -> (u16, u16) {
    match *message {
        [kind, _, _, _, high, low, ..] if kinds.contains(&kind) => (0, u16::from_be_bytes([high, low])),
        _ => (0, 0),
    }
}

fn v4(address: &[u8]) -> Option<IpAddr> {
    <[u8; 4]>::try_from(address).ok().map(IpAddr::from)
}

#[cfg(test)]
mod tests;
