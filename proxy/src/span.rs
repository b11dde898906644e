//! Parts of a byte stream: which positions are settled, and which bytes wait for their equal.
//!
//! Positions are 64-bit and never wrap; `stream` maps sequence numbers to them.

use std::collections::VecDeque;
use std::ops::Range;

use bytes::Bytes;
use checkpoint::Instant;
use smallvec::{SmallVec, smallvec};

/// A set of positions as disjoint, ordered ranges with gaps between them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ranges(SmallVec<[(u64, u64); 1]>);

impl Ranges {
    /// Makes the set of everything before `end`.
    pub(crate) fn until(end: u64) -> Self {
        Self(smallvec![(0, end)])
    }

    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }

    /// Says whether every position of `range` is in the set; an empty range always is.
    pub(crate) fn covers(&self, range: &Range<u64>) -> bool {
        range.start >= range.end || self.end_of(range.start).is_some_and(|end| end >= range.end)
    }

    /// Returns where the range that holds `position` ends; nothing if it is not in the set.
    pub(crate) fn end_of(&self, position: u64) -> Option<u64> {
        let place = self.0.partition_point(|&(start, _)| start <= position).checked_sub(1)?;
        let (_, end) = self.0[place];
        (position < end).then_some(end)
    }

    /// Returns the first position after `position` at which a range starts.
    pub(crate) fn next_start(&self, position: u64) -> Option<u64> {
        self.0
            .get(self.0.partition_point(|&(start, _)| start <= position))
            .map(|&(start, _)| start)
    }

    /// Adds a range.
    pub(crate) fn insert(&mut self, range: Range<u64>) {
        if range.start >= range.end {
            return;
        }
        let from = self.0.partition_point(|&(_, end)| end < range.start);
        let to = self.0.partition_point(|&(start, _)| start <= range.end);
        if from == to {
            self.0.insert(from, (range.start, range.end));
        } else {
            let merged = (self.0[from].0.min(range.start), self.0[to - 1].1.max(range.end));
            self.0[from] = merged;
            self.0.drain(from + 1..to);
        }
    }

    /// Takes a range out.
    pub(crate) fn remove(&mut self, range: Range<u64>) {
        if range.start >= range.end {
            return;
        }
        let from = self.0.partition_point(|&(_, end)| end <= range.start);
        let to = self.0.partition_point(|&(start, _)| start < range.end);
        if from >= to {
            return;
        }
        let head = (self.0[from].0, range.start);
        let tail = (range.end, self.0[to - 1].1);
        let rest = [head, tail].into_iter().filter(|(start, end)| start < end);
        self.0.drain(from..to);
        self.0.insert_many(from, rest);
    }
}

/// Bytes at a position that wait for the other side's.
#[derive(Clone, Debug)]
pub(crate) struct Chunk {
    pub(crate) start: u64,
    pub(crate) bytes: Bytes,
    pub(crate) arrived: Instant,
}

/// Disjoint chunks in order of position.
#[derive(Clone, Debug, Default)]
pub(crate) struct Chunks {
    list: VecDeque<Chunk>,
    bytes: usize,
}

/// What a walk along the chunks finds at a position.
pub(crate) enum Found {
    /// The chunk with this index holds the position.
    At(usize),
    /// No chunk does; the next one starts here, if there is one.
    Gap(Option<u64>),
}

impl Chunk {
    pub(crate) fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }
}

impl Chunks {
    pub(crate) fn find(&self, position: u64) -> Found {
        let after = self.list.partition_point(|chunk| chunk.start <= position);
        match after.checked_sub(1) {
            Some(index) if position < self.list[index].end() => Found::At(index),
            _ => Found::Gap(self.list.get(after).map(|chunk| chunk.start)),
        }
    }

    pub(crate) fn chunk(&self, index: usize) -> &Chunk {
        &self.list[index]
    }

    /// Adds a chunk where there is none.
    pub(crate) fn insert(&mut self, chunk: Chunk) {
        self.bytes += chunk.bytes.len();
        let place = self.list.partition_point(|other| other.start <= chunk.start);
        if place == self.list.len() {
            self.list.push_back(chunk);
        } else {
            self.list.insert(place, chunk);
        }
    }

    /// Cuts `range`, which lies within the chunk, out of it.
    pub(crate) fn cut(&mut self, index: usize, range: &Range<u64>) {
        let chunk = &mut self.list[index];
        assert!(
            chunk.start <= range.start && range.end <= chunk.end(),
            "a cut lies within its chunk"
        );
        self.bytes -= length(range);
        let head = length(&(chunk.start..range.start));
        let tail = length(&(chunk.start..range.end));
        if tail == chunk.bytes.len() {
            if head == 0 {
                if index == 0 {
                    self.list.pop_front();
                } else {
                    self.list.remove(index);
                }
            } else {
                chunk.bytes.truncate(head);
            }
            return;
        }
        let rest = Chunk {
            start: range.end,
            bytes: chunk.bytes.slice(tail..),
            arrived: chunk.arrived,
        };
        if head == 0 {
            *chunk = rest;
        } else {
            chunk.bytes.truncate(head);
            self.list.insert(index + 1, rest);
        }
    }

    pub(crate) fn oldest(&self) -> Option<Instant> {
        self.list.front().map(|chunk| chunk.arrived)
    }

    pub(crate) fn count(&self) -> usize {
        self.list.len()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn clear(&mut self) {
        self.list.clear();
        self.bytes = 0;
    }
}

/// Returns the length of a range that lies within one frame or chunk.
pub(crate) fn length(range: &Range<u64>) -> usize {
    usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ranges_hold_exactly_what_was_inserted_and_not_removed(
            changes in proptest::collection::vec((any::<bool>(), 0u64..60, 0u64..12), 0..30),
        ) {
            let mut ranges = Ranges::default();
            let mut model = [false; 80];
            for (inserts, start, length) in changes {
                if inserts {
                    ranges.insert(start..start + length);
                } else {
                    ranges.remove(start..start + length);
                }
                (start..start + length).for_each(|position| model[usize::try_from(position).unwrap()] = inserts);
            }
            for (position, &inside) in model.iter().enumerate() {
                prop_assert_eq!(ranges.end_of(position as u64).is_some(), inside);
            }
            prop_assert!(ranges.0.windows(2).all(|pair| pair[0].1 < pair[1].0));
        }
    }

    #[test]
    fn cutting_the_middle_leaves_both_ends() {
        let mut chunks = Chunks::default();
        chunks.insert(Chunk {
            start: 10,
            bytes: Bytes::from_static(b"abcdef"),
            arrived: Instant(0),
        });
        chunks.cut(0, &(12..14));
        assert_eq!((chunks.count(), chunks.bytes()), (2, 4));
        assert_eq!(chunks.chunk(0).bytes, "ab");
        assert_eq!((chunks.chunk(1).start, &chunks.chunk(1).bytes[..]), (14, &b"ef"[..]));
        assert!(matches!(chunks.find(12), Found::Gap(Some(14))));
    }
}
