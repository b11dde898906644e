//! One TCP connection as the two sides' byte streams.
//!
//! The comparator feeds every segment of either side; bytes are compared by their place in the
//! stream, so segmentation, retransmission and order do not matter. [`Stream::leave`] then says
//! whether a segment of the primary may leave. Everything before the position that the last commit
//! covers is settled; what both sides have sent since then becomes settled as it is found equal.
//!
//! The two sides' sequence numbers are in the clients' space, but for a connection that was opened in
//! this epoch: there each side's SYN carries its own number, and the secondary's following segments
//! are translated once its host has learnt the offset. So each side has an anchor of its own.
//!
//! Never holds a frame, never reads a clock; knows one epoch at a time.

mod begin;
mod note;

use std::ops::Range;

use bytes::Bytes;
use checkpoint::frames::FramePool;
use checkpoint::mutants::{self, Mutant};
use checkpoint::{Instant, Role};

use crate::frame::{Offer, Segment};
use crate::said::{Said, Thread};
use crate::seq::Seq;
use crate::settle::settle;
use crate::span::{Chunks, Ranges, length};
use crate::verdict::{Difference, Fact, Limit, Reason, context};

pub(crate) use note::{Leave, Note, Turn};

/// The position of a connection's first known sequence number; leaves room below for late retransmissions.
pub(crate) const ORIGIN: u64 = 1 << 40;
/// More gaps than this in what is settled are a reason for a checkpoint.
const GAPS_MAX: usize = 256;
/// More pieces than this that wait in one stream are a reason for a checkpoint.
const CHUNKS_MAX: usize = 16_384;
/// Initial sequence numbers closer than this do not tell whether a segment is translated; it is taken to be, unless the
/// first one was not.
const ISN_NEAR: u32 = 1 << 20;
/// Urgent positions of the secondary that are remembered.
const URGENT_MAX: usize = 4;

/// One connection, or what is known of it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stream {
    primary: Side,
    secondary: Side,
    /// What both have sent, and what a commit covers.
    settled: Ranges,
    /// What the primary has said lately.
    thread: Thread,
    committed_isn: Option<Seq>,
    committed_fin: Option<u64>,
    committed_urgent: Option<u64>,
    /// The highest acknowledgement, and SACK edge, that may leave.
    permitted: Option<Seq>,
    permitted_sack: Option<Seq>,
    /// The highest acknowledgement that has left.
    left: Option<Seq>,
    /// After the last number that has left, unless that was a SYN's.
    left_end: Option<Seq>,
    /// Diverged in this epoch: nothing more becomes settled until a commit.
    poisoned: bool,
}

/// What one side has sent.
#[derive(Clone, Debug, Default)]
struct Side {
    /// Its SYN's sequence number.
    isn: Option<Seq>,
    /// It has sent nothing but its SYN: the next segment tells where its stream begins.
    opening: bool,
    /// The secondary's stream begins in its own numbers: its host did not know the offset yet.
    untranslated: bool,
    /// A sequence number and its position.
    anchor: Option<(Seq, u64)>,
    /// What its SYN offered, without and with ACK.
    offers: [Option<Offer>; 2],
    fin: Option<u64>,
    rst: bool,
    /// The latest first.
    urgent: Vec<u64>,
    ack: Option<Seq>,
    sack: Option<Seq>,
    /// Position and byte of its last keep-alive probe: the stream's last byte, or any other.
    probe: Option<(u64, u8)>,
    /// After its last byte, and after its last byte or FIN.
    data_end: u64,
    end: u64,
    chunks: Chunks,
    /// When its last SYN, FIN or RST came.
    fact_at: Instant,
}

impl Stream {
    /// Says whether this segment of the primary opens another connection than the one known.
    pub(crate) fn primary_opens_another(&self, segment: &Segment) -> bool {
        segment.syn && (self.primary.anchor.is_some() || self.primary.rst) && self.primary.isn != Some(segment.seq)
    }

    /// Says whether this segment of the secondary opens another connection than the one known.
    pub(crate) fn secondary_opens_another(&self, segment: &Segment) -> bool {
        segment.syn
            && (self.secondary.anchor.is_some() || self.secondary.rst)
            && self.secondary.isn != Some(segment.seq)
            && self.primary.isn != Some(segment.seq)
    }

