//! The connections to the peer, once all stand.
//!
//! ```text
//!   send_control ──► control ──► the peer          control ──► read ──┐ first
//!   send, bulk   ──► data ─────► the peer          data ─────► read ──┼──► Events
//!   page senders ──► streams ──► the peer          streams ──► read ──┘
//! ```
//!
//! *Control* carries heartbeats and goodbyes, the *page streams* ([`crate::pages`]) pages, *data* everything else. Each keeps its
//! order; none waits for another, so that a heartbeat gets through while data is backed up, and an input while pages are. What has arrived and is not
//! yet taken is bounded: then the reader stops, and TCP makes the peer wait.
//!
//! Made by `connect` and `listener`, used by the role's loop and its VM thread. Decides nothing: it
//! reports the end of a connection, and it is the loop that judges what that means.

use std::fmt;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use checkpoint::wire::{Hello, Message, Welcome};
use rustix::net::{Shutdown, shutdown};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::timeout;

pub use crate::connection::{CloseCause, Closed};
use crate::connection::{Incoming, Outgoing};
use crate::listener::Occupied;
use crate::pages::{ArrivedPages, PageReader, PageSenders};

/// Bytes of messages that wait for the role's loop before the reader stops.
const ARRIVED_BYTES_MAX: u32 = 32 * 1024 * 1024;
/// Messages that wait for the role's loop before the reader stops.
const ARRIVED_MESSAGES_MAX: usize = 8 * 1024;
/// The same for the control connection.
const CONTROL_MESSAGES_MAX: usize = 64;
/// Batches and ends of the page streams that wait for the role's loop before their readers stop.
const PAGES_ARRIVED_MAX: usize = 256;
/// A [`BulkSender`] waits while this much is queued.
const BULK_QUEUED_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Which of the connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// Handshake, heartbeats, goodbye.
    Control,
    /// Everything else but pages.
    Data,
    /// The page stream of that number.
    Pages(usize),
}

impl fmt::Display for Which {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Control => f.write_str("control"),
            Self::Data => f.write_str("data"),
            Self::Pages(stream) => write!(f, "page stream {stream}"),
        }
    }
}

/// What the peer, or its end, sent.
#[derive(Debug)]
pub enum LinkEvent {
    /// A message. Those of one connection come in their order.
    Message(Message),
    /// Pages. Those of one stream come in their order.
    Pages(ArrivedPages),
    /// The last event of a connection: everything that the peer had sent on it has been delivered.
    Closed {
        /// The connection.
        which: Which,
        /// How it ended.
        cause: CloseCause,
    },
}

/// All connections stand, and both sides have agreed.
#[derive(Debug)]
pub struct Established {
    /// What the primary said.
    pub hello: Hello,
    /// What the secondary said.
    pub welcome: Welcome,
    /// For sending.
    pub link: Link,
    /// For receiving.
    pub events: Events,
}

/// The sending end. Clones are handles on the same link, which is closed with the last of them.
#[derive(Clone, Debug)]
pub struct Link(Arc<Inner>);

/// The receiving end.
#[derive(Debug)]
pub struct Events {
    control: mpsc::Receiver<Arrived>,
    data: mpsc::Receiver<Arrived>,
    pages: mpsc::Receiver<LinkEvent>,
}

/// Sends on the data connection from a thread that may block.
#[derive(Clone, Debug)]
pub struct BulkSender(Arc<Outgoing>);

/// One connection during the handshake.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) incoming: Incoming,
    pub(crate) outgoing: Arc<Outgoing>,
}

/// What both sides know when the handshake is over.
pub(crate) struct Agreement {
    pub(crate) hello: Hello,
    pub(crate) welcome: Welcome,
    pub(crate) peer: SocketAddr,
    /// Control messages that came before the other connections stood.
    pub(crate) early: Vec<Message>,
    pub(crate) occupied: Option<Occupied>,
}

#[derive(Debug)]
struct Inner {
    control: Arc<Outgoing>,
    data: Arc<Outgoing>,
    senders: PageSenders,
    /// Those of control and data, and then the page streams.
    streams: Vec<Arc<TcpStream>>,
    peer: SocketAddr,
    /// True once nobody wants to receive any more. The readers hold its other ends.
    finishing: watch::Sender<bool>,
    tasks: Vec<AbortHandle>,
    occupied: Mutex<Option<Occupied>>,
}

#[derive(Debug)]
struct Arrived {
    event: LinkEvent,
    _room: Option<OwnedSemaphorePermit>,
}

impl Link {
    /// Sends a message on the control connection. Never blocks.
    pub fn send_control(&self, message: Message) {
        self.0.control.send(&message);
    }

    /// Sends a message on the data connection, in order. Never blocks: the queue has no bound of its own.
    ///
    /// After the end of the link the message is forgotten; the end itself is an event.
    pub fn send(&self, message: Message) {
        self.0.data.send(&message);
    }

