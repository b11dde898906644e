//! Random runs of both sides against a plain model of what may leave.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;
use checkpoint::{Duration, Epoch, EpochMode};
use proptest::prelude::*;

use crate::comparator::ComparatorLimits;
use crate::frame::{self, Body};
use crate::seq::Seq;
use crate::temper::FlowPatience;
use crate::testkit::*;
use crate::verdict::{Reason, Verdict};

const FLOWS: usize = 2;

/// The byte that an undisturbed guest has at this position of this flow's stream.
fn content(flow: usize, position: i64) -> u8 {
    u8::try_from((position * 7 + position / 5 + i64::try_from(flow).unwrap() * 13).rem_euclid(251)).unwrap()
}

fn seq(base: u32, position: i64) -> u32 {
    base.wrapping_add_signed(i32::try_from(position).unwrap())
}

#[derive(Clone, Debug)]
enum Event {
    /// A segment of a flow: how far back from the newest byte it starts, its length, FIN, how much more it acknowledges.
    Segment {
        primary: bool,
        flow: usize,
        back: i64,
        length: usize,
        fin: bool,
        more_ack: u32,
        sack: bool,
    },
    Datagram {
        primary: bool,
        byte: u8,
    },
    /// The secondary's guest has another byte here, until the next load.
    Flip {
        flow: usize,
        ahead: i64,
    },
    /// The next epoch is run in this mode.
    Stop(EpochMode),
    Commit,
    Abandon,
    Stale,
    Wait(u64),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        12 => (any::<bool>(), 0..FLOWS, -4i64..24, 0usize..16, 0u8..40, 0u32..6, any::<bool>()).prop_map(
            |(primary, flow, back, length, fin, more_ack, sack)| Event::Segment {
                primary,
                flow,
                // Mostly new data.
                back: if back > 8 { 0 } else { back },
                length,
                fin: fin == 0,
                more_ack,
                sack,
            }
        ),
        4 => (any::<bool>(), 0u8..4).prop_map(|(primary, byte)| Event::Datagram { primary, byte }),
        1 => (0..FLOWS, 0i64..20).prop_map(|(flow, ahead)| Event::Flip { flow, ahead }),
        2 => prop_oneof![2 => Just(EpochMode::Lockstep), 1 => Just(EpochMode::Buffered)].prop_map(Event::Stop),
        2 => Just(Event::Commit),
        1 => Just(Event::Abandon),
        1 => Just(Event::Stale),
        1 => (0u64..150).prop_map(Event::Wait),
    ]
}

/// One side of one stream.
#[derive(Clone, Copy, Debug, Default)]
struct End {
    newest: i64,
    ack: u32,
    fin: Option<i64>,
}

/// What a stream of the model knows.
#[derive(Debug, Default)]
struct Model {
    primary: End,
    at_stop: End,
    secondary: End,
    committed: End,
    /// Bytes and FINs that the secondary has sent in this epoch.
    sent: BTreeMap<i64, u8>,
    sent_fin: BTreeSet<i64>,
    sent_ack: u32,
    sent_sack: u32,
    /// Highest SACK edge of the primary now, at the stop, and committed.
    sacks: [u32; 3],
    flips: BTreeSet<i64>,
    /// Bytes and FINs that have left.
    left: BTreeSet<i64>,
    left_fin: BTreeSet<i64>,
    held: VecDeque<Held>,
}

/// What waits with bytes or a FIN.
#[derive(Debug)]
struct Held {
    seq: Seq,
    bytes: Vec<u8>,
    fin: bool,
    is_new: bool,
    /// Where what has not left may begin, in bytes: its first bytes may have left by themselves, or the same of another frame.
    starts: Vec<usize>,
}

struct World {
    bench: Bench,
    base: u32,
    acks: u32,
    flows: Vec<Model>,
    datagrams: VecDeque<Bytes>,
    /// Datagrams of the secondary in this epoch that have not let one of the primary leave.
    equal: Vec<u8>,
    /// How many datagrams at the front are of an epoch that is not committed.
    stopped: Option<Epoch>,
    /// Of the running epoch, and of the one stopped before it.
    modes: [EpochMode; 2],
    committed_datagrams: usize,
    divergences: BTreeSet<Epoch>,
    last_committed: Epoch,
}

