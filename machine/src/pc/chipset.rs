//! What the vCPUs of a PC share in the kernel: interrupt controllers, timer, and KVM's clock.
//!
//! KVM's clock is guest time. A machine that is restored goes on at the time at which it was saved, whatever this host's
//! counter and clock say, so guest time never runs backwards. Paused time on the same host counts, once.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use zerocopy::IntoBytes;

use crate::state::{Reader, Section, StateError, Writer};
use crate::vcpu::state::{RegisterError, group, load, save};

/// The name of the chips' section.
pub(crate) const CHIPSET: &str = "chipset";
const VERSION: u32 = 1;
const CONTROLLERS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];
/// Hosts whose counters differ by more are refused: thousandths.
const FREQUENCY_TOLERANCE: u32 = 10;

/// The chips as they are saved.
pub(crate) struct ChipsetState {
    controllers: [kvm_irqchip; CONTROLLERS.len()],
    timer: kvm_pit_state2,
    /// Guest time in nanoseconds.
    pub(crate) now: u64,
    /// How fast the guest's time stamp counter is.
    tsc_khz: u32,
}

impl ChipsetState {
    /// Saves the chips of a machine whose vCPUs are stopped.
    pub(crate) fn save(vm: &VmFd, tsc_khz: u32) -> Result<Self, RegisterError> {
        let mut controllers = CONTROLLERS.map(|chip_id| kvm_irqchip {
            chip_id,
            ..Default::default()
        });
        for controller in &mut controllers {
            save("interrupt controllers", vm.get_irqchip(controller))?;
        }
        Ok(Self {
            controllers,
            timer: save("timer", vm.get_pit2())?,
            now: save("clock", vm.get_clock())?.clock,
            tsc_khz,
        })
    }

    /// Loads the chips of a machine whose vCPUs are stopped.
    pub(crate) fn load(&self, vm: &VmFd) -> Result<(), RegisterError> {
        for controller in &self.controllers {
            load("interrupt controllers", vm.set_irqchip(controller))?;
        }
        load("timer", vm.set_pit2(&self.timer))?;
        let clock = kvm_clock_data {
            clock: self.now,
            ..Default::default()
        };
        load("clock", vm.set_clock(&clock))
    }

    /// Says whether a guest that has counted so fast can go on on a host whose counter is this fast.
    pub(crate) fn check_frequency(&self, host_khz: u32) -> Result<(), RegisterError> {
        if self.tsc_khz.abs_diff(host_khz) > host_khz / 1_000 * FREQUENCY_TOLERANCE {
            return Err(RegisterError::Frequency {
                saved: self.tsc_khz,
                host: host_khz,
            });
        }
        Ok(())
    }

    /// Writes the chips' section.
    pub(crate) fn section(&self) -> Section {
        let mut writer = Writer::new();
        for controller in &self.controllers {
            writer.bytes(controller.as_bytes());
        }
        writer.bytes(self.timer.as_bytes()).u64(self.now).u32(self.tsc_khz);
        writer.finish(CHIPSET, VERSION)
    }

    /// Reads the chips' section.
    pub(crate) fn decode(section: &Section) -> Result<Self, StateError> {
        let mut from = Reader::new(section, VERSION)?;
        let mut controllers = [kvm_irqchip::default(); CONTROLLERS.len()];
        for (controller, chip_id) in controllers.iter_mut().zip(CONTROLLERS) {
            *controller = group(&mut from, "interrupt controllers")?;
            if controller.chip_id != chip_id {
                return Err(from.value("interrupt controllers"));
            }
        }
        let state = Self {
            controllers,
            timer: group(&mut from, "timer")?,
            now: from.u64("clock")?,
            tsc_khz: from.u32("the counter's frequency")?,
        };
        from.end()?;
        Ok(state)
    }
}
