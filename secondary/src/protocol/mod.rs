//! The secondary's half of the pair protocol, pure: events in, actions out.
//!
//! ```text
//!   Idle ──Begin──► Syncing ──End, checked, recorded──► Following ◄───────── Loaded
//!     │               │                                  │   │ End, checked: commit point, acknowledge
//!     │ link lost     │ link lost                        │   └────────────► (loading) ──┘
//!     ▼               ▼                  a connection ended │   │ it broke the protocol
//!   Over (unpaired)  Over (unpaired)                  Draining  Severed
//!               ended by its kernel, and read to the end │   │ its lease is over │
//!                                                        ▼   ▼                   │
//!     Over (fenced) ◄── VM quiet ── Fenced ◄── lost ── Contending ◄──────────────┘
//!                        disk durable                    │ won, recorded, VM quiet
//!                                                        ▼
//!                                                  Over (taken over)
//! ```
//!
//! The primary may hold a lease until the takeover limit has passed since it was last heard; before that, only an end
//! of the connection that its kernel made tells that it releases nothing more.
//!
//! In a buffered epoch the VM stands in the state that it has loaded, and what is in front of its guest waits with it: a
//! takeover only lets it run.
//!
//! A checkpoint is all or nothing: until its end mark has arrived, verified and been checked, nothing
//! touches the VM, its memory or its disk; from then on a takeover is in the new state. It never reads
//! a clock, never blocks, and holds bulk data by reference only.

mod alike;
mod end;
mod guest;
mod inputs;
mod load;
mod loss;
mod peer;
mod room;

use std::collections::VecDeque;

use bytes::Bytes;
use checkpoint::backlog::Backlog;
use checkpoint::failover::{self, Claim, Connection, Contest, Order, Standing};
use checkpoint::limits;
use checkpoint::liveness::Liveness;
use checkpoint::mutants::{self, Mutant};
use checkpoint::pages::identical::{PageHashes, PageMatches};
use checkpoint::pair::{Delivery, RecordUpdate, Report};
use checkpoint::staging::{Arrival, StagingError, Totals};
use checkpoint::wire::{Begin, DiskWrite, EndMark, GoodbyeReason, Heartbeat, Held, Input, Message, Output, PageBatch};
use checkpoint::{Duration, Epoch, EpochMode, Generation, InputNumber, Instant, Nic, Role, Tag};
use proxy::Pictures;

use crate::event::{Action, Event, LinkEnd, Outcome, TakenOver};

use inputs::Inputs;
use room::Own;

/// Inputs consumed by the guest between two confirmations.
const CONFIRM_EVERY: u64 = 64;
/// Frames of the guest kept while the peer is lost and the witness has not answered.
const PENDING_OUTPUTS_MAX: usize = 1_024;
/// TCP segments of the running epoch that are sent again at a takeover.
const RECENT_OUTPUTS_MAX: usize = 512;

/// What the operator set.
#[derive(Clone, Debug)]
pub struct Options {
    /// Whether a witness is configured; without one only the operator makes this side take over.
    pub witness: bool,
    /// Silence after which the peer is lost.
    pub takeover_limit: Duration,
    /// Generation of the durable record, 0 if there is none.
    pub generation: Generation,
    /// What the primary was told that this side still has.
    pub held: Held,
    /// Network cards of the VM.
    pub cards: usize,
    /// Page streams of the pairing.
    pub streams: usize,
    /// Pages that the guest's own and those of a checkpoint that arrives may be together before the epoch is to end.
    pub room: u64,
    /// Bytes of output that may wait to be sent before the guest's network card stops.
    pub unsent_bytes: usize,
}

/// Counters for the status report.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    /// Checkpoints loaded.
    pub checkpoints: u64,
    /// Frames given to the guest.
    pub inputs: u64,
    /// Frames that the guest sent.
    pub outputs: u64,
    /// Pages received.
    pub pages: u64,
    /// Encoded page bytes received.
    pub page_bytes: u64,
    /// When the last checkpoint was loaded.
    pub last_checkpoint: Option<Instant>,
    /// Length of the last stop, from the commit point to the resumption.
    pub last_pause: Duration,
    /// Pages and bytes of the last checkpoint.
    pub last_shipment: (u64, u64),
}

