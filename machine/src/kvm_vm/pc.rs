//! What a machine for Linux has beside the vCPUs and the virtio devices: interrupt lines, chips, old devices, power.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use guest::abi::LOW_MEMORY_END_MAX;
use kvm_ioctls::VmFd;

use crate::boot::BootError;
use crate::boot::linux::{self, Entry};
use crate::devices::Interrupt;
use crate::index;
use crate::memory::GuestRam;
use crate::pc::chipset::{CHIPSET, ChipsetState};
use crate::pc::cmos::{self, Cmos};
use crate::pc::power::Power;
use crate::pc::serial::{self, Serial};
use crate::pc::{self, Layout};
use crate::state::{MachineState, Section, StateError};
use crate::vcpu::Board;
use crate::vcpu::state::RegisterError;
use crate::vm::VmError;

/// What a PC boots, at first and after each reset.
#[derive(Debug)]
pub struct Program {
    /// The kernel, a bzImage or an ELF file with a PVH entry.
    pub kernel: File,
    /// The initial RAM disk.
    pub initrd: Option<File>,
    /// The kernel's command line.
    pub command_line: String,
}

impl Program {
    fn load(&self, ram: &GuestRam, layout: &Layout) -> Result<Entry, BootError> {
        let kernel = read(&self.kernel, "kernel")?;
        let initrd = self.initrd.as_ref().map(|initrd| read(initrd, "initial RAM disk"));
        let initrd = initrd.transpose()?;
        Ok(linux::load(
            ram,
            &kernel,
            initrd.as_deref(),
            &self.command_line,
            layout,
        )?)
    }
}

/// Reads a file from its start. No file that is larger than the largest machine's low memory has a use.
fn read(file: &File, what: &'static str) -> Result<Vec<u8>, BootError> {
    let length = || Ok(index(file.metadata()?.len().min(LOW_MEMORY_END_MAX)));
    let whole = |length| {
        let mut bytes = vec![0; length];
        file.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    };
    length()
        .and_then(whole)
        .map_err(|source| BootError::File { what, source })
}

/// What a PC is made of.
pub struct PcConfig {
    /// The number of its vCPUs, 1 to [`VCPUS_MAX`](crate::VCPUS_MAX).
    pub vcpus: u8,
    /// What the guest writes to its serial port goes there.
    pub serial: Box<dyn Write + Send>,
    /// What it boots.
    pub program: Program,
}

/// The parts of one PC.
pub(super) struct Pc {
    vm: Arc<VmFd>,
    layout: Layout,
    program: Program,
    serial: Arc<Serial>,
    cmos: Arc<Cmos>,
    power: Arc<Power>,
    event: Line,
    /// How fast the time stamp counter is.
    tsc_khz: u32,
    /// The old devices before anything has run.
    reset: [Section; 2],
}

/// A pin of the I/O APIC. It is raised at once, not by an `irqfd`, which has a worker of the kernel's do it for
/// such a pin: so when the devices are at rest, no interrupt is on its way to chips that have been saved.
struct Line {
    vm: Arc<VmFd>,
    gsi: u32,
}

impl Interrupt for Line {
    fn trigger(&self) {
        let raised = self.vm.set_irq_line(self.gsi, true);
        if let Err(error) = raised.and_then(|()| self.vm.set_irq_line(self.gsi, false)) {
            tracing::error!(%error, gsi = self.gsi, "KVM takes no interrupt");
        }
    }
}

impl Pc {
    /// Lays out a PC with virtio devices in so many places.
    pub(super) fn new(config: PcConfig, vm: Arc<VmFd>, places: usize, tsc_khz: u32) -> Self {
        let line = |gsi| Line {
            vm: Arc::clone(&vm),
            gsi,
        };
        let serial = Arc::new(Serial::new(config.serial, Arc::new(line(pc::COM1_GSI))));
        let cmos: Arc<Cmos> = Arc::default();
        Self {
            layout: Layout::new(config.vcpus, places),
            program: config.program,
            reset: [serial.state(), cmos.state()],
            serial,
            cmos,
            power: Arc::default(),
            event: line(pc::EVENT_GSI),
            tsc_khz,
            vm,
        }
    }

    /// Returns the interrupt of the virtio device at this place.
    pub(super) fn line(&self, place: usize) -> Arc<dyn Interrupt> {
        Arc::new(Line {
            vm: Arc::clone(&self.vm),
            gsi: self.layout.slots[place].gsi,
        })
    }

    /// Puts the old devices on the board.
    pub(super) fn connect(&self, board: &mut Board) {
        self.power.connect(&mut board.ports);
        let serial = Arc::clone(&self.serial);
        board.ports.insert(pc::COM1_PORT.into(), pc::COM1_PORTS.into(), serial);
        let cmos = Arc::clone(&self.cmos);
        board.ports.insert(pc::CMOS_PORT.into(), pc::CMOS_PORTS.into(), cmos);
        board.power = Some(Arc::clone(&self.power));
    }

    /// The serial port, for input.
    pub(super) const fn serial(&self) -> &Arc<Serial> {
        &self.serial
    }

    /// Names the sections beside those of the vCPUs and the virtio devices.
    pub(super) fn sections(&self) -> impl Iterator<Item = &'static str> + use<> {
        [CHIPSET, serial::SECTION, cmos::SECTION].into_iter()
    }

    /// Saves all but the vCPUs and the virtio devices.
    pub(super) fn save(&self) -> Result<Vec<Section>, RegisterError> {
        Ok(vec![self.chipset()?.section(), self.serial.state(), self.cmos.state()])
    }

    /// Says whether this PC can go on with this state.
    pub(super) fn check(&self, state: &MachineState, chipset: &ChipsetState) -> Result<(), VmError> {
        chipset.check_frequency(self.tsc_khz)?;
        self.serial.check(state.section(serial::SECTION)?)?;
        self.cmos.check(state.section(cmos::SECTION)?)?;
        Ok(())
    }

    /// Restores all but the vCPUs, the chips and the virtio devices.
    pub(super) fn restore(&self, state: &MachineState) -> Result<(), StateError> {
        self.serial.restore(state.section(serial::SECTION)?)?;
        self.cmos.restore(state.section(cmos::SECTION)?)
    }

    /// Reads the chips' section.
    pub(super) fn decode(state: &MachineState) -> Result<ChipsetState, StateError> {
        ChipsetState::decode(state.section(CHIPSET)?)
    }

    /// Saves the chips of a machine whose vCPUs are stopped.
    pub(super) fn chipset(&self) -> Result<ChipsetState, RegisterError> {
        ChipsetState::save(&self.vm, self.tsc_khz)
    }

    /// Brings the old devices to their state at a start, and loads the kernel. Returns how it is entered.
    pub(super) fn load(&self, ram: &GuestRam) -> Result<Entry, BootError> {
        let [serial, cmos] = &self.reset;
        self.serial.restore(serial).expect("the port's own state");
        self.cmos.restore(cmos).expect("the clock's own state");
        self.program.load(ram, &self.layout)
    }

    /// Tells the guest that it goes on from a copy of its past: its random state must be another from here on.
    pub(super) fn reseed(&self, ram: &GuestRam, seed: [u8; 32]) {
        let (id, _) = seed.split_first_chunk().expect("a seed is longer than an identity");
        pc::generation::write(ram, *id);
        self.event.trigger();
    }
}
