//! What both roles' shells share: connections to the peer, the clock, the sentinel, the status report.

#![forbid(unsafe_code)]

pub mod clock;
pub mod control;
pub mod sentinel;
pub mod status;
