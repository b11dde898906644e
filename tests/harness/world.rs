//! Two hosts, their links, a witness, a switch and clients, under one clock and one seed.
//!
//! Every happening has a time; the earliest is carried out, the protocol of the host concerned takes one
//! step, its actions are carried out at that same moment or become happenings of a later one. Each host has a clock of
//! its own, of another origin and up to a twentieth faster or slower.

use std::collections::BTreeMap;

use bytes::Bytes;
use checkpoint::limits::{self, STREAMS_MAX};
use checkpoint::pages::Question;
use checkpoint::pages::identical::{PageHashes, PageMatches};
use checkpoint::staging::Totals;
use checkpoint::wire::{DeviceState, PageBatch};
use checkpoint::{Duration, Generation, Tag};
use primary::event::{Action as PrimaryAction, Event as PrimaryEvent};
use primary::protocol::{Mode, Resume, Room};
use secondary::event::{Action as SecondaryAction, Event as SecondaryEvent};

use crate::checkers::Checkers;
use crate::clients::Clients;
use crate::coverage::Coverage;
use crate::disk::DiskOrder;
use crate::faults::{Fault, Kind};
use crate::network::{Channel, Link, Wire, Witness};
use crate::node::{DiskFault, Node, Role};
use crate::operator::OPERATOR_LOOKS_EVERY;
use crate::random::Random;
use crate::shipping::Step;
use crate::toy_vm::Effect;
use crate::trace::{Line, Trace};

/// Silence after which a side is lost, on both.
pub const TAKEOVER_LIMIT: Duration = Duration::from_millis(300);
pub(crate) const MILLISECOND: u64 = 1_000_000;
/// One is the same as a later death: after the second, the witness's term 1 may be old.
const FIRST_STARTS_CUT: u32 = 2;

/// What a host's VM thread is told. It obeys in order.
pub(crate) enum VmOrder {
    Alike(PageMatches),
    /// Pages of a stream, which are written into the image at once.
    Apply(usize, PageBatch),
    Ask(Tag),
    /// Makes memory ready for a sync; keeps it if the primary builds on it.
    BeginSync(bool),
    Check(Tag, Result<(), String>),
    Compare(PageHashes),
    Count(Tag),
    DropStage,
    KeepDirty,
    Load(Tag),
    Pause,
    Resume,
    /// Whether pages may be compared, besides.
    Ship(Totals, Vec<u64>, bool),
    ShipAhead(Tag, u64),
    StageDevices(DeviceState),
    StagePages(usize, PageBatch),
    Sync(Totals, bool),
}

pub(crate) enum Happening {
    ClientHears(Bytes),
    ClientWakes(usize, u64),
    Courier(usize, u64),
    Claim(usize, u64, Generation),
    Dial(usize, u64),
    Disk(usize, u64, DiskOrder),
    DiskHeals(usize, DiskFault),
    Fault(Fault),
    Flushed(usize, u64, u64),
    Frame(Bytes),
    GuestTimer(usize, u64, u64),
    Operator,
    PrimaryEvent(usize, u64, PrimaryEvent),
    SecondaryEvent(usize, u64, SecondaryEvent),
    Serve(usize, u64),
    Stop(usize, u64),
    Vm(usize, u64, VmOrder),
    Wire(Wire),
}

/// Makes a fault, given the primary's number and the other's.
pub type Aim = fn([usize; 2]) -> Fault;

/// A fault that waits for some side to be at a step.
struct Armed {
    step: &'static str,
    what: Trap,
}

enum Trap {
    Aim(Aim),
    /// Of the host that is at the step, or of its peer.
    Kind(Kind, bool),
}

/// Returns what a seed's pair is set to.
pub(crate) fn mode_of(seed: u64) -> Mode {
    match seed % 3 {
        0 => Mode::Auto,
        1 => Mode::Lockstep,
        _ => Mode::Buffered,
    }
}

