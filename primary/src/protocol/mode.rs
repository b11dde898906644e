//! When checkpoints are taken, and whether the secondary's guest runs between two: what the operator set, and what follows from it.
//!
//! A mode is one epoch's: it is decided at the stop that ends the epoch before, and the end mark tells the secondary.

use core::fmt;
use core::str::FromStr;

use super::{EpochMode, Instant, Primary, Trigger};

/// When a checkpoint is taken, and whether the secondary's guest runs between two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Both guests run; a checkpoint is taken when their outputs differ.
    #[default]
    Lockstep,
    /// Only the primary's guest runs; a checkpoint is taken every few milliseconds, and output waits for it.
    Buffered,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lockstep => "lockstep",
            Self::Buffered => "buffered",
        })
    }
}

impl FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "lockstep" => Ok(Self::Lockstep),
            "buffered" => Ok(Self::Buffered),
            _ => Err(format!("'{text}' is no mode: say lockstep or buffered")),
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
        }
    }

    /// Decides the mode of the epoch that begins.
    pub(super) fn next_mode(&self) -> EpochMode {
        match self.options.mode {
            Mode::Lockstep => EpochMode::Lockstep,
            Mode::Buffered => EpochMode::Buffered,
        }
    }

    /// Returns when the next checkpoint is due if nothing else asks for one, and what for; the last was acknowledged then.
    pub(super) fn checkpoint_due(&self, acknowledged: Instant) -> (Instant, Trigger) {
        let age = (acknowledged + self.options.epoch_age_max, Trigger::Age);
        match self.epoch_mode {
            EpochMode::Lockstep => age,
            EpochMode::Buffered => age.min((self.began + self.options.checkpoint_every, Trigger::Period)),
        }
    }
}
