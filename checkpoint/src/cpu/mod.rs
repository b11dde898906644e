//! The CPU that a VM has, and whether a host can give it.
//!
//! A [`CpuModel`] is what CPUID tells the guest, without what depends on the number of its vCPUs, and the model-specific
//! registers that are part of its state. What a host can give is a model, too. The VM's model is made once, when it
//! boots, and is the VM's for life: a guest never sees a feature go. Two hosts fit if the one has all of what the VM has.
//!
//! Driven by `handshake`, and by whoever makes a machine. Never asks a processor: it knows leaves, not KVM.

#![allow(missing_docs, reason = "the rkyv derive leaves a generated field undocumented")]

mod levels;
mod names;
mod tidy;

use rkyv::{Archive, Deserialize, Serialize};

pub use levels::{Level, is_needed};

use crate::limits::{CPU_LEAVES_MAX, CPU_MSRS_MAX};
use names::{COMPONENTS, MSRS, NEEDS, Register, WORDS, Word};

const VENDOR: u32 = 0;
const VERSION: u32 = 1;
const XSAVE: u32 = 0xd;
const SIZES: u32 = 0x8000_0008;
/// The cache line that CLFLUSH works on, in leaf 1's ebx.
const LINE: u32 = 0xff00;

/// What CPUID answers for one function, and one index where the function has several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Archive, Serialize, Deserialize)]
pub struct CpuLeaf {
    /// The function, in eax.
    pub function: u32,
    /// The index, in ecx; 0 where the function has none.
    pub index: u32,
    /// The answer in eax.
    pub eax: u32,
    /// The answer in ebx.
    pub ebx: u32,
    /// The answer in ecx.
    pub ecx: u32,
    /// The answer in edx.
    pub edx: u32,
}

impl CpuLeaf {
    /// Returns what a function answers in eax, ebx, ecx and edx.
    #[must_use]
    pub const fn new(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> Self {
        Self {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
        }
    }
}

/// A CPU as a guest sees it, or as a host can give it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct CpuModel {
    /// What CPUID answers, in order of function and index.
    pub leaves: Vec<CpuLeaf>,
    /// Numbers of the model-specific registers that are part of its state, in order.
    pub msrs: Vec<u32>,
}

/// Why a CPU can't be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CpuError {
    /// It isn't in the form that this release gives it.
    #[error("the description of the CPU is malformed: {0}")]
    Malformed(&'static str),
    /// Processors of two vendors have nothing in common that a guest could rely on.
    #[error("{0} and {1} processors can't run one VM: both hosts need processors of one vendor")]
    Vendors(String, String),
    /// The host lacks something of it.
    #[error("this host's processor or its KVM lacks {}", listed(.0))]
    Lacks(Vec<String>),
}

/// Returns the name of the feature that is called `name`, with `-` for `_` and in any case, if there is one.
#[must_use]
pub fn feature(name: &str) -> Option<&'static str> {
    let name = name.to_ascii_lowercase().replace('-', "_");
    let name = if name == "tsc_deadline" {
        "tsc_deadline_timer"
    } else {
        &name
    };
    feature_names().find(|known| *known == name)
}

/// Returns the names of all features.
pub fn feature_names() -> impl Iterator<Item = &'static str> {
    let names = WORDS.iter().flat_map(|word| word.names.iter().copied());
    names.filter(|name| !name.is_empty())
}

/// Tells whether the feature `name` is nothing without `other`.
#[must_use]
pub fn rests_on(name: &str, other: &str) -> bool {
    let mut needed = NEEDS
        .iter()
        .filter(|(above, _)| *above == name)
        .map(|(_, needed)| *needed);
    needed.any(|needed| needed == other || rests_on(needed, other))
}

/// Writes a list of names, not all of a very long one.
#[must_use]
pub fn listed(names: &[String]) -> String {
    const NAMES_MAX: usize = 24;
    match names.len().checked_sub(NAMES_MAX) {
        None | Some(0) => names.join(", "),
        Some(more) => format!("{} and {more} more", names[..NAMES_MAX].join(", ")),
    }
}

impl CpuModel {
    /// Makes a model of what a host tells: only what is known to be a feature stays.
    #[must_use]
    pub fn new(leaves: Vec<CpuLeaf>, msrs: Vec<u32>) -> Self {
        let mut model = Self { leaves, msrs };
        model.leaves.sort_unstable();
        model.leaves.dedup_by_key(|leaf| (leaf.function, leaf.index));
        model.msrs.sort_unstable();
        model.msrs.dedup();
        model.tidy();
        model
    }

