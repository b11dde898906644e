//! A disk in memory that behaves as badly as real ones may: for tests and the simulation.
//!
//! A [`SimDisk`] stands for one host's disk with several [`SimImage`]s on it. Writes are visible at once and durable
//! only after a flush. At a power cut every sector written since the last flush keeps, independently, either its
//! durable content or any of the contents written since: writes are lost, torn at sectors and reordered. A failed
//! flush loses data the same way and lets later flushes succeed, as Linux does.
//!
//! Everything is decided by the seed; no clock, no threads of its own.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

use crate::image::{Image, Room, SECTOR, SECTOR_BYTES};
use crate::sectors::to_usize;

/// One host's disk. See the module's documentation.
#[derive(Debug)]
pub struct SimDisk {
    faults: Mutex<Faults>,
    /// Weak, since an image keeps its disk.
    images: Mutex<Vec<Weak<SimImage>>>,
}

#[derive(Debug)]
struct Faults {
    seed: u64,
    /// Writes and flushes seen.
    operations: u64,
    /// The power fails instead of the operation with this number.
    power_cut_at: Option<u64>,
    off: bool,
    fail_writes: bool,
    fail_flushes: bool,
    fail_reads: bool,
    /// Bytes that may still be reserved.
    free: u64,
    flush_delay: Duration,
}

/// A disk image on a [`SimDisk`].
#[derive(Debug)]
pub struct SimImage {
    disk: Arc<SimDisk>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// What reads see.
    current: Vec<u8>,
    /// What is on the medium.
    durable: Vec<u8>,
    /// For each sector written since the last flush, every content it had since, oldest first.
    unflushed: BTreeMap<usize, Vec<[u8; SECTOR]>>,
    /// Whether a sector has room on the medium.
    backed: Vec<bool>,
}

impl SimDisk {
    /// Makes a disk without faults and with room for everything.
    #[must_use]
    pub fn new(seed: u64) -> Arc<Self> {
        Arc::new(Self {
            faults: Mutex::new(Faults {
                seed: seed ^ 0x9e37_79b9_7f4a_7c15,
                operations: 0,
                power_cut_at: None,
                off: false,
                fail_writes: false,
                fail_flushes: false,
                fail_reads: false,
                free: u64::MAX,
                flush_delay: Duration::ZERO,
            }),
            images: Mutex::default(),
        })
    }

    /// Makes an image of zeros, sparse, durable.
    ///
    /// # Panics
    /// If the size is not whole sectors.
    #[must_use]
    pub fn image(self: &Arc<Self>, size: u64) -> Arc<SimImage> {
        assert!(size.is_multiple_of(SECTOR_BYTES), "whole sectors");
        let size = to_usize(size);
        let state = State {
            current: vec![0; size],
            durable: vec![0; size],
            unflushed: BTreeMap::new(),
            backed: vec![false; size / SECTOR],
        };
        let image = Arc::new(SimImage {
            disk: Arc::clone(self),
            state: Mutex::new(state),
        });
        self.images
            .lock()
            .expect("no panic while locked")
            .push(Arc::downgrade(&image));
        image
    }

    /// Returns how many writes and flushes there have been.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.lock().operations
    }

    /// Lets the power fail instead of the `n`th write or flush from now on, counted from 0.
    pub fn cut_power_after(&self, n: u64) {
        let mut faults = self.lock();
        faults.power_cut_at = Some(faults.operations + n);
    }

    /// Tells whether the power has failed.
    #[must_use]
    pub fn is_off(&self) -> bool {
        self.lock().off
    }

    /// Cuts the power if it is on, decides what survived on the medium, and starts again without faults.
    pub fn power_cycle(&self) {
        let images = self.images.lock().expect("no panic while locked");
        for image in images.iter().filter_map(Weak::upgrade) {
            let mut state = image.lock();
            let mut faults = self.lock();
            state.settle(&mut faults);
            state.current = state.durable.clone();
        }
        let mut faults = self.lock();
        *faults = Faults {
            power_cut_at: None,
            off: false,
            fail_writes: false,
            fail_flushes: false,
            fail_reads: false,
            flush_delay: Duration::ZERO,
            ..*faults
        };
    }

    /// Lets every read fail, or none.
    pub fn fail_reads(&self, fail: bool) {
        self.lock().fail_reads = fail;
    }

    /// Lets every write fail half-way, or none.
    pub fn fail_writes(&self, fail: bool) {
        self.lock().fail_writes = fail;
    }

    /// Lets every flush fail and lose what it should have kept, or none.
    pub fn fail_flushes(&self, fail: bool) {
        self.lock().fail_flushes = fail;
    }

    /// Sets how many bytes are free: more can neither be reserved nor written to sectors without room.
    pub fn set_free(&self, bytes: u64) {
        self.lock().free = bytes;
    }

    /// Lets every flush sleep for `delay` of real time; for tests with threads.
    pub fn slow_flushes(&self, delay: Duration) {
        self.lock().flush_delay = delay;
    }

    fn lock(&self) -> MutexGuard<'_, Faults> {
        self.faults.lock().expect("no panic while locked")
    }
}

