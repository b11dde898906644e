//! What both roles' shells share: connections to the peer, the clock, the sentinel, the status report.
//!
//! ```text
//!   role's loop ─┬─ connect / listener ──► peer ─┬► connection ──► TCP    the pair's connections
//!                │                              └► pages ───────► TCP    those that carry pages
//!                ├─ sentinel                                              tells the peer of this process's death
//!                ├─ control, status, flows                                what the operator asks and is told
//!                ├─ port, record                                          the guest's network, the durable note
//!                └─ clock, entropy                                        what the pure machines are given
//! ```
//!
//! Everything here carries and bounds; nothing here decides what a message, a silence or a command means.

#![forbid(unsafe_code)]

pub mod capture;
pub mod clock;
pub mod connect;
pub mod connection;
pub mod contest;
pub mod control;
pub mod entropy;
pub mod flows;
pub mod listener;
pub mod mailbox;
pub mod operator;
pub mod pages;
pub mod pcapng;
pub mod peer;
pub mod port;
pub mod record;
pub mod sentinel;
pub mod status;
pub mod worker;

pub use connect::{ConnectError, connect};
pub use listener::{ListenError, Listener};
pub use operator::Alarms;
pub use pages::{ArrivedPages, PageSenders};
pub use peer::{BulkSender, CloseCause, Closed, Established, Events, Link, LinkEvent, Which};
pub use sentinel::Sentinel;
pub use worker::Worker;

/// Writes an error and its causes on one line.
#[must_use]
pub fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