impl World {
    fn new(base: u32, acks: u32, buffers_flows: bool) -> Self {
        let limits = ComparatorLimits {
            flow_patience: buffers_flows.then_some(FlowPatience {
                strikes: 1,
                ..FlowPatience::default()
            }),
            ..ComparatorLimits::default()
        };
        Self {
            bench: Bench::with(limits),
            base,
            acks,
            flows: (0..FLOWS).map(|_| Model::default()).collect(),
            datagrams: VecDeque::new(),
            equal: Vec::new(),
            stopped: None,
            modes: [EpochMode::Lockstep; 2],
            committed_datagrams: 0,
            divergences: BTreeSet::new(),
            last_committed: Epoch(0),
        }
    }

    /// Tells whether the secondary's guest runs now.
    fn follows(&self) -> bool {
        self.modes[usize::from(self.stopped.is_some())] == EpochMode::Lockstep
    }

    fn apply(&mut self, event: &Event) {
        match *event {
            Event::Segment { primary: false, .. } | Event::Datagram { primary: false, .. } | Event::Stale
                if !self.follows() => {}
            Event::Segment { .. } => self.segment(event),
            Event::Datagram { primary: true, byte } => {
                self.datagrams.push_back(udp(9, &[byte]));
                let verdicts = self.bench.primary(udp(9, &[byte]));
                self.judge(&verdicts);
            }
            Event::Datagram { primary: false, byte } => {
                self.equal.push(byte);
                let verdicts = self.bench.secondary(udp(9, &[byte]));
                self.judge(&verdicts);
            }
            Event::Flip { flow, ahead } => {
                let at = self.flows[flow].secondary.newest + ahead;
                self.flows[flow].flips.insert(at);
            }
            Event::Stop(next) if self.stopped.is_none() => {
                self.stopped = Some(self.bench.comparator.stop(next));
                self.modes = [next, self.modes[0]];
                self.committed_datagrams = self.datagrams.len();
                for flow in &mut self.flows {
                    flow.at_stop = flow.primary;
                    flow.sacks[1] = flow.sacks[0];
                }
            }
            Event::Commit => self.commit(),
            Event::Abandon if self.stopped.is_some() => {
                self.bench.comparator.abandon();
                self.stopped = None;
                if self.modes[1] == EpochMode::Buffered {
                    self.modes[0] = EpochMode::Buffered;
                }
            }
            Event::Stale => {
                let epoch = Epoch(self.bench.comparator.comparing().0 - 1);
                // After an abandoned epoch the number before is the same execution.
                if epoch > self.last_committed {
                    self.equal.push(0);
                }
                let verdicts = self.bench.secondary_in(epoch.0, udp(9, &[0]));
                assert!(
                    epoch > self.last_committed || verdicts.is_empty(),
                    "stale output changes nothing"
                );
                self.judge(&verdicts);
            }
            Event::Wait(millis) => {
                let verdicts = self.bench.wait(Duration::from_millis(millis));
                self.judge(&verdicts);
            }
            Event::Stop(_) | Event::Abandon => {}
        }
    }

