//! The whole machine on the host's KVM, with tiny guests in machine code.

mod devices;
mod guests;
mod pc;
mod state;

use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use guest::abi::{BOOT_INFO, CLOCK_PAGE, IMAGE_BASE, STACK_TOP};
use std::os::fd::BorrowedFd;
use vm_memory::{Bytes as _, GuestAddress};

use self::guests::{compute, count, elf, fault, hostile, pages, tick};
use super::*;
use crate::kvm::host_check;
use crate::memory::{MEMORY_MIN, PAGE_BYTES};
use crate::vcpu::state::Registers;

/// Where the guests below keep their results.
const DATA: u64 = 0x40_0000;
const PAGE: u64 = PAGE_BYTES as u64;
const DATA_PAGE: u64 = DATA / PAGE;
const CLOCK: u64 = CLOCK_PAGE / PAGE;
/// Far more than anything here takes on an idle host.
const PATIENCE: Duration = Duration::from_secs(20);

struct Nowhere;

impl net::Backend for Nowhere {
    fn transmit(&mut self, _: &[u8]) {}
    fn receive(&mut self) -> Option<Bytes> {
        None
    }
    fn put_back(&mut self, _: Bytes) {}
    fn delivered(&mut self, _: Bytes) {}
    fn readiness(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }
}

struct Blank(u64);

