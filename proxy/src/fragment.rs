//! IP fragments of one flow: put together for the comparison, released as the guest sent them.
//!
//! Two sides may cut equal datagrams differently. So each side's fragments are put together by their sender's number, and a
//! datagram that is whole on both sides, and equal, leaves: all of the primary's fragments of it, in its order. The numbers
//! themselves are not compared. What never becomes whole, overlaps or makes no sense waits for the commit.
//!
//! What a commit lets leave of an unfinished datagram is at the receiver, who goes on with whatever comes under its number. If
//! that part is a beginning, both sides go on from there under the same number; anything else under that number is not compared
//! until every receiver has forgotten it, nor is a flow with too many such numbers.
//!
//! Knows one epoch at a time; what it keeps of the primary's is in `hold` too, and of the secondary's bounded by the
//! comparator.

use std::collections::VecDeque;

use bytes::Bytes;
use checkpoint::limits::FRAME_HEADER_BYTES;
use checkpoint::mutants::{self, Mutant};
use checkpoint::{Duration, Instant};

use crate::frame::{Fragment, Shape};
use crate::verdict::{Difference, Fact, Limit, Reason, context};

/// Datagrams of one side that may be unfinished at a time; more are a reason for a checkpoint.
const PARTS_MAX: usize = 64;
/// Fragments of one datagram; one with more waits for the commit.
const PIECES_MAX: usize = 256;
/// Most bytes of a datagram.
const DATAGRAM_MAX: usize = 65_535;
/// How many whole datagrams of the other side are looked at.
const SEARCH_MAX: usize = 16;
/// Unfinished datagrams at the receiver that are remembered; with more the flow is not compared.
const BEGUN_MAX: usize = 16;
/// After so long a receiver has forgotten what it has of a datagram: twice the minute of RFC 8200.
const FORGOTTEN_AFTER: Duration = Duration::from_millis(120_000);

const UDP: u8 = 17;

/// The fragments of one flow.
#[derive(Debug, Default)]
pub(crate) struct Fragments {
    mine: Side,
    theirs: Side,
    /// The primary's that may leave and have not, and where their IP packet ends.
    leaving: VecDeque<(u64, usize)>,
    /// How many of the primary's wait for their equal.
    held: usize,
    /// When the last of the primary's came.
    latest: Instant,
    /// When there were too many unfinished datagrams.
    wary: Option<Instant>,
}

#[derive(Debug, Default)]
struct Side {
    /// Unfinished datagrams, oldest first.
    parts: VecDeque<Datagram>,
    /// Whole datagrams without an equal, oldest first.
    whole: VecDeque<Datagram>,
    /// Datagrams of which the receiver has a part from before the last commit, oldest first.
    begun: VecDeque<Begun>,
    /// Fragments and bytes that are kept.
    kept: (usize, usize),
    /// There was no room for all parts.
    is_over: bool,
}

/// What the receiver has of an unfinished datagram.
#[derive(Clone, Copy, Debug)]
struct Begun {
    datagram: u32,
    /// How much of its beginning, if that is all that has left.
    left: Option<usize>,
    since: Instant,
}

#[derive(Debug)]
struct Datagram {
    number: u32,
    protocol: u8,
    arrived: Instant,
    /// How much of its beginning left before the last commit.
    left: usize,
    /// Sorted, without overlap.
    pieces: Vec<Piece>,
    /// The sum of their bytes, and what is kept in memory for them.
    bytes: usize,
    weight: usize,
    length: Option<usize>,
    /// The headers of the fragment with which it begins, and of the others.
    headers: [Option<Headers>; 2],
    /// Not to be compared.
    is_broken: bool,
}

#[derive(Debug)]
struct Piece {
    at: usize,
    bytes: Bytes,
    /// Of the primary: its serial number, and where its IP packet ends.
    leaves: Option<(u64, usize)>,
}

#[derive(Debug)]
struct Headers {
    bytes: Bytes,
    shape: Shape,
}

impl Fragments {
    /// Takes a fragment of the primary.
    pub(crate) fn primary(
        &mut self,
        now: Instant,
        serial: u64,
        fragment: &Fragment,
        frame: &Bytes,
    ) -> Result<(), Reason> {
        self.latest = self.latest.max(now);
        self.held += 1;
        let leaves = Some((serial, fragment.end));
        let Some(datagram) = self.mine.add(now, fragment, frame, leaves)? else {
            return Ok(());
        };
        let found = self.theirs.whole.iter().take(SEARCH_MAX);
        let found = found.enumerate().find(|(_, other)| datagram.equals(other));
        match found.map(|(at, _)| at) {
            Some(at) => {
                self.theirs.take_whole(at);
                self.matched(&datagram);
            }
            None => self.mine.add_whole(datagram),
        }
        Ok(())
    }

