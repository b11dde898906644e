//! Modes of protection: output that waits for a checkpoint instead of the secondary's equal output.

use link::status::{State, Status};
use tandem::lab::Host;

use crate::load::Work;
use crate::stage::{Setup, Stage};

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
    work.finish(&stage);
}

fn mode_now(status: &Status) -> Option<&str> {
    status.mode.as_ref().map(|mode| mode.now.as_str())
}
