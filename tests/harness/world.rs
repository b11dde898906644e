//! Two hosts, their links, a witness, a switch and clients, under one clock and one seed.
//!
//! Every happening has a time; the earliest is carried out, the protocol of the host concerned takes one
//! step, its actions are carried out at that same moment or become happenings of a later one.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;

use bytes::Bytes;
use checkpoint::pair::{Delivery, RecordUpdate, WitnessAnswer};
use checkpoint::staging::Totals;
use checkpoint::wire::{BlockHashes, DiskWrite, Message, Session, Welcome};
use checkpoint::{Duration, Epoch, Generation, Instant};
use primary::event::{Action as PrimaryAction, Event as PrimaryEvent, Outcome as PrimaryOutcome};
use primary::protocol::{Options as PrimaryOptions, Primary, Start};
use secondary::event::{Action as SecondaryAction, Event as SecondaryEvent, Outcome as SecondaryOutcome};
use secondary::protocol::{Options as SecondaryOptions, Secondary};
use storage::Image;
use storage::verify::{BlockHash, HashKey};

use crate::checkers::Checkers;
use crate::node::{Node, Role};
use crate::random::Random;
use crate::toy_vm::{Answer, CLIENTS, DISK_BYTES, Request};

const KEY: HashKey = HashKey([7; 32]);
const TAKEOVER_LIMIT: Duration = Duration::from_millis(300);
const TRACE: usize = 60;
const MILLISECOND: u64 = 1_000_000;

/// What a fault does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The connections end, both hosts live.
    CloseLink,
    /// Nothing passes any more, and nobody is told.
    CutLink,
    /// The host executes nothing for so many milliseconds.
    Freeze(usize, u64),
    /// The host dies.
    Kill(usize),
    /// Nothing passes for so many milliseconds; then everything, in order.
    Stall(u64),
    /// The witness answers nobody for so many milliseconds.
    WitnessDown(u64),
}

enum Happening {
    ClientAsks(usize),
    ClientHears(Bytes),
    Fault(Fault),
    Frame(Bytes),
    PrimaryEvent(usize, u64, PrimaryEvent),
    Restart(usize, u64),
    SecondaryEvent(usize, u64, SecondaryEvent),
    Serve(usize, u64),
    Dial(usize, u64),
    Wire {
        link: usize,
        to: usize,
        control: bool,
        item: Item,
    },
    DiskJobs(usize, u64),
    Load(usize, u64, checkpoint::Tag),
    Pause(usize, u64),
    Ship(usize, u64, Totals, Vec<u64>),
}