    /// Writes what was sent on the data connection now, and not only when the loop next waits.
    pub fn flush(&self) {
        self.0.data.write_soon();
    }

    /// Returns the bytes that wait to be written to the data connection.
    #[must_use]
    pub fn queued_bytes(&self) -> usize {
        self.0.data.queued_bytes()
    }

    /// Waits until everything sent on the data connection is with the kernel, or never will be.
    pub async fn drained(&self) {
        self.0.data.drained().await;
    }

    /// Returns a sender for a thread that may block. Its messages share the queue and the order of [`Self::send`].
    #[must_use]
    pub fn bulk(&self) -> BulkSender {
        BulkSender(Arc::clone(&self.0.data))
    }

    /// Returns the senders of pages, for threads that may block.
    #[must_use]
    pub fn page_senders(&self) -> PageSenders {
        self.0.senders.clone()
    }

    /// Returns the peer's address.
    #[must_use]
    pub fn peer_addr(&self) -> SocketAddr {
        self.0.peer
    }

    /// Returns all sockets, for the sentinel to guard.
    #[must_use]
    pub fn sockets(&self) -> Vec<BorrowedFd<'_>> {
        self.0.streams.iter().map(AsFd::as_fd).collect()
    }

    /// Ends all connections now. What is queued, and what has arrived and was not taken, may be lost.
    ///
    /// The peer sees the end even if the sentinel holds the sockets too.
    pub fn close(&self) {
        self.0.close();
    }

    /// Ends all connections in order: writes what is queued, ends the streams, waits for the peer to do the same.
    /// What still arrives is thrown away. After `limit` the link is closed all the same.
    ///
    /// The control connection ends first: the end of another, heard before, would look like a loss, and the goodbye came too late.
    pub async fn finish(&self, limit: Duration) {
        self.0.finishing.send_replace(true);
        let orderly = async {
            self.0.control.drained().await;
            self.0.data.drained().await;
            // Fails if the connection is gone already.
            let _ = shutdown(&self.0.streams[0], Shutdown::Write);
            if timeout(limit / 2, self.0.finishing.closed()).await.is_err() {
                self.0.shutdown(Shutdown::Write);
                self.0.finishing.closed().await;
            }
        };
        if timeout(limit, orderly).await.is_err() {
            tracing::debug!(peer = %self.0.peer, "the peer did not end the link in time");
        }
        self.close();
    }
}

