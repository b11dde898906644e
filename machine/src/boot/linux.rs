//! Puts a Linux kernel and what it must know into the memory of a PC, before its first start.
//!
//! A kernel is a bzImage, entered in 64-bit mode, or an ELF file with a PVH entry, entered in 32-bit mode: its
//! first bytes tell. Kernel and initial RAM disk are whatever the user has given. Everything is written through the
//! machine's memory, so all of it counts as dirty.

mod bzimage;
mod pvh;
mod start;

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};

use guest::abi::HIGH_MEMORY;

pub(crate) use self::start::{firmware, start_at};
use crate::memory::{GuestRam, PAGE_BYTES};
use crate::pc::{self, COMMAND_LINE, Layout, RESERVED};

/// The ends of RAM and of what is reserved, as both protocols number them.
const TYPE_RAM: u32 = 1;
const TYPE_RESERVED: u32 = 2;
const MIB: u64 = 1 << 20;

/// Why a kernel can't be loaded.
#[derive(Debug, Error)]
pub enum LinuxError {
    /// The file is something else.
    #[error(
        "the kernel is neither a bzImage nor an ELF file: give a Linux kernel for x86-64 (a distribution's /boot/vmlinuz-…, or a vmlinux)"
    )]
    Unknown,
    /// The file is a kernel, but not a whole one.
    #[error("the kernel is damaged ({what}): copy it again")]
    Damaged {
        /// What is wrong with it.
        what: &'static str,
    },
    /// It can't be entered in 64-bit mode.
    #[error(
        "the kernel speaks boot protocol {major}.{minor:02} without a 64-bit entry: give a 64-bit kernel, Linux 3.8 or newer"
    )]
    Protocol {
        /// The protocol's version.
        major: u8,
        /// The second part of it.
        minor: u8,
    },
    /// It can't be loaded.
    #[error("the kernel's ELF file can't be loaded: it is damaged, or it is too large for the machine's memory")]
    Elf(#[source] linux_loader::loader::Error),
    /// It has no entry that a virtual machine can use.
    #[error("the kernel's ELF file has no PVH entry: build it with CONFIG_PVH=y, or give its bzImage")]
    NoPvhEntry,
    /// It doesn't fit.
    #[error(
        "the kernel needs memory from {} to {} MiB, and the machine's low memory is from 1 to {} MiB: give it more memory",
        start / MIB, end.div_ceil(MIB), low_end / MIB
    )]
    TooLarge {
        /// Where it begins.
        start: u64,
        /// Where it ends.
        end: u64,
        /// Where low memory ends.
        low_end: u64,
    },
    /// There is nothing in the RAM disk.
    #[error("the initial RAM disk is empty: give a whole one, or none")]
    InitrdEmpty,
    /// The RAM disk doesn't fit.
    #[error(
        "the initial RAM disk has {bytes} bytes, and {room} are free above the kernel: give the machine more memory, or take a smaller one"
    )]
    InitrdTooLarge {
        /// Its size.
        bytes: u64,
        /// What there is for it.
        room: u64,
    },
    /// The command line is too long for the kernel.
    #[error("the kernel's command line has {bytes} bytes, and this kernel takes at most {max}: shorten it")]
    CommandLine {
        /// Its length.
        bytes: usize,
        /// The most that are possible.
        max: usize,
    },
}

/// Where and how the kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// In 64-bit mode, with the zero page.
    Long(u64),
    /// In 32-bit mode, with PVH's start information.
    Pvh(u64),
}

/// Fills the memory of the machine that has this layout.
pub(crate) fn load(
    ram: &GuestRam,
    kernel: &[u8],
    initrd: Option<&[u8]>,
    command_line: &str,
    layout: &Layout,
) -> Result<Entry, LinuxError> {
    if initrd.is_some_and(<[u8]>::is_empty) {
        return Err(LinuxError::InitrdEmpty);
    }
    let entry = if bzimage::is(kernel) {
        bzimage::load(ram, kernel, initrd, command_line)?
    } else if kernel.starts_with(b"\x7fELF") {
        pvh::load(ram, kernel, initrd, command_line)?
    } else {
        return Err(LinuxError::Unknown);
    };
    pc::acpi::write(ram, layout);
    pc::power::write_reset_program(ram);
    Ok(entry)
}

/// A part of the address space that the kernel is told of. What it is not told of is no memory.
struct Part {
    start: u64,
    end: u64,
    kind: u32,
}

/// Where there is memory, and whose.
fn memory_map(ram: &GuestRam) -> Vec<Part> {
    let part = |start, end, kind| Part { start, end, kind };
    let mut map = vec![
        part(0, RESERVED.start, TYPE_RAM),
        part(RESERVED.start, RESERVED.end, TYPE_RESERVED),
        part(RESERVED.end, ram.low_end(), TYPE_RAM),
    ];
    if ram.high_end() > HIGH_MEMORY {
        map.push(part(HIGH_MEMORY, ram.high_end(), TYPE_RAM));
    }
    map
}

/// Says that the kernel lies in low memory, above what it is told at its start.
fn check_place(ram: &GuestRam, start: u64, end: Option<u64>) -> Result<(), LinuxError> {
    let low_end = ram.low_end();
    match end {
        Some(end) if start >= RESERVED.end && end <= low_end => Ok(()),
        end => Err(LinuxError::TooLarge {
            start,
            end: end.unwrap_or(u64::MAX),
            low_end,
        }),
    }
}

/// Writes the RAM disk as high as it may lie, between the kernel's end and `limit`. Says where.
fn write_initrd(ram: &GuestRam, initrd: &[u8], kernel_end: u64, limit: u64) -> Result<u64, LinuxError> {
    const PAGE: u64 = PAGE_BYTES as u64;
    let bytes = initrd.len() as u64;
    let (floor, limit) = (
        kernel_end.max(RESERVED.end).next_multiple_of(PAGE),
        limit.min(ram.low_end()) / PAGE * PAGE,
    );
    let room = limit.saturating_sub(floor);
    if bytes > room {
        return Err(LinuxError::InitrdTooLarge { bytes, room });
    }
    let address = (limit - bytes) / PAGE * PAGE;
    ram.memory()
        .write_slice(initrd, GuestAddress(address))
        .expect("it was given a place in low memory");
    Ok(address)
}

/// Writes the command line, of which this kernel takes `max` bytes.
fn write_command_line(ram: &GuestRam, command_line: &str, max: usize) -> Result<(), LinuxError> {
    let max = max.min(crate::index(COMMAND_LINE.end - COMMAND_LINE.start) - 1);
    let bytes = command_line.len();
    if bytes > max {
        return Err(LinuxError::CommandLine { bytes, max });
    }
    let line = [command_line.as_bytes(), &[0]].concat();
    ram.memory()
        .write_slice(&line, GuestAddress(COMMAND_LINE.start))
        .expect("low memory is RAM");
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests;