enum Item {
    Message(Message),
    Closed(&'static str),
}

#[derive(Debug)]
struct Link {
    ends: [usize; 2],
    /// Nothing passes any more.
    cut: bool,
    /// Nothing passes until then.
    stalled_until: u64,
    /// When the last item of (receiver, control?) arrives, for order.
    last: BTreeMap<(usize, bool), u64>,
    closed: [bool; 2],
}

#[derive(Debug)]
struct Client {
    request: Request,
    answered: bool,
    asked_at: u64,
}

/// The world.
pub struct World {
    now: u64,
    serial: u64,
    random: Random,
    queue: BTreeMap<(u64, u64), Happening>,
    nodes: [Node; 2],
    links: Vec<Link>,
    terms: BTreeMap<Generation, usize>,
    witness_down_until: u64,
    clients: Vec<Client>,
    /// The rules.
    pub checkers: Checkers,
    trace: VecDeque<String>,
    /// Faults injected.
    pub faults: u64,
}

impl World {
    /// Makes a world in which host 0 boots the VM and host 1 waits for it.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let clients = (0..CLIENTS).map(|client| Client {
            request: Request {
                client: u8::try_from(client).expect("few"),
                id: 0,
                key: u8::try_from(client).expect("few"),
                noisy: false,
            },
            answered: true,
            asked_at: 0,
        });
        let mut world = Self {
            now: 0,
            serial: 0,
            random: Random::new(seed),
            queue: BTreeMap::new(),
            nodes: [Node::new(seed), Node::new(seed ^ 1)],
            links: Vec::new(),
            terms: BTreeMap::new(),
            witness_down_until: 0,
            clients: clients.collect(),
            checkers: Checkers::default(),
            trace: VecDeque::new(),
            faults: 0,
        };
        world.terms.insert(Generation(1), 0);
        world.nodes[1].wait();
        world.nodes[0].life += 1;
        world.start_primary(
            0,
            Start::Boot {
                generation: Generation(1),
                last_epoch: Epoch(0),
            },
        );
        for client in 0..world.clients.len() {
            world.later(MILLISECOND, Happening::ClientAsks(client));
        }
        world
    }

    /// Runs for so many simulated milliseconds.
    pub fn run(&mut self, milliseconds: u64) {
        let end = self.now + milliseconds * MILLISECOND;
        while self.advance(end) {}
        self.now = end;
    }

    /// Runs until the condition holds; false if it does not within so many simulated milliseconds.
    pub fn run_until(&mut self, milliseconds: u64, condition: impl Fn(&Self) -> bool) -> bool {
        let end = self.now + milliseconds * MILLISECOND;
        while !condition(self) {
            if !self.advance(end) {
                self.now = end;
                return condition(self);
            }
        }
        true
    }

    /// Chooses a fault.
    pub fn random_fault(&mut self) -> Fault {
        let node = usize::from(self.random.one_in(2));
        match self.random.below(6) {
            0 => Fault::CloseLink,
            1 => Fault::CutLink,
            2 => Fault::Freeze(node, 50 + self.random.below(900)),
            3 => Fault::Kill(node),
            4 => Fault::Stall(20 + self.random.below(500)),
            _ => Fault::WitnessDown(100 + self.random.below(2_000)),
        }
    }

    /// Lets a fault happen within the next so many microseconds.
    pub fn inject(&mut self, fault: Fault, within_micros: u64) {
        let delay = self.random.below(within_micros.max(1) * 1_000);
        self.later(delay, Happening::Fault(fault));
    }

    /// Tells whether a pair is protected on both sides.
    #[must_use]
    pub fn is_protected(&self) -> bool {
        let states = self.nodes.each_ref().map(|node| match &node.role {
            Role::Primary(primary) => primary.state_name(),
            Role::Secondary(secondary) => secondary.state_name(),
            Role::Off | Role::Waiting => "off",
        });
        states == ["protected"; 2]
    }

    /// Tells whether some side runs the VM, protected or as owner.
    #[must_use]
    pub fn is_served(&self) -> bool {
        self.nodes.iter().any(|node| {
            matches!(&node.role, Role::Primary(primary) if matches!(primary.state_name(), "alone" | "syncing" | "protected" | "checkpointing"))
        })
    }

    /// Returns the last events, for a failure's report.
    #[must_use]
    pub fn trace(&self) -> String {
        let mut text = String::new();
        for line in &self.trace {
            let _ = writeln!(text, "  {line}");
        }
        text
    }

    // Time.

    fn later(&mut self, delay: u64, happening: Happening) {
        self.serial += 1;
        self.queue.insert((self.now + delay, self.serial), happening);
    }

    fn soon(&mut self, happening: Happening) {
        let delay = 20_000 + self.random.below(300_000);
        self.later(delay, happening);
    }

    fn note(&mut self, line: String) {
        if self.trace.len() == TRACE {
            self.trace.pop_front();
        }
        self.trace
            .push_back(format!("{:>12.6} ms  {line}", self.now as f64 / 1e6));
    }

    /// Carries out the next happening or deadline before `end`.
    fn advance(&mut self, end: u64) -> bool {
        let deadline = (0..2).filter_map(|node| self.deadline(node).map(|at| (at, node))).min();
        let next = self.queue.first_key_value().map(|(key, _)| key.0);
        match (next, deadline) {
            (None, None) => false,
            (Some(at), deadline) if deadline.is_none_or(|(other, _)| at <= other) => {
                if at > end {
                    return false;
                }
                self.now = self.now.max(at);
                let (_, happening) = self.queue.pop_first().expect("just seen");
                self.happen(happening);
                true
            }
            (_, Some((at, node))) => {
                if at > end {
                    return false;
                }
                self.now = self.now.max(at);
                match &self.nodes[node].role {
                    Role::Primary(_) => self.step_primary(node, PrimaryEvent::Timeout),
                    Role::Secondary(_) => self.step_secondary(node, SecondaryEvent::Timeout),
                    Role::Off | Role::Waiting => {}
                }
                true
            }
            (Some(_), None) => unreachable!("covered above"),
        }
    }

    fn deadline(&self, node: usize) -> Option<u64> {
        let node = &self.nodes[node];
        let deadline = match &node.role {
            Role::Primary(primary) => primary.deadline(),
            Role::Secondary(secondary) => secondary.deadline(),
            Role::Off | Role::Waiting => None,
        };
        // A deadline that has been missed by a whole step is due now.
        deadline.map(|at| at.0.max(node.frozen_until).max(self.now))
    }

    /// Returns the host's number and life if the happening needs that host to execute.
    fn executes_on(&self, happening: &Happening) -> Option<usize> {
        match happening {
            Happening::PrimaryEvent(node, ..)
            | Happening::SecondaryEvent(node, ..)
            | Happening::Serve(node, _)
            | Happening::Dial(node, _)
            | Happening::DiskJobs(node, _)
            | Happening::Load(node, ..)
            | Happening::Pause(node, _)
            | Happening::Ship(node, ..) => Some(*node),
            Happening::Wire { to, .. } => Some(*to),
            _ => None,
        }
    }

    fn is_over(&self, happening: &Happening) -> bool {
        let life = match happening {
            Happening::PrimaryEvent(node, life, _)
            | Happening::SecondaryEvent(node, life, _)
            | Happening::Serve(node, life)
            | Happening::Dial(node, life)
            | Happening::DiskJobs(node, life)
            | Happening::Load(node, life, _)
            | Happening::Pause(node, life)
            | Happening::Restart(node, life)
            | Happening::Ship(node, life, ..) => (*node, *life),
            Happening::Wire { link, to, .. } => return self.nodes[*to].link != Some(*link),
            _ => return false,
        };
        self.nodes[life.0].life != life.1
    }

    fn happen(&mut self, happening: Happening) {
        if self.is_over(&happening) {
            return;
        }
        if let Some(node) = self.executes_on(&happening)
            && self.nodes[node].frozen_until > self.now
        {
            let delay = self.nodes[node].frozen_until - self.now;
            return self.later(delay, happening);
        }
        match happening {
            Happening::ClientAsks(client) => self.client_asks(client),
            Happening::ClientHears(frame) => self.client_hears(&frame),
            Happening::Dial(node, life) => self.dial(node, life),
            Happening::DiskJobs(node, _) => {
                if let Some(epoch) = self.nodes[node].run_jobs() {
                    self.step_secondary(node, SecondaryEvent::DiskCommitted(epoch));
                }
            }
            Happening::Fault(fault) => self.fault(fault),
            Happening::Frame(frame) => self.frame_at_switch(&frame),
            Happening::Load(node, _, tag) => {
                self.nodes[node].load();
                self.step_secondary(node, SecondaryEvent::Loaded(tag));
            }
            Happening::Pause(node, _) => {
                self.nodes[node].running = false;
                match self.nodes[node].role {
                    Role::Primary(_) => self.step_primary(node, PrimaryEvent::Paused),
                    Role::Secondary(_) => self.step_secondary(node, SecondaryEvent::Paused),
                    Role::Off | Role::Waiting => {}
                }
            }
            Happening::PrimaryEvent(node, _, event) => self.step_primary(node, event),
            Happening::Restart(node, _) => {
                self.note(format!("host {node} starts and waits for a primary"));
                self.nodes[node].wait();
            }
            Happening::SecondaryEvent(node, _, event) => self.step_secondary(node, event),
            Happening::Serve(node, life) => self.serve(node, life),
            Happening::Ship(node, _, totals, blocks) => {
                let entropy = self.random.next();
                let (messages, shipment) = self.nodes[node].ship(&blocks, totals, entropy);
                for message in messages {
                    self.send(node, false, message);
                }
                self.step_primary(node, PrimaryEvent::CheckpointSent(shipment));
            }
            Happening::Wire {
                link,
                to,
                control,
                item,
            } => self.arrive(link, to, control, item),
        }
    }

    // Guests.

    fn wake(&mut self, node: usize) {
        let host = &mut self.nodes[node];
        if host.running && !host.serving && !host.inbox.is_empty() {
            host.serving = true;
            let life = host.life;
            self.soon(Happening::Serve(node, life));
        }
    }

    fn serve(&mut self, node: usize, _life: u64) {
        let noise = self.random.next();
        let host = &mut self.nodes[node];
        host.serving = false;
        if !host.running {
            return;
        }
        let Some(delivery) = host.inbox.pop_front() else { return };
        match host.role {
            Role::Primary(_) => self.step_primary(node, PrimaryEvent::InputConsumed(delivery.clone())),
            Role::Secondary(_) => self.step_secondary(node, SecondaryEvent::InputConsumed(delivery.clone())),
            Role::Off | Role::Waiting => return,
        }
        let served = self.nodes[node].vm.serve(&delivery.guest, noise);
        if let Some((offset, data)) = served.write {
            self.nodes[node].write_disk(offset, &data);
            if let Role::Primary(_) = self.nodes[node].role {
                self.step_primary(node, PrimaryEvent::GuestWrote { offset, data });
            }
        }
        if let Some(frame) = served.output {
            match &self.nodes[node].role {
                Role::Primary(primary) => {
                    self.checkers.primary_sent(primary.tag(), &frame);
                    self.step_primary(node, PrimaryEvent::GuestSent(frame));
                }
                Role::Secondary(secondary) => {
                    self.checkers.secondary_sent(secondary.tag(), &frame);
                    self.step_secondary(node, SecondaryEvent::GuestSent(frame));
                }
                Role::Off | Role::Waiting => {}
            }
        }
        self.wake(node);
    }

    // Clients and the switch.

    fn client_asks(&mut self, client: usize) {
        let noisy = self.random.one_in(8);
        let state = &mut self.clients[client];
        if state.answered {
            state.answered = false;
            state.request.id += 1;
            state.request.noisy = noisy;
            state.asked_at = self.now;
        }
        let frame = state.request.frame();
        self.later(50_000, Happening::Frame(frame));
        self.later(250 * MILLISECOND, Happening::ClientAsks(client));
    }

    fn client_hears(&mut self, frame: &Bytes) {
        let Some(answer) = Answer::parse(frame) else { return };
        let client = usize::from(answer.client);
        let state = &mut self.clients[client];
        if answer.id != state.request.id {
            return;
        }
        let first = !state.answered;
        state.answered = true;
        let request = state.request;
        self.checkers.answered(request, answer);
        if first {
            let think = 200_000 + self.random.below(20 * MILLISECOND);
            self.queue
                .retain(|_, happening| !matches!(happening, Happening::ClientAsks(other) if *other == client));
            self.later(think, Happening::ClientAsks(client));
        }
    }

    fn frame_at_switch(&mut self, frame: &Bytes) {
        for node in 0..2 {
            if let Role::Primary(_) = self.nodes[node].role {
                let life = self.nodes[node].life;
                self.later(
                    10_000,
                    Happening::PrimaryEvent(node, life, PrimaryEvent::FrameArrived(frame.clone())),
                );
            }
        }
    }

    // Links.

    fn dial(&mut self, node: usize, life: u64) {
        let other = 1 - node;
        let Role::Primary(primary) = &self.nodes[node].role else {
            return;
        };
        if primary.state_name() != "alone" {
            return;
        }
        if !matches!(self.nodes[other].role, Role::Waiting) || self.nodes[other].frozen_until > self.now {
            return self.later(50 * MILLISECOND, Happening::Dial(node, life));
        }
        let link = self.links.len();
        self.links.push(Link {
            ends: [node, other],
            cut: false,
            stalled_until: 0,
            last: BTreeMap::new(),
            closed: [false; 2],
        });
        self.nodes[node].link = Some(link);
        self.nodes[other].link = Some(link);
        let generation = Generation(self.nodes[other].record.map_or(0, |record| record.generation.0));
        let options = SecondaryOptions {
            witness: true,
            takeover_limit: TAKEOVER_LIMIT,
            generation,
        };
        let secondary = Secondary::new(options, format!("host {node}"), Instant(self.now));
        self.nodes[other].role = Role::Secondary(Box::new(secondary));
        self.note(format!("host {node} pairs with host {other}"));
        let welcome = Welcome {
            node: format!("host {other}"),
            session: Session(0),
            generation: 0,
            committed: 0,
        };
        self.step_primary(node, PrimaryEvent::Connected(welcome));
    }

    fn send(&mut self, from: usize, control: bool, message: Message) {
        self.put(from, control, Item::Message(message));
    }

    fn put(&mut self, from: usize, control: bool, item: Item) {
        let Some(number) = self.nodes[from].link else { return };
        let delay = 30_000 + self.random.below(100_000);
        let link = &mut self.links[number];
        if link.cut {
            return;
        }
        let to = if link.ends[0] == from {
            link.ends[1]
        } else {
            link.ends[0]
        };
        let last = link.last.entry((to, control)).or_default();
        let at = (self.now + delay).max(link.stalled_until).max(*last);
        *last = at;
        self.serial += 1;
        self.queue.insert(
            (at, self.serial),
            Happening::Wire {
                link: number,
                to,
                control,
                item,
            },
        );
    }

    fn arrive(&mut self, link: usize, to: usize, control: bool, item: Item) {
        if self.links[link].cut {
            return;
        }
        match (&self.nodes[to].role, item) {
            (Role::Primary(_), Item::Message(message)) => self.step_primary(to, PrimaryEvent::PeerSent(message)),
            (Role::Primary(_), Item::Closed(cause)) => {
                self.nodes[to].link = None;
                self.step_primary(to, PrimaryEvent::LinkClosed(cause.to_owned()));
            }
            (Role::Secondary(_), Item::Message(message)) => self.step_secondary(to, SecondaryEvent::PeerSent(message)),
            (Role::Secondary(_), Item::Closed(cause)) if control => {
                self.step_secondary(to, SecondaryEvent::ControlClosed(cause.to_owned()));
            }
            (Role::Secondary(_), Item::Closed(cause)) => {
                self.step_secondary(to, SecondaryEvent::DataClosed(cause.to_owned()));
            }
            (Role::Off | Role::Waiting, _) => {}
        }
    }

    /// One end closes: the other reads what is under way, then the end.
    fn close(&mut self, node: usize, cause: &'static str) {
        let Some(number) = self.nodes[node].link else { return };
        let end = usize::from(self.links[number].ends[1] == node);
        if core::mem::replace(&mut self.links[number].closed[end], true) {
            return;
        }
        self.put(node, true, Item::Closed(cause));
        self.put(node, false, Item::Closed(cause));
        if let Role::Primary(_) = self.nodes[node].role {
            self.nodes[node].link = None;
        }
    }

    // Faults.

    fn fault(&mut self, fault: Fault) {
        self.note(format!("FAULT {fault:?}"));
        self.faults += 1;
        let link = self.nodes[0].link.or(self.nodes[1].link);
        match fault {
            Fault::CloseLink => {
                if let Some(link) = link {
                    for end in self.links[link].ends {
                        self.put(end, true, Item::Closed("reset"));
                        self.put(end, false, Item::Closed("reset"));
                    }
                }
            }
            Fault::CutLink => {
                if let Some(link) = link {
                    self.links[link].cut = true;
                }
            }
            Fault::Freeze(node, milliseconds) => self.nodes[node].frozen_until = self.now + milliseconds * MILLISECOND,
            Fault::Kill(node) => self.kill(node),
            Fault::Stall(milliseconds) => {
                if let Some(link) = link {
                    self.stall(link, self.now + milliseconds * MILLISECOND);
                }
            }
            Fault::WitnessDown(milliseconds) => self.witness_down_until = self.now + milliseconds * MILLISECOND,
        }
    }

    /// A host is killed only if the other holds the VM too, or it does not run it: the world never loses the VM itself.
    fn kill(&mut self, node: usize) {
        let survivable = match &self.nodes[node].role {
            Role::Primary(primary) => {
                matches!(primary.state_name(), "protected" | "checkpointing")
                    && matches!(&self.nodes[1 - node].role, Role::Secondary(other) if matches!(other.state_name(), "protected" | "checkpointing"))
                    && self.links[self.nodes[node].link.expect("protected")].stalled_until <= self.now
                    && !self.links[self.nodes[node].link.expect("protected")].cut
            }
            Role::Secondary(secondary) => {
                matches!(secondary.state_name(), "syncing" | "protected" | "checkpointing")
                    && matches!(self.nodes[1 - node].role, Role::Primary(_))
            }
            Role::Off | Role::Waiting => false,
        };
        if !survivable || self.nodes[1 - node].frozen_until > self.now {
            return;
        }
        self.close(node, "the host died");
        self.nodes[node].die();
        let life = self.nodes[node].life;
        self.later(800 * MILLISECOND, Happening::Restart(node, life));
    }

    fn stall(&mut self, link: usize, until: u64) {
        self.links[link].stalled_until = until;
        let late: Vec<_> = self
            .queue
            .iter()
            .filter(|((at, _), happening)| {
                *at < until && matches!(happening, Happening::Wire { link: other, .. } if *other == link)
            })
            .map(|(key, _)| *key)
            .collect();
        for key in late {
            let happening = self.queue.remove(&key).expect("just seen");
            self.queue.insert((until, key.1), happening);
        }
    }

    fn claim(&mut self, node: usize, term: Generation) -> WitnessAnswer {
        if self.witness_down_until > self.now {
            return WitnessAnswer::Unreachable("the witness is down".to_owned());
        }
        let latest = self.terms.last_key_value().map(|(term, owner)| (*term, *owner));
        match latest {
            Some((last, owner)) if last > term && owner != node => WitnessAnswer::LostTo(format!("host {owner}")),
            _ => {
                let owner = *self.terms.entry(term).or_insert(node);
                if owner == node {
                    WitnessAnswer::Won
                } else {
                    WitnessAnswer::LostTo(format!("host {owner}"))
                }
            }
        }
    }

    // The primary's shell.

    fn start_primary(&mut self, node: usize, start: Start) {
        let options = PrimaryOptions {
            witness: true,
            takeover_limit: TAKEOVER_LIMIT,
            epoch_age_max: Duration::from_millis(1_000),
            unmatched_max: Duration::from_millis(200),
            disk_bytes: DISK_BYTES,
        };
        let mut actions = Vec::new();
        let primary = Primary::new(options, start, Instant(self.now), &mut actions);
        self.nodes[node].role = Role::Primary(Box::new(primary));
        self.act_primary(node, actions);
    }

    fn step_primary(&mut self, node: usize, event: PrimaryEvent) {
        let mut actions = Vec::new();
        let Role::Primary(primary) = &mut self.nodes[node].role else {
            return;
        };
        let quiet = matches!(
            event,
            PrimaryEvent::Timeout | PrimaryEvent::PeerSent(Message::Heartbeat)
        );
        let line = format!("primary   {node} {} {}", primary.tag(), brief(&event));
        primary.step(Instant(self.now), event, &mut actions);
        if !quiet || !actions.is_empty() {
            self.note(line);
        }
        self.act_primary(node, actions);
    }

    fn act_primary(&mut self, node: usize, actions: Vec<PrimaryAction>) {
        let life = self.nodes[node].life;
        for action in actions {
            match action {
                PrimaryAction::Claim(term) => {
                    let answer = self.claim(node, term);
                    self.soon(Happening::PrimaryEvent(
                        node,
                        life,
                        PrimaryEvent::WitnessAnswered(term, answer),
                    ));
                }
                PrimaryAction::CloseLink => self.close(node, "closed"),
                PrimaryAction::CompareBlocks(hashes) => self.compare(node, &hashes),
                PrimaryAction::Deliver(delivery) => self.deliver(node, delivery),
                PrimaryAction::Dial => self.later(20 * MILLISECOND, Happening::Dial(node, life)),
                PrimaryAction::End(outcome) => {
                    self.primary_ended(node, &outcome);
                    return;
                }
                PrimaryAction::HoldInput(_)
                | PrimaryAction::Report(_)
                | PrimaryAction::Reseed
                | PrimaryAction::SeedEntropy(_) => {}
                PrimaryAction::KeepDirty => self.nodes[node].keep_dirty(),
                PrimaryAction::PauseVm => self.soon(Happening::Pause(node, life)),
                PrimaryAction::ResumeVm => {
                    // The VM's thread obeys in order: a stop that is still under way comes first.
                    self.queue
                        .retain(|_, happening| !matches!(happening, Happening::Pause(other, _) if *other == node));
                    self.nodes[node].running = true;
                    self.wake(node);
                }
                PrimaryAction::Send(message) => self.send(node, false, message),
                PrimaryAction::SendCheckpoint { tag, blocks, totals } => {
                    let snapshot = self.nodes[node].snapshot();
                    self.checkers.stopped(tag, snapshot);
                    self.soon(Happening::Ship(node, life, totals, blocks));
                }
                PrimaryAction::SendControl(message) => self.send(node, true, message),
                PrimaryAction::StoreRecord(record) => self.store_record(node, record),
                PrimaryAction::SyncMemory(totals) => {
                    let (messages, shipment) = self.nodes[node].sync_memory(totals);
                    for message in messages {
                        self.send(node, false, message);
                    }
                    self.soon(Happening::PrimaryEvent(
                        node,
                        life,
                        PrimaryEvent::MemorySynced(shipment),
                    ));
                }
                PrimaryAction::Transmit { frames, not_after } => self.transmit(node, frames, not_after),
            }
        }
    }

    fn transmit(&mut self, node: usize, frames: Vec<Bytes>, not_after: Option<Instant>) {
        if not_after.is_some_and(|limit| limit.0 < self.now) {
            return self.note(format!("host {node} drops {} frames that are late", frames.len()));
        }
        let Role::Primary(primary) = &self.nodes[node].role else {
            return;
        };
        let paired = matches!(primary.state_name(), "protected" | "checkpointing");
        let generation = primary.tag().generation;
        for frame in frames {
            self.checkers.released(node, generation, paired, &frame);
            self.later(50_000, Happening::ClientHears(frame));
        }
    }

    fn compare(&mut self, node: usize, hashes: &BlockHashes) {
        let life = self.nodes[node].life;
        let theirs: Vec<BlockHash> = hashes.hashes.iter().copied().map(BlockHash).collect();
        let image = self.nodes[node].image.clone();
        let different =
            storage::verify::differing(&*image, &KEY, hashes.first, &theirs).expect("the blocks are in range");
        for block in different {
            let (offset, length) = storage::verify::block_range(image.size(), block);
            let mut data = vec![0; length];
            image.read_at(offset, &mut data).expect("in range");
            self.send(
                node,
                false,
                Message::SyncBlock(DiskWrite {
                    tag: hashes.tag,
                    offset,
                    data: data.into(),
                }),
            );
        }
        self.soon(Happening::PrimaryEvent(
            node,
            life,
            PrimaryEvent::DiskSynced(hashes.tag.generation),
        ));
    }

    fn primary_ended(&mut self, node: usize, outcome: &PrimaryOutcome) {
        self.note(format!("host {node} ended as primary: {outcome:?}"));
        self.close(node, "ended");
        self.nodes[node].die();
        let life = self.nodes[node].life;
        self.later(300 * MILLISECOND, Happening::Restart(node, life));
    }

    // The secondary's shell.

    fn step_secondary(&mut self, node: usize, event: SecondaryEvent) {
        let mut actions = Vec::new();
        let Role::Secondary(secondary) = &mut self.nodes[node].role else {
            return;
        };
        let quiet = matches!(
            event,
            SecondaryEvent::Timeout | SecondaryEvent::PeerSent(Message::Heartbeat)
        );
        let line = format!("secondary {node} {} {}", secondary.tag(), brief(&event));
        secondary.step(Instant(self.now), event, &mut actions);
        if !quiet || !actions.is_empty() {
            self.note(line);
        }
        self.act_secondary(node, actions);
    }

    fn act_secondary(&mut self, node: usize, actions: Vec<SecondaryAction>) {
        let life = self.nodes[node].life;
        let event = |event| Happening::SecondaryEvent(node, life, event);
        for action in actions {
            match action {
                SecondaryAction::ApplyPages(batch) => self.nodes[node].apply(&batch),
                SecondaryAction::ApplyWrite(write) => {
                    self.nodes[node]
                        .image
                        .write_at(write.offset, &write.data)
                        .expect("in range");
                }
                SecondaryAction::Check(tag) => {
                    let Role::Secondary(secondary) = &self.nodes[node].role else {
                        return;
                    };
                    let first = secondary.is_first();
                    self.nodes[node].run_jobs();
                    let result = self.nodes[node].prepare(tag, first);
                    self.soon(event(SecondaryEvent::Checked(tag, result)));
                }
                SecondaryAction::Claim(term) => {
                    let answer = self.claim(node, term);
                    self.soon(event(SecondaryEvent::WitnessAnswered(term, answer)));
                }
                SecondaryAction::CloseLink => self.close_secondary(node),
                SecondaryAction::CommitDisk(epoch) => {
                    self.nodes[node].commit_disk(epoch);
                    let snapshot = self.nodes[node].snapshot();
                    self.checkers.loaded(epoch, &snapshot);
                    self.soon(Happening::DiskJobs(node, life));
                }
                SecondaryAction::Deliver(delivery) => self.deliver(node, delivery),
                SecondaryAction::DropDeliveries => self.nodes[node].inbox.clear(),
                SecondaryAction::DropStage => self.nodes[node].drop_stage(),
                SecondaryAction::End(outcome) => {
                    self.secondary_ended(node, outcome);
                    return;
                }
                SecondaryAction::Load(tag) => self.soon(Happening::Load(node, life, tag)),
                SecondaryAction::PauseVm => self.soon(Happening::Pause(node, life)),
                SecondaryAction::Report(_) | SecondaryAction::SeedEntropy(_) => {}
                SecondaryAction::ResumeVm => {
                    self.nodes[node].running = true;
                    self.wake(node);
                }
                SecondaryAction::Send(message) => {
                    if let Message::Acknowledge(tag) = &message {
                        self.checkers.acknowledge(*tag);
                    }
                    self.send(node, false, message);
                }
                SecondaryAction::SendBlockHashes(tag) => {
                    let image = self.nodes[node].image.clone();
                    self.nodes[node]
                        .replica
                        .as_mut()
                        .expect("a secondary")
                        .begin_sync()
                        .expect("the disk is whole");
                    let hashes = storage::verify::hashes(&*image, &KEY, 0, usize::MAX).expect("in range");
                    let hashes = hashes.into_iter().map(|hash| hash.0).collect();
                    self.send(node, false, Message::BlockHashes(BlockHashes { tag, first: 0, hashes }));
                }
                SecondaryAction::SendControl(message) => self.send(node, true, message),
                SecondaryAction::StageDevices(state) => self.nodes[node].stage_devices(state),
                SecondaryAction::StagePages(batch) => self.nodes[node].stage_pages(batch),
                SecondaryAction::StageWrite(write) => {
                    let replica = self.nodes[node].replica.as_mut().expect("a secondary");
                    replica
                        .stage(write.tag.epoch, write.offset, &write.data)
                        .expect("the primary keeps the rules");
                }
                SecondaryAction::StoreRecord(record) => self.store_record(node, record),
            }
        }
    }

    fn close_secondary(&mut self, node: usize) {
        self.close(node, "closed");
        // What was still in the connections is read; then their own ends report.
        let life = self.nodes[node].life;
        self.soon(Happening::SecondaryEvent(
            node,
            life,
            SecondaryEvent::DataClosed("closed".to_owned()),
        ));
    }

    fn secondary_ended(&mut self, node: usize, outcome: SecondaryOutcome) {
        self.close(node, "ended");
        self.note(format!("host {node} ended as secondary: {}", brief(&outcome)));
        if let SecondaryOutcome::TakenOver(taken) = outcome {
            let host = &mut self.nodes[node];
            host.link = None;
            host.life += 1;
            host.serving = false;
            host.fold();
            let taken = *taken;
            return self.start_primary(
                node,
                Start::TakenOver {
                    generation: taken.generation,
                    last_epoch: taken.last_epoch,
                    network: taken.network,
                    inputs: taken.inputs,
                    outputs: taken.outputs,
                },
            );
        }
        self.nodes[node].die();
        let life = self.nodes[node].life;
        self.later(300 * MILLISECOND, Happening::Restart(node, life));
    }

    // Both.

    fn deliver(&mut self, node: usize, delivery: Delivery) {
        self.nodes[node].inbox.push_back(delivery);
        self.wake(node);
    }

    fn store_record(&mut self, node: usize, record: RecordUpdate) {
        self.nodes[node].record = Some(record);
        let life = self.nodes[node].life;
        let happening = match self.nodes[node].role {
            Role::Primary(_) => Happening::PrimaryEvent(node, life, PrimaryEvent::RecordStored(record)),
            _ => Happening::SecondaryEvent(node, life, SecondaryEvent::RecordStored(record)),
        };
        self.soon(happening);
    }
}

/// Shows the start of a value: enough to follow a trace.
fn brief(value: &impl std::fmt::Debug) -> String {
    let mut text = format!("{value:?}");
    if let Some((end, _)) = text.char_indices().nth(110) {
        text.truncate(end);
    }
    text
}
