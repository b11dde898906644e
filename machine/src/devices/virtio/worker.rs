//! The thread behind a device: sleeps until a queue was kicked or the back end has something, then takes a turn.
//!
//! ```text
//!   asleep ──kick, readiness, wake──► at the gate ──not frozen──► turn ──► asleep, or the gate again if there is more
//!                                         '──frozen──► waits for the thaw
//! ```
//!
//! A turn is bounded, looks at all queues in their order, and between two requests sees that it is to stop.
//! Freezing or thawing an idle worker wakes nobody. The only one that reads or writes the guest's queues.

use std::any::Any;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::queue::{QueueError, Ring};
use super::{Complaints, Device, Signal, Turn, Work, lock};
use crate::devices::Interrupt;
use crate::memory::Memory;

const CONTROL: u64 = u64::MAX;
const READINESS: u64 = u64::MAX - 1;

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
    pub(super) kicks: Vec<EventFd>,
    /// Locked by the worker for a turn, else by whoever changes the device.
    pub(super) core: Mutex<Core>,
    /// The guest broke a queue; the device does nothing until it is reset.
    broken: AtomicBool,
    gate: Mutex<Gate>,
    moved: Condvar,
    complaints: Mutex<Complaints>,
    stop: AtomicBool,
    control: EventFd,
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

#[derive(Debug, Default)]
struct Gate {
    frozen: bool,
    busy: bool,
    exit: bool,
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
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(descriptor);
        let epoll = Epoll::new().map_err(descriptor)?;
        let kicks = (0..device.queues()).map(|_| event()).collect::<Result<Vec<_>, _>>()?;
        let control = event()?;
        watch(&epoll, &control, CONTROL).map_err(descriptor)?;
        for (number, kick) in (0..).zip(&kicks) {
            watch(&epoll, kick, number).map_err(descriptor)?;
        }
        let readiness = duplicate(device.as_ref()).map_err(descriptor)?;
        let shared = Arc::new(Shared {
            name: name.to_owned(),
            ram,
            signal: Signal {
                status: AtomicU32::new(0),
                line,
            },
            kicks,
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
            control,
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
        self.shared.wake();
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
        drop(gate);
        self.moved.notify_all();
    }

    /// Says whether the worker is at rest and stays so.
    pub(super) fn at_rest(&self) -> bool {
        let gate = lock(&self.gate);
        gate.frozen && !gate.busy
    }

    /// Makes the worker look at all queues.
    pub(super) fn wake(&self) {
        kick(&self.control);
    }

    /// Makes the worker look at queue `number`, if there is one.
    pub(super) fn notify(&self, number: u32) {
        if let Some(event) = self.kicks.get(crate::index(number.into())) {
            kick(event);
        }
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

    pub(super) fn acknowledge(&self, bits: u32) {
        self.signal.status.fetch_and(!bits, Ordering::AcqRel);
    }

    pub(super) fn set_interrupt_status(&self, bits: u32) {
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
        self.wake();
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
        let turns = 1 + std::iter::from_fn(|| self.turn().then_some(())).take(10_000).count();
        self.stop.store(true, Ordering::Release);
        turns
    }

    fn run(&self) {
        let mut events = vec![EpollEvent::default(); self.kicks.len() + 2];
        let mut more = false;
        loop {
            if !more {
                self.sleep(&mut events);
            }
            let mut gate = lock(&self.gate);
            while gate.frozen && !gate.exit {
                gate = self.moved.wait(gate).unwrap_or_else(PoisonError::into_inner);
            }
            if gate.exit {
                return;
            }
            gate.busy = true;
            drop(gate);
            more = self.turn();
            let mut gate = lock(&self.gate);
            gate.busy = false;
            if gate.frozen {
                self.moved.notify_all();
            }
        }
    }

    fn sleep(&self, events: &mut [EpollEvent]) {
        let count = match self.epoll.wait(-1, events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => panic!("the worker's own epoll descriptor is valid: {error}"),
        };
        for event in &events[..count] {
            let source = match event.data() {
                READINESS => continue,
                CONTROL => Some(&self.control),
                number => self.kicks.get(crate::index(number)),
            };
            // An empty counter is as good as one that was emptied.
            let _ = source.map(EventFd::read);
        }
    }

    /// Takes a turn and says whether there is more to do at once.
    fn turn(&self) -> bool {
        let core = &mut *lock(&self.core);
        let mut turn = Turn::default();
        if !core.rings.is_empty() && !self.is_broken() {
            let work = Work {
                ram: &self.ram,
                signal: &self.signal,
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

fn watch(epoll: &Epoll, descriptor: &impl AsRawFd, token: u64) -> io::Result<()> {
    control(epoll, ControlOperation::Add, descriptor, token)
}

fn control(epoll: &Epoll, operation: ControlOperation, descriptor: &impl AsRawFd, token: u64) -> io::Result<()> {
    epoll.ctl(operation, descriptor.as_raw_fd(), EpollEvent::new(EventSet::IN, token))
}

fn kick(event: &EventFd) {
    // Fails only when the counter is full, and then the worker is woken anyway.
    let _ = event.write(1);
}
