//! How a device slot is written into its section, and what is checked when it is read again.
//!
//! A section comes from a peer or a file. Reading it accepts only what [`VirtioMmio::state`] can have
//! written for the same device in memory of the same shape; everything else names the field.
//!
//! [`VirtioMmio::state`]: super::mmio::VirtioMmio::state

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};

use super::registers::{DRIVER_OK, FEATURES_OK, Identity, QueueSetup, Registers, STATUS_BITS, acceptable};
use crate::memory::Memory;
use crate::state::{Reader, Section, StateError, Writer};

const VERSION: u32 = 1;
const CONFIG_BYTES_MAX: usize = 256;
const DEVICE_BYTES_MAX: usize = 64 * 1024;

/// Everything about a device slot that its section holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Saved {
    pub(super) identity: Identity,
    pub(super) registers: Registers,
    /// For each queue, the next entry of the available ring and of the used ring.
    pub(super) positions: Vec<(u16, u16)>,
    pub(super) broken: bool,
    pub(super) interrupt_status: u32,
    /// What the kind of device adds.
    pub(super) device: Vec<u8>,
}

impl Saved {
    pub(super) fn write(&self, name: &str) -> Section {
        let mut writer = Writer::new();
        writer
            .u32(self.identity.kind)
            .u64(self.identity.features)
            .bytes(&self.identity.config);
        let registers = &self.registers;
        writer
            .u32(registers.status)
            .u8(self.broken.into())
            .u32(self.interrupt_status)
            .u32(registers.device_features_sel)
            .u32(registers.driver_features_sel)
            .u64(registers.driver_features)
            .u32(registers.queue_sel);
        for (queue, (next_avail, next_used)) in registers.queues.iter().zip(&self.positions) {
            writer
                .u16(queue.size)
                .u8(queue.ready.into())
                .u64(queue.descriptors)
                .u64(queue.available)
                .u64(queue.used)
                .u16(*next_avail)
                .u16(*next_used);
        }
        writer.bytes(&self.device);
        writer.finish(name, VERSION)
    }

    /// Reads the section of a device with this identity and number of queues.
    pub(super) fn read(
        section: &Section,
        identity: &Identity,
        queues: usize,
        ram: &Memory,
    ) -> Result<Self, StateError> {
        let mut reader = Reader::new(section, VERSION)?;
        read_identity(&mut reader, identity)?;
        let mut registers = Registers::new(queues);
        registers.status = reader.u32("status")?;
        let broken = reader.bool("needs-reset flag")?;
        let interrupt_status = reader.u32("interrupt status")?;
        if interrupt_status & !(VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG) != 0 {
            return Err(reader.value("interrupt status"));
        }
        registers.device_features_sel = reader.u32("device feature selector")?;
        registers.driver_features_sel = reader.u32("driver feature selector")?;
        registers.driver_features = reader.u64("driver features")?;
        registers.queue_sel = reader.u32("queue selector")?;
        check_status(&reader, &registers, broken, identity)?;
        let mut positions = Vec::with_capacity(queues);
        for queue in &mut registers.queues {
            let (setup, position) = read_queue(&mut reader, ram)?;
            *queue = setup;
            let resting = position.0 == position.1 || broken;
            let running = registers.status & DRIVER_OK != 0 && setup.ready;
            if !resting || !running && position != (0, 0) {
                return Err(reader.value("queue positions"));
            }
            positions.push(position);
        }
        let device = reader.bytes("the device's own state", DEVICE_BYTES_MAX)?.to_vec();
        reader.end()?;
        Ok(Self {
            identity: identity.clone(),
            registers,
            positions,
            broken,
            interrupt_status,
            device,
        })
    }
}

fn read_identity(reader: &mut Reader<'_>, identity: &Identity) -> Result<(), StateError> {
    if reader.u32("device kind")? != identity.kind {
        return Err(reader.value("device kind"));
    }
    if reader.u64("device features")? != identity.features {
        return Err(reader.value("device features"));
    }
    if reader.bytes("configuration", CONFIG_BYTES_MAX)? != identity.config {
        return Err(reader.value("configuration (MAC address or disk size differ)"));
    }
    Ok(())
}

fn check_status(
    reader: &Reader<'_>,
    registers: &Registers,
    broken: bool,
    identity: &Identity,
) -> Result<(), StateError> {
    let status = registers.status;
    if status & !STATUS_BITS != 0 || status & DRIVER_OK != 0 && status & FEATURES_OK == 0 {
        return Err(reader.value("status"));
    }
    if status & FEATURES_OK != 0 && !acceptable(registers.driver_features, identity) {
        return Err(reader.value("driver features"));
    }
    if broken && status & DRIVER_OK == 0 {
        return Err(reader.value("needs-reset flag"));
    }
    Ok(())
}

fn read_queue(reader: &mut Reader<'_>, ram: &Memory) -> Result<(QueueSetup, (u16, u16)), StateError> {
    let setup = QueueSetup {
        size: reader.u16("queue size")?,
        ready: reader.bool("queue ready")?,
        descriptors: reader.u64("descriptor table")?,
        available: reader.u64("available ring")?,
        used: reader.u64("used ring")?,
    };
    let position = (reader.u16("next available entry")?, reader.u16("next used entry")?);
    if !setup.usable(ram) {
        return Err(reader.value("queue (size, or a ring outside guest memory)"));
    }
    Ok((setup, position))
}
