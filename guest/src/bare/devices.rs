//! The virtio devices of the machine, and how one is set up.
//!
//! The transport and the queues are virtio-drivers'; the drivers on top are our own, because none of them may
//! wait. Only features that the drivers use are accepted: no offloads, no merged buffers, no indirect
//! descriptors, and no event indexes (plain flags suppress notifications).

use alloc::vec::Vec;
use core::ptr::NonNull;
use core::sync::atomic::{Ordering, fence};

use bitflags::bitflags;
use guest::abi::{BootInfo, VIRTIO_BASE, VIRTIO_STRIDE};
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::mmio::{MmioTransport, VirtIOHeader};
use virtio_drivers::transport::{DeviceType, Transport};
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};

use super::memory::address;

/// One device's registers.
pub(crate) type Registers = MmioTransport<'static>;

bitflags! {
    /// The features that our drivers know.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct Features: u64 {
        /// Block: the device is read-only.
        const READ_ONLY = 1 << 5;
        /// Block: flush requests are understood.
        const FLUSH = 1 << 9;
        /// Block: discards are understood.
        const DISCARD = 1 << 13;
        /// Network: the configuration has the MAC address. The same bit as `READ_ONLY`, on another device.
        const MAC = 1 << 5;
        /// Network: the device takes commands by a queue of their own.
        const CONTROL = 1 << 17;
        /// Network: there are several pairs of queues.
        const SEVERAL = 1 << 22;
        /// The device follows the standard.
        const VERSION_1 = 1 << 32;
    }
}

/// All network devices, and the first device of each other kind.
#[derive(Default)]
pub(crate) struct Devices {
    pub(crate) nets: Vec<Registers>,
    pub(crate) block: Option<Registers>,
    pub(crate) console: Option<Registers>,
    pub(crate) entropy: Option<Registers>,
}

impl Devices {
    /// Looks at every device that the machine has announced.
    pub(crate) fn find(boot: &BootInfo) -> Self {
        let mut found = Self::default();
        for index in 0..boot.devices {
            let base = address(VIRTIO_BASE + index * VIRTIO_STRIDE);
            let Some(header) = NonNull::new(core::ptr::with_exposed_provenance_mut::<VirtIOHeader>(base)) else {
                continue;
            };
            // SAFETY: the machine says that a device's registers are there, for ever.
            let Ok(registers) = (unsafe { MmioTransport::new(header, address(VIRTIO_STRIDE)) }) else {
                continue;
            };
            let place = match registers.device_type() {
                DeviceType::Network => {
                    found.nets.push(registers);
                    continue;
                }
                DeviceType::Block => &mut found.block,
                DeviceType::Console => &mut found.console,
                DeviceType::EntropySource => &mut found.entropy,
                _ => continue,
            };
            if place.is_none() {
                *place = Some(registers);
            }
        }
        found
    }
}

/// Agrees on features; the caller then makes the queues and calls `finish_init`.
pub(crate) fn begin(registers: &mut Registers, known: Features) -> Features {
    let agreed = registers.begin_init(known | Features::VERSION_1);
    if !agreed.contains(Features::VERSION_1) {
        panic!(
            "a {:?} device does not offer VERSION_1: use a newer machine",
            registers.device_type()
        );
    }
    agreed
}

/// Makes queue `index`.
pub(crate) fn queue<const SIZE: usize>(registers: &mut Registers, index: u16) -> VirtQueue<Direct, SIZE> {
    match VirtQueue::new(registers, index, false, false) {
        Ok(queue) => queue,
        Err(error) => panic!("queue {index} of the {:?} device: {error}", registers.device_type()),
    }
}

/// Tells the device of new buffers in queue `index`, if it wants to be told.
pub(crate) fn kick<const SIZE: usize>(registers: &mut Registers, queue: &VirtQueue<Direct, SIZE>, index: u16) {
    // The device asks for notifications and then looks once more; so the index must be out before the flag is read.
    fence(Ordering::SeqCst);
    if queue.should_notify() {
        registers.notify(index);
    }
}

/// Memory as the devices see it: one to one.
#[derive(Debug)]
pub(crate) struct Direct;

// SAFETY: all memory is mapped one to one and reachable by the devices; the heap gives aligned areas that are
// nobody else's.
unsafe impl Hal for Direct {
    fn dma_alloc(pages: usize, _direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        // SAFETY: the shape is not empty: a queue has at least one page.
        let area = unsafe { alloc::alloc::alloc_zeroed(shape(pages)) };
        match NonNull::new(area) {
            Some(area) => (area.as_ptr().expose_provenance() as PhysAddr, area),
            None => panic!("no memory for a device's queue"),
        }
    }

    unsafe fn dma_dealloc(_paddr: PhysAddr, vaddr: NonNull<u8>, pages: usize) -> i32 {
        // SAFETY: it came from `dma_alloc` with as many pages.
        unsafe { alloc::alloc::dealloc(vaddr.as_ptr(), shape(pages)) };
        0
    }

    unsafe fn mmio_phys_to_virt(paddr: PhysAddr, _size: usize) -> NonNull<u8> {
        match NonNull::new(core::ptr::with_exposed_provenance_mut(address(paddr))) {
            Some(area) => area,
            None => panic!("a device at address 0"),
        }
    }

    unsafe fn share(buffer: NonNull<[u8]>, _direction: BufferDirection) -> PhysAddr {
        buffer.as_ptr().cast::<u8>().expose_provenance() as PhysAddr
    }

    unsafe fn unshare(_paddr: PhysAddr, _buffer: NonNull<[u8]>, _direction: BufferDirection) {}
}

fn shape(pages: usize) -> core::alloc::Layout {
    match core::alloc::Layout::from_size_align(pages.max(1) * PAGE_SIZE, PAGE_SIZE) {
        Ok(shape) => shape,
        Err(_) => panic!("a queue of {pages} pages"),
    }
}
