//! Replays captures, `captures/*.pcap` and `*.pcapng`, through comparator and translator.
//!
//! The primary's guest is the captured one. The secondary's says the same in its own way: with other initial numbers, other
//! identifications, and its streams and fragments cut elsewhere. All must leave by comparison; with one byte changed, not.
//!
//! The guest of a capture has the station address 02:00:00:00:00:01; `captures/make.sh` makes one.

use std::collections::BTreeMap;
use std::path::Path;

use bytes::Bytes;
use checkpoint::{Duration, Epoch, EpochMode, Instant};
use etherparse::{SlicedPacket, TransportSlice};
use proptest::prelude::*;
use proxy::{Comparator, ComparatorLimits, NetworkPicture, Pending, Verdict, complete, on_wire};

const GUEST: [u8; 6] = [2, 0, 0, 0, 0, 1];
const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;

/// Reads the frames of a capture, in either format, as this kind of machine writes them.
fn frames(capture: &[u8]) -> Vec<Bytes> {
    let word = |at: usize| u32::from_le_bytes(capture[at..at + 4].try_into().expect("four bytes")) as usize;
    let mut frames = Vec::new();
    if word(0) == 0x0a0d_0d0a {
        let mut at = 0;
        while at < capture.len() {
            if word(at) == 6 {
                frames.push(Bytes::copy_from_slice(&capture[at + 28..][..word(at + 20)]));
            }
            at += word(at + 4);
        }
        return frames;
    }
    assert!([0xa1b2_c3d4, 0xa1b2_3c4d].contains(&word(0)), "this is no capture");
    let mut at = 24;
    while at < capture.len() {
        frames.push(Bytes::copy_from_slice(&capture[at + 16..][..word(at + 8)]));
        at += 16 + word(at + 8);
    }
    frames
}

fn captures() -> Vec<(String, Vec<Bytes>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/captures");
    let paths = std::fs::read_dir(folder)
        .expect("a folder")
        .map(|entry| entry.expect("a file").path());
    let captures = paths.filter(|path| path.extension().is_some_and(|last| last == "pcap" || last == "pcapng"));
    captures
        .map(|path| {
            (
                path.display().to_string(),
                frames(&std::fs::read(&path).expect("a file")),
            )
        })
        .collect()
}

/// A segment of the guest; nobody looks at the checksums of the secondary's.
#[derive(Clone)]
struct Segment {
    headers: Vec<u8>,
    /// Where that of TCP starts.
    tcp: usize,
    payload: Vec<u8>,
}

impl Segment {
    fn of(frame: &[u8]) -> Option<Self> {
        let packet = SlicedPacket::from_ethernet(frame).expect("what is captured can be read");
        let Some(TransportSlice::Tcp(tcp)) = &packet.transport else {
            return None;
        };
        let payload = tcp.payload().to_vec();
        let headers = frame[..frame.len() - payload.len()].to_vec();
        Some(Self {
            tcp: headers.len() - tcp.header_slice().len(),
            headers,
            payload,
        })
    }

    fn is_v4(&self) -> bool {
        self.headers[12] == 8
    }

    /// Addresses and ports.
    fn key(&self) -> Vec<u8> {
        self.headers[if self.is_v4() { 26 } else { 22 }..self.tcp + 4].to_vec()
    }

    fn flag(&self, bits: u8) -> bool {
        self.headers[self.tcp + 13] & bits != 0
    }

    fn seq(&self) -> u32 {
        u32::from_be_bytes(self.headers[self.tcp + 4..self.tcp + 8].try_into().expect("four bytes"))
    }

    fn moved(mut self, by: u32) -> Self {
        let seq = self.seq().wrapping_add(by);
        self.headers[self.tcp + 4..self.tcp + 8].copy_from_slice(&seq.to_be_bytes());
        self
    }

    fn end(&self) -> u32 {
        self.seq()
            .wrapping_add(u32::try_from(self.payload.len()).expect("it fits"))
    }

    /// Cuts it in two.
    fn cut(mut self, at: usize) -> (Self, Self) {
        let mut rest = self.clone().moved(u32::try_from(at).expect("it fits"));
        rest.payload.drain(..at);
        self.payload.truncate(at);
        self.headers[self.tcp + 13] &= !FIN;
        (self, rest)
    }

