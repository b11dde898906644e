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
//!                        Over (fenced) ◄── lost ── Contending ◄──────────────────┘
//!                                                        │ won, recorded, VM quiet
//!                                                        ▼
//!                                                  Over (taken over)
//! ```
//!
//! The primary may hold a lease until the takeover limit has passed since it was last heard; before that, only an end
//! of the connection that its kernel made tells that it releases nothing more.
//!
//! A checkpoint is all or nothing: until its end mark has arrived, verified and been checked, nothing
//! touches the VM, its memory or its disk; from then on a takeover is in the new state. It never reads
//! a clock, never blocks, and holds bulk data by reference only.

use bytes::Bytes;
use checkpoint::limits;
use checkpoint::liveness::Liveness;
use checkpoint::pair::{Delivery, RecordUpdate, Report, WitnessAnswer};
use checkpoint::staging::{StagingError, Totals};
use checkpoint::wire::{DiskWrite, EndMark, GoodbyeReason, Heartbeat, Input, Message, Output};
use checkpoint::{Duration, Epoch, Generation, InputNumber, Instant, Role, Tag};
use proxy::NetworkPicture;

use crate::event::{Action, Event, LinkEnd, Outcome, TakenOver};

/// Time between two claims of a term that the witness did not answer.
const CLAIM_RETRY: Duration = Duration::from_millis(100);
/// Inputs consumed by the guest between two confirmations.
const CONFIRM_EVERY: u64 = 64;
/// Frames of the guest kept while the peer is lost and the witness has not answered.
const PENDING_OUTPUTS_MAX: usize = 1_024;

/// What the operator set.
#[derive(Clone, Debug)]
pub struct Options {
    /// Whether a witness is configured; without one only the operator makes this side take over.
    pub witness: bool,
    /// Silence after which the peer is lost.
    pub takeover_limit: Duration,
    /// Generation of the durable record, 0 if there is none.
    pub generation: Generation,
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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Idle,
    Syncing,
    Following,
    /// A connection is gone. What the primary had sent is still read; it may hold a lease until then.
    Draining {
        until: Instant,
        /// A connection was ended by the primary's kernel: no lease is in use any more.
        ended: bool,
        /// The data connection is not at its end.
        unread: bool,
    },
    /// The primary broke the protocol: nothing more of it is taken. It may hold a lease until then.
    Severed {
        until: Instant,
    },
    /// `retry` is when to claim again, `None` while an answer is outstanding or none is asked for.
    Contending {
        term: Generation,
        retry: Option<Instant>,
        claim: Claim,
    },
    Over,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Claim {
    /// Asked, or to be asked again; or waiting for the operator.
    Open,
    /// Won; the record is being written.
    Won,
    /// Won and recorded.
    Recorded,
}

/// Why a part of a checkpoint is not taken.
#[derive(Debug, thiserror::Error)]
enum PartError {
    #[error("it sent a part of a checkpoint before the sync began")]
    BeforeBegin,
    #[error("it sent a part of a checkpoint after its end mark")]
    AfterEnd,
    #[error(transparent)]
    Staging(#[from] StagingError),
}

/// How far the checkpoint in flight has come.
#[derive(Debug)]
enum Flight {
    /// Its parts arrive.
    Staging,
    /// Its end mark verified; the machine tries what could fail.
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
    state: State,
    generation: Generation,
    /// The epoch that the own guest runs in.
    running: Epoch,
    committed: Epoch,
    first: bool,
    liveness: Liveness,
    primary: String,
    flight: Flight,
    totals: Totals,
    /// The network's state of the checkpoint in flight.
    staged_network: Option<NetworkPicture>,
    network: NetworkPicture,
    received: InputNumber,
    consumed: InputNumber,
    confirmed: InputNumber,
    /// Inputs of the epoch after the one being loaded.
    later: Vec<Input>,
    outputs: Vec<Bytes>,
    quiet: bool,
    leaving: Option<GoodbyeReason>,
    counters: Counters,
}

impl Secondary {
    /// Makes the protocol of a side whose primary has just been accepted.
    #[must_use]
    pub fn new(options: Options, primary: String, now: Instant) -> Self {
        Self {
            state: State::Idle,
            generation: options.generation,
            running: Epoch(0),
            committed: Epoch(0),
            first: true,
            liveness: Liveness::new(options.takeover_limit, now),
            primary,
            flight: Flight::Staging,
            totals: Totals::new(Tag::default(), None),
            staged_network: None,
            network: NetworkPicture::new(),
            received: InputNumber(0),
            consumed: InputNumber(0),
            confirmed: InputNumber(0),
            later: Vec::new(),
            outputs: Vec::new(),
            quiet: true,
            leaving: None,
            counters: Counters::default(),
            options,
        }
    }

