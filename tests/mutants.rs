//! The simulation under deliberate bugs: it must notice each of them. A mutant that survives is a hole in the checkers.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use checkpoint::mutants::{self, Mutant};
use harness::run::run;
use harness::sequences;

const SEEDS: u64 = 2_000;

/// What came of a mutant.
enum Verdict {
    /// The seed, and the message of the assertion that noticed it.
    Caught(u64, String),
    /// How often the mutant's code was reached in all seeds together.
    Survived(u64),
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Caught(seed, message) => {
                let line = message.lines().next().unwrap_or_default();
                write!(f, "{:>5}  {line}", seed + 1)
            }
            Self::Survived(0) => f.write_str("    -  SURVIVES: never reached"),
            Self::Survived(reached) => write!(f, "    -  SURVIVES: reached {reached} times"),
        }
    }
}

fn hunt(mutant: Mutant, seeds: u64) -> Verdict {
    if Mutant::SEQUENCES_ONLY.contains(&mutant) {
        return match mutants::with(mutant, sequences::run) {
            Err(message) => Verdict::Caught(0, message),
            Ok(()) => Verdict::Survived(mutants::reached()),
        };
    }
    let mut reached = 0;
    for seed in 0..seeds {
        let result = mutants::with(mutant, || run(seed, &[], false));
        reached += mutants::reached();
        if let Err(failure) = result {
            return Verdict::Caught(seed, failure.message);
        }
    }
    Verdict::Survived(reached)
}

/// `MUTANT=name` hunts that one only, `SEEDS=n` changes how long.
#[test]
fn the_simulation_notices_every_mutant() {
    let variable = |name| std::env::var(name).ok();
    let seeds = variable("SEEDS").and_then(|text| text.parse().ok()).unwrap_or(SEEDS);
    let chosen = variable("MUTANT");
    let all: Vec<Mutant> = Mutant::ALL
        .iter()
        .copied()
        .filter(|mutant| chosen.as_ref().is_none_or(|chosen| chosen == mutant.name()))
        .collect();
    assert!(!all.is_empty(), "there is no mutant of that name");
    // Thousands of runs are to panic here; their messages are kept.
    std::panic::set_hook(Box::new(|_| {}));
    let verdicts = Mutex::new(BTreeMap::new());
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some(mutant) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let verdict = hunt(*mutant, seeds);
                    verdicts
                        .lock()
                        .expect("no thread panics")
                        .insert(mutant.name(), verdict);
                }
            });
        }
    });
    let _quiet = std::panic::take_hook();
    let verdicts = verdicts.into_inner().expect("no thread panics");
    println!("{:<32} seeds  noticed by", "mutant");
    for (name, verdict) in &verdicts {
        println!("{name:<32} {verdict}");
    }
    let survivors: Vec<_> = verdicts
        .iter()
        .filter(|(_, verdict)| matches!(verdict, Verdict::Survived(_)))
        .map(|(name, _)| *name)
        .collect();
    assert!(survivors.is_empty(), "the simulation does not notice {survivors:?}");
}

/// By this symbol the test of the shipped program would know it.
#[test]
fn a_program_with_mutants_is_known_by_a_symbol() {
    let own = std::env::current_exe()
        .and_then(std::fs::read)
        .expect("this test has an executable");
    let symbol = ["7mutants", "6active"].concat();
    assert!(own.windows(symbol.len()).any(|bytes| bytes == symbol.as_bytes()));
}
