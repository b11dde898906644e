//! The contest for the right to run, explored exhaustively: every order of events within the bounds, not a sample of them.
//!
//! The code that decides is the shipped one: `failover::Contest` on both sides, `failover::start_decision` for each start,
//! `handshake::judge_hello` for each pairing. Around it is a small model (`world.rs`, `link.rs`): hosts that crash, die silently and
//! start again; a record that is durable only after a step of its own; two connections whose messages wait as long as they
//! like, overtake each other between the two, and are lost from a cut on, in one direction or both; connections that break,
//! and connections that a kernel ends; heartbeats, the lease and the primary's silence in ticks, with a clock that may stand
//! still for a tick; claims that the witness decides late, never, or whose answer is lost; orderly ends of either side. A
//! side may do nothing for as long as it likes, so every pause is in it.
//!
//! # What must hold in every state
//! - Never are two sides able to let output leave.
//! - Output leaves only in a generation that its side has won, after the record of that is durable, never in an older
//!   generation than another before it, never from a state that lacks what clients were told, and from one side in each.
//! - Only a side that holds a complete state of its generation contends.
//! - If no further fault happens and hosts that are off are started again, the VM runs again.
//! - If no further fault happens and a side is there that is entitled to go on, the VM runs again without any start.
//!
//! # Bounds
//! Printed by each run with the number of states; in a release build:
//!
//! | what | faults | pairings | takeover limit, lease | states |
//! |---|---|---|---|---|
//! | several generations | 2 | 2 | 3, 2 ticks | 931,940 |
//! | more faults | 3 | 1 | 3, 2 ticks | 303,356 |
//! | clocks that differ: the primary's stands still one tick in five | 2 | 1 | 4, 2 ticks | 731,880 |
//! | no witness: the operator decides | 2 | 2 | 3, 2 ticks | 73,446 |
//!
//! A fault is a death (silent or not), a cut, a broken connection, a message that breaks the protocol, a claim without an
//! answer, an orderly end. Pauses, delays, starts and the loss of the peer's trust after a pause are free. `MODEL_DEPTH=n`
//! allows `n` more faults in each; a debug build allows one fewer.
//!
//! # What is not in it
//! Epochs: a follower's crash leaves its last committed epoch, which counts as what clients were told. The moment between
//! the look at the clock and the write to the TAP. `Liveness`, which has property tests of its own. How the protocols call
//! the contest: the simulation runs that.

mod link;
mod model;
mod world;

use std::fmt::Write;

use checkpoint::mutants::Mutant;
use stateright::{Checker, Expectation, HasDiscoveries, Model};

use crate::model::Contests;
use crate::world::Bounds;

const SHORT: Bounds = Bounds {
    witness: true,
    limit: 3,
    lease: 2,
    drift: false,
    faults: 2,
    pairings: 2,
};

/// Explores all of it; or under a mutant until a rule is broken. Returns what is wrong.
fn explore(mut bounds: Bounds, mutant: Option<Mutant>) -> Result<(), String> {
    let deeper = std::env::var("MODEL_DEPTH").ok().and_then(|text| text.parse().ok());
    bounds.faults = (bounds.faults + deeper.unwrap_or(0)) - u8::from(cfg!(debug_assertions));
    let finish = match mutant {
        Some(_) => HasDiscoveries::AnyFailures,
        None => HasDiscoveries::AllFailures,
    };
    let checker = Contests::new(bounds, mutant)
        .checker()
        .threads(std::thread::available_parallelism().map_or(1, usize::from))
        .finish_when(finish)
        .spawn_bfs()
        .join();
    println!(
        "{bounds:?}: {} states, {} steps, at most {} in a row",
        checker.unique_state_count(),
        checker.state_count(),
        checker.max_depth()
    );
    let mut wrong = String::new();
    for property in checker.model().properties() {
        match (&property.expectation, checker.discovery(property.name)) {
            (Expectation::Always, Some(path)) => {
                let world = path.last_state().clone();
                writeln!(wrong, "not so: {}", property.name).expect("a string");
                for step in path.into_actions() {
                    writeln!(wrong, "  {step:?}").expect("a string");
                }
                writeln!(wrong, "{world:?}").expect("a string");
            }
            (Expectation::Sometimes, None) => {
                writeln!(wrong, "it never comes to: {}", property.name).expect("a string");
            }
            _ => {}
        }
    }
    if wrong.is_empty() { Ok(()) } else { Err(wrong) }
}

fn check(bounds: Bounds) {
    if let Err(wrong) = explore(bounds, None) {
        panic!("{wrong}");
    }
}

#[test]
fn over_several_generations_there_is_one_owner_and_somebody_runs() {
    check(SHORT);
}

#[test]
fn after_several_faults_there_is_one_owner_and_somebody_runs() {
    check(Bounds {
        faults: 3,
        pairings: 1,
        ..SHORT
    });
}

#[test]
fn a_clock_that_is_slow_does_not_make_two_owners() {
    check(Bounds {
        limit: 4,
        drift: true,
        pairings: 1,
        ..SHORT
    });
}

#[test]
fn an_operator_who_keeps_the_word_does_not_make_two_owners() {
    check(Bounds {
        witness: false,
        ..SHORT
    });
}

#[cfg(feature = "mutants")]
#[test]
fn the_model_notices_every_mutant_of_the_contest() {
    let mutants = [
        Mutant::AcceptOldAnswer,
        Mutant::ClaimOnce,
        Mutant::ClaimOwnTerm,
        Mutant::ContendAfterGoodbye,
        Mutant::ContendIncomplete,
        Mutant::ContendWithinLease,
        Mutant::GoAloneUnasked,
        Mutant::IgnoreLease,
        Mutant::RunAfterLosing,
        Mutant::RunBeforeRecord,
        Mutant::SkipTermAtFirstStart,
        Mutant::StartFollower,
        Mutant::StartSuperseded,
        Mutant::UnreachableIsWon,
    ];
    let mut survivors = Vec::new();
    for mutant in mutants {
        print!("{}: ", mutant.name());
        match explore(SHORT, Some(mutant)) {
            Ok(()) => survivors.push(mutant.name()),
            Err(wrong) => println!("  {}", wrong.lines().next().unwrap_or_default()),
        }
    }
    assert!(survivors.is_empty(), "the model does not notice {survivors:?}");
}
