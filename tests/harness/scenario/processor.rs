//! The processor of a scenario's hosts. Never a real one's.

use checkpoint::cpu::{CpuLeaf, CpuModel};

/// A host's processor, and what a VM has of it.
pub(super) struct Processor {
    /// What it can give a VM's CPU.
    pub(super) gives: CpuModel,
    /// The CPU of the VM that the host runs or has run.
    pub(super) model: CpuModel,
}

impl Default for Processor {
    fn default() -> Self {
        Self {
            gives: with_a_few_features(),
            model: CpuModel::default(),
        }
    }
}

/// A processor with a few features.
fn with_a_few_features() -> CpuModel {
    let leaf = |function, [eax, ebx, ecx, edx]: [u32; 4]| CpuLeaf {
        function,
        index: 0,
        eax,
        ebx,
        ecx,
        edx,
    };
    let leaves = vec![
        leaf(0, [0, u32::from_le_bytes(*b"Toys"), 0, 0]),
        // pni, ssse3, sse4_1, sse4_2, rdrand; sse, sse2.
        leaf(1, [0, 0x800, 0x4018_0201, 0x0600_0000]),
    ];
    CpuModel::new(leaves, vec![0x174])
}
