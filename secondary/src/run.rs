//! The secondary's loop: wait for an event, a deadline or a question; step; act. No decisions.

use std::sync::Arc;
use std::time::Duration as StdDuration;

use bytes::Bytes;
use checkpoint::pair::Delivery;
use checkpoint::wire::{Begin, Message, Session};
use checkpoint::{Generation, Instant, Nic};
use link::clock;
use link::control::{Answer, Command as Question, ControlRequest};
use link::mailbox::{self, mailbox};
use link::pages::Held;
use link::port::{Observer, Port, Turns};
use link::record::RecordPlace;
use link::sentinel::Sentinel;
use link::status::{Rates, Status};
use link::{Alarms, CloseCause, Established, Events as LinkEvents, Link, LinkEvent, Which, Worker};
use machine::{PowerEvent, Vm};
use storage::witness::DirectoryWitness;
use storage::{FileImage, Replica};
use tokio::sync::{mpsc, watch};
use tracing::info;

use crate::disk::{self, Disk, Follower};
use crate::event::{Action, Event, LinkEnd, Outcome};
use crate::protocol::{Options, Secondary};
use crate::stage::Stagers;
use crate::vm::{self, Command, VmThread};

/// Events of the machine that may wait for the loop; its threads block when there are more.
const EVENTS_MAX: usize = 4_096;
/// Events of the machine taken in one go for each network card; more than a turn of it makes.
const EVENTS_PER_TURN: usize = 256;
/// Messages of the peer taken in one go.
const MESSAGES_PER_TURN: usize = 64;
/// Longest time that an orderly end of the connections takes.
const GOODBYE_MAX: StdDuration = StdDuration::from_millis(500);

/// Everything a secondary runs with, once a primary has been accepted.
pub struct Setup {
    /// What the operator set.
    pub options: Options,
    /// Name of the pair.
    pub pair: String,
    /// Name of this host.
    pub node: String,
    /// The accepted primary.
    pub established: Established,
    /// The machine, stopped; its memory is private over the committed image.
    pub vm: Box<dyn Vm>,
    /// The guest's network ports, one a card.
    pub ports: Vec<Arc<Port>>,
    /// The disk's image.
    pub image: Arc<FileImage>,
    /// The disk's layers.
    pub replica: Replica<FileImage>,
    /// The record beside the image.
    pub record: RecordPlace,
    /// The witness, if there is one.
    pub witness: Option<Arc<DirectoryWitness>>,
    /// What the guest does with its power switch.
    pub power: mpsc::UnboundedReceiver<PowerEvent>,
    /// The process that ends the connections when this one dies.
    pub sentinel: Arc<Sentinel>,
}

/// How the run ended, and the machine if it is to be run on.
pub struct Finished {
    /// How it ended.
    pub outcome: Outcome,
    /// Stopped: with the state to go on from after a takeover, else with the memory that the outcome tells of.
    pub vm: Option<Box<dyn Vm>>,
    /// What the guest does with its power switch.
    pub power: mpsc::UnboundedReceiver<PowerEvent>,
    /// Set when the image holds all that the guest was told is written; only after a takeover.
    pub image_ready: Option<std::sync::mpsc::Receiver<Result<(), String>>>,
}

/// Runs as secondary to the end.
///
/// # Errors
/// Fails if the host refuses a thread at the start.
pub async fn run(
    mut setup: Setup,
    control: &mut mpsc::Receiver<ControlRequest>,
    stop: &mut watch::Receiver<bool>,
) -> std::io::Result<Finished> {
    let (events, inbox) = mailbox(EVENTS_MAX);
    let disk = Disk::new(Arc::clone(&setup.image), setup.replica);
    let nets = link::port::backends(&setup.ports, &Events(events.clone()));
    let block = Follower::new(disk.clone(), events.clone());
    setup
        .vm
        .set_backends(nets, Box::new(block))
        .map_err(std::io::Error::other)?;
    let cards = Turns::new(setup.vm.net_turns())?;
    let stagers = Stagers::spawn(setup.options.streams, &setup.vm.ram(), &events)?;
    let vm = vm::spawn(setup.vm, stagers.orders(), events.clone())?;
    let thread = disk::spawn(disk.clone(), setup.record, events.clone(), vm.orders())?;
    let primary = setup.established.hello.node;
    setup.sentinel.guard(&setup.established.link.sockets());
    let role = Role {
        protocol: Secondary::new(setup.options, primary, clock::now()),
        actions: Vec::new(),
        arrived: None,
        stagers,
        vm,
        disk,
        thread,
        events,
        address: setup.established.link.peer_addr().to_string(),
        link: setup.established.link,
        session: setup.established.welcome.session,
        goodbye: false,
        finishing: None,
        closed: false,
        pair: setup.pair,
        node: setup.node,
        ports: setup.ports,
        cards,
        witness: setup.witness,
        sentinel: setup.sentinel,
        alarms: Alarms::default(),
        state: "starting",
        since: clock::now(),
        rates: Rates::default(),
        sampled: (clock::now(), crate::protocol::Counters::default()),
        outcome: None,
    };
    role.run(inbox, setup.established.events, setup.power, control, stop)
        .await
}

