//! The network card: pairs of queues, the first of which carries frames to the guest, the second frames from it.
//!
//! Most cards have one pair. One with several offers that to the driver, which says by a control queue behind all pairs how
//! many it uses ([`control`]); a frame for the guest goes to the one of these that its flow belongs to ([`steer`]). The frames
//! for the guest keep one order among all queues: one that waits for room in its own is not overtaken.
//!
//! Each frame has the header of [`crate::offload`] before it, here, in the back end and in the guest's buffers. If the
//! card offers it and the driver has accepted it, a frame may be a TCP segment of up to 64 KiB or leave out its checksum,
//! and one for the guest may take several buffers: then it gets all of them at once. A frame for the guest stays in
//! the back end until the guest has room for it; then it is taken, put on the used ring and reported as
//! delivered, in one go. Nothing is dropped here, except frames that no Ethernet of this size can carry and those that
//! ask more of their receiver than it has agreed to.

mod control;
mod steer;

use std::os::fd::BorrowedFd;
use std::slice;
use std::sync::Arc;

use bytes::Bytes;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MAC;

use self::control::Command;
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
/// The most pairs of queues that a card has.
pub const QUEUE_PAIRS_MAX: u16 = 8;
/// The fields of the configuration between the address and the number of queue pairs, none of which is offered.
const STATUS: [u8; 2] = [0; 2];
/// Control commands in one turn.
const COMMANDS: usize = 4;
/// Frames of one queue in one turn, so that neither direction waits long for the other.
const BATCH: usize = 64;
/// Frames after which the guest is told, at the latest.
const REPORT: usize = 16;

/// The network behind the card. Called on the card's worker, never while the card is frozen.
pub trait Backend: Send {
    /// Learns what the guest takes: when the driver is ready, the card is restored, and the back end is put behind the card.
    fn accepts(&mut self, _offloads: Offloads) {}
    /// Takes a frame from the guest: a copy of its own, if it keeps it. Must not block.
    fn transmit(&mut self, frame: &[u8]);
    /// Tells whether it takes a frame now. While it does not, frames stay in the guest's queue, and in its memory; when it
    /// does again, somebody has to make a turn due.
    fn may_transmit(&self) -> bool {
        true
    }
    /// Hands over the next frame for the guest, if there is one now. When it returns `None`, no descriptor of
    /// [`Backend::readiness`] may stay readable.
    fn receive(&mut self) -> Option<Bytes>;
    /// Takes the frame back that was received last: the guest has too few buffers for it now, or has broken its queue.
    fn put_back(&mut self, frame: Bytes);
    /// Learns that `frame`, the one received last, is on the guest's used ring: now it is input.
    /// Not called for a frame that the guest can't take; such a frame is lost.
    fn delivered(&mut self, frame: Bytes);
    /// Descriptors that are readable while [`Backend::receive`] may have something. They are duplicated
    /// and watched, level-triggered, until the back end is replaced.
    fn readiness(&self) -> Vec<BorrowedFd<'_>>;
}

/// What a network card is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CardConfig {
    /// Its hardware address.
    pub mac: [u8; 6],
    /// Whether the guest may leave checksums, and the cutting of long TCP segments, to the network.
    pub offloads: bool,
    /// Pairs of queues, from 1 to [`QUEUE_PAIRS_MAX`].
    pub queues: u16,
}

/// A handle on the network card.
#[derive(Clone)]
pub struct Net {
    mmio: Arc<VirtioMmio>,
}

