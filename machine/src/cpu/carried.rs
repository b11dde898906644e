//! Which features, XSAVE components and MSRs a guest may have: those whose state comes along to another host.

use kvm_bindings::kvm_xsave;

use super::CpuLeaf;

pub(super) const TSC_DEADLINE: u32 = 1 << 24;
pub(super) const HYPERVISOR: u32 = 1 << 31;
const PV_SEND_IPI: u32 = 1 << 11;

/// KVM's offers to the guest that are the same on every host and have no state but the clock's: nop-io-delay, clocksource2,
/// pv-send-ipi, clocksource-stable. Not the others: asynchronous page faults, steal time, PV end-of-interrupt, PV unhalt
/// and PV TLB flush are a conversation of the guest with its host in the guest's memory, which the next host would not
/// go on with; polling and yielding depend on the host's kernel.
const PARAVIRTUAL: u32 = 1 << 1 | 1 << 3 | PV_SEND_IPI | 1 << 24;

/// Bits taken from what KVM offers, by function, index, and eax, ebx, ecx, edx.
#[rustfmt::skip]
const HIDDEN: [(u32, u32, [u32; 4]); 10] = [
    // Nested virtualisation, the performance counters and their buffers, SMX; OSXSAVE follows the guest. Threads are the topology's.
    // The rest of ebx numbers processors.
    (1, 0, [0, !0xff00, bits(&[2, 3, 4, 5, 6, 15, 27]), bits(&[21, 28])]),
    // SGX, MPX, cache allocation, processor trace.
    (7, 0, [0, bits(&[2, 12, 14, 15, 25]),
        // OSPKE follows the guest. Shadow stacks (their pointer is no MSR), key locker, ENQCMD, SGX, supervisor keys.
        bits(&[4, 7, 13, 23, 29, 30, 31]),
        // SGX, user interrupts, hybrid, PCONFIG, LBR, branch tracking, AMX, core capabilities.
        bits(&[1, 5, 15, 18, 19, 20, 22, 24, 25, 30])]),
    // Performance counters, FRED, NMI sources, AMX, HRESET, lists of MSRs.
    (7, 1, [bits(&[8, 17, 20, 21, 22, 27]), 0, 0, bits(&[8, 15, 18, 19])]),
    // The components that the kernel keeps, which KVM does not save as one; XFD, which is AMX's.
    (0xd, 1, [bits(&[4]), u32::MAX, u32::MAX, u32::MAX]),
    (0xd, 0, [0, u32::MAX, 0, 0]),
    (6, 0, [!bits(&[2]), u32::MAX, u32::MAX, u32::MAX]),
    (0x4000_0001, 0, [!PARAVIRTUAL, u32::MAX, u32::MAX, u32::MAX]),
    // SVM, sampling, SKINIT, watchdog, LWP, node number, performance counters, MWAITX.
    (0x8000_0001, 0, [0, 0, bits(&[1, 2, 10, 12, 13, 15, 19, 23, 24, 27, 28, 29]), 0]),
    // Guest address size is a hint; counters of the host's; the topology.
    (0x8000_0008, 0, [0xffff_0000, bits(&[1, 4, 23, 27, 31]), u32::MAX, u32::MAX]),
    (0x8000_0021, 0, [bits(&[13, 24]), u32::MAX, 0, u32::MAX]),
];

/// Ranges of MSRs that belong to what is hidden, or to the host, and would only make two hosts look different.
const FOREIGN_MSRS: [(u32, u32); 18] = [
    (0x8c, 0x8f), // SGX
    (0xc1, 0xc8), // performance counters
    (0x186, 0x18d),
    (0x309, 0x30c),
    (0x329, 0x329),
    (0x345, 0x345),
    (0x38d, 0x390),
    (0x3f1, 0x3f2),
    (0x480, 0x493), // VMX
    (0x4c1, 0x4c8),
    (0x560, 0x58f), // processor trace
    (0x600, 0x600),
    (0x6a0, 0x6a8),             // CET
    (0xd90, 0xd90),             // MPX
    (0x4000_0000, 0x4000_01ff), // Hyper-V
    (0x4b56_4d02, 0x4b56_4dff), // KVM's, but for the clock
    (0xc001_0000, 0xc001_0007),
    (0xc001_0200, 0xc001_020b),
];

