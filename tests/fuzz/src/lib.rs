//! What the fuzzers do with their bytes: steps and frames for the comparator, the translator and the address book, and what must hold.
//!
//! Driven by `fuzz_targets/` and, with random bytes, by `proxy/tests/fuzz.rs`. Any bytes mean something, so nothing is rejected.

use bytes::Bytes;
use checkpoint::limits::FRAME_HEADER_BYTES;
use checkpoint::{Duration, Epoch, EpochMode, Instant};
use etherparse::{Ethernet2Header, IpFragOffset, IpNumber, Ipv4Header, PacketBuilder, SlicedPacket, TransportSlice};
use proxy::{Comparator, ComparatorLimits, FlowPatience, NetworkPicture, Pending, Verdict, on_wire};

const GUEST: [u8; 6] = [2, 0, 0, 0, 0, 1];
const CLIENT: [u8; 6] = [2, 0, 0, 0, 0, 2];
/// Steps that are taken; what comes behind them is left.
const STEPS_MAX: usize = 400;

/// Reads bytes; zeroes when there are none.
struct Source<'a>(&'a [u8]);

impl Source<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        *first
    }

    fn below(&mut self, end: u8) -> u8 {
        self.byte() % end
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.byte()).collect()
    }

    /// A frame of the guest, or of a client: nearly right, mostly.
    fn frame(&mut self, inbound: bool) -> Vec<u8> {
        let mut frame = match self.below(11) {
            0 => {
                let count = usize::from(self.below(96));
                self.bytes(count)
            }
            1..=4 => self.tcp(inbound),
            5 => self.udp(inbound),
            6 => self.fragment(inbound),
            7 => self.fragment_v6(inbound),
            8 => self.icmpv6(inbound),
            9 => self.arp(inbound),
            _ => self.icmp(inbound),
        };
        if self.below(8) == 0 && frame.len() > 12 {
            let tags = [[0x81, 0, 0, 7], [0x81, 0, 0x60, 7], [0x88, 0xa8, 0, 9]];
            for _ in 0..=self.below(2) {
                let tag = tags[usize::from(self.below(3))];
                frame.splice(12..12, tag);
            }
        }
        if self.below(8) == 0 && !frame.is_empty() {
            for _ in 0..1 + self.below(3) {
                let at = usize::from(self.byte()) % frame.len();
                frame[at] ^= self.byte();
            }
        }
        if self.below(16) == 0 {
            frame.truncate(usize::from(self.byte()));
        }
        self.headed(frame)
    }

    /// Puts a header before a frame that says what is left to do; mostly nothing.
    fn headed(&mut self, mut frame: Vec<u8>) -> Vec<u8> {
        let mut header = vec![0; FRAME_HEADER_BYTES];
        match self.below(8) {
            0 => header = self.bytes(FRAME_HEADER_BYTES),
            1 | 2 if kind_on_wire(&frame) == Kind::Tcp && frame.len() > 68 => {
                // The checksum is to be filled in, and, perhaps, the segment to be cut.
                let tags = frame[12..]
                    .chunks(4)
                    .take_while(|tag| [[0x81, 0], [0x88, 0xa8]].contains(&[tag[0], tag[1]]));
                let ip = 14 + 4 * tags.count();
                let v6 = frame[ip - 2..ip] == [0x86, 0xdd];
                let start = ip + if v6 { 40 } else { 20 };
                let addresses = if v6 {
                    &frame[start - 32..start]
                } else {
                    &frame[start - 8..start]
                };
                let length = u16::try_from(frame.len() - start).expect("short").to_be_bytes();
                let words = addresses.chunks(2).chain([&[0, 6][..], &length]);
                let sum: u32 = words
                    .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])))
                    .sum();
                let sum = (sum & 0xffff) + (sum >> 16);
                let sum = u16::try_from((sum & 0xffff) + (sum >> 16))
                    .expect("two bytes")
                    .to_be_bytes();
                frame[start + 16..start + 18].copy_from_slice(&sum);
                header[0] = 1;
                header[6] = u8::try_from(start).expect("one byte");
                header[8] = 16;
                if self.below(2) == 0 {
                    header[1] = if v6 { 4 } else { 1 };
                    header[4] = 1 + self.below(9);
                }
            }
            _ => {}
        }
        if self.below(32) == 0 {
            header.truncate(usize::from(self.below(12)));
        }
        [header, frame].concat()
    }

    fn tcp(&mut self, inbound: bool) -> Vec<u8> {
        let (seq, ack, flags) = (self.byte(), self.byte(), self.byte());
        let (ports, link) = ends(inbound, 80, 5_000 + u16::from(self.below(2)));
        let number = |byte: u8| 0xffff_ffc0_u32.wrapping_add(u32::from(byte));
        let tcp = if self.below(4) == 0 {
            let (from, to) = if inbound {
                ([9; 16], [1; 16])
            } else {
                ([1; 16], [9; 16])
            };
            link.ipv6(from, to, 64).tcp(ports.0, ports.1, number(seq), 1_000)
        } else {
            let (from, to) = if inbound {
                ([10, 0, 0, 9], [10, 0, 0, 1])
            } else {
                ([10, 0, 0, 1], [10, 0, 0, 9])
            };
            link.ipv4(from, to, 64).tcp(ports.0, ports.1, number(seq), 1_000)
        };
        let tcp = if flags & 1 != 0 { tcp.fin() } else { tcp };
        let tcp = if flags & 6 == 2 { tcp.syn() } else { tcp };
        let tcp = if flags & 14 == 12 { tcp.rst() } else { tcp };
        let tcp = if flags & 48 == 48 {
            tcp.urg(u16::from(self.below(9)))
        } else {
            tcp
        };
        let tcp = if flags & 192 == 192 { tcp } else { tcp.ack(number(ack)) };
        let mut options = match self.below(6) {
            0 => vec![1, 1, 5, 10, 255, 255, 255, self.byte(), 0, 0, 0, self.byte()],
            1 => vec![1, 1, 8, 10, 0, 0, 0, self.byte(), 0, 0, 0, self.byte()],
            2 => self.bytes(4),
            _ => Vec::new(),
        };
        options.truncate(40);
        let tcp = tcp.options_raw(&options).expect("there is room");
        // Mostly the stream that both guests say.
        let count = self.below(24);
        let mut payload: Vec<u8> = (0..count).map(|at| seq.wrapping_add(at).wrapping_mul(31)).collect();
        if self.below(8) == 0 {
            payload.iter_mut().take(1).for_each(|byte| *byte ^= 1);
        }
        let mut frame = Vec::new();
        tcp.write(&mut frame, &payload).expect("a vector takes it");
        frame
    }

    fn udp(&mut self, inbound: bool) -> Vec<u8> {
        let (ports, link) = ends(inbound, 53, 9);
        let mut frame = Vec::new();
        let udp = link.ipv4([10, 0, 0, 1], [10, 0, 0, 9], 64).udp(ports.0, ports.1);
        udp.write(&mut frame, &[self.below(4)]).expect("a vector takes it");
        frame
    }

    fn icmp(&mut self, inbound: bool) -> Vec<u8> {
        let (_, link) = ends(inbound, 0, 0);
        let mut frame = Vec::new();
        let ip = link.ipv4([10, 0, 0, 9], [10, 0, 0, 1], 64);
        if self.below(2) == 0 {
            let echo = ip.icmpv4_echo_reply(u16::from(self.below(2)), u16::from(self.below(4)));
            echo.write(&mut frame, &[]).expect("a vector takes it");
        } else {
            // An error that quotes a frame of the other direction.
            let quoted = self.tcp(!inbound);
            let kind = self.below(20);
            let raw = ip.icmpv4_raw(kind, 0, [0; 4]);
            let cut = 14 + usize::from(self.below(64));
            let quote = quoted.get(14..cut.min(quoted.len())).unwrap_or_default();
            raw.write(&mut frame, quote).expect("a vector takes it");
        }
        frame
    }

    fn icmpv6(&mut self, inbound: bool) -> Vec<u8> {
        let (_, link) = ends(inbound, 0, 0);
        let ip = link.ipv6([1; 16], [9; 16], 64);
        let mut frame = Vec::new();
        if self.below(2) == 0 {
            let echo = ip.icmpv6_echo_reply(u16::from(self.below(2)), u16::from(self.below(4)));
            echo.write(&mut frame, &[]).expect("a vector takes it");
        } else {
            // Neighbour discovery, mostly.
            let kind = 128 + self.below(16);
            let target = [self.below(2); 16];
            let raw = ip.icmpv6_raw(kind, 0, [0; 4]);
            raw.write(&mut frame, &target).expect("a vector takes it");
        }
        frame
    }

    fn arp(&mut self, inbound: bool) -> Vec<u8> {
        let (from, to) = if inbound { (CLIENT, GUEST) } else { (GUEST, [0xff; 6]) };
        let operation = 1 + self.below(2);
        let sender = [10, 0, 0, self.below(3)];
        let fixed = [0, 1, 8, 0, 6, 4, 0, operation];
        let target = [0, 0, 0, 0, 0, 0, 10, 0, 0, 9];
        [&to[..], &from, &[8, 6], &fixed, &from, &sender, &target].concat()
    }

    fn fragment_v6(&mut self, inbound: bool) -> Vec<u8> {
        let (from, to) = if inbound { (9, 1) } else { (1, 9) };
        let mut payload = vec![self.below(2); 8 * (1 + usize::from(self.below(2)))];
        if self.below(8) == 0 {
            payload.pop();
        }
        let place = u16::from(self.below(3)) << 3 | u16::from(self.below(3) > 0);
        let length = u16::try_from(8 + payload.len()).expect("short");
        let mut frame = Ethernet2Header {
            source: GUEST,
            destination: CLIENT,
            ether_type: etherparse::EtherType::IPV6,
        }
        .to_bytes()
        .to_vec();
        frame.extend([0x60, 0, 0, 0]);
        frame.extend(length.to_be_bytes());
        frame.extend([44, 64]);
        frame.extend([from; 16]);
        frame.extend([to; 16]);
        frame.extend([17, 0]);
        frame.extend(place.to_be_bytes());
        frame.extend([0, 0, 0, self.below(3)]);
        frame.extend(payload);
        frame
    }

    fn fragment(&mut self, inbound: bool) -> Vec<u8> {
        let units = 1 + usize::from(self.below(2));
        let mut payload = vec![self.below(2); 8 * units];
        let (from, to) = if inbound {
            ([10, 0, 0, 9], [10, 0, 0, 1])
        } else {
            ([10, 0, 0, 1], [10, 0, 0, 9])
        };
        let mut ip = Ipv4Header::new(0, 64, IpNumber::UDP, from, to).expect("short");
        ip.identification = u16::from(self.below(3));
        ip.fragment_offset = IpFragOffset::try_new(u16::from(self.below(3))).expect("small");
        ip.more_fragments = self.below(3) > 0;
        ip.dont_fragment = false;
        if self.below(8) == 0 {
            payload.pop();
        }
        ip.set_payload_len(payload.len()).expect("short");
        ip.header_checksum = ip.calc_header_checksum();
        let link = Ethernet2Header {
            source: GUEST,
            destination: CLIENT,
            ether_type: etherparse::EtherType::IPV4,
        };
        let mut frame = link.to_bytes().to_vec();
        frame.extend(&ip.to_bytes()[..]);
        frame.extend(payload);
        frame
    }
}

