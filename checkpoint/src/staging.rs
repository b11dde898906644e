//! Whether a checkpoint in flight is complete.
//!
//! A checkpoint is all or nothing. Both sides count and sum what travels, in order; the primary's sums
//! become the end mark, and the secondary commits only if its own are the same.
//!
//! ```text
//!   pages, writes, device state, network state ──► Totals ──mark()──► End ──► verify() ──► advance()
//! ```
//!
//! The guest may already run in the next epoch while a checkpoint is transferred: disk writes of that
//! epoch are summed apart, and become its own with `advance`. Pages and states of it follow the end mark.
//!
//! Driven by the protocols of both roles. Holds sums only, never the data.

use crate::epoch::{Epoch, EpochMode, InputNumber, Tag};
use crate::wire::{DeviceState, DiskWrite, EndMark, NetworkState, PageBatch};

/// Why a checkpoint is not complete, or something is no part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StagingError {
    /// Tagged with an epoch that is not being transferred.
    #[error("{what} of epoch {found} came during the checkpoint of epoch {expected}")]
    WrongEpoch {
        /// What came.
        what: &'static str,
        /// Its tag.
        found: Tag,
        /// The checkpoint in flight.
        expected: Tag,
    },
    /// Came a second time.
    #[error("the checkpoint of epoch {tag} has its {what} twice")]
    Twice {
        /// What came.
        what: &'static str,
        /// The checkpoint in flight.
        tag: Tag,
    },
    /// Did not come.
    #[error("the checkpoint of epoch {tag} lacks its {what}")]
    Missing {
        /// What did not come.
        what: &'static str,
        /// The checkpoint in flight.
        tag: Tag,
    },
    /// The changes are relative to a state that this side does not hold.
    #[error(
        "the checkpoint of epoch {tag} builds on {}, this side holds {}",
        base(found),
        base(held)
    )]
    Base {
        /// The checkpoint in flight.
        tag: Tag,
        /// What it builds on.
        found: Option<Epoch>,
        /// What is held.
        held: Option<Epoch>,
    },
    /// A number of things is not the one promised.
    #[error("the checkpoint of epoch {tag} came with {found} {what} instead of {promised}")]
    Count {
        /// The checkpoint in flight.
        tag: Tag,
        /// What is counted.
        what: &'static str,
        /// How many came.
        found: u64,
        /// How many the end mark promises.
        promised: u64,
    },
    /// The number is right, the content or the order is not.
    #[error("the {what} of the checkpoint of epoch {tag} are not those that were sent")]
    Digest {
        /// The checkpoint in flight.
        tag: Tag,
        /// What differs.
        what: &'static str,
    },
}

/// Running sums of one checkpoint, kept alike by both sides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Totals {
    tag: Tag,
    base: Option<Epoch>,
    pages: Sum,
    writes: Sum,
    next_writes: Sum,
    sections: Option<u32>,
    network: bool,
}

/// A count and the crc32 of everything counted, continued from item to item.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Sum {
    count: u64,
    digest: u32,
}

fn base(epoch: &Option<Epoch>) -> String {
    epoch.map_or_else(|| "nothing".to_owned(), |epoch| format!("epoch {epoch}"))
}

impl Totals {
    /// Starts the sums of a checkpoint. `base` is the committed epoch that its pages change, `None` if they are the
    /// whole of memory.
    #[must_use]
    pub fn new(tag: Tag, base: Option<Epoch>) -> Self {
        Self {
            tag,
            base,
            pages: Sum::default(),
            writes: Sum::default(),
            next_writes: Sum::default(),
            sections: None,
            network: false,
        }
    }

    /// Returns the epoch whose checkpoint this is.
    #[must_use]
    pub fn tag(&self) -> Tag {
        self.tag
    }

    /// Returns the epoch that the pages change.
    #[must_use]
    pub fn base(&self) -> Option<Epoch> {
        self.base
    }

    /// Returns how many pages were counted so far.
    #[must_use]
    pub fn pages_counted(&self) -> u64 {
        self.pages.count
    }

    /// Counts a batch of pages, those shipped ahead of the stop included.
    ///
    /// # Errors
    /// Refuses pages of another epoch.
    pub fn pages(&mut self, batch: &PageBatch) -> Result<(), StagingError> {
        self.expect_own("pages", batch.tag)?;
        self.pages.add(batch.count.into(), &[&batch.encoded]);
        Ok(())
    }