/// More of them, one by one: VM_HSAVE_PA, the TSC ratio of nested guests, XFD and its error, LBR's control and depth. KVM's wall clock
/// under both numbers: to set it is to have KVM write the time into guest memory, which is the guest's once it has read it.
/// And the old number of KVM's clock, which is the same register as the new one.
const FOREIGN_MSR: [u32; 9] = [
    0xc001_0117,
    0xc000_0104,
    0x1c4,
    0x1c5,
    0x14ce,
    0x14cf,
    0x11,
    0x4b56_4d00,
    0x12,
];

const fn bits(numbers: &[u32]) -> u32 {
    let (mut bits, mut at) = (0, 0);
    while at < numbers.len() {
        bits |= 1 << numbers[at];
        at += 1;
    }
    bits
}

/// Tells whether a function answers by index.
pub(super) const fn indexed(function: u32) -> bool {
    matches!(function, 4 | 7 | 0xb | 0xd | 0x8000_001d)
}

/// Tells whether a leaf is a model's, and hides what is not to be seen in it.
pub(super) fn keep(leaf: &mut CpuLeaf) -> bool {
    let known = matches!(
        (leaf.function, leaf.index),
        (0..=2 | 6 | 0x4000_0000..=0x4000_0001 | 0x8000_0000..=0x8000_0006 | 0x8000_0008 | 0x8000_0021, 0)
            | (4 | 0x8000_001d, 0..=7)
            | (7, 0..=2)
            | (0xd, 0..=62)
    );
    for (function, index, hidden) in HIDDEN {
        if (function, index) == (leaf.function, leaf.index) {
            leaf.eax &= !hidden[0];
            leaf.ebx &= !hidden[1];
            leaf.ecx &= !hidden[2];
            leaf.edx &= !hidden[3];
        }
    }
    // A cache of no kind ends their list.
    let ends = matches!(leaf.function, 4 | 0x8000_001d) && leaf.eax & 0x1f == 0;
    known && !ends
}

/// Takes away the XSAVE components that end beyond what is saved of them.
pub(super) fn drop_wide_components(leaves: &mut Vec<CpuLeaf>) {
    let fits = |leaf: &CpuLeaf| {
        let end = u64::from(leaf.eax) + u64::from(leaf.ebx);
        // The user's, of a size, within the structure.
        leaf.ecx & 1 == 0 && leaf.eax != 0 && end <= size_of::<kvm_xsave>() as u64
    };
    let component = |leaf: &CpuLeaf| leaf.function == 0xd && leaf.index >= 2;
    leaves.retain(|leaf| !component(leaf) || fits(leaf));
    let fitting = leaves.iter().filter(|leaf| component(leaf) && leaf.index < 32);
    let low = fitting.fold(0b11, |low, leaf| low | 1 << leaf.index);
    for leaf in leaves.iter_mut().filter(|leaf| (leaf.function, leaf.index) == (0xd, 0)) {
        leaf.eax &= low;
        leaf.edx = 0;
    }
}

/// Takes away what only an interrupt controller in the kernel gives.
pub(super) fn drop_irqchip(leaves: &mut [CpuLeaf]) {
    for leaf in leaves {
        match leaf.function {
            1 => leaf.ecx &= !TSC_DEADLINE,
            0x4000_0001 => leaf.eax &= !PV_SEND_IPI,
            _ => {}
        }
    }
}

/// Tells whether an MSR comes along to another host.
pub(super) fn msr(index: u32) -> bool {
    let foreign = FOREIGN_MSRS
        .iter()
        .any(|(first, last)| (*first..=*last).contains(&index));
    !foreign && !FOREIGN_MSR.contains(&index)
}