fn ends(inbound: bool, guest: u16, client: u16) -> ((u16, u16), etherparse::PacketBuilderStep<Ethernet2Header>) {
    if inbound {
        ((client, guest), PacketBuilder::ethernet2(CLIENT, GUEST))
    } else {
        ((guest, client), PacketBuilder::ethernet2(GUEST, CLIENT))
    }
}

/// What a frame is for the rules below: one of TCP may be changed on its way out, one in fragments leaves with others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Tcp,
    Fragment,
    Other,
}

fn kind(frame: &[u8]) -> Kind {
    kind_on_wire(frame.get(FRAME_HEADER_BYTES..).unwrap_or_default())
}

fn kind_on_wire(frame: &[u8]) -> Kind {
    let Ok(packet) = SlicedPacket::from_ethernet(frame) else {
        return Kind::Other;
    };
    if packet.is_ip_payload_fragmented() {
        Kind::Fragment
    } else if matches!(packet.transport, Some(TransportSlice::Tcp(_))) {
        Kind::Tcp
    } else {
        Kind::Other
    }
}

/// A comparator, and what it holds by this model.
struct Watch {
    comparator: Comparator,
    now: Instant,
    /// Frames of the primary that are not of TCP and have not left.
    waiting: Vec<Bytes>,
    /// Frames of the secondary in the epoch being compared, each of which lets one leave.
    heard: usize,
    stopped: Option<Epoch>,
}

