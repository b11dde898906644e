//! The guest's network ports, one a card: where frames wait for the guest, and where they come out of it.
//!
//! The role's loop puts frames in, and takes the network cards' turns: each moves frames to the guest as it has
//! room and tells the loop of those that reached the guest and of those that the guest sent. Ports outlive
//! a change of role: what waits in them at a takeover is delivered by the next role.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;

use bytes::Bytes;
use checkpoint::Nic;
use checkpoint::frames::FramePool;
use checkpoint::pair::Delivery;
use machine::devices::{self, block, net};
use machine::offload::Offloads;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, Sleep, sleep};

/// Frames that may wait for the guest, on all its cards, before a port counts as full.
pub const INBOX_FRAMES_MAX: usize = 512;
/// The same in bytes.
pub const INBOX_BYTES_MAX: usize = 4 << 20;

/// Frames that wait.
#[derive(Debug, Default)]
struct Inbox {
    deliveries: VecDeque<Delivery>,
    bytes: usize,
}

/// Frames on their way into one guest by one of its cards.
#[derive(Debug)]
pub struct Port {
    nic: Nic,
    inbox: Mutex<Inbox>,
    /// Frames and bytes that may wait before it counts as full.
    frames_max: usize,
    bytes_max: usize,
    /// What the guest takes.
    accepted: Mutex<Offloads>,
    /// What the guest sends stays in its queue.
    output_held: AtomicBool,
}

impl Port {
    /// Makes the ports of a guest that has so many cards.
    #[must_use]
    pub fn all(cards: usize) -> Vec<Arc<Self>> {
        let port = |nic| {
            Arc::new(Self {
                nic,
                inbox: Mutex::default(),
                frames_max: INBOX_FRAMES_MAX / cards,
                bytes_max: INBOX_BYTES_MAX / cards,
                accepted: Mutex::default(),
                output_held: AtomicBool::default(),
            })
        };
        Nic::all(cards).map(port).collect()
    }

    /// Puts a frame behind those that wait; then a turn of the card is due.
    pub fn deliver(&self, delivery: Delivery) {
        let mut inbox = self.inbox();
        inbox.bytes += delivery.guest.len();
        inbox.deliveries.push_back(delivery);
    }

    /// Forgets the frames that wait.
    pub fn clear(&self) {
        *self.inbox() = Inbox::default();
    }

    /// Lets what the guest sends stay in its queue, or come out again; then a turn of the card is due.
    pub fn hold_output(&self, hold: bool) {
        self.output_held.store(hold, Ordering::Relaxed);
    }

