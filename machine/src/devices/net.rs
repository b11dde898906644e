//! The network card: queue 0 carries frames to the guest, queue 1 frames from it.
//!
//! Each frame has the header of [`crate::offload`] before it, here, in the back end and in the guest's buffers. If the
//! card offers it and the driver has accepted it, a frame may be a TCP segment of up to 64 KiB or leave out its checksum,
//! and one for the guest may take several buffers: then it gets all of them at once. A frame for the guest stays in
//! the back end until the guest has room for it; then it is taken, put on the used ring and reported as
//! delivered, in one go. Nothing is dropped here, except frames that no Ethernet of this size can carry and those that
//! ask more of their receiver than it has agreed to.

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
use crate::offload::{self, HEADER_BYTES, Offloads};

/// The longest frame in bytes, with its header: the longest IPv6 packet behind two VLAN tags.
pub const FRAME_BYTES_MAX: usize = HEADER_BYTES + 14 + 2 * 4 + 40 + 0xffff;
/// The shortest frame: its header and Ethernet's.
pub const FRAME_BYTES_MIN: usize = HEADER_BYTES + 14;

#[expect(clippy::cast_possible_truncation, reason = "twelve")]
const HEADER_BYTES_U32: u32 = HEADER_BYTES as u32;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Frames of one queue in one turn, so that neither direction waits long for the other.
const BATCH: usize = 64;
/// Frames after which the guest is told, at the latest.
const REPORT: usize = 16;

