//! Frames that are compared whole: everything but TCP streams and IP fragments.
//!
//! A frame leaves when the other side has sent the same, whatever came before it: these protocols promise no order, and
//! what one side alone has sent must not hold up what both have. When both sides keep something that fits nothing of the
//! other's for longer than the reorder window, they differ.
//!
//! Knows one epoch at a time; the primary's frames stay in `hold`.

use std::collections::VecDeque;

use bytes::Bytes;
use checkpoint::limits::FRAME_HEADER_BYTES;
use checkpoint::{Instant, Role};

use crate::frame::Shape;
use crate::hold::Hold;
use crate::shared::{Lent, Room, Shared, Spare};
use crate::verdict::{Difference, Fact, Reason, context};

/// How many waiting frames of the other side are looked at.
const SEARCH_MAX: usize = 16;

/// The frames of one flow that have not found their equal.
#[derive(Debug, Default)]
pub(crate) struct Whole {
    queues: Lent<Queues>,
    /// One of the primary's that found its equal and has not left.
    equal: Option<u64>,
    waiting_bytes: usize,
}

#[derive(Debug, Default)]
pub(crate) struct Queues {
    /// The primary's, oldest first.
    unequal: VecDeque<(u64, Shape)>,
    /// The secondary's, oldest first.
    waiting: VecDeque<(Bytes, Shape, Instant)>,
}

impl Room for Queues {
    fn room(&self) -> usize {
        self.unequal.capacity() + self.waiting.capacity()
    }
}

impl Whole {
    /// Takes a frame of the primary.
    pub(crate) fn primary(&mut self, serial: u64, shape: &Shape, frame: &[u8], spare: &mut Spare<Queues>) {
        let queues = self.queues.get_or_take(spare);
        let mut searched = queues.waiting.iter().take(SEARCH_MAX);
        let found = searched.position(|(bytes, other, _)| shape.equal(frame, other, bytes));
        match found.and_then(|at| queues.waiting.remove(at)) {
            Some((bytes, ..)) => {
                self.waiting_bytes -= bytes.len();
                self.equal = Some(serial);
            }
            None => queues.unequal.push_back((serial, *shape)),
        }
    }

    /// Takes a frame of the secondary.
    pub(crate) fn secondary(&mut self, now: Instant, shape: &Shape, frame: &[u8], hold: &Hold, shared: &mut Shared) {
        let queues = self.queues.get_or_take(&mut shared.wholes);
        let found = queues.unequal.iter().take(SEARCH_MAX).position(|(serial, other)| {
            let held = hold.get(*serial);
            held.is_some_and(|held| other.equal(&held.frame, shape, frame))
        });
        if let Some((serial, _)) = found.and_then(|at| queues.unequal.remove(at)) {
            self.equal = Some(serial);
        } else {
            self.waiting_bytes += frame.len();
            queues.waiting.push_back((shared.pool.copy(frame), *shape, now));
        }
    }

    /// Returns the frame of the primary that may leave.
    pub(crate) fn next(&self) -> Option<u64> {
        self.equal
    }

    /// Forgets the frame that may leave.
    pub(crate) fn leave(&mut self) {
        self.equal = None;
    }

    /// Takes out the frame of the primary that has waited longest, if it is this one.
    pub(crate) fn take_oldest(&mut self, serial: u64) -> bool {
        let Some(queues) = self.queues.get_mut() else {
            return false;
        };
        let is_it = queues.unequal.front().is_some_and(|(first, _)| *first == serial);
        if is_it {
            queues.unequal.pop_front();
        }
        is_it
    }

    /// Returns how many frames of the primary wait.
    pub(crate) fn len(&self) -> usize {
        self.queues.get().map_or(0, |queues| queues.unequal.len())
    }

    /// Does without queues as long as there is nothing to put in.
    pub(crate) fn rest(&mut self, spare: &mut Spare<Queues>) {
        let has_any = |queues: &Queues| !queues.unequal.is_empty() || !queues.waiting.is_empty();
        if !self.queues.get().is_some_and(has_any) {
            self.queues.give_back(spare);
        }
    }

    /// Returns how many frames and bytes of the secondary wait.
    pub(crate) fn pending(&self) -> (usize, usize) {
        (
            self.queues.get().map_or(0, |queues| queues.waiting.len()),
            self.waiting_bytes,
        )
    }

    /// Returns since when the secondary's oldest frame has waited.
    pub(crate) fn waits_since(&self) -> Option<Instant> {
        self.queues.get()?.waiting.front().map(|(_, _, arrived)| *arrived)
    }

    /// Says whether both sides keep something that fits nothing of the other's.
    pub(crate) fn is_suspect(&self) -> bool {
        self.len() > 0 && self.pending().0 > 0
    }

    /// Says whose frames wait, if they are of one side only.
    pub(crate) fn is_of_one_side(&self) -> Option<Role> {
        match (self.len() == 0, self.pending().0 == 0) {
            (false, true) => Some(Role::Primary),
            (true, false) => Some(Role::Secondary),
            _ => None,
        }
    }

    /// Returns the difference that makes it suspect.
    pub(crate) fn difference(&self, hold: &Hold) -> Option<Reason> {
        let queues = self.queues.get()?;
        let (theirs, their_shape, _) = queues.waiting.front()?;
        let (serial, shape) = queues.unequal.front()?;
        let mine = &hold.get(*serial)?.frame;
        let at = shape.first_difference(mine, their_shape, theirs).unwrap_or(0);
        Some(Reason::Mismatch(Difference {
            fact: Fact::Bytes,
            offset: at.saturating_sub(FRAME_HEADER_BYTES) as u64,
            primary: context(mine, at),
            secondary: context(theirs, at),
        }))
    }

    /// Begins the next epoch.
    pub(crate) fn clear(&mut self) {
        if let Some(queues) = self.queues.get_mut() {
            queues.waiting.clear();
        }
        self.waiting_bytes = 0;
    }
}
