//! The switch between the three kernels: what the two roles' shells do with frames, in one thread and without a VM.
//!
//! ```text
//!   client tap0 ── wire ──► primary's picture ──► primary tap0
//!        ▲          │ mirrored, later ──► secondary's picture ──► secondary tap0
//!        └── wire ◄─┤ released
//!                 comparator ◄── primary's picture ◄── primary tap0
//!                        ▲────── later ── secondary's picture ◄── secondary tap0
//! ```
//!
//! Translator and comparator are the shipped ones. The wire to the client loses, repeats and reorders frames by a seed; the
//! link between the hosts does not, it is slow. VLAN tags are put on and taken off here. A kernel's stack can't be loaded with
//! another's state: at a divergence the primary goes on alone, so that the client can end, and it is for the test to fail.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;

use bytes::Bytes;
use checkpoint::limits::FRAME_HEADER_BYTES;
use checkpoint::{Duration, Epoch, EpochMode, Instant};
use harness::random::Random;
use link::clock;
use machine::tap::Tap;
use proxy::{Comparator, ComparatorLimits, Counters, Divergence, FlowKey, FlowReport, NetworkPicture, Reason, Verdict};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::capture::Capture;
use crate::segment::{self, Ends, Kind};

/// Longest time between two looks at the orders.
const LOOK_EVERY: Duration = Duration::from_millis(1);
/// Nothing has come from a stack for so long, and nothing waits: it is quiet.
const QUIET: Duration = Duration::from_millis(25);
/// A divergence is told this late: what takes shorter is time lost, and what takes longer would never have come. The shipped
/// bound would make a test fail on a machine with other work.
const UNMATCHED: Duration = Duration::from_millis(3_000);
const REORDER: Duration = Duration::from_millis(1_000);
/// How late a frame is that others overtake.
const OVERTAKEN: Duration = Duration::from_millis(3);
/// Where kernels tell their IPv6 groups, again and again after times left to chance: nobody here listens.
const GROUP_REPORTS: [u8; 6] = [0x33, 0x33, 0, 0, 0, 0x16];
const FRAMES_PER_TURN: usize = 256;

/// What the wires are like.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Conditions {
    /// Of all that is left to chance.
    pub(crate) seed: u64,
    /// Of a thousand frames between client and switch, in each direction.
    pub(crate) lost: u64,
    /// The same.
    pub(crate) repeated: u64,
    /// The same.
    pub(crate) overtaken: u64,
    /// From a frame's arrival until the secondary's answer to it is there, if that took no time.
    pub(crate) delay: Duration,
    /// The tags of the pair's side, outermost first.
    pub(crate) vlans: &'static [u16],
}

/// When the primary's host is cut off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moment {
    /// At once.
    Now,
    /// When the primary has sent the next such segment, and before it leaves.
    Sent(Kind),
    /// When the next such segment has left.
    Left(Kind),
}

/// What the switch tells.
#[derive(Clone, Debug)]
pub(crate) struct Told {
    pub(crate) divergences: Vec<String>,
    pub(crate) counters: Counters,
    /// Longest time that a frame of the primary was held.
    pub(crate) held_longest: Duration,
    /// Commits that were asked for.
    pub(crate) commits: u64,
    /// Resets that only one of the stacks sent.
    pub(crate) late_resets: u64,
    pub(crate) taken_over: bool,
    /// Frames that the wire lost, repeated or let be overtaken.
    pub(crate) harmed: u64,
    /// The longest frame that was released, with its header, in bytes.
    pub(crate) longest: usize,
}

/// The thread, seen from the test. It ends when this is dropped.
pub(crate) struct Switch {
    orders: Option<Sender<Order>>,
    thread: Option<JoinHandle<()>>,
}

enum Order {
    Protect(Sender<()>),
    Commit(Sender<()>),
    TakeOver(Moment),
    Tell(Sender<Told>),
    /// From the switch to itself.
    Forgive,
}

