//! The secondary's disk: what its guest sees, and what the primary has sent meanwhile.
//!
//! ```text
//!   protected ──reserve(n)──► (commit point) ──commit(n)──► protected, a CommitJob under way
//!       ├──abandon──► protected, buffers empty, overlay kept
//!       └──take_over──► promoted, a CommitJob under way ──committed──► settled ──into_image──► plain image
//! ```
//!
//! A commit or takeover counts in memory at once: the guest's next read sees it. What remains is I/O, and that is
//! the [`CommitJob`], which the shell runs on another thread and reports back to [`Replica::committed`]. One job
//! exists at a time; what is committed meanwhile waits, joined into one batch, and becomes the next job.
//!
//! Space is found before the commit point, never after it: the journal has its size from the beginning, the
//! base's blocks are reserved by [`Replica::reserve`] and, for the guest's own writes, by [`Replica::write`].
//!
//! A job that fails leaves this side without a disk to run on: it must not run and not contend. The journal is
//! brought in by [`crate::recover`] at its next start.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::ops::Range;
use std::sync::Arc;

use checkpoint::limits::{BLOCK_BYTES, EPOCH_WRITES_BYTES_MAX, OVERLAY_BYTES_MAX};
use checkpoint::mutants::{self, Mutant};
use checkpoint::wire::Written;
use checkpoint::{Epoch, Generation, Tag};

use crate::backed::Backed;
use crate::changed::BlockSet;
use crate::image::Image;
use crate::journal::{self, Kind, Last};
use crate::sectors::{CHUNK_BYTES, RangeError, SectorMap, check_range, footprint, footprint_of_zeros, split};

/// Epochs of the primary that may be buffered at a time: one being checkpointed, one running, and slack.
const BUFFERS_MAX: usize = 4;
const BLOCK: u64 = BLOCK_BYTES as u64;
const CHUNKS_PER_BLOCK: u64 = BLOCK / CHUNK_BYTES as u64;

/// What a replica may hold in memory, in bytes of 4 KiB chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The guest's own writes since the last commit.
    pub overlay: u64,
    /// The primary's writes of all uncommitted epochs together.
    pub staged: u64,
}

/// Why a guest's request or a write of the primary is refused.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Outside the disk or not whole sectors.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// The overlay is full: the guest must wait for a commit.
    #[error("the guest's writes since the last checkpoint fill the overlay; they go on after the next checkpoint")]
    OverlayFull,
    /// The image cannot be read, or has no room.
    #[error("the disk image failed")]
    Io(#[from] io::Error),
}

/// Why a mirrored write is refused. All but `Promoted` are the peer's fault.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum StageError {
    /// Outside the disk or not whole sectors.
    #[error("the primary sent a disk write that cannot be")]
    Range(#[from] RangeError),
    /// The epoch is complete already.
    #[error("the primary sent a disk write for epoch {epoch}, which ended with checkpoint {sealed}")]
    Sealed {
        /// The write's epoch.
        epoch: Epoch,
        /// The last epoch that takes no more writes.
        sealed: Epoch,
    },
    /// More data than the primary's own bound allows.
    #[error("the primary sent more disk writes than {limit} bytes for uncommitted epochs")]
    TooMuch {
        /// The bound.
        limit: u64,
    },
    /// More epochs at a time than the protocol knows.
    #[error("the primary sent disk writes for more than {BUFFERS_MAX} epochs at a time")]
    TooManyEpochs,
    /// This side has taken over.
    #[error("this side has taken over; it takes no more writes of its former primary")]
    Promoted,
}

