//! The tandem program as a library: its commands, and the laboratory that the demo and the tests share.

#![forbid(unsafe_code)]

pub mod lab;
