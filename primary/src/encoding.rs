//! Pages of one checkpoint after another, encoded against what the secondary has committed.
//!
//! ```text
//!   begin(n) ─► push … finish ─► (shipped ahead of the stop)
//!               push … finish ─► (shipped at the stop) ─► begin(n + 1): n is acknowledged
//!                                      └─ abandon ─► forget: another sync
//! ```
//!
//! Who drives it says truly when a checkpoint is acknowledged: with the first page of the next, and never before. That, and that
//! every page shipped goes through here, is what deltas rest on. Pure: it neither reads guest memory nor sends.

use checkpoint::mutants::{self, Mutant};
use checkpoint::pages::identical::{PageHasher, PageHashes, PageMatches};
use checkpoint::pages::{
    Asking, BATCH_BYTES, BaseCache, BatchEncoder, Chooser, Codec, CodecStats, Page, Pushed, Question, is_zero,
};
use checkpoint::staging::Totals;
use checkpoint::wire::PageBatch;
use checkpoint::{Duration, Instant, Tag};

use crate::comparison::{Comparison, Next};

/// What is known for encoding pages, and the sums of those shipped ahead.
pub struct Encoding {
    encoder: BatchEncoder,
    cache: BaseCache,
    chooser: Chooser,
    /// The checkpoint whose pages are encoded, or were last; none after it was abandoned.
    open: Option<Tag>,
    /// Of the pages that were shipped ahead in it.
    ahead: Option<Totals>,
    /// What the encoder had done before it.
    before: CodecStats,
    asking: Asking,
    comparison: Comparison,
    /// Pages of its stop that were sent otherwise than as alike, their bytes, and the time of all of them.
    spent: (u64, u64, Duration),
}

impl Encoding {
    /// Makes one that remembers at most `cache_bytes` of what the secondary has committed.
    #[must_use]
    pub fn new(cache_bytes: usize) -> Self {
        Self {
            encoder: BatchEncoder::new(BATCH_BYTES, None),
            cache: BaseCache::new(cache_bytes),
            chooser: Chooser::default(),
            open: None,
            ahead: None,
            before: CodecStats::default(),
            asking: Asking::default(),
            comparison: nothing_to_compare(),
            spent: (0, 0, Duration(0)),
        }
    }

    /// Goes on with the pages of this checkpoint, or begins with them: then the one before is acknowledged, unless it
    /// was abandoned.
    pub fn begin(&mut self, tag: Tag) {
        if self.open == Some(tag) {
            return;
        }
        match self.open.replace(tag) {
            Some(before) => self.cache.commit(before.epoch),
            None => self.cache.abandon(),
        }
        self.ahead = None;
        self.encoder.rebase(self.cache.committed());
        self.before = *self.encoder.stats();
        self.comparison = nothing_to_compare();
        self.spent = (0, 0, Duration(0));
    }

    /// Returns what was encoded for the open checkpoint, ahead of its stop and after it.
    #[must_use]
    pub fn stats(&self) -> CodecStats {
        self.encoder.stats().since(&self.before)
    }

    /// Encodes a page. Says whether the batch is full, and must be finished before the next.
    pub fn push(&mut self, page: u64, content: &Page) -> bool {
        self.push_timed(page, content, || Instant(0))
    }

    /// As `push`, taking note of the time that it takes by that clock.
    pub fn push_timed(&mut self, page: u64, content: &Page, clock: impl Fn() -> Instant) -> bool {
        let pushed = if self.comparison.take_alike(page) {
            self.encoder.push_own(page)
        } else {
            let reference = self.cache.base(page);
            let pushed = timed(&mut self.chooser, clock, |chooser| {
                self.encoder.push(page, content, reference, chooser)
            });
            if !matches!(pushed.codec, Codec::Zero | Codec::Unchanged) {
                let (pages, bytes, time) = self.spent;
                self.spent = (pages + 1, bytes + pushed.bytes as u64, time);
            }
            pushed
        };
        self.cache.shipped(page, content, pushed.codec);
        pushed.full
    }

    /// Takes note of the link's speed, in bytes a second.
    pub fn link_measured(&mut self, speed: u64) {
        self.chooser.link_measured(speed);
    }

    /// Decides how many of the copied pages of a stop to ask about.
    pub fn choose(&mut self, pages: usize) -> Question {
        self.asking.decide(pages as u64, self.chooser.link())
    }

    /// Begins with the copied pages of the open checkpoint. Questions have at most `chunk` pages, or as many as is good.
    /// Says whether the secondary's VM must stop.
    pub fn compare(&mut self, pages: usize, asks: Question, chunk: Option<usize>) -> bool {
        self.comparison = Comparison::new(pages, asks, chunk);
        self.spent = (0, 0, Duration(0));
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
        let worth = |place| {
            let (number, content) = page(place);
            let base = self.cache.base(number);
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
        self.asking.answered(asked, alike, took, tells);
        let more = self.comparison.unasked();
        let asks = self.asking.goes_on(more, asked, alike, self.chooser.link());
        self.comparison.go_on(asks);
    }

    /// Takes note of the time that some of the copied pages took until they were queued.
    pub fn took(&mut self, time: Duration) {
        self.spent.2.0 += time.0;
    }

    /// The open checkpoint is shipped: what its pages took is known.
    pub fn shipped(&mut self) {
        let (pages, bytes, took) = self.spent;
        self.asking.sent(pages, bytes, took);
    }

    /// Ends the batch and counts it in `totals`; none if nothing is in it.
    ///
    /// # Panics
    /// Panics if the sums are those of another checkpoint.
    pub fn finish(&mut self, totals: &mut Totals) -> Option<PageBatch> {
        if self.encoder.is_empty() {
            return None;
        }
        let (count, encoded) = self.encoder.finish();
        let batch = PageBatch {
            tag: totals.tag(),
            count,
            encoded,
        };
        totals
            .pages(&batch)
            .expect("the sums are of the checkpoint whose pages these are");
        Some(batch)
    }

    /// Takes the sums of what was shipped ahead in the open checkpoint: to go on with them.
    ///
    /// # Panics
    /// Panics if none is open.
    pub fn take_ahead(&mut self) -> Totals {
        let tag = self.open.expect("pages are shipped in a checkpoint that was begun");
        self.ahead.take().unwrap_or_else(|| Totals::new(tag, None))
    }

    /// Puts the sums back, with what was shipped ahead since.
    pub fn keep_ahead(&mut self, totals: Totals) {
        self.ahead = Some(totals);
    }

    /// The open checkpoint will not be acknowledged.
    pub fn abandon(&mut self) {
        // A batch that was begun is not sent any more.
        let _ = self.encoder.finish();
        self.cache.abandon();
        self.open = None;
        self.ahead = None;
        self.comparison = nothing_to_compare();
    }

    /// Forgets what a secondary holds: there will be another, or the same with another state.
    pub fn forget(&mut self) {
        self.abandon();
        if !mutants::on(Mutant::KeepBaseOfAnother) {
            self.cache.clear();
        }
    }
}

fn nothing_to_compare() -> Comparison {
    Comparison::new(0, Question::Nothing, None)
}

/// Encodes a page, and tells the chooser how long that took.
pub(crate) fn timed(
    chooser: &mut Chooser,
    clock: impl Fn() -> Instant,
    push: impl FnOnce(&mut Chooser) -> Pushed,
) -> Pushed {
    let begun = clock();
    let pushed = push(chooser);
    let took = clock().since(begun);
    if let Some(codec) = pushed.timed {
        chooser.timed(codec, 1, took);
    }
    pushed
}
