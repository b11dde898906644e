//! Guest RAM on a memfd, and the pages of it that this process wrote.
//!
//! The memfd holds the *committed image*. A [`Mapping::Shared`] machine writes straight into it. A
//! [`Mapping::Private`] machine, the secondary's, copies a page when it first writes it, so that
//! the memfd keeps the last committed content: [`GuestRam::revert`] forgets the copies, and
//! [`GuestRam::write_committed`] replaces what lies under them. A page that the guest has only read
//! shows a later write to the memfd at once, so the guest must be stopped for both.
//!
//! RAM pages are numbered without gaps: first the low part, then the part above the device window.
//! The writes of the devices and of the machine itself go through [`Memory`], whose bitmap notes
//! them; those of the guest are in KVM's log. Only both together are the dirty pages.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use guest::abi::{HIGH_MEMORY, LOW_MEMORY_END_MAX};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, SeekFrom};
use rustix::io::Errno;
use rustix::mm::Advice;
use rustix::process::{PidfdFlags, getpid, pidfd_open};
use thiserror::Error;
use vm_memory::bitmap::NewBitmap;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap};

use crate::written::Written;
use crate::{PageSet, index};

/// Bytes of a page.
pub const PAGE_BYTES: usize = 4096;
/// Memory comes in pieces of this many bytes.
pub const MEMORY_STEP: u64 = 2 << 20;
/// The smallest machine: the guest's image and a little heap.
pub const MEMORY_MIN: u64 = 8 << 20;
/// The largest machine: its page tables must fit below the guest's image.
pub const MEMORY_MAX: u64 = 64 << 30;

const PAGE: u64 = PAGE_BYTES as u64;

/// Guest memory as devices see it; every write through it is noted in its bitmap.
pub type Memory = GuestMemoryMmap<Written>;

/// Whose writes reach the committed image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// The guest writes the image itself.
    Shared,
    /// The guest writes copies; the image stays as it was committed.
    Private,
}

