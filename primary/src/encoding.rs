//! Pages of one checkpoint after another, encoded against what the secondary has committed.
//!
//! ```text
//!   begin(n) ─► push … finish ─► (shipped ahead of the stop)
//!               push … finish ─► (shipped at the stop) ─► begin(n + 1): n is acknowledged
//!                                      └─ abandon ─► forget: another sync
//! ```
//!
//! There is a [`Lane`] for each page stream, with an encoder, a cache and sums of its own: they work side by side, since no page
//! takes two of them. What is decided about all pages together is [`Encoding`]'s.
//!
//! Who drives it says truly when a checkpoint is acknowledged: with the first page of the next, and never before. That, and that
//! every page shipped goes through here, is what deltas rest on. Pure: it neither reads guest memory nor sends.

use std::collections::BTreeSet;

use checkpoint::mutants::{self, Mutant};
use checkpoint::pages::identical::{PageHasher, PageHashes, PageMatches};
use checkpoint::pages::{
    Asking, BATCH_BYTES, BaseCache, BatchEncoder, Chooser, Codec, CodecStats, Page, Pushed, Question, is_zero,
    stream_of,
};
use checkpoint::wire::{PageBatch, PageSum, PageSums};
use checkpoint::{Duration, Instant, Tag};

use crate::comparison::{Comparison, Next};

/// What is known for encoding pages.
pub struct Encoding {
    lanes: Vec<Lane>,
    cache_bytes: usize,
    /// The checkpoint whose pages are encoded, or were last; none after it was abandoned.
    open: Option<Tag>,
    asking: Asking,
    comparison: Comparison,
    /// How long the pages of its stop took until they were queued.
    took: Duration,
}

/// The pages of one stream.
pub struct Lane {
    encoder: BatchEncoder,
    cache: BaseCache,
    chooser: Chooser,
    /// The checkpoint that pages are part of.
    tag: Tag,
    /// What was encoded in it, ahead of its stop and after it.
    sum: PageSum,
    /// What the encoder had done before it.
    before: CodecStats,
    /// Pages that the secondary's stopped VM has alike.
    alike: BTreeSet<u64>,
    /// Pages of its stop that were sent otherwise than as alike, and their bytes.
    spent: (u64, u64),
}

impl Encoding {
    /// Makes one for so many streams that remembers at most `cache_bytes` of what the secondary has committed.
    #[must_use]
    pub fn new(cache_bytes: usize, streams: usize) -> Self {
        Self {
            lanes: lanes(cache_bytes, streams),
            cache_bytes,
            open: None,
            asking: Asking::default(),
            comparison: nothing_to_compare(),
            took: Duration(0),
        }
    }

    /// Goes on with the pages of this checkpoint, or begins with them: then the one before is acknowledged, unless it
    /// was abandoned.
    pub fn begin(&mut self, tag: Tag) {
        if self.open == Some(tag) {
            return;
        }
        let before = self.open.replace(tag);
        for lane in &mut self.lanes {
            match before {
                Some(before) => lane.cache.commit(before.epoch),
                None => lane.cache.abandon(),
            }
            lane.begin(tag);
        }
        self.comparison = nothing_to_compare();
        self.took = Duration(0);
    }

    /// Returns the pages' streams, which may be worked on side by side.
    pub fn lanes(&mut self) -> &mut [Lane] {
        &mut self.lanes
    }

    /// Returns the stream of a page, and what encodes it.
    pub fn lane_of(&mut self, page: u64) -> (usize, &mut Lane) {
        let stream = stream_of(page, self.lanes.len());
        (stream, &mut self.lanes[stream])
    }

    /// Returns the sums of the open checkpoint, ahead of its stop and after it.
    ///
    /// # Panics
    /// Panics if a batch is begun and not finished.
    #[must_use]
    pub fn sums(&self) -> PageSums {
        assert!(
            self.lanes.iter().all(|lane| lane.encoder.is_empty()),
            "what is summed has been sent"
        );
        let sums: Vec<PageSum> = self.lanes.iter().map(|lane| lane.sum).collect();
        PageSums::of(&sums).expect("a pairing's number of streams")
    }

    /// Returns what was encoded for the open checkpoint, ahead of its stop and after it.
    #[must_use]
    pub fn stats(&self) -> CodecStats {
        let mut stats = CodecStats::default();
        for lane in &self.lanes {
            stats.add(&lane.encoder.stats().since(&lane.before));
        }
        stats
    }

