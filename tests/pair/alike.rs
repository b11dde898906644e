//! Pages that both guests wrote alike are found on the other host, hardly anything is sent of them, and they are what they were
//! after a takeover.

use link::control::{self, Command};
use link::status::{CheckpointTrace, State};
use tandem::lab::Host;

use crate::ahead::{check_values, store_values};
use crate::stage::{LIMIT, Setup, Stage, await_fact};

/// Written at once, each time with other bytes.
const PAGES: u64 = 2_000;
/// Bytes that each of them may take: hash, place, answer and record.
const BYTES_MAX: u64 = 40;

#[test]
fn pages_that_both_guests_wrote_alike_are_found_and_a_takeover_has_them() {
    let setup = Setup {
        more: vec!["--epoch-max-age", "10s", "--ahead-rate", "0"],
        ..Setup::default()
    };
    let Some(mut stage) = Stage::new(setup) else { return };
    stage.pair(Host::A);
    // How soon the primary asks depends on what it has measured, and the first pages are sent while it finds out.
    let found = await_fact("a checkpoint of pages that are alike", || {
        let told = stage.get(&format!("/write/{PAGES},random"), LIMIT).ok()?;
        assert_eq!(told.0, 200, "{told:?}");
        store_values(&stage);
        stage.ask(Host::A, &Command::Checkpoint).ok()?;
        let history = control::ask_history(&stage.control(Host::A)).ok()?;
        let equal = |trace: &CheckpointTrace| own(trace) > PAGES * 9 / 10 && trace.bytes <= PAGES * BYTES_MAX;
        history.into_iter().find(equal)
    });
    println!("{found:?}");
    assert!(found.pages >= own(&found), "{found:?}");

    stage.kill(Host::A);
    stage.await_state(Host::B, State::Alone);
    check_values(&stage);
}

/// Pages of a checkpoint that were sent as the secondary's own.
fn own(trace: &CheckpointTrace) -> u64 {
    let own = trace.codecs.iter().filter(|share| share.codec == "own");
    own.map(|share| share.pages).sum()
}
