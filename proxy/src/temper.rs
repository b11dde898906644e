//! Whether a flow's output is compared or waits for checkpoints: pure, one for each flow, and one for each service that
//! differs (see `service`).
//!
//! ```text
//!   compared ──differences in a row──► buffered ──back-off over──► compared, on trial ──no difference for as long──► compared
//!                                         ▲                            │ one difference: twice the back-off
//!                                         └────────────────────────────┘
//! ```
//!
//! Each difference costs a checkpoint at once; a buffered flow waits for one in each period at most. A change counts from the
//! beginning of an epoch, so a flow is never buffered for less than the shortest back-off.

use checkpoint::{Duration, Epoch, Instant};

/// How much a flow, or one flow after the other of a service, may differ before it is buffered, and for how long it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowPatience {
    /// Differences in a row after which it is buffered.
    pub strikes: u32,
    /// Differences further apart than this are not in a row.
    pub row: Duration,
    /// Flows of a service that differ in a row before all of them are buffered.
    pub service_strikes: u32,
    /// Flows of a service that differ further apart than this are not in a row. It takes those along that agree, so it has
    /// to be worth it: each would cost a checkpoint.
    pub service_row: Duration,
    /// How long it is buffered at first.
    pub backoff_min: Duration,
    /// How long it is buffered at most.
    pub backoff_max: Duration,
}

/// What a temper is measured by.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    pub(crate) strikes: u32,
    pub(crate) row: Duration,
    pub(crate) backoff_min: Duration,
    pub(crate) backoff_max: Duration,
}

impl FlowPatience {
    pub(crate) fn of_flows(&self) -> Patience {
        Patience {
            strikes: self.strikes,
            row: self.row,
            backoff_min: self.backoff_min,
            backoff_max: self.backoff_max,
        }
    }

    pub(crate) fn of_services(&self) -> Patience {
        Patience {
            strikes: self.service_strikes,
            row: self.service_row,
            ..self.of_flows()
        }
    }
}

impl Default for FlowPatience {
    fn default() -> Self {
        Self {
            strikes: 3,
            row: Duration::from_millis(1_000),
            service_strikes: 3,
            service_row: Duration::from_millis(250),
            backoff_min: Duration::from_millis(1_000),
            backoff_max: Duration::from_millis(64_000),
        }
    }
}

/// What is known of the differences of a flow or service.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Temper {
    /// Differences in a row, and the epoch and time of the last.
    strikes: u32,
    last: Option<(Epoch, Instant)>,
    /// Since when it is buffered.
    buffered: Option<Instant>,
    backoff: Duration,
    /// Since when it is on trial.
    trial: Option<Instant>,
}

impl Temper {
    /// Says whether its output waits for commits, in the epoch that is compared.
    pub(crate) fn is_buffered(&self) -> bool {
        self.buffered.is_some()
    }

    /// Says whether nothing is left of it to remember.
    pub(crate) fn is_settled(&self, now: Instant, patience: &Patience) -> bool {
        let in_a_row = self.last.is_some_and(|(_, at)| now.since(at) <= patience.row);
        !self.is_buffered() && self.trial.is_none() && !in_a_row
    }

    /// The two sides differed on it in this epoch, or one waited too long for the other.
    pub(crate) fn differed(&mut self, now: Instant, epoch: Epoch, patience: &Patience) {
        if self.last.is_some_and(|(last, _)| last == epoch) {
            return;
        }
        let in_a_row = self.last.is_some_and(|(_, at)| now.since(at) <= patience.row);
        self.strikes = if in_a_row { self.strikes.saturating_add(1) } else { 1 };
        self.last = Some((epoch, now));
    }

    /// Decides for the epoch that is compared from now on.
    pub(crate) fn decide(&mut self, now: Instant, patience: &Patience) {
        if let Some(since) = self.buffered {
            if now >= since + self.backoff {
                *self = Self {
                    backoff: self.backoff,
                    trial: Some(now),
                    ..Self::default()
                };
            }
            return;
        }
        if self.trial.is_some_and(|since| now.since(since) > self.backoff) {
            (self.trial, self.backoff) = (None, Duration(0));
        }
        let failed = self.trial.is_some() && self.strikes > 0;
        if failed || self.strikes >= patience.strikes {
            let backoff = if failed {
                Duration(self.backoff.0.saturating_mul(2)).min(patience.backoff_max)
            } else {
                patience.backoff_min
            };
            *self = Self {
                buffered: Some(now),
                backoff,
                ..Self::default()
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn patience() -> Patience {
        FlowPatience::default().of_flows()
    }

    fn at(millis: u64) -> Instant {
        Instant(1_000_000_000) + Duration::from_millis(millis)
    }

    #[test]
    fn differences_in_a_row_buffer_a_flow_and_each_failed_trial_doubles_the_time() {
        let mut temper = Temper::default();
        let (mut now, mut epoch) = (0, 0);
        let mut changes = Vec::new();
        while now < 200_000 {
            let before = temper.is_buffered();
            if !before {
                temper.differed(at(now), Epoch(epoch), &patience());
            }
            temper.decide(at(now), &patience());
            if temper.is_buffered() != before {
                changes.push(now);
            }
            (now, epoch) = (now + 100, epoch + 1);
        }
        let spans: Vec<u64> = changes
            .chunks(2)
            .filter_map(|pair| Some(pair.get(1)? - pair[0]))
            .collect();
        assert_eq!(changes[0], 200, "the third difference");
        assert_eq!(spans[..7], [1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 64_000]);
    }

    #[test]
    fn rare_differences_and_many_in_one_epoch_are_no_row() {
        let mut temper = Temper::default();
        for number in 0..100 {
            for _ in 0..10 {
                temper.differed(at(number * 1_001), Epoch(number), &patience());
            }
            temper.decide(at(number * 1_001), &patience());
            assert!(!temper.is_buffered());
        }
    }

    proptest! {
        #[test]
        fn a_flow_never_flaps_and_comes_back(
            steps in proptest::collection::vec((0u64..400, any::<bool>()), 1..1_000),
        ) {
            let mut temper = Temper::default();
            let mut now = 0;
            let mut since = None;
            for (epoch, (wait, differs)) in (0..).zip(steps) {
                now += wait;
                let before = temper.is_buffered();
                if differs && !before {
                    temper.differed(at(now), Epoch(epoch), &patience());
                }
                temper.decide(at(now), &patience());
                match (before, temper.is_buffered()) {
                    (false, true) => since = Some(now),
                    (true, false) => prop_assert!(now - since.expect("it was buffered") >= patience().backoff_min.as_millis()),
                    _ => {}
                }
            }
            temper.decide(at(now) + patience().backoff_max, &patience());
            temper.decide(at(now) + patience().backoff_max + patience().backoff_max + Duration(1), &patience());
            prop_assert!(!temper.is_buffered());
        }
    }
}
