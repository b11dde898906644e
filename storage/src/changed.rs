//! Which blocks of the disk changed since both sides last had the same content.
//!
//! The primary marks every write. When it stops for checkpoint *n* it closes *n*; what it marks later belongs to
//! *n + 1*. Only `Committed(n)`, which the secondary sends once its journal is durable, clears *n*. If the epoch is
//! abandoned, its blocks join the running one. After a break the union of everything left is what a returning
//! peer needs, and no more.
//!
//! A block is [`BLOCK_BYTES`] long. The map costs 128 bytes for each 64 MiB of disk that has a mark.
//!
//! Driven by the primary's protocol core.

use std::collections::{BTreeMap, VecDeque};
use std::ops::RangeInclusive;

use checkpoint::Tag;
use checkpoint::limits::BLOCK_BYTES;
use checkpoint::mutants::{self, Mutant};

const BLOCK: u64 = BLOCK_BYTES as u64;
const WORDS: usize = 16;
const GROUP_BLOCKS: u64 = WORDS as u64 * 64;
/// Closed epochs kept apart; beyond that the two oldest are joined, which clears blocks later but never too early.
const EPOCHS_MAX: usize = 16;

/// A set of block numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockSet {
    groups: BTreeMap<u64, [u64; WORDS]>,
}

impl BlockSet {
    /// Adds a block; tells whether it was new.
    pub fn insert(&mut self, block: u64) -> bool {
        let (word, bit) = place(block);
        let word = &mut self.groups.entry(block / GROUP_BLOCKS).or_insert([0; WORDS])[word];
        let new = *word & bit == 0;
        *word |= bit;
        new
    }

    /// Adds a run of blocks.
    pub fn insert_all(&mut self, blocks: RangeInclusive<u64>) {
        let (first, last) = blocks.into_inner();
        for group in first / GROUP_BLOCKS..=last / GROUP_BLOCKS {
            let words = self.groups.entry(group).or_insert([0; WORDS]);
            for (word, index) in words.iter_mut().zip(0..) {
                let start = group * GROUP_BLOCKS + index * 64;
                let (from, to) = (first.max(start), last.min(start + 63));
                if from <= to {
                    *word |= (u64::MAX >> (63 - (to - from))) << (from - start);
                }
            }
        }
    }

    /// Takes out those of a run of blocks that `is_gone` tells.
    pub fn remove_if(&mut self, blocks: RangeInclusive<u64>, is_gone: impl Fn(u64) -> bool) {
        let (first, last) = blocks.into_inner();
        let groups = self.groups.range_mut(first / GROUP_BLOCKS..=last / GROUP_BLOCKS);
        for (group, words) in groups {
            for (word, index) in words.iter_mut().zip(0..) {
                let start = group * GROUP_BLOCKS + index * 64;
                for bit in (0..64).filter(|bit| (first..=last).contains(&(start + bit))) {
                    if *word & (1 << bit) != 0 && is_gone(start + bit) {
                        *word &= !(1 << bit);
                    }
                }
            }
        }
        self.groups.retain(|_, words| *words != [0; WORDS]);
    }

    /// Tells whether the block is in the set.
    #[must_use]
    pub fn contains(&self, block: u64) -> bool {
        let (word, bit) = place(block);
        self.groups
            .get(&(block / GROUP_BLOCKS))
            .is_some_and(|words| words[word] & bit != 0)
    }

    /// Adds all of `other`.
    pub fn union(&mut self, other: &Self) {
        for (group, words) in &other.groups {
            let own = self.groups.entry(*group).or_insert([0; WORDS]);
            for (own, word) in own.iter_mut().zip(words) {
                *own |= word;
            }
        }
    }

    /// Returns how many blocks are in the set.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.groups
            .values()
            .flatten()
            .map(|word| u64::from(word.count_ones()))
            .sum()
    }

    /// Tells whether the set is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// Returns the highest block.
    #[must_use]
    pub fn last(&self) -> Option<u64> {
        let (group, words) = self.groups.last_key_value()?;
        let index = words.iter().rposition(|word| *word != 0)?;
        Some(group * GROUP_BLOCKS + index as u64 * 64 + u64::from(words[index].ilog2()))
    }

    /// Returns the blocks in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u64> {
        self.groups.iter().flat_map(|(group, words)| {
            words.iter().zip(0_u64..).flat_map(move |(word, index)| {
                (0..64_u64)
                    .filter(move |bit| word & (1 << bit) != 0)
                    .map(move |bit| group * GROUP_BLOCKS + index * 64 + bit)
            })
        })
    }
}

/// The blocks changed since the last common state, by epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangedBlocks {
    size: u64,
    since: Tag,
    closed: VecDeque<(Tag, BlockSet)>,
    running: BlockSet,
}

impl ChangedBlocks {
    /// Starts with nothing changed: both sides have the same content of `size` bytes as of `since`.
    #[must_use]
    pub fn new(size: u64, since: Tag) -> Self {
        Self {
            size,
            since,
            closed: VecDeque::new(),
            running: BlockSet::default(),
        }
    }

    /// Returns the last state that both sides are known to hold.
    #[must_use]
    pub fn since(&self) -> Tag {
        self.since
    }

    /// Returns the size of the disk in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Notes a write in the running epoch.
    ///
    /// # Panics
    /// If the range is outside the disk: the block device has checked it.
    pub fn mark(&mut self, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        let last = offset.checked_add(len - 1).filter(|last| *last < self.size);
        let last = last.expect("a write that the block device let through is within the disk");
        let last = if mutants::on(Mutant::MarkFirstBlock) {
            offset
        } else {
            last
        };
        self.running.insert_all(offset / BLOCK..=last / BLOCK);
    }