    /// Takes a segment of the primary and returns what it needs to leave, and what is wrong.
    pub(crate) fn primary(
        &mut self,
        now: Instant,
        segment: &Segment,
        frame: &Bytes,
        said: &mut Said,
    ) -> (Note, Result<(), Reason>) {
        let known = self.primary.data_end;
        let note = self.note(segment);
        let again = self.compare_again(known, &note, frame, said);
        self.keep(known, &note, frame, said);
        let result = if self.poisoned {
            Ok(())
        } else {
            again.and_then(|()| self.compare_primary(now, &note, frame))
        };
        (note, self.checked(result))
    }

    /// Follows a frame of the primary that leaves by a commit, uncompared.
    pub(crate) fn follow(&mut self, segment: &Segment, frame: &[u8], said: &mut Said) {
        let known = self.primary.data_end;
        let note = self.note(segment);
        self.keep(known, &note, frame, said);
    }

    /// Takes a segment of the secondary and returns what is wrong.
    pub(crate) fn secondary(
        &mut self,
        now: Instant,
        segment: &Segment,
        frame: &[u8],
        pool: &mut FramePool,
    ) -> Result<(), Reason> {
        let side = &mut self.secondary;
        side.ack = Seq::later_known(side.ack, segment.ack);
        side.sack = Seq::later_known(side.sack, segment.options.sack);
        self.permitted = Seq::later_known(self.permitted, segment.ack);
        self.permitted_sack = Seq::later_known(self.permitted_sack, segment.options.sack);
        if self.poisoned {
            return Ok(());
        }
        let result = self.compare_secondary(now, segment, frame, pool);
        self.checked(result)
    }

    /// Follows the primary without comparing: its output leaves at once, or a commit is about to cover it.
    pub(crate) fn note(&mut self, segment: &Segment) -> Note {
        let data_seq = segment.data_seq();
        let occupies = segment.length() > 0 || segment.fin || segment.syn;
        if self.primary.anchor.is_none() && occupies {
            self.anchor_primary(segment);
        }
        let side = &mut self.primary;
        if segment.syn {
            side.opening = segment.length() == 0;
        } else if occupies
            && !segment.rst
            && core::mem::take(&mut side.opening)
            && let Some((known, _)) = side.anchor
            && data_seq != known
            && !mutants::on(Mutant::KeepOwnNumbers)
        {
            // After a takeover the SYN leaves as this guest numbers it, and what follows as its peer knows the connection. A
            // guest begins its stream at the beginning, so any other number, however near, is that.
            side.anchor = Some((data_seq, side.end));
            self.left_end = None;
        }
        let start = position(side.anchor, data_seq);
        let data = start..start + u64::from(segment.length());
        let mut note = Note {
            data,
            fin: None,
            syn: None,
            rst: segment.rst,
            urgent: None,
            turn: side.turn(segment, start),
            segment: *segment,
        };
        if segment.syn {
            side.isn = Some(segment.seq);
            side.offers[usize::from(segment.ack.is_some())] = Some(segment.options.offer);
            note.syn = Some((segment.seq, segment.ack.is_some()));
        }
        if segment.fin {
            note.fin = Some(note.data.end);
            side.fin = note.fin;
        }
        if let Some(pointer) = segment.urgent {
            note.urgent = Some(start + u64::from(pointer));
            // Forgotten ones of the primary only make it wait.
            let _forgotten = remember(&mut side.urgent, start + u64::from(pointer));
        }
        side.rst |= segment.rst;
        if !segment.rst {
            side.ack = Seq::later_known(side.ack, segment.ack);
            side.sack = Seq::later_known(side.sack, segment.options.sack);
        }
        if occupies {
            side.extend(segment, &note.data);
            // The anchor follows, so that positions stay right however often the numbers wrap.
            if side.end == note.data.end + u64::from(segment.fin) {
                side.anchor = Some((segment.end_seq(), side.end));
            }
        }
        note
    }