impl Net {
    /// Makes a card in front of `backend`.
    ///
    /// # Panics
    /// If it shall have no queues, or too many.
    pub fn new(
        name: &str,
        config: CardConfig,
        backend: Box<dyn Backend>,
        ram: Memory,
        line: Arc<dyn Interrupt>,
    ) -> Result<Self, DeviceError> {
        assert!(
            (1..=QUEUE_PAIRS_MAX).contains(&config.queues),
            "a card has 1 to {QUEUE_PAIRS_MAX} pairs of queues"
        );
        let card = Card {
            config,
            accepted: 0,
            pairs: 1,
            backend,
            buffers: Vec::new(),
            frame: vec![0; FRAME_BYTES_MAX],
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
    config: CardConfig,
    /// The features that the driver has accepted.
    accepted: u64,
    /// The queue pairs that the driver uses.
    pairs: u16,
    backend: Box<dyn Backend>,
    /// The guest's buffers of one frame, and what was written into each.
    buffers: Vec<(Chain, u32)>,
    /// A frame of the guest is read into it.
    frame: Vec<u8>,
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
        let offloads = if self.config.offloads { offload::FEATURES } else { 0 };
        let queues = if self.config.queues > 1 { control::FEATURES } else { 0 };
        1 << VIRTIO_NET_F_MAC | offloads | queues
    }

    fn activate(&mut self, features: u64) {
        self.accepted = features;
        self.pairs = 1;
        self.backend.accepts(Offloads::of_guest(features));
    }

    fn queues(&self) -> usize {
        let control = usize::from(self.config.queues > 1);
        2 * usize::from(self.config.queues) + control
    }

    fn config(&self) -> Vec<u8> {
        let mut config = self.config.mac.to_vec();
        if self.config.queues > 1 {
            config.extend(STATUS);
            config.extend(self.config.queues.to_le_bytes());
        }
        config
    }

    fn turn(&mut self, rings: &mut [Ring], work: &Work<'_>) -> Result<Turn, QueueError> {
        // First: the driver waits for the answer, and it says where frames go.
        let mut more = match control::place(self.accepted, self.config.queues) {
            Some(place) => self.obey(rings, place, work)?,
            None => false,
        };
        let received = self.receive(rings, work)?;
        // A queue that the driver gave up may still have frames in it.
        let pairs = if control::is_multi(self.accepted) {
            self.config.queues
        } else {
            1
        };
        let most = BATCH / usize::from(pairs);
        for pair in 0..pairs {
            more |= self.transmit(&mut rings[transmit_ring(pair)], most, work)?;
        }
        Ok(Turn {
            more: more || received.more,
            watch: received.watch,
        })
    }

    fn state(&self) -> Vec<u8> {
        if self.config.queues > 1 {
            self.pairs.to_le_bytes().to_vec()
        } else {
            Vec::new()
        }
    }

    fn check(&self, accepted: u64, state: &[u8]) -> Result<(), &'static str> {
        let most = if control::is_multi(accepted) {
            self.config.queues
        } else {
            1
        };
        let pairs = match (self.config.queues, state) {
            (1, []) => 1,
            (2.., &[low, high]) => u16::from_le_bytes([low, high]),
            _ => 0,
        };
        if (1..=most).contains(&pairs) {
            Ok(())
        } else {
            Err("the number of queue pairs in use")
        }
    }

    fn restore(&mut self, state: &[u8]) {
        if let &[low, high] = state {
            self.pairs = u16::from_le_bytes([low, high]);
        }
    }

    fn readiness(&self) -> Vec<BorrowedFd<'_>> {
        self.backend.readiness()
    }
}

impl Card {
    /// Carries out commands of the driver; `true` if there are more.
    fn obey(&mut self, rings: &mut [Ring], place: usize, work: &Work<'_>) -> Result<bool, QueueError> {
        for _ in 0..COMMANDS {
            if work.stopping() {
                break;
            }
            let Some((chain, command)) = control::take(&mut rings[place], work.ram)? else {
                return rings[place].listen(work.ram);
            };
            let is_done = match command {
                Command::Pairs(pairs) => self.use_pairs(pairs, rings),
                Command::Unknown => false,
            };
            control::answer(&mut rings[place], work.ram, &chain, is_done)?;
            rings[place].tell(work)?;
        }
        Ok(true)
    }

    /// Uses so many queue pairs from now on, if the driver has agreed to several and has made all of these ready.
    fn use_pairs(&mut self, pairs: u16, rings: &[Ring]) -> bool {
        let can = control::is_multi(self.accepted)
            && (1..=self.config.queues).contains(&pairs)
            && (rings.iter().take(2 * usize::from(pairs))).all(Ring::is_ready);
        if can {
            self.pairs = pairs;
        }
        can
    }

    /// Outside to guest.
    fn receive(&mut self, rings: &mut [Ring], work: &Work<'_>) -> Result<Turn, QueueError> {
        let mut report = Report::default();
        for _ in 0..BATCH {
            if work.stopping() {
                break;
            }
            let Some(frame) = self.backend.receive() else {
                report.end(rings, work)?;
                return Ok(Turn {
                    more: false,
                    watch: true,
                });
            };
            let place = receive_ring(steer::queue(&frame, self.pairs));
            match self.deliver(&mut rings[place], &frame, work.ram) {
                Ok(Delivery::Done) => {
                    self.backend.delivered(frame);
                    report.frame(rings, work)?;
                }
                Ok(Delivery::Lost) => {}
                Ok(Delivery::Waits(buffers)) => {
                    self.backend.put_back(frame);
                    report.end(rings, work)?;
                    // The network is not looked at before that; the guest's next buffer wakes the worker.
                    return Ok(Turn {
                        more: rings[place].listen_beyond(work.ram, buffers)?,
                        watch: false,
                    });
                }
                Err(error) => {
                    self.backend.put_back(frame);
                    return Err(error);
                }
            }
        }
        report.end(rings, work)?;
        Ok(Turn {
            more: true,
            watch: true,
        })
    }

