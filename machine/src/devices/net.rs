//! The network card: queue 0 carries frames to the guest, queue 1 frames from it.
//!
//! No offloads and no merged buffers: one frame, one buffer, behind a header of 12 bytes that is all
//! zero but for the number of buffers. A frame for the guest stays in the back end until the guest has a
//! buffer for it; then it is taken, put on the used ring and reported as delivered, in one go.
//! Nothing is dropped here, except frames that no Ethernet of this size can carry.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use bytes::Bytes;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MAC;

use super::virtio::mmio::VirtioMmio;
use super::virtio::queue::{Chain, QueueError, Ring};
use super::virtio::{Complaints, Device, DeviceError, Turn, Work};
use crate::devices::Interrupt;
use crate::memory::Memory;

/// The longest frame in bytes, without checksum: a jumbo frame with two VLAN tags.
pub const FRAME_BYTES_MAX: usize = 9022;
/// The shortest frame: an Ethernet header.
pub const FRAME_BYTES_MIN: usize = 14;

const HEADER_BYTES: u32 = 12;
/// The header of every frame to the guest: no offload, one buffer.
const HEADER: [u8; HEADER_BYTES as usize] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Frames of one queue in one turn, so that neither direction waits long for the other.
const BATCH: usize = 64;
/// Frames after which the guest is told, at the latest.
const REPORT: usize = 16;

/// The network behind the card. Called on the card's worker, never while the card is frozen.
pub trait Backend: Send {
    /// Takes a frame from the guest. Must not block.
    fn transmit(&mut self, frame: &[u8]);
    /// Tells whether it takes a frame now. While it does not, frames stay in the guest's queue, and in its memory; when it
    /// does again, somebody has to make a turn due.
    fn may_transmit(&self) -> bool {
        true
    }
    /// Hands over the next frame for the guest, if there is one now. Called only when the guest has a
    /// buffer for it. When it returns `None`, no descriptor of [`Backend::readiness`] may stay readable.
    fn receive(&mut self) -> Option<Bytes>;
    /// Learns that `frame`, the one received last, is on the guest's used ring: now it is input.
    /// Not called for a frame that does not fit into the guest's buffer; such a frame is lost.
    fn delivered(&mut self, frame: Bytes);
    /// Descriptors that are readable while [`Backend::receive`] may have something. They are duplicated
    /// and watched, level-triggered, until the back end is replaced.
    fn readiness(&self) -> Vec<BorrowedFd<'_>>;
}

/// A handle on the network card.
#[derive(Clone)]
pub struct Net {
    mmio: Arc<VirtioMmio>,
}

impl Net {
    /// Makes a card with the hardware address `mac` in front of `backend`.
    pub fn new(
        name: &str,
        mac: [u8; 6],
        backend: Box<dyn Backend>,
        ram: Memory,
        line: Arc<dyn Interrupt>,
    ) -> Result<Self, DeviceError> {
        let card = Card {
            mac,
            backend,
            frame: Vec::new(),
            complaints: Complaints::default(),
        };
        Ok(Self {
            mmio: Arc::new(VirtioMmio::new(name, Box::new(card), ram, line)?),
        })
    }

    /// The card's transport.
    #[must_use]
    pub fn mmio(&self) -> &Arc<VirtioMmio> {
        &self.mmio
    }

    /// Puts another network behind the card, between two frames, and returns the one it had.
    pub fn set_backend(&self, backend: Box<dyn Backend>) -> Box<dyn Backend> {
        self.mmio
            .change(|card: &mut Card| std::mem::replace(&mut card.backend, backend))
    }
}

struct Card {
    mac: [u8; 6],
    backend: Box<dyn Backend>,
    frame: Vec<u8>,
    complaints: Complaints,
}

impl Device for Card {
    fn kind(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_NET_F_MAC
    }

    fn queues(&self) -> usize {
        2
    }

    fn config(&self) -> Vec<u8> {
        self.mac.to_vec()
    }

