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
}

#[derive(Debug)]
struct Slot {
    first_page: u64,
    words: Vec<u64>,
}

impl DirtyLog {
    /// Gives `ram` to the VM, with dirty logging on.
    pub(crate) fn new(vm: &VmFd, ram: &GuestRam) -> Result<Self, HostError> {
        kvm::enable_manual_dirty_log(vm)?;
        let mut slots = Vec::new();
        for (part, slot) in ram.parts().zip(0..) {
            add_memory(vm, slot, part)?;
            let pages = part.bytes / PAGE_BYTES as u64;
            slots.push(Slot {
                first_page: part.first_page,
                words: vec![0; index(pages / 64)],
            });
        }
        Ok(Self {
            slots,
            given_back: PageSet::new(ram.pages()),
        })
    }

    /// Returns the pages that are dirty, and leaves them so.
    pub(crate) fn peek(&mut self, vm: &VmFd, ram: &GuestRam) -> Result<PageSet, HostError> {
        let mut dirty = self.given_back.clone();
        self.read(vm, &mut dirty)?;
        ram.peek_written(&mut dirty);
        Ok(dirty)
    }

    /// Returns the pages that are dirty; from now on they count as clean.
    pub(crate) fn take(&mut self, vm: &VmFd, ram: &GuestRam) -> Result<PageSet, HostError> {
        let mut dirty = self.given_back.clone();
        self.read(vm, &mut dirty)?;
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
