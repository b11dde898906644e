//! What each guest has said on each connection and in which epoch, by position in the stream: the measure of rule 1.
//!
//! Positions are counted from each guest's own first number, and on the wire from the number that the client heard
//! first, so that the translation of sequence numbers is judged without any of its own state. Acknowledgements are in the client's
//! numbers, which nobody translates. Watched from outside the protocols.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use checkpoint::{Epoch, Generation, Tag};

use crate::packet::{self, ACK, Assembly, End, FIN, Header, RST, SYN};
use crate::tcp::ahead;

/// Connections that are remembered for each pair of ports.
const CONNECTIONS_MAX: usize = 4;

/// Guest's port, and the other end.
type Ends = (u16, End);

/// Everything that is known.
#[derive(Debug, Default)]
pub struct Streams {
    /// By the client's first number too, 0 for those that the guest opens.
    flows: BTreeMap<(Ends, u32), Flow>,
    /// Datagrams and fragments of them, and answers to segments of no connection.
    whole: BTreeMap<Bytes, Flow>,
    /// With what is not settled.
    touched: BTreeSet<(Ends, u32)>,
    touched_whole: BTreeSet<Bytes>,
    /// Puts together what each guest sends in fragments.
    assemblies: [Assembly; 2],
    /// Datagrams that the primary's guest has sent in fragments, by their number there; the newest first.
    cut: BTreeMap<u16, Vec<Bytes>>,
    /// The client's first number and the guest's, as clients know them; the newest last.
    heard: BTreeMap<Ends, Vec<(u32, u32)>>,
    generation: Generation,
    /// Output of the primary waits for the secondary.
    holding: bool,
}

#[derive(Debug, Default)]
struct Flow {
    iss: Option<u32>,
    settled: Said,
    /// What the running primary's guest has said since, by epoch.
    primary: Vec<(Tag, Said)>,
    /// What the guest that follows has said.
    follower: Vec<(Tag, Said)>,
}

/// What was said: pieces of the stream, the highest acknowledgement, and facts.
#[derive(Clone, Debug, Default)]
struct Said {
    /// The stream from its beginning; of an epoch, what is in `pieces`.
    stream: Vec<u8>,
    pieces: Vec<(u32, Bytes)>,
    ack: Option<u32>,
    syn: bool,
    fin: Option<u32>,
    reset: bool,
    whole: bool,
}

/// A segment, by its position.
struct Segment {
    at: u32,
    bytes: Bytes,
    ack: Option<u32>,
    syn: bool,
    fin: Option<u32>,
    reset: bool,
}

impl Streams {
    /// The primary's guest sent a frame in this epoch, in its own numbers; `held` while output waits for the secondary.
    pub fn primary_sent(&mut self, tag: Tag, held: bool, frame: &Bytes, first: Option<(u32, u32)>) {
        self.reach(tag.generation);
        if tag.generation < self.generation {
            // The VM is another's; this side has not been told yet.
            return;
        }
        if core::mem::replace(&mut self.holding, held) && !held {
            // It goes on alone, with all that it has said.
            self.settle(|_| true);
            self.forget_untouched();
        }
        if let Some((number, ..)) = packet::fragment(frame)
            && let Some(whole) = self.assemblies[0].add(frame)
        {
            let known = self.cut.entry(number).or_default();
            known.truncate(CONNECTIONS_MAX);
            known.insert(0, whole.clone());
            self.primary_sent(tag, held, &whole, first);
        }
        let Some((flow, segment)) = self.flow(frame, first) else {
            return;
        };
        if let (Some(segment), Some((iss, _))) = (&segment, first)
            && flow.iss != Some(iss)
        {
            if segment.syn {
                flow.settled = Said::default();
                flow.primary.clear();
            }
            flow.iss = Some(iss);
        }
        if held {
            said_in(&mut flow.primary, tag).add(segment);
        } else {
            let mut said = Said::default();
            said.add(segment);
            flow.settled.join(&said);
        }
    }