    /// Says whether a segment of the primary may leave now.
    pub(crate) fn leave(&self, note: &Note) -> Leave {
        if !self.content_may_leave(note) {
            return Leave::Wait;
        }
        let segment = &note.segment;
        let Some(ack) = segment.ack else { return Leave::Whole };
        let Some(permitted) = self.permitted else {
            return Leave::Wait;
        };
        let ack_may = ack.at_most(permitted) || mutants::on(Mutant::AcknowledgeUnconfirmed);
        let sack_may = segment.options.sack.is_none_or(|edge| {
            edge.at_most(permitted) || self.permitted_sack.is_some_and(|permitted| edge.at_most(permitted))
        });
        if ack_may && sack_may {
            return Leave::Whole;
        }
        // An acknowledgement alone waits; so does one that gives a SYN or RST its meaning, or that is signed.
        if note.data.is_empty() && note.fin.is_none() || segment.syn || segment.rst || segment.options.signed {
            return Leave::Wait;
        }
        let lowered = if ack_may { ack } else { permitted };
        if self.left.is_some_and(|left| !left.at_most(lowered) && !ack_may) {
            Leave::Wait
        } else if mutants::on(Mutant::LowerNothing) {
            Leave::Whole
        } else {
            Leave::Lowered(lowered)
        }
    }

    /// Notes the end and the acknowledgement of a segment that has left.
    pub(crate) fn has_left(&mut self, end: Option<Seq>, ack: Option<Seq>) {
        self.left = Seq::later_known(self.left, ack);
        self.left_end = Seq::later_known(self.left_end, end);
    }

    /// Returns the number after the last that has left, as the client knows it.
    pub(crate) fn left_end(&self) -> Option<Seq> {
        self.left_end
    }

    /// Says whether this acknowledgement may leave.
    pub(crate) fn permits(&self, ack: Seq) -> bool {
        self.permitted.is_some_and(|permitted| ack.at_most(permitted))
    }

    /// Says whether an acknowledgement at least as high has left.
    pub(crate) fn acknowledged(&self, ack: Seq) -> bool {
        self.left.is_some_and(|left| ack.at_most(left))
    }

    /// Settles everything the primary has sent; the secondary goes on from there. Says whether the connection is over,
    /// so that nothing is known any more.
    pub(crate) fn commit(&mut self) -> bool {
        if self.primary.rst {
            *self = Self::default();
            return true;
        }
        let primary = &mut self.primary;
        primary.chunks.clear();
        primary.offers = [None; 2];
        if primary.urgent.is_empty() {
            primary.urgent.extend(self.committed_urgent);
        }
        if primary.anchor.is_some() {
            self.thread.move_back(primary.end.wrapping_sub(ORIGIN));
        }
        primary.rebase();
        self.settled = if primary.anchor.is_some() {
            Ranges::until(primary.end)
        } else {
            Ranges::default()
        };
        self.committed_isn = primary.isn;
        self.committed_fin = primary.fin;
        self.committed_urgent = core::mem::take(&mut primary.urgent).first().copied();
        self.permitted = primary.ack;
        self.permitted_sack = primary.sack;
        self.secondary = Side {
            isn: primary.isn,
            anchor: primary.anchor,
            ..Side::default()
        };
        self.poisoned = false;
        false
    }

    /// Says whether positions have moved so far that a commit should move them back.
    pub(crate) fn is_far(&self) -> bool {
        self.primary.end > ORIGIN << 8
    }

    /// Stops comparing until the next commit.
    pub(crate) fn poison(&mut self) {
        self.poisoned = true;
        self.primary.chunks.clear();
        self.secondary.chunks.clear();
    }

    /// Says which side alone has opened the connection since the last commit, towards the other end.
    pub(crate) fn opened_by(&self) -> Option<Role> {
        let (one, other) = (&self.primary, &self.secondary);
        if one.offers[0].is_some() && self.committed_isn != one.isn && other.offers[0].is_none() {
            Some(Role::Primary)
        } else if other.offers[0].is_some() && one.isn.is_none() {
            Some(Role::Secondary)
        } else {
            None
        }
    }

    /// Says whether the primary has ended the connection, so that there is little to remember.
    pub(crate) fn is_over(&self) -> bool {
        self.primary.rst || self.primary.fin.is_some() || self.primary.anchor.is_none()
    }

