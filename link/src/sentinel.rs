//! The sentinel: a small process that tells the peer of this one's death at once.
//!
//! It holds duplicates of the sockets to the peer. When the role dies, however it dies, the sentinel
//! sends what the kernel still has queued and ends both streams, so that the peer reads the link to its
//! end without waiting until the kernel has freed the dead role's guest memory. How it learns of the death
//! is `machine::sentinel`'s.
//!
//! A role owns one [`Sentinel`], spawned before guest memory is mapped. The process itself runs
//! [`main_loop`]. It decides nothing, and a role goes on without it, only the slower to be missed.

use std::convert::Infallible;
use std::ffi::OsStr;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio, exit};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::Duration;

use machine::sentinel::{Canary, CanaryEnd, detach, wait_for_death};
use rustix::cmsg_space;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, Shutdown, SocketFlags, SocketType, recv, recvmsg, send, sendmsg, shutdown, socketpair,
};

use crate::clock;

/// Sockets that can be guarded at a time: control, data and the page streams.
pub const GUARDED_MAX: usize = 2 + checkpoint::limits::STREAMS_MAX;

const WATCH: u8 = b'w';
const GUARD: u8 = b'g';
const RELEASE: u8 = b'r';
const END: u8 = b'e';
const DONE: u8 = b'.';

/// The sentinel must have done what it is told within this.
const REPLY_LIMIT: Duration = Duration::from_secs(2);
/// Its program must have started within this: a busy host takes its time to read it from the disk, and nothing else waits yet.
const START_LIMIT: Duration = Duration::from_secs(15);
/// After a death, the peer has this long to take what is queued for it.
const LAST_WORDS_LIMIT: checkpoint::Duration = checkpoint::Duration::from_millis(10_000);
const WATCHER_STACK_BYTES: usize = 64 * 1024;

