//! A PC on the host's KVM, with tiny kernels in 32-bit machine code: it starts, prints, is copied, and ends; several vCPUs with
//! timers under way move from one to another. The kernels run in ring 0, which paravirtual KVM interprets: they are short.

use std::arch::global_asm;
use std::fs::File;
use std::sync::Mutex;

use rustix::fs::MemfdFlags;

use super::*;
use crate::boot::linux::tests::{CODE, elf};
use crate::pc::chipset::CHIPSET;

const PC_MEMORY: u64 = 32 << 20;

/// Prints `ok`, then powers off.
const PRINTS: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xb0, b'o', 0xee, // out dx, 'o'
    0xb0, b'k', 0xee, // out dx, 'k'
    0x66, 0xba, 0x00, 0x06, // mov dx, 0x600
    0xb0, 0x34, 0xee, // out dx, 0x34
    0xf4, 0xeb, 0xfd, // hlt for ever
];

/// Prints what comes in.
const ECHOES: &[u8] = &[
    0x66, 0xba, 0xfd, 0x03, // mov dx, 0x3fd
    0xec, // in al, dx
    0xa8, 0x01, // test al, 1
    0x74, 0xf7, // jz to the start
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xec, 0xee, // in al, dx; out dx, al
    0xeb, 0xef, // jmp to the start
];

/// Where the guests below count.
const BOOTS: u64 = 0x30_0000;
const WAKES: u64 = 0x30_0004;
const TICKS: u64 = 0x30_0008;
const OTHER: u64 = 0x9000;

global_asm!(
    ".pushsection .rodata.guests, \"a\"",
    ".globl pc_power, pc_power_end, pc_two, pc_two_end",
    ".code32",
    // Says so and asks for a reset at the first start, and powers off at the second.
    "pc_power:",
    "mov dx, 0x3f8",
    "mov al, 'o'",
    "out dx, al",
    "mov al, 'k'",
    "out dx, al",
    "inc dword ptr [0x300000]",
    "cmp dword ptr [0x300000], 2",
    "je 2f",
    "mov dx, 0x602",
    "mov al, 1",
    "out dx, al",
    "3: jmp 3b",
    "2: mov dx, 0x600",
    "mov al, 0x34",
    "out dx, al",
    "3: jmp 3b",
    "pc_power_end:",
    // Starts the second vCPU, which counts for ever, and sleeps between the ticks of its timer.
    "pc_two:",
    "mov esp, 0x2f0000",
    "mov eax, offset pc_two_tick_at",
    "mov word ptr [0x310200], ax",
    "shr eax, 16",
    "mov word ptr [0x310206], ax",
    "mov dword ptr [0x310202], 0x8e000010",
    "mov word ptr [0x320000], 0x7ff",
    "mov dword ptr [0x320002], 0x310000",
    "lidt [0x320000]",
    "mov esi, offset pc_two_second_at",
    "mov edi, 0x8000",
    "mov ecx, 32",
    "cld",
    "rep movsb",
    // The local APIC on, then INIT and a start-up at 0x8000 for number 1.
    "mov dword ptr [0xfee000f0], 0x1ff",
    "mov dword ptr [0xfee00310], 0x1000000",
    "mov dword ptr [0xfee00300], 0x4500",
    "mov dword ptr [0xfee00310], 0x1000000",
    "mov dword ptr [0xfee00300], 0x4608",
    // A periodic timer with vector 0x40.
    "mov dword ptr [0xfee003e0], 0xb",
    "mov dword ptr [0xfee00320], 0x20040",
    "mov dword ptr [0xfee00380], 2000000",
    "sti",
    "pc_two_sleep: hlt",
    "pc_two_woken: inc dword ptr [0x300004]",
    "jmp pc_two_sleep",
    "pc_two_tick: inc dword ptr [0x300008]",
    "mov dword ptr [0xfee000b0], 0",
    // Not `iret`, which an interpreter lacks: it goes on behind the `hlt`, with interrupts.
    "add esp, 12",
    "sti",
    "jmp pc_two_woken",
    ".code16",
    "pc_two_second: xor ax, ax",
    "mov ds, ax",
    "6: inc dword ptr ds:[0x9000]",
    "jmp 6b",
    ".space 32",
    "pc_two_end:",
    ".set pc_two_tick_at, pc_two_tick - pc_two + {code}",
    ".set pc_two_second_at, pc_two_second - pc_two + {code}",
    ".code64",
    ".popsection",
    code = const CODE,
);

unsafe extern "C" {
    static pc_power: u8;
    static pc_power_end: u8;
    static pc_two: u8;
    static pc_two_end: u8;
}

