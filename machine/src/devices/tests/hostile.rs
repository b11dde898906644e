//! Guests that write whatever they like into their queues.

use std::io;
use std::os::fd::BorrowedFd;

use bytes::Bytes;
use proptest::prelude::*;
use virtio_queue::desc::{RawDescriptor, split};

use super::driver::{DriverQueue, Piece, QUEUE_SIZE, bell, ram, read32, start, write32};
use crate::devices::block::{self, Block};
use crate::devices::console::Console;
use crate::devices::entropy::{Entropy, EntropySource};
use crate::devices::net::{self, CardConfig, Net};
use crate::devices::{Interrupt, VirtioMmio};
use crate::memory::Memory;

/// Swallows everything.
struct Anything;

/// Swallows everything, and has as many frames of a few buffers' length.
struct Frames(u32);

impl net::Backend for Frames {
    fn transmit(&mut self, frame: &[u8]) {
        assert!((net::FRAME_BYTES_MIN..=net::FRAME_BYTES_MAX).contains(&frame.len()));
    }

    fn receive(&mut self) -> Option<Bytes> {
        self.0 = self.0.checked_sub(1)?;
        Some(vec![0; 3_000].into())
    }

    fn put_back(&mut self, _frame: Bytes) {
        self.0 += 1;
    }

    fn delivered(&mut self, _frame: Bytes) {}

    fn readiness(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }
}

impl block::Backend for Anything {
    fn size(&self) -> u64 {
        1 << 20
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        assert!(offset + data.len() as u64 <= 1 << 20);
        data.fill(1);
        Ok(())
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        assert!(offset + data.len() as u64 <= 1 << 20);
        Ok(())
    }