impl Faults {
    /// Counts a write or flush; fails if the power does.
    fn operation(&mut self) -> io::Result<()> {
        self.off |= self.power_cut_at.is_some_and(|at| self.operations >= at);
        self.operations += 1;
        self.powered()
    }

    fn powered(&self) -> io::Result<()> {
        if self.off {
            Err(io::Error::other("the power is off"))
        } else {
            Ok(())
        }
    }

    fn random(&mut self, below: usize) -> usize {
        self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.seed;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        to_usize((mixed ^ (mixed >> 31)) % below as u64)
    }
}

impl SimImage {
    /// Returns the whole content as reads see it, whether the power is on or not.
    #[must_use]
    pub fn content(&self) -> Vec<u8> {
        self.lock().current.clone()
    }

    /// Replaces the whole content, durably.
    ///
    /// # Panics
    /// If the size is another.
    pub fn set_content(&self, content: &[u8]) {
        let mut state = self.lock();
        assert_eq!(content.len(), state.current.len());
        state.unflushed.clear();
        state.current.copy_from_slice(content);
        state.durable.copy_from_slice(content);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while locked")
    }
}

impl State {
    /// Decides for every unflushed sector which of its contents the medium has.
    fn settle(&mut self, faults: &mut Faults) {
        for (sector, contents) in std::mem::take(&mut self.unflushed) {
            if let Some(content) = faults
                .random(contents.len() + 1)
                .checked_sub(1)
                .map(|index| contents[index])
            {
                self.durable[sector * SECTOR..][..SECTOR].copy_from_slice(&content);
            }
        }
    }

