//! The registers of the virtio-mmio transport, version 2: what the driver has set, and the rules for it.
//!
//! Pure state: a write returns what the transport has to do about it. Total for every offset, width
//! and value; what a driver must not do is ignored, as the standard advises. Driven by
//! [`VirtioMmio`](super::mmio::VirtioMmio) under its lock.

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK,
};
use virtio_bindings::virtio_mmio as reg;
use virtio_queue::{Queue, QueueState};
use vm_memory::{GuestAddress, GuestMemory, Permissions};

use super::{QUEUE_SIZE_MAX, VERSION_1};
use crate::memory::Memory;

pub(super) const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
pub(super) const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
/// The status bits that a driver may set.
pub(super) const STATUS_BITS: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_DRIVER_OK
    | VIRTIO_CONFIG_S_FAILED;
const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const TRANSPORT_VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"tndm");

/// What the driver has set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Registers {
    pub(super) status: u32,
    pub(super) device_features_sel: u32,
    pub(super) driver_features_sel: u32,
    pub(super) driver_features: u64,
    pub(super) queue_sel: u32,
    pub(super) queues: Vec<QueueSetup>,
}

/// One queue as the driver has set it up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct QueueSetup {
    pub(super) size: u16,
    pub(super) ready: bool,
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

/// What a write asks the transport for, beyond storing it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    None,
    Notify,
    Acknowledge(u32),
    Activate,
    Reset,
}

/// What does not change while the machine lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) kind: u32,
    pub(super) features: u64,
    pub(super) config: Vec<u8>,
}

impl Registers {
    pub(super) fn new(queues: usize) -> Self {
        Self {
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            queues: vec![QueueSetup::default(); queues],
        }
    }

    /// Reads the register at `offset`, except status and interrupt status, which the transport knows better.
    pub(super) fn read(&self, offset: u32, identity: &Identity) -> u32 {
        match offset {
            reg::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            reg::VIRTIO_MMIO_VERSION => TRANSPORT_VERSION,
            reg::VIRTIO_MMIO_DEVICE_ID => identity.kind,
            reg::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            reg::VIRTIO_MMIO_DEVICE_FEATURES => match self.device_features_sel {
                0 => low(identity.features),
                1 => high(identity.features),
                _ => 0,
            },
            reg::VIRTIO_MMIO_QUEUE_NUM_MAX if self.queue().is_some() => QUEUE_SIZE_MAX.into(),
            reg::VIRTIO_MMIO_QUEUE_READY => self.queue().is_some_and(|queue| queue.ready).into(),
            // There is no shared memory: its length reads as all ones.
            reg::VIRTIO_MMIO_SHM_LEN_LOW | reg::VIRTIO_MMIO_SHM_LEN_HIGH => u32::MAX,
            reg::VIRTIO_MMIO_SHM_BASE_LOW | reg::VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            // The configuration generation is always 0, since no configuration ever changes.
            _ => 0,
        }
    }

    /// Writes the register at `offset`.
    pub(super) fn write(&mut self, offset: u32, value: u32, identity: &Identity, ram: &Memory) -> Effect {
        match offset {
            reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_sel = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES => self.accept(value),
            reg::VIRTIO_MMIO_QUEUE_SEL => self.queue_sel = value,
            reg::VIRTIO_MMIO_QUEUE_NOTIFY => return Effect::Notify,
            reg::VIRTIO_MMIO_INTERRUPT_ACK => return Effect::Acknowledge(value),
            reg::VIRTIO_MMIO_STATUS => return self.set_status(value, identity),
            reg::VIRTIO_MMIO_QUEUE_READY => self.set_ready(value, ram),
            _ => self.set_up(offset, value),
        }
        Effect::None
    }

    fn queue(&self) -> Option<&QueueSetup> {
        self.queues.get(crate::index(self.queue_sel.into()))
    }

    fn accept(&mut self, value: u32) {
        // What is agreed is agreed: later writes are ignored.
        if self.status & FEATURES_OK != 0 {
            return;
        }
        let value = u64::from(value);
        match self.driver_features_sel {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | value,
            1 => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
            _ => {}
        }
    }

