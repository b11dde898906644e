//! What surrounds the contest in the model: two hosts with their records, and the witness; their connections are in `link.rs`.
//!
//! The decisions are the shipped ones: `Contest`, `start_decision` and `judge_hello`. This file does what the protocols
//! and the shells do around them, as little of it as the contest can see. Time is the age of things, in ticks: how old the
//! newest heartbeat is that came back, how long a primary has been silent.

use checkpoint::failover::{Connection, Contest, Decision, Event, KnownState, Order, Standing, start_decision};
use checkpoint::pair::WitnessAnswer;
use checkpoint::{Generation, Instant, Role};

use crate::link::{Link, Message};

/// The hosts' names, as the witness knows them.
pub(crate) const NAMES: [&str; 2] = ["a", "b"];
/// No model has so many terms that one is missed.
const TERMS: usize = 16;
/// When leases end, for the contest: the model counts ticks itself.
pub(crate) const LEASE_ENDS: Instant = Instant(1);
/// What the contest is given as the end of a lease when it is asked about output.
const LEASE: Instant = Instant(7);

/// What one run of the checker explores.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// Whether there is a witness.
    pub(crate) witness: bool,
    /// Takeover limit in ticks.
    pub(crate) limit: u8,
    /// Ticks for which output may leave after a heartbeat that came back was sent.
    pub(crate) lease: u8,
    /// Once in each takeover limit the primary's clock may stand still for a tick.
    pub(crate) drift: bool,
    /// Faults of any kind.
    pub(crate) faults: u8,
    /// Connections between a primary and a secondary.
    pub(crate) pairings: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct World {
    pub(crate) hosts: [Host; 2],
    /// Who owns which term; the first is term 1.
    pub(crate) witness: [Option<u8>; TERMS],
    pub(crate) link: Option<Link>,
    /// The newest generation in which output left, and whose it was.
    pub(crate) released: Option<(Generation, usize)>,
    pub(crate) faults: u8,
    pub(crate) pairings: u8,
    /// Ticks since the primary's clock stood still.
    pub(crate) steady: u8,
    /// The rule that the last step broke.
    pub(crate) broken: Option<&'static str>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Host {
    /// What is durable beside the image.
    pub(crate) record: Option<KnownState>,
    /// Its image has all that clients were told without the other.
    pub(crate) current: bool,
    pub(crate) process: Process,
    pub(crate) asks: Vec<Ask>,
    /// Records that are being written, in order.
    pub(crate) stores: Vec<Store>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Process {
    /// It may start the VM if it wins this term.
    Starting(Generation),
    /// It has won the term; the record of that is being written.
    Started(Generation),
    /// Its host is off, or it is a secondary without a primary: it may be started as primary, or accept one.
    Waiting,
    Primary {
        contest: Contest,
        /// Ticks since the newest heartbeat was sent that came back.
        age: u8,
    },
    Secondary {
        contest: Contest,
        /// Ticks since the primary was heard.
        silent: u8,
    },
}

/// A claim at the witness.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Ask {
    pub(crate) term: Generation,
    /// What the witness has decided.
    pub(crate) verdict: Option<Verdict>,
    /// Nobody waits for the answer any more; the witness may still carry it out.
    pub(crate) orphan: bool,
}

/// A witness's decision of a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Verdict {
    Won,
    /// The owner of that term or of a later one.
    LostTo(usize),
}

/// A record on its way to the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Store {
    pub(crate) known: KnownState,
    /// The image that it makes complete has all that clients were told.
    pub(crate) fresh: bool,
}

impl World {
    pub(crate) fn new(bounds: &Bounds) -> Self {
        let host = Host {
            record: None,
            current: true,
            process: Process::Waiting,
            asks: Vec::new(),
            stores: Vec::new(),
        };
        let mut world = Self {
            hosts: [host.clone(), host],
            witness: [None; TERMS],
            link: None,
            released: None,
            faults: bounds.faults,
            pairings: bounds.pairings,
            steady: bounds.limit,
            broken: None,
        };
        if !bounds.witness {
            let generation = Generation(1);
            world.hosts[0].record = Some(KnownState {
                generation,
                role: Role::Primary,
                complete: true,
            });
            world.hosts[0].process = Process::Primary {
                contest: Contest::owner(false, generation),
                age: bounds.lease + 1,
            };
            world.hosts[1].process = Process::Waiting;
        }
        world
    }

    pub(crate) fn standing(&self, host: usize) -> Option<Standing> {
        match &self.hosts[host].process {
            Process::Primary { contest, .. } | Process::Secondary { contest, .. } => Some(contest.standing()),
            _ => None,
        }
    }

