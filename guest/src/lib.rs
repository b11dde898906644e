//! The bundled freestanding guest: its interface to the machine, and its services.
//!
//! Without features the library is what other crates need: the interface ([`abi`]), the settings of the command
//! line, the content of `/file/N` and the clock's arithmetic, with no dependencies. The feature `services` adds
//! the services themselves, free of I/O and clocks, so that they are tested on any host. The feature `bare` is
//! for the freestanding program (`src/main.rs`), which drives them with frames, disk completions and the time.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

#[cfg(feature = "services")]
extern crate alloc;

pub mod abi;
pub mod clock;
pub mod content;
pub mod settings;

#[cfg(feature = "services")]
pub mod dirtier;
#[cfg(feature = "services")]
mod echo;
#[cfg(feature = "services")]
mod gate;
#[cfg(feature = "services")]
mod http;
#[cfg(feature = "services")]
pub mod kv;
#[cfg(feature = "services")]
mod outgoing;
#[cfg(feature = "services")]
mod pattern;
#[cfg(feature = "services")]
pub mod random;
#[cfg(feature = "services")]
mod redis;
#[cfg(feature = "services")]
pub mod resp;
#[cfg(feature = "services")]
pub mod server;
#[cfg(feature = "services")]
pub mod spread;
#[cfg(feature = "services")]
mod stack;
#[cfg(feature = "services")]
mod tcp;
#[cfg(feature = "services")]
mod vlan;
#[cfg(feature = "services")]
pub mod world;
