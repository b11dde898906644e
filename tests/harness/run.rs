//! One seed: a list of faults, a world that runs through them, and what must hold at its end.
//!
//! The list is a function of the seed alone, so that a fault can be left out (by its number) and the others stay.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use primary::protocol::Mode;

use crate::coverage::{Coverage, STEPS, impossible};
use crate::faults::Kind;
use crate::node::Role;
use crate::random::Random;
use crate::world::{World, mode_of};

/// Steps of a checkpoint whose pages are compared.
const COMPARING: [&str; 4] = ["comparing", "halting", "standing", "answering"];
/// Rounds of faults in a seed; each ends with the pair protected again.
const ROUNDS: u64 = 8;
/// Simulated milliseconds from a start, or from the last fault of a round, to a protected pair that serves.
///
/// The longest fault lasts 1.5 s, a restart comes within 0.8 s of a death, and each may come twice.
pub const PROTECTED_WITHIN: u64 = 10_000;
/// The same for a survivor whose peer is dead for good.
pub const ALONE_WITHIN: u64 = 3_000;
/// Simulated milliseconds in which an undisturbed pair gets to [`LEAST`].
const ENOUGH_WITHIN: u64 = 20_000;
/// Committed checkpoints, faults and answers to clients in every seed.
pub const LEAST: [u64; 3] = [20, 3, 200];

/// A fault that a seed has planned.
#[derive(Clone, Copy, Debug)]
struct Planned {
    kind: Kind,
    when: When,
}

#[derive(Clone, Copy, Debug)]
enum When {
    /// So many microseconds after the beginning of its round, against that host.
    At(u64, usize),
    /// As soon as a host is at this step, against that host.
    AtStep(&'static str),
    /// As soon as a host is at this step, against its peer.
    AtPeerOf(&'static str),
}

/// What came of a seed that broke no rule.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Which faults met which steps.
    pub coverage: Coverage,
    /// Committed checkpoints, faults, answers to clients.
    pub counts: [u64; 3],
    /// Faults in the seed's list.
    pub planned: usize,
    /// Of everything that happened, in its order.
    pub digest: u64,
}

/// A broken rule.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The seed.
    pub seed: u64,
    /// Which rule, and how.
    pub message: String,
    /// The last events.
    pub trace: String,
    /// Faults in the seed's list.
    pub planned: usize,
}

thread_local! {
    static CURRENT: Cell<Option<(u64, usize)>> = const { Cell::new(None) };
}

/// Runs a seed without the faults of these numbers; `loud` prints every event.
///
/// # Errors
/// Tells which rule was broken.
pub fn run(seed: u64, skip: &[usize], loud: bool) -> Result<Report, Box<Failure>> {
    let rounds = plan(seed);
    let planned = rounds.iter().map(Vec::len).sum();
    let mut world = if seed % 8 == 5 {
        World::not_started(seed)
    } else {
        World::new(seed)
    };
    if loud {
        world.trace.be_loud();
    }
    CURRENT.set(Some((seed, planned)));
    let result = catch_unwind(AssertUnwindSafe(|| go(&mut world, seed, &rounds, skip)));
    CURRENT.set(None);
    world.coverage.switched = world.checkers.switched.into();
    world.coverage.buffered_flow = world.checkers.buffered_flow.into();
    match result {
        Ok(()) => Ok(Report {
            coverage: world.coverage,
            counts: [world.checkers.loads, world.faults, world.checkers.answers],
            planned,
            digest: world.trace.digest(),
        }),
        Err(panic) => Err(Box::new(Failure {
            seed,
            message: message(&*panic),
            trace: world.trace.to_string(),
            planned,
        })),
    }
}

/// Returns the seed that this thread is running, and the number of its faults: for a program that ends at a panic.
#[must_use]
pub fn current() -> Option<(u64, usize)> {
    CURRENT.get()
}

/// Leaves out one fault after the other, as long as `fails` still holds; returns the numbers left out.
pub fn minimise(planned: usize, mut fails: impl FnMut(&[usize]) -> bool) -> Vec<usize> {
    let mut skip = Vec::new();
    for fault in (0..planned).rev() {
        skip.push(fault);
        if !fails(&skip) {
            skip.pop();
        }
    }
    skip.sort_unstable();
    skip
}

