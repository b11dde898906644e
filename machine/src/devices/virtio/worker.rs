//! The thread behind a device: sleeps until a queue was kicked or the back end has something, then takes a turn.
//!
//! ```text
//!   asleep ──kick, readiness──► at the gate ──not frozen──► turn ──► asleep, or the gate again if there is more
//!                                   '──frozen──► waits for the thaw
//! ```
//!
//! A turn is bounded, looks at all queues in their order, and between two requests sees that it is to stop.
//! Freezing or thawing an idle worker wakes nobody. Only a turn reads or writes the guest's queues.
//!
//! Someone else may take the turns ([`Turns`]): a loop that has the frames in its hand already would only wake
//! this thread for each, and be woken by it for the answer. The thread then waits at the gate.

use std::any::Any;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_mmio::VIRTIO_MMIO_INT_VRING;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::queue::{QueueError, Ring};
use super::{Complaints, Device, LATE, Signal, Turn, Work, lock};
use crate::devices::Interrupt;
use crate::memory::Memory;

const KICK: u64 = 0;
const READINESS: u64 = 1;

/// A device and its worker's thread, which ends when this is dropped.
pub(super) struct Worker {
    pub(super) shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What the worker shares with those who command it.
pub(super) struct Shared {
    pub(super) name: String,
    pub(super) ram: Memory,
    pub(super) signal: Signal,
    pub(super) queues: usize,
    /// Written when a turn is due: by the guest's notification of any queue, and by whoever changes the device.
    pub(super) kick: EventFd,
    /// Locked by the worker for a turn, else by whoever changes the device.
    pub(super) core: Mutex<Core>,
    /// The guest broke a queue; the device does nothing until it is reset.
    broken: AtomicBool,
    gate: Mutex<Gate>,
    moved: Condvar,
    complaints: Mutex<Complaints>,
    stop: AtomicBool,
    epoll: Epoll,
}

/// The device and its queues.
pub(super) struct Core {
    pub(super) device: Box<dyn Device>,
    /// One for each queue while the driver is ready, else none.
    pub(super) rings: Vec<Ring>,
    readiness: Vec<OwnedFd>,
    watching: bool,
}

/// Who takes a turn.
enum Taker {
    Worker {
        /// What the guest need not know at once has waited long enough.
        tell_late: bool,
    },
    /// The holder of [`Turns`].
    Holder,
}

#[derive(Debug, Default)]
struct Gate {
    frozen: bool,
    busy: bool,
    exit: bool,
    /// [`Turns`] takes the turns.
    lent: bool,
    /// The worker's thread waits here.
    parked: bool,
    /// A lent turn was due while frozen.
    missed: bool,
}

/// The right to take a device's turns, instead of its worker, on one thread of the holder's. The first is due when it is
/// lent; given back when dropped. The guest is interrupted when the holder says so: what it sends on is often awaited
/// elsewhere, and a vCPU that is woken may take the processor from it.
pub struct Turns(Arc<Shared>);

impl Turns {
    pub(super) fn borrow(shared: &Arc<Shared>) -> Self {
        let mut gate = lock(&shared.gate);
        assert!(!gate.lent, "one at a time takes the turns of a device");
        gate.lent = true;
        drop(gate);
        shared.moved.notify_all();
        // Asleep it would take the holder's kicks, and with them the edges.
        shared.kick();
        let parked = shared
            .moved
            .wait_while(lock(&shared.gate), |gate| !gate.parked)
            .unwrap_or_else(PoisonError::into_inner);
        drop(parked);
        Self(Arc::clone(shared))
    }

    /// Takes a turn and says whether there is more to do at once. While the device is frozen nothing happens, and
    /// a turn is due again at the thaw.
    #[must_use]
    pub fn take(&self) -> bool {
        let shared = &*self.0;
        let mut gate = lock(&shared.gate);
        if gate.frozen {
            gate.missed = true;
            return false;
        }
        if gate.exit {
            return false;
        }
        gate.busy = true;
        drop(gate);
        shared.turn_at_gate(Taker::Holder)
    }

    /// Interrupts the guest if the turns since the last call have something for it that it waits for. Returns whether there is
    /// something else, for [`Turns::tell_late`] to tell it within [`LATE`]. While the device is frozen nothing happens, and a
    /// turn is due at the thaw, after which to call this again.
    #[must_use]
    pub fn tell(&self) -> bool {
        if self.0.signal.is_owed() {
            self.unless_frozen(Signal::pay);
        }
        self.0.signal.is_late()
    }

    /// Interrupts the guest if there is anything that it has not been told of, but while the device is frozen.
    pub fn tell_late(&self) {
        self.unless_frozen(Signal::end_delay);
    }

