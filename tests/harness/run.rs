//! One run of the world: a seed's faults, and what must hold after each.

use core::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::faults::{Coverage, Fault};
use crate::trace::Trace;
use crate::world::{Aim, World};

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

/// Why a run failed.
pub struct Failure {
    /// The message of the assertion: a rule's number and what broke it, or the protocol's own.
    pub message: String,
    /// The last events.
    pub trace: Trace,
}

/// One pair through several faults; after each, it is protected again within the stated time, and clients go on.
///
/// # Errors
/// Tells the rule that this seed breaks.
pub fn run(seed: u64, loud: bool) -> Result<Coverage, Failure> {
    let mut world = World::new(seed);
    if loud {
        world.trace.be_loud();
    }
    match catch_unwind(AssertUnwindSafe(|| live(&mut world))) {
        Ok(()) => Ok(world.coverage),
        Err(panic) => Err(Failure {
            message: message(&*panic),
            trace: world.trace,
        }),
    }
}

fn live(world: &mut World) {
    assert!(
        world.run_until(5_000, World::is_protected),
        "rule 6: not protected within 5 s of the start"
    );
    for _ in 0..FAULTS {
        break_something(world);
        assert!(
            world.run_until(8_000, World::is_protected),
            "rule 6: not protected within 8 s of the fault"
        );
        let answers = world.checkers.answers;
        world.run(600);
        assert!(world.checkers.answers > answers, "rule 6: no client gets an answer");
    }
    world.finish();
}

fn message(panic: &(dyn Any + Send)) -> String {
    panic
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
        .unwrap_or_else(|| "a panic without a message".to_owned())
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
