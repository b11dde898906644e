//! What a segment of the primary says, and when and how it may leave.

use std::ops::Range;

use crate::frame::Segment;
use crate::seq::Seq;

/// What a segment of the primary needs to leave.
#[derive(Clone, Debug)]
pub(crate) struct Note {
    pub(super) data: Range<u64>,
    pub(super) fin: Option<u64>,
    pub(super) syn: Option<(Seq, bool)>,
    pub(super) rst: bool,
    pub(super) urgent: Option<u64>,
    pub(super) turn: Turn,
    pub(super) segment: Segment,
}

/// Whether a segment has to wait for those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// It says something new, or must not be changed.
    InOrder,
    /// It only acknowledges.
    Acknowledgement,
    /// It says nothing new: a retransmission or a probe.
    Again,
}

/// Whether and how a segment may leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leave {
    /// Not yet.
    Wait,
    /// As it is.
    Whole,
    /// With its acknowledgement lowered to this and its SACK blocks blanked.
    Lowered(Seq),
}

impl Note {
    /// Returns when its turn to leave is.
    pub(crate) fn turn(&self) -> Turn {
        self.turn
    }

    /// Returns the segment.
    pub(crate) fn segment(&self) -> &Segment {
        &self.segment
    }
}