    /// Goes on with the sums of the pages that were shipped ahead of the stop; they were counted apart, since disk
    /// writes were counted here meanwhile.
    ///
    /// # Panics
    /// Panics if they are of another epoch, or pages were counted here.
    pub fn go_on_with_pages(&mut self, ahead: &Self) {
        assert_eq!(
            (self.tag, self.pages),
            (ahead.tag, Sum::default()),
            "pages shipped ahead come first"
        );
        self.pages = ahead.pages;
    }

    /// Counts a disk write of this epoch, or of the next while this one is transferred.
    ///
    /// # Errors
    /// Refuses a write of any other epoch.
    pub fn write(&mut self, write: &DiskWrite) -> Result<(), StagingError> {
        let sum = if write.tag == self.tag {
            &mut self.writes
        } else if write.tag == self.next_tag() {
            &mut self.next_writes
        } else {
            return Err(self.wrong_epoch("a disk write", write.tag));
        };
        sum.add(1, &[&write.offset.to_le_bytes(), &write.data]);
        Ok(())
    }

    /// Counts the device state.
    ///
    /// # Errors
    /// Refuses that of another epoch, and a second one.
    pub fn device_state(&mut self, state: &DeviceState) -> Result<(), StagingError> {
        self.expect_own("device state", state.tag)?;
        if self.sections.is_some() {
            return Err(StagingError::Twice {
                what: "device state",
                tag: self.tag,
            });
        }
        self.sections = Some(u32::try_from(state.sections.len()).unwrap_or(u32::MAX));
        Ok(())
    }

    /// Counts the network's state.
    ///
    /// # Errors
    /// Refuses that of another epoch, and a second one.
    pub fn network_state(&mut self, state: &NetworkState) -> Result<(), StagingError> {
        self.expect_own("network state", state.tag)?;
        if self.network {
            return Err(StagingError::Twice {
                what: "network state",
                tag: self.tag,
            });
        }
        self.network = true;
        Ok(())
    }

    /// Makes the end mark, on the primary; `next` is the mode of the epoch that has begun.
    ///
    /// # Panics
    /// Panics if the device or network state was not counted: the primary never ends a checkpoint without them.
    #[must_use]
    pub fn mark(&self, input: InputNumber, next: EpochMode, entropy: [u8; 32]) -> EndMark {
        assert!(self.network, "an end mark follows the network's state");
        EndMark {
            tag: self.tag,
            base: self.base,
            pages: self.pages.count,
            pages_digest: self.pages.digest,
            writes: self.writes.count,
            writes_digest: self.writes.digest,
            sections: self.sections.expect("an end mark follows the device state"),
            input,
            next,
            entropy,
        }
    }

    /// Compares with the end mark, on the secondary. Nothing of the checkpoint may be used unless this holds.
    ///
    /// # Errors
    /// Names what is missing or differs.
    pub fn verify(&self, mark: &EndMark) -> Result<(), StagingError> {
        let tag = self.tag;
        self.expect_own("an end mark", mark.tag)?;
        if mark.base != self.base {
            return Err(StagingError::Base {
                tag,
                found: mark.base,
                held: self.base,
            });
        }
        self.pages.compare("pages", tag, mark.pages, mark.pages_digest)?;
        self.writes
            .compare("disk writes", tag, mark.writes, mark.writes_digest)?;
        let sections = self.sections.ok_or(StagingError::Missing {
            what: "device state",
            tag,
        })?;
        if sections != mark.sections {
            let (found, promised) = (sections.into(), mark.sections.into());
            return Err(StagingError::Count {
                tag,
                what: "device sections",
                found,
                promised,
            });
        }
        if self.network {
            Ok(())
        } else {
            Err(StagingError::Missing {
                what: "network state",
                tag,
            })
        }
    }

    /// Goes on to the next epoch, whose pages change what was just committed (or, on the primary, sent).
    pub fn advance(&mut self) {
        let writes = self.next_writes;
        *self = Self {
            writes,
            ..Self::new(self.next_tag(), Some(self.tag.epoch))
        };
    }