impl Watch {
    fn new(patience: bool) -> Self {
        let limits = ComparatorLimits {
            held_frames: 48,
            pending_frames: 48,
            flows: 8,
            flow_patience: patience.then(FlowPatience::default),
            ..ComparatorLimits::default()
        };
        let mut comparator = Comparator::new(limits, Epoch(1));
        comparator.protect(Epoch(1), EpochMode::Lockstep);
        let now = Instant(1_000_000_000);
        comparator.loaded(now, Epoch(0));
        Self {
            comparator,
            now,
            waiting: Vec::new(),
            heard: 0,
            stopped: None,
        }
    }

    fn step(&mut self, source: &mut Source<'_>) {
        let mut verdicts = Vec::new();
        match source.below(24) {
            0 => self.commit(),
            1 | 2 if self.stopped.is_none() => {
                let next = if source.below(4) == 0 {
                    EpochMode::Buffered
                } else {
                    EpochMode::Lockstep
                };
                self.stopped = Some(self.comparator.stop(next));
            }
            3 => {
                self.now += Duration::from_millis(u64::from(source.byte()));
                if self.comparator.deadline().is_some_and(|deadline| deadline <= self.now) {
                    self.comparator.timeout(self.now, &mut verdicts);
                }
                self.judge(&verdicts, false);
            }
            4 if source.below(4) == 0 => {
                self.comparator.abandon();
                self.stopped = None;
            }
            5..=14 => {
                let frame = Bytes::from(source.frame(false));
                // A guest stands while its host has no room.
                if self.comparator.is_full() {
                    return;
                }
                if kind(&frame) != Kind::Tcp {
                    self.waiting.push(frame.clone());
                }
                self.comparator.primary_output(self.now, frame, &mut verdicts);
                self.judge(&verdicts, false);
            }
            _ => {
                let epoch = self.stopped.unwrap_or_else(|| self.comparator.running());
                let frame = Bytes::from(source.frame(false));
                self.heard += 1;
                self.comparator.secondary_output(self.now, epoch, frame, &mut verdicts);
                self.judge(&verdicts, false);
            }
        }
        let (held, pending) = (self.comparator.held(), self.comparator.pending());
        assert!(held.frames <= 2 * 48 + 1, "{} frames are held", held.frames);
        assert!(
            pending.frames <= 2 * 48 + 2,
            "{} frames of the secondary wait",
            pending.frames
        );
    }