/// What can go wrong with guest memory.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// No machine has this size.
    #[error(
        "a machine can't have {bytes} bytes of memory: choose a multiple of 2 MiB from {} MiB to {} GiB",
        MEMORY_MIN >> 20,
        MEMORY_MAX >> 30
    )]
    Size {
        /// The size asked for.
        bytes: u64,
    },
    /// The host gives no memory file.
    #[error("the host gives no memory file of {bytes} bytes: free memory, or give the machine less")]
    Create {
        /// The size asked for.
        bytes: u64,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The memory file can't be mapped.
    #[error("the machine's memory can't be mapped: free memory, or give the machine less")]
    Map(#[source] MmapRegionError),
    /// The machine has no such page.
    #[error("page {page} is past the end of the machine's {pages} pages")]
    NoPage {
        /// The page asked for.
        page: u64,
        /// The pages there are.
        pages: u64,
    },
    /// The host can't read or write the committed image.
    #[error("the committed memory image can't be accessed")]
    Image(#[source] io::Error),
    /// The host can't drop the guest's copies of pages.
    #[error("the guest's own copies of memory pages can't be dropped")]
    Revert(#[source] io::Error),
}

/// The RAM of one machine; clones are handles on the same RAM.
#[derive(Clone, Debug)]
pub struct GuestRam {
    memory: Memory,
    image: Arc<File>,
    mapping: Mapping,
    low_bytes: u64,
    bytes: u64,
}

impl GuestRam {
    /// Makes the RAM of a machine with `bytes` of it, all zero.
    pub fn new(bytes: u64, mapping: Mapping) -> Result<Self, MemoryError> {
        if !bytes.is_multiple_of(MEMORY_STEP) || !(MEMORY_MIN..=MEMORY_MAX).contains(&bytes) {
            return Err(MemoryError::Size { bytes });
        }
        let image = Arc::new(memory_file(bytes).map_err(|source| MemoryError::Create { bytes, source })?);
        let low_bytes = bytes.min(LOW_MEMORY_END_MAX);
        let mut regions = vec![map(&image, 0, low_bytes, 0, mapping)?];
        if bytes > low_bytes {
            regions.push(map(&image, low_bytes, bytes - low_bytes, HIGH_MEMORY, mapping)?);
        }
        let memory = Memory::from_regions(regions).expect("two regions far apart, in order");
        Ok(Self {
            memory,
            image,
            mapping,
            low_bytes,
            bytes,
        })
    }

    /// Returns the memory for devices.
    #[must_use]
    pub const fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Returns whose writes reach the committed image.
    #[must_use]
    pub const fn mapping(&self) -> Mapping {
        self.mapping
    }

    /// Returns the size in bytes.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns the number of pages.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.bytes / PAGE
    }

    /// Returns where the low part ends (exclusive), as a guest-physical address.
    #[must_use]
    pub const fn low_end(&self) -> u64 {
        self.low_bytes
    }

    /// Returns where the high part ends (exclusive); its start if there is none.
    #[must_use]
    pub const fn high_end(&self) -> u64 {
        HIGH_MEMORY + (self.bytes - self.low_bytes)
    }

    /// Copies a page as the guest sees it. The guest may run; then the copy may be torn, and the page
    /// is dirty again.
    pub fn read_page(&self, page: u64, content: &mut [u8; PAGE_BYTES]) -> Result<(), MemoryError> {
        let address = self.page_address(page)?;
        self.memory
            .read_slice(content, address)
            .expect("every RAM page is mapped");
        Ok(())
    }

    /// Copies pages that follow each other, from `first` on, as the guest sees them; else like [`Self::read_page`].
    ///
    /// # Panics
    /// If `content` is not made of whole pages.
    pub fn read_run(&self, first: u64, content: &mut [u8]) -> Result<(), MemoryError> {
        assert!(
            content.len().is_multiple_of(PAGE_BYTES),
            "memory is read in whole pages"
        );
        self.check_pages(first, content.len() as u64 / PAGE)?;
        let low_bytes = index(self.low_bytes.saturating_sub(first * PAGE)).min(content.len());
        let (low, high) = content.split_at_mut(low_bytes);
        for (first, content) in [(first, low), (first.max(self.low_bytes / PAGE), high)] {
            if !content.is_empty() {
                let address = self.page_address(first)?;
                self.memory
                    .read_slice(content, address)
                    .expect("every RAM page is mapped");
            }
        }
        Ok(())
    }

    /// Copies a page of the committed image.
    pub fn read_committed(&self, page: u64, content: &mut [u8; PAGE_BYTES]) -> Result<(), MemoryError> {
        self.read_committed_run(page, content)
    }

    /// Copies pages of the committed image that follow each other, from `first` on.
    fn read_committed_run(&self, first: u64, content: &mut [u8]) -> Result<(), MemoryError> {
        self.check_pages(first, content.len() as u64 / PAGE)?;
        self.image
            .read_exact_at(content, first * PAGE)
            .map_err(MemoryError::Image)
    }

    /// Replaces a page of the committed image.
    pub fn write_committed(&self, page: u64, content: &[u8; PAGE_BYTES]) -> Result<(), MemoryError> {
        self.write_committed_run(page, content)
    }

    /// Replaces pages of the committed image that follow each other, from `first` on.
    ///
    /// # Panics
    /// If `content` is not made of whole pages.
    pub fn write_committed_run(&self, first: u64, content: &[u8]) -> Result<(), MemoryError> {
        assert!(
            content.len().is_multiple_of(PAGE_BYTES),
            "the image is written in whole pages"
        );
        self.check_pages(first, content.len() as u64 / PAGE)?;
        self.image
            .write_all_at(content, first * PAGE)
            .map_err(MemoryError::Image)
    }

    /// Replaces `pages` of the committed image, in this order, with the pages in `content`; a page that comes
    /// twice is as it came last.
    ///
    /// # Panics
    /// If there is not one page of content for each.
    pub fn write_committed_pages(&self, pages: &[u64], content: &[u8]) -> Result<(), MemoryError> {
        assert_eq!(content.len(), pages.len() * PAGE_BYTES, "one page of content for each");
        let mut rest = content;
        for run in pages.chunk_by(|page, next| page.checked_add(1) == Some(*next)) {
            let (content, others) = rest.split_at(run.len() * PAGE_BYTES);
            self.write_committed_run(run[0], content)?;
            rest = others;
        }
        Ok(())
    }

    /// Makes a checkpoint the committed image and what the guest sees: of the pages of each of `staged` their content, of those `alike`
    /// what the guest has there, and else what was committed before, in place of its copies of `stale` pages: those that it wrote, and those
    /// kept before. The guest must be stopped. Copies of `kept` pages, some of the stale ones, become what is committed; all others go. To
    /// fill one costs less than the two faults of a guest that reads and writes where it has none.
    ///
    /// The log that `own` is from does not know of every copy. The host's kernel also makes one for the guest when it has to wait for a page
    /// (KVM's asynchronous faults ask for it as for writing), and then nothing is logged. Such a copy is what was committed then,
    /// and becomes wrong when something else is committed there: so what is committed is dropped, too.
    pub fn commit<'a>(
        &self,
        staged: impl IntoIterator<Item = (&'a [u64], &'a [u8])>,
        alike: &PageSet,
        mut stale: PageSet,
        kept: &PageSet,
    ) -> Result<(), MemoryError> {
        for (pages, content) in staged {
            self.write_committed_pages(pages, content)?;
            stale.extend(pages.iter().copied());
        }
        self.commit_own(alike)?;
        stale.union(alike);
        stale.subtract(kept);
        self.revert(&stale)?;
        // Copies of alike pages are as committed.
        let mut other = kept.clone();
        other.subtract(alike);
        self.refill(&other)
    }

    /// Gives the guest copies of the committed image in `pages`, which count as clean. The guest must be stopped.
    fn refill(&self, pages: &PageSet) -> Result<(), MemoryError> {
        in_pieces(pages, |first, content| {
            self.read_committed_run(first, content)?;
            for (page, content) in (first..).zip(content.chunks(PAGE_BYTES)) {
                let address = self.page_address(page)?;
                self.memory
                    .write_slice(content, address)
                    .expect("a page of the machine is in its memory");
            }
            Ok(())
        })?;
        self.clear_written(pages);
        Ok(())
    }

    /// Makes what the guest sees of `pages` the committed image. The guest must be stopped.
    fn commit_own(&self, pages: &PageSet) -> Result<(), MemoryError> {
        if self.mapping == Mapping::Shared {
            return Ok(());
        }
        in_pieces(pages, |first, content| {
            self.read_run(first, content)?;
            self.write_committed_run(first, content)
        })
    }

    /// Drops all of the guest's own copies, so that it sees the committed image. The guest must be stopped.
    pub fn revert_all(&self) -> Result<(), MemoryError> {
        let all = self.parts().map(|part| {
            let end = part.first_page + part.bytes / PAGE;
            self.host_range(&(part.first_page..end))
        });
        match self.mapping {
            Mapping::Shared => Ok(()),
            Mapping::Private => drop_copies(&all.collect::<Result<Vec<_>, _>>()?),
        }
    }

    /// Drops the guest's own copies of `pages`, so that it sees the committed image there. A shared
    /// machine has no copies, and nothing happens. The guest must be stopped.
    pub fn revert(&self, pages: &PageSet) -> Result<(), MemoryError> {
        if self.mapping == Mapping::Shared {
            return Ok(());
        }
        let low_pages = self.low_bytes / PAGE;
        let mut ranges = Vec::with_capacity(RANGES_MAX);
        for run in pages.runs() {
            for part in [run.start..run.end.min(low_pages), run.start.max(low_pages)..run.end] {
                if !part.is_empty() {
                    ranges.push(self.host_range(&part)?);
                }
                if ranges.len() >= RANGES_MAX - 1 {
                    drop_copies(&ranges)?;
                    ranges.clear();
                }
            }
        }
        drop_copies(&ranges)
    }

    /// Lists the pages that have ever been written; all others are zero, and to read them would only
    /// allocate them. What the guest writes meanwhile may be missing, but is in its dirty log.
    pub fn populated(&self) -> Result<PageSet, MemoryError> {
        let all = 0..self.pages();
        let mut pages = match self.mapping {
            Mapping::Shared => PageSet::new(all.end),
            Mapping::Private => self.copies(&all).map_err(MemoryError::Image)?,
        };
        let mut at = 0;
        while let Some(start) = self.seek(SeekFrom::Data(at))? {
            let end = self.seek(SeekFrom::Hole(start))?.unwrap_or(self.bytes);
            pages.extend(start / PAGE..end.div_ceil(PAGE));
            at = end;
        }
        Ok(pages)
    }

    /// Gives the image's memory back to the host under those of `pages` that the guest has copies of, and
    /// returns their number. The guest may run. Only for a machine that nothing reverts any more: after
    /// this the image is no committed state.
    pub fn give_back_image(&self, pages: Range<u64>) -> Result<u64, MemoryError> {
        self.check_pages(pages.start, pages.end.saturating_sub(pages.start))?;
        if self.mapping == Mapping::Shared {
            return Ok(0);
        }
        let copied = self.copies(&pages).map_err(MemoryError::Image)?;
        for run in copied.runs() {
            let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&self.image, hole, run.start * PAGE, (run.end - run.start) * PAGE)
                .map_err(|error| MemoryError::Image(error.into()))?;
        }
        Ok(copied.len())
    }

    /// Makes the committed image all zero. The guest must be stopped; its own copies stay.
    pub fn clear_image(&self) -> Result<(), MemoryError> {
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&self.image, hole, 0, self.bytes).map_err(|error| MemoryError::Image(error.into()))
    }

    /// Returns the guest-physical address of a RAM page.
    pub fn page_address(&self, page: u64) -> Result<GuestAddress, MemoryError> {
        self.check_pages(page, 1)?;
        let offset = page * PAGE;
        Ok(GuestAddress(if offset < self.low_bytes {
            offset
        } else {
            offset - self.low_bytes + HIGH_MEMORY
        }))
    }

    /// Returns the RAM page that holds a guest-physical address, if it is RAM.
    #[must_use]
    pub fn page_at(&self, address: u64) -> Option<u64> {
        if address < self.low_bytes {
            Some(address / PAGE)
        } else {
            let high = address.checked_sub(HIGH_MEMORY)?;
            (high < self.bytes - self.low_bytes).then_some((high + self.low_bytes) / PAGE)
        }
    }

    /// Adds the pages that were written through [`Self::memory`] to `pages`.
    pub(crate) fn peek_written(&self, pages: &mut PageSet) {
        for (region, part) in self.memory.iter().zip(self.parts()) {
            (**region).bitmap().peek(part.first_page, pages);
        }
    }

    /// Moves the pages that were written through [`Self::memory`] into `pages`.
    pub(crate) fn take_written(&self, pages: &mut PageSet) {
        for (region, part) in self.memory.iter().zip(self.parts()) {
            (**region).bitmap().take(part.first_page, pages);
        }
    }

    /// Forgets that `pages` were written through [`Self::memory`].
    pub(crate) fn clear_written(&self, pages: &PageSet) {
        for (region, part) in self.memory.iter().zip(self.parts()) {
            let words = index(part.bytes / PAGE / 64);
            (**region).bitmap().clear(pages.words_from(part.first_page, words));
        }
    }

    /// Lists the parts as (guest-physical address, host address, bytes, first page).
    pub(crate) fn parts(&self) -> impl Iterator<Item = RamPart> + '_ {
        self.memory.iter().scan(0, |first_page, region| {
            let part = RamPart {
                address: vm_memory::GuestMemoryRegion::start_addr(region).0,
                host: region.as_ptr(),
                bytes: region.size() as u64,
                first_page: *first_page,
            };
            *first_page += part.bytes / PAGE;
            Some(part)
        })
    }

    /// Finds where the image's next data or hole begins, if there is one.
    fn seek(&self, to: SeekFrom) -> Result<Option<u64>, MemoryError> {
        match rustix::fs::seek(&self.image, to) {
            Ok(offset) => Ok(Some(offset)),
            Err(Errno::NXIO) => Ok(None),
            Err(error) => Err(MemoryError::Image(error.into())),
        }
    }

    /// Finds those of `pages` that the guest has copies of.
    fn copies(&self, pages: &Range<u64>) -> io::Result<PageSet> {
        let mut copied = PageSet::new(self.pages());
        for part in self.parts() {
            let end = part.first_page + part.bytes / PAGE;
            let wanted = pages.start.max(part.first_page)..pages.end.min(end);
            if !wanted.is_empty() {
                find_copies(&part, wanted, &mut copied)?;
            }
        }
        Ok(copied)
    }

    fn check_pages(&self, first: u64, count: u64) -> Result<(), MemoryError> {
        let pages = self.pages();
        match first.checked_add(count) {
            Some(end) if end <= pages => Ok(()),
            _ => Err(MemoryError::NoPage {
                page: first.saturating_add(count).saturating_sub(1),
                pages,
            }),
        }
    }

    /// Finds where this process sees `pages`, which are all of one part of the RAM.
    fn host_range(&self, pages: &Range<u64>) -> Result<HostRange, MemoryError> {
        self.check_pages(pages.start, pages.end - pages.start)?;
        let part = self
            .parts()
            .take_while(|part| part.first_page <= pages.start)
            .last()
            .expect("the first part begins with page 0");
        Ok(HostRange {
            start: part.host.wrapping_add(index((pages.start - part.first_page) * PAGE)),
            bytes: index((pages.end - pages.start) * PAGE),
        })
    }
}

