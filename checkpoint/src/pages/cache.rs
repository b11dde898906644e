//! What the secondary has committed, as far as the primary remembers it.
//!
//! A delta is against the committed content, so this holds exactly that, and nothing that is not acknowledged: content
//! shipped in an epoch waits beside the base and takes its place at the commit, or is forgotten if the epoch is abandoned.
//!
//! ```text
//!   shipped(page) ─► waiting ─► commit: becomes the base
//!                       │  ▲─── shipped again in the same epoch: replaced
//!                       └─────► abandon: forgotten, the base stays
//! ```
//!
//! A page that was shipped, but for which no room was left, loses its base at the commit: what is held is never old.
//! Every page of a shipment must be told of here; that is all that the guarantee rests on.
//!
//! The room is bounded. When it is full, a page gets in only if it is dirtied more often than the coldest of a few that a
//! clock hand points at; pages that wait for the commit are not asked to leave. Zero pages are not kept: they need no base.
//!
//! Driven by the shell that ships pages: one for each encoder, over pages of its own.

use std::collections::BTreeMap;

use super::{Codec, Page, ZERO_PAGE};
use crate::epoch::Epoch;
use crate::limits::PAGE_BYTES;
use crate::mutants::{self, Mutant};

/// A bound that a host can spare for a VM with a few hot tens of thousands of pages.
pub const BASE_BYTES_DEFAULT: usize = 256 * 1024 * 1024;

/// What a page takes with its places in the tables, in bytes.
const SLOT_BYTES: usize = PAGE_BYTES + 128;
/// Slots that the clock hand looks at for one that may go.
const SCAN: usize = 16;
/// Counters of dirtying for each page that has room; pages without room are counted, too.
const COUNTERS_PER_SLOT: usize = 4;
/// Counters are halved after so many pages for each slot.
const HALVE_AFTER: usize = 8;

/// The committed content of a page.
#[derive(Clone, Copy, Debug)]
pub struct Reference<'a> {
    /// The content.
    pub page: &'a Page,
    /// The commit whose content it is.
    pub epoch: Epoch,
    /// Whether the page was shipped in this epoch already, so that the receiver has something to take back.
    pub shipped: bool,
}

/// For the status.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Memory that is taken, in bytes.
    pub bytes: usize,
    /// Memory that may be taken, in bytes.
    pub limit: usize,
    /// Contents that are held: bases, and what waits for the commit.
    pub pages: usize,
    /// Pages that were asked for and had a base.
    pub hits: u64,
    /// Pages that were asked for and had none.
    pub misses: u64,
    /// Pages that made room for others.
    pub evictions: u64,
}

/// Contents of pages at their last commit.
pub struct BaseCache {
    committed: Option<Epoch>,
    limit: usize,
    slots_most: usize,
    slots: Vec<Slot>,
    free: Vec<usize>,
    entries: BTreeMap<u64, Entry>,
    /// Pages with something that waits; a page may be named twice.
    waiting: Vec<u64>,
    hand: usize,
    heat: Heat,
    hits: u64,
    misses: u64,
    evictions: u64,
}

struct Slot {
    page: u64,
    content: Box<Page>,
}

#[derive(Clone, Copy)]
struct Entry {
    base: Option<usize>,
    next: Next,
}

/// What the commit makes of a page.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Next {
    /// The base stays.
    Base,
    /// This slot becomes the base.
    Slot(usize),
    /// The base is old then.
    Nothing,
}

