//! Small scripted worlds: a fault at every phase of the protocol, with clients, delays and disks, and what must come of it.
//!
//! What a single order of events can show is told in `scenarios/*.txt` instead.

use checkpoint::Epoch;
use checkpoint::pair::Trigger;
use harness::faults::Fault;
use harness::node::{Node, Role};
use harness::world::{Aim, World};
use primary::event::Event as PrimaryEvent;
use primary::protocol::SyncCounts;
use secondary::event::Event as SecondaryEvent;
use storage::Image;

const KILL_PRIMARY: Aim = |[primary, _]| Fault::Kill(primary);
const KILL_SECONDARY: Aim = |[_, secondary]| Fault::Kill(secondary);
const CUT: Aim = |_| Fault::CutLink;
const RESET: Aim = |_| Fault::CloseLink;

/// Phases of the first checkpoint of a pairing; until its end mark is sent only the primary may run.
const FIRST: [&str; 7] = [
    "pairing",
    "syncing",
    "stopping first",
    "copying first",
    "sending first",
    "awaiting first",
    "recording",
];
/// Phases of a later checkpoint, in their order.
const CHECKPOINT: [&str; 11] = [
    "stopping",
    "copying",
    "comparing",
    "halting",
    "standing",
    "answering",
    "sending",
    "awaiting",
    "checking",
    "loading",
    "committing",
];

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

fn sync_of(node: &Node) -> SyncCounts {
    match &node.role {
        Role::Primary(primary) => primary.counters().sync,
        _ => panic!("the host is no primary"),
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
fn case_b11_a_cut_or_reset_link_leaves_one_side_running_and_the_other_fenced() {
    let mut returned = 0;
    for aim in [CUT, RESET] {
        for phase in CHECKPOINT {
            let mut world = protected();
            spring(&mut world, phase, aim);
            let fenced = |world: &World, node: usize| world.node(node).outcome == Some("fenced");
            assert!(
                world.run_until(1_500, |world| fenced(world, 0) || fenced(world, 1)),
                "{phase}"
            );
            if fenced(&world, 0) {
                goes_on(&mut world, 1, 100);
                assert_eq!(world.phase(0), "off", "{phase}");
            } else {
                serves(&mut world);
                assert!(
                    world.run_until(1_000, World::is_protected),
                    "{phase}: the loser waits, and follows again"
                );
                let sync = sync_of(world.node(0));
                assert!(sync.memory_by_difference && sync.blocks.is_some(), "{phase}: {sync:?}");
                returned += 1;
            }
        }
    }
    assert!(returned > 0, "the primary never won");
}

#[test]
fn a_secondary_that_loses_power_brings_the_disk_that_it_had_made_durable() {
    let mut by_difference = 0;
    for seed in 0..12 {
        for phase in ["loading", "committing"] {
            let mut world = protected_in(World::new(seed));
            spring(&mut world, phase, |[_, other]| Fault::PowerLoss(other));
            goes_on(&mut world, 0, 1_000);
            assert!(
                world.run_until(5_000, World::is_protected),
                "{phase} {seed}\n{}",
                world.trace
            );
            let sync = sync_of(world.node(0));
            assert!(!sync.memory_by_difference, "{phase} {seed}");
            by_difference += u32::from(sync.blocks.is_some());
        }
    }
    assert!(by_difference > 0, "no disk was known");
}

#[test]
fn a_link_lost_in_the_first_checkpoint_leaves_the_primary_running() {
    for aim in [CUT, RESET] {
        for phase in ["pairing", "syncing", "stopping first", "copying first", "sending first"] {
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
        nic: checkpoint::Nic::FIRST,
        number: None,
        wire: bytes::Bytes::from_static(b"a frame"),
        guest: bytes::Bytes::from_static(b"a frame"),
    };
    for _ in 0..world.inputs_max() {
        world.ask_primary(0, PrimaryEvent::InputConsumed(delivery.clone()));
    }
    assert!(world.node(0).input_held);
    goes_on(&mut world, 0, 1_000);
    assert!(!world.node(0).input_held);
}

#[test]
fn input_that_a_standing_guest_can_not_confirm_is_covered_by_a_checkpoint_before_it_is_too_much() {
    // A buffered one.
    let mut world = protected_in(World::new(2));
    let delivery = checkpoint::pair::Delivery {
        nic: checkpoint::Nic::FIRST,
        number: None,
        wire: bytes::Bytes::from_static(b"a frame"),
        guest: bytes::Bytes::from_static(b"a frame"),
    };
    let by_limit = |world: &World| match &world.node(0).role {
        Role::Primary(primary) => primary.counters().checkpoints.get(&Trigger::Limit).copied(),
        _ => panic!("the host is no primary"),
    };
    assert!(world.run_until(1_000, |world| world.phase(0) == "protected"));
    assert_eq!(by_limit(&world), None);
    for _ in 0..world.inputs_max() / 2 {
        world.ask_primary(0, PrimaryEvent::InputConsumed(delivery.clone()));
    }
    assert!(!world.node(0).input_held);
    assert!(world.run_until(1_000, |world| by_limit(world).is_some()));
    serves(&mut world);
}
