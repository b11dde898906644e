//! A driver for tests: negotiates over the registers, offers buffers, takes used ones.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use virtio_queue::QueueState;
use virtio_queue::desc::{RawDescriptor, split};
use virtio_queue::mock::{AvailRing, DescriptorTable, UsedRing};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::PageSet;
use crate::devices::{Interrupt, VirtioMmio};
use crate::memory::Memory;

pub(super) const RAM_BYTES: usize = 1 << 20;
/// Entries of each queue: few, so that rings wrap often.
pub(super) const QUEUE_SIZE: u16 = 16;
/// Each queue has three pages: descriptors, available ring, used ring. (`MockSplitQueue` overlaps its rings.)
const QUEUES_AT: u64 = 0x1000;
const QUEUE_STRIDE: u64 = 3 * PAGE;
pub(super) const PAGE: u64 = 4096;

/// Counts interrupts.
#[derive(Default)]
pub(super) struct Bell(pub(super) AtomicUsize);

impl Interrupt for Bell {
    fn trigger(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

pub(super) fn ram() -> Memory {
    Memory::from_ranges(&[(GuestAddress(0), RAM_BYTES)]).unwrap()
}

pub(super) fn bell() -> Arc<Bell> {
    Arc::default()
}

/// The pages that were written through vm-memory, and forgets them.
pub(super) fn written_pages(ram: &Memory) -> Vec<u64> {
    let region = ram.iter().next().unwrap();
    let mut pages = PageSet::new((region.len() / PAGE).next_multiple_of(64));
    (**region).bitmap().take(0, &mut pages);
    pages.iter().collect()
}

pub(super) fn read32(mmio: &VirtioMmio, offset: u64) -> u32 {
    let mut data = [0; 4];
    mmio.read(offset, &mut data);
    u32::from_le_bytes(data)
}

pub(super) fn write32(mmio: &VirtioMmio, offset: u64, value: u32) {
    mmio.write(offset, &value.to_le_bytes());
}

/// One buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub(super) enum Piece {
    Read(u64, u32),
    Write(u64, u32),
}

/// A queue as its driver sees it.
pub(super) struct DriverQueue<'a> {
    pub(super) table: DescriptorTable<'a, Memory>,
    pub(super) available: AvailRing<'a, Memory>,
    pub(super) used: UsedRing<'a, Memory>,
    ram: &'a Memory,
    at: u64,
    number: u32,
    next_avail: u16,
    next_used: u16,
    free: Vec<u16>,
    chains: Vec<Vec<u16>>,
    /// Whether places in the rings say who wants to be told when; as negotiated.
    by_events: Cell<bool>,
    /// Where the available ring ended at the last look whether to notify.
    notified: Cell<u16>,
}

impl<'a> DriverQueue<'a> {
    pub(super) fn new(ram: &'a Memory, number: u32) -> Self {
        let at = QUEUES_AT + u64::from(number) * QUEUE_STRIDE;
        Self {
            table: DescriptorTable::new(ram, GuestAddress(at), QUEUE_SIZE),
            available: AvailRing::new(ram, GuestAddress(at + PAGE), QUEUE_SIZE),
            used: UsedRing::new(ram, GuestAddress(at + 2 * PAGE), QUEUE_SIZE),
            ram,
            at,
            number,
            next_avail: 0,
            next_used: 0,
            free: (0..QUEUE_SIZE).collect(),
            chains: vec![Vec::new(); QUEUE_SIZE.into()],
            by_events: Cell::new(false),
            notified: Cell::new(0),
        }
    }

    /// The page that holds the used ring.
    pub(super) fn used_page(&self) -> u64 {
        self.at / PAGE + 2
    }

    /// The queue as its device sees it at the start.
    pub(super) fn state(&self) -> QueueState {
        QueueState {
            max_size: QUEUE_SIZE,
            size: QUEUE_SIZE,
            ready: true,
            desc_table: self.at,
            avail_ring: self.at + PAGE,
            used_ring: self.at + 2 * PAGE,
            ..QueueState::default()
        }
    }

    /// Puts a chain on the available ring; returns its head, or `None` if descriptors are short.
    pub(super) fn offer(&mut self, pieces: &[Piece]) -> Option<u16> {
        let rest = self.free.len().checked_sub(pieces.len())?;
        let indices = self.free.split_off(rest);
        for (place, (piece, index)) in pieces.iter().zip(&indices).enumerate() {
            let (address, bytes, writable) = match *piece {
                Piece::Read(address, bytes) => (address, bytes, 0),
                Piece::Write(address, bytes) => (address, bytes, 2),
            };
            let next = indices.get(place + 1).copied();
            let flags = writable | u16::from(next.is_some());
            let descriptor = split::Descriptor::new(address, bytes, flags, next.unwrap_or(0));
            self.table.store(*index, RawDescriptor::from(descriptor)).unwrap();
        }
        let head = indices[0];
        self.chains[usize::from(head)] = indices;
        self.offer_head(head);
        Some(head)
    }

    /// Puts a head on the available ring, whatever it is.
    pub(super) fn offer_head(&mut self, head: u16) {
        self.available
            .ring()
            .ref_at(usize::from(self.next_avail % QUEUE_SIZE))
            .unwrap()
            .store(head);
        self.next_avail = self.next_avail.wrapping_add(1);
        self.tell_me_from(self.next_used);
        std::sync::atomic::fence(Ordering::SeqCst);
        self.available.idx().store(self.next_avail);
    }

