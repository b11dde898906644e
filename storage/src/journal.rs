//! The journal: makes a batch of writes to the base image all or nothing.
//!
//! A batch is written to the journal and flushed, then applied to the base and flushed, then the journal is
//! retired. A crash before the first flush has ended leaves a journal whose digest does not hold (or one of an
//! earlier batch, which the base already has): the base is untouched. A crash later leaves a complete journal,
//! and [`recover`] applies it again, which is harmless as often as it happens.
//!
//! ```text
//!   0      header: magic, state, kind, generation, epoch, image size, count, digest, checksum   (one sector)
//!   4096   index: extents of zeros, each with its first chunk and 256 times how many              (16 bytes each)
//!                 then for each chunk its number and the mask of the sectors written              (16 bytes each)
//!   …      the chunks, 4 KiB each, in ascending order
//! ```
//!
//! Zeros go into the base first, then the chunks. A journal of the first version has no extents of zeros and is read as well;
//! one of a later version is refused, and nothing is done to it.
//!
//! The digest covers header, index and chunks, so that order and completeness of unflushed writes do not matter
//! and no end mark is needed. A retired journal still tells the last (generation, epoch) that the base holds.
//!
//! Retiring is not always flushed at once: a journal that comes back after a crash is that of the batch which the
//! base already holds. It *is* flushed before anything else may write to the base, that is at a takeover and
//! by [`recover`].
//!
//! Called by [`crate::replica`]'s job on its thread, and once at every start. Takes every byte of the file for hostile.

use std::io;
use std::ops::Range;

use checkpoint::limits::BLOCK_BYTES;
use checkpoint::mutants::{self, Mutant};
use checkpoint::{Epoch, Generation, Tag};

use crate::backed::Backed;
use crate::changed::BlockSet;
use crate::image::{Image, Room};
use crate::sectors::{CHUNK_BYTES, Chunk, SectorMap, runs, to_usize};

/// The version follows, as a digit.
const MAGIC: [u8; 7] = *b"TandemJ";
const VERSION: u8 = 2;
const HEADER: usize = 512;
const INDEX_AT: u64 = 4096;
const INDEX_ENTRY: usize = 16;
const CHUNK: u64 = CHUNK_BYTES as u64;
const BLOCK: u64 = BLOCK_BYTES as u64;
/// Largest single read or write, in chunks.
const PIECE_CHUNKS: usize = 256;
/// Zeros that go into the base at once, in chunks: as long the guest of a secondary may wait for room. A file system gives 4 MiB
/// back in one or two milliseconds.
const ZEROS_CHUNKS: u64 = 1_024;

/// What a batch is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The primary's writes, up to and including the tag's epoch.
    Commit,
    /// The secondary's own writes since the tag's epoch.
    TakeOver,
}

/// What [`recover`] found and did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recovery {
    /// The journal has never been used, or not for this image.
    Fresh,
    /// The base was whole already.
    Clean(Last),
    /// A complete batch was applied to the base (perhaps once more).
    Replayed(Last),
    /// A batch that never became complete was thrown away; the base does not have any of it.
    Discarded,
}

/// The batch that the base last took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Last {
    /// Generation and epoch it was committed in. After a takeover: the last epoch before it.
    pub tag: Tag,
    /// Where its writes came from.
    pub kind: Kind,
}

/// Why the journal could not be brought in.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// The journal is whole, but belongs to another image.
    #[error(
        "the journal was written for an image of {journal} bytes, but this image has {image}; \
         put the right image back, or delete the journal if its writes may be lost"
    )]
    Foreign {
        /// Size of the image it was written for.
        journal: u64,
        /// Size of the image it was found beside.
        image: u64,
    },
    /// Written by a later version of the program.
    #[error(
        "the journal has format {version}, this program knows up to {VERSION}; run the newer program, or delete the journal if \
         its writes may be lost"
    )]
    Version {
        /// Its format.
        version: u8,
    },
    /// The journal is whole by its digest, yet describes something that cannot be.
    #[error("the journal is damaged ({what}); delete it and let this side be resynchronised from its peer")]
    Damaged {
        /// What is wrong.
        what: &'static str,
    },
    /// A read, write or flush failed.
    #[error("the journal could not be applied to the disk image; free the disk of errors and start again")]
    Io(#[from] io::Error),
}

