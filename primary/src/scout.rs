//! Which dirty pages have gone quiet, to be shipped ahead of the stop, and which are hot and wait for it.
//!
//! A dirty bit says that a page was written since the bit was cleared, not when. So a page is hot when its bit appears,
//! cools while looks find nothing new about it, and is shipped ahead once it is cold. A page that was shipped ahead and is dirty
//! again was shipped in vain: it becomes so hot that it takes several times as long, so that the guest's faults and
//! the link are spent on pages that stay.
//!
//! ```text
//!   clean ──written──► hot ──looks──► cold ──► shipped ahead ──written──► hotter ──looks──► cold …
//!                       └────────────── the stop takes whatever is dirty ──────┘
//! ```
//!
//! Pure: it is shown dirty sets and names pages; the shell clears, copies and sends.

use machine::{Heat, PageSet};

/// Looks after which everything cools by half.
const COOL_AFTER: u32 = 5;
/// As hot as a page may be to be shipped ahead: cooled twice since it was written once.
const COLD: u8 = 4;
/// How often a page that was shipped in vain counts as written: it takes five coolings.
const IN_VAIN: usize = 7;

/// What is known of the pages of one machine.
#[derive(Clone, Debug)]
pub struct Scout {
    heat: Heat,
    /// Dirty at the last look, and left so.
    seen: PageSet,
    /// Shipped ahead since the last stop.
    shipped: PageSet,
    looks: u32,
}

impl Scout {
    /// Makes the record of a machine with `pages` pages, of which nothing is known.
    #[must_use]
    pub fn new(pages: u64) -> Self {
        Self {
            heat: Heat::new(pages),
            seen: PageSet::new(pages),
            shipped: PageSet::new(pages),
            looks: 0,
        }
    }

    /// Takes note of the dirty pages and returns those to be shipped ahead, at most so many. They count as clean from
    /// here on.
    pub fn look(&mut self, dirty: &PageSet, most: u64) -> PageSet {
        self.looks = self.looks.wrapping_add(1);
        if self.looks.is_multiple_of(COOL_AFTER) {
            self.heat.cool();
        }
        let mut fresh = dirty.clone();
        fresh.subtract(&self.seen);
        let mut in_vain = PageSet::new(dirty.pages());
        in_vain.extend(fresh.iter().filter(|page| self.shipped.contains(*page)));
        self.heat.note(&fresh);
        for _ in 1..IN_VAIN {
            self.heat.note(&in_vain);
        }
        let mut cold = PageSet::new(dirty.pages());
        if let Ok(most) = usize::try_from(most) {
            cold.extend(self.heat.at_most(COLD, dirty).iter().take(most));
        }
        self.shipped.union(&cold);
        self.seen.clone_from(dirty);
        self.seen.subtract(&cold);
        cold
    }

    /// The machine was stopped, and all its pages count as clean.
    pub fn stopped(&mut self) {
        self.seen.clear();
        self.shipped.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: u64 = 100;
    const ALL: u64 = u64::MAX;

    fn set(pages: impl IntoIterator<Item = u64>) -> PageSet {
        let mut set = PageSet::new(PAGES);
        set.extend(pages);
        set
    }

    /// Looks until something is cold; returns how many looks that took.
    fn looks_until_cold(scout: &mut Scout, dirty: &PageSet) -> u32 {
        (1..1_000)
            .find(|_| !scout.look(dirty, ALL).is_empty())
            .expect("what is not written cools")
    }

    #[test]
    fn a_page_is_left_alone_until_it_has_been_quiet_for_a_while() {
        let mut scout = Scout::new(PAGES);
        assert!(scout.look(&set([]), ALL).is_empty());
        let looks = looks_until_cold(&mut scout, &set([3]));
        assert!((COOL_AFTER..=3 * COOL_AFTER).contains(&looks), "{looks}");
        assert!(scout.look(&set([]), ALL).is_empty(), "once");
    }

    #[test]
    fn a_page_shipped_in_vain_has_to_be_quiet_for_longer() {
        let mut scout = Scout::new(PAGES);
        let first = looks_until_cold(&mut scout, &set([3]));
        let again = looks_until_cold(&mut scout, &set([3]));
        assert!(again >= 2 * first, "{first} looks, then {again}");
        let third = looks_until_cold(&mut scout, &set([3]));
        assert!(third >= again, "{again} looks, then {third}");
    }

    #[test]
    fn a_page_that_is_written_all_the_time_is_shipped_seldom_and_a_quiet_one_once() {
        let mut scout = Scout::new(PAGES);
        let (mut hot, mut quiet) = (0, 0);
        let mut dirty = set([1, 2]);
        for _ in 0..200 {
            let cold = scout.look(&dirty, ALL);
            quiet += u32::from(cold.contains(1));
            hot += u32::from(cold.contains(2));
            dirty.subtract(&cold);
            dirty.insert(2);
        }
        assert_eq!(quiet, 1);
        assert!(hot <= 10, "{hot} times in 200 looks");
    }

    #[test]
    fn no_more_than_asked_and_the_rest_is_not_forgotten() {
        let mut scout = Scout::new(PAGES);
        let mut dirty = set(0..20);
        for _ in 0..50 {
            assert!(scout.look(&dirty, 0).is_empty());
        }
        for round in 0..4 {
            let cold = scout.look(&dirty, 5);
            assert_eq!(cold, set(round * 5..round * 5 + 5));
            dirty.subtract(&cold);
        }
        assert!(scout.look(&dirty, 5).is_empty());
    }

    #[test]
    fn after_a_stop_what_was_shipped_before_was_not_in_vain() {
        let mut scout = Scout::new(PAGES);
        let first = looks_until_cold(&mut scout, &set([3]));
        scout.stopped();
        let next = looks_until_cold(&mut scout, &set([3]));
        assert!(next <= first + COOL_AFTER, "{first} looks, then {next}");
    }
}
