//! Small scripted worlds: one fault at one step of the protocol, and what must come of it.

use checkpoint::wire::{EndMark, Heartbeat, Input, Message};
use checkpoint::{Epoch, Generation, InputNumber, Instant, Tag};
use harness::faults::Fault;
use harness::node::{Node, Role};
use harness::world::{Aim, World};
use primary::event::Event as PrimaryEvent;
use secondary::event::Event as SecondaryEvent;
use storage::Image;

const KILL_PRIMARY: Aim = |[primary, _]| Fault::Kill(primary);
const KILL_SECONDARY: Aim = |[_, secondary]| Fault::Kill(secondary);
const CUT: Aim = |_| Fault::CutLink;
const RESET: Aim = |_| Fault::CloseLink;

/// Phases of the first checkpoint of a pairing; until its end mark is sent only the primary may run.
const FIRST: [&str; 6] = [
    "pairing",
    "syncing",
    "stopping first",
    "sending first",
    "awaiting first",
    "recording",
];
/// Phases of a later checkpoint, in their order.
const CHECKPOINT: [&str; 6] = ["stopping", "sending", "awaiting", "checking", "loading", "committing"];

fn new_world(witness: bool) -> World {
    let mut world = if witness {
        World::new(1)
    } else {
        World::without_witness(1)
    };
    world.restarts = false;
    world
}

fn protected() -> World {
    protected_in(new_world(true))
}

fn protected_in(mut world: World) -> World {
    assert!(world.run_until(5_000, World::is_protected), "{}", world.trace);
    world.run(50);
    assert!(world.checkers.answers > 0);
    world
}

/// Waits for an armed fault; a checkpoint is asked for, so that its phases come.
fn spring(world: &mut World, phase: &'static str, aim: Aim) {
    let before = world.faults;
    world.arm(phase, aim);
    world.ask_primary(0, PrimaryEvent::CheckpointAsked);
    assert!(
        world.run_until(5_000, |world| world.faults > before),
        "{phase} did not come\n{}",
        world.trace
    );
}

/// That host runs the VM alone within so many milliseconds, and serves.
fn goes_on(world: &mut World, node: usize, milliseconds: u64) {
    assert!(
        world.run_until(milliseconds, |world| world.phase(node) == "alone"),
        "host {node} is {}\n{}",
        world.phase(node),
        world.trace
    );
    serves(world);
}

fn serves(world: &mut World) {
    let answers = world.checkers.answers;
    world.run(600);
    assert!(world.checkers.answers > answers + 5, "no answers\n{}", world.trace);
}

fn committed(node: &Node) -> Epoch {
    node.record.expect("recorded").committed
}

fn tag_of(node: &Node) -> Tag {
    match &node.role {
        Role::Primary(primary) => primary.tag(),
        Role::Secondary(secondary) => secondary.tag(),
        Role::Off | Role::Waiting => panic!("the host has no role"),
    }
}

#[test]
fn case_a1_a_primary_that_dies_before_the_end_mark_leaves_the_old_state() {
    for phase in ["stopping", "sending"] {
        let mut world = protected();
        let before = world.checkers.last_stop();
        spring(&mut world, phase, KILL_PRIMARY);
        let last = world.checkers.last_stop();
        // At `stopping` the order is given, and the stop itself has not come.
        let in_flight = if phase == "stopping" { last.next() } else { last };
        assert!(in_flight > before);
        goes_on(&mut world, 1, 200);
        assert!(committed(world.node(1)) < in_flight, "{phase}");
    }
}

#[test]
fn case_a2_a_primary_that_dies_after_the_end_mark_leaves_one_state_or_the_other() {
    for phase in ["awaiting", "checking"] {
        let mut world = protected();
        spring(&mut world, phase, KILL_PRIMARY);
        goes_on(&mut world, 1, 200);
        let last = world.checkers.last_stop();
        assert!([last, Epoch(last.0 - 1)].contains(&committed(world.node(1))), "{phase}");
    }
}

#[test]
fn case_a3_a_primary_that_dies_after_the_commit_point_leaves_the_new_state() {
    for phase in ["loading", "committing"] {
        let mut world = protected();
        spring(&mut world, phase, KILL_PRIMARY);
        let last = world.checkers.last_stop();
        goes_on(&mut world, 1, 200);
        assert_eq!(committed(world.node(1)), last, "{phase}");
    }
}

