//! The registers with which a Linux kernel starts, and what it finds in memory for them.

use kvm_bindings::{kvm_dtable, kvm_msr_entry, kvm_regs, kvm_segment};
use vm_memory::{Bytes, GuestAddress};

use super::Entry;
use crate::boot::{CR0_EXTENSION, CR0_PAGING, CR0_PROTECTED, CR4_PAE, EFER_LONG_MODE, RFLAGS_RESERVED};
use crate::memory::GuestRam;
use crate::pc::{DESCRIPTORS, PAGE_TABLES, START_INFO, ZERO_PAGE};
use crate::vcpu::state::Registers;

/// The selectors that Linux's boot protocol asks for.
const SELECTOR_CODE: u16 = 0x10;
const SELECTOR_DATA: u16 = 0x18;
const SELECTOR_TASK: u16 = 0x20;

/// The default type of memory, with the variable ranges off.
const MSR_MTRR_DEFAULT: u32 = 0x2ff;
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

const TABLE: u64 = 4096;
const GIB: u64 = 1 << 30;
/// The first gibibytes lie where they are: low memory and everything below 4 GiB.
const MAPPED_GIB: u64 = 4;
const PRESENT_WRITABLE: u64 = 0b11;
const LARGE: u64 = 1 << 7;

/// Sets the registers of the first vCPU to `entry`, and writes its descriptors and page tables.
pub(crate) fn start_at(entry: Entry, ram: &GuestRam, registers: &mut Registers) {
    registers.regs = kvm_regs {
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    };
    let long = match entry {
        Entry::Long(at) => {
            registers.regs.rip = at;
            registers.regs.rsi = ZERO_PAGE;
            true
        }
        Entry::Pvh(at) => {
            registers.regs.rip = at;
            registers.regs.rbx = START_INFO;
            false
        }
    };
    let [code, data, task] = segments(long);
    write_descriptors(ram, &[code, data, task]);
    let sregs = &mut registers.sregs;
    (sregs.cs, sregs.tr) = (code, task);
    for segment in [
        &mut sregs.ss,
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
    ] {
        *segment = data;
    }
    sregs.gdt = kvm_dtable {
        base: DESCRIPTORS,
        limit: DESCRIPTORS_BYTES - 1,
        ..Default::default()
    };
    sregs.idt = kvm_dtable::default();
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (CR0_PROTECTED | CR0_EXTENSION, 0, 0, 0);
    if long {
        write_page_tables(ram);
        sregs.cr0 |= CR0_PAGING;
        sregs.cr3 = PAGE_TABLES;
        sregs.cr4 = CR4_PAE;
        sregs.efer = EFER_LONG_MODE;
    }
}

/// Sets what firmware sets on every vCPU before a kernel comes: all memory can be cached.
pub(crate) fn firmware(registers: &mut Registers) {
    let entry = kvm_msr_entry {
        index: MSR_MTRR_DEFAULT,
        data: MTRR_ENABLED_WRITE_BACK,
        ..Default::default()
    };
    // A host that does not keep it does without.
    if let Some(msr) = registers.msrs.iter_mut().find(|msr| msr.index == MSR_MTRR_DEFAULT) {
        *msr = entry;
    }
}