impl Recovery {
    /// Returns the last batch that the base holds, if the journal tells.
    ///
    /// The durable record decides if it is of a later generation: once alone, a side writes without the journal.
    #[must_use]
    pub fn last(&self) -> Option<Last> {
        match self {
            Self::Clean(last) | Self::Replayed(last) => Some(*last),
            Self::Fresh | Self::Discarded => None,
        }
    }
}

/// Brings the base into the one state or the other after a stop or crash. To be called at every start, before anything
/// reads the image. May itself be interrupted anywhere and called again.
///
/// # Errors
/// If the journal is whole but cannot be applied; the image must not be used then.
pub fn recover<I: Image + ?Sized>(image: &I, journal: &I) -> Result<Recovery, RecoverError> {
    let mut sector = [0; HEADER];
    journal.read_at(0, &mut sector)?;
    if sector == [0; HEADER] {
        // Written again for the same reason as a retirement, below.
        forget(journal)?;
        return Ok(Recovery::Fresh);
    }
    let Some(header) = Header::decode(&sector)? else {
        return discard(journal);
    };
    let same_size = header.image_bytes == image.size();
    match (header.full, same_size) {
        (true, true) => {}
        (true, false) => {
            return Err(RecoverError::Foreign {
                journal: header.image_bytes,
                image: image.size(),
            });
        }
        (false, true) => {
            // The retirement may not be durable, and what follows may write to the base without the journal. It is written
            // again: a flush that failed before may have lost it, and no later one would bring it back.
            retire(journal, image.size(), header.last)?;
            journal.flush()?;
            return Ok(Recovery::Clean(header.last));
        }
        // The image was replaced or resized; there is nothing to bring in.
        (false, false) => return Ok(Recovery::Fresh),
    }
    let Some(index) = verified_index(journal, &header)? else {
        return discard(journal);
    };
    index.check(image.size())?;
    write_again(journal, header.data_at() + index.chunks.len() as u64 * CHUNK)?;
    let mut data_at = header.data_at();
    let mut piece = vec![0; PIECE_CHUNKS * CHUNK_BYTES];
    let own = blocks_of(index.chunks.iter().map(|(number, _)| *number));
    for extent in index.zeros {
        zero(image, extent, |block| own.contains(block))?;
    }
    let mut writer = Applier::new(image);
    for entries in index.chunks.chunks(PIECE_CHUNKS) {
        let piece = &mut piece[..entries.len() * CHUNK_BYTES];
        journal.read_at(data_at, piece)?;
        data_at += piece.len() as u64;
        for ((number, mask), data) in entries.iter().zip(piece.chunks_exact(CHUNK_BYTES)) {
            writer.put(*number, *mask, data)?;
        }
    }
    writer.finish()?;
    image.flush()?;
    retire(journal, image.size(), header.last)?;
    journal.flush()?;
    Ok(Recovery::Replayed(header.last))
}

/// Makes the journal tell nothing any more, durably: the base is about to be written past it.
///
/// # Errors
/// If the journal cannot be written.
pub fn forget<I: Image + ?Sized>(journal: &I) -> io::Result<()> {
    journal.write_at(0, &[0; HEADER])?;
    journal.flush()
}

/// Returns the size of a journal that takes batches of up to `batch` bytes of chunks.
#[must_use]
pub fn size_for(batch: u64) -> u64 {
    let chunks = batch.div_ceil(CHUNK);
    INDEX_AT + index_bytes(chunks) + chunks * CHUNK
}

/// Returns the largest batch, in bytes of chunks, that a journal of `size` bytes takes.
#[must_use]
pub fn batch_for(size: u64) -> u64 {
    let mut chunks = size.saturating_sub(INDEX_AT) / CHUNK;
    while chunks > 0 && size_for(chunks * CHUNK) > size {
        chunks -= 1;
    }
    chunks * CHUNK
}

