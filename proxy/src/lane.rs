//! One flow in the comparator: the primary's held frames, and how they are compared.
//!
//! Frames are compared in the order in which the guest sent them. Those that have not been are raw: of an epoch
//! that is not compared yet, or of a new connection on the same ports that the secondary has not opened yet. In which order
//! the others leave is told by `order` for a TCP
//! stream, by `fragment` for IP fragments and by `datagram` for frames compared whole.

use std::collections::VecDeque;

use bytes::Bytes;
use checkpoint::mutants::{self, Mutant};
use checkpoint::{Epoch, Instant, Role};

use crate::counters::{FlowReport, Tally};
use crate::crossing::has_ports;
use crate::datagram::Whole;
use crate::flow::FlowKey;
use crate::fragment::Fragments;
use crate::frame::{self, Body, Fragment, Frame, Segment};
use crate::hold::Hold;
use crate::order::{Begun, Entry, Next, Order, Place};
use crate::picture::into_mut;
use crate::said::Said;
use crate::seq::Seq;
use crate::service::ServiceKey;
use crate::shared::Shared;
use crate::stream::{Leave, Stream};
use crate::table::Flow;
use crate::temper::{Patience, Temper};
use crate::verdict::{Difference, Fact, Reason};

/// A flow.
#[derive(Debug)]
pub(crate) struct Lane {
    key: FlowKey,
    kind: Kind,
    /// Held frames that have not been compared.
    raw: VecDeque<u64>,
    /// The primary has opened a new connection that the secondary has not.
    blocked: bool,
    /// Output of the secondary since it opened a new connection that the primary has not.
    deferred: VecDeque<(Instant, Bytes)>,
    deferred_bytes: usize,
    /// An acknowledgement that was lowered and that nothing has carried since.
    owed: Option<Box<Owed>>,
    /// The latest time that has left: its receiver drops what leaves later with an earlier one (PAWS).
    time: Option<Seq>,
    /// Whether it is compared at all.
    temper: Temper,
    /// Whether its service knows that it differs.
    told: bool,
    opened_by_guest: bool,
    /// Whether it is among the flows that one side alone has opened.
    pub(crate) noted: bool,
    pub(crate) suspected: bool,
    /// Whether it is among the flows of whose frames a part may leave.
    pub(crate) begins: bool,
    pub(crate) touched: bool,
    /// Whether it was used since the table of flows last asked.
    pub(crate) used: bool,
    pub(crate) tally: Tally,
    /// The latest difference.
    difference: Option<Box<Difference>>,
}

/// What came of an attempt to go on to a new connection.
pub(crate) enum Unblocked {
    Nothing,
    Restarted,
    Diverged(Reason),
}

#[derive(Debug)]
enum Kind {
    Stream(Box<Stream>, Order),
    Fragments(Box<Fragments>),
    Whole(Whole),
}