/// Runs seeds on so many threads, in their order as far as that goes, until one fails or `go_on` says no.
///
/// Returns how many ran, their coverage, and the first failure.
pub fn run_many(
    start: u64,
    seeds: u64,
    threads: usize,
    go_on: impl Fn(u64) -> bool + Sync,
) -> (u64, Coverage, Option<Box<Failure>>) {
    let next = AtomicU64::new(0);
    let done = Mutex::new((0, Coverage::default(), None::<Box<Failure>>));
    let work = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let ran = {
                let done = done.lock().unwrap_or_else(PoisonError::into_inner);
                if done.2.is_some() || number >= seeds {
                    return;
                }
                done.0
            };
            if !go_on(ran) {
                return;
            }
            let result = run(start + number, &[], false);
            let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
            done.0 += 1;
            match result {
                Ok(report) => done.1.add(&report.coverage),
                Err(failure) if done.2.as_ref().is_none_or(|other| failure.seed < other.seed) => done.2 = Some(failure),
                Err(_) => {}
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(work);
        }
    });
    done.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Returns the numbers and names of a seed's faults, for a report.
#[must_use]
pub fn describe_plan(seed: u64, skip: &[usize]) -> String {
    let faults = plan(seed).into_iter().flatten().enumerate();
    let kept = faults.filter(|(number, _)| !skip.contains(number));
    kept.map(|(number, fault)| match fault.when {
        When::At(micros, host) => format!(
            "  {number}: {:?} of host {host} {micros} µs into its round\n",
            fault.kind
        ),
        When::AtStep(step) => format!("  {number}: {:?} at '{step}'\n", fault.kind),
        When::AtPeerOf(step) => format!("  {number}: {:?} of the peer at '{step}'\n", fault.kind),
    })
    .collect()
}

fn plan(seed: u64) -> Vec<Vec<Planned>> {
    let mut random = Random::new(seed ^ 0x7461_6e64_656d);
    // Where only one guest runs nothing is compared; the other seeds make up for it.
    let compares = |step: &&'static str| COMPARING.contains(step);
    let steps: Vec<_> = match mode_of(seed) {
        Mode::Lockstep | Mode::Auto => STEPS.into_iter().chain(COMPARING).collect(),
        Mode::Buffered => STEPS.into_iter().filter(|step| !compares(step)).collect(),
    };
    let groups: Vec<_> = steps.into_iter().flat_map(groups).collect();
    let mut plan = Vec::new();
    for round in 0..ROUNDS {
        // A group has one step; the stride takes a seed from step to step. The seeds of a mode, every third, take turns.
        let (turn, count) = (seed / 3 * ROUNDS + round, groups.len() as u64);
        let stride = STRIDES[usize::try_from(turn / count).expect("few") % STRIDES.len()];
        let (step, kinds) = &groups[usize::try_from(turn * stride % count).expect("few")];
        let when = When::AtStep(step);
        let mut faults: Vec<_> = kinds.iter().map(|kind| Planned { kind: *kind, when }).collect();
        faults.push(prelude(step, &mut random).unwrap_or_else(|| at_random(&mut random)));
        plan.push(faults);
    }
    plan
}

/// Aimed faults in each round, all at one step.
const AIMED_PER_ROUND: usize = 3;
/// Primes, so that every group gets its turn; more than one, so that it does not always come after the same.
const STRIDES: [u64; 8] = [1_009, 1_013, 1_019, 1_021, 1_031, 1_033, 1_039, 1_049];

/// All kinds of faults that can meet a step, a few at a time: those that end the step in different groups, and last in them.
fn groups(step: &'static str) -> Vec<(&'static str, Vec<Kind>)> {
    let mut kinds: Vec<_> = Kind::ALL
        .into_iter()
        .filter(|kind| impossible(step, *kind).is_none())
        .collect();
    kinds.sort_by_key(|kind| kind.ends_the_step());
    let count = kinds.len().div_ceil(AIMED_PER_ROUND);
    let group = |number| kinds.iter().copied().skip(number).step_by(count).collect();
    (0..count).map(|number| (step, group(number))).collect()
}

fn at_random(random: &mut Random) -> Planned {
    let kind = one_of(&Kind::ALL, random);
    let when = When::At(random.below(400_000), usize::from(random.one_in(2)));
    Planned { kind, when }
}

