//! The shipped protocol under random faults: a seed is one run, `SEED=n` replays it with its trace.

use harness::run::{self, Failure};

const SEEDS: u64 = if cfg!(debug_assertions) { 100 } else { 2_000 };
/// Times that every possible pair of a step and a fault comes in an ordinary run.
const COVERED: u64 = 50;

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// `SKIP=2,5` leaves these faults of the seed's list out.
fn skipped() -> Vec<usize> {
    let text = std::env::var("SKIP").unwrap_or_default();
    let numbers = text.split(',').filter(|number| !number.is_empty());
    numbers
        .map(|number| number.parse().expect("SKIP is a list of numbers"))
        .collect()
}

#[test]
fn no_seed_breaks_a_rule() {
    if let Some(seed) = number("SEED") {
        let skip = skipped();
        println!("faults of the seed:\n{}", run::describe_plan(seed, &skip));
        if let Err(failure) = run::run(seed, &skip, true) {
            panic!("SEED={seed}: {}", failure.message);
        }
        return;
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let seeds = number("SEEDS").unwrap_or(SEEDS);
    let (_, coverage, failure) = run::run_many(0, seeds, threads, |_| true);
    if let Some(failure) = failure {
        report(&failure);
    }
    println!("{coverage}");
    if seeds >= 2_000 {
        let rare = coverage.below(COVERED);
        assert!(rare.is_empty(), "met less than {COVERED} times: {rare:?}");
        let modes = [coverage.switched, coverage.buffered_flow];
        assert!(
            modes.iter().all(|seeds| *seeds >= COVERED),
            "modes change in few seeds: {modes:?}"
        );
    }
}

fn report(failure: &Failure) -> ! {
    let Failure {
        seed,
        message,
        trace,
        planned,
    } = failure;
    eprintln!("SEED={seed} fails; the last events:\n{trace}");
    let skip = run::minimise(*planned, |skip| run::run(*seed, skip, false).is_err());
    let numbers: Vec<_> = skip.iter().map(usize::to_string).collect();
    eprintln!(
        "it still fails with these faults only:\n{}",
        run::describe_plan(*seed, &skip)
    );
    panic!(
        "{message}\nreplay: SEED={seed} SKIP={} cargo test --release -p tests --test simulation",
        numbers.join(",")
    );
}

#[test]
fn a_seed_is_the_same_run_each_time() {
    for seed in [3, 4] {
        let digests = [(); 2].map(|()| run::run(seed, &[], false).map(|report| report.digest));
        let [Ok(one), Ok(other)] = digests else { continue };
        assert_eq!(one, other, "seed {seed}");
    }
}

#[test]
fn what_no_guest_of_the_world_sends_leaves_by_the_same_rule() {
    assert_eq!(harness::sequences::run(), Ok(()));
}
