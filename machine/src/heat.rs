//! How often each page was dirty lately: which pages to ship ahead, and which to leave for the stop.
//!
//! One byte a page. Each look at the dirty set makes the dirty pages hotter; each [`Heat::cool`] halves all. A page
//! that is written in every period stays hot, one that was written once is cold after a few. Pure: it reads no clock, and
//! who looks and who cools says how long a period is.

use crate::{PageSet, index};

/// How hot a page gets by being dirty once; eight coolings later it is forgotten.
const ONCE: u8 = 16;

/// How often each page was dirty lately.
#[derive(Clone, Debug)]
pub struct Heat {
    pages: Box<[u8]>,
}

impl Heat {
    /// Makes the record of a machine with `pages` pages, all cold.
    #[must_use]
    pub fn new(pages: u64) -> Self {
        Self {
            pages: vec![0; index(pages)].into(),
        }
    }

    /// Notes that `dirty` were written since the last look.
    ///
    /// # Panics
    /// If the set belongs to a machine of another size.
    pub fn note(&mut self, dirty: &PageSet) {
        assert_eq!(dirty.pages(), self.pages.len() as u64, "the pages of one machine");
        for page in dirty.iter() {
            let heat = &mut self.pages[index(page)];
            *heat = heat.saturating_add(ONCE);
        }
    }

    /// Halves the heat of every page.
    pub fn cool(&mut self) {
        // Eight pages at a time: the bit that falls out of one byte must not fall into the next.
        let (words, rest) = self.pages.as_chunks_mut::<8>();
        for word in words {
            *word = (u64::from_ne_bytes(*word) >> 1 & 0x7f7f_7f7f_7f7f_7f7f).to_ne_bytes();
        }
        for heat in rest {
            *heat >>= 1;
        }
    }

    /// Says how hot a page is; 0 for one that the machine does not have.
    #[must_use]
    pub fn of(&self, page: u64) -> u8 {
        self.pages.get(index(page)).copied().unwrap_or(0)
    }

    /// Lists `pages` coldest first; equally hot ones in ascending order, so that runs stay together.
    #[must_use]
    pub fn coldest_first(&self, pages: &PageSet) -> Vec<u64> {
        let mut starts = [0_usize; 256];
        for page in pages.iter() {
            starts[usize::from(self.of(page))] += 1;
        }
        let mut next = 0;
        for start in &mut starts {
            next += core::mem::replace(start, next);
        }
        let mut order = vec![0; next];
        for page in pages.iter() {
            let place = &mut starts[usize::from(self.of(page))];
            order[*place] = page;
            *place += 1;
        }
        order
    }

    /// Returns those of `pages` that are at most as hot as `limit`.
    #[must_use]
    pub fn at_most(&self, limit: u8, pages: &PageSet) -> PageSet {
        let mut cold = PageSet::new(pages.pages());
        cold.extend(pages.iter().filter(|page| self.of(*page) <= limit));
        cold
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn set(pages: impl IntoIterator<Item = u64>) -> PageSet {
        let mut set = PageSet::new(100);
        set.extend(pages);
        set
    }

    #[test]
    fn a_page_written_always_is_hotter_than_one_written_once() {
        let mut heat = Heat::new(100);
        heat.note(&set([1, 2]));
        for _ in 0..50 {
            heat.cool();
            heat.note(&set([2]));
        }
        assert_eq!((heat.of(0), heat.of(1)), (0, 0));
        assert!(heat.of(2) > ONCE);
        assert_eq!(heat.coldest_first(&set([0, 1, 2, 3])), [0, 1, 3, 2]);
        assert_eq!(heat.at_most(0, &set([0, 2, 3])), set([0, 3]));
        assert_eq!(heat.of(100), 0);
    }

    #[test]
    fn heat_neither_overflows_nor_stays_for_ever() {
        let mut heat = Heat::new(100);
        for _ in 0..1000 {
            heat.note(&set([99]));
        }
        assert_eq!((heat.of(98), heat.of(99)), (0, u8::MAX));
        for _ in 0..8 {
            heat.cool();
        }
        assert_eq!(heat.of(99), 0);
    }

    proptest! {
        #[test]
        fn cooling_halves_each_page_on_its_own(levels in proptest::collection::vec(any::<u8>(), 0..40)) {
            let mut heat = Heat { pages: levels.clone().into() };
            heat.cool();
            let halves: Vec<_> = levels.iter().map(|level| level / 2).collect();
            prop_assert_eq!(&*heat.pages, &*halves);
        }

        #[test]
        fn the_order_is_that_of_a_stable_sort(levels in proptest::collection::vec(any::<u8>(), 100), pages in proptest::collection::btree_set(0_u64..100, 0..100)) {
            let heat = Heat { pages: levels.into() };
            let mut expected: Vec<_> = pages.iter().copied().collect();
            expected.sort_by_key(|page| heat.of(*page));
            prop_assert_eq!(heat.coldest_first(&set(pages)), expected);
        }
    }
}
