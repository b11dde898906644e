//! One flow in the comparator: the primary's held frames in order, and how they are compared.
//!
//! Frames leave in the order in which the guest sent them. The first `compared` entries have been
//! compared; the others are raw: of an epoch that is not compared yet, or of a new connection on the
//! same ports that the secondary has not opened yet.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};
use checkpoint::{Epoch, Instant};

use crate::counters::FlowReport;
use crate::datagram::{SEARCH_MAX, Waiting};
use crate::flow::FlowKey;
use crate::frame::{self, Body, Frame, Segment, Shape};
use crate::hold::Hold;
use crate::seq::Seq;
use crate::stream::{Leave, Note, Stream};
use crate::temper::{FlowPatience, Temper};
use crate::verdict::{Difference, Fact, Reason, context};

/// Most entries that are walked to find an equal; behind them a flow waits for its commit.
const WALK_MAX: usize = 256;

/// A flow.
#[derive(Debug)]
pub(crate) struct Lane {
    key: FlowKey,
    kind: Kind,
    queue: VecDeque<Entry>,
    /// How many entries at the front of the queue have been compared.
    compared: usize,
    /// Compared entries of a flow compared whole that have no equal yet.
    unequal: usize,
    /// The primary has opened a new connection that the secondary has not.
    blocked: bool,
    /// Output of the secondary since it opened a new connection that the primary has not.
    deferred: VecDeque<(Instant, Bytes)>,
    deferred_bytes: usize,
    /// An acknowledgement that was lowered and that nothing has carried since.
    owed: Option<Owed>,
    /// Whether it is compared at all.
    temper: Temper,
    pub(crate) suspected: bool,
    pub(crate) touched: bool,
    /// When it was used last, in frames.
    pub(crate) used: u64,
    pub(crate) waits: u64,
    matched: u64,
    mismatched: u64,
}

/// What came of an attempt to go on to a new connection.
pub(crate) enum Unblocked {
    Nothing,
    Restarted,
    Diverged(Reason),
}

#[derive(Debug)]
enum Kind {
    Stream(Box<Stream>),
    Whole(Waiting),
}

#[derive(Debug)]
struct Entry {
    serial: u64,
    state: State,
}

#[derive(Debug)]
enum State {
    Raw,
    Segment(Note),
    Whole { shape: Shape, equal: bool },
}

#[derive(Debug)]
struct Owed {
    frame: Vec<u8>,
    ack: Seq,
}

impl Leave {
    pub(crate) fn is_lowered(self) -> bool {
        matches!(self, Self::Lowered(_))
    }
}

impl Lane {
    /// Makes the flow that this frame belongs to.
    pub(crate) fn new(frame: &Frame) -> Self {
        let kind = match frame.body {
            Body::Tcp(_) => Kind::Stream(Box::default()),
            Body::Whole(_) => Kind::Whole(Waiting::default()),
        };
        Self {
            key: frame.key,
            kind,
            queue: VecDeque::new(),
            compared: 0,
            unequal: 0,
            blocked: false,
            deferred: VecDeque::new(),
            deferred_bytes: 0,
            owed: None,
            temper: Temper::default(),
            suspected: false,
            touched: false,
            used: 0,
            waits: 0,
            matched: 0,
            mismatched: 0,
        }
    }

    pub(crate) fn key(&self) -> FlowKey {
        self.key
    }

    /// Says whether its output waits for commits, uncompared.
    pub(crate) fn is_buffered(&self) -> bool {
        self.temper.is_buffered()
    }

    /// The sides differed on it in this epoch.
    pub(crate) fn differed(&mut self, now: Instant, epoch: Epoch, patience: &FlowPatience) {
        self.temper.differed(now, epoch, patience);
    }

    /// Decides, at a commit, whether what comes next waits for commits too.
    pub(crate) fn is_buffered_after(&mut self, now: Instant, patience: &FlowPatience) -> bool {
        self.temper.decide(now, patience);
        self.temper.is_buffered()
    }

