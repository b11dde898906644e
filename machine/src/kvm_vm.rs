//! The machine on KVM: one vCPU, memory, and the virtio devices, put together.
//!
//! It is made paused and empty. Then it is either booted, or restored from what another machine has
//! saved. The order of stopping and starting matters: the vCPU stops before the devices, so that no
//! request comes after a device is at rest, and starts after them.

use std::io::{self, Write};
use std::sync::Arc;

use guest::abi::{VIRTIO_BASE, VIRTIO_STRIDE};
use kvm_bindings::CpuId;
use kvm_ioctls::{IoEventAddress, VmFd};
use thiserror::Error;

use crate::PageSet;
use crate::boot::{self, BootError};
use crate::bus::Bus;
use crate::clock::{self, GuestClock};
use crate::devices::block::{self, Block};
use crate::devices::console::Console;
use crate::devices::entropy::{Entropy, EntropySource};
use crate::devices::net::{self, Net};
use crate::devices::{DeviceError, Turns, VirtioMmio};
use crate::dirty::DirtyLog;
use crate::doorbell::{Doorbell, Interrupt};
use crate::kvm::{Host, HostError, refused};
use crate::memory::{GuestRam, Mapping, MemoryError};
use crate::state::{MachineState, Reader, StateError, Writer};
use crate::vcpu::state::{MsrList, Scratch};
use crate::vcpu::{CpuState, PowerEvent, PowerHook, Vcpu};
use crate::vm::{Vm, VmError};

const VCPU: &str = "vcpu";
const VCPU_VERSION: u32 = 1;

/// What a network card is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CardConfig {
    /// Its hardware address.
    pub mac: [u8; 6],
    /// Whether the guest may leave checksums, and the cutting of long TCP segments, to the network.
    pub offloads: bool,
}

/// What a machine is made of.
pub struct MachineConfig {
    /// Bytes of RAM, a multiple of 2 MiB.
    pub memory_bytes: u64,
    /// Whose writes reach the committed memory image.
    pub mapping: Mapping,
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
    /// The vCPU's thread can't be made.
    #[error("the host refuses a thread for the guest's processor: raise its limits (ulimit -u)")]
    Thread(#[source] io::Error),
}

/// A machine on KVM.
pub struct KvmVm {
    // The vCPU goes first, so that nothing uses the rest when it goes.
    vcpu: Vcpu,
    devices: Devices,
    doorbell: Arc<Doorbell>,
    dirty: DirtyLog,
    vm: VmFd,
    ram: GuestRam,
    msrs: MsrList,
    cpuid: CpuId,
    scratch: Option<Scratch>,
    host: Host,
    life: Life,
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

/// The name of a network card's section; that of the first is what it was when there was no other.
fn net_name(card: usize) -> String {
    match card {
        0 => "net".to_owned(),
        card => format!("net{card}"),
    }
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
        let cpuid = host.cpuid()?;
        let ram = GuestRam::new(config.memory_bytes, config.mapping)?;
        let vm = host.create_vm()?;
        let dirty = DirtyLog::new(&vm, &ram)?;
        let doorbell = Arc::new(Doorbell::default());
        let line = || Arc::clone(&doorbell) as Arc<dyn Interrupt>;
        let memory = || ram.memory().clone();
        assert_eq!(
            config.cards.len(),
            networks.len(),
            "there is a network behind each card"
        );
        let cards = config.cards.iter().zip(networks).enumerate();
        let nets = cards.map(|(number, (card, network))| {
            Net::new(&net_name(number), card.mac, card.offloads, network, memory(), line())
        });
        let devices = Devices::new(
            nets.collect::<Result<_, _>>()?,
            Block::new("block", "tandem", block, memory(), line())?,
            &Console::new("console", config.console, memory(), line())?,
            Entropy::new("entropy", EntropySource::Host, memory(), line())?,
        );
        let bus = connect(&vm, &devices)?;
        let fd = host.create_vcpu(&vm, &cpuid)?;
        let clock = GuestClock::new(&fd)?;
        let vcpu = Vcpu::new(fd, ram.clone(), clock, Arc::clone(&doorbell), bus, config.on_power)
            .map_err(BuildError::Thread)?;
        // The trials of MSRs may leave strange values, so they are not made on the vCPU for the checks.
        let msrs = Scratch::new(&host, &cpuid)?.msrs(&host)?;
        let life = Life::Paused;
        Ok(Self {
            vcpu,
            devices,
            doorbell,
            dirty,
            vm,
            ram,
            msrs,
            cpuid,
            scratch: None,
            host,
            life,
        })
    }