/// Why an epoch cannot be committed, or not yet.
#[derive(Debug, thiserror::Error)]
pub enum ReserveError {
    /// The commits before it are still being written; ask again after the next [`Replica::committed`].
    #[error("earlier checkpoints are still being written to the disk")]
    Busy,
    /// No room on the host's file system, or the disk fails.
    #[error("no room for the primary's disk writes; free some space on the file system of the image")]
    Io(#[from] io::Error),
}

/// Why a job could not be finished. The base is the state before or, after the next start, the state after.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// The journal could not be written or flushed: the base is untouched.
    #[error("the journal of the disk image could not be written; this side is out of service until its disk is sound")]
    Journal(#[source] io::Error),
    /// The base could not be written or flushed: the next start finishes it from the journal.
    #[error("the disk image could not be written; this side is out of service until its disk is sound")]
    Apply(#[source] io::Error),
}

/// What a guest's flush means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// The guest is speculative: nothing it flushes is the pair's state yet. Answer at once.
    Done,
    /// This side has taken over: answer after [`Replica::into_image`] and a flush of the image.
    AfterTakeover,
}

/// The secondary's disk. See the module's documentation.
pub struct Replica<I: Image + ?Sized> {
    image: Arc<I>,
    journal: Arc<I>,
    limits: Limits,
    generation: Generation,
    /// The last epoch committed in memory.
    last: Epoch,
    /// The epoch that [`commit`](Self::commit) may be called for.
    reserved: Option<Epoch>,
    overlay: SectorMap,
    buffers: BTreeMap<Epoch, SectorMap>,
    /// Commits on their way into the base, oldest first. The first one's job is running.
    pending: VecDeque<Pending>,
    serial: u64,
    promoted: bool,
    /// Blocks of the base that have room on the host, and whose room somebody counts on: a job that zeros them leaves it there.
    backed: Arc<Backed>,
}

struct Pending {
    serial: u64,
    last: Last,
    batch: Arc<SectorMap>,
}

/// The I/O of one commit or takeover, to be run on another thread.
#[must_use = "a commit that is not run never becomes durable"]
pub struct CommitJob<I: Image + ?Sized> {
    image: Arc<I>,
    journal: Arc<I>,
    serial: u64,
    last: Last,
    batch: Arc<SectorMap>,
    backed: Arc<Backed>,
}

/// A finished job, to be given to [`Replica::committed`]: the base holds it durably.
#[derive(Debug, PartialEq, Eq)]
pub struct Done {
    serial: u64,
    last: Last,
    bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            overlay: OVERLAY_BYTES_MAX,
            staged: 2 * EPOCH_WRITES_BYTES_MAX,
        }
    }
}

impl Limits {
    /// Returns the batch that the journal must have room for, for a disk of `size` bytes.
    #[must_use]
    pub fn batch(&self, size: u64) -> u64 {
        // At worst every chunk of the disk, above an extent of zeros for every second one.
        let chunks = size.div_ceil(CHUNK_BYTES as u64);
        let whole = (chunks + chunks.div_ceil(2)).saturating_mul(CHUNK_BYTES as u64);
        self.overlay.max(self.staged).min(whole)
    }
}

impl<I: Image + ?Sized> Replica<I> {
    /// Starts on an image that holds the state `at`; [`crate::recover`] has been run on both files.
    ///
    /// # Panics
    /// If the journal is smaller than [`Limits::batch`] asks for.
    #[must_use]
    pub fn new(image: Arc<I>, journal: Arc<I>, limits: Limits, at: Tag) -> Self {
        assert!(
            journal::batch_for(journal.size()) >= limits.batch(image.size()),
            "the journal was opened with room"
        );
        Self {
            image,
            journal,
            limits,
            generation: at.generation,
            last: at.epoch,
            reserved: None,
            overlay: SectorMap::default(),
            buffers: BTreeMap::new(),
            pending: VecDeque::new(),
            serial: 0,
            promoted: false,
            backed: Arc::default(),
        }
    }

