//! The primary's loop: wait for an event, a deadline or a question; step; act. No decisions.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration as StdDuration;

use checkpoint::handshake::{self, Local};
use checkpoint::limits::{self, PAGE_BYTES};
use checkpoint::pages::BASE_BYTES_DEFAULT;
use checkpoint::wire::{Held, MachineShape, Message, Session};
use checkpoint::{Epoch, Generation, Instant, Nic};
use link::capture::Captures;
use link::clock;
use link::control::{Answer, Command as Question, ControlRequest};
use link::mailbox::{self, mailbox};
use link::port::{INBOX_BYTES_MAX, INBOX_FRAMES_MAX, Port, Turns};
use link::record::RecordPlace;
use link::sentinel::Sentinel;
use link::status::{Rates, Status};
use link::{Alarms, BulkSender, Established, Events as LinkEvents, Link, LinkEvent, Worker};
use machine::devices::net::FRAME_BYTES_MAX;
use machine::offload::HEADER_BYTES;
use machine::tap::Tap;
use machine::{PowerEvent, Vm};
use storage::FileImage;
use storage::witness::DirectoryWitness;
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{info, warn};

use crate::backends::{Disk, Events, give_back_image};
use crate::clients::Clients;
use crate::event::{Action, Event, GuestEnd, Outcome};
use crate::protocol::{Options, Primary, Start};
use crate::trace::Traces;
use crate::vm::{self, Command, DiskCommand, ShipOrder, VmThread};

/// Events of the machine that may wait for the loop; its threads block when there are more.
const EVENTS_MAX: usize = 4_096;
/// Frames taken from the TAP in one go.
const FRAMES_PER_TURN: usize = 64;
const _: () = assert!(
    (INBOX_BYTES_MAX + limits::NICS_MAX * limits::FRAME_BYTES_MAX) as u64 <= limits::INPUT_BYTES_UNCONFIRMED_MAX
        && INBOX_FRAMES_MAX as u64 <= limits::INPUTS_UNCONFIRMED_MAX
        && limits::FRAME_HEADER_BYTES == HEADER_BYTES
        && limits::FRAME_BYTES_MAX == FRAME_BYTES_MAX,
    "what was read before the network is held fits into what the secondary bears"
);
/// Events of the machine taken in one go for each network card; more than a turn of it makes.
const EVENTS_PER_TURN: usize = 256;
/// Messages of the peer taken in one go.
const MESSAGES_PER_TURN: usize = 64;
/// Longest time that an orderly end of the connections takes.
const GOODBYE_MAX: StdDuration = StdDuration::from_millis(500);
/// Time between two attempts to reach a secondary.
const DIAL_EVERY: StdDuration = StdDuration::from_millis(250);

/// Everything a primary runs with.
pub struct Setup {
    /// What the operator set.
    pub options: Options,
    /// How this side came to run.
    pub start: Start,
    /// Name of the pair.
    pub pair: String,
    /// Name of this host.
    pub node: String,
    /// Where a secondary listens; without it the VM runs alone.
    pub peer: Option<SocketAddr>,
    /// Most page streams of a pairing.
    pub streams: usize,
    /// The machine, for the handshake.
    pub shape: MachineShape,
    /// The machine, stopped.
    pub vm: Box<dyn Vm>,
    /// The guest's network ports, one a card.
    pub ports: Vec<Arc<Port>>,
    /// Where the clients of each card are.
    pub taps: Vec<Arc<Tap>>,
    /// The disk.
    pub image: Arc<FileImage>,
    /// Told when the image holds all that the guest was told is written; block device and disk thread wait for it.
    pub image_ready: Option<std::sync::mpsc::Receiver<Result<(), String>>>,
    /// The record beside the image.
    pub record: RecordPlace,
    /// The witness, if there is one.
    pub witness: Option<Arc<DirectoryWitness>>,
    /// What the guest does with its power switch.
    pub power: mpsc::UnboundedReceiver<PowerEvent>,
    /// The process that ends the connections when this one dies.
    pub sentinel: Arc<Sentinel>,
    /// A secondary that has been met already.
    pub met: Option<Established>,
}

/// What a role hears from outside while it runs; it outlives the role.
pub struct Outside {
    /// Questions and orders from the control socket.
    pub control: mpsc::Receiver<ControlRequest>,
    /// True once the operator asked for an orderly end.
    pub stop: watch::Receiver<bool>,
}