    /// Takes one event and appends what is to be done.
    pub fn step(&mut self, now: Instant, event: Event, actions: &mut Vec<Action>) {
        if self.state == State::Over {
            return;
        }
        self.liveness.poll(now);
        match event {
            Event::Checked(tag, result) => self.checked(now, tag, result, actions),
            Event::ControlClosed(end) => self.closed(&end, false, actions),
            Event::DataClosed(end) => self.closed(&end, true, actions),
            Event::DiskCommitted(epoch) => self.send_tagged(Message::Committed, epoch, actions),
            Event::GuestSent(frame) => self.guest_sent(frame, actions),
            Event::GuestStopped(reason) => {
                actions.push(Action::Report(Report::Note(format!(
                    "the guest stopped here: {reason}"
                ))));
            }
            Event::InputConsumed(delivery) => self.input_consumed(&delivery, actions),
            Event::Loaded(tag) => self.loaded(now, tag, actions),
            Event::NearLimit if self.state == State::Following => {
                self.send_tagged(Message::Want, self.running, actions);
            }
            Event::NearLimit => {}
            Event::Paused => {
                self.quiet = true;
                self.try_take_over(actions);
            }
            Event::PeerSent(message) => self.peer_sent(now, message, actions),
            Event::RecordStored(record) => self.recorded(now, record, actions),
            Event::StageFailed(reason) | Event::VmFailed(reason) => self.fail(reason, actions),
            Event::StopAsked => self.leave(GoodbyeReason::Operator, actions),
            Event::TakeOverAsked => self.take_over_asked(actions),
            Event::Timeout => self.timeout(now, actions),
            Event::WitnessAnswered(term, answer) => self.witness_answered(now, term, answer, actions),
        }
    }

    /// Returns when to call `step` with `Event::Timeout`.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        match self.state {
            State::Idle | State::Syncing | State::Following => Some(self.liveness.deadline()),
            State::Draining { until, .. } | State::Severed { until } => Some(until),
            State::Contending { retry, .. } => retry,
            State::Over => None,
        }
    }

