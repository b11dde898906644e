//! The secondary role: a pure protocol core and the shell that runs it.
//!
//! ```text
//!   device workers ─┐                                ┌─► VM thread: stage, check, load, resume
//!   peer ───────────┼──► Event ─► Secondary::step ─► Action
//!   witness ────────┤        (protocol.rs)           ├─► disk thread: hashes, commits, record
//!   clock, operator ┘                                └─► peer, guest's port
//! ```
//!
//! A takeover is an [`event::Outcome`]: the program feeds what is in it into the primary role.

#![forbid(unsafe_code)]

mod disk;
pub mod event;
pub mod protocol;
pub mod run;
mod stage;
mod status;
mod vm;

pub use run::{Finished, Setup, run};