/// Runs as primary to the end.
///
/// # Errors
/// Fails if the host refuses a thread or a descriptor at the start.
pub async fn run(mut setup: Setup, outside: &mut Outside) -> std::io::Result<Outcome> {
    let (events, inbox) = mailbox(EVENTS_MAX);
    let (folded, ready) = setup.image_ready.take().map_or((None, None), |image_ready| {
        let (open, ready) = std::sync::mpsc::channel();
        (Some((image_ready, open)), Some(ready))
    });
    let nets = link::port::backends(&setup.ports, &Events(events.clone()));
    let disk = Disk::new(Arc::clone(&setup.image), ready, events.clone());
    setup
        .vm
        .set_backends(nets, Box::new(disk))
        .map_err(std::io::Error::other)?;
    if let Start::TakenOver { .. } = setup.start {
        give_back_image(setup.vm.ram())?;
    }
    let traces = Traces::default();
    let cards = Turns::new(setup.vm.net_turns())?;
    // Of what the secondary has committed no more is remembered than the pages of a checkpoint may take there.
    let cache_bytes = usize::try_from(setup.options.room.pages)
        .unwrap_or(usize::MAX)
        .saturating_mul(2 * PAGE_BYTES)
        .min(BASE_BYTES_DEFAULT);
    let image = Arc::clone(&setup.image);
    let vm = vm::spawn(setup.vm, image, traces.clone(), events.clone(), cache_bytes)?;
    let disk = vm::spawn_disk(Arc::clone(&setup.image), setup.record, folded, events.clone())?;
    let (dialled, answers) = mpsc::channel(1);
    let mut actions = Vec::new();
    let protocol = Primary::new(setup.options.clone(), setup.start, clock::now(), &mut actions);
    let mut role = Role {
        protocol,
        actions,
        vm,
        disk,
        events,
        link: None,
        goodbye: false,
        finishing: None,
        session: Session(0),
        dialled,
        dialler: None,
        local: Local {
            pair: setup.pair,
            node: setup.node,
            shape: setup.shape,
            adapts: false,
            generation: Generation(0),
            owner: true,
            committed: Epoch(0),
            held: Held::default(),
            held_cpu: None,
            takeover_limit_ms: setup.options.takeover_limit.as_millis(),
            witness: setup.options.witness,
            streams: setup.streams,
        },
        peer: setup.peer,
        clients: Clients::new(&setup.taps)?,
        captures: Captures::new(setup.taps.len()),
        ports: setup.ports,
        cards,
        witness: setup.witness,
        sentinel: setup.sentinel,
        hold: false,
        alarms: Alarms::default(),
        state: "starting",
        since: clock::now(),
        rates: Rates::default(),
        sampled: (clock::now(), crate::protocol::Counters::default()),
        outcome: None,
        traced: Epoch(0),
        traces,
        asked: Vec::new(),
    };
    if let Some(met) = setup.met {
        role.connected(met);
    }
    role.run(inbox, answers, setup.power, outside).await
}

struct Role {
    protocol: Primary,
    actions: Vec<Action>,
    vm: VmThread,
    disk: Worker<DiskCommand>,
    events: mailbox::Sender<Event>,
    link: Option<(Link, LinkEvents)>,
    /// The peer has been told that this end is in order.
    goodbye: bool,
    finishing: Option<tokio::task::JoinHandle<()>>,
    session: Session,
    dialled: mpsc::Sender<Established>,
    dialler: Option<tokio::task::JoinHandle<()>>,
    local: Local,
    peer: Option<SocketAddr>,
    clients: Clients,
    captures: Captures,
    ports: Vec<Arc<Port>>,
    cards: Turns,
    witness: Option<Arc<DirectoryWitness>>,
    sentinel: Arc<Sentinel>,
    hold: bool,
    alarms: Alarms,
    state: &'static str,
    /// When the state last changed.
    since: Instant,
    rates: Rates,
    sampled: (Instant, crate::protocol::Counters),
    outcome: Option<Outcome>,
    traces: Traces,
    /// The last committed epoch that they know of.
    traced: Epoch,
    /// Who asked for a checkpoint, and the epoch that it ends.
    asked: Vec<(Epoch, oneshot::Sender<Result<Answer, String>>)>,
}