    /// Takes a fragment of the secondary.
    pub(crate) fn secondary(&mut self, now: Instant, fragment: &Fragment, frame: &Bytes) -> Result<(), Reason> {
        let Some(datagram) = self.theirs.add(now, fragment, frame, None)? else {
            return Ok(());
        };
        let found = self.mine.whole.iter().take(SEARCH_MAX);
        let found = found.enumerate().find(|(_, other)| other.equals(&datagram));
        match found.map(|(at, _)| at).and_then(|at| self.mine.take_whole(at)) {
            Some(mine) => self.matched(&mine),
            None => self.theirs.add_whole(datagram),
        }
        Ok(())
    }

    /// Keeps up with a fragment of the primary that leaves without being compared, after all that have been.
    pub(crate) fn follow(&mut self, now: Instant, fragment: &Fragment) {
        if !self.mine.parts.is_empty() {
            self.clear();
        }
        self.latest = self.latest.max(now);
        let begun = self.mine.take_begun(fragment.datagram, now);
        let (at, end) = (fragment.at, fragment.at + fragment.end - fragment.payload);
        let goes_on = begun.map_or(at == 0, |begun| begun.left == Some(at));
        if fragment.more || !goes_on {
            self.remember(fragment.datagram, goes_on.then_some(end));
        }
    }

    /// Returns the fragment of the primary that may leave.
    pub(crate) fn next(&self) -> Option<u64> {
        self.leaving.front().map(|(serial, _)| *serial)
    }

    /// Forgets the fragment that may leave; returns it as it leaves, without the padding that nobody has compared.
    pub(crate) fn leave(&mut self, mut frame: Bytes) -> Bytes {
        if let Some((_, end)) = self.leaving.pop_front() {
            frame.truncate(end);
        }
        frame
    }

    /// Returns how many fragments of the primary wait.
    pub(crate) fn len(&self) -> usize {
        self.held
    }

    /// Returns how many fragments and bytes of the secondary wait.
    pub(crate) fn pending(&self) -> (usize, usize) {
        self.theirs.kept
    }

    /// Returns since when the secondary's oldest fragment has waited.
    pub(crate) fn waits_since(&self) -> Option<Instant> {
        let oldest = [self.theirs.parts.front(), self.theirs.whole.front()];
        oldest.into_iter().flatten().map(|datagram| datagram.arrived).min()
    }

    /// Says whether both sides keep a whole datagram that fits none of the other's.
    pub(crate) fn is_suspect(&self) -> bool {
        !self.mine.whole.is_empty() && !self.theirs.whole.is_empty()
    }

    /// Returns the difference that makes it suspect.
    pub(crate) fn difference(&self) -> Option<Reason> {
        let difference = self.mine.whole.front()?.difference(self.theirs.whole.front()?);
        Some(Reason::Mismatch(difference?))
    }

    /// Says whether there is nothing worth remembering.
    pub(crate) fn is_over(&self) -> bool {
        self.mine.begun.is_empty() && !self.is_wary()
    }

    /// Says whether too many datagrams have left unfinished for it to be compared. Changes at a commit only.
    pub(crate) fn is_wary(&self) -> bool {
        self.wary.is_some()
    }

    /// Begins the next epoch: all that the primary has sent has left.
    pub(crate) fn clear(&mut self) {
        self.held = 0;
        let mine = std::mem::take(&mut self.mine);
        self.mine.begun = mine.begun;
        mine.whole.iter().for_each(|whole| self.mine.finish(whole));
        for part in &mine.parts {
            self.remember(part.number, part.beginning());
        }
        if mine.is_over {
            self.wary = Some(self.latest);
        }
        if self.wary.is_some_and(|since| is_forgotten(since, self.latest)) {
            self.wary = None;
        }
        self.theirs = Side {
            begun: self.mine.begun.clone(),
            ..Side::default()
        };
    }

    /// The receiver has this of an unfinished datagram.
    fn remember(&mut self, datagram: u32, left: Option<usize>) {
        let (begun, now) = (&mut self.mine.begun, self.latest);
        begun.retain(|begun| begun.datagram != datagram && !is_forgotten(begun.since, now));
        begun.push_back(Begun {
            datagram,
            left,
            since: now,
        });
        if begun.len() > BEGUN_MAX {
            begun.pop_front();
            self.wary = Some(now);
        }
    }

    fn matched(&mut self, mine: &Datagram) {
        let mut leaving: Vec<(u64, usize)> = mine.pieces.iter().filter_map(|piece| piece.leaves).collect();
        leaving.sort_unstable();
        self.mine.finish(mine);
        self.theirs.finish(mine);
        self.held -= leaving.len();
        self.leaving.extend(leaving);
    }
}

