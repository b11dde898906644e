//! Whether a checkpoint in flight is complete.
//!
//! A checkpoint is all or nothing. Both sides count and sum what travels, in order; the primary's sums
//! become the end mark, and the secondary commits only if its own are the same.
//!
//! ```text
//!   pages, writes, device state, network state ──► Totals ──mark()──► End ──► verify() ──► advance()
//!     │ by stream                                                              │ ▲
//!     '── may come after the end mark ─────────────────────────────────────────┴─┘ until it is complete
//! ```
//!
//! The guest may already run in the next epoch while a checkpoint is transferred: disk writes of that
//! epoch are summed apart, and become its own with `advance`. States of it follow the end mark; pages of it are not sent before
//! the checkpoint is loaded. Each page stream keeps its own order, and none keeps that of the end mark: what is promised of a
//! stream and has not come yet is waited for.
//!
//! Driven by the protocols of both roles. Holds sums only, never the data.

use crate::epoch::{Epoch, EpochMode, InputNumber, Tag};
use crate::mutants::{self, Mutant};
use crate::wire::{DeviceState, DiskWrite, EndMark, NetworkState, PageBatch, PageSum, PageSums, Written};

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
    /// It is said to have come on another number of page streams than there are.
    #[error("the checkpoint of epoch {tag} was sent on {found} page streams, and there are {agreed}")]
    Streams {
        /// The checkpoint in flight.
        tag: Tag,
        /// How many its end mark knows.
        found: usize,
        /// How many there are.
        agreed: usize,
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

/// How much of a checkpoint has come that keeps its end mark's promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Arrival {
    /// All of it.
    Complete,
    /// All but pages that are still on their way.
    PagesMissing,
}