/// Flat code and data, and a task that is never used but must be there.
fn segments(long: bool) -> [kvm_segment; 3] {
    let flat = kvm_segment {
        limit: u32::MAX,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let code = kvm_segment {
        selector: SELECTOR_CODE,
        type_: 0xb,
        l: u8::from(long),
        db: u8::from(!long),
        ..flat
    };
    let data = kvm_segment {
        selector: SELECTOR_DATA,
        type_: 0x3,
        db: 1,
        ..flat
    };
    let task = kvm_segment {
        selector: SELECTOR_TASK,
        type_: 0xb,
        limit: 0x67,
        present: 1,
        ..Default::default()
    };
    [code, data, task]
}

/// Descriptors 0 and 1 are empty, then come code, data, and the task with its upper half.
const DESCRIPTORS_BYTES: u16 = 6 * 8;

fn write_descriptors(ram: &GuestRam, segments: &[kvm_segment]) {
    for segment in segments {
        ram.memory()
            .write_obj(
                descriptor(segment).to_le(),
                GuestAddress(DESCRIPTORS + u64::from(segment.selector)),
            )
            .expect("low memory is RAM");
    }
}

/// A segment with base 0 as the processor reads it from a table.
fn descriptor(segment: &kvm_segment) -> u64 {
    let pages = segment.g == 1;
    let limit = u64::from(if pages { segment.limit >> 12 } else { segment.limit });
    let flag = |value: u8, bit: u32| u64::from(value) << bit;
    (limit & 0xffff)
        | flag(segment.type_, 40)
        | flag(segment.s, 44)
        | flag(segment.dpl, 45)
        | flag(segment.present, 47)
        | (limit >> 16) << 48
        | flag(segment.l, 53)
        | flag(segment.db, 54)
        | flag(segment.g, 55)
}

/// Maps the first gibibytes to themselves, in pages of 2 MiB.
fn write_page_tables(ram: &GuestRam) {
    let put = |address: u64, entry: u64| {
        ram.memory()
            .write_obj(entry.to_le(), GuestAddress(address))
            .expect("low memory is RAM");
    };
    let middle = PAGE_TABLES + TABLE;
    put(PAGE_TABLES, middle | PRESENT_WRITABLE);
    for gib in 0..MAPPED_GIB {
        let table = middle + (gib + 1) * TABLE;
        put(middle + gib * 8, table | PRESENT_WRITABLE);
        for entry in 0..512 {
            let leaf = (gib * GIB) | (entry << 21) | PRESENT_WRITABLE | LARGE;
            put(table + entry * 8, leaf);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{MEMORY_MIN, Mapping};

    fn started(entry: Entry) -> (GuestRam, Registers) {
        let ram = GuestRam::new(MEMORY_MIN, Mapping::Shared).unwrap();
        let mut registers = Registers {
            regs: kvm_regs {
                rdx: 1,
                ..Default::default()
            },
            sregs: Default::default(),
            xsave: Default::default(),
            xcrs: Default::default(),
            debug: Default::default(),
            events: Default::default(),
            run_state: Default::default(),
            msrs: Vec::new(),
            timing: None,
        };
        start_at(entry, &ram, &mut registers);
        (ram, registers)
    }

    fn entry(ram: &GuestRam, address: u64) -> u64 {
        ram.memory().read_obj(GuestAddress(address)).unwrap()
    }

    #[test]
    fn descriptors_are_those_of_the_registers() {
        let read = |ram: &GuestRam| {
            [SELECTOR_CODE, SELECTOR_DATA, SELECTOR_TASK, SELECTOR_TASK + 8]
                .map(|selector| entry(ram, DESCRIPTORS + u64::from(selector)))
        };
        let (ram, long) = started(Entry::Long(0x100_0200));
        assert_eq!(
            read(&ram),
            [0xaf_9b00_0000_ffff, 0xcf_9300_0000_ffff, 0x8b00_0000_0067, 0]
        );
        assert_eq!(
            (long.sregs.cs.selector, long.sregs.cs.l, long.sregs.cs.db),
            (0x10, 1, 0)
        );
        assert_eq!(long.sregs.gdt.limit, 47);
        let (ram, pvh) = started(Entry::Pvh(0x100_0000));
        assert_eq!(read(&ram)[..2], [0xcf_9b00_0000_ffff, 0xcf_9300_0000_ffff]);
        assert_eq!((pvh.sregs.cs.l, pvh.sregs.cs.db), (0, 1));
    }

    #[test]
    fn a_bzimage_starts_in_64_bit_mode_with_everything_mapped_to_itself() {
        let (ram, registers) = started(Entry::Long(0x100_0200));
        assert_eq!(registers.regs.rip, 0x100_0200);
        assert_eq!(registers.regs.rsi, ZERO_PAGE);
        assert_eq!(registers.regs.rdx, 0, "nothing is left of before");
        assert_eq!(registers.sregs.efer, 0x500);
        assert_eq!(registers.sregs.cr0 & 0x8000_0001, 0x8000_0001);
        for address in [0, 0x9000, 0x1234_5678, 0xbfff_ffff, 0xfee0_0000, 0xffff_ffff_u64] {
            let present = |entry: u64| {
                assert_eq!(entry & 3, 3);
                entry & !0xfff
            };
            let upper = present(entry(&ram, registers.sregs.cr3 + (address >> 39) * 8));
            let middle = present(entry(&ram, upper + ((address >> 30) & 511) * 8));
            let leaf = entry(&ram, middle + ((address >> 21) & 511) * 8);
            assert_eq!(leaf, (address & !0x1f_ffff) | 0x83, "{address:#x}");
        }
    }

    #[test]
    fn a_pvh_kernel_starts_in_32_bit_mode_without_paging() {
        let (_, registers) = started(Entry::Pvh(0x100_0040));
        assert_eq!((registers.regs.rip, registers.regs.rbx), (0x100_0040, START_INFO));
        assert_eq!(registers.regs.rflags, 2);
        let sregs = registers.sregs;
        assert_eq!((sregs.cr0, sregs.cr4, sregs.efer), (0x11, 0, 0));
    }

    #[test]
    fn memory_can_be_cached() {
        let (_, mut registers) = started(Entry::Pvh(0));
        registers.msrs.push(kvm_msr_entry {
            index: MSR_MTRR_DEFAULT,
            ..Default::default()
        });
        firmware(&mut registers);
        let msrs: Vec<_> = registers.msrs.iter().map(|msr| (msr.index, msr.data)).collect();
        assert_eq!(msrs, [(0x2ff, 0x806)]);
    }
}