/// What happens in a turn of a network card, which the loop takes itself.
#[derive(Clone)]
struct Events(mailbox::Sender<Event>);

impl Observer for Events {
    fn sent(&mut self, nic: Nic, frame: Bytes) {
        self.0.post(Event::GuestSent(nic, frame));
    }

    fn consumed(&mut self, delivery: Delivery) {
        self.0.post(Event::InputConsumed(delivery));
    }
}

struct Role {
    protocol: Secondary,
    actions: Vec<Action>,
    /// What is kept of the link until the pages that have just arrived are staged.
    arrived: Option<Held>,
    stagers: Stagers,
    vm: VmThread,
    disk: Disk,
    thread: Worker<disk::Command>,
    events: mailbox::Sender<Event>,
    link: Link,
    session: Session,
    /// The peer has been told that this end is in order.
    goodbye: bool,
    finishing: Option<tokio::task::JoinHandle<()>>,
    address: String,
    /// Whether a connection has ended.
    closed: bool,
    pair: String,
    node: String,
    ports: Vec<Arc<Port>>,
    cards: Turns,
    witness: Option<Arc<DirectoryWitness>>,
    sentinel: Arc<Sentinel>,
    alarms: Alarms,
    state: &'static str,
    /// When the state last changed.
    since: Instant,
    rates: Rates,
    sampled: (Instant, crate::protocol::Counters),
    outcome: Option<Outcome>,
}

impl Role {
    async fn run(
        mut self,
        mut inbox: mailbox::Receiver<Event>,
        mut peer: LinkEvents,
        mut power: mpsc::UnboundedReceiver<PowerEvent>,
        control: &mut mpsc::Receiver<ControlRequest>,
        stop: &mut watch::Receiver<bool>,
    ) -> std::io::Result<Finished> {
        let mut stopping = *stop.borrow();
        if stopping {
            self.step(Event::StopAsked);
        }
        while self.outcome.is_none() {
            let deadline = clock::sleep_until(self.protocol.deadline());
            tokio::select! {
                event = inbox.recv() => self.step(event),
                () = self.cards.due() => {}
                () = self.link.drained(), if self.protocol.awaits_drain() => {}
                Some(event) = peer.recv(self.protocol.takes_pages()) => {
                    self.link_event(event);
                    for _ in 1..MESSAGES_PER_TURN {
                        let Some(event) = peer.try_recv(self.protocol.takes_pages()) else { break };
                        self.link_event(event);
                    }
                }
                Some(event) = power.recv() => self.guest_ended(event),
                Some(request) = control.recv() => self.answer(request),
                _ = stop.changed(), if !stopping => {
                    stopping = true;
                    self.step(Event::StopAsked);
                }
                () = deadline => self.step(Event::Timeout),
            }
            self.cards.take();
            for _ in 0..EVENTS_PER_TURN * self.cards.cards() {
                let Some(event) = inbox.try_recv() else { break };
                self.step(event);
            }
            self.link.flush();
            self.cards.tell();
            if self.protocol.awaits_drain() && self.link.queued_bytes() == 0 {
                self.step(Event::OutputDrained);
            }
        }
        drop(inbox);
        self.wind_up(power).await
    }

