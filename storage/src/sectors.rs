//! A sparse piece of a disk: the sectors that were written, and nothing else.
//!
//! The overlay, the epoch buffers and the batch being committed are each one [`SectorMap`]. Sectors are kept in
//! chunks of 4 KiB with one bit for each sector that is known, so that small writes cost one chunk of memory and
//! a long write costs no more than its length. All bounds are counted in chunks, see [`footprint`].

use std::collections::BTreeMap;

use crate::image::{SECTOR, SECTOR_BYTES};

/// Bytes in one chunk.
pub(crate) const CHUNK_BYTES: usize = 4096;
const CHUNK: u64 = CHUNK_BYTES as u64;
const FULL: u8 = u8::MAX;

const _: () = assert!(CHUNK_BYTES / SECTOR == 8, "one bit of the mask for each sector");

/// Why a range of a disk is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// Not whole sectors.
    #[error("{len} bytes at {offset} are not whole sectors of 512 bytes")]
    Misaligned {
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        len: u64,
    },
    /// Beyond the end of the disk.
    #[error("{len} bytes at {offset} reach beyond the disk's {size} bytes")]
    Outside {
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        len: u64,
        /// Bytes of the disk.
        size: u64,
    },
}

/// Returns what a write costs in the overlay or in an epoch buffer, at most: the chunks of 4 KiB it touches, in bytes.
///
/// Both ends count with this, so that what the primary's [`Mirror`](crate::Mirror) lets through always fits the
/// secondary's buffers.
#[must_use]
pub fn footprint(offset: u64, len: u64) -> u64 {
    if len == 0 {
        return 0;
    }
    let last = offset.saturating_add(len - 1) / CHUNK;
    (last - offset / CHUNK + 1).saturating_mul(CHUNK)
}

/// Checks that a range is made of whole sectors within a disk of `size` bytes.
pub(crate) fn check_range(size: u64, offset: u64, len: usize) -> Result<(), RangeError> {
    let len = len as u64;
    if !offset.is_multiple_of(SECTOR_BYTES) || !len.is_multiple_of(SECTOR_BYTES) {
        return Err(RangeError::Misaligned { offset, len });
    }
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(RangeError::Outside { offset, len, size }),
    }
}

/// Converts a length that is known to fit the address space.
pub(crate) fn to_usize(value: u64) -> usize {
    usize::try_from(value).expect("lengths in memory fit 64-bit usize")
}

/// The sectors of one chunk that are known.
#[derive(Clone)]
pub(crate) struct Chunk {
    /// Bit *i* is set if sector *i* is known.
    pub(crate) mask: u8,
    /// The sectors; unknown ones are zero.
    pub(crate) data: Box<[u8; CHUNK_BYTES]>,
}

/// Written sectors of a disk. See the module's documentation.
#[derive(Clone, Default)]
pub(crate) struct SectorMap {
    chunks: BTreeMap<u64, Chunk>,
}