impl BaseCache {
    /// Makes an empty cache of at most `limit` bytes; 0 remembers nothing.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        let slots_most = limit / SLOT_BYTES;
        Self {
            committed: None,
            limit,
            slots_most,
            slots: Vec::new(),
            free: Vec::new(),
            entries: BTreeMap::new(),
            waiting: Vec::new(),
            hand: 0,
            heat: Heat::new(slots_most),
            hits: 0,
            misses: 0,
            evictions: 0,
        }
    }

    /// Returns the epoch whose content is held: the base of every batch that is made with this cache.
    #[must_use]
    pub fn committed(&self) -> Option<Epoch> {
        self.committed
    }

    /// Returns a page's committed content.
    pub fn base(&mut self, index: u64) -> Option<Reference<'_>> {
        let found = self
            .entries
            .get(&index)
            .and_then(|entry| Some((entry.base?, entry.next)));
        let (Some(epoch), Some((slot, next))) = (self.committed, found) else {
            self.misses += 1;
            return None;
        };
        self.hits += 1;
        let slot = match next {
            Next::Slot(waits) if mutants::on(Mutant::DeltaFromShipped) => waits,
            _ => slot,
        };
        Some(Reference {
            page: &self.slots[slot].content,
            epoch,
            shipped: next != Next::Base,
        })
    }

    /// Takes note of a page that goes to the secondary in this epoch, encoded by `codec`. What was shipped of it before in
    /// the same epoch no longer counts. Said of every page, those that the encoder left out included.
    ///
    /// # Panics
    /// Panics if a page is said to be as in a base that it does not have.
    pub fn shipped(&mut self, index: u64, content: &Page, codec: Codec) {
        self.heat.touch(index);
        let known = self.entries.get(&index).copied();
        if codec == Codec::Unchanged {
            let entry = known.filter(|entry| entry.base.is_some());
            let entry = entry.expect("a page is unchanged against its base only");
            self.set_next(index, entry, Next::Base);
            return;
        }
        let keep = codec != Codec::Zero;
        match known {
            Some(entry) => {
                let next = match entry.next {
                    Next::Slot(slot) if keep => Next::Slot(slot),
                    // Given back by `set_next`.
                    Next::Slot(_) => Next::Nothing,
                    Next::Base | Next::Nothing if keep => self.take_slot(index).map_or(Next::Nothing, Next::Slot),
                    Next::Base | Next::Nothing => Next::Nothing,
                };
                self.fill(next, content);
                // Taking a slot evicts other pages only: those without anything that waits, and never this one.
                self.set_next(index, entry, next);
            }
            None if keep => {
                if let Some(slot) = self.take_slot(index) {
                    self.fill(Next::Slot(slot), content);
                    let fresh = Entry {
                        base: None,
                        next: Next::Base,
                    };
                    self.set_next(index, fresh, Next::Slot(slot));
                }
            }
            None => {}
        }
    }

    /// The epoch is acknowledged: what was shipped in it is the base now.
    ///
    /// # Panics
    /// Panics if epochs do not ascend.
    pub fn commit(&mut self, epoch: Epoch) {
        assert!(
            self.committed.is_none_or(|committed| committed < epoch),
            "epoch {epoch} after {:?}",
            self.committed
        );
        self.committed = Some(epoch);
        for index in core::mem::take(&mut self.waiting) {
            let Some(entry) = self.entries.get_mut(&index) else {
                continue;
            };
            let old = match core::mem::replace(&mut entry.next, Next::Base) {
                Next::Base => None,
                Next::Slot(slot) => entry.base.replace(slot),
                Next::Nothing => entry.base.take(),
            };
            if entry.base.is_none() {
                self.entries.remove(&index);
            }
            self.free.extend(old);
        }
    }

    /// The epoch will not be committed: what was shipped in it is forgotten, and the secondary holds what it held.
    pub fn abandon(&mut self) {
        for index in core::mem::take(&mut self.waiting) {
            if let Some(entry) = self.entries.get(&index).copied() {
                self.set_next(index, entry, Next::Base);
            }
        }
    }

    /// Forgets everything and gives the memory back: another secondary holds another state.
    pub fn clear(&mut self) {
        *self = Self {
            hits: self.hits,
            misses: self.misses,
            evictions: self.evictions,
            ..Self::new(self.limit)
        };
    }

    /// Returns the numbers for the status.
    #[must_use]
    pub fn stats(&self) -> CacheStats {
        CacheStats {
            bytes: self.slots.len() * SLOT_BYTES,
            limit: self.limit,
            pages: self.slots.len() - self.free.len(),
            hits: self.hits,
            misses: self.misses,
            evictions: self.evictions,
        }
    }

    /// Changes what the commit makes of a page, giving back the slot that waited and does so no longer.
    fn set_next(&mut self, index: u64, mut entry: Entry, next: Next) {
        if let Next::Slot(slot) = entry.next
            && next != entry.next
        {
            self.free.push(slot);
        }
        if next != Next::Base && entry.next == Next::Base {
            self.waiting.push(index);
        }
        entry.next = next;
        if entry.base.is_none() && !matches!(next, Next::Slot(_)) {
            self.entries.remove(&index);
        } else {
            self.entries.insert(index, entry);
        }
    }

    fn fill(&mut self, next: Next, content: &Page) {
        if let Next::Slot(slot) = next {
            self.slots[slot].content.copy_from_slice(content);
        }
    }

    /// Finds room for a page, if it deserves any.
    fn take_slot(&mut self, page: u64) -> Option<usize> {
        let slot = if let Some(slot) = self.free.pop() {
            slot
        } else if self.slots.len() < self.slots_most {
            self.slots.push(Slot {
                page,
                content: Box::new(ZERO_PAGE),
            });
            self.slots.len() - 1
        } else {
            self.evict(page)?
        };
        self.slots[slot].page = page;
        Some(slot)
    }

    fn evict(&mut self, page: u64) -> Option<usize> {
        let mut coldest = None;
        for _ in 0..SCAN.min(self.slots.len()) {
            let slot = self.hand;
            self.hand = (self.hand + 1) % self.slots.len();
            let other = self.slots[slot].page;
            let leaves = other != page && self.entries.get(&other).is_some_and(|entry| entry.next == Next::Base);
            let heat = self.heat.of(other);
            if leaves && coldest.is_none_or(|(_, least)| heat < least) {
                coldest = Some((slot, heat));
            }
        }
        let (slot, heat) = coldest?;
        if heat >= self.heat.of(page) {
            return None;
        }
        self.entries.remove(&self.slots[slot].page);
        self.evictions += 1;
        Some(slot)
    }
}

