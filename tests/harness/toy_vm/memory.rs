//! The toy guest's memory: pages that are copied when written, and the two records of what was written.
//!
//! As on a real host, what the guest writes is in one record and what the machine writes for it (received frames)
//! in another. A checkpoint needs both, and there is one way to ask: [`Memory::harvest`].

use std::sync::Arc;

use checkpoint::limits::PAGE_BYTES;
use checkpoint::mutants::{self, Mutant};
use machine::PageSet;

/// Pages of the toy.
pub const PAGES: u64 = 32;

/// Pages, and what was written since the last harvest.
#[derive(Clone, Debug)]
pub struct Memory {
    /// The pages; a copy shares those that neither has written since.
    pub pages: Vec<Arc<Vec<u8>>>,
    guest_log: PageSet,
    machine_bitmap: PageSet,
}

impl Default for Memory {
    fn default() -> Self {
        let zero = Arc::new(vec![0; PAGE_BYTES]);
        Self {
            pages: (0..PAGES).map(|_| Arc::clone(&zero)).collect(),
            guest_log: PageSet::new(PAGES),
            machine_bitmap: PageSet::new(PAGES),
        }
    }
}

impl Memory {
    /// Returns a page.
    #[must_use]
    pub fn page(&self, page: u64) -> &[u8] {
        &self.pages[index(page)]
    }

    /// Returns a page, shared until somebody writes it.
    #[must_use]
    pub fn content(&self, page: u64) -> Arc<Vec<u8>> {
        Arc::clone(&self.pages[index(page)])
    }

    /// The guest writes.
    pub fn write(&mut self, page: u64, offset: usize, bytes: &[u8]) {
        if put(&mut self.pages, page, offset, bytes) {
            self.guest_log.insert(page);
        }
    }

    /// The machine writes for the guest.
    pub fn machine_writes(&mut self, page: u64, offset: usize, bytes: &[u8]) {
        if put(&mut self.pages, page, offset, bytes) {
            self.machine_bitmap.insert(page);
        }
    }

    /// Returns a number of a page.
    #[must_use]
    pub fn number(&self, page: u64, at: usize) -> u64 {
        let bytes = &self.page(page)[at * 8..at * 8 + 8];
        u64::from_le_bytes(bytes.try_into().expect("eight bytes"))
    }

    /// The guest writes a number.
    pub fn set_number(&mut self, page: u64, at: usize, number: u64) {
        self.write(page, at * 8, &number.to_le_bytes());
    }

    /// Tells whether a page was written since the last harvest.
    #[must_use]
    pub fn is_written(&self, page: u64) -> bool {
        self.guest_log.contains(page) || self.machine_bitmap.contains(page)
    }

    /// Returns the pages written since the last harvest, by whomever, but for those that were cleared.
    #[must_use]
    pub fn dirty(&self) -> PageSet {
        let mut dirty = self.guest_log.clone();
        dirty.union(&self.machine_bitmap);
        dirty
    }

    /// Counts these pages as clean, in both records.
    pub fn clear_dirty(&mut self, pages: &PageSet) {
        self.guest_log.subtract(pages);
        self.machine_bitmap.subtract(pages);
    }

    /// Returns the pages written since the last call, by whomever.
    pub fn harvest(&mut self) -> PageSet {
        let mut dirty = core::mem::replace(&mut self.guest_log, PageSet::new(PAGES));
        if !mutants::on(Mutant::SkipMachineWrites) {
            dirty.union(&self.machine_bitmap);
        }
        self.machine_bitmap.clear();
        dirty
    }

    /// Makes these pages part of the next harvest.
    pub fn put_back(&mut self, pages: &PageSet) {
        self.guest_log.union(pages);
    }
}

fn put(pages: &mut [Arc<Vec<u8>>], page: u64, offset: usize, bytes: &[u8]) -> bool {
    let page = &mut pages[index(page)];
    if page[offset..offset + bytes.len()] == *bytes {
        return false;
    }
    Arc::make_mut(page)[offset..offset + bytes.len()].copy_from_slice(bytes);
    true
}

pub(crate) fn index(page: u64) -> usize {
    usize::try_from(page).expect("the toy is small")
}