    /// Ends the running epoch, at the stop of its checkpoint.
    ///
    /// # Panics
    /// If epochs do not come in ascending order.
    pub fn close(&mut self, tag: Tag) {
        let last = self.closed.back().map_or(self.since, |(last, _)| *last);
        assert!(tag > last, "epoch {tag} closed after {last}");
        self.closed.push_back((tag, std::mem::take(&mut self.running)));
        if self.closed.len() > EPOCHS_MAX {
            let (_, oldest) = self.closed.pop_front().expect("more than one");
            self.closed.front_mut().expect("more than one").1.union(&oldest);
        }
    }

    /// Forgets the blocks of all epochs up to `tag`: the secondary's disk holds them durably.
    pub fn clear_committed(&mut self, tag: Tag) {
        while self.closed.front().is_some_and(|(closed, _)| *closed <= tag) {
            (self.since, _) = self.closed.pop_front().expect("just seen");
        }
    }

    /// Moves every closed and uncommitted epoch back into the running one: their checkpoints were abandoned.
    pub fn reopen(&mut self) {
        for (_, blocks) in self
            .closed
            .drain(..)
            .filter(|_| !mutants::on(Mutant::ForgetAbandonedWrites))
        {
            self.running.union(&blocks);
        }
    }

    /// Returns the blocks changed in the running epoch.
    #[must_use]
    pub fn running_blocks(&self) -> &BlockSet {
        &self.running
    }

    /// Returns every block changed since the last common state.
    #[must_use]
    pub fn all_blocks(&self) -> BlockSet {
        let mut all = self.running.clone();
        for (_, blocks) in &self.closed {
            all.union(blocks);
        }
        all
    }
}

fn place(block: u64) -> (usize, u64) {
    let within = block % GROUP_BLOCKS;
    (crate::sectors::to_usize(within / 64), 1 << (within % 64))
}

#[cfg(test)]
mod tests {
    use checkpoint::{Epoch, Generation};

    use super::*;
    use proptest::prelude::*;

    const SIZE: u64 = 200 * 1024 * 1024 + 512;

    fn tag(epoch: u64) -> Tag {
        Tag {
            generation: Generation(3),
            epoch: Epoch(epoch),
        }
    }

    fn blocks(map: &ChangedBlocks) -> Vec<u64> {
        map.all_blocks().iter().collect()
    }

    #[test]
    fn only_committed_epochs_are_forgotten() {
        let mut map = ChangedBlocks::new(SIZE, tag(0));
        map.mark(0, 512);
        map.close(tag(1));
        map.mark(BLOCK - 512, 1024);
        map.close(tag(2));
        map.mark(SIZE - 512, 512);
        map.clear_committed(tag(1));
        assert_eq!(
            blocks(&map),
            [0, 1, SIZE / BLOCK],
            "block 0 was written again in epoch 2"
        );
        assert_eq!(map.since(), tag(1));
        map.clear_committed(tag(2));
        assert_eq!(blocks(&map), [SIZE / BLOCK]);
        assert_eq!(map.since(), tag(2));
    }

    #[test]
    fn an_abandoned_epoch_joins_the_running_one() {
        let mut map = ChangedBlocks::new(SIZE, tag(0));
        map.mark(5 * BLOCK, 1);
        map.close(tag(1));
        map.reopen();
        map.clear_committed(tag(1));
        assert_eq!(
            blocks(&map),
            [5],
            "a late Committed(1) of an abandoned epoch clears nothing"
        );
        map.close(tag(2));
        map.clear_committed(tag(2));
        assert!(map.all_blocks().is_empty());
    }

    #[test]
    fn many_uncommitted_epochs_stay_bounded_and_are_never_cleared_early() {
        let mut map = ChangedBlocks::new(SIZE, tag(0));
        for epoch in 1..=40 {
            map.mark(epoch * BLOCK, 1);
            map.close(tag(epoch));
        }
        assert_eq!(map.closed.len(), EPOCHS_MAX);
        map.clear_committed(tag(10));
        assert_eq!(map.all_blocks().len(), 40);
        map.clear_committed(tag(40));
        assert!(map.all_blocks().is_empty());
    }

    proptest! {
        #[test]
        fn a_set_is_a_set(numbers in prop::collection::btree_set(0_u64..5000, 0..200), more in prop::collection::btree_set(0_u64..5000, 0..200)) {
            let make = |numbers: &std::collections::BTreeSet<u64>| {
                let mut set = BlockSet::default();
                numbers.iter().for_each(|number| assert!(set.insert(*number)));
                set
            };
            let mut set = make(&numbers);
            prop_assert!(set.iter().eq(numbers.iter().copied()));
            prop_assert_eq!(set.len(), numbers.len() as u64);
            prop_assert_eq!(set.last(), numbers.last().copied());
            set.union(&make(&more));
            prop_assert!(set.iter().eq(numbers.union(&more).copied()));
            prop_assert!(more.iter().all(|number| set.contains(*number)));
        }

        #[test]
        fn runs_go_in_and_come_out(runs in prop::collection::vec((any::<bool>(), 0_u64..4000, 0_u64..2500), 0..20)) {
            let (mut set, mut model) = (BlockSet::default(), std::collections::BTreeSet::new());
            for (goes_in, first, more) in runs {
                let run = first..=first + more;
                if goes_in {
                    set.insert_all(run.clone());
                    model.extend(run);
                } else {
                    set.remove_if(run.clone(), |block| block % 3 != 0);
                    model.retain(|block| !run.contains(block) || block % 3 == 0);
                }
                prop_assert!(set.iter().eq(model.iter().copied()));
                prop_assert_eq!(set.is_empty(), model.is_empty());
            }
        }
    }
}