/// Running sums of one checkpoint, kept alike by both sides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Totals {
    tag: Tag,
    base: Option<Epoch>,
    pages: PageSums,
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
    /// whole of memory; they travel on so many `streams`.
    ///
    /// # Panics
    /// Panics on a number of streams that no pairing has.
    #[must_use]
    pub fn new(tag: Tag, base: Option<Epoch>, streams: usize) -> Self {
        Self {
            tag,
            base,
            pages: PageSums::new(streams),
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
        self.pages.pages()
    }

    /// Returns the number of page streams.
    #[must_use]
    pub fn streams(&self) -> usize {
        self.pages.as_slice().len()
    }

    /// Counts a batch of pages, those shipped ahead of the stop included.
    ///
    /// # Errors
    /// Refuses pages of another epoch.
    ///
    /// # Panics
    /// Panics on a stream that there is not.
    pub fn pages(&mut self, stream: usize, batch: &PageBatch) -> Result<(), StagingError> {
        self.expect_own("pages", batch.tag)?;
        self.pages.add(stream, PageSum::of(batch));
        Ok(())
    }

    /// Counts pages whose sums are known, after those that were counted before.
    ///
    /// # Panics
    /// Panics on another number of streams.
    pub fn add_pages(&mut self, sums: &PageSums) {
        self.pages.add_all(sums);
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
        let offset = write.offset.to_le_bytes();
        match &write.written {
            Written::Data(data) => sum.add(1, &[&offset, data]),
            Written::Zeros(len) => sum.add(1, &[&offset, b"zeros", &len.to_le_bytes()]),
        }
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
            pages: self.pages,
            writes: self.writes.count,
            writes_digest: self.writes.digest,
            sections: self.sections.expect("an end mark follows the device state"),
            input,
            next,
            entropy,
        }
    }

    /// Compares with the end mark, on the secondary. Nothing of the checkpoint may be used unless all of it has come.
    ///
    /// # Errors
    /// Names what is missing or differs. Pages that have not come yet are no fault; everything else precedes the end mark.
    pub fn verify(&self, mark: &EndMark) -> Result<Arrival, StagingError> {
        let tag = self.tag;
        self.expect_own("an end mark", mark.tag)?;
        if mark.base != self.base {
            return Err(StagingError::Base {
                tag,
                found: mark.base,
                held: self.base,
            });
        }
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
        if !self.network {
            return Err(StagingError::Missing {
                what: "network state",
                tag,
            });
        }
        self.verify_pages(&mark.pages)
    }

    fn verify_pages(&self, promised: &PageSums) -> Result<Arrival, StagingError> {
        let tag = self.tag;
        let (sums, promised) = (self.pages.as_slice(), promised.as_slice());
        if sums.len() != promised.len() {
            return Err(StagingError::Streams {
                tag,
                found: promised.len(),
                agreed: sums.len(),
            });
        }
        let mut missing = 0;
        for (sum, promised) in sums.iter().zip(promised) {
            if sum.pages > promised.pages {
                return Err(StagingError::Count {
                    tag,
                    what: "pages of a stream",
                    found: sum.pages,
                    promised: promised.pages,
                });
            }
            if sum.pages < promised.pages {
                missing += 1;
            } else if sum != promised {
                return Err(StagingError::Digest { tag, what: "pages" });
            }
        }
        let enough = missing == 0 || missing < sums.len() && mutants::on(Mutant::CompleteByOneStream);
        Ok(if enough {
            Arrival::Complete
        } else {
            Arrival::PagesMissing
        })
    }

    /// Goes on to the next epoch, whose pages change what was just committed (or, on the primary, sent).
    pub fn advance(&mut self) {
        let writes = self.next_writes;
        *self = Self {
            writes,
            ..Self::new(self.next_tag(), Some(self.tag.epoch), self.streams())
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
        PageBatch::new(tag(epoch), 2, Bytes::from(vec![seed; 30]))
    }

    fn write(epoch: u64, seed: u8) -> DiskWrite {
        DiskWrite {
            tag: tag(epoch),
            offset: u64::from(seed) * 512,
            written: if seed % 3 == 2 {
                Written::Zeros(u64::from(seed) * 512)
            } else {
                Bytes::from(vec![seed; 512]).into()
            },
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

    /// The second of three batches takes the second stream.
    fn stream(batch: &PageBatch) -> usize {
        usize::from(batch.encoded[0] == 2)
    }

    fn count(totals: &mut Totals, message: &Message) -> Result<(), StagingError> {
        match message {
            Message::Pages(batch) => totals.pages(stream(batch), batch),
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
        let mut totals = Totals::new(tag(7), Some(Epoch(6)), 2);
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
        assert_eq!(totals(&checkpoint()).unwrap().verify(&mark()), Ok(Arrival::Complete));
        assert_eq!(
            (mark().pages.pages(), mark().writes, mark().sections, mark().base),
            (6, 3, 1, Some(Epoch(6)))
        );
    }

    #[test]
    fn pages_may_be_summed_by_who_ships_them() {
        let good = checkpoint();
        let mut sums = PageSums::new(2);
        for seed in 1..4 {
            let batch = batch(7, seed);
            sums.add(stream(&batch), PageSum::of(&batch));
        }
        let mut rest = totals(&good[3..]).unwrap();
        rest.add_pages(&sums);
        assert_eq!(rest, totals(&good).unwrap());
    }

    #[test]
    fn streams_may_come_in_any_order_among_each_other_and_after_the_end_mark() {
        let mut good = checkpoint();
        good.swap(0, 1);
        let mut staged = totals(&good[3..]).unwrap();
        for message in &good[..3] {
            assert_eq!(staged.verify(&mark()), Ok(Arrival::PagesMissing));
            count(&mut staged, message).unwrap();
        }
        assert_eq!(staged.verify(&mark()), Ok(Arrival::Complete));
        count(&mut staged, &good[0]).unwrap();
        assert!(matches!(staged.verify(&mark()), Err(StagingError::Count { .. })));
    }

    #[test]
    fn digests_are_those_that_the_end_mark_documents() {
        let pages: Vec<u8> = [1, 3].iter().flat_map(|seed| batch(7, *seed).encoded).collect();
        let digests = mark().pages.as_slice().iter().map(|sum| sum.digest).collect::<Vec<_>>();
        assert_eq!(
            digests,
            [crc32fast::hash(&pages), crc32fast::hash(&batch(7, 2).encoded)]
        );
        let writes: Vec<u8> = (1..4)
            .map(|seed| write(7, seed))
            .flat_map(|write| match &write.written {
                Written::Data(data) => [&write.offset.to_le_bytes()[..], data].concat(),
                Written::Zeros(len) => [&write.offset.to_le_bytes()[..], b"zeros", &len.to_le_bytes()].concat(),
            })
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
            let arrival = complete(&missing);
            assert!(
                arrival.is_err() || at < 3 && arrival == Ok(Arrival::PagesMissing),
                "without {:?}",
                good[at]
            );
            let mut doubled = good.clone();
            doubled.insert(at, good[at].clone());
            assert!(complete(&doubled).is_err(), "twice {:?}", good[at]);
        }
        for (a, b) in [(0, 2), (3, 4), (4, 5)] {
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
        let with = |change: fn(&mut PageSum)| {
            let mut sums = good.pages.as_slice().to_vec();
            change(&mut sums[1]);
            let pages = PageSums::of(&sums).unwrap();
            EndMark { pages, ..good }
        };
        for wrong in [
            EndMark { tag: tag(8), ..good },
            EndMark { base: None, ..good },
            EndMark {
                base: Some(Epoch(5)),
                ..good
            },
            with(|sum| sum.pages -= 1),
            with(|sum| sum.bytes += 1),
            with(|sum| sum.digest = !sum.digest),
            EndMark {
                pages: PageSums::of(&good.pages.as_slice()[..1]).unwrap(),
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
            prop_assert_eq!(
                secondary.verify(&primary.mark(InputNumber(5), EpochMode::default(), [1; 32])),
                Ok(Arrival::Complete)
            );
            prop_assert_eq!(primary.mark(InputNumber(5), EpochMode::default(), [1; 32]), mark());
            primary.advance();
            secondary.advance();
            for message in states(8) {
                count(&mut primary, &message).unwrap();
                count(&mut secondary, &message).unwrap();
            }
            let next = primary.mark(InputNumber(6), EpochMode::default(), [2; 32]);
            prop_assert_eq!((next.tag, next.base, next.pages), (tag(8), Some(Epoch(7)), PageSums::new(2)));
            prop_assert_eq!(next.writes, places.len() as u64);
            prop_assert_eq!(secondary.verify(&next), Ok(Arrival::Complete));
        }
    }
}