/// Why a part of a checkpoint is not taken.
#[derive(Debug, thiserror::Error)]
enum PartError {
    #[error("it sent a part of a checkpoint before the sync began")]
    BeforeBegin,
    #[error("it sent a part of a checkpoint after its end mark")]
    AfterEnd,
    #[error("it sent pages of the next checkpoint before this one was loaded")]
    BeforeLoad,
    #[error(transparent)]
    Staging(#[from] StagingError),
}

/// How far the checkpoint in flight has come.
#[derive(Debug)]
enum Flight {
    /// Its parts arrive.
    Staging,
    /// So they do, and the VM is to stop: pages will be compared.
    Halting,
    /// So they do; the VM stands until the checkpoint is loaded.
    Standing,
    /// So they may; pages of the VM, which stands, are being compared.
    Comparing,
    /// Its end mark has come; pages are still on their way.
    Gathering(EndMark),
    /// All of it has come and verified; the machine tries what could fail.
    Checking(EndMark),
    /// The first of a pairing: checked; the record is being written.
    Recording(EndMark),
    /// Committed; being loaded since that moment.
    Loading(EndMark, Instant),
}

/// The state machine.
#[derive(Debug)]
pub struct Secondary {
    options: Options,
    contest: Contest,
    /// The epoch that the own guest runs in.
    running: Epoch,
    /// Whether it does run, or stands in the state that the epoch began with.
    mode: EpochMode,
    committed: Epoch,
    /// Last epoch whose disk writes are in the image.
    durable: Epoch,
    first: bool,
    liveness: Liveness,
    primary: String,
    flight: Flight,
    own: Own,
    totals: Totals,
    /// The network's state of the checkpoint in flight.
    staged_network: Option<Pictures>,
    network: Pictures,
    received: InputNumber,
    /// All up to this one.
    consumed: InputNumber,
    /// Received and not consumed.
    unconsumed: Backlog,
    /// In front of the guest.
    inputs: Inputs,
    confirmed: InputNumber,
    /// Inputs of the epoch after the one being loaded.
    later: Vec<Input>,
    /// What the guest sent since the peer was lost.
    outputs: Vec<(Nic, Bytes)>,
    /// Bytes of output sent since all of it was on its way, at the least.
    unsent: usize,
    output_held: bool,
    /// The last TCP segments that the guest sent in this epoch: the primary may have died before it released them.
    recent: VecDeque<(Nic, Bytes)>,
    quiet: bool,
    leaving: Option<GoodbyeReason>,
    /// Why this side is fenced.
    fenced: String,
    counters: Counters,
}

impl Secondary {
    /// Makes the protocol of a side whose primary has just been accepted.
    #[must_use]
    pub fn new(options: Options, primary: String, now: Instant) -> Self {
        Self {
            contest: Contest::follower(options.witness, options.generation),
            running: Epoch(0),
            mode: EpochMode::default(),
            committed: Epoch(0),
            durable: Epoch(0),
            first: true,
            liveness: Liveness::new(options.takeover_limit, now),
            primary,
            flight: Flight::Staging,
            own: Own::default(),
            totals: Totals::new(Tag::default(), None, options.streams),
            staged_network: None,
            network: Pictures::new(options.cards),
            received: InputNumber(0),
            consumed: InputNumber(0),
            unconsumed: Backlog::default(),
            inputs: Inputs::new(options.cards),
            confirmed: InputNumber(0),
            later: Vec::new(),
            outputs: Vec::new(),
            unsent: 0,
            output_held: false,
            recent: VecDeque::new(),
            quiet: true,
            leaving: None,
            fenced: String::new(),
            counters: Counters::default(),
            options,
        }
    }

