//! What the guest asks for when it leaves the vCPU: device registers, ports, the doorbell, the power registers.
//!
//! Every address, size and value here is the guest's choice. Reads of nothing give all ones, writes
//! to nothing are ignored, and none of it can fail.

use guest::abi::{DOORBELL, DOORBELL_IDLE, DOORBELL_POWER, POWER_OFF, POWER_PANIC, POWER_RESET};
use kvm_ioctls::VcpuExit;

use std::sync::Arc;

use super::PowerEvent;
use crate::bus::Bus;
use crate::doorbell::Doorbell;
use crate::pc::power::Power;

const DOORBELL_END: u64 = DOORBELL + 0x1000;

/// What the guest reaches when it leaves a vCPU.
#[derive(Default)]
pub(crate) struct Board {
    /// What is mapped into memory.
    pub(crate) bus: Bus,
    /// I/O ports.
    pub(crate) ports: Bus,
    /// Where the bundled guest waits. Its page is on no bus.
    pub(crate) doorbell: Option<Arc<Doorbell>>,
    /// A PC's power registers, which are among the ports.
    pub(crate) power: Option<Arc<Power>>,
}

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
pub(crate) fn handle(exit: VcpuExit<'_>, board: &Board) -> (Request, bool) {
    match exit {
        VcpuExit::MmioRead(address, data) => {
            board.bus.read(address, data);
            (Request::Continue, true)
        }
        VcpuExit::MmioWrite(address, data) => {
            let request = if board.doorbell.is_some() && (DOORBELL..DOORBELL_END).contains(&address) {
                doorbell(address - DOORBELL, data)
            } else {
                board.bus.write(address, data);
                Request::Continue
            };
            (request, true)
        }
        VcpuExit::IoIn(port, data) => {
            board.ports.read(port.into(), data);
            (Request::Continue, true)
        }
        VcpuExit::IoOut(port, data) => {
            board.ports.write(port.into(), data);
            let event = board.power.as_ref().and_then(|power| power.take(port));
            (event.map_or(Request::Continue, Request::End), true)
        }
        VcpuExit::Intr => (Request::Continue, false),
        VcpuExit::Shutdown if board.power.is_some() => {
            // That is how an operating system resets a PC when nothing else has worked.
            tracing::warn!("the guest's processor shut down (a fault without a handler): a PC starts again then");
            (Request::End(PowerEvent::Reset), false)
        }
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

    fn board() -> Board {
        Board {
            doorbell: Some(Arc::default()),
            ..Board::default()
        }
    }

    fn write(address: u64, data: &[u8]) -> Request {
        handle(VcpuExit::MmioWrite(address, data), &board()).0
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
    fn a_pc_has_no_doorbell() {
        let (request, _) = handle(VcpuExit::MmioWrite(DOORBELL, &7_u64.to_le_bytes()), &Board::default());
        assert_eq!(request, Request::Continue);
    }

    #[test]
    fn reads_of_nothing_give_all_ones() {
        for size in 0..=8 {
            let mut data = vec![0; size];
            let mut port = vec![0; size];
            handle(VcpuExit::MmioRead(u64::MAX, &mut data), &board());
            handle(VcpuExit::IoIn(0x60, &mut port), &board());
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
            let (Request::End(PowerEvent::Crashed { reason }), _) = handle(exit, &board()) else {
                panic!("must end the guest");
            };
            assert!(!reason.is_empty());
        }
    }
}
