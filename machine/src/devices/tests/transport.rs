//! The transport's registers, its life cycle, and its saved state.

use proptest::prelude::*;

use super::driver::{DriverQueue, QUEUE_SIZE, bell, ram, read32, start, start_with, write32};
use crate::devices::VirtioMmio;
use crate::devices::entropy::{Entropy, EntropySource};
use crate::devices::virtio::queue::Ring;
use crate::memory::Memory;
use crate::state::{Section, StateError};

fn entropy(ram: &Memory) -> Entropy {
    Entropy::new(
        "entropy",
        EntropySource::Seeded {
            seed: [7; 32],
            position: 0,
        },
        ram.clone(),
        bell(),
    )
    .unwrap()
}

#[test]
fn identifies_itself() {
    let ram = ram();
    let entropy = entropy(&ram);
    let mmio = entropy.mmio();
    assert_eq!([read32(mmio, 0), read32(mmio, 4), read32(mmio, 8)], [0x7472_6976, 2, 4]);
    assert_eq!(
        [read32(mmio, 0xb0), read32(mmio, 0xb4), read32(mmio, 0xfc)],
        [u32::MAX, u32::MAX, 0]
    );
    write32(mmio, 0x14, 1);
    assert_eq!(read32(mmio, 0x10), 1, "VERSION_1");
    write32(mmio, 0x14, 2);
    assert_eq!(read32(mmio, 0x10), 0);
    write32(mmio, 0x30, 1);
    assert_eq!(read32(mmio, 0x34), 0, "there is one queue only");
    write32(mmio, 0x30, 0);
    assert_eq!(read32(mmio, 0x34), 256);
}

#[test]
fn refuses_features_that_were_not_offered_and_drivers_without_version_1() {
    let ram = ram();
    let entropy = entropy(&ram);
    let mmio = entropy.mmio();
    for (half, features) in [(0, 1 << 5), (1, 0)] {
        write32(mmio, 0x70, 0);
        write32(mmio, 0x70, 3);
        write32(mmio, 0x24, 1);
        write32(mmio, 0x20, 1);
        write32(mmio, 0x24, half);
        write32(mmio, 0x20, features);
        write32(mmio, 0x70, 3 | 8);
        assert_eq!(read32(mmio, 0x70), 3);
        write32(mmio, 0x70, 3 | 8 | 4);
        assert_eq!(read32(mmio, 0x70), 3, "no DRIVER_OK without FEATURES_OK");
    }
}

#[test]
fn refuses_queues_that_can_not_be_used() {
    let ram = ram();
    let entropy = entropy(&ram);
    let mmio = entropy.mmio();
    let tries = [
        (3, 0x1000, 0x2000, 0x3000),
        (0, 0x1000, 0x2000, 0x3000),
        (512, 0x1000, 0x2000, 0x3000),
        (0x1_0010, 0x1000, 0x2000, 0x3000),
        (16, 0x1008, 0x2000, 0x3000),
        (16, 0x1000, 0x2001, 0x3000),
        (16, 0x1000, 0x2000, 0x3002),
        (16, 0x1000, 0, 0x3000),
        (16, 0xffff_fff0, 0x2000, 0x3000),
        (16, 0x1000, 0x2000, 0xf_fffc),
    ];
    for (size, descriptors, available, used) in tries {
        for (register, value) in [
            (0x30, 0),
            (0x44, 0),
            (0x38, size),
            (0x80, descriptors),
            (0x90, available),
            (0xa0, used),
            (0x44, 1),
        ] {
            write32(mmio, register, value);
        }
        assert_eq!(
            read32(mmio, 0x44),
            0,
            "{size} {descriptors:#x} {available:#x} {used:#x}"
        );
    }
}

#[test]
fn a_running_queue_can_not_be_moved_and_a_reset_forgets_it() {
    let ram = ram();
    let entropy = entropy(&ram);
    let mmio = entropy.mmio();
    let queue = DriverQueue::new(&ram, 0);
    start(mmio, &[&queue]);
    mmio.freeze().unwrap();
    let before = mmio.state();
    for (register, value) in [(0x44, 0), (0x38, 8), (0x80, 0x5000), (0x20, 0), (0x70, 4)] {
        write32(mmio, register, value);
    }
    assert_eq!(mmio.state(), before);
    write32(mmio, 0x70, 0);
    assert_eq!([read32(mmio, 0x70), read32(mmio, 0x44), read32(mmio, 0x60)], [0, 0, 0]);
    mmio.thaw();
}