    fn frame(mut self) -> Vec<u8> {
        let length = self.headers.len() + self.payload.len() - 14;
        let (at, length) = if self.is_v4() { (16, length) } else { (18, length - 40) };
        self.headers[at..at + 2].copy_from_slice(&u16::try_from(length).expect("it fits").to_be_bytes());
        self.headers.extend(self.payload);
        self.headers
    }
}

/// A stream of the secondary.
#[derive(Default)]
struct Stream {
    /// How much higher its numbers are.
    shift: u32,
    /// Not sent yet.
    waits: Option<Segment>,
}

/// The secondary's guest, which says what the primary's does.
struct Secondary {
    random: u64,
    picture: NetworkPicture,
    streams: BTreeMap<Vec<u8>, Stream>,
    datagrams: BTreeMap<u16, Vec<u8>>,
    /// Which byte of all its payloads is another.
    flip: Option<usize>,
    said: usize,
    out: Vec<Vec<u8>>,
}

impl Secondary {
    fn new(seed: u64, flip: Option<usize>) -> Self {
        let mut picture = NetworkPicture::new();
        picture.follow();
        Self {
            random: seed,
            picture,
            streams: BTreeMap::new(),
            datagrams: BTreeMap::new(),
            flip,
            said: 0,
            out: Vec::new(),
        }
    }

    fn below(&mut self, end: usize) -> usize {
        self.random = self
            .random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.random >> 33).expect("it fits") % end
    }

    fn hears(&mut self, frame: &[u8]) {
        self.flush();
        self.picture.arriving(complete(frame));
    }

    fn says(&mut self, frame: &[u8]) {
        let Some(mut segment) = Segment::of(frame) else {
            return self.says_datagram(frame);
        };
        let shift = u32::try_from(self.below(1 << 31)).expect("it fits");
        let stream = self.streams.entry(segment.key()).or_default();
        if segment.flag(SYN) {
            stream.shift = shift;
        }
        segment = segment.moved(stream.shift);
        let before = stream.waits.take();
        segment.payload = self.flipped(segment.payload);
        if let Some(mut before) = before {
            if before.end() == segment.seq() {
                // Said together.
                segment = segment.moved(before.seq().wrapping_sub(before.end()));
                before.payload.append(&mut segment.payload);
                segment.payload = before.payload;
            } else {
                self.send(before);
            }
        }
        let key = segment.key();
        if !segment.payload.is_empty() && !segment.flag(SYN | FIN | RST) && self.below(3) == 0 {
            self.streams.entry(key).or_default().waits = Some(segment);
            return;
        }
        while segment.payload.len() > 1 && self.below(3) > 0 {
            let at = 1 + self.below(segment.payload.len() - 1);
            let (first, rest) = segment.cut(at);
            self.send(first);
            segment = rest;
        }
        self.send(segment);
    }

    /// Sends what has been put off.
    fn flush(&mut self) {
        let waiting: Vec<Segment> = self
            .streams
            .values_mut()
            .filter_map(|stream| stream.waits.take())
            .collect();
        waiting.into_iter().for_each(|segment| self.send(segment));
    }

    fn send(&mut self, segment: Segment) {
        let left = self.picture.leaving(complete(&segment.frame()));
        self.out.push(on_wire(left.wire()).into());
    }

    fn says_datagram(&mut self, frame: &[u8]) {
        let mut own = frame.to_vec();
        if own[12..14] != [8, 0] {
            return self.out.push(own);
        }
        let word = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
        let (number, flags) = (word(18), word(20));
        own[18..20].copy_from_slice(&number.wrapping_add(99).to_be_bytes());
        let payload = own.split_off(34);
        if flags & 0x3fff == 0 {
            own.extend(self.flipped(payload));
            return self.out.push(own);
        }
        // The captured ones are in order; these are cut elsewhere.
        self.datagrams.entry(number).or_default().extend(payload);
        if flags & 0x2000 != 0 {
            return;
        }
        let whole = self.datagrams.remove(&number).expect("just added");
        let whole = self.flipped(whole);
        let mut from = 0;
        while from < whole.len() {
            let until = (from + 8 * (1 + self.below(180))).min(whole.len());
            let (length, place) = (
                u16::try_from(20 + until - from).expect("it fits"),
                u16::try_from(from / 8).expect("it fits"),
            );
            own[16..18].copy_from_slice(&length.to_be_bytes());
            let more = u16::from(until < whole.len()) << 13;
            own[20..22].copy_from_slice(&(place | more).to_be_bytes());
            self.out.push([&own[..], &whole[from..until]].concat());
            from = until;
        }
    }

    fn flipped(&mut self, mut payload: Vec<u8>) -> Vec<u8> {
        if let Some(at) = self.flip.and_then(|flip| flip.checked_sub(self.said))
            && let Some(byte) = payload.get_mut(at)
        {
            *byte ^= 0x20;
        }
        self.said += payload.len();
        payload
    }
}

