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

use checkpoint::Tag;
use checkpoint::mutants::{self, Mutant};
use checkpoint::pages::{BATCH_BYTES, BaseCache, BatchEncoder, Chooser, CodecStats, Page};
use checkpoint::staging::Totals;
use checkpoint::wire::PageBatch;

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
    }

    /// Returns what was encoded for the open checkpoint, ahead of its stop and after it.
    #[must_use]
    pub fn stats(&self) -> CodecStats {
        self.encoder.stats().since(&self.before)
    }

    /// Encodes a page. Says whether the batch is full, and must be finished before the next.
    pub fn push(&mut self, page: u64, content: &Page) -> bool {
        let reference = self.cache.base(page);
        let pushed = self.encoder.push(page, content, reference, &mut self.chooser);
        self.cache.shipped(page, content, pushed.codec);
        pushed.full
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
    }

    /// Forgets what a secondary holds: there will be another, or the same with another state.
    pub fn forget(&mut self) {
        self.abandon();
        if !mutants::on(Mutant::KeepBaseOfAnother) {
            self.cache.clear();
        }
    }
}