#[test]
fn notifiers_stand_for_the_notification_register() {
    let ram = ram();
    let entropy = entropy(&ram);
    let mut queue = DriverQueue::new(&ram, 0);
    start(entropy.mmio(), &[&queue]);
    let notifiers = entropy.mmio().notifiers().unwrap();
    assert_eq!(
        notifiers.iter().map(|n| (n.offset, n.datamatch)).collect::<Vec<_>>(),
        [(0x50, 0)]
    );
    queue.offer(&[super::driver::Piece::Write(0x8000, 8)]);
    notifiers[0].fd.write(1).unwrap();
    assert_eq!(queue.wait_used(), (15, 8));
    super::driver::wait_for("the interrupt status", || {
        (read32(entropy.mmio(), 0x60) == 1).then_some(())
    });
    write32(entropy.mmio(), 0x64, 1);
    assert_eq!(read32(entropy.mmio(), 0x60), 0);
}

#[test]
fn freezing_twice_is_freezing_and_an_idle_freeze_is_fast() {
    let ram = ram();
    let entropy = entropy(&ram);
    let mmio = entropy.mmio();
    let begin = std::time::Instant::now();
    for _ in 0..100 {
        mmio.freeze().unwrap();
        mmio.freeze().unwrap();
        mmio.thaw();
        mmio.thaw();
    }
    assert!(begin.elapsed() < std::time::Duration::from_secs(2));
}

#[test]
fn a_restored_device_looks_at_its_queues_without_being_notified() {
    let ram = ram();
    let entropy = entropy(&ram);
    let mut queue = DriverQueue::new(&ram, 0);
    start(entropy.mmio(), &[&queue]);
    std::thread::sleep(std::time::Duration::from_millis(10));
    entropy.mmio().freeze().unwrap();
    queue.offer(&[super::driver::Piece::Write(0x8000, 8)]);
    entropy.mmio().restore(&entropy.mmio().state()).unwrap();
    entropy.mmio().thaw();
    assert_eq!(queue.wait_used().1, 8);
}

#[test]
fn no_notification_is_lost_across_a_freeze() {
    let ram = ram();
    let entropy = entropy(&ram);
    let mut queue = DriverQueue::new(&ram, 0);
    start(entropy.mmio(), &[&queue]);
    for round in 0..200_u64 {
        // Before, during or after the freeze, by turns.
        if round % 3 == 0 {
            queue.offer(&[super::driver::Piece::Write(0x8000, 8)]);
            queue.notify(entropy.mmio());
        }
        std::thread::sleep(std::time::Duration::from_micros(round * 7 % 50));
        entropy.mmio().freeze().unwrap();
        if round % 3 == 1 {
            queue.offer(&[super::driver::Piece::Write(0x8000, 8)]);
            queue.notify(entropy.mmio());
        }
        entropy.mmio().thaw();
        if round % 3 == 2 {
            queue.offer(&[super::driver::Piece::Write(0x8000, 8)]);
            queue.notify(entropy.mmio());
        }
        assert_eq!(queue.wait_used().1, 8);
    }
}

#[test]
fn what_is_offered_while_the_device_asks_for_notifications_is_not_missed() {
    let ram = ram();
    let mut driver = DriverQueue::new(&ram, 0);
    let mut ring = Ring::new(driver.state(), &ram).unwrap();
    for listening_before in [false, true] {
        driver.offer(&[super::driver::Piece::Write(0x8000, 8)]);
        let chain = ring.pop(&ram).unwrap().unwrap();
        ring.complete(&ram, &chain, 8).unwrap();
        assert!(ring.pop(&ram).unwrap().is_none());
        if listening_before {
            assert!(!ring.listen(&ram).unwrap());
        }
        driver.offer(&[super::driver::Piece::Write(0x8000, 8)]);
        assert!(ring.listen(&ram).unwrap());
        let chain = ring.pop(&ram).unwrap().unwrap();
        ring.complete(&ram, &chain, 8).unwrap();
    }
}

/// A device in the middle of its life: some requests done, some still queued.
fn busy_device(ram: &Memory) -> (Entropy, Section) {
    let device = entropy(ram);
    let mut queue = DriverQueue::new(ram, 0);
    start(device.mmio(), &[&queue]);
    device.mmio().freeze().unwrap();
    for _ in 0..5 {
        queue.offer(&[super::driver::Piece::Write(0x8000, 100)]);
    }
    device.mmio().settle();
    queue.offer(&[super::driver::Piece::Write(0x9000, 100)]);
    let section = device.mmio().state();
    (device, section)
}

