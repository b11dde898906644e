//! What each vCPU is told of the topology, and what no guest is told.

use super::*;

fn model(vendor: &[u8; 4], more: &[CpuLeaf]) -> CpuModel {
    let vendor = u32::from_le_bytes(*vendor);
    let mut leaves = vec![
        CpuLeaf::new(0, 0, [0x20, vendor, 1, 2]),
        CpuLeaf::new(1, 0, [0x00a1_0f11, 0x0710_0800, 1 << 24 | 1 << 31, 0x178b_fbff]),
        CpuLeaf::new(0x4000_0000, 0, [0, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
        CpuLeaf::new(0x4000_0001, 0, [0x0100_080a, 0, 0, 0]),
        CpuLeaf::new(0x8000_0000, 0, [0x8000_0021, vendor, 1, 2]),
        CpuLeaf::new(0x8000_0001, 0, [0x00a1_0f11, 0, 0x0040_0103, 0]),
        CpuLeaf::new(0x8000_0008, 0, [0x3030, 0, 0, 0]),
    ];
    leaves.extend_from_slice(more);
    leaves.sort_unstable();
    CpuModel {
        leaves,
        msrs: Vec::new(),
    }
}

/// Returns eax, ebx, ecx, edx as vCPU `vcpu` of `vcpus` sees them.
fn seen(model: &CpuModel, (vcpu, vcpus): (u8, u8), function: u32, index: u32) -> Option<[u32; 4]> {
    let cpuid = model.cpuid_for(vcpu, vcpus, true);
    let entry = cpuid
        .as_slice()
        .iter()
        .find(|entry| (entry.function, entry.index) == (function, index))?;
    assert_eq!(
        entry.flags,
        u32::from(matches!(function, 4 | 7 | 0xb | 0xd | 0x8000_001d))
    );
    Some([entry.eax, entry.ebx, entry.ecx, entry.edx])
}

#[test]
fn an_amd_guest_counts_its_cores() {
    let model = model(
        b"Auth",
        &[
            CpuLeaf::new(0x8000_001d, 0, [0x4121, 0x01c0_003f, 0x3f, 0]),
            CpuLeaf::new(0x8000_001d, 3, [0x7c163, 0x03c0_003f, 0x7fff, 1]),
        ],
    );
    let at = |place, function, index| seen(&model, place, function, index).unwrap();
    for (vcpus, bits) in [(1_u8, 0_u32), (2, 1), (3, 2), (4, 2), (8, 3)] {
        for vcpu in 0..vcpus {
            let (place, id, count) = ((vcpu, vcpus), u32::from(vcpu), u32::from(vcpus));
            let [_, ebx, _, edx] = at(place, 1, 0);
            assert_eq!(ebx, 0x0800 | (1 << bits) << 16 | id << 24);
            assert_eq!(
                (edx >> 28 & 1 == 1, at(place, 0x8000_0001, 0)[2] & 2 == 2),
                (vcpus > 1, vcpus > 1)
            );
            assert_eq!(at(place, 0xb, 0), [0, 1, 0x100, id]);
            assert_eq!(at(place, 0xb, 1), [bits, count, 0x201, id]);
            assert_eq!(at(place, 0xb, 2), [0, 0, 2, id]);
            assert_eq!(at(place, 0x8000_0008, 0)[2], (count - 1) | (bits << 12));
            assert_eq!(at(place, 0x8000_001e, 0), [id, id, 0, 0]);
            let shared = |index| at(place, 0x8000_001d, index)[0] >> 14 & 0xfff;
            assert_eq!((shared(0), shared(3)), (0, count - 1));
        }
    }
    assert_eq!(at((0, 1), 0, 0)[0], 0xb);
    assert_eq!(at((0, 1), 0x8000_0000, 0)[0], 0x8000_001e);
    assert_eq!(at((0, 1), 0x4000_0000, 0)[0], 0x4000_0001);
}

#[test]
fn an_intel_guest_counts_its_cores() {
    let model = model(
        b"Genu",
        &[
            CpuLeaf::new(4, 0, [0x1c00_4121, 0x02c0_003f, 0x3f, 0]),
            CpuLeaf::new(4, 3, [0x1c03_c163, 0x02c0_003f, 0x7fff, 4]),
        ],
    );
    let at = |vcpus, function, index| seen(&model, (0, vcpus), function, index);
    for (vcpus, bits) in [(1, 0), (3, 2), (8, 3)] {
        let fields = |index| at(vcpus, 4, index).map(|[eax, ..]| (eax >> 26, eax >> 14 & 0xfff, eax & 0x3fff));
        assert_eq!(fields(0), Some(((1 << bits) - 1, 0, 0x121)));
        assert_eq!(fields(3), Some(((1 << bits) - 1, (1 << bits) - 1, 0x163)));
        assert_eq!(at(vcpus, 0x8000_0008, 0), Some([0x3030, 0, 0, 0]), "that is AMD's");
    }
    assert_eq!(at(2, 0x8000_001e, 0), None);
}

#[test]
fn without_an_irqchip_its_timer_and_its_interrupts_are_not_offered() {
    let model = model(b"Auth", &[]);
    let offered = |irqchip| {
        let cpuid = model.cpuid_for(0, 1, irqchip);
        let find = |function| {
            cpuid
                .as_slice()
                .iter()
                .find(|entry| entry.function == function)
                .unwrap()
        };
        (find(1).ecx >> 24 & 1, find(0x4000_0001).eax)
    };
    assert_eq!((offered(true), offered(false)), ((1, 0x0100_080a), (0, 0x0100_000a)));
}

#[test]
fn what_could_not_come_along_is_hidden() {
    let all = |function, index| {
        let mut shown = CpuLeaf::new(function, index, [u32::MAX; 4]);
        carried::keep(&mut shown).then_some([shown.eax, shown.ebx, shown.ecx, shown.edx])
    };
    let bit = |word: u32, number: u32| word >> number & 1 == 1;
    let [_, _, ecx, edx] = all(1, 0).unwrap();
    assert!(
        !bit(ecx, 5) && !bit(ecx, 15) && bit(ecx, 28) && bit(edx, 26),
        "VMX and the counters"
    );
    let [_, ebx, ecx, edx] = all(7, 0).unwrap();
    assert!(
        !bit(ebx, 14) && bit(ebx, 5) && !bit(ecx, 7) && bit(ecx, 3),
        "MPX, shadow stacks"
    );
    assert!(!bit(edx, 24) && bit(edx, 29), "AMX");
    assert!(!bit(all(0x8000_0001, 0).unwrap()[2], 2), "SVM");
    assert_eq!(all(0x4000_0001, 0), Some([0x0100_080a, 0, 0, 0]));
    for gone in [
        3,
        5,
        0xa,
        0x14,
        0x15,
        0x1d,
        0x8000_0007,
        0x8000_000a,
        0x8000_001e,
        0xc000_0001,
    ] {
        assert_eq!(all(gone, 0), None, "{gone:#x}");
    }
    assert!(!carried::msr(0x345) && !carried::msr(0x4b56_4d02) && carried::msr(0x4b56_4d01) && carried::msr(0x10a));
}

#[test]
fn xsave_components_that_are_not_saved_are_not_offered() {
    let mut leaves = vec![
        CpuLeaf::new(0xd, 0, [0x6_02e7, 0, 0, 1]),
        CpuLeaf::new(0xd, 2, [256, 576, 0, 0]),
        CpuLeaf::new(0xd, 9, [8, 2688, 0, 0]),
        CpuLeaf::new(0xd, 11, [16, 0, 1, 0]),
        CpuLeaf::new(0xd, 17, [64, 2752, 2, 0]),
        CpuLeaf::new(0xd, 18, [8192, 2816, 6, 0]),
    ];
    carried::drop_wide_components(&mut leaves);
    let kept: Vec<_> = leaves.iter().map(|leaf| (leaf.index, leaf.eax)).collect();
    assert_eq!(kept, [(0, 0x2_0207), (2, 256), (9, 8), (17, 64)]);
    assert_eq!(leaves[0].edx, 0);
}
