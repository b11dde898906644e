//! One device slot: the registers of the virtio-mmio transport, the device behind them, and its worker.
//!
//! ```text
//!   reset ──FEATURES_OK, queues ready, DRIVER_OK──► active ──hostile queue──► needs reset
//!     ▲───────────────────── status = 0 ───────────────┴────────────────────────────┘
//! ```
//!
//! vCPU threads read and write registers; whoever runs the machine freezes, saves, restores and thaws.
//! Never touches guest memory itself; the worker does, and only while it is not frozen.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_STATUS,
};
use vmm_sys_util::eventfd::EventFd;

use super::persist::Saved;
use super::queue::{QueueError, Ring};
use super::registers::{Effect, Identity, Registers};
use super::worker::{Core, Shared, Turns, Worker};
use super::{Device, DeviceError, EVENT_IDX, FREEZE_LIMIT, VERSION_1, lock};
use crate::devices::Interrupt;
use crate::memory::Memory;
use crate::state::{Section, StateError};

/// An event that stands for a write to a queue's notification register, for `KVM_IOEVENTFD`.
#[derive(Debug)]
pub struct Notifier {
    /// Where in the device's window the guest writes.
    pub offset: u64,
    /// The 32-bit value that it writes.
    pub datamatch: u32,
    /// What the write signals.
    pub fd: EventFd,
}

/// One device slot.
pub struct VirtioMmio {
    identity: Identity,
    registers: Mutex<Registers>,
    worker: Worker,
}

impl VirtioMmio {
    pub(crate) fn new(
        name: &str,
        device: Box<dyn Device>,
        ram: Memory,
        line: Arc<dyn Interrupt>,
    ) -> Result<Self, DeviceError> {
        let identity = Identity {
            kind: device.kind(),
            features: device.features() | VERSION_1 | EVENT_IDX,
            config: device.config(),
        };
        let registers = Mutex::new(Registers::new(device.queues()));
        let worker = Worker::start(name, device, ram, line).map_err(|(what, source)| DeviceError::Start {
            device: name.to_owned(),
            what,
            source,
        })?;
        Ok(Self {
            identity,
            registers,
            worker,
        })
    }

