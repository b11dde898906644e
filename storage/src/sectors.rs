//! A sparse piece of a disk: the sectors that were written, and nothing else.
//!
//! The overlay, the epoch buffers and the batch being committed are each one [`SectorMap`]. Sectors are kept in
//! chunks of 4 KiB with one bit for each sector that is known, so that small writes cost one chunk of memory and
//! a long write costs no more than its length. Whole chunks of zeros lie beneath, as extents: however long, one costs what one
//! chunk does. All bounds are counted in chunks, see [`footprint`].

use std::collections::BTreeMap;
use std::ops::Range;

use checkpoint::wire::Written;

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

/// Returns what a write costs in the overlay or in an epoch buffer, at most, in bytes: the chunks of 4 KiB it touches; of zeros
/// those that it touches in part, and one for all the others.
///
/// Both ends count with this, so that what the primary lets through always fits the secondary's buffers.
#[must_use]
pub fn footprint(offset: u64, written: &Written) -> u64 {
    match written {
        Written::Data(data) => chunks_touched(offset, data.len() as u64) * CHUNK,
        Written::Zeros(len) => footprint_of_zeros(offset, *len),
    }
}

pub(crate) fn footprint_of_zeros(offset: u64, len: u64) -> u64 {
    let (edges, whole) = split(offset, len);
    let edges: u64 = edges.iter().map(|(offset, len)| chunks_touched(*offset, *len)).sum();
    (edges + u64::from(!whole.is_empty())) * CHUNK
}

fn chunks_touched(offset: u64, len: u64) -> u64 {
    if len == 0 {
        return 0;
    }
    offset.saturating_add(len - 1) / CHUNK - offset / CHUNK + 1
}

/// Splits a range into the whole chunks in it, by their numbers, and the rest before and after, as offset and length.
pub(crate) fn split(offset: u64, len: u64) -> ([(u64, u64); 2], Range<u64>) {
    let end = offset + len;
    let whole = offset.div_ceil(CHUNK)..end / CHUNK;
    if whole.is_empty() {
        return ([(offset, len), (end, 0)], 0..0);
    }
    let (from, to) = (whole.start * CHUNK, whole.end * CHUNK);
    ([(offset, from - offset), (to, end - to)], whole)
}

/// Checks that a range is made of whole sectors within a disk of `size` bytes.
pub(crate) fn check_range(size: u64, offset: u64, len: u64) -> Result<(), RangeError> {
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
    /// What is known above the zeros.
    chunks: BTreeMap<u64, Chunk>,
    /// Extents of whole chunks that are zeros where `chunks` does not know better: first chunk and end. They don't touch.
    zeros: BTreeMap<u64, u64>,
}

impl SectorMap {
    /// Returns the memory held, in bytes of chunks. An extent of zeros counts as one.
    pub(crate) fn bytes(&self) -> u64 {
        (self.chunks.len() + self.zeros.len()) as u64 * CHUNK
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.chunks.is_empty() && self.zeros.is_empty()
    }

    /// Returns the extents of zeros beneath the chunks, in ascending order, by the numbers of their chunks.
    pub(crate) fn zeros(&self) -> impl ExactSizeIterator<Item = Range<u64>> {
        self.zeros.iter().map(|(first, end)| *first..*end)
    }