impl Side {
    /// Adds a fragment; returns its datagram if that is whole now.
    fn add(
        &mut self,
        now: Instant,
        fragment: &Fragment,
        frame: &Bytes,
        leaves: Option<(u64, usize)>,
    ) -> Result<Option<Datagram>, Reason> {
        let same = |part: &Datagram| part.number == fragment.datagram || mutants::on(Mutant::JoinFragments);
        let at = match self.parts.iter().rposition(same) {
            Some(at) => at,
            None if self.parts.len() >= PARTS_MAX => {
                self.is_over = true;
                return Err(Reason::Limit(Limit::Fragments));
            }
            None => {
                let part = self.begin(now, fragment);
                self.parts.push_back(part);
                self.parts.len() - 1
            }
        };
        let part = &mut self.parts[at];
        let before = part.weight();
        part.add(fragment, frame, leaves);
        let after = part.weight();
        let is_whole = part.is_whole();
        self.kept.0 = self.kept.0 + after.0 - before.0;
        self.kept.1 = self.kept.1 + after.1 - before.1;
        let whole = is_whole.then(|| self.parts.remove(at)).flatten();
        Ok(whole.inspect(|whole| self.forget(whole)))
    }

    /// Makes the datagram to which a fragment belongs that belongs to none here.
    fn begin(&mut self, now: Instant, fragment: &Fragment) -> Datagram {
        let begun = self.take_begun(fragment.datagram, now);
        let left = begun.map_or(Some(0), |begun| begun.left.filter(|left| fragment.at >= *left));
        if let (Some(begun), Some(_)) = (begun, left) {
            // The receiver has it until this one has left; nothing else is to come in between.
            self.begun.push_back(Begun { left: None, ..begun });
        }
        Datagram {
            number: fragment.datagram,
            protocol: fragment.protocol,
            arrived: now,
            left: left.unwrap_or(0),
            pieces: Vec::new(),
            bytes: 0,
            weight: 0,
            length: None,
            headers: [None, None],
            is_broken: left.is_none(),
        }
    }

    /// What the receiver had of a datagram is no more: that has left, whole.
    fn finish(&mut self, datagram: &Datagram) {
        if datagram.left > 0 {
            self.begun.retain(|begun| begun.datagram != datagram.number);
        }
    }

    fn take_begun(&mut self, datagram: u32, now: Instant) -> Option<Begun> {
        let at = self.begun.iter().position(|begun| begun.datagram == datagram)?;
        self.begun.remove(at).filter(|begun| !is_forgotten(begun.since, now))
    }

    fn add_whole(&mut self, datagram: Datagram) {
        let (pieces, weight) = datagram.weight();
        self.kept = (self.kept.0 + pieces, self.kept.1 + weight);
        self.whole.push_back(datagram);
    }

    fn take_whole(&mut self, at: usize) -> Option<Datagram> {
        let datagram = self.whole.remove(at);
        datagram.inspect(|datagram| self.forget(datagram))
    }

    fn forget(&mut self, datagram: &Datagram) {
        let (pieces, weight) = datagram.weight();
        self.kept = (self.kept.0 - pieces, self.kept.1 - weight);
    }
}

impl Datagram {
    fn add(&mut self, fragment: &Fragment, frame: &Bytes, leaves: Option<(u64, usize)>) {
        if self.is_broken {
            return;
        }
        let bytes = frame.slice(fragment.payload..fragment.end);
        let place = self.place(fragment, bytes.len());
        let (Some(place), true) = (place, self.has_headers_of(fragment, frame)) else {
            self.is_broken = true;
            self.pieces = Vec::new();
            (self.bytes, self.weight) = (0, 0);
            self.headers = [None, None];
            return;
        };
        if !fragment.more {
            self.length = Some(fragment.at + bytes.len());
        }
        self.bytes += bytes.len();
        self.weight += frame.len();
        let piece = Piece {
            at: fragment.at,
            bytes,
            leaves,
        };
        self.pieces.insert(place, piece);
    }

    /// Returns where among the pieces a fragment belongs; nothing if it does not fit there.
    fn place(&self, fragment: &Fragment, length: usize) -> Option<usize> {
        let (at, end) = (fragment.at, fragment.at + length);
        let place = self.pieces.partition_point(|piece| piece.at < at);
        let free_from = place
            .checked_sub(1)
            .map_or(self.left, |before| self.pieces[before].end());
        let free_until = self.pieces.get(place).map(|piece| piece.at).or(self.length);
        let is_last = self.length.is_none() && place == self.pieces.len();
        let fits = length > 0
            && end <= DATAGRAM_MAX
            && at >= free_from
            && free_until.is_none_or(|until| end <= until)
            && (if fragment.more {
                length.is_multiple_of(8)
            } else {
                is_last
            })
            && self.pieces.len() < PIECES_MAX;
        fits.then_some(place)
    }

