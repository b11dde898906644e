//! How often which fault met which step of the protocol.

use std::collections::BTreeMap;
use std::fmt;

use crate::faults::Kind;

/// Every step of both roles, and the two of a host without a role: `Primary::phase`, `Secondary::phase`.
pub const STEPS: [&str; 31] = [
    // Of the primary.
    "alone",
    "pairing",
    "syncing",
    "stopping first",
    "copying first",
    "sending first",
    "awaiting first",
    "protected",
    "stopping",
    "copying",
    "comparing",
    "sending",
    "awaiting",
    "contending",
    // Of the secondary.
    "idle",
    "receiving",
    "gathering",
    "checking",
    "recording",
    "halting",
    "standing",
    "answering",
    "loading",
    "committing",
    "following",
    "draining",
    "severed",
    "claiming",
    "won",
    "recorded",
    // Of neither.
    "waiting",
];

/// Why a fault can't meet a step; nothing if it can.
#[must_use]
pub fn impossible(step: &str, kind: Kind) -> Option<&'static str> {
    let unlinked = matches!(
        step,
        "alone" | "contending" | "severed" | "claiming" | "won" | "recorded" | "waiting"
    );
    if kind.strikes_the_link() && unlinked {
        return Some("the pair has no link in this step, or the host has closed its end");
    }
    None
}

/// The counts.
#[derive(Clone, Debug, Default)]
pub struct Coverage {
    met: BTreeMap<(&'static str, Kind), u64>,
    /// Seeds in which a primary went over to buffered epochs and back.
    pub switched: u64,
    /// Seeds in which a primary did not compare some flow.
    pub buffered_flow: u64,
}

impl Coverage {
    /// Notes that a fault came while a host was at that step.
    pub fn note(&mut self, step: &'static str, kind: Kind) {
        *self.met.entry((step, kind)).or_default() += 1;
    }

    /// Adds another count.
    pub fn add(&mut self, other: &Self) {
        for (pair, count) in &other.met {
            *self.met.entry(*pair).or_default() += count;
        }
        self.switched += other.switched;
        self.buffered_flow += other.buffered_flow;
    }

    /// Returns the pairs that are possible and came less often, with their counts.
    #[must_use]
    pub fn below(&self, least: u64) -> Vec<(&'static str, Kind, u64)> {
        STEPS
            .into_iter()
            .flat_map(|step| Kind::ALL.map(|kind| (step, kind)))
            .filter(|(step, kind)| impossible(step, *kind).is_none())
            .map(|(step, kind)| (step, kind, self.met.get(&(step, kind)).copied().unwrap_or_default()))
            .filter(|(.., count)| *count < least)
            .collect()
    }
}

impl fmt::Display for Coverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<15} least  faults", "step")?;
        for step in STEPS {
            let count = |kind| self.met.get(&(step, kind)).copied().unwrap_or_default();
            let possible = Kind::ALL
                .into_iter()
                .filter(|kind| impossible(step, *kind).is_none())
                .map(|kind| (kind, count(kind)));
            let least = possible.clone().map(|(_, count)| count).min().unwrap_or_default();
            let all: Vec<_> = possible.map(|(kind, count)| format!("{kind:?} {count}")).collect();
            writeln!(f, "{step:<15} {least:>5}  {}", all.join(", "))?;
        }
        let Self {
            switched,
            buffered_flow,
            ..
        } = self;
        writeln!(
            f,
            "switched there and back in {switched} seeds, a flow buffered in {buffered_flow}"
        )
    }
}
