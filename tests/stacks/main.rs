//! Comparator and translator against real TCP: three stacks of this kernel, no VM.
//!
//! ```text
//!   streams    what clients do, in order and in disorder          takeovers   the primary's host dies, in each phase
//!   tools      other people's clients and servers; Wireshark      switch      what the two roles do with frames
//!   stage      the namespaces      services, clients   the programs      segment, capture   frames
//! ```
//!
//! Two namespaces are the hosts of one server: the same addresses, the same program, other initial sequence numbers, timestamps
//! and segments. Their stacks can't be checkpointed, so whatever the two do differently is a failure. A third is the client.
//! Needs root and /dev/net/tun; without them a test says so and does nothing, or fails if `TANDEM_REQUIRE_KVM` is set. The tests of
//! `tools` are left out unless asked for: see the script `run`.

mod capture;
mod clients;
mod segment;
mod services;
mod stage;
mod streams;
mod switch;
mod takeovers;
mod tools;