    fn segment(&mut self, event: &Event) {
        let Event::Segment {
            primary,
            flow,
            back,
            length,
            fin,
            more_ack,
            sack,
        } = *event
        else {
            return;
        };
        let base = self.base;
        let model = &mut self.flows[flow];
        let end = if primary {
            &mut model.primary
        } else {
            &mut model.secondary
        };
        let start = (end.newest - back).max(0);
        let mut stop = start + i64::try_from(length).unwrap();
        if let Some(fin) = end.fin {
            stop = stop.min(fin);
        }
        let stop = stop.max(start.min(end.fin.unwrap_or(start)));
        let start = start.min(stop);
        let newest = end.newest;
        // A bare acknowledgement may stand anywhere, and says no byte.
        if stop > start || fin {
            end.newest = end.newest.max(stop);
        }
        if fin && end.fin.is_none() {
            end.fin = Some(end.newest);
        }
        let fin = end.fin == Some(stop);
        let is_new = stop > newest || fin;
        end.ack += more_ack;
        let ack = end.ack;
        let flips = &model.flips;
        let payload: Vec<u8> = (start..stop)
            .map(|at| content(flow, at) ^ (u8::from(!primary && flips.contains(&at)) * 0x80))
            .collect();
        let ports = (80, 5000 + u16::try_from(flow).unwrap());
        let flags = ACK | if fin { FIN } else { 0 };
        let mut tcp = Tcp {
            ports,
            ..Tcp::new(seq(base, start), self.acks.wrapping_add(ack), flags, &payload)
        };
        if sack {
            tcp = tcp.sack(&[(self.acks.wrapping_add(ack + 1), self.acks.wrapping_add(ack + 3))]);
        }
        let verdicts = if primary {
            if sack {
                model.sacks[0] = model.sacks[0].max(ack + 3);
            }
            if !tcp.payload.is_empty() || fin {
                model.held.push_back(Held {
                    seq: Seq(tcp.seq),
                    bytes: tcp.payload.clone(),
                    fin,
                    is_new,
                    starts: vec![0],
                });
            }
            self.bench.primary(tcp.frame())
        } else {
            model.sent.extend((start..stop).zip(payload));
            model.sent_fin.extend(fin.then_some(stop));
            model.sent_ack = model.sent_ack.max(ack);
            if sack {
                model.sent_sack = model.sent_sack.max(ack + 3);
            }
            self.bench.secondary(tcp.frame())
        };
        self.judge(&verdicts);
    }

    fn commit(&mut self) {
        let Some(epoch) = self.stopped.take() else { return };
        self.last_committed = epoch;
        for flow in &mut self.flows {
            flow.committed = flow.at_stop;
            flow.sacks[2] = flow.sacks[1];
            flow.secondary = flow.at_stop;
            flow.sent.clear();
            flow.sent_fin.clear();
            flow.flips.clear();
            (flow.sent_ack, flow.sent_sack) = (0, 0);
        }
        self.equal.clear();
        let before = self.datagrams.len();
        let committed = self.committed_datagrams;
        let mut verdicts = Vec::new();
        self.bench.comparator.commit(self.bench.now, epoch, &mut verdicts);
        self.bench.comparator.loaded(self.bench.now, epoch);
        self.judge(&verdicts);
        assert_eq!(
            self.datagrams.len(),
            before - committed,
            "a commit releases exactly its epoch"
        );
        self.committed_datagrams = 0;
    }

    fn judge(&mut self, verdicts: &[Verdict]) {
        for verdict in verdicts {
            match verdict {
                Verdict::Release(released, _) => match frame::parse(released).body {
                    Body::Tcp(_) => self.judge_segment(released),
                    Body::Fragment(_) | Body::Whole(_) => self.judge_datagram(released),
                },
                Verdict::Diverged(divergence) => {
                    assert!(
                        self.divergences.insert(divergence.epoch),
                        "at most one divergence for an epoch"
                    );
                    assert_ne!(Some(divergence.epoch), self.stopped, "none while it is checkpointed");
                }
                Verdict::Violation(what) => panic!("{what}"),
            }
        }
    }

    fn judge_datagram(&mut self, released: &Bytes) {
        let at = self.datagrams.iter().position(|held| held == released);
        let at = at.expect("unchanged, once");
        self.datagrams.remove(at);
        if at < self.committed_datagrams {
            self.committed_datagrams -= 1;
            if self.stopped.is_none() {
                return;
            }
        }
        let byte = released[released.len() - 1];
        let equal = self.equal.iter().position(|other| *other == byte);
        self.equal
            .remove(equal.expect("a datagram leaves only for an equal one"));
    }