/// Pages that are copied to the image, or from it, at a time: what stays in a processor's cache.
const COMMIT_PAGES: usize = 16;
/// Ranges that one call can take.
const RANGES_MAX: usize = 1024;

/// A range of one mapping of a machine; the layout is that of `struct iovec`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct HostRange {
    start: *mut u8,
    bytes: usize,
}

/// Goes through `pages` with room for so many of them: the first of each piece, and its bytes.
fn in_pieces(
    pages: &PageSet,
    mut copy: impl FnMut(u64, &mut [u8]) -> Result<(), MemoryError>,
) -> Result<(), MemoryError> {
    let mut content = vec![0; COMMIT_PAGES * PAGE_BYTES];
    for run in pages.runs() {
        for first in run.clone().step_by(COMMIT_PAGES) {
            let count = (run.end - first).min(COMMIT_PAGES as u64);
            copy(first, &mut content[..index(count * PAGE)])?;
        }
    }
    Ok(())
}

/// Drops the copies in `ranges`, at most [`RANGES_MAX`], in one call where the kernel has one for it: up to half the
/// price of a call for each.
fn drop_copies(ranges: &[HostRange]) -> Result<(), MemoryError> {
    let mut rest = ranges;
    if rest.len() > 1 && drop_at_once(rest) {
        rest = &[];
    }
    for range in rest {
        // SAFETY: the range lies inside one mapping of a machine that the caller holds (see `host_range`). Guest memory is only
        // ever accessed by volatile copies, never by reference.
        unsafe { rustix::mm::madvise(range.start.cast(), range.bytes, Advice::LinuxDontNeed) }
            .map_err(|error| MemoryError::Revert(error.into()))?;
    }
    Ok(())
}

