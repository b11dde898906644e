//! The key-value store's format on its disk.
//!
//! ```text
//! sector 0          superblock, copy for even generations
//! sector 8          superblock, copy for odd generations
//! sector 16 …       half 0 of the log
//! sector 16 + h …   half 1 of the log          h = (capacity − 16) / 2 sectors
//! ```
//! A superblock names the half in use and its generation; the valid copy with the higher generation counts. A half
//! is a sequence of records, one after the other, numbered from 0, ended by an end record. A record is
//! `crc32 u32 · index u64 · kind u8 · 0 u8 · key bytes u16 · value bytes u32 · key · value`, little endian; the
//! checksum covers the generation and everything after itself, so that what an earlier generation left behind
//! is never taken for a record. The first record that does not hold ends the log: without a valid end record
//! in its place the tail was torn.

use alloc::vec::Vec;

/// Bytes of a sector.
pub const SECTOR: usize = 512;
/// Longest key in bytes.
pub const KEY_MAX: usize = 1024;
/// Longest value in bytes.
pub const VALUE_MAX: usize = 64 * 1024;
/// Bytes of a record without key and value.
pub const RECORD_HEADER: usize = 20;
/// Fewest sectors a disk can have (1 MiB).
pub const CAPACITY_MIN: u64 = 2048;

const MAGIC: [u8; 8] = *b"TANDEMKV";
const VERSION: u32 = 1;
const SUPERBLOCK_BYTES: usize = 36;
const FIRST_HALF: u64 = 16;
const COPY_STRIDE: u64 = 8;

/// What one record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry<'a> {
    /// `key` has `value`.
    Set {
        /// The key.
        key: &'a [u8],
        /// Its value.
        value: &'a [u8],
    },
    /// `key` is gone.
    Delete {
        /// The key.
        key: &'a [u8],
    },
    /// All keys are gone.
    Clear,
    /// The log ends here.
    End,
}

/// What the bytes at a place of the log are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decoded<'a> {
    /// A record and its length.
    Record(Entry<'a>, usize),
    /// The beginning of what may be a record: more bytes are needed.
    Short,
    /// No record of this generation and index.
    Broken,
}

impl Entry<'_> {
    /// Counts the bytes of the record.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let (_, key, value) = self.parts();
        RECORD_HEADER + key.len() + value.len()
    }

    /// Appends the record to `out`.
    pub fn encode(&self, generation: u64, index: u64, out: &mut Vec<u8>) {
        let (kind, key, value) = self.parts();
        let start = out.len();
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&index.to_le_bytes());
        out.extend_from_slice(&[kind, 0]);
        out.extend_from_slice(&u16::try_from(key.len()).unwrap_or(u16::MAX).to_le_bytes());
        out.extend_from_slice(&u32::try_from(value.len()).unwrap_or(u32::MAX).to_le_bytes());
        out.extend_from_slice(key);
        out.extend_from_slice(value);
        let checksum = checksum(generation, &out[start + 4..]);
        out[start..start + 4].copy_from_slice(&checksum.to_le_bytes());
    }

    fn parts(&self) -> (u8, &[u8], &[u8]) {
        match self {
            Self::End => (0, &[], &[]),
            Self::Set { key, value } => (1, key, value),
            Self::Delete { key } => (2, key, &[]),
            Self::Clear => (3, &[], &[]),
        }
    }
}

/// Reads the record at the beginning of `bytes`.
#[must_use]
pub fn decode(bytes: &[u8], generation: u64, index: u64) -> Decoded<'_> {
    let Some(header) = bytes.get(..RECORD_HEADER) else {
        return Decoded::Short;
    };
    let (kind, padding) = (header[12], header[13]);
    let key_bytes = usize::from(u16::from_le_bytes([header[14], header[15]]));
    let value_bytes = number(&header[16..20]);
    if number(&header[4..12]) != index || padding != 0 || key_bytes > KEY_MAX || value_bytes > VALUE_MAX as u64 {
        return Decoded::Broken;
    }
    let length = RECORD_HEADER + key_bytes + usize::try_from(value_bytes).unwrap_or(0);
    let Some(record) = bytes.get(..length) else {
        return Decoded::Short;
    };
    if u64::from(checksum(generation, &record[4..])) != number(&record[..4]) {
        return Decoded::Broken;
    }
    let (key, value) = record[RECORD_HEADER..].split_at(key_bytes);
    match kind {
        0 if key.is_empty() && value.is_empty() => Decoded::Record(Entry::End, length),
        1 => Decoded::Record(Entry::Set { key, value }, length),
        2 if value.is_empty() => Decoded::Record(Entry::Delete { key }, length),
        3 if key.is_empty() && value.is_empty() => Decoded::Record(Entry::Clear, length),
        _ => Decoded::Broken,
    }
}

/// Says which half is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Raised with each change of the half.
    pub generation: u64,
    /// The half in use, 0 or 1.
    pub half: u32,
    /// Sectors of each half.
    pub half_sectors: u64,
}

/// What a sector that should hold a superblock holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SuperblockSector {
    /// Nothing but zeroes.
    Blank,
    /// A superblock.
    Valid(Superblock),
    /// A superblock that another version of this program wrote.
    OtherVersion(u32),
    /// Something else, or a torn superblock.
    Broken,
}

impl Superblock {
    /// Makes the first superblock for a disk of `capacity` sectors; `None` if that is too small.
    #[must_use]
    pub fn first(capacity: u64) -> Option<Self> {
        (capacity >= CAPACITY_MIN).then(|| Self {
            generation: 1,
            half: 0,
            half_sectors: (capacity - FIRST_HALF) / 2,
        })
    }