#[test]
fn case_a6_a_primary_goes_on_when_the_secondary_dies_at_any_step() {
    for phase in FIRST {
        let mut world = new_world(true);
        world.arm(phase, KILL_SECONDARY);
        assert!(world.run_until(5_000, |world| world.faults == 1), "{phase}");
        goes_on(&mut world, 0, 200);
    }
    for phase in CHECKPOINT {
        let mut world = protected();
        spring(&mut world, phase, KILL_SECONDARY);
        goes_on(&mut world, 0, 200);
    }
}

#[test]
fn case_a7_a_secondary_that_hangs_is_left_behind_and_fenced_when_it_wakes() {
    let mut world = protected();
    world.fault(Fault::Freeze(1, 2_000));
    goes_on(&mut world, 0, 700);
    world.run(2_500);
    assert_eq!(world.node(1).outcome, Some("fenced"));
}

#[test]
fn case_a10_messages_that_no_primary_sends_end_the_link_and_nothing_else() {
    let forgeries: [fn(Tag) -> Message; 6] = [
        |tag| {
            Message::Input(Input {
                tag: Tag {
                    generation: Generation(1),
                    ..tag
                },
                number: InputNumber(1),
                frame: bytes::Bytes::new(),
            })
        },
        |tag| {
            Message::Input(Input {
                tag,
                number: InputNumber(u64::MAX),
                frame: bytes::Bytes::new(),
            })
        },
        Message::Begin,
        Message::Acknowledge,
        |tag| {
            Message::End(EndMark {
                tag,
                base: None,
                pages: 1,
                pages_digest: 2,
                writes: 3,
                writes_digest: 4,
                sections: 5,
                input: InputNumber(6),
                entropy: [0; 32],
            })
        },
        |_| {
            Message::Heartbeat(Heartbeat {
                sent: Instant(1),
                echo: Instant(u64::MAX),
            })
        },
    ];
    for (number, forge) in forgeries.into_iter().enumerate() {
        let mut world = protected();
        let tag = tag_of(world.node(1));
        world.forge(1, false, forge(tag));
        world.run(1);
        assert_eq!(world.phase(1), "severed", "forgery {number}");
        goes_on(&mut world, 0, 1_000);
    }
}

#[test]
fn an_input_of_an_old_generation_is_refused_even_if_all_else_fits() {
    for (age, phase) in [(0, "loading"), (1, "severed")] {
        let mut world = new_world(true);
        assert!(world.run_until(5_000, |world| world.phase(1) == "loading"));
        let Tag { generation, epoch } = tag_of(world.node(1));
        let tag = Tag {
            generation: Generation(generation.0 - age),
            epoch: epoch.next(),
        };
        let input = Input {
            tag,
            number: InputNumber(1),
            frame: bytes::Bytes::new(),
        };
        world.ask_secondary(1, SecondaryEvent::PeerSent(Message::Input(input)));
        assert_eq!(world.phase(1), phase);
    }
}

#[test]
fn messages_that_no_secondary_sends_end_the_link_and_the_primary_goes_on() {
    let forgeries: [fn(Tag) -> Message; 6] = [
        Message::Acknowledge,
        Message::Committed,
        Message::Loaded,
        |tag| Message::Confirm(tag, InputNumber(u64::MAX)),
        |tag| {
            Message::Want(Tag {
                generation: Generation(1),
                ..tag
            })
        },
        |_| {
            Message::Heartbeat(Heartbeat {
                sent: Instant(1),
                echo: Instant(u64::MAX),
            })
        },
    ];
    for forge in forgeries {
        let mut world = protected();
        let tag = tag_of(world.node(0));
        world.forge(0, false, forge(tag));
        goes_on(&mut world, 0, 1_000);
    }
}

#[test]
fn case_b11_a_cut_or_reset_link_leaves_one_side_running_and_the_other_fenced() {
    for aim in [CUT, RESET] {
        for phase in CHECKPOINT {
            let mut world = protected();
            spring(&mut world, phase, aim);
            world.run(1_500);
            let phases = [world.phase(0), world.phase(1)];
            assert!(
                phases == ["alone", "off"] || phases == ["off", "alone"],
                "{phase}: {phases:?}"
            );
            let loser = usize::from(phases[0] == "alone");
            assert_eq!(world.node(loser).outcome, Some("fenced"), "{phase}");
            serves(&mut world);
        }
    }
}