/// Says whether all of it was done; if not, it can be done again.
fn drop_at_once(ranges: &[HostRange]) -> bool {
    let Ok(this) = pidfd_open(getpid(), PidfdFlags::empty()) else {
        return false;
    };
    let (fd, at) = (this.as_raw_fd(), ranges.as_ptr());
    let advice = libc::MADV_DONTNEED;
    // SAFETY: as in `drop_copies`, for each of the ranges; the kernel reads as many as there are.
    let done = unsafe { libc::syscall(libc::SYS_process_madvise, fd, at, ranges.len(), advice, 0) };
    usize::try_from(done) == Ok(ranges.iter().map(|range| range.bytes).sum())
}

/// One of the two parts of RAM.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RamPart {
    pub(crate) address: u64,
    pub(crate) host: *mut u8,
    pub(crate) bytes: u64,
    pub(crate) first_page: u64,
}

/// Adds those of `pages`, which lie in `part`, that are private copies. A copy stays one until it is
/// dropped, so the guest may go on making more.
fn find_copies(part: &RamPart, pages: Range<u64>, copied: &mut PageSet) -> io::Result<()> {
    const PRESENT_OR_SWAPPED: u64 = 0b11 << 62;
    const OF_A_FILE: u64 = 1 << 61;
    let first = part.host as u64 / PAGE + (pages.start - part.first_page);
    let mut entries = vec![0; index((pages.end - pages.start) * 8)];
    File::open("/proc/self/pagemap")?.read_exact_at(&mut entries, first * 8)?;
    for (entry, page) in entries.as_chunks::<8>().0.iter().zip(pages) {
        let entry = u64::from_ne_bytes(*entry);
        if entry & PRESENT_OR_SWAPPED != 0 && entry & OF_A_FILE == 0 {
            copied.insert(page);
        }
    }
    Ok(())
}