/// The network behind the card. Called on the card's worker, never while the card is frozen.
pub trait Backend: Send {
    /// Learns what the guest takes: when the driver is ready, the card is restored, and the back end is put behind the card.
    fn accepts(&mut self, _offloads: Offloads) {}
    /// Takes a frame from the guest. Must not block.
    fn transmit(&mut self, frame: Bytes);
    /// Tells whether it takes a frame now. While it does not, frames stay in the guest's queue, and in its memory; when it
    /// does again, somebody has to make a turn due.
    fn may_transmit(&self) -> bool {
        true
    }
    /// Hands over the next frame for the guest, if there is one now. Called only when the guest has a
    /// buffer for it. When it returns `None`, no descriptor of [`Backend::readiness`] may stay readable.
    fn receive(&mut self) -> Option<Bytes>;
    /// Takes the frame back that was received last: the guest has too few buffers for it now.
    fn put_back(&mut self, frame: Bytes);
    /// Learns that `frame`, the one received last, is on the guest's used ring: now it is input.
    /// Not called for a frame that the guest can't take; such a frame is lost.
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
    /// Makes a card with the hardware address `mac` in front of `backend`, which takes what the guest leaves to it if the
    /// card offers that.
    pub fn new(
        name: &str,
        mac: [u8; 6],
        offers: bool,
        backend: Box<dyn Backend>,
        ram: Memory,
        line: Arc<dyn Interrupt>,
    ) -> Result<Self, DeviceError> {
        let card = Card {
            mac,
            offers,
            accepted: 0,
            backend,
            buffers: Vec::new(),
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
    pub fn set_backend(&self, mut backend: Box<dyn Backend>) -> Box<dyn Backend> {
        self.mmio.change(|card: &mut Card| {
            backend.accepts(Offloads::of_guest(card.accepted));
            std::mem::replace(&mut card.backend, backend)
        })
    }
}

struct Card {
    mac: [u8; 6],
    /// Whether it offers more than its address.
    offers: bool,
    /// The features that the driver has accepted.
    accepted: u64,
    backend: Box<dyn Backend>,
    /// The guest's buffers of one frame, and what was written into each.
    buffers: Vec<(Chain, u32)>,
    complaints: Complaints,
}

/// What came of a frame for the guest.
enum Delivery {
    Done,
    Lost,
    /// All the buffers there are, so many, are too few.
    Waits(usize),
}

impl Device for Card {
    fn kind(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        let offered = if self.offers { offload::FEATURES } else { 0 };
        1 << VIRTIO_NET_F_MAC | offered
    }

    fn activate(&mut self, features: u64) {
        self.accepted = features;
        self.backend.accepts(Offloads::of_guest(features));
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
        let asleep = |more| Turn { more, watch: false };
        for _ in 0..BATCH {
            if work.stopping() {
                break;
            }
            let Some(buffer) = next_buffer(ring, work.ram)? else {
                report.end(ring, work)?;
                // Without a buffer the network is not even looked at; the guest's next buffer wakes the worker.
                return Ok(asleep(ring.listen(work.ram)?));
            };
            let Some(frame) = self.backend.receive() else {
                ring.unpop(1);
                report.end(ring, work)?;
                return Ok(Turn {
                    more: false,
                    watch: true,
                });
            };
            match self.deliver(ring, buffer, &frame, work.ram)? {
                Delivery::Done => {
                    self.backend.delivered(frame);
                    report.frame(ring, work)?;
                }
                Delivery::Lost => {}
                Delivery::Waits(buffers) => {
                    self.backend.put_back(frame);
                    report.end(ring, work)?;
                    return Ok(asleep(ring.listen_beyond(work.ram, buffers)?));
                }
            }
        }
        report.end(ring, work)?;
        Ok(Turn {
            more: true,
            watch: true,
        })
    }

    /// Writes a frame into the guest's buffers, the first of which was taken, or puts all of them back.
    fn deliver(&mut self, ring: &mut Ring, first: Chain, frame: &[u8], ram: &Memory) -> Result<Delivery, QueueError> {
        let guest = Offloads::of_guest(self.accepted);
        if frame.len() > FRAME_BYTES_MAX || !guest.permit(frame) {
            ring.unpop(1);
            return Ok(self.lost(
                frame,
                "it is too long, or leaves to the guest what that has not agreed to",
            ));
        }
        let most = if offload::merges(self.accepted) { ring.size() } else { 1 };
        self.buffers.clear();
        let mut left = frame.len();
        let mut next = Some(first);
        while let Some(buffer) = next {
            let written = u32::try_from(left).map_or_else(|_| buffer.writable(), |left| left.min(buffer.writable()));
            left -= crate::index(written.into());
            self.buffers.push((buffer, written));
            let taken = self.buffers.len();
            next = if left == 0 {
                None
            } else if taken == most {
                ring.unpop(taken);
                return Ok(self.lost(frame, "it is longer than the guest's buffers"));
            } else if let Some(another) = next_buffer(ring, ram)? {
                Some(another)
            } else {
                ring.unpop(taken);
                return Ok(Delivery::Waits(taken));
            };
        }
        self.fill(frame, guest, ram)?;
        ring.complete_all(ram, &self.buffers)?;
        Ok(Delivery::Done)
    }

    /// Writes a frame into the buffers that were found for it.
    fn fill(&self, frame: &[u8], guest: Offloads, ram: &Memory) -> Result<(), QueueError> {
        let (header, mut rest) = frame
            .split_first_chunk::<HEADER_BYTES>()
            .expect("what is permitted has a header");
        let header = guest.header(header, u16::try_from(self.buffers.len()).unwrap_or(u16::MAX));
        for (place, (buffer, written)) in self.buffers.iter().enumerate() {
            let offset = if place == 0 { HEADER_BYTES_U32 } else { 0 };
            if place == 0 {
                buffer.write(ram, 0, &header)?;
            }
            let (now, later) = rest.split_at(crate::index((written - offset).into()));
            buffer.write(ram, offset, now)?;
            rest = later;
        }
        Ok(())
    }

    fn lost(&mut self, frame: &[u8], why: &str) -> Delivery {
        if let Some(count) = self.complaints.due() {
            tracing::warn!(bytes = frame.len(), count, "frame for the guest dropped: {why}");
        }
        Delivery::Lost
    }

    /// Guest to outside; `true` if there is more.
    fn transmit(&mut self, ring: &mut Ring, work: &Work<'_>) -> Result<bool, QueueError> {
        let mut report = Report::default();
        for _ in 0..BATCH {
            if work.stopping() {
                break;
            }
            if !self.backend.may_transmit() {
                report.end(ring, work)?;
                return Ok(false);
            }
            let Some(chain) = ring.pop(work.ram)? else {
                report.end(ring, work)?;
                return ring.listen(work.ram);
            };
            if chain.writable() != 0 || chain.readable() < HEADER_BYTES_U32 {
                return Err(QueueError::Layout(
                    "a transmit buffer is writable, or too short for a header",
                ));
            }
            match self.taken(&chain, work.ram)? {
                Ok(frame) => self.backend.transmit(frame),
                Err(why) => {
                    if let Some(count) = self.complaints.due() {
                        let bytes = chain.readable();
                        tracing::warn!(bytes, count, "frame of the guest dropped: {why}");
                    }
                }
            }
            ring.complete(work.ram, &chain, 0)?;
            report.frame(ring, work)?;
        }
        report.end(ring, work)?;
        Ok(true)
    }

    /// Reads a frame of the guest, or says why it is none.
    fn taken(&self, chain: &Chain, ram: &Memory) -> Result<Result<Bytes, &'static str>, QueueError> {
        let length = crate::index(chain.readable().into());
        if !(FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&length) {
            return Ok(Err("no Ethernet frame has that length"));
        }
        let mut frame = vec![0; length];
        chain.read(ram, 0, &mut frame)?;
        let host = Offloads::of_host(self.accepted);
        host.clean(&mut frame);
        Ok(if host.permit(&frame) {
            Ok(frame.into())
        } else {
            Err("its header asks what was not agreed to, or can't be true")
        })
    }
}

/// Takes the next buffer for a frame to the guest.
fn next_buffer(ring: &mut Ring, ram: &Memory) -> Result<Option<Chain>, QueueError> {
    let buffer = ring.pop(ram)?;
    if buffer
        .as_ref()
        .is_some_and(|buffer| buffer.readable() != 0 || buffer.writable() < HEADER_BYTES_U32)
    {
        return Err(QueueError::Layout(
            "a receive buffer is not writable, or too small for a header",
        ));
    }
    Ok(buffer)
}

/// Tells the guest of used buffers, not for each frame.
#[derive(Default)]
struct Report {
    frames: usize,
}

impl Report {
    fn frame(&mut self, ring: &mut Ring, work: &Work<'_>) -> Result<(), QueueError> {
        self.frames += 1;
        if self.frames == REPORT {
            self.end(ring, work)?;
        }
        Ok(())
    }

    fn end(&mut self, ring: &mut Ring, work: &Work<'_>) -> Result<(), QueueError> {
        self.frames = 0;
        ring.tell(work)
    }
}
