//! Frames and a comparator in a known state, for the tests of this crate.

use bytes::Bytes;
use checkpoint::limits::FRAME_HEADER_BYTES;
use checkpoint::{Duration, Epoch, EpochMode, Instant};
use std::net::IpAddr;

use crate::announce::AddressBook;
use crate::checksum;
use crate::comparator::{Comparator, ComparatorLimits};
use crate::frame::{self, Body, Segment};
use crate::sequence::Translator;
use crate::verdict::{Divergence, Verdict};

/// Where the IP header of a frame without tags starts.
pub(crate) const IP_AT: usize = FRAME_HEADER_BYTES + 14;
/// Where what follows an IPv4 header without options starts, and what follows an IPv6 header.
pub(crate) const TRANSPORT_AT: usize = IP_AT + 20;
pub(crate) const TRANSPORT_V6_AT: usize = IP_AT + 40;
pub(crate) const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub(crate) const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
pub(crate) const GUEST: [u8; 4] = [10, 0, 0, 1];
pub(crate) const CLIENT: [u8; 4] = [10, 0, 0, 9];

pub(crate) const FIN: u8 = 1;
pub(crate) const SYN: u8 = 2;
pub(crate) const RST: u8 = 4;
pub(crate) const ACK: u8 = 16;
pub(crate) const URG: u8 = 32;

/// A TCP segment to be built; from guest port 80 to client port 5000 unless said otherwise.
#[derive(Clone, Debug)]
pub(crate) struct Tcp {
    pub(crate) ports: (u16, u16),
    pub(crate) inbound: bool,
    pub(crate) v6: bool,
    pub(crate) vlans: Vec<(u16, u16)>,
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    pub(crate) flags: u8,
    pub(crate) urgent: u16,
    pub(crate) window: u16,
    pub(crate) ttl: u8,
    pub(crate) options: Vec<u8>,
    pub(crate) payload: Vec<u8>,
}

impl Tcp {
    pub(crate) fn new(seq: u32, ack: u32, flags: u8, payload: &[u8]) -> Self {
        Self {
            ports: (80, 5000),
            inbound: false,
            v6: false,
            vlans: Vec::new(),
            seq,
            ack,
            flags,
            urgent: 0,
            window: 1000,
            ttl: 64,
            options: Vec::new(),
            payload: payload.to_vec(),
        }
    }

    pub(crate) fn data(seq: u32, ack: u32, payload: &[u8]) -> Self {
        Self::new(seq, ack, ACK, payload)
    }

    pub(crate) fn ack(seq: u32, ack: u32) -> Self {
        Self::new(seq, ack, ACK, &[])
    }

    pub(crate) fn sack(mut self, blocks: &[(u32, u32)]) -> Self {
        self.options = vec![1, 1, 5, u8::try_from(2 + blocks.len() * 8).unwrap()];
        for (left, right) in blocks {
            self.options.extend(left.to_be_bytes());
            self.options.extend(right.to_be_bytes());
        }
        self
    }

    /// Puts timestamps before the other options.
    pub(crate) fn times(mut self, value: u32, echo: u32) -> Self {
        let times = [&[1, 1, 8, 10][..], &value.to_be_bytes(), &echo.to_be_bytes()].concat();
        self.options.splice(0..0, times);
        self
    }

    pub(crate) fn frame(&self) -> Bytes {
        let mut segment = Vec::new();
        let (source, destination) = if self.inbound {
            (self.ports.1, self.ports.0)
        } else {
            self.ports
        };
        segment.extend(source.to_be_bytes());
        segment.extend(destination.to_be_bytes());
        segment.extend(self.seq.to_be_bytes());
        segment.extend(self.ack.to_be_bytes());
        let mut options = self.options.clone();
        options.resize(options.len().next_multiple_of(4), 0);
        segment.push(u8::try_from((20 + options.len()) / 4).unwrap() << 4);
        segment.push(self.flags);
        segment.extend(self.window.to_be_bytes());
        segment.extend([0, 0]);
        segment.extend(self.urgent.to_be_bytes());
        segment.extend(options);
        segment.extend(&self.payload);
        let (from, to) = ends(self.v6, self.inbound);
        let sum = checksum::transport(from, to, 6, &segment);
        segment[16..18].copy_from_slice(&sum.to_be_bytes());
        ip(from, to, 6, self.ttl, &self.vlans, &segment)
    }
}

/// Returns source and destination.
pub(crate) fn ends(v6: bool, inbound: bool) -> (IpAddr, IpAddr) {
    let (guest, client) = if v6 {
        ("fd00::1".parse().unwrap(), "fd00::9".parse().unwrap())
    } else {
        (IpAddr::from(GUEST), IpAddr::from(CLIENT))
    };
    if inbound { (client, guest) } else { (guest, client) }
}