    pub(crate) fn generation(&self, host: usize) -> Option<Generation> {
        match &self.hosts[host].process {
            Process::Primary { contest, .. } | Process::Secondary { contest, .. } => Some(contest.generation()),
            _ => None,
        }
    }

    /// Tells whether the host's end of the link is open, and which host is the primary on it.
    pub(crate) fn attached(&self, host: usize) -> bool {
        self.link.as_ref().is_some_and(|link| link.open[host])
    }

    pub(crate) fn owner(&self, term: Generation) -> Option<usize> {
        let index = usize::try_from(term.0).expect("a small number").checked_sub(1)?;
        self.witness[index].map(usize::from)
    }

    pub(crate) fn latest(&self) -> Option<(Generation, usize)> {
        let index = self.witness.iter().rposition(Option::is_some)?;
        let owner = self.witness[index]?;
        Some((Generation(index as u64 + 1), owner.into()))
    }

    /// What `DirectoryWitness::claim` does.
    fn decide(&mut self, host: usize, term: Generation) -> Verdict {
        if let Some((latest, owner)) = self.latest()
            && latest > term
        {
            return Verdict::LostTo(owner);
        }
        let index = usize::try_from(term.0 - 1).expect("a small number");
        let name = u8::try_from(host).expect("two hosts");
        match usize::from(*self.witness[index].get_or_insert(name)) {
            owner if owner == host => Verdict::Won,
            owner => Verdict::LostTo(owner),
        }
    }

    // The contest.

    pub(crate) fn tell(&mut self, bounds: &Bounds, host: usize, now: Instant, event: Event) {
        let (Process::Primary { contest, .. } | Process::Secondary { contest, .. }) = &mut self.hosts[host].process
        else {
            return;
        };
        let before = contest.generation();
        let mut orders = Vec::new();
        contest.step(now, event, &mut orders);
        for order in orders {
            self.carry_out(bounds, host, before, order);
        }
    }

    fn carry_out(&mut self, bounds: &Bounds, host: usize, before: Generation, order: Order) {
        match order {
            Order::Alarm(_) | Order::AskOperator => {}
            Order::Claim(term) => self.hosts[host].asks.push(Ask {
                term,
                verdict: None,
                orphan: false,
            }),
            Order::Fence { .. } => self.exit(host, Process::Waiting),
            Order::GiveUp => self.exit(host, Process::Waiting),
            Order::Lose | Order::Sever => self.close(host),
            Order::Pair => {
                let generation = self.generation(host).expect("a primary pairs");
                self.send(host, Connection::Data, Message::Begin(generation));
            }
            Order::Record(generation) => self.store(host, generation, Role::Primary, true, true),
            Order::Run => self.run(bounds, host),
            Order::Stop => {
                let record = self.hosts[host].record;
                if !record.is_some_and(|record| record.complete && record.generation == before) {
                    self.broken = Some("a side contends without a complete state of its generation");
                }
            }
        }
    }

    fn run(&mut self, bounds: &Bounds, host: usize) {
        if let Process::Secondary { contest, .. } = &self.hosts[host].process {
            self.hosts[host].process = Process::Primary {
                contest: Contest::owner(bounds.witness, contest.generation()),
                age: bounds.lease + 1,
            };
        }
    }

    pub(crate) fn store(&mut self, host: usize, generation: Generation, role: Role, complete: bool, fresh: bool) {
        let known = KnownState {
            generation,
            role,
            complete,
        };
        self.hosts[host].stores.push(Store { known, fresh });
    }

    fn store_first(&mut self, host: usize) -> KnownState {
        let Store { known, fresh } = self.hosts[host].stores.remove(0);
        self.hosts[host].record = Some(known);
        if known.role == Role::Secondary {
            self.hosts[host].current = known.complete && fresh;
        }
        known
    }

    /// The oldest record that is being written is durable, and the process hears of it.
    pub(crate) fn stored(&mut self, bounds: &Bounds, host: usize) {
        let known = self.store_first(host);
        match &self.hosts[host].process {
            Process::Started(term) => {
                self.hosts[host].process = Process::Primary {
                    contest: Contest::owner(bounds.witness, *term),
                    age: bounds.lease + 1,
                };
            }
            Process::Secondary { contest, .. } if known.role == Role::Secondary => {
                if known.complete && known.generation == contest.generation() {
                    self.tell(bounds, host, Instant(0), Event::Committed);
                }
            }
            _ => self.tell(bounds, host, Instant(0), Event::Recorded(known.generation)),
        }
    }