    /// Returns the size of the disk in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.image.size()
    }

    /// Returns the last commit in memory. It is durable once its job is done.
    #[must_use]
    pub fn last(&self) -> Tag {
        Tag {
            generation: self.generation,
            epoch: self.last,
        }
    }

    /// Drops overlay and buffers and hands out the base, so that an initial sync can write to it. The guest does not
    /// run. From here to [`end_sync`](Self::end_sync) the image is no whole state: the durable record says so first.
    ///
    /// # Errors
    /// If the journal cannot be flushed: an old batch could come back over what the sync writes.
    ///
    /// # Panics
    /// If a commit is under way or this side has taken over.
    pub fn begin_sync(&mut self) -> io::Result<Arc<I>> {
        assert!(
            self.pending.is_empty() && !self.promoted,
            "a sync in the middle of a commit or takeover"
        );
        self.overlay = SectorMap::default();
        self.abandon();
        // The sync gives room back as it likes.
        *self.backed.lock() = BlockSet::default();
        self.journal.flush()?;
        Ok(Arc::clone(&self.image))
    }

    /// Notes that the base, which has been flushed, is the state `at`.
    ///
    /// # Panics
    /// If the guest has run since [`begin_sync`](Self::begin_sync), or a commit is under way.
    pub fn end_sync(&mut self, at: Tag) {
        assert!(
            self.overlay.is_empty() && self.pending.is_empty() && !self.promoted,
            "the end of a sync"
        );
        self.generation = at.generation;
        self.last = at.epoch;
        self.buffers = self.buffers.split_off(&at.epoch.next());
    }

    /// Reads what the guest sees.
    ///
    /// # Errors
    /// If the range is bad or the image fails.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        check_range(self.image.size(), offset, buf.len() as u64)?;
        self.image.read_at(offset, buf)?;
        for pending in self.pending.iter().filter(|_| !mutants::on(Mutant::ReadOldBase)) {
            pending.batch.read(offset, buf);
        }
        self.overlay.read(offset, buf);
        Ok(())
    }

    /// Keeps a write of the guest.
    ///
    /// # Errors
    /// If the range is bad, the overlay is full, or the host has no room to ever keep the block.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        check_range(self.image.size(), offset, data.len() as u64)?;
        if self.overlay.bytes() + self.overlay.growth(offset, data.len()) > self.limits.overlay {
            return Err(DiskError::OverlayFull);
        }
        self.back(offset, data.len() as u64)?;
        self.overlay.write(offset, data);
        Ok(())
    }

    /// Keeps a discard of the guest: from now on it reads zeros there.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn zero(&mut self, offset: u64, len: u64) -> Result<(), DiskError> {
        check_range(self.image.size(), offset, len)?;
        if self.overlay.bytes() + footprint_of_zeros(offset, len) > self.limits.overlay {
            return Err(DiskError::OverlayFull);
        }
        for (offset, len) in split(offset, len).0 {
            self.back(offset, len)?;
        }
        self.overlay.zero(offset, len);
        Ok(())
    }

    /// Says what a flush of the guest has to wait for.
    #[must_use]
    pub fn flush(&self) -> Flush {
        if self.promoted {
            Flush::AfterTakeover
        } else {
            Flush::Done
        }
    }

    /// Keeps a write of the primary's guest until its epoch is committed.
    ///
    /// # Errors
    /// If the primary sends what it must not; see [`StageError`].
    pub fn stage(&mut self, epoch: Epoch, offset: u64, written: &Written) -> Result<(), StageError> {
        if self.promoted {
            return Err(StageError::Promoted);
        }
        check_range(self.image.size(), offset, written.len())?;
        let sealed = self.reserved.unwrap_or(self.last);
        if epoch <= sealed {
            return Err(StageError::Sealed { epoch, sealed });
        }
        if !self.buffers.contains_key(&epoch) && self.buffers.len() == BUFFERS_MAX {
            return Err(StageError::TooManyEpochs);
        }
        let staged = self.staged_bytes();
        let growth = match (self.buffers.get(&epoch), written) {
            (Some(buffer), Written::Data(data)) => buffer.growth(offset, data.len()),
            _ => footprint(offset, written),
        };
        if staged + growth > self.limits.staged {
            return Err(StageError::TooMuch {
                limit: self.limits.staged,
            });
        }
        let buffer = self.buffers.entry(epoch).or_default();
        match written {
            Written::Data(data) => buffer.write(offset, data),
            Written::Zeros(len) => buffer.zero(offset, *len),
        }
        Ok(())
    }

    /// Forgets the primary's uncommitted writes: it sends them again in a later epoch. The overlay stays.
    pub fn abandon(&mut self) {
        if !mutants::on(Mutant::FoldBuffers) {
            self.buffers.clear();
        }
        self.reserved = None;
    }

    /// Tells whether a checkpoint should be asked for because memory runs short.
    #[must_use]
    pub fn near_limit(&self) -> bool {
        near(self.overlay_bytes(), self.limits.overlay) || near(self.staged_bytes(), self.limits.staged)
    }

    /// Returns the memory of the guest's own writes.
    #[must_use]
    pub fn overlay_bytes(&self) -> u64 {
        self.overlay.bytes()
    }

    /// Returns the memory of the primary's uncommitted writes.
    #[must_use]
    pub fn staged_bytes(&self) -> u64 {
        self.buffers.values().map(SectorMap::bytes).sum()
    }

    /// Returns the memory of commits that are not in the base yet.
    #[must_use]
    pub fn committing_bytes(&self) -> u64 {
        self.pending.iter().map(|pending| pending.batch.bytes()).sum()
    }

    /// Finds room for everything up to `epoch`, before the commit point. No more writes are taken for it.
    ///
    /// # Errors
    /// If earlier commits still use the room, or the host has none.
    ///
    /// # Panics
    /// If the epoch is committed already or this side has taken over.
    pub fn reserve(&mut self, epoch: Epoch) -> Result<(), ReserveError> {
        assert!(!self.promoted, "checkpoint {epoch} after a takeover");
        assert!(epoch > self.last, "checkpoint {epoch} after {}", self.last);
        let waiting = self.waiting().map_or(0, |pending| pending.batch.bytes());
        let staged: u64 = self.buffers.range(..=epoch).map(|(_, buffer)| buffer.bytes()).sum();
        if waiting > 0 && waiting + staged > journal::batch_for(self.journal.size()) {
            return Err(ReserveError::Busy);
        }
        let numbers: Vec<u64> = self
            .buffers
            .range(..=epoch)
            .flat_map(|(_, buffer)| buffer.iter().map(|(number, _)| number))
            .collect();
        for number in numbers {
            self.back(number * CHUNK_BYTES as u64, 1)?;
        }
        self.reserved = Some(epoch);
        Ok(())
    }

    /// Makes checkpoint `epoch` the guest's disk: its own writes are dropped, the primary's up to `epoch` are seen.
    /// Returns the job, unless one is running, in which case [`committed`](Self::committed) returns it later.
    ///
    /// # Panics
    /// If the epoch has not been reserved: there may be no room for it, and it cannot be refused any more.
    pub fn commit(&mut self, epoch: Epoch) -> Option<CommitJob<I>> {
        assert_eq!(
            self.reserved.take(),
            Some(epoch),
            "commit of an epoch that was not reserved"
        );
        let last = if mutants::on(Mutant::CommitNextWrites) {
            epoch.next()
        } else {
            epoch
        };
        let later = self.buffers.split_off(&last.next());
        let mut batch = SectorMap::default();
        for (_, buffer) in std::mem::replace(&mut self.buffers, later) {
            batch.merge(buffer);
        }
        let overlay = std::mem::take(&mut self.overlay);
        if mutants::on(Mutant::CommitOverlay) {
            batch.merge(overlay);
        }
        self.last = epoch;
        self.enqueue(Kind::Commit, batch)
    }

    /// Makes the guest's own state the truth: its writes go into the base, the primary's are dropped. Returns the
    /// job, unless one is running, in which case [`committed`](Self::committed) returns it later.
    ///
    /// The guest may go on at once. Its writes are kept in memory until [`into_image`](Self::into_image).
    ///
    /// # Panics
    /// If this side has taken over already.
    pub fn take_over(&mut self) -> Option<CommitJob<I>> {
        assert!(!self.promoted, "two takeovers");
        self.promoted = true;
        let mut overlay = std::mem::take(&mut self.overlay);
        if mutants::on(Mutant::FoldBuffers) {
            std::mem::take(&mut self.buffers)
                .into_values()
                .for_each(|buffer| overlay.merge(buffer));
        }
        self.abandon();
        self.enqueue(Kind::TakeOver, overlay)
    }

    /// Notes that a job is done, and returns the next one if there is any.
    ///
    /// # Panics
    /// If that job was not the running one.
    pub fn committed(&mut self, done: &Done) -> Option<CommitJob<I>> {
        let finished = self.pending.pop_front().expect("a job of this replica");
        assert_eq!(finished.serial, done.serial, "a job of this replica");
        self.pending.front().map(|next| self.job(next))
    }

    /// Tells whether a takeover is complete on disk, so that [`into_image`](Self::into_image) may be called.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.promoted && self.pending.is_empty()
    }

    /// Writes what the guest has written since the takeover, and returns the image to go on with. Not flushed.
    ///
    /// # Errors
    /// If the image cannot be written. The guest's disk has failed then.
    ///
    /// # Panics
    /// If [`is_settled`](Self::is_settled) does not hold.
    pub fn into_image(self) -> io::Result<Arc<I>> {
        assert!(self.is_settled(), "the takeover is not on disk yet");
        journal::apply(&*self.image, &self.overlay, &self.backed)?;
        Ok(self.image)
    }

    fn enqueue(&mut self, kind: Kind, batch: SectorMap) -> Option<CommitJob<I>> {
        let last = Last { tag: self.last(), kind };
        let zeros: Vec<_> = batch.zeros().collect();
        if let Some(waiting) = self.pending.get_mut(1).filter(|_| kind == Kind::Commit) {
            Arc::make_mut(&mut waiting.batch).merge(batch);
            waiting.last = last;
            self.give_up_room(zeros);
            return None;
        }
        self.serial += 1;
        self.pending.push_back(Pending {
            serial: self.serial,
            last,
            batch: Arc::new(batch),
        });
        self.give_up_room(zeros);
        (self.pending.len() == 1).then(|| self.job(&self.pending[0]))
    }

    fn job(&self, pending: &Pending) -> CommitJob<I> {
        CommitJob {
            image: Arc::clone(&self.image),
            journal: Arc::clone(&self.journal),
            serial: pending.serial,
            last: pending.last,
            batch: Arc::clone(&pending.batch),
            backed: Arc::clone(&self.backed),
        }
    }

    /// Nobody counts on the room of what becomes zeros, but a batch that writes there and waits for the running job.
    fn give_up_room(&self, zeros: Vec<Range<u64>>) {
        if zeros.is_empty() {
            return;
        }
        let mut backed = self.backed.lock();
        for chunks in zeros {
            let blocks = chunks.start / CHUNKS_PER_BLOCK..=(chunks.end - 1) / CHUNKS_PER_BLOCK;
            backed.remove_if(blocks, |block| {
                let chunks = block * CHUNKS_PER_BLOCK..(block + 1) * CHUNKS_PER_BLOCK;
                let mut waiting = self.pending.iter().skip(1);
                !waiting.any(|pending| pending.batch.has_chunk_in(chunks.clone()))
            });
        }
    }

    /// Returns the commit that waits for the running job, if there is one.
    fn waiting(&self) -> Option<&Pending> {
        self.pending.get(1)
    }

    /// Makes sure that the blocks of a range have room on the host.
    fn back(&self, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let mut backed = self.backed.lock();
        for block in offset / BLOCK..=(offset + len - 1) / BLOCK {
            if !backed.contains(block) {
                let start = block * BLOCK;
                self.image.reserve(start, BLOCK.min(self.image.size() - start))?;
                backed.insert(block);
            }
        }
        Ok(())
    }
}

