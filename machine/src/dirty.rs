//! Which pages were written: KVM's log of the guest's writes, joined with the machine's own.
//!
//! KVM never sees what this process writes into guest memory: receive buffers, used rings, disk
//! reads, the clock page. A checkpoint that misses those is silently wrong, so whatever is asked here,
//! the answer always joins both.
//!
//! Pages may be counted as clean while the guest and the devices run, to be shipped ahead of a stop. Both logs are cleared first,
//! and the pages read after it: a write at the same moment is either in the content that is read or in the next set, or
//! in both. For the devices' writes `written.rs` says why; for the guest's it is KVM that takes the page's write access away
//! (and waits until no processor remembers it) before the call to clear returns, so the next write faults and is logged.
//! What was shipped ahead is therefore good exactly if the page is not dirty at the stop.
//!
//! A page that was written in each of the last periods will be in the next, and the fault that says so costs the guest more than it costs
//! to look at one page too many: such a page is *open*, it keeps its write access and stays dirty. Now and then all are closed, so
//! that those which are written no more are found.

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;

use crate::kvm::{self, HostError, refused};
use crate::memory::{GuestRam, PAGE_BYTES, RamPart};
use crate::{PageSet, index};

/// The dirty pages of one machine.
#[derive(Debug)]
pub(crate) struct DirtyLog {
    slots: Vec<Slot>,
    /// Pages given back because their epoch was abandoned; neither log holds them any more.
    given_back: PageSet,
    /// How often the dirty pages were taken.
    taken: u64,
}

#[derive(Debug)]
struct Slot {
    first_page: u64,
    words: Vec<u64>,
    /// KVM's log as it was taken last, and the time before.
    before: [Vec<u64>; 2],
}

/// Of so many times that the dirty pages are taken, one closes all pages.
const CLOSED_EVERY: u64 = 16;
/// More pages than these are not left open: they would make the stops longer, also some time after they are written no more.
const OPEN_MAX: u64 = 1_024;

impl DirtyLog {
    /// Gives `ram` to the VM, with dirty logging on.
    pub(crate) fn new(vm: &VmFd, ram: &GuestRam) -> Result<Self, HostError> {
        kvm::enable_manual_dirty_log(vm)?;
        let mut slots = Vec::new();
        for (part, slot) in ram.parts().zip(0..) {
            add_memory(vm, slot, part)?;
            let pages = part.bytes / PAGE_BYTES as u64;
            let words = vec![0; index(pages / 64)];
            slots.push(Slot {
                first_page: part.first_page,
                before: [words.clone(), words.clone()],
                words,
            });
        }
        Ok(Self {
            slots,
            given_back: PageSet::new(ram.pages()),
            taken: 0,
        })
    }

    /// Returns the pages that are dirty, and leaves them so.
    pub(crate) fn peek(&mut self, vm: &VmFd, ram: &GuestRam) -> Result<PageSet, HostError> {
        let mut dirty = self.given_back.clone();
        self.read(vm, &mut dirty)?;
        ram.peek_written(&mut dirty);
        Ok(dirty)
    }

    /// Returns the pages that are dirty; from now on they count as clean, but those that are open.
    pub(crate) fn take(&mut self, vm: &VmFd, ram: &GuestRam) -> Result<PageSet, HostError> {
        let mut dirty = self.given_back.clone();
        self.read(vm, &mut dirty)?;
        self.taken += 1;
        let lasting: u64 = self.slots.iter().map(Slot::lasting).sum();
        let closes = self.taken.is_multiple_of(CLOSED_EVERY) || lasting > OPEN_MAX;
        self.slots.iter_mut().for_each(|slot| slot.leave_open(closes));
        if let Err(error) = self.clear_in_words(vm) {
            self.given_back = dirty;
            return Err(error);
        }
        ram.take_written(&mut dirty);
        self.given_back.clear();
        Ok(dirty)
    }

    /// Counts `pages` as clean from now on, whether they were dirty or not, and no others. After an error all of
    /// them are dirty.
    pub(crate) fn clear(&mut self, vm: &VmFd, ram: &GuestRam, pages: &PageSet) -> Result<(), HostError> {
        for slot in &mut self.slots {
            let count = slot.words.len();
            slot.words.copy_from_slice(pages.words_from(slot.first_page, count));
        }
        if let Err(error) = self.clear_in_words(vm) {
            self.given_back.union(pages);
            return Err(error);
        }
        ram.clear_written(pages);
        self.given_back.subtract(pages);
        Ok(())
    }

