//! A network card with several pairs of queues: its clients notice no takeover, and both hosts must say the same of it.

use link::status::State;
use storage::Record;
use tandem::lab::{Host, TAP};

use crate::load::Work;
use crate::stage::{LIMIT, Setup, Stage, await_fact};

fn two_queues() -> Option<Stage> {
    Stage::new(Setup {
        card: ",queues=2",
        more: vec!["--cmdline", "isn_skew=1"],
        ..Setup::default()
    })
}

#[test]
fn clients_on_several_queues_live_through_the_deaths_of_their_hosts() {
    let Some(mut stage) = two_queues() else { return };
    stage.pair(Host::A);
    let log = stage.log(Host::A);
    assert!(log.contains("tandem guest: 2 pairs of queues"), "{log}");
    // A new connection has one queue or the other, for what comes and for what leaves.
    await_fact("frames on all queues", || {
        stage.get("/", LIMIT).expect("the guest answers");
        let text = stage.log(Host::A);
        let used = |queue| text.contains(&format!("tandem guest: network queue {queue} is in use"));
        (0..4).all(used).then_some(())
    });
    let work = Work::start(&stage, "queues:");
    for victim in [Host::A, Host::B] {
        stage.kill(victim);
        stage.await_state(victim.other(), State::Alone);
        work.await_more();
        stage.start(victim, "secondary");
        stage.await_protected();
        work.await_more();
    }
    // In between, the primary's and the secondary's output were equal on several flows.
    let status = stage.status(Host::A).expect("the primary answers");
    assert!(status.cards[0].matched > 0, "{:?}", status.cards);
    drop(work.finish(&stage));
}

#[test]
fn hosts_with_different_numbers_of_queues_are_no_pair() {
    let Some(mut stage) = two_queues() else { return };
    stage.start(Host::B, "secondary");
    await_fact("the secondary", || stage.status(Host::B));
    let mut words = stage.words(Host::A, "primary");
    let tap = words
        .iter_mut()
        .find(|word| word.starts_with(TAP))
        .expect("it was said");
    TAP.clone_into(tap);
    let (status, text) = stage.run(Host::A, words);
    assert!(!status.success());
    assert!(text.contains("offloads=on,queues=2"), "{text}");
    let journal = Record::journal_for(&stage.image(Host::A));
    assert!(!journal.exists(), "a start that is refused leaves nothing behind");
}
