//! The tandem program.

#![forbid(unsafe_code)]

fn main() {}