fn one_of(kinds: &[Kind], random: &mut Random) -> Kind {
    kinds[usize::try_from(random.below(kinds.len() as u64)).expect("few")]
}

/// What brings a step about that an undisturbed pair never reaches.
fn prelude(step: &str, random: &mut Random) -> Option<Planned> {
    let (when, kinds): (_, &[Kind]) = match step {
        "severed" => (When::AtStep("following"), &[Kind::Repeat]),
        // Damage ends the data connection and leaves the control connection as it is.
        "draining" => (
            When::AtStep("following"),
            &[Kind::CloseLink, Kind::HalfOpen, Kind::Corrupt, Kind::Corrupt],
        ),
        "contending" => (When::AtPeerOf("protected"), &[Kind::Kill, Kind::PowerLoss, Kind::CutTo]),
        "claiming" | "won" => (When::AtPeerOf("following"), &[Kind::Kill, Kind::PowerLoss]),
        "recorded" => (When::AtPeerOf("loading"), &[Kind::Kill]),
        "waiting" | "alone" | "pairing" | "syncing" | "stopping first" | "copying first" | "sending first"
        | "awaiting first" | "idle" | "receiving" | "recording" => {
            let when = When::At(random.below(200_000), usize::from(random.one_in(2)));
            (when, &[Kind::Kill, Kind::PowerLoss, Kind::CutLink, Kind::CloseLink])
        }
        _ => return None,
    };
    let kind = one_of(kinds, random);
    Some(Planned { kind, when })
}

fn go(world: &mut World, seed: u64, rounds: &[Vec<Planned>], skip: &[usize]) {
    assert!(
        world.run_until(PROTECTED_WITHIN, World::is_protected),
        "rule 6: not protected within {PROTECTED_WITHIN} ms of the start"
    );
    let mut number = 0;
    for round in rounds {
        for fault in round {
            number += 1;
            if skip.contains(&(number - 1)) {
                continue;
            }
            match fault.when {
                When::At(micros, host) => {
                    let fault = fault.kind.against(host, world.random());
                    world.inject_at(fault, micros);
                }
                When::AtStep(step) => world.arm_kind(step, fault.kind, false),
                When::AtPeerOf(step) => world.arm_kind(step, fault.kind, true),
            }
        }
        world.run(700);
        world.run_until(1_500, |world| world.armed() == 0);
        world.disarm();
        recovers(world);
    }
    let enough = |world: &World| world.checkers.loads >= LEAST[0] && world.checkers.answers >= LEAST[2];
    assert!(
        world.run_until(ENOUGH_WITHIN, enough),
        "rule 6: only {} checkpoints and {} answers",
        world.checkers.loads,
        world.checkers.answers
    );
    if skip.is_empty() {
        let counts = counts(world);
        assert!(counts[1] >= LEAST[1], "the seed has only {} faults", counts[1]);
    }
    if seed.is_multiple_of(8) {
        recovers(world);
        let survivor = usize::from(seed.is_multiple_of(16));
        world.bury(1 - survivor);
        assert!(
            world.run_until(ALONE_WITHIN, |world| is_alone(world, survivor)),
            "rule 6: the survivor is '{}' {ALONE_WITHIN} ms after its peer died for good",
            world.phase(survivor)
        );
        serves(world);
    }
    world.finish();
}

fn counts(world: &World) -> [u64; 3] {
    [world.checkers.loads, world.faults, world.checkers.answers]
}

fn recovers(world: &mut World) {
    let is_well = |world: &World| world.is_protected() && !world.is_disturbed();
    assert!(
        world.run_until(PROTECTED_WITHIN, is_well),
        "rule 6: not protected within {PROTECTED_WITHIN} ms of the last fault, but '{}' and '{}'",
        world.phase(0),
        world.phase(1)
    );
    serves(world);
}

fn serves(world: &mut World) {
    let answers = world.checkers.answers;
    let served = world.run_until(2_000, |world| world.checkers.answers > answers + 3);
    assert!(served, "rule 6: clients get no answers for 2 s");
}

fn is_alone(world: &World, node: usize) -> bool {
    matches!(&world.node(node).role, Role::Primary(primary) if primary.state_name() == "alone")
}

fn message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("a panic without words").to_owned()
}