/// Writes a batch. It counts once the journal has been flushed.
pub(crate) fn write<I: Image + ?Sized>(journal: &I, image_bytes: u64, last: Last, batch: &SectorMap) -> io::Result<()> {
    let mut header = Header {
        version: VERSION,
        full: true,
        last,
        image_bytes,
        count: batch.bytes() / CHUNK,
        digest: [0; 32],
    };
    let mut digest = header.hasher();
    let mut index = Vec::with_capacity(to_usize(index_bytes(header.count)));
    for extent in batch.zeros() {
        index.extend_from_slice(&extent.start.to_le_bytes());
        index.extend_from_slice(&((extent.end - extent.start) << 8).to_le_bytes());
    }
    for (number, chunk) in batch.iter() {
        index.extend_from_slice(&number.to_le_bytes());
        index.extend_from_slice(&u64::from(chunk.mask).to_le_bytes());
    }
    digest.update(&index);
    journal.write_at(INDEX_AT, &index)?;
    let mut data_at = header.data_at();
    let mut piece = Vec::with_capacity(PIECE_CHUNKS * CHUNK_BYTES);
    let mut chunks = batch.iter().peekable();
    while let Some((_, chunk)) = chunks.next() {
        piece.extend_from_slice(&chunk.data[..]);
        if piece.len() == PIECE_CHUNKS * CHUNK_BYTES || chunks.peek().is_none() {
            digest.update(&piece);
            journal.write_at(data_at, &piece)?;
            data_at += piece.len() as u64;
            piece.clear();
        }
    }
    header.digest = *digest.finalize().as_bytes();
    journal.write_at(0, &header.encode())
}

/// Applies a batch to the base. Not flushed. Blocks that are `backed` keep their room; nobody counts on another one from here on
/// without asking again.
pub(crate) fn apply<I: Image + ?Sized>(image: &I, batch: &SectorMap, backed: &Backed) -> io::Result<()> {
    let own = blocks_of(batch.iter().map(|(number, _)| number));
    for extent in batch.zeros() {
        for start in extent.clone().step_by(to_usize(ZEROS_CHUNKS)) {
            let backed = backed.lock_after_others();
            let piece = start..extent.end.min(start + ZEROS_CHUNKS);
            zero(image, piece, |block| own.contains(block) || backed.contains(block))?;
        }
    }
    let mut writer = Applier::new(image);
    for (number, Chunk { mask, data }) in batch.iter() {
        writer.put(number, *mask, &data[..])?;
    }
    writer.finish()
}

/// Marks the journal as no longer needed. Not flushed.
pub(crate) fn retire<I: Image + ?Sized>(journal: &I, image_bytes: u64, last: Last) -> io::Result<()> {
    journal.write_at(
        0,
        &Header {
            version: VERSION,
            full: false,
            last,
            image_bytes,
            count: 0,
            digest: [0; 32],
        }
        .encode(),
    )
}

/// Makes a whole journal durable, up to `end`. What reads show of it may be on no medium: a flush that failed may have lost it,
/// and no later one would bring it back. Interrupted anywhere, it is as whole as before, or was on no medium.
fn write_again<I: Image + ?Sized>(journal: &I, end: u64) -> io::Result<()> {
    let mut piece = vec![0; PIECE_CHUNKS * CHUNK_BYTES];
    let mut at = 0;
    while at < end {
        let length = piece.len().min(to_usize(end - at));
        journal.read_at(at, &mut piece[..length])?;
        journal.write_at(at, &piece[..length])?;
        at += length as u64;
    }
    journal.flush()
}

/// Returns the blocks that these chunks are in.
fn blocks_of(chunks: impl Iterator<Item = u64>) -> BlockSet {
    let mut blocks = BlockSet::default();
    chunks.for_each(|number| {
        blocks.insert(number * CHUNK / BLOCK);
    });
    blocks
}

