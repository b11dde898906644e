//! A set of guest pages, by their index in RAM.
//!
//! RAM pages are numbered without gaps from 0, whatever their guest-physical addresses are. The set
//! is a bitmap: one bit for each page of the machine, allocated once.

use std::ops::Range;

/// A set of guest pages, by their index in RAM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    pages: u64,
}

impl PageSet {
    /// Creates an empty set for a machine of `pages` pages.
    #[must_use]
    pub fn new(pages: u64) -> Self {
        Self {
            words: vec![0; crate::index(pages.div_ceil(64))],
            pages,
        }
    }

    /// Creates the set of all pages of a machine of `pages` pages.
    #[must_use]
    pub fn full(pages: u64) -> Self {
        let mut set = Self {
            words: vec![u64::MAX; crate::index(pages.div_ceil(64))],
            pages,
        };
        set.trim();
        set
    }

    /// Returns the number of pages the machine has; the set's members are below it.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// Adds a page. Says whether it is new.
    ///
    /// # Panics
    /// If the machine has no such page.
    pub fn insert(&mut self, page: u64) -> bool {
        assert!(page < self.pages, "page {page} of a machine with {} pages", self.pages);
        let word = &mut self.words[crate::index(page / 64)];
        let bit = 1 << (page % 64);
        let new = *word & bit == 0;
        *word |= bit;
        new
    }

    /// Takes a page out. Says whether it was there.
    pub fn remove(&mut self, page: u64) -> bool {
        let was = self.contains(page);
        if was {
            self.words[crate::index(page / 64)] &= !(1 << (page % 64));
        }
        was
    }

    /// Says whether the page is in the set.
    #[must_use]
    pub fn contains(&self, page: u64) -> bool {
        page < self.pages && self.words[crate::index(page / 64)] & (1 << (page % 64)) != 0
    }

    /// Adds all pages of `other`.
    ///
    /// # Panics
    /// If the two belong to machines of different sizes.
    pub fn union(&mut self, other: &Self) {
        assert_eq!(self.pages, other.pages, "page sets of machines of different sizes");
        for (word, more) in self.words.iter_mut().zip(&other.words) {
            *word |= more;
        }
    }

    /// Takes all pages of `other` out.
    ///
    /// # Panics
    /// If the two belong to machines of different sizes.
    pub fn subtract(&mut self, other: &Self) {
        assert_eq!(self.pages, other.pages, "page sets of machines of different sizes");
        for (word, less) in self.words.iter_mut().zip(&other.words) {
            *word &= !less;
        }
    }

    /// Leaves only the pages that are in `other` too.
    ///
    /// # Panics
    /// If the two belong to machines of different sizes.
    pub fn intersect(&mut self, other: &Self) {
        assert_eq!(self.pages, other.pages, "page sets of machines of different sizes");
        for (word, both) in self.words.iter_mut().zip(&other.words) {
            *word &= both;
        }
    }

    /// Adds 64 pages at once: bit *n* of `bits` is page `first` + *n*.
    pub(crate) fn union_word(&mut self, first: u64, bits: u64) {
        debug_assert_eq!(first % 64, 0, "words begin at multiples of 64");
        self.words[crate::index(first / 64)] |= bits;
    }

    /// Returns the set as words: bit *n* of the first is page *n*.
    #[cfg(test)]
    pub(crate) fn words(&self) -> &[u64] {
        &self.words
    }

    /// Returns `count` words of the set: bit *n* of the first is page `first` + *n*.
    pub(crate) fn words_from(&self, first: u64, count: usize) -> &[u64] {
        debug_assert_eq!(first % 64, 0, "words begin at multiples of 64");
        let first = crate::index(first / 64);
        &self.words[first..first + count]
    }

    /// Clears the bits past the last page.
    pub(crate) fn trim(&mut self) {
        let used = self.pages % 64;
        if used != 0
            && let Some(last) = self.words.last_mut()
        {
            *last &= (1 << used) - 1;
        }
    }

    /// Takes all pages out.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Returns the number of pages in the set.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Says whether the set has no pages.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Goes through the pages in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.words.iter().zip((0..).step_by(64)).flat_map(|(word, first)| {
            let mut rest = *word;
            std::iter::from_fn(move || {
                (rest != 0).then(|| {
                    let bit = rest.trailing_zeros();
                    rest &= rest - 1;
                    first + u64::from(bit)
                })
            })
        })
    }

    /// Goes through the longest ranges of pages that follow each other, in ascending order.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut next = 0;
        std::iter::from_fn(move || {
            let start = self.find(next, true)?;
            let end = self.find(start, false).unwrap_or(self.pages);
            next = end;
            Some(start..end)
        })
    }

    /// Finds the first page from `start` on that is in the set (`present`) or is not.
    fn find(&self, start: u64, present: bool) -> Option<u64> {
        let flip = if present { 0 } else { u64::MAX };
        let mut mask = u64::MAX << (start % 64);
        let first = start / 64;
        for (word, number) in self.words.get(crate::index(first)..)?.iter().zip(first..) {
            let candidates = (word ^ flip) & mask;
            if candidates != 0 {
                let page = number * 64 + u64::from(candidates.trailing_zeros());
                return (page < self.pages).then_some(page);
            }
            mask = u64::MAX;
        }
        None
    }
}

impl Extend<u64> for PageSet {
    fn extend<T: IntoIterator<Item = u64>>(&mut self, pages: T) {
        for page in pages {
            self.insert(page);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn full_set_has_every_page_and_no_more() {
        for pages in [0, 1, 63, 64, 65, 200] {
            let set = PageSet::full(pages);
            assert_eq!(set.len(), pages);
            assert_eq!(set.iter().collect::<Vec<_>>(), (0..pages).collect::<Vec<_>>());
            let runs: Vec<_> = set.runs().collect();
            assert_eq!(runs, Vec::from_iter((pages > 0).then_some(0..pages)));
        }
    }

    proptest! {
        #[test]
        fn agrees_with_a_tree(pages in proptest::collection::btree_set(0_u64..300, 0..300), other in proptest::collection::btree_set(0_u64..300, 0..50)) {
            let mut set = PageSet::new(300);
            for page in &pages {
                prop_assert!(set.insert(*page));
            }
            prop_assert_eq!(set.len(), pages.len() as u64);
            prop_assert_eq!(set.iter().collect::<BTreeSet<_>>(), pages.clone());
            let from_runs: BTreeSet<_> = set.runs().flatten().collect();
            prop_assert_eq!(&from_runs, &pages);
            for pair in set.runs().collect::<Vec<_>>().windows(2) {
                prop_assert!(pair[0].end < pair[1].start, "runs are as long as they can be");
            }
            let mut second = PageSet::new(300);
            second.extend(other.iter().copied());
            let mut both = set.clone();
            both.union(&second);
            prop_assert_eq!(both.iter().collect::<BTreeSet<_>>(), pages.union(&other).copied().collect::<BTreeSet<_>>());
            both.subtract(&second);
            prop_assert_eq!(both.iter().collect::<BTreeSet<_>>(), pages.difference(&other).copied().collect::<BTreeSet<_>>());
        }
    }
}