    /// Takes room for the sectors of a range that have none.
    fn back(&mut self, offset: u64, len: u64, faults: &mut Faults) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let sectors = to_usize(offset) / SECTOR..=to_usize(offset + len - 1) / SECTOR;
        let backed = &mut self.backed[sectors];
        let missing = backed.iter().filter(|backed| !**backed).count() as u64 * SECTOR_BYTES;
        if missing > faults.free {
            return Err(io::ErrorKind::StorageFull.into());
        }
        faults.free -= missing;
        backed.fill(true);
        Ok(())
    }

    fn check(&self, offset: u64, len: usize) -> io::Result<()> {
        match offset.checked_add(len as u64) {
            Some(end) if end <= self.current.len() as u64 => Ok(()),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn write(&mut self, offset: usize, data: &[u8]) {
        self.current[offset..offset + data.len()].copy_from_slice(data);
        for sector in offset / SECTOR..(offset + data.len()).div_ceil(SECTOR) {
            let mut content = [0; SECTOR];
            content.copy_from_slice(&self.current[sector * SECTOR..][..SECTOR]);
            self.unflushed.entry(sector).or_default().push(content);
        }
    }
}

impl Image for SimImage {
    fn size(&self) -> u64 {
        self.lock().current.len() as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let state = self.lock();
        state.check(offset, buf.len())?;
        let faults = self.disk.lock();
        faults.powered()?;
        if faults.fail_reads {
            return Err(io::Error::other("a read failed"));
        }
        buf.copy_from_slice(&state.current[to_usize(offset)..][..buf.len()]);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut state = self.lock();
        state.check(offset, data.len())?;
        if data.is_empty() {
            return Ok(());
        }
        let mut faults = self.disk.lock();
        let was_off = faults.off;
        if let Err(off) = faults.operation() {
            if !was_off {
                // What was being written when the power failed may have reached the medium, in part.
                state.write(to_usize(offset), data);
            }
            return Err(off);
        }
        state.back(offset, data.len() as u64, &mut faults)?;
        if faults.fail_writes {
            state.write(to_usize(offset), &data[..data.len() / 2 / SECTOR * SECTOR]);
            return Err(io::Error::other("a write failed"));
        }
        state.write(to_usize(offset), data);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        let delay = self.disk.lock().flush_delay;
        if !delay.is_zero() {
            std::thread::sleep(delay);
        }
        let mut state = self.lock();
        let mut faults = self.disk.lock();
        faults.operation()?;
        if faults.fail_flushes {
            state.settle(&mut faults);
            return Err(io::Error::other("a flush failed"));
        }
        let State {
            current,
            durable,
            unflushed,
            ..
        } = &mut *state;
        for sector in std::mem::take(unflushed).into_keys() {
            let range = sector * SECTOR..(sector + 1) * SECTOR;
            durable[range.clone()].copy_from_slice(&current[range]);
        }
        Ok(())
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut state = self.lock();
        state.check(offset, to_usize(len))?;
        let mut faults = self.disk.lock();
        faults.powered()?;
        state.back(offset, len, &mut faults)
    }

    /// Zeros need no room; of what is given back, a later write needs some again, however much there is.
    fn zero(&self, offset: u64, len: u64, room: Room) -> io::Result<()> {
        let zeros = vec![0; to_usize(len)];
        let mut state = self.lock();
        state.check(offset, zeros.len())?;
        if zeros.is_empty() {
            return Ok(());
        }
        let mut faults = self.disk.lock();
        let was_off = faults.off;
        if let Err(off) = faults.operation() {
            if !was_off {
                state.write(to_usize(offset), &zeros);
            }
            return Err(off);
        }
        if faults.fail_writes {
            state.write(to_usize(offset), &zeros[..zeros.len() / 2 / SECTOR * SECTOR]);
            return Err(io::Error::other("a write failed"));
        }
        state.write(to_usize(offset), &zeros);
        if room == Room::GiveBack {
            state.backed[to_usize(offset) / SECTOR..to_usize(offset + len).div_ceil(SECTOR)].fill(false);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_flushed_writes_are_sure_to_survive() {
        let (mut kept, mut lost) = (0, 0);
        for seed in 0..64 {
            let disk = SimDisk::new(seed);
            let image = disk.image(1024);
            image.write_at(0, &[1; 512]).unwrap();
            image.flush().unwrap();
            image.write_at(512, &[2; 512]).unwrap();
            disk.power_cycle();
            let content = image.content();
            assert_eq!(content[..512], [1; 512]);
            if content[512..] == [2; 512] {
                kept += 1
            } else {
                lost += 1
            }
        }
        assert!(kept > 0 && lost > 0, "{kept} {lost}");
    }

    #[test]
    fn a_failed_flush_loses_data_that_reads_still_show() {
        let mut lost = 0;
        for seed in 0..16 {
            let disk = SimDisk::new(seed);
            let image = disk.image(512);
            image.write_at(0, &[1; 512]).unwrap();
            disk.fail_flushes(true);
            image.flush().unwrap_err();
            disk.fail_flushes(false);
            image.flush().unwrap();
            assert_eq!(image.content(), [1; 512]);
            disk.power_cycle();
            lost += i32::from(image.content() == [0; 512]);
        }
        assert!(lost > 0);
    }

    #[test]
    fn the_power_fails_where_it_was_told_to() {
        let disk = SimDisk::new(0);
        let image = disk.image(512);
        disk.cut_power_after(1);
        image.write_at(0, &[1; 512]).unwrap();
        image.flush().unwrap_err();
        assert!(disk.is_off());
        image.read_at(0, &mut [0; 512]).unwrap_err();
        disk.power_cycle();
        image.read_at(0, &mut [0; 512]).unwrap();
    }

    #[test]
    fn what_gave_its_room_back_needs_some_again() {
        let disk = SimDisk::new(0);
        let image = disk.image(2048);
        image.write_at(0, &[1; 2048]).unwrap();
        disk.set_free(0);
        image.zero(0, 1024, Room::Keep).unwrap();
        image.zero(1024, 512, Room::GiveBack).unwrap();
        assert_eq!(image.content(), [[0; 1536].as_slice(), &[1; 512]].concat());
        image.write_at(0, &[2; 1024]).unwrap();
        let refused = image.write_at(1024, &[2; 512]).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::StorageFull);
    }

    #[test]
    fn a_full_disk_takes_only_what_was_reserved() {
        let disk = SimDisk::new(0);
        let image = disk.image(2048);
        disk.set_free(512);
        image.reserve(512, 512).unwrap();
        assert_eq!(image.reserve(512, 1024).unwrap_err().kind(), io::ErrorKind::StorageFull);
        image.write_at(512, &[1; 512]).unwrap();
        assert_eq!(
            image.write_at(0, &[1; 512]).unwrap_err().kind(),
            io::ErrorKind::StorageFull
        );
    }
}
