//! Which device answers at which guest-physical address.
//!
//! Called on the vCPU's thread with addresses and sizes of the guest's choice. Where nothing answers,
//! reads give all ones and writes are ignored.

use std::sync::Arc;

use crate::devices::VirtioMmio;

/// Something with registers on the bus.
pub(crate) trait BusDevice: Send + Sync {
    /// Reads registers; `data` is all ones before.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Writes registers.
    fn write(&self, offset: u64, data: &[u8]);
}

impl BusDevice for VirtioMmio {
    fn read(&self, offset: u64, data: &mut [u8]) {
        Self::read(self, offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        Self::write(self, offset, data);
    }
}

/// The device window of one machine.
#[derive(Default)]
pub(crate) struct Bus {
    ranges: Vec<Range>,
}

struct Range {
    base: u64,
    bytes: u64,
    device: Arc<dyn BusDevice>,
}

impl Bus {
    /// Lets `device` answer at `base` and the `bytes` after it.
    ///
    /// # Panics
    /// If something else answers there.
    pub(crate) fn insert(&mut self, base: u64, bytes: u64, device: Arc<dyn BusDevice>) {
        let free = |range: &Range| base + bytes <= range.base || range.base + range.bytes <= base;
        assert!(self.ranges.iter().all(free), "two devices at {base:#x}");
        self.ranges.push(Range { base, bytes, device });
    }

    /// Reads what answers at `address`.
    pub(crate) fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((device, offset)) = self.find(address, data.len()) {
            device.read(offset, data);
        }
    }

    /// Writes to what answers at `address`.
    pub(crate) fn write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(address, data.len()) {
            device.write(offset, data);
        }
    }

    fn find(&self, address: u64, bytes: usize) -> Option<(&dyn BusDevice, u64)> {
        let range = self
            .ranges
            .iter()
            .find(|range| (range.base..range.base + range.bytes).contains(&address))?;
        let offset = address - range.base;
        (offset + bytes as u64 <= range.bytes).then(|| (&*range.device, offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Notes(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Notes {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data[0] = u8::try_from(offset).unwrap();
        }

        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn finds_devices_and_nothing_between_them() {
        let (first, second) = (Arc::new(Notes::default()), Arc::new(Notes::default()));
        let mut bus = Bus::default();
        bus.insert(0x1000, 0x100, Arc::clone(&first) as _);
        bus.insert(0x1100, 0x100, Arc::clone(&second) as _);
        bus.write(0x10fc, &[1; 4]);
        bus.write(0x1100, &[2]);
        bus.write(0x10fe, &[3; 4]);
        bus.write(0xfff, &[4]);
        bus.write(u64::MAX, &[5; 8]);
        assert_eq!(*first.0.lock().unwrap(), [(0xfc, vec![1; 4])]);
        assert_eq!(*second.0.lock().unwrap(), [(0, vec![2])]);
        let mut data = [0; 2];
        bus.read(0x1105, &mut data);
        assert_eq!(data, [5, 0xff]);
        bus.read(0x1200, &mut data);
        assert_eq!(data, [0xff, 0xff]);
        bus.read(0x10ff, &mut data);
        assert_eq!(data, [0xff, 0xff], "a read across the end belongs to nobody");
    }

    #[test]
    #[should_panic(expected = "two devices")]
    fn refuses_two_devices_in_one_place() {
        let mut bus = Bus::default();
        bus.insert(0x1000, 0x100, Arc::new(Notes::default()));
        bus.insert(0x10ff, 0x100, Arc::new(Notes::default()));
    }
}
