//! A model brought into its one form: nothing in it that is not modelled, and nothing that rests on what is missing.

use super::names::{COMPONENTS, MSRS, NEEDS, Register, WORDS};
use super::{CpuLeaf, CpuModel, LINE, SIZES, Word, XSAVE};

/// Bits that follow what the guest does, so that they say nothing of the CPU.
const DYNAMIC: [&str; 2] = ["osxsave", "ospke"];
/// What XSAVE's first two components and its header take.
const XSAVE_BYTES_MIN: u32 = 576;
/// Bits of an address that four levels of page tables translate.
const VIRTUAL_BITS: u32 = 48;
/// x87 and SSE.
const COMPONENTS_MIN: u64 = 3;

impl CpuModel {
    pub(super) fn tidy(&mut self) {
        self.leaves.retain_mut(modelled);
        for name in DYNAMIC {
            self.clear(name);
        }
        while self.drop_unsupported() {}
        let components = self.components();
        self.leaves.retain(|leaf| {
            leaf.function != XSAVE || leaf.index == 1 || leaf.index == 0 || components >> leaf.index & 1 == 1
        });
        if !self.has("xsave") {
            self.leaves.retain(|leaf| leaf.function != XSAVE);
        }
        let useless = MSRS
            .iter()
            .filter(|(_, features)| !features.iter().any(|name| self.has(name)));
        let useless: Vec<_> = useless.map(|(msr, _)| *msr).collect();
        self.msrs.retain(|msr| !useless.contains(msr));
        self.set_sizes();
        let five_levels = self.has("la57");
        if let Some(sizes) = self.leaf_mut(SIZES, 0).filter(|_| !five_levels) {
            let linear = (sizes.eax >> 8 & 0xff).min(VIRTUAL_BITS);
            sizes.eax = sizes.eax & 0xff | linear << 8;
        }
    }

    /// Takes away features whose foundation is missing; tells whether there were any.
    fn drop_unsupported(&mut self) -> bool {
        let before = self.clone();
        for (name, needed) in NEEDS {
            if self.has(name) && !self.has(needed) {
                self.clear(name);
            }
        }
        let components = self.components();
        let supported = COMPONENTS
            .iter()
            .filter(|(_, name)| self.has(name))
            .fold(COMPONENTS_MIN, |bits, (number, _)| bits | 1 << number);
        // AVX-512 has three components, and is whole or not at all; a component is one only if it tells its place.
        for (number, name) in COMPONENTS {
            if components >> number & 1 == 0 || self.leaf(XSAVE, number).is_none() {
                self.clear(name);
            }
        }
        self.drop_components(!supported);
        *self != before
    }

    /// Sets the fields that say how much there is of the others.
    fn set_sizes(&mut self) {
        let end = |leaf: &CpuLeaf| leaf.eax.saturating_add(leaf.ebx);
        let places = self
            .leaves
            .iter()
            .filter(|leaf| leaf.function == XSAVE && leaf.index >= 2);
        let bytes = places.map(end).fold(XSAVE_BYTES_MIN, u32::max);
        let last = |least: u32, most: u32| {
            let functions = self.leaves.iter().map(|leaf| leaf.function);
            functions.filter(|function| (least..=most).contains(function)).max()
        };
        let (basic, hypervisor, extended) = (
            last(0, 0x3fff_ffff),
            last(0x4000_0000, 0x4fff_ffff),
            last(0x8000_0000, u32::MAX),
        );
        let extended_features = self
            .leaves
            .iter()
            .filter(|leaf| leaf.function == 7)
            .map(|leaf| leaf.index)
            .max();
        for leaf in &mut self.leaves {
            match (leaf.function, leaf.index) {
                (0, 0) => leaf.eax = basic.unwrap_or(0),
                (0x4000_0000, 0) => leaf.eax = hypervisor.unwrap_or(0),
                (0x8000_0000, 0) => leaf.eax = extended.unwrap_or(0),
                (7, 0) => leaf.eax = extended_features.unwrap_or(0),
                (XSAVE, 0) => leaf.ecx = bytes,
                _ => {}
            }
        }
    }
}

/// Tells whether a leaf is part of a model, and clears what isn't in it.
fn modelled(leaf: &mut CpuLeaf) -> bool {
    let feature = |register| {
        let known = |word: &Word| (word.function, word.index, word.register) == (leaf.function, leaf.index, register);
        if WORDS.iter().any(known) { u32::MAX } else { 0 }
    };
    let all = u32::MAX;
    let features = [Register::Eax, Register::Ebx, Register::Ecx, Register::Edx].map(feature);
    // What else the leaf has beyond features.
    let rest = match (leaf.function, leaf.index) {
        (0 | 0x4000_0000 | 0x8000_0000, 0) => [all; 4],
        (1, 0) => [all, LINE, 0, 0],
        (6, 0) | (7, 0..=2) | (XSAVE, 1) | (0x4000_0001 | 0x8000_0021, 0) => [0; 4],
        // Caches and names.
        (2 | 0x8000_0002..=0x8000_0006, 0) | (4 | 0x8000_001d, 0..=7) => [all; 4],
        (XSAVE, 0) => [all, 0, 0, all],
        (XSAVE, 2..=62) => [all, all, all, 0],
        (0x8000_0001, 0) => [all, 0, 0, 0],
        (SIZES, 0) => [0xffff, 0, 0, 0],
        _ => return false,
    };
    leaf.eax &= features[0] | rest[0];
    leaf.ebx &= features[1] | rest[1];
    leaf.ecx &= features[2] | rest[2];
    leaf.edx &= features[3] | rest[3];
    true
}