/// How often pages were dirtied of late. Pages may share a counter: then both seem hotter than they are.
struct Heat {
    counters: Vec<u8>,
    touches: usize,
    halve_after: usize,
}

impl Heat {
    fn new(slots: usize) -> Self {
        let counters = (slots * COUNTERS_PER_SLOT).next_power_of_two();
        Self {
            counters: vec![0; counters],
            touches: 0,
            halve_after: slots.max(1) * HALVE_AFTER,
        }
    }

    fn touch(&mut self, page: u64) {
        let place = self.place(page);
        self.counters[place] = self.counters[place].saturating_add(1);
        self.touches += 1;
        if self.touches >= self.halve_after {
            self.touches = 0;
            self.counters.iter_mut().for_each(|counter| *counter /= 2);
        }
    }

    fn of(&self, page: u64) -> u8 {
        self.counters[self.place(page)]
    }

    fn place(&self, page: u64) -> usize {
        // Neighbours are spread by a multiplication; its upper half is the well-mixed one.
        let mixed = page.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        usize::try_from(mixed).expect("32 bits") & (self.counters.len() - 1)
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn page(value: u8) -> Page {
        [value; PAGE_BYTES]
    }

    fn cache(pages: usize) -> BaseCache {
        BaseCache::new(pages * SLOT_BYTES)
    }

    fn held(cache: &mut BaseCache, index: u64) -> Option<(u8, u64, bool)> {
        let reference = cache.base(index)?;
        Some((reference.page[7], reference.epoch.0, reference.shipped))
    }

    #[test]
    fn what_is_shipped_becomes_the_base_at_the_commit_and_not_before() {
        let mut cache = cache(8);
        cache.shipped(3, &page(1), Codec::Lz4);
        assert_eq!(held(&mut cache, 3), None);
        cache.commit(Epoch(5));
        assert_eq!(held(&mut cache, 3), Some((1, 5, false)));
        cache.shipped(3, &page(2), Codec::Delta);
        assert_eq!(held(&mut cache, 3), Some((1, 5, true)));
        cache.shipped(3, &page(3), Codec::Raw);
        assert_eq!(
            held(&mut cache, 3),
            Some((1, 5, true)),
            "the delta is never against an earlier shipment"
        );
        cache.commit(Epoch(6));
        assert_eq!(held(&mut cache, 3), Some((3, 6, false)));
        cache.commit(Epoch(9));
        assert_eq!(held(&mut cache, 3), Some((3, 9, false)));
    }

    #[test]
    fn an_abandoned_epoch_leaves_the_base() {
        let mut cache = cache(8);
        cache.shipped(3, &page(1), Codec::Raw);
        cache.commit(Epoch(5));
        cache.shipped(3, &page(2), Codec::Raw);
        cache.shipped(4, &page(2), Codec::Raw);
        cache.abandon();
        assert_eq!(held(&mut cache, 3), Some((1, 5, false)));
        assert_eq!(held(&mut cache, 4), None);
        assert_eq!(cache.stats().pages, 1);
        cache.commit(Epoch(7));
        assert_eq!(held(&mut cache, 3), Some((1, 7, false)));
    }

    #[test]
    fn a_page_that_returned_to_its_base_or_to_zero_is_right_after_the_commit() {
        let mut cache = cache(8);
        cache.shipped(1, &page(1), Codec::Raw);
        cache.shipped(2, &page(2), Codec::Raw);
        cache.commit(Epoch(5));
        cache.shipped(1, &page(9), Codec::Raw);
        cache.shipped(1, &page(1), Codec::Unchanged);
        cache.shipped(2, &page(9), Codec::Raw);
        cache.shipped(2, &page(0), Codec::Zero);
        cache.commit(Epoch(6));
        assert_eq!(held(&mut cache, 1), Some((1, 6, false)));
        assert_eq!(held(&mut cache, 2), None);
    }

    #[test]
    fn without_room_nothing_old_is_kept() {
        let mut cache = cache(2);
        cache.shipped(1, &page(1), Codec::Raw);
        cache.shipped(2, &page(2), Codec::Raw);
        cache.commit(Epoch(5));
        // Both are shipped at once: there is no slot for either to wait in.
        cache.shipped(1, &page(3), Codec::Raw);
        cache.shipped(2, &page(4), Codec::Raw);
        cache.commit(Epoch(6));
        for (index, value) in [(1, 3), (2, 4)] {
            assert!(matches!(held(&mut cache, index), None | Some((_, 6, false))));
            assert!(held(&mut cache, index).is_none_or(|held| held.0 == value));
        }
        let mut none = BaseCache::new(0);
        none.shipped(1, &page(1), Codec::Raw);
        none.commit(Epoch(1));
        assert_eq!(held(&mut none, 1), None);
        assert_eq!(none.stats().bytes, 0);
    }

    #[test]
    fn hot_pages_outlive_a_scan_of_cold_ones() {
        let mut cache = cache(64);
        let hot = 0..16;
        let mut cold = 1_000;
        for epoch in 1..200 {
            for index in hot.clone() {
                cache.shipped(index, &page(epoch), Codec::Raw);
            }
            for _ in 0..40 {
                cache.shipped(cold, &page(epoch), Codec::Raw);
                cold += 1;
            }
            cache.commit(Epoch(epoch.into()));
        }
        let kept = hot.filter(|index| held(&mut cache, *index).is_some()).count();
        assert!(kept >= 14, "{kept} of 16");
        let stats = cache.stats();
        assert!(stats.bytes <= stats.limit);
        assert!(stats.evictions > 0);
    }

    #[test]
    fn new_hot_pages_take_the_room_of_those_that_went_cold() {
        let mut cache = cache(32);
        for epoch in 1..100_u64 {
            let first = if epoch < 50 { 0 } else { 100 };
            for index in first..first + 16 {
                cache.shipped(index, &page(1), Codec::Raw);
            }
            cache.commit(Epoch(epoch));
        }
        let kept = (100..116).filter(|index| held(&mut cache, *index).is_some()).count();
        assert!(kept >= 14, "{kept} of 16");
    }

    #[test]
    fn hits_and_misses_are_counted_and_clearing_forgets() {
        let mut cache = cache(4);
        cache.shipped(1, &page(1), Codec::Own);
        cache.commit(Epoch(1));
        assert!(held(&mut cache, 1).is_some());
        assert!(held(&mut cache, 2).is_none());
        cache.clear();
        assert!(held(&mut cache, 1).is_none());
        let stats = cache.stats();
        assert_eq!((stats.hits, stats.misses, stats.pages, stats.bytes), (1, 2, 0, 0));
        assert_eq!(cache.committed(), None);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Ship(u64, u8),
        Commit,
        Abandon,
        Clear,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let ship = (0..12_u64, 0..4_u8).prop_map(|(index, value)| Step::Ship(index, value));
        vec(
            prop_oneof![20 => ship, 2 => Just(Step::Commit), 1 => Just(Step::Abandon), 1 => Just(Step::Clear)],
            0..200,
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

        /// Against a model of the secondary that keeps everything.
        #[test]
        fn what_is_held_is_what_the_secondary_committed(steps in steps(), room in 0..16_usize) {
            let mut cache = cache(room);
            let mut committed = BTreeMap::new();
            let mut staged: BTreeMap<u64, u8> = BTreeMap::new();
            let mut epoch = 0;
            for step in steps {
                match step {
                    Step::Ship(index, value) => {
                        let known = held(&mut cache, index);
                        if let Some((_, _, shipped)) = known {
                            prop_assert_eq!(shipped, staged.contains_key(&index) );
                        }
                        let codec = match known {
                            Some((base, _, _)) if base == value => Codec::Unchanged,
                            _ if value == 0 => Codec::Zero,
                            _ => Codec::Raw,
                        };
                        cache.shipped(index, &page(value), codec);
                        if codec == Codec::Unchanged {
                            staged.remove(&index);
                        } else {
                            staged.insert(index, value);
                        }
                    }
                    Step::Commit => {
                        epoch += 1;
                        committed.append(&mut staged);
                        cache.commit(Epoch(epoch));
                    }
                    Step::Abandon => {
                        staged.clear();
                        cache.abandon();
                    }
                    Step::Clear => {
                        staged.clear();
                        committed.clear();
                        cache.clear();
                    }
                }
                for index in 0..12 {
                    if let Some((value, at, _)) = held(&mut cache, index) {
                        prop_assert_eq!(committed.get(&index), Some(&value));
                        prop_assert_eq!(at, epoch);
                    }
                }
                let stats = cache.stats();
                prop_assert!(stats.bytes <= stats.limit);
                let named: usize = cache.entries.values()
                    .map(|entry| usize::from(entry.base.is_some()) + usize::from(matches!(entry.next, Next::Slot(_))))
                    .sum();
                prop_assert_eq!(named, stats.pages);
            }
        }
    }
}