#[test]
fn state_survives_a_round_trip() {
    let ram = ram();
    let (_source, section) = busy_device(&ram);
    let other = entropy(&ram);
    let mmio: &VirtioMmio = other.mmio();
    mmio.check(&section).unwrap();
    mmio.freeze().unwrap();
    mmio.restore(&section).unwrap();
    assert_eq!(mmio.state(), section);
    assert_eq!(read32(mmio, 0x70), 15);
}

#[test]
fn state_of_another_device_or_memory_is_refused_by_name() {
    let ram = ram();
    let (device, section) = busy_device(&ram);
    let mmio = device.mmio();
    let renamed = Section {
        name: "net".into(),
        ..section.clone()
    };
    assert_eq!(
        mmio.check(&renamed),
        Err(StateError::Unexpected { section: "net".into() })
    );
    let newer = Section {
        version: 2,
        ..section.clone()
    };
    assert!(matches!(mmio.check(&newer), Err(StateError::Version { found: 2, .. })));
    let error = |place: usize, byte: u8| {
        let mut damaged = section.clone();
        damaged.bytes[place] = byte;
        mmio.check(&damaged).unwrap_err().to_string()
    };
    assert!(error(0, 1).contains("device kind"));
    assert!(error(4, 0xff).contains("device features"));
    // After kind, features, an empty configuration, status, flag, interrupt status, three selectors and features.
    let queue = 4 + 8 + 4 + 4 + 1 + 4 + 4 + 4 + 8 + 4;
    assert!(error(queue, 3).contains("queue"), "a size that is no power of two");
    assert!(
        error(queue + 3 + 6, 1).contains("queue"),
        "a descriptor table far outside memory"
    );
    assert!(error(queue + 27, 77).contains("queue positions"));
    assert!(error(section.bytes.len() - 41, 9).contains("entropy source"));
    let small = Memory::from_ranges(&[(vm_memory::GuestAddress(0), 0x1000)]).unwrap();
    assert!(
        entropy(&small).mmio().check(&section).is_err(),
        "its rings are not in this memory"
    );
}

#[test]
fn a_driver_that_accepts_nothing_more_than_version_1_is_served() {
    let ram = ram();
    let device = entropy(&ram);
    let mut queue = DriverQueue::new(&ram, 0);
    start_with(device.mmio(), &[&queue], 1 << 32);
    for _ in 0..3 * QUEUE_SIZE {
        queue.offer(&[super::driver::Piece::Write(0x8000, 16)]);
        queue.notify(device.mmio());
        assert_eq!(queue.wait_used().1, 16);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn damaged_state_is_refused_or_means_what_it_says(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in proptest::option::of(any::<prop::sample::Index>()),
    ) {
        let ram = ram();
        let (device, section) = busy_device(&ram);
        let mut damaged = section.clone();
        for (place, byte) in changes {
            let place = place.index(damaged.bytes.len());
            damaged.bytes[place] = byte;
        }
        if let Some(cut) = cut {
            damaged.bytes.truncate(cut.index(section.bytes.len()));
        }
        let mmio = device.mmio();
        match mmio.check(&damaged) {
            Ok(()) => {
                prop_assert_eq!(mmio.restore(&damaged), Ok(()));
                prop_assert_eq!(mmio.state(), damaged);
                prop_assert!(mmio.settle() < 100);
            }
            Err(error) => {
                prop_assert_eq!(mmio.restore(&damaged), Err(error));
                prop_assert_eq!(mmio.state(), section, "a refused restore changes nothing");
            }
        }
    }

    #[test]
    fn registers_take_anything(
        accesses in proptest::collection::vec(
            (any::<bool>(), prop_oneof![0u64..0x120, any::<u64>()], 0usize..10, prop_oneof![0u32..20, any::<u32>()]),
            0..200,
        ),
    ) {
        let ram = ram();
        let device = entropy(&ram);
        let mmio = device.mmio();
        for (write, offset, bytes, value) in accesses {
            let mut data = [0; 12];
            data[..4].copy_from_slice(&value.to_le_bytes());
            if write {
                mmio.write(offset, &data[..bytes]);
            } else {
                mmio.read(offset, &mut data[..bytes]);
            }
        }
        mmio.freeze().unwrap();
        let section = mmio.state();
        prop_assert_eq!(mmio.check(&section), Ok(()));
    }
}