/// The world.
pub struct World {
    pub(crate) now: u64,
    serial: u64,
    pub(crate) random: Random,
    pub(crate) queue: BTreeMap<(u64, u64), Happening>,
    pub(crate) nodes: [Node; 2],
    pub(crate) links: Vec<Link>,
    pub(crate) resume: Resume,
    /// Network cards of the VM.
    pub(crate) cards: usize,
    /// Page streams of each pairing.
    pub(crate) streams: usize,
    pub(crate) pause_budget: Option<Duration>,
    pub(crate) room: Room,
    /// Of the secondary's output that waits to be sent.
    pub(crate) unsent_bytes: usize,
    pub(crate) mode: Mode,
    pub(crate) checkpoint_every: Duration,
    /// The clients, and what they did and saw.
    pub clients: Clients,
    /// Of each client: its last wake-up call, and when it asked for it.
    pub(crate) client_turns: Vec<(u64, Option<u64>)>,
    pub(crate) sent: Vec<Bytes>,
    pub(crate) effects: Vec<Effect>,
    pub(crate) witness: Witness,
    pub(crate) has_witness: bool,
    pub(crate) primary_actions: Vec<PrimaryAction>,
    pub(crate) secondary_actions: Vec<SecondaryAction>,
    /// So many starts without a record lose their host's power while they write the first.
    pub(crate) first_starts_cut: u32,
    /// An operator starts a host that died or ended.
    pub restarts: bool,
    /// No frame is lost or overtaken between the clients and the hosts.
    pub smooth: bool,
    /// The host whose disk holds everything that the guest has flushed, if there is one.
    pub(crate) current: Option<usize>,
    /// The VM has run before.
    pub(crate) booted: bool,
    armed: Vec<Armed>,
    /// The end of the longest fault.
    pub(crate) disturbed_until: u64,
    /// The rules.
    pub checkers: Checkers,
    /// What happened last.
    pub trace: Trace,
    /// Faults that have happened.
    pub faults: u64,
    /// Where.
    pub coverage: Coverage,
}

