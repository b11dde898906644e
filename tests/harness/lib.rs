//! What the tests share: a simulated world for the protocol's state machines, and a toy guest.
//!
//! The world runs the very `Primary` and `Secondary` that ship, one thread, one seed, a fake clock. It does
//! not cover KVM, devices, kernel networking or the shells; those have tests of their own on higher rungs.

#![forbid(unsafe_code)]

pub mod checkers;
pub mod clients;
pub mod coverage;
mod disk;
pub mod faults;
mod guests;
pub mod history;
#[cfg(test)]
mod lossy;
mod network;
pub mod node;
mod operator;
pub mod ops;
pub mod packet;
pub mod random;
pub mod run;
pub mod scenario;
pub mod sequences;
mod shells;
mod shipping;
pub mod streams;
pub mod tcp;
pub mod toy_vm;
pub mod trace;
pub mod world;