/// What came of a replay.
struct Replay {
    sent: usize,
    left: usize,
    told: usize,
    /// Bytes of the secondary's payloads.
    said: usize,
    comparator: Comparator,
}

fn replay(frames: &[Bytes], seed: u64, flip: Option<usize>) -> Replay {
    let mut comparator = Comparator::new(ComparatorLimits::default(), Epoch(1));
    let mut now = Instant(1_000_000_000);
    comparator.protect(Epoch(1), EpochMode::Lockstep);
    comparator.loaded(now, Epoch(0));
    let mut secondary = Secondary::new(seed, flip);
    let (mut verdicts, mut sent) = (Vec::new(), 0);
    for frame in frames {
        if frame[6..12] == GUEST {
            sent += 1;
            comparator.primary_output(now, complete(frame), &mut verdicts);
            secondary.says(frame);
        } else {
            secondary.hears(frame);
        }
        for own in secondary.out.drain(..) {
            comparator.secondary_output(now, Epoch(1), complete(&own), &mut verdicts);
        }
    }
    secondary.flush();
    for own in secondary.out.drain(..) {
        comparator.secondary_output(now, Epoch(1), complete(&own), &mut verdicts);
    }
    while let Some(deadline) = comparator.deadline() {
        now = now.max(deadline) + Duration::from_millis(1);
        comparator.timeout(now, &mut verdicts);
    }
    let count = |is: fn(&Verdict) -> bool| verdicts.iter().filter(|verdict| is(verdict)).count();
    Replay {
        sent,
        left: count(|verdict| matches!(verdict, Verdict::Release(..))),
        told: count(|verdict| matches!(verdict, Verdict::Diverged(_))),
        said: secondary.said,
        comparator,
    }
}

#[test]
fn captures_are_read_in_both_formats() {
    let block = |kind: u32, body: &[u8]| {
        let length = u32::try_from(12 + body.len()).expect("it fits").to_le_bytes();
        [&kind.to_le_bytes()[..], &length, body, &length].concat()
    };
    let packet = [&[0; 12][..], &3u32.to_le_bytes(), &3u32.to_le_bytes(), b"abc\0"].concat();
    let capture = [block(0x0a0d_0d0a, &[0; 16]), block(1, &[0; 8]), block(6, &packet)].concat();
    assert_eq!(frames(&capture), ["abc"]);
    for (name, frames) in captures() {
        assert!(frames.len() > 100, "{name}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn what_was_captured_is_equal_however_the_secondary_cuts_it(seed: u64) {
        for (name, frames) in captures() {
            let replay = replay(&frames, seed, None);
            prop_assert_eq!(replay.told, 0, "{}", &name);
            prop_assert!(replay.left >= replay.sent, "{}: {} of {} have left", name, replay.left, replay.sent);
            prop_assert_eq!(replay.comparator.held().frames, 0);
            prop_assert_eq!(replay.comparator.pending(), Pending::default());
        }
    }

    #[test]
    fn one_byte_that_is_another_is_seen(seed: u64, flip: prop::sample::Index) {
        for (name, frames) in captures() {
            let said = replay(&frames, seed, None).said;
            let replay = replay(&frames, seed, Some(flip.index(said)));
            prop_assert_eq!(replay.told, 1, "{}", name);
            prop_assert!(replay.left < replay.sent);
        }
    }
}