    /// Takes one event and appends what is to be done.
    pub fn step(&mut self, now: Instant, event: Event, actions: &mut Vec<Action>) {
        if self.standing() == Standing::Over {
            return;
        }
        self.liveness.poll(now);
        match event {
            Event::Checked(tag, result) => self.checked(now, tag, result, actions),
            Event::Compared(matches) => self.compared(matches, actions),
            Event::ControlClosed(end) => self.closed(now, Connection::Control, &end, actions),
            Event::Counted(tag, pages) => self.counted(now, tag, pages, actions),
            Event::DataClosed(end) => self.closed(now, Connection::Data, &end, actions),
            Event::DiskCommitted(epoch) => self.disk_committed(epoch, actions),
            Event::GuestSent(nic, frame) => self.guest_sent(nic, frame, actions),
            Event::GuestStopped(reason) => {
                actions.push(Action::Report(Report::Note(format!(
                    "the guest stopped here: {reason}"
                ))));
            }
            Event::InputConsumed(delivery) => self.input_consumed(&delivery, actions),
            Event::OutputDrained => self.output_drained(actions),
            Event::Loaded(tag) => self.loaded(now, tag, actions),
            Event::NearLimit if self.standing() == Standing::Following => {
                self.send_tagged(Message::Want, self.running, actions);
            }
            Event::NearLimit => {}
            Event::PagesArrived(stream, batch) => self.pages_arrived(now, stream, batch, actions),
            Event::PagesClosed(end) => self.closed(now, Connection::Pages, &end, actions),
            Event::Paused => {
                self.quiet = true;
                self.halted(actions);
                self.try_take_over(actions);
                self.try_stand_down(actions);
            }
            Event::PeerSent(message) => self.peer_sent(now, message, actions),
            Event::RecordStored(record) => self.recorded(now, record, actions),
            Event::StageFailed(reason) | Event::VmFailed(reason) => self.fail(reason, actions),
            Event::StopAsked => self.leave(now, GoodbyeReason::Operator, actions),
            Event::TakeOverAsked => {
                let cause = "the operator says that it is off";
                self.contend(now, failover::Event::TakeOverAsked, cause, actions);
            }
            Event::Timeout => self.timeout(now, actions),
            Event::WitnessAnswered(term, answer) => {
                self.contend(now, failover::Event::Answered(term, answer), "", actions);
            }
        }
    }