impl Role {
    async fn run(
        mut self,
        mut inbox: mailbox::Receiver<Event>,
        mut answers: mpsc::Receiver<Established>,
        mut power: mpsc::UnboundedReceiver<PowerEvent>,
        outside: &mut Outside,
    ) -> std::io::Result<Outcome> {
        self.act();
        let mut stopping = *outside.stop.borrow();
        if stopping {
            self.step(Event::StopAsked);
        }
        while self.outcome.is_none() {
            let deadline = clock::sleep_until(self.protocol.deadline());
            tokio::select! {
                event = inbox.recv() => self.step(event),
                () = self.cards.due() => {}
                event = next_link_event(&mut self.link) => {
                    self.link_event(event);
                    for _ in 1..MESSAGES_PER_TURN {
                        let Some(event) = self.link.as_mut().and_then(|(_, events)| events.try_recv(true)) else { break };
                        self.link_event(event);
                    }
                }
                Some(established) = answers.recv() => self.connected(established),
                nic = self.clients.readable(&self.ports), if !self.hold => self.read_tap(nic),
                Some(event) = power.recv() => self.guest_ended(event),
                Some(request) = outside.control.recv() => self.answer(request),
                _ = outside.stop.changed(), if !stopping => {
                    stopping = true;
                    self.step(Event::StopAsked);
                }
                () = deadline => self.step(Event::Timeout),
            }
            self.cards.take();
            self.clients.follow(&self.ports);
            for _ in 0..EVENTS_PER_TURN * self.cards.cards() {
                let Some(event) = inbox.try_recv() else { break };
                self.step(event);
            }
            self.clients.flush();
            if let Some((link, _)) = &self.link {
                link.flush();
            }
            self.cards.tell();
        }
        self.clients.flush();
        self.wind_up().await
    }

    async fn wind_up(mut self) -> std::io::Result<Outcome> {
        if let Some(dialler) = self.dialler.take() {
            dialler.abort();
        }
        self.drop_link();
        if let Some(finishing) = self.finishing.take() {
            finishing.await.map_err(std::io::Error::other)?;
        }
        let vm = self.vm;
        tokio::task::spawn_blocking(move || vm.join())
            .await
            .map_err(std::io::Error::other)?;
        Ok(self
            .outcome
            .unwrap_or_else(|| Outcome::Failed("the role ended without a reason".to_owned())))
    }

    fn step(&mut self, event: Event) {
        if self.outcome.is_none() {
            let is_copied = matches!(event, Event::Copied { .. });
            self.protocol.step(clock::now(), event, &mut self.actions);
            self.act();
            if is_copied {
                self.vm.send(Command::Dispatch);
            }
        }
    }

    fn act(&mut self) {
        let mut actions = core::mem::take(&mut self.actions);
        for action in actions.drain(..) {
            self.carry_out(action);
        }
        self.actions = actions;
        self.show_output();
        if self.traced != self.protocol.committed() {
            self.traced = self.protocol.committed();
            let predicted = self.protocol.counters().last_predicted;
            self.traces.committed(self.traced, predicted.into());
        }
        self.answer_asked();
        // A protected pair takes checkpoints all the time: that is no news.
        let state = match self.protocol.state_name() {
            "checkpointing" => "protected",
            other => other,
        };
        if state != self.state && self.outcome.is_none() {
            info!(state, generation = self.protocol.tag().generation.0, "state");
            self.state = state;
            self.since = clock::now();
        }
    }

    /// Shows those who capture what this step has seen.
    fn show_output(&mut self) {
        if self.captures.is_empty() {
            return;
        }
        for sight in self.protocol.take_seen() {
            self.captures.offer(&sight);
        }
        if self.captures.is_empty() {
            self.protocol.watch_output(false);
        }
    }

