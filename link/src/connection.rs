//! One TCP connection that carries messages: framing in both directions, bounded and in order.
//!
//! [`Incoming`] reads what has arrived, and gives every complete message up to the end of the stream.
//! [`Outgoing`] takes messages without blocking and writes all that is queued in few system calls.
//! Neither knows what a message means. The peer is not trusted: a length beyond the bound, a wrong
//! checksum or an unknown kind ends the connection and costs no more memory than one message.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use bytes::{Buf, Bytes, BytesMut};
use checkpoint::wire::{Encoded, HEADER_BYTES, Header, Message, WireError, decode, encode, take_body};
use rustix::net::sockopt;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::sync::Notify;

/// What is read from the kernel at a time, if it has so much.
const READ_BYTES: usize = 64 * 1024;
/// What is made ready for the rest of a body at a time.
const RESERVED_BYTES_MAX: usize = 1024 * 1024;
/// Pieces handed to the kernel in one call.
const PIECES_MAX: usize = 64;
/// A body up to this size is put into one piece with its header.
const PIECE_JOINED_MAX: usize = 2 * 1024;
/// A thread that sends writes by itself while no more than this is queued.
const IMMEDIATE_BYTES_MAX: usize = 64 * 1024;
/// The kernel's buffers for one connection, in bytes, where it lets us ask for them. What is to be sent shall wait in
/// our own queue, whose length is known; what has arrived may wait in the kernel.
const SEND_BUFFER_BYTES: usize = 1024 * 1024;
const RECEIVE_BUFFER_BYTES: usize = 4 * 1024 * 1024;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum CloseCause {
    /// The peer, or its kernel, ended the stream.
    #[error("the peer closed the connection")]
    Eof,
    /// The connection broke.
    #[error("the connection broke")]
    Broken(#[source] io::Error),
    /// The peer sent what no tandem sends.
    #[error("the peer sent something that is not the tandem protocol")]
    Garbage(#[source] WireError),
    /// The peer sent what does not belong on this connection.
    #[error("the peer sent a {0} message on a connection that carries pages only")]
    Misplaced(&'static str),
}

/// Sets what every connection of a pair wants from the kernel.
pub(crate) fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    // Without the right to exceed the host's limit, the kernel's own growing buffers are larger than what may be set.
    let _ = sockopt::set_socket_send_buffer_size_force(stream, SEND_BUFFER_BYTES);
    let _ = sockopt::set_socket_recv_buffer_size_force(stream, RECEIVE_BUFFER_BYTES);
    Ok(())
}

/// The reading half of a connection.
#[derive(Debug)]
pub(crate) struct Incoming {
    stream: Arc<TcpStream>,
    buffer: BytesMut,
}

impl Incoming {
    pub(crate) fn new(stream: Arc<TcpStream>) -> Self {
        Self {
            stream,
            buffer: BytesMut::new(),
        }
    }

    pub(crate) fn stream(&self) -> &Arc<TcpStream> {
        &self.stream
    }

    /// Gives the stream and what was read of it and not taken.
    pub(crate) fn into_parts(self) -> (Arc<TcpStream>, BytesMut) {
        (self.stream, self.buffer)
    }

    /// Returns the next message and its size. Nothing is lost if the wait is given up.
    pub(crate) async fn next(&mut self) -> Result<(Message, usize), CloseCause> {
        let header = loop {
            if let Some(bytes) = self.buffer.first_chunk::<HEADER_BYTES>() {
                break Header::parse(bytes).map_err(CloseCause::Garbage)?;
            }
            self.fill(HEADER_BYTES).await?;
        };
        // The header has bounded it.
        let body_bytes = header.body_len();
        self.fill(HEADER_BYTES + body_bytes).await?;
        self.buffer.advance(HEADER_BYTES);
        let body = take_body(&mut self.buffer, &header);
        let message = decode(&header, body).map_err(CloseCause::Garbage)?;
        Ok((message, HEADER_BYTES + body_bytes))
    }

    /// Throws away everything up to the end of the stream.
    pub(crate) async fn discard(&mut self) {
        loop {
            self.buffer.clear();
            if self.fill(1).await.is_err() {
                return;
            }
        }
    }

    /// Reads until the buffer has `wanted` bytes.
    async fn fill(&mut self, wanted: usize) -> Result<(), CloseCause> {
        while self.buffer.len() < wanted {
            // No memory for bytes that a header only promises.
            self.buffer
                .reserve((wanted - self.buffer.len()).clamp(READ_BYTES, RESERVED_BYTES_MAX));
            self.stream.readable().await.map_err(CloseCause::Broken)?;
            match self.read() {
                Ok(0) => return Err(CloseCause::Eof),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(CloseCause::Broken(error)),
            }
        }
        Ok(())
    }

    /// Reads what there is, as far as there is room. What fills less than the room was all: to ask for more would cost a system
    /// call, so the stream counts as no longer readable until the kernel says that it is (epoll(7), question 9).
    fn read(&mut self) -> io::Result<usize> {
        let room = self.buffer.capacity() - self.buffer.len();
        let mut all = None;
        let result = self.stream.try_io(Interest::READABLE, || {
            let bytes = self.stream.try_read_buf(&mut self.buffer)?;
            if (1..room).contains(&bytes) {
                all = Some(bytes);
                return Err(io::ErrorKind::WouldBlock.into());
            }
            Ok(bytes)
        });
        all.map_or(result, Ok)
    }
}

/// The writing half of a connection.
///
/// Senders put messages into a queue. Whoever holds `writing` moves them to the socket: the task that runs
/// [`Self::write`], or the sender itself: a loop at the end of its turn, and a thread that may block.
#[derive(Debug)]
pub(crate) struct Outgoing {
    stream: Arc<TcpStream>,
    queue: Mutex<Queue>,
    /// Bytes queued or being written.
    bytes: AtomicUsize,
    room: Condvar,
    writing: Mutex<Writing>,
    work: Notify,
    drained: Notify,
    broken: AtomicBool,
}

#[derive(Debug, Default)]
struct Queue {
    pieces: VecDeque<Bytes>,
    ended: bool,
    /// Threads that wait for room.
    waiting: usize,
}

#[derive(Debug, Default)]
struct Writing {
    pieces: VecDeque<Bytes>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    /// Everything queued is with the kernel.
    Empty,
    /// The kernel takes no more for now.
    Full,
}

/// Nothing can be sent any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the connection to the peer is closed")]
pub struct Closed;

impl Outgoing {
    pub(crate) fn new(stream: Arc<TcpStream>) -> Self {
        Self {
            stream,
            queue: Mutex::default(),
            bytes: AtomicUsize::new(0),
            room: Condvar::new(),
            writing: Mutex::default(),
            work: Notify::new(),
            drained: Notify::new(),
            broken: AtomicBool::new(false),
        }
    }

    /// Returns the bytes not yet handed to the kernel.
    pub(crate) fn queued_bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Queues a message, to be written by the task when it gets its turn. Never blocks.
    pub(crate) fn send(&self, message: &Message) {
        if self.push(pieces(message), self.queue()).is_some() {
            self.work.notify_one();
        }
    }

    /// Writes what is queued, from the calling thread, as far as the kernel takes it at once: what was sent in one go
    /// leaves in one go, and without the way through the task. Never blocks.
    pub(crate) fn write_soon(&self) {
        if self.queued_bytes() > 0 && !self.write_now() {
            self.work.notify_one();
        }
    }

    /// Queues a message once fewer than `queued_bytes_max` bytes wait before it. Blocks the calling thread.
    pub(crate) fn blocking_send(&self, message: &Message, queued_bytes_max: usize) -> Result<(), Closed> {
        let pieces = pieces(message);
        let mut queue = self.queue();
        while !queue.ended && self.queued_bytes() >= queued_bytes_max {
            queue.waiting += 1;
            queue = self.room.wait(queue).unwrap_or_else(PoisonError::into_inner);
            queue.waiting -= 1;
        }
        if queue.ended {
            return Err(Closed);
        }
        if let Some(bytes) = self.push(pieces, queue)
            && !(bytes <= IMMEDIATE_BYTES_MAX && self.write_now())
        {
            self.work.notify_one();
        }
        Ok(())
    }

    /// Writes what is queued, and what will be, until the connection breaks or is given up.
    pub(crate) async fn write(&self) {
        loop {
            if let Err(error) = self.flush().await {
                // The reader sees the end too, after everything that the peer had sent before.
                tracing::debug!(%error, "can't write to the peer any more");
                return self.give_up();
            }
            if self.queue().ended {
                return;
            }
            self.work.notified().await;
        }
    }

    /// Writes what is queued.
    pub(crate) async fn flush(&self) -> io::Result<()> {
        loop {
            let progress = self.pump(&mut lock(&self.writing))?;
            if progress == Progress::Empty {
                return Ok(());
            }
            self.stream.writable().await?;
        }
    }

    /// Waits until everything queued is with the kernel, or never will be.
    pub(crate) async fn drained(&self) {
        loop {
            let drained = self.drained.notified();
            if self.queued_bytes() == 0 || self.broken.load(Ordering::Relaxed) {
                return;
            }
            drained.await;
        }
    }

    /// Takes no more messages, forgets those that wait, and lets go of blocked senders.
    pub(crate) fn give_up(&self) {
        self.broken.store(true, Ordering::Relaxed);
        let mut queue = self.queue();
        queue.ended = true;
        queue.pieces.clear();
        self.bytes.store(0, Ordering::Relaxed);
        drop(queue);
        self.room.notify_all();
        self.drained.notify_waiters();
        self.work.notify_one();
    }

    /// Returns how many bytes are queued now, if any will ever be written.
    fn push(&self, pieces: [Bytes; 2], mut queue: MutexGuard<'_, Queue>) -> Option<usize> {
        if queue.ended {
            return None;
        }
        let mut added = 0;
        for piece in pieces.into_iter().filter(|piece| !piece.is_empty()) {
            added += piece.len();
            queue.pieces.push_back(piece);
        }
        Some(self.bytes.fetch_add(added, Ordering::Relaxed) + added)
    }

    /// Writes from the calling thread; false if the task has to look after what is queued.
    fn write_now(&self) -> bool {
        let Ok(mut writing) = self.writing.try_lock() else {
            return false;
        };
        matches!(self.pump(&mut writing), Ok(Progress::Empty))
    }

    /// Moves what is queued to the kernel, in order, until nothing is left or the kernel takes no more.
    fn pump(&self, writing: &mut Writing) -> io::Result<Progress> {
        loop {
            if writing.pieces.is_empty() {
                let mut queue = self.queue();
                if queue.pieces.is_empty() {
                    return Ok(Progress::Empty);
                }
                std::mem::swap(&mut writing.pieces, &mut queue.pieces);
            }
            let slices: Vec<_> = writing
                .pieces
                .iter()
                .take(PIECES_MAX)
                .map(|piece| IoSlice::new(piece))
                .collect();
            match self.stream.try_write_vectored(&slices) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    drop(slices);
                    writing.advance(written);
                    self.wrote(written);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Progress::Full),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn wrote(&self, written: usize) {
        // Under the queue's lock, so that a blocked sender can't miss the news.
        let queue = self.queue();
        let before = self.bytes.load(Ordering::Relaxed);
        self.bytes.store(before.saturating_sub(written), Ordering::Relaxed);
        let is_awaited = queue.waiting > 0;
        drop(queue);
        if is_awaited {
            self.room.notify_all();
        }
        if before == written {
            self.drained.notify_waiters();
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        lock(&self.queue)
    }
}

impl Writing {
    fn advance(&mut self, mut written: usize) {
        while let Some(piece) = self.pieces.front_mut() {
            if written < piece.len() {
                piece.advance(written);
                return;
            }
            written -= piece.len();
            self.pieces.pop_front();
        }
        assert_eq!(written, 0, "the kernel takes no more than it is given");
    }
}

fn pieces(message: &Message) -> [Bytes; 2] {
    let Encoded { header, body } = encode(message);
    if body.len() > PIECE_JOINED_MAX {
        return [Bytes::copy_from_slice(&header), body];
    }
    let mut joined = BytesMut::with_capacity(HEADER_BYTES + body.len());
    joined.extend_from_slice(&header);
    joined.extend_from_slice(&body);
    [joined.freeze(), Bytes::new()]
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use checkpoint::wire::{Output, encode_into};
    use checkpoint::{Epoch, Generation, Nic, Tag};
    use proptest::prelude::*;
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;

    use super::*;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (one, other) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        (one.unwrap(), other.unwrap().0)
    }

    fn output(epoch: u64, bytes: usize) -> Message {
        let tag = Tag {
            generation: Generation(1),
            epoch: Epoch(epoch),
        };
        Message::Output(Output {
            tag,
            nic: Nic::FIRST,
            frame: vec![epoch.to_le_bytes()[0]; bytes].into(),
        })
    }

    fn bytes_of(messages: &[Message]) -> Vec<u8> {
        let mut bytes = Vec::new();
        messages.iter().for_each(|message| encode_into(message, &mut bytes));
        bytes
    }

    /// Sends bytes in pieces of a size, ends the stream, and returns what is read.
    async fn read_back(bytes: &[u8], piece: usize) -> (Vec<Message>, CloseCause) {
        let (mut ours, theirs) = pair().await;
        let mut incoming = Incoming::new(Arc::new(theirs));
        let write = async {
            for piece in bytes.chunks(piece) {
                // The reader may have had enough.
                if ours.write_all(piece).await.is_err() {
                    return;
                }
                tokio::task::yield_now().await;
            }
            let _ = ours.shutdown().await;
        };
        let read = async {
            let mut messages = Vec::new();
            loop {
                match incoming.next().await {
                    Ok((message, _)) => messages.push(message),
                    Err(cause) => return (messages, cause),
                }
            }
        };
        tokio::join!(write, read).1
    }

    #[tokio::test]
    async fn messages_are_read_from_any_pieces_up_to_the_last_whole_one() {
        let sent = [output(1, 60), output(2, 9_000), output(3, 1), output(4, 1_500)];
        let bytes = bytes_of(&sent);
        for piece in [1, 47, 49, 1_000, bytes.len()] {
            let (read, cause) = read_back(&bytes, piece).await;
            assert_eq!(read, sent);
            assert!(matches!(cause, CloseCause::Eof));
        }
        let (read, cause) = read_back(&bytes[..bytes.len() - 1], 500).await;
        assert_eq!(read, sent[..3]);
        assert!(matches!(cause, CloseCause::Eof));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn senders_on_several_threads_keep_each_its_order() {
        let (ours, theirs) = pair().await;
        let outgoing = Arc::new(Outgoing::new(Arc::new(ours)));
        let writer = tokio::spawn({
            let outgoing = Arc::clone(&outgoing);
            async move { outgoing.write().await }
        });
        let threads: Vec<_> = (0..3_u64)
            .map(|thread| {
                let outgoing = Arc::clone(&outgoing);
                std::thread::spawn(move || {
                    for number in 0..3_000 {
                        let bytes = 1 + usize::try_from(number * 37 % 4_000).unwrap();
                        outgoing
                            .blocking_send(&output(thread << 32 | number, bytes), 100_000)
                            .unwrap();
                    }
                })
            })
            .collect();
        let mut incoming = Incoming::new(Arc::new(theirs));
        let mut next = [0; 3];
        for _ in 0..9_000 {
            let epoch = incoming.next().await.unwrap().0.tag().unwrap().epoch.0;
            let expected = &mut next[usize::try_from(epoch >> 32).unwrap()];
            assert_eq!(epoch & 0xffff_ffff, *expected);
            *expected += 1;
        }
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        outgoing.drained().await;
        assert_eq!(outgoing.queued_bytes(), 0);
        outgoing.give_up();
        writer.await.unwrap();
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn damaged_streams_give_whole_messages_and_then_one_cause(
            flips in prop::collection::vec((any::<prop::sample::Index>(), 1..=255_u8), 0..4),
            cut in any::<prop::sample::Index>(),
            piece in 1..3_000_usize,
        ) {
            let sent: Vec<_> = (0..6).map(|epoch| output(epoch, 700)).collect();
            let mut bytes = bytes_of(&sent);
            let whole = bytes.len() / sent.len();
            let mut first_damaged = bytes.len();
            for (at, flip) in flips {
                let at = at.index(bytes.len());
                bytes[at] ^= flip;
                first_damaged = first_damaged.min(at);
            }
            bytes.truncate(cut.index(bytes.len()) + 1);
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let (read, _) = runtime.block_on(read_back(&bytes, piece));
            // Two flips of one byte may undo each other, so more may come than what lies before the first.
            prop_assert!(read.len() >= first_damaged.min(bytes.len()) / whole);
            prop_assert_eq!(&read[..], &sent[..read.len()]);
        }

        #[test]
        fn pieces_are_written_from_where_the_kernel_stopped(
            lengths in prop::collection::vec(1..50_usize, 1..20),
            steps in prop::collection::vec(1..80_usize, 1..100),
        ) {
            let all: Vec<u8> = (0..lengths.iter().sum::<usize>()).map(|at| at.to_le_bytes()[0]).collect();
            let mut rest = Bytes::from(all.clone());
            let pieces = lengths.iter().map(|length| rest.split_to(*length)).collect();
            let mut writing = Writing { pieces };
            let mut done = 0;
            for step in steps {
                let step = step.min(all.len() - done);
                writing.advance(step);
                done += step;
                let left: Vec<u8> = writing.pieces.iter().flatten().copied().collect();
                prop_assert_eq!(&left[..], &all[done..]);
                prop_assert!(writing.pieces.iter().all(|piece| !piece.is_empty()));
            }
        }
    }
}