    async fn wind_up(mut self, power: mpsc::UnboundedReceiver<PowerEvent>) -> std::io::Result<Finished> {
        self.close_link();
        if let Some(finishing) = self.finishing.take() {
            finishing.await.map_err(std::io::Error::other)?;
        }
        let outcome = self
            .outcome
            .take()
            .unwrap_or_else(|| Outcome::Failed("the role ended without a reason".to_owned()));
        let taken = matches!(outcome, Outcome::TakenOver(_));
        let image_ready = taken.then(|| self.fold());
        let (vm, stagers, disk) = (self.vm, self.stagers, self.thread);
        let vm = tokio::task::spawn_blocking(move || {
            // After a takeover the disk's thread goes on by itself; else nothing may be written after this run.
            if !taken {
                disk.join();
            }
            let vm = vm.join();
            stagers.join();
            vm
        })
        .await
        .map_err(std::io::Error::other)?;
        Ok(Finished {
            outcome,
            vm,
            power,
            image_ready,
        })
    }

    /// Makes the own writes the disk, behind the commits that are still in the queue.
    fn fold(&self) -> std::sync::mpsc::Receiver<Result<(), String>> {
        let (done, ready) = std::sync::mpsc::channel();
        let job = self.disk.replica().take_over();
        self.thread.send(disk::Command::Fold(job, done));
        ready
    }

    fn step(&mut self, event: Event) {
        if self.outcome.is_none() {
            self.protocol.step(clock::now(), event, &mut self.actions);
            self.act();
        }
    }

    fn act(&mut self) {
        let mut actions = core::mem::take(&mut self.actions);
        for action in actions.drain(..) {
            self.carry_out(action);
        }
        self.actions = actions;
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

    fn carry_out(&mut self, action: Action) {
        match action {
            Action::ApplyPages(stream, batch) => {
                let room = self.arrived.take().expect("pages are applied as they arrive");
                self.stagers.apply(stream, batch, room);
            }
            Action::ApplyWrite(write) => self.thread.send(disk::Command::Apply(write)),
            Action::BeginSync(Begin { tag, base }) => {
                let hashes = (link::entropy::hash_key(self.session), self.link.bulk());
                self.thread.send(disk::Command::BeginSync {
                    tag,
                    hashes: base.disk.is_none().then_some(hashes),
                });
                self.vm.send(Command::BeginSync {
                    keep: base.memory.is_some(),
                    ready: self.stagers.begin(),
                });
            }
            Action::Check(tag) => {
                let first = self.protocol.is_first();
                self.thread.send(disk::Command::Prepare { tag, first });
            }
            Action::Claim(term) => self.claim(term),
            Action::CloseLink => self.close_link(),
            Action::Compare(hashes) => self.vm.send(Command::Compare(hashes)),
            Action::CommitDisk(epoch) => {
                let job = self.disk.commit(epoch);
                if let Some(job) = job {
                    self.thread.send(disk::Command::Run(job));
                }
            }
            Action::CountOwn(tag) => self.vm.send(Command::Count(tag)),
            Action::Deliver(delivery) => {
                let nic = delivery.nic;
                self.ports[nic.index()].deliver(delivery);
                self.cards.make_due(nic);
            }
            Action::DropDeliveries => self.ports.iter().for_each(|port| port.clear()),
            Action::DropStage => {
                self.stagers.drop_staged();
                self.vm.send(Command::DropStage);
            }
            Action::End(outcome) => self.outcome = Some(outcome),
            Action::HoldOutput(hold) => {
                self.ports.iter().for_each(|port| port.hold_output(hold));
                self.cards.make_all_due();
            }
            Action::Load(tag) => self.vm.send(Command::Load(tag)),
            Action::PauseVm => self.vm.send(Command::Pause),
            Action::Report(report) => self.alarms.report(report),
            Action::ResumeVm => self.vm.send(Command::Resume),
            Action::Send(message) => self.link.send(message),
            Action::SendControl(message) => {
                self.goodbye = matches!(message, Message::Goodbye(_));
                self.link.send_control(message);
            }
            Action::SeedEntropy(seed) => self.vm.send(Command::Seed(seed)),
            Action::StageDevices(state) => self.vm.send(Command::StageDevices(state)),
            Action::StagePages(stream, batch) => {
                let room = self.arrived.take().expect("pages are staged as they arrive");
                self.stagers.stage(stream, batch, room);
            }
            Action::StageWrite(write) => {
                let staged = self.disk.replica().stage(write.tag.epoch, write.offset, &write.written);
                if let Err(error) = staged {
                    // Taken after this step: actions are carried out in order.
                    self.events.post(Event::StageFailed(error.to_string()));
                }
            }
            Action::StoreRecord(update) => self.thread.send(disk::Command::Store(update)),
        }
    }

    fn claim(&self, term: Generation) {
        let Some(witness) = &self.witness else { return };
        let events = self.events.clone();
        link::contest::claim(witness, term, move |answer| {
            events.send(Event::WitnessAnswered(term, answer));
        });
    }

    fn close_link(&mut self) {
        if !self.goodbye {
            self.link.close();
        } else if self.finishing.is_none() {
            let link = self.link.clone();
            self.finishing = Some(tokio::spawn(async move { link.finish(GOODBYE_MAX).await }));
        }
        self.sentinel.release();
    }

    fn link_event(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::Message(message) => self.step(Event::PeerSent(message)),
            LinkEvent::Pages(pages) => {
                self.arrived = Some(pages.room);
                self.step(Event::PagesArrived(pages.stream, pages.batch));
                // They may not have been wanted.
                self.arrived = None;
            }
            LinkEvent::Closed { which, cause } => {
                self.closed = true;
                let end = link_end(which, cause);
                self.step(match which {
                    Which::Control => Event::ControlClosed(end),
                    Which::Data => Event::DataClosed(end),
                    Which::Pages(_) => Event::PagesClosed(end),
                });
            }
        }
    }