    /// Checks that a model is one that [`CpuModel::new`] could have made.
    ///
    /// # Errors
    /// Says in what it isn't.
    pub fn check(&self) -> Result<(), CpuError> {
        self.check_bounds()?;
        let key = |leaf: &CpuLeaf| (leaf.function, leaf.index);
        if !self.leaves.is_sorted_by(|a, b| key(a) < key(b)) || !self.msrs.is_sorted_by(|a, b| a < b) {
            return Err(CpuError::Malformed("something in it is out of order"));
        }
        let mut tidy = self.clone();
        tidy.tidy();
        if tidy != *self {
            return Err(CpuError::Malformed("it has what no VM can have"));
        }
        Ok(())
    }

    /// Checks that a model is no larger than one may be.
    ///
    /// # Errors
    /// Says what there is too much of.
    pub fn check_bounds(&self) -> Result<(), CpuError> {
        if self.leaves.len() > CPU_LEAVES_MAX {
            return Err(CpuError::Malformed("it has too many leaves"));
        }
        if self.msrs.len() > CPU_MSRS_MAX {
            return Err(CpuError::Malformed("it has too many model-specific registers"));
        }
        Ok(())
    }

    /// Returns what both have. What only describes (model, caches) is that of `self`.
    ///
    /// # Errors
    /// Fails if they are of two vendors.
    pub fn intersection(&self, other: &Self) -> Result<Self, CpuError> {
        if self.vendor() != other.vendor() {
            return Err(CpuError::Vendors(self.vendor_name(), other.vendor_name()));
        }
        let mut both = self.clone();
        for word in &WORDS {
            both.keep(word, other.bits(word));
        }
        let foreign = self.components() & !self.alike_components(other);
        both.drop_components(foreign);
        if let Some(ours) = both.leaf_mut(SIZES, 0) {
            let theirs = other.address_bits();
            let bits = ours.eax.to_le_bytes();
            ours.eax = u32::from_le_bytes([bits[0].min(theirs[0]), bits[1].min(theirs[1]), 0, 0]);
        }
        both.msrs.retain(|msr| other.msrs.binary_search(msr).is_ok());
        both.tidy();
        Ok(both)
    }

    /// Names what this CPU has and `host` can't give.
    #[must_use]
    pub fn missing_from(&self, host: &Self) -> Vec<String> {
        if self.vendor() != host.vendor() {
            return vec![format!("vendor {} (it is {})", self.vendor_name(), host.vendor_name())];
        }
        let mut missing = Vec::new();
        for word in &WORDS {
            let bits = self.bits(word) & !host.bits(word);
            missing.extend((0..32).filter(|bit| bits >> bit & 1 == 1).map(|bit| word.name(bit)));
        }
        let foreign = self.components() & !self.alike_components(host);
        let feature = |number| COMPONENTS.iter().find(|(component, _)| *component == number);
        // Of a component that the host has not at all its feature says enough.
        let placed =
            |number: &u32| foreign >> number & 1 == 1 && feature(*number).is_none_or(|(_, name)| host.has(name));
        missing.extend((0..63).filter(placed).map(component_name));
        let ([ours, our_linear], [theirs, their_linear]) = (self.address_bits(), host.address_bits());
        if ours > theirs {
            missing.push(format!("{ours} physical address bits (it has {theirs})"));
        }
        if our_linear > their_linear {
            missing.push(format!("{our_linear} virtual address bits (it has {their_linear})"));
        }
        let line = |model: &Self| model.leaf(VERSION, 0).map_or(0, |leaf| (leaf.ebx & LINE) >> 5);
        if line(self) != line(host) {
            missing.push(format!("cache lines of {} bytes (it has {})", line(self), line(host)));
        }
        // Of an MSR whose features the host has not its features say enough.
        let told = |msr: u32| {
            let features = MSRS
                .iter()
                .find(|(known, _)| *known == msr)
                .map(|(_, features)| *features);
            features.is_some_and(|features| !features.iter().any(|name| host.has(name)))
        };
        let msrs = self
            .msrs
            .iter()
            .filter(|msr| host.msrs.binary_search(msr).is_err() && !told(**msr));
        missing.extend(msrs.map(|msr| format!("MSR {msr:#x}")));
        // Repeated bits have one name.
        let mut told = Vec::new();
        for name in missing {
            if !told.contains(&name) {
                told.push(name);
            }
        }
        told
    }

