//! The model that is checked: what can happen in a state, and what must hold in each.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Mutex;

use checkpoint::Instant;
use checkpoint::failover::{Claim, Connection, Event, Standing};
use checkpoint::mutants::Mutant;
use stateright::{Model, Property};

use crate::link::Message;
use crate::world::{Bounds, Process, World};

/// Steps in which a run without faults must have come to output.
const PATIENCE: usize = 200;
const CONNECTIONS: [Connection; 2] = [Connection::Control, Connection::Data];

/// Something that can happen. The number is a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// The witness's answer to a claim arrives.
    Answer(usize, usize),
    /// The primary sends a heartbeat.
    Beat(usize),
    /// The program is started as primary.
    Boot(usize),
    /// A connection of a secondary breaks, though the primary lives.
    Break(usize, Connection),
    /// The end mark of the first checkpoint is sent.
    Checkpoint(usize),
    /// A primary dials and is accepted.
    Connect(usize),
    /// From now on nothing comes through from these hosts.
    Cut([bool; 2]),
    /// A message arrives, or a connection's end.
    Deliver(usize, Connection),
    /// The host dies: its peer hears nothing more.
    Die(usize),
    /// The witness decides a claim.
    Execute(usize, usize),
    /// The process is killed: its kernel ends the connections.
    Kill(usize),
    /// The primary breaks the protocol, as its secondary sees it.
    Misbehave(usize),
    /// A page stream of a secondary ends, because its primary has closed it or died.
    PagesEnd(usize),
    /// A starting host claims its term.
    Start(usize),
    /// A host that claims its first term gets no answer, and its program ends.
    StartUnanswered(usize),
    /// A record is durable.
    Store(usize),
    /// The operator ends a side in order.
    Stop(usize),
    /// The primary does not hear its secondary for the limit.
    Suspect(usize),
    /// The operator says that the old primary is off for good.
    TakeOver(usize),
    /// Time passes; the primary's clock may stand still meanwhile.
    Tick { still: bool },
    /// No answer comes to a claim, which may have been carried out, or may still be.
    Unanswered(usize, usize),
    /// A side looks at its deadline.
    Wake(usize),
}

/// What is explored, and under which deliberate bug.
pub(crate) struct Contests {
    pub(crate) bounds: Bounds,
    pub(crate) mutant: Option<Mutant>,
    /// Fingerprints of states from which a run without faults is known to end with output: with and without restarts.
    pub(crate) lively: [Mutex<BTreeSet<u64>>; 2],
}

impl Contests {
    pub(crate) fn new(bounds: Bounds, mutant: Option<Mutant>) -> Self {
        Self {
            bounds,
            mutant,
            lively: Default::default(),
        }
    }

    fn under_mutant<T>(&self, function: impl FnOnce() -> T) -> T {
        #[cfg(feature = "mutants")]
        if let Some(mutant) = self.mutant {
            return checkpoint::mutants::with(mutant, function);
        }
        assert!(self.mutant.is_none(), "this build has no mutants");
        function()
    }

    fn host_steps(&self, world: &World, host: usize, steps: &mut Vec<Step>) {
        let state = &world.hosts[host];
        for (index, ask) in state.asks.iter().enumerate() {
            if ask.verdict.is_none() {
                steps.push(Step::Execute(host, index));
            } else if !ask.orphan {
                steps.push(Step::Answer(host, index));
            }
            if world.faults > 0 && !ask.orphan {
                steps.push(Step::Unanswered(host, index));
            }
        }
        if !state.stores.is_empty() {
            steps.push(Step::Store(host));
        }
        match &state.process {
            Process::Waiting => steps.extend(self.bounds.witness.then_some(Step::Boot(host))),
            Process::Starting(_) => {
                steps.push(Step::Start(host));
                steps.extend((world.faults > 0).then_some(Step::StartUnanswered(host)));
            }
            Process::Started(_) => {}
            Process::Primary { contest, .. } => self.primary_steps(world, host, contest.standing(), steps),
            Process::Secondary { contest, silent, .. } => {
                self.secondary_steps(world, host, contest.standing(), *silent, steps);
            }
        }
        if world.faults > 0 && state.process != Process::Waiting {
            steps.extend([Step::Kill(host), Step::Die(host)]);
        }
    }

