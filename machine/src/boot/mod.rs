//! Puts the guest's image, its page tables and what it must know into memory, before its first start.
//!
//! The guest is entered in ring 3 of 64-bit mode; `guest::abi` says where things lie. Everything is
//! written through the machine's memory, so all of it counts as dirty.

pub(crate) mod linux;
mod tables;

use std::io::{self, Cursor};

use guest::abi::{BOOT_INFO, BOOT_MAGIC, COMMAND_LINE, COMMAND_LINE_MAX, IMAGE_BASE, PAGE_TABLES, STACK_TOP};
use kvm_bindings::{kvm_dtable, kvm_segment};
use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::Elf;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};

pub use self::linux::LinuxError;
use crate::memory::GuestRam;
use crate::vcpu::state::{RegisterError, Registers};

const CR0_PROTECTED: u64 = 1;
const CR0_MONITOR: u64 = 1 << 1;
const CR0_EXTENSION: u64 = 1 << 4;
const CR0_NUMERIC_ERROR: u64 = 1 << 5;
const CR0_WRITE_PROTECT: u64 = 1 << 16;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_FXSR: u64 = 1 << 9;
const CR4_XMM_EXCEPTIONS: u64 = 1 << 10;
const EFER_LONG_MODE: u64 = 1 << 8 | 1 << 10;
const RFLAGS_RESERVED: u64 = 1 << 1;
const SELECTOR_CODE: u16 = 0x33;
const SELECTOR_DATA: u16 = 0x2b;

/// Why a guest can't be booted.
#[derive(Debug, Error)]
pub enum BootError {
    /// The image is no program, or does not fit.
    #[error("the guest image can't be loaded: it must be a 64-bit ELF program, and fit into the machine's memory")]
    Image(#[source] linux_loader::loader::Error),
    /// The image begins or ends where it must not.
    #[error(
        "the guest image lies outside of {IMAGE_BASE:#x} to {end:#x}: it was linked for another machine, or the machine's memory is too small"
    )]
    Place {
        /// Where low memory ends.
        end: u64,
    },
    /// The command line is too long.
    #[error("the guest's command line has {bytes} bytes, at most {COMMAND_LINE_MAX} are possible")]
    CommandLine {
        /// Its length.
        bytes: usize,
    },
    /// The kernel can't be loaded.
    #[error(transparent)]
    Linux(#[from] LinuxError),
    /// A file can't be read.
    #[error("the {what} can't be read")]
    File {
        /// Which.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// KVM doesn't take the registers to start with.
    #[error("the vCPU can't be set up for the guest")]
    Registers(#[from] RegisterError),
}

/// Fills the memory of a machine with `devices` devices. Returns where the guest starts.
pub(crate) fn load(ram: &GuestRam, image: &[u8], command_line: &str, devices: u64) -> Result<u64, BootError> {
    if command_line.len() > COMMAND_LINE_MAX {
        return Err(BootError::CommandLine {
            bytes: command_line.len(),
        });
    }
    let end = ram.low_end();
    let loaded = Elf::load(ram.memory(), None, &mut Cursor::new(image), None).map_err(BootError::Image)?;
    let entry = loaded.kernel_load.0;
    if !(IMAGE_BASE..end).contains(&entry) || loaded.kernel_end > end {
        return Err(BootError::Place { end });
    }
    tables::write(ram);
    let memory = ram.memory();
    memory
        .write_slice(command_line.as_bytes(), GuestAddress(COMMAND_LINE))
        .expect("low memory is RAM");
    let info = [BOOT_MAGIC, end, ram.high_end(), command_line.len() as u64, devices];
    for (field, address) in info.into_iter().zip((BOOT_INFO..).step_by(8)) {
        memory
            .write_obj(field.to_le(), GuestAddress(address))
            .expect("low memory is RAM");
    }
    Ok(entry)
}

/// Sets the registers with which the guest starts at `entry`.
pub(crate) fn start_at(entry: u64, registers: &mut Registers) {
    registers.regs = kvm_bindings::kvm_regs {
        rip: entry,
        rsp: STACK_TOP,
        rdi: BOOT_INFO,
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    };
    let sregs = &mut registers.sregs;
    sregs.cr0 = CR0_PROTECTED | CR0_MONITOR | CR0_EXTENSION | CR0_NUMERIC_ERROR | CR0_WRITE_PROTECT | CR0_PAGING;
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 = CR4_PAE | CR4_FXSR | CR4_XMM_EXCEPTIONS;
    sregs.efer = EFER_LONG_MODE;
    let flat = kvm_segment {
        limit: u32::MAX,
        present: 1,
        dpl: 3,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment {
        selector: SELECTOR_CODE,
        type_: 0xb,
        l: 1,
        ..flat
    };
    let data = kvm_segment {
        selector: SELECTOR_DATA,
        type_: 0x3,
        db: 1,
        ..flat
    };
    sregs.ss = data;
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.gdt = kvm_dtable::default();
    sregs.idt = kvm_dtable::default();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{MEMORY_MIN, Mapping};

    fn ram() -> GuestRam {
        GuestRam::new(MEMORY_MIN, Mapping::Shared).unwrap()
    }

    #[test]
    fn refuses_what_is_no_image() {
        for image in [&b""[..], b"\x7fELF", &[0; 4096], &[0xff; 100]] {
            assert!(matches!(load(&ram(), image, "", 4), Err(BootError::Image(_))));
        }
    }

    #[test]
    fn refuses_a_command_line_that_does_not_fit() {
        let line = "x".repeat(COMMAND_LINE_MAX + 1);
        assert!(matches!(
            load(&ram(), b"", &line, 4),
            Err(BootError::CommandLine { bytes: 4097 })
        ));
    }
}
