//! CPUs with a name, which hosts of many kinds can give alike: the levels of the x86-64 psABI.
//!
//! Each has what the psABI names, and what any guest on KVM needs. It has nothing else: no mitigations either, so a guest
//! takes those that need no help of the processor.

use super::names::WORDS;
use super::{CpuError, CpuModel, SIZES};

/// Part of every level where the host has it: what a kernel and its virtual platform use, no program's instructions.
const PLATFORM: [&str; 25] = [
    "vme",
    "de",
    "pse",
    "mce",
    "apic",
    "sep",
    "mtrr",
    "mca",
    "pat",
    "pse36",
    "clflush",
    "x2apic",
    "tsc_deadline_timer",
    "tsc_adjust",
    "hypervisor",
    "arat",
    "nx",
    "xsave",
    "cr8_legacy",
    "topoext",
    "kvmclock",
    "kvmclock_stable",
    "kvm_nop_io_delay",
    "kvm_pv_send_ipi",
    "mmxext",
];
const V1: [&str; 14] = [
    "fpu", "tsc", "msr", "pae", "cx8", "pge", "cmov", "mmx", "fxsr", "sse", "sse2", "syscall", "lm", "nx",
];
const V2: [&str; 7] = ["cx16", "lahf_lm", "popcnt", "pni", "ssse3", "sse4_1", "sse4_2"];
const V3: [&str; 9] = ["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"];
const V4: [&str; 5] = ["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"];
/// Bits of a physical address: what the smallest processors have that can run a VM.
const PHYSICAL_BITS: u32 = 39;

/// Tells whether any 64-bit guest needs the feature of this name.
#[must_use]
pub fn is_needed(name: &str) -> bool {
    V1.contains(&name)
}

/// A level of the x86-64 psABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// To SSE 4.2.
    V2,
    /// To AVX2.
    V3,
    /// To AVX-512.
    V4,
}

impl Level {
    /// All of them, the least first.
    pub const ALL: [Self; 3] = [Self::V2, Self::V3, Self::V4];

    /// Returns its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::V2 => "x86-64-v2",
            Self::V3 => "x86-64-v3",
            Self::V4 => "x86-64-v4",
        }
    }

    /// Returns the CPU of this level that `host` can give.
    ///
    /// # Errors
    /// Names the features of the level that the host lacks.
    pub fn of(self, host: &CpuModel) -> Result<CpuModel, CpuError> {
        let lists: [&[&str]; 4] = [&V1, &V2, &V3, &V4];
        let needed = || lists[..self as usize + 2].iter().copied().flatten().copied();
        let lacking: Vec<_> = needed().filter(|name| !host.has(name)).map(str::to_owned).collect();
        if !lacking.is_empty() {
            return Err(CpuError::Lacks(lacking));
        }
        let mut model = host.clone();
        let wanted = |name: &str| PLATFORM.contains(&name) || needed().any(|needed| needed == name);
        for word in &WORDS {
            let bits = word.names.iter().filter(|name| wanted(name));
            model.keep(word, bits.fold(0, |bits, name| bits | word.mask(name)));
        }
        if let Some(sizes) = model.leaf_mut(SIZES, 0) {
            sizes.eax = sizes.eax & !0xff | (sizes.eax & 0xff).min(PHYSICAL_BITS);
        }
        model.tidy();
        Ok(model)
    }
}
