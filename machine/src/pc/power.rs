//! The ports by which a guest ends: sleep, reset, and a notification when it panics.
//!
//! The vCPU that wrote to a port asks [`Power::take`] at once what that meant, and stops. So nothing of
//! it is state of the machine.
//!
//! Where the processor of a PC starts there is a program that writes to the reset port, and nothing else. A Linux that
//! was told of hardware-reduced ACPI leaves resets to EFI; where there is none it goes there, in real mode.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use vm_memory::{Bytes, GuestAddress};

use super::RESET_ENTRY;
use crate::bus::{Bus, BusDevice};
use crate::memory::GuestRam;
use crate::vcpu::PowerEvent;

/// The panic notification (`QEMU0001`): what it can tell is read, what has happened is written.
pub(crate) const PANIC_PORT: u16 = 0x505;
/// ACPI's sleep control register.
pub(crate) const SLEEP_CONTROL_PORT: u16 = 0x600;
/// ACPI's sleep status register.
pub(crate) const SLEEP_STATUS_PORT: u16 = 0x601;
/// ACPI's reset register.
pub(crate) const RESET_PORT: u16 = 0x602;
/// Written to the reset register it resets.
pub(crate) const RESET_VALUE: u8 = 1;
/// The type of sleep that is powered off.
pub(crate) const SLEEP_TYPE_OFF: u8 = 5;

const RESET_PROGRAM: [u8; 9] = {
    let [low, high] = RESET_PORT.to_le_bytes();
    // mov dx, port; mov al, value; out dx, al; hlt; jmp to the hlt
    [0xba, low, high, 0xb0, RESET_VALUE, 0xee, 0xf4, 0xeb, 0xfd]
};

const KEYBOARD_PORT: u16 = 0x64;
/// A keyboard controller that never says what it has, as if none were there, yet takes a command at once.
const KEYBOARD_STATUS: u8 = 0xfd;
const KEYBOARD_RESET: u8 = 0xfe;
const SLEEP_ENABLE: u8 = 1 << 5;
const PANICKED: u8 = 1;

/// All of them: the first of some, and how many.
const PORTS: [(u16, u16); 3] = [(KEYBOARD_PORT, 1), (PANIC_PORT, 1), (SLEEP_CONTROL_PORT, 3)];

const NOTHING: u8 = 0;
const OFF: u8 = 1;
const RESET: u8 = 2;
const PANIC: u8 = 3;

/// Writes the program where the processor of a PC starts.
pub(crate) fn write_reset_program(ram: &GuestRam) {
    ram.memory()
        .write_slice(&RESET_PROGRAM, GuestAddress(RESET_ENTRY))
        .expect("low memory is RAM");
}

/// The power ports of one machine.
#[derive(Debug, Default)]
pub(crate) struct Power {
    event: AtomicU8,
}

impl Power {
    /// Lets the ports answer.
    pub(crate) fn connect(self: &Arc<Self>, ports: &mut Bus) {
        for (first, count) in PORTS {
            let power = Arc::clone(self);
            ports.insert(first.into(), count.into(), Arc::new(Ports { first, power }));
        }
    }

    /// Says once how the guest has ended, to the vCPU that has written to this port; the others' ports don't matter.
    pub(crate) fn take(&self, port: u16) -> Option<PowerEvent> {
        let own = PORTS
            .iter()
            .any(|(first, count)| (*first..first + count).contains(&port));
        if !own {
            return None;
        }
        match self.event.swap(NOTHING, Ordering::Relaxed) {
            OFF => Some(PowerEvent::Off),
            RESET => Some(PowerEvent::Reset),
            PANIC => Some(PowerEvent::Panic),
            _ => None,
        }
    }

    fn written(&self, port: u16, value: u8) {
        let event = match port {
            KEYBOARD_PORT if value == KEYBOARD_RESET => RESET,
            PANIC_PORT if value & PANICKED != 0 => PANIC,
            SLEEP_CONTROL_PORT if value & SLEEP_ENABLE != 0 && (value >> 2) & 7 == SLEEP_TYPE_OFF => OFF,
            RESET_PORT if value == RESET_VALUE => RESET,
            _ => return,
        };
        self.event.store(event, Ordering::Relaxed);
    }
}

/// Some of the ports, those from `first` on.
struct Ports {
    first: u16,
    power: Arc<Power>,
}

impl Ports {
    fn numbered(&self, offset: u64) -> impl Iterator<Item = u16> {
        let first = self.first + u16::try_from(offset).expect("a device has few ports");
        first..
    }
}

impl BusDevice for Ports {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (port, byte) in self.numbered(offset).zip(data) {
            *byte = match port {
                KEYBOARD_PORT => KEYBOARD_STATUS,
                PANIC_PORT => PANICKED,
                _ => 0,
            };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (port, byte) in self.numbered(offset).zip(data) {
            self.power.written(port, *byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> (Arc<Power>, Bus) {
        let (power, mut ports) = (Arc::new(Power::default()), Bus::default());
        power.connect(&mut ports);
        (power, ports)
    }

    fn after(port: u16, value: u8) -> Option<PowerEvent> {
        let (power, ports) = machine();
        ports.write(port.into(), &[value]);
        assert_eq!(power.take(0x3f8), None, "it is said to who has written there");
        let event = power.take(port);
        assert_eq!(power.take(port), None, "it is said once");
        event
    }

    #[test]
    fn says_how_the_guest_has_ended() {
        assert_eq!(after(0x600, 0x34), Some(PowerEvent::Off));
        assert_eq!(after(0x602, 1), Some(PowerEvent::Reset));
        assert_eq!(after(0x64, 0xfe), Some(PowerEvent::Reset));
        assert_eq!(after(0x505, 1), Some(PowerEvent::Panic));
    }

    #[test]
    fn nothing_else_ends_it() {
        for (port, value) in [
            (0x600, 0x14), // the type without the enable bit
            (0x600, 0x24), // another type
            (0x601, 0x80), // Linux clears the status first
            (0x602, 0),
            (0x602, 0x34),
            (0x64, 0xd1),
            (0x505, 2), // a crash kernel takes over
        ] {
            assert_eq!(after(port, value), None, "{port:#x} {value:#x}");
        }
    }

    #[test]
    fn reads_tell_what_is_there() {
        let (_, ports) = machine();
        let read = |port| {
            let mut data = [0xaa];
            ports.read(port, &mut data);
            data[0]
        };
        assert_eq!(read(0x505), 1);
        assert_eq!((read(0x600), read(0x601)), (0, 0));
        assert_eq!(read(0x64) & 0b11, 0b01, "never empty, and ready for a command");
        let mut word = [0xaa; 2];
        ports.read(0x601, &mut word);
        assert_eq!(word, [0, 0]);
    }
}
