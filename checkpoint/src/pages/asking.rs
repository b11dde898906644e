//! Whether it pays to ask the secondary which pages it has alike.
//!
//! Asking saves what the alike pages would take to encode and to send, and costs what [`identical`](super::identical)
//! does: the secondary's VM stands from then on, two round trips, and for each page a hash on both sides and some 20 bytes.
//! Most guests write alike what they compute and differently what has to do with time, so the share of alike pages is
//! that of a guest, not of an epoch: what the last answers said is a good guess for the next.
//!
//! - All pages are asked about while the expected saving is greater than the expected cost.
//! - While it is not, a few pages are asked about now and then, so that a change of the guest is noticed; an answer that
//!   promises much is soon followed by the next.
//!
//! Driven by the shell that ships pages. Integers only; knows no pages, reads no clock.

use crate::limits::PAGE_BYTES;
use crate::time::Duration;

/// Pages of a question that only looks for a change.
const SAMPLE_PAGES: u64 = 64;
/// Checkpoints with as many pages between two such questions.
const SAMPLE_EVERY: u32 = 64;
/// Shares are in parts of this.
const WHOLE: u64 = 256;
/// The weight of a new value in an average is one in so many.
const WEIGHT: u64 = 4;
/// Bytes that an alike page takes: hash, place, answer and record.
const ASKED_BYTES: u64 = 20;
/// Nanoseconds of a page's hash on both sides.
const ASKED_TIME: u64 = 600;
/// Nanoseconds until the answer to a question about nothing, until answers tell.
const ROUND_TIME: u64 = 500_000;
/// Nanoseconds that a page takes to encode, until it is measured.
const ENCODING_TIME: u64 = 4_000;
/// Longest times that are believed: a shell that was stopped by its host measures anything.
const TIME_MAX: u64 = 1_000_000_000;

/// How many pages to ask about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Question {
    /// None: all of them are sent.
    Nothing,
    /// So many of them, spread evenly.
    Some(u64),
    /// All of them.
    All,
}

/// Decides, and learns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asking {
    /// Share of the pages asked about that were alike.
    share: u64,
    /// Nanoseconds to encode a page, and the bytes that it takes.
    encoding: u64,
    bytes: u64,
    /// Nanoseconds of a question about no page.
    round: u64,
    until_sample: u32,
}

impl Default for Asking {
    /// Knows nothing, and will soon try.
    fn default() -> Self {
        Self {
            share: 0,
            encoding: ENCODING_TIME,
            bytes: PAGE_BYTES as u64 / 2,
            round: ROUND_TIME,
            until_sample: 1,
        }
    }
}

impl Asking {
    /// Decides for a checkpoint of so many pages. `link` is the link's speed in bytes per second.
    pub fn decide(&mut self, pages: u64, link: u64) -> Question {
        if pages == 0 {
            return Question::Nothing;
        }
        let transfer = |bytes: u64| bytes.saturating_mul(1_000_000_000) / link.max(1);
        let page = self.encoding.saturating_add(transfer(self.bytes));
        let saved = page.saturating_mul(pages).saturating_mul(self.share) / WHOLE;
        let asked = (ASKED_TIME + transfer(ASKED_BYTES)).saturating_mul(pages);
        if saved > asked.saturating_add(self.round) {
            return Question::All;
        }
        if pages < SAMPLE_PAGES {
            return Question::Nothing;
        }
        self.until_sample = self.until_sample.saturating_sub(1);
        if self.until_sample > 0 {
            return Question::Nothing;
        }
        self.until_sample = SAMPLE_EVERY;
        Question::Some(SAMPLE_PAGES)
    }

    /// Takes note of an answer and of the time from the question to it.
    pub fn answered(&mut self, asked: u64, alike: u64, took: Duration) {
        let Some(share) = alike.min(asked).saturating_mul(WHOLE).checked_div(asked) else {
            return;
        };
        // A few pages tell less than all, but for the way up: that is tried again at once.
        if asked <= SAMPLE_PAGES && share > self.share {
            self.until_sample = 1;
        }
        self.share = average(self.share, share);
        let round = took.0.min(TIME_MAX).saturating_sub(asked.saturating_mul(ASKED_TIME));
        self.round = average(self.round, round);
    }

    /// Takes note of pages that were encoded otherwise than as alike, of their bytes and of the time it took.
    pub fn encoded(&mut self, pages: u64, bytes: u64, took: Duration) {
        if let (Some(bytes), Some(took)) = (bytes.checked_div(pages), took.0.min(TIME_MAX).checked_div(pages)) {
            self.bytes = average(self.bytes, bytes);
            self.encoding = average(self.encoding, took);
        }
    }
}

fn average(old: u64, new: u64) -> u64 {
    if new >= old {
        // Rounded up, so that the average reaches what stays the same.
        old + (new - old).div_ceil(WEIGHT)
    } else {
        old - (old - new).div_ceil(WEIGHT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIGABIT: u64 = 125_000_000;

    /// Takes so many checkpoints; returns how many asked about all pages, and how many about some.
    fn run(asking: &mut Asking, checkpoints: u64, pages: u64, alike_percent: u64) -> (u64, u64) {
        let (mut all, mut some) = (0, 0);
        for _ in 0..checkpoints {
            let asked = match asking.decide(pages, GIGABIT) {
                Question::Nothing => continue,
                Question::Some(few) => {
                    some += 1;
                    few
                }
                Question::All => {
                    all += 1;
                    pages
                }
            };
            let took = Duration(300_000 + asked * 600);
            asking.answered(asked, asked * alike_percent / 100, took);
        }
        (all, some)
    }

    #[test]
    fn a_guest_that_writes_alike_is_soon_asked_about_all_pages() {
        let (all, some) = run(&mut Asking::default(), 100, 5_000, 95);
        assert!(all >= 90 && some <= 8, "{all} {some}");
    }

    #[test]
    fn a_guest_that_writes_differently_is_asked_now_and_then() {
        let (all, some) = run(&mut Asking::default(), 640, 5_000, 0);
        assert_eq!((all, some), (0, 10));
    }

    #[test]
    fn a_guest_that_changes_is_noticed_both_ways() {
        let mut asking = Asking::default();
        run(&mut asking, 100, 5_000, 95);
        let (all, _) = run(&mut asking, 200, 5_000, 0);
        assert!(all < 20, "{all}");
        let (all, _) = run(&mut asking, 200, 5_000, 95);
        assert!(all > 100, "{all}");
    }

    #[test]
    fn few_pages_are_not_worth_a_round_trip() {
        let mut asking = Asking::default();
        run(&mut asking, 100, 5_000, 100);
        assert_eq!(run(&mut asking, 100, 10, 100), (0, 0));
    }

    #[test]
    fn pages_that_take_few_bytes_are_rather_sent_and_on_a_slow_link_rather_asked_about() {
        let mut asking = Asking::default();
        run(&mut asking, 100, 1_000, 90);
        (0..50).for_each(|_| asking.encoded(1_000, 40_000, Duration(300_000)));
        assert_ne!(asking.decide(1_000, GIGABIT), Question::All);
        assert_eq!(asking.decide(1_000, GIGABIT / 100), Question::All);
    }

    #[test]
    fn absurd_measurements_are_survived() {
        let mut asking = Asking::default();
        for number in [0, 1, u64::MAX] {
            asking.answered(number, u64::MAX, Duration(u64::MAX));
            asking.encoded(number, u64::MAX, Duration(u64::MAX));
            asking.decide(number, number);
            asking.decide(u64::MAX, 0);
        }
    }
}
