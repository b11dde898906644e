//! Memory that is written on purpose: the dirtier's working set, `/touch` and `/write`.
//!
//! The [`Arena`] is all memory outside the heap. The dirtier goes through the first part of it at a set rate,
//! in small portions, so that the network is served in between; it never catches up more than a tenth of a
//! second. A touch writes a stretch of the arena once,
//! with its own content or with a pattern. Neither reads a clock: the server passes the time.

use alloc::vec::Vec;

use crate::content;
use crate::pattern;
use crate::settings::{Dirty, Order, Pattern};

/// Bytes of a page.
pub const PAGE_BYTES: usize = 4096;
/// One page of the arena.
pub type Page = [u64; PAGE_BYTES / 8];
/// Pages of a MiB.
pub const PAGES_PER_MIB: usize = 256;

const PAGES_PER_PORTION: u64 = 256;
const SECOND: u64 = 1_000_000_000;
const CATCH_UP_MAX: u64 = SECOND / 10;
const TICK: u64 = 1_000_000;

/// The memory that is there to be written, in up to a few pieces.
#[derive(Debug, Default)]
pub struct Arena {
    pieces: Vec<&'static mut [Page]>,
}

impl Arena {
    /// Takes the pieces in ascending order of address.
    #[must_use]
    pub fn new(pieces: Vec<&'static mut [Page]>) -> Self {
        Self { pieces }
    }

    /// Counts the pages.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.pieces.iter().map(|piece| piece.len()).sum()
    }

    fn page(&mut self, index: usize) -> Option<&mut Page> {
        let mut index = index;
        for piece in &mut self.pieces {
            if index < piece.len() {
                return piece.get_mut(index);
            }
            index -= piece.len();
        }
        None
    }
}

/// A touch in progress: writes pages once, a portion at a time.
#[derive(Debug, Default)]
pub struct Touch {
    next: usize,
    end: usize,
    rounds: u64,
    /// What is written; none: content that no page had before.
    pattern: Option<(Pattern, u64)>,
}

impl Touch {
    /// Starts to write the first `mib` MiB of the arena; a touch still in progress is extended.
    ///
    /// # Errors
    /// The number of MiB there are, if that is less.
    pub fn start(&mut self, arena: &Arena, mib: usize) -> Result<(), usize> {
        let available = arena.pages() / PAGES_PER_MIB;
        if mib > available {
            return Err(available);
        }
        if self.is_done() {
            self.begin(None);
        }
        self.end = self.end.max(mib * PAGES_PER_MIB);
        Ok(())
    }

    /// Starts to write a pattern into the first `pages` pages of the arena. The same `noise` gives the same content;
    /// nothing is written while a touch is in progress.
    ///
    /// # Errors
    /// The number of pages there are, if that is less; none while a touch is in progress.
    pub fn start_pattern(&mut self, arena: &Arena, pages: usize, what: Pattern, noise: u64) -> Result<(), usize> {
        let available = if self.is_done() { arena.pages() } else { 0 };
        if pages > available {
            return Err(available);
        }
        self.begin(Some((what, noise)));
        self.end = pages;
        Ok(())
    }

    fn begin(&mut self, pattern: Option<(Pattern, u64)>) {
        self.next = 0;
        self.end = 0;
        self.rounds += 1;
        self.pattern = pattern;
    }

    /// Whether nothing is left to write.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.next >= self.end
    }

    /// Writes the next portion; returns whether there was any.
    pub fn run(&mut self, arena: &mut Arena) -> bool {
        if self.is_done() {
            return false;
        }
        for _ in 0..PAGES_PER_PORTION * 2 {
            if self.is_done() {
                break;
            }
            if let Some(page) = arena.page(self.next) {
                let start = (self.next as u64).wrapping_add(self.rounds << 32).wrapping_mul(512);
                match self.pattern {
                    Some((pattern, noise)) => pattern::fill(page, pattern, content::word(start ^ noise)),
                    None => {
                        for (at, word) in page.iter_mut().enumerate() {
                            *word = content::word(start.wrapping_add(at as u64));
                        }
                    }
                }
            }
            self.next += 1;
        }
        true
    }
}

/// The memory dirtier.
#[derive(Debug, Default)]
pub struct Dirtier {
    job: Option<Job>,
    written: u64,
}

#[derive(Debug)]
struct Job {
    dirty: Dirty,
    pages: usize,
    started_ns: u64,
    done: u64,
    next: usize,
    noise: u64,
}

impl Dirtier {
    /// Sets what to do from now on.
    ///
    /// # Errors
    /// The number of MiB the arena has, if the working set is larger.
    pub fn set(&mut self, dirty: Option<Dirty>, arena: &Arena, now_ns: u64) -> Result<(), usize> {
        let Some(dirty) = dirty else {
            self.job = None;
            return Ok(());
        };
        let pages = usize::try_from(dirty.working_set_mib)
            .unwrap_or(usize::MAX)
            .saturating_mul(PAGES_PER_MIB);
        if pages > arena.pages() {
            return Err(arena.pages() / PAGES_PER_MIB);
        }
        self.job = Some(Job {
            dirty,
            pages,
            started_ns: now_ns,
            done: 0,
            next: 0,
            noise: 1,
        });
        Ok(())
    }

