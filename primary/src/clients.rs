//! The clients' side: frames to and from the TAPs, one a card. Decides nothing; counts what is lost, and never logs a line for
//! each frame.

use std::future::poll_fn;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::task::Poll;

use bytes::Bytes;
use checkpoint::frames::FramePool;
use checkpoint::limits::FRAME_BYTES_MAX;
use checkpoint::{Instant, Nic};
use link::clock;
use link::port::Port;
use machine::offload::Offloads;
use machine::tap::Tap;
use smallvec::SmallVec;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tracing::warn;

/// Frames written in one go, after one look at the clock.
const FRAMES_PER_LOOK: usize = 64;

/// Frames that were lost here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Lost {
    /// Released, but too late to be written.
    pub(crate) late: u64,
    /// Released, and refused by the TAP.
    pub(crate) refused: u64,
    /// Read, and longer than any that is taken.
    pub(crate) too_long: u64,
}

/// The TAPs, and what was lost at them.
pub(crate) struct Clients {
    taps: Vec<AsyncFd<TapFd>>,
    /// What each was told last that its guest takes.
    accepted: Vec<Offloads>,
    /// The card that is looked at first.
    next: usize,
    pool: FramePool,
    /// What is to leave in this turn.
    leaving: Vec<(Nic, Bytes, Option<Instant>)>,
    /// A frame is read into it. One byte more than any may have shows that it was cut.
    frame: Vec<u8>,
    lost: Lost,
}

/// A TAP's descriptor, for the runtime to watch.
struct TapFd(Arc<Tap>);

impl AsRawFd for TapFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Clients {
    /// Watches the TAPs of the guest's cards.
    ///
    /// # Errors
    /// Fails if the runtime can't.
    pub(crate) fn new(taps: &[Arc<Tap>]) -> io::Result<Self> {
        let watched = taps.iter().map(|tap| {
            tap.set_offloads(Offloads::NONE)?;
            #[expect(
                deprecated,
                reason = "its replacement is unsafe; TapFd keeps one descriptor open for as long as it lives"
            )]
            AsyncFd::new(TapFd(Arc::clone(tap)))
        });
        Ok(Self {
            taps: watched.collect::<io::Result<_>>()?,
            accepted: vec![Offloads::NONE; taps.len()],
            next: 0,
            pool: FramePool::new(),
            leaving: Vec::new(),
            frame: vec![0; FRAME_BYTES_MAX + 1],
            lost: Lost::default(),
        })
    }

    /// Waits for frames for a card whose port has room, the cards taking turns. Nothing is lost if the wait is given up.
    pub(crate) async fn readable(&mut self, ports: &[Arc<Port>]) -> Nic {
        let count = self.taps.len();
        let nic = poll_fn(|context| {
            let cards = Nic::all(count).cycle().skip(self.next).take(count);
            for nic in cards.filter(|nic| !ports[nic.index()].is_full()) {
                // It fails only when the runtime ends, and its tasks with it.
                if let Poll::Ready(Ok(_)) = self.taps[nic.index()].poll_read_ready(context) {
                    return Poll::Ready(nic);
                }
            }
            Poll::Pending
        })
        .await;
        self.next = (nic.index() + 1) % count;
        nic
    }

    /// Has the host leave to each guest's card what that takes, and do the rest itself.
    pub(crate) fn follow(&mut self, ports: &[Arc<Port>]) {
        for ((tap, told), port) in self.taps.iter().zip(&mut self.accepted).zip(ports) {
            let accepted = port.accepted();
            if accepted == *told {
                continue;
            }
            *told = accepted;
            let tap = &tap.get_ref().0;
            if let Err(error) = tap.set_offloads(accepted) {
                // It does all of it, or what the guest does not take is dropped at its card.
                warn!(%error, tap = tap.name(), "the TAP can't be told what the guest takes of it");
            }
        }
    }

    /// Returns the TAPs' names, one a card.
    pub(crate) fn taps(&self) -> Vec<&str> {
        self.taps.iter().map(|tap| tap.get_ref().0.name()).collect()
    }

    pub(crate) fn lost(&self) -> Lost {
        self.lost
    }

    /// Takes frames that are to leave to the TAP of a card with the others of this turn, each not after this instant.
    pub(crate) fn transmit(&mut self, nic: Nic, frames: SmallVec<[Bytes; 1]>, not_after: Option<Instant>) {
        self.leaving
            .extend(frames.into_iter().map(|frame| (nic, frame, not_after)));
    }

    /// Writes what is to leave. The clock is read right before: a process that was stopped in between drops it.
    pub(crate) fn flush(&mut self) {
        let mut leaving = core::mem::take(&mut self.leaving);
        for batch in leaving.chunks(FRAMES_PER_LOOK) {
            let now = clock::now();
            let mut late = 0;
            for (nic, frame, not_after) in batch {
                if not_after.is_some_and(|limit| now > limit) {
                    late += 1;
                } else {
                    self.write(*nic, frame);
                }
            }
            if late > 0 {
                self.lost.late += late;
                warn!(
                    frames = late,
                    "released too late, dropped: nothing was heard from the peer in time"
                );
            }
        }
        leaving.clear();
        self.leaving = leaving;
    }

    fn write(&mut self, nic: Nic, frame: &Bytes) {
        let tap = &self.taps[nic.index()].get_ref().0;
        let Err(error) = tap.send(frame) else { return };
        self.lost.refused += 1;
        if self.lost.refused.is_power_of_two() {
            let (tap, frames) = (tap.name(), self.lost.refused);
            warn!(%error, tap, frames, "the TAP refused a frame, and the client has to ask again: is the interface up?");
        }
    }

    /// Reads the next frame for a card, if there is one.
    pub(crate) fn read(&mut self, nic: Nic) -> Option<Bytes> {
        let watched = &self.taps[nic.index()];
        let frame = &mut self.frame[..];
        loop {
            let mut failure = None;
            let read = watched.try_io(Interest::READABLE, |tap| match tap.0.recv(frame) {
                Ok(Some(length)) => Ok(length),
                Ok(None) => Err(ErrorKind::WouldBlock.into()),
                Err(error) => {
                    failure = Some(error);
                    // To the runtime the same: it is looked at again when there is news of it.
                    Err(io::Error::from(ErrorKind::WouldBlock))
                }
            });
            match read {
                Ok(length) if length > FRAME_BYTES_MAX => {
                    self.lost.too_long += 1;
                    if self.lost.too_long.is_power_of_two() {
                        let (tap, frames) = (watched.get_ref().0.name(), self.lost.too_long);
                        warn!(
                            tap,
                            frames,
                            "a frame of more than {FRAME_BYTES_MAX} bytes is dropped: lower the interface's MTU"
                        );
                    }
                }
                Ok(length) => return Some(self.pool.copy(&frame[..length])),
                // Nothing more, which the runtime knows now, too.
                Err(_) => {
                    if let Some(error) = failure {
                        warn!(%error, tap = watched.get_ref().0.name(), "the TAP can't be read: is it still there?");
                    }
                    return None;
                }
            }
        }
    }
}
