//! The host's KVM: whether it can run a machine, the CPU it offers, and the calls kvm-ioctls lacks.
//!
//! Nothing here is assumed of a host: capabilities, CPUID leaves and the list of MSRs are read. Two
//! kinds of KVM matter, that of the hardware and the paravirtual one of many cloud machines.

use std::ffi::CStr;
use std::io;

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY,
    kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_device_attr, kvm_dirty_log,
    kvm_dirty_log__bindgen_ty_1, kvm_enable_cap, kvm_pit_config,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use thiserror::Error;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_iow_nr, ioctl_iowr_nr};

/// Why this host can't run a machine.
#[derive(Debug, Error)]
pub enum HostError {
    /// The host has no KVM.
    #[error(
        "there is no /dev/kvm: load the module kvm_intel or kvm_amd, switch virtualisation on in the firmware, \
         or, in a container, pass the device in"
    )]
    NoKvm,
    /// The user may not use KVM.
    #[error("/dev/kvm may not be opened: run as root, or add this user to the group that owns /dev/kvm")]
    NoPermission,
    /// KVM can't be opened for another reason.
    #[error("/dev/kvm can't be opened")]
    Open(#[source] io::Error),
    /// KVM has another interface.
    #[error("/dev/kvm speaks version {found} of its interface, version {KVM_API_VERSION} is needed: update the kernel")]
    ApiVersion {
        /// The version it speaks.
        found: i32,
    },
    /// KVM lacks something.
    #[error("this host's KVM lacks {capability}: use a kernel from 5.10 on")]
    Capability {
        /// What it lacks.
        capability: &'static str,
    },
    /// A call that must work does not.
    #[error("KVM refuses to {call}")]
    Refused {
        /// What was asked of it.
        call: &'static str,
        /// What it said.
        #[source]
        source: io::Error,
    },
}

/// Says whether this host can run a machine, and if not, why and what to do.
pub fn host_check() -> Result<(), HostError> {
    Host::open()?.probe()
}

/// What interrupts and time there are in a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Chips {
    /// None: the guest asks its devices, and waits at a doorbell.
    None,
    /// Those of a PC, in the kernel: local APICs, an I/O APIC, two PICs, a PIT, and KVM's clock.
    Pc,
}

/// What a PC needs beyond any machine.
const PC_CAPABILITIES: [(Cap, &str); 4] = [
    (Cap::Irqchip, "interrupt controllers"),
    (Cap::Pit2, "a programmable timer"),
    (Cap::PitState2, "saving the programmable timer"),
    (Cap::AdjustClock, "setting its clock"),
];