impl<I: Image + ?Sized> CommitJob<I> {
    /// Writes the journal, then the base. When this returns, the base holds the batch durably.
    ///
    /// # Errors
    /// If any write or flush fails. This side is out of service then.
    pub fn run(self) -> Result<Done, CommitError> {
        let Self {
            image,
            journal,
            serial,
            last,
            batch,
            backed,
        } = self;
        let size = image.size();
        if !batch.is_empty() {
            journal::write(&*journal, size, last, &batch).map_err(CommitError::Journal)?;
            if !mutants::on(Mutant::ApplyBeforeJournal) {
                journal.flush().map_err(CommitError::Journal)?;
            }
            journal::apply(&*image, &batch, &backed).map_err(CommitError::Apply)?;
            if !mutants::on(Mutant::RetireBeforeFlush) {
                image.flush().map_err(CommitError::Apply)?;
            }
        }
        journal::retire(&*journal, size, last).map_err(CommitError::Journal)?;
        if last.kind == Kind::TakeOver {
            // From now on the guest writes to the base directly: an old journal must not come back over that.
            journal.flush().map_err(CommitError::Journal)?;
        }
        Ok(Done {
            serial,
            last,
            bytes: batch.bytes(),
        })
    }

    /// Returns the commit this job makes durable.
    #[must_use]
    pub fn last(&self) -> Last {
        self.last
    }
}

impl Done {
    /// Returns the commit that is durable now, and with it every earlier one.
    #[must_use]
    pub fn last(&self) -> Last {
        self.last
    }

    /// Returns the size of the batch, in bytes of chunks.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

fn near(bytes: u64, limit: u64) -> bool {
    bytes >= limit / 4 * 3
}

#[cfg(test)]
mod tests;