    fn primary_steps(&self, world: &World, host: usize, standing: Standing, steps: &mut Vec<Step>) {
        if world.attached(host) {
            steps.extend([Step::Suspect(host), Step::Beat(host)]);
        }
        if standing == (Standing::Leading { peer_entitled: false }) && world.attached(host) {
            steps.push(Step::Checkpoint(host));
        }
        let dials = standing == Standing::Alone && world.link.is_none() && world.pairings > 0;
        if dials && world.hosts[1 - host].process == Process::Waiting && world.accepts(&self.bounds, host) {
            steps.push(Step::Connect(host));
        }
        if let Standing::Contending(Claim::Open { retry: Some(_) }) = standing {
            steps.push(Step::Wake(host));
        }
        if world.faults > 0 {
            steps.push(Step::Stop(host));
        }
    }

    fn secondary_steps(&self, world: &World, host: usize, standing: Standing, silent: u8, steps: &mut Vec<Step>) {
        if !follows(standing) || silent >= self.bounds.limit {
            steps.push(Step::Wake(host));
        }
        let off = world.hosts[1 - host].process == Process::Waiting;
        if !self.bounds.witness && off {
            steps.push(Step::TakeOver(host));
        }
        if world.faults > 0 {
            steps.push(Step::Stop(host));
            if world.attached(host) {
                steps.push(Step::Misbehave(host));
                let every = [Connection::Control, Connection::Data, Connection::Pages];
                steps.extend(every.map(|connection| Step::Break(host, connection)));
            }
        }
    }

    fn link_steps(&self, world: &World, steps: &mut Vec<Step>) {
        let Some(link) = &world.link else { return };
        if !link.open[link.primary] && !link.pipes[link.primary][0].cut {
            steps.push(Step::PagesEnd(1 - link.primary));
        }
        for (host, pipes) in link.pipes.iter().enumerate() {
            for (pipe, connection) in pipes.iter().zip(CONNECTIONS) {
                if !pipe.queue.is_empty() {
                    steps.push(Step::Deliver(host, connection));
                }
            }
        }
        let whole = link.pipes.each_ref().map(|pipes| !pipes[0].cut);
        if world.faults > 0 && link.open == [true; 2] && whole == [true; 2] {
            steps.extend([[true, false], [false, true], [true, true]].map(Step::Cut));
        }
    }

    fn apply(&self, world: &mut World, step: Step) {
        let bounds = &self.bounds;
        let fault = matches!(
            step,
            Step::Break(..)
                | Step::Cut(_)
                | Step::Die(_)
                | Step::Kill(_)
                | Step::Misbehave(_)
                | Step::StartUnanswered(_)
                | Step::Stop(_)
                | Step::Unanswered(..)
        );
        world.faults -= u8::from(fault);
        match step {
            Step::Answer(host, index) => world.answer(bounds, host, index),
            Step::Beat(host) => world.send(host, Connection::Control, Message::Beat(0)),
            Step::Boot(host) => world.boot(host),
            Step::Break(host, connection) => world.closed(bounds, host, connection, false),
            Step::Checkpoint(host) => world.checkpoint(bounds, host),
            Step::Connect(host) => world.connect(bounds, host),
            Step::Cut(from) => world.cut(from),
            Step::Deliver(from, connection) => world.deliver(bounds, from, connection),
            Step::Die(host) => world.die(host, true),
            Step::Execute(host, index) => world.execute(host, index),
            Step::Kill(host) => world.die(host, false),
            Step::Misbehave(host) => world.misbehaved(bounds, host),
            Step::PagesEnd(host) => world.closed(bounds, host, Connection::Pages, true),
            Step::Start(host) => world.start(host),
            Step::StartUnanswered(host) => {
                world.start(host);
                world.die(host, true);
            }
            Step::Store(host) => world.stored(bounds, host),
            Step::Stop(host) => world.stop(bounds, host),
            Step::Suspect(host) => world.tell(bounds, host, Instant(0), Event::Lost),
            Step::TakeOver(host) => world.tell(bounds, host, Instant(0), Event::TakeOverAsked),
            Step::Tick { still } => world.tick(bounds, still),
            Step::Unanswered(host, index) => world.unanswered(bounds, host, index),
            Step::Wake(host) => world.wake(bounds, host),
        }
        for host in 0..2 {
            world.release(bounds, host);
        }
        world.simplify(bounds);
    }

