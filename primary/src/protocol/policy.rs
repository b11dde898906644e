//! Whether the next epoch is run in lockstep or buffered, with `--mode auto`: decided from what checkpoints cost.
//!
//! ```text
//!              differences take as much time as buffering would, and most output waits for checkpoints
//!   Lockstep ──────────────────────────────────────────────────────────────────────────────────────────► Buffered
//!       ▲                                                                                                   │
//!       └──────────────────────── the back-off is over: tried again for a window at least ──────────────────┘
//! ```
//!
//! In lockstep a checkpoint is taken for a difference, and costs the time from its stop to its load; buffered, one is taken in each
//! period, whatever the guests say. What both cost is the share of time in which a checkpoint is under way. A window of
//! lockstep is judged as a whole, so that no single difference decides; each failed trial doubles the back-off. So two switches
//! are never closer than a window, and two of the same kind never closer than a window and the shortest back-off.
//!
//! Driven by `primary::protocol` at the end of each epoch. Never reads a clock.

use core::fmt;

use checkpoint::{Duration, EpochMode, Instant};
use proxy::FlowPatience;

/// How long the policy looks before it decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// Shortest time in lockstep from which its cost is judged.
    pub window: Duration,
    /// Shortest time that the VM stays buffered.
    pub backoff_min: Duration,
    /// Longest time that it stays so.
    pub backoff_max: Duration,
    /// Lockstep is given up when differences cost this much of what buffering costs, in percent,
    pub cost: u64,
    /// and this much of the output waited for checkpoints all the same, in percent.
    pub waiting: u64,
    /// The same for single flows.
    pub flow: FlowPatience,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            window: Duration::from_millis(500),
            backoff_min: Duration::from_millis(2_000),
            backoff_max: Duration::from_millis(60_000),
            cost: 80,
            waiting: 50,
            flow: FlowPatience::default(),
        }
    }
}

/// Weight of the newest checkpoint in the mean cost: one in so many.
const SMOOTHING: u64 = 8;

/// Frames that have left since the begin, by what let them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Left {
    /// The secondary's guest said the same.
    pub(crate) equal: u64,
    /// A checkpoint covered them.
    pub(crate) committed: u64,
}

/// What a window of lockstep has shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Measured {
    span: Duration,
    /// Time in which a checkpoint for a difference was under way.
    spent: Duration,
    differences: u64,
}

/// The state machine; see the module.
#[derive(Debug)]
pub(crate) struct Policy {
    patience: Patience,
    period: Duration,
    mode: EpochMode,
    /// When the mode was chosen.
    since: Instant,
    /// When the window began, and what had left by then.
    window: (Instant, Left),
    measured: Measured,
    /// What the last whole window showed.
    last: Measured,
    /// Mean time from a stop to its load.
    cost: Duration,
    backoff: Duration,
}

impl Policy {
    pub(crate) fn new(patience: Patience, period: Duration, now: Instant) -> Self {
        Self {
            patience,
            period,
            mode: EpochMode::Lockstep,
            since: now,
            window: (now, Left::default()),
            measured: Measured::default(),
            last: Measured::default(),
            cost: Duration(0),
            backoff: Duration(0),
        }
    }

    /// A pairing begins: nothing is known of what checkpoints cost with this secondary.
    pub(crate) fn restart(&mut self, now: Instant, left: Left) {
        *self = Self::new(self.patience, self.period, now);
        self.window.1 = left;
    }

    /// A checkpoint has been loaded, so long after its stop was asked for; `difference`: in lockstep, output waited for it.
    pub(crate) fn checkpointed(&mut self, took: Duration, difference: bool) {
        self.cost = if self.cost.0 == 0 {
            took
        } else {
            Duration(self.cost.0 - self.cost.0 / SMOOTHING + took.0 / SMOOTHING)
        };
        if difference {
            self.measured.spent = Duration(self.measured.spent.0.saturating_add(took.0));
            self.measured.differences += 1;
        }
    }

    /// Decides the mode of the epoch that begins now.
    pub(crate) fn decide(&mut self, now: Instant, left: Left) -> EpochMode {
        match self.mode {
            EpochMode::Lockstep => {
                let span = now.since(self.window.0);
                if span >= self.patience.window {
                    let before = self.window.1;
                    self.last = Measured { span, ..self.measured };
                    self.measured = Measured::default();
                    self.window = (now, left);
                    let equal = left.equal.saturating_sub(before.equal);
                    let committed = left.committed.saturating_sub(before.committed);
                    let waiting =
                        committed.saturating_mul(100) >= (equal + committed).saturating_mul(self.patience.waiting);
                    if waiting && self.is_dear() {
                        self.give_up(now);
                    }
                }
            }
            EpochMode::Buffered => {
                if now >= self.since + self.backoff {
                    self.mode = EpochMode::Lockstep;
                    self.since = now;
                    self.window = (now, left);
                    self.measured = Measured::default();
                    self.last = Measured::default();
                }
            }
        }
        self.mode
    }

    /// Says whether the last window of lockstep cost about as much as buffering does.
    fn is_dear(&self) -> bool {
        let buffered = self.cost.0.max(self.period.0).max(1);
        let [spent, span, cost, buffered] =
            [self.last.spent.0, self.last.span.0, self.cost.0, buffered].map(u128::from);
        // spent / span >= percentage of (cost / max(cost, period)), without division
        self.last.differences > 0 && spent * buffered * 100 >= span * cost * u128::from(self.patience.cost)
    }

    /// A trial that did not last as long as the back-off before it doubles that.
    fn give_up(&mut self, now: Instant) {
        let lasted = now.since(self.since);
        self.backoff = if self.backoff.0 > 0 && lasted <= self.backoff {
            Duration(self.backoff.0.saturating_mul(2)).min(self.patience.backoff_max)
        } else {
            self.patience.backoff_min
        };
        self.mode = EpochMode::Buffered;
        self.since = now;
    }
}