    /// Returns how many pieces and bytes of the secondary wait.
    pub(crate) fn pending(&self) -> (usize, usize) {
        (self.secondary.chunks.count(), self.secondary.chunks.bytes())
    }

    /// Returns since when output of the secondary has waited for the primary's.
    pub(crate) fn secondary_waits_since(&self) -> Option<Instant> {
        if self.poisoned {
            return None;
        }
        let (one, other) = (&self.primary, &self.secondary);
        let fin = other.fin.is_some() && one.fin.is_none();
        let syn = other.offers.iter().flatten().next().is_some() && one.isn.is_none();
        let facts = (fin || syn || (other.rst && !one.rst)).then_some(other.fact_at);
        match (other.chunks.oldest(), facts) {
            (Some(chunk), Some(fact)) => Some(chunk.min(fact)),
            (chunk, fact) => chunk.or(fact),
        }
    }

    fn content_may_leave(&self, note: &Note) -> bool {
        if !self.settled.covers(&note.data) {
            return false;
        }
        if let Some((isn, with_ack)) = note.syn
            && self.committed_isn != Some(isn)
            && !(self.primary.isn == Some(isn)
                && self.secondary.offers[usize::from(with_ack)] == Some(note.segment.options.offer))
        {
            return false;
        }
        if let Some(fin) = note.fin
            && self.committed_fin != Some(fin)
            && (self.secondary.fin != Some(fin) || self.poisoned)
            && !mutants::on(Mutant::IgnoreFin)
        {
            return false;
        }
        if let Some(urgent) = note.urgent
            && !self.is_urgent(&self.secondary, urgent)
        {
            return false;
        }
        let marks = self.secondary.urgent.iter();
        for &urgent in marks.filter(|&&urgent| note.data.start < urgent && urgent <= note.data.end) {
            // The primary may mark it yet, with its next segment.
            if !self.is_urgent(&self.primary, urgent) && !mutants::on(Mutant::IgnoreUrgent) {
                return false;
            }
        }
        !note.rst || self.secondary.rst
    }

    /// Compares the bytes that the primary has said before with what it said then. Those of which that is not known any
    /// more, or that differ, are not settled: the secondary has to say them, too.
    fn compare_again(&mut self, known: u64, note: &Note, frame: &[u8], said: &Said) -> Result<(), Reason> {
        let again = note.data.start..note.data.end.min(known);
        if again.is_empty() || mutants::on(Mutant::PassRepeated) {
            return Ok(());
        }
        let payload = &frame[note.segment.payload..][..length(&again)];
        let is_probe = payload.len() == 1 && note.data.end == known;
        if is_probe && self.secondary.probe == Some((again.start, payload[0])) {
            return Ok(());
        }
        let settled = &mut self.settled;
        let compared = said.compare(&self.thread, again.start, payload, |unknown| settled.remove(unknown));
        let Err(differs) = compared else { return Ok(()) };
        settled.remove(again.clone());
        if is_probe {
            return Ok(());
        }
        Err(Reason::Mismatch(Difference {
            fact: Fact::Resent,
            offset: differs.position.saturating_sub(ORIGIN),
            primary: context(payload, length(&(again.start..differs.position))),
            secondary: differs.before,
        }))
    }

    /// Keeps what is new of a segment of the primary.
    fn keep(&mut self, known: u64, note: &Note, frame: &[u8], said: &mut Said) {
        let start = note.data.start.max(known);
        if start < note.data.end {
            let skipped = length(&(note.data.start..start));
            let bytes = &frame[note.segment.payload + skipped..note.segment.end];
            said.add(&mut self.thread, start, bytes);
        }
    }

    fn compare_primary(&mut self, now: Instant, note: &Note, frame: &Bytes) -> Result<(), Reason> {
        if !note.data.is_empty() {
            let Segment { payload, end, .. } = note.segment;
            settle(
                &mut self.settled,
                &mut self.primary.chunks,
                &mut self.secondary.chunks,
                now,
                note.data.start,
                &frame[payload..end],
                |part| frame.slice(payload + part.start..payload + part.end),
            )
            .map_err(|found| found.into_reason(true))?;
        }
        self.compare_facts()
    }

