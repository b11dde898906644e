//! The pair with nothing replaced: real processes on KVM, in network namespaces, killed, cut, fed with garbage.
//!
//! ```text
//!   survival  a host dies, at any step of the protocol       split    the link is cut; no witness; both die
//!   ends      orderly ends                                   garbage  hostile bytes on every port
//!   starts    starts that must fail, and say why             journal  commits interrupted half-way
//!   flows     connections whose numbers are translated       idle     what a pair costs that does nothing
//!   phases    a host dies in every phase of a connection
//!   resync    a broken pair is made whole by difference          modes    buffered output, and auto
//!   bench     the benchmarks come to their end
//!   ahead     pages shipped ahead of a stop             traffic  what is told of the VM's traffic
//!   cards     a VM with two network cards               queues   a card with several pairs of queues
//! ```
//!
//! `stage` has the hosts, `load` the clients. Every test asserts on facts that the roles and the clients tell,
//! never on how long something took. Needs /dev/kvm and root; without them a test says so and does nothing, or
//! fails if TANDEM_REQUIRE_KVM is set.

mod ahead;
mod alike;
mod bench;
mod cards;
mod ends;
mod flows;
mod garbage;
mod idle;
mod journal;
mod load;
mod memory;
mod modes;
mod phases;
mod program;
mod queues;
mod resync;
mod split;
mod stage;
mod starts;
mod survival;
mod tagger;
mod traffic;