    fn zero(&mut self, offset: u64, length: u64, _: bool) -> io::Result<()> {
        assert!(offset + length <= 1 << 20);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn devices(ram: &Memory) -> Vec<(std::sync::Arc<VirtioMmio>, u32)> {
    let line = || -> std::sync::Arc<dyn Interrupt> { bell() };
    let block = Block::new("block", "", Box::new(Anything), ram.clone(), line()).unwrap();
    let card = |name, queues| {
        let config = CardConfig {
            mac: [2; 6],
            offloads: true,
            queues,
        };
        Net::new(name, config, Box::new(Frames(40)), ram.clone(), line()).unwrap()
    };
    let console = Console::new("console", Box::new(io::sink()), ram.clone(), line()).unwrap();
    let entropy = Entropy::new("entropy", EntropySource::Host, ram.clone(), line()).unwrap();
    vec![
        (block.mmio().clone(), 1),
        (card("net", 1).mmio().clone(), 2),
        (console.mmio().clone(), 2),
        (entropy.mmio().clone(), 1),
        (card("net1", 2).mmio().clone(), 5),
    ]
}

const NEEDS_RESET: u32 = 0x40;

/// Lets the disk meet `prepare`'s queue; returns the status register afterwards.
fn disk_meets(prepare: impl FnOnce(&mut DriverQueue<'_>)) -> u32 {
    let ram = ram();
    let (mmio, _) = devices(&ram).swap_remove(0);
    let mut queue = DriverQueue::new(&ram, 0);
    start(&mmio, &[&queue]);
    mmio.freeze().unwrap();
    prepare(&mut queue);
    mmio.settle();
    let status = read32(&mmio, 0x70);
    if status & NEEDS_RESET != 0 {
        assert_eq!(read32(&mmio, 0x60) & 2, 2, "the driver is told");
        let section = mmio.state();
        mmio.restore(&section)
            .expect("a broken device can be saved and restored");
        assert_eq!(read32(&mmio, 0x70), status);
        write32(&mmio, 0x70, 0);
        assert_eq!(read32(&mmio, 0x70), 0, "a reset mends it");
    }
    status
}

fn store(queue: &DriverQueue<'_>, index: u16, address: u64, bytes: u32, flags: u16, next: u16) {
    let descriptor = split::Descriptor::new(address, bytes, flags, next);
    queue.table.store(index, RawDescriptor::from(descriptor)).unwrap();
}

#[test]
fn each_broken_rule_stops_the_device() {
    let broken = |prepare: fn(&mut DriverQueue<'_>)| assert_eq!(disk_meets(prepare) & NEEDS_RESET, NEEDS_RESET);
    // A chain that loops, one that leaves its table, one that begins outside it.
    broken(|queue| {
        store(queue, 0, 0x8000, 16, 1, 1);
        store(queue, 1, 0x9000, 512, 3, 2);
        store(queue, 2, 0xa000, 1, 3, 2);
        queue.offer_head(0);
    });
    broken(|queue| {
        store(queue, 0, 0x8000, 16, 1, 1);
        store(queue, 1, 0x9000, 513, 3, 99);
        queue.offer_head(0);
    });
    broken(|queue| queue.offer_head(QUEUE_SIZE));
    // Buffers that are not memory.
    broken(|queue| {
        queue.offer(&[Piece::Read(1 << 40, 16), Piece::Write(0x8000, 1)]);
    });
    broken(|queue| {
        queue.offer(&[Piece::Read(u64::MAX - 3, 16), Piece::Write(0x8000, 1)]);
    });
    broken(|queue| {
        queue.offer(&[Piece::Read(0x8000, 16), Piece::Write(0xf_ffff, 2)]);
    });
    // Wrong order, no header, no status.
    broken(|queue| {
        queue.offer(&[Piece::Write(0x8000, 1), Piece::Read(0x9000, 16)]);
    });
    broken(|queue| {
        queue.offer(&[Piece::Read(0x9000, 15), Piece::Write(0x8000, 1)]);
    });
    broken(|queue| {
        queue.offer(&[Piece::Read(0x9000, 16)]);
    });
    // An indirect table: not offered, of a length that is none, and nested in itself.
    broken(|queue| {
        store(queue, 0, 0x1000, 16, 4, 0);
        queue.offer_head(0);
    });
    broken(|queue| {
        store(queue, 0, 0x1000, 15, 4, 0);
        queue.offer_head(0);
    });
    // More on the ring than it holds.
    broken(|queue| queue.available.idx().store(QUEUE_SIZE + 1));
}

#[test]
fn a_proper_request_breaks_nothing() {
    assert_eq!(
        disk_meets(|queue| {
            queue.offer(&[Piece::Read(0x8000, 16), Piece::Write(0x9000, 513)]);
        }),
        15
    );
}

#[test]
fn a_broken_device_does_nothing_until_it_is_reset_and_then_works() {
    let ram = ram();
    let (mmio, _) = devices(&ram).swap_remove(3);
    let mut queue = DriverQueue::new(&ram, 0);
    start(&mmio, &[&queue]);
    queue.offer_head(QUEUE_SIZE);
    queue.notify(&mmio);
    super::driver::wait_for("the device to stop", || {
        (read32(&mmio, 0x70) & NEEDS_RESET != 0).then_some(())
    });
    queue.offer(&[Piece::Write(0x8000, 16)]);
    queue.notify(&mmio);
    std::thread::sleep(std::time::Duration::from_millis(10));
    assert_eq!(queue.used_idx(), 0);
    let mut queue = DriverQueue::new(&ram, 0);
    start(&mmio, &[&queue]);
    queue.offer(&[Piece::Write(0x8000, 16)]);
    queue.notify(&mmio);
    assert_eq!(queue.wait_used().1, 16);
}

/// A descriptor that is right often enough to get somewhere.
fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address = prop_oneof![8 => 0u64..0x10_0000, 1 => 0xf_fff0u64..0x10_0010, 1 => any::<u64>()];
    let bytes = prop_oneof![4 => 0u32..2048, 2 => Just(16), 1 => Just(1), 1 => Just(512), 1 => any::<u32>()];
    let flags = prop_oneof![10 => 0u16..4, 1 => 0u16..8, 1 => any::<u16>()];
    let next = prop_oneof![10 => 0u16..QUEUE_SIZE, 1 => any::<u16>()];
    (address, bytes, flags, next)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn no_queue_can_panic_a_device_or_keep_it_for_ever(
        table in proptest::collection::vec(descriptor(), usize::from(QUEUE_SIZE)),
        heads in proptest::collection::vec(prop_oneof![10 => 0u16..QUEUE_SIZE, 1 => any::<u16>()], 0..16),
        idx in proptest::option::weighted(0.1, any::<u16>()),
        kind in prop_oneof![0u32..14, any::<u32>()],
    ) {
        let ram = ram();
        super::driver::put(&ram, 0x8000, &kind.to_le_bytes());
        for (mmio, queues) in devices(&ram) {
            let mut views: Vec<_> = (0..queues).map(|number| DriverQueue::new(&ram, number)).collect();
            start(&mmio, &views.iter().collect::<Vec<_>>());
            mmio.freeze().unwrap();
            for view in &mut views {
                for (index, &(address, bytes, flags, next)) in (0..).zip(&table) {
                    store(view, index, address, bytes, flags, next);
                }
                for &head in &heads {
                    view.offer_head(head);
                }
                if let Some(idx) = idx {
                    view.available.idx().store(idx);
                }
            }
            prop_assert!(mmio.settle() < 10_000);
            let section = mmio.state();
            prop_assert_eq!(mmio.check(&section), Ok(()));
        }
    }
}