    /// Loads the guest's image, an ELF program for the interface in `guest::abi`, and makes it ready to
    /// start at guest time 0.
    ///
    /// # Panics
    /// If the machine is not paused.
    pub fn boot(&mut self, image: &[u8], command_line: &str) -> Result<(), BootError> {
        self.assert_paused();
        let entry = boot::load(&self.ram, image, command_line, self.devices.all().len() as u64)?;
        let mut cpu = self.vcpu.cpu();
        cpu.edit(|registers| boot::start_at(entry, registers), &self.msrs)?;
        cpu.clock.set(0, self.ram.memory());
        Ok(())
    }

    /// Says how the guest has ended, if it has. A machine that runs has not.
    pub fn ended(&mut self) -> Option<PowerEvent> {
        if self.life == Life::Running {
            None
        } else {
            self.vcpu.cpu().ended().cloned()
        }
    }

    fn assert_paused(&self) {
        assert_eq!(self.life, Life::Paused, "the machine is paused first");
    }

    /// Reads the vCPU's section, and says that there is one section for each part and no other.
    fn decode(&self, state: &MachineState) -> Result<CpuState, StateError> {
        let devices = self.devices.all();
        let known = |name: &str| name == VCPU || devices.iter().any(|device| device.name() == name);
        for (number, section) in state.0.iter().enumerate() {
            let twice = state.0[..number].iter().any(|earlier| earlier.name == section.name);
            if twice || !known(&section.name) {
                return Err(StateError::Unexpected {
                    section: section.name.clone(),
                });
            }
        }
        let mut reader = Reader::new(state.section(VCPU)?, VCPU_VERSION)?;
        let cpu = CpuState::decode(&mut reader)?;
        reader.end()?;
        Ok(cpu)
    }

    /// Loads the registers on a vCPU that never runs, made anew if an earlier trial has failed there.
    fn try_registers(&mut self, cpu: &CpuState) -> Result<(), VmError> {
        let scratch = match self.scratch.take() {
            Some(scratch) => scratch,
            None => Scratch::new(&self.host, &self.cpuid)?,
        };
        scratch.try_load(&cpu.registers)?;
        self.scratch = Some(scratch);
        Ok(())
    }
}

impl Vm for KvmVm {
    fn pause(&mut self) -> Result<(), VmError> {
        if self.life == Life::Running {
            self.vcpu.pause().map_err(VmError::Stop)?;
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
        self.life = Life::Running;
        for device in self.devices.all() {
            device.thaw();
        }
        self.vcpu.resume();
        Ok(())
    }

    fn save(&mut self) -> Result<MachineState, VmError> {
        self.assert_paused();
        let cpu = self.vcpu.cpu();
        if let Some(PowerEvent::Crashed { reason }) = cpu.ended() {
            return Err(VmError::Crashed { reason: reason.clone() });
        }
        let mut writer = Writer::new();
        cpu.save(&self.msrs)?.encode(&mut writer);
        drop(cpu);
        let mut sections = vec![writer.finish(VCPU, VCPU_VERSION)];
        sections.extend(self.devices.all().iter().map(|device| device.state()));
        Ok(MachineState(sections))
    }

    fn check(&mut self, state: &MachineState) -> Result<(), VmError> {
        let cpu = self.decode(state)?;
        for device in self.devices.all() {
            device.check(state.section(device.name())?)?;
        }
        self.try_registers(&cpu)
    }

    fn restore(&mut self, state: &MachineState) -> Result<(), VmError> {
        self.assert_paused();
        self.life = Life::Poisoned;
        let saved = self.decode(state)?;
        let mut cpu = self.vcpu.cpu();
        cpu.load(&saved)?;
        cpu.clock.set(saved.now, self.ram.memory());
        drop(cpu);
        for device in self.devices.all() {
            device.restore(state.section(device.name())?)?;
        }
        // What was reported but not yet seen is not saved: the guest looks once for nothing instead.
        self.doorbell.trigger();
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
        clock::reseed(self.ram.memory(), seed);
    }
}

/// Puts the devices on the bus, at rest, and lets KVM take their notifications.
fn connect(vm: &VmFd, devices: &Devices) -> Result<Bus, BuildError> {
    let mut bus = Bus::default();
    for (device, base) in devices
        .all()
        .iter()
        .zip((VIRTIO_BASE..).step_by(crate::index(VIRTIO_STRIDE)))
    {
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
