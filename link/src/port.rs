//! The guest's network port: where frames wait for the guest, and where they come out of it.
//!
//! The role's loop puts frames in, and takes the network card's turns: each moves frames to the guest as it has
//! room and tells the loop of those that reached the guest and of those that the guest sent. The port outlives
//! a change of role: what waits in it at a takeover is delivered by the next role.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use checkpoint::pair::Delivery;
use machine::devices::{self, block, net};
use machine::offload::HEADER_BYTES;
use tokio::io::unix::AsyncFd;

/// Frames that may wait for the guest before the port counts as full.
pub const INBOX_FRAMES_MAX: usize = 512;

/// Frames on their way into one guest.
#[derive(Debug, Default)]
pub struct Port {
    inbox: Mutex<VecDeque<Delivery>>,
    /// What the guest sends stays in its queue.
    output_held: AtomicBool,
}

impl Port {
    /// Puts a frame behind those that wait; then a turn of the card is due.
    pub fn deliver(&self, delivery: Delivery) {
        self.inbox().push_back(delivery);
    }

    /// Forgets the frames that wait.
    pub fn clear(&self) {
        self.inbox().clear();
    }

    /// Lets what the guest sends stay in its queue, or come out again; then a turn of the card is due.
    pub fn hold_output(&self, hold: bool) {
        self.output_held.store(hold, Ordering::Relaxed);
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
}

/// What a port tells its role's loop, in the card's turn, which the loop itself takes. Must not block.
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
    /// Makes the back end of one role, which takes what the guest sends until it is told otherwise.
    pub fn new(port: Arc<Port>, observer: O) -> Self {
        port.hold_output(false);
        Self {
            port,
            observer,
            current: None,
        }
    }
}

impl<O: Observer> net::Backend for PortBackend<O> {
    fn transmit(&mut self, frame: Bytes) {
        self.observer.sent(frame.slice(HEADER_BYTES..));
    }

    fn may_transmit(&self) -> bool {
        !self.port.output_held.load(Ordering::Relaxed)
    }

    fn receive(&mut self) -> Option<Bytes> {
        let next = self.port.inbox().pop_front();
        let frame = next
            .as_ref()
            .map(|delivery| [&[0; HEADER_BYTES][..], &delivery.guest].concat().into());
        self.current = next;
        frame
    }

    fn put_back(&mut self, _frame: Bytes) {
        if let Some(delivery) = self.current.take() {
            self.port.inbox().push_front(delivery);
        }
    }

    fn delivered(&mut self, _frame: Bytes) {
        if let Some(delivery) = self.current.take() {
            self.observer.consumed(delivery);
        }
    }

    fn readiness(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }
}

/// The network card's turns, taken by a role's loop.
pub struct Turns {
    card: AsyncFd<devices::Turns>,
    due: bool,
}

impl Turns {
    /// Makes the loop take the turns of `card` from now on. The first is due.
    ///
    /// # Errors
    /// Fails if the runtime can't watch the card.
    pub fn new(card: devices::Turns) -> std::io::Result<Self> {
        #[expect(
            deprecated,
            reason = "its replacement is unsafe; the card keeps one descriptor open for as long as it lives"
        )]
        let card = AsyncFd::new(card)?;
        Ok(Self { card, due: true })
    }

    /// Makes a turn due: there is a frame for the guest.
    pub fn make_due(&mut self) {
        self.due = true;
    }

    /// Waits until a turn is due. Nothing is lost if the wait is given up.
    pub async fn due(&mut self) {
        if !self.due {
            // Fails only when the runtime ends, and its tasks with it.
            if let Ok(mut kicked) = self.card.readable().await {
                kicked.clear_ready();
            }
            self.due = true;
        }
    }

    /// Takes a turn if one is due.
    pub fn take(&mut self) {
        if self.due {
            self.due = self.card.get_ref().take();
        }
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
