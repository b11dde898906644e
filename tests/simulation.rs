//! The shipped protocol under random faults: a seed is one run, `SEED=n` replays it with its trace.

use harness::faults::Coverage;
use harness::run::run;

const SEEDS: u64 = if cfg!(debug_assertions) { 80 } else { 400 };

/// Runs a seed that must break no rule.
fn passed(seed: u64, loud: bool) -> Coverage {
    run(seed, loud).unwrap_or_else(|failure| {
        panic!(
            "SEED={seed} fails: {}; the last events:\n{}",
            failure.message, failure.trace
        )
    })
}

#[test]
fn no_seed_breaks_a_rule() {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    if let Some(seed) = number("SEED") {
        passed(seed, true);
        return;
    }
    let mut coverage = Coverage::default();
    for seed in 0..number("SEEDS").unwrap_or(SEEDS) {
        coverage.add(&passed(seed, false));
    }
    println!("{coverage}");
    for phase in ["protected", "stopping", "sending", "awaiting"] {
        assert!(
            coverage.has("kill", phase) || coverage.has("power loss", phase),
            "no host died in {phase}"
        );
    }
}
