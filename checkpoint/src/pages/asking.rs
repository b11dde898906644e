//! Whether it pays to ask the secondary which pages it has alike.
//!
//! Asking saves what the alike pages would take to encode and to send, on both hosts, and costs what
//! [`identical`](super::identical) does: a hash on both sides, some 20 bytes a page, and the time until the first answer.
//! Most guests write alike what they compute and differently what has to do with time, so the share of alike pages is
//! that of a guest, not of an epoch: what the last answers said is a good guess for the next.
//!
//! - All pages are asked about while the expected saving is greater than the expected cost.
//! - While it is not, a few pages are asked about now and then, while the others are sent already. What that costs is bounded by
//!   a share of what sending takes, so large checkpoints do it nearly always. An answer that promises enough is followed by a
//!   question about all that is left.
//!
//! What a page costs is what the shell sees go by on the clock: the encoder, the processors' time in both kernels and on the other host, which
//! holds the sender up when it is slower; and no less than what its bytes take on the link.
//!
//! Driven by the shell that ships pages. Integers only; knows no pages, reads no clock.

use crate::limits::PAGE_BYTES;
use crate::time::Duration;

/// Pages of a question that only looks for a change.
pub const SAMPLE_PAGES: u64 = 64;
/// A checkpoint's sending takes at least so many times as long as a question, if one is asked for a change: it has to be answered
/// before all is sent.
const SAMPLE_WORTH: u64 = 2;
/// Nanoseconds of processors' time that such a question takes, and how many times as much is spent on pages from one to the next.
const SAMPLE_TIME: u64 = 150_000;
const SAMPLE_AFTER: u64 = 8;
/// Shares are in parts of this.
const WHOLE: u64 = 256;
/// The weight of a new value in an average is one in so many; shares and sending are about many pages each time.
const WEIGHT: u64 = 4;
const MANY_WEIGHT: u64 = 2;
/// Bytes that an alike page takes: hash, place, answer and record.
const ASKED_BYTES: u64 = 20;
/// Nanoseconds of a page's hashes, until answers tell.
const ASKED_TIME: u64 = 1_500;
/// Pages of an answer that tells what each of them took; fewer tell what an answer takes by itself.
const TIMED_PAGES: u64 = 256;
/// Nanoseconds until the answer to a question about nothing, until answers tell.
const ROUND_TIME: u64 = 500_000;
/// Nanoseconds that a page takes to be sent, until it is measured.
const SENDING_TIME: u64 = 4_000;
/// Pages that were sent, from which their time is believed.
const SENT_PAGES: u64 = 16;
/// Of so many checkpoints that ask about all pages one sends a few, so that what pages cost does not grow old; that is done while
/// the secondary's VM stops.
const SPARE_EVERY: u32 = 16;
const SPARED_PAGES: u64 = 32;
/// Checkpoints of fewer pages ask nothing: another round trip is all that they would notice.
const ASKED_MIN: u64 = 2 * SAMPLE_PAGES;
/// Longest times that are believed: a shell that was stopped by its host measures anything.
const TIME_MAX: u64 = 1_000_000_000;

/// How many pages to ask about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Question {
    /// None: all of them are sent.
    Nothing,
    /// [`SAMPLE_PAGES`] of them, spread evenly, while the first are sent.
    Sample,
    /// All of them, but for so many of the first.
    All(u64),
}

/// What the time from a question to its answer tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tells {
    /// The first question of a checkpoint, counted from when the secondary's VM was to stop: what asking takes at all.
    Round,
    /// A later one: what each page takes.
    Pages,
    /// The question waited behind pages.
    Nothing,
}

/// Decides, and learns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asking {
    /// Share of the pages asked about that were alike.
    share: u64,
    /// Nanoseconds to send a page, and the bytes that it takes.
    sending: u64,
    bytes: u64,
    /// Nanoseconds to ask about one page more, and about none.
    asked: u64,
    round: u64,
    /// Nanoseconds of sending since the last question, or so.
    credit: u64,
    until_spared: u32,
}

impl Default for Asking {
    /// Knows nothing, and will soon try.
    fn default() -> Self {
        Self {
            share: 0,
            sending: SENDING_TIME,
            bytes: PAGE_BYTES as u64 / 2,
            asked: ASKED_TIME,
            round: ROUND_TIME,
            credit: SAMPLE_AFTER * SAMPLE_TIME,
            until_spared: SPARE_EVERY,
        }
    }
}