/// Zeros chunks of the base, and gives their room back but in blocks that keep it.
fn zero<I: Image + ?Sized>(image: &I, chunks: Range<u64>, keeps: impl Fn(u64) -> bool) -> io::Result<()> {
    let (mut at, end) = (chunks.start * CHUNK, chunks.end * CHUNK);
    while at < end {
        let mut block = at / BLOCK;
        let kept = keeps(block);
        block += 1;
        while block * BLOCK < end && keeps(block) == kept {
            block += 1;
        }
        let stop = end.min(block * BLOCK);
        image.zero(at, stop - at, if kept { Room::Keep } else { Room::GiveBack })?;
        at = stop;
    }
    Ok(())
}

fn discard<I: Image + ?Sized>(journal: &I) -> Result<Recovery, RecoverError> {
    forget(journal)?;
    Ok(Recovery::Discarded)
}

fn index_bytes(chunks: u64) -> u64 {
    (chunks * INDEX_ENTRY as u64).next_multiple_of(CHUNK)
}

/// What a journal says of its batch.
struct Index {
    /// Extents of zeros, by the numbers of their chunks.
    zeros: Vec<Range<u64>>,
    /// Chunks above them, each with the mask of its known sectors.
    chunks: Vec<(u64, u8)>,
}

impl Index {
    /// Splits the index; `None` if it is none.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let (mut zeros, mut chunks) = (Vec::new(), Vec::new());
        for entry in bytes.chunks_exact(INDEX_ENTRY) {
            let (number, what) = (le_u64(&entry[..8]), le_u64(&entry[8..]));
            match (entry[8], what >> 8) {
                (0, count) if chunks.is_empty() => zeros.push(number..number.checked_add(count)?),
                (mask @ 1.., 0) => chunks.push((number, mask)),
                _ => return None,
            }
        }
        Some(Self { zeros, chunks })
    }

    fn check(&self, image_bytes: u64) -> Result<(), RecoverError> {
        let damaged = |what| Err(RecoverError::Damaged { what });
        let chunks = image_bytes.div_ceil(CHUNK);
        for (number, mask) in &self.chunks {
            if *number >= chunks {
                return damaged("a write beyond the end of the image");
            }
            let sectors_left = (image_bytes - number * CHUNK) / crate::SECTOR_BYTES;
            if sectors_left < 8 && mask >> sectors_left != 0 {
                return damaged("a write beyond the end of the image");
            }
        }
        if self.zeros.iter().any(|extent| extent.end > image_bytes / CHUNK) {
            return damaged("zeros beyond the end of the image");
        }
        let ascends = self.zeros.iter().all(|extent| !extent.is_empty())
            && self.zeros.windows(2).all(|pair| pair[0].end <= pair[1].start)
            && self.chunks.windows(2).all(|pair| pair[0].0 < pair[1].0);
        if ascends {
            Ok(())
        } else {
            damaged("writes out of order")
        }
    }
}

/// Reads and checks everything behind the header. `None` if it is not what the header says.
fn verified_index<I: Image + ?Sized>(journal: &I, header: &Header) -> Result<Option<Index>, RecoverError> {
    if header.count > batch_for(journal.size()) / CHUNK {
        return Ok(None);
    }
    let mut digest = header.hasher();
    let mut index = vec![0; to_usize(header.count) * INDEX_ENTRY];
    journal.read_at(INDEX_AT, &mut index)?;
    digest.update(&index);
    let Some(index) = Index::parse(&index) else {
        return Ok(None);
    };
    let mut piece = vec![0; PIECE_CHUNKS * CHUNK_BYTES];
    let (mut at, mut left) = (header.data_at(), index.chunks.len() * CHUNK_BYTES);
    while left > 0 {
        let piece = &mut piece[..left.min(PIECE_CHUNKS * CHUNK_BYTES)];
        journal.read_at(at, piece)?;
        digest.update(piece);
        at += piece.len() as u64;
        left -= piece.len();
    }
    if digest.finalize() != header.digest && !mutants::on(Mutant::TrustJournal) {
        return Ok(None);
    }
    Ok(Some(index))
}

