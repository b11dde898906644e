//! The numbers that order everything the pair exchanges.

use core::fmt;

use rkyv::{Archive, Deserialize, Serialize};

/// The witness's term. Raised by each side that wins the witness and for each new peer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Archive, Serialize, Deserialize)]
pub struct Generation(pub u64);

/// The number of an epoch within the life of a pair. Never used twice in one generation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Archive, Serialize, Deserialize)]
pub struct Epoch(pub u64);

/// The number of an input frame, counted from 1 in each generation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InputNumber(pub u64);

/// What every held frame, forwarded input, mirrored write and secondary's frame carries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Archive, Serialize, Deserialize)]
pub struct Tag {
    /// Generation in which it was made; ordered first.
    pub generation: Generation,
    /// Epoch in which it was made.
    pub epoch: Epoch,
}

/// Which half of the pair a process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Talks to the clients.
    Primary,
    /// Follows, and takes over.
    Secondary,
}

/// Whether the secondary's guest runs in an epoch: decided by the primary at the end of the one before, and told in its
/// end mark, so that both sides always agree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Archive, Serialize, Deserialize)]
pub enum EpochMode {
    /// Both guests run it, and output of the primary's leaves when the secondary's has sent the same.
    #[default]
    Lockstep,
    /// Only the primary's guest runs it, and its output leaves when the epoch is committed.
    Buffered,
}

impl Generation {
    /// Returns the generation after this one.
    ///
    /// # Panics
    /// Panics after 2⁶⁴ − 1 generations, which no pair lives to see.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.checked_add(1).expect("2^64 generations"))
    }
}

impl Epoch {
    /// Returns the epoch after this one.
    ///
    /// # Panics
    /// Panics after 2⁶⁴ − 1 epochs, which no pair lives to see.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.checked_add(1).expect("2^64 epochs"))
    }
}

impl InputNumber {
    /// Returns the number after this one.
    ///
    /// # Panics
    /// Panics after 2⁶⁴ − 1 inputs, which no pair lives to see.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.checked_add(1).expect("2^64 inputs"))
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.generation, self.epoch)
    }
}

impl fmt::Display for EpochMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lockstep => "lockstep",
            Self::Buffered => "buffered",
        })
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Primary => "primary",
            Self::Secondary => "secondary",
        })
    }
}
