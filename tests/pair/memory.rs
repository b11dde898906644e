//! The memory that a checkpoint's pages may take is bounded: a guest that writes a lot has checkpoints taken early.

use link::control;
use tandem::lab::Host;

use crate::load::Work;
use crate::stage::{LIMIT, Setup, Stage, await_fact};

/// As many fit twice into the memory that is given below.
const PAGES_MAX: u64 = 512;
/// Pages that the dirtier goes through.
const WRITTEN: u64 = 8 * 256;
const CHECKPOINTS: usize = 5;

#[test]
fn a_guest_that_writes_a_lot_has_checkpoints_taken_before_their_pages_take_too_much_memory() {
    let setup = Setup {
        more: vec!["--epoch-max-age", "20s", "--checkpoint-memory", "4M"],
        ..Setup::default()
    };
    let Some(mut stage) = Stage::new(setup) else { return };
    stage.pair(Host::A);
    let work = Work::start(&stage, "memory:");
    stage
        .get("/set?dirty=8,2000,random", LIMIT)
        .expect("the dirtier starts");
    let status = stage.await_status(Host::A, "checkpoints that memory asked for", |status| {
        status.checkpoints.memory >= CHECKPOINTS as u64
    });
    println!("{:?}", status.checkpoints);
    let history = await_fact("the history", || control::ask_history(&stage.control(Host::A)).ok());
    let last = history
        .iter()
        .rev()
        .take(CHECKPOINTS)
        .map(|trace| trace.pages + trace.pages_ahead);
    let last: Vec<_> = last.collect();
    println!("{last:?}");
    assert!(last.iter().any(|pages| *pages >= PAGES_MAX / 2), "{last:?}");
    // A guest that was not stopped early would have written everything.
    assert!(last.iter().all(|pages| *pages < WRITTEN * 3 / 4), "{last:?}");
    work.await_more();
    work.finish(&stage);
}
