//! A PC on the host's KVM, with tiny kernels in 32-bit machine code: it starts, prints, is copied, and ends.

use std::fs::File;
use std::sync::Mutex;

use rustix::fs::MemfdFlags;

use super::*;
use crate::boot::linux::tests::elf;

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

/// A PC of two vCPUs with this kernel, and what it prints.
fn pc(code: &[u8], mapping: Mapping) -> (Machine, Paper) {
    let (report, ends) = mpsc::channel();
    let paper = Paper::default();
    let config = MachineConfig {
        memory_bytes: PC_MEMORY,
        mapping,
        platform: Platform::Pc(PcConfig {
            vcpus: 2,
            serial: Box::new(paper.clone()),
            program: Program {
                kernel: file(&elf(code)),
                initrd: None,
                command_line: String::new(),
            },
        }),
        cards: Vec::new(),
        console: Box::new(io::sink()),
        on_power: Arc::new(move |event| drop(report.send(event))),
    };
    let vm = KvmVm::new(config, Vec::new(), Box::new(Blank(1 << 20))).unwrap();
    (Machine { vm, ends }, paper)
}

#[test]
fn prints_and_powers_off() {
    if kvm_is_missing() {
        return;
    }
    let (mut machine, paper) = pc(PRINTS, Mapping::Shared);
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
    let (mut machine, paper) = pc(ECHOES, Mapping::Shared);
    machine.vm.start_pc().unwrap();
    let input = |machine: &Machine, text: &[u8]| {
        assert_eq!(machine.vm.serial().unwrap().input(text), text.len());
    };
    input(&machine, b"first");
    machine.run_until(|_| paper.shows(b"first"));
    input(&machine, b"second");
    let (mut copy, other) = pc(ECHOES, Mapping::Private);
    machine.copy_to(&mut copy);
    copy.run_until(|_| other.shows(b"second"));
    assert!(paper.shows(b"first"), "the paused machine has printed nothing more");
}

#[test]
fn a_jump_to_where_a_processor_starts_is_a_reset() {
    if kvm_is_missing() {
        return;
    }
    let (mut machine, _) = pc(&[], Mapping::Shared);
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