    fn judge_segment(&mut self, released: &Bytes) {
        let (got, payload) = segment(released);
        let key = frame::parse(released).key;
        let number = usize::from(key.destination.port - 5000);
        let (base, acks) = (self.base, self.acks);
        let model = &mut self.flows[number];
        let start = i64::from(got.seq.after(Seq(base)));
        if !payload.is_empty() || got.fin {
            let rests = |held: &Held, fits: &dyn Fn(&[u8]) -> bool| {
                let at = usize::try_from(got.seq.after(held.seq)).unwrap_or(usize::MAX);
                held.starts.contains(&at) && fits(&held.bytes[at..])
            };
            let same = |held: &Held| held.fin == got.fin && rests(held, &|rest| rest == payload);
            let first_new = model.held.iter().position(|held| held.is_new);
            let may = |at: &usize| same(&model.held[*at]) && (!model.held[*at].is_new || first_new == Some(*at));
            let at = (0..model.held.len()).find(may);
            // Or its first bytes leave, and the rest after them; and those again of what is said again.
            let begins = |at: &usize| {
                let held = &model.held[*at];
                let begins = !got.fin && rests(held, &|rest| rest.starts_with(&payload));
                begins && (!held.is_new || first_new == Some(*at))
            };
            let begun: Vec<usize> = (0..model.held.len()).filter(begins).collect();
            for &at in &begun {
                let held = &mut model.held[at];
                if held.is_new {
                    held.starts
                        .push(usize::try_from(got.end_seq().after(held.seq)).unwrap());
                }
            }
            match at {
                Some(at) => drop(model.held.remove(at)),
                None => assert!(
                    !begun.is_empty(),
                    "what leaves was held, and what is new leaves in order"
                ),
            }
        }
        for (at, byte) in (start..).zip(&payload) {
            let fine = at < model.committed.newest || model.sent.get(&at) == Some(byte) || model.left.contains(&at);
            assert!(fine, "byte {at} of flow {number} leaves neither equal nor committed");
            model.left.insert(at);
        }
        if got.fin {
            let at = start + i64::try_from(payload.len()).unwrap();
            let fine = model.committed.fin == Some(at) || model.sent_fin.contains(&at) || model.left_fin.contains(&at);
            assert!(fine, "the FIN of flow {number} leaves neither equal nor committed");
            model.left_fin.insert(at);
        }
        let ack = got.ack.unwrap().0.wrapping_sub(acks);
        let permitted = model.sent_ack.max(model.committed.ack);
        assert!(ack <= permitted, "ACK {ack} leaves above {permitted}");
        if let Some(edge) = got.options.sack {
            let edge = edge.0.wrapping_sub(acks);
            let permitted = permitted.max(model.sent_sack).max(model.sacks[2]);
            assert!(edge <= permitted, "SACK {edge} leaves above {permitted}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn nothing_leaves_that_was_neither_equal_nor_committed(
        base in prop_oneof![Just(u32::MAX - 40), any::<u32>()],
        acks in prop_oneof![Just(u32::MAX - 10), any::<u32>()],
        buffers_flows: bool,
        events in proptest::collection::vec(event(), 1..160),
    ) {
        let mut world = World::new(base, acks, buffers_flows);
        for event in &events {
            world.apply(event);
        }
        // Nothing is lost: two more checkpoints let everything leave.
        for event in [Event::Commit, Event::Stop(EpochMode::Lockstep), Event::Commit] {
            world.apply(&event);
        }
        prop_assert!(world.flows.iter().all(|flow| flow.held.is_empty()));
        prop_assert!(world.datagrams.is_empty());
        prop_assert_eq!(world.bench.comparator.held().frames, 0);
        prop_assert_eq!(world.bench.comparator.pending(), crate::Pending::default());
    }
}

/// Cuts a stream into segments: in order, with retransmissions of what came before.
fn cuts(length: usize) -> impl Strategy<Value = Vec<(usize, usize)>> {
    proptest::collection::vec((1usize..40, 0usize..20, any::<bool>()), 1..40).prop_map(move |pieces| {
        let mut segments = Vec::new();
        let mut at = 0;
        for (size, back, again) in pieces.into_iter().cycle().take(4 * length) {
            if at == length {
                break;
            }
            let end = (at + size).min(length);
            segments.push((if again { at.saturating_sub(back) } else { at }, end));
            at = end;
        }
        segments.push((at, length));
        segments
    })
}

proptest! {
    #[test]
    fn case_p05_p06_p07_p09_equal_streams_are_equal_however_they_are_cut(
        base in prop_oneof![(0u32..400).prop_map(|back| u32::MAX - back), any::<u32>()],
        primary in cuts(300),
        secondary in cuts(300),
        order in proptest::collection::vec(any::<bool>(), 1..200),
        flip in proptest::option::of(0usize..300),
    ) {
        let stream: Vec<u8> = (0..300).map(|at| content(0, at)).collect();
        let mut other = stream.clone();
        if let Some(at) = flip {
            other[at] ^= 1;
        }
        let at = |position: usize| base.wrapping_add(u32::try_from(position).unwrap());
        let mut bench = Bench::new();
        bench.primary(Tcp::ack(at(0), 5).frame());
        bench.checkpoint();
        let (mut mine, mut theirs) = (primary.iter().peekable(), secondary.iter().peekable());
        let mut verdicts = Vec::new();
        let mut order = order.into_iter().cycle();
        while mine.peek().is_some() || theirs.peek().is_some() {
            let turn = order.next().unwrap();
            if (turn || theirs.peek().is_none()) && let Some(&(start, end)) = mine.next() {
                verdicts.extend(bench.primary(Tcp::data(at(start), 5, &stream[start..end]).frame()));
            } else if let Some(&(start, end)) = theirs.next() {
                verdicts.extend(bench.secondary(Tcp::data(at(start), 5, &other[start..end]).frame()));
            }
        }
        let left = released(&verdicts);
        match flip {
            None => {
                prop_assert_eq!(divergence(&verdicts), None);
                prop_assert_eq!(bench.comparator.pending(), crate::Pending::default());
                let want: Vec<Bytes> =
                    primary.iter().map(|&(start, end)| Tcp::data(at(start), 5, &stream[start..end]).frame()).collect();
                // The last one is an acknowledgement, which need not wait.
                let data = |frame: &&Bytes| !segment(frame).1.is_empty();
                prop_assert!(left.iter().filter(data).eq(want.iter().filter(data)));
                prop_assert_eq!(left.len(), want.len());
            }
            Some(flip) => {
                let told = &divergence(&verdicts).expect("the flipped byte is seen").reason;
                let exact = matches!(told, Reason::Mismatch(found) if found.primary[0] == stream[flip] && found.secondary[0] == other[flip]);
                prop_assert!(exact, "the first differing byte is shown: {:?}", told);
                for frame in left {
                    let (got, payload) = segment(&frame);
                    let end = usize::try_from(got.seq.after(Seq(base))).unwrap() + payload.len();
                    prop_assert!(end <= flip, "nothing from the difference on leaves");
                }
                let held = bench.comparator.held().frames;
                prop_assert_eq!(released(&bench.checkpoint()).len(), held);
            }
        }
    }

    #[test]
    fn garbage_from_either_side_never_panics_and_leaves_only_when_equal_or_committed(
        frames in proptest::collection::vec((any::<bool>(), garbage()), 1..60),
    ) {
        let mut bench = Bench::new();
        let mut left = 0;
        for (number, (primary, frame)) in frames.iter().enumerate() {
            let verdicts = if *primary { bench.primary(frame.clone()) } else { bench.secondary(frame.clone()) };
            left += released(&verdicts).len();
            if number % 17 == 16 {
                left += released(&bench.checkpoint()).len();
            }
        }
        left += released(&bench.checkpoint()).len();
        let sent = frames.iter().filter(|(primary, _)| *primary).count();
        prop_assert!(left >= sent, "nothing is lost");
        prop_assert_eq!(bench.comparator.held().frames, 0);
    }
}

/// Random bytes, or a well-formed frame with some bytes changed or cut off.
pub(crate) fn garbage() -> impl Strategy<Value = Vec<u8>> {
    let formed = prop_oneof![
        (
            any::<u32>(),
            any::<u32>(),
            any::<u8>(),
            proptest::collection::vec(any::<u8>(), 0..30),
            any::<bool>()
        )
            .prop_map(|(seq, ack, flags, payload, v6)| Tcp {
                v6,
                ..Tcp::new(seq % 64, ack % 64, flags, &payload)
            }
            .sack(&[(1, ack % 64), (9, 12)])
            .frame()
            .to_vec()),
        proptest::collection::vec(any::<u8>(), 0..30).prop_map(|payload| udp(1, &payload).to_vec()),
        Just(arp(1, GUEST).to_vec()),
    ];
    prop_oneof![
        1 => proptest::collection::vec(any::<u8>(), 0..120),
        4 => (formed, proptest::collection::vec((any::<usize>(), any::<u8>()), 0..4), proptest::option::of(0usize..100)).prop_map(
            |(mut frame, changes, cut)| {
                for (at, byte) in changes {
                    let at = at % frame.len();
                    frame[at] = byte;
                }
                frame.truncate(cut.unwrap_or(frame.len()));
                frame
            }
        ),
    ]
}

proptest! {
    #[test]
    fn case_p22_a_connection_of_two_guests_with_other_numbers_is_one_stream_to_the_client(
        mine: u32, theirs: u32, client: u32, clocks in (1u32.., any::<u32>()), active: bool, payload in proptest::collection::vec(any::<u8>(), 1..400),
        sizes in proptest::collection::vec((1usize..90, 1usize..90), 400),
    ) {
        let mut bench = Bench::new();
        let mut translator = crate::Translator::new();
        translator.follow();
        let mut secondary = |bench: &mut Bench, tcp: Tcp| {
            let mut frame = tcp.frame().to_vec();
            outbound(&mut translator, &mut frame);
            bench.secondary(frame)
        };
        let syn = |isn: u32| if active { Tcp::new(isn, 0, SYN, b"") } else { Tcp::new(isn, client.wrapping_add(1), SYN | ACK, b"") };
        bench.primary(syn(mine).times(clocks.0, 1).frame());
        prop_assert_eq!(released(&secondary(&mut bench, syn(theirs).times(clocks.1, 1))).len(), 1);
        let flags = if active { SYN | ACK } else { ACK };
        let seq = if active { client } else { client.wrapping_add(1) };
        let answer = Tcp { inbound: true, ..Tcp::new(seq, mine.wrapping_add(1), flags, b"") }.times(1, clocks.0);
        let mut answer = answer.frame().to_vec();
        inbound(&mut translator, &mut answer);
        prop_assert_eq!(times(&answer), (1, clocks.1));
        prop_assert_eq!(segment(&answer).0.ack, Some(Seq(theirs.wrapping_add(1))));
        let mut secondary = |bench: &mut Bench, tcp: Tcp| {
            let mut frame = tcp.frame().to_vec();
            outbound(&mut translator, &mut frame);
            bench.secondary(frame)
        };
        let (mut here, mut there) = (0, 0);
        let mut left = Vec::new();
        for (one, other) in sizes {
            let (to, until) = ((here + one).min(payload.len()), (there + other).min(payload.len()));
            let at = |isn: u32, position: usize| isn.wrapping_add(1 + u32::try_from(position).unwrap());
            let time = |clock: u32, position: usize| clock.wrapping_add(u32::try_from(position).unwrap());
            if here < to {
                let tcp = Tcp::data(at(mine, here), client.wrapping_add(1), &payload[here..to]);
                left.extend(bench.primary(tcp.times(time(clocks.0, to), 1).frame()));
            }
            if there < until {
                let tcp = Tcp::data(at(theirs, there), client.wrapping_add(1), &payload[there..until]);
                left.extend(secondary(&mut bench, tcp.times(time(clocks.1, until), 1)));
            }
            // Overtakes what is held.
            left.extend(bench.primary(Tcp::ack(at(mine, to), client.wrapping_add(1)).times(time(clocks.0, to), 1).frame()));
            (here, there) = (to, until);
        }
        prop_assert_eq!(divergence(&left), None);
        let seen: Vec<u8> = released(&left).iter().flat_map(|frame| segment(frame).1).collect();
        prop_assert_eq!(seen, payload);
        prop_assert_eq!(bench.comparator.held().frames, 0);
        let seen: Vec<u32> = released(&left).iter().map(|frame| times(frame).0.wrapping_sub(clocks.0)).collect();
        prop_assert!(seen.is_sorted(), "no time is before one that has left");
    }
}
