//! When checkpoints are taken, and whether the secondary's guest runs between two: what the operator set, and what follows from it.
//!
//! A mode is one epoch's: it is decided at the stop that ends the epoch before, and the end mark tells the secondary.

use core::fmt;
use core::str::FromStr;

use super::policy::Left;
use super::{Action, EpochMode, Instant, Primary, Report, Trigger};

/// When a checkpoint is taken, and whether the secondary's guest runs between two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Both guests run; a checkpoint is taken when their outputs differ.
    #[default]
    Lockstep,
    /// Only the primary's guest runs; a checkpoint is taken every few milliseconds, and output waits for it.
    Buffered,
    /// Lockstep; a flow on which the outputs keep differing waits for checkpoints, and the VM is buffered while that costs less.
    Auto,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lockstep => "lockstep",
            Self::Buffered => "buffered",
            Self::Auto => "auto",
        })
    }
}

impl FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "lockstep" => Ok(Self::Lockstep),
            "buffered" => Ok(Self::Buffered),
            "auto" => Ok(Self::Auto),
            _ => Err(format!("'{text}' is no mode: say lockstep, buffered or auto")),
        }
    }
}

impl Primary {
    /// Returns whether the secondary's guest runs too, while it is protected.
    #[must_use]
    pub fn epoch_mode(&self) -> EpochMode {
        self.epoch_mode
    }

    /// Returns what the operator set.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.options.mode
    }

    /// Tells why the epoch has its mode.
    #[must_use]
    pub fn mode_reason(&self) -> String {
        match self.options.mode {
            Mode::Lockstep => "output leaves when both guests have sent the same; set with --mode".to_owned(),
            Mode::Buffered => format!(
                "output waits for a checkpoint, one every {}; set with --mode",
                self.options.checkpoint_every
            ),
            Mode::Auto => format!("{} (auto)", self.policy),
        }
    }

    /// Decides the mode of the epoch that begins with this checkpoint.
    pub(super) fn next_mode(&mut self, now: Instant, trigger: Trigger, actions: &mut Vec<Action>) -> EpochMode {
        match self.options.mode {
            Mode::Lockstep => return EpochMode::Lockstep,
            Mode::Buffered => return EpochMode::Buffered,
            Mode::Auto => {}
        }
        let sums = self.comparators.counters().total();
        let left = Left {
            equal: sums.matched,
            committed: sums.committed,
        };
        if trigger == Trigger::Sync {
            self.policy.restart(now, left);
            return EpochMode::Lockstep;
        }
        let next = self.policy.decide(now, left);
        if next != self.epoch_mode {
            self.counters.switches += 1;
            actions.push(Action::Report(Report::Note(format!(
                "{next} from here on: {}",
                self.policy
            ))));
        }
        next
    }

    /// Returns when the next checkpoint is due if nothing else asks for one, and what for; the last was acknowledged then.
    pub(super) fn checkpoint_due(&self, acknowledged: Instant) -> (Instant, Trigger) {
        let age = (acknowledged + self.options.epoch_age_max, Trigger::Age);
        let period = match self.epoch_mode {
            EpochMode::Buffered => self.options.checkpoint_every,
            // Frames behind them in the hold may wait for equals.
            EpochMode::Lockstep if self.comparators.waits_for_commit() => {
                self.options.checkpoint_every.min(self.options.unmatched_max)
            }
            EpochMode::Lockstep => return age,
        };
        age.min((self.began + period, Trigger::Period))
    }
}
