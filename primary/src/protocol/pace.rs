//! How much is spent on pages before a stop: of the link, of a processor, of the guest's faults.
//!
//! Between two looks at the dirty pages lies at least [`Budget::every`], and so much more that what the last round sent
//! and took stays within the budget on average. A round itself is bounded, so that nothing has to be saved up or cut off.
//! A stop with few pages is short in any case: while there are no more, they are left for it, and looked at seldom. Each look
//! takes processor time, and each page that is shipped and then written again costs the guest a fault, and the link a page.
//! Pure: it reads no clock and knows no page.

use checkpoint::{Duration, Instant};

/// Pages that one round ships at most.
const ROUND_PAGES_MAX: u64 = 512;

/// What may be spent on shipping ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Shortest time from one look to the next.
    pub every: Duration,
    /// The same while few pages are dirty.
    pub seldom: Duration,
    /// Fewer dirty pages than these are few: nothing is shipped.
    pub few_pages: u64,
    /// Bytes on the link in a second; with none, pages are looked at and not shipped.
    pub bytes_per_second: u64,
    /// Share of the time, in percent, in which the threads may be busy with it.
    pub busy_percent: u64,
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            every: Duration::from_millis(5),
            seldom: Duration::from_millis(25),
            few_pages: 1_024,
            bytes_per_second: 128 * 1024 * 1024,
            busy_percent: 25,
        }
    }
}

impl Budget {
    /// Returns how many pages one round may ship, of so many that are expected to be dirty.
    #[must_use]
    pub fn round_pages(&self, dirty: u64) -> u64 {
        if self.bytes_per_second == 0 || dirty < self.few_pages {
            0
        } else {
            ROUND_PAGES_MAX
        }
    }

    /// Returns the shortest time to the next look, with so many pages dirty. It becomes short before they are many.
    #[must_use]
    pub fn interval(&self, dirty: u64) -> Duration {
        if dirty < self.few_pages / 2 {
            self.seldom
        } else {
            self.every
        }
    }

    /// Returns when the next look is due after one that began at `began`, sent `bytes` and kept threads busy for `busy`, and `every`
    /// after it at the earliest.
    #[must_use]
    pub fn next(&self, began: Instant, every: Duration, bytes: u64, busy: Duration) -> Instant {
        let sending = scaled(bytes, 1_000_000_000, self.bytes_per_second);
        let working = scaled(busy.0, 100, self.busy_percent);
        began + Duration(every.0.max(sending).max(working))
    }
}

/// Computes `amount` × `times` ÷ `by`, at most what fits.
fn scaled(amount: u64, times: u64, by: u64) -> u64 {
    let scaled = u128::from(amount) * u128::from(times) / u128::from(by.max(1));
    u64::try_from(scaled).unwrap_or(u64::MAX / 2).min(u64::MAX / 2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BUDGET: Budget = Budget {
        every: Duration::from_millis(5),
        seldom: Duration::from_millis(25),
        few_pages: 100,
        bytes_per_second: 1_000_000,
        busy_percent: 25,
    };

    fn wait(bytes: u64, busy: Duration) -> u64 {
        BUDGET
            .next(Instant(7), BUDGET.every, bytes, busy)
            .since(Instant(7))
            .as_millis()
    }

    #[test]
    fn a_round_that_cost_little_is_followed_after_the_shortest_time() {
        assert_eq!(wait(0, Duration(0)), 5);
        assert_eq!(wait(5_000, Duration::from_millis(1)), 5);
    }

    #[test]
    fn few_pages_are_left_for_the_stop_and_looked_at_seldom_until_they_grow() {
        assert_eq!((BUDGET.round_pages(99), BUDGET.round_pages(100)), (0, ROUND_PAGES_MAX));
        assert_eq!(
            (BUDGET.interval(49), BUDGET.interval(50)),
            (BUDGET.seldom, BUDGET.every)
        );
        let all = Budget { few_pages: 0, ..BUDGET };
        assert_eq!((all.round_pages(0), all.interval(0)), (ROUND_PAGES_MAX, BUDGET.every));
    }

    #[test]
    fn the_dearer_of_link_and_processor_decides() {
        assert_eq!(wait(20_000, Duration::from_millis(1)), 20);
        assert_eq!(wait(20_000, Duration::from_millis(10)), 40);
    }

    #[test]
    fn nothing_allowed_is_never_and_no_overflow() {
        let none = Budget {
            bytes_per_second: 0,
            busy_percent: 0,
            ..BUDGET
        };
        assert!(none.next(Instant(1), none.every, u64::MAX, Duration(u64::MAX)) > Instant(u64::MAX / 2));
    }

    proptest! {
        /// Whatever rounds cost, over any stretch of them no more is spent than the budget says.
        #[test]
        fn the_average_is_kept(rounds in proptest::collection::vec((0_u64..2_000_000, 0_u64..50), 1..50)) {
            let (mut at, mut bytes, mut busy) = (Instant(0), 0, 0);
            for (sent, worked) in rounds {
                // A round is over before the next begins.
                at = BUDGET.next(at, BUDGET.every, sent, Duration::from_millis(worked));
                bytes += sent;
                busy += worked;
            }
            let span = at.0 / 1_000_000;
            prop_assert!(bytes <= BUDGET.bytes_per_second / 1_000 * span + 1_000);
            prop_assert!(busy * 100 <= span * BUDGET.busy_percent + 100);
        }
    }
}