    /// Adds a held frame, uncompared.
    pub(crate) fn push(&mut self, serial: u64) {
        self.queue.push_back(Entry {
            serial,
            state: State::Raw,
        });
    }

    /// Says whether this frame is the next to be compared.
    pub(crate) fn is_next_raw(&self, serial: u64) -> bool {
        !self.blocked
            && self
                .queue
                .get(self.compared)
                .is_some_and(|entry| entry.serial == serial)
    }

    /// Compares a frame of the primary if it is the next.
    pub(crate) fn primary(&mut self, now: Instant, serial: u64, parsed: &Frame, frame: &Bytes) -> Result<(), Reason> {
        if !self.is_next_raw(serial) {
            return Ok(());
        }
        let result = match (&mut self.kind, &parsed.body) {
            (Kind::Stream(stream), Body::Tcp(segment)) => {
                if stream.primary_opens_another(segment) {
                    self.blocked = true;
                    return Ok(());
                }
                let (note, result) = stream.primary(now, segment, frame);
                self.queue[self.compared].state = State::Segment(note);
                result
            }
            (Kind::Whole(waiting), Body::Whole(shape)) => {
                let equal = waiting.take_equal(shape, frame);
                self.unequal += usize::from(!equal);
                self.queue[self.compared].state = State::Whole { shape: *shape, equal };
                Ok(())
            }
            _ => return Ok(()),
        };
        self.compared += 1;
        self.counted(result)
    }

    /// Compares a frame of the secondary.
    pub(crate) fn secondary(&mut self, now: Instant, parsed: &Frame, frame: &Bytes, hold: &Hold) -> Result<(), Reason> {
        let result = match (&mut self.kind, &parsed.body) {
            (Kind::Stream(stream), Body::Tcp(segment)) => {
                if !self.deferred.is_empty() || stream.secondary_opens_another(segment) {
                    self.deferred_bytes += frame.len();
                    self.deferred.push_back((now, frame.clone()));
                    return Ok(());
                }
                stream.secondary(now, segment, frame)
            }
            (Kind::Whole(waiting), Body::Whole(shape)) => {
                let unequal = self
                    .queue
                    .iter_mut()
                    .take(self.compared)
                    .take(WALK_MAX)
                    .filter_map(|entry| match entry.state {
                        State::Whole { shape, equal: false } => Some((shape, entry)),
                        _ => None,
                    });
                let mut found = false;
                for (other, entry) in unequal.take(SEARCH_MAX) {
                    let Some(held) = hold.get(entry.serial) else { continue };
                    if other.equal(&held.frame, shape, frame) {
                        entry.state = State::Whole {
                            shape: other,
                            equal: true,
                        };
                        found = true;
                        break;
                    }
                }
                if found {
                    self.unequal -= 1;
                } else {
                    waiting.push(frame.clone(), *shape, now);
                }
                Ok(())
            }
            _ => Ok(()),
        };
        self.counted(result)
    }

    /// Returns the front frame if it may leave, and how.
    pub(crate) fn next_to_leave(&self) -> Option<(u64, Leave)> {
        let entry = self.queue.front()?;
        let leave = match (&entry.state, &self.kind) {
            (State::Segment(note), Kind::Stream(stream)) => stream.leave(note),
            (State::Whole { equal: true, .. }, _) => Leave::Whole,
            _ => Leave::Wait,
        };
        (leave != Leave::Wait).then_some((entry.serial, leave))
    }

    /// Passes the front frame, which the secondary has sent as well.
    pub(crate) fn pass(&mut self, frame: Bytes, leave: Leave) -> Bytes {
        self.matched += 1;
        let Some(entry) = self.queue.pop_front() else {
            return frame;
        };
        self.compared -= 1;
        let State::Segment(note) = entry.state else {
            return frame;
        };
        let Kind::Stream(stream) = &mut self.kind else {
            return frame;
        };
        let segment = note.segment();
        match leave {
            Leave::Lowered(ack) => {
                stream.has_left(Some(ack));
                if let Some(full) = segment.ack.filter(|full| *full != ack) {
                    self.owed = segment
                        .acknowledgement(&frame, full)
                        .map(|frame| Owed { frame, ack: full });
                }
                lowered(segment, frame, ack)
            }
            Leave::Whole | Leave::Wait => {
                stream.has_left(segment.ack.filter(|_| !segment.rst));
                without_padding(segment, frame)
            }
        }
    }

