//! One virtual machine on KVM that can be paused, saved and restored.
//!
//! ```text
//!   shells ──► trait Vm ──► KvmVm ─┬─ vcpu      a thread for each vCPU, its registers saved and loaded
//!                                  ├─ cpu       what CPUID tells the guest
//!                                  ├─ memory    guest RAM on a memfd, and which pages were written
//!                                  ├─ clock     the guest's clock page
//!                                  ├─ doorbell  where the idle bundled guest waits
//!                                  ├─ pc        what Linux needs: chips, ACPI, serial port, clock, power
//!                                  └─ devices   virtio-mmio: net, block, console, entropy
//! ```
//!
//! The shells `primary` and `secondary` drive it through [`Vm`]. It knows nothing of checkpoints,
//! peers or epochs: it stops, says what it is, becomes what it is told to be, and runs. The two
//! traits by which it reaches the outside, the block and the network back end, belong to it and are
//! implemented by its users.
//!
//! This crate and `guest` are the only ones with `unsafe` code.

#[cfg(not(all(target_arch = "x86_64", target_pointer_width = "64")))]
compile_error!("Tandem runs on x86-64 Linux only");

pub mod boot;
mod bus;
mod clock;
mod copy;
mod cpu;
pub mod devices;
mod dirty;
pub mod doorbell;
pub mod floor;
mod heat;
mod kvm;
mod kvm_vm;
pub mod memory;
pub mod netns;
pub mod offload;
pub mod pageset;
mod pc;
pub mod sentinel;
pub mod state;
pub mod tap;
mod vcpu;
mod vm;
mod written;

pub use boot::{BootError, LinuxError};
pub use copy::CopyBuffer;
pub use cpu::{CpuLeaf, CpuModel};
pub use devices::net::CardConfig;
pub use doorbell::Interrupt;
pub use heat::Heat;
pub use kvm::{HostError, host_check};
pub use kvm_vm::{BuildError, KvmVm, MachineConfig, PcConfig, Platform, Program};
pub use memory::{GuestRam, Mapping, Memory, MemoryError, PAGE_BYTES};
pub use pageset::PageSet;
pub use pc::VCPUS_MAX;
pub use pc::serial::Serial;
pub use state::{MachineState, Section, StateError};
pub use vcpu::state::RegisterError;
pub use vcpu::{PowerEvent, PowerHook};
pub use vm::{Vm, VmError};
pub use written::Written;

/// Turns a 64-bit count or index into one for slices; both have 64 bits here.
#[expect(clippy::cast_possible_truncation, reason = "usize has 64 bits, see the check above")]
pub(crate) const fn index(number: u64) -> usize {
    number as usize
}