    /// Returns this CPU without the features of these names, and without what rests on them.
    #[must_use]
    pub fn without<'a>(&self, features: impl IntoIterator<Item = &'a str>) -> Self {
        let mut model = self.clone();
        for name in features {
            model.clear(name);
        }
        model.tidy();
        model
    }

    /// Tells whether it has the feature of this name.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        WORDS.iter().any(|word| self.bits(word) & word.mask(name) != 0)
    }

    /// Returns the bits of a physical address.
    #[must_use]
    pub fn physical_bits(&self) -> u8 {
        self.address_bits()[0]
    }

    /// Bits of a physical and of a virtual address.
    fn address_bits(&self) -> [u8; 2] {
        let [physical, linear, ..] = self.leaf(SIZES, 0).map_or([0; 4], |leaf| leaf.eax.to_le_bytes());
        [physical, linear]
    }

    fn leaf(&self, function: u32, index: u32) -> Option<&CpuLeaf> {
        self.leaves
            .iter()
            .find(|leaf| (leaf.function, leaf.index) == (function, index))
    }

    fn leaf_mut(&mut self, function: u32, index: u32) -> Option<&mut CpuLeaf> {
        self.leaves
            .iter_mut()
            .find(|leaf| (leaf.function, leaf.index) == (function, index))
    }

    pub(crate) fn vendor(&self) -> [u32; 3] {
        self.leaf(VENDOR, 0)
            .map_or([0; 3], |leaf| [leaf.ebx, leaf.edx, leaf.ecx])
    }

    fn vendor_name(&self) -> String {
        let bytes = self.vendor().map(u32::to_le_bytes);
        let text = String::from_utf8_lossy(bytes.as_flattened());
        // It may be a peer's.
        text.chars().filter(char::is_ascii_graphic).collect()
    }

    fn bits(&self, word: &Word) -> u32 {
        self.leaf(word.function, word.index)
            .map_or(0, |leaf| *register(leaf, word.register))
    }

    /// Leaves only these bits of a word.
    fn keep(&mut self, word: &Word, bits: u32) {
        if let Some(leaf) = self.leaf_mut(word.function, word.index) {
            *register_mut(leaf, word.register) &= bits;
        }
    }

    fn clear(&mut self, name: &str) {
        for word in &WORDS {
            self.keep(word, !word.mask(name));
        }
    }

    /// Which components XSAVE has, a bit for each.
    fn components(&self) -> u64 {
        self.leaf(XSAVE, 0)
            .map_or(0, |leaf| u64::from(leaf.edx) << 32 | u64::from(leaf.eax))
    }

    fn drop_components(&mut self, components: u64) {
        if let Some(leaf) = self.leaf_mut(XSAVE, 0) {
            let [a, b, c, d, e, f, g, h] = (!components).to_le_bytes();
            leaf.eax &= u32::from_le_bytes([a, b, c, d]);
            leaf.edx &= u32::from_le_bytes([e, f, g, h]);
        }
    }

    /// Which components of both have the same place and size.
    fn alike_components(&self, other: &Self) -> u64 {
        let place = |model: &Self, number: u32| model.leaf(XSAVE, number).copied();
        let alike = |number: &u32| *number < 2 || place(self, *number) == place(other, *number);
        let both = self.components() & other.components();
        (0..63)
            .filter(|number| both >> number & 1 == 1 && alike(number))
            .fold(0, |bits, number| bits | 1 << number)
    }
}

impl Word {
    fn name(&self, bit: u32) -> String {
        match self.names.get(bit as usize) {
            Some(name) if !name.is_empty() => (*name).to_owned(),
            _ => {
                let (function, index, register) = (self.function, self.index, self.register.name());
                format!("cpuid {function:x}.{index} {register} bit {bit}")
            }
        }
    }

    /// The bit of this name; none if the name is another word's.
    fn mask(&self, name: &str) -> u32 {
        let position = self.names.iter().position(|known| *known == name);
        position.map_or(0, |bit| 1 << bit)
    }
}

fn component_name(number: u32) -> String {
    let feature = COMPONENTS.iter().find(|(component, _)| *component == number);
    let feature = feature.map_or_else(String::new, |(_, name)| format!(" ({name})"));
    format!("xsave component {number}{feature} in this place")
}

fn register(leaf: &CpuLeaf, register: Register) -> &u32 {
    match register {
        Register::Eax => &leaf.eax,
        Register::Ebx => &leaf.ebx,
        Register::Ecx => &leaf.ecx,
        Register::Edx => &leaf.edx,
    }
}

fn register_mut(leaf: &mut CpuLeaf, register: Register) -> &mut u32 {
    match register {
        Register::Eax => &mut leaf.eax,
        Register::Ebx => &mut leaf.ebx,
        Register::Ecx => &mut leaf.ecx,
        Register::Edx => &mut leaf.edx,
    }
}

#[cfg(test)]
pub(crate) mod samples;
#[cfg(test)]
mod tests;