impl fmt::Display for Policy {
    /// Tells why the mode is as it is.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Measured {
            span,
            spent,
            differences,
        } = self.last;
        let percent = u128::from(spent.0) * 100 / u128::from(span.0.max(1));
        let rate = u128::from(differences) * 1_000_000_000 / u128::from(span.0.max(1));
        match self.mode {
            EpochMode::Buffered => write!(
                f,
                "in lockstep {rate} differences a second took {percent}% of the time; it is tried again after {} ms",
                self.backoff.as_millis()
            ),
            EpochMode::Lockstep if span.0 == 0 && self.backoff.0 > 0 => {
                write!(f, "tried again after {} ms", self.backoff.as_millis())
            }
            EpochMode::Lockstep if span.0 == 0 => f.write_str("the guests have not been watched for long"),
            EpochMode::Lockstep => write!(f, "{rate} differences a second take {percent}% of the time"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PERIOD: Duration = Duration::from_millis(5);

    fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    struct Bench {
        policy: Policy,
        now: Instant,
        left: Left,
        switches: Vec<(Instant, EpochMode)>,
    }

    impl Bench {
        fn new() -> Self {
            let now = Instant(1_000_000_000);
            Self {
                policy: Policy::new(Patience::default(), PERIOD, now),
                now,
                left: Left::default(),
                switches: Vec::new(),
            }
        }

        /// An epoch of this length ends, with a checkpoint that took so long.
        fn epoch(&mut self, length: Duration, took: Duration, difference: bool) {
            let before = self.policy.mode;
            self.now += length;
            if difference || before == EpochMode::Buffered {
                self.left.committed += 3;
            } else {
                self.left.equal += 3;
            }
            let mode = self.policy.decide(self.now, self.left);
            if mode != before {
                self.switches.push((self.now, mode));
            }
            self.now += took;
            self.policy
                .checkpointed(took, difference && before == EpochMode::Lockstep);
        }

        fn run(&mut self, span: Duration, length: Duration, took: Duration, difference: bool) {
            let end = self.now + span;
            while self.now < end {
                self.epoch(length, took, difference);
            }
        }

        fn modes(&self) -> Vec<EpochMode> {
            self.switches.iter().map(|(_, mode)| *mode).collect()
        }
    }

    #[test]
    fn guests_that_agree_stay_in_lockstep() {
        let mut bench = Bench::new();
        bench.run(ms(60_000), ms(1_000), ms(3), false);
        assert_eq!(bench.modes(), []);
    }

    #[test]
    fn few_differences_cost_less_than_a_checkpoint_in_each_period() {
        let mut bench = Bench::new();
        bench.run(ms(60_000), ms(50), ms(3), true);
        assert_eq!(bench.modes(), []);
    }

    #[test]
    fn differences_all_the_time_are_buffered_and_lockstep_is_tried_ever_less_often() {
        let mut bench = Bench::new();
        bench.run(ms(300_000), ms(1), ms(3), true);
        let buffered: Vec<Instant> = bench
            .switches
            .iter()
            .filter(|(_, mode)| *mode == EpochMode::Buffered)
            .map(|(at, _)| *at)
            .collect();
        let gaps: Vec<u64> = buffered
            .windows(2)
            .map(|pair| pair[1].since(pair[0]).as_millis() / 1_000)
            .collect();
        assert_eq!(gaps[..4], [2, 4, 8, 16], "{gaps:?}");
        assert!(gaps.iter().all(|gap| *gap <= 61), "{gaps:?}");
    }

    #[test]
    fn guests_that_agree_again_come_back_to_lockstep_and_stay() {
        let mut bench = Bench::new();
        bench.run(ms(30_000), ms(1), ms(3), true);
        bench.run(ms(120_000), ms(5), ms(3), false);
        assert_eq!(bench.policy.mode, EpochMode::Lockstep);
        let count = bench.switches.len();
        bench.run(ms(120_000), ms(1_000), ms(3), false);
        assert_eq!(bench.switches.len(), count);
        // What was long ago counts no more.
        bench.run(ms(2_000), ms(1), ms(3), true);
        assert_eq!(bench.policy.mode, EpochMode::Buffered);
        assert_eq!(bench.policy.backoff, Patience::default().backoff_min);
    }

    #[test]
    fn output_that_mostly_agrees_keeps_the_vm_in_lockstep_whatever_one_flow_costs() {
        let mut bench = Bench::new();
        for _ in 0..10_000 {
            bench.left.equal += 10;
            bench.epoch(ms(1), ms(3), true);
        }
        assert_eq!(bench.modes(), []);
    }

    proptest! {
        #[test]
        fn it_never_flaps_and_always_comes_back(
            epochs in proptest::collection::vec((0u64..30_000, 0u64..20_000, any::<bool>()), 1..2_000),
        ) {
            let mut bench = Bench::new();
            for (length, took, difference) in epochs {
                bench.epoch(Duration::from_micros(length), Duration::from_micros(took), difference);
            }
            let Patience { window, backoff_min, backoff_max, .. } = Patience::default();
            for pair in bench.switches.windows(2) {
                let least = if pair[0].1 == EpochMode::Buffered { backoff_min } else { window };
                prop_assert!(pair[0].1 != pair[1].1);
                prop_assert!(pair[1].0.since(pair[0].0) >= least);
            }
            bench.run(Duration(backoff_max.0 + window.0), ms(5), ms(3), false);
            prop_assert_eq!(bench.policy.mode, EpochMode::Lockstep);
        }
    }
}