    /// Returns the memory that the bases of all streams take, and may take, in bytes.
    #[must_use]
    pub fn bases(&self) -> (usize, usize) {
        let caches = self.lanes.iter().map(|lane| lane.cache.stats());
        caches.fold((0, 0), |all, cache| (all.0 + cache.bytes, all.1 + cache.limit))
    }

    /// Decides how many of the copied pages of a stop to ask about.
    pub fn choose(&mut self, pages: usize) -> Question {
        let link = self.link();
        self.asking.decide(pages as u64, link)
    }

    /// Begins with the copied pages of the open checkpoint. Questions have at most `chunk` pages, or as many as is good.
    /// Says whether the secondary's VM must stop.
    pub fn compare(&mut self, pages: usize, asks: Question, chunk: Option<usize>) -> bool {
        self.comparison = Comparison::new(pages, asks, chunk);
        self.lanes.iter_mut().for_each(|lane| lane.spent = (0, 0));
        self.took = Duration(0);
        asks != Question::Nothing
    }

    /// Says what to do next with the copied pages.
    pub fn next_step(&mut self) -> Next {
        self.comparison.next()
    }

    /// The secondary's VM stands for this checkpoint.
    pub fn halted(&mut self) {
        self.comparison.halted();
    }

    /// Makes the question that is next, if pages are left to ask about: not zero, and not as in the base. Both VMs stand, or what they had is
    /// copied, before the seed is drawn; `page` gives a page of the copy.
    pub fn question<'a>(
        &mut self,
        tag: Tag,
        seed: [u8; 32],
        page: impl Fn(usize) -> (u64, &'a Page),
    ) -> Option<PageHashes> {
        let hasher = PageHasher::new(&seed);
        let mut hashes = Vec::new();
        let lanes = &mut self.lanes;
        let worth = |place| {
            let (number, content) = page(place);
            let stream = stream_of(number, lanes.len());
            let base = lanes[stream].cache.base(number);
            let worth = base.is_none_or(|base| base.page != content) && !is_zero(content);
            worth.then(|| {
                hashes.push((number, hasher.hash(content)));
                number
            })
        };
        self.comparison.question(worth)?;
        Some(PageHashes {
            tag,
            seed,
            pages: hashes,
        })
    }

    /// Takes the answer to the last question, which came after that time; for the first one since the secondary's VM was to stop.
    ///
    /// # Panics
    /// Panics if it is about another number of pages, which the protocol refuses.
    pub fn answered(&mut self, matches: &PageMatches, took: Duration) {
        let (asked, alike, tells) = self.comparison.answered(&matches.alike);
        for page in self.comparison.take_alike() {
            self.lane_of(page).1.alike.insert(page);
        }
        self.asking.answered(asked, alike, took, tells);
        let more = self.comparison.unasked();
        let asks = self.asking.goes_on(more, asked, alike, self.link());
        self.comparison.go_on(asks);
    }

    /// Takes note of the time that some of the copied pages took until they were queued.
    pub fn took(&mut self, time: Duration) {
        self.took.0 += time.0;
    }

    /// The open checkpoint is shipped: what its pages took is known.
    pub fn shipped(&mut self) {
        let spent = self.lanes.iter().map(|lane| lane.spent);
        let (pages, bytes) = spent.fold((0, 0), |all, lane| (all.0 + lane.0, all.1 + lane.1));
        self.asking.sent(pages, bytes, self.took);
    }

    /// Bytes a second that all streams carry together.
    fn link(&self) -> u64 {
        self.lanes.iter().map(|lane| lane.chooser.link()).sum()
    }

    /// The open checkpoint will not be acknowledged.
    pub fn abandon(&mut self) {
        for lane in &mut self.lanes {
            // A batch that was begun is not sent any more.
            let _ = lane.encoder.finish();
            lane.cache.abandon();
            lane.alike.clear();
        }
        self.open = None;
        self.comparison = nothing_to_compare();
    }

    /// Forgets what a secondary holds: there will be another, or the same with another state. Pages will take so many streams.
    pub fn forget(&mut self, streams: usize) {
        self.abandon();
        if self.lanes.len() != streams {
            self.lanes = lanes(self.cache_bytes, streams);
        } else if !mutants::on(Mutant::KeepBaseOfAnother) {
            self.lanes.iter_mut().for_each(|lane| lane.cache.clear());
        }
    }
}

