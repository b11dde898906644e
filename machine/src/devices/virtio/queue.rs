//! A guest's queue, with every rule checked that the device relies on.
//!
//! `virtio-queue` reads the rings; this file turns what it yields into a [`Chain`] whose pieces all lie
//! in guest memory, in the right order and complete. Bounded by the queue's size, whatever the guest
//! writes. Buffers are used in the order in which they were offered, one after the other, so that
//! between two requests `next_avail` equals `next_used` and nothing is in flight.

use std::sync::atomic::{Ordering, fence};

use thiserror::Error;
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError, Permissions};

use super::Work;
use crate::memory::Memory;

/// In the flags of the available ring.
#[expect(clippy::cast_possible_truncation, reason = "the flags are of two bytes")]
const NO_INTERRUPT: u16 = VRING_AVAIL_F_NO_INTERRUPT as u16;
/// Where each ring's entries begin.
const RING_HEADER_BYTES: u64 = 4;
const AVAILABLE_ELEMENT_BYTES: u64 = 2;
const USED_ELEMENT_BYTES: u64 = 8;

/// How a guest has broken the rules of its queue.
#[derive(Debug, Error)]
pub(crate) enum QueueError {
    #[error("its rings can't be used")]
    Ring(#[source] virtio_queue::Error),
    #[error("the ring says that buffers are there, and has none")]
    Vanished,
    #[error("a descriptor chain loops, or goes on outside its table")]
    Endless,
    #[error("a buffer at {address:#x} of {bytes} bytes is not in guest memory")]
    Outside { address: u64, bytes: u32 },
    #[error("{0}")]
    Layout(&'static str),
    #[error("guest memory can't be accessed")]
    Memory(#[source] GuestMemoryError),
}

/// What there is to tell the driver about chains that were given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum News {
    /// Nothing that it wants to know.
    None,
    /// One beyond those that it has seen or does not want to know of.
    One,
    /// As many as it wants to know of, or an unknown number.
    Several,
}

/// One queue in use.
pub(crate) struct Ring {
    queue: Queue,
    /// Whether the driver was told to send notifications; `None`: what guest memory says is unknown.
    listening: Option<bool>,
    /// Where the driver was told to notify, if it is told places.
    awaited: Option<u16>,
    /// Where the used ring ended when the driver was last told of it.
    told: u16,
}

impl Ring {
    /// Takes over a queue in this state; its addresses must be in guest memory.
    pub(crate) fn new(state: QueueState, ram: &Memory) -> Result<Self, QueueError> {
        let queue = Queue::try_from(state).map_err(QueueError::Ring)?;
        if state.ready && !queue.is_valid(ram) {
            return Err(QueueError::Layout("a ring is not in guest memory"));
        }
        Ok(Self {
            queue,
            listening: None,
            awaited: None,
            told: state.next_used,
        })
    }

    pub(crate) fn state(&self) -> QueueState {
        self.queue.state()
    }

    /// Takes the next chain. The driver need not notify from now on until [`Ring::listen`].
    pub(crate) fn pop(&mut self, ram: &Memory) -> Result<Option<Chain>, QueueError> {
        if !self.queue.ready() {
            return Ok(None);
        }
        let offered = self
            .queue
            .avail_idx(ram, Ordering::Acquire)
            .map_err(QueueError::Ring)?
            .0;
        if offered == self.queue.next_avail() {
            return Ok(None);
        }
        if self.listening != Some(false) {
            self.queue.disable_notification(ram).map_err(QueueError::Ring)?;
            self.listening = Some(false);
        }
        let limit = usize::from(self.queue.size());
        let chain = self
            .queue
            .iter(ram)
            .map_err(QueueError::Ring)?
            .next()
            .ok_or(QueueError::Vanished)?;
        Chain::collect(chain, limit, ram).map(Some)
    }

    /// Puts the chains that were taken last back, so many of them.
    pub(crate) fn unpop(&mut self, chains: usize) {
        for _ in 0..chains {
            self.queue.go_to_previous_position();
        }
    }

    /// Gives `chain` back to the driver with `written` bytes in its writable part.
    pub(crate) fn complete(&mut self, ram: &Memory, chain: &Chain, written: u32) -> Result<(), QueueError> {
        self.queue.add_used(ram, chain.head, written).map_err(QueueError::Ring)
    }

    /// Gives chains back that were taken one after the other, each with its number of bytes: the driver sees all of them
    /// at once, or none.
    pub(crate) fn complete_all(&mut self, ram: &Memory, chains: &[(Chain, u32)]) -> Result<(), QueueError> {
        let Some(((last, written), before)) = chains.split_last() else {
            return Ok(());
        };
        let (first, size) = (self.queue.next_used(), self.queue.size());
        let mut next = first;
        for (chain, written) in before {
            let place = RING_HEADER_BYTES + u64::from(next % size) * USED_ELEMENT_BYTES;
            // Which chain, and how much of it.
            let element = u64::from(*written) << 32 | u64::from(chain.head);
            // The whole ring was found to lie in guest memory, so the sum can't overflow.
            let address = GuestAddress(self.queue.used_ring() + place);
            ram.write_obj(element.to_le(), address).map_err(QueueError::Memory)?;
            next = next.wrapping_add(1);
        }
        // Its index moves with the last one.
        self.queue.set_next_used(next);
        self.complete(ram, last, *written)
    }

    /// Tells the driver of the chains that were given back since it was told last, unless it does not want to know (virtio
    /// 1.2 §2.7.7): each interrupt costs the guest three exits or more.
    pub(crate) fn tell(&mut self, work: &Work<'_>) -> Result<(), QueueError> {
        if self.news(work.ram)? != News::None {
            work.used();
        }
        Ok(())
    }

    /// The same, but a single chain that the driver wants to know of may wait: for buffers that only the driver's own memory needs
    /// back. Without them the driver still has room for more, and it looks when it next puts some in, or is told of others.
    pub(crate) fn tell_sometime(&mut self, work: &Work<'_>) -> Result<(), QueueError> {
        match self.news(work.ram)? {
            News::None => {}
            News::One => {
                self.told = self.told.wrapping_sub(1);
                work.used_sometime();
            }
            News::Several => work.used(),
        }
        Ok(())
    }

    /// Says what there is to tell the driver, as if it were told now.
    fn news(&mut self, ram: &Memory) -> Result<News, QueueError> {
        let used = self.queue.next_used();
        let before = std::mem::replace(&mut self.told, used);
        if used == before {
            return Ok(News::None);
        }
        // The driver writes what it wants, then looks at the used ring; here it is the other way round.
        fence(Ordering::SeqCst);
        let available = self.queue.avail_ring();
        Ok(if self.queue.event_idx_enabled() {
            let after = RING_HEADER_BYTES + u64::from(self.queue.size()) * AVAILABLE_ELEMENT_BYTES;
            let event = load(ram, available + after)?;
            match used.wrapping_sub(event).wrapping_sub(1) {
                0 => News::One,
                beyond if beyond < used.wrapping_sub(before) => News::Several,
                _ => News::None,
            }
        } else if load(ram, available)? & NO_INTERRUPT == 0 {
            News::Several
        } else {
            News::None
        })
    }

    /// Asks the driver for notifications; `true` if there is something to take already.
    pub(crate) fn listen(&mut self, ram: &Memory) -> Result<bool, QueueError> {
        self.listen_beyond(ram, 0)
    }

    /// Asks the driver for notifications; `true` if there are more than so many chains to take already.
    pub(crate) fn listen_beyond(&mut self, ram: &Memory, chains: usize) -> Result<bool, QueueError> {
        if !self.queue.ready() {
            return Ok(false);
        }
        if self.queue.event_idx_enabled() {
            // The driver notifies when it goes beyond this place.
            let place = self
                .queue
                .next_avail()
                .wrapping_add(u16::try_from(chains).unwrap_or(u16::MAX));
            // What is there already makes no page dirty.
            if self.awaited.replace(place) != Some(place) {
                let after = RING_HEADER_BYTES + u64::from(self.queue.size()) * USED_ELEMENT_BYTES;
                let address = GuestAddress(self.queue.used_ring() + after);
                ram.store(place.to_le(), address, Ordering::Relaxed)
                    .map_err(QueueError::Memory)?;
                fence(Ordering::SeqCst);
            }
        } else if self.listening != Some(true) {
            self.listening = Some(true);
            self.queue.enable_notification(ram).map_err(QueueError::Ring)?;
        }
        let offered = self
            .queue
            .avail_idx(ram, Ordering::Acquire)
            .map_err(QueueError::Ring)?
            .0;
        Ok(usize::from(offered.wrapping_sub(self.queue.next_avail())) > chains)
    }

    /// Says whether the driver has set it up.
    pub(crate) fn is_ready(&self) -> bool {
        self.queue.ready()
    }

    /// Returns how many entries it has.
    pub(crate) fn size(&self) -> usize {
        self.queue.size().into()
    }
}

/// Reads a number of a ring, which was found to lie in guest memory.
fn load(ram: &Memory, address: u64) -> Result<u16, QueueError> {
    ram.load(GuestAddress(address), Ordering::Relaxed)
        .map(u16::from_le)
        .map_err(QueueError::Memory)
}

/// A request of the driver: what the device may read, and what it may write.
#[derive(Debug, Default)]
pub(crate) struct Chain {
    head: u16,
    readable: Part,
    writable: Part,
}

#[derive(Debug, Default)]
struct Part {
    pieces: Vec<(GuestAddress, u32)>,
    bytes: u32,
}

impl Chain {
    fn collect(
        mut chain: virtio_queue::DescriptorChain<&Memory>,
        limit: usize,
        ram: &Memory,
    ) -> Result<Self, QueueError> {
        let mut collected = Self {
            head: chain.head_index(),
            ..Self::default()
        };
        // The iterator ends silently at a descriptor it can't follow; then the last one had a successor.
        let mut complete = false;
        let mut count = 0;
        for descriptor in chain.by_ref() {
            count += 1;
            if count > limit {
                return Err(QueueError::Endless);
            }
            complete = !descriptor.has_next();
            let bytes = descriptor.len();
            let part = if descriptor.is_write_only() {
                &mut collected.writable
            } else if collected.writable.pieces.is_empty() {
                &mut collected.readable
            } else {
                return Err(QueueError::Layout("a chain has a readable buffer after a writable one"));
            };
            if bytes == 0 {
                continue;
            }
            let outside = QueueError::Outside {
                address: descriptor.addr().0,
                bytes,
            };
            let access = if descriptor.is_write_only() {
                Permissions::Write
            } else {
                Permissions::Read
            };
            if !GuestMemory::check_range(ram, descriptor.addr(), crate::index(bytes.into()), access) {
                return Err(outside);
            }
            part.bytes = part.bytes.checked_add(bytes).ok_or(outside)?;
            part.pieces.push((descriptor.addr(), bytes));
        }
        if complete {
            Ok(collected)
        } else {
            Err(QueueError::Endless)
        }
    }

    /// The bytes the device may read.
    pub(crate) const fn readable(&self) -> u32 {
        self.readable.bytes
    }

    /// The bytes the device may write.
    pub(crate) const fn writable(&self) -> u32 {
        self.writable.bytes
    }

    /// Fills `data` from `offset` in the readable part.
    pub(crate) fn read(&self, ram: &Memory, offset: u32, data: &mut [u8]) -> Result<(), QueueError> {
        self.readable.each(offset, data.len(), |address, range| {
            ram.read_slice(&mut data[range], address).map_err(QueueError::Memory)
        })
    }

    /// Writes `data` at `offset` in the writable part. Marks the pages in guest memory's bitmap.
    pub(crate) fn write(&self, ram: &Memory, offset: u32, data: &[u8]) -> Result<(), QueueError> {
        self.writable.each(offset, data.len(), |address, range| {
            ram.write_slice(&data[range], address).map_err(QueueError::Memory)
        })
    }
}

impl Part {
    /// Calls `access` with each stretch of guest memory for `length` bytes from `offset`, and its place in them.
    fn each(
        &self,
        offset: u32,
        length: usize,
        mut access: impl FnMut(GuestAddress, std::ops::Range<usize>) -> Result<(), QueueError>,
    ) -> Result<(), QueueError> {
        let mut skip = u64::from(offset);
        let mut done = 0;
        for &(address, bytes) in &self.pieces {
            if done == length {
                break;
            }
            let bytes = u64::from(bytes);
            if skip >= bytes {
                skip -= bytes;
                continue;
            }
            let take = crate::index(bytes - skip).min(length - done);
            // The whole piece was found to lie in guest memory, so the sum can't overflow.
            access(GuestAddress(address.0 + skip), done..done + take)?;
            done += take;
            skip = 0;
        }
        assert_eq!(done, length, "a device stays within the chain it was given");
        Ok(())
    }
}
