//! Random choices that can be repeated.

use std::time::Duration;

/// A small generator (SplitMix64): its seed is all there is to it.
#[derive(Debug)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Draws a span of time from `from` up to `to`.
    pub(super) fn span(&mut self, from: Duration, to: Duration) -> Duration {
        let width = u64::try_from((to - from).as_nanos()).unwrap_or(u64::MAX);
        from + Duration::from_nanos(self.next() % width.max(1))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_spans_within_their_bounds() {
        let (from, to) = (Duration::from_millis(10), Duration::from_millis(20));
        let draw = |seed| {
            let mut random = Random::new(seed);
            std::array::from_fn::<_, 50, _>(|_| random.span(from, to))
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
        assert!(draw(3).iter().all(|span| (from..to).contains(span)));
    }
}