    fn carry_out(&mut self, action: Action) {
        match action {
            Action::Alike(matches) => self.vm.send(Command::Alike(matches)),
            Action::AskAlike(tag) => self.vm.send(Command::AskAlike(tag)),
            Action::Claim(term) => self.claim(term),
            Action::CloseLink => self.drop_link(),
            Action::CompareBlocks(hashes) => {
                let Some(bulk) = self.bulk() else { return };
                let key = link::entropy::hash_key(self.session);
                self.disk.send(DiskCommand::Compare { hashes, key, bulk });
            }
            Action::Deliver(delivery) => {
                let nic = delivery.nic;
                self.ports[nic.index()].deliver(delivery);
                self.cards.make_due(nic);
            }
            Action::Dial => self.dial(),
            Action::End(outcome) => self.outcome = Some(outcome),
            Action::HoldInput(hold) => self.hold = hold,
            Action::KeepDirty => self.vm.send(Command::KeepDirty),
            Action::PauseVm => self.vm.send(Command::Pause),
            Action::Report(report) => self.alarms.report(report),
            Action::Reseed => self.vm.send(Command::Reseed),
            Action::ResumeVm => self.vm.send(Command::Resume),
            Action::Send(message) => {
                if let Some((link, _)) = &self.link {
                    link.send(message);
                }
            }
            Action::SendCheckpoint {
                tag,
                blocks,
                totals,
                both_ran,
            } => {
                let Some((link, _)) = &self.link else { return };
                self.vm.send(Command::Ship(Box::new(ShipOrder {
                    tag,
                    blocks,
                    totals,
                    both_ran,
                    bulk: link.bulk(),
                    streams: link.page_senders(),
                })));
            }
            Action::ShipAhead { tag, pages } => {
                let Some((link, _)) = &self.link else { return };
                let streams = link.page_senders();
                self.vm.send(Command::ShipAhead { tag, pages, streams });
            }
            Action::SendBlocks { tag, blocks } => {
                let Some(bulk) = self.bulk() else { return };
                self.disk.send(DiskCommand::Send { tag, blocks, bulk });
            }
            Action::SendControl(message) => {
                self.goodbye = matches!(message, Message::Goodbye(_));
                if let Some((link, _)) = &self.link {
                    link.send_control(message);
                }
            }
            Action::SeedEntropy(seed) => self.vm.send(Command::Seed(seed)),
            Action::StoreRecord(update) => self.disk.send(DiskCommand::Store(update)),
            Action::SyncMemory { totals, difference } => {
                let Some((link, _)) = &self.link else { return };
                self.vm.send(Command::Sync {
                    totals: Box::new(totals),
                    difference,
                    streams: link.page_senders(),
                });
            }
            Action::Transmit { nic, frames, not_after } => self.clients.transmit(nic, frames, not_after),
        }
    }

    /// Returns the way for bulk data, unless the link has gone since the order was given.
    fn bulk(&self) -> Option<BulkSender> {
        self.link.as_ref().map(|(link, _)| link.bulk())
    }

    fn claim(&self, term: Generation) {
        let Some(witness) = &self.witness else { return };
        let events = self.events.clone();
        link::contest::claim(witness, term, move |answer| {
            events.send(Event::WitnessAnswered(term, answer));
        });
    }

    fn dial(&mut self) {
        let Some(peer) = self.peer else { return };
        if self.link.is_some() || self.dialler.as_ref().is_some_and(|dialler| !dialler.is_finished()) {
            return;
        }
        self.local.generation = self.protocol.tag().generation;
        self.local.committed = self.protocol.committed();
        let local = self.local.clone();
        let dialled = self.dialled.clone();
        self.dialler = Some(tokio::spawn(async move {
            let mut told = String::new();
            loop {
                let judge = |welcome: &_| handshake::judge_welcome(&local, welcome);
                match link::connect(peer, handshake::hello(&local), judge).await {
                    Ok(established) => {
                        // A closed channel means that the role has ended.
                        let _ = dialled.send(established).await;
                        return;
                    }
                    Err(error) => {
                        let text = link::describe(&error);
                        if text != told {
                            if error.is_passing() {
                                info!("no secondary yet: {text}");
                            } else {
                                warn!("the VM stays unprotected until this is mended: {text}");
                            }
                            told = text;
                        }
                    }
                }
                tokio::time::sleep(DIAL_EVERY).await;
            }
        }));
    }

    fn connected(&mut self, established: Established) {
        // Its work is done, though its task may not have ended yet: the next loss starts another.
        self.dialler = None;
        let welcome = established.welcome;
        info!(secondary = %welcome.node, "connected");
        self.session = welcome.session;
        self.sentinel.guard(&established.link.sockets());
        self.link = Some((established.link, established.events));
        self.step(Event::Connected(welcome));
    }

