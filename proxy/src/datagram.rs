//! Frames that are compared whole: everything but TCP streams and IP fragments.
//!
//! A frame leaves when the other side has sent the same, whatever came before it: these protocols promise no order, and
//! what one side alone has sent must not hold up what both have. When both sides keep something that fits nothing of the
//! other's for longer than the reorder window, they differ.
//!
//! Knows one epoch at a time; the primary's frames stay in `hold`.

use std::collections::VecDeque;

use bytes::Bytes;
use checkpoint::{Instant, Role};

use crate::frame::Shape;
use crate::hold::Hold;
use crate::verdict::{Difference, Fact, Reason, context};

/// How many waiting frames of the other side are looked at.
const SEARCH_MAX: usize = 16;

/// The frames of one flow that have not found their equal.
#[derive(Debug, Default)]
pub(crate) struct Whole {
    /// The primary's, oldest first.
    unequal: VecDeque<(u64, Shape)>,
    /// One of the primary's that found it and has not left.
    equal: Option<u64>,
    /// The secondary's, oldest first.
    waiting: VecDeque<(Bytes, Shape, Instant)>,
    waiting_bytes: usize,
}

impl Whole {
    /// Takes a frame of the primary.
    pub(crate) fn primary(&mut self, serial: u64, shape: &Shape, frame: &[u8]) {
        let mut searched = self.waiting.iter().take(SEARCH_MAX);
        let found = searched.position(|(bytes, other, _)| shape.equal(frame, other, bytes));
        match found.and_then(|at| self.waiting.remove(at)) {
            Some((bytes, ..)) => {
                self.waiting_bytes -= bytes.len();
                self.equal = Some(serial);
            }
            None => self.unequal.push_back((serial, *shape)),
        }
    }

    /// Takes a frame of the secondary.
    pub(crate) fn secondary(&mut self, now: Instant, shape: &Shape, frame: &Bytes, hold: &Hold) {
        let found = self.unequal.iter().take(SEARCH_MAX).position(|(serial, other)| {
            let held = hold.get(*serial);
            held.is_some_and(|held| other.equal(&held.frame, shape, frame))
        });
        if let Some((serial, _)) = found.and_then(|at| self.unequal.remove(at)) {
            self.equal = Some(serial);
        } else {
            self.waiting_bytes += frame.len();
            self.waiting.push_back((frame.clone(), *shape, now));
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
        let is_it = self.unequal.front().is_some_and(|(first, _)| *first == serial);
        if is_it {
            self.unequal.pop_front();
        }
        is_it
    }

    /// Returns how many frames of the primary wait.
    pub(crate) fn len(&self) -> usize {
        self.unequal.len()
    }

    /// Returns how many frames and bytes of the secondary wait.
    pub(crate) fn pending(&self) -> (usize, usize) {
        (self.waiting.len(), self.waiting_bytes)
    }

    /// Returns since when the secondary's oldest frame has waited.
    pub(crate) fn waits_since(&self) -> Option<Instant> {
        self.waiting.front().map(|(_, _, arrived)| *arrived)
    }

    /// Says whether both sides keep something that fits nothing of the other's.
    pub(crate) fn is_suspect(&self) -> bool {
        !self.unequal.is_empty() && !self.waiting.is_empty()
    }

    /// Says whose frames wait, if they are of one side only.
    pub(crate) fn is_of_one_side(&self) -> Option<Role> {
        match (self.unequal.is_empty(), self.waiting.is_empty()) {
            (false, true) => Some(Role::Primary),
            (true, false) => Some(Role::Secondary),
            _ => None,
        }
    }

    /// Returns the difference that makes it suspect.
    pub(crate) fn difference(&self, hold: &Hold) -> Option<Reason> {
        let (theirs, their_shape, _) = self.waiting.front()?;
        let (serial, shape) = self.unequal.front()?;
        let mine = &hold.get(*serial)?.frame;
        let at = shape.first_difference(mine, their_shape, theirs).unwrap_or(0);
        Some(Reason::Mismatch(Difference {
            fact: Fact::Bytes,
            offset: at as u64,
            primary: context(mine, at),
            secondary: context(theirs, at),
        }))
    }

    /// Begins the next epoch.
    pub(crate) fn clear(&mut self) {
        self.waiting.clear();
        self.waiting_bytes = 0;
    }
}
