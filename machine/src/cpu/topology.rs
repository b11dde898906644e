//! The leaves that say which vCPU this is, and how many there are.
//!
//! A guest sees one package of cores with one thread each. Linux reads that in several places, by vendor and by age: all
//! of them say the same. The number of a vCPU is that of its local APIC.

use super::CpuLeaf;

const HTT: u32 = 1 << 28;
const CMP_LEGACY: u32 = 1 << 1;
const TOPOEXT: u32 = 1 << 22;
/// Fields of a cache's leaf: its level, how many logical processors share it, and how many cores there are, less one.
const CACHE_SHARED: u32 = 0xfff << 14;
const CACHE_CORES: u32 = 0x3f << 26;
/// The first level of cache that all cores share.
const SHARED_LEVEL: u32 = 3;

/// Completes the leaves for vCPU `vcpu` of `vcpus`.
///
/// # Panics
/// If there are no vCPUs, or more than an APIC's eight bits can tell apart.
pub(super) fn describe(leaves: &mut Vec<CpuLeaf>, vcpu: u8, vcpus: u8) {
    assert!(vcpu < vcpus, "vCPU {vcpu} is one of {vcpus}");
    let (id, count) = (u32::from(vcpu), u32::from(vcpus));
    // Bits of an APIC number that tell the cores apart.
    let bits = count.next_power_of_two().trailing_zeros();
    let several = |bit: u32| if count > 1 { bit } else { 0 };
    let amd = leaves.iter().any(|leaf| leaf.function == 0 && is_amd(leaf));
    let topoext = leaves
        .iter()
        .any(|leaf| leaf.function == 0x8000_0001 && leaf.ecx & TOPOEXT != 0);
    for leaf in &mut *leaves {
        match leaf.function {
            1 => {
                leaf.ebx = leaf.ebx & 0xff00 | (1 << bits).min(0xff) << 16 | id << 24;
                leaf.edx = leaf.edx & !HTT | several(HTT);
            }
            4 => {
                let cores = (1 << bits) - 1;
                let shared = if level(leaf) < SHARED_LEVEL { 0 } else { cores };
                leaf.eax = leaf.eax & !(CACHE_SHARED | CACHE_CORES) | shared << 14 | cores << 26;
            }
            0x8000_0001 if amd => leaf.ecx = leaf.ecx & !CMP_LEGACY | several(CMP_LEGACY),
            0x8000_0008 if amd => leaf.ecx = (count - 1) | (bits << 12),
            0x8000_001d => {
                let shared = if level(leaf) < SHARED_LEVEL { 0 } else { count - 1 };
                leaf.eax = leaf.eax & !CACHE_SHARED | shared << 14;
            }
            _ => {}
        }
    }
    // Threads of a core, cores of the package, and the end of the list.
    leaves.push(CpuLeaf::new(0xb, 0, [0, 1, 0x100, id]));
    leaves.push(CpuLeaf::new(0xb, 1, [bits, count, 0x201, id]));
    leaves.push(CpuLeaf::new(0xb, 2, [0, 0, 2, id]));
    if amd && topoext {
        leaves.push(CpuLeaf::new(0x8000_001e, 0, [id, id, 0, 0]));
    }
    leaves.sort_unstable();
    set_last(leaves);
}

fn is_amd(leaf: &CpuLeaf) -> bool {
    [*b"Auth", *b"Hygo"].map(u32::from_le_bytes).contains(&leaf.ebx)
}

fn level(leaf: &CpuLeaf) -> u32 {
    leaf.eax >> 5 & 7
}

/// Says in the first leaf of each range which is its last.
fn set_last(leaves: &mut [CpuLeaf]) {
    for first in [0, 0x4000_0000, 0x8000_0000] {
        let range = leaves
            .iter()
            .map(|leaf| leaf.function)
            .filter(|function| function >> 28 == first >> 28);
        let last = range.max();
        for leaf in leaves.iter_mut().filter(|leaf| leaf.function == first) {
            leaf.eax = last.unwrap_or(first);
        }
    }
}
