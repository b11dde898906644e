//! One host dies under load: the other goes on, on the same connections, and the pair is made whole again.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::thread::sleep;
use std::time::Duration;

use link::control::Command;
use link::status::State;
use tandem::lab::Host;

use crate::load::Work;
use crate::stage::{Setup, Stage};

const ROUNDS: u64 = 6;
/// A checkpoint of a small VM is over within this, so the kill meets each of its steps now and then.
const AFTER_REQUEST: Duration = Duration::from_millis(5);

#[test]
fn case_38_39_the_primary_is_killed_and_then_its_successor() {
    let Some(mut stage) = Stage::new(Setup::default()) else {
        return;
    };
    stage.pair(Host::A);
    let before = stage.status(Host::B).expect("the secondary answers");
    assert_eq!(stage.owner().1, Host::A.name());
    let work = Work::start(&stage, "twice:");

    for victim in [Host::A, Host::B] {
        let survivor = victim.other();
        let generation = stage.status(survivor).expect("the survivor answers").generation;
        stage.kill(victim);
        let status = stage.await_state(survivor, State::Alone);
        assert_eq!(status.role, "primary");
        assert!(
            status.generation > generation,
            "{} after {generation}",
            status.generation
        );
        assert_eq!(stage.owner(), (status.generation, survivor.name().to_owned()));
        work.await_more();
        stage.start(victim, "secondary");
        stage.await_protected();
        work.await_more();
    }
    let after = stage.status(Host::A).expect("the primary answers");
    assert!(after.generation >= before.generation + 2, "{after:?}");
    assert_eq!(after.role, "primary");
    work.finish(&stage);
}

#[test]
fn the_primary_is_killed_and_nothing_is_lost_even_over_udp() {
    let Some(mut stage) = Stage::new(Setup::default()) else {
        return;
    };
    stage.pair(Host::A);
    let work = Work::start(&stage, "once:");
    let blow = stage.kill(Host::A);
    let answer = work.await_answer_since(blow);
    stage.await_state(Host::B, State::Alone);
    work.await_more();
    work.finish_after(&stage, blow, answer);
}

#[test]
fn case_6_the_secondary_is_killed_and_another_joins() {
    let Some(mut stage) = Stage::new(Setup::default()) else {
        return;
    };
    stage.pair(Host::A);
    let generation = stage.status(Host::A).expect("the primary answers").generation;
    let work = Work::start(&stage, "second:");
    let blow = stage.kill(Host::B);
    let status = stage.await_state(Host::A, State::Alone);
    assert!(
        status.generation > generation,
        "{} after {generation}",
        status.generation
    );
    assert_eq!(stage.owner(), (status.generation, Host::A.name().to_owned()));
    let answer = work.await_answer_since(blow);
    work.await_more();
    stage.start(Host::B, "secondary");
    stage.await_protected();
    work.await_more();
    work.finish_after(&stage, blow, answer);
}

/// Cases 1, 2, 3 and 6: kills at moments that lie around a checkpoint.
#[test]
fn case_1_2_3_6_either_side_is_killed_within_a_checkpoint() {
    let Some(mut stage) = Stage::new(Setup::default()) else {
        return;
    };
    stage.pair(Host::A);
    let work = Work::start(&stage, "within:");
    let mut primary = Host::A;
    for round in 0..ROUNDS {
        let kills_primary = round % 2 == 0;
        let victim = if kills_primary { primary } else { primary.other() };
        let delay = random_span(AFTER_REQUEST);
        println!(
            "round {round}: {} dies {delay:?} after a checkpoint was asked for",
            victim.name()
        );
        // Refused if one is being taken right now, which is as good.
        let _ = stage.ask(primary, &Command::Checkpoint);
        sleep(delay);
        stage.kill(victim);
        primary = victim.other();
        let status = stage.await_state(primary, State::Alone);
        assert_eq!(stage.owner(), (status.generation, primary.name().to_owned()));
        work.await_more();
        stage.start(victim, "secondary");
        stage.await_protected();
    }
    work.await_more();
    work.finish(&stage);
}

pub(crate) fn random_span(up_to: Duration) -> Duration {
    let random = RandomState::new().build_hasher().finish();
    let nanos = u64::try_from(up_to.as_nanos()).expect("a short span");
    Duration::from_nanos(random % nanos)
}
