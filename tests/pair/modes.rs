//! Modes of protection: output that waits for a checkpoint instead of the secondary's equal output.

use link::status::{State, Status};
use tandem::lab::Host;

use crate::load::Work;
use crate::stage::{LIMIT, Setup, Stage};

#[test]
fn buffered_hosts_die_one_after_the_other_and_nothing_is_lost() {
    let setup = Setup {
        more: vec!["--mode", "buffered", "--checkpoint-every", "5ms"],
        ..Setup::default()
    };
    let Some(mut stage) = Stage::new(setup) else { return };
    stage.pair(Host::A);
    let work = Work::start(&stage, "buffered:");
    for victim in [Host::A, Host::B] {
        let survivor = victim.other();
        work.await_more();
        let primary = stage.status(victim).expect("the primary answers");
        assert_eq!(mode_now(&primary), Some("buffered"));
        assert!(primary.checkpoints.period > 0, "{:?}", primary.checkpoints);
        assert_eq!(primary.checkpoints.mismatch, 0, "nothing is compared");
        let secondary = stage.status(survivor).expect("the secondary answers");
        assert_eq!(mode_now(&secondary), Some("buffered"));
        stage.kill(victim);
        let status = stage.await_state(survivor, State::Alone);
        assert_eq!((status.role.as_str(), mode_now(&status)), ("primary", None));
        work.await_more();
        stage.start(victim, "secondary");
        stage.await_protected();
    }
    work.await_more();
    drop(work.finish(&stage));
}

#[test]
fn auto_buffers_what_keeps_differing_and_comes_back() {
    let setup = Setup {
        more: vec!["--mode", "auto", "--cmdline", "nondeterminism=1000"],
        ..Setup::default()
    };
    let Some(mut stage) = Stage::new(setup) else { return };
    stage.pair(Host::A);
    let work = Work::start(&stage, "auto:");
    let buffers = |status: &Status| {
        let mode = status.mode.as_ref();
        mode.is_some_and(|mode| mode.now == "buffered" || mode.buffered_flows > 0)
    };
    let status = stage.await_status(Host::A, "something is buffered", buffers);
    println!("{:?}", status.mode);
    work.await_more();
    let told = stage.get("/set?nondeterminism=0", LIMIT).expect("the guest answers");
    assert_eq!(told.0, 200, "{told:?}");
    let compares_all = |status: &Status| {
        let mode = status.mode.as_ref();
        mode.is_some_and(|mode| mode.now == "lockstep" && mode.buffered_flows == 0)
    };
    stage.await_status(Host::A, "everything is compared again", compares_all);
    work.await_more();
    // The successor is told to be unsteady again, and is killed while it buffers.
    stage.kill(Host::A);
    stage.await_state(Host::B, State::Alone);
    stage.start(Host::A, "secondary");
    stage.await_protected();
    let told = stage.get("/set?nondeterminism=1000", LIMIT).expect("the guest answers");
    assert_eq!(told.0, 200, "{told:?}");
    stage.await_status(Host::B, "something is buffered", buffers);
    stage.kill(Host::B);
    stage.await_state(Host::A, State::Alone);
    work.await_more();
    drop(work.finish(&stage));
}

fn mode_now(status: &Status) -> Option<&str> {
    status.mode.as_ref().map(|mode| mode.now.as_str())
}
