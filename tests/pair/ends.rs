//! Orderly ends: nobody takes an end for a death.

use link::status::State;
use tandem::lab::Host;

use crate::load::{Work, assert_stored};
use crate::stage::{Setup, Stage};

#[test]
fn the_end_of_the_primary_ends_both_with_equal_images() {
    let Some(mut stage) = Stage::new(Setup::default()) else {
        return;
    };
    stage.pair(Host::A);
    let term = stage.owner();
    let report = Work::start(&stage, "end:").finish(&stage);
    stage.terminate(Host::A);
    for host in [Host::A, Host::B] {
        let status = stage.await_end(host);
        assert_eq!(status.code(), Some(0), "{} ended: {status}", host.name());
        assert!(!stage.control(host).exists(), "the socket of {} is gone", host.name());
    }
    assert_eq!(stage.owner(), term, "nobody contended");
    assert!(
        stage.image_bytes(Host::A) == stage.image_bytes(Host::B),
        "the images differ after an orderly end"
    );
    // Either image is the VM's disk.
    stage.start(Host::B, "run");
    stage.await_guest();
    assert_stored(&stage, &report.tcp.counters);
}

#[test]
fn the_end_of_the_primary_under_load_loses_nothing_acknowledged() {
    let Some(mut stage) = Stage::new(Setup::default()) else {
        return;
    };
    stage.pair(Host::A);
    let work = Work::start(&stage, "loaded:");
    stage.terminate(Host::A);
    for host in [Host::A, Host::B] {
        let status = stage.await_end(host);
        assert_eq!(status.code(), Some(0), "{} ended: {status}", host.name());
    }
    assert!(
        stage.image_bytes(Host::A) == stage.image_bytes(Host::B),
        "the images differ after an orderly end"
    );
    stage.start(Host::B, "run");
    stage.await_guest();
    let counters = work.abandon();
    assert_stored(&stage, &counters);
}

#[test]
fn the_end_of_the_secondary_leaves_the_primary_alone() {
    let Some(mut stage) = Stage::new(Setup::default()) else {
        return;
    };
    stage.pair(Host::A);
    let work = Work::start(&stage, "rest:");
    let (status, told) = stage.operate(Host::B, &["stop"]);
    assert_eq!(status.code(), Some(0), "{told}");
    let status = stage.await_end(Host::B);
    assert_eq!(status.code(), Some(0), "{status}");
    stage.await_state(Host::A, State::Alone);
    work.await_more();
    stage.start(Host::B, "secondary");
    stage.await_protected();
    stage.terminate(Host::B);
    let status = stage.await_end(Host::B);
    assert_eq!(status.code(), Some(0), "{status}");
    stage.await_state(Host::A, State::Alone);
    work.await_more();
    work.finish(&stage);
}