    /// Returns what a run without faults does next, each side as prompt as it can be.
    fn prompt(&self, world: &World, restarts: bool) -> Option<Step> {
        let mut steps = Vec::new();
        self.actions(world, &mut steps);
        let first = |wanted: fn(&Step) -> bool| steps.iter().copied().find(wanted);
        first(|step| matches!(step, Step::Store(_) | Step::Start(_)))
            .or_else(|| first(|step| matches!(step, Step::Answer(..))))
            .or_else(|| first(|step| matches!(step, Step::Execute(..))))
            .or_else(|| first(|step| matches!(step, Step::Deliver(..))))
            .or_else(|| self.wait(world, |standing| !follows(standing)))
            .or_else(|| self.lease_step(world))
            .or_else(|| self.wait(world, |_| true))
            .or_else(|| {
                let boots = |step: &&Step| matches!(step, Step::Boot(host) if world.would_start(*host));
                steps.iter().find(boots).copied().filter(|_| restarts)
            })
    }

    /// A secondary in such a standing counts the ticks until it may act; a side that contends asks again.
    fn wait(&self, world: &World, wanted: fn(Standing) -> bool) -> Option<Step> {
        (0..2).find_map(|host| match &world.hosts[host].process {
            Process::Secondary { contest, silent, .. } if wanted(contest.standing()) => {
                let early = *silent < self.bounds.limit;
                Some(if early {
                    Step::Tick { still: false }
                } else {
                    Step::Wake(host)
                })
            }
            Process::Primary { contest, .. } if contest.deadline().is_some() => Some(Step::Wake(host)),
            _ => None,
        })
    }

    /// A primary that needs its lease renewed sends a heartbeat, or gives its secondary up.
    fn lease_step(&self, world: &World) -> Option<Step> {
        let link = world.link.as_ref()?;
        let host = link.primary;
        if !world.attached(host) {
            return None;
        }
        let dead = !link.open[1 - host] || link.pipes.iter().flatten().any(|pipe| pipe.cut);
        Some(if dead { Step::Suspect(host) } else { Step::Beat(host) })
    }

    /// Tells whether a run without faults from here ends with output.
    fn is_lively(&self, world: &World, restarts: bool) -> bool {
        let lively = &self.lively[usize::from(restarts)];
        let mut world = world.clone();
        (world.faults, world.pairings) = (0, 0);
        let mut passed = Vec::new();
        for _ in 0..PATIENCE {
            let mut hasher = DefaultHasher::new();
            world.hash(&mut hasher);
            let mark = hasher.finish();
            let known = lively.lock().expect("no thread panics").contains(&mark);
            if known || (0..2).any(|host| world.can_release(&self.bounds, host)) {
                lively.lock().expect("no thread panics").extend(passed);
                return true;
            }
            passed.push(mark);
            let Some(step) = self.prompt(&world, restarts) else {
                return false;
            };
            self.under_mutant(|| self.apply(&mut world, step));
        }
        false
    }