/// Whose kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Primary,
    Secondary,
}

/// A frame on its way.
enum Passing {
    /// From the client, to the host that leads.
    Arriving(Bytes),
    /// What has arrived there, to the secondary.
    Mirrored(Bytes),
    /// Sent by the secondary's guest, to the comparator.
    Output(Bytes),
    /// Released, to the client.
    Leaving(Bytes),
}

struct Hub {
    taps: [Tap; 3],
    /// Frames are read into it.
    buffer: Vec<u8>,
    pictures: [NetworkPicture; 2],
    comparator: Comparator,
    leader: Side,
    passing: BTreeMap<(Instant, u64), Passing>,
    serial: u64,
    conditions: Conditions,
    random: Random,
    /// Connections on which a reset was what one of the stacks sent last.
    resets: BTreeSet<Ends>,
    /// When a stack has last sent something.
    heard: Instant,
    moment: Option<Moment>,
    asked: Vec<Order>,
    released: Option<Capture>,
    alone: Option<Capture>,
    secondary: Option<Capture>,
    told: Told,
}

const CLIENT: usize = 2;

impl Side {
    fn index(self) -> usize {
        match self {
            Self::Primary => 0,
            Self::Secondary => 1,
        }
    }
}

impl Switch {
    /// Starts it. With a folder for captures, it writes there what the client's side and what the primary's showed.
    pub(crate) fn start(taps: [Tap; 3], conditions: Conditions, captures: Option<&Path>) -> Self {
        let limits = ComparatorLimits {
            unmatched: UNMATCHED,
            unmatched_min: UNMATCHED,
            reorder: REORDER,
            ..ComparatorLimits::default()
        };
        let mut pictures = [NetworkPicture::new(), NetworkPicture::new()];
        pictures[Side::Secondary.index()].follow();
        let capture =
            |name: &str| captures.map(|folder| Capture::new(&folder.join(name)).expect("a capture can be written"));
        let hub = Hub {
            taps,
            buffer: Vec::new(),
            pictures,
            comparator: Comparator::new(limits, Epoch(1)),
            leader: Side::Primary,
            passing: BTreeMap::new(),
            serial: 0,
            conditions,
            random: Random::new(conditions.seed),
            resets: BTreeSet::new(),
            heard: clock::now(),
            moment: None,
            asked: Vec::new(),
            released: capture("released.pcap"),
            alone: capture("alone.pcap"),
            secondary: capture("secondary.pcap"),
            told: Told {
                divergences: Vec::new(),
                counters: Counters::default(),
                held_longest: Duration::default(),
                commits: 0,
                late_resets: 0,
                taken_over: false,
                harmed: 0,
                longest: 0,
            },
        };
        let (orders, inbox) = channel();
        let thread = std::thread::Builder::new().name("switch".to_owned());
        let thread = thread.spawn(move || hub.run(&inbox)).expect("a thread can be started");
        Self {
            orders: Some(orders),
            thread: Some(thread),
        }
    }

    /// Waits until all stacks are quiet, and has output compared from then on.
    pub(crate) fn protect(&self) {
        self.ask(Order::Protect);
    }

    /// Waits until nothing is pending, and commits.
    pub(crate) fn commit(&self) {
        self.ask(Order::Commit);
    }

    /// Cuts the primary's host off, now or later; the secondary leads from then on.
    pub(crate) fn take_over(&self, moment: Moment) {
        self.order(Order::TakeOver(moment));
    }

    /// Returns what has happened until now.
    pub(crate) fn tell(&self) -> Told {
        self.ask(Order::Tell)
    }

    fn ask<T>(&self, order: impl FnOnce(Sender<T>) -> Order) -> T {
        let (reply, answer) = channel();
        self.order(order(reply));
        answer.recv().expect("the switch answers")
    }

