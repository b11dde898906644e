//! The whole machine on the host's KVM, with tiny guests in machine code.

use std::arch::global_asm;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use guest::abi::{BOOT_INFO, CLOCK_PAGE, IMAGE_BASE, STACK_TOP};
use std::os::fd::BorrowedFd;
use vm_memory::{Bytes as _, GuestAddress};

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

global_asm!(
    ".pushsection .rodata.guests, \"a\"",
    // Counts for ever.
    "guest_count:",
    "mov ebx, 0x400000",
    "xor eax, eax",
    "2: inc rax",
    "mov [rbx], rax",
    "jmp 2b",
    "guest_count_end:",
    // 3 * 10^7 rounds over general registers, SSE, memory and the FS base; then power off.
    "guest_compute:",
    "mov ecx, 30000000",
    "mov eax, 0x3ff00000",
    "shl rax, 32",
    "movq xmm1, rax",
    "xorps xmm0, xmm0",
    "2: addsd xmm0, xmm1",
    "mulsd xmm1, xmm0",
    "sqrtsd xmm1, xmm1",
    "divsd xmm1, xmm0",
    "mov rax, fs:[0x10]",
    "add rax, rcx",
    "rol rax, 7",
    "mov fs:[0x10], rax",
    "dec rcx",
    "jnz 2b",
    "movsd fs:[0x18], xmm0",
    "mov eax, 0xd0100008",
    "mov dword ptr [rax], 1",
    "2: jmp 2b",
    "guest_compute_end:",
    // Writes every third page of 30, then waits at the doorbell; again and again.
    "guest_pages:",
    "xor r8d, r8d",
    "2: inc r8",
    "mov ebx, 0x400000",
    "mov ecx, 10",
    "3: mov [rbx + 8], r8",
    "add rbx, 0x3000",
    "dec ecx",
    "jnz 3b",
    "mov eax, 0xd0100000",
    "mov [rax], rcx",
    "jmp 2b",
    "guest_pages_end:",
    // Reads its clock, waits 2 ms, counts; again and again.
    "guest_tick:",
    "mov esi, 0x2000",
    "mov ebx, 0x400000",
    "mov edi, 0xd0100000",
    "2: rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "sub rax, [rsi + 8]",
    "mul qword ptr [rsi + 24]",
    "shrd rax, rdx, 32",
    "add rax, [rsi + 16]",
    "mov [rbx], rax",
    "inc qword ptr [rbx + 8]",
    "add rax, 2000000",
    "mov [rdi], rax",
    "jmp 2b",
    "guest_tick_end:",
    // Touches device registers in every wrong way; then power off.
    "guest_hostile:",
    "mov ebx, 0x400000",
    "mov esi, 0xd0000000",
    "movzx eax, byte ptr [rsi + 0x300000]",
    "mov [rbx], rax",
    "mov rax, [rsi + 0x4000]",
    "mov [rbx + 8], rax",
    "movups xmm0, [rsi + 0x200ff9]",
    "movups [rbx + 16], xmm0",
    "mov eax, 0xb0000000",
    "mov rax, [rax]",
    "mov [rbx + 32], rax",
    "xor eax, eax",
    "mov ecx, 0x6000",
    "4: mov [rsi + rcx], al",
    "mov [rsi + rcx], rax",
    "add rax, 0x1234567",
    "add ecx, 0x1f",
    "cmp ecx, 0x8000",
    "jb 4b",
    "mov ecx, 0",
    "5: mov ax, [rsi + rcx]",
    "mov [rsi + rcx], ax",
    "mov [rsi + rcx], rax",
    "mov [rsi + rcx + 1], eax",
    "movups xmm0, [rsi + rcx + 3]",
    "movups [rsi + rcx + 3], xmm0",
    "add ecx, 0x61",
    "cmp ecx, 0x4000",
    "jb 5b",
    "movups [rsi + 0x100ff8], xmm0",
    "movups [rsi + 0x100001], xmm0",
    "mov edi, 0xe0000000",
    "mov ecx, 300",
    "rep movsb",
    "mov qword ptr [rbx + 40], 1",
    "mov eax, 0xd0100008",
    "mov byte ptr [rax], 1",
    "mov dword ptr [rax], 77",
    "mov dword ptr [rax], 1",
    "2: jmp 2b",
    "guest_hostile_end:",
    // Faults, without a handler.
    "guest_fault:",
    "ud2",
    "guest_fault_end:",
    ".popsection",
);

macro_rules! guests {
    ($($name:ident $end:ident $function:ident)*) => {
        unsafe extern "C" {
            $(static $name: u8; static $end: u8;)*
        }
        $(fn $function() -> &'static [u8] {
            let (start, end) = (&raw const $name, &raw const $end);
            // SAFETY: the two labels bound one stretch of the read-only data above.
            unsafe { std::slice::from_raw_parts(start, end as usize - start as usize) }
        })*
    };
}

