//! The page streams: connections that carry nothing but page batches, from the primary to the secondary.
//!
//! ```text
//!   who encodes ──► PageSenders ──► stream k ──► reader's thread ──► LinkEvent::Pages ──► who stages
//!       ▲ blocks while the kernel takes no more         ▲ stops while much waits: Room         │
//!       '───────────────────────────────────────────────┴──────────────────────────────────────┘
//! ```
//!
//! They bypass the runtime: sums over megabytes and a full kernel buffer shall hold up nobody else. A batch is written out of
//! the memory in which it was encoded, and handed on in the memory into which it was read; nothing copies it in between. What
//! has been read and is neither staged nor dropped is bounded for each stream: then its reader stops, and TCP makes the primary
//! wait.
//!
//! Made with the link, and ended by the end of its sockets. Decides nothing.

use std::io::{self, IoSlice};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;

use bytes::{Buf, Bytes, BytesMut};
use checkpoint::Instant;
use checkpoint::limits::BODY_BYTES_MAX;
use checkpoint::wire::{Encoded, HEADER_BYTES, Header, Message, PageBatch, decode, encode};
use rustix::buffer::spare_capacity;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, recv, sendmsg};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use crate::clock;
use crate::connection::{CloseCause, Closed, Incoming};
use crate::peer::{LinkEvent, Which};

/// Bytes of batches that wait between all readers and whoever stages them.
const ARRIVED_BYTES_MAX: usize = 32 * 1024 * 1024;
/// Bytes that tell a stream's speed.
const MEASURED_BYTES_MIN: u64 = 1024 * 1024;
/// What a batch takes beside its bytes, at most.
const BATCH_OVERHEAD_BYTES: usize = 512;

/// The primary's ends. Clones are handles on the same streams.
#[derive(Clone, Debug)]
pub struct PageSenders(Arc<[PageSender]>);

#[derive(Debug)]
struct PageSender {
    stream: Arc<TcpStream>,
    meter: Mutex<Meter>,
    /// The last measurement that nobody has taken, or 0.
    speed: AtomicU64,
}

impl PageSenders {
    pub(crate) fn new(streams: &[Arc<TcpStream>]) -> Self {
        let sender = |stream: &Arc<TcpStream>| PageSender {
            stream: Arc::clone(stream),
            meter: Mutex::default(),
            speed: AtomicU64::new(0),
        };
        Self(streams.iter().map(sender).collect())
    }

    /// Returns how many there are.
    #[must_use]
    pub fn streams(&self) -> usize {
        self.0.len()
    }

    /// Writes a batch to a stream. Blocks the calling thread, which must not be the runtime's, until the kernel has all of it.
    ///
    /// # Errors
    /// Fails if the link is closed.
    pub fn blocking_send(&self, stream: usize, batch: PageBatch) -> Result<(), Closed> {
        let sender = &self.0[stream];
        let Encoded { header, body } = encode(&Message::Pages(batch));
        sender.write(&header, &body).map_err(|error| {
            // Its reader tells of the end.
            tracing::debug!(stream, %error, "can't write pages to the peer any more");
            Closed
        })
    }

    /// Returns a stream's speed in bytes a second, if it was measured since the last call: it is while more is sent than it takes
    /// at once.
    #[must_use]
    pub fn take_speed(&self, stream: usize) -> Option<u64> {
        Some(self.0[stream].speed.swap(0, Ordering::Relaxed)).filter(|speed| *speed > 0)
    }
}

