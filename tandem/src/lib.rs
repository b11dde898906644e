//! The tandem program as a library: its commands, and the laboratory that the demo and the tests share.
//!
//! ```text
//!   main ─► cli ─┬─ args, options, settings, units     what is wanted
//!                ├─ role, bundle, linux, serial        a role, run with it
//!                ├─ operator                           questions to a running role
//!                ├─ demo ─┐  ┌─ stage                   roles as real processes
//!                └─ bench ┴──┼─ lab                     two hosts and a client on one machine
//!                            └─ clients                 what the client does
//! ```

#![forbid(unsafe_code)]

pub mod args;
pub mod bench;
pub mod bundle;
pub mod capture;
pub mod cards;
pub mod cli;
pub mod clients;
pub mod cpu;
pub mod demo;
pub mod lab;
pub mod linux;
pub mod operator;
pub mod options;
pub mod role;
mod serial;
pub mod settings;
mod stage;
pub mod units;
