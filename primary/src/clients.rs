//! The clients' side: frames to and from the TAP. Decides nothing; counts what is lost, and never logs a line for each frame.

use std::sync::Arc;

use bytes::Bytes;
use checkpoint::Instant;
use checkpoint::limits::FRAME_BYTES_MAX;
use link::clock;
use machine::tap::Tap;
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

/// The TAP, and what was lost at it.
pub(crate) struct Clients {
    tap: Arc<Tap>,
    lost: Lost,
}

impl Clients {
    pub(crate) fn new(tap: Arc<Tap>) -> Self {
        Self {
            tap,
            lost: Lost::default(),
        }
    }

    pub(crate) fn lost(&self) -> Lost {
        self.lost
    }

    /// Writes frames. The clock is read right before: a process that was stopped in between drops them.
    pub(crate) fn transmit(&mut self, frames: &[Bytes], not_after: Option<Instant>) {
        for batch in frames.chunks(FRAMES_PER_LOOK) {
            if not_after.is_some_and(|limit| clock::now() > limit) {
                self.lost.late += batch.len() as u64;
                warn!(
                    frames = batch.len(),
                    "released too late, dropped: nothing was heard from the peer in time"
                );
                continue;
            }
            for frame in batch {
                let Err(error) = self.tap.send_bare(frame) else {
                    continue;
                };
                self.lost.refused += 1;
                if self.lost.refused.is_power_of_two() {
                    let (tap, frames) = (self.tap.name(), self.lost.refused);
                    warn!(%error, tap, frames, "the TAP refused a frame, and the client has to ask again: is the interface up?");
                }
            }
        }
    }

    /// Reads the next frame, if there is one.
    pub(crate) fn read(&mut self) -> Option<Bytes> {
        // One byte more shows that a frame was cut.
        let mut frame = [0; FRAME_BYTES_MAX + 1];
        loop {
            match self.tap.recv_bare(&mut frame) {
                Ok(Some(length)) if length > FRAME_BYTES_MAX => {
                    self.lost.too_long += 1;
                    if self.lost.too_long.is_power_of_two() {
                        let (tap, frames) = (self.tap.name(), self.lost.too_long);
                        warn!(
                            tap,
                            frames,
                            "a frame of more than {FRAME_BYTES_MAX} bytes is dropped: lower the interface's MTU"
                        );
                    }
                }
                Ok(Some(length)) => return Some(Bytes::copy_from_slice(&frame[..length])),
                Ok(None) => return None,
                Err(error) => {
                    warn!(%error, "the TAP can't be read");
                    return None;
                }
            }
        }
    }
}
