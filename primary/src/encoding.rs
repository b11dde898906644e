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

use std::collections::{BTreeSet, VecDeque};

use checkpoint::mutants::{self, Mutant};
use checkpoint::pages::identical::{HASHES_MAX, PageHasher, PageHashes, PageMatches};
use checkpoint::pages::{
    Asking, BATCH_BYTES, BaseCache, BatchEncoder, Chooser, Codec, CodecStats, Page, Pushed, Question, is_zero,
};
use checkpoint::staging::Totals;
use checkpoint::wire::PageBatch;
use checkpoint::{Duration, Instant, Tag};

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
    /// What encoding took in it: pages, bytes, time.
    spent: (u64, u64, Duration),
}

/// A comparison of copied pages with those of the secondary's stopped VM; empty while there is none.
#[derive(Default)]
struct Comparison {
    /// Places in the copy that are still to be asked about.
    places: VecDeque<usize>,
    /// Pages that the open question is about.
    open: Vec<u64>,
    /// Those that are alike.
    alike: BTreeSet<u64>,
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
            comparison: Comparison::default(),
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
        self.comparison = Comparison::default();
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
        let pushed = if self.comparison.alike.remove(&page) {
            self.encoder.push_own(page)
        } else {
            let reference = self.cache.base(page);
            let (pushed, took) = timed(&mut self.chooser, clock, |chooser| {
                self.encoder.push(page, content, reference, chooser)
            });
            if !matches!(pushed.codec, Codec::Zero | Codec::Unchanged) {
                let (pages, bytes, time) = self.spent;
                self.spent = (pages + 1, bytes + pushed.bytes as u64, Duration(time.0 + took.0));
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

    /// Returns the places of those of the copied pages that would take bytes: not zero, and not as in the base.
    pub fn worth_asking<'a>(&mut self, pages: impl Iterator<Item = (u64, &'a Page)>) -> Vec<usize> {
        let mut worth = |page, content| {
            let base = self.cache.base(page);
            base.is_none_or(|base| base.page != content) && !is_zero(content)
        };
        let worth = pages
            .enumerate()
            .filter_map(|(place, (page, content))| worth(page, content).then_some(place));
        worth.collect()
    }

    /// Decides about which of these places to ask; about none if that does not pay.
    pub fn choose(&mut self, places: Vec<usize>) -> Vec<usize> {
        let few = match self.asking.decide(places.len() as u64, self.chooser.link()) {
            Question::Nothing => return Vec::new(),
            Question::All => return places,
            Question::Some(few) => usize::try_from(few).unwrap_or(usize::MAX),
        };
        let step = places.len().div_ceil(few).max(1);
        places.into_iter().step_by(step).collect()
    }

    /// Begins to ask about the pages at these places of the copy.
    pub fn compare(&mut self, places: Vec<usize>) {
        self.comparison.places = places.into();
    }

    /// Returns the next question, if there is one (more). Both VMs stand, or what they had is copied, before the seed is
    /// drawn; `page` gives a page of the copy.
    pub fn question<'a>(
        &mut self,
        tag: Tag,
        seed: [u8; 32],
        page: impl Fn(usize) -> (u64, &'a Page),
    ) -> Option<PageHashes> {
        let places = &mut self.comparison.places;
        if places.is_empty() {
            return None;
        }
        let hasher = PageHasher::new(&seed);
        let hash = |place| {
            let (number, content) = page(place);
            (number, hasher.hash(content))
        };
        let pages: Vec<_> = places.drain(..places.len().min(HASHES_MAX)).map(hash).collect();
        self.comparison.open = pages.iter().map(|(page, _)| *page).collect();
        Some(PageHashes { tag, seed, pages })
    }

    /// Takes the answer to the last question, which came after that time.
    ///
    /// # Panics
    /// Panics if it is about another number of pages, which the protocol refuses.
    pub fn answered(&mut self, matches: &PageMatches, took: Duration) {
        let asked = core::mem::take(&mut self.comparison.open);
        assert_eq!(asked.len(), matches.alike.len(), "an answer to the last question");
        let count = asked.len() as u64;
        let alike = asked.into_iter().zip(&matches.alike);
        let alike: Vec<u64> = alike.filter_map(|(page, alike)| alike.then_some(page)).collect();
        self.asking.answered(count, alike.len() as u64, took);
        self.comparison.alike.extend(alike);
    }

    /// The open checkpoint is shipped: what its pages took is known.
    pub fn shipped(&mut self) {
        let (pages, bytes, took) = self.spent;
        self.asking.encoded(pages, bytes, took);
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
        self.comparison = Comparison::default();
    }

    /// Forgets what a secondary holds: there will be another, or the same with another state.
    pub fn forget(&mut self) {
        self.abandon();
        if !mutants::on(Mutant::KeepBaseOfAnother) {
            self.cache.clear();
        }
    }
}

/// Encodes a page, and tells the chooser how long that took.
pub(crate) fn timed(
    chooser: &mut Chooser,
    clock: impl Fn() -> Instant,
    push: impl FnOnce(&mut Chooser) -> Pushed,
) -> (Pushed, Duration) {
    let begun = clock();
    let pushed = push(chooser);
    let took = clock().since(begun);
    if let Some(codec) = pushed.timed {
        chooser.timed(codec, 1, took);
    }
    (pushed, took)
}