fn between(start: &'static u8, end: &'static u8) -> &'static [u8] {
    let (start, end): (*const u8, *const u8) = (start, end);
    // SAFETY: both labels lie in one section, `end` behind `start`, with the guest's code between them.
    unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
}

fn power() -> &'static [u8] {
    // SAFETY: the label is one of the section above; only its address is taken.
    let start = unsafe { &pc_power };
    // SAFETY: as above.
    between(start, unsafe { &pc_power_end })
}

fn two() -> &'static [u8] {
    // SAFETY: as for `power`.
    let start = unsafe { &pc_two };
    // SAFETY: as above.
    between(start, unsafe { &pc_two_end })
}

#[derive(Clone, Default)]
struct Paper(Arc<Mutex<Vec<u8>>>);

impl Write for Paper {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(text);
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Paper {
    fn shows(&self, text: &[u8]) -> bool {
        *self.0.lock().unwrap() == text
    }
}

fn file(content: &[u8]) -> File {
    let file = File::from(rustix::fs::memfd_create("kernel", MemfdFlags::CLOEXEC).unwrap());
    (&file).write_all(content).unwrap();
    file
}

/// A PC with this kernel, and what it prints.
fn pc(code: &[u8], mapping: Mapping, vcpus: u8) -> (Machine, Paper) {
    let paper = Paper::default();
    let platform = Platform::Pc(PcConfig {
        vcpus,
        serial: Box::new(paper.clone()),
        program: Program {
            kernel: file(&elf(code)),
            initrd: None,
            command_line: String::new(),
        },
    });
    (made(mapping, PC_MEMORY, 1, platform), paper)
}

#[test]
fn prints_and_powers_off() {
    if kvm_is_missing() {
        return;
    }
    let (mut machine, paper) = pc(PRINTS, Mapping::Shared, 2);
    machine.vm.start_pc().unwrap();
    machine.vm.resume().unwrap();
    assert_eq!(machine.end(), PowerEvent::Off);
    assert!(paper.shows(b"ok"));
    machine.vm.pause().unwrap();
    machine.vm.start_pc().unwrap();
    machine.vm.resume().unwrap();
    assert_eq!(machine.end(), PowerEvent::Off);
    assert!(paper.shows(b"okok"), "it starts again as it did");
}

#[test]
fn a_copy_goes_on_with_the_input_that_waits() {
    if kvm_is_missing() {
        return;
    }
    let (mut machine, paper) = pc(ECHOES, Mapping::Shared, 2);
    machine.vm.start_pc().unwrap();
    let input = |machine: &Machine, text: &[u8]| {
        assert_eq!(machine.vm.serial().unwrap().input(text), text.len());
    };
    input(&machine, b"first");
    machine.run_until(|_| paper.shows(b"first"));
    input(&machine, b"second");
    let (mut copy, other) = pc(ECHOES, Mapping::Private, 2);
    machine.copy_to(&mut copy);
    copy.run_until(|_| other.shows(b"second"));
    assert!(paper.shows(b"first"), "the paused machine has printed nothing more");
}

#[test]
fn a_jump_to_where_a_processor_starts_is_a_reset() {
    if kvm_is_missing() {
        return;
    }
    let (mut machine, _) = pc(&[], Mapping::Shared, 2);
    machine.vm.start_pc().unwrap();
    let msrs = machine.vm.msrs.clone();
    let real_mode = |registers: &mut Registers| {
        registers.regs.rip = 0xfff0;
        let sregs = &mut registers.sregs;
        (sregs.cr0, sregs.cs.base, sregs.cs.selector) = (0x10, 0xf_0000, 0xf000);
        (sregs.cs.limit, sregs.cs.g, sregs.cs.db) = (0xffff, 0, 0);
    };
    machine.vm.vcpus[0].cpu().edit(real_mode, &msrs).unwrap();
    machine.vm.resume().unwrap();
    assert_eq!(machine.end(), PowerEvent::Reset);
}

#[test]
fn what_firmware_says_of_memory_moves_though_kvm_does_not_list_it() {
    const MASK: u32 = 0x201;
    if kvm_is_missing() {
        return;
    }
    let (mut machine, _) = pc(&[], Mapping::Shared, 2);
    machine.vm.start_pc().unwrap();
    let msrs = machine.vm.msrs.clone();
    let mark = |registers: &mut Registers| {
        let mask = registers.msrs.iter_mut().find(|msr| msr.index == MASK);
        mask.expect("it is saved").data = 0xf_f000_0800;
    };
    machine.vm.vcpus[1].cpu().edit(mark, &msrs).unwrap();
    let (mut copy, _) = pc(&[], Mapping::Shared, 2);
    machine.copy_to(&mut copy);
    for (vcpu, expected) in [(0, 0), (1, 0xf_f000_0800)] {
        let saved = copy.vm.vcpus[vcpu].cpu().save(&msrs, 0).unwrap().registers.msrs;
        let of = |index| saved.iter().filter(move |msr| msr.index == index).map(|msr| msr.data);
        assert_eq!(of(MASK).collect::<Vec<_>>(), [expected]);
        assert_eq!(of(0x2ff).collect::<Vec<_>>(), [0x806]);
    }
}

impl Machine {
    fn half(&self, address: u64) -> u32 {
        self.vm.ram.memory().read_obj(GuestAddress(address)).unwrap()
    }
}

#[test]
fn a_pc_starts_again_when_it_is_reset_and_ends_when_it_powers_off() {
    if kvm_is_missing() {
        return;
    }
    let (mut machine, paper) = pc(power(), Mapping::Shared, 1);
    machine.vm.start_pc().unwrap();
    machine.vm.resume().unwrap();
    assert_eq!(machine.end(), PowerEvent::Reset);
    machine.vm.pause().unwrap();
    assert_eq!(machine.vm.ended(), Some(PowerEvent::Reset));
    // Stopped in between, it asks again.
    assert!(machine.vm.restart().unwrap());
    machine.vm.resume().unwrap();
    assert_eq!(machine.end(), PowerEvent::Reset);
    assert!(machine.vm.restart().unwrap());
    assert_eq!(machine.end(), PowerEvent::Off);
    assert_eq!(machine.half(BOOTS), 2);
    assert!(paper.shows(b"okok"));
}

#[test]
fn a_reset_that_was_asked_for_moves_with_the_machine() {
    if kvm_is_missing() {
        return;
    }
    let (mut original, _) = pc(power(), Mapping::Shared, 1);
    let (mut copy, paper) = pc(power(), Mapping::Private, 1);
    original.vm.start_pc().unwrap();
    original.vm.resume().unwrap();
    assert_eq!(original.end(), PowerEvent::Reset);
    original.vm.pause().unwrap();
    original.copy_to(&mut copy);
    copy.vm.resume().unwrap();
    assert_eq!(copy.end(), PowerEvent::Reset);
    assert!(copy.vm.restart().unwrap());
    assert_eq!(copy.end(), PowerEvent::Off);
    assert!(paper.shows(b"ok"), "only what was printed there");
}

#[test]
fn the_bundled_guests_machine_leaves_a_reset_to_its_owner() {
    if kvm_is_missing() {
        return;
    }
    assert!(!empty(Mapping::Shared).vm.restart().unwrap());
}

#[test]
fn two_vcpus_stop_together_and_go_on_elsewhere_with_their_timer() {
    if kvm_is_missing() {
        return;
    }
    let (mut original, _) = pc(two(), Mapping::Shared, 2);
    let (mut copy, _) = pc(two(), Mapping::Private, 2);
    original.vm.start_pc().unwrap();
    let grows = |machine: &Machine, from: [u32; 3]| {
        let now = [WAKES, TICKS, OTHER].map(|address| machine.half(address));
        now.iter().zip(from).all(|(now, before)| *now > before + 3)
    };
    original.run_until(|machine| grows(machine, [0; 3]));
    let stopped = [WAKES, TICKS, OTHER].map(|address| original.half(address));
    thread::sleep(Duration::from_millis(20));
    assert_eq!(stopped, [WAKES, TICKS, OTHER].map(|address| original.half(address)));

    original.copy_to(&mut copy);
    assert_eq!(stopped, [WAKES, TICKS, OTHER].map(|address| copy.half(address)));
    copy.run_until(|machine| grows(machine, stopped));
    // And the other way round, as after a takeover.
    let stopped = [WAKES, TICKS, OTHER].map(|address| copy.half(address));
    let (mut third, _) = pc(two(), Mapping::Private, 2);
    copy.copy_to(&mut third);
    third.run_until(|machine| grows(machine, stopped));
}

/// Nothing of a PC that has not run since is another after a restore, but its time, which goes on.
/// A leap of a time, far beyond what a test takes: 20 minutes in nanoseconds, some minutes of a counter.
const AHEAD: u64 = 1 << 40;

#[test]
fn a_pc_is_restored_whole_and_its_time_goes_on() {
    if kvm_is_missing() {
        return;
    }
    let (mut original, _) = pc(two(), Mapping::Shared, 2);
    let (mut copy, _) = pc(two(), Mapping::Private, 2);
    original.vm.start_pc().unwrap();
    original.run_until(|machine| machine.half(TICKS) > 3 && machine.half(OTHER) > 3);
    // Two machines on one host would have about the same time without being told.
    let msrs = original.vm.msrs.clone();
    for vcpu in &mut original.vm.vcpus {
        let ahead = |registers: &mut Registers| registers.timing.as_mut().unwrap().tsc += AHEAD;
        vcpu.cpu().edit(ahead, &msrs).unwrap();
    }
    let before = original.vm.save().unwrap();
    copy.vm.check(&before).unwrap();
    copy.vm.restore(&before).unwrap();
    let after = copy.vm.save().unwrap();
    assert_eq!(names(&before), names(&after));
    let (first, second) = (times(&original.vm, &before), times(&copy.vm, &after));
    for (number, (first, second)) in first.iter().zip(&second).enumerate() {
        assert!(second >= first, "time {number} goes back from {first} to {second}");
        assert!(
            second - first < AHEAD / 2,
            "time {number} leaps from {first} to {second}"
        );
    }
    for (mine, other) in before.0.iter().zip(&after.0) {
        if !mine.name.starts_with("vcpu") && mine.name != CHIPSET {
            assert_eq!(mine, other);
        }
    }
    let (mine, other) = (original.vm.decode(&before).unwrap(), copy.vm.decode(&after).unwrap());
    for (mine, other) in mine.cpus.iter().zip(&other.cpus) {
        let (mine, other) = (&mine.registers, &other.registers);
        assert_eq!(mine.regs, other.regs);
        assert_eq!(mine.sregs, other.sregs);
        assert_eq!(mine.run_state, other.run_state);
        assert_eq!(mine.xcrs, other.xcrs);
        assert_eq!(mine.debug, other.debug);
        assert_eq!(mine.events, other.events);
        assert_eq!(mine.xsave.region, other.xsave.region);
        let values = |registers: &Registers| {
            registers
                .msrs
                .iter()
                .map(|msr| (msr.index, msr.data))
                .collect::<Vec<_>>()
        };
        assert_eq!(values(mine), values(other));
        // All of the local APIC but what its timer has counted down to.
        let apic = |registers: &Registers| {
            let mut apic = registers.timing.as_ref().unwrap().apic.regs;
            apic[0x390..0x394].fill(0);
            apic
        };
        assert_eq!(apic(mine), apic(other));
    }
}

fn names(state: &MachineState) -> Vec<&str> {
    state.0.iter().map(|section| &*section.name).collect()
}

/// The counters of a saved machine's vCPUs, and its clock.
fn times(vm: &KvmVm, state: &MachineState) -> Vec<u64> {
    let decoded = vm.decode(state).unwrap();
    let counters = decoded
        .cpus
        .iter()
        .map(|cpu| cpu.registers.timing.as_ref().unwrap().tsc);
    counters.chain([decoded.chipset.unwrap().now]).collect()
}

#[test]
fn check_names_what_does_not_fit_a_pc() {
    if kvm_is_missing() {
        return;
    }
    let (mut machine, _) = pc(two(), Mapping::Shared, 2);
    let (mut single, _) = pc(two(), Mapping::Shared, 1);
    machine.vm.start_pc().unwrap();
    let good = machine.vm.save().unwrap();
    machine.vm.check(&good).unwrap();
    let refused = |vm: &mut KvmVm, state: &MachineState| vm.check(state).unwrap_err();
    assert!(matches!(
        refused(&mut single.vm, &good),
        VmError::State(StateError::Unexpected { section }) if section == "vcpu1"
    ));
    let fewer = single.vm.save().unwrap();
    assert!(matches!(
        refused(&mut machine.vm, &fewer),
        VmError::State(StateError::Missing { section }) if section == "vcpu1"
    ));
    let mut faster = good.clone();
    let at = faster.0.iter().position(|section| section.name == CHIPSET).unwrap();
    let end = faster.0[at].bytes.len();
    faster.0[at].bytes[end - 4..].copy_from_slice(&1_000_u32.to_le_bytes());
    assert!(matches!(
        refused(&mut machine.vm, &faster),
        VmError::Registers(RegisterError::Frequency { saved: 1_000, .. })
    ));
    let mut cut = good.clone();
    cut.0[at].bytes.truncate(end - 1);
    assert!(matches!(
        refused(&mut machine.vm, &cut),
        VmError::State(StateError::Length { .. })
    ));
    machine.vm.check(&good).unwrap();
}
