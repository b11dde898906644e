//! Which pages were written: KVM's log of the guest's writes, joined with the machine's own.
//!
//! KVM never sees what this process writes into guest memory: receive buffers, used rings, disk
//! reads, the clock page. A checkpoint that misses those is silently wrong, so there is one way to ask
//! for dirty pages, [`DirtyLog::take`], and it always joins both.
//!
//! The log is cleared before the pages are read, and a device notes a page after writing it: a write
//! at the same moment is either in the content that is read or in the next set, or in both.

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;

use crate::kvm::{self, Host, HostError, refused};
use crate::memory::{GuestRam, PAGE_BYTES, RamPart};
use crate::{PageSet, index};

/// The dirty pages of one machine.
#[derive(Debug)]
pub(crate) struct DirtyLog {
    slots: Vec<Slot>,
    /// The log stays until it is cleared; otherwise reading clears it.
    manual: bool,
    /// Pages given back because their epoch was abandoned.
    given_back: PageSet,
}

#[derive(Debug)]
struct Slot {
    first_page: u64,
    words: Vec<u64>,
}

impl DirtyLog {
    /// Gives `ram` to the VM, with dirty logging on.
    pub(crate) fn new(host: &Host, vm: &VmFd, ram: &GuestRam) -> Result<Self, HostError> {
        let manual = host.has_manual_dirty_log();
        if manual {
            kvm::enable_manual_dirty_log(vm)?;
        }
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
            manual,
            given_back: PageSet::new(ram.pages()),
        })
    }

    /// Returns the pages written since the last call, by the guest or by this process, and those given
    /// back; from now on they count as clean.
    pub(crate) fn take(&mut self, vm: &VmFd, ram: &GuestRam) -> Result<PageSet, HostError> {
        let mut dirty = self.given_back.clone();
        for (slot, number) in self.slots.iter_mut().zip(0..) {
            kvm::read_dirty_log(vm, number, &mut slot.words)?;
            for (word, first) in slot.words.iter().zip((slot.first_page..).step_by(64)) {
                if *word != 0 {
                    dirty.union_word(first, *word);
                }
            }
            if self.manual
                && let Err(error) = slot.clear(vm, number)
            {
                self.given_back = dirty;
                return Err(error);
            }
        }
        ram.take_written(&mut dirty);
        self.given_back.clear();
        Ok(dirty)
    }

    /// Makes `pages` part of what the next [`Self::take`] returns.
    pub(crate) fn put_back(&mut self, pages: &PageSet) {
        self.given_back.union(pages);
    }
}

impl Slot {
    /// Clears the log of the pages in `words`, in one call for each stretch of words with any.
    fn clear(&mut self, vm: &VmFd, number: u32) -> Result<(), HostError> {
        let mut next = 0;
        while let Some(start) = self.words[next..]
            .iter()
            .position(|word| *word != 0)
            .map(|skip| next + skip)
        {
            // A gap of a few empty words costs less than another call.
            let gap = |window: &[u64]| window.iter().all(|word| *word == 0);
            let end = (start + 1..self.words.len())
                .find(|at| gap(&self.words[*at..self.words.len().min(at + 16)]))
                .unwrap_or(self.words.len());
            let words = &mut self.words[start..end];
            let pages = u32::try_from(words.len() * 64).expect("a machine has less than 2^32 pages");
            kvm::clear_dirty_log(vm, number, start as u64 * 64, pages, words)?;
            next = end;
        }
        Ok(())
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
