//! What the shells drive: a machine that stops, says what it is, becomes what it is told to be, and runs.
//!
//! ```text
//!            pause                       save, take_dirty, set_backends
//!   Running ───────► Paused ──────────────────────────────────────────────► Paused
//!      ▲               │ ▲ restore
//!      └──── resume ───┘ └───────► after an error: Poisoned, never runs again
//! ```

use std::io;

use thiserror::Error;

use crate::boot::BootError;
use crate::devices::{DeviceError, Turns, block, net};
use crate::kvm::HostError;
use crate::vcpu::state::RegisterError;
use crate::{GuestRam, MachineState, PageSet, StateError};

/// A machine, as the shells see it.
pub trait Vm: Send {
    /// Stops the guest, then the devices. On success nothing writes guest memory any more, and no
    /// request is half done. Paused already: nothing happens. After an error, pause again or resume.
    fn pause(&mut self) -> Result<(), VmError>;

    /// Lets the devices go on, then the guest. A device that was restored looks at all its queues first.
    fn resume(&mut self) -> Result<(), VmError>;

    /// Lets a guest that has asked to start again do so; `false` if this machine doesn't know how to. While it is paused nothing
    /// happens: the guest asks again when it is resumed.
    fn restart(&mut self) -> Result<bool, VmError>;

    /// Saves all but the memory.
    ///
    /// # Panics
    /// If the machine is not paused.
    fn save(&mut self) -> Result<MachineState, VmError>;

    /// Says whether [`Self::restore`] will take `state`; all that could be refused is tried beside the
    /// machine, which may run meanwhile.
    fn check(&mut self, state: &MachineState) -> Result<(), VmError>;

    /// Becomes the machine that was saved; its memory must be there already. Guest time goes on where it was
    /// saved. After an error the machine is poisoned.
    ///
    /// # Panics
    /// If the machine is not paused.
    fn restore(&mut self, state: &MachineState) -> Result<(), VmError>;

    /// Returns the dirty pages, and leaves them dirty: those written by the guest or by the machine since they
    /// last counted as clean. The machine may run.
    fn dirty_now(&mut self) -> Result<PageSet, VmError>;

    /// Counts exactly `pages` as clean from now on, whether they were dirty or not. The machine may run. What is
    /// read of a page after this is its content at the next stop, unless [`Self::take_dirty`] has the page then. After
    /// an error all of them are dirty.
    fn clear_dirty(&mut self, pages: &PageSet) -> Result<(), VmError>;

    /// Returns the dirty pages; from now on they count as clean, but for some that are written all the time: those stay dirty, written or
    /// not. The machine may run.
    fn take_dirty(&mut self) -> Result<PageSet, VmError>;

    /// Makes `pages` dirty: they were taken or cleared, but nothing became of it.
    fn put_back_dirty(&mut self, pages: &PageSet);

    /// Returns a handle on the memory, for any thread.
    fn ram(&self) -> GuestRam;

    /// Puts other networks, one for each card in their order, and another disk, of the same size, behind the devices.
    ///
    /// # Panics
    /// If the machine is not paused, or there is not one network for each card.
    fn set_backends(&mut self, nets: Vec<Box<dyn net::Backend>>, block: Box<dyn block::Backend>)
    -> Result<(), VmError>;

    /// Lets the holder take the network cards' turns, in their order, which a thread of each card's does else.
    ///
    /// # Panics
    /// If someone has them already.
    fn net_turns(&self) -> Vec<Turns>;

    /// Draws the guest's random bytes from the start of this seed's stream from now on, or from the host.
    fn set_entropy_seed(&mut self, seed: Option<[u8; 32]>);

    /// Tells the guest to mix fresh randomness into its own.
    ///
    /// # Panics
    /// If the machine is not paused.
    fn reseed(&mut self, seed: [u8; 32]);
}

/// Why a machine can't do what it is asked.
#[derive(Debug, Error)]
pub enum VmError {
    /// The vCPU does not stop.
    #[error("the guest's processor did not stop in time: the host is overloaded or its KVM hangs")]
    Stop(#[source] io::Error),
    /// A device can't do what it is asked.
    #[error("a device of the machine failed")]
    Device(#[from] DeviceError),
    /// KVM can't do what it is asked.
    #[error("the host's KVM failed")]
    Host(#[from] HostError),
    /// The saved state can't be read.
    #[error("the saved state does not fit this machine")]
    State(#[from] StateError),
    /// The guest can't be booted again.
    #[error("the guest has asked for a reset, and can't be booted again")]
    Boot(#[from] BootError),
    /// The registers can't be saved or loaded.
    #[error("the processor's registers can't be saved or loaded")]
    Registers(#[from] RegisterError),
    /// A crashed guest has no state worth keeping.
    #[error("the guest has crashed: {reason}")]
    Crashed {
        /// What happened.
        reason: String,
    },
    /// An earlier restore has failed.
    #[error("an earlier restore of this machine has failed half-way: it can't run, start a new one")]
    Poisoned,
}