#[test]
fn a_link_lost_in_the_first_checkpoint_leaves_the_primary_running() {
    for aim in [CUT, RESET] {
        for phase in ["pairing", "syncing", "stopping first", "sending first"] {
            let mut world = new_world(true);
            world.arm(phase, aim);
            assert!(world.run_until(5_000, |world| world.faults == 1), "{phase}");
            goes_on(&mut world, 0, 1_500);
            // Fenced if the end mark got through before the link was gone.
            assert!(matches!(world.node(1).outcome, Some("unpaired" | "fenced")), "{phase}");
        }
    }
}

#[test]
fn case_b12_nobody_runs_while_the_witness_is_unreachable() {
    for aim in [CUT, RESET] {
        let mut world = protected();
        world.fault(Fault::WitnessDown(3_000));
        world.fault(aim([0, 1]));
        world.run(1_000);
        assert_eq!([world.phase(0), world.phase(1)], ["contending", "claiming"]);
        assert!((0..2).all(|node| !world.node(node).running), "both guests stand");
        let answers = world.checkers.answers;
        world.run(1_500);
        assert_eq!(world.checkers.answers, answers);
        world.run(1_500);
        assert!((0..2).any(|node| world.phase(node) == "alone"));
        serves(&mut world);
    }
}

#[test]
fn an_unreachable_witness_does_not_disturb_a_protected_pair() {
    let mut world = protected();
    world.fault(Fault::WitnessDown(3_000));
    serves(&mut world);
    assert!(world.run_until(100, World::is_protected));
}

#[test]
fn case_b14_a_primary_that_wakes_after_the_takeover_lets_nothing_out() {
    let mut world = protected();
    world.fault(Fault::Freeze(0, 900));
    goes_on(&mut world, 1, 600);
    world.run(1_000);
    assert_eq!(world.node(0).outcome, Some("fenced"));
}

#[test]
fn releases_are_dropped_when_the_lease_ran_out_in_a_stopped_process() {
    let mut dropped = 0;
    for seed in 0..20 {
        let mut world = World::new(seed);
        world.restarts = false;
        let mut world = protected_in(world);
        world.fault(Fault::Freeze(0, 250));
        world.run(400);
        dropped += world.checkers.late;
        serves(&mut world);
    }
    assert!(dropped > 0, "no release was late in any of the worlds");
}

#[test]
fn case_b16_short_stalls_cause_no_takeover() {
    let mut world = protected();
    for _ in 0..5 {
        world.fault(Fault::Stall(120));
        world.run(400);
        assert!([world.phase(0), world.phase(1)].iter().all(|phase| *phase != "off"));
    }
    serves(&mut world);
    assert_eq!(tag_of(world.node(0)).generation, Generation(2), "the same pairing");
}

#[test]
fn a_death_that_the_kernel_tells_of_is_acted_on_at_once_and_a_silent_one_after_the_limit() {
    let mut world = protected();
    let start = world.milliseconds();
    world.fault(Fault::Kill(0));
    assert!(world.run_until(1_000, |world| world.phase(1) == "alone"));
    assert!(world.milliseconds() - start < 20);

    let mut world = protected();
    let start = world.milliseconds();
    world.fault(Fault::PowerLoss(0));
    assert!(world.run_until(1_000, |world| world.phase(1) == "alone"));
    assert!((250..420).contains(&(world.milliseconds() - start)));
}

#[test]
fn a_secondary_whose_link_was_reset_waits_for_the_lease() {
    let mut world = protected();
    let start = world.milliseconds();
    // The primary's own word does not arrive: it knows of nothing.
    world.fault(Fault::CutTo(0));
    world.fault(Fault::CloseLink);
    assert!(world.run_until(100, |world| world.phase(1) == "draining"));
    assert!(world.run_until(1_000, |world| world.phase(1) != "draining"));
    assert!(
        world.milliseconds() - start >= 200,
        "it contended while the primary could release"
    );
}

#[test]
fn without_a_witness_the_secondary_waits_for_the_operator() {
    let mut world = protected_in(new_world(false));
    world.fault(Fault::Kill(0));
    world.run(3_000);
    assert_eq!(world.phase(1), "claiming");
    world.ask_secondary(1, SecondaryEvent::TakeOverAsked);
    goes_on(&mut world, 1, 100);
}

