//! What makes a machine a PC that a stock Linux kernel boots on: where things lie, and the few old devices.
//!
//! ```text
//!   guest-physical addresses                      ports
//!   0x0000_0500  descriptor table                 0x060..0x064  keyboard controller: only its reset line
//!   0x0000_6000  PVH start information            0x070..0x071  CMOS clock
//!   0x0000_7000  zero page of a bzImage           0x3f8..0x3ff  COM1
//!   0x0000_9000  first page tables                0x505         panic notification
//!   0x0002_0000  command line                     0x600..0x602  sleep, and reset
//!   0x0009_fc00  reserved, up to 1 MiB
//!   0x000d_f000  generation of the machine        interrupt pins of the only IOAPIC
//!   0x000e_0000  ACPI tables                      4             COM1
//!   0x000f_fff0  a program that resets            9             events: a new generation
//!   0x0010_0000  RAM, up to 3 GiB                 16..23, then  virtio-mmio devices
//!   0xd000_0000  virtio-mmio devices              5 6 7 10 11
//!   0xfec0_0000  IOAPIC (in KVM)
//!   0xfee0_0000  local APICs (in KVM)
//!   0x1_0000_0000  the rest of RAM
//! ```
//!
//! Nothing else is there: no PCI, no HPET, no keyboard, no screen. The guest learns all of it from the
//! ACPI tables, which are of the hardware-reduced kind.

pub(crate) mod acpi;
pub(crate) mod chipset;
pub(crate) mod cmos;
pub(crate) mod generation;
pub(crate) mod power;
pub(crate) mod serial;

use std::ops::Range;

use guest::abi::{VIRTIO_BASE, VIRTIO_STRIDE};

/// The most vCPUs of a machine.
pub const VCPUS_MAX: u8 = 8;

/// The guest's descriptor table at its start.
pub(crate) const DESCRIPTORS: u64 = 0x500;
/// What a PVH kernel is told at its start: one page.
pub(crate) const START_INFO: u64 = 0x6000;
/// What a bzImage is told at its start: one page.
pub(crate) const ZERO_PAGE: u64 = 0x7000;
/// The page tables with which a bzImage starts: six pages.
pub(crate) const PAGE_TABLES: u64 = 0x9000;
/// The kernel's command line.
pub(crate) const COMMAND_LINE: Range<u64> = 0x2_0000..0x3_0000;
/// What is no RAM to the guest, though memory is there: up to here it is.
pub(crate) const RESERVED: Range<u64> = 0x9_fc00..0x10_0000;
/// The page with the generation of the machine.
pub(crate) const GENERATION: u64 = 0xd_f000;
/// The ACPI tables, the root pointer first.
pub(crate) const ACPI_TABLES: Range<u64> = 0xe_0000..0xf_0000;
/// Where the processor of a PC starts, in real mode.
pub(crate) const RESET_ENTRY: u64 = 0xf_fff0;

/// The IOAPIC that KVM has.
pub(crate) const IOAPIC: u32 = 0xfec0_0000;
/// The local APICs that KVM has.
pub(crate) const LOCAL_APIC: u32 = 0xfee0_0000;

/// First port of the serial port.
pub(crate) const COM1_PORT: u16 = 0x3f8;
/// Ports of the serial port.
pub(crate) const COM1_PORTS: u16 = 8;
/// The serial port's interrupt.
pub(crate) const COM1_GSI: u32 = 4;
/// First port of the CMOS clock: index, then data.
pub(crate) const CMOS_PORT: u16 = 0x70;
/// Ports of the CMOS clock.
pub(crate) const CMOS_PORTS: u16 = 2;
/// The interrupt by which the guest learns of events, that is of a new generation.
pub(crate) const EVENT_GSI: u32 = 9;

/// The interrupts of the virtio devices, in the order of their places.
const SLOT_GSIS: [u32; 13] = [16, 17, 18, 19, 20, 21, 22, 23, 5, 6, 7, 10, 11];
/// The most virtio devices of a machine: the IOAPIC has no more pins.
pub(crate) const SLOTS_MAX: usize = SLOT_GSIS.len();

/// Where a virtio-mmio device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    /// Its registers begin there.
    pub(crate) base: u64,
    /// Bytes of registers.
    pub(crate) bytes: u64,
    /// The pin of the IOAPIC that it raises.
    pub(crate) gsi: u32,
}

/// What differs from one PC to the next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// The number of vCPUs; the number of each is its APIC's.
    pub(crate) vcpus: u8,
    /// The virtio devices.
    pub(crate) slots: Vec<Slot>,
}

/// Where virtio devices lie, one after the other: on the bus and in the tables that announce them.
pub(crate) fn device_bases() -> impl Iterator<Item = u64> {
    (VIRTIO_BASE..).step_by(crate::index(VIRTIO_STRIDE))
}

impl Layout {
    /// Lays out a machine with so many vCPUs and virtio devices.
    ///
    /// # Panics
    /// If there are none or too many vCPUs, or too many devices.
    pub(crate) fn new(vcpus: u8, devices: usize) -> Self {
        assert!((1..=VCPUS_MAX).contains(&vcpus), "a machine has 1 to {VCPUS_MAX} vCPUs");
        assert!(devices <= SLOTS_MAX, "a machine has at most {SLOTS_MAX} devices");
        let slot = |(base, gsi)| Slot {
            base,
            bytes: VIRTIO_STRIDE,
            gsi,
        };
        Self {
            vcpus,
            slots: device_bases().zip(SLOT_GSIS).take(devices).map(slot).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_device_has_its_own_place_and_pin() {
        let layout = Layout::new(VCPUS_MAX, SLOTS_MAX);
        let mut gsis: Vec<_> = layout.slots.iter().map(|slot| slot.gsi).collect();
        gsis.extend([COM1_GSI, EVENT_GSI]);
        gsis.sort_unstable();
        gsis.dedup();
        assert_eq!(gsis.len(), SLOTS_MAX + 2);
        assert!(gsis.iter().all(|gsi| *gsi < 24), "KVM's IOAPIC has 24 pins");
        for pair in layout.slots.windows(2) {
            assert_eq!(pair[0].base + pair[0].bytes, pair[1].base);
        }
    }

    #[test]
    #[should_panic(expected = "at most 13 devices")]
    fn refuses_more_devices_than_pins() {
        let _ = Layout::new(1, SLOTS_MAX + 1);
    }
}
