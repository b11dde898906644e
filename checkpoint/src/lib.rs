//! Epochs, the wire format, staging, liveness and the failover decision.
//!
//! An *epoch* is the execution between two checkpoints; checkpoint *n* ends epoch *n*. The primary
//! stops, ships what epoch *n* changed, and the secondary makes it its own state in one step:
//!
//! ```text
//!   primary    run n ──stop──► ship pages, devices, end mark ──► wait ──acknowledged──► release ≤ n, run n+1
//!                                        │                         ▲
//!   secondary  run n ───────────► stage, verify ─ commit point ────┘──► stop, load, run n+1
//! ```
//!
//! Everything here is pure: no I/O, no clock, no threads, no randomness. Time, witness answers and
//! messages come in as values; decisions go out as values.

#![forbid(unsafe_code)]

pub mod backlog;
pub mod cpu;
pub mod epoch;
pub mod failover;
pub mod frames;
pub mod handshake;
pub mod limits;
pub mod liveness;
pub mod mutants;
pub mod nic;
pub mod pages;
pub mod pair;
pub mod staging;
pub mod time;
pub mod wire;

pub use epoch::{Epoch, EpochMode, Generation, InputNumber, Role, Tag};
pub use nic::Nic;
pub use time::{Duration, Instant};
