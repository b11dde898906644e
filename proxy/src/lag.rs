//! How long output of the primary waits for its equal before it counts as unmatched: pure, one for all flows.
//!
//! Each match tells how far the secondary's output trails the primary's. The bound is a multiple of the most of the last
//! half minute, between two limits; it is the upper one as long as little has been measured. One that is too tight costs a
//! checkpoint for nothing, one that is too loose only the rest of a wait that the operator has agreed to: so it is
//! the most that counts and not what is usual, and one that was reached is doubled.

use checkpoint::{Duration, Instant};

/// How many times as long as the most measured a frame may wait.
const FACTOR: u64 = 4;
/// Measurements that a bound needs.
const MATCHES_MIN: u64 = 64;
/// What was measured is forgotten in steps of this.
const SLOT: Duration = Duration::from_millis(4_000);
/// Steps that are remembered, the running one included.
const SLOTS: usize = 8;

/// How far the secondary's output trails the primary's, and what follows from it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lag {
    /// The most of the last half minute.
    pub most: Duration,
    /// Matches it was measured at.
    pub matches: u64,
    /// How long a frame of the primary may wait for its equal now.
    pub bound: Duration,
}

/// What was measured lately.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct LagMeter {
    slots: [Slot; SLOTS],
    /// When the running step began, in steps.
    step: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    matches: u64,
    most: Duration,
}

impl LagMeter {
    /// Takes a match: the secondary's output came so much later.
    pub(crate) fn matched(&mut self, now: Instant, lag: Duration) {
        self.forget(now);
        let slot = &mut self.slots[0];
        slot.matches += 1;
        slot.most = slot.most.max(lag);
    }

    /// The bound was reached. The secondary may have become slower all of a sudden: it is given twice as long from now on.
    pub(crate) fn exceeded(&mut self, now: Instant, bound: Duration) {
        self.forget(now);
        let slot = &mut self.slots[0];
        slot.most = slot.most.max(Duration(bound.0.saturating_mul(2) / FACTOR));
    }

    /// Forgets what is too old. The bound changes here and with a match only.
    pub(crate) fn forget(&mut self, now: Instant) {
        let step = now.0 / SLOT.0;
        let passed = usize::try_from(step.saturating_sub(self.step))
            .unwrap_or(SLOTS)
            .min(SLOTS);
        if passed > 0 {
            self.slots.rotate_right(passed);
            self.slots[..passed].fill(Slot::default());
            self.step = step;
        }
    }

    /// Returns how long a frame may wait: between `least` and `limit`.
    pub(crate) fn bound(&self, least: Duration, limit: Duration) -> Duration {
        if self.matches() < MATCHES_MIN {
            return limit;
        }
        Duration(self.most().0.saturating_mul(FACTOR)).max(least).min(limit)
    }

    pub(crate) fn most(&self) -> Duration {
        self.slots.iter().map(|slot| slot.most).max().unwrap_or_default()
    }

    pub(crate) fn matches(&self) -> u64 {
        self.slots.iter().map(|slot| slot.matches).sum()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LEAST: Duration = Duration::from_millis(20);
    const LIMIT: Duration = Duration::from_millis(200);

    fn at(millis: u64) -> Instant {
        Instant(1_000_000_000_000) + Duration::from_millis(millis)
    }

    fn measured(millis: u64) -> LagMeter {
        let mut meter = LagMeter::default();
        for _ in 0..MATCHES_MIN {
            meter.matched(at(0), Duration::from_millis(millis));
        }
        meter
    }

    #[test]
    fn the_bound_follows_the_most_measured_between_its_limits() {
        let bound = |meter: &LagMeter| meter.bound(LEAST, LIMIT).as_millis();
        assert_eq!(bound(&LagMeter::default()), 200, "nothing is known");
        assert_eq!(bound(&measured(0)), 20);
        assert_eq!(bound(&measured(9)), 36);
        assert_eq!(bound(&measured(90)), 200);
        let mut meter = measured(1);
        meter.matched(at(1), Duration::from_millis(30));
        assert_eq!(bound(&meter), 120, "one that was slow counts");
        meter.forget(at(27_000));
        assert_eq!(bound(&meter), 120, "for half a minute");
        meter.forget(at(33_000));
        assert_eq!(bound(&meter), 200, "and then nothing is known again");
    }

    #[test]
    fn a_bound_that_is_reached_is_doubled_for_half_a_minute() {
        let mut meter = measured(0);
        for bound in [20, 40, 80, 160, 200, 200] {
            let now = meter.bound(LEAST, LIMIT);
            assert_eq!(now.as_millis(), bound);
            meter.exceeded(at(1), now);
        }
    }

    #[test]
    fn a_limit_below_the_least_is_a_limit() {
        let limit = Duration::from_millis(5);
        assert_eq!(measured(0).bound(LEAST, limit), limit);
    }

    proptest! {
        #[test]
        fn no_wait_that_was_just_measured_is_too_long(
            steps in proptest::collection::vec((0u64..5_000, 0u64..500_000_000), 1..200),
        ) {
            let mut meter = LagMeter::default();
            let mut now = at(0);
            for (wait, lag) in steps {
                now += Duration::from_millis(wait);
                let lag = Duration(lag);
                meter.matched(now, lag);
                let bound = meter.bound(LEAST, LIMIT);
                prop_assert!(bound >= LEAST && bound <= LIMIT);
                prop_assert!(bound > lag || bound == LIMIT || lag == Duration(0));
                let before = meter.bound(LEAST, LIMIT);
                meter.exceeded(now, before);
                prop_assert!(meter.bound(LEAST, LIMIT) >= before);
            }
        }
    }
}