impl Asking {
    /// Decides for a checkpoint of so many pages. `link` is the link's speed in bytes per second.
    pub fn decide(&mut self, pages: u64, link: u64) -> Question {
        let sending = self.page(link).saturating_mul(pages);
        if pages >= ASKED_MIN && self.pays(pages, self.share, self.round, link) {
            self.until_spared -= 1;
            if self.until_spared > 0 {
                return Question::All(0);
            }
            self.until_spared = SPARE_EVERY;
            return Question::All(SPARED_PAGES);
        }
        self.credit = self.credit.saturating_add(sending);
        let worth = pages >= ASKED_MIN && sending >= SAMPLE_WORTH * self.round;
        if !worth || self.credit < SAMPLE_AFTER * SAMPLE_TIME {
            return Question::Nothing;
        }
        self.credit = 0;
        Question::Sample
    }

    /// Decides whether to ask about so many more pages, after this answer.
    #[must_use]
    pub fn goes_on(&self, more: u64, asked: u64, alike: u64, link: u64) -> bool {
        // The first answer is there: the next ones come while pages are sent.
        share(asked, alike).is_some_and(|share| self.pays(more, share, 0, link))
    }

    /// Takes note of an answer, and of the time from the question to it if that tells something.
    pub fn answered(&mut self, asked: u64, alike: u64, took: Duration, tells: Tells) {
        let Some(share) = share(asked, alike) else {
            return;
        };
        self.share = average(self.share, share, MANY_WEIGHT);
        let took = took.0.min(TIME_MAX);
        match tells {
            Tells::Round => {
                let round = took.saturating_sub(asked.saturating_mul(self.asked));
                self.round = average(self.round, round, WEIGHT);
            }
            Tells::Pages if asked >= TIMED_PAGES => self.asked = average(self.asked, took / asked, WEIGHT),
            Tells::Pages | Tells::Nothing => {}
        }
    }

    /// Takes note of pages that were encoded otherwise than as alike and queued, of their bytes and of the time it took.
    pub fn sent(&mut self, pages: u64, bytes: u64, took: Duration) {
        if pages >= SENT_PAGES {
            self.bytes = average(self.bytes, bytes / pages, MANY_WEIGHT);
            self.sending = average(self.sending, took.0.min(TIME_MAX) / pages, MANY_WEIGHT);
        }
    }

    fn pays(&self, pages: u64, share: u64, round: u64, link: u64) -> bool {
        let saved = self.page(link).saturating_mul(pages).saturating_mul(share) / WHOLE;
        let asked = self.asked.max(transfer(ASKED_BYTES, link)).saturating_mul(pages);
        saved > asked.saturating_add(round)
    }

    /// Nanoseconds that a page takes that is not asked about.
    fn page(&self, link: u64) -> u64 {
        self.sending.max(transfer(self.bytes, link))
    }
}

fn transfer(bytes: u64, link: u64) -> u64 {
    bytes.saturating_mul(1_000_000_000) / link.max(1)
}

fn share(asked: u64, alike: u64) -> Option<u64> {
    alike.min(asked).saturating_mul(WHOLE).checked_div(asked)
}

