//! How long the next stop will take: a part that every stop has, and a price for each dirty page.
//!
//! Both are learned from the stops that there were: the straight line that fits them best, where an older stop counts for
//! less than a newer one. Pure: it is told pages and times.

use checkpoint::Duration;

/// What an older stop still counts for when a new one is learned.
const REMEMBERED: f64 = 0.9;
/// A stop that took longer than so many times what was expected counts as one that took this long: the host was busy elsewhere.
const SURPRISE_MAX: f64 = 4.0;
/// What is expected before anything was learned: stops of so many pages took so many nanoseconds. Measured on a host
/// under load (`docs/PERFORMANCE.md`).
const EXPECTED: [(u32, f64); 2] = [(0, 300e3), (10_000, 10e6)];
/// What these count for, beside a stop that was seen: a little for ever, so that stops of nearly one size say nothing of the price.
const EXPECTED_WEIGHT: f64 = 0.01;

/// What stops have cost.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Predictor {
    seen: Sums,
}

/// Sums over weighted points (pages, nanoseconds).
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    weight: f64,
    x: f64,
    y: f64,
    xx: f64,
    xy: f64,
}

impl Predictor {
    /// Returns how long a stop with so many dirty pages is expected to take.
    pub(super) fn predict(&self, pages: u64) -> Duration {
        duration(self.nanoseconds(count(pages)))
    }

    /// Says whether there was a stop to learn from.
    pub(super) fn has_learned(&self) -> bool {
        self.seen.weight > 0.0
    }

    /// Takes note of what a stop took.
    pub(super) fn learn(&mut self, pages: u64, took: Duration) {
        let x = count(pages);
        let y = count(took.0).min(SURPRISE_MAX * self.nanoseconds(x) + EXPECTED[0].1);
        self.seen = self.seen.scaled(REMEMBERED).plus(x, y, 1.0);
    }

    fn nanoseconds(&self, pages: f64) -> f64 {
        let all = EXPECTED
            .into_iter()
            .fold(self.seen, |sums, (x, y)| sums.plus(f64::from(x), y, EXPECTED_WEIGHT));
        let spread = all.weight * all.xx - all.x * all.x;
        // More pages never take less time, whatever chance the stops had.
        let price = ((all.weight * all.xy - all.x * all.y) / spread).max(0.0);
        let always = ((all.y - price * all.x) / all.weight).max(0.0);
        always + price * pages
    }
}

impl Sums {
    fn plus(self, x: f64, y: f64, weight: f64) -> Self {
        Self {
            weight: self.weight + weight,
            x: self.x + weight * x,
            y: self.y + weight * y,
            xx: self.xx + weight * x * x,
            xy: self.xy + weight * x * y,
        }
    }

    fn scaled(self, by: f64) -> Self {
        Self {
            weight: self.weight * by,
            x: self.x * by,
            y: self.y * by,
            xx: self.xx * by,
            xy: self.xy * by,
        }
    }
}

/// What is beyond 32 bits of microseconds or pages is as good as for ever.
fn count(number: u64) -> f64 {
    let (high, low) = (number >> 32, number & u64::from(u32::MAX));
    let part = |bits| f64::from(u32::try_from(bits).unwrap_or(u32::MAX));
    part(high) * 4_294_967_296.0 + part(low)
}

fn duration(nanoseconds: f64) -> Duration {
    core::time::Duration::try_from_secs_f64(nanoseconds / 1e9).map_or(Duration(u64::MAX), Duration::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const fn micros(count: u64) -> Duration {
        Duration::from_micros(count)
    }

    fn near(found: Duration, expected: Duration, percent: u64) {
        let off = found.0.abs_diff(expected.0);
        assert!(off * 100 <= expected.0 * percent, "{found} instead of about {expected}");
    }

    #[test]
    fn before_anything_is_learned_it_is_what_was_measured_once() {
        let predictor = Predictor::default();
        near(predictor.predict(0), micros(300), 1);
        near(predictor.predict(10_000), micros(10_000), 1);
    }

    #[test]
    fn both_parts_are_learned_from_stops_of_different_sizes() {
        let mut predictor = Predictor::default();
        for round in 0..60 {
            let pages = 500 + 1_000 * (round % 7);
            predictor.learn(pages, micros(2_000 + 3 * pages));
        }
        near(predictor.predict(100), micros(2_300), 10);
        near(predictor.predict(2_000), micros(8_000), 10);
    }

    #[test]
    fn stops_of_one_size_are_learned_for_that_size() {
        let mut predictor = Predictor::default();
        for _ in 0..60 {
            predictor.learn(1_000, micros(5_000));
        }
        near(predictor.predict(1_000), micros(5_000), 10);
        assert!(predictor.predict(2_000) > predictor.predict(1_000));
    }

    #[test]
    fn one_lost_time_slice_is_no_lesson() {
        let mut predictor = Predictor::default();
        for _ in 0..60 {
            predictor.learn(100, micros(400));
        }
        predictor.learn(100, micros(500_000));
        assert!(predictor.predict(100) < micros(1_200), "{}", predictor.predict(100));
        for _ in 0..30 {
            predictor.learn(100, micros(400));
        }
        near(predictor.predict(100), micros(400), 15);
    }

    #[test]
    fn a_host_that_has_become_slower_is_believed_after_a_while() {
        let mut predictor = Predictor::default();
        for _ in 0..60 {
            predictor.learn(100, micros(40_000));
        }
        near(predictor.predict(100), micros(40_000), 10);
    }

    proptest! {
        #[test]
        fn more_pages_never_take_less(stops in proptest::collection::vec((0_u64..1 << 40, 0_u64..1 << 60), 0..50), pages in any::<u32>()) {
            let mut predictor = Predictor::default();
            for (pages, took) in stops {
                predictor.learn(pages, Duration(took));
            }
            let few = predictor.predict(pages.into());
            prop_assert!(few <= predictor.predict(u64::from(pages) * 2));
        }
    }
}
