//! The shipped protocol under random faults: a seed is one run, `SEED=n` replays it with its trace.

use std::panic::{AssertUnwindSafe, catch_unwind};

use harness::faults::{Coverage, Fault};
use harness::world::{Aim, World};

const SEEDS: u64 = if cfg!(debug_assertions) { 80 } else { 400 };
const FAULTS: u64 = 6;

/// Phases of either side in which half of the faults are made to happen; chance alone would rarely meet the short ones.
const PHASES: [&str; 17] = [
    "pairing",
    "syncing",
    "stopping first",
    "sending first",
    "awaiting first",
    "recording",
    "stopping",
    "sending",
    "awaiting",
    "checking",
    "loading",
    "committing",
    "contending",
    "draining",
    "claiming",
    "won",
    "recorded",
];

const AIMS: [Aim; 9] = [
    |[primary, _]| Fault::Kill(primary),
    |[_, other]| Fault::Kill(other),
    |[primary, _]| Fault::PowerLoss(primary),
    |[_, other]| Fault::PowerLoss(other),
    |[primary, _]| Fault::Freeze(primary, 400),
    |[_, other]| Fault::Freeze(other, 400),
    |_| Fault::CloseLink,
    |_| Fault::CutLink,
    |[primary, _]| Fault::CutTo(primary),
];

/// One pair through several faults; after each, it is protected again within the stated time, and clients go on.
fn run(seed: u64, loud: bool) -> Coverage {
    let mut world = World::new(seed);
    if loud {
        world.trace.be_loud();
    }
    let result = catch_unwind(AssertUnwindSafe(|| {
        assert!(
            world.run_until(5_000, World::is_protected),
            "rule 6: not protected within 5 s of the start"
        );
        for _ in 0..FAULTS {
            break_something(&mut world);
            assert!(
                world.run_until(8_000, World::is_protected),
                "rule 6: not protected within 8 s of the fault"
            );
            let answers = world.checkers.answers;
            world.run(600);
            assert!(world.checkers.answers > answers, "rule 6: no client gets an answer");
        }
    }));
    if let Err(panic) = result {
        eprintln!("SEED={seed} fails; the last events:\n{}", world.trace);
        std::panic::resume_unwind(panic);
    }
    world.coverage
}

/// One fault, or two at a time, at a random moment or in a chosen phase.
fn break_something(world: &mut World) {
    let random = world.random();
    let phase = PHASES[usize::try_from(random.below(17)).expect("few")];
    let aim = AIMS[usize::try_from(random.below(9)).expect("few")];
    let (first, second) = (Fault::random(random), Fault::random(random));
    match random.below(4) {
        0 => world.inject(first, 1_500_000),
        1 => world.arm(phase, aim),
        2 => {
            world.inject(first, 1_000);
            world.arm(phase, aim);
        }
        _ => {
            world.inject(first, 1_000_000);
            world.inject(second, 1_000_000);
        }
    }
    world.run(2_000);
    world.disarm();
}

#[test]
fn no_seed_breaks_a_rule() {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    if let Some(seed) = number("SEED") {
        run(seed, true);
        return;
    }
    let mut coverage = Coverage::default();
    for seed in 0..number("SEEDS").unwrap_or(SEEDS) {
        coverage.add(&run(seed, false));
    }
    println!("{coverage}");
    for phase in ["protected", "stopping", "sending", "awaiting"] {
        assert!(
            coverage.has("kill", phase) || coverage.has("power loss", phase),
            "no host died in {phase}"
        );
    }
}