impl PageSender {
    fn write(&self, header: &[u8], body: &Bytes) -> io::Result<()> {
        let mut meter = lock(&self.meter);
        let mut pieces = [IoSlice::new(header), IoSlice::new(body)];
        let mut rest = &mut pieces[..];
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let mut blocked = false;
        while !rest.is_empty() {
            match sendmsg(&*self.stream, rest, &mut SendAncillaryBuffer::default(), flags) {
                Ok(written) => {
                    IoSlice::advance_slices(&mut rest, written);
                    if let Some(speed) = meter.took(written) {
                        self.speed.store(speed, Ordering::Relaxed);
                    }
                }
                Err(Errno::AGAIN) => {
                    blocked = true;
                    meter.is_full();
                    wait_for(&self.stream, PollFlags::OUT)?;
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        if !blocked {
            meter.is_empty();
        }
        Ok(())
    }
}

/// Measures a stream's speed while it takes less than there is: then the kernel's buffer is full, so what it takes is what
/// has left it at the other end.
#[derive(Debug, Default)]
struct Meter(Option<Flow>);

/// Since when that is so, and how much it has taken.
#[derive(Clone, Copy, Debug)]
struct Flow {
    since: Instant,
    bytes: u64,
}

impl Meter {
    /// The kernel takes no more for now.
    fn is_full(&mut self) {
        self.0.get_or_insert_with(|| Flow {
            since: clock::now(),
            bytes: 0,
        });
    }

    /// The kernel has taken all there was.
    fn is_empty(&mut self) {
        self.0 = None;
    }

    /// Counts what the kernel took; returns the speed when that was enough to tell it.
    fn took(&mut self, written: usize) -> Option<u64> {
        let flow = self.0.as_mut()?;
        flow.bytes += written as u64;
        if flow.bytes < MEASURED_BYTES_MIN {
            return None;
        }
        let now = clock::now();
        let speed = flow.bytes.saturating_mul(1_000_000_000) / now.since(flow.since).0.max(1);
        *flow = Flow { since: now, bytes: 0 };
        Some(speed.max(1))
    }
}

/// A batch that has arrived.
#[derive(Debug)]
pub struct ArrivedPages {
    /// The stream on which it came.
    pub stream: usize,
    /// The batch.
    pub batch: PageBatch,
    /// To be kept until the batch is staged or dropped.
    pub room: Held,
}

/// Part of the bytes that may wait; given back when it is dropped.
#[derive(Debug)]
pub struct Held {
    room: Arc<Room>,
    bytes: usize,
}

/// What may wait of one stream.
#[derive(Debug)]
struct Room {
    free: Mutex<usize>,
    freed: Condvar,
}

impl Room {
    fn new(bytes: usize) -> Arc<Self> {
        let (free, freed) = (Mutex::new(bytes), Condvar::new());
        Arc::new(Self { free, freed })
    }

    /// Waits until so many bytes are free, and takes them.
    fn take(self: &Arc<Self>, bytes: usize) -> Held {
        let mut free = lock(&self.free);
        while *free < bytes {
            free = self.freed.wait(free).unwrap_or_else(PoisonError::into_inner);
        }
        *free -= bytes;
        let room = Arc::clone(self);
        Held { room, bytes }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        *lock(&self.room.free) += self.bytes;
        self.room.freed.notify_all();
    }
}

/// Reads one stream on the secondary.
pub(crate) struct PageReader {
    pub(crate) stream: usize,
    pub(crate) socket: Arc<TcpStream>,
    /// What was read behind the message that attached it.
    pub(crate) early: BytesMut,
    pub(crate) events: mpsc::Sender<LinkEvent>,
}

impl PageReader {
    /// Takes a connection over from the handshake.
    pub(crate) fn new(stream: usize, incoming: Incoming, events: mpsc::Sender<LinkEvent>) -> Self {
        let (socket, early) = incoming.into_parts();
        Self {
            stream,
            socket,
            early,
            events,
        }
    }

    /// Starts a thread that reads to the end of the stream, which is told also if the host refuses the thread. `streams` share the
    /// bytes that may wait.
    pub(crate) fn spawn(self, streams: usize) {
        let (events, which) = (self.events.clone(), Which::Pages(self.stream));
        let thread = Builder::new().name(format!("pages-{}", self.stream));
        let room = Room::new((ARRIVED_BYTES_MAX / streams).max(BODY_BYTES_MAX + BATCH_OVERHEAD_BYTES));
        if let Err(error) = thread.spawn(move || self.run(&room)) {
            let cause = CloseCause::Broken(error);
            // There is room: nothing has been told yet.
            let _ = events.try_send(LinkEvent::Closed { which, cause });
        }
    }

    fn run(mut self, room: &Arc<Room>) {
        let cause = loop {
            match self.next() {
                Ok(batch) => {
                    let arrived = ArrivedPages {
                        stream: self.stream,
                        room: room.take(batch.encoded.len() + BATCH_OVERHEAD_BYTES),
                        batch,
                    };
                    if self.events.blocking_send(LinkEvent::Pages(arrived)).is_err() {
                        // Nobody wants any more.
                        return;
                    }
                }
                Err(cause) => break cause,
            }
        };
        let which = Which::Pages(self.stream);
        let _ = self.events.blocking_send(LinkEvent::Closed { which, cause });
    }

    fn next(&mut self) -> Result<PageBatch, CloseCause> {
        let mut header = Vec::with_capacity(HEADER_BYTES);
        self.fill(&mut header, HEADER_BYTES)?;
        let header = header.first_chunk().expect("filled");
        let header = Header::parse(header).map_err(CloseCause::Garbage)?;
        // Judged before any of its body is waited for.
        if !header.is_pages() {
            return Err(CloseCause::Misplaced(header.kind_name()));
        }
        // The header has bounded it. Memory that is never written costs nothing.
        let mut body = Vec::with_capacity(header.body_len());
        self.fill(&mut body, header.body_len())?;
        match decode(&header, body.into()).map_err(CloseCause::Garbage)? {
            Message::Pages(batch) => Ok(batch),
            _ => Err(CloseCause::Misplaced(header.kind_name())),
        }
    }

    /// Reads until there are so many bytes.
    fn fill(&mut self, bytes: &mut Vec<u8>, wanted: usize) -> Result<(), CloseCause> {
        let early = self.early.len().min(wanted);
        bytes.extend_from_slice(&self.early[..early]);
        self.early.advance(early);
        while bytes.len() < wanted {
            match recv(&*self.socket, spare_capacity(bytes), RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err(CloseCause::Eof),
                Ok(_) => {}
                Err(Errno::AGAIN) => wait_for(&self.socket, PollFlags::IN).map_err(CloseCause::Broken)?,
                Err(Errno::INTR) => {}
                Err(error) => return Err(CloseCause::Broken(error.into())),
            }
        }
        // A vector may have more capacity than was asked for.
        self.early.extend_from_slice(&bytes[wanted..]);
        bytes.truncate(wanted);
        Ok(())
    }
}

fn wait_for(socket: &TcpStream, what: PollFlags) -> io::Result<()> {
    loop {
        match poll(&mut [PollFd::new(socket, what)], None) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use checkpoint::Duration;

    use super::*;

    #[test]
    fn speed_is_told_by_what_is_taken_while_there_is_more() {
        let mut meter = Meter::default();
        assert_eq!(
            meter.took(1 << 30),
            None,
            "it takes all there is: that tells nothing of the link"
        );
        let since = clock::now() - Duration::from_millis(10);
        meter.0 = Some(Flow { since, bytes: 0 });
        assert_eq!(meter.took(1_000), None);
        let speed = meter.took(1_000_000_000).unwrap();
        assert!((1..=100_000_100_000).contains(&speed), "{speed} bytes a second");
        assert_eq!(meter.took(1_000), None, "the next one begins");
    }

    #[test]
    fn what_waits_is_bounded_and_given_back() {
        let room = Room::new(1_000);
        let first = room.take(900);
        let (waiting, taken) = (Arc::clone(&room), std::thread::spawn(move || drop(first)));
        drop(waiting.take(500));
        taken.join().unwrap();
        assert_eq!(*lock(&room.free), 1_000);
    }
}
