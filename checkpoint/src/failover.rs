//! Who may run the VM.
//!
//! While a pair runs, each side's part in that decision is a [`Contest`]: who contends, for which term, from
//! when on, and what may leave meanwhile.
//!
//! A start without a peer is a contest too: this host may have been dead while the other side took over. What
//! decides is the durable record beside the image and the latest term at the witness:
//!
//! | record | latest term | decision |
//! |---|---|---|
//! | none | none | start: a new pair |
//! | none | term 1, this host's | start, in term 1 again: the very first start was cut short |
//! | none | any other | refuse: the image is not the pair's |
//! | incomplete | any | refuse: a resync was cut short |
//! | complete | this host's, later than the record | start: claimed with that very state |
//! | complete, primary | none, or this host's and not later | start: generations since then had no witness |
//! | complete, secondary | the same | refuse: the primary's disk may be newer |
//! | complete | another host's | refuse: that host's disk is newer, or may be |
//!
//! To start is to claim the next term; only a claim that is won may be followed by running the VM. [`Contest`]
//! keeps the same rule: a side that holds a complete state of generation *g* and loses its peer claims
//! term *g* + 1.
//!
//! Driven by the program before it takes a role, and by the protocols of both roles. Never asks the witness itself.

mod contest;

pub use contest::{Claim, Connection, Contest, Event, Order, Standing};

use crate::epoch::{Generation, Role};
use crate::mutants::{self, Mutant};

/// What the durable record says of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KnownState {
    /// Generation that the image last ran in.
    pub generation: Generation,
    /// Its role in that generation.
    pub role: Role,
    /// Whether it is one complete state, not in the middle of a resync.
    pub complete: bool,
}

/// Whether to start without a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Claim this term, and run the VM if it is won.
    Start {
        /// The term.
        term: Generation,
    },
    /// Don't run the VM.
    Refuse(StartRefusal),
}

/// Why a host may not start the VM alone. Each says what to do instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StartRefusal {
    /// The pair has run, but this image was no part of it.
    #[error(
        "the witness knows this pair (term {term} is {owner}'s), but the disk image has no record of it: \
         start this host as the secondary of {owner}, or choose another pair name for a new disk"
    )]
    NoRecord {
        /// Latest term.
        term: Generation,
        /// Its owner.
        owner: String,
    },
    /// The image is a mixture of two states.
    #[error(
        "the disk image was being synchronised when this host stopped, and is not complete: \
         start this host as a secondary and let its peer complete it"
    )]
    Incomplete,
    /// Another host won a later term.
    #[error(
        "{owner} has owned the VM since term {term}, this host's disk is of generation {ours}: \
         start this host as the secondary of {owner}"
    )]
    Superseded {
        /// The image's generation.
        ours: Generation,
        /// Latest term.
        term: Generation,
        /// Its owner.
        owner: String,
    },
    /// This host followed the owner of the latest term.
    #[error(
        "generation {ours}, of which this host's disk is, belongs to {owner}, whose disk may be newer: start {owner}"
    )]
    Followed {
        /// The image's generation.
        ours: Generation,
        /// Its owner.
        owner: String,
    },
    /// This host followed a primary that the witness does not know.
    #[error(
        "this host was the secondary in generation {ours}, and the disk of its primary may be newer: \
         start the former primary"
    )]
    WasSecondary {
        /// The image's generation.
        ours: Generation,
    },
    /// The latest term is older than the image and another host's.
    #[error(
        "this host's disk is of generation {ours}, but the witness ends at {owner}'s term {term}: \
         check that --witness names the pair's own directory"
    )]
    WitnessBehind {
        /// The image's generation.
        ours: Generation,
        /// Latest term.
        term: Generation,
        /// Its owner.
        owner: String,
    },
}

/// Decides whether this host, `node`, may start the VM without a peer.
///
/// `known` is the image's record, if it has one; `latest` the latest term at the witness and its owner, if there is a
/// witness and it has given one. A witness that can't be read is no absent one: then there is nothing to decide.
#[must_use]
pub fn start_decision(known: Option<KnownState>, latest: Option<(Generation, String)>, node: &str) -> Decision {
    let newest = match (known, &latest) {
        // A very first start, perhaps after one that was cut short: it claims the same term again.
        (None, Some((term, _))) if mutants::on(Mutant::SkipTermAtFirstStart) => *term,
        (None, _) => Generation(0),
        (Some(known), Some((term, _))) => known.generation.max(*term),
        (Some(known), None) => known.generation,
    };
    match refusal(known, latest, node) {
        Some(refusal) => Decision::Refuse(refusal),
        None => Decision::Start { term: newest.next() },
    }
}

fn refusal(known: Option<KnownState>, latest: Option<(Generation, String)>, node: &str) -> Option<StartRefusal> {
    let Some(KnownState {
        generation: ours,
        role,
        complete,
    }) = known
    else {
        // Nothing but a first start, cut short between its claim and its record, leaves a term 1 of one's own.
        return match latest {
            Some((term, owner)) if owner != node || term != Generation(1) => {
                Some(StartRefusal::NoRecord { term, owner })
            }
            _ => None,
        };
    };
    if !complete {
        return Some(StartRefusal::Incomplete);
    }
    match latest {
        Some((term, owner)) if owner != node && term > ours && mutants::on(Mutant::StartSuperseded) => None,
        Some((term, owner)) if owner != node && term == ours && mutants::on(Mutant::StartFollower) => None,
        Some((term, owner)) if owner != node => Some(if term > ours {
            StartRefusal::Superseded { ours, term, owner }
        } else if term == ours {
            StartRefusal::Followed { ours, owner }
        } else {
            StartRefusal::WitnessBehind { ours, term, owner }
        }),
        // A term after the record's generation was claimed with the state that the record describes.
        Some((term, _)) if term > ours => None,
        _ if role == Role::Primary => None,
        _ => Some(StartRefusal::WasSecondary { ours }),
    }
}

#[cfg(test)]
mod tests;