    fn commit(&mut self) {
        if let Some(epoch) = self.stopped.take() {
            let mut verdicts = Vec::new();
            self.comparator.commit(self.now, epoch, &mut verdicts);
            self.comparator.loaded(self.now, epoch);
            self.heard = 0;
            self.judge(&verdicts, true);
        }
    }

    /// What leaves was sent, and once; what leaves by comparison, the secondary has sent.
    fn judge(&mut self, verdicts: &[Verdict], commit: bool) {
        for verdict in verdicts {
            let Verdict::Release(frame, _) = verdict else { continue };
            let kind = kind(frame);
            if kind == Kind::Tcp {
                continue;
            }
            // Padding of a fragment is cut off.
            let same = |sent: &Bytes| sent == frame || kind == Kind::Fragment && sent.starts_with(frame);
            let at = self.waiting.iter().position(same);
            self.waiting.remove(at.expect("what leaves was sent"));
            if kind == Kind::Other && !commit {
                self.heard = self
                    .heard
                    .checked_sub(1)
                    .expect("what leaves has been sent by the secondary, too");
            }
        }
    }
}

/// The comparator under frames of both sides, and epochs.
pub fn comparator(data: &[u8]) {
    let mut source = Source(data);
    let mut watch = Watch::new(source.below(2) == 1);
    for _ in 0..STEPS_MAX {
        if source.0.is_empty() {
            break;
        }
        watch.step(&mut source);
    }
    // Nothing is lost: at the second commit all that is held is of a committed epoch.
    watch.commit();
    watch.stopped = Some(watch.comparator.stop(EpochMode::Lockstep));
    watch.commit();
    assert_eq!(watch.comparator.held().frames, 0);
    assert!(watch.waiting.is_empty(), "all has left: {:02x?}", watch.waiting);
    assert_eq!(watch.comparator.pending(), Pending::default());
}