guests! {
    guest_count guest_count_end count
    guest_compute guest_compute_end compute
    guest_pages guest_pages_end pages
    guest_tick guest_tick_end tick
    guest_hostile guest_hostile_end hostile
    guest_fault guest_fault_end fault
}

/// Wraps code as a program for the guest's interface.
fn elf(code: &[u8]) -> Vec<u8> {
    const HEADERS: u64 = 64 + 56;
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    image.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for field in [IMAGE_BASE, 64, 0] {
        image.extend(field.to_le_bytes());
    }
    image.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 64, 0, 0, 0, 0, 0]);
    image.extend([1, 0, 0, 0, 7, 0, 0, 0]);
    let size = code.len() as u64;
    for field in [HEADERS, IMAGE_BASE, IMAGE_BASE, size, size, PAGE] {
        image.extend(field.to_le_bytes());
    }
    assert_eq!(image.len() as u64, HEADERS);
    image.extend(code);
    image
}

struct Nowhere;

impl net::Backend for Nowhere {
    fn transmit(&mut self, _: &[u8]) {}
    fn receive(&mut self) -> Option<Bytes> {
        None
    }
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
    let (report, ends) = mpsc::channel();
    let config = MachineConfig {
        memory_bytes: MEMORY_MIN,
        mapping,
        mac: [2, 0, 0, 0, 0, 1],
        console: Box::new(io::sink()),
        on_power: Arc::new(move |event| drop(report.send(event))),
    };
    Machine {
        vm: KvmVm::new(config, Box::new(Nowhere), Box::new(Blank(1 << 20))).unwrap(),
        ends,
    }
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
        let cpu = self.vm.vcpu.cpu();
        cpu.save(&msrs).unwrap().registers.encode(&mut writer);
        writer.finish("", 0).bytes
    }

    /// Waits until the guest is asleep at its doorbell.
    fn settle(&mut self) {
        thread::sleep(Duration::from_millis(50));
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
    let registers = machine.vm.vcpu.cpu().save(&machine.vm.msrs).unwrap().registers;
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
    original.vm.vcpu.cpu().edit(fs, &original.vm.msrs).unwrap();
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
fn dirty_pages_are_those_of_the_guest_and_of_the_machine() {
    if kvm_is_missing() {
        return;
    }
    let mut machine = booted(pages());
    let boot = machine.vm.take_dirty().unwrap();
    for address in [BOOT_INFO, CLOCK_PAGE, IMAGE_BASE, guest::abi::PAGE_TABLES] {
        assert!(boot.contains(address / PAGE), "the machine wrote {address:#x} itself");
    }
    assert!(machine.vm.take_dirty().unwrap().is_empty());

    // KVM also reports a page when the guest touches it for the first time, so it goes round once before.
    let written: Vec<u64> = (0..10).map(|number| DATA_PAGE + number * 3).collect();
    machine.vm.resume().unwrap();
    machine.settle();
    let first = machine.vm.take_dirty().unwrap();
    assert!(written.iter().all(|page| first.contains(*page)));
    machine.vm.doorbell.trigger();
    machine.settle();
    assert_eq!(
        machine.vm.take_dirty().unwrap().iter().collect::<Vec<_>>(),
        written,
        "only the guest's pages"
    );
    assert!(
        machine.vm.take_dirty().unwrap().is_empty(),
        "an idle guest writes nothing"
    );

    // One page that only the machine writes, and one that both write.
    machine
        .vm
        .ram
        .memory()
        .write_obj(1_u8, GuestAddress(DATA + PAGE))
        .unwrap();
    machine.vm.ram.memory().write_obj(1_u8, GuestAddress(DATA)).unwrap();
    machine.vm.doorbell.trigger();
    machine.settle();
    let mut both = written.clone();
    both.insert(1, DATA_PAGE + 1);
    let dirty = machine.vm.take_dirty().unwrap();
    assert_eq!(dirty.iter().collect::<Vec<_>>(), both);
    assert_eq!(machine.word(DATA + 8), 3, "the guest was woken once each time");

    machine.vm.put_back_dirty(&dirty);
    machine
        .vm
        .ram
        .memory()
        .write_obj(1_u8, GuestAddress(DATA + 2 * PAGE))
        .unwrap();
    both.insert(2, DATA_PAGE + 2);
    assert_eq!(machine.vm.take_dirty().unwrap().iter().collect::<Vec<_>>(), both);
    assert!(machine.vm.take_dirty().unwrap().is_empty());
    machine.vm.pause().unwrap();
    machine.vm.reseed([1; 32]);
    assert_eq!(machine.vm.take_dirty().unwrap().iter().collect::<Vec<_>>(), [CLOCK]);
}

#[test]
fn private_machine_goes_back_to_the_committed_image() {
    if kvm_is_missing() {
        return;
    }
    let mut primary = booted(pages());
    primary.vm.resume().unwrap();
    primary.settle();
    primary.vm.pause().unwrap();
    let mut secondary = empty(Mapping::Private);
    primary.copy_to(&mut secondary);
    assert_eq!(secondary.word(DATA + 8), 1);
    for round in 1..4 {
        secondary.run_until(|machine| machine.word(DATA + 8 + 27 * PAGE) == 2);
        let mut page = [0; PAGE_BYTES];
        secondary.vm.ram.read_committed(DATA_PAGE, &mut page).unwrap();
        assert_eq!(
            page[8], 1,
            "what it does on its own does not reach the image, round {round}"
        );
        primary.copy_to(&mut secondary);
        assert_eq!(secondary.word(DATA + 8), 1, "it is back where the primary stopped");
    }
}

#[test]
fn check_names_what_this_host_would_refuse() {
    if kvm_is_missing() {
        return;
    }
    let mut machine = booted(pages());
    machine.vm.resume().unwrap();
    machine.settle();
    machine.vm.pause().unwrap();
    let good = machine.vm.save().unwrap();
    machine.vm.resume().unwrap();
    machine.vm.check(&good).unwrap();

    let spoil = |change: &dyn Fn(&mut CpuState)| {
        let mut state = good.clone();
        let mut reader = Reader::new(&good.0[0], VCPU_VERSION).unwrap();
        let mut cpu = CpuState::decode(&mut reader).unwrap();
        change(&mut cpu);
        let mut writer = Writer::new();
        cpu.encode(&mut writer);
        state.0[0] = writer.finish(VCPU, VCPU_VERSION);
        state
    };
    let cases: [(&str, MachineState); 6] = [
        ("special registers", spoil(&|cpu| cpu.registers.sregs.cr4 |= 1 << 63)),
        ("special registers", spoil(&|cpu| cpu.registers.sregs.efer = 0)),
        ("debug registers", spoil(&|cpu| cpu.registers.debug.dr7 = u64::MAX)),
        ("XCR registers", spoil(&|cpu| cpu.registers.xcrs.xcrs[0].value = 2)),
        ("XSAVE state", spoil(&|cpu| cpu.registers.xsave.region[129] = 1 << 30)),
        (
            "MSR 0xc0000082",
            spoil(&|cpu| {
                cpu.registers
                    .msrs
                    .iter_mut()
                    .find(|msr| msr.index == 0xc000_0082)
                    .unwrap()
                    .data = 1 << 62;
            }),
        ),
    ];
    for (name, state) in &cases {
        let error = machine.vm.check(state).expect_err(name);
        let VmError::Registers(error) = error else {
            panic!("{name}: {error}")
        };
        assert!(error.to_string().contains(name), "{error}");
        machine.vm.check(&good).expect("a failed trial leaves nothing behind");
    }

    let mut missing = good.clone();
    missing.0.remove(2);
    assert!(matches!(
        machine.vm.check(&missing),
        Err(VmError::State(StateError::Missing { .. }))
    ));
    let mut twice = good.clone();
    twice.0.push(twice.0[1].clone());
    assert!(matches!(
        machine.vm.check(&twice),
        Err(VmError::State(StateError::Unexpected { .. }))
    ));
    for (section, length) in (0..good.0.len()).flat_map(|section| [0, 1, 40].map(|length| (section, length))) {
        let mut short = good.clone();
        short.0[section].bytes.truncate(length);
        if short != good {
            assert!(machine.vm.check(&short).is_err(), "section {section} cut to {length}");
        }
    }

    machine.vm.pause().unwrap();
    machine.vm.restore(&cases[0].1).unwrap_err();
    assert!(
        matches!(machine.vm.resume(), Err(VmError::Poisoned)),
        "after a failed restore it never runs"
    );
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
    let now = machine.vm.vcpu.cpu().clock.now();
    assert!(
        seen <= now && now - seen < 1_000_000_000,
        "guest and machine agree on guest time: {seen} and {now}"
    );

    // Restored elsewhere, later: it goes on from the guest time of the stop, wherever it slept.
    let saved = machine.vm.save().unwrap();
    let mut reader = Reader::new(&saved.0[0], VCPU_VERSION).unwrap();
    let stopped_at = CpuState::decode(&mut reader).unwrap().now;
    let mut copy = empty(Mapping::Private);
    machine.copy_to(&mut copy);
    thread::sleep(Duration::from_millis(300));
    let restored = copy.vm.vcpu.cpu().clock.now();
    let later = copy.word(DATA + 8) + 2;
    copy.run_until(|machine| machine.word(DATA + 8) > later);
    let seen_after = copy.word(DATA);
    assert!(restored >= stopped_at && seen_after > seen);
    assert!(seen_after >= stopped_at, "guest time runs on");

    // Paused on its own host, it sees the time that has passed, once.
    machine.vm.resume().unwrap();
    thread::sleep(Duration::from_millis(50));
    machine.vm.pause().unwrap();
    let total = machine.vm.vcpu.cpu().clock.now();
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
        machine.vm.doorbell.trigger();
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
            crate::cpu_identity().unwrap()
        })
    };
    let identities: Vec<_> = (0..4).map(on).map(|asked| asked.join().unwrap()).collect();
    assert!(
        identities.iter().all(|identity| *identity == identities[0]),
        "{identities:x?}"
    );
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