    /// The superblock after a compaction into the other half.
    #[must_use]
    pub fn next(&self) -> Self {
        Self {
            generation: self.generation + 1,
            half: 1 - self.half,
            half_sectors: self.half_sectors,
        }
    }

    /// The sector this superblock is written to.
    #[must_use]
    pub fn sector(&self) -> u64 {
        Self::copy_sector(self.generation % 2)
    }

    /// The sector of a copy: 0 or 1.
    #[must_use]
    pub fn copy_sector(copy: u64) -> u64 {
        copy * COPY_STRIDE
    }

    /// The first sector of the half in use.
    #[must_use]
    pub fn half_start(&self) -> u64 {
        FIRST_HALF + u64::from(self.half) * self.half_sectors
    }

    /// Bytes of each half.
    #[must_use]
    pub fn half_bytes(&self) -> u64 {
        self.half_sectors * SECTOR as u64
    }

    /// Whether all of it lies on a disk of `capacity` sectors.
    #[must_use]
    pub fn fits(&self, capacity: u64) -> bool {
        self.half_sectors
            .checked_mul(2)
            .and_then(|both| both.checked_add(FIRST_HALF))
            .is_some_and(|end| end <= capacity)
    }

    /// Writes it as a sector.
    #[must_use]
    pub fn encode(&self) -> [u8; SECTOR] {
        let mut bytes = Vec::with_capacity(SUPERBLOCK_BYTES);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&self.half.to_le_bytes());
        bytes.extend_from_slice(&self.generation.to_le_bytes());
        bytes.extend_from_slice(&self.half_sectors.to_le_bytes());
        let checksum = crc32fast::hash(&bytes);
        bytes.extend_from_slice(&checksum.to_le_bytes());
        let mut sector = [0; SECTOR];
        sector[..SUPERBLOCK_BYTES].copy_from_slice(&bytes);
        sector
    }

    /// Reads a sector.
    #[must_use]
    pub fn decode(sector: &[u8]) -> SuperblockSector {
        if sector.iter().all(|byte| *byte == 0) {
            return SuperblockSector::Blank;
        }
        let Some(bytes) = sector.get(..SUPERBLOCK_BYTES) else {
            return SuperblockSector::Broken;
        };
        if bytes[..8] != MAGIC {
            return SuperblockSector::Broken;
        }
        let version = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
        if version != VERSION {
            return SuperblockSector::OtherVersion(version);
        }
        let half = u32::from_le_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]);
        let sound = u64::from(crc32fast::hash(&bytes[..32])) == number(&bytes[32..36]) && half <= 1;
        if !sound {
            return SuperblockSector::Broken;
        }
        SuperblockSector::Valid(Self {
            generation: number(&bytes[16..24]),
            half,
            half_sectors: number(&bytes[24..32]),
        })
    }
}

fn checksum(generation: u64, bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&generation.to_le_bytes());
    hasher.update(bytes);
    hasher.finalize()
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn encoded(entry: &Entry<'_>, generation: u64, index: u64) -> Vec<u8> {
        let mut out = Vec::new();
        entry.encode(generation, index, &mut out);
        assert_eq!(out.len(), entry.bytes());
        out
    }

    #[test]
    fn superblocks_survive_the_round_trip_and_any_flip_is_noticed() {
        let superblock = Superblock::first(4096).unwrap().next();
        let sector = superblock.encode();
        assert_eq!(Superblock::decode(&sector), SuperblockSector::Valid(superblock));
        for bit in 0..SUPERBLOCK_BYTES * 8 {
            let mut flipped = sector;
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(
                !matches!(Superblock::decode(&flipped), SuperblockSector::Valid(_)),
                "bit {bit}"
            );
        }
        assert_eq!(Superblock::decode(&[0; SECTOR]), SuperblockSector::Blank);
        assert_eq!(Superblock::first(CAPACITY_MIN - 1), None);
        assert!(superblock.fits(4096) && !superblock.fits(4095));
    }

    proptest! {
        #[test]
        fn records_survive_the_round_trip(
            key in vec(any::<u8>(), 0..40), value in vec(any::<u8>(), 0..200), generation: u64, index: u64,
        ) {
            for entry in [Entry::Set { key: &key, value: &value }, Entry::Delete { key: &key }, Entry::Clear, Entry::End] {
                let bytes = encoded(&entry, generation, index);
                prop_assert_eq!(decode(&bytes, generation, index), Decoded::Record(entry, bytes.len()));
                prop_assert_eq!(decode(&bytes[..bytes.len() - 1], generation, index), Decoded::Short);
                prop_assert_eq!(decode(&bytes, generation.wrapping_add(1), index), Decoded::Broken);
                prop_assert_eq!(decode(&bytes, generation, index.wrapping_add(1)), Decoded::Broken);
            }
        }

        #[test]
        fn a_changed_record_is_never_taken(
            key in vec(any::<u8>(), 0..20), value in vec(any::<u8>(), 0..50), bit: prop::sample::Index,
        ) {
            let mut bytes = encoded(&Entry::Set { key: &key, value: &value }, 5, 9);
            let bit = bit.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(!matches!(decode(&bytes, 5, 9), Decoded::Record(..)));
        }

        #[test]
        fn any_bytes_get_an_answer(bytes in vec(any::<u8>(), 0..200), index in 0_u64..3) {
            let _ = decode(&bytes, 1, index);
            let _ = Superblock::decode(&bytes);
        }
    }
}
