//! Room for the content of pages, made before it is needed: what a stop copies into.
//!
//! To copy into memory that was never touched costs a fault a page, many times the copy itself. So the buffer is filled
//! once when it is made, is used again for every stop, and never grows. What does not fit stays with the caller.

use crate::{GuestRam, MemoryError, PAGE_BYTES, PageSet, index};

/// Room for the content of pages.
pub struct CopyBuffer {
    pages: Vec<u64>,
    content: Box<[[u8; PAGE_BYTES]]>,
}

impl CopyBuffer {
    /// Makes room for `capacity` pages, all of it in memory.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        let mut content = vec![[0; PAGE_BYTES]; capacity].into_boxed_slice();
        for page in &mut content {
            // Zeroed memory is only promised; a value other than zero must be written.
            page[0] = core::hint::black_box(1);
        }
        Self {
            pages: Vec::with_capacity(capacity),
            content,
        }
    }

    /// Returns for how many more pages there is room.
    #[must_use]
    pub const fn room(&self) -> usize {
        self.content.len() - self.pages.len()
    }

    /// Says whether the buffer holds nothing.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// Forgets what was copied; the room stays.
    pub fn clear(&mut self) {
        self.pages.clear();
    }

    /// Copies `pages` as the guest sees them, in ascending order for as long as there is room, and returns those
    /// that there was no room for. The guest may run; see [`GuestRam::read_page`].
    ///
    /// # Panics
    /// If the set belongs to a machine of another size.
    pub fn copy(&mut self, ram: &GuestRam, pages: &PageSet) -> Result<PageSet, MemoryError> {
        assert_eq!(pages.pages(), ram.pages(), "the pages of one machine");
        let mut rest = PageSet::new(pages.pages());
        for run in pages.runs() {
            let used = self.pages.len();
            let count = (run.end - run.start).min(self.room() as u64);
            let room = self.content[used..used + index(count)].as_flattened_mut();
            ram.read_run(run.start, room)?;
            self.pages.extend(run.start..run.start + count);
            rest.extend(run.start + count..run.end);
        }
        Ok(rest)
    }

    /// Goes through the copies in the order in which they were made.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (u64, &[u8; PAGE_BYTES])> {
        self.pages.iter().copied().zip(&self.content)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Mapping;
    use crate::memory::{MEMORY_MIN, MEMORY_STEP};
    use guest::abi::LOW_MEMORY_END_MAX;

    #[test]
    fn holds_what_was_there_and_no_more_than_it_can() {
        let ram = GuestRam::new(MEMORY_MIN, Mapping::Shared).unwrap();
        let mut pages = PageSet::new(ram.pages());
        for (page, byte) in [(0, 1), (5, 2), (6, 3), (7, 4), (900, 5)] {
            ram.write_committed(page, &[byte; PAGE_BYTES]).unwrap();
            pages.insert(page);
        }
        let mut buffer = CopyBuffer::new(3);
        for _ in 0..2 {
            let rest = buffer.copy(&ram, &pages).unwrap();
            assert_eq!(rest.iter().collect::<Vec<_>>(), [7, 900]);
            let copies: Vec<_> = buffer.iter().map(|(page, content)| (page, content[4095])).collect();
            assert_eq!(copies, [(0, 1), (5, 2), (6, 3)]);
            assert_eq!(buffer.room(), 0);
            assert_eq!(buffer.copy(&ram, &rest).unwrap(), rest);
            buffer.clear();
            assert!(buffer.is_empty());
        }
        assert!(buffer.copy(&ram, &PageSet::new(ram.pages())).unwrap().is_empty());
        assert!(buffer.is_empty());
    }

    #[test]
    fn a_run_over_the_device_window_is_whole() {
        let ram = GuestRam::new(LOW_MEMORY_END_MAX + MEMORY_STEP, Mapping::Private).unwrap();
        let low = LOW_MEMORY_END_MAX / PAGE_BYTES as u64;
        let mut pages = PageSet::new(ram.pages());
        for (page, byte) in (low - 2..low + 2).zip(1..) {
            ram.write_committed(page, &[byte; PAGE_BYTES]).unwrap();
            pages.insert(page);
        }
        let mut buffer = CopyBuffer::new(10);
        assert!(buffer.copy(&ram, &pages).unwrap().is_empty());
        let copies: Vec<_> = buffer
            .iter()
            .map(|(page, content)| (page - low + 2, content[9]))
            .collect();
        assert_eq!(copies, [(0, 1), (1, 2), (2, 3), (3, 4)]);
    }
}
