//! The demo: a pair on this machine, clients at work, a host killed, and the account of what was lost.
//!
//! ```text
//!   run ─► for each round ─► round ─┬─ crate::stage     a pair as real processes; nothing is left behind
//!                                   ├─ crate::clients
//!                                   └─ report            numbers of the round ─► totals, JSON
//!          story   what happens, with times
//! ```

mod random;
mod report;
mod round;
mod story;

use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use primary::protocol::Mode;
use random::Random;

use crate::stage::tidy::{Owner, Tidy};
use crate::stage::touchable_mib;
use crate::units::{ByteSize, Span};
use report::Report;
use story::Story;

/// What `demo` is told.
#[derive(Args, Clone, Debug)]
pub struct DemoOptions {
    /// Which host is killed
    #[arg(long, value_enum, default_value_t = Victim::Primary)]
    pub kill: Victim,
    /// Kill nobody: cut the link between the hosts, which the witness must then decide
    #[arg(long, conflicts_with = "kill")]
    pub cut: bool,
    /// How often, each time with a new pair and at another random moment
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub rounds: u32,
    /// The VM's memory
    #[arg(long, value_name = "SIZE", default_value = "256M")]
    pub memory: ByteSize,
    /// How much of it the guest has written before the kill [default: nearly all]
    #[arg(long, value_name = "SIZE")]
    pub touch: Option<ByteSize>,
    /// How many of a thousand HTTP answers differ between the two VMs
    #[arg(long, value_name = "PERMILLE", default_value_t = 20, value_parser = clap::value_parser!(u16).range(0..=1000))]
    pub nondeterminism: u16,
    /// What output waits for: lockstep, buffered or auto, as for a pair
    #[arg(long, value_name = "MODE", default_value_t)]
    pub mode: Mode,
    /// How long a silent host is waited for before it is held for dead
    #[arg(long, value_name = "SPAN", default_value = "300ms")]
    pub takeover_limit: Span,
    /// Chooses the random moments; the same seed, the same choices [default: from the clock]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Print one JSON object and no story
    #[arg(long)]
    pub json: bool,
}

/// A host that is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Victim {
    /// The one whose VM the clients reach.
    Primary,
    /// The one that protects it.
    Secondary,
}

impl DemoOptions {
    fn touch_mib(&self) -> u64 {
        self.touch
            .map_or_else(|| touchable_mib(self.memory), |size| size.0 >> 20)
    }

    fn seed(&self) -> u64 {
        let clock = || {
            SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(1, |since| since.subsec_nanos().into())
        };
        self.seed.unwrap_or_else(clock)
    }
}

/// Runs the demo and tells whether nothing was lost. Prints the story or, if asked, the JSON.
///
/// # Errors
/// Fails if the demo could not be carried out: a host that can't run VMs, missing rights, a role that did
/// not come up, an interruption. What was counted until then is lost; nothing else is left.
pub fn run(options: &DemoOptions) -> Result<bool> {
    machine::host_check().context("this machine can't run the demo")?;
    let tidy = Tidy::start(Owner::Demo, None)?;
    let story = Story::new(!options.json);
    let seed = options.seed();
    let mut random = Random::new(seed);
    let mut report = Report::new(options, seed);
    story.title(&format!(
        "A pair of {} of memory on two hosts of one machine; seed {seed}",
        options.memory
    ));
    for number in 1..=options.rounds {
        story.round(number, options.rounds);
        let outcome = round::run(options, &story, &tidy, &mut random);
        tidy.clear();
        match outcome {
            Ok(round) => report.add(round),
            Err(error) if tidy.is_interrupted() => {
                tracing::debug!(%error, "the interruption's effect");
                bail!("interrupted in round {number}; everything was cleaned up");
            }
            Err(error) => return Err(error.context(format!("round {number} could not be carried out (seed {seed})"))),
        }
    }
    report.finish();
    if options.json {
        serde_json::to_writer(io::stdout().lock(), &report).context("can't print the report")?;
        println!();
    } else {
        story.summary(&report);
    }
    Ok(report.passed)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: DemoOptions,
    }

    fn parse(words: &[&str]) -> Result<DemoOptions, clap::Error> {
        Line::try_parse_from([&["demo"], words].concat()).map(|line| line.options)
    }

    #[test]
    fn the_guest_touches_nearly_all_of_its_memory_unless_told_otherwise() {
        for (memory, touched) in [("256M", 184), ("1G", 888), ("64M", 4), ("32M", 0)] {
            assert_eq!(parse(&["--memory", memory]).unwrap().touch_mib(), touched);
        }
        assert_eq!(parse(&["--touch", "16M"]).unwrap().touch_mib(), 16);
    }

    #[test]
    fn only_what_makes_sense_is_taken() {
        assert_eq!(parse(&["--kill", "secondary"]).unwrap().kill, Victim::Secondary);
        assert!(parse(&["--cut"]).unwrap().cut);
        assert_eq!(parse(&["--seed", "7"]).unwrap().seed(), 7);
        for wrong in [
            &["--kill", "both"][..],
            &["--rounds", "0"],
            &["--cut", "--kill", "primary"],
        ] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
