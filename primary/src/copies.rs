//! Copies of guest pages: what a stop copies, and the courier reads. Decides nothing but how much room is kept.

use core::ops::Range;

use checkpoint::limits::PAGE_BYTES;
use checkpoint::pages::Page;
use machine::{GuestRam, MemoryError, PageSet};

/// Pages copied at a stop. What is dirty beyond them is shipped while the VM stands, so that the copy is bounded.
const COPIED_PAGES_MAX: usize = 64 * 1024;
/// Stops after which room that none of them needed is given back to the host.
const SPARE_AFTER: u32 = 32;

/// Copies of pages; its room is used again and again, since memory that is new costs a fault a page.
#[derive(Default)]
pub(crate) struct Copies {
    numbers: Vec<u64>,
    content: Vec<u8>,
    /// Pages of the largest of the last stops, and how many these were.
    most: usize,
    stops: u32,
}

impl Copies {
    /// Copies pages until the bound, and returns those beyond it.
    pub(crate) fn take(&mut self, ram: &GuestRam, pages: &PageSet) -> Result<Vec<u64>, MemoryError> {
        let count = usize::try_from(pages.len()).map_or(COPIED_PAGES_MAX, |count| count.min(COPIED_PAGES_MAX));
        self.make_room(count);
        let mut rest = &mut self.content[..count * PAGE_BYTES];
        let mut beyond = Vec::new();
        for run in pages.runs() {
            let wanted = usize::try_from(run.end - run.start).unwrap_or(usize::MAX);
            let taken = wanted.min(rest.len() / PAGE_BYTES);
            let (now, later) = rest.split_at_mut(taken * PAGE_BYTES);
            rest = later;
            if taken > 0 {
                ram.read_run(run.start, now)?;
            }
            let end = run.start + taken as u64;
            self.numbers.extend(run.start..end);
            beyond.extend(end..run.end);
        }
        Ok(beyond)
    }

    pub(crate) fn read(
        &mut self,
        ram: &GuestRam,
        pages: impl ExactSizeIterator<Item = u64>,
    ) -> Result<(), MemoryError> {
        self.make_room(pages.len());
        self.numbers.extend(pages);
        for (page, content) in self.numbers.iter().zip(self.content.as_chunks_mut().0) {
            ram.read_page(*page, content)?;
        }
        Ok(())
    }

    /// Returns how many pages are copied.
    pub(crate) fn len(&self) -> usize {
        self.numbers.len()
    }

    /// What was copied is sent. Gives room back if the last stops were much smaller than one before them.
    pub(crate) fn used(&mut self) {
        self.most = self.most.max(self.numbers.len());
        self.stops += 1;
        if self.stops < SPARE_AFTER {
            return;
        }
        let enough = 2 * self.most * PAGE_BYTES;
        if self.content.len() > 2 * enough {
            self.content.truncate(enough);
            self.content.shrink_to_fit();
        }
        (self.most, self.stops) = (0, 0);
    }

    fn make_room(&mut self, pages: usize) {
        self.numbers.clear();
        if self.content.len() < pages * PAGE_BYTES {
            self.content.resize(pages * PAGE_BYTES, 0);
        }
    }

    pub(crate) fn at(&self, place: usize) -> (u64, &Page) {
        (self.numbers[place], &self.content.as_chunks().0[place])
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, &Page)> {
        self.range(0..self.numbers.len())
    }

    pub(crate) fn range(&self, places: Range<usize>) -> impl Iterator<Item = (u64, &Page)> {
        let content = &self.content.as_chunks().0[places.clone()];
        self.numbers[places].iter().copied().zip(content)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use machine::Mapping;

    #[test]
    fn room_that_later_stops_do_not_need_is_given_back() {
        let ram = GuestRam::new(16 << 20, Mapping::Shared).unwrap();
        let set = |count| {
            let mut pages = PageSet::new(ram.pages());
            pages.extend(0..count);
            pages
        };
        let mut copies = Copies::default();
        for count in [1_000, 10, 900] {
            assert!(copies.take(&ram, &set(count)).unwrap().is_empty());
            copies.used();
            assert_eq!(copies.content.len(), 1_000 * PAGE_BYTES);
        }
        for _ in 0..2 * SPARE_AFTER {
            copies.take(&ram, &set(50)).unwrap();
            assert_eq!(copies.iter().count(), 50);
            copies.used();
        }
        assert_eq!(
            (copies.content.len(), copies.content.capacity()),
            (100 * PAGE_BYTES, 100 * PAGE_BYTES)
        );
        copies.take(&ram, &set(1_000)).unwrap();
        assert_eq!(copies.iter().count(), 1_000);
    }
}