#[derive(Debug)]
struct Owed {
    segment: Segment,
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
            Body::Tcp(_) => Kind::Stream(Box::default(), Order::default()),
            Body::Fragment(_) => Kind::Fragments(Box::default()),
            Body::Whole(_) => Kind::Whole(Whole::default()),
        };
        Self {
            key: frame.key,
            kind,
            raw: VecDeque::new(),
            blocked: false,
            deferred: VecDeque::new(),
            deferred_bytes: 0,
            owed: None,
            time: None,
            temper: Temper::default(),
            told: false,
            opened_by_guest: matches!(&frame.body, Body::Tcp(segment) if segment.syn && segment.ack.is_none()),
            noted: false,
            suspected: false,
            begins: false,
            touched: false,
            used: true,
            tally: Tally::default(),
            difference: None,
        }
    }

    pub(crate) fn key(&self) -> FlowKey {
        self.key
    }

    /// Says whether its output waits for commits, uncompared.
    pub(crate) fn is_buffered(&self) -> bool {
        let is_wary = matches!(&self.kind, Kind::Fragments(fragments) if fragments.is_wary());
        self.temper.is_buffered() || is_wary || !self.key.class.is_compared()
    }

    /// Counts what made a checkpoint necessary.
    pub(crate) fn diverged(&mut self, reason: &Reason) {
        self.tally.diverged(reason);
        if let Reason::Mismatch(difference) = reason {
            self.difference = Some(Box::new(difference.clone()));
        }
    }

    /// The sides differed on it in this epoch.
    pub(crate) fn differed(&mut self, now: Instant, epoch: Epoch, patience: &Patience) {
        self.temper.differed(now, epoch, patience);
    }

    /// Returns the service that it belongs to.
    pub(crate) fn service(&self) -> Option<ServiceKey> {
        ServiceKey::of(&self.key, self.opened_by_guest)
    }

    /// Says, once, that it has differed.
    pub(crate) fn is_news_to_service(&mut self) -> bool {
        !std::mem::replace(&mut self.told, true)
    }

    /// Decides, at a commit, whether what comes next waits for commits too.
    pub(crate) fn is_buffered_after(&mut self, now: Instant, patience: &Patience) -> bool {
        self.temper.decide(now, patience);
        self.temper.is_buffered()
    }

    /// Compares a held frame of the primary if none is to be compared before it.
    pub(crate) fn take(
        &mut self,
        now: Instant,
        serial: u64,
        parsed: &Frame,
        frame: &Bytes,
        shared: &mut Shared,
    ) -> Result<(), Reason> {
        let is_next = !self.blocked && self.raw.is_empty();
        let result = is_next
            .then(|| self.compare(now, serial, parsed, frame, shared))
            .flatten();
        result.unwrap_or_else(|| {
            self.raw.push_back(serial);
            Ok(())
        })
    }

    /// Adds a held frame, uncompared.
    pub(crate) fn push(&mut self, serial: u64) {
        self.raw.push_back(serial);
    }

    /// Says whether this frame is the next to be compared.
    pub(crate) fn is_next_raw(&self, serial: u64) -> bool {
        !self.blocked && self.raw.front() == Some(&serial)
    }

    /// Compares a frame of the primary if it is the next.
    pub(crate) fn primary(
        &mut self,
        now: Instant,
        serial: u64,
        parsed: &Frame,
        frame: &Bytes,
        shared: &mut Shared,
    ) -> Result<(), Reason> {
        if !self.is_next_raw(serial) {
            return Ok(());
        }
        let Some(result) = self.compare(now, serial, parsed, frame, shared) else {
            return Ok(());
        };
        self.raw.pop_front();
        result
    }

    /// Compares the next frame of the primary; nothing if it has to wait for that.
    fn compare(
        &mut self,
        now: Instant,
        serial: u64,
        parsed: &Frame,
        frame: &Bytes,
        shared: &mut Shared,
    ) -> Option<Result<(), Reason>> {
        let result = match (&mut self.kind, &parsed.body) {
            (Kind::Stream(stream, order), Body::Tcp(segment)) => {
                if stream.primary_opens_another(segment) {
                    self.blocked = true;
                    return None;
                }
                let (note, result) = stream.primary(now, segment, frame, &mut shared.said);
                order.push(serial, note, &mut shared.orders);
                result
            }
            (Kind::Fragments(fragments), Body::Fragment(fragment)) => fragments.primary(now, serial, fragment, frame),
            (Kind::Whole(whole), Body::Whole(shape)) => {
                whole.primary(serial, shape, frame, &mut shared.wholes);
                Ok(())
            }
            _ => return None,
        };
        Some(result)
    }

    /// Compares a frame of the secondary.
    pub(crate) fn secondary(
        &mut self,
        now: Instant,
        parsed: &Frame,
        frame: &[u8],
        hold: &Hold,
        shared: &mut Shared,
    ) -> Result<(), Reason> {
        match (&mut self.kind, &parsed.body) {
            (Kind::Stream(stream, _), Body::Tcp(segment)) => {
                if !self.deferred.is_empty() || stream.secondary_opens_another(segment) {
                    self.deferred_bytes += frame.len();
                    self.deferred.push_back((now, shared.pool.copy(frame)));
                    return Ok(());
                }
                stream.secondary(now, segment, frame, &mut shared.pool)
            }
            (Kind::Fragments(fragments), Body::Fragment(fragment)) => {
                fragments.secondary(now, fragment, &shared.pool.copy(frame))
            }
            (Kind::Whole(whole), Body::Whole(shape)) => {
                whole.secondary(now, shape, frame, hold, shared);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Returns the oldest frame that may leave, and how.
    pub(crate) fn next_to_leave(&self) -> Option<Next> {
        let serial = match &self.kind {
            Kind::Stream(stream, order) => return order.next(stream),
            Kind::Fragments(fragments) => fragments.next()?,
            Kind::Whole(whole) => whole.next()?,
        };
        Some(Next {
            serial,
            leave: Leave::Whole,
            place: Place::Whole,
        })
    }

    /// Passes a frame that may leave, which the secondary has sent as well.
    pub(crate) fn pass(&mut self, next: &Next, frame: Bytes) -> Bytes {
        let (stream, order) = match &mut self.kind {
            Kind::Stream(stream, order) => (stream, order),
            Kind::Fragments(fragments) => return fragments.leave(frame),
            Kind::Whole(whole) => {
                whole.leave();
                return frame;
            }
        };
        let Some(entry) = order.take(next.place) else {
            return frame;
        };
        let segment = entry.note.segment();
        let Leave::Lowered(ack) = next.leave else {
            let frame = leaving(stream, order, &entry, frame);
            return in_time(&mut self.time, segment, frame);
        };
        stream.has_left((!segment.syn).then(|| segment.end_seq()), Some(ack));
        if let Some(full) = segment.ack.filter(|full| *full != ack) {
            self.owed = segment.acknowledgement(&frame, full).map(|frame| {
                Box::new(Owed {
                    segment: *segment,
                    frame,
                    ack: full,
                })
            });
        }
        in_time(&mut self.time, segment, lowered(segment, entry.rest(frame), ack))
    }

    /// Gives back what is only of use while something of it waits.
    pub(crate) fn rest(&mut self, shared: &mut Shared) {
        match &mut self.kind {
            Kind::Stream(_, order) => order.rest(&mut shared.orders),
            Kind::Fragments(_) => {}
            Kind::Whole(whole) => whole.rest(&mut shared.wholes),
        }
    }

    /// Returns since when something has waited of which a part may leave before the rest.
    pub(crate) fn may_begin(&self, hold: &Hold) -> Option<Instant> {
        let Kind::Stream(_, order) = &self.kind else {
            return None;
        };
        let waiting = order.firsts().filter_map(|entry| hold.get(entry.serial));
        waiting.map(|held| held.arrived).min()
    }

    /// Says whether something waits of which a part may leave, and nothing did before.
    pub(crate) fn comes_to_wait(&mut self, hold: &Hold) -> bool {
        if self.begins || self.may_begin(hold).is_none() {
            return false;
        }
        self.begins = true;
        true
    }

    /// Returns what may leave of a held segment though the rest may not: its first bytes, or a lower acknowledgement. With the
    /// serial number of what has waited longest for it.
    pub(crate) fn begin(&mut self, hold: &Hold) -> Option<(u64, Bytes)> {
        self.begin_bytes(hold).or_else(|| self.begin_acknowledgement(hold))
    }

    fn begin_acknowledgement(&mut self, hold: &Hold) -> Option<(u64, Bytes)> {
        let Kind::Stream(stream, order) = &mut self.kind else {
            return None;
        };
        let (first, last) = order.acknowledgements(stream)?;
        let ack = stream.lowers(&last.note)?;
        let segment = last.note.segment();
        let mut begun = lowered(segment, hold.get(last.serial)?.frame.clone(), ack);
        if let Some(end) = order.renumbered(last, stream.left_end()) {
            let mut renumbered = into_mut(begun);
            segment.set_seq(&mut renumbered, end);
            begun = renumbered.freeze();
        }
        stream.has_left(None, Some(ack));
        Some((first.serial, in_time(&mut self.time, segment, begun)))
    }

    fn begin_bytes(&mut self, hold: &Hold) -> Option<(u64, Bytes)> {
        let Kind::Stream(stream, order) = &mut self.kind else {
            return None;
        };
        let Begun {
            serial,
            segment,
            part,
            leave,
        } = order.begin(stream)?;
        let end = if mutants::on(Mutant::BeginTooMuch) {
            segment.end_seq()
        } else {
            part.end
        };
        let mut begun = segment.part(&hold.get(serial)?.frame, part.start..end);
        if let Leave::Lowered(ack) = leave {
            segment.set_ack(&mut begun, ack);
            segment.blank_sack(&mut begun);
            stream.has_left(Some(end), Some(ack));
        } else {
            stream.has_left(Some(end), segment.ack);
        }
        Some((serial, in_time(&mut self.time, segment, Bytes::from(begun))))
    }

    /// Passes the frame that has waited longest by a commit, or on going alone.
    pub(crate) fn pass_unequal(&mut self, serial: u64, arrived: Instant, frame: Bytes, said: &mut Said) -> Bytes {
        match &mut self.kind {
            Kind::Stream(stream, order) => {
                if let Some(entry) = order.take_oldest(serial) {
                    let frame = leaving(stream, order, &entry, frame);
                    return in_time(&mut self.time, entry.note.segment(), frame);
                }
            }
            Kind::Whole(whole) => {
                if whole.take_oldest(serial) {
                    return frame;
                }
            }
            Kind::Fragments(_) => {}
        }
        if self.raw.front() != Some(&serial) {
            return frame;
        }
        self.raw.pop_front();
        if matches!(self.kind, Kind::Whole(_)) {
            return frame;
        }
        match frame::parse(&frame).body {
            Body::Tcp(segment) => {
                self.follow(&segment, Some((&frame, said)));
                in_time(&mut self.time, &segment, without_padding(&segment, frame))
            }
            Body::Fragment(fragment) => {
                self.follow_fragment(arrived, &fragment);
                frame
            }
            Body::Whole(_) => frame,
        }
    }

    /// Keeps up with a fragment of the primary that leaves without being compared.
    pub(crate) fn follow_fragment(&mut self, now: Instant, fragment: &Fragment) {
        if let Kind::Fragments(fragments) = &mut self.kind {
            fragments.follow(now, fragment);
        }
    }

    /// Keeps up with a segment of the primary that leaves without being compared; keeps its bytes if it is given them.
    pub(crate) fn follow(&mut self, segment: &Segment, frame: Option<(&Bytes, &mut Said)>) {
        let Kind::Stream(stream, _) = &mut self.kind else {
            return;
        };
        if stream.primary_opens_another(segment) {
            **stream = Stream::default();
            self.owed = None;
        }
        if let Some((frame, said)) = frame {
            stream.follow(segment, frame, said);
        } else {
            let _note = stream.note(segment);
        }
        has_left(stream, segment);
        if stream.is_far() {
            stream.commit();
        }
    }

    /// Returns an acknowledgement that was owed and may leave now.
    pub(crate) fn pay(&mut self) -> Option<Bytes> {
        let Kind::Stream(stream, order) = &mut self.kind else {
            return None;
        };
        let ack = self.owed.as_ref()?.ack;
        if stream.acknowledged(ack) {
            self.owed = None;
            return None;
        }
        if order.is_barred() || !stream.permits(ack) {
            return None;
        }
        stream.has_left(None, Some(ack));
        let mut owed = self.owed.take()?;
        if let Some(end) = stream.left_end() {
            owed.segment.set_seq(&mut owed.frame, end);
        }
        Some(in_time(&mut self.time, &owed.segment, Bytes::from(owed.frame)))
    }

    /// Lets both sides go on to a new connection on the same ports once both have opened it.
    pub(crate) fn unblock(&mut self, now: Instant, hold: &Hold, shared: &mut Shared) -> Unblocked {
        if !self.blocked || self.deferred.is_empty() {
            return Unblocked::Nothing;
        }
        let Kind::Stream(stream, order) = &mut self.kind else {
            return Unblocked::Nothing;
        };
        if order.len() > 0 {
            stream.poison();
            self.deferred.clear();
            self.deferred_bytes = 0;
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
        while let Some(serial) = self.raw.front().copied()
            && let Some(held) = hold.get(serial)
            && !self.blocked
        {
            let fed = self.primary(held.arrived, serial, &frame::parse(&held.frame), &held.frame, shared);
            result = result.and(fed);
        }
        let deferred = std::mem::take(&mut self.deferred);
        self.deferred_bytes = 0;
        for (arrived, frame) in deferred {
            let fed = self.secondary(arrived.min(now), &frame::parse(&frame), &frame, hold, shared);
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
        self.noted = false;
        self.touched = false;
        self.deferred.clear();
        self.deferred_bytes = 0;
        match &mut self.kind {
            Kind::Stream(stream, _) => {
                if stream.commit() {
                    self.owed = None;
                }
            }
            Kind::Fragments(fragments) => fragments.clear(),
            Kind::Whole(whole) => whole.clear(),
        }
        self.pay()
    }

    /// Returns how many frames or pieces, and bytes, of the secondary wait.
    pub(crate) fn pending(&self) -> (usize, usize) {
        let (frames, bytes) = match &self.kind {
            Kind::Stream(stream, _) => stream.pending(),
            Kind::Fragments(fragments) => fragments.pending(),
            Kind::Whole(whole) => whole.pending(),
        };
        (frames + self.deferred.len(), bytes + self.deferred_bytes)
    }

    /// Returns since when output of the secondary has waited.
    pub(crate) fn waits_since(&self) -> Option<Instant> {
        let compared = match &self.kind {
            Kind::Stream(stream, _) => stream.secondary_waits_since(),
            Kind::Fragments(fragments) => fragments.waits_since(),
            Kind::Whole(whole) => whole.waits_since(),
        };
        let deferred = self.deferred.front().map(|(arrived, _)| *arrived);
        compared.into_iter().chain(deferred).min()
    }

    /// Says whether both sides keep something that fits nothing of the other's.
    pub(crate) fn is_suspect(&self) -> bool {
        match &self.kind {
            Kind::Stream(..) => false,
            Kind::Fragments(fragments) => fragments.is_suspect(),
            Kind::Whole(whole) => whole.is_suspect(),
        }
    }

    /// Says whether it is suspect and was not before.
    pub(crate) fn becomes_suspect(&mut self) -> bool {
        self.is_suspect() && !std::mem::replace(&mut self.suspected, true)
    }

    /// Returns the difference that makes it suspect.
    pub(crate) fn difference(&self, hold: &Hold) -> Option<Reason> {
        match &self.kind {
            Kind::Stream(..) => None,
            Kind::Fragments(fragments) => fragments.difference(),
            Kind::Whole(whole) => whole.difference(hold),
        }
    }

    /// Says whether this side has opened it and the other has said nothing on it yet.
    pub(crate) fn speaks_alone(&self, side: Role) -> bool {
        match &self.kind {
            _ if !has_ports(self.key.class) => false,
            Kind::Stream(stream, _) => stream.opened_by() == Some(side),
            Kind::Whole(whole) => self.tally.matched == 0 && whole.is_of_one_side() == Some(side),
            Kind::Fragments(_) => false,
        }
    }

    pub(crate) fn report(&self) -> FlowReport {
        FlowReport {
            key: self.key,
            tally: self.tally,
            held: self.held(),
            buffered: self.is_buffered(),
            pending: self.pending().0,
            difference: self.difference.as_deref().cloned(),
        }
    }

    /// Returns how many frames of the primary wait.
    fn held(&self) -> usize {
        let compared = match &self.kind {
            Kind::Stream(_, order) => order.len(),
            Kind::Fragments(fragments) => fragments.len(),
            Kind::Whole(whole) => whole.len(),
        };
        compared + self.raw.len()
    }
}

impl Flow for Lane {
    fn key(&self) -> &FlowKey {
        &self.key
    }

    /// What is forgotten is only how far a flow had been settled by the last commit: so it is compared from scratch.
    fn is_idle(&self) -> bool {
        self.held() == 0 && self.deferred.is_empty() && self.owed.is_none() && !self.touched
    }

    fn is_over(&self) -> bool {
        match &self.kind {
            Kind::Stream(stream, _) => stream.is_over(),
            Kind::Fragments(fragments) => fragments.is_over(),
            Kind::Whole(_) => true,
        }
    }

    fn was_used(&mut self) -> bool {
        std::mem::take(&mut self.used)
    }
}

/// Notes that a segment, just taken out of the order, leaves with its own acknowledgement, and returns it as it leaves.
fn leaving(stream: &mut Stream, order: &Order, entry: &Entry, frame: Bytes) -> Bytes {
    let segment = entry.note.segment();
    let frame = entry.rest(without_padding(segment, frame));
    let Some(end) = order.renumbered(entry, stream.left_end()) else {
        has_left(stream, segment);
        return frame;
    };
    stream.has_left(None, segment.ack);
    let mut frame = into_mut(frame);
    segment.set_seq(&mut frame, end);
    frame.freeze()
}

/// Returns a segment that leaves with its own time, or with the latest that has left if something overtook it.
fn in_time(latest: &mut Option<Seq>, segment: &Segment, frame: Bytes) -> Bytes {
    let Some(times) = segment.options.timestamps.filter(|_| !segment.options.signed) else {
        return frame;
    };
    match *latest {
        Some(latest) if !segment.syn && !times.value.after(latest).is_positive() => {
            if times.value == latest || mutants::on(Mutant::SendOldTimes) {
                return frame;
            }
            let mut frame = into_mut(frame);
            segment.set_time(&mut frame, latest);
            frame.freeze()
        }
        _ => {
            *latest = Some(times.value);
            frame
        }
    }
}

fn has_left(stream: &mut Stream, segment: &Segment) {
    if !segment.rst {
        stream.has_left((!segment.syn).then(|| segment.end_seq()), segment.ack);
    }
}

/// Returns the frame with a lower acknowledgement, without SACK blocks and padding.
fn lowered(segment: &Segment, frame: Bytes, ack: Seq) -> Bytes {
    let mut frame = into_mut(frame);
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