impl World {
    /// Makes a world in which host 0 boots the VM and host 1 waits for it.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut world = Self::empty(seed, true);
        world.witness.terms.insert(Generation(1), 0);
        world.first_start();
        world.begin()
    }

    /// Makes a world in which neither host has ever started, and the first starts of the VM are cut short.
    #[must_use]
    pub fn not_started(seed: u64) -> Self {
        let mut world = Self::empty(seed, true);
        world.first_starts_cut = FIRST_STARTS_CUT;
        world.begin()
    }

    /// Makes a world without a witness.
    #[must_use]
    pub fn without_witness(seed: u64) -> Self {
        let mut world = Self::empty(seed, false);
        world.first_start();
        world.begin()
    }

    fn empty(seed: u64, witness: bool) -> Self {
        let mut random = Random::new(seed);
        let nodes = [Node::new(seed, &mut random), Node::new(seed ^ 1, &mut random)];
        let resume = if seed.is_multiple_of(4) {
            Resume::AfterAcknowledgement
        } else {
            Resume::AfterCopy
        };
        let clients = Clients::new(random.draw());
        Self {
            now: 0,
            serial: 0,
            random,
            queue: BTreeMap::new(),
            nodes,
            links: Vec::new(),
            resume,
            cards: usize::try_from(1 + seed / 4 % 2).expect("few"),
            streams: usize::try_from(1 + seed % 4).expect("few"),
            // Near what a toy's stop takes.
            room: match seed % 4 {
                1 | 2 => Room {
                    held_bytes: 4_096,
                    written_bytes: 32_768,
                    inputs: 24,
                    input_bytes: 2_048,
                    ..Room::default()
                },
                // Few of its pages.
                3 => Room {
                    pages: 8,
                    ..Room::default()
                },
                _ => Room::default(),
            },
            unsent_bytes: if seed % 3 == 1 { 1_024 } else { limits::UNSENT_BYTES_MAX },
            pause_budget: (seed % 5 == 1).then(|| Duration::from_micros(250 + seed % 7 * 50)),
            mode: mode_of(seed),
            checkpoint_every: Duration::from_millis(5 + seed % 7 * 10),
            client_turns: vec![(0, None); clients.count()],
            clients,
            sent: Vec::new(),
            effects: Vec::new(),
            primary_actions: Vec::new(),
            secondary_actions: Vec::new(),
            restarts: true,
            smooth: false,
            witness: Witness::default(),
            first_starts_cut: 0,
            has_witness: witness,
            current: None,
            booted: false,
            armed: Vec::new(),
            disturbed_until: 0,
            checkers: Checkers::default(),
            trace: Trace::default(),
            faults: 0,
            coverage: Coverage::default(),
        }
    }

    fn begin(mut self) -> Self {
        for client in 0..self.clients.count() {
            self.clients_sent(client);
        }
        self.later(OPERATOR_LOOKS_EVERY, Happening::Operator);
        self
    }

    /// Returns how many inputs a primary forwards before one is confirmed.
    #[must_use]
    pub fn inputs_max(&self) -> u64 {
        self.room.inputs
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

    /// Returns the source of chance, for the choice of faults.
    pub fn random(&mut self) -> &mut Random {
        &mut self.random
    }

    /// Lets a fault happen after so many microseconds.
    pub fn inject_at(&mut self, fault: Fault, micros: u64) {
        self.later(micros * 1_000, Happening::Fault(fault));
    }

    /// Lets a fault happen as soon as some side is in this phase.
    pub fn arm(&mut self, phase: &'static str, aim: Aim) {
        let what = Trap::Aim(aim);
        self.armed.push(Armed { step: phase, what });
    }

    /// Lets a fault of this kind strike the host that is the first to be at this step, or its link or witness; or the
    /// peer of that host.
    pub fn arm_kind(&mut self, step: &'static str, kind: Kind, peer: bool) {
        let what = Trap::Kind(kind, peer);
        self.armed.push(Armed { step, what });
    }

    /// Takes armed faults back; returns how many have not happened.
    pub fn disarm(&mut self) -> usize {
        core::mem::take(&mut self.armed).len()
    }

    /// Returns how many armed faults have not happened.
    #[must_use]
    pub fn armed(&self) -> usize {
        self.armed.len()
    }

    pub(crate) fn spring(&mut self) {
        if self.armed.is_empty() {
            return;
        }
        let phases = [self.phase(0), self.phase(1)];
        let is_met = |armed: &Armed| phases.iter().position(|phase| *phase == armed.step);
        while let Some((at, host)) = (0..self.armed.len()).find_map(|at| Some((at, is_met(&self.armed[at])?))) {
            let fault = match self.armed.remove(at).what {
                Trap::Aim(aim) => {
                    let first = usize::from(!matches!(self.nodes[0].role, Role::Primary(_)));
                    aim([first, 1 - first])
                }
                Trap::Kind(kind, peer) => kind.against(if peer { 1 - host } else { host }, &mut self.random),
            };
            self.fault(fault);
            if [self.phase(0), self.phase(1)] != phases {
                return;
            }
        }
    }

    /// Gives the protocol of a host an event, if it is primary.
    pub fn ask_primary(&mut self, node: usize, event: PrimaryEvent) {
        self.step_primary(node, event);
    }

    /// Gives the protocol of a host an event, if it is secondary.
    pub fn ask_secondary(&mut self, node: usize, event: SecondaryEvent) {
        self.step_secondary(node, event);
    }

    /// Returns what the host's protocol is in the middle of.
    #[must_use]
    pub fn phase(&self, node: usize) -> &'static str {
        match &self.nodes[node].role {
            Role::Primary(primary) => primary.phase(),
            Role::Secondary(secondary) => secondary.phase(),
            Role::Off => "off",
            Role::Waiting => "waiting",
        }
    }

    /// Returns the simulated time in milliseconds.
    #[must_use]
    pub fn milliseconds(&self) -> u64 {
        self.now / MILLISECOND
    }

    /// Returns a host.
    #[must_use]
    pub fn node(&self, node: usize) -> &Node {
        &self.nodes[node]
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

    /// Tells whether some fault has not ended.
    #[must_use]
    pub fn is_disturbed(&self) -> bool {
        let waiting = |happening: &Happening| matches!(happening, Happening::Fault(_));
        self.nodes
            .iter()
            .any(|node| node.doomed || node.is_stopping() || node.frozen_until > self.now || node.disk_fails())
            || self.queue.values().any(waiting)
    }

    /// The host dies, and never comes back.
    pub fn bury(&mut self, node: usize) {
        self.fault(Fault::PowerLoss(node));
        self.nodes[node].off_until = u64::MAX;
    }

    // Time.

    pub(crate) fn later(&mut self, delay: u64, happening: Happening) {
        self.serial += 1;
        self.queue.insert((self.now + delay, self.serial), happening);
    }

    pub(crate) fn soon(&mut self, happening: Happening) {
        let delay = 20_000 + self.random.below(300_000);
        self.later(delay, happening);
    }

    /// Orders of one host's VM thread are carried out one after the other.
    pub(crate) fn order(&mut self, node: usize, order: VmOrder) {
        let (least, longest) = match order {
            VmOrder::Load(_) => (MILLISECOND, 10 * MILLISECOND),
            _ => (2_000, 200_000),
        };
        let mut at = (self.now + least + self.random.below(longest)).max(self.nodes[node].ordered_until);
        // What is staged is taken or dropped as a whole.
        if matches!(order, VmOrder::Check(..) | VmOrder::DropStage | VmOrder::Load(_)) {
            at = self.nodes[node].staged_until.into_iter().fold(at, u64::max);
        }
        self.nodes[node].ordered_until = at;
        if let VmOrder::BeginSync(_) = order {
            // The streams wait until the image is ready.
            self.nodes[node].staged_until = [at; STREAMS_MAX];
        }
        let life = self.nodes[node].life;
        self.later(at - self.now, Happening::Vm(node, life, order));
    }

    /// Pages of one stream are taken one batch after the other, beside the VM's thread and the other streams.
    pub(crate) fn pages(&mut self, node: usize, stream: usize, order: VmOrder) {
        let at = (self.now + 2_000 + self.random.below(200_000)).max(self.nodes[node].staged_until[stream]);
        self.nodes[node].staged_until[stream] = at;
        let life = self.nodes[node].life;
        self.later(at - self.now, Happening::Vm(node, life, order));
    }

    pub(crate) fn note(&mut self, line: Line) {
        self.trace.add(self.now, line);
    }

    /// Carries out the next happening or deadline before `end`.
    fn advance(&mut self, end: u64) -> bool {
        let deadline = (0..2).filter_map(|node| self.deadline(node).map(|at| (at, node))).min();
        let next = self.queue.first_key_value().map(|(key, _)| key.0);
        let (at, node) = match (next, deadline) {
            (None, None) => return false,
            (Some(at), None) => (at, None),
            (None, Some((at, node))) => (at, Some(node)),
            (Some(at), Some((due, node))) => {
                let first = due < at || (due == at && self.nodes[node].deadline_first);
                if first { (due, Some(node)) } else { (at, None) }
            }
        };
        if at > end {
            return false;
        }
        self.now = self.now.max(at);
        let Some(node) = node else {
            let (_, happening) = self.queue.pop_first().expect("just seen");
            self.happen(happening);
            self.spring();
            return true;
        };
        match &self.nodes[node].role {
            Role::Primary(_) => self.step_primary(node, PrimaryEvent::Timeout),
            Role::Secondary(_) => self.step_secondary(node, SecondaryEvent::Timeout),
            Role::Off | Role::Waiting => {}
        }
        self.spring();
        true
    }

    fn deadline(&self, node: usize) -> Option<u64> {
        let node = &self.nodes[node];
        let deadline = match &node.role {
            Role::Primary(primary) => primary.deadline(),
            Role::Secondary(secondary) => secondary.deadline(),
            Role::Off | Role::Waiting => None,
        };
        deadline.map(|at| node.world_time(at).max(node.frozen_until).max(self.now))
    }

    /// Returns the host that has to execute for this, and its life if another life does not inherit it.
    fn executes_on(happening: &Happening) -> Option<(usize, Option<u64>)> {
        match happening {
            Happening::PrimaryEvent(node, life, _)
            | Happening::SecondaryEvent(node, life, _)
            | Happening::Serve(node, life)
            | Happening::Stop(node, life)
            | Happening::Flushed(node, life, _)
            | Happening::GuestTimer(node, life, _)
            | Happening::Dial(node, life)
            | Happening::Courier(node, life)
            | Happening::Disk(node, life, _)
            | Happening::Vm(node, life, _) => Some((*node, Some(*life))),
            Happening::Wire(wire) => Some((wire.to, None)),
            Happening::Claim(..)
            | Happening::ClientWakes(..)
            | Happening::ClientHears(_)
            | Happening::DiskHeals(..)
            | Happening::Fault(_)
            | Happening::Frame(_)
            | Happening::Operator => None,
        }
    }

    fn happen(&mut self, happening: Happening) {
        if let Some((node, life)) = Self::executes_on(&happening) {
            let host = &self.nodes[node];
            let gone = matches!(&happening, Happening::Wire(wire) if host.link != Some(wire.link));
            if gone || life.is_some_and(|life| life != host.life) {
                return;
            }
            if host.frozen_until > self.now {
                let delay = host.frozen_until - self.now;
                return self.later(delay, happening);
            }
        }
        match happening {
            Happening::Claim(node, life, term) => self.claimed(node, life, term),
            Happening::ClientHears(frame) => self.client_hears(&frame),
            Happening::ClientWakes(client, turn) => self.client_wakes(client, turn),
            Happening::Courier(node, life) => self.courier(node, life),
            Happening::Dial(node, life) => self.dial(node, life),
            Happening::Disk(node, _, order) => self.obey_disk(node, order),
            Happening::DiskHeals(node, fault) => self.nodes[node].heal_disk(fault),
            Happening::Fault(fault) => self.fault(fault),
            Happening::Flushed(node, _, number) => self.flush_ends(node, number),
            Happening::Frame(frame) => self.frame_at_switch(&frame),
            Happening::GuestTimer(node, _, time) => self.guest_timer(node, time),
            Happening::Operator => self.operate(),
            Happening::PrimaryEvent(node, _, event) => self.step_primary(node, event),
            Happening::SecondaryEvent(node, _, event) => self.step_secondary(node, event),
            Happening::Serve(node, _) => self.serve(node),
            Happening::Stop(node, _) => self.stop(node),
            Happening::Vm(node, _, order) => self.obey(node, order),
            Happening::Wire(wire) => self.arrive(wire),
        }
        for node in 0..2 {
            if self.nodes[node].doomed && self.nodes[node].disk.is_off() {
                self.note(Line::Note(format!(
                    "host {node} loses power in the middle of its disk work"
                )));
                self.power_loss(node);
            }
        }
    }

    // Guests.

    fn obey(&mut self, node: usize, order: VmOrder) {
        let host = &mut self.nodes[node];
        match order {
            VmOrder::BeginSync(keep) => host.begin_sync(keep),
            VmOrder::Apply(stream, batch) => host.apply((stream, self.streams), &batch),
            VmOrder::DropStage => host.drop_stage(),
            VmOrder::KeepDirty => host.keep_dirty(),
            VmOrder::StageDevices(state) => host.stage_devices(state),
            VmOrder::StagePages(stream, batch) => host.stage_pages((stream, self.streams), &batch),
            VmOrder::Resume => self.guest_resumes(node),
            VmOrder::Alike(matches) => {
                host.shipping.answered(&matches);
                let life = host.life;
                self.soon(Happening::Courier(node, life));
            }
            VmOrder::Ask(tag) => {
                host.shipping.halted(tag);
                let life = host.life;
                self.soon(Happening::Courier(node, life));
            }
            VmOrder::Compare(hashes) => {
                let matches = host.compare(&hashes);
                self.step_secondary(node, SecondaryEvent::Compared(matches));
            }
            VmOrder::Count(tag) => {
                let own = host.vm.memory.dirty().len();
                self.step_secondary(node, SecondaryEvent::Counted(tag, own));
                if let Role::Secondary(secondary) = &self.nodes[node].role
                    && secondary.tag() == tag
                    && secondary.phase() == "following"
                {
                    self.checkers.counted(tag, own >= 2 * self.room.pages);
                }
            }
            VmOrder::Check(tag, result) => self.step_secondary(node, SecondaryEvent::Checked(tag, result)),
            VmOrder::Load(tag) => {
                host.load(tag);
                self.step_secondary(node, SecondaryEvent::Loaded(tag));
            }
            VmOrder::Pause => {
                host.running = false;
                match host.role {
                    Role::Primary(_) => self.step_primary(node, PrimaryEvent::Paused),
                    Role::Secondary(_) => self.step_secondary(node, SecondaryEvent::Paused),
                    Role::Off | Role::Waiting => {}
                }
            }
            VmOrder::Ship(totals, blocks, both_ran) => {
                let (tag, life) = (totals.tag(), host.life);
                let asks = match self.random.below(4) {
                    0 if both_ran => Question::All(0),
                    1 if both_ran => Question::All(3),
                    2 if both_ran => Question::Sample,
                    _ => Question::Nothing,
                };
                let (pages, entropy) = host.copy(&blocks, totals, asks, self.random.draw());
                self.step_primary(node, PrimaryEvent::Copied { tag, pages, entropy });
                self.soon(Happening::Courier(node, life));
            }
            VmOrder::ShipAhead(tag, most) => {
                let life = host.life;
                let Some(look) = host.look(tag, most) else { return };
                let held = host.shipping.pages_of_epoch(&host.vm.memory, tag);
                if look.ahead > 0 {
                    if self.random.below(8) == 0 {
                        host.courier_until = self.now + self.random.below(20 * MILLISECOND);
                    }
                    self.soon(Happening::Courier(node, life));
                }
                self.checkers.looked(tag, held >= self.room.pages);
                self.step_primary(node, PrimaryEvent::Looked(look));
            }
            VmOrder::Sync(totals, difference) => {
                let (batches, shipment) = host.sync_memory(totals, difference);
                if host.link.is_none() {
                    return;
                }
                for (stream, batch) in batches {
                    self.send_pages(node, stream, batch);
                }
                self.step_primary(node, PrimaryEvent::MemorySynced(shipment));
            }
        }
    }

    /// Takes the courier's next step, ahead of a stop or with what was copied at one; the guest may run meanwhile.
    fn courier(&mut self, node: usize, life: u64) {
        let host = &mut self.nodes[node];
        if host.courier_until > self.now {
            let delay = host.courier_until - self.now;
            return self.later(delay, Happening::Courier(node, life));
        }
        while let Some(errand) = host.shipping.errands.front()
            && host.link != Some(errand.link())
        {
            host.shipping.errands.pop_front();
        }
        let seed = self.random.draw();
        let host = &mut self.nodes[node];
        match host.shipping.step(&mut host.vm.memory, seed) {
            Some(Step::CompareAsked(tag)) => self.step_primary(node, PrimaryEvent::CompareAsked(tag)),
            Some(Step::Hashed(hashes)) => self.step_primary(node, PrimaryEvent::Hashed(hashes)),
            Some(Step::Send(message)) => self.send(node, Channel::Data, message),
            Some(Step::SendPages((stream, batch))) => self.send_pages(node, stream, batch),
            Some(Step::ShippedAhead(done)) => self.step_primary(node, PrimaryEvent::ShippedAhead(done)),
            Some(Step::Sent(shipment)) => self.step_primary(node, PrimaryEvent::CheckpointSent(shipment)),
            None => {}
        }
        if self.nodes[node].shipping.is_busy() {
            let delay = self.random.below(20_000);
            self.later(delay, Happening::Courier(node, life));
        }
    }
}