/// Why there is no sentinel. A role can go on without one.
#[derive(Debug, thiserror::Error)]
pub enum SentinelError {
    /// The kernel refused something.
    #[error("can't prepare the sentinel; the peer will notice this host's death later")]
    Prepare(#[source] io::Error),
    /// The program could not be run.
    #[error("can't run the sentinel; the peer will notice this host's death later")]
    Spawn(#[source] io::Error),
    /// It did not answer.
    #[error("the sentinel does not answer; the peer will notice this host's death later")]
    Silent(#[source] io::Error),
}

/// The role's end of its sentinel. Dropping it ends the sentinel, which leaves the sockets as they are.
#[derive(Debug)]
pub struct Sentinel {
    socket: Mutex<OwnedFd>,
    pid: u32,
    ending: Arc<AtomicBool>,
    _canary: Canary,
}

impl Sentinel {
    /// Runs this program's own `sentinel` subcommand, which must do nothing but call [`main_loop`].
    ///
    /// Call it before guest memory is mapped.
    ///
    /// # Errors
    /// Fails if the process can't be started or does not answer.
    pub fn spawn() -> Result<Self, SentinelError> {
        Self::spawn_program(Path::new("/proc/self/exe"), &[OsStr::new("sentinel")])
    }

    /// Runs `program` with `arguments`, which must do nothing but call [`main_loop`].
    ///
    /// # Errors
    /// Fails if the process can't be started or does not answer.
    pub fn spawn_program(program: &Path, arguments: &[&OsStr]) -> Result<Self, SentinelError> {
        let canary = Canary::start().map_err(SentinelError::Prepare)?;
        let (socket, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(|error| SentinelError::Prepare(error.into()))?;
        let child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(SentinelError::Spawn)?;
        let pid = child.id();
        let ending = Arc::new(AtomicBool::new(false));
        reap(child, Arc::clone(&ending)).map_err(SentinelError::Prepare)?;
        let sentinel = Self {
            socket: Mutex::new(socket),
            pid,
            ending,
            _canary: canary,
        };
        let page = sentinel._canary.page();
        sentinel
            .tell(WATCH, &[page], START_LIMIT)
            .map_err(SentinelError::Silent)?;
        Ok(sentinel)
    }

    /// Returns the sentinel's process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Has these sockets ended at this process's death, instead of those guarded before. On return it is so.
    ///
    /// # Panics
    /// Panics on more than [`GUARDED_MAX`] sockets.
    pub fn guard(&self, sockets: &[BorrowedFd<'_>]) {
        assert!(sockets.len() <= GUARDED_MAX, "a link has no more connections");
        if let Err(error) = self.tell(GUARD, sockets, REPLY_LIMIT) {
            tracing::warn!(%error, "the sentinel can't guard the link: the peer will notice this host's death later");
        }
    }

    /// Has no socket ended any more.
    pub fn release(&self) {
        if let Err(error) = self.tell(RELEASE, &[], REPLY_LIMIT) {
            tracing::debug!(%error, "the sentinel is gone");
        }
    }

    /// Sends one order with its descriptors and waits until it is carried out.
    fn tell(&self, order: u8, descriptors: &[BorrowedFd<'_>], limit: Duration) -> io::Result<()> {
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(GUARDED_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            assert!(
                control.push(SendAncillaryMessage::ScmRights(descriptors)),
                "there is room for {GUARDED_MAX}"
            );
        }
        sendmsg(
            &*socket,
            &[IoSlice::new(&[order])],
            &mut control,
            SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
        )?;
        wait_readable(socket.as_fd(), limit)?;
        let mut reply = [0];
        match recv(&*socket, &mut reply, RecvFlags::DONTWAIT)?.0 {
            1 if reply[0] == DONE => Ok(()),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

impl Drop for Sentinel {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
        if let Err(error) = self.tell(END, &[], REPLY_LIMIT) {
            tracing::debug!(%error, "the sentinel was gone before its end");
        }
    }
}

/// The life of the sentinel's process. Must be the first thing that `main` does; never returns to other work.
///
/// Standard input is the socket to the role.
#[must_use]
pub fn main_loop() -> ExitCode {
    let Err(error) = run();
    // Standard error leads nowhere: the exit code is all that can be told.
    ExitCode::from(u8::try_from(error.raw_os_error().unwrap_or(1)).unwrap_or(1))
}

fn run() -> io::Result<Infallible> {
    detach()?;
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    let guarded = Arc::new(Mutex::new(Vec::new()));
    loop {
        let Ok(Some((order, mut descriptors))) = next_order(socket.as_fd()) else {
            // The role is gone without a word.
            end_streams(&guarded)
        };
        match order {
            WATCH => {
                let page = descriptors.pop().ok_or(io::ErrorKind::InvalidInput)?;
                let guarded = Arc::clone(&guarded);
                Builder::new()
                    .name("watch".into())
                    .stack_size(WATCHER_STACK_BYTES)
                    .spawn(move || watch(&page, &guarded))?;
            }
            GUARD => *lock(&guarded) = descriptors,
            RELEASE => lock(&guarded).clear(),
            _ => {
                lock(&guarded).clear();
                let _ = send(&socket, &[DONE], SendFlags::NOSIGNAL);
                exit(0);
            }
        }
        send(&socket, &[DONE], SendFlags::NOSIGNAL)?;
    }
}

fn next_order(socket: BorrowedFd<'_>) -> io::Result<Option<(u8, Vec<OwnedFd>)>> {
    let mut order = [0];
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(GUARDED_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        match recvmsg(
            socket,
            &mut [IoSliceMut::new(&mut order)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        ) {
            Err(Errno::INTR) => {}
            received => break received?,
        }
    };
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            descriptors.extend(received);
        }
    }
    Ok((received.bytes == 1).then_some((order[0], descriptors)))
}

fn watch(page: &OwnedFd, guarded: &Mutex<Vec<OwnedFd>>) {
    // An error or an orderly end leaves the socket to the role as the only sign of its death.
    if let Ok(CanaryEnd::Died) = wait_for_death(page.as_fd()) {
        end_streams(guarded);
    }
}

/// Lets the peer read each guarded stream to its end, and exits.
fn end_streams(guarded: &Mutex<Vec<OwnedFd>>) -> ! {
    // Held to the end: whoever else learns of the death must not end this process before the last words are out.
    let mut sockets = lock(guarded);
    for socket in sockets.iter() {
        let _ = shutdown(socket, Shutdown::Write);
    }
    // A socket closed with unread bytes in it resets the connection, and what is still queued towards the peer is lost.
    let deadline = clock::now() + LAST_WORDS_LIMIT;
    while !sockets.is_empty() {
        let left = deadline.since(clock::now());
        if left == checkpoint::Duration::default() || wait_any(&sockets, left.into()).is_err() {
            break;
        }
        sockets.retain(|socket| discard(socket.as_fd()));
    }
    exit(0)
}

/// Throws away what has arrived; tells whether more may come.
fn discard(socket: BorrowedFd<'_>) -> bool {
    let mut scrap = [0; 16 * 1024];
    loop {
        match recv(socket, &mut scrap, RecvFlags::DONTWAIT) {
            Ok((0, _)) => return false,
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return error == Errno::AGAIN,
        }
    }
}

fn wait_any(sockets: &[OwnedFd], limit: Duration) -> io::Result<()> {
    let mut polled: Vec<_> = sockets
        .iter()
        .map(|socket| PollFd::new(socket, PollFlags::IN))
        .collect();
    let limit = limit.try_into().map_err(|_| io::ErrorKind::InvalidInput)?;
    match poll(&mut polled, Some(&limit)) {
        Ok(0) => Err(io::ErrorKind::TimedOut.into()),
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn wait_readable(socket: BorrowedFd<'_>, limit: Duration) -> io::Result<()> {
    wait_any(&[socket.try_clone_to_owned()?], limit)
}

fn lock(guarded: &Mutex<Vec<OwnedFd>>) -> MutexGuard<'_, Vec<OwnedFd>> {
    guarded.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes note of the sentinel's end, whenever it comes.
fn reap(mut child: Child, ending: Arc<AtomicBool>) -> io::Result<()> {
    Builder::new()
        .name("sentinel-end".into())
        .stack_size(WATCHER_STACK_BYTES)
        .spawn(move || {
            let ended = child.wait();
            if !ending.load(Ordering::Relaxed) {
                let how = ended.map_or_else(|error| error.to_string(), |status| status.to_string());
                tracing::warn!(how, "the sentinel died: the peer will notice this host's death later");
            }
        })?;
    Ok(())
}