    /// The secondary's guest sent a frame while it followed in this epoch.
    pub fn secondary_sent(&mut self, tag: Tag, frame: &Bytes, first: Option<(u32, u32)>) {
        if let Some(whole) = self.assemblies[1].add(frame) {
            self.secondary_sent(tag, &whole, first);
        }
        if let Some((flow, segment)) = self.flow(frame, first) {
            said_in(&mut flow.follower, tag).add(segment);
        }
    }

    /// The secondary has committed this epoch: its state has said what the primary's guest has.
    pub fn acknowledge(&mut self, tag: Tag) {
        // A primary that was alone for a moment may have sent nothing in it; what it had said before is its state all the same.
        self.reach(tag.generation);
        self.settle(|one| one.generation == tag.generation && one.epoch <= tag.epoch);
        self.each_touched(|flow| flow.follower.retain(|(one, _)| one.epoch > tag.epoch));
        self.forget_untouched();
    }

    /// The secondary goes on in this generation, from this epoch: what the old primary's guest said since is void.
    pub fn taken_over(&mut self, generation: Generation, epoch: Epoch) {
        self.each_touched(|flow| {
            flow.primary.clear();
            for (tag, said) in core::mem::take(&mut flow.follower) {
                if tag.epoch == epoch {
                    flow.settled.join(&said);
                }
            }
        });
        self.forget_untouched();
        self.reach(generation);
    }

    /// The guest starts anew: it has no connection, and what it says next has nothing to do with what it said.
    pub fn rebooted(&mut self) {
        *self = Self {
            generation: self.generation,
            holding: self.holding,
            ..Self::default()
        };
    }

    /// A client heard this: from now on it knows the connection's numbers.
    pub fn heard(&mut self, frame: &[u8]) {
        if let Some(packet) = packet::parse(frame)
            && let Some(header) = packet.tcp.filter(|header| header.has(SYN))
        {
            let irs = first_of_client(&header);
            let known = self.heard.entry((packet.from.1, packet.to)).or_default();
            if !known.iter().any(|(other, _)| *other == irs) {
                if known.len() == CONNECTIONS_MAX {
                    known.remove(0);
                }
                known.push((irs, header.seq));
            }
        }
    }

    /// Tells whether the survivor could have produced a frame that leaves to the clients in this generation.
    pub fn allows(&mut self, generation: Generation, frame: &Bytes) -> bool {
        self.reach(generation);
        if let Some((number, place, _, bytes)) = packet::fragment(frame) {
            let is_settled = self.whole.get(frame).is_some_and(|flow| flow.settled.whole);
            let mut datagrams = self.cut.get(&number).into_iter().flatten();
            return is_settled
                || datagrams.any(|whole| {
                    let part = whole.get(packet::TRANSPORT + place..).unwrap_or_default();
                    part.starts_with(bytes) && self.whole.get(whole).is_some_and(Flow::allows_whole)
                });
        }
        let Some(packet) = packet::parse(frame) else {
            return true;
        };
        let Some(header) = packet.tcp else {
            return self.whole.get(frame).is_some_and(|flow| flow.allows_whole());
        };
        let ends = (packet.from.1, packet.to);
        if header.has(RST)
            && let Some(flow) = self.whole.get(&reset_key(ends))
            && flow.allows_whole()
        {
            return true;
        }
        let numbers = self.heard.get(&ends).map_or(&[][..], Vec::as_slice);
        if header.has(SYN) || numbers.is_empty() {
            let irs = first_of_client(&header);
            let segment = segment(frame, &header, packet.payload, header.seq);
            return self.flows.get(&(ends, irs)).is_some_and(|flow| flow.allows(&segment));
        }
        numbers.iter().rev().any(|(irs, iss)| {
            let segment = segment(frame, &header, packet.payload, *iss);
            self.flows.get(&(ends, *irs)).is_some_and(|flow| flow.allows(&segment))
        })
    }

