//! The bzImage: Linux's own boot protocol, entered in 64-bit mode.

use std::io::Cursor;

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::KernelLoader;
use linux_loader::loader::bzimage::BzImage;
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::{Entry, LinuxError, check_place, memory_map, write_command_line, write_initrd};
use crate::memory::GuestRam;
use crate::pc::{ACPI_TABLES, COMMAND_LINE, ZERO_PAGE};

/// Where the header is in the file.
pub(super) const HEADER: usize = 0x1f1;
const MAGIC: std::ops::Range<usize> = 0x202..0x206;
/// The byte that says how far the header goes on after [`HEADER_AFTER`].
const HEADER_LENGTH: usize = 0x201;
const HEADER_AFTER: usize = 0x202;
/// From this version on the header has all fields that are used here: 2.12.
const VERSION_MIN: u16 = 0x20c;
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
/// A loader without a number of its own.
const LOADER: u8 = 0xff;
const SECTOR: u64 = 512;
/// From where the kernel is loaded to its 64-bit entry.
const ENTRY_64: u64 = 0x200;

/// Says whether a file is a bzImage, or at least calls itself one.
pub(super) fn is(kernel: &[u8]) -> bool {
    kernel.get(MAGIC) == Some(b"HdrS")
}

/// Loads it, and writes its zero page.
pub(super) fn load(
    ram: &GuestRam,
    kernel: &[u8],
    initrd: Option<&[u8]>,
    command_line: &str,
) -> Result<Entry, LinuxError> {
    let mut header = header(kernel)?;
    let start = header.pref_address;
    let end = start.checked_add(payload_bytes(kernel, &header)?.max(header.init_size.into()));
    check_place(ram, start, end)?;
    let end = end.expect("the place was checked");
    write_command_line(ram, command_line, crate::index(header.cmdline_size.into()))?;
    if let Some(initrd) = initrd {
        let limit = u64::from(header.initrd_addr_max) + 1;
        let low = |value: u64| u32::try_from(value).expect("low memory ends below 4 GiB");
        header.ramdisk_image = low(write_initrd(ram, initrd, end, limit)?);
        header.ramdisk_size = low(initrd.len() as u64);
    }
    BzImage::load(ram.memory(), Some(GuestAddress(start)), &mut Cursor::new(kernel), None).map_err(|_| {
        LinuxError::Damaged {
            what: "it can't be read",
        }
    })?;
    header.type_of_loader = LOADER;
    header.cmd_line_ptr = u32::try_from(COMMAND_LINE.start).expect("low memory ends below 4 GiB");
    write_zero_page(ram, header);
    Ok(Entry::Long(start + ENTRY_64))
}

/// Reads the header, as far as the file says that it goes, and says that it can be used.
fn header(kernel: &[u8]) -> Result<setup_header, LinuxError> {
    let damaged = LinuxError::Damaged {
        what: "its header is cut off",
    };
    let Some(after) = kernel.get(HEADER_LENGTH) else {
        return Err(damaged);
    };
    let mut header = setup_header::default();
    let length = (HEADER_AFTER - HEADER + usize::from(*after)).min(size_of::<setup_header>());
    let Some(bytes) = kernel.get(HEADER..HEADER + length) else {
        return Err(damaged);
    };
    header.as_mut_slice()[..length].copy_from_slice(bytes);
    let [minor, major] = header.version.to_le_bytes();
    let long = header.loadflags & LOADED_HIGH != 0 && header.xloadflags & XLF_KERNEL_64 != 0;
    if header.version < VERSION_MIN || !long {
        return Err(LinuxError::Protocol { major, minor });
    }
    Ok(header)
}

/// Bytes of what is loaded: the file without its real-mode part.
fn payload_bytes(kernel: &[u8], header: &setup_header) -> Result<u64, LinuxError> {
    let sectors = match header.setup_sects {
        0 => 4,
        sectors => u64::from(sectors),
    };
    (kernel.len() as u64)
        .checked_sub((sectors + 1) * SECTOR)
        .filter(|bytes| *bytes > ENTRY_64)
        .ok_or(LinuxError::Damaged { what: "it is cut off" })
}

fn write_zero_page(ram: &GuestRam, header: setup_header) {
    let mut page = boot_params {
        hdr: header,
        acpi_rsdp_addr: ACPI_TABLES.start,
        ..Default::default()
    };
    let map = memory_map(ram);
    page.e820_entries = u8::try_from(map.len()).expect("the memory has few parts");
    for (number, part) in map.iter().enumerate() {
        page.e820_table[number] = boot_e820_entry {
            addr: part.start,
            size: part.end - part.start,
            r#type: part.kind,
        };
    }
    ram.memory()
        .write_obj(page, GuestAddress(ZERO_PAGE))
        .expect("low memory is RAM");
}
