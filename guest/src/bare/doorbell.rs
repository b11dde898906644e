//! The doorbell page: idling until a device or a deadline, and the power register.

use guest::abi::{DOORBELL, DOORBELL_IDLE, DOORBELL_POWER};

use super::memory::address;

/// Idles until a device has used a buffer or guest time has reached `deadline` (0: none). May return early.
pub(crate) fn wait(deadline: u64) {
    let register = core::ptr::with_exposed_provenance_mut::<u64>(address(DOORBELL + DOORBELL_IDLE));
    // SAFETY: a register of the machine, mapped and aligned; writing it touches no memory of the program.
    unsafe { register.write_volatile(deadline) };
}

/// Ends the guest.
pub(crate) fn power(code: u32) -> ! {
    let register = core::ptr::with_exposed_provenance_mut::<u32>(address(DOORBELL + DOORBELL_POWER));
    // SAFETY: as above.
    unsafe { register.write_volatile(code) };
    loop {
        // The machine stops the guest; should it not do so at once, idle.
        wait(0);
    }
}