    fn set_status(&mut self, value: u32, identity: &Identity) -> Effect {
        if value == 0 {
            return Effect::Reset;
        }
        let mut new = value & STATUS_BITS & !self.status;
        if new & FEATURES_OK != 0 && !acceptable(self.driver_features, identity) {
            new &= !FEATURES_OK;
        }
        if (self.status | new) & FEATURES_OK == 0 {
            new &= !DRIVER_OK;
        }
        self.status |= new;
        if new & DRIVER_OK != 0 {
            Effect::Activate
        } else {
            Effect::None
        }
    }

    fn set_up(&mut self, offset: u32, value: u32) {
        let running = self.status & DRIVER_OK != 0;
        let selected = crate::index(self.queue_sel.into());
        let Some(queue) = self.queues.get_mut(selected).filter(|queue| !queue.ready && !running) else {
            return;
        };
        match offset {
            // A size that can't be is kept as 0, with which the queue never becomes ready.
            reg::VIRTIO_MMIO_QUEUE_NUM => queue.size = u16::try_from(value).unwrap_or(0),
            reg::VIRTIO_MMIO_QUEUE_DESC_LOW => set_low(&mut queue.descriptors, value),
            reg::VIRTIO_MMIO_QUEUE_DESC_HIGH => set_high(&mut queue.descriptors, value),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_low(&mut queue.available, value),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_high(&mut queue.available, value),
            reg::VIRTIO_MMIO_QUEUE_USED_LOW => set_low(&mut queue.used, value),
            reg::VIRTIO_MMIO_QUEUE_USED_HIGH => set_high(&mut queue.used, value),
            _ => {}
        }
    }

    fn set_ready(&mut self, value: u32, ram: &Memory) {
        let running = self.status & DRIVER_OK != 0;
        let selected = crate::index(self.queue_sel.into());
        let Some(queue) = self.queues.get_mut(selected).filter(|_| !running) else {
            return;
        };
        // The driver reads the register again and sees whether its queue can be used.
        queue.ready = value == 1 && QueueSetup { ready: true, ..*queue }.usable(ram);
    }
}

impl Default for QueueSetup {
    fn default() -> Self {
        Self {
            size: QUEUE_SIZE_MAX,
            ready: false,
            descriptors: 0,
            available: 0,
            used: 0,
        }
    }
}

impl QueueSetup {
    /// Describes the queue with its positions in the rings, and whether notifications go by these.
    pub(super) fn with_positions(self, next_avail: u16, next_used: u16, by_events: bool) -> QueueState {
        QueueState {
            max_size: QUEUE_SIZE_MAX,
            next_avail,
            next_used,
            event_idx_enabled: by_events,
            // A queue that is not ready may have any size; its ring object is never used.
            size: if self.ready { self.size } else { QUEUE_SIZE_MAX },
            ready: self.ready,
            desc_table: if self.ready { self.descriptors } else { 0 },
            avail_ring: if self.ready { self.available } else { 0 },
            used_ring: if self.ready { self.used } else { 0 },
        }
    }

    /// Says whether a ready queue has a possible size and rings in guest memory; one that is not ready is usable.
    pub(super) fn usable(self, ram: &Memory) -> bool {
        let inside = |address, bytes, access| GuestMemory::check_range(ram, GuestAddress(address), bytes, access);
        let size = usize::from(self.size);
        // The available ring at address 0 means "not set up" to the queue's reader.
        !self.ready
            || self.available != 0
                && Queue::try_from(self.with_positions(0, 0, false)).is_ok()
                && inside(self.descriptors, 16 * size, Permissions::Read)
                && inside(self.available, 6 + 2 * size, Permissions::Read)
                && inside(self.used, 6 + 8 * size, Permissions::Write)
    }
}

/// Says whether a driver may work with these features.
pub(super) const fn acceptable(driver: u64, identity: &Identity) -> bool {
    driver & !identity.features == 0 && driver & VERSION_1 != 0
}

#[expect(clippy::cast_possible_truncation, reason = "that is its purpose")]
const fn low(value: u64) -> u32 {
    value as u32
}

const fn high(value: u64) -> u32 {
    low(value >> 32)
}

fn set_low(register: &mut u64, value: u32) {
    *register = *register & !0xffff_ffff | u64::from(value);
}

fn set_high(register: &mut u64, value: u32) {
    *register = *register & 0xffff_ffff | u64::from(value) << 32;
}