fn average(old: u64, new: u64, weight: u64) -> u64 {
    if new >= old {
        // Rounded up, so that the average reaches what stays the same.
        old + (new - old).div_ceil(weight)
    } else {
        old - (old - new).div_ceil(weight)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIGABIT: u64 = 125_000_000;
    const FAST: u64 = 100 * GIGABIT;
    const CHUNK: u64 = 1_000;

    /// What became of checkpoints: how many asked about all pages from the beginning, and how many about some; pages sent in all.
    #[derive(Debug, Default, PartialEq, Eq)]
    struct Run {
        all: u64,
        some: u64,
        sent: u64,
    }

    /// Takes so many checkpoints of pages that take 4 µs each to send, and 1 µs to ask about.
    fn run(asking: &mut Asking, checkpoints: u64, pages: u64, alike_percent: u64) -> Run {
        let mut run = Run::default();
        for _ in 0..checkpoints {
            let mut left = pages;
            let mut asks = match asking.decide(pages, FAST) {
                Question::Nothing => false,
                Question::All(spared) => {
                    run.all += 1;
                    left -= spared;
                    run.sent += spared;
                    asking.sent(spared, spared * 4_000, Duration(spared * 4_000));
                    true
                }
                Question::Sample => {
                    run.some += 1;
                    let alike = SAMPLE_PAGES * alike_percent / 100;
                    asking.answered(SAMPLE_PAGES, alike, Duration(300_000), Tells::Nothing);
                    left -= pages.min(100);
                    run.sent += pages.min(100);
                    asking.goes_on(left, SAMPLE_PAGES, alike, FAST)
                }
            };
            while asks && left > 0 {
                let asked = left.min(CHUNK);
                let alike = asked * alike_percent / 100;
                let took = Duration(asked * 1_000 + if left == pages { 300_000 } else { 0 });
                let tells = if left == pages { Tells::Round } else { Tells::Pages };
                asking.answered(asked, alike, took, tells);
                left -= asked;
                run.sent += asked - alike;
                asks = asking.goes_on(left, asked, alike, FAST);
            }
            run.sent += left;
            asking.sent(left, left * 4_000, Duration(left * 4_000));
        }
        run
    }

    fn asks_all(question: Question) -> bool {
        matches!(question, Question::All(_))
    }

    #[test]
    fn a_guest_that_writes_alike_is_soon_asked_about_all_pages() {
        let run = run(&mut Asking::default(), 100, 5_000, 95);
        assert!(run.all >= 98, "{run:?}");
        assert!(run.sent < 100 * 5_000 / 10, "{run:?}");
    }

    #[test]
    fn a_guest_that_writes_differently_is_never_asked_about_more_than_some() {
        let run = run(&mut Asking::default(), 640, 5_000, 0);
        assert_eq!((run.all, run.sent), (0, 640 * 5_000));
        assert!(run.some > 64, "a change of the guest is noticed: {run:?}");
    }

    #[test]
    fn what_questions_cost_is_a_small_part_of_what_sending_does() {
        let (mut asking, mut questions) = (Asking::default(), 0);
        for _ in 0..1_000 {
            if asking.decide(400, FAST) == Question::Sample {
                questions += 1;
                asking.answered(SAMPLE_PAGES, 0, Duration(300_000), Tells::Nothing);
            }
            asking.sent(400, 1_600_000, Duration(400 * 4_000));
        }
        let (spent, sending) = (questions * SAMPLE_TIME, 1_000 * 400 * 4_000);
        assert!(questions > 10 && spent * 4 < sending, "{questions}");
    }

    #[test]
    fn a_guest_that_changes_is_noticed_both_ways() {
        let mut asking = Asking::default();
        run(&mut asking, 100, 5_000, 95);
        let differs = run(&mut asking, 100, 5_000, 0);
        assert!(differs.all < 5, "{differs:?}");
        let equals = run(&mut asking, 100, 5_000, 95);
        assert!(equals.all > 95, "{equals:?}");
    }

    #[test]
    fn few_pages_are_not_worth_a_round_trip() {
        let mut asking = Asking::default();
        run(&mut asking, 100, 5_000, 100);
        assert_eq!(
            run(&mut asking, 100, 10, 100),
            Run {
                sent: 1_000,
                ..Run::default()
            }
        );
    }

    #[test]
    fn pages_that_cost_little_are_rather_sent_and_on_a_slow_link_rather_asked_about() {
        let mut asking = Asking::default();
        run(&mut asking, 100, 1_000, 90);
        (0..50).for_each(|_| asking.sent(1_000, 40_000, Duration(300_000)));
        assert!(!asks_all(asking.decide(1_000, GIGABIT)));
        assert!(asks_all(asking.decide(1_000, GIGABIT / 100)));
    }

    #[test]
    fn the_time_on_the_clock_counts_however_fast_the_link_is() {
        let mut asking = Asking::default();
        run(&mut asking, 20, 1_000, 90);
        (0..50).for_each(|_| asking.sent(1_000, 40_000, Duration(13_000_000)));
        assert!(asks_all(asking.decide(1_000, u64::MAX)));
    }

    #[test]
    fn pages_that_have_become_cheap_are_noticed_though_all_were_alike() {
        let mut asking = Asking::default();
        run(&mut asking, 20, 1_000, 100);
        let asked = (0..200).take_while(|_| match asking.decide(1_000, FAST) {
            Question::All(spared) => {
                asking.sent(spared, spared * 20, Duration(spared * 500));
                asking.answered(1_000, 1_000, Duration(1_500_000), Tells::Nothing);
                true
            }
            _ => false,
        });
        assert!(asked.count() < 100);
    }

    #[test]
    fn absurd_measurements_are_survived() {
        let mut asking = Asking::default();
        for number in [0, 1, u64::MAX] {
            for tells in [Tells::Round, Tells::Pages, Tells::Nothing] {
                asking.answered(number, u64::MAX, Duration(u64::MAX), tells);
            }
            asking.sent(number, u64::MAX, Duration(u64::MAX));
            asking.decide(number, number);
            asking.decide(u64::MAX, 0);
            let _ = asking.goes_on(u64::MAX, number, number, 0);
        }
    }
}