    /// The device's name, which is also its section's.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.shared().name
    }

    /// Answers a read of the vCPU at `offset` in the device's window.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Ok(offset) = u32::try_from(offset) else { return };
        if let Some(start) = offset.checked_sub(VIRTIO_MMIO_CONFIG) {
            let start = crate::index(start.into()).min(self.identity.config.len());
            for (to, from) in data.iter_mut().zip(&self.identity.config[start..]) {
                *to = *from;
            }
        } else if let Ok(data) = <&mut [u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
        {
            let value = match offset {
                VIRTIO_MMIO_INTERRUPT_STATUS => self.shared().interrupt_status(),
                VIRTIO_MMIO_STATUS => self.status(),
                _ => self.registers().read(offset, &self.identity),
            };
            *data = value.to_le_bytes();
        }
    }

    /// Carries out a write of the vCPU at `offset` in the device's window.
    pub fn write(&self, offset: u64, data: &[u8]) {
        // No device here has a configuration that can be written.
        let Ok(data) = <[u8; 4]>::try_from(data) else { return };
        let Some(offset) = u32::try_from(offset)
            .ok()
            .filter(|offset| offset.is_multiple_of(4) && *offset < VIRTIO_MMIO_CONFIG)
        else {
            return;
        };
        let mut registers = self.registers();
        match registers.write(offset, u32::from_le_bytes(data), &self.identity, &self.shared().ram) {
            Effect::None => {}
            Effect::Notify => self.shared().kick(),
            Effect::Acknowledge(bits) => self.shared().acknowledge(bits),
            Effect::Activate => self.activate(&registers),
            Effect::Reset => self.reset_locked(&mut registers),
        }
    }

    /// Duplicates the events that stand for the queues' notifications.
    pub fn notifiers(&self) -> Result<Vec<Notifier>, DeviceError> {
        let offset = VIRTIO_MMIO_QUEUE_NOTIFY.into();
        let clone = |datamatch: u32| {
            let kick = self.shared().kick.try_clone();
            kick.map(|fd| Notifier { offset, datamatch, fd })
                .map_err(|source| DeviceError::Start {
                    device: self.name().to_owned(),
                    what: "a descriptor",
                    source,
                })
        };
        (0..).take(self.shared().queues).map(clone).collect()
    }

    /// Brings the device to rest: no request is in flight, and guest memory is not touched until
    /// [`VirtioMmio::thaw`]. What it has not begun stays in the queues. Frozen already: nothing happens.
    ///
    /// After an error the worker comes to rest as soon as its request ends; freeze again or thaw.
    pub fn freeze(&self) -> Result<(), DeviceError> {
        self.freeze_within(FREEZE_LIMIT)
    }

    /// Lets the device go on; one that was restored, or got another back end, looks at all its queues first.
    pub fn thaw(&self) {
        self.shared().thaw();
    }

    /// Saves the frozen device: registers, queue positions, and what its kind adds.
    ///
    /// # Panics
    /// If the device is not frozen: its state would be a mixture.
    #[must_use]
    pub fn state(&self) -> Section {
        assert!(
            self.shared().at_rest(),
            "the {} device is frozen before it is saved",
            self.name()
        );
        let registers = self.registers();
        let core = self.core();
        let saved = Saved {
            identity: self.identity.clone(),
            positions: positions(&core, registers.queues.len()),
            registers: registers.clone(),
            broken: self.shared().is_broken(),
            interrupt_status: self.shared().saved_interrupt_status(),
            device: core.device.state(),
        };
        saved.write(self.name())
    }

    /// Checks a section without changing anything: that it is whole, of this device, and possible in this memory.
    pub fn check(&self, section: &Section) -> Result<(), StateError> {
        let saved = self.parse(section)?;
        let core = self.core();
        core.device
            .check(saved.registers.driver_features, &saved.device)
            .map_err(|field| value(section, field))
    }

    /// Becomes the device that `section` describes. On an error nothing has changed.
    ///
    /// # Panics
    /// If the device is not frozen: its worker would see a mixture.
    pub fn restore(&self, section: &Section) -> Result<(), StateError> {
        assert!(
            self.shared().at_rest(),
            "the {} device is frozen before it is restored",
            self.name()
        );
        let saved = self.parse(section)?;
        let mut registers = self.registers();
        let mut core = self.core();
        core.device
            .check(saved.registers.driver_features, &saved.device)
            .map_err(|field| value(section, field))?;
        let rings = if saved.registers.status & super::registers::DRIVER_OK != 0 {
            self.rings(&saved.registers, &saved.positions)
                .map_err(|_| value(section, "queues"))?
        } else {
            Vec::new()
        };
        core.rings = rings;
        core.device.activate(saved.registers.driver_features);
        core.device.restore(&saved.device);
        self.shared().set_broken(saved.broken);
        self.shared().set_interrupt_status(saved.interrupt_status);
        *registers = saved.registers;
        self.shared().kick();
        Ok(())
    }

    /// Raises the interrupt again if the driver has not acknowledged the last: one that was on its way when the machine was
    /// saved may be lost.
    pub(crate) fn report_again(&self) {
        self.shared().signal.again();
    }

    /// Brings the device back to how it was made, as a driver's reset does.
    pub fn reset(&self) {
        self.reset_locked(&mut self.registers());
    }

    /// Lets the holder take the turns from now on, which the worker does else.
    ///
    /// # Panics
    /// If someone has them already.
    #[must_use]
    pub fn turns(&self) -> Turns {
        Turns::borrow(&self.worker.shared)
    }

    pub(crate) fn freeze_within(&self, limit: Duration) -> Result<(), DeviceError> {
        if self.shared().freeze(limit) {
            Ok(())
        } else {
            Err(DeviceError::Stuck {
                device: self.name().to_owned(),
            })
        }
    }

    pub(crate) fn change<D: Device, R>(&self, change: impl FnOnce(&mut D) -> R) -> R {
        self.shared().change(change)
    }

    /// Lets the frozen device do all it can on the caller's thread; returns the number of turns.
    #[cfg(test)]
    pub(crate) fn settle(&self) -> usize {
        self.shared().settle()
    }

    fn shared(&self) -> &Shared {
        &self.worker.shared
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        lock(&self.registers)
    }

    /// Locked after the registers, never before.
    fn core(&self) -> MutexGuard<'_, Core> {
        lock(&self.shared().core)
    }

    fn status(&self) -> u32 {
        let broken = if self.shared().is_broken() {
            VIRTIO_CONFIG_S_NEEDS_RESET
        } else {
            0
        };
        self.registers().status | broken
    }

    fn activate(&self, registers: &Registers) {
        let mut core = self.core();
        let positions = vec![(0, 0); registers.queues.len()];
        match self.rings(registers, &positions) {
            Ok(rings) => core.rings = rings,
            Err(error) => self.shared().fail(&error),
        }
        core.device.activate(registers.driver_features);
        drop(core);
        self.shared().kick();
    }

    fn reset_locked(&self, registers: &mut Registers) {
        let mut core = self.core();
        core.rings.clear();
        core.device.activate(0);
        *registers = Registers::new(registers.queues.len());
        self.shared().set_broken(false);
        self.shared().set_interrupt_status(0);
    }

    fn rings(&self, registers: &Registers, positions: &[(u16, u16)]) -> Result<Vec<Ring>, QueueError> {
        let by_events = registers.driver_features & EVENT_IDX != 0;
        registers
            .queues
            .iter()
            .zip(positions)
            .map(|(queue, &(next_avail, next_used))| {
                Ring::new(
                    queue.with_positions(next_avail, next_used, by_events),
                    &self.shared().ram,
                )
            })
            .collect()
    }

    fn parse(&self, section: &Section) -> Result<Saved, StateError> {
        if section.name != self.name() {
            return Err(StateError::Unexpected {
                section: section.name.clone(),
            });
        }
        Saved::read(section, &self.identity, self.shared().queues, &self.shared().ram)
    }
}

fn positions(core: &Core, queues: usize) -> Vec<(u16, u16)> {
    let mut positions: Vec<_> = core
        .rings
        .iter()
        .map(Ring::state)
        .map(|state| (state.next_avail, state.next_used))
        .collect();
    positions.resize(queues, (0, 0));
    positions
}

fn value(section: &Section, field: &'static str) -> StateError {
    StateError::Value {
        section: section.name.clone(),
        field,
    }
}