    /// Takes the next used chain: its head and the bytes written.
    pub(super) fn take(&mut self) -> Option<(u16, u32)> {
        if self.used.idx().load() == self.next_used {
            return None;
        }
        std::sync::atomic::fence(Ordering::SeqCst);
        let element = self
            .used
            .ring()
            .ref_at(usize::from(self.next_used % QUEUE_SIZE))
            .unwrap()
            .load();
        self.next_used = self.next_used.wrapping_add(1);
        let head = u16::try_from(element.id()).unwrap();
        self.free.append(&mut self.chains[usize::from(head)]);
        Some((head, element.len()))
    }

    pub(super) fn wait_used(&mut self) -> (u16, u32) {
        wait_for("a used buffer", || self.take())
    }

    pub(super) fn used_idx(&self) -> u16 {
        self.used.idx().load()
    }

    /// Notifies the device, unless it has asked not to be.
    pub(super) fn notify(&self, mmio: &VirtioMmio) {
        std::sync::atomic::fence(Ordering::SeqCst);
        if self.wants_to_know() {
            write32(mmio, 0x50, self.number);
        }
    }

    /// Says whether the device wants a notification of what was offered since this was asked last.
    pub(super) fn wants_to_know(&self) -> bool {
        let used = self.at + 2 * PAGE;
        let before = self.notified.replace(self.next_avail);
        if !self.by_events.get() {
            let flags: u16 = self.ram.read_obj(GuestAddress(used)).unwrap();
            return flags & 1 == 0;
        }
        let event: u16 = self
            .ram
            .read_obj(GuestAddress(used + 4 + 8 * u64::from(QUEUE_SIZE)))
            .unwrap();
        self.next_avail.wrapping_sub(event).wrapping_sub(1) < self.next_avail.wrapping_sub(before)
    }

    /// Asks for an interrupt when the used ring goes beyond this place.
    pub(super) fn tell_me_from(&self, place: u16) {
        let event = GuestAddress(self.at + PAGE + 4 + 2 * u64::from(QUEUE_SIZE));
        self.ram.write_obj(place, event).unwrap();
    }

    /// Asks for no interrupts, or for all, by the flag.
    pub(super) fn mute(&self, muted: bool) {
        self.ram
            .write_obj(u16::from(muted), GuestAddress(self.at + PAGE))
            .unwrap();
    }

    /// Tells the device where this queue is.
    pub(super) fn set_up(&self, mmio: &VirtioMmio) {
        write32(mmio, 0x30, self.number);
        assert_eq!(read32(mmio, 0x44), 0, "a queue is not ready before it is set up");
        assert!(read32(mmio, 0x34) >= QUEUE_SIZE.into());
        write32(mmio, 0x38, QUEUE_SIZE.into());
        for (register, address) in [(0x80, self.at), (0x90, self.at + PAGE), (0xa0, self.at + 2 * PAGE)] {
            write32(mmio, register, u32::try_from(address).unwrap());
            write32(mmio, register + 4, 0);
        }
        write32(mmio, 0x44, 1);
        assert_eq!(read32(mmio, 0x44), 1, "the queue is accepted");
    }
}

/// Negotiates all offered features and makes the queues and the driver ready.
pub(super) fn start(mmio: &VirtioMmio, queues: &[&DriverQueue<'_>]) {
    start_with(mmio, queues, u64::MAX);
}

/// The same with the features in `mask` only.
pub(super) fn start_with(mmio: &VirtioMmio, queues: &[&DriverQueue<'_>], mask: u64) {
    write32(mmio, 0x70, 0);
    write32(mmio, 0x70, 1);
    write32(mmio, 0x70, 1 | 2);
    for half in 0..2u32 {
        write32(mmio, 0x14, half);
        write32(mmio, 0x24, half);
        let offered = u64::from(read32(mmio, 0x10));
        write32(
            mmio,
            0x20,
            u32::try_from(offered & mask >> (32 * half) & 0xffff_ffff).unwrap(),
        );
    }
    write32(mmio, 0x70, 1 | 2 | 8);
    assert_eq!(read32(mmio, 0x70), 1 | 2 | 8, "the features are accepted");
    write32(mmio, 0x14, 0);
    let by_events = u64::from(read32(mmio, 0x10)) & mask & 1 << 29 != 0;
    for queue in queues {
        queue.set_up(mmio);
        queue.by_events.set(by_events);
    }
    write32(mmio, 0x70, 1 | 2 | 8 | 4);
    assert_eq!(read32(mmio, 0x70), 1 | 2 | 8 | 4);
}

pub(super) fn wait_for<T>(what: &str, mut poll: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = poll() {
            return found;
        }
        assert!(start.elapsed() < Duration::from_secs(10), "waited 10 s for {what}");
        std::thread::sleep(Duration::from_micros(20));
    }
}

pub(super) fn put(ram: &Memory, address: u64, data: &[u8]) {
    ram.write_slice(data, GuestAddress(address)).unwrap();
}

pub(super) fn get(ram: &Memory, address: u64, bytes: usize) -> Vec<u8> {
    let mut data = vec![0; bytes];
    ram.read_slice(&mut data, GuestAddress(address)).unwrap();
    data
}