impl Inner {
    fn close(&self) {
        for task in &self.tasks {
            task.abort();
        }
        self.control.give_up();
        self.data.give_up();
        self.shutdown(Shutdown::Both);
        self.occupied.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    fn shutdown(&self, how: Shutdown) {
        for stream in &self.streams {
            // Fails if the connection is gone already.
            let _ = shutdown(stream, how);
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.close();
    }
}

impl Events {
    /// Returns the next event, those of the control connection first; `None` when all connections have ended and all is
    /// delivered, or after [`Link::close`]. Nothing is lost if the wait is given up. Without `pages`, those of the page streams
    /// wait, their ends included.
    pub async fn recv(&mut self, pages: bool) -> Option<LinkEvent> {
        let Self {
            control,
            data,
            pages: streams,
        } = self;
        let bulk = async {
            tokio::select! {
                Some(arrived) = data.recv() => Some(arrived.event),
                Some(event) = streams.recv(), if pages => Some(event),
                else => None,
            }
        };
        tokio::select! {
            biased;
            Some(arrived) = control.recv() => Some(arrived.event),
            Some(event) = bulk => Some(event),
            else => None,
        }
    }

    /// Returns the next event if there is one already.
    pub fn try_recv(&mut self, pages: bool) -> Option<LinkEvent> {
        let arrived = self.control.try_recv().or_else(|_| self.data.try_recv());
        let streams = || pages.then(|| self.pages.try_recv().ok()).flatten();
        arrived.ok().map(|arrived| arrived.event).or_else(streams)
    }
}

impl BulkSender {
    /// Sends a message once there is room in the queue. Blocks the calling thread, which must not be the runtime's.
    ///
    /// # Errors
    /// Fails if the link is closed.
    pub fn blocking_send(&self, message: Message) -> Result<(), Closed> {
        self.0.blocking_send(&message, BULK_QUEUED_BYTES_MAX)
    }
}

impl Connection {
    pub(crate) fn new(stream: TcpStream) -> Self {
        let stream = Arc::new(stream);
        Self {
            incoming: Incoming::new(Arc::clone(&stream)),
            outgoing: Arc::new(Outgoing::new(stream)),
        }
    }

    /// Writes a message, all of it.
    pub(crate) async fn say(&self, message: Message) -> Result<(), CloseCause> {
        self.outgoing.send(&message);
        self.outgoing.flush().await.map_err(CloseCause::Broken)
    }
}

impl Established {
    /// Starts the tasks and threads of all connections.
    pub(crate) fn start(control: Connection, data: Connection, streams: Vec<Connection>, agreement: Agreement) -> Self {
        let Agreement {
            hello,
            welcome,
            peer,
            early,
            occupied,
        } = agreement;
        // Who was called is the secondary, which pages are sent to.
        let reads_pages = occupied.is_some();
        let (finishing, finish) = watch::channel(false);
        let (control_events, control_receiver) = mpsc::channel(CONTROL_MESSAGES_MAX);
        let (data_events, data_receiver) = mpsc::channel(ARRIVED_MESSAGES_MAX);
        let control_delivery = Delivery {
            which: Which::Control,
            events: control_events,
            room: None,
            finish: finish.clone(),
        };
        let room = Arc::new(Semaphore::new(ARRIVED_BYTES_MAX as usize));
        let data_delivery = Delivery {
            which: Which::Data,
            events: data_events,
            room: Some(room),
            finish,
        };
        let socket = |connection: &Connection| Arc::clone(connection.incoming.stream());
        let page_sockets: Vec<_> = streams.iter().map(socket).collect();
        let mut sockets = vec![socket(&control), socket(&data)];
        sockets.extend(page_sockets.iter().cloned());
        let mut tasks = vec![
            spawn_writer(&control.outgoing),
            spawn_writer(&data.outgoing),
            spawn_reader(control.incoming, control_delivery, early),
            spawn_reader(data.incoming, data_delivery, Vec::new()),
        ];
        let (pages_events, pages_receiver) = mpsc::channel(PAGES_ARRIVED_MAX);
        let count = streams.len();
        for (stream, connection) in streams.into_iter().enumerate() {
            let events = pages_events.clone();
            match reads_pages {
                true => PageReader::new(stream, connection.incoming, events).spawn(count),
                false => tasks.push(spawn_watcher(stream, connection.incoming, events)),
            }
        }
        let link = Link(Arc::new(Inner {
            control: control.outgoing,
            data: data.outgoing,
            senders: PageSenders::new(&page_sockets),
            streams: sockets,
            peer,
            finishing,
            tasks,
            occupied: Mutex::new(occupied),
        }));
        let events = Events {
            control: control_receiver,
            data: data_receiver,
            pages: pages_receiver,
        };
        Self {
            hello,
            welcome,
            link,
            events,
        }
    }
}

fn spawn_writer(outgoing: &Arc<Outgoing>) -> AbortHandle {
    let outgoing = Arc::clone(outgoing);
    tokio::spawn(async move { outgoing.write().await }).abort_handle()
}

/// Waits for the end of a stream on which nothing comes from the other side.
fn spawn_watcher(stream: usize, mut incoming: Incoming, events: mpsc::Sender<LinkEvent>) -> AbortHandle {
    let watch = async move {
        let event = match incoming.next().await {
            // Whatever it is, it is out of its place: the protocol is to say so.
            Ok((message, _)) => LinkEvent::Message(message),
            Err(cause) => LinkEvent::Closed {
                which: Which::Pages(stream),
                cause,
            },
        };
        // Fails only if the receiver is dropped.
        let _ = events.send(event).await;
    };
    tokio::spawn(watch).abort_handle()
}

fn spawn_reader(mut incoming: Incoming, mut delivery: Delivery, early: Vec<Message>) -> AbortHandle {
    let read = async move {
        for message in early {
            delivery.deliver(LinkEvent::Message(message), 0).await;
        }
        let cause = loop {
            match incoming.next().await {
                Ok((message, bytes)) => delivery.deliver(LinkEvent::Message(message), bytes).await,
                Err(cause) => break cause,
            }
        };
        let which = delivery.which;
        delivery.deliver(LinkEvent::Closed { which, cause }, 0).await;
    };
    tokio::spawn(read).abort_handle()
}

/// The way from a reader to the role's loop.
struct Delivery {
    which: Which,
    events: mpsc::Sender<Arrived>,
    room: Option<Arc<Semaphore>>,
    finish: watch::Receiver<bool>,
}

impl Delivery {
    /// Waits for room and hands the event over; throws it away if nobody wants it any more.
    async fn deliver(&mut self, event: LinkEvent, bytes: usize) {
        let Self {
            events, room, finish, ..
        } = self;
        let hand_over = async {
            let room = match room {
                None => None,
                Some(room) => {
                    let bytes = u32::try_from(bytes).unwrap_or(u32::MAX).min(ARRIVED_BYTES_MAX);
                    Some(
                        Arc::clone(room)
                            .acquire_many_owned(bytes)
                            .await
                            .expect("the semaphore is never closed"),
                    )
                }
            };
            // Fails only if the receiver is dropped.
            let _ = events.send(Arrived { event, _room: room }).await;
        };
        tokio::select! {
            biased;
            _ = finish.wait_for(|finishing| *finishing) => {}
            () = hand_over => {}
        }
    }
}
