//! Who may run when the hosts can't agree by themselves: the link is cut, both die, or there is no witness.

use std::fs;
use std::time::Instant;

use link::control::Command;
use link::status::State;
use tandem::lab::Host;

use crate::load::{Work, assert_stored};
use crate::stage::{Setup, Stage, await_fact};

const FENCED: Option<i32> = Some(3);

#[test]
fn case_11_the_link_is_cut_and_exactly_one_side_goes_on() {
    let limit = std::time::Duration::from_millis(1_000);
    let setup = Setup {
        takeover_limit: "1s",
        ..Setup::default()
    };
    let Some(mut stage) = Stage::new(setup) else { return };
    stage.pair(Host::A);
    let work = Work::start(&stage, "cut:");
    let blow = Instant::now();
    stage.lab.cut_replication().expect("the link can be cut");
    let loser = await_fact("a side that is fenced", || {
        // A primary that is fenced ends; a secondary waits.
        if !stage.is_running(Host::A) {
            return Some(Host::A);
        }
        let status = stage.status(Host::B)?;
        (status.state == State::Fenced).then_some(Host::B)
    });
    if loser == Host::A {
        assert_eq!(stage.await_end(loser).code(), FENCED);
    }
    let winner = loser.other();
    let status = stage.await_state(winner, State::Alone);
    assert_eq!(stage.owner(), (status.generation, winner.name().to_owned()));
    // What was last heard is at most one heartbeat, an eighth of the limit, older than the cut.
    assert!(
        blow.elapsed() >= limit * 3 / 4,
        "the limit is waited for: {:?}",
        blow.elapsed()
    );
    let told = stage.log(loser);
    let reason = format!("fenced: {} owns the VM since term {}", winner.name(), status.generation);
    assert!(told.contains(&reason), "{told}");

    work.await_more();
    stage.lab.heal_replication().expect("the link can be healed");
    if loser == Host::A {
        stage.start(loser, "secondary");
    }
    stage.await_protected();
    work.await_more();
    work.finish(&stage);
}

#[test]
fn case_19_33_both_die_and_only_the_owner_starts_again() {
    let Some(mut stage) = Stage::new(Setup::default()) else {
        return;
    };
    stage.pair(Host::A);
    let work = Work::start(&stage, "both:");
    stage.kill(Host::B);
    stage.kill(Host::A);
    let (term, owner) = stage.owner();
    let owner = if owner == Host::A.name() { Host::A } else { Host::B };
    let other = owner.other();
    fs::remove_file(stage.control(other)).expect("a killed role leaves its socket");

    let (status, told) = stage.run(other, stage.words(other, "primary"));
    assert_eq!(status.code(), Some(1), "{told}");
    assert!(told.contains(owner.name()) && told.contains(": start "), "{told}");
    assert!(!stage.control(other).exists(), "a socket of a role that did not start");
    assert_eq!(stage.owner(), (term, owner.name().to_owned()), "the term is not taken");

    stage.start(owner, "primary");
    stage.await_state(owner, State::Alone);
    stage.await_guest();
    let counters = work.abandon();
    assert_stored(&stage, &counters);
    stage.start(other, "secondary");
    stage.await_protected();
    stage.kill(owner);
    stage.await_state(other, State::Alone);
    assert_stored(&stage, &counters);
}

#[test]
fn case_17_without_a_witness_only_the_operator_lets_the_secondary_run() {
    let setup = Setup {
        witness: false,
        ..Setup::default()
    };
    let Some(mut stage) = Stage::new(setup) else { return };
    stage.pair(Host::A);
    let work = Work::start(&stage, "manual:");
    let meant = ["takeover", "--old-primary-is-off"];
    let (status, told) = stage.operate(Host::B, &meant);
    assert_eq!(status.code(), Some(1), "{told}");
    assert!(told.contains("no takeover: this side is protected"), "{told}");
    let (status, told) = stage.operate(Host::A, &meant);
    assert_eq!(status.code(), Some(1), "{told}");
    assert!(told.contains("nothing to take over"), "{told}");

    let blow = stage.kill(Host::A);
    stage.await_state(Host::B, State::Contending);
    let (status, told) = stage.operate(Host::B, &["takeover"]);
    assert_eq!(status.code(), Some(2), "{told}");
    assert!(told.contains("--old-primary-is-off"), "{told}");
    let unmeant = Command::Takeover {
        old_primary_is_off: false,
    };
    let refused = stage.ask(Host::B, &unmeant).expect_err("it must be meant");
    assert!(refused.to_string().contains("--old-primary-is-off"), "{refused}");
    let (status, told) = stage.operate(Host::B, &["checkpoint"]);
    assert_ne!(status.code(), Some(0), "{told}");
    assert_eq!(work.answer_since(blow), None, "nobody runs");
    assert_eq!(stage.status(Host::B).expect("it answers").state, State::Contending);

    let (status, told) = stage.operate(Host::B, &meant);
    assert_eq!(status.code(), Some(0), "{told}");
    stage.await_state(Host::B, State::Alone);
    work.await_more();
    let (status, told) = stage.operate(Host::B, &meant);
    assert_eq!(status.code(), Some(1), "twice: {told}");
    work.finish(&stage);
}