/// Writes known sectors to an image, neighbours in one piece.
struct Applier<'a, I: ?Sized> {
    image: &'a I,
    at: u64,
    piece: Vec<u8>,
}

impl<'a, I: Image + ?Sized> Applier<'a, I> {
    fn new(image: &'a I) -> Self {
        Self {
            image,
            at: 0,
            piece: Vec::with_capacity(PIECE_CHUNKS * CHUNK_BYTES),
        }
    }

    fn put(&mut self, number: u64, mask: u8, data: &[u8]) -> io::Result<()> {
        for (from, to) in runs(mask) {
            let at = number * CHUNK + from as u64;
            if self.at + self.piece.len() as u64 != at || self.piece.len() >= PIECE_CHUNKS * CHUNK_BYTES {
                self.image.write_at(self.at, &self.piece)?;
                self.piece.clear();
                self.at = at;
            }
            self.piece.extend_from_slice(&data[from..to]);
        }
        Ok(())
    }

    fn finish(self) -> io::Result<()> {
        self.image.write_at(self.at, &self.piece)
    }
}

struct Header {
    version: u8,
    full: bool,
    last: Last,
    image_bytes: u64,
    count: u64,
    digest: [u8; 32],
}

impl Header {
    fn data_at(&self) -> u64 {
        INDEX_AT + index_bytes(self.count)
    }

    /// Starts the digest with everything that the header says.
    fn hasher(&self) -> blake3::Hasher {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.fields());
        hasher
    }

    fn fields(&self) -> [u8; 48] {
        let mut fields = [0; 48];
        fields[..7].copy_from_slice(&MAGIC);
        fields[7] = b'0' + self.version;
        fields[8] = self.full.into();
        fields[9] = match self.last.kind {
            Kind::Commit => 0,
            Kind::TakeOver => 1,
        };
        fields[16..24].copy_from_slice(&self.last.tag.generation.0.to_le_bytes());
        fields[24..32].copy_from_slice(&self.last.tag.epoch.0.to_le_bytes());
        fields[32..40].copy_from_slice(&self.image_bytes.to_le_bytes());
        fields[40..48].copy_from_slice(&self.count.to_le_bytes());
        fields
    }

    fn encode(&self) -> [u8; HEADER] {
        let mut sector = [0; HEADER];
        sector[..48].copy_from_slice(&self.fields());
        sector[48..80].copy_from_slice(&self.digest);
        let checksum = crc32fast::hash(&sector[..HEADER - 4]);
        sector[HEADER - 4..].copy_from_slice(&checksum.to_le_bytes());
        sector
    }

    /// `None` if it is torn, or no header at all.
    fn decode(sector: &[u8; HEADER]) -> Result<Option<Self>, RecoverError> {
        let checksum = crc32fast::hash(&sector[..HEADER - 4]).to_le_bytes();
        if sector[..7] != MAGIC || sector[HEADER - 4..] != checksum {
            return Ok(None);
        }
        let version = sector[7].wrapping_sub(b'0');
        if !(1..=VERSION).contains(&version) {
            return Err(RecoverError::Version { version });
        }
        if sector[8] > 1 || sector[9] > 1 {
            return Ok(None);
        }
        let tag = Tag {
            generation: Generation(le_u64(&sector[16..24])),
            epoch: Epoch(le_u64(&sector[24..32])),
        };
        let mut digest = [0; 32];
        digest.copy_from_slice(&sector[48..80]);
        Ok(Some(Self {
            version,
            full: sector[8] == 1,
            last: Last {
                tag,
                kind: if sector[9] == 0 { Kind::Commit } else { Kind::TakeOver },
            },
            image_bytes: le_u64(&sector[32..40]),
            count: le_u64(&sector[40..48]),
            digest,
        }))
    }
}

fn le_u64(bytes: &[u8]) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(bytes);
    u64::from_le_bytes(value)
}

#[cfg(test)]
mod tests;