    /// An orderly end of a process: what it had ordered of its disk is done.
    pub(crate) fn exit(&mut self, host: usize, next: Process) {
        self.close(host);
        while !self.hosts[host].stores.is_empty() {
            self.store_first(host);
        }
        self.end(host, next);
    }

    /// The process is killed, or its host dies, silently.
    pub(crate) fn die(&mut self, host: usize, silent: bool) {
        if silent {
            self.cut([host == 0, host == 1]);
        }
        self.close(host);
        self.hosts[host].stores.clear();
        self.end(host, Process::Waiting);
    }

    fn end(&mut self, host: usize, next: Process) {
        self.hosts[host].process = next;
        self.hosts[host].asks.retain(|ask| ask.verdict.is_none());
        for ask in &mut self.hosts[host].asks {
            ask.orphan = true;
        }
    }

    // What a host does by itself.

    /// The operator ends this side in order.
    pub(crate) fn stop(&mut self, bounds: &Bounds, host: usize) {
        match self.standing(host) {
            Some(Standing::Idle | Standing::Syncing | Standing::Following) => {
                self.send(host, Connection::Control, Message::Goodbye);
                self.leave(bounds, host);
            }
            // What is lost already hears nothing; a primary's link is closed then.
            Some(Standing::Draining { .. } | Standing::Severed { .. }) => self.exit(host, Process::Waiting),
            _ => {
                self.send(host, Connection::Control, Message::Goodbye);
                self.exit(host, Process::Waiting);
            }
        }
    }

    /// Output would leave now, if the guest had any.
    pub(crate) fn can_release(&self, bounds: &Bounds, host: usize) -> bool {
        let Process::Primary { contest, age, .. } = &self.hosts[host].process else {
            return false;
        };
        contest
            .release_until(LEASE)
            .is_none_or(|until| until >= LEASE && *age <= bounds.lease)
    }

    /// Output leaves as soon as it can: all that this may break later is found.
    pub(crate) fn release(&mut self, bounds: &Bounds, host: usize) {
        if !self.can_release(bounds, host) {
            return;
        }
        let Process::Primary { contest, .. } = &self.hosts[host].process else {
            return;
        };
        let generation = contest.generation();
        let together = contest.standing() == Standing::Leading { peer_entitled: true };
        if bounds.witness {
            self.broken = self.broken.or_else(|| self.rule_broken(host, generation));
        }
        self.released = Some((generation, host));
        if together {
            return;
        }
        let other = 1 - host;
        self.hosts[other].current = false;
        for store in &mut self.hosts[other].stores {
            store.fresh = false;
        }
        let sent = self.link.iter_mut().flat_map(|link| &mut link.pipes[host]);
        for message in sent.flat_map(|pipe| &mut pipe.queue) {
            if let Message::End(fresh) = message {
                *fresh = false;
            }
        }
    }

