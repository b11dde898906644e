//! The link breaks and comes back: the pair is made whole by shipping what changed meanwhile.

use link::status::{LastSync, State, Status};
use rustix::process::{Pid, Signal, kill_process};
use tandem::lab::Host;

use crate::load::Work;
use crate::stage::{Setup, Stage};

fn signal(stage: &mut Stage, host: Host, signal: Signal) {
    let pid = i32::try_from(stage.pid(host)).ok().and_then(Pid::from_raw);
    kill_process(pid.expect("a process has a number"), signal).expect("a process may be signalled");
}

fn last_sync(status: &Status) -> LastSync {
    status.last_sync.expect("a protected primary has synced")
}

#[test]
fn case_38_a_short_break_is_made_up_for_by_difference() {
    let Some(mut stage) = Stage::new(Setup::default()) else {
        return;
    };
    stage.pair(Host::A);
    let first = last_sync(&stage.status(Host::A).expect("the primary answers"));
    assert!(!first.memory_by_difference && first.blocks.is_none(), "{first:?}");
    let work = Work::start(&stage, "break:");

    // Stopped, so that it can't be the one that wins.
    signal(&mut stage, Host::B, Signal::STOP);
    stage.lab.cut_replication().expect("the link can be cut");
    let alone = stage.await_state(Host::A, State::Alone);
    signal(&mut stage, Host::B, Signal::CONT);
    let fenced = stage.await_status(Host::B, "fenced and told", |status| {
        status.state == State::Fenced && status.reason.is_some()
    });
    let reason = format!("a owns the VM since term {}", alone.generation);
    assert!(
        fenced.reason.as_ref().is_some_and(|told| told.contains(&reason)),
        "{fenced:?}"
    );
    work.await_more();

    stage.lab.heal_replication().expect("the link can be healed");
    stage.await_protected();
    let status = stage.status(Host::A).expect("the primary answers");
    assert!(status.generation > alone.generation, "{status:?}");
    let sync = last_sync(&status);
    assert!(
        sync.memory_by_difference && sync.pages < sync.pages_total / 4,
        "{sync:?} after {first:?}"
    );
    assert!(sync.blocks.is_some_and(|blocks| blocks < sync.blocks_total), "{sync:?}");
    let told = stage.log(Host::A);
    assert!(told.contains("resync by difference: "), "{told}");
    work.await_more();

    stage.kill(Host::A);
    stage.await_state(Host::B, State::Alone);
    work.await_more();
    work.finish(&stage);
}

#[test]
fn a_secondary_that_was_killed_brings_its_disk_and_nothing_else() {
    let Some(mut stage) = Stage::new(Setup::default()) else {
        return;
    };
    stage.pair(Host::A);
    let work = Work::start(&stage, "restart:");
    stage.kill(Host::B);
    stage.await_state(Host::A, State::Alone);
    work.await_more();
    stage.start(Host::B, "secondary");
    stage.await_protected();
    let sync = last_sync(&stage.status(Host::A).expect("the primary answers"));
    assert!(!sync.memory_by_difference, "{sync:?}");
    assert!(sync.blocks.is_some_and(|blocks| blocks < sync.blocks_total), "{sync:?}");
    work.await_more();
    stage.kill(Host::A);
    stage.await_state(Host::B, State::Alone);
    work.await_more();
    work.finish(&stage);
}

#[test]
fn an_image_that_ran_by_itself_is_compared() {
    let Some(mut stage) = Stage::new(Setup::default()) else {
        return;
    };
    stage.pair(Host::A);
    let work = Work::start(&stage, "strayed:");
    stage.terminate(Host::B);
    stage.await_end(Host::B);
    stage.await_state(Host::A, State::Alone);
    // Boots the image and writes to it, away from the pair's clients.
    stage.lab.cut_client_port(Host::B).expect("a port can be cut");
    stage.start(Host::B, "run");
    stage.await_state(Host::B, State::Alone);
    stage.terminate(Host::B);
    stage.await_end(Host::B);
    stage.start(Host::B, "secondary");
    stage.await_protected();
    let sync = last_sync(&stage.status(Host::A).expect("the primary answers"));
    assert!(!sync.memory_by_difference && sync.blocks.is_none(), "{sync:?}");
    work.await_more();
    work.finish(&stage);
}
