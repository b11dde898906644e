//! The CPU that a guest is given: what CPUID tells it, and which model-specific registers are part of its state.
//!
//! A [`CpuModel`] says nothing of the number of vCPUs: the leaves that do are made for each vCPU when the machine is
//! ([`CpuModel::cpuid_for`]). What two hosts have in common, and what features are called, is decided elsewhere; here it
//! is known what KVM can carry to another host. Never changes a host.

mod carried;
mod topology;

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use crate::kvm::{Chips, Host, HostError};
use crate::vcpu::state::Scratch;

/// What CPUID answers for one function, and one index where the function has several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
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

/// A CPU as a guest sees it, whichever of the vCPUs it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuModel {
    /// What CPUID answers, in order of function and index.
    pub leaves: Vec<CpuLeaf>,
    /// Numbers of the model-specific registers that are part of the state, in order.
    pub msrs: Vec<u32>,
}

impl CpuModel {
    /// Returns all that this host can give a guest and another host like it can take over.
    ///
    /// # Errors
    /// Fails if the host has no KVM that can run a machine.
    pub fn host() -> Result<Self, HostError> {
        let host = Host::open()?;
        let mut leaves: Vec<_> = host.cpuid()?.as_slice().iter().map(CpuLeaf::of).collect();
        leaves.retain_mut(carried::keep);
        carried::drop_wide_components(&mut leaves);
        for leaf in leaves.iter_mut().filter(|leaf| leaf.function == 1) {
            // KVM does not tell of these two by itself.
            leaf.ecx |= carried::HYPERVISOR;
            leaf.ecx &= !carried::TSC_DEADLINE;
            if host.has_tsc_deadline() {
                leaf.ecx |= carried::TSC_DEADLINE;
            }
        }
        leaves.sort_unstable();
        let model = Self {
            leaves,
            msrs: Vec::new(),
        };
        // A PC's; what the bundled guest's machine can't take of them is found when that is made.
        let scratch = Scratch::new(&host, Chips::Pc, &[model.cpuid_for(0, 1, true)])?;
        let usable = scratch.msrs(&host.msr_indexes()?);
        let mut msrs: Vec<_> = usable
            .indexes()
            .iter()
            .copied()
            .filter(|msr| carried::msr(*msr))
            .collect();
        msrs.sort_unstable();
        Ok(Self { msrs, ..model })
    }

    /// Returns the CPUID of one vCPU of several, each of which the guest sees as a core with one thread. Without an
    /// `irqchip` in the kernel what needs one is left out.
    ///
    /// # Panics
    /// If there are no vCPUs, or more than CPUID can count.
    pub(crate) fn cpuid_for(&self, vcpu: u8, vcpus: u8, irqchip: bool) -> CpuId {
        let mut leaves = self.leaves.clone();
        if !irqchip {
            carried::drop_irqchip(&mut leaves);
        }
        topology::describe(&mut leaves, vcpu, vcpus);
        let entries: Vec<_> = leaves.iter().map(CpuLeaf::entry).collect();
        CpuId::from_entries(&entries).expect("a model has fewer leaves than KVM takes")
    }
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

    const fn of(entry: &kvm_cpuid_entry2) -> Self {
        Self::new(
            entry.function,
            entry.index,
            [entry.eax, entry.ebx, entry.ecx, entry.edx],
        )
    }

    fn entry(&self) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function: self.function,
            index: self.index,
            flags: if carried::indexed(self.function) {
                kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX
            } else {
                0
            },
            eax: self.eax,
            ebx: self.ebx,
            ecx: self.ecx,
            edx: self.edx,
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests;