    fn rule_broken(&self, host: usize, generation: Generation) -> Option<&'static str> {
        let recorded = |record: KnownState| record.complete && record.role == Role::Primary;
        match self.released {
            Some((newest, _)) if newest > generation => Some("output leaves in an old generation"),
            Some((newest, owner)) if newest == generation && owner != host => Some("a generation has two owners"),
            _ if self.owner(generation) != Some(host) => Some("output leaves in a generation that was not won"),
            _ if !self.hosts[host].record.is_some_and(recorded) => Some("output leaves before the record is durable"),
            _ if !self.hosts[host].current => Some("a state runs that is older than what clients were told"),
            _ => None,
        }
    }

    /// The program starts as primary: it may run, or waits for one as secondary.
    pub(crate) fn boot(&mut self, host: usize) {
        self.hosts[host].process = match self.start_decision(host) {
            Decision::Start { term } => Process::Starting(term),
            Decision::Refuse(_) => Process::Waiting,
        };
    }

    pub(crate) fn would_start(&self, host: usize) -> bool {
        matches!(self.start_decision(host), Decision::Start { .. })
    }

    fn start_decision(&self, host: usize) -> Decision {
        let latest = self.latest().map(|(term, owner)| (term, NAMES[owner].to_owned()));
        start_decision(self.hosts[host].record, latest, NAMES[host])
    }

    pub(crate) fn start(&mut self, host: usize) {
        let Process::Starting(term) = self.hosts[host].process else {
            return;
        };
        self.hosts[host].process = if self.decide(host, term) == Verdict::Won {
            self.store(host, term, Role::Primary, true, true);
            Process::Started(term)
        } else {
            Process::Waiting
        };
    }

    pub(crate) fn execute(&mut self, host: usize, index: usize) {
        let ask = self.hosts[host].asks[index];
        self.hosts[host].asks[index].verdict = Some(self.decide(host, ask.term));
    }

    pub(crate) fn answer(&mut self, bounds: &Bounds, host: usize, index: usize) {
        let ask = self.hosts[host].asks.remove(index);
        let answer = match ask.verdict.expect("the witness has decided") {
            Verdict::Won => WitnessAnswer::Won,
            Verdict::LostTo(owner) => WitnessAnswer::LostTo(NAMES[owner].to_owned()),
        };
        self.tell(bounds, host, Instant(0), Event::Answered(ask.term, answer));
    }

    /// No answer comes: the claim may have been carried out, or may still be.
    pub(crate) fn unanswered(&mut self, bounds: &Bounds, host: usize, index: usize) {
        let ask = &mut self.hosts[host].asks[index];
        ask.orphan = true;
        let term = ask.term;
        let answer = WitnessAnswer::Unreachable(String::new());
        self.tell(bounds, host, Instant(0), Event::Answered(term, answer));
    }

    /// The deadline of a side may have passed.
    pub(crate) fn wake(&mut self, bounds: &Bounds, host: usize) {
        let now = match &self.hosts[host].process {
            Process::Secondary { contest, silent, .. } => match contest.standing() {
                Standing::Idle | Standing::Syncing | Standing::Following if *silent >= bounds.limit => {
                    return self.tell(bounds, host, Instant(0), Event::Lost);
                }
                Standing::Draining { .. } | Standing::Severed { .. } if *silent < bounds.limit => Instant(0),
                Standing::Draining { .. } | Standing::Severed { .. } => LEASE_ENDS,
                _ => Instant(u64::MAX),
            },
            _ => Instant(u64::MAX),
        };
        self.tell(bounds, host, now, Event::Timeout);
    }

    pub(crate) fn checkpoint(&mut self, bounds: &Bounds, host: usize) {
        self.tell(bounds, host, Instant(0), Event::CheckpointSent);
        self.send(host, Connection::Data, Message::End(true));
    }

    /// Time passes; on the primary's clock only if it does not stand still.
    pub(crate) fn tick(&mut self, bounds: &Bounds, still: bool) {
        let worthless = bounds.lease + 1;
        let older = |age: &mut u8| *age = (*age + u8::from(!still)).min(worthless);
        let linked = [self.attached(0), self.attached(1)];
        for (host, linked) in self.hosts.iter_mut().zip(linked) {
            match &mut host.process {
                Process::Primary { age, .. } if linked => older(age),
                Process::Secondary { silent, .. } => {
                    *silent = (*silent + 1).min(bounds.limit);
                }
                _ => {}
            }
        }
        for pipe in self.link.iter_mut().flat_map(|link| link.pipes.iter_mut().flatten()) {
            for message in &mut pipe.queue {
                if let Message::Beat(age) = message {
                    older(age);
                }
            }
        }
        self.steady = if still { 0 } else { (self.steady + 1).min(bounds.limit) };
    }

    /// Makes states the same that no further step can tell apart.
    pub(crate) fn simplify(&mut self, bounds: &Bounds) {
        let latest = self.latest().map_or(Generation(0), |(term, _)| term);
        for (index, host) in self.hosts.iter_mut().enumerate() {
            // An orphan only matters while it can still take its term.
            host.asks
                .retain(|ask| !ask.orphan || (ask.verdict.is_none() && ask.term > latest));
            host.asks.sort_unstable();
            host.asks.dedup_by(|ask, same| ask == same && ask.orphan);
            let attached = self.link.as_ref().is_some_and(|link| link.open[index]);
            match &mut host.process {
                Process::Primary { age, .. } if !attached => *age = bounds.lease + 1,
                Process::Secondary { contest, silent } if is_lost(contest.standing()) => *silent = bounds.limit,
                _ => {}
            }
        }
        if let Some(link) = &mut self.link {
            // An echo that is too old renews nothing.
            link.pipes[1 - link.primary][0]
                .queue
                .retain(|message| !matches!(message, Message::Beat(age) if *age > bounds.lease));
        }
        if self.link.is_none() || !bounds.drift {
            self.steady = bounds.limit;
        }
    }
}

/// Tells whether a secondary no longer counts how long its primary is silent.
fn is_lost(standing: Standing) -> bool {
    matches!(
        standing,
        Standing::Contending(_) | Standing::Alone | Standing::Leaving | Standing::Fenced | Standing::Over
    )
}
