//! The devices in the machine: what they write reaches the other side, what they have not begun too.
//!
//! The test is the driver, beside a guest that sleeps: it fills a queue of the entropy device, whose bytes
//! come from a seed and so must be equal on both sides.

use super::guests::pages;
use super::*;

const QUEUE: u64 = 0x50_0000;
const DESCRIPTORS: u64 = QUEUE;
const AVAILABLE: u64 = QUEUE + PAGE;
const USED: u64 = QUEUE + 2 * PAGE;
const BUFFERS: u64 = QUEUE + 3 * PAGE;
const ENTRIES: u16 = 8;
const FILLED: u32 = 32;

fn set(machine: &Machine, register: u64, value: u32) {
    machine.vm.devices.entropy.mmio().write(register, &value.to_le_bytes());
}

/// Does what a driver does at its start.
fn start_driver(machine: &Machine) {
    for (register, value) in [
        (0x70, 1),
        (0x70, 3),
        (0x24, 1),
        (0x20, 1),
        (0x70, 11),
        (0x30, 0),
        (0x38, ENTRIES.into()),
    ] {
        set(machine, register, value);
    }
    for (register, address) in [(0x80, DESCRIPTORS), (0x90, AVAILABLE), (0xa0, USED)] {
        set(machine, register, u32::try_from(address).unwrap());
        set(machine, register + 4, 0);
    }
    set(machine, 0x44, 1);
    set(machine, 0x70, 15);
}

/// Queues the request `number`, for a page of its own, and notifies the device.
fn queue(machine: &Machine, number: u16) {
    let memory = machine.vm.ram.memory();
    let descriptor = DESCRIPTORS + 16 * u64::from(number);
    memory
        .write_obj(BUFFERS + PAGE * u64::from(number), GuestAddress(descriptor))
        .unwrap();
    memory.write_obj(FILLED, GuestAddress(descriptor + 8)).unwrap();
    memory.write_obj(2_u32, GuestAddress(descriptor + 12)).unwrap();
    memory
        .write_obj(number, GuestAddress(AVAILABLE + 4 + 2 * u64::from(number)))
        .unwrap();
    memory.write_obj(number + 1, GuestAddress(AVAILABLE + 2)).unwrap();
    set(machine, 0x50, 0);
}

fn wait_for_used(machine: &Machine, count: u16) {
    let start = Instant::now();
    let used = || machine.vm.ram.memory().read_obj::<u16>(GuestAddress(USED + 2)).unwrap();
    while used() != count {
        assert!(start.elapsed() < PATIENCE, "the device uses its buffers");
        thread::sleep(Duration::from_millis(1));
    }
}

fn filled(machine: &Machine, number: u16) -> [u8; FILLED as usize] {
    machine
        .vm
        .ram
        .memory()
        .read_obj(GuestAddress(BUFFERS + PAGE * u64::from(number)))
        .unwrap()
}

fn sleeping() -> Machine {
    let mut machine = booted(pages());
    start_driver(&machine);
    machine.vm.set_entropy_seed(Some([7; 32]));
    machine.vm.resume().unwrap();
    machine.settle();
    machine
}

#[test]
fn pages_that_only_a_device_wrote_reach_the_other_side() {
    if kvm_is_missing() {
        return;
    }
    let mut primary = sleeping();
    primary.vm.pause().unwrap();
    let mut secondary = empty(Mapping::Private);
    primary.copy_to(&mut secondary);
    primary.vm.take_dirty().unwrap();

    queue(&primary, 0);
    let by_driver = primary.vm.take_dirty().unwrap();
    assert_eq!(
        by_driver.iter().collect::<Vec<_>>(),
        [DESCRIPTORS / PAGE, AVAILABLE / PAGE]
    );
    primary.vm.resume().unwrap();
    wait_for_used(&primary, 1);
    primary.settle();
    primary.vm.pause().unwrap();
    let mut dirty = primary.vm.take_dirty().unwrap();
    for address in [USED, BUFFERS] {
        assert!(
            dirty.contains(address / PAGE),
            "the device wrote {address:#x}, the guest did not"
        );
    }
    dirty.union(&by_driver);
    let state = primary.vm.save().unwrap();

    secondary.vm.resume().unwrap();
    secondary.settle();
    secondary.vm.check(&state).unwrap();
    secondary.vm.pause().unwrap();
    let mut page = [0; PAGE_BYTES];
    for number in dirty.iter() {
        primary.vm.ram.read_page(number, &mut page).unwrap();
        secondary.vm.ram.write_committed(number, &page).unwrap();
    }
    let own = secondary.vm.take_dirty().unwrap();
    secondary.vm.ram.revert(&own).unwrap();
    secondary.vm.restore(&state).unwrap();
    let mut other = [0; PAGE_BYTES];
    for number in (0..primary.vm.ram.pages()).filter(|number| *number != CLOCK) {
        primary.vm.ram.read_page(number, &mut page).unwrap();
        secondary.vm.ram.read_page(number, &mut other).unwrap();
        assert!(page == other, "page {number} differs");
    }
    assert_ne!(filled(&secondary, 0), [0; FILLED as usize]);

    // Both go on at the same place of the stream.
    for machine in [&mut primary, &mut secondary] {
        machine.vm.resume().unwrap();
        queue(machine, 1);
        wait_for_used(machine, 2);
    }
    assert_eq!(filled(&primary, 1), filled(&secondary, 1));
    assert_ne!(filled(&primary, 1), filled(&primary, 0));
}

#[test]
fn request_that_was_not_begun_is_carried_and_done_once() {
    if kvm_is_missing() {
        return;
    }
    let mut primary = sleeping();
    primary.vm.pause().unwrap();
    queue(&primary, 0);
    thread::sleep(Duration::from_millis(20));
    assert_eq!(
        filled(&primary, 0),
        [0; FILLED as usize],
        "a frozen device does nothing"
    );
    let mut secondary = empty(Mapping::Private);
    primary.copy_to(&mut secondary);
    for machine in [&mut primary, &mut secondary] {
        machine.vm.resume().unwrap();
        wait_for_used(machine, 1);
        machine.settle();
        wait_for_used(machine, 1);
    }
    assert_eq!(filled(&primary, 0), filled(&secondary, 0));
}

#[test]
fn guest_that_sleeps_is_woken_by_its_device() {
    if kvm_is_missing() {
        return;
    }
    let mut machine = sleeping();
    let before = machine.word(DATA + 8);
    queue(&machine, 0);
    wait_for_used(&machine, 1);
    machine.run_until(|machine| machine.word(DATA + 8) > before);
    assert_eq!(machine.word(DATA + 8), before + 1);
}
