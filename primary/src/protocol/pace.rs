//! How much is spent on pages before a stop: of the link, of a processor, of the guest's faults.
//!
//! Between two looks at the dirty pages lies at least [`Budget::every`], and so much more that what the last round sent
//! and took stays within the budget on average. A round itself is bounded, so that nothing has to be saved up or cut off.
//! Pure: it reads no clock and knows no page.

use checkpoint::{Duration, Instant};

/// Pages that one round ships at most.
const ROUND_PAGES_MAX: u64 = 512;

/// What may be spent on shipping ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Shortest time from one look to the next.
    pub every: Duration,
    /// Bytes on the link in a second; with none, pages are looked at and not shipped.
    pub bytes_per_second: u64,
    /// Share of the time, in percent, in which the threads may be busy with it.
    pub busy_percent: u64,
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            every: Duration::from_millis(5),
            bytes_per_second: 128 * 1024 * 1024,
            busy_percent: 25,
        }
    }
}

impl Budget {
    /// Returns how many pages one round may ship.
    #[must_use]
    pub fn round_pages(&self) -> u64 {
        if self.bytes_per_second == 0 { 0 } else { ROUND_PAGES_MAX }
    }

    /// Returns when the next look is due after one that began at `began`, sent `bytes` and kept threads busy for `busy`.
    #[must_use]
    pub fn next(&self, began: Instant, bytes: u64, busy: Duration) -> Instant {
        let sending = scaled(bytes, 1_000_000_000, self.bytes_per_second);
        let working = scaled(busy.0, 100, self.busy_percent);
        began + Duration(self.every.0.max(sending).max(working))
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
        bytes_per_second: 1_000_000,
        busy_percent: 25,
    };

    fn wait(bytes: u64, busy: Duration) -> u64 {
        BUDGET.next(Instant(7), bytes, busy).since(Instant(7)).as_millis()
    }

    #[test]
    fn a_round_that_cost_little_is_followed_after_the_shortest_time() {
        assert_eq!(wait(0, Duration(0)), 5);
        assert_eq!(wait(5_000, Duration::from_millis(1)), 5);
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
        assert!(none.next(Instant(1), u64::MAX, Duration(u64::MAX)) > Instant(u64::MAX / 2));
    }

    proptest! {
        /// Whatever rounds cost, over any stretch of them no more is spent than the budget says.
        #[test]
        fn the_average_is_kept(rounds in proptest::collection::vec((0_u64..2_000_000, 0_u64..50), 1..50)) {
            let (mut at, mut bytes, mut busy) = (Instant(0), 0, 0);
            for (sent, worked) in rounds {
                // A round is over before the next begins.
                at = BUDGET.next(at, sent, Duration::from_millis(worked));
                bytes += sent;
                busy += worked;
            }
            let span = at.0 / 1_000_000;
            prop_assert!(bytes <= BUDGET.bytes_per_second / 1_000 * span + 1_000);
            prop_assert!(busy * 100 <= span * BUDGET.busy_percent + 100);
        }
    }
}
