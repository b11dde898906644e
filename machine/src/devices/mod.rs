//! The devices of the machine, all virtio behind the memory-mapped transport, version 2.
//!
//! ```text
//!   vCPU thread ──registers──► VirtioMmio ◄──freeze, save, restore, thaw── vm
//!        └──ioeventfd──► worker thread ──► net │ block │ console │ entropy ──► back end
//! ```
//!
//! Each device has a worker thread of its own, the only one that touches the guest's queues, unless someone
//! else takes its turns ([`Turns`]). Between two requests it can be frozen: then nothing is in flight, and no guest memory is read or written
//! until it is thawed. Whatever the guest has queued stays in guest memory and is carried there.
//!
//! Everything a guest can write, registers, rings and descriptors, is hostile here: a queue that
//! breaks the rules stops its device, which then asks for a reset.

pub mod block;
pub mod console;
pub mod entropy;
pub mod net;
pub mod virtio;

pub use crate::doorbell::Interrupt;
pub use virtio::mmio::{Notifier, VirtioMmio};
pub use virtio::{DeviceError, LATE, Turns};

#[cfg(test)]
mod tests;
