//! What the guest asks for when it leaves the vCPU: device registers, the doorbell, the power register.
//!
//! Every address, size and value here is the guest's choice. Reads of nothing give all ones, writes
//! to nothing are ignored, and none of it can fail.

use guest::abi::{DOORBELL, DOORBELL_IDLE, DOORBELL_POWER, POWER_OFF, POWER_PANIC, POWER_RESET};
use kvm_ioctls::VcpuExit;

use super::PowerEvent;
use crate::bus::Bus;

const DOORBELL_END: u64 = DOORBELL + 0x1000;

/// What an exit asks of the vCPU's thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// Enter the guest again.
    Continue,
    /// Wait until a device has something or this guest time is reached (0: however long).
    Wait(u64),
    /// The guest has ended.
    End(PowerEvent),
}

/// Carries out what can be done at once, and says what is left. The flag says whether the
/// instruction is only complete once the vCPU is entered again.
pub(crate) fn handle(exit: VcpuExit<'_>, bus: &Bus) -> (Request, bool) {
    match exit {
        VcpuExit::MmioRead(address, data) => {
            bus.read(address, data);
            (Request::Continue, true)
        }
        VcpuExit::MmioWrite(address, data) => {
            let request = if (DOORBELL..DOORBELL_END).contains(&address) {
                doorbell(address - DOORBELL, data)
            } else {
                bus.write(address, data);
                Request::Continue
            };
            (request, true)
        }
        VcpuExit::IoIn(_, data) => {
            data.fill(0xff);
            (Request::Continue, true)
        }
        VcpuExit::IoOut(..) => (Request::Continue, true),
        VcpuExit::Intr => (Request::Continue, false),
        VcpuExit::Shutdown => crashed("its processor shut down (a fault without a handler)"),
        VcpuExit::InternalError => crashed("KVM could not emulate an instruction"),
        VcpuExit::FailEntry(reason, _) => crashed(&format!("the processor refused its registers (reason {reason:#x})")),
        other => crashed(&format!("it left the processor in a way it has no use for ({other:?})")),
    }
}

fn crashed(reason: &str) -> (Request, bool) {
    (
        Request::End(PowerEvent::Crashed {
            reason: reason.to_owned(),
        }),
        false,
    )
}

fn doorbell(offset: u64, data: &[u8]) -> Request {
    match offset {
        DOORBELL_IDLE => data
            .try_into()
            .map_or(Request::Continue, |value| Request::Wait(u64::from_le_bytes(value))),
        DOORBELL_POWER => match data.try_into().map(u32::from_le_bytes) {
            Ok(POWER_OFF) => Request::End(PowerEvent::Off),
            Ok(POWER_RESET) => Request::End(PowerEvent::Reset),
            Ok(POWER_PANIC) => Request::End(PowerEvent::Panic),
            _ => Request::Continue,
        },
        _ => Request::Continue,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(address: u64, data: &[u8]) -> Request {
        handle(VcpuExit::MmioWrite(address, data), &Bus::default()).0
    }

    #[test]
    fn doorbell_takes_only_what_it_knows() {
        assert_eq!(write(DOORBELL, &7_u64.to_le_bytes()), Request::Wait(7));
        assert_eq!(write(DOORBELL, &[7; 4]), Request::Continue);
        assert_eq!(write(DOORBELL + 1, &[7; 8]), Request::Continue);
        assert_eq!(
            write(DOORBELL + 8, &POWER_OFF.to_le_bytes()),
            Request::End(PowerEvent::Off)
        );
        assert_eq!(write(DOORBELL + 8, &9_u32.to_le_bytes()), Request::Continue);
        assert_eq!(write(DOORBELL + 8, &[1]), Request::Continue);
        assert_eq!(write(DOORBELL + 0xfff, &[0; 8]), Request::Continue);
    }

    #[test]
    fn reads_of_nothing_give_all_ones() {
        for size in 0..=8 {
            let mut data = vec![0; size];
            let mut port = vec![0; size];
            handle(VcpuExit::MmioRead(u64::MAX, &mut data), &Bus::default());
            handle(VcpuExit::IoIn(0x60, &mut port), &Bus::default());
            assert!(data.iter().chain(&port).all(|byte| *byte == 0xff));
        }
    }

    #[test]
    fn exits_without_a_use_end_the_guest_and_say_why() {
        for exit in [
            VcpuExit::Shutdown,
            VcpuExit::InternalError,
            VcpuExit::FailEntry(3, 0),
            VcpuExit::Hlt,
        ] {
            let (Request::End(PowerEvent::Crashed { reason }), _) = handle(exit, &Bus::default()) else {
                panic!("must end the guest");
            };
            assert!(!reason.is_empty());
        }
    }
}