    /// Describes what is known of a frame's flow, for a failure's report.
    #[must_use]
    pub fn describe(&self, frame: &[u8]) -> String {
        if let Some(fragment) = packet::fragment(frame) {
            let datagrams = self.cut.get(&fragment.0).into_iter().flatten();
            let flows: Vec<_> = datagrams.map(|whole| (whole, self.whole.get(whole))).collect();
            return format!("a fragment: {fragment:?}, of {flows:?}");
        }
        let Some(packet) = packet::parse(frame) else {
            return String::new();
        };
        let ends = (packet.from.1, packet.to);
        let flows: Vec<_> = self.flows.range((ends, 0)..=(ends, u32::MAX)).collect();
        format!(
            "{:?} to {:?}: heard {:?}, {flows:?}",
            packet.tcp,
            packet.to,
            self.heard.get(&ends)
        )
    }

    /// What was said in an older generation by the side that runs on is its state.
    fn reach(&mut self, generation: Generation) {
        if generation > self.generation {
            self.generation = generation;
            self.settle(|tag| tag.generation < generation);
            self.forget_untouched();
        }
    }

    fn flow(&mut self, frame: &Bytes, first: Option<(u32, u32)>) -> Option<(&mut Flow, Option<Segment>)> {
        if packet::fragment(frame).is_some() {
            return Some((self.whole_flow(frame.clone()), None));
        }
        let packet = packet::parse(frame)?;
        let ends = (packet.from.1, packet.to);
        let Some((header, (iss, irs))) = packet.tcp.zip(first) else {
            let key = if packet.tcp.is_some() {
                reset_key(ends)
            } else {
                frame.clone()
            };
            return Some((self.whole_flow(key), None));
        };
        let irs = if ends.0 == packet::SERVICE_PORT { irs } else { 0 };
        let key = (ends, irs);
        let flow = self.flows.entry(key).or_default();
        self.touched.insert(key);
        Some((flow, Some(segment(frame, &header, packet.payload, iss))))
    }

    fn whole_flow(&mut self, key: Bytes) -> &mut Flow {
        self.touched_whole.insert(key.clone());
        self.whole.entry(key).or_default()
    }

    fn settle(&mut self, covered: impl Fn(&Tag) -> bool) {
        self.each_touched(|flow| {
            let Flow { settled, primary, .. } = flow;
            primary.retain(|(tag, said)| {
                let is_covered = covered(tag);
                if is_covered {
                    settled.join(said);
                }
                !is_covered
            });
        });
    }

    fn each_touched(&mut self, mut act: impl FnMut(&mut Flow)) {
        for key in &self.touched {
            act(self.flows.get_mut(key).expect("touched"));
        }
        for key in &self.touched_whole {
            act(self.whole.get_mut(key).expect("touched"));
        }
    }

    fn forget_untouched(&mut self) {
        let open = |flow: &Flow| !flow.primary.is_empty() || !flow.follower.is_empty();
        self.touched.retain(|key| open(&self.flows[key]));
        self.touched_whole.retain(|key| open(&self.whole[key]));
    }
}

impl Flow {
    fn allows_whole(&self) -> bool {
        let both = self
            .primary
            .iter()
            .any(|(tag, _)| self.follower.iter().any(|(other, _)| other == tag));
        self.settled.whole || both
    }

    /// Each byte, the acknowledgement and each fact: settled, or said by both in the same epoch.
    fn allows(&self, segment: &Segment) -> bool {
        let both = |said: &dyn Fn(&Said) -> bool| {
            said(&self.settled)
                || self
                    .primary
                    .iter()
                    .any(|(tag, one)| said(one) && self.follower.iter().any(|(other, also)| other == tag && said(also)))
        };
        let mut rest = &segment.bytes[..];
        let mut at = segment.at;
        while !rest.is_empty() {
            let step = self
                .said_by_both(at, rest)
                .into_iter()
                .chain([self.settled.agrees(at, rest)])
                .max()
                .unwrap_or(0);
            if step == 0 {
                return false;
            }
            rest = &rest[step..];
            at = at.wrapping_add(u32::try_from(step).expect("short"));
        }
        segment
            .ack
            .is_none_or(|ack| both(&|said| said.ack.is_some_and(|highest| ahead(ack, highest) <= 0)))
            && (!segment.syn || both(&|said| said.syn))
            && segment.fin.is_none_or(|fin| both(&|said| said.fin == Some(fin)))
            && (!segment.reset || both(&|said| said.reset))
    }