impl block::Backend for Blank {
    fn size(&self) -> u64 {
        self.0
    }
    fn read(&mut self, _: u64, data: &mut [u8]) -> io::Result<()> {
        data.fill(0);
        Ok(())
    }
    fn write(&mut self, _: u64, _: &[u8]) -> io::Result<()> {
        Ok(())
    }
    fn zero(&mut self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Ok(())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A machine under test, and what it says about its end.
struct Machine {
    vm: KvmVm,
    ends: Receiver<PowerEvent>,
}

/// Says loudly that there is no KVM to test on, or panics where it must be there.
fn kvm_is_missing() -> bool {
    let Err(error) = host_check() else { return false };
    assert!(
        std::env::var_os("TANDEM_REQUIRE_KVM").is_none(),
        "TANDEM_REQUIRE_KVM is set, but: {error}"
    );
    println!("SKIPPED, needs KVM: {error}");
    true
}

fn empty(mapping: Mapping) -> Machine {
    sized(mapping, MEMORY_MIN)
}

fn sized(mapping: Mapping, memory_bytes: u64) -> Machine {
    with_cards(mapping, memory_bytes, 1)
}

fn with_cards(mapping: Mapping, memory_bytes: u64, cards: u8) -> Machine {
    made(mapping, memory_bytes, cards, Platform::Bundled)
}

fn made(mapping: Mapping, memory_bytes: u64, cards: u8, platform: Platform) -> Machine {
    let (report, ends) = mpsc::channel();
    let card = |number| CardConfig {
        mac: [2, 0, 0, 0, 0, number],
        offloads: false,
        queues: 1,
    };
    let config = MachineConfig {
        memory_bytes,
        cpu: CpuModel::host().unwrap(),
        mapping,
        platform,
        cards: (1..=cards).map(card).collect(),
        console: Box::new(io::sink()),
        on_power: Arc::new(move |event| drop(report.send(event))),
    };
    Machine {
        vm: KvmVm::new(config, nowhere(cards), Box::new(Blank(1 << 20))).unwrap(),
        ends,
    }
}

impl KvmVm {
    /// The doorbell of the bundled guest's machine.
    fn doorbell(&self) -> &Arc<Doorbell> {
        match &self.kind {
            Kind::Bundled(doorbell) => doorbell,
            Kind::Pc(_) => panic!("a PC has no doorbell"),
        }
    }
}

fn nowhere(cards: u8) -> Vec<Box<dyn net::Backend>> {
    (0..cards).map(|_| Box::new(Nowhere) as _).collect()
}

fn booted(code: &[u8]) -> Machine {
    let mut machine = empty(Mapping::Shared);
    machine.vm.boot(&elf(code), "").unwrap();
    machine
}

impl Machine {
    fn word(&self, address: u64) -> u64 {
        self.vm.ram.memory().read_obj(GuestAddress(address)).unwrap()
    }

    fn end(&self) -> PowerEvent {
        self.ends.recv_timeout(PATIENCE).expect("the guest ends")
    }

    fn registers(&mut self) -> Vec<u8> {
        let mut writer = Writer::new();
        let msrs = self.vm.msrs.clone();
        let cpu = self.vm.vcpus[0].cpu();
        cpu.save(&msrs, crate::clock::host_tsc())
            .unwrap()
            .registers
            .encode(&mut writer);
        writer.finish("", 0).bytes
    }

    /// Waits until the guest is asleep at its doorbell.
    fn settle(&self) {
        let start = Instant::now();
        while !self.vm.doorbell().sleeps() {
            assert!(start.elapsed() < PATIENCE, "the guest falls asleep");
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn run_until(&mut self, mut done: impl FnMut(&Self) -> bool) {
        let start = Instant::now();
        self.vm.resume().unwrap();
        while !done(self) {
            assert!(start.elapsed() < PATIENCE, "the guest gets on");
            thread::sleep(Duration::from_millis(1));
        }
        self.vm.pause().unwrap();
    }

    /// Makes `other` this machine, the way a checkpoint does.
    fn copy_to(&mut self, other: &mut Self) {
        let mut page = [0; PAGE_BYTES];
        for number in 0..self.vm.ram.pages() {
            self.vm.ram.read_page(number, &mut page).unwrap();
            other.vm.ram.write_committed(number, &page).unwrap();
        }
        let state = self.vm.save().unwrap();
        other.vm.check(&state).unwrap();
        let own = other.vm.take_dirty().unwrap();
        other.vm.ram.revert(&own).unwrap();
        other.vm.restore(&state).unwrap();
    }
}

#[test]
fn runs_natively_and_stops_when_told() {
    if kvm_is_missing() {
        return;
    }
    let mut machine = booted(count());
    assert_eq!(machine.word(DATA), 0, "it starts paused");
    let start = Instant::now();
    machine.run_until(|machine| machine.word(DATA) > 50_000_000);
    assert!(start.elapsed() < PATIENCE / 2, "an interpreted guest takes a minute");
    let (first, registers) = (machine.word(DATA), machine.registers());
    thread::sleep(Duration::from_millis(20));
    assert_eq!(machine.word(DATA), first, "nothing moves while it is paused");
    machine.vm.pause().unwrap();
    assert_eq!(machine.registers(), registers);
    machine.run_until(|machine| machine.word(DATA) > first);
    let registers = machine.vm.vcpus[0]
        .cpu()
        .save(&machine.vm.msrs, crate::clock::host_tsc())
        .unwrap()
        .registers;
    assert_eq!((registers.regs.rdi, registers.regs.rsp), (BOOT_INFO, STACK_TOP));
}

#[test]
fn many_pauses_never_hang_and_lose_nothing() {
    if kvm_is_missing() {
        return;
    }
    let mut machine = booted(count());
    let mut worst = Duration::ZERO;
    for _ in 0..300 {
        machine.vm.resume().unwrap();
        let start = Instant::now();
        machine.vm.pause().unwrap();
        worst = worst.max(start.elapsed());
    }
    println!("longest of 300 pauses of a busy guest: {worst:?}");
    assert!(worst < Duration::from_secs(1));
    let before = machine.word(DATA);
    machine.run_until(|machine| machine.word(DATA) > before);
}

#[test]
fn restored_in_the_middle_it_ends_as_if_never_stopped() {
    if kvm_is_missing() {
        return;
    }
    let fs = |registers: &mut Registers| registers.sregs.fs.base = DATA;
    let mut original = booted(compute());
    original.vm.vcpus[0].cpu().edit(fs, &original.vm.msrs).unwrap();
    original.run_until(|machine| machine.word(DATA + 0x10) != 0);
    let mut copy = empty(Mapping::Private);
    original.copy_to(&mut copy);
    let page = |machine: &Machine, number| {
        let mut page = [0; PAGE_BYTES];
        machine.vm.ram.read_page(number, &mut page).unwrap();
        page
    };
    for number in (0..original.vm.ram.pages()).filter(|number| *number != CLOCK) {
        assert_eq!(page(&original, number), page(&copy, number), "page {number}");
    }
    assert_eq!(original.registers(), copy.registers());
    for machine in [&mut original, &mut copy] {
        machine.vm.resume().unwrap();
        assert_eq!(machine.end(), PowerEvent::Off);
        machine.vm.pause().unwrap();
        assert_eq!(machine.vm.ended(), Some(PowerEvent::Off));
        assert_ne!(machine.word(DATA + 0x18), 0);
    }
    assert_eq!(original.registers(), copy.registers());
    for number in (0..original.vm.ram.pages()).filter(|number| *number != CLOCK) {
        assert_eq!(page(&original, number), page(&copy, number), "page {number}");
    }
    // One that has ended stays so where it is restored.
    let mut late = empty(Mapping::Private);
    original.copy_to(&mut late);
    late.vm.resume().unwrap();
    assert_eq!(late.end(), PowerEvent::Off);
}

#[test]
fn deadlines_wake_on_time_and_guest_time_never_runs_backwards() {
    if kvm_is_missing() {
        return;
    }
    let mut machine = booted(tick());
    let start = Instant::now();
    machine.vm.resume().unwrap();
    thread::sleep(Duration::from_millis(200));
    machine.vm.pause().unwrap();
    let (ticks, elapsed) = (machine.word(DATA + 8), start.elapsed().as_millis());
    println!("{ticks} deadlines of 2 ms in {elapsed} ms");
    assert!(ticks >= 10, "deadlines pass");
    assert!(u128::from(ticks) <= elapsed / 2 + 2, "and not before their time");
    let seen = machine.word(DATA);
    let now = machine.vm.vcpus[0].cpu().clock.unwrap().now();
    assert!(
        seen <= now && now - seen < 1_000_000_000,
        "guest and machine agree on guest time: {seen} and {now}"
    );

    // Restored elsewhere, a second later: it goes on from the guest time of the stop, wherever it slept.
    let mut copy = empty(Mapping::Private);
    machine.copy_to(&mut copy);
    let saved = machine.vm.save().unwrap();
    let mut reader = Reader::new(&saved.0[0], VCPU_VERSION).unwrap();
    let stopped_at = CpuState::decode(&mut reader, Chips::None).unwrap().now;
    let later = copy.word(DATA + 8) + 5;
    thread::sleep(Duration::from_secs(1));
    copy.vm.restore(&saved).unwrap();
    copy.run_until(|machine| machine.word(DATA + 8) > later);
    let (seen_after, now_after) = (copy.word(DATA), copy.vm.vcpus[0].cpu().clock.unwrap().now());
    assert!(
        seen_after > seen && seen_after >= stopped_at,
        "guest time never runs backwards"
    );
    assert!(
        now_after - stopped_at < 900_000_000,
        "the second between stop and restore does not count"
    );
    assert!(
        now_after >= seen_after && now_after - seen_after < 500_000_000,
        "the guest has been told"
    );

    // Paused on its own host, it sees the time that has passed, once.
    machine.vm.resume().unwrap();
    thread::sleep(Duration::from_millis(50));
    machine.vm.pause().unwrap();
    let total = machine.vm.vcpus[0].cpu().clock.unwrap().now();
    let real = u64::try_from(start.elapsed().as_nanos()).unwrap();
    assert!(
        total.abs_diff(real) < 100_000_000,
        "{total} guest ns in {real} real ones"
    );
}

#[test]
fn sleeper_wakes_for_a_device_and_after_a_restore() {
    if kvm_is_missing() {
        return;
    }
    let mut machine = booted(pages());
    machine.vm.resume().unwrap();
    machine.settle();
    assert_eq!(machine.word(DATA + 8), 1, "without a deadline it sleeps for ever");
    for round in 2..20 {
        machine.vm.doorbell().trigger();
        let start = Instant::now();
        while machine.word(DATA + 8) < round {
            assert!(start.elapsed() < PATIENCE, "a report wakes it");
            thread::yield_now();
        }
    }
    machine.settle();
    let before = machine.word(DATA + 8);
    machine.vm.pause().unwrap();
    machine.vm.resume().unwrap();
    machine.settle();
    assert_eq!(machine.word(DATA + 8), before, "a pause alone does not wake it");
    machine.vm.pause().unwrap();
    let mut copy = empty(Mapping::Private);
    machine.copy_to(&mut copy);
    copy.vm.resume().unwrap();
    copy.settle();
    assert_eq!(copy.word(DATA + 8), before + 1, "a restored guest looks once");
}

#[test]
fn hostile_accesses_read_all_ones_and_break_nothing() {
    if kvm_is_missing() {
        return;
    }
    let mut machine = booted(hostile());
    machine.vm.resume().unwrap();
    assert_eq!(machine.end(), PowerEvent::Off);
    machine.vm.pause().unwrap();
    assert_eq!(machine.word(DATA), 0xff, "a byte of nothing");
    assert_eq!(machine.word(DATA + 8), u64::MAX, "a word past the last device");
    assert_eq!(
        machine.word(DATA + 16),
        u64::MAX,
        "sixteen bytes of nothing across pages"
    );
    assert_eq!(machine.word(DATA + 24), u64::MAX);
    assert_eq!(
        machine.word(DATA + 32),
        u64::MAX,
        "memory that the machine does not have"
    );
    assert_eq!(machine.word(DATA + 40), 1, "it got to its end");
    machine.vm.save().unwrap();
}

#[test]
fn crash_is_reported_and_a_restore_cures_it() {
    if kvm_is_missing() {
        return;
    }
    let mut machine = booted(fault());
    machine.vm.resume().unwrap();
    assert!(matches!(machine.end(), PowerEvent::Crashed { .. }));
    machine.vm.pause().unwrap();
    assert!(matches!(machine.vm.save(), Err(VmError::Crashed { .. })));
    let mut healthy = booted(pages());
    healthy.vm.resume().unwrap();
    healthy.settle();
    healthy.vm.pause().unwrap();
    healthy.copy_to(&mut machine);
    machine.vm.resume().unwrap();
    machine.settle();
    machine.vm.pause().unwrap();
    assert_eq!((machine.vm.ended(), machine.word(DATA + 8)), (None, 2));
}

#[test]
fn guests_see_the_same_cpu_whichever_processor_is_asked() {
    if kvm_is_missing() {
        return;
    }
    let on = |processor| {
        let mut set = rustix::thread::CpuSet::new();
        set.set(processor);
        thread::spawn(move || {
            // A container may forbid it; then the same processor is asked twice.
            let _ = rustix::thread::sched_setaffinity(None, &set);
            CpuModel::host().unwrap()
        })
    };
    let models: Vec<_> = (0..4).map(on).map(|asked| asked.join().unwrap()).collect();
    assert!(models.iter().all(|model| *model == models[0]), "{models:x?}");
    assert!(models[0].leaves.is_sorted() && models[0].msrs.is_sorted() && !models[0].msrs.is_empty());
}

#[test]
fn idle_guest_stops_saves_and_goes_on_quickly() {
    if kvm_is_missing() {
        return;
    }
    let mut machine = booted(pages());
    machine.vm.resume().unwrap();
    machine.settle();
    let mut times = Vec::new();
    let mut parts = [Duration::ZERO; 4];
    for _ in 0..200 {
        let start = Instant::now();
        machine.vm.pause().unwrap();
        let paused = Instant::now();
        let state = machine.vm.save().unwrap();
        let saved = Instant::now();
        machine.vm.take_dirty().unwrap();
        let taken = Instant::now();
        machine.vm.resume().unwrap();
        let end = Instant::now();
        times.push(end - start);
        for (part, time) in parts
            .iter_mut()
            .zip([paused - start, saved - paused, taken - saved, end - taken])
        {
            *part += time / 200;
        }
        assert!(state.bytes() < 64 << 10);
        thread::sleep(Duration::from_micros(500));
    }
    times.sort_unstable();
    println!(
        "pause, save, take_dirty, resume: {parts:?}; median {:?}, longest {:?}",
        times[100], times[199]
    );
    assert!(times[100] < Duration::from_millis(20));
    let state = {
        machine.vm.pause().unwrap();
        machine.vm.save().unwrap()
    };
    let start = Instant::now();
    for _ in 0..50 {
        machine.vm.check(&state).unwrap();
    }
    let checked = start.elapsed() / 50;
    let start = Instant::now();
    for _ in 0..50 {
        machine.vm.restore(&state).unwrap();
    }
    println!(
        "check {checked:?}, restore {:?}, {} bytes",
        start.elapsed() / 50,
        state.bytes()
    );
}