    fn order(&self, order: Order) {
        let orders = self.orders.as_ref().expect("set until dropped");
        orders.send(order).expect("the switch runs");
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        self.orders = None;
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(
            std::thread::panicking() || matches!(ended, Some(Ok(()))),
            "the switch has panicked"
        );
    }
}

impl Hub {
    fn run(mut self, inbox: &Receiver<Order>) {
        loop {
            match inbox.try_recv() {
                Ok(Order::TakeOver(Moment::Now)) => self.take_over(clock::now()),
                Ok(Order::TakeOver(moment)) => self.moment = Some(moment),
                Ok(order) => self.asked.push(order),
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => return,
            }
            let more = self.read_taps();
            self.pass(clock::now());
            self.time(clock::now());
            self.answer(clock::now());
            if !more {
                self.wait();
            }
        }
    }

    /// Takes what the three stacks have sent; says whether there may be more.
    fn read_taps(&mut self) -> bool {
        let mut frame = std::mem::take(&mut self.buffer);
        frame.resize(checkpoint::limits::FRAME_BYTES_MAX, 0);
        let mut more = false;
        for index in 0..self.taps.len() {
            for turn in 0..FRAMES_PER_TURN {
                let Some(length) = self.taps[index].recv(&mut frame).expect("a TAP can be read") else {
                    break;
                };
                more |= turn + 1 == FRAMES_PER_TURN;
                let now = clock::now();
                self.heard = now;
                match index {
                    0 => self.guest_sent(now, Side::Primary, &frame[..length]),
                    1 => self.guest_sent(now, Side::Secondary, &frame[..length]),
                    _ => self.wire(now, &frame[..length], Passing::Arriving),
                }
            }
        }
        self.buffer = frame;
        more
    }

    fn guest_sent(&mut self, now: Instant, side: Side, frame: &[u8]) {
        let host_is_cut_off = self.told.taken_over && side == Side::Primary;
        if host_is_cut_off || frame[FRAME_HEADER_BYTES..].starts_with(&GROUP_REPORTS) {
            return;
        }
        let frame = segment::tag(frame, self.conditions.vlans);
        let frame = self.pictures[side.index()].leaving(frame).into_wire();
        match segment::is_reset(&frame) {
            Some((ends, true)) => drop(self.resets.insert(ends)),
            Some((ends, false)) => drop(self.resets.remove(&ends)),
            None => {}
        }
        if side != self.leader {
            return self.later(now + self.half_delay(), Passing::Output(frame));
        }
        note(&mut self.alone, now, &frame);
        if self.is_moment(Moment::Sent, &frame) {
            return self.take_over(now);
        }
        let mut verdicts = Vec::new();
        self.comparator.primary_output(now, frame, &mut verdicts);
        self.carry_out(now, verdicts);
    }

    /// Lets what is due go on.
    fn pass(&mut self, now: Instant) {
        while self.passing.first_key_value().is_some_and(|((due, _), _)| *due <= now) {
            let (_, passing) = self.passing.pop_first().expect("just seen");
            self.arrive(now, passing);
        }
    }

    fn arrive(&mut self, now: Instant, passing: Passing) {
        match passing {
            Passing::Arriving(frame) => {
                for capture in [&mut self.alone, &mut self.released, &mut self.secondary] {
                    note(capture, now, &frame);
                }
                self.deliver(self.leader, frame.clone());
                if self.leader == Side::Primary {
                    self.later(now + self.half_delay(), Passing::Mirrored(frame));
                }
            }
            Passing::Mirrored(frame) => self.deliver(Side::Secondary, frame),
            Passing::Output(frame) => {
                note(&mut self.secondary, now, &frame);
                if self.leader == Side::Primary {
                    let mut verdicts = Vec::new();
                    // Both stacks are in the epoch that runs: none has to be loaded first.
                    let epoch = self.comparator.running();
                    self.comparator.secondary_output(now, epoch, frame, &mut verdicts);
                    self.carry_out(now, verdicts);
                }
            }
            Passing::Leaving(frame) => self.send(CLIENT, &frame),
        }
    }

