//! What all virtio devices share: the trait behind the transport, and the turn a worker takes.

pub mod mmio;
mod persist;
pub(crate) mod queue;
mod registers;
mod worker;

use std::any::Any;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use thiserror::Error;
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};

use self::queue::{QueueError, Ring};
pub use self::worker::Turns;
use crate::devices::Interrupt;
use crate::memory::Memory;

/// Entries of every queue, at most.
pub const QUEUE_SIZE_MAX: u16 = 256;
/// How long a device may take to come to rest.
pub const FREEZE_LIMIT: Duration = Duration::from_secs(10);
/// Feature bit: the device follows version 1 of the standard.
pub(crate) const VERSION_1: u64 = 1 << virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
/// Driver and device say from which entry of a ring on they want to be told.
pub(crate) const EVENT_IDX: u64 = 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

/// Why a device can't be made, frozen or changed.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// The host refused a descriptor or a thread.
    #[error("the {device} device can't start its worker: the host refused {what}; raise its limits (ulimit -n, -u)")]
    Start {
        /// Which device.
        device: String,
        /// What was refused.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A request did not end in time.
    #[error(
        "the {device} device did not come to rest within {FREEZE_LIMIT:?}: its back end hangs in a request; \
         check the disk or terminal behind it"
    )]
    Stuck {
        /// Which device.
        device: String,
    },
    /// A disk is to be replaced by one of another size.
    #[error(
        "the {device} device has {has} bytes and can't go on with a disk of {offered}: use an image of the same size"
    )]
    Size {
        /// Which device.
        device: String,
        /// The size the guest knows.
        has: u64,
        /// The new disk's size.
        offered: u64,
    },
}

/// One kind of device, behind the transport. Driven by the worker, under the worker's lock.
pub(crate) trait Device: Any + Send {
    /// The kind of device by the standard's number.
    fn kind(&self) -> u32;
    /// The features offered, those of the transport ([`VERSION_1`], [`EVENT_IDX`]) aside.
    fn features(&self) -> u64 {
        0
    }
    /// The number of queues.
    fn queues(&self) -> usize;
    /// The device's configuration space.
    fn config(&self) -> Vec<u8>;
    /// Tells what the driver has accepted, before the first turn; nothing, at a reset.
    fn activate(&mut self, _features: u64) {}
    /// Looks at all queues in their order and does a bounded part of what is there.
    fn turn(&mut self, rings: &mut [Ring], work: &Work<'_>) -> Result<Turn, QueueError>;
    /// Descriptors that become readable when the outside has something for the guest.
    fn readiness(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }
    /// State of its own, beyond the queues.
    fn state(&self) -> Vec<u8> {
        Vec::new()
    }
    /// Says which field of such state is wrong, if the driver has accepted these features.
    fn check(&self, _accepted: u64, state: &[u8]) -> Result<(), &'static str> {
        if state.is_empty() {
            Ok(())
        } else {
            Err("the device's own state")
        }
    }
    /// Takes over state that `check` has accepted.
    fn restore(&mut self, _state: &[u8]) {}
}

/// How long the guest may wait to be told of used buffers that are not urgent.
pub const LATE: Duration = Duration::from_millis(25);

/// What a device needs for a turn.
pub(crate) struct Work<'a> {
    /// Guest memory.
    pub(crate) ram: &'a Memory,
    /// How the guest learns of used buffers.
    pub(crate) signal: &'a Signal,
    /// Who takes the turn says when the guest is interrupted ([`Turns::tell`]).
    lent: bool,
    stop: &'a AtomicBool,
}

impl Work<'_> {
    /// Says whether the device is to come to rest: no further request is to begin.
    pub(crate) fn stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Reports used buffers to the guest, after the turn if that is lent.
    pub(crate) fn used(&self) {
        if self.lent {
            self.signal.owe();
        } else {
            self.signal.raise(VIRTIO_MMIO_INT_VRING);
        }
    }

    /// Reports used buffers that the guest is in no hurry to have back: with the next that it is told of, or after [`LATE`].
    pub(crate) fn used_sometime(&self) {
        self.signal.delay();
    }
}

/// How a turn has ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Turn {
    /// There is, or may be, more to do at once.
    pub(crate) more: bool,
    /// The next turn is also due when a [`Device::readiness`] descriptor is readable.
    pub(crate) watch: bool,
}

/// The interrupt status register and the line behind it.
pub(crate) struct Signal {
    status: AtomicU32,
    /// The status says more than the line has been told.
    owed: AtomicBool,
    /// There is more to tell, which the status does not say yet.
    late: AtomicBool,
    line: Arc<dyn Interrupt>,
}

impl Signal {
    /// Notes that there are used buffers; the guest is interrupted later.
    fn owe(&self) {
        self.status.fetch_or(VIRTIO_MMIO_INT_VRING, Ordering::AcqRel);
        self.owed.store(true, Ordering::Release);
    }

    fn is_owed(&self) -> bool {
        self.owed.load(Ordering::Acquire)
    }

    /// Interrupts the guest if that is owed.
    fn pay(&self) {
        if self.owed.swap(false, Ordering::AcqRel) {
            // The driver may have acknowledged what was noted, and looked, before the rest was used.
            self.raise(VIRTIO_MMIO_INT_VRING);
        }
    }

    /// Notes that there are used buffers; the guest is interrupted much later, or together with what is owed.
    fn delay(&self) {
        if !self.is_owed() {
            self.late.store(true, Ordering::Release);
        }
    }

    fn is_late(&self) -> bool {
        self.late.load(Ordering::Acquire)
    }

    /// Interrupts the guest if there is something to tell that waits.
    fn end_delay(&self) {
        if self.is_late() {
            self.raise(VIRTIO_MMIO_INT_VRING);
        }
    }

    fn forget(&self) {
        self.owed.store(false, Ordering::Release);
        self.late.store(false, Ordering::Release);
    }

    fn changed(&self) {
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    /// Reports what has not been acknowledged once more.
    fn again(&self) {
        self.owed.store(false, Ordering::Release);
        if self.status.load(Ordering::Acquire) != 0 {
            self.line.trigger();
        }
    }

    fn raise(&self, bits: u32) {
        self.status.fetch_or(bits, Ordering::AcqRel);
        if bits & VIRTIO_MMIO_INT_VRING != 0 {
            // One interrupt makes the driver look at all queues.
            self.late.store(false, Ordering::Release);
        }
        self.line.trigger();
    }
}

/// Counts complaints about one thing, so that a guest can't flood the log: the 1st, 2nd, 4th, 8th … is due.
#[derive(Debug, Default)]
pub(crate) struct Complaints(u64);

impl Complaints {
    /// Counts one more and says how many there are if it is worth a line.
    pub(crate) fn due(&mut self) -> Option<u64> {
        self.0 += 1;
        self.0.is_power_of_two().then_some(self.0)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
