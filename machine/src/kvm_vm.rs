//! The machine on KVM: vCPUs, memory, and the virtio devices, put together.
//!
//! It is made paused and empty. Then it is either booted, or restored from what another machine has
//! saved. The order of stopping and starting matters: the vCPUs stop before the devices, so that no
//! request comes after a device is at rest, and start after them. What a PC has beyond that is in [`pc`].

mod pc;

use std::io::{self, Write};
use std::sync::Arc;

use guest::abi::VIRTIO_STRIDE;
use kvm_bindings::{CpuId, kvm_msr_entry};
use kvm_ioctls::{IoEventAddress, VmFd};
use thiserror::Error;

use self::pc::Pc;
pub use self::pc::{PcConfig, Program};
use crate::PageSet;
use crate::boot::{self, BootError, linux};
use crate::bus::Bus;
use crate::clock::{self, GuestClock};
use crate::cpu::CpuModel;
use crate::devices::block::{self, Block};
use crate::devices::console::Console;
use crate::devices::entropy::{Entropy, EntropySource};
use crate::devices::net::{self, CardConfig, Net};
use crate::devices::{DeviceError, Turns, VirtioMmio};
use crate::dirty::DirtyLog;
use crate::doorbell::{Doorbell, Interrupt};
use crate::kvm::{Chips, Host, HostError, refused};
use crate::memory::{GuestRam, Mapping, MemoryError};
use crate::pc::chipset::ChipsetState;
use crate::pc::serial::Serial;
use crate::state::{MachineState, Reader, StateError, Writer};
use crate::vcpu::state::{MsrList, RegisterError, Scratch};
use crate::vcpu::{Board, CpuState, PowerEvent, PowerHook, Vcpu};
use crate::vm::{Vm, VmError};

const VCPU_VERSION: u32 = 2;

/// What kind of guest a machine is made for.
pub enum Platform {
    /// The bundled guest: one vCPU and no interrupts. It waits at its doorbell, and reads the time from a page.
    Bundled,
    /// A PC, on which Linux runs.
    Pc(PcConfig),
}

/// What a machine is made of.
pub struct MachineConfig {
    /// Bytes of RAM, a multiple of 2 MiB.
    pub memory_bytes: u64,
    /// The CPU that the guest sees, which this host must be able to give.
    pub cpu: CpuModel,
    /// Whose writes reach the committed memory image.
    pub mapping: Mapping,
    /// What kind of guest it is for.
    pub platform: Platform,
    /// The network cards.
    pub cards: Vec<CardConfig>,
    /// What the guest prints goes there.
    pub console: Box<dyn Write + Send>,
    /// Learns when the guest has ended.
    pub on_power: PowerHook,
}