    fn deliver(&mut self, side: Side, wire: Bytes) {
        let delivery = self.pictures[side.index()].arriving(wire);
        self.send(side.index(), &delivery.guest);
    }

    fn send(&mut self, tap: usize, frame: &[u8]) {
        let frame = segment::untag(frame, self.conditions.vlans);
        self.taps[tap].send(&frame).expect("a kernel takes frames");
    }

    fn carry_out(&mut self, now: Instant, verdicts: Vec<Verdict>) {
        for verdict in verdicts {
            match verdict {
                Verdict::Release(frame, _) => {
                    assert!(segment::is_intact(&frame), "a checksum is wrong: {frame:02x?}");
                    self.told.longest = self.told.longest.max(frame.len());
                    note(&mut self.released, now, &frame);
                    self.wire(now, &frame, Passing::Leaving);
                    if self.is_moment(Moment::Left, &frame) {
                        return self.take_over(now);
                    }
                }
                Verdict::Diverged(divergence) if self.is_late_reset(&divergence) => {
                    self.told.late_resets += 1;
                    self.asked.push(Order::Forgive);
                }
                Verdict::Diverged(divergence) => {
                    self.told.divergences.push(divergence.to_string());
                    return self.go_alone(now);
                }
                Verdict::Violation(what) => panic!("the secondary is honest: {what}"),
            }
        }
    }

    /// Does to a frame what wires do.
    fn wire(&mut self, now: Instant, frame: &[u8], passing: fn(Bytes) -> Passing) {
        let frame = if passing(Bytes::new()).is_from_client() {
            segment::tag(frame, self.conditions.vlans)
        } else {
            Bytes::copy_from_slice(frame)
        };
        let Conditions {
            lost,
            repeated,
            overtaken,
            ..
        } = self.conditions;
        let harm = self.random.below(1_000);
        self.told.harmed += u64::from(harm < lost + repeated + overtaken);
        if harm < lost {
            return;
        }
        if harm < lost + repeated {
            self.later(now, passing(frame.clone()));
        }
        let late = (lost + repeated..lost + repeated + overtaken).contains(&harm);
        let due = if late { now + OVERTAKEN } else { now };
        self.later(due, passing(frame));
    }

    fn later(&mut self, due: Instant, passing: Passing) {
        self.serial += 1;
        self.passing.insert((due, self.serial), passing);
    }

    fn half_delay(&self) -> Duration {
        Duration(self.conditions.delay.0 / 2)
    }

    fn is_moment(&self, moment: fn(Kind) -> Moment, frame: &[u8]) -> bool {
        self.moment
            .is_some_and(|wanted| segment::kinds(frame).any(|kind| moment(kind) == wanted))
    }

    /// The primary's host is gone: what was on its way to the secondary is there, what was on its way from it is lost.
    fn take_over(&mut self, now: Instant) {
        self.moment = None;
        self.told.taken_over = true;
        self.told.counters = self.comparator.counters();
        for (at, passing) in std::mem::take(&mut self.passing) {
            match passing {
                Passing::Mirrored(frame) => self.deliver(Side::Secondary, frame),
                Passing::Output(_) => {}
                other => drop(self.passing.insert(at, other)),
            }
        }
        self.leader = Side::Secondary;
        self.pictures[Side::Secondary.index()].lead();
        self.comparator = Comparator::new(ComparatorLimits::default(), Epoch(1));
        for frame in self.pictures[Side::Secondary.index()].announcements() {
            self.wire(now, &frame, Passing::Leaving);
        }
    }

    /// What comes for a connection that has just ended is answered by a reset, or by nothing if the program holds the socket
    /// at that moment: the kernel's own chance, and no difference that lasts.
    fn is_late_reset(&self, divergence: &Divergence) -> bool {
        let unmatched = matches!(divergence.reason, Reason::Unmatched { .. });
        unmatched && divergence.flow.is_some_and(|flow| self.is_of_reset(&flow))
    }

