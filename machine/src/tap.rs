//! A TAP device of the host.