    fn compare_secondary(
        &mut self,
        now: Instant,
        segment: &Segment,
        frame: &[u8],
        pool: &mut FramePool,
    ) -> Result<(), Reason> {
        if segment.syn || segment.fin || segment.rst {
            self.secondary.fact_at = now;
        }
        self.secondary.rst |= segment.rst;
        if segment.syn {
            self.secondary.offers[usize::from(segment.ack.is_some())] = Some(segment.options.offer);
            if self.secondary.anchor.is_none() {
                self.secondary.isn = Some(segment.seq);
                self.secondary.anchor = Some((segment.seq, ORIGIN));
                self.secondary.opening = true;
            }
        } else if (segment.length() > 0 || segment.fin) && core::mem::take(&mut self.secondary.opening) {
            let own = self.secondary.isn.map(|isn| isn.plus(1));
            self.secondary.untranslated = own == Some(segment.seq);
        }
        if self.secondary.untranslated && self.is_near() {
            // Nobody can tell which of its segments are in whose numbers.
            self.poison();
            return Ok(());
        }
        if segment.length() > 0 || segment.fin || segment.urgent.is_some() {
            let start = self.secondary_position(segment);
            let data = start..start + u64::from(segment.length());
            if segment.length() == 1 && data.end == self.primary.data_end {
                self.secondary.probe = Some((start, frame[segment.payload]));
            }
            self.secondary.extend(segment, &data);
            if segment.fin {
                self.secondary.fin = Some(data.end);
            }
            if let Some(pointer) = segment.urgent
                && let Some(forgotten) = remember(&mut self.secondary.urgent, start + u64::from(pointer))
                && !self.is_urgent(&self.primary, forgotten)
            {
                return Err(fact(Fact::Urgent, forgotten.saturating_sub(ORIGIN)));
            }
            if !data.is_empty() {
                let payload = &frame[segment.payload..segment.end];
                settle(
                    &mut self.settled,
                    &mut self.secondary.chunks,
                    &mut self.primary.chunks,
                    now,
                    start,
                    payload,
                    // Copied: its frame is a part of what a link has read at once.
                    |part| pool.copy(&payload[part]),
                )
                .map_err(|found| found.into_reason(false))?;
            }
        }
        self.compare_facts()
    }

    fn compare_facts(&self) -> Result<(), Reason> {
        let (one, other) = (&self.primary, &self.secondary);
        for (mine, theirs) in one.offers.iter().zip(&other.offers) {
            if let (Some(mine), Some(theirs)) = (mine, theirs)
                && mine != theirs
            {
                return Err(fact(Fact::Offer, 0));
            }
        }
        let ends_early = |fin: Option<u64>, data_end: u64| fin.is_some_and(|fin| fin < data_end);
        let differ = matches!((one.fin, other.fin), (Some(mine), Some(theirs)) if mine != theirs);
        if differ || ends_early(one.fin, other.data_end) || ends_early(other.fin, one.data_end) {
            let at = one.fin.into_iter().chain(other.fin).min().unwrap_or(ORIGIN);
            return Err(fact(Fact::StreamEnd, at.saturating_sub(ORIGIN)));
        }
        // A side that has sent the byte after an urgent position does not mark it any more.
        for (marking, silent) in [(one, other), (other, one)] {
            let mut marks = marking.urgent.iter();
            let new = ORIGIN..silent.data_end;
            if let Some(urgent) = marks.find(|&urgent| new.contains(urgent) && !self.is_urgent(silent, *urgent)) {
                return Err(fact(Fact::Urgent, urgent.saturating_sub(ORIGIN)));
            }
        }
        Ok(())
    }

    /// Says whether this side, or both up to the last commit, have marked this position as urgent.
    fn is_urgent(&self, side: &Side, position: u64) -> bool {
        side.urgent.contains(&position) || self.committed_urgent == Some(position)
    }

    fn checked(&mut self, result: Result<(), Reason>) -> Result<(), Reason> {
        let full = self.settled.count() > GAPS_MAX
            || self.primary.chunks.count() > CHUNKS_MAX
            || self.secondary.chunks.count() > CHUNKS_MAX;
        let result = result.and(if full { Err(Reason::Limit(Limit::Gaps)) } else { Ok(()) });
        if result.is_err() {
            self.poison();
        }
        result
    }