fn nothing_to_compare() -> Comparison {
    Comparison::new(0, Question::Nothing, None)
}

fn lanes(cache_bytes: usize, streams: usize) -> Vec<Lane> {
    let lane = |_| Lane {
        encoder: BatchEncoder::new(BATCH_BYTES, None),
        cache: BaseCache::new(cache_bytes / streams),
        chooser: Chooser::default(),
        tag: Tag::default(),
        sum: PageSum::default(),
        before: CodecStats::default(),
        alike: BTreeSet::new(),
        spent: (0, 0),
    };
    (0..streams).map(lane).collect()
}

impl Lane {
    fn begin(&mut self, tag: Tag) {
        self.tag = tag;
        self.sum = PageSum::default();
        self.encoder.rebase(self.cache.committed());
        self.before = *self.encoder.stats();
        self.alike.clear();
        self.spent = (0, 0);
    }

    /// Says whether this page may be in the batch that is begun. Where pages are shipped ahead they are in order for each look only.
    #[must_use]
    pub fn follows(&self, page: u64) -> bool {
        self.encoder.follows(page)
    }

    /// Encodes a page of this stream, which follows those of its batch. Says whether the batch is full, and must be finished before the next.
    pub fn push(&mut self, page: u64, content: &Page) -> bool {
        self.push_timed(page, content, || Instant(0))
    }

    /// As `push`, taking note of the time that it takes by that clock.
    pub fn push_timed(&mut self, page: u64, content: &Page, clock: impl Fn() -> Instant) -> bool {
        let pushed = if self.alike.remove(&page) {
            self.encoder.push_own(page)
        } else {
            let reference = self.cache.base(page);
            let pushed = timed(&mut self.chooser, clock, |chooser| {
                self.encoder.push(page, content, reference, chooser)
            });
            if !matches!(pushed.codec, Codec::Zero | Codec::Unchanged) {
                let (pages, bytes) = self.spent;
                self.spent = (pages + 1, bytes + pushed.bytes as u64);
            }
            pushed
        };
        self.cache.shipped(page, content, pushed.codec);
        pushed.full
    }

    /// Takes note of the stream's speed, in bytes a second.
    pub fn link_measured(&mut self, speed: u64) {
        self.chooser.link_measured(speed);
    }

    /// Ends the batch and sums it; none if nothing is in it.
    pub fn finish(&mut self) -> Option<PageBatch> {
        if self.encoder.is_empty() {
            return None;
        }
        let (count, encoded) = self.encoder.finish();
        let batch = PageBatch::new(self.tag, count, encoded);
        self.sum.add(PageSum::of(&batch));
        Some(batch)
    }
}

/// Encodes a page, and tells the chooser how long that took.
fn timed(chooser: &mut Chooser, clock: impl Fn() -> Instant, push: impl FnOnce(&mut Chooser) -> Pushed) -> Pushed {
    let begun = clock();
    let pushed = push(chooser);
    let took = clock().since(begun);
    if let Some(codec) = pushed.timed {
        chooser.timed(codec, 1, took);
    }
    pushed
}

#[cfg(test)]
mod tests {
    use super::*;
    use checkpoint::limits::PAGE_BYTES;
    use checkpoint::{Epoch, Generation};

    /// Two looks at the dirty pages may follow each other while the courier ships what the first has found.
    #[test]
    fn pages_of_a_second_look_begin_another_batch() {
        let mut encoding = Encoding::new(1 << 20, 1);
        let tag = Tag {
            generation: Generation(1),
            epoch: Epoch(1),
        };
        encoding.begin(tag);
        let mut batches = Vec::new();
        for page in [7, 48_541, 4_734, 4_735, 4_735] {
            let (_, lane) = encoding.lane_of(page);
            if !lane.follows(page) {
                batches.extend(lane.finish().map(|batch| batch.count));
            }
            assert!(!lane.push(page, &[1; PAGE_BYTES]));
        }
        batches.extend(encoding.lane_of(0).1.finish().map(|batch| batch.count));
        assert_eq!(batches, [2, 2, 1]);
        assert_eq!(encoding.sums().pages(), 5);
    }
}