pub(crate) fn ethernet(vlans: &[(u16, u16)], ethertype: u16, payload: &[u8]) -> Bytes {
    let mut frame = vec![0; FRAME_HEADER_BYTES];
    frame.extend(CLIENT_MAC);
    frame.extend(GUEST_MAC);
    for (protocol, vlan) in vlans {
        frame.extend(protocol.to_be_bytes());
        frame.extend(vlan.to_be_bytes());
    }
    frame.extend(ethertype.to_be_bytes());
    frame.extend(payload);
    frame.into()
}

pub(crate) fn ip(from: IpAddr, to: IpAddr, protocol: u8, ttl: u8, vlans: &[(u16, u16)], payload: &[u8]) -> Bytes {
    let mut packet = Vec::new();
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            packet.extend([0x45, 0]);
            packet.extend(u16::try_from(20 + payload.len()).unwrap().to_be_bytes());
            packet.extend([0, 7, 0x40, 0, ttl, protocol, 0, 0]);
            packet.extend(from.octets());
            packet.extend(to.octets());
            let sum = checksum::header(&packet);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
            packet.extend(payload);
            ethernet(vlans, 0x0800, &packet)
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            packet.extend([0x60, 0, 0, 0]);
            packet.extend(u16::try_from(payload.len()).unwrap().to_be_bytes());
            packet.extend([protocol, ttl]);
            packet.extend(from.octets());
            packet.extend(to.octets());
            packet.extend(payload);
            ethernet(vlans, 0x86dd, &packet)
        }
        _ => panic!("both ends are of one family"),
    }
}

