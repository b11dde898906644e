//! The ELF file with a PVH entry: Xen's boot protocol for virtual machines, entered in 32-bit mode.

use std::io::Cursor;

use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::{Entry, LinuxError, check_place, memory_map, write_command_line, write_initrd};
use crate::memory::GuestRam;
use crate::pc::{ACPI_TABLES, COMMAND_LINE, START_INFO};

const MAGIC: u32 = 0x336e_c578;
/// The version that has a memory map.
const VERSION: u32 = 1;
const MODULES: u64 = START_INFO + 0x100;
const MEMORY_MAP: u64 = START_INFO + 0x200;
/// What Linux takes of a command line on x86; the ELF file does not say.
const COMMAND_LINE_MAX: usize = 2047;

/// Loads it, and writes its start information.
pub(super) fn load(
    ram: &GuestRam,
    kernel: &[u8],
    initrd: Option<&[u8]>,
    command_line: &str,
) -> Result<Entry, LinuxError> {
    let loaded = Elf::load(ram.memory(), None, &mut Cursor::new(kernel), None).map_err(LinuxError::Elf)?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(LinuxError::NoPvhEntry);
    };
    check_place(ram, entry.0, Some(loaded.kernel_end.max(entry.0 + 1)))?;
    write_command_line(ram, command_line, COMMAND_LINE_MAX)?;
    let mut info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        cmdline_paddr: COMMAND_LINE.start,
        rsdp_paddr: ACPI_TABLES.start,
        memmap_paddr: MEMORY_MAP,
        ..Default::default()
    };
    if let Some(initrd) = initrd {
        let module = hvm_modlist_entry {
            paddr: write_initrd(ram, initrd, loaded.kernel_end, ram.low_end())?,
            size: initrd.len() as u64,
            ..Default::default()
        };
        info.nr_modules = 1;
        info.modlist_paddr = MODULES;
        put(ram, MODULES, module);
    }
    for (part, address) in memory_map(ram)
        .iter()
        .zip((MEMORY_MAP..).step_by(size_of::<hvm_memmap_table_entry>()))
    {
        let entry = hvm_memmap_table_entry {
            addr: part.start,
            size: part.end - part.start,
            type_: part.kind,
            reserved: 0,
        };
        put(ram, address, entry);
        info.memmap_entries += 1;
    }
    put(ram, START_INFO, info);
    Ok(Entry::Pvh(entry.0))
}

fn put<T: ByteValued>(ram: &GuestRam, address: u64, value: T) {
    ram.memory()
        .write_obj(value, GuestAddress(address))
        .expect("low memory is RAM");
}
