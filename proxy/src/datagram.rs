//! Frames that are compared whole: everything but TCP streams.
//!
//! Per flow, first in first out, with a small search so that two answers in another order still find
//! each other. When both sides keep something that fits nothing of the other's for longer than the
//! reorder window, they differ. Knows one epoch at a time; the primary's frames stay in `hold`.

use std::collections::VecDeque;

use bytes::Bytes;
use checkpoint::Instant;

use crate::frame::Shape;

/// How many waiting frames of the other side are looked at.
pub(crate) const SEARCH_MAX: usize = 16;

/// The secondary's frames of one flow that wait for the primary's.
#[derive(Clone, Debug, Default)]
pub(crate) struct Waiting {
    queue: VecDeque<(Bytes, Shape, Instant)>,
    bytes: usize,
}

impl Waiting {
    /// Takes out a frame that equals this one of the primary.
    pub(crate) fn take_equal(&mut self, shape: &Shape, frame: &[u8]) -> bool {
        let found = self
            .queue
            .iter()
            .take(SEARCH_MAX)
            .position(|(bytes, other, _)| shape.equal(frame, other, bytes));
        match found.and_then(|place| self.queue.remove(place)) {
            Some((bytes, _, _)) => {
                self.bytes -= bytes.len();
                true
            }
            None => false,
        }
    }

    pub(crate) fn push(&mut self, frame: Bytes, shape: Shape, arrived: Instant) {
        self.bytes += frame.len();
        self.queue.push_back((frame, shape, arrived));
    }

    /// Returns the frame that has waited longest.
    pub(crate) fn oldest(&self) -> Option<(&Bytes, &Shape, Instant)> {
        self.queue
            .front()
            .map(|(frame, shape, arrived)| (frame, shape, *arrived))
    }

    pub(crate) fn pending(&self) -> (usize, usize) {
        (self.queue.len(), self.bytes)
    }

    pub(crate) fn clear(&mut self) {
        self.queue.clear();
        self.bytes = 0;
    }
}