    /// Returns the name of the state, as `tandem status` shows it.
    #[must_use]
    pub fn state_name(&self) -> &'static str {
        match self.state {
            State::Idle | State::Syncing => "syncing",
            State::Following if self.first => "syncing",
            State::Following => match self.flight {
                Flight::Loading(..) => "checkpointing",
                _ => "protected",
            },
            State::Draining { .. } | State::Severed { .. } | State::Contending { claim: Claim::Open, .. } => {
                "contending"
            }
            State::Contending { .. } => "promoting",
            State::Over => "ended",
        }
    }

    /// Returns what this side is in the middle of, in finer steps than its state; for logs and tests.
    #[must_use]
    pub fn phase(&self) -> &'static str {
        match (self.state, &self.flight) {
            (State::Idle, _) => "idle",
            (State::Syncing | State::Following, Flight::Checking(_)) => "checking",
            (State::Syncing | State::Following, Flight::Recording(_)) => "recording",
            (State::Syncing | State::Following, Flight::Loading(..)) => "loading",
            (State::Syncing, Flight::Staging) => "receiving",
            (State::Following, Flight::Staging) => "following",
            (State::Draining { .. }, _) => "draining",
            (State::Severed { .. }, _) => "severed",
            (State::Contending { claim: Claim::Open, .. }, _) => "claiming",
            (State::Contending { claim: Claim::Won, .. }, _) => "won",
            (
                State::Contending {
                    claim: Claim::Recorded, ..
                },
                _,
            ) => "recorded",
            (State::Over, _) => "over",
        }
    }

    /// Returns the running epoch and its generation.
    #[must_use]
    pub fn tag(&self) -> Tag {
        Tag {
            generation: self.generation,
            epoch: self.running,
        }
    }

    /// Returns the last committed epoch.
    #[must_use]
    pub fn committed(&self) -> Epoch {
        self.committed
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

    /// Returns the counters of this run.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    // The primary.

    fn peer_sent(&mut self, now: Instant, message: Message, actions: &mut Vec<Action>) {
        if self.leaving.is_some()
            || !matches!(
                self.state,
                State::Idle | State::Syncing | State::Following | State::Draining { .. }
            )
        {
            return;
        }
        self.liveness.heard(now);
        if let Message::Begin(tag) = message {
            return self.begin(tag, actions);
        }
        if message
            .generation()
            .is_some_and(|generation| generation != self.generation)
        {
            return self.misbehaved("it speaks of another generation", actions);
        }
        match message {
            Message::Heartbeat(heartbeat) => self.heartbeat(now, heartbeat, actions),
            Message::Goodbye(reason) => self.goodbye(reason, actions),
            Message::SyncBlock(write) if self.state == State::Syncing => actions.push(Action::ApplyWrite(write)),
            Message::Input(input) => self.input(input, actions),
            Message::Write(write) => self.write(write, actions),
            Message::Pages(batch) => {
                if let Err(error) = self.in_flight().and_then(|totals| Ok(totals.pages(&batch)?)) {
                    return self.misbehaved(&error.to_string(), actions);
                }
                self.counters.pages += u64::from(batch.count);
                self.counters.page_bytes += batch.encoded.len() as u64;
                actions.push(if self.state == State::Syncing {
                    Action::ApplyPages(batch)
                } else {
                    Action::StagePages(batch)
                });
            }
            Message::DeviceState(state) => {
                if let Err(error) = self.in_flight().and_then(|totals| Ok(totals.device_state(&state)?)) {
                    return self.misbehaved(&error.to_string(), actions);
                }
                actions.push(Action::StageDevices(state));
            }
            Message::NetworkState(state) => {
                if let Err(error) = self.in_flight().and_then(|totals| Ok(totals.network_state(&state)?)) {
                    return self.misbehaved(&error.to_string(), actions);
                }
                match NetworkPicture::decode(&state.encoded) {
                    Ok(picture) => self.staged_network = Some(picture),
                    Err(error) => self.misbehaved(&format!("its network state is broken: {error}"), actions),
                }
            }
            Message::End(mark) => self.end_mark(mark, actions),
            _ => self.misbehaved(
                "it sent a message that only a secondary sends, or out of order",
                actions,
            ),
        }
    }

    /// Answers at once, which renews the primary's lease; not after the loss of a connection.
    fn heartbeat(&mut self, now: Instant, heartbeat: Heartbeat, actions: &mut Vec<Action>) {
        if let State::Draining { .. } = self.state {
            return;
        }
        if let Err(error) = self.liveness.heartbeat(now, heartbeat) {
            return self.misbehaved(&error.to_string(), actions);
        }
        self.beat(now, actions);
    }

    fn beat(&mut self, now: Instant, actions: &mut Vec<Action>) {
        actions.push(Action::SendControl(Message::Heartbeat(self.liveness.beat(now))));
        self.confirm(actions);
    }

    fn begin(&mut self, tag: Tag, actions: &mut Vec<Action>) {
        if self.state != State::Idle || tag.generation <= self.generation || tag.epoch.0 == 0 {
            return self.misbehaved("it began a sync out of order, or in an old generation", actions);
        }
        self.generation = tag.generation;
        self.running = tag.epoch;
        self.committed = Epoch(tag.epoch.0 - 1);
        self.state = State::Syncing;
        self.totals = Totals::new(tag, None);
        self.store_record(false, false, actions);
        actions.push(Action::SendBlockHashes(tag));
        self.report_state(actions);
    }

    fn input(&mut self, input: Input, actions: &mut Vec<Action>) {
        if self.first || input.number != self.received.next() {
            return self.misbehaved("its inputs are out of order", actions);
        }
        let loading = matches!(self.flight, Flight::Loading(..));
        let due = if loading { self.running.next() } else { self.running };
        if input.tag.epoch != due || self.later.len() as u64 >= limits::INPUTS_UNCONFIRMED_MAX {
            return self.misbehaved("its inputs are of another epoch, or too many", actions);
        }
        self.received = input.number;
        if loading {
            self.later.push(input);
        } else {
            self.deliver(input, actions);
        }
    }

    fn deliver(&mut self, input: Input, actions: &mut Vec<Action>) {
        let mut delivery = self.network.arriving(input.frame);
        delivery.number = Some(input.number);
        actions.push(Action::Deliver(delivery));
    }

    fn write(&mut self, write: DiskWrite, actions: &mut Vec<Action>) {
        if let Err(error) = self.in_flight().and_then(|totals| Ok(totals.write(&write)?)) {
            return self.misbehaved(&error.to_string(), actions);
        }
        actions.push(if self.state == State::Syncing {
            Action::ApplyWrite(write)
        } else {
            Action::StageWrite(write)
        });
    }

    /// Returns the sums of the checkpoint in flight, if parts of it may arrive now.
    fn in_flight(&mut self) -> Result<&mut Totals, PartError> {
        match self.flight {
            _ if self.state == State::Idle => Err(PartError::BeforeBegin),
            Flight::Staging | Flight::Loading(..) => Ok(&mut self.totals),
            Flight::Checking(_) | Flight::Recording(_) => Err(PartError::AfterEnd),
        }
    }

    fn end_mark(&mut self, mark: EndMark, actions: &mut Vec<Action>) {
        if let Err(error) = self.in_flight().and_then(|totals| Ok(totals.verify(&mark)?)) {
            return self.misbehaved(&error.to_string(), actions);
        }
        if mark.input != self.received || matches!(self.flight, Flight::Loading(..)) {
            return self.misbehaved(
                "its end mark names inputs that it did not send, or comes too early",
                actions,
            );
        }
        self.counters.last_shipment = (mark.pages, 0);
        self.flight = Flight::Checking(mark);
        actions.push(Action::Check(mark.tag));
    }

    fn checked(&mut self, now: Instant, tag: Tag, result: Result<(), String>, actions: &mut Vec<Action>) {
        let Flight::Checking(mark) = self.flight else { return };
        if mark.tag != tag || !matches!(self.state, State::Syncing | State::Following | State::Draining { .. }) {
            return;
        }
        if let Err(reason) = result {
            return self.fail(format!("checkpoint {tag} can't be loaded here: {reason}"), actions);
        }
        if self.first {
            self.flight = Flight::Recording(mark);
            self.store_record_for(tag.epoch, true, false, actions);
        } else {
            self.commit(now, mark, actions);
        }
    }

    /// The commit point: from here on a takeover is in the new state.
    fn commit(&mut self, now: Instant, mark: EndMark, actions: &mut Vec<Action>) {
        self.committed = mark.tag.epoch;
        self.flight = Flight::Loading(mark, now);
        self.totals.advance();
        self.quiet = false;
        // What the guest sent in an execution that this checkpoint replaces must not leave.
        self.outputs.clear();
        if self.state == State::Syncing {
            self.state = State::Following;
        }
        actions.push(Action::Send(Message::Acknowledge(mark.tag)));
        actions.push(Action::Load(mark.tag));
    }

    fn loaded(&mut self, now: Instant, tag: Tag, actions: &mut Vec<Action>) {
        let Flight::Loading(mark, since) = self.flight else {
            return;
        };
        assert_eq!(mark.tag, tag, "one checkpoint is loaded at a time");
        self.flight = Flight::Staging;
        self.running = tag.epoch.next();
        self.network = self
            .staged_network
            .take()
            .expect("a checkpoint is committed only with its network state");
        self.network.follow();
        self.consumed = mark.input;
        self.counters.checkpoints += 1;
        self.counters.last_checkpoint = Some(now);
        self.counters.last_pause = now.since(since);
        actions.push(Action::CommitDisk(tag.epoch));
        actions.push(Action::DropDeliveries);
        actions.push(Action::SeedEntropy(mark.entropy));
        for input in core::mem::take(&mut self.later) {
            self.deliver(input, actions);
        }
        self.quiet = true;
        let started = core::mem::take(&mut self.first);
        if self.state == State::Following && self.leaving.is_none() {
            self.quiet = false;
            actions.push(Action::ResumeVm);
            self.confirm(actions);
            actions.push(Action::Send(Message::Loaded(tag)));
            if started {
                self.report_state(actions);
            }
        }
        self.try_take_over(actions);
    }

    fn goodbye(&mut self, reason: GoodbyeReason, actions: &mut Vec<Action>) {
        self.leaving = Some(reason);
        actions.push(Action::PauseVm);
        actions.push(Action::DropStage);
        self.store_record(!self.first, true, actions);
    }

    /// The peer broke the protocol: its connections are closed, and it counts as lost.
    fn misbehaved(&mut self, what: &str, actions: &mut Vec<Action>) {
        actions.push(Action::Report(Report::Alarm(format!(
            "the primary broke the protocol: {what}"
        ))));
        let until = match self.state {
            State::Following => self.liveness.suspect_at(),
            State::Draining {
                until, ended: false, ..
            } => until,
            _ => return self.link_lost("it broke the protocol", actions),
        };
        actions.push(Action::CloseLink);
        self.state = State::Severed { until };
        self.report_state(actions);
    }

    // The machine.

    fn guest_sent(&mut self, frame: Bytes, actions: &mut Vec<Action>) {
        self.counters.outputs += 1;
        if matches!(self.flight, Flight::Loading(..)) {
            return;
        }
        let frame = self.network.leaving(frame);
        match self.state {
            State::Following => actions.push(Action::Send(Message::Output(Output { tag: self.tag(), frame }))),
            State::Draining { .. } | State::Severed { .. } | State::Contending { .. }
                if self.outputs.len() < PENDING_OUTPUTS_MAX =>
            {
                self.outputs.push(frame);
            }
            _ => {}
        }
    }

    fn input_consumed(&mut self, delivery: &Delivery, actions: &mut Vec<Action>) {
        self.counters.inputs += 1;
        let Some(number) = delivery.number else { return };
        if self.state != State::Following || matches!(self.flight, Flight::Loading(..)) {
            return;
        }
        self.consumed = number;
        if self.consumed.0 - self.confirmed.0 >= CONFIRM_EVERY {
            self.confirm(actions);
        }
    }

    fn confirm(&mut self, actions: &mut Vec<Action>) {
        if self.consumed > self.confirmed && self.state == State::Following {
            self.confirmed = self.consumed;
            actions.push(Action::Send(Message::Confirm(self.tag(), self.confirmed)));
        }
    }

    /// This side can't follow: the primary is told, and goes on alone.
    fn fail(&mut self, reason: String, actions: &mut Vec<Action>) {
        actions.push(Action::SendControl(Message::Goodbye(GoodbyeReason::Failed(
            reason.clone(),
        ))));
        actions.push(Action::CloseLink);
        self.finish(Outcome::Failed(reason), actions);
    }

    // Loss of the primary.

    fn closed(&mut self, end: &LinkEnd, data: bool, actions: &mut Vec<Action>) {
        let clean = *end == LinkEnd::PeerEnded;
        let (until, ended, unread) = match self.state {
            State::Idle | State::Syncing => return self.link_lost(&end.to_string(), actions),
            State::Following => {
                actions.push(Action::Report(Report::Note(format!(
                    "a connection of primary {} is gone: {end}",
                    self.primary
                ))));
                (self.liveness.suspect_at(), clean, !data)
            }
            State::Draining { until, ended, unread } => (until, ended || clean, unread && !data),
            State::Severed { .. } | State::Contending { .. } | State::Over => return,
        };
        self.state = State::Draining { until, ended, unread };
        if ended && !unread {
            self.link_lost(&end.to_string(), actions);
        }
    }

    /// Nothing more comes from the primary, and it lets nothing more out: its state is final.
    fn link_lost(&mut self, cause: &str, actions: &mut Vec<Action>) {
        if self.leaving.is_some() {
            return;
        }
        match self.state {
            State::Idle | State::Syncing => {
                actions.push(Action::CloseLink);
                let reason = format!("primary {} lost before the first checkpoint: {cause}", self.primary);
                self.finish(Outcome::Unpaired(reason), actions);
            }
            State::Following | State::Draining { .. } | State::Severed { .. } => {
                actions.push(Action::CloseLink);
                actions.push(Action::Report(Report::Note(format!(
                    "primary {} lost: {cause}",
                    self.primary
                ))));
                self.contend(actions);
            }
            State::Contending { .. } | State::Over => {}
        }
    }

    fn contend(&mut self, actions: &mut Vec<Action>) {
        let term = self.generation.next();
        self.state = State::Contending {
            term,
            retry: None,
            claim: Claim::Open,
        };
        if self.options.witness {
            actions.push(Action::Claim(term));
        } else {
            actions.push(Action::Report(Report::Alarm(
                "no witness is configured: once the old primary is off for good, run `tandem takeover --old-primary-is-off`"
                    .to_owned(),
            )));
        }
        match self.flight {
            // Committed: the load is finished first, and leaves the VM stopped.
            Flight::Loading(..) => {}
            _ => {
                self.flight = Flight::Staging;
                self.staged_network = None;
                actions.push(Action::PauseVm);
                actions.push(Action::DropStage);
            }
        }
        self.report_state(actions);
    }

    fn take_over_asked(&mut self, actions: &mut Vec<Action>) {
        if let State::Contending {
            term,
            claim: Claim::Open,
            ..
        } = self.state
        {
            self.won(term, actions);
        }
    }

    fn witness_answered(&mut self, now: Instant, term: Generation, answer: WitnessAnswer, actions: &mut Vec<Action>) {
        let State::Contending {
            term: asked,
            claim: Claim::Open,
            ..
        } = self.state
        else {
            return;
        };
        if asked != term {
            return;
        }
        match answer {
            WitnessAnswer::Won => self.won(term, actions),
            WitnessAnswer::LostTo(owner) => {
                let reason =
                    format!("{owner} owns the VM since term {term}: this side's VM and its output are stopped");
                actions.push(Action::Report(Report::State("fenced")));
                self.finish(Outcome::Fenced(reason), actions);
            }
            WitnessAnswer::Unreachable(cause) => {
                actions.push(Action::Report(Report::Alarm(format!("witness unreachable: {cause}"))));
                self.state = State::Contending {
                    term,
                    retry: Some(now + CLAIM_RETRY),
                    claim: Claim::Open,
                };
            }
        }
    }

    fn won(&mut self, term: Generation, actions: &mut Vec<Action>) {
        self.state = State::Contending {
            term,
            retry: None,
            claim: Claim::Won,
        };
        self.generation = term;
        actions.push(Action::StoreRecord(RecordUpdate {
            generation: term,
            role: Role::Primary,
            committed: self.committed,
            complete: true,
            clean: false,
        }));
        self.report_state(actions);
    }

    fn recorded(&mut self, now: Instant, record: RecordUpdate, actions: &mut Vec<Action>) {
        if record.clean {
            let reason = self.leaving.take().unwrap_or(GoodbyeReason::Operator);
            actions.push(Action::CloseLink);
            return self.finish(Outcome::Ended(reason), actions);
        }
        if record.generation != self.generation || !record.complete {
            return;
        }
        if let Flight::Recording(mark) = self.flight {
            return self.commit(now, mark, actions);
        }
        if let State::Contending {
            term,
            claim: Claim::Won,
            ..
        } = self.state
        {
            self.state = State::Contending {
                term,
                retry: None,
                claim: Claim::Recorded,
            };
            self.try_take_over(actions);
        }
    }

    /// Takes over once the term is won and recorded, the VM is stopped, and no load is in progress.
    fn try_take_over(&mut self, actions: &mut Vec<Action>) {
        let State::Contending {
            claim: Claim::Recorded, ..
        } = self.state
        else {
            return;
        };
        if !self.quiet || matches!(self.flight, Flight::Loading(..)) {
            return;
        }
        let mut inputs = Vec::new();
        for input in core::mem::take(&mut self.later) {
            inputs.push(self.network.arriving(input.frame));
        }
        let taken = TakenOver {
            generation: self.generation,
            last_epoch: self.running,
            network: core::mem::take(&mut self.network),
            inputs,
            outputs: core::mem::take(&mut self.outputs),
        };
        self.finish(Outcome::TakenOver(Box::new(taken)), actions);
    }

    // Ends and time.

    fn leave(&mut self, reason: GoodbyeReason, actions: &mut Vec<Action>) {
        match self.state {
            State::Contending { .. } | State::Draining { .. } | State::Severed { .. } => {
                self.finish(Outcome::Ended(reason), actions);
            }
            _ => {
                actions.push(Action::SendControl(Message::Goodbye(reason.clone())));
                self.goodbye(reason, actions);
            }
        }
    }

    fn finish(&mut self, outcome: Outcome, actions: &mut Vec<Action>) {
        self.state = State::Over;
        actions.push(Action::End(outcome));
    }

    fn timeout(&mut self, now: Instant, actions: &mut Vec<Action>) {
        match self.state {
            State::Idle | State::Syncing | State::Following => {
                if self.liveness.is_suspect(now) {
                    let limit = self.options.takeover_limit;
                    return self.link_lost(&format!("silent for more than {limit}"), actions);
                }
                if self.liveness.heartbeat_due() <= now {
                    self.beat(now, actions);
                }
            }
            State::Draining { until, .. } | State::Severed { until } if until <= now => {
                self.link_lost("nothing was heard of it within the limit", actions);
            }
            State::Contending {
                term,
                retry: Some(retry),
                claim: Claim::Open,
            } if retry <= now => {
                self.state = State::Contending {
                    term,
                    retry: None,
                    claim: Claim::Open,
                };
                actions.push(Action::Claim(term));
            }
            _ => {}
        }
    }

    fn send_tagged(&self, message: fn(Tag) -> Message, epoch: Epoch, actions: &mut Vec<Action>) {
        if matches!(self.state, State::Following | State::Syncing) {
            actions.push(Action::Send(message(Tag {
                generation: self.generation,
                epoch,
            })));
        }
    }

    fn store_record(&self, complete: bool, clean: bool, actions: &mut Vec<Action>) {
        self.store_record_for(self.committed, complete, clean, actions);
    }

    fn store_record_for(&self, committed: Epoch, complete: bool, clean: bool, actions: &mut Vec<Action>) {
        actions.push(Action::StoreRecord(RecordUpdate {
            generation: self.generation,
            role: Role::Secondary,
            committed,
            complete,
            clean,
        }));
    }

    fn report_state(&self, actions: &mut Vec<Action>) {
        actions.push(Action::Report(Report::State(self.state_name())));
    }
}