/// Why a machine can't be made.
#[derive(Debug, Error)]
pub enum BuildError {
    /// The host can't run it.
    #[error(transparent)]
    Host(#[from] HostError),
    /// It can't have this memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A device can't be made.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The registers that it starts with can't be saved.
    #[error(transparent)]
    Registers(#[from] RegisterError),
    /// The vCPU's thread can't be made.
    #[error("the host refuses a thread for the guest's processor: raise its limits (ulimit -u)")]
    Thread(#[source] io::Error),
}

/// A machine on KVM.
pub struct KvmVm {
    // The vCPUs go first, so that nothing uses the rest when it goes.
    vcpus: Vec<Vcpu>,
    devices: Devices,
    kind: Kind,
    dirty: DirtyLog,
    vm: Arc<VmFd>,
    ram: GuestRam,
    msrs: MsrList,
    cpuids: Vec<CpuId>,
    /// What of each vCPU's MSRs is settled since it runs; nothing before.
    lasting: Vec<Vec<kvm_msr_entry>>,
    scratch: Option<Scratch>,
    host: Host,
    /// What the vCPUs and chips of a PC are like before anything has run.
    reset: Option<Decoded>,
    life: Life,
}

/// What only one kind of machine has.
enum Kind {
    Bundled(Arc<Doorbell>),
    Pc(Box<Pc>),
}

impl Kind {
    const fn chips(&self) -> Chips {
        match self {
            Self::Bundled(_) => Chips::None,
            Self::Pc(_) => Chips::Pc,
        }
    }

    /// Returns the interrupt of the device at this place on the bus.
    fn line(&self, place: usize) -> Arc<dyn Interrupt> {
        match self {
            Self::Bundled(doorbell) => Arc::clone(doorbell) as _,
            Self::Pc(pc) => pc.line(place),
        }
    }

    /// Adds what the guest reaches beside the virtio devices.
    fn board(&self, bus: Bus) -> Board {
        let mut board = Board {
            bus,
            ..Board::default()
        };
        match self {
            Self::Bundled(doorbell) => board.doorbell = Some(Arc::clone(doorbell)),
            Self::Pc(pc) => pc.connect(&mut board),
        }
        board
    }
}

/// Everything that a machine's sections say.
struct Decoded {
    cpus: Vec<CpuState>,
    chipset: Option<ChipsetState>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    Paused,
    /// It runs, or did not stop in full.
    Running,
    Poisoned,
}

struct Devices {
    nets: Vec<Net>,
    block: Block,
    entropy: Entropy,
    /// All of them, in the order of their places on the bus.
    all: Vec<Arc<VirtioMmio>>,
}

impl Devices {
    /// The devices that each machine has one of.
    const BESIDE_CARDS: usize = 3;

    fn new(nets: Vec<Net>, block: Block, console: &Console, entropy: Entropy) -> Self {
        let mut all: Vec<_> = nets.iter().map(|net| Arc::clone(net.mmio())).collect();
        all.extend([block.mmio(), console.mmio(), entropy.mmio()].map(Arc::clone));
        Self {
            nets,
            block,
            entropy,
            all,
        }
    }

    fn all(&self) -> &[Arc<VirtioMmio>] {
        &self.all
    }
}

/// The name of one part's section; that of the first is what it is where there is no other.
fn numbered(part: &str, number: usize) -> String {
    match number {
        0 => part.to_owned(),
        number => format!("{part}{number}"),
    }
}

fn vcpu_name(number: usize) -> String {
    numbered("vcpu", number)
}

impl KvmVm {
    /// Makes a machine, paused and empty, with one of these networks behind each of its cards.
    ///
    /// # Panics
    /// If there is not one network for each hardware address.
    pub fn new(
        config: MachineConfig,
        networks: Vec<Box<dyn net::Backend>>,
        block: Box<dyn block::Backend>,
    ) -> Result<Self, BuildError> {
        let host = Host::open()?;
        let ram = GuestRam::new(config.memory_bytes, config.mapping)?;
        assert_eq!(
            config.cards.len(),
            networks.len(),
            "there is a network behind each card"
        );
        let places = config.cards.len() + Devices::BESIDE_CARDS;
        let (chips, count) = match &config.platform {
            Platform::Bundled => (Chips::None, 1),
            Platform::Pc(pc) => (Chips::Pc, pc.vcpus),
        };
        let vm = Arc::new(host.create_vm(chips)?);
        let cpuids: Vec<_> = (0..count)
            .map(|number| config.cpu.cpuid_for(number, count, chips == Chips::Pc))
            .collect();
        let fds = (0..).zip(&cpuids);
        let fds = fds.map(|(number, cpuid)| host.create_vcpu(&vm, number, cpuid));
        let fds: Vec<_> = fds.collect::<Result<_, _>>()?;
        let (kind, clock) = match config.platform {
            Platform::Bundled => (Kind::Bundled(Arc::default()), Some(GuestClock::new(&fds[0])?)),
            Platform::Pc(pc) => {
                let tsc_khz = clock::tsc_khz(&fds[0])?;
                (Kind::Pc(Box::new(Pc::new(pc, Arc::clone(&vm), places, tsc_khz))), None)
            }
        };
        let dirty = DirtyLog::new(&vm, &ram)?;
        let memory = || ram.memory().clone();
        let cards = config.cards.iter().zip(networks).enumerate();
        let nets = cards.map(|(number, (card, network))| {
            let name = numbered("net", number);
            Net::new(&name, *card, network, memory(), kind.line(number))
        });
        let nets: Vec<_> = nets.collect::<Result<_, _>>()?;
        let line = |place| kind.line(config.cards.len() + place);
        let devices = Devices::new(
            nets,
            Block::new("block", "tandem", block, memory(), line(0))?,
            &Console::new("console", config.console, memory(), line(1))?,
            Entropy::new("entropy", EntropySource::Host, memory(), line(2))?,
        );
        let board = Arc::new(kind.board(connect(&vm, &devices)?));
        let start = |fd| Vcpu::new(fd, ram.clone(), clock, &board, &config.on_power);
        let vcpus = fds.into_iter().map(start).collect::<Result<_, _>>();
        // The trials of MSRs may leave strange values, so they are not made on the vCPUs for the checks.
        let msrs = Scratch::new(&host, chips, &cpuids)?.msrs(&config.cpu.msrs);
        let mut machine = Self {
            vcpus: vcpus.map_err(BuildError::Thread)?,
            devices,
            kind,
            dirty,
            vm,
            ram,
            msrs,
            cpuids,
            lasting: Vec::new(),
            scratch: None,
            host,
            reset: None,
            life: Life::Paused,
        };
        if let Kind::Pc(pc) = &machine.kind {
            let chipset = Some(pc.chipset()?);
            let mut cpus = machine.save_cpus()?;
            for cpu in &mut cpus {
                linux::firmware(&mut cpu.registers);
            }
            machine.reset = Some(Decoded { cpus, chipset });
        }
        Ok(machine)
    }

    /// Loads the bundled guest's image, an ELF program for the interface in `guest::abi`, and makes it ready to
    /// start at guest time 0.
    ///
    /// # Panics
    /// If the machine is not paused, or made for another guest.
    pub fn boot(&mut self, image: &[u8], command_line: &str) -> Result<(), BootError> {
        self.assert_paused();
        let entry = boot::load(&self.ram, image, command_line, self.devices.all().len() as u64)?;
        let mut cpu = self.vcpus[0].cpu();
        cpu.edit(|registers| boot::start_at(entry, registers), &self.msrs)?;
        let clock = cpu
            .clock
            .as_mut()
            .expect("the bundled guest's machine has a clock page");
        clock.set(0, self.ram.memory());
        Ok(())
    }

    /// Loads the kernel of a PC and makes it ready to start, as it is switched on or reset.
    ///
    /// # Panics
    /// If the machine is not paused, or no PC.
    pub fn start_pc(&mut self) -> Result<(), BootError> {
        self.assert_paused();
        let (Kind::Pc(pc), Some(reset)) = (&self.kind, self.reset.take()) else {
            panic!("the machine is a PC");
        };
        for device in self.devices.all() {
            device.reset();
        }
        let entry = pc.load(&self.ram)?;
        let loaded = self.load_cpus(&reset);
        self.reset = Some(reset);
        loaded?;
        let cpu = self.vcpus[0].cpu();
        Ok(cpu.edit(|registers| linux::start_at(entry, &self.ram, registers), &self.msrs)?)
    }

    /// Returns the serial port of a PC, for input.
    #[must_use]
    pub fn serial(&self) -> Option<Arc<Serial>> {
        match &self.kind {
            Kind::Bundled(_) => None,
            Kind::Pc(pc) => Some(Arc::clone(pc.serial())),
        }
    }

    /// Says how the guest has ended, if it has: of several vCPUs' ends the worst. A machine that runs has not.
    pub fn ended(&mut self) -> Option<PowerEvent> {
        if self.life == Life::Running {
            None
        } else {
            let ends = self.vcpus.iter_mut().filter_map(|vcpu| vcpu.cpu().ended().cloned());
            ends.max_by_key(|end| match end {
                PowerEvent::Reset => 0,
                PowerEvent::Off => 1,
                PowerEvent::Panic => 2,
                PowerEvent::Crashed { .. } => 3,
            })
        }
    }

    fn assert_paused(&self) {
        assert_eq!(self.life, Life::Paused, "the machine is paused first");
    }

    /// Returns the names of all sections of this machine, in their order.
    fn sections(&self) -> Vec<String> {
        let mut names: Vec<_> = (0..self.vcpus.len()).map(vcpu_name).collect();
        if let Kind::Pc(pc) = &self.kind {
            names.extend(pc.sections().map(str::to_owned));
        }
        names.extend(self.devices.all().iter().map(|device| device.name().to_owned()));
        names
    }

    /// Reads what belongs to the vCPUs, and says that there is one section for each part and no other.
    fn decode(&self, state: &MachineState) -> Result<Decoded, StateError> {
        let known = self.sections();
        for (number, section) in state.0.iter().enumerate() {
            let twice = state.0[..number].iter().any(|earlier| earlier.name == section.name);
            if twice || !known.contains(&section.name) {
                return Err(StateError::Unexpected {
                    section: section.name.clone(),
                });
            }
        }
        let chips = self.kind.chips();
        let cpu = |number| {
            let mut reader = Reader::new(state.section(&vcpu_name(number))?, VCPU_VERSION)?;
            let cpu = CpuState::decode(&mut reader, chips)?;
            reader.end()?;
            Ok(cpu)
        };
        Ok(Decoded {
            cpus: (0..self.vcpus.len()).map(cpu).collect::<Result<_, _>>()?,
            chipset: match &self.kind {
                Kind::Bundled(_) => None,
                Kind::Pc(_) => Some(Pc::decode(state)?),
            },
        })
    }

    /// Loads the registers on vCPUs that never run, made anew if an earlier trial has failed there.
    fn try_registers(&mut self, decoded: &Decoded) -> Result<(), VmError> {
        let scratch = match self.scratch.take() {
            Some(scratch) => scratch,
            None => Scratch::new(&self.host, self.kind.chips(), &self.cpuids)?,
        };
        let registers = decoded.cpus.iter().map(|cpu| &cpu.registers);
        scratch.try_load(registers, decoded.chipset.as_ref())?;
        self.scratch = Some(scratch);
        Ok(())
    }

    /// Saves the vCPUs, at one moment.
    fn save_cpus(&mut self) -> Result<Vec<CpuState>, RegisterError> {
        let at = clock::host_tsc();
        let save = |vcpu: &mut Vcpu| vcpu.cpu().save(&self.msrs, at);
        self.vcpus.iter_mut().map(save).collect()
    }

    /// Loads the vCPUs, at one moment, and after them what they share: interrupts that are on their way then reach them.
    fn load_cpus(&mut self, decoded: &Decoded) -> Result<(), RegisterError> {
        let at = clock::host_tsc();
        for (vcpu, saved) in self.vcpus.iter_mut().zip(&decoded.cpus) {
            vcpu.cpu().load(saved, at)?;
        }
        if let Some(chipset) = &decoded.chipset {
            chipset.load(&self.vm)?;
        }
        Ok(())
    }
}

impl Vm for KvmVm {
    fn pause(&mut self) -> Result<(), VmError> {
        if self.life == Life::Running {
            // All are asked before the first is waited for: they stop together.
            for vcpu in &self.vcpus {
                vcpu.ask_to_stop().map_err(VmError::Stop)?;
            }
            for vcpu in &self.vcpus {
                vcpu.wait_until_stopped().map_err(VmError::Stop)?;
            }
            for device in self.devices.all() {
                device.freeze()?;
            }
            self.life = Life::Paused;
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        if self.life == Life::Poisoned {
            return Err(VmError::Poisoned);
        }
        // After a pause that failed: one that was slow to stop would stop yet, and never go on.
        for vcpu in self.vcpus.iter().filter(|vcpu| vcpu.is_asked_to_stop()) {
            vcpu.wait_until_stopped().map_err(VmError::Stop)?;
        }
        // A guest that has ended says so again, and does nothing else.
        let ended = self.ended().is_some();
        if self.lasting.is_empty() {
            let read = |vcpu: &mut Vcpu| vcpu.cpu().lasting_msrs(&self.msrs);
            self.lasting = self.vcpus.iter_mut().map(read).collect::<Result<_, _>>()?;
        }
        self.life = Life::Running;
        for device in self.devices.all() {
            device.thaw();
        }
        for vcpu in &mut self.vcpus {
            if !ended || vcpu.cpu().ended().is_some() {
                vcpu.resume();
            }
        }
        Ok(())
    }

    fn restart(&mut self) -> Result<bool, VmError> {
        if self.reset.is_none() {
            return Ok(false);
        }
        if self.life == Life::Running {
            self.pause()?;
            // Another state may have been loaded since the guest asked.
            if self.ended() == Some(PowerEvent::Reset) {
                self.start_pc()?;
            }
            self.resume()?;
        }
        Ok(true)
    }

    fn save(&mut self) -> Result<MachineState, VmError> {
        self.assert_paused();
        if let Some(PowerEvent::Crashed { reason }) = self.ended() {
            return Err(VmError::Crashed { reason });
        }
        let cpus = self.save_cpus()?;
        let sections = cpus.iter().enumerate().map(|(number, cpu)| {
            let mut writer = Writer::new();
            cpu.encode(&mut writer);
            writer.finish(vcpu_name(number), VCPU_VERSION)
        });
        let mut sections: Vec<_> = sections.collect();
        if let Kind::Pc(pc) = &self.kind {
            sections.extend(pc.save()?);
        }
        sections.extend(self.devices.all().iter().map(|device| device.state()));
        Ok(MachineState(sections))
    }

    fn check(&mut self, state: &MachineState) -> Result<(), VmError> {
        let decoded = self.decode(state)?;
        for device in self.devices.all() {
            device.check(state.section(device.name())?)?;
        }
        if let (Kind::Pc(pc), Some(chipset)) = (&self.kind, &decoded.chipset) {
            pc.check(state, chipset)?;
        }
        for (cpu, lasting) in decoded.cpus.iter().zip(&self.lasting) {
            cpu.registers.check_lasting(lasting)?;
        }
        self.try_registers(&decoded)
    }

    fn restore(&mut self, state: &MachineState) -> Result<(), VmError> {
        self.assert_paused();
        self.life = Life::Poisoned;
        let decoded = self.decode(state)?;
        self.load_cpus(&decoded)?;
        for device in self.devices.all() {
            device.restore(state.section(device.name())?)?;
        }
        match &self.kind {
            Kind::Bundled(doorbell) => {
                let mut cpu = self.vcpus[0].cpu();
                let clock = cpu
                    .clock
                    .as_mut()
                    .expect("the bundled guest's machine has a clock page");
                clock.set(decoded.cpus[0].now, self.ram.memory());
                // What was reported but not yet seen is not saved: the guest looks once for nothing instead.
                doorbell.trigger();
            }
            Kind::Pc(pc) => {
                pc.restore(state)?;
                for device in self.devices.all() {
                    device.report_again();
                }
                for vcpu in &mut self.vcpus {
                    vcpu.cpu().tell_of_pause();
                }
            }
        }
        self.life = Life::Paused;
        Ok(())
    }

    fn dirty_now(&mut self) -> Result<PageSet, VmError> {
        Ok(self.dirty.peek(&self.vm, &self.ram)?)
    }

    fn clear_dirty(&mut self, pages: &PageSet) -> Result<(), VmError> {
        Ok(self.dirty.clear(&self.vm, &self.ram, pages)?)
    }

    fn take_dirty(&mut self) -> Result<PageSet, VmError> {
        Ok(self.dirty.take(&self.vm, &self.ram)?)
    }

    fn put_back_dirty(&mut self, pages: &PageSet) {
        self.dirty.put_back(pages);
    }

    fn ram(&self) -> GuestRam {
        self.ram.clone()
    }

    fn set_backends(
        &mut self,
        nets: Vec<Box<dyn net::Backend>>,
        block: Box<dyn block::Backend>,
    ) -> Result<(), VmError> {
        self.assert_paused();
        self.devices.block.set_backend(block)?;
        assert_eq!(
            nets.len(),
            self.devices.nets.len(),
            "there is a network behind each card"
        );
        for (card, net) in self.devices.nets.iter().zip(nets) {
            card.set_backend(net);
        }
        Ok(())
    }

    fn net_turns(&self) -> Vec<Turns> {
        self.devices.nets.iter().map(|card| card.mmio().turns()).collect()
    }

    fn set_entropy_seed(&mut self, seed: Option<[u8; 32]>) {
        self.devices.entropy.set_seed(seed);
    }

    fn reseed(&mut self, seed: [u8; 32]) {
        self.assert_paused();
        match &self.kind {
            Kind::Bundled(_) => clock::reseed(self.ram.memory(), seed),
            Kind::Pc(pc) => pc.reseed(&self.ram, seed),
        }
    }
}

/// Puts the devices on the bus, at rest, and lets KVM take their notifications.
fn connect(vm: &VmFd, devices: &Devices) -> Result<Bus, BuildError> {
    let mut bus = Bus::default();
    for (device, base) in devices.all().iter().zip(crate::pc::device_bases()) {
        device.freeze()?;
        for notifier in device.notifiers()? {
            let address = IoEventAddress::Mmio(base + notifier.offset);
            vm.register_ioevent(&notifier.fd, &address, notifier.datamatch)
                .map_err(refused("take a device's notifications"))?;
        }
        bus.insert(base, VIRTIO_STRIDE, Arc::clone(device) as _);
    }
    Ok(bus)
}

#[cfg(test)]
mod tests;
