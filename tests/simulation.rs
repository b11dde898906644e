//! The shipped protocol under random faults: a seed is one run, `SEED=n` replays it with its trace.

use std::panic::{AssertUnwindSafe, catch_unwind};

use harness::world::World;

const SEEDS: u64 = 300;
const FAULTS: u64 = 6;

/// One pair through several faults; after each, somebody serves again within the stated time, and clients go on.
fn run(seed: u64) {
    let mut world = World::new(seed);
    let result = catch_unwind(AssertUnwindSafe(|| {
        assert!(
            world.run_until(5_000, World::is_protected),
            "rule 6: not protected within 5 s of the start"
        );
        for _ in 0..FAULTS {
            let fault = world.random_fault();
            world.inject(fault, 1_500_000);
            world.run(4_500);
            assert!(
                world.run_until(6_000, World::is_protected),
                "rule 6: not protected within 6 s of {fault:?}"
            );
            let answers = world.checkers.answers;
            world.run(600);
            assert!(
                world.checkers.answers > answers,
                "rule 6: no client gets an answer after {fault:?}"
            );
        }
        assert_eq!(world.faults, FAULTS);
    }));
    if let Err(panic) = result {
        eprintln!("SEED={seed} fails; the last events:\n{}", world.trace());
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn no_seed_breaks_a_rule() {
    if let Some(seed) = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()) {
        return run(seed);
    }
    for seed in 0..SEEDS {
        run(seed);
    }
}