#[test]
fn without_a_witness_a_primary_goes_on_alone() {
    let mut world = protected_in(new_world(false));
    world.fault(Fault::CutLink);
    goes_on(&mut world, 0, 1_000);
    assert_eq!(world.phase(1), "claiming");
}

#[test]
fn an_orderly_end_of_the_primary_leaves_equal_and_clean_images() {
    let mut world = protected();
    world.ask_primary(0, PrimaryEvent::StopAsked);
    world.run(1_000);
    for node in 0..2 {
        assert_eq!(world.node(node).outcome, Some("ended"), "{}", world.trace);
        let record = world.node(node).record.expect("recorded");
        assert!(record.clean && record.complete);
    }
    assert_eq!(committed(world.node(0)), committed(world.node(1)));
    assert_eq!(disk(world.node(0)), disk(world.node(1)));
}

fn disk(node: &Node) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(node.image.size()).expect("small")];
    node.image.read_at(0, &mut bytes).expect("in range");
    bytes
}

#[test]
fn an_orderly_end_in_any_phase_ends_both() {
    for phase in FIRST.into_iter().chain(CHECKPOINT) {
        let mut world = new_world(true);
        assert!(
            world.run_until(5_000, |world| (0..2).any(|node| world.phase(node) == phase)),
            "{phase}"
        );
        world.ask_primary(0, PrimaryEvent::StopAsked);
        world.run(7_000);
        assert_eq!(world.node(0).outcome, Some("ended"), "{phase}\n{}", world.trace);
        assert_eq!(world.node(1).outcome, Some("ended"), "{phase}\n{}", world.trace);
    }
}

#[test]
fn an_orderly_end_of_the_secondary_lets_the_primary_go_on_at_once_even_without_an_answer_of_the_witness() {
    for phase in ["protected", "sending", "awaiting", "loading", "committing"] {
        let mut world = protected();
        world.ask_primary(0, PrimaryEvent::CheckpointAsked);
        assert!(world.run_until(5_000, |world| (0..2).any(|node| world.phase(node) == phase)));
        world.fault(Fault::WitnessDown(5_000));
        world.ask_secondary(1, SecondaryEvent::StopAsked);
        goes_on(&mut world, 0, 50);
        assert_eq!(world.node(1).outcome, Some("ended"), "{phase}");
    }
}

#[test]
fn output_waits_for_the_secondary() {
    let mut world = protected();
    world.fault(Fault::Freeze(1, 150));
    world.run(2);
    let answers = world.checkers.answers;
    world.run(140);
    assert_eq!(world.checkers.answers, answers);
    world.run(600);
    assert!(world.checkers.answers > answers);
    assert_eq!(tag_of(world.node(0)).generation, Generation(2), "the same pairing");
}

#[test]
fn a_checkpoint_is_taken_when_the_operator_asks() {
    let mut world = protected();
    assert!(world.run_until(1_000, World::is_protected));
    let last = world.checkers.last_stop();
    world.ask_primary(0, PrimaryEvent::CheckpointAsked);
    assert!(world.run_until(10, |world| world.checkers.last_stop() > last));
    assert!(world.run_until(10, World::is_protected));
}

#[test]
fn case_e38_the_survivor_is_protected_again_and_survives_the_next_death() {
    let mut world = World::new(3);
    assert!(world.run_until(5_000, World::is_protected));
    for turn in 0..4 {
        let primary = usize::from(matches!(world.node(1).role, Role::Primary(_)));
        world.fault(Fault::Kill(primary));
        serves(&mut world);
        assert!(world.run_until(5_000, World::is_protected), "turn {turn}");
    }
}

#[test]
fn a_primary_whose_input_was_held_hears_its_clients_again_when_the_secondary_is_lost() {
    let mut world = protected();
    world.fault(Fault::Freeze(1, 5_000));
    let delivery = checkpoint::pair::Delivery {
        number: None,
        wire: bytes::Bytes::from_static(b"a frame"),
        guest: bytes::Bytes::from_static(b"a frame"),
    };
    for _ in 0..checkpoint::limits::INPUTS_UNCONFIRMED_MAX {
        world.ask_primary(0, PrimaryEvent::InputConsumed(delivery.clone()));
    }
    assert!(world.node(0).input_held);
    goes_on(&mut world, 0, 1_000);
    assert!(!world.node(0).input_held);
}
