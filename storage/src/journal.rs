//! The journal: makes a batch of writes to the base image all or nothing.
//!
//! A batch is written to the journal and flushed, then applied to the base and flushed, then the journal is
//! retired. A crash before the first flush has ended leaves a journal whose digest does not hold (or one of an
//! earlier batch, which the base already has): the base is untouched. A crash later leaves a complete journal,
//! and [`recover`] applies it again, which is harmless as often as it happens.
//!
//! ```text
//!   0      header: magic, state, kind, generation, epoch, image size, count, digest, checksum   (one sector)
//!   4096   index: for each chunk its number and the mask of the sectors written                  (16 bytes each)
//!   …      the chunks, 4 KiB each, in ascending order
//! ```
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

use checkpoint::mutants::{self, Mutant};
use checkpoint::{Epoch, Generation, Tag};

use crate::image::Image;
use crate::sectors::{CHUNK_BYTES, Chunk, SectorMap, runs, to_usize};

const MAGIC: [u8; 8] = *b"TandemJ1";
const HEADER: usize = 512;
const INDEX_AT: u64 = 4096;
const INDEX_ENTRY: usize = 16;
const CHUNK: u64 = CHUNK_BYTES as u64;
/// Largest single read or write, in chunks.
const PIECE_CHUNKS: usize = 256;

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
    let Some(header) = Header::decode(&sector) else {
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
    check_index(&index, image.size())?;
    write_again(journal, header.data_at() + index.len() as u64 * CHUNK)?;
    let mut data_at = header.data_at();
    let mut piece = vec![0; PIECE_CHUNKS * CHUNK_BYTES];
    let mut writer = Applier::new(image);
    for entries in index.chunks(PIECE_CHUNKS) {
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
        full: true,
        last,
        image_bytes,
        count: batch.iter().len() as u64,
        digest: [0; 32],
    };
    let mut digest = header.hasher();
    let mut index = Vec::with_capacity(to_usize(index_bytes(header.count)));
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

/// Applies a batch to the base. Not flushed.
pub(crate) fn apply<I: Image + ?Sized>(image: &I, batch: &SectorMap) -> io::Result<()> {
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

fn discard<I: Image + ?Sized>(journal: &I) -> Result<Recovery, RecoverError> {
    forget(journal)?;
    Ok(Recovery::Discarded)
}

fn index_bytes(chunks: u64) -> u64 {
    (chunks * INDEX_ENTRY as u64).next_multiple_of(CHUNK)
}

/// Reads and checks everything behind the header. `None` if it is not what the header says.
fn verified_index<I: Image + ?Sized>(journal: &I, header: &Header) -> Result<Option<Vec<(u64, u8)>>, RecoverError> {
    if header.count > batch_for(journal.size()) / CHUNK {
        return Ok(None);
    }
    let mut digest = header.hasher();
    let mut index = vec![0; to_usize(header.count) * INDEX_ENTRY];
    journal.read_at(INDEX_AT, &mut index)?;
    digest.update(&index);
    let mut piece = vec![0; PIECE_CHUNKS * CHUNK_BYTES];
    let (mut at, mut left) = (header.data_at(), to_usize(header.count) * CHUNK_BYTES);
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
    let entries = index
        .chunks_exact(INDEX_ENTRY)
        .map(|entry| (le_u64(&entry[..8]), entry[8]));
    Ok(Some(entries.collect()))
}

fn check_index(index: &[(u64, u8)], image_bytes: u64) -> Result<(), RecoverError> {
    let chunks = image_bytes.div_ceil(CHUNK);
    for (position, (number, mask)) in index.iter().enumerate() {
        if *number >= chunks {
            return Err(RecoverError::Damaged {
                what: "a write beyond the end of the image",
            });
        }
        let sectors_left = (image_bytes - number * CHUNK) / crate::SECTOR_BYTES;
        if sectors_left < 8 && mask >> sectors_left != 0 {
            return Err(RecoverError::Damaged {
                what: "a write beyond the end of the image",
            });
        }
        if position > 0 && index[position - 1].0 >= *number {
            return Err(RecoverError::Damaged {
                what: "writes out of order",
            });
        }
    }
    Ok(())
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
        fields[..8].copy_from_slice(&MAGIC);
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

    fn decode(sector: &[u8; HEADER]) -> Option<Self> {
        let checksum = crc32fast::hash(&sector[..HEADER - 4]).to_le_bytes();
        if sector[..8] != MAGIC || sector[HEADER - 4..] != checksum || sector[8] > 1 || sector[9] > 1 {
            return None;
        }
        let tag = Tag {
            generation: Generation(le_u64(&sector[16..24])),
            epoch: Epoch(le_u64(&sector[24..32])),
        };
        let mut digest = [0; 32];
        digest.copy_from_slice(&sector[48..80]);
        Some(Self {
            full: sector[8] == 1,
            last: Last {
                tag,
                kind: if sector[9] == 0 { Kind::Commit } else { Kind::TakeOver },
            },
            image_bytes: le_u64(&sector[32..40]),
            count: le_u64(&sector[40..48]),
            digest,
        })
    }
}

fn le_u64(bytes: &[u8]) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(bytes);
    u64::from_le_bytes(value)
}

#[cfg(test)]
mod tests;
