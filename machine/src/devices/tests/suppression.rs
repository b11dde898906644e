//! Who is told of what in a queue, and who does not want to know (virtio 1.2 §2.7.7, §2.7.10).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::driver::{Bell, DriverQueue, Piece, bell, ram, start, start_with};
use crate::devices::entropy::{Entropy, EntropySource};
use crate::memory::Memory;

const EVENT_IDX: u64 = 1 << 29;

/// A device that rests: turns are taken by `settle` only.
fn at_rest(ram: &Memory, bell: &Arc<Bell>) -> Entropy {
    let entropy = Entropy::new("entropy", EntropySource::Host, ram.clone(), Arc::clone(bell) as _).unwrap();
    entropy.mmio().freeze().unwrap();
    entropy
}

fn rung(bell: &Bell) -> usize {
    bell.0.swap(0, Ordering::SeqCst)
}

fn offer(queue: &mut DriverQueue<'_>, chains: usize) {
    for _ in 0..chains {
        queue.offer(&[Piece::Write(0x20_000, 8)]).unwrap();
    }
}

fn take(queue: &mut DriverQueue<'_>) -> usize {
    std::iter::from_fn(|| queue.take()).count()
}

#[test]
fn a_driver_that_asks_for_no_interrupt_gets_none() {
    let (ram, bell) = (ram(), bell());
    let entropy = at_rest(&ram, &bell);
    let mut queue = DriverQueue::new(&ram, 0);
    start_with(entropy.mmio(), &[&queue], !EVENT_IDX);
    entropy.mmio().settle();
    offer(&mut queue, 1);
    entropy.mmio().settle();
    assert_eq!((rung(&bell), take(&mut queue)), (1, 1));
    queue.mute(true);
    offer(&mut queue, 3);
    entropy.mmio().settle();
    assert_eq!((rung(&bell), take(&mut queue)), (0, 3));
    queue.mute(false);
    entropy.mmio().settle();
    assert_eq!(rung(&bell), 0, "nothing is new");
    offer(&mut queue, 1);
    entropy.mmio().settle();
    assert_eq!((rung(&bell), take(&mut queue)), (1, 1));
}

#[test]
fn a_driver_is_told_from_the_place_that_it_names_however_far_the_ring_has_wrapped() {
    let (ram, bell) = (ram(), bell());
    let entropy = at_rest(&ram, &bell);
    let mut queue = DriverQueue::new(&ram, 0);
    start(entropy.mmio(), &[&queue]);
    entropy.mmio().settle();
    let mut place = 0u16;
    // Beyond the end of the numbers.
    for _ in 0..(usize::from(u16::MAX) / 4 + 3) {
        offer(&mut queue, 2);
        queue.tell_me_from(place.wrapping_add(2));
        entropy.mmio().settle();
        assert_eq!(rung(&bell), 0, "the third is asked for, from {place} on");
        offer(&mut queue, 2);
        queue.tell_me_from(place.wrapping_add(2));
        entropy.mmio().settle();
        assert_eq!(rung(&bell), 1, "from {place} on");
        assert_eq!(take(&mut queue), 4);
        place = place.wrapping_add(4);
    }
}

#[test]
fn a_device_is_told_when_it_has_nothing_left_and_not_before() {
    let (ram, bell) = (ram(), bell());
    let entropy = at_rest(&ram, &bell);
    let mut queue = DriverQueue::new(&ram, 0);
    start(entropy.mmio(), &[&queue]);
    entropy.mmio().settle();
    for _ in 0..40_000 {
        offer(&mut queue, 1);
        assert!(queue.wants_to_know());
        offer(&mut queue, 1);
        assert!(!queue.wants_to_know(), "it knows");
        entropy.mmio().settle();
        assert_eq!(take(&mut queue), 2);
    }
}