pub(crate) fn udp(port: u16, payload: &[u8]) -> Bytes {
    let mut datagram = Vec::new();
    datagram.extend(53u16.to_be_bytes());
    datagram.extend(port.to_be_bytes());
    datagram.extend(u16::try_from(8 + payload.len()).unwrap().to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend(payload);
    let (from, to) = ends(false, false);
    ip(from, to, 17, 64, &[], &datagram)
}

pub(crate) fn arp(operation: u16, sender: [u8; 4]) -> Bytes {
    let mut packet = vec![0, 1, 8, 0, 6, 4];
    packet.extend(operation.to_be_bytes());
    packet.extend(GUEST_MAC);
    packet.extend(sender);
    packet.extend(CLIENT_MAC);
    packet.extend(CLIENT);
    ethernet(&[], 0x0806, &packet)
}

/// Reads a segment back and asserts that its checksum is right.
pub(crate) fn segment(frame: &[u8]) -> (Segment, Vec<u8>) {
    let Body::Tcp(segment) = frame::parse(frame).body else {
        panic!("a TCP segment is expected")
    };
    let packet = etherparse::SlicedPacket::from_ethernet(&frame[FRAME_HEADER_BYTES..]).unwrap();
    let Some(etherparse::TransportSlice::Tcp(tcp)) = &packet.transport else {
        panic!("a TCP segment is expected")
    };
    let sum = match &packet.net {
        Some(etherparse::NetSlice::Ipv4(ip)) => tcp.calc_checksum_ipv4(ip.header().source(), ip.header().destination()),
        Some(etherparse::NetSlice::Ipv6(ip)) => tcp.calc_checksum_ipv6(ip.header().source(), ip.header().destination()),
        _ => panic!("an IP packet is expected"),
    };
    assert_eq!(sum.unwrap() % 0xffff, tcp.checksum() % 0xffff, "the checksum is right");
    (segment, frame[segment.payload..segment.end].to_vec())
}

/// Returns the sender's time in a segment, and the one that it returns.
pub(crate) fn times(frame: &[u8]) -> (u32, u32) {
    let times = segment(frame).0.options.timestamps.unwrap();
    (times.value.0, times.echo.0)
}

/// A comparator and its clock.
#[derive(Debug)]
pub(crate) struct Bench {
    pub(crate) comparator: Comparator,
    pub(crate) now: Instant,
}

impl Bench {
    /// Compares from epoch 1 on, the secondary running.
    pub(crate) fn new() -> Self {
        Self::with(ComparatorLimits::default())
    }

    pub(crate) fn with(limits: ComparatorLimits) -> Self {
        let mut comparator = Comparator::new(limits, Epoch(1));
        comparator.protect(Epoch(1), EpochMode::Lockstep);
        let now = Instant(1_000_000_000);
        comparator.loaded(now, Epoch(0));
        Self { comparator, now }
    }

    pub(crate) fn primary(&mut self, frame: impl Into<Bytes>) -> Vec<Verdict> {
        let mut verdicts = Vec::new();
        self.comparator.primary_output(self.now, frame.into(), &mut verdicts);
        verdicts
    }

    pub(crate) fn secondary(&mut self, frame: impl Into<Bytes>) -> Vec<Verdict> {
        let epoch = self.comparator.comparing();
        self.secondary_in(epoch.0, frame)
    }

    pub(crate) fn secondary_in(&mut self, epoch: u64, frame: impl Into<Bytes>) -> Vec<Verdict> {
        let mut verdicts = Vec::new();
        self.comparator
            .secondary_output(self.now, Epoch(epoch), frame.into(), &mut verdicts);
        verdicts
    }

    /// Stops, commits and loads; returns what that releases.
    pub(crate) fn checkpoint(&mut self) -> Vec<Verdict> {
        self.checkpoint_to(EpochMode::Lockstep)
    }

    /// The same; the next epoch is run in this mode.
    pub(crate) fn checkpoint_to(&mut self, next: EpochMode) -> Vec<Verdict> {
        let epoch = self.comparator.stop(next);
        self.commit(epoch)
    }

    pub(crate) fn commit(&mut self, epoch: Epoch) -> Vec<Verdict> {
        let mut verdicts = Vec::new();
        self.comparator.commit(self.now, epoch, &mut verdicts);
        self.comparator.loaded(self.now, epoch);
        verdicts
    }

    /// Lets time pass, and calls at the deadline if it is within.
    pub(crate) fn wait(&mut self, span: Duration) -> Vec<Verdict> {
        let mut verdicts = Vec::new();
        let end = self.now + span;
        while let Some(deadline) = self.comparator.deadline()
            && deadline <= end
        {
            let before = (self.now, verdicts.len());
            self.now = self.now.max(deadline);
            self.comparator.timeout(self.now, &mut verdicts);
            assert!(
                before != (self.now, verdicts.len()) || self.comparator.deadline() != Some(deadline),
                "a deadline that has passed must move on"
            );
        }
        self.now = end;
        verdicts
    }
}

pub(crate) fn released(verdicts: &[Verdict]) -> Vec<Bytes> {
    verdicts
        .iter()
        .filter_map(|verdict| match verdict {
            Verdict::Release(frame, _) => Some(frame.clone()),
            _ => None,
        })
        .collect()
}

pub(crate) fn divergence(verdicts: &[Verdict]) -> Option<&Divergence> {
    verdicts.iter().find_map(|verdict| match verdict {
        Verdict::Diverged(divergence) => Some(divergence),
        _ => None,
    })
}

/// Passes a frame of the guest through a translator; what was read of it before must be what can be read of it then.
pub(crate) fn outbound(translator: &mut Translator, frame: &mut [u8]) {
    let mut parsed = frame::parse(frame);
    translator.outbound(&parsed).apply(&mut parsed, frame);
    assert_eq!(format!("{parsed:?}"), format!("{:?}", frame::parse(frame)));
}

/// Passes a frame for the guest through a translator, which leaves alone what does not concern it.
pub(crate) fn inbound(translator: &mut Translator, frame: &mut [u8]) {
    let parsed = frame::parse(frame);
    let (before, concerns) = (frame.to_vec(), translator.concerns(&parsed));
    translator.inbound(&parsed, frame);
    assert!(concerns || frame == before);
}

/// Prepares a frame that was translated before.
pub(crate) fn again(translator: &Translator, frame: &mut [u8]) -> bool {
    translator.again(&frame::parse(frame), frame)
}

/// Shows a frame of the guest to its address book.
pub(crate) fn learn(book: &mut AddressBook, frame: &[u8]) {
    book.learn(&frame::parse(frame), frame);
}

/// Leaves the checksum of a segment or a UDP datagram to be filled in, and a segment to be cut into such pieces.
pub(crate) fn left_to_do(frame: &[u8], size: Option<u16>) -> Bytes {
    let key = frame::parse(frame).key;
    let mut left = frame.to_vec();
    let (at, field, protocol) = match frame::parse(frame).body {
        Body::Tcp(segment) => (segment.tcp, 16, 6),
        _ => (TRANSPORT_AT, 6, 17),
    };
    let sum = checksum::transport(key.source.address, key.destination.address, protocol, &[]);
    left[at + field..at + field + 2].copy_from_slice(&(!sum).to_be_bytes());
    checksum::shortened_pseudo(0, &mut left[at..], field);
    let place = |at: usize| u16::try_from(at).unwrap().to_le_bytes();
    left[0] = 1;
    left[6..8].copy_from_slice(&place(at - FRAME_HEADER_BYTES));
    left[8..10].copy_from_slice(&place(field));
    if let Some(size) = size {
        left[1] = if at == TRANSPORT_V6_AT { 4 } else { 1 };
        left[4..6].copy_from_slice(&size.to_le_bytes());
    }
    left.into()
}
