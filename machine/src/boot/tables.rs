//! Identity page tables: all memory and the device window, for user mode, in pages of 2 MiB.
//!
//! Entries are marked accessed and dirty from the start, so that the processor never writes to them:
//! they stay equal on both hosts, and out of the dirty log.

use guest::abi::{HIGH_MEMORY, PAGE_TABLES, STACK_TOP};
use vm_memory::{Bytes, GuestAddress};

use crate::memory::{GuestRam, MEMORY_MAX};

const PRESENT_WRITABLE_USER: u64 = 0b111;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const LINK: u64 = PRESENT_WRITABLE_USER | ACCESSED;
const LEAF: u64 = LINK | DIRTY | LARGE;
const TABLE: u64 = 4096;
const GIB: u64 = 1 << 30;

// One table each of the two upper levels, and one for each GiB; below the stack there is room.
const _: () = assert!(MEMORY_MAX + HIGH_MEMORY <= 512 * GIB);
const _: () = assert!(PAGE_TABLES + (2 + (MEMORY_MAX + HIGH_MEMORY) / GIB) * TABLE < STACK_TOP / 2);

/// Writes the tables for this machine.
pub(super) fn write(ram: &GuestRam) {
    let upper = PAGE_TABLES + TABLE;
    let first = upper + TABLE;
    put(ram, PAGE_TABLES, upper | LINK);
    for gib in 0..ram.high_end().div_ceil(GIB) {
        let table = first + gib * TABLE;
        put(ram, upper + gib * 8, table | LINK);
        for entry in 0..512 {
            put(ram, table + entry * 8, (gib * GIB + (entry << 21)) | LEAF);
        }
    }
}

fn put(ram: &GuestRam, address: u64, entry: u64) {
    ram.memory()
        .write_obj(entry.to_le(), GuestAddress(address))
        .expect("the page tables lie in low memory");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{MEMORY_STEP, Mapping};
    use guest::abi::{DOORBELL, LOW_MEMORY_END_MAX, VIRTIO_BASE};

    fn entry(ram: &GuestRam, table: u64, number: u64) -> u64 {
        ram.memory()
            .read_obj(GuestAddress((table & !0xfff) + number * 8))
            .unwrap()
    }

    /// Walks the tables as the processor does.
    fn translate(ram: &GuestRam, address: u64) -> Option<u64> {
        let present = |entry: u64| (entry & PRESENT_WRITABLE_USER == PRESENT_WRITABLE_USER).then_some(entry);
        let upper = present(entry(ram, PAGE_TABLES, address >> 39))?;
        let middle = present(entry(ram, upper, (address >> 30) & 511))?;
        let leaf = present(entry(ram, middle, (address >> 21) & 511))?;
        Some((leaf & !0x1f_ffff) + (address & 0x1f_ffff))
    }

    #[test]
    fn maps_memory_and_devices_to_themselves() {
        let ram = GuestRam::new(LOW_MEMORY_END_MAX + GIB + MEMORY_STEP, Mapping::Shared).unwrap();
        for address in [
            0,
            0x1234,
            LOW_MEMORY_END_MAX - 1,
            VIRTIO_BASE,
            DOORBELL + 8,
            HIGH_MEMORY + 7,
            ram.high_end() - 1,
        ] {
            write(&ram);
            assert_eq!(translate(&ram, address), Some(address), "{address:#x}");
        }
        assert_eq!(translate(&ram, 100 * GIB), None);
    }
}
