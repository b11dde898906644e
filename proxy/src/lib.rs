//! Compares what two machines send, holds and releases it, translates TCP sequence numbers and timestamps; pure.
//!
//! Output of the primary's guest may leave when the secondary's guest has sent the same in the same
//! epoch, or when its epoch is committed ([`Comparator`]). A flow on which the two keep differing may be left to the commits. So that the two send the same, both roles
//! translate TCP sequence numbers at their guest's edge ([`Translator`]), and what the network must
//! learn of a guest after a takeover is remembered ([`AddressBook`]).
//!
//! # What is compared
//! | frames | compared | ignored by policy |
//! |---|---|---|
//! | TCP over IPv4 and IPv6 | the byte stream by position; SYN with its MSS, window scale, SACK and timestamp offer; FIN; RST; the urgent position; acknowledgements and SACK blocks as upper bounds | Ethernet addresses, VLAN priority, IP header, window, other options, PSH, ECN flags, sequence number of a RST, timestamps (but never earlier than one that has left), padding (cut off) |
//! | UDP, ICMP, `ICMPv6` (neighbour discovery, MLD), IGMP, other IP protocols | the whole frame | VLAN priority, TOS or traffic class, flow label, TTL or hop limit, IP identification, DF, IP and UDP checksum |
//! | IP fragments, those of TCP too | the datagrams that they make, whole on both sides, and the headers in front | as above, and how the datagram is cut; padding (cut off) |
//! | SCTP | nothing: it waits for commits, since tags and numbers of its associations are random | |
//! | ARP, other EtherTypes, 802.3 | the whole frame | VLAN priority |
//! | what does not parse | the whole frame | nothing |
//!
//! Each frame has a header of twelve bytes before it that says what is left to do on it: a checksum to be filled in, a segment
//! of up to 64 KiB to be cut (`offload`). It is ignored like the checksum, unless it says more than that.
//!
//! VLAN numbers (802.1Q, `QinQ`, up to three) are part of the flow. All frames of which not even the addresses parse
//! are one flow.
//!
//! Fragments leave when their datagram is whole on both sides and equal: all of them, as they were sent. What never becomes
//! whole, overlaps, comes twice or makes no sense waits for the commit, and so does what a receiver might put together
//! with a part that an earlier commit let leave. A flow with many unfinished datagrams is not compared until none has
//! been left unfinished for two minutes. TCP in fragments is compared as datagrams, so it is equal
//! only if both sides sent the same segment in the same numbers; sequence numbers in fragments are not translated.
//!
//! # Not supported
//! A datagram that one side sends in fragments and the other whole differs. Signed TCP (MD5, TCP-AO) cannot be
//! translated; a connection that was opened since the last commit does not survive a takeover. Sequence numbers
//! quoted in ICMP errors are translated for the guest, but not in errors that the guest sends. TCP Fast Open data before the handshake is over is compared, but a
//! takeover in that moment breaks that connection. A retransmission of what the primary said more than 8 MiB ago, or
//! before it was protected, leaves only when the secondary repeats it too.

#![forbid(unsafe_code)]

mod announce;
mod cards;
mod checksum;
mod codec;
mod comparator;
mod counters;
mod crossing;
mod datagram;
mod epochs;
mod flow;
mod fragment;
mod frame;
mod hold;
mod lag;
mod lane;
mod offload;
mod order;
mod picture;
mod said;
mod seq;
mod sequence;
mod service;
mod settle;
mod shared;
mod span;
mod stream;
mod table;
mod temper;
#[cfg(test)]
mod testkit;
mod timing;
mod verdict;

pub use announce::{AddressBook, NetworkState};
pub use cards::{Comparators, Pictures};
pub use codec::StateError;
pub use comparator::{Comparator, ComparatorLimits, Mode};
pub use counters::{Counters, FlowReport, Held, Pending, Tally};
pub use flow::{Class, Endpoint, FlowKey, Traffic, Vlans};
pub use lag::Lag;
pub use offload::{complete, on_wire};
pub use picture::{Leaving, NetworkPicture};
pub use sequence::{Snapshot, Translator};
pub use temper::FlowPatience;
pub use verdict::{Difference, Divergence, Fact, Limit, Reason, Verdict, Why};