    fn said_by_both(&self, at: u32, bytes: &[u8]) -> Option<usize> {
        self.primary
            .iter()
            .filter_map(|(tag, one)| {
                let (_, also) = self.follower.iter().find(|(other, _)| other == tag)?;
                Some(one.agrees(at, bytes).min(also.agrees(at, bytes)))
            })
            .max()
    }
}

impl Said {
    fn add(&mut self, segment: Option<Segment>) {
        self.whole = true;
        let Some(segment) = segment else { return };
        if !segment.bytes.is_empty() {
            self.pieces.push((segment.at, segment.bytes));
        }
        self.acknowledge(segment.ack);
        self.syn |= segment.syn;
        self.fin = segment.fin.or(self.fin);
        self.reset |= segment.reset;
    }

    fn acknowledge(&mut self, ack: Option<u32>) {
        if let Some(ack) = ack
            && self.ack.is_none_or(|highest| ahead(ack, highest) > 0)
        {
            self.ack = Some(ack);
        }
    }

    /// Returns how many of the bytes from there on were said so.
    fn agrees(&self, at: u32, bytes: &[u8]) -> usize {
        let in_stream = usize::try_from(at)
            .ok()
            .and_then(|at| self.stream.get(at..))
            .map_or(0, |said| common(said, bytes));
        self.pieces
            .iter()
            .filter_map(|(start, said)| {
                Some(common(
                    said.get(usize::try_from(at.checked_sub(*start)?).ok()?..)?,
                    bytes,
                ))
            })
            .fold(in_stream, usize::max)
    }

    /// Takes over what an execution has said that is now the VM's.
    fn join(&mut self, said: &Self) {
        for (at, bytes) in &said.pieces {
            let at = usize::try_from(*at).expect("a short stream");
            assert!(
                at <= self.stream.len(),
                "a guest has sent from {at} on, and {} bytes before",
                self.stream.len()
            );
            let known = common(&self.stream[at..], bytes);
            assert!(
                known == bytes.len() || at + known == self.stream.len(),
                "rule 3: the guest that runs on repeats other bytes than were settled at {at}"
            );
            self.stream.extend_from_slice(&bytes[known..]);
        }
        self.acknowledge(said.ack);
        self.syn |= said.syn;
        self.fin = said.fin.or(self.fin);
        self.reset |= said.reset;
        self.whole |= said.whole;
    }
}

fn said_in(list: &mut Vec<(Tag, Said)>, tag: Tag) -> &mut Said {
    if list.last().is_none_or(|(last, _)| *last != tag) {
        list.push((tag, Said::default()));
    }
    &mut list.last_mut().expect("just seen").1
}

fn segment(frame: &Bytes, header: &Header, payload: &[u8], iss: u32) -> Segment {
    let at = header.seq.wrapping_sub(iss).wrapping_sub(u32::from(!header.has(SYN)));
    let end = at.wrapping_add(u32::try_from(payload.len()).expect("short"));
    Segment {
        at,
        bytes: frame.slice_ref(payload),
        // A reset's is no promise.
        ack: (header.flags & (ACK | RST) == ACK).then_some(header.ack),
        syn: header.has(SYN),
        fin: header.has(FIN).then_some(end),
        reset: header.has(RST),
    }
}

fn first_of_client(header: &Header) -> u32 {
    if header.has(ACK) { header.ack.wrapping_sub(1) } else { 0 }
}

fn reset_key(ends: Ends) -> Bytes {
    let (port, (address, other)) = ends;
    let ([a, b], [c, d]) = (port.to_le_bytes(), other.to_le_bytes());
    Bytes::copy_from_slice(&[a, b, address, c, d])
}

fn common(one: &[u8], other: &[u8]) -> usize {
    one.iter().zip(other).take_while(|(a, b)| a == b).count()
}
