//! What the comparator decides, and what it tells about a divergence.

use std::fmt;

use bytes::Bytes;
use checkpoint::{Duration, Epoch, Role};

use crate::flow::FlowKey;

/// Most bytes of each side shown with a difference.
pub(crate) const CONTEXT_MAX: usize = 16;

/// A decision of the comparator; the order of verdicts is the order in which they are to be carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// This frame may leave, for this reason.
    Release(Bytes, Why),
    /// A checkpoint is needed: the two sides differ, one waits too long, or a bound is near.
    Diverged(Divergence),
    /// The peer sent what no honest peer can send; the connection is to be given up.
    Violation(String),
}

/// Why a frame may leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// The secondary's guest has sent the same in the same epoch.
    Equal,
    /// So it has, but acknowledged less: the acknowledgement is lowered to that.
    Lowered,
    /// It is the first part of a segment whose rest the secondary's guest has not said, or a lower acknowledgement.
    Begun,
    /// It says again what both have said.
    Again,
    /// The rest of an acknowledgement that was lowered before: the secondary's guest has acknowledged as much, or a commit covers it.
    Owed,
    /// The commit of this epoch covers it.
    Committed(Epoch),
    /// Nothing protects it: there is no secondary that could take over.
    Unprotected,
}

/// Why a checkpoint is needed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Divergence {
    /// The epoch in which it happened.
    pub epoch: Epoch,
    /// The flow it happened on, if it is one's.
    pub flow: Option<FlowKey>,
    /// What happened.
    pub reason: Reason,
}

/// What made the two sides diverge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Both sides sent something, and it differs.
    Mismatch(Difference),
    /// One side's output has waited too long for the other's.
    Unmatched {
        /// Whose output waits.
        side: Role,
        /// How long it has waited.
        waited: Duration,
    },
    /// A bound of the comparator is reached.
    Limit(Limit),
}

/// The first difference between the two sides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// What differs.
    pub fact: Fact,
    /// Offset of the first differing byte: in the frame, in the datagram if that is in fragments (and their headers are
    /// alike), or within the epoch's part of a TCP stream.
    pub offset: u64,
    /// Up to 16 bytes of the primary from there.
    pub primary: Vec<u8>,
    /// Up to 16 bytes of the secondary from there.
    pub secondary: Vec<u8>,
}

/// What can differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fact {
    /// The bytes.
    Bytes,
    /// The bytes of a retransmission: one side sent others before, shown as the other side's.
    Resent,
    /// Where a TCP stream ends.
    StreamEnd,
    /// Which of a TCP stream's bytes are urgent.
    Urgent,
    /// What a SYN offers.
    Offer,
    /// Which connection the ports belong to: one side has opened a new one, the other still has output of the old.
    Connection,
    /// From which of its ports a guest opens a flow.
    Port,
}

/// Which bound is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// Bytes or frames of the primary that wait for release.
    Held,
    /// Bytes or frames of the secondary that wait for the primary's.
    Pending,
    /// Flows.
    Flows,
    /// Unfinished datagrams in the fragments of one flow.
    Fragments,
    /// Gaps in one TCP stream.
    Gaps,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Equal => f.write_str("equal on both sides"),
            Self::Lowered => f.write_str("equal on both sides, acknowledgement lowered to the secondary's"),
            Self::Begun => f.write_str("a first part: the secondary's guest has said as much"),
            Self::Again => f.write_str("repeats what both sides have said"),
            Self::Owed => f.write_str("acknowledgement that was lowered before"),
            Self::Committed(epoch) => write!(f, "covered by checkpoint {epoch}"),
            Self::Unprotected => f.write_str("unprotected: no secondary could take over"),
        }
    }
}

impl fmt::Display for Divergence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.reason {
            Reason::Mismatch(difference) => write!(f, "{difference}")?,
            Reason::Unmatched { side, waited } => write!(f, "output of the {side} unmatched for {waited}")?,
            Reason::Limit(limit) => write!(f, "{limit}")?,
        }
        if let Some(flow) = &self.flow {
            write!(f, " on {flow}")?;
        }
        write!(f, " in epoch {}", self.epoch)
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let (Fact::Port, Ok(primary), Ok(secondary)) = (
            self.fact,
            <[u8; 2]>::try_from(&self.primary[..]),
            <[u8; 2]>::try_from(&self.secondary[..]),
        ) {
            let (primary, secondary) = (u16::from_be_bytes(primary), u16::from_be_bytes(secondary));
            return write!(
                f,
                "opened from port {primary} by the primary and from {secondary} by the secondary"
            );
        }
        let fact = match self.fact {
            Fact::Bytes => "bytes differ",
            Fact::Resent => "a retransmission carries other bytes",
            Fact::StreamEnd => "streams end differently",
            Fact::Urgent => "urgent bytes differ",
            Fact::Offer => "SYN options differ",
            Fact::Connection => "one side opened a new connection",
            Fact::Port => "opened from different ports",
        };
        write!(
            f,
            "{fact} at {}: primary {:02x?}, secondary {:02x?}",
            self.offset, self.primary, self.secondary
        )
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Held => "too much output held",
            Self::Pending => "too much output of the secondary pending",
            Self::Flows => "too many flows",
            Self::Fragments => "too many unfinished datagrams",
            Self::Gaps => "too many gaps in a TCP stream",
        })
    }
}

/// Returns up to [`CONTEXT_MAX`] bytes from `at`.
pub(crate) fn context(bytes: &[u8], at: usize) -> Vec<u8> {
    bytes[at.min(bytes.len())..].iter().take(CONTEXT_MAX).copied().collect()
}