    /// A device at rest interrupts nobody: a turn is due after that.
    fn unless_frozen(&self, tell: impl FnOnce(&Signal)) {
        let mut gate = lock(&self.0.gate);
        if gate.frozen {
            gate.missed = true;
        } else {
            tell(&self.0.signal);
        }
    }
}

impl AsRawFd for Turns {
    /// A descriptor with an edge each time that a turn is due. It is not read, and so stays readable.
    fn as_raw_fd(&self) -> RawFd {
        self.0.kick.as_raw_fd()
    }
}

impl Drop for Turns {
    fn drop(&mut self) {
        let mut gate = lock(&self.0.gate);
        gate.lent = false;
        if !gate.frozen {
            self.0.signal.pay();
        }
        drop(gate);
        self.0.moved.notify_all();
        self.0.kick();
    }
}

impl Worker {
    /// Makes the device's descriptors and starts its thread; the error says what the host refused.
    pub(super) fn start(
        name: &str,
        device: Box<dyn Device>,
        ram: Memory,
        line: Arc<dyn Interrupt>,
    ) -> Result<Self, (&'static str, io::Error)> {
        let descriptor = |source| ("a descriptor", source);
        let epoll = Epoll::new().map_err(descriptor)?;
        let kick = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(descriptor)?;
        control(&epoll, ControlOperation::Add, &kick, KICK).map_err(descriptor)?;
        let readiness = duplicate(device.as_ref()).map_err(descriptor)?;
        let shared = Arc::new(Shared {
            name: name.to_owned(),
            ram,
            signal: Signal {
                status: AtomicU32::new(0),
                owed: AtomicBool::new(false),
                late: AtomicBool::new(false),
                line,
            },
            queues: device.queues(),
            kick,
            core: Mutex::new(Core {
                device,
                rings: Vec::new(),
                readiness,
                watching: false,
            }),
            broken: AtomicBool::new(false),
            gate: Mutex::default(),
            moved: Condvar::new(),
            complaints: Mutex::default(),
            stop: AtomicBool::new(false),
            epoll,
        });
        let thread = thread::Builder::new()
            .name(format!("virtio-{name}"))
            .spawn({
                let shared = Arc::clone(&shared);
                move || shared.run()
            })
            .map_err(|source| ("a thread", source))?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        lock(&self.shared.gate).exit = true;
        self.shared.moved.notify_all();
        self.shared.kick();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(device = self.shared.name, "the device's worker has panicked");
        }
    }
}

impl Shared {
    /// Brings the worker to rest; `false` if it is still in a request after `limit`.
    pub(super) fn freeze(&self, limit: Duration) -> bool {
        self.stop.store(true, Ordering::Release);
        let mut gate = lock(&self.gate);
        gate.frozen = true;
        let (gate, _) = self
            .moved
            .wait_timeout_while(gate, limit, |gate| gate.busy)
            .unwrap_or_else(PoisonError::into_inner);
        !gate.busy
    }

    /// Lets the worker go on where it was. One that sleeps is not woken: it found nothing to do before it slept, a turn that
    /// was cut short leaves it at the gate, and a kick since then has not been taken from its descriptor.
    pub(super) fn thaw(&self) {
        let mut gate = lock(&self.gate);
        gate.frozen = false;
        self.stop.store(false, Ordering::Release);
        let missed = mem::take(&mut gate.missed);
        drop(gate);
        self.moved.notify_all();
        if missed {
            self.kick();
        }
    }

    /// Says whether the worker is at rest and stays so.
    pub(super) fn at_rest(&self) -> bool {
        let gate = lock(&self.gate);
        gate.frozen && !gate.busy
    }

    /// Makes a turn due, which looks at all queues.
    pub(super) fn kick(&self) {
        // Fails only when the counter is full, and then a turn is due anyway.
        let _ = self.kick.write(1);
    }

    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    pub(super) fn set_broken(&self, broken: bool) {
        self.broken.store(broken, Ordering::Release);
    }

    pub(super) fn interrupt_status(&self) -> u32 {
        self.signal.status.load(Ordering::Acquire)
    }

    /// Returns what the register is to say after a restore: also what the guest is told of later here.
    pub(super) fn saved_interrupt_status(&self) -> u32 {
        let later = if self.signal.is_late() {
            VIRTIO_MMIO_INT_VRING
        } else {
            0
        };
        self.interrupt_status() | later
    }

    pub(super) fn acknowledge(&self, bits: u32) {
        self.signal.status.fetch_and(!bits, Ordering::AcqRel);
    }

    /// Sets the register of a device that is restored or reset: nothing is owed for what was before.
    pub(super) fn set_interrupt_status(&self, bits: u32) {
        self.signal.forget();
        self.signal.status.store(bits, Ordering::Release);
    }

    /// Changes the device, of which the caller knows the type, between two turns.
    pub(super) fn change<D: Device, R>(&self, change: impl FnOnce(&mut D) -> R) -> R {
        let mut core = lock(&self.core);
        let device: &mut dyn Any = core.device.as_mut();
        let result = change(
            device
                .downcast_mut()
                .expect("a handle is made together with its device"),
        );
        core.rewatch(&self.epoll, &self.name);
        drop(core);
        self.kick();
        result
    }

