//! CPUs for tests.

use super::{CpuLeaf, CpuModel};

pub(crate) const AMD: [u32; 3] = [0x6874_7541, 0x444d_4163, 0x6974_6e65];
pub(crate) const INTEL: [u32; 3] = [0x756e_6547, 0x6c65_746e, 0x4965_6e69];

/// What KVM tells on a server of 2022 with AVX-512, roughly.
pub(crate) fn made_by(vendor: [u32; 3]) -> CpuModel {
    let [ebx, ecx, edx] = vendor;
    let leaves = vec![
        CpuLeaf::new(0x8000_0008, 0, [0x3030, 0x0100_d000, 0x7007, 0]),
        CpuLeaf::new(0, 0, [0x20, ebx, ecx, edx]),
        CpuLeaf::new(1, 0, [0x00a1_0f11, 0x0710_0800, 0xfffa_3203, 0x178b_fbff]),
        CpuLeaf::new(6, 0, [4, 0, 1, 0]),
        CpuLeaf::new(7, 0, [1, 0xf1bf_07ab, 0x0040_5fce, 0x2400_0010]),
        CpuLeaf::new(7, 1, [0x20, 0, 0, 0]),
        CpuLeaf::new(0xb, 0, [1, 2, 0x100, 0]),
        CpuLeaf::new(0xd, 0, [0x2e7, 0x240, 0x988, 0]),
        CpuLeaf::new(0xd, 1, [0xf, 0x240, 0x1800, 0]),
        CpuLeaf::new(0xd, 2, [256, 576, 0, 0]),
        CpuLeaf::new(0xd, 5, [64, 832, 0, 0]),
        CpuLeaf::new(0xd, 6, [512, 896, 0, 0]),
        CpuLeaf::new(0xd, 7, [1024, 1408, 0, 0]),
        CpuLeaf::new(0xd, 9, [8, 2432, 0, 0]),
        CpuLeaf::new(0x4000_0000, 0, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
        CpuLeaf::new(0x4000_0001, 0, [0x0100_080a, 0, 0, 0]),
        CpuLeaf::new(0x8000_0000, 0, [0x8000_0021, ebx, ecx, edx]),
        CpuLeaf::new(0x8000_0001, 0, [0x00a1_0f11, 0, 0x0040_01f3, 0x2fd3_fbff]),
    ];
    CpuModel::new(leaves, vec![0xc000_0081, 0x174, 0x10a, 0x174])
}

pub(crate) fn server() -> CpuModel {
    made_by(AMD)
}