    /// Says whether a fragment's headers are those of the datagram's others, for the policy; keeps the first of each kind.
    fn has_headers_of(&mut self, fragment: &Fragment, frame: &Bytes) -> bool {
        let kept = &mut self.headers[usize::from(fragment.at > 0)];
        if let Some(headers) = kept {
            return headers.shape.equal(&headers.bytes, &fragment.headers, frame);
        }
        *kept = Some(Headers {
            bytes: frame.slice(..fragment.payload),
            shape: fragment.headers,
        });
        true
    }

    fn is_whole(&self) -> bool {
        !self.is_broken && self.length == Some(self.left + self.bytes)
    }

    /// Returns how much of its beginning is here, if that is all.
    fn beginning(&self) -> Option<usize> {
        let end = self.pieces.last().map_or(self.left, Piece::end);
        (!self.is_broken && self.length.is_none() && self.left + self.bytes == end).then_some(end)
    }

    fn weight(&self) -> (usize, usize) {
        (self.pieces.len(), self.weight)
    }

    /// Says whether this one of the primary and that of the secondary are equal for the policy.
    fn equals(&self, other: &Self) -> bool {
        self.difference(other).is_none()
    }

    fn difference(&self, other: &Self) -> Option<Difference> {
        let goes_on = self.left > 0 || other.left > 0;
        if goes_on && (self.left, self.number) != (other.left, other.number) {
            return Some(difference(0, &[], &[]));
        }
        for (mine, theirs) in self.headers.iter().zip(&other.headers) {
            match (mine, theirs) {
                (Some(mine), Some(theirs)) => {
                    let (bytes, other_bytes) = (&mine.bytes, &theirs.bytes);
                    if let Some(at) = mine.shape.first_difference(bytes, &theirs.shape, other_bytes) {
                        return Some(difference(
                            at.saturating_sub(FRAME_HEADER_BYTES),
                            &bytes[at.min(bytes.len())..],
                            &other_bytes[at.min(other_bytes.len())..],
                        ));
                    }
                }
                (None, None) => {}
                _ => return Some(difference(0, &[], &[])),
            }
        }
        let (mut mine, mut theirs) = (self.runs(), other.runs());
        loop {
            let n = mine.rest.len().min(theirs.rest.len());
            if n == 0 {
                let ends_alike = mine.rest.len() == theirs.rest.len();
                return (!ends_alike).then(|| difference(mine.at, mine.rest, theirs.rest));
            }
            let same = mine.rest[..n].iter().zip(&theirs.rest[..n]);
            let unequal = same.enumerate().position(|(offset, (a, b))| {
                // The checksum of a UDP datagram.
                let is_ignored = self.protocol == UDP && (6..8).contains(&(mine.at + offset));
                a != b && !is_ignored
            });
            if let Some(offset) = unequal {
                return Some(difference(
                    mine.at + offset,
                    &mine.rest[offset..],
                    &theirs.rest[offset..],
                ));
            }
            mine.skip(n);
            theirs.skip(n);
        }
    }

    /// Returns its bytes, which are behind each other once it is whole.
    fn runs(&self) -> Runs<'_> {
        let mut runs = Runs {
            at: self.left,
            rest: &[],
            pieces: self.pieces.iter(),
        };
        runs.skip(0);
        runs
    }
}

/// The bytes of a datagram, piece by piece.
struct Runs<'a> {
    at: usize,
    rest: &'a [u8],
    pieces: std::slice::Iter<'a, Piece>,
}

impl Runs<'_> {
    fn skip(&mut self, bytes: usize) {
        self.at += bytes;
        self.rest = &self.rest[bytes..];
        if self.rest.is_empty()
            && let Some(piece) = self.pieces.next()
        {
            self.rest = &piece.bytes;
        }
    }
}

impl Piece {
    fn end(&self) -> usize {
        self.at + self.bytes.len()
    }
}

fn is_forgotten(since: Instant, now: Instant) -> bool {
    now.since(since) > FORGOTTEN_AFTER
}

fn difference(at: usize, mine: &[u8], theirs: &[u8]) -> Difference {
    Difference {
        fact: Fact::Bytes,
        offset: at as u64,
        primary: context(mine, 0),
        secondary: context(theirs, 0),
    }
}

#[cfg(test)]
mod tests;
