//! Finds the blocks in which two disks differ, without sending the disks.
//!
//! Each block of [`BLOCK_BYTES`] has a hash of 16 bytes, keyed with a value drawn for each comparison, so that a guest
//! cannot prepare two blocks that look equal. A block of zeros has the hash zero and costs only the look at it.
//!
//! Used by the initial sync and by a resync whose map of changed blocks is lost.

use std::io;

use checkpoint::limits::BLOCK_BYTES;
use checkpoint::wire::Written;

use crate::image::Image;
use crate::sectors::to_usize;

const BLOCK: u64 = BLOCK_BYTES as u64;

/// The hash of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockHash(pub [u8; 16]);

/// The key of one comparison: random, the same on both sides.
#[derive(Clone)]
pub struct HashKey(pub [u8; 32]);

impl BlockHash {
    /// The hash of a block of zeros.
    pub const ZERO: Self = Self([0; 16]);
}

/// Returns the number of blocks of a disk; the last one may be shorter.
#[must_use]
pub fn block_count(size: u64) -> u64 {
    size.div_ceil(BLOCK)
}

/// Returns where a block begins and how long it is.
///
/// # Panics
/// If the disk has no such block.
#[must_use]
pub fn block_range(size: u64, block: u64) -> (u64, usize) {
    assert!(block < block_count(size), "block {block} of a disk of {size} bytes");
    (block * BLOCK, to_usize((size - block * BLOCK).min(BLOCK)))
}

/// Reads a block as it is to be sent: where it begins, and its content.
///
/// # Errors
/// If the image cannot be read.
pub fn read_block<I: Image + ?Sized>(image: &I, block: u64) -> io::Result<(u64, Written)> {
    let (offset, len) = block_range(image.size(), block);
    Ok((offset, read_written(image, offset, len)?))
}

/// Reads a part of an image as a write that would make it so. Zeros are told as such.
///
/// # Errors
/// If the image cannot be read.
pub fn read_written<I: Image + ?Sized>(image: &I, offset: u64, len: usize) -> io::Result<Written> {
    let mut data = vec![0; len];
    image.read_at(offset, &mut data)?;
    Ok(if is_zero(&data) {
        Written::Zeros(len as u64)
    } else {
        Written::Data(data.into())
    })
}

/// Returns the hash of a block's content.
#[must_use]
pub fn hash_block(key: &HashKey, data: &[u8]) -> BlockHash {
    if is_zero(data) {
        return BlockHash::ZERO;
    }
    let mut hash = [0; 16];
    hash.copy_from_slice(&blake3::keyed_hash(&key.0, data).as_bytes()[..16]);
    BlockHash(hash)
}

/// Returns the hashes of up to `count` blocks from `first` on; fewer at the end of the disk.
///
/// # Errors
/// If the image cannot be read.
pub fn hashes<I: Image + ?Sized>(image: &I, key: &HashKey, first: u64, count: usize) -> io::Result<Vec<BlockHash>> {
    let end = first.saturating_add(count as u64).min(block_count(image.size()));
    let mut buf = vec![0; BLOCK_BYTES];
    (first..end)
        .map(|block| {
            let (offset, len) = block_range(image.size(), block);
            image.read_at(offset, &mut buf[..len])?;
            Ok(hash_block(key, &buf[..len]))
        })
        .collect()
}

/// Returns the blocks from `first` on whose hash is not the peer's.
///
/// # Errors
/// If the image cannot be read, or the peer sent hashes for blocks that the disk does not have (`InvalidData`).
pub fn differing<I: Image + ?Sized>(image: &I, key: &HashKey, first: u64, peer: &[BlockHash]) -> io::Result<Vec<u64>> {
    let blocks = block_count(image.size());
    if first.checked_add(peer.len() as u64).is_none_or(|end| end > blocks) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!(
                "the peer sent {} block hashes from block {first} on, but the disk has {blocks} blocks",
                peer.len()
            ),
        ));
    }
    let own = hashes(image, key, first, peer.len())?;
    Ok((first..)
        .zip(own.iter().zip(peer))
        .filter(|(_, (own, peer))| own != peer)
        .map(|(block, _)| block)
        .collect())
}

/// Tells whether all bytes are zero.
#[must_use]
pub fn is_zero(data: &[u8]) -> bool {
    let (wide, rest) = data.as_chunks::<64>();
    wide.iter()
        .all(|chunk| chunk.iter().fold(0, |seen, byte| seen | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::SimDisk;
    use proptest::prelude::*;

    const KEY: HashKey = HashKey([5; 32]);

    #[test]
    fn zero_blocks_need_no_hashing() {
        assert_eq!(hash_block(&KEY, &[0; BLOCK_BYTES]), BlockHash::ZERO);
        assert_eq!(hash_block(&KEY, &[0; 512]), BlockHash::ZERO);
        for at in [0, 63, 64, 511] {
            let mut data = [0; 512];
            data[at] = 1;
            assert_ne!(hash_block(&KEY, &data), BlockHash::ZERO);
        }
        assert_ne!(hash_block(&KEY, &[1; 512]), hash_block(&HashKey([6; 32]), &[1; 512]));
    }

    #[test]
    fn a_block_of_zeros_is_told_as_such() {
        let image = SimDisk::new(1).image(BLOCK + 512);
        image.write_at(BLOCK, &[1; 512]).unwrap();
        assert_eq!(read_block(&*image, 0).unwrap(), (0, Written::Zeros(BLOCK)));
        assert_eq!(
            read_block(&*image, 1).unwrap(),
            (BLOCK, Written::Data(vec![1; 512].into()))
        );
    }

    #[test]
    fn hashes_end_with_the_disk() {
        let image = SimDisk::new(1).image(3 * BLOCK + 512);
        assert_eq!(hashes(&*image, &KEY, 2, 100).unwrap().len(), 2);
        assert!(hashes(&*image, &KEY, 4, 1).unwrap().is_empty());
        assert!(hashes(&*image, &KEY, u64::MAX, usize::MAX).unwrap().is_empty());
        assert_eq!(block_range(image.size(), 3), (3 * BLOCK, 512));
    }

    #[test]
    fn a_peer_with_more_blocks_is_refused() {
        let image = SimDisk::new(1).image(3 * BLOCK);
        assert!(differing(&*image, &KEY, 0, &[BlockHash::ZERO; 3]).unwrap().is_empty());
        assert_eq!(
            differing(&*image, &KEY, 1, &[BlockHash::ZERO; 3]).unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
        differing(&*image, &KEY, u64::MAX, &[BlockHash::ZERO]).unwrap_err();
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn exactly_the_changed_blocks_differ(writes in prop::collection::btree_map(0_u64..385, 1_u8.., 0..6)) {
            let disk = SimDisk::new(1);
            let (ours, theirs) = (disk.image(3 * BLOCK + 512), disk.image(3 * BLOCK + 512));
            for (sector, value) in &writes {
                theirs.write_at(sector * 512, &[*value; 512]).unwrap();
            }
            let peer = hashes(&*theirs, &KEY, 0, 4).unwrap();
            let expected: std::collections::BTreeSet<u64> = writes.keys().map(|sector| sector * 512 / BLOCK).collect();
            let found = differing(&*ours, &KEY, 0, &peer).unwrap();
            prop_assert!(found.into_iter().eq(expected));
        }
    }
}