    /// Returns when to call `step` with `Event::Timeout`.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        match self.standing() {
            Standing::Idle | Standing::Syncing | Standing::Following => {
                let look = self.look_due();
                look.into_iter().chain([self.liveness.deadline()]).min()
            }
            _ => self.contest.deadline(),
        }
    }

    /// Returns the name of the state, as `tandem status` shows it.
    #[must_use]
    pub fn state_name(&self) -> &'static str {
        match self.standing() {
            Standing::Idle | Standing::Syncing => "syncing",
            Standing::Following if self.first => "syncing",
            Standing::Following => match self.flight {
                Flight::Loading(..) => "checkpointing",
                _ => "protected",
            },
            Standing::Draining { .. } | Standing::Severed { .. } | Standing::Contending(Claim::Open { .. }) => {
                "contending"
            }
            Standing::Contending(Claim::Won) | Standing::Alone => "promoting",
            Standing::Fenced => "fenced",
            Standing::Leaving | Standing::Over | Standing::Pairing(_) | Standing::Leading { .. } => "ended",
        }
    }

    /// Returns what this side is in the middle of, in finer steps than its state; for logs and tests.
    #[must_use]
    pub fn phase(&self) -> &'static str {
        match (self.standing(), &self.flight) {
            (Standing::Idle, _) => "idle",
            (Standing::Syncing | Standing::Following, Flight::Gathering(_)) => "gathering",
            (Standing::Syncing | Standing::Following, Flight::Checking(_)) => "checking",
            (Standing::Syncing | Standing::Following, Flight::Recording(_)) => "recording",
            (Standing::Syncing | Standing::Following, Flight::Loading(..)) => "loading",
            (Standing::Syncing | Standing::Following, Flight::Halting) => "halting",
            (Standing::Syncing | Standing::Following, Flight::Standing) => "standing",
            (Standing::Syncing | Standing::Following, Flight::Comparing) => "answering",
            (Standing::Syncing, Flight::Staging) => "receiving",
            (Standing::Following, Flight::Staging) if self.durable < self.committed => "committing",
            (Standing::Following, Flight::Staging) => "following",
            (Standing::Draining { .. }, _) => "draining",
            (Standing::Severed { .. }, _) => "severed",
            (Standing::Contending(Claim::Open { .. }), _) => "claiming",
            (Standing::Contending(Claim::Won), _) => "won",
            (Standing::Alone, _) => "recorded",
            (Standing::Leaving, _) => "leaving",
            (Standing::Fenced, _) => "fenced",
            (Standing::Over | Standing::Pairing(_) | Standing::Leading { .. }, _) => "over",
        }
    }

    /// Tells whether pages may be taken from the streams. Until the sync has begun they wait there: what begins it travels on
    /// another connection.
    #[must_use]
    pub fn takes_pages(&self) -> bool {
        self.standing() != Standing::Idle
    }

    /// Returns the number of page streams.
    #[must_use]
    pub fn streams(&self) -> usize {
        self.options.streams
    }

    /// Returns the running epoch and its generation.
    #[must_use]
    pub fn tag(&self) -> Tag {
        Tag {
            generation: self.contest.generation(),
            epoch: self.running,
        }
    }

    /// Returns the last committed epoch.
    #[must_use]
    pub fn committed(&self) -> Epoch {
        self.committed
    }

    /// Returns whether the own guest runs in the epoch of the tag, once a checkpoint is loaded.
    #[must_use]
    pub fn epoch_mode(&self) -> EpochMode {
        self.mode
    }

    /// Tells whether no checkpoint of this pairing has been loaded yet.
    #[must_use]
    pub fn is_first(&self) -> bool {
        self.first
    }

    /// Returns the primary's name.
    #[must_use]
    pub fn primary(&self) -> &str {
        &self.primary
    }

    /// Returns the queues with their lengths and bounds: inputs that wait for a load, frames that wait for the outcome of a
    /// contest, segments kept for a takeover, and bytes of output that may not have been sent.
    #[must_use]
    pub fn queues(&self) -> [(&'static str, usize, usize); 4] {
        let inputs = usize::try_from(2 * limits::INPUTS_UNCONFIRMED_MAX).expect("a small limit");
        [
            ("inputs", self.later.len(), inputs),
            ("outputs", self.outputs.len(), PENDING_OUTPUTS_MAX),
            ("recent outputs", self.recent.len(), RECENT_OUTPUTS_MAX),
            (
                "bytes of unsent output",
                self.unsent,
                self.options.unsent_bytes + limits::FRAME_BYTES_MAX,
            ),
        ]
    }

    /// Returns the counters of this run.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    fn timeout(&mut self, now: Instant, actions: &mut Vec<Action>) {
        match self.standing() {
            Standing::Idle | Standing::Syncing | Standing::Following => {
                if self.liveness.is_suspect(now) {
                    let limit = self.options.takeover_limit;
                    let cause = format!("silent for more than {limit}");
                    return self.contend(now, failover::Event::Lost, &cause, actions);
                }
                if self.liveness.heartbeat_due() <= now {
                    self.beat(now, actions);
                }
                if self.look_due().is_some_and(|due| due <= now) {
                    self.look(actions);
                }
            }
            _ => {
                let cause = "nothing was heard of it within the limit";
                self.contend(now, failover::Event::Timeout, cause, actions);
            }
        }
    }

    fn standing(&self) -> Standing {
        self.contest.standing()
    }

    fn send_tagged(&self, message: fn(Tag) -> Message, epoch: Epoch, actions: &mut Vec<Action>) {
        if matches!(
            self.standing(),
            Standing::Following | Standing::Syncing | Standing::Leaving
        ) {
            actions.push(Action::Send(message(Tag {
                generation: self.contest.generation(),
                epoch,
            })));
        }
    }

    fn report_state(&self, actions: &mut Vec<Action>) {
        actions.push(Action::Report(Report::State(self.state_name())));
    }
}