impl SectorMap {
    /// Returns the memory held, in bytes of chunks.
    pub(crate) fn bytes(&self) -> u64 {
        self.chunks.len() as u64 * CHUNK
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// Returns the chunks in ascending order, each with its number.
    pub(crate) fn iter(&self) -> impl ExactSizeIterator<Item = (u64, &Chunk)> {
        self.chunks.iter().map(|(number, chunk)| (*number, chunk))
    }

    /// Returns by how much [`bytes`](Self::bytes) would grow if this range were written.
    pub(crate) fn growth(&self, offset: u64, len: usize) -> u64 {
        if len == 0 {
            return 0;
        }
        let (first, last) = (offset / CHUNK, (offset + len as u64 - 1) / CHUNK);
        let present = self.chunks.range(first..=last).count() as u64;
        (last - first + 1 - present) * CHUNK
    }

    /// Keeps the sectors of `data`. The range has been checked.
    pub(crate) fn write(&mut self, mut offset: u64, mut data: &[u8]) {
        while !data.is_empty() {
            let start = to_usize(offset % CHUNK);
            let (piece, rest) = data.split_at(data.len().min(CHUNK_BYTES - start));
            let chunk = self.chunks.entry(offset / CHUNK).or_insert_with(|| Chunk {
                mask: 0,
                data: Box::new([0; CHUNK_BYTES]),
            });
            chunk.data[start..start + piece.len()].copy_from_slice(piece);
            chunk.mask |= mask_of(start / SECTOR, piece.len() / SECTOR);
            offset += piece.len() as u64;
            data = rest;
        }
    }

    /// Copies the known sectors of the range into `buf` and leaves the others as they are.
    pub(crate) fn read(&self, offset: u64, buf: &mut [u8]) {
        if buf.is_empty() {
            return;
        }
        let end = offset + buf.len() as u64;
        for (number, chunk) in self.chunks.range(offset / CHUNK..=(end - 1) / CHUNK) {
            for (from, to) in runs(chunk.mask) {
                let (from, to) = (number * CHUNK + from as u64, number * CHUNK + to as u64);
                let (from, to) = (from.max(offset), to.min(end));
                if from < to {
                    let source = to_usize(from % CHUNK)..to_usize(from % CHUNK + (to - from));
                    buf[to_usize(from - offset)..to_usize(to - offset)].copy_from_slice(&chunk.data[source]);
                }
            }
        }
    }

    /// Takes over all sectors of `newer`, which win.
    pub(crate) fn merge(&mut self, newer: Self) {
        if self.is_empty() {
            *self = newer;
            return;
        }
        for (number, chunk) in newer.chunks {
            match self.chunks.get_mut(&number) {
                Some(old) if chunk.mask != FULL => {
                    for (from, to) in runs(chunk.mask) {
                        old.data[from..to].copy_from_slice(&chunk.data[from..to]);
                    }
                    old.mask |= chunk.mask;
                }
                _ => {
                    self.chunks.insert(number, chunk);
                }
            }
        }
    }
}

/// Returns the byte ranges of a chunk that `mask` says are known, joined where they touch.
pub(crate) fn runs(mask: u8) -> impl Iterator<Item = (usize, usize)> {
    let mut sector = 0;
    std::iter::from_fn(move || {
        while sector < 8 && mask & (1 << sector) == 0 {
            sector += 1;
        }
        let first = sector;
        while sector < 8 && mask & (1 << sector) != 0 {
            sector += 1;
        }
        (first < sector).then_some((first * SECTOR, sector * SECTOR))
    })
}

fn mask_of(first: usize, count: usize) -> u8 {
    (first..first + count).fold(0, |mask, sector| mask | 1 << sector)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ranges_are_checked_without_overflow() {
        assert_eq!(check_range(4096, 0, 4096), Ok(()));
        assert_eq!(check_range(4096, 4096, 0), Ok(()));
        assert!(matches!(check_range(4096, 1, 512), Err(RangeError::Misaligned { .. })));
        assert!(matches!(check_range(4096, 512, 4096), Err(RangeError::Outside { .. })));
        assert!(matches!(
            check_range(4096, u64::MAX - 511, 512),
            Err(RangeError::Outside { .. })
        ));
    }

    #[test]
    fn footprint_counts_chunks_touched() {
        assert_eq!(footprint(0, 0), 0);
        assert_eq!(footprint(0, 512), 4096);
        assert_eq!(footprint(3584, 1024), 8192);
        assert_eq!(footprint(4096, 4096), 4096);
    }

    proptest! {
        #[test]
        fn a_map_is_a_patch(ops in prop::collection::vec((any::<bool>(), 0_u64..64, 1_usize..20, any::<u8>()), 1..40)) {
            const SIZE: usize = 84 * 512;
            let mut flat = vec![0xaa; SIZE];
            let mut older = SectorMap::default();
            let mut newer = SectorMap::default();
            // Writes to the newer map are replayed onto the flat array after all of the older ones.
            for pass in [false, true] {
                for (late, sector, count, value) in ops.iter().filter(|op| op.0 == pass) {
                    let data = vec![*value; count * 512];
                    let map = if *late { &mut newer } else { &mut older };
                    let before = map.bytes();
                    let growth = map.growth(sector * 512, data.len());
                    map.write(sector * 512, &data);
                    prop_assert_eq!(map.bytes(), before + growth);
                    prop_assert!(growth <= footprint(sector * 512, data.len() as u64));
                    flat[to_usize(sector * 512)..][..data.len()].copy_from_slice(&data);
                }
            }
            older.merge(newer);
            let mut read = vec![0xaa; SIZE];
            older.read(0, &mut read);
            prop_assert_eq!(&read, &flat);
            for (_, sector, count, _) in &ops {
                let mut part = vec![0xaa; count * 512];
                older.read(sector * 512, &mut part);
                prop_assert_eq!(&part[..], &flat[to_usize(sector * 512)..][..part.len()]);
            }
        }
    }
}
