//! The primary role: a pure protocol core and the shell that runs it.
//!
//! ```text
//!   device workers ─┐                              ┌─► VM thread: pause, look, copy, resume; courier: ship
//!   TAP ────────────┤                              ├─► disk thread: compare, record
//!   peer ───────────┼──► Event ─► Primary::step ─► Action
//!   witness ────────┤        (protocol.rs)         ├─► TAP, guest's port
//!   clock, operator ┘                              └─► peer
//! ```

#![forbid(unsafe_code)]

mod backends;
mod clients;
pub mod comparison;
mod copies;
pub mod encoding;
pub mod event;
mod flows;
mod lanes;
pub mod protocol;
pub mod run;
pub mod scout;
mod ship;
mod status;
mod trace;
mod vm;

pub use run::{Outside, Setup, run};