    fn anchor_primary(&mut self, segment: &Segment) {
        if segment.syn {
            self.primary.isn = Some(segment.seq);
            self.primary.anchor = Some((segment.seq, ORIGIN));
        } else if let (Some(anchor), None) = (self.secondary.anchor, self.secondary.isn) {
            self.primary.anchor = Some(anchor);
        } else {
            self.primary.anchor = Some((segment.data_seq(), ORIGIN));
            if self.secondary.anchor.is_none() {
                self.secondary.anchor = self.primary.anchor;
            }
        }
    }

    /// Says whether the two sides chose initial numbers that differ by so little that a number does not tell whose it is.
    fn is_near(&self) -> bool {
        matches!((self.primary.isn, self.secondary.isn), (Some(mine), Some(theirs))
            if mine != theirs && mine.after(theirs).unsigned_abs() < ISN_NEAR)
    }

    /// Returns the position of a segment's first byte of the secondary, translated already or not.
    fn secondary_position(&mut self, segment: &Segment) -> u64 {
        let seq = segment.data_seq();
        let own = self.secondary.anchor;
        let Some((primary_seq, _)) = self.primary.anchor else {
            if own.is_none() {
                self.secondary.anchor = Some((seq, ORIGIN));
            }
            return position(self.secondary.anchor, seq);
        };
        let translated = match (self.primary.isn, self.secondary.isn, own) {
            // Its SYN, and TCP Fast Open data in it, is never translated while the numbers differ.
            (Some(_), Some(theirs), Some(anchor)) if self.primary.isn != Some(theirs) => {
                let near = self.is_near();
                let to_primary = seq.after(primary_seq).unsigned_abs();
                let to_own = seq.after(anchor.0).unsigned_abs();
                !(segment.syn && segment.seq == theirs) && (near || to_primary <= to_own)
            }
            _ => true,
        };
        position(if translated { self.primary.anchor } else { own }, seq)
    }
}

impl Side {
    /// Returns the turn of a segment that has not been added, by the position of its first byte.
    fn turn(&self, segment: &Segment, start: u64) -> Turn {
        let (length, signed) = (segment.length(), segment.options.signed);
        if segment.syn || segment.fin || segment.rst || segment.urgent.is_some() {
            Turn::InOrder
        } else if length == 0 && start >= self.end {
            // It may have to be renumbered, so it must be known how.
            if signed || self.opening {
                Turn::InOrder
            } else {
                Turn::Acknowledgement
            }
        } else if start + u64::from(length) <= self.end {
            Turn::Again
        } else {
            Turn::InOrder
        }
    }

    fn extend(&mut self, segment: &Segment, data: &Range<u64>) {
        if !data.is_empty() {
            self.data_end = self.data_end.max(data.end);
        }
        let end = data.end + u64::from(segment.fin);
        self.end = self.end.max(end);
    }

    /// Counts positions from the end of what has been sent.
    fn rebase(&mut self) {
        let Some((_, anchor)) = &mut self.anchor else { return };
        let shift = self.end.wrapping_sub(ORIGIN);
        *anchor = anchor.wrapping_sub(shift);
        self.end = ORIGIN;
        if self.data_end > 0 {
            self.data_end = self.data_end.wrapping_sub(shift);
        }
        self.fin = self.fin.map(|fin| fin.wrapping_sub(shift));
        for urgent in &mut self.urgent {
            *urgent = urgent.wrapping_sub(shift);
        }
    }
}

fn fact(fact: Fact, offset: u64) -> Reason {
    Reason::Mismatch(Difference {
        fact,
        offset,
        primary: Vec::new(),
        secondary: Vec::new(),
    })
}

fn position(anchor: Option<(Seq, u64)>, seq: Seq) -> u64 {
    anchor.map_or(ORIGIN, |(known, at)| {
        at.saturating_add_signed(i64::from(seq.after(known)))
    })
}

/// Adds an urgent position; returns the one for which there is no more room.
fn remember(urgent: &mut Vec<u64>, position: u64) -> Option<u64> {
    if urgent.contains(&position) {
        return None;
    }
    urgent.insert(0, position);
    if urgent.len() > URGENT_MAX { urgent.pop() } else { None }
}
