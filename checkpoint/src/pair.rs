//! Values that the protocols of both roles exchange with their shells.

use bytes::Bytes;

use crate::epoch::{Epoch, Generation, InputNumber, Role};
use crate::nic::Nic;
use crate::time::Instant;

/// A frame on its way into the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// The card that it is for.
    pub nic: Nic,
    /// Its number, if the primary gave it one.
    pub number: Option<InputNumber>,
    /// As the clients sent it: what is forwarded to the peer.
    pub wire: Bytes,
    /// As the guest shall see it: sequence numbers translated.
    pub guest: Bytes,
}

/// Where a frame of the guests' output was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The primary's guest sent it.
    Primary,
    /// The secondary's guest sent it.
    Secondary,
    /// It may leave to the clients.
    Released,
}

/// A frame of the guests' output that was seen, for a capture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sight {
    /// When.
    pub at: Instant,
    /// On which card.
    pub nic: Nic,
    /// Where.
    pub place: Place,
    /// What there is to say about it.
    pub comment: String,
    /// As it is on the wire.
    pub frame: Bytes,
}

/// What the witness said to a claim of a term.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum WitnessAnswer {
    /// The term is this side's, now and for ever.
    Won,
    /// The term belongs to another node.
    LostTo(String),
    /// No answer; the text says why.
    Unreachable(String),
}

/// What is written to the durable record beside the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordUpdate {
    /// Generation this side runs in.
    pub generation: Generation,
    /// Role in that generation.
    pub role: Role,
    /// Last committed epoch of it.
    pub committed: Epoch,
    /// Whether the image is one complete state (not in the middle of a sync).
    pub complete: bool,
    /// Whether the run ended in order.
    pub clean: bool,
}

/// Why a checkpoint was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Trigger {
    /// The operator asked, or the end of the run.
    Admin,
    /// The epoch reached its maximum age.
    Age,
    /// The pause would soon be longer than the operator wants.
    Budget,
    /// A queue, overlay or stage came near its limit.
    Limit,
    /// The pages of the next checkpoint would soon take more memory than the operator gives.
    Memory,
    /// The outputs differ.
    Mismatch,
    /// Output waits for the commit of its epoch, and the time between two checkpoints has passed.
    Period,
    /// The first checkpoint of a pairing.
    Sync,
    /// A frame waited too long for its equal.
    Unmatched,
}

/// What the operator is told: state changes and alarms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// Something is wrong that does not stop the VM.
    Alarm(String),
    /// An ordinary event of the pair's life.
    Note(String),
    /// The state has a new name.
    State(&'static str),
}