    /// Tells whether any of these chunks has known sectors above the zeros.
    pub(crate) fn has_chunk_in(&self, numbers: Range<u64>) -> bool {
        self.chunks.range(numbers).next().is_some()
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

    /// Keeps zeros in a range, which has been checked.
    pub(crate) fn zero(&mut self, offset: u64, len: u64) {
        let (edges, whole) = split(offset, len);
        for (offset, len) in edges {
            self.write(offset, &[0; 2 * CHUNK_BYTES][..to_usize(len)]);
        }
        if !whole.is_empty() {
            self.zero_chunks(whole);
        }
    }

    fn zero_chunks(&mut self, Range { mut start, mut end }: Range<u64>) {
        self.chunks.extract_if(start..end, |_, _| true).for_each(drop);
        if let Some((first, last)) = self
            .zeros
            .range(..start)
            .next_back()
            .filter(|(_, last)| **last >= start)
        {
            (start, end) = (*first, end.max(*last));
        }
        while let Some((first, last)) = self.zeros.range(start..=end).next() {
            let first = *first;
            end = end.max(*last);
            self.zeros.remove(&first);
        }
        self.zeros.insert(start, end);
    }

    /// Copies the known sectors of the range into `buf` and leaves the others as they are.
    pub(crate) fn read(&self, offset: u64, buf: &mut [u8]) {
        if buf.is_empty() {
            return;
        }
        let end = offset + buf.len() as u64;
        // They don't overlap: from the last backwards, each ends before the one after it.
        for (first, last) in self.zeros.range(..end.div_ceil(CHUNK)).rev() {
            let (from, to) = ((first * CHUNK).max(offset), (last * CHUNK).min(end));
            if from >= to {
                break;
            }
            buf[to_usize(from - offset)..to_usize(to - offset)].fill(0);
        }
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
        for (first, end) in newer.zeros {
            self.zero_chunks(first..end);
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
        let data = |offset, len| footprint(offset, &Written::Data(vec![0; len].into()));
        assert_eq!(data(0, 0), 0);
        assert_eq!(data(0, 512), 4096);
        assert_eq!(data(3584, 1024), 8192);
        assert_eq!(data(4096, 4096), 4096);
        let zeros = |offset, len| footprint(offset, &Written::Zeros(len));
        assert_eq!(zeros(0, 512), 4096);
        assert_eq!(zeros(3584, 1024), 8192);
        assert_eq!(zeros(4096, 1 << 30), 4096);
        assert_eq!(zeros(3584, 1 << 30), 3 * 4096);
    }

    /// What is done to a map.
    #[derive(Clone, Debug)]
    enum Op {
        Write(u8),
        Zero,
    }

    fn ops() -> impl Strategy<Value = Vec<(bool, u64, usize, Op)>> {
        let op = prop_oneof![3 => any::<u8>().prop_map(Op::Write), 2 => Just(Op::Zero)];
        prop::collection::vec((any::<bool>(), 0_u64..64, 1_usize..30, op), 1..40)
    }

    proptest! {
        #[test]
        fn a_map_is_a_patch(ops in ops()) {
            const SIZE: usize = 94 * 512;
            let mut flat = vec![0xaa; SIZE];
            let mut older = SectorMap::default();
            let mut newer = SectorMap::default();
            // Writes to the newer map are replayed onto the flat array after all of the older ones.
            for pass in [false, true] {
                for (late, sector, count, op) in ops.iter().filter(|op| op.0 == pass) {
                    let map = if *late { &mut newer } else { &mut older };
                    let (offset, len) = (sector * 512, count * 512);
                    let before = map.bytes();
                    let part = &mut flat[to_usize(offset)..][..len];
                    match op {
                        Op::Write(value) => {
                            let data = vec![*value; len];
                            let growth = map.growth(offset, len);
                            map.write(offset, &data);
                            prop_assert_eq!(map.bytes(), before + growth);
                            prop_assert!(growth <= footprint(offset, &Written::Data(data.into())));
                            part.fill(*value);
                        }
                        Op::Zero => {
                            map.zero(offset, len as u64);
                            prop_assert!(map.bytes() <= before + footprint(offset, &Written::Zeros(len as u64)));
                            part.fill(0);
                        }
                    }
                    let extents: Vec<_> = map.zeros().collect();
                    prop_assert!(extents.iter().all(|extent| !extent.is_empty()));
                    prop_assert!(extents.windows(2).all(|pair| pair[0].end < pair[1].start), "{:?}", extents);
                }
            }
            let together = older.bytes() + newer.bytes();
            older.merge(newer);
            prop_assert!(older.bytes() <= together);
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
