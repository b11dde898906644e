//! What of a kernel file is taken, what is refused, and what the guest finds.

use super::*;
use crate::memory::{MEMORY_MIN, Mapping};

#[test]
fn refuses_what_is_no_kernel() {
    let ram = GuestRam::new(MEMORY_MIN, Mapping::Shared).unwrap();
    let layout = Layout::new(1, 4);
    for file in [&b""[..], b"#!/bin/sh", &[0; 4096], &[0xff; 0x300]] {
        assert!(matches!(load(&ram, file, None, "", &layout), Err(LinuxError::Unknown)));
    }
}