    /// Passes the front frame by a commit, or on going alone.
    pub(crate) fn pass_unequal(&mut self, serial: u64, frame: Bytes) -> Bytes {
        if self.queue.front().is_none_or(|entry| entry.serial != serial) {
            return frame;
        }
        let Some(entry) = self.queue.pop_front() else {
            return frame;
        };
        self.compared = self.compared.saturating_sub(1);
        match entry.state {
            State::Segment(note) => {
                if let Kind::Stream(stream) = &mut self.kind {
                    stream.has_left(note.segment().ack.filter(|_| !note.segment().rst));
                }
                without_padding(note.segment(), frame)
            }
            State::Whole { equal, .. } => {
                self.unequal -= usize::from(!equal);
                frame
            }
            State::Raw => match frame::parse(&frame).body {
                Body::Tcp(segment) => {
                    self.follow(&segment);
                    without_padding(&segment, frame)
                }
                Body::Whole(_) => frame,
            },
        }
    }

    /// Keeps up with a segment of the primary that leaves without being compared.
    pub(crate) fn follow(&mut self, segment: &Segment) {
        let Kind::Stream(stream) = &mut self.kind else { return };
        if stream.primary_opens_another(segment) {
            **stream = Stream::default();
            self.owed = None;
        }
        let _note = stream.note(segment);
        stream.has_left(segment.ack.filter(|_| !segment.rst));
        if stream.is_far() {
            stream.commit();
        }
    }

    /// Returns an acknowledgement that was owed and may leave now.
    pub(crate) fn pay(&mut self) -> Option<Bytes> {
        let Kind::Stream(stream) = &mut self.kind else {
            return None;
        };
        let ack = self.owed.as_ref()?.ack;
        if stream.acknowledged(ack) {
            self.owed = None;
            return None;
        }
        if !self.queue.is_empty() || !stream.permits(ack) {
            return None;
        }
        stream.has_left(Some(ack));
        self.owed.take().map(|owed| Bytes::from(owed.frame))
    }

    /// Lets both sides go on to a new connection on the same ports once both have opened it.
    pub(crate) fn unblock(&mut self, now: Instant, hold: &Hold) -> Unblocked {
        if !self.blocked || self.deferred.is_empty() {
            return Unblocked::Nothing;
        }
        let Kind::Stream(stream) = &mut self.kind else {
            return Unblocked::Nothing;
        };
        if self.compared > 0 {
            stream.poison();
            self.deferred.clear();
            self.deferred_bytes = 0;
            self.mismatched += 1;
            let empty = Difference {
                fact: Fact::Connection,
                offset: 0,
                primary: Vec::new(),
                secondary: Vec::new(),
            };
            return Unblocked::Diverged(Reason::Mismatch(empty));
        }
        **stream = Stream::default();
        self.owed = None;
        self.blocked = false;
        let mut result = Ok(());
        while let Some(serial) = self.queue.get(self.compared).map(|entry| entry.serial)
            && let Some(held) = hold.get(serial)
            && !self.blocked
        {
            let fed = self.primary(held.arrived, serial, &frame::parse(&held.frame), &held.frame);
            result = result.and(fed);
        }
        let deferred = std::mem::take(&mut self.deferred);
        self.deferred_bytes = 0;
        for (arrived, frame) in deferred {
            let fed = self.secondary(arrived.min(now), &frame::parse(&frame), &frame, hold);
            result = result.and(fed);
        }
        match result {
            Ok(()) => Unblocked::Restarted,
            Err(reason) => Unblocked::Diverged(reason),
        }
    }