    /// Tells whether a side that runs here is entitled to go on, and nothing else can have decided otherwise.
    fn has_heir(&self, world: &World) -> bool {
        (0..2).any(|host| {
            let (Some(standing), Some(generation)) = (world.standing(host), world.generation(host)) else {
                return false;
            };
            let entitled = !matches!(
                standing,
                Standing::Idle | Standing::Syncing | Standing::Leaving | Standing::Fenced | Standing::Over
            );
            let dismissed = world
                .link
                .as_ref()
                .is_some_and(|link| link.primary != host && link.pipes[1 - host][0].queue.contains(&Message::Goodbye));
            let other = 1 - host;
            let decided = world
                .latest()
                .is_some_and(|(term, owner)| owner == other && term > generation);
            let deciding = world.hosts[other].asks.iter().any(|ask| ask.term > generation)
                || matches!(world.hosts[other].process, Process::Starting(_));
            entitled && !dismissed && !decided && !deciding
        })
    }
}

impl Model for Contests {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(&self.bounds)]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        for host in 0..2 {
            self.host_steps(world, host, steps);
        }
        self.link_steps(world, steps);
        let timed = |process: &Process| matches!(process, Process::Secondary { .. });
        if world.link.is_some() || world.hosts.iter().any(|host| timed(&host.process)) {
            steps.push(Step::Tick { still: false });
            if self.bounds.drift && world.steady >= self.bounds.limit {
                steps.push(Step::Tick { still: true });
            }
        }
    }

    fn next_state(&self, world: &World, step: Step) -> Option<World> {
        let mut next = world.clone();
        self.under_mutant(|| self.apply(&mut next, step));
        (next != *world).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::<Self>::always("no rule is broken", |_, world| world.broken.is_none()),
            Property::<Self>::always("never are two sides able to let output leave", |model, world| {
                !(0..2).all(|host| world.can_release(&model.bounds, host))
            }),
            Property::<Self>::sometimes("a pair is protected", |_, world| pair(world)),
        ];
        if self.bounds.witness {
            properties.extend([
                Property::<Self>::always("who runs has won its term", |_, world| {
                    (0..2).all(|host| {
                        !runs(world, host) || world.generation(host).and_then(|term| world.owner(term)) == Some(host)
                    })
                }),
                Property::<Self>::always("with restarts, the VM always runs again", |model, world| {
                    model.is_lively(world, true)
                }),
                Property::<Self>::always("a side that is entitled to goes on by itself", |model, world| {
                    !model.has_heir(world) || model.is_lively(world, false)
                }),
            ]);
        }
        if self.bounds.witness {
            properties.push(Property::<Self>::sometimes("a secondary takes over", |_, world| {
                takeovers(world) > 0
            }));
        }
        if self.bounds.witness && self.bounds.pairings > 1 {
            properties.extend([
                Property::<Self>::sometimes("a pair is protected after a takeover", |_, world| {
                    takeovers(world) == 1 && pair(world)
                }),
                Property::<Self>::sometimes("the VM goes there and back", |_, world| takeovers(world) > 1),
            ]);
        }
        properties
    }
}

fn follows(standing: Standing) -> bool {
    matches!(standing, Standing::Idle | Standing::Syncing | Standing::Following)
}

fn runs(world: &World, host: usize) -> bool {
    let primary = matches!(world.hosts[host].process, Process::Primary { .. });
    primary
        && matches!(
            world.standing(host),
            Some(Standing::Alone | Standing::Pairing(_) | Standing::Leading { .. })
        )
}

fn pair(world: &World) -> bool {
    let leads = |host| world.standing(host) == Some(Standing::Leading { peer_entitled: true });
    (0..2).any(|host| leads(host) && world.standing(1 - host) == Some(Standing::Following))
}

/// Tells how often the VM has gone from one host to the other in the terms up to that in which output left last.
fn takeovers(world: &World) -> usize {
    let Some((generation, _)) = world.released else {
        return 0;
    };
    let terms = usize::try_from(generation.0).expect("a small number");
    let changes = world.witness[..terms].windows(2);
    changes.filter(|pair| pair[0] != pair[1]).count()
}