    fn guest_ended(&mut self, event: PowerEvent) {
        let reason = match event {
            PowerEvent::Off => "it powered off".to_owned(),
            PowerEvent::Reset => return self.vm.send(Command::Restart),
            PowerEvent::Panic => "it panicked".to_owned(),
            PowerEvent::Crashed { reason } => reason,
        };
        self.step(Event::GuestStopped(reason));
    }

    fn answer(&mut self, request: ControlRequest) {
        let reply = match request.command {
            Question::Status => Ok(Answer::Status(Box::new(self.status()))),
            Question::History | Question::Flows { .. } | Question::Capture => {
                Err("this side is the secondary: ask the primary".to_owned())
            }
            Question::Checkpoint if !matches!(self.protocol.state_name(), "protected" | "checkpointing") => Err(
                format!("no checkpoint now: this side is {}", self.protocol.state_name()),
            ),
            Question::Checkpoint => {
                self.link.send(Message::Want(self.protocol.tag()));
                Ok(Answer::Done("the primary is asked for a checkpoint".to_owned()))
            }
            Question::Stop => {
                self.step(Event::StopAsked);
                Ok(Answer::Done("ending in order".to_owned()))
            }
            Question::Takeover { .. } if self.witness.is_some() => Err(
                "a witness is configured, and it alone decides: this side takes over by itself as soon as the witness \
                 gives it the term; make the witness's directory reachable again"
                    .to_owned(),
            ),
            Question::Takeover {
                old_primary_is_off: true,
            } if self.protocol.state_name() == "contending" => {
                self.step(Event::TakeOverAsked);
                Ok(Answer::Done("taking over".to_owned()))
            }
            Question::Takeover {
                old_primary_is_off: true,
            } => Err(format!(
                "no takeover: this side is {}; it takes over only after it has lost its primary",
                self.protocol.state_name()
            )),
            Question::Takeover {
                old_primary_is_off: false,
            } => Err(
                "say --old-primary-is-off once you have made sure that it is: two running primaries destroy data"
                    .to_owned(),
            ),
        };
        // The asker may have gone.
        let _ = request.reply.send(reply);
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
        let (overlay, staged) = {
            let replica = self.disk.replica();
            (replica.overlay_bytes(), replica.staged_bytes())
        };
        crate::status::status(
            &self.protocol,
            now,
            &crate::status::Shell {
                pair: &self.pair,
                node: &self.node,
                address: &self.address,
                connected: !self.closed,
                link_queued_bytes: self.link.queued_bytes() as u64,
                overlay_bytes: overlay,
                staged_bytes: staged,
                rates: self.rates,
                alarms: self.alarms.list(),
                since: now.since(self.since),
            },
        )
    }
}

fn link_end(which: Which, cause: CloseCause) -> LinkEnd {
    match cause {
        CloseCause::Eof => LinkEnd::PeerEnded,
        CloseCause::Broken(error) => LinkEnd::Broken(format!("{which} connection: it broke: {error}")),
        CloseCause::Garbage(error) => LinkEnd::Broken(format!("{which} connection: {error}")),
        CloseCause::Misplaced(_) => LinkEnd::Broken(format!("{which} connection: {cause}")),
    }
}