    /// Writes a frame into the guest's buffers, or puts all of them back.
    fn deliver(&mut self, ring: &mut Ring, frame: &[u8], ram: &Memory) -> Result<Delivery, QueueError> {
        let guest = Offloads::of_guest(self.accepted);
        if frame.len() > FRAME_BYTES_MAX || !guest.permit(frame) {
            return Ok(self.lost(
                frame,
                "it is too long, or leaves to the guest what that has not agreed to",
            ));
        }
        let most = if offload::merges(self.accepted) { ring.size() } else { 1 };
        self.buffers.clear();
        let mut left = frame.len();
        while left > 0 {
            let taken = self.buffers.len();
            if taken == most {
                ring.unpop(taken);
                return Ok(self.lost(frame, "it is longer than the guest's buffers"));
            }
            let Some(buffer) = next_buffer(ring, ram)? else {
                ring.unpop(taken);
                return Ok(Delivery::Waits(taken));
            };
            let written = u32::try_from(left).map_or_else(|_| buffer.writable(), |left| left.min(buffer.writable()));
            left -= crate::index(written.into());
            self.buffers.push((buffer, written));
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

    /// Guest to outside, so many frames at most; `true` if there is more.
    fn transmit(&mut self, ring: &mut Ring, most: usize, work: &Work<'_>) -> Result<bool, QueueError> {
        let mut report = Report::of_sent();
        for _ in 0..most {
            if work.stopping() {
                break;
            }
            if !self.backend.may_transmit() {
                report.end(slice::from_mut(ring), work)?;
                return Ok(false);
            }
            let Some(chain) = ring.pop(work.ram)? else {
                report.end(slice::from_mut(ring), work)?;
                return ring.listen(work.ram);
            };
            if chain.writable() != 0 || chain.readable() < HEADER_BYTES_U32 {
                return Err(QueueError::Layout(
                    "a transmit buffer is writable, or too short for a header",
                ));
            }
            match self.taken(&chain, work.ram)? {
                Ok(length) => self.backend.transmit(&self.frame[..length]),
                Err(why) => {
                    if let Some(count) = self.complaints.due() {
                        let bytes = chain.readable();
                        tracing::warn!(bytes, count, "frame of the guest dropped: {why}");
                    }
                }
            }
            ring.complete(work.ram, &chain, 0)?;
            report.frame(slice::from_mut(ring), work)?;
        }
        report.end(slice::from_mut(ring), work)?;
        Ok(true)
    }

    /// Reads a frame of the guest and returns its length, or says why it is none.
    fn taken(&mut self, chain: &Chain, ram: &Memory) -> Result<Result<usize, &'static str>, QueueError> {
        let length = crate::index(chain.readable().into());
        if !(FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&length) {
            return Ok(Err("no Ethernet frame has that length"));
        }
        let frame = &mut self.frame[..length];
        chain.read(ram, 0, frame)?;
        let host = Offloads::of_host(self.accepted);
        host.clean(frame);
        Ok(if host.permit(frame) {
            Ok(length)
        } else {
            Err("its header asks what was not agreed to, or can't be true")
        })
    }
}

fn receive_ring(pair: u16) -> usize {
    2 * usize::from(pair)
}

fn transmit_ring(pair: u16) -> usize {
    2 * usize::from(pair) + 1
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
    /// These are frames of the guest's: to have a single buffer back is not urgent, and the interrupt would cost as much as the frame.
    sent: bool,
}

impl Report {
    fn of_sent() -> Self {
        Self { frames: 0, sent: true }
    }

    fn frame(&mut self, rings: &mut [Ring], work: &Work<'_>) -> Result<(), QueueError> {
        self.frames += 1;
        if self.frames == REPORT {
            self.end(rings, work)?;
        }
        Ok(())
    }

    fn end(&mut self, rings: &mut [Ring], work: &Work<'_>) -> Result<(), QueueError> {
        self.frames = 0;
        let tell = if self.sent { Ring::tell_sometime } else { Ring::tell };
        rings.iter_mut().try_for_each(|ring| tell(ring, work))
    }
}