fn check_all(kvm: &Kvm, needed: &[(Cap, &'static str)]) -> Result<(), HostError> {
    match needed.iter().find(|(needed, _)| !kvm.check_extension(*needed)) {
        Some((_, capability)) => Err(HostError::Capability { capability }),
        None => Ok(()),
    }
}

/// An open /dev/kvm that has all that a machine needs.
#[derive(Debug)]
pub(crate) struct Host {
    kvm: Kvm,
}

impl Host {
    /// Opens /dev/kvm and looks at what it offers.
    pub(crate) fn open() -> Result<Self, HostError> {
        Self::open_at(c"/dev/kvm")
    }

    fn open_at(path: &CStr) -> Result<Self, HostError> {
        let kvm = Kvm::new_with_path(path).map_err(|error| match error.errno() {
            libc::ENOENT | libc::ENODEV | libc::ENXIO => HostError::NoKvm,
            libc::EACCES | libc::EPERM => HostError::NoPermission,
            _ => HostError::Open(error.into()),
        })?;
        let found = kvm.get_api_version();
        if u32::try_from(found) != Ok(KVM_API_VERSION) {
            return Err(HostError::ApiVersion { found });
        }
        let needed = [
            (Cap::UserMemory, "user memory slots"),
            (Cap::ImmediateExit, "the immediate exit"),
            (Cap::Ioeventfd, "ioeventfd"),
            (Cap::ExtCpuid, "CPUID control"),
            (Cap::Xsave, "saving XSAVE state"),
            (Cap::Xcrs, "saving XCR registers"),
            (Cap::Debugregs, "saving debug registers"),
            (Cap::VcpuEvents, "saving pending events"),
            (Cap::MpState, "saving the processor's run state"),
            (Cap::GetTscKhz, "the frequency of the time stamp counter"),
        ];
        check_all(&kvm, &needed)?;
        if kvm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into()) & 1 == 0 {
            return Err(HostError::Capability {
                capability: "a dirty log that stays until it is cleared",
            });
        }
        Ok(Self { kvm })
    }

    /// Tries what only shows when a VM is made.
    fn probe(&self) -> Result<(), HostError> {
        let vm = self.create_vm(Chips::None)?;
        self.create_vcpu(&vm, 0, &self.cpuid()?)?;
        Ok(())
    }

    /// Makes a VM without memory.
    pub(crate) fn create_vm(&self, chips: Chips) -> Result<VmFd, HostError> {
        let vm = self.kvm.create_vm().map_err(refused("create a VM"))?;
        // Intel processors that can't run real mode natively keep pages there, between the
        // device window and the end of the first 4 GiB, where no machine has anything.
        if self.kvm.check_extension(Cap::SetIdentityMapAddr) {
            vm.set_identity_map_address(0xfffb_c000)
                .map_err(refused("set the address of the identity map"))?;
        }
        if self.kvm.check_extension(Cap::SetTssAddr) {
            vm.set_tss_address(0xfffb_d000)
                .map_err(refused("set the TSS address"))?;
        }
        if chips == Chips::Pc {
            check_all(&self.kvm, &PC_CAPABILITIES)?;
            vm.create_irq_chip().map_err(refused("make interrupt controllers"))?;
            let speaker = kvm_pit_config {
                flags: KVM_PIT_SPEAKER_DUMMY,
                ..Default::default()
            };
            vm.create_pit2(speaker).map_err(refused("make a timer"))?;
        }
        Ok(vm)
    }

    /// Makes a vCPU of a VM, with this CPUID, whose time stamp counter is that of the host.
    pub(crate) fn create_vcpu(&self, vm: &VmFd, number: u8, cpuid: &CpuId) -> Result<VcpuFd, HostError> {
        let vcpu = vm.create_vcpu(number.into()).map_err(refused("create a vCPU"))?;
        vcpu.set_cpuid2(cpuid).map_err(refused("set the guest's CPUID"))?;
        if !set_tsc_offset(&vcpu, 0) {
            tracing::debug!(error = %io::Error::last_os_error(), "KVM has no control of the TSC offset");
        }
        Ok(vcpu)
    }

    /// Returns the CPUID that KVM could give a guest on this host, in part that of whichever processor was asked.
    pub(crate) fn cpuid(&self) -> Result<CpuId, HostError> {
        self.kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(refused("say which CPUID it supports"))
    }

    /// Tells whether the local APIC of a guest has a timer that follows the time stamp counter.
    pub(crate) fn has_tsc_deadline(&self) -> bool {
        self.kvm.check_extension(Cap::TscDeadlineTimer)
    }

    /// Lists the MSRs that make up a guest's state on this host.
    pub(crate) fn msr_indexes(&self) -> Result<Vec<u32>, HostError> {
        let list = self.kvm.get_msr_index_list().map_err(refused("list the MSRs"))?;
        Ok(list.as_slice().to_vec())
    }
}

/// Makes a [`HostError::Refused`] from KVM's answer.
pub(crate) fn refused<E: Into<io::Error>>(call: &'static str) -> impl FnOnce(E) -> HostError {
    move |error| HostError::Refused {
        call,
        source: error.into(),
    }
}

ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

const KVMIO: u32 = kvm_bindings::KVMIO;

/// Asks KVM to keep the dirty log of `vm` until it is cleared by [`clear_dirty_log`].
pub(crate) fn enable_manual_dirty_log(vm: &VmFd) -> Result<(), HostError> {
    let capability = kvm_enable_cap {
        cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
        args: [1, 0, 0, 0],
        ..Default::default()
    };
    vm.enable_cap(&capability)
        .map_err(refused("keep the dirty log until it is cleared"))
}

/// Reads which pages of memory slot `slot` were written; `words` has a bit for each.
pub(crate) fn read_dirty_log(vm: &VmFd, slot: u32, words: &mut [u64]) -> Result<(), HostError> {
    let request = kvm_dirty_log {
        slot,
        padding1: 0,
        __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 {
            dirty_bitmap: words.as_mut_ptr().cast(),
        },
    };
    // SAFETY: the caller allocated a bit for each page of the slot, so KVM writes within `words`.
    let status = unsafe { ioctl_with_ref(vm, KVM_GET_DIRTY_LOG(), &request) };
    ioctl_status(status, "read the dirty log")
}

/// Watches the pages of `words` (bit 0 is page `first_page` of the slot) for the next write.
pub(crate) fn clear_dirty_log(
    vm: &VmFd,
    slot: u32,
    first_page: u64,
    pages: u32,
    words: &mut [u64],
) -> Result<(), HostError> {
    assert!(words.len() as u64 * 64 >= u64::from(pages), "a bit for each page");
    let mut request = kvm_clear_dirty_log {
        slot,
        num_pages: pages,
        first_page,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            dirty_bitmap: words.as_mut_ptr().cast(),
        },
    };
    // SAFETY: KVM reads one bit for each of `pages` from `words`, which has them (checked above).
    let status = unsafe { ioctl_with_mut_ref(vm, KVM_CLEAR_DIRTY_LOG(), &mut request) };
    ioctl_status(status, "clear the dirty log")
}