    fn link_event(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::Message(message) => self.step(Event::PeerSent(message)),
            // A secondary sends none: the protocol is to say so.
            LinkEvent::Pages(arrived) => self.step(Event::PeerSent(Message::Pages(arrived.batch))),
            LinkEvent::Closed { which, cause } => {
                self.drop_link();
                self.step(Event::LinkClosed(format!("{which} connection: {cause}")));
            }
        }
    }

    fn drop_link(&mut self) {
        // The peer may take the connections' end for the end of all output.
        self.clients.flush();
        let Some((link, _)) = self.link.take() else { return };
        if self.goodbye {
            self.finishing = Some(tokio::spawn(async move { link.finish(GOODBYE_MAX).await }));
        } else {
            link.close();
        }
        self.sentinel.release();
    }

    fn read_tap(&mut self, nic: Nic) {
        for _ in 0..FRAMES_PER_TURN {
            if self.ports[nic.index()].is_full() {
                return;
            }
            let Some(frame) = self.clients.read(nic) else { return };
            self.step(Event::FrameArrived(nic, frame));
        }
    }

    fn guest_ended(&mut self, event: PowerEvent) {
        match event {
            PowerEvent::Off => self.step(Event::GuestStopped(GuestEnd::PowerOff)),
            PowerEvent::Reset => self.vm.send(Command::Restart),
            PowerEvent::Panic => {
                self.step(Event::GuestStopped(GuestEnd::Crashed(
                    "it panicked; see its console".to_owned(),
                )));
            }
            PowerEvent::Crashed { reason } => self.step(Event::VmFailed(reason)),
        }
    }

    fn answer(&mut self, request: ControlRequest) {
        let reply = match request.command {
            Question::Status => Ok(Answer::Status(Box::new(self.status()))),
            Question::History => Ok(Answer::History(self.traces.list())),
            Question::Flows { most } => {
                let flows = crate::flows::flows(&self.protocol, clock::now(), most);
                Ok(Answer::Flows(Box::new(flows)))
            }
            Question::Capture => self.captures.begin().map(|capture| {
                self.protocol.watch_output(true);
                Answer::Capture(capture)
            }),
            Question::Checkpoint if self.is_protected() => {
                self.asked.push((self.protocol.covering(), request.reply));
                return self.step(Event::CheckpointAsked);
            }
            Question::Checkpoint => Err(format!(
                "no checkpoint: this side is {}, and takes one only while it is protected",
                self.protocol.state_name()
            )),
            Question::Stop => {
                self.step(Event::StopAsked);
                Ok(Answer::Done("ending in order".to_owned()))
            }
            Question::Takeover { .. } => {
                Err("this side is the primary and runs the VM: nothing to take over".to_owned())
            }
        };
        // The asker may have gone.
        let _ = request.reply.send(reply);
    }

    fn is_protected(&self) -> bool {
        matches!(self.protocol.state_name(), "protected" | "checkpointing")
    }

    /// Tells those who asked for a checkpoint what became of it.
    fn answer_asked(&mut self) {
        if self.asked.is_empty() {
            return;
        }
        let (committed, protected) = (self.protocol.committed(), self.is_protected());
        for (epoch, reply) in core::mem::take(&mut self.asked) {
            // The asker may have gone.
            if committed >= epoch {
                let _ = reply.send(Ok(Answer::Done(format!("checkpoint {epoch} is committed"))));
            } else if protected {
                self.asked.push((epoch, reply));
            } else {
                let _ = reply.send(Err(
                    "the secondary was lost before the checkpoint was committed".to_owned()
                ));
            }
        }
    }

    fn status(&mut self) -> Status {
        let now = clock::now();
        let counters = self.protocol.counters().clone();
        let span = now.since(self.sampled.0);
        if span.as_millis() >= 1_000 {
            let before = &self.sampled.1;
            self.rates = Rates::over(
                span,
                counters.inputs - before.inputs,
                counters.outputs - before.outputs,
                counters.pages - before.pages,
                counters.page_bytes - before.page_bytes,
            );
            self.sampled = (now, counters);
        }
        crate::status::status(
            &self.protocol,
            now,
            &crate::status::Shell {
                pair: &self.local.pair,
                node: &self.local.node,
                peer_address: self.peer,
                link_queued_bytes: self.link.as_ref().map_or(0, |(link, _)| link.queued_bytes() as u64),
                rates: self.rates,
                lost: self.clients.lost(),
                taps: self.clients.taps(),
                alarms: self.alarms.list(),
                since: now.since(self.since),
                last: self.traces.last(),
            },
        )
    }
}

async fn next_link_event(link: &mut Option<(Link, LinkEvents)>) -> LinkEvent {
    match link {
        Some((_, events)) => match events.recv(true).await {
            Some(event) => event,
            None => core::future::pending().await,
        },
        None => core::future::pending().await,
    }
}