/// Makes a memory file that never changes its size, so that no access to a mapping of it can fail.
fn memory_file(bytes: u64) -> io::Result<File> {
    let file = File::from(rustix::fs::memfd_create(
        "tandem-guest",
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
    )?);
    file.set_len(bytes)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

fn map(
    image: &Arc<File>,
    offset: u64,
    bytes: u64,
    address: u64,
    mapping: Mapping,
) -> Result<GuestRegionMmap<Written>, MemoryError> {
    let sharing = match mapping {
        Mapping::Shared => libc::MAP_SHARED,
        Mapping::Private => libc::MAP_PRIVATE,
    };
    let region = MmapRegionBuilder::new_with_bitmap(index(bytes), Written::with_len(index(bytes)))
        .with_file_offset(FileOffset::from_arc(Arc::clone(image), offset))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(sharing | libc::MAP_NORESERVE)
        .build()
        .map_err(MemoryError::Map)?;
    // A core dump of guest memory would keep the dead process's connections open for as long as it takes.
    // SAFETY: the range is the mapping just made; the advice changes what a core dump holds, not its content.
    unsafe { rustix::mm::madvise(region.as_ptr().cast(), index(bytes), Advice::LinuxDontDump) }.map_err(|error| {
        MemoryError::Create {
            bytes,
            source: error.into(),
        }
    })?;
    Ok(GuestRegionMmap::new(region, GuestAddress(address)).expect("RAM ends far below 2^64"))
}

#[cfg(test)]
mod tests;