    /// Tells the guest that its device needs a reset.
    pub(super) fn fail(&self, error: &QueueError) {
        if let Some(count) = lock(&self.complaints).due() {
            let error = error as &dyn std::error::Error;
            tracing::error!(
                device = self.name,
                error,
                count,
                "the guest has broken a queue; the device stops until the guest resets it"
            );
        }
        self.set_broken(true);
        self.signal.changed();
    }

    /// Takes turns on the caller's thread until there is nothing left to do; returns their number.
    #[cfg(test)]
    pub(super) fn settle(&self) -> usize {
        assert!(self.at_rest(), "only one thread takes turns");
        self.stop.store(false, Ordering::Release);
        let turns = 1 + std::iter::from_fn(|| self.turn(false).then_some(()))
            .take(10_000)
            .count();
        self.stop.store(true, Ordering::Release);
        turns
    }

    fn run(&self) {
        let mut events = [EpollEvent::default(); 2];
        let mut more = false;
        let mut late_until: Option<Instant> = None;
        loop {
            if !more {
                self.sleep(&mut events, late_until);
            }
            let mut gate = lock(&self.gate);
            while (gate.frozen || gate.lent) && !gate.exit {
                if gate.lent && !gate.parked {
                    gate.parked = true;
                    self.moved.notify_all();
                }
                gate = self.moved.wait(gate).unwrap_or_else(PoisonError::into_inner);
            }
            gate.parked = false;
            if gate.exit {
                return;
            }
            gate.busy = true;
            drop(gate);
            let tell_late = late_until.is_some_and(|until| until <= Instant::now());
            more = self.turn_at_gate(Taker::Worker { tell_late });
            late_until = late_until
                .filter(|_| !tell_late)
                .or_else(|| Some(Instant::now() + LATE));
            late_until = late_until.filter(|_| self.signal.is_late());
        }
    }

    /// Waits until a turn is due, or until what the guest is to be told of is late.
    fn sleep(&self, events: &mut [EpollEvent], late: Option<Instant>) {
        let limit = late.map_or(-1, |late| {
            let left = late.saturating_duration_since(Instant::now()).as_millis() + 1;
            i32::try_from(left).unwrap_or(i32::MAX)
        });
        let count = match self.epoll.wait(limit, events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => panic!("the worker's own epoll descriptor is valid: {error}"),
        };
        if events[..count].iter().any(|event| event.data() == KICK) {
            // An empty counter is as good as one that was emptied.
            let _ = self.kick.read();
        }
    }

    /// Takes a turn, once the gate says busy, and leaves the gate again.
    fn turn_at_gate(&self, taker: Taker) -> bool {
        let more = self.turn(matches!(taker, Taker::Holder));
        if let Taker::Worker { tell_late } = taker {
            // What was lent may have been given back while the device was frozen.
            self.signal.pay();
            if tell_late {
                self.signal.end_delay();
            }
        }
        let mut gate = lock(&self.gate);
        gate.busy = false;
        // A worker that is parked because its turns are lent is not to hear of each.
        if gate.frozen {
            self.moved.notify_all();
        }
        more
    }

    /// Takes a turn and says whether there is more to do at once.
    fn turn(&self, lent: bool) -> bool {
        let core = &mut *lock(&self.core);
        let mut turn = Turn::default();
        if !core.rings.is_empty() && !self.is_broken() {
            let work = Work {
                ram: &self.ram,
                signal: &self.signal,
                lent,
                stop: &self.stop,
            };
            match core.device.turn(&mut core.rings, &work) {
                Ok(taken) => turn = taken,
                Err(error) => self.fail(&error),
            }
        }
        core.set_watching(turn.watch, &self.epoll, &self.name);
        turn.more
    }
}

impl Core {
    /// Forgets the back end's old descriptors and asks for its new ones.
    fn rewatch(&mut self, epoll: &Epoll, name: &str) {
        self.set_watching(false, epoll, name);
        self.readiness = duplicate(self.device.as_ref()).unwrap_or_else(|error| {
            tracing::error!(device = name, %error, "the back end can't be watched: no descriptors left");
            Vec::new()
        });
    }

    fn set_watching(&mut self, watching: bool, epoll: &Epoll, name: &str) {
        if mem::replace(&mut self.watching, watching) == watching {
            return;
        }
        for descriptor in &self.readiness {
            let operation = if watching {
                ControlOperation::Add
            } else {
                ControlOperation::Delete
            };
            if let Err(error) = control(epoll, operation, descriptor, READINESS) {
                tracing::error!(device = name, %error, "the back end's descriptor can't be watched");
            }
        }
    }
}

/// Duplicates the back end's descriptors, so that they live as long as they are watched.
fn duplicate(device: &dyn Device) -> io::Result<Vec<OwnedFd>> {
    device
        .readiness()
        .iter()
        .map(|descriptor| descriptor.try_clone_to_owned())
        .collect()
}

fn control(epoll: &Epoll, operation: ControlOperation, descriptor: &impl AsRawFd, token: u64) -> io::Result<()> {
    epoll.ctl(operation, descriptor.as_raw_fd(), EpollEvent::new(EventSet::IN, token))
}