    fn turn(&mut self, rings: &mut [Ring], work: &Work<'_>) -> Result<Turn, QueueError> {
        let received = self.receive(&mut rings[RECEIVE], work)?;
        let transmitted = self.transmit(&mut rings[TRANSMIT], work)?;
        Ok(Turn {
            more: received.more || transmitted,
            watch: received.watch,
        })
    }

    fn readiness(&self) -> Vec<BorrowedFd<'_>> {
        self.backend.readiness()
    }
}

impl Card {
    /// Outside to guest.
    fn receive(&mut self, ring: &mut Ring, work: &Work<'_>) -> Result<Turn, QueueError> {
        let mut report = Report::default();
        for _ in 0..BATCH {
            if work.stopping() {
                break;
            }
            let Some(chain) = ring.pop(work.ram)? else {
                report.end(work);
                // Without a buffer the network is not even looked at; the guest's next buffer wakes the worker.
                return Ok(Turn {
                    more: ring.listen(work.ram)?,
                    watch: false,
                });
            };
            if chain.readable() != 0 || chain.writable() < HEADER_BYTES {
                return Err(QueueError::Layout(
                    "a receive buffer is not writable, or too small for a header",
                ));
            }
            let Some(frame) = self.backend.receive() else {
                ring.unpop();
                report.end(work);
                return Ok(Turn {
                    more: false,
                    watch: true,
                });
            };
            match self.deliver(ring, &chain, &frame, work.ram)? {
                true => {
                    self.backend.delivered(frame);
                    report.frame(work);
                }
                false => ring.unpop(),
            }
        }
        report.end(work);
        Ok(Turn {
            more: true,
            watch: true,
        })
    }

    /// Writes a frame into the guest's buffer; `false` if it does not fit.
    fn deliver(&mut self, ring: &mut Ring, chain: &Chain, frame: &[u8], ram: &Memory) -> Result<bool, QueueError> {
        let room = chain.writable() - HEADER_BYTES;
        let length = match u32::try_from(frame.len()) {
            Ok(length) if length <= room && frame.len() <= FRAME_BYTES_MAX => length,
            _ => {
                if let Some(count) = self.complaints.due() {
                    tracing::warn!(
                        bytes = frame.len(),
                        room,
                        count,
                        "frame dropped: too long for the guest's buffer"
                    );
                }
                return Ok(false);
            }
        };
        chain.write(ram, 0, &HEADER)?;
        chain.write(ram, HEADER_BYTES, frame)?;
        ring.complete(ram, chain, HEADER_BYTES + length)?;
        Ok(true)
    }

    /// Guest to outside; `true` if there is more.
    fn transmit(&mut self, ring: &mut Ring, work: &Work<'_>) -> Result<bool, QueueError> {
        let mut report = Report::default();
        for _ in 0..BATCH {
            if work.stopping() {
                break;
            }
            if !self.backend.may_transmit() {
                report.end(work);
                return Ok(false);
            }
            let Some(chain) = ring.pop(work.ram)? else {
                report.end(work);
                return ring.listen(work.ram);
            };
            if chain.writable() != 0 || chain.readable() < HEADER_BYTES {
                return Err(QueueError::Layout(
                    "a transmit buffer is writable, or too short for a header",
                ));
            }
            let length = crate::index((chain.readable() - HEADER_BYTES).into());
            if (FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&length) {
                self.frame.resize(length, 0);
                chain.read(work.ram, HEADER_BYTES, &mut self.frame)?;
                self.backend.transmit(&self.frame);
            } else if let Some(count) = self.complaints.due() {
                tracing::warn!(
                    bytes = length,
                    count,
                    "frame of the guest dropped: no Ethernet frame has that length"
                );
            }
            ring.complete(work.ram, &chain, 0)?;
            report.frame(work);
        }
        report.end(work);
        Ok(true)
    }
}

/// Tells the guest of used buffers, not for each frame.
#[derive(Default)]
struct Report {
    frames: usize,
}

impl Report {
    fn frame(&mut self, work: &Work<'_>) {
        self.frames += 1;
        if self.frames == REPORT {
            self.end(work);
        }
    }

    fn end(&mut self, work: &Work<'_>) {
        if std::mem::take(&mut self.frames) != 0 {
            work.signal.used();
        }
    }
}