    fn next_tag(&self) -> Tag {
        Tag {
            generation: self.tag.generation,
            epoch: self.tag.epoch.next(),
        }
    }

    fn expect_own(&self, what: &'static str, found: Tag) -> Result<(), StagingError> {
        if found == self.tag {
            Ok(())
        } else {
            Err(self.wrong_epoch(what, found))
        }
    }

    fn wrong_epoch(&self, what: &'static str, found: Tag) -> StagingError {
        StagingError::WrongEpoch {
            what,
            found,
            expected: self.tag,
        }
    }
}

impl Sum {
    fn add(&mut self, count: u64, parts: &[&[u8]]) {
        let mut digest = crc32fast::Hasher::new_with_initial(self.digest);
        parts.iter().for_each(|part| digest.update(part));
        self.digest = digest.finalize();
        self.count = self.count.saturating_add(count);
    }

    fn compare(self, what: &'static str, tag: Tag, promised: u64, digest: u32) -> Result<(), StagingError> {
        if self.count != promised {
            return Err(StagingError::Count {
                tag,
                what,
                found: self.count,
                promised,
            });
        }
        if self.digest == digest {
            Ok(())
        } else {
            Err(StagingError::Digest { tag, what })
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;
    use crate::epoch::Generation;
    use crate::wire::{Message, Section};

    fn tag(epoch: u64) -> Tag {
        Tag {
            generation: Generation(2),
            epoch: Epoch(epoch),
        }
    }

    fn batch(epoch: u64, seed: u8) -> PageBatch {
        PageBatch {
            tag: tag(epoch),
            count: 2,
            encoded: Bytes::from(vec![seed; 30]),
        }
    }

    fn write(epoch: u64, seed: u8) -> DiskWrite {
        DiskWrite {
            tag: tag(epoch),
            offset: u64::from(seed) * 512,
            data: Bytes::from(vec![seed; 512]),
        }
    }

    fn states(epoch: u64) -> [Message; 2] {
        let section = Section {
            name: "vcpu0".into(),
            version: 1,
            bytes: vec![1],
        };
        [
            Message::DeviceState(DeviceState {
                tag: tag(epoch),
                sections: vec![section],
            }),
            Message::NetworkState(NetworkState {
                tag: tag(epoch),
                encoded: Bytes::from_static(b"n"),
            }),
        ]
    }

    fn count(totals: &mut Totals, message: &Message) -> Result<(), StagingError> {
        match message {
            Message::Pages(batch) => totals.pages(batch),
            Message::Write(write) => totals.write(write),
            Message::DeviceState(state) => totals.device_state(state),
            Message::NetworkState(state) => totals.network_state(state),
            other => panic!("{other:?} is not counted"),
        }
    }

    /// Epoch 7's checkpoint of three batches and three writes.
    fn checkpoint() -> Vec<Message> {
        let pages = (1..4).map(|seed| Message::Pages(batch(7, seed)));
        let writes = (1..4).map(|seed| Message::Write(write(7, seed)));
        pages.chain(writes).chain(states(7)).collect()
    }

    fn totals(messages: &[Message]) -> Result<Totals, StagingError> {
        let mut totals = Totals::new(tag(7), Some(Epoch(6)));
        messages.iter().try_for_each(|message| count(&mut totals, message))?;
        Ok(totals)
    }

    fn mark() -> EndMark {
        totals(&checkpoint())
            .unwrap()
            .mark(InputNumber(5), EpochMode::default(), [1; 32])
    }

    #[test]
    fn a_checkpoint_that_came_as_it_was_sent_is_complete() {
        assert_eq!(totals(&checkpoint()).unwrap().verify(&mark()), Ok(()));
        assert_eq!(
            (mark().pages, mark().writes, mark().sections, mark().base),
            (6, 3, 1, Some(Epoch(6)))
        );
    }

    #[test]
    fn pages_shipped_ahead_are_summed_apart_from_the_writes_of_that_time() {
        let (mut ahead, mut rest) = (totals(&[]).unwrap(), totals(&[]).unwrap());
        let good = checkpoint();
        count(&mut ahead, &good[0]).unwrap();
        count(&mut rest, &good[3]).unwrap();
        count(&mut ahead, &good[1]).unwrap();
        rest.go_on_with_pages(&ahead);
        for at in [2, 4, 5, 6, 7] {
            count(&mut rest, &good[at]).unwrap();
        }
        assert_eq!(rest, totals(&good).unwrap());
    }

    #[test]
    fn digests_are_those_that_the_end_mark_documents() {
        let pages: Vec<u8> = (1..4).flat_map(|seed| batch(7, seed).encoded).collect();
        assert_eq!(mark().pages_digest, crc32fast::hash(&pages));
        let writes: Vec<u8> = (1..4)
            .map(|seed| write(7, seed))
            .flat_map(|write| [&write.offset.to_le_bytes()[..], &write.data].concat())
            .collect();
        assert_eq!(mark().writes_digest, crc32fast::hash(&writes));
    }

    #[test]
    fn anything_missing_doubled_or_swapped_is_detected() {
        let good = checkpoint();
        let complete = |messages: &[Message]| totals(messages).and_then(|totals| totals.verify(&mark()));
        for at in 0..good.len() {
            let mut missing = good.clone();
            missing.remove(at);
            assert!(complete(&missing).is_err(), "without {:?}", good[at]);
            let mut doubled = good.clone();
            doubled.insert(at, good[at].clone());
            assert!(complete(&doubled).is_err(), "twice {:?}", good[at]);
        }
        for (a, b) in [(0, 1), (1, 2), (3, 4), (4, 5)] {
            let mut swapped = good.clone();
            swapped.swap(a, b);
            assert!(
                matches!(complete(&swapped), Err(StagingError::Digest { .. })),
                "{a} and {b} swapped"
            );
        }
    }

    #[test]
    fn every_field_of_the_mark_is_compared() {
        let staged = totals(&checkpoint()).unwrap();
        let good = mark();
        for wrong in [
            EndMark { tag: tag(8), ..good },
            EndMark { base: None, ..good },
            EndMark {
                base: Some(Epoch(5)),
                ..good
            },
            EndMark { pages: 7, ..good },
            EndMark {
                pages_digest: !good.pages_digest,
                ..good
            },
            EndMark { writes: 2, ..good },
            EndMark {
                writes_digest: !good.writes_digest,
                ..good
            },
            EndMark { sections: 2, ..good },
        ] {
            assert!(staged.verify(&wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn other_epochs_are_no_part_of_it() {
        let mut totals = totals(&[]).unwrap();
        for message in [
            Message::Pages(batch(8, 1)),
            Message::Pages(batch(6, 1)),
            Message::Write(write(6, 1)),
            Message::Write(write(9, 1)),
            states(8)[0].clone(),
            states(6)[1].clone(),
        ] {
            assert!(
                matches!(count(&mut totals, &message), Err(StagingError::WrongEpoch { .. })),
                "{message:?}"
            );
        }
        let other = Tag {
            generation: Generation(1),
            epoch: Epoch(7),
        };
        let write = DiskWrite {
            tag: other,
            ..write(7, 1)
        };
        assert!(matches!(totals.write(&write), Err(StagingError::WrongEpoch { .. })));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn writes_of_the_next_epoch_may_come_at_any_place(places in prop::collection::vec(any::<prop::sample::Index>(), 0..6)) {
            let mut sent = checkpoint();
            for (seed, place) in (10..).zip(&places) {
                let place = place.index(sent.len() + 1);
                sent.insert(place, Message::Write(write(8, seed)));
            }
            let mut primary = totals(&sent).unwrap();
            let mut secondary = totals(&sent).unwrap();
            prop_assert_eq!(secondary.verify(&primary.mark(InputNumber(5), EpochMode::default(), [1; 32])), Ok(()));
            prop_assert_eq!(primary.mark(InputNumber(5), EpochMode::default(), [1; 32]), mark());
            primary.advance();
            secondary.advance();
            for message in states(8) {
                count(&mut primary, &message).unwrap();
                count(&mut secondary, &message).unwrap();
            }
            let next = primary.mark(InputNumber(6), EpochMode::default(), [2; 32]);
            prop_assert_eq!((next.tag, next.base, next.pages), (tag(8), Some(Epoch(7)), 0));
            prop_assert_eq!(next.writes, places.len() as u64);
            prop_assert_eq!(secondary.verify(&next), Ok(()));
        }
    }
}