    /// Counts the pages written since the start.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.written
    }

    /// What it does, if it is on.
    #[must_use]
    pub fn dirty(&self) -> Option<Dirty> {
        self.job.as_ref().map(|job| job.dirty)
    }

    /// Writes the pages that are due, up to one portion; returns whether more are due.
    pub fn run(&mut self, arena: &mut Arena, now_ns: u64) -> bool {
        let Some(job) = &mut self.job else { return false };
        let due = job.due(now_ns);
        let portion = due.min(PAGES_PER_PORTION);
        for _ in 0..portion {
            job.write_next(arena);
        }
        job.done += portion;
        self.written += portion;
        due > portion
    }

    /// When the next portion is due, in guest nanoseconds.
    #[must_use]
    pub fn deadline(&self) -> Option<u64> {
        let job = self.job.as_ref()?;
        let rate = u64::from(job.dirty.pages_per_second);
        // Whole ticks only: a fast dirtier writes a few pages a millisecond instead of waking up for each.
        let step = (rate * TICK / SECOND).max(1);
        let at = u128::from(job.done + step) * u128::from(SECOND) / u128::from(rate);
        Some(
            job.started_ns
                .saturating_add(u64::try_from(at).unwrap_or(u64::MAX))
                .saturating_add(1),
        )
    }
}

impl Job {
    fn due(&mut self, now_ns: u64) -> u64 {
        let rate = u128::from(self.dirty.pages_per_second);
        let count = |ns: u64| u64::try_from(u128::from(ns) * rate / u128::from(SECOND)).unwrap_or(u64::MAX);
        let passed = now_ns.saturating_sub(self.started_ns);
        let due = count(passed).saturating_sub(self.done);
        let most = count(CATCH_UP_MAX).max(1);
        if due > most {
            // Paused for long (a checkpoint, a busy network): start over instead of writing it all at once.
            self.started_ns = now_ns;
            self.done = 0;
            return most.min(1);
        }
        due
    }

    fn write_next(&mut self, arena: &mut Arena) {
        self.noise = self
            .noise
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let index = match self.dirty.order {
            Order::Sequential => self.next,
            Order::Random => usize::try_from(self.noise >> 24).unwrap_or(0) % self.pages,
        };
        self.next = (index + 1) % self.pages;
        let noise = self.noise;
        if let Some(page) = arena.page(index) {
            pattern::fill(page, self.dirty.pattern, noise);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arena(sizes: &[usize]) -> Arena {
        let piece = |pages: &usize| std::vec![[0_u64; 512]; *pages].leak();
        Arena::new(sizes.iter().map(piece).collect())
    }

    fn dirty(pattern: Pattern, order: Order) -> Dirty {
        Dirty {
            working_set_mib: 1,
            pages_per_second: 1000,
            pattern,
            order,
        }
    }

    fn touched(arena: &mut Arena) -> usize {
        (0..arena.pages())
            .filter(|index| arena.page(*index).unwrap().iter().any(|word| *word != 0))
            .count()
    }

    #[test]
    fn the_rate_is_kept() {
        let mut arena = arena(&[100, 400]);
        let mut dirtier = Dirtier::default();
        dirtier
            .set(Some(dirty(Pattern::Text, Order::Sequential)), &arena, 0)
            .unwrap();
        let mut wakes = 0;
        loop {
            let now = dirtier.deadline().unwrap();
            if now > SECOND {
                break;
            }
            while dirtier.run(&mut arena, now) {}
            wakes += 1;
        }
        assert!((998..=1000).contains(&dirtier.written()), "{}", dirtier.written());
        assert!(wakes <= 1000);
        assert_eq!(touched(&mut arena), 256);
    }

    #[test]
    fn every_deadline_makes_progress_at_any_rate() {
        let mut arena = arena(&[256]);
        for rate in [1, 3, 999, 1_000_000, u32::MAX] {
            let mut dirtier = Dirtier::default();
            let mut what = dirty(Pattern::Sparse, Order::Random);
            what.pages_per_second = rate;
            dirtier.set(Some(what), &arena, 77).unwrap();
            for _ in 0..20 {
                let before = dirtier.written();
                let at = dirtier.deadline().unwrap();
                dirtier.run(&mut arena, at);
                assert!(dirtier.written() > before, "rate {rate}");
            }
        }
    }

    #[test]
    fn a_long_pause_is_not_caught_up() {
        let mut arena = arena(&[256]);
        let mut dirtier = Dirtier::default();
        dirtier
            .set(Some(dirty(Pattern::Random, Order::Sequential)), &arena, 0)
            .unwrap();
        while dirtier.run(&mut arena, 60 * SECOND) {}
        assert!(dirtier.written() <= 100);
    }

    #[test]
    fn a_touch_writes_each_page_once_across_pieces() {
        let mut arena = arena(&[3, 600]);
        let mut touch = Touch::default();
        assert_eq!(touch.start(&arena, 3), Err(2));
        touch.start(&arena, 2).unwrap();
        while touch.run(&mut arena) {}
        assert_eq!(touched(&mut arena), 512);
    }

    #[test]
    fn a_pattern_is_written_once_and_anew_each_time() {
        let mut arena = arena(&[3, 600]);
        let mut touch = Touch::default();
        assert_eq!(touch.start_pattern(&arena, 604, Pattern::Sparse, 0), Err(603));
        touch.start_pattern(&arena, 600, Pattern::Sparse, 0).unwrap();
        assert_eq!(
            touch.start_pattern(&arena, 1, Pattern::Sparse, 0),
            Err(0),
            "one at a time"
        );
        while touch.run(&mut arena) {}
        assert_eq!(touched(&mut arena), 600);
        let first = *arena.page(7).unwrap();
        touch.start_pattern(&arena, 600, Pattern::Random, 0).unwrap();
        while touch.run(&mut arena) {}
        assert_ne!(*arena.page(7).unwrap(), first);
    }

    #[test]
    fn a_working_set_that_does_not_fit_is_refused() {
        let arena = arena(&[255]);
        let mut dirtier = Dirtier::default();
        assert_eq!(
            dirtier.set(Some(dirty(Pattern::Zero, Order::Random)), &arena, 0),
            Err(0)
        );
        assert!(dirtier.dirty().is_none());
    }
}
