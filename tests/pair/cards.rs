//! A VM with two network cards, each with a network of its own: clients on both notice no takeover.

use link::control::Command;
use link::flows::Flows;
use link::status::State;
use tandem::clients::Target;
use tandem::lab::{Host, SECOND_TAP, TAP};

use crate::load::Work;
use crate::stage::{Setup, Stage, await_fact};

fn two_cards() -> Option<Stage> {
    let stage = Stage::new(Setup {
        more: vec!["--tap", SECOND_TAP, "--cmdline", "isn_skew=1"],
        ..Setup::default()
    })?;
    stage.lab.add_second_network().expect("the lab has a second network");
    Some(stage)
}

#[test]
fn clients_on_both_cards_live_through_the_deaths_of_their_hosts() {
    let Some(mut stage) = two_cards() else { return };
    stage.pair(Host::A);
    let works = [
        Work::start(&stage, "first:"),
        Work::start_at(&stage, Target::on_card(1), "second:"),
    ];
    let flows: Flows = await_fact("output on both cards that is equal", || {
        let answer = stage
            .ask(Host::A, &Command::Flows { most: 1_000 })
            .expect("the primary answers");
        let flows: Flows = serde_json::from_value(answer).expect("they are flows");
        let equal = |card| flows.flows.iter().any(|flow| flow.card == card && flow.matched > 0);
        (equal(0) && equal(1)).then_some(flows)
    });
    assert_eq!(flows.cards, 2);
    let told = stage.status(Host::A).expect("the primary answers").cards;
    let taps: Vec<&str> = told.iter().map(|card| card.tap.as_str()).collect();
    assert_eq!(taps, [TAP, SECOND_TAP]);
    assert!(told.iter().all(|card| card.matched > 0), "{told:?}");
    for victim in [Host::A, Host::B] {
        let survivor = victim.other();
        stage.kill(victim);
        let status = stage.await_state(survivor, State::Alone);
        assert_eq!(status.role, "primary");
        works.iter().for_each(Work::await_more);
        stage.start(victim, "secondary");
        stage.await_protected();
        works.iter().for_each(Work::await_more);
    }
    works.into_iter().for_each(|work| drop(work.finish(&stage)));
}

#[test]
fn hosts_with_different_numbers_of_cards_are_no_pair() {
    let Some(mut stage) = two_cards() else { return };
    stage.start(Host::B, "secondary");
    await_fact("the secondary", || stage.status(Host::B));
    let mut words = stage.words(Host::A, "primary");
    let at = words.iter().position(|word| word == SECOND_TAP).expect("it was said");
    words.drain(at - 1..=at);
    let (status, text) = stage.run(Host::A, words);
    assert!(!status.success());
    assert!(text.contains("the number of network cards (one --tap each)"), "{text}");
}