    /// Takes what the primary has sent so far as the state both sides go on from. Returns an owed acknowledgement.
    pub(crate) fn commit(&mut self) -> Option<Bytes> {
        self.blocked = false;
        self.suspected = false;
        self.touched = false;
        self.deferred.clear();
        self.deferred_bytes = 0;
        match &mut self.kind {
            Kind::Stream(stream) => {
                if stream.commit() {
                    self.owed = None;
                }
            }
            Kind::Whole(waiting) => waiting.clear(),
        }
        self.pay()
    }

    /// Returns how many frames or pieces, and bytes, of the secondary wait.
    pub(crate) fn pending(&self) -> (usize, usize) {
        let (frames, bytes) = match &self.kind {
            Kind::Stream(stream) => stream.pending(),
            Kind::Whole(waiting) => waiting.pending(),
        };
        (frames + self.deferred.len(), bytes + self.deferred_bytes)
    }

    /// Returns since when output of the secondary has waited.
    pub(crate) fn waits_since(&self) -> Option<Instant> {
        let compared = match &self.kind {
            Kind::Stream(stream) => stream.secondary_waits_since(),
            Kind::Whole(waiting) => waiting.oldest().map(|(_, _, arrived)| arrived),
        };
        let deferred = self.deferred.front().map(|(arrived, _)| *arrived);
        compared.into_iter().chain(deferred).min()
    }

    /// Says whether both sides keep something that fits nothing of the other's.
    pub(crate) fn is_suspect(&self) -> bool {
        matches!(&self.kind, Kind::Whole(waiting) if self.unequal > 0 && waiting.pending().0 > 0)
    }

    /// Says whether it is suspect and was not before.
    pub(crate) fn becomes_suspect(&mut self) -> bool {
        self.is_suspect() && !std::mem::replace(&mut self.suspected, true)
    }

    /// Returns the difference that makes it suspect.
    pub(crate) fn difference(&mut self, hold: &Hold) -> Option<Reason> {
        let Kind::Whole(waiting) = &self.kind else { return None };
        let (theirs, their_shape, _) = waiting.oldest()?;
        let (serial, shape) = self
            .queue
            .iter()
            .take(self.compared)
            .find_map(|entry| match entry.state {
                State::Whole { shape, equal: false } => Some((entry.serial, shape)),
                _ => None,
            })?;
        let mine = &hold.get(serial)?.frame;
        let at = shape.first_difference(mine, their_shape, theirs).unwrap_or(0);
        self.mismatched += 1;
        Some(Reason::Mismatch(Difference {
            fact: Fact::Bytes,
            offset: at as u64,
            primary: context(mine, at),
            secondary: context(theirs, at),
        }))
    }

    /// Says whether nothing of it is held, waits or is noted for the next commit.
    pub(crate) fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.deferred.is_empty() && self.owed.is_none() && !self.touched
    }

    /// Says whether there is nothing worth remembering.
    pub(crate) fn is_over(&self) -> bool {
        matches!(&self.kind, Kind::Stream(stream) if stream.is_over()) || matches!(self.kind, Kind::Whole(_))
    }

    pub(crate) fn report(&self) -> FlowReport {
        FlowReport {
            key: self.key,
            matched: self.matched,
            mismatched: self.mismatched,
            waits: self.waits,
            held: self.queue.len(),
            buffered: self.is_buffered(),
            pending: self.pending().0,
        }
    }

    fn counted(&mut self, result: Result<(), Reason>) -> Result<(), Reason> {
        self.mismatched += u64::from(result.is_err());
        result
    }
}

/// Returns the frame with a lower acknowledgement, without SACK blocks and padding.
fn lowered(segment: &Segment, frame: Bytes, ack: Seq) -> Bytes {
    let mut frame = frame
        .try_into_mut()
        .unwrap_or_else(|shared| BytesMut::from(&shared[..]));
    segment.set_ack(&mut frame, ack);
    segment.blank_sack(&mut frame);
    frame.truncate(segment.end);
    frame.freeze()
}

/// Returns the frame without the bytes after its IP packet, which nobody has compared.
fn without_padding(segment: &Segment, mut frame: Bytes) -> Bytes {
    frame.truncate(segment.end);
    frame
}
