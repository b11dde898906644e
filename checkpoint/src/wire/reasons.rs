//! Why a peer is turned away, or ends in order, in words an operator can act on.
//!
//! Said by either side, shown by both. Part of the wire format, see the parent module.

#![allow(missing_docs, reason = "the rkyv derive leaves a generated field undocumented")]

use rkyv::{Archive, Deserialize, Serialize};

/// Why a peer is turned away. Each says what to change.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Archive, Serialize, Deserialize)]
pub enum Refusal {
    /// The protocol versions differ.
    #[error("the peer speaks protocol version {theirs}, this host {ours}: run the same tandem release on both")]
    Version {
        /// The refuser's version.
        ours: u16,
        /// The version that was refused.
        theirs: u16,
    },
    /// Another pair's name.
    #[error("the peer belongs to pair '{theirs}', this host to '{ours}': check --pair and --peer")]
    Pair {
        /// The refuser's pair.
        ours: String,
        /// The pair that was refused.
        theirs: String,
    },
    /// Both hosts have one name, by which the witness could not tell them apart.
    #[error("both hosts are called '{0}': give each its own --name")]
    SameNode(String),
    /// A setting that must be equal is not.
    #[error("{what} differs: primary has {primary}, secondary has {secondary}: make them equal")]
    Differs {
        /// The setting.
        what: String,
        /// The primary's value.
        primary: String,
        /// The secondary's value.
        secondary: String,
    },
    /// The VM's CPU has what the secondary's host can't give.
    #[error("the secondary's processor, or its KVM, lacks what the VM's CPU has: {missing}: {cure}")]
    Cpu {
        /// What it lacks.
        missing: String,
        /// What to do.
        cure: String,
    },
    /// The secondary already follows a primary.
    #[error("this secondary already follows {0}")]
    Busy(String),
    /// The peer is of an older generation than this host's image.
    #[error(
        "this host has seen generation {ours}, the peer only {theirs}: the peer's disk is older; start it as secondary instead"
    )]
    OlderGeneration {
        /// The refuser's generation.
        ours: u64,
        /// The peer's generation.
        theirs: u64,
    },
    /// Both hosts ran the VM as owners of one generation, which no witness permits.
    #[error(
        "both hosts have run this VM in generation {0}, so their disks differ: decide which to keep, and on the other host delete \
         the file IMAGE.tandem beside its disk image and start it as secondary again"
    )]
    BothRan(u64),
    /// Bytes that are not this protocol.
    #[error("the peer sent something that is not the tandem protocol ({0})")]
    Protocol(String),
}

/// Why a side ends in order.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Archive, Serialize, Deserialize)]
pub enum GoodbyeReason {
    /// The operator stopped it.
    #[error("stopped by its operator")]
    Operator,
    /// The guest powered itself off.
    #[error("the guest powered off")]
    PowerOff,
    /// It can't go on; the text says why.
    #[error("{0}")]
    Failed(String),
}