/// The translator and the address book under frames in both directions, roles and snapshots.
pub fn picture(data: &[u8]) {
    let mut source = Source(data);
    let mut picture = NetworkPicture::of(GUEST);
    for _ in 0..STEPS_MAX {
        if source.0.is_empty() {
            break;
        }
        match source.below(16) {
            0 => picture.follow(),
            1 => picture.lead(),
            2 => {
                let snapshot = picture.encode();
                let read = NetworkPicture::decode(&snapshot.encoded).expect("its own snapshot can be read");
                // What the first role leaves out is not there any more.
                let again = read.encode();
                let read = NetworkPicture::decode(&again.encoded).expect("its own snapshot can be read");
                assert_eq!(read.encode(), again, "and is the same again");
                let mut broken = snapshot.encoded.to_vec();
                if !broken.is_empty() {
                    let at = usize::from(source.byte()) % broken.len();
                    broken[at] ^= source.byte();
                }
                if let Ok(read) = NetworkPicture::decode(&broken) {
                    picture = read;
                }
            }
            3 => {
                let count = usize::from(source.byte());
                let _refused = NetworkPicture::decode(&source.bytes(count));
            }
            4 => {
                for frame in picture.announcements() {
                    assert!(SlicedPacket::from_ethernet(&on_wire(&frame)).is_ok());
                }
            }
            5..=9 => {
                let wire = Bytes::from(source.frame(true));
                let delivery = picture.arriving(wire.clone());
                assert_eq!(delivery.wire, wire, "what came is forwarded as it came");
                translated(&wire, &delivery.guest);
            }
            _ => {
                let frame = Bytes::from(source.frame(false));
                let left = picture.leaving(frame.clone());
                translated(&frame, left.wire());
                if let Some(again) = picture.leaving_again(frame.clone()) {
                    translated(&frame, &again);
                }
            }
        }
    }
}

/// Only numbers of TCP change, and a right checksum stays right.
fn translated(before: &Bytes, after: &Bytes) {
    assert_eq!(before.len(), after.len());
    let is_error = SlicedPacket::from_ethernet(&on_wire(before)).is_ok_and(|packet| {
        matches!(
            packet.transport,
            Some(TransportSlice::Icmpv4(_) | TransportSlice::Icmpv6(_))
        )
    });
    if kind(before) != Kind::Tcp && !is_error {
        assert_eq!(before, after, "{:?} is none of TCP", kind(before));
    }
    if let Some(true) = is_right(before) {
        assert_eq!(
            is_right(after),
            Some(true),
            "the checksum is wrong: {before:02x?}, {after:02x?}"
        );
    }
}

/// Says whether the checksum of TCP is right, if it is TCP.
fn is_right(frame: &Bytes) -> Option<bool> {
    let frame = on_wire(frame);
    let packet = SlicedPacket::from_ethernet(&frame).ok()?;
    let Some(TransportSlice::Tcp(tcp)) = &packet.transport else {
        return None;
    };
    let sum = match packet.net.as_ref()? {
        etherparse::NetSlice::Ipv4(ip) => tcp.calc_checksum_ipv4(ip.header().source(), ip.header().destination()),
        etherparse::NetSlice::Ipv6(ip) => tcp.calc_checksum_ipv6(ip.header().source(), ip.header().destination()),
        etherparse::NetSlice::Arp(_) => return None,
    };
    // Both zeroes mean the same.
    Some(sum.ok()? % 0xffff == tcp.checksum() % 0xffff)
}