    fn is_of_reset(&self, flow: &FlowKey) -> bool {
        let [source, destination] = [flow.source, flow.destination].map(|end| (end.address, end.port));
        self.resets.contains(&(source.into(), destination.into()))
    }

    /// Forgets late resets, as a checkpoint would; nothing else may wait.
    fn forgive(&mut self, now: Instant) {
        let waits = |flow: &FlowReport| flow.held > 0 || flow.pending > 0;
        let waiting: Vec<FlowKey> = self.comparator.flows().filter(waits).map(|flow| flow.key).collect();
        if let Some(flow) = waiting.iter().find(|flow| !self.is_of_reset(flow)) {
            self.told.divergences.push(format!("something is left on {flow}"));
            return self.go_alone(now);
        }
        self.commit(now);
    }

    fn go_alone(&mut self, now: Instant) {
        let mut verdicts = Vec::new();
        self.comparator.release_all(&mut verdicts);
        self.carry_out(now, verdicts);
    }

    fn commit(&mut self, now: Instant) {
        let mut verdicts = Vec::new();
        let epoch = self.comparator.stop(EpochMode::Lockstep);
        self.comparator.commit(now, epoch, &mut verdicts);
        self.comparator.loaded(now, epoch);
        self.carry_out(now, verdicts);
    }

    fn time(&mut self, now: Instant) {
        if let Some(oldest) = self.comparator.held().oldest {
            self.told.held_longest = self.told.held_longest.max(now.since(oldest));
        }
        if self.comparator.deadline().is_some_and(|deadline| deadline <= now) {
            let mut verdicts = Vec::new();
            self.comparator.timeout(now, &mut verdicts);
            self.carry_out(now, verdicts);
        }
    }

    /// Does what is asked, if it is time for it.
    fn answer(&mut self, now: Instant) {
        let still = self.passing.is_empty() && self.heard + QUIET <= now;
        let settled = still && self.comparator.held().frames == 0 && self.comparator.pending().frames == 0;
        let asks_forgiveness = self.asked.iter().any(|order| matches!(order, Order::Forgive));
        for order in std::mem::take(&mut self.asked) {
            // Whoever asked has gone only if the test fails anyway.
            match order {
                Order::Protect(reply) if still => {
                    self.comparator.protect(Epoch(1), EpochMode::Lockstep);
                    self.comparator.loaded(now, Epoch(0));
                    let _ = reply.send(());
                }
                Order::Commit(reply) if settled => {
                    self.told.commits += 1;
                    self.commit(now);
                    let _ = reply.send(());
                }
                Order::Forgive if still => self.forgive(now),
                // Whether a late reset is all that was left is not known yet.
                Order::Tell(reply) if !asks_forgiveness => {
                    if !self.told.taken_over {
                        self.told.counters = self.comparator.counters();
                    }
                    let _ = reply.send(self.told.clone());
                }
                later => self.asked.push(later),
            }
        }
    }

    fn wait(&self) {
        let now = clock::now();
        let due = self.passing.first_key_value().map(|((due, _), _)| *due);
        let span = due.map_or(LOOK_EVERY, |due| due.since(now)).0.min(LOOK_EVERY.0);
        let span = Timespec {
            tv_sec: 0,
            tv_nsec: i64::try_from(span).expect("below a second"),
        };
        let mut watched = self.taps.each_ref().map(|tap| PollFd::new(tap, PollFlags::IN));
        // An interrupted wait is a short one.
        let _ = poll(&mut watched, Some(&span));
    }
}

fn note(capture: &mut Option<Capture>, now: Instant, frame: &Bytes) {
    if let Some(capture) = capture {
        capture
            .write(now, &proxy::on_wire(frame))
            .expect("a capture can be written");
    }
}

impl Passing {
    fn is_from_client(&self) -> bool {
        matches!(self, Self::Arriving(_))
    }
}
