//! Everything that touches the machine: entry, memory, devices, doorbell. The only code with `unsafe`.

pub(crate) mod block;
pub(crate) mod clock;
pub(crate) mod console;
pub(crate) mod devices;
pub(crate) mod doorbell;
pub(crate) mod entropy;
mod entry;
pub(crate) mod memory;
pub(crate) mod net;
mod symbols;

use core::sync::atomic::{AtomicBool, Ordering};

use guest::abi::POWER_PANIC;

static PANICKING: AtomicBool = AtomicBool::new(false);

/// Prints `why`, unless printing is what went wrong, and stops.
pub(crate) fn end_in_panic(why: &str) -> ! {
    if !PANICKING.swap(true, Ordering::Relaxed) {
        console::print(why);
        console::drain();
    }
    doorbell::power(POWER_PANIC)
}
