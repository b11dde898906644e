//! The pages that this process wrote into guest memory: one bit for each, set after the write.
//!
//! Devices set bits while another thread takes them, with no lock between the two. What makes it sound is
//! the order on either side. A writer writes, then sets the bit with a release. Whoever takes clears the bit with
//! an acquire, then reads the page. If the bit was set first, taking it makes all of the write visible to the read. If
//! it was taken first, the write sets it once more, and the page is in the next set, whatever was read of it.
//! A bit is therefore set even where it is set already: a writer that left that out would have
//! released nothing. At a stop the devices are at rest, and every write of theirs has set its bits.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};

use crate::{PAGE_BYTES, PageSet};

const PAGE: NonZeroUsize = NonZeroUsize::new(PAGE_BYTES).expect("a page is not empty");

/// The pages of one region of memory that this process wrote.
#[derive(Debug, Default)]
pub struct Written {
    words: Box<[AtomicU64]>,
}

impl Written {
    /// Adds the pages to `to`; page 0 of the region is page `first` there.
    pub(crate) fn peek(&self, first: u64, to: &mut PageSet) {
        for (word, first) in self.words.iter().zip((first..).step_by(64)) {
            let bits = word.load(Ordering::Acquire);
            if bits != 0 {
                to.union_word(first, bits);
            }
        }
    }

    /// Moves the pages into `to`; page 0 of the region is page `first` there.
    pub(crate) fn take(&self, first: u64, to: &mut PageSet) {
        for (word, first) in self.words.iter().zip((first..).step_by(64)) {
            // A plain look is cheap, and nearly all words are empty.
            if word.load(Ordering::Relaxed) != 0 {
                to.union_word(first, word.swap(0, Ordering::AcqRel));
            }
        }
    }

    /// Takes those pages out that have a bit in `masks`, a word for each of the region's.
    pub(crate) fn clear(&self, masks: &[u64]) {
        for (word, mask) in self.words.iter().zip(masks) {
            if *mask != 0 {
                word.fetch_and(!mask, Ordering::AcqRel);
            }
        }
    }
}

impl Bitmap for Written {
    fn mark_dirty(&self, offset: usize, len: usize) {
        let Some(last) = len.checked_sub(1) else { return };
        let first = offset / PAGE;
        let last = offset.saturating_add(last) / PAGE;
        // Pages past the end are nowhere: the write itself was refused.
        for number in first / 64..=(last / 64).min(self.words.len().wrapping_sub(1)) {
            let Some(word) = self.words.get(number) else { return };
            let from = first.saturating_sub(number * 64);
            let to = (last - number * 64).min(63);
            word.fetch_or(u64::MAX >> (63 - (to - from)) << from, Ordering::AcqRel);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset / PAGE;
        self.words
            .get(page / 64)
            .is_some_and(|word| word.load(Ordering::Acquire) >> (page % 64) & 1 != 0)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

impl<'a> WithBitmapSlice<'a> for Written {
    type S = RefSlice<'a, Self>;
}

impl NewBitmap for Written {
    fn with_len(bytes: usize) -> Self {
        let words = bytes.div_ceil(PAGE_BYTES).div_ceil(64);
        Self {
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGES: usize = 200;

    fn set(pages: impl IntoIterator<Item = u64>) -> PageSet {
        let mut set = PageSet::new(256);
        set.extend(pages);
        set
    }

    #[test]
    fn nothing_and_what_lies_past_the_end_mark_nothing() {
        let written = Written::with_len(64 * PAGE_BYTES);
        written.mark_dirty(5, 0);
        written.mark_dirty(64 * PAGE_BYTES, 1);
        written.mark_dirty(usize::MAX - 1, usize::MAX);
        Written::default().mark_dirty(0, usize::MAX);
        let mut seen = PageSet::new(64);
        written.take(0, &mut seen);
        assert!(seen.is_empty());
        written.mark_dirty(0, usize::MAX);
        written.take(0, &mut seen);
        assert_eq!(seen, PageSet::full(64));
    }

    proptest! {
        #[test]
        fn agrees_with_a_set(
            writes in proptest::collection::vec((0..PAGES * PAGE_BYTES, 1..80 * PAGE_BYTES), 0..20),
            cleared in proptest::collection::vec(0..PAGES as u64, 0..50),
        ) {
            let written = Written::with_len(PAGES * PAGE_BYTES);
            let mut expected = set([]);
            for (offset, len) in &writes {
                written.mark_dirty(*offset, *len);
                let last = (offset + len - 1) / PAGE_BYTES;
                expected.extend((offset / PAGE_BYTES..=last.min(255)).map(|page| page as u64));
            }
            for page in 0..PAGES {
                prop_assert_eq!(written.dirty_at(page * PAGE_BYTES + 9), expected.contains(page as u64));
            }
            let cleared = set(cleared);
            written.clear(cleared.words());
            expected.subtract(&cleared);
            for _ in 0..2 {
                let mut seen = set([]);
                written.peek(0, &mut seen);
                prop_assert_eq!(&seen, &expected);
            }
            let mut taken = set([]);
            written.take(0, &mut taken);
            prop_assert_eq!(&taken, &expected);
            written.peek(0, &mut taken);
            prop_assert_eq!(&taken, &expected);
            let mut rest = set([]);
            written.take(0, &mut rest);
            prop_assert!(rest.is_empty());
        }
    }
}