    /// Makes `pages` dirty.
    pub(crate) fn put_back(&mut self, pages: &PageSet) {
        self.given_back.union(pages);
    }

    /// Reads KVM's log into the slots' words, and adds it to `dirty`.
    fn read(&mut self, vm: &VmFd, dirty: &mut PageSet) -> Result<(), HostError> {
        for (slot, number) in self.slots.iter_mut().zip(0..) {
            kvm::read_dirty_log(vm, number, &mut slot.words)?;
            for (word, first) in slot.words.iter().zip((slot.first_page..).step_by(64)) {
                if *word != 0 {
                    dirty.union_word(first, *word);
                }
            }
        }
        Ok(())
    }

    /// Clears KVM's log of the pages in the slots' words.
    fn clear_in_words(&mut self, vm: &VmFd) -> Result<(), HostError> {
        let mut slots = self.slots.iter_mut().zip(0..);
        slots.try_for_each(|(slot, number)| slot.clear(vm, number))
    }
}

impl Slot {
    /// Counts the pages that are there for the third time in turn.
    fn lasting(&self) -> u64 {
        let [last, one_before] = &self.before;
        let words = self.words.iter().zip(last).zip(one_before);
        let lasting = words.map(|((word, last), one_before)| word & last & one_before);
        lasting.map(|word| u64::from(word.count_ones())).sum()
    }

    /// Takes those out of the words, to stay open, unless all are closed.
    fn leave_open(&mut self, closes: bool) {
        let [last, one_before] = &mut self.before;
        for ((word, last), one_before) in self.words.iter_mut().zip(last).zip(one_before) {
            let open = if closes { 0 } else { *word & *last & *one_before };
            *one_before = core::mem::replace(last, *word);
            *word &= !open;
        }
    }

    /// Clears the log of the pages in `words`, in one call: each has its price, and KVM passes over empty words quickly.
    fn clear(&mut self, vm: &VmFd, number: u32) -> Result<(), HostError> {
        let used = |word: &u64| *word != 0;
        let (Some(first), Some(last)) = (self.words.iter().position(used), self.words.iter().rposition(used)) else {
            return Ok(());
        };
        let words = &mut self.words[first..=last];
        let pages = u32::try_from(words.len() * 64).expect("a machine has less than 2^32 pages");
        kvm::clear_dirty_log(vm, number, first as u64 * 64, pages, words)
    }
}

fn add_memory(vm: &VmFd, slot: u32, part: RamPart) -> Result<(), HostError> {
    let region = kvm_userspace_memory_region {
        slot,
        flags: KVM_MEM_LOG_DIRTY_PAGES,
        guest_phys_addr: part.address,
        memory_size: part.bytes,
        userspace_addr: part.host as u64,
    };
    // SAFETY: the range is a mapping owned by the machine's `GuestRam`, which outlives its VM, and the
    // guest's writes to it alias no Rust reference.
    unsafe { vm.set_user_memory_region(region) }.map_err(refused("take the machine's memory"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_is_dirty_for_the_third_time_in_turn_stays_open_until_all_are_closed() {
        let mut slot = Slot {
            first_page: 0,
            words: vec![0; 2],
            before: [vec![0; 2], vec![0; 2]],
        };
        // Of word 1, as KVM has it, and of those pages the ones that are cleared.
        let mut cleared = |dirty: u64, closes: bool| {
            slot.words[1] = dirty;
            let lasting = slot.lasting();
            slot.leave_open(closes);
            let left = dirty & !slot.words[1];
            assert_eq!(if closes { 0 } else { lasting }, u64::from(left.count_ones()));
            assert_eq!(slot.words[0], 0);
            slot.words[1]
        };
        assert_eq!(cleared(0b0111, false), 0b0111);
        assert_eq!(cleared(0b0101, false), 0b0101);
        assert_eq!(cleared(0b1111, false), 0b1010, "the two that were there each time");
        assert_eq!(cleared(0b0111, false), 0b0010);
        assert_eq!(cleared(0b0111, true), 0b0111, "all are closed");
        assert_eq!(cleared(0b0001, false), 0, "one is written still");
        assert_eq!(cleared(0b0100, false), 0b0100);
    }
}
