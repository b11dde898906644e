//! The guest's network port: where frames wait for the guest, and where they come out of it.
//!
//! The role's loop puts frames in; the device's worker takes them out when the guest has room and
//! tells the loop of each that reached the guest and of each that the guest sent. The port outlives a
//! change of role: what waits in it at a takeover is delivered by the next role.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use checkpoint::pair::Delivery;
use machine::devices::{block, net};
use rustix::event::{EventfdFlags, eventfd};

/// Frames that may wait for the guest before the port counts as full.
pub const INBOX_FRAMES_MAX: usize = 512;

/// Frames on their way into one guest.
#[derive(Debug)]
pub struct Port {
    inbox: Mutex<VecDeque<Delivery>>,
    ready: OwnedFd,
}

impl Port {
    /// Makes an empty port.
    ///
    /// # Errors
    /// Fails if the host has no file descriptor left.
    pub fn new() -> std::io::Result<Arc<Self>> {
        let ready = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Arc::new(Self {
            inbox: Mutex::default(),
            ready,
        }))
    }

    /// Puts a frame behind those that wait.
    pub fn deliver(&self, delivery: Delivery) {
        let mut inbox = self.inbox();
        let waits = !inbox.is_empty();
        inbox.push_back(delivery);
        drop(inbox);
        // With others before it the worker has been woken: it sleeps only after it has seen the inbox empty.
        if !waits {
            self.wake();
        }
    }

    /// Forgets the frames that wait.
    pub fn clear(&self) {
        self.inbox().clear();
    }

    /// Returns how many frames wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.inbox().len()
    }

    /// Tells whether no more frames should be put in for now.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.waiting() >= INBOX_FRAMES_MAX
    }

    fn inbox(&self) -> MutexGuard<'_, VecDeque<Delivery>> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // The counter can't overflow: the worker resets it. A full one means that it is readable, as wanted.
        let _ = rustix::io::write(&self.ready, &1_u64.to_ne_bytes());
    }
}

/// What a port tells its role's loop, from the device's worker thread. Both may block for back-pressure.
pub trait Observer: Send {
    /// The guest sent a frame.
    fn sent(&mut self, frame: Bytes);
    /// A frame is on the guest's receive ring.
    fn consumed(&mut self, delivery: Delivery);
}

/// The port as the network device's back end.
pub struct PortBackend<O> {
    port: Arc<Port>,
    observer: O,
    current: Option<Delivery>,
}

impl<O: Observer> PortBackend<O> {
    /// Makes the back end of one role.
    pub fn new(port: Arc<Port>, observer: O) -> Self {
        port.wake();
        Self {
            port,
            observer,
            current: None,
        }
    }
}

impl<O: Observer> net::Backend for PortBackend<O> {
    fn transmit(&mut self, frame: &[u8]) {
        self.observer.sent(Bytes::copy_from_slice(frame));
    }

    fn receive(&mut self) -> Option<Bytes> {
        let next = {
            let mut inbox = self.port.inbox();
            let next = inbox.pop_front();
            if next.is_none() {
                let _ = rustix::io::read(&self.port.ready, &mut [0_u8; 8]);
            }
            next
        };
        let frame = next.as_ref().map(|delivery| delivery.guest.clone());
        self.current = next;
        frame
    }

    fn delivered(&mut self, _frame: Bytes) {
        if let Some(delivery) = self.current.take() {
            self.observer.consumed(delivery);
        }
    }

    fn readiness(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.port.ready.as_fd()]
    }
}

/// Nobody listens: the role has not begun.
struct Nobody;

impl Observer for Nobody {
    fn sent(&mut self, _frame: Bytes) {}

    fn consumed(&mut self, _delivery: Delivery) {}
}

/// Makes the network back end of a machine that has no role yet and does not run.
#[must_use]
pub fn unattached(port: Arc<Port>) -> impl net::Backend {
    PortBackend::new(port, Nobody)
}

/// The block back end of a machine that has no role yet and does not run: a disk of that size that fails.
pub struct UnattachedDisk(pub u64);

impl block::Backend for UnattachedDisk {
    fn size(&self) -> u64 {
        self.0
    }

    fn read(&mut self, _offset: u64, _bytes: &mut [u8]) -> std::io::Result<()> {
        Err(std::io::ErrorKind::NotConnected.into())
    }

    fn write(&mut self, _offset: u64, _bytes: &[u8]) -> std::io::Result<()> {
        Err(std::io::ErrorKind::NotConnected.into())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Err(std::io::ErrorKind::NotConnected.into())
    }
}