    /// Returns how many frames wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.inbox().deliveries.len()
    }

    /// Tells whether no more frames should be put in for now.
    #[must_use]
    pub fn is_full(&self) -> bool {
        let inbox = self.inbox();
        inbox.deliveries.len() >= self.frames_max || inbox.bytes >= self.bytes_max
    }

    /// Returns what the guest takes, as it was told last.
    #[must_use]
    pub fn accepted(&self) -> Offloads {
        *lock(&self.accepted)
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        lock(&self.inbox)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a port tells its role's loop, in the card's turn, which the loop itself takes. Must not block.
pub trait Observer: Send {
    /// The guest sent a frame on that card.
    fn sent(&mut self, nic: Nic, frame: Bytes);
    /// A frame is on the guest's receive ring.
    fn consumed(&mut self, delivery: Delivery);
}

/// A port as its card's back end.
struct PortBackend<O> {
    port: Arc<Port>,
    observer: O,
    /// Of the frames that the guest sends.
    pool: FramePool,
    current: Option<Delivery>,
}

impl<O: Observer> PortBackend<O> {
    fn new(port: Arc<Port>, observer: O) -> Self {
        port.hold_output(false);
        Self {
            port,
            observer,
            pool: FramePool::new(),
            current: None,
        }
    }
}

impl<O: Observer> net::Backend for PortBackend<O> {
    fn accepts(&mut self, offloads: Offloads) {
        *lock(&self.port.accepted) = offloads;
    }

    fn transmit(&mut self, frame: &[u8]) {
        self.observer.sent(self.port.nic, self.pool.copy(frame));
    }

    fn may_transmit(&self) -> bool {
        !self.port.output_held.load(Ordering::Relaxed)
    }

    fn receive(&mut self) -> Option<Bytes> {
        let mut inbox = self.port.inbox();
        let next = inbox.deliveries.pop_front();
        let frame = next.as_ref().map(|delivery| delivery.guest.clone());
        inbox.bytes -= frame.as_ref().map_or(0, Bytes::len);
        drop(inbox);
        self.current = next;
        frame
    }

    fn put_back(&mut self, frame: Bytes) {
        if let Some(delivery) = self.current.take() {
            let mut inbox = self.port.inbox();
            inbox.bytes += frame.len();
            inbox.deliveries.push_front(delivery);
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

/// The network cards' turns, taken by a role's loop.
pub struct Turns {
    cards: Vec<Card>,
    /// When the guest is told of what is not urgent, if there is something.
    late: Pin<Box<Sleep>>,
    is_late: bool,
}

struct Card {
    turns: AsyncFd<devices::Turns>,
    due: bool,
}

impl Turns {
    /// Makes the loop take the turns of these cards from now on. The first of each is due.
    ///
    /// # Errors
    /// Fails if the runtime can't watch a card.
    pub fn new(cards: Vec<devices::Turns>) -> std::io::Result<Self> {
        let watched = cards.into_iter().map(|turns| {
            #[expect(
                deprecated,
                reason = "its replacement is unsafe; the card keeps one descriptor open for as long as it lives"
            )]
            let turns = AsyncFd::new(turns)?;
            Ok(Card { turns, due: true })
        });
        Ok(Self {
            cards: watched.collect::<std::io::Result<_>>()?,
            late: Box::pin(sleep(devices::LATE)),
            is_late: false,
        })
    }

    /// Makes a turn of a card due: there is a frame for the guest.
    pub fn make_due(&mut self, nic: Nic) {
        self.cards[nic.index()].due = true;
    }

    /// Makes a turn of each card due.
    pub fn make_all_due(&mut self) {
        for card in &mut self.cards {
            card.due = true;
        }
    }

    /// Returns how many cards there are.
    #[must_use]
    pub fn cards(&self) -> usize {
        self.cards.len()
    }

    /// Waits until a turn is due. Nothing is lost if the wait is given up.
    pub async fn due(&mut self) {
        std::future::poll_fn(|context| {
            if self.is_late && self.late.as_mut().poll(context).is_ready() {
                self.is_late = false;
                self.cards.iter().for_each(|card| card.turns.get_ref().tell_late());
            }
            let mut any = false;
            for card in &mut self.cards {
                // It fails only when the runtime ends, and its tasks with it.
                if !card.due
                    && let Poll::Ready(Ok(mut kicked)) = card.turns.poll_read_ready(context)
                {
                    kicked.clear_ready();
                    card.due = true;
                }
                any |= card.due;
            }
            if any { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    /// Takes a turn of each card that one is due of. The guest hears of it when it is told.
    pub fn take(&mut self) {
        for card in self.cards.iter_mut().filter(|card| card.due) {
            card.due = card.turns.get_ref().take();
        }
    }

    /// Tells the guest of what the turns had for it: after what they had for others is sent, since a vCPU that is woken may take
    /// the processor.
    pub fn tell(&mut self) {
        let late = self.cards.iter().filter(|card| card.turns.get_ref().tell()).count();
        if late > 0 && !self.is_late {
            self.is_late = true;
            self.late.as_mut().reset(Instant::now() + devices::LATE);
        }
    }
}

/// Nobody listens: the role has not begun.
#[derive(Clone)]
struct Nobody;

impl Observer for Nobody {
    fn sent(&mut self, _nic: Nic, _frame: Bytes) {}

    fn consumed(&mut self, _delivery: Delivery) {}
}

/// Makes the network back ends of one role, a card each, which take what the guest sends until they are told otherwise.
pub fn backends(ports: &[Arc<Port>], observer: &(impl Observer + Clone + 'static)) -> Vec<Box<dyn net::Backend>> {
    let backend = |port: &Arc<Port>| PortBackend::new(Arc::clone(port), observer.clone());
    ports.iter().map(|port| Box::new(backend(port)) as _).collect()
}

/// Makes the network back ends of a machine that has no role yet and does not run.
#[must_use]
pub fn unattached(ports: &[Arc<Port>]) -> Vec<Box<dyn net::Backend>> {
    backends(ports, &Nobody)
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

    fn zero(&mut self, _offset: u64, _length: u64, _give_back: bool) -> std::io::Result<()> {
        Err(std::io::ErrorKind::NotConnected.into())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Err(std::io::ErrorKind::NotConnected.into())
    }
}