/// Makes the guest's time stamp counter that of the host and `offset` more, where KVM knows how (Linux 5.16 on). Where it
/// does not, the clock measures the difference.
pub(crate) fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> bool {
    let attribute = tsc_offset_attribute((&raw const offset) as u64);
    // SAFETY: KVM reads eight bytes at the attribute's address, which is a local variable that outlives the call.
    let status = unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) };
    status == 0
}

/// Returns by how much the guest's time stamp counter is ahead of the host's, where KVM tells.
pub(crate) fn tsc_offset(vcpu: &VcpuFd) -> Option<u64> {
    let mut offset = 0_u64;
    let attribute = tsc_offset_attribute((&raw mut offset) as u64);
    // SAFETY: KVM writes eight bytes at the attribute's address, which is a local variable that outlives the call.
    let status = unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) };
    (status == 0).then_some(offset)
}

fn tsc_offset_attribute(addr: u64) -> kvm_device_attr {
    kvm_device_attr {
        group: kvm_bindings::KVM_VCPU_TSC_CTRL,
        attr: kvm_bindings::KVM_VCPU_TSC_OFFSET.into(),
        addr,
        flags: 0,
    }
}

fn ioctl_status(status: i32, call: &'static str) -> Result<(), HostError> {
    if status == 0 {
        Ok(())
    } else {
        Err(HostError::Refused {
            call,
            source: io::Error::last_os_error(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error;

    #[test]
    fn says_what_is_wrong_with_the_host() {
        assert!(matches!(
            Host::open_at(c"/dev/tandem-has-no-such-file"),
            Err(HostError::NoKvm)
        ));
        assert!(matches!(
            Host::open_at(c"/dev/null"),
            Err(HostError::ApiVersion { found: -1 })
        ));
        assert!(HostError::NoKvm.to_string().contains("kvm_intel"), "the cure is named");
        let refused = refused::<io::Error>("create a VM")(io::ErrorKind::OutOfMemory.into());
        assert!(refused.source().is_some(), "the cause is kept");
    }
}
