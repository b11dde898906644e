//! The primary's half of the pair protocol, pure: events in, actions out.
//!
//! ```text
//!   Alone ──Connected──► Pairing ──term won, recorded──► Syncing ──all sent──► Stopping
//!     ▲                     │ link lost                     │ link lost           │ Paused
//!     ├─────────────────────┴───────────────────────────────┘                     ▼
//!     │                             ┌──────── trigger ── Protected ◄─ack─ Awaiting ◄─sent─ Sending
//!     │ won, recorded               └──► Stopping             │ link lost: from any of these
//!   Contending ◄──────────────────────────────────────────────┘
//!     │ lost
//!   Fenced
//! ```
//!
//! The VM resumes after the acknowledgement (`Awaiting → Protected`): while a checkpoint travels the
//! primary's guest produces nothing, so epoch *n* + 1 has no output before *n* is committed.
//! This is the only place that says "checkpoint acknowledged ⇒ release output". It never reads a
//! clock, never blocks, and holds bulk data by reference only.

use bytes::Bytes;
use checkpoint::limits;
use checkpoint::liveness::Liveness;
use checkpoint::pair::{Delivery, RecordUpdate, Report, Trigger, WitnessAnswer};
use checkpoint::staging::Totals;
use checkpoint::wire::{DiskWrite, GoodbyeReason, Input, Message, NetworkState, Welcome};
use checkpoint::{Duration, Epoch, Generation, InputNumber, Instant, Role, Tag};
use proxy::{Comparator, ComparatorLimits, Mode, NetworkPicture, Reason, Verdict};
use storage::ChangedBlocks;

use crate::event::{Action, Event, GuestEnd, Outcome, Shipment};

/// Time between two claims of a term that the witness did not answer.
const CLAIM_RETRY: Duration = Duration::from_millis(100);
/// Longest time that an orderly end waits for its last checkpoint.
const ENDING_MAX: Duration = Duration::from_millis(5_000);
/// When announcements are repeated after a start or a takeover.
const ANNOUNCE_AFTER: [Duration; 6] = [
    Duration(0),
    Duration::from_millis(20),
    Duration::from_millis(100),
    Duration::from_millis(500),
    Duration::from_millis(1_500),
    Duration::from_millis(4_000),
];

/// What the operator set.
#[derive(Clone, Debug)]
pub struct Options {
    /// Whether a witness is configured; without one the primary goes on alone unasked.
    pub witness: bool,
    /// Silence after which the peer is lost.
    pub takeover_limit: Duration,
    /// An epoch is never older than this.
    pub epoch_age_max: Duration,
    /// A frame never waits longer than this for its equal.
    pub unmatched_max: Duration,
    /// Size of the disk in bytes.
    pub disk_bytes: u64,
    /// The guest's hardware address, announced when it boots.
    pub mac: [u8; 6],
}

/// How this side came to run.
#[derive(Debug)]
pub enum Start {
    /// It boots the VM, as owner of this generation.
    Boot {
        /// The generation, won and recorded.
        generation: Generation,
        /// Last epoch number ever used; the run begins with the next.
        last_epoch: Epoch,
    },
    /// It took over from a lost primary, as owner of this generation.
    TakenOver {
        /// The generation, won and recorded.
        generation: Generation,
        /// Last epoch number ever used.
        last_epoch: Epoch,
        /// Translation offsets and learned addresses, as the secondary held them.
        network: NetworkPicture,
        /// Frames that the guest has not yet received, in order.
        inputs: Vec<Delivery>,
        /// Frames that the guest sent since the peer was lost.
        outputs: Vec<Bytes>,
    },
}

/// Counters for the status report.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    /// Checkpoints acknowledged, by trigger.
    pub checkpoints: std::collections::BTreeMap<Trigger, u64>,
    /// Times that the outputs differed.
    pub divergences: u64,
    /// Frames given to the guest.
    pub inputs: u64,
    /// Frames that the guest sent.
    pub outputs: u64,
    /// Pages shipped.
    pub pages: u64,
    /// Encoded page bytes shipped.
    pub page_bytes: u64,
    /// When the last checkpoint was acknowledged.
    pub last_checkpoint: Option<Instant>,
    /// Length of the last stop.
    pub last_pause: Duration,
    /// Pages and bytes of the last checkpoint.
    pub last_shipment: (u64, u64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Alone,
    Pairing {
        term: Generation,
        won: bool,
    },
    Syncing {
        disk: bool,
        memory: bool,
    },
    Protected {
        since: Instant,
    },
    Stopping {
        trigger: Trigger,
        asked: Instant,
    },
    Sending {
        trigger: Trigger,
        asked: Instant,
        tag: Tag,
    },
    Awaiting {
        trigger: Trigger,
        asked: Instant,
        tag: Tag,
    },
    /// `retry` is when to claim again, `None` while an answer is outstanding; `won` while the record is written.
    Contending {
        term: Generation,
        retry: Option<Instant>,
        won: bool,
    },
    Over,
}

/// The end that has been asked for.
#[derive(Debug)]
struct Ending {
    reason: GoodbyeReason,
    by: Instant,
    recorded: bool,
}

/// The state machine.
#[derive(Debug)]
pub struct Primary {
    options: Options,
    state: State,
    generation: Generation,
    /// The epoch that the guest runs in.
    epoch: Epoch,
    committed: Epoch,
    running: bool,
    liveness: Option<Liveness>,
    peer: Option<String>,
    /// The peer may have committed a checkpoint of this generation, so it may contend.
    peer_entitled: bool,
    comparator: Comparator,
    network: NetworkPicture,
    input: InputNumber,
    confirmed: InputNumber,
    input_held: bool,
    totals: Totals,
    write_bytes: u64,
    changed: ChangedBlocks,
    announce: Option<(Instant, usize)>,
    ending: Option<Ending>,
    counters: Counters,
    verdicts: Vec<Verdict>,
}

impl Primary {
    /// Makes the protocol of a side that owns its generation; the VM is built and stopped.
    #[must_use]
    pub fn new(options: Options, start: Start, now: Instant, actions: &mut Vec<Action>) -> Self {
        let (generation, last_epoch, network, inputs, outputs, taken_over) = match start {
            Start::Boot { generation, last_epoch } => (
                generation,
                last_epoch,
                // The network may still send the guest's frames to where it ran before.
                NetworkPicture::of(options.mac),
                Vec::new(),
                Vec::new(),
                false,
            ),
            Start::TakenOver {
                generation,
                last_epoch,
                network,
                inputs,
                outputs,
            } => (generation, last_epoch, network, inputs, outputs, true),
        };
        let mut primary = Self {
            state: State::Alone,
            generation,
            epoch: last_epoch.next(),
            committed: last_epoch,
            running: true,
            liveness: None,
            peer: None,
            peer_entitled: false,
            comparator: Comparator::new(
                ComparatorLimits {
                    unmatched: options.unmatched_max,
                    ..ComparatorLimits::default()
                },
                last_epoch.next(),
            ),
            network,
            input: InputNumber(0),
            confirmed: InputNumber(0),
            input_held: false,
            totals: Totals::new(
                Tag {
                    generation,
                    epoch: last_epoch.next(),
                },
                None,
            ),
            write_bytes: 0,
            changed: ChangedBlocks::new(
                options.disk_bytes,
                Tag {
                    generation,
                    epoch: last_epoch,
                },
            ),
            announce: Some((now, 0)),
            ending: None,
            counters: Counters::default(),
            verdicts: Vec::new(),
            options,
        };
        primary.network.lead();
        if taken_over {
            actions.push(Action::Reseed);
        }
        actions.push(Action::SeedEntropy(None));
        primary.announce(now, actions);
        actions.extend(inputs.into_iter().map(Action::Deliver));
        primary.transmit(outputs, None, actions);
        actions.push(Action::ResumeVm);
        primary.report_state(actions);
        actions.push(Action::Dial);
        primary
    }

    /// Takes one event and appends what is to be done.
    pub fn step(&mut self, now: Instant, event: Event, actions: &mut Vec<Action>) {
        if self.state == State::Over {
            return;
        }
        if let Some(liveness) = &mut self.liveness {
            liveness.poll(now);
        }
        match event {
            Event::CheckpointAsked => self.trigger(now, Trigger::Admin, actions),
            Event::CheckpointSent(shipment) => self.checkpoint_sent(shipment, actions),
            Event::Connected(welcome) => self.connected(now, welcome, actions),
            Event::DiskSynced(generation) if generation == self.generation => self.synced(now, None, actions),
            Event::MemorySynced(shipment) if shipment.totals.tag() == self.tag() => {
                self.synced(now, Some(shipment), actions)
            }
            Event::DiskSynced(_) | Event::MemorySynced(_) => {}
            Event::FrameArrived(frame) => actions.push(Action::Deliver(self.network.arriving(frame))),
            Event::GuestSent(frame) => self.guest_sent(now, frame, actions),
            Event::GuestStopped(end) => self.guest_stopped(now, end, actions),
            Event::GuestWrote { offset, data } => self.guest_wrote(now, offset, data, actions),
            Event::InputConsumed(delivery) => self.input_consumed(delivery, actions),
            Event::LinkClosed(cause) => self.link_lost(now, &cause, actions),
            Event::Paused => self.paused(actions),
            Event::PeerSent(message) => self.peer_sent(now, message, actions),
            Event::RecordStored(record) => self.recorded(now, record, actions),
            Event::StopAsked => self.end(now, GoodbyeReason::Operator, actions),
            Event::Timeout => self.timeout(now, actions),
            Event::VmFailed(reason) => self.vm_failed(reason, actions),
            Event::WitnessAnswered(term, answer) => self.witness_answered(now, term, answer, actions),
        }
    }

    /// Returns when to call `step` with `Event::Timeout`.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        let liveness = self.liveness.as_ref().map(Liveness::deadline);
        let state = match self.state {
            State::Protected { since } => Some(since + self.options.epoch_age_max),
            State::Contending { retry, .. } => retry,
            _ => None,
        };
        let comparator = matches!(self.state, State::Protected { .. })
            .then(|| self.comparator.deadline())
            .flatten();
        let announce = self.announce.map(|(start, next)| start + ANNOUNCE_AFTER[next]);
        let ending = self.ending.as_ref().map(|ending| ending.by);
        [liveness, state, comparator, announce, ending]
            .into_iter()
            .flatten()
            .min()
    }

    /// Returns the name of the state, as `tandem status` shows it.
    #[must_use]
    pub fn state_name(&self) -> &'static str {
        match self.state {
            State::Alone => "alone",
            State::Pairing { .. }
            | State::Syncing { .. }
            | State::Stopping {
                trigger: Trigger::Sync, ..
            }
            | State::Sending {
                trigger: Trigger::Sync, ..
            }
            | State::Awaiting {
                trigger: Trigger::Sync, ..
            } => "syncing",
            State::Stopping { .. } | State::Sending { .. } | State::Awaiting { .. } => "checkpointing",
            State::Protected { .. } => "protected",
            State::Contending { .. } => "contending",
            State::Over => "ended",
        }
    }

    /// Returns what this side is in the middle of, in finer steps than its state; for logs and tests.
    #[must_use]
    pub fn phase(&self) -> &'static str {
        match self.state {
            State::Alone => "alone",
            State::Pairing { .. } => "pairing",
            State::Syncing { .. } => "syncing",
            State::Protected { .. } => "protected",
            State::Stopping {
                trigger: Trigger::Sync, ..
            } => "stopping first",
            State::Sending {
                trigger: Trigger::Sync, ..
            } => "sending first",
            State::Awaiting {
                trigger: Trigger::Sync, ..
            } => "awaiting first",
            State::Stopping { .. } => "stopping",
            State::Sending { .. } => "sending",
            State::Awaiting { .. } => "awaiting",
            State::Contending { .. } => "contending",
            State::Over => "over",
        }
    }

    /// Returns the running epoch and its generation.
    #[must_use]
    pub fn tag(&self) -> Tag {
        Tag {
            generation: self.generation,
            epoch: self.epoch,
        }
    }

    /// Returns the last epoch that the secondary acknowledged.
    #[must_use]
    pub fn committed(&self) -> Epoch {
        self.committed
    }

    /// Returns the secondary's name while it is connected.
    #[must_use]
    pub fn peer(&self) -> Option<&str> {
        self.peer.as_deref()
    }

    /// Returns the counters of this run.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Returns the comparator, for its queues' lengths.
    #[must_use]
    pub fn comparator(&self) -> &Comparator {
        &self.comparator
    }

    /// Returns the bytes of disk writes of the running epoch.
    #[must_use]
    pub fn writes_uncommitted_bytes(&self) -> u64 {
        self.write_bytes
    }

    /// Returns the number of inputs that the secondary has not confirmed.
    #[must_use]
    pub fn inputs_unconfirmed(&self) -> u64 {
        self.input.0 - self.confirmed.0
    }

    // Machine.

    fn guest_sent(&mut self, now: Instant, frame: Bytes, actions: &mut Vec<Action>) {
        self.counters.outputs += 1;
        let frame = self.network.leaving(frame);
        self.comparator.primary_output(now, frame, &mut self.verdicts);
        self.act_on_verdicts(now, actions);
    }

    fn input_consumed(&mut self, delivery: Delivery, actions: &mut Vec<Action>) {
        self.counters.inputs += 1;
        if !self.mirroring() {
            return;
        }
        self.input = self.input.next();
        let input = Input {
            tag: self.tag(),
            number: self.input,
            frame: delivery.wire,
        };
        actions.push(Action::Send(Message::Input(input)));
        self.hold_input(actions);
    }

    fn guest_wrote(&mut self, now: Instant, offset: u64, data: Bytes, actions: &mut Vec<Action>) {
        self.changed.mark(offset, data.len() as u64);
        if !self.mirroring() {
            return;
        }
        self.write_bytes += data.len() as u64;
        let write = DiskWrite {
            tag: self.tag(),
            offset,
            data,
        };
        self.totals.write(&write).expect("the sums are of the running epoch");
        actions.push(Action::Send(Message::Write(write)));
        if self.write_bytes >= limits::EPOCH_WRITES_BYTES_MAX {
            self.trigger(now, Trigger::Limit, actions);
        }
    }

    fn guest_stopped(&mut self, now: Instant, end: GuestEnd, actions: &mut Vec<Action>) {
        let reason = match end {
            GuestEnd::PowerOff => GoodbyeReason::PowerOff,
            GuestEnd::Reset => GoodbyeReason::Failed("the guest asked for a reset; start it again".to_owned()),
            GuestEnd::Crashed(reason) => GoodbyeReason::Failed(format!("the guest crashed: {reason}")),
        };
        self.end(now, reason, actions);
    }

    /// This host can't run the VM: the secondary, which can, is left to win the witness.
    fn vm_failed(&mut self, reason: String, actions: &mut Vec<Action>) {
        actions.push(Action::CloseLink);
        self.finish(Outcome::Failed(reason), actions);
    }

    fn paused(&mut self, actions: &mut Vec<Action>) {
        match self.state {
            State::Stopping { trigger, asked } => self.stopped(trigger, asked, actions),
            _ => {
                if let Some(ending) = &self.ending
                    && !self.mirroring()
                    && !ending.recorded
                {
                    self.store_record(true, actions);
                }
            }
        }
    }

    /// Epoch *n* is over; what the guest does next is *n* + 1.
    fn stopped(&mut self, trigger: Trigger, asked: Instant, actions: &mut Vec<Action>) {
        let tag = self.tag();
        let blocks = if trigger == Trigger::Sync {
            self.changed.all_blocks().iter().collect()
        } else {
            Vec::new()
        };
        if trigger != Trigger::Sync {
            let stopped = self.comparator.stop();
            assert_eq!(
                stopped, tag.epoch,
                "the comparator and the protocol are in the same epoch"
            );
        }
        self.changed.close(tag);
        self.epoch = self.epoch.next();
        self.write_bytes = 0;
        let next = Totals::new(self.tag(), Some(tag.epoch));
        let totals = core::mem::replace(&mut self.totals, next);
        self.state = State::Sending { trigger, asked, tag };
        actions.push(Action::SendCheckpoint { tag, blocks, totals });
    }

    fn checkpoint_sent(&mut self, shipment: Shipment, actions: &mut Vec<Action>) {
        let State::Sending { trigger, asked, tag } = self.state else {
            return;
        };
        let mut totals = shipment.totals;
        if totals.tag() != tag {
            return;
        }
        let network = NetworkState {
            tag,
            encoded: self.network.encode(),
        };
        totals
            .network_state(&network)
            .expect("the network's state is counted once");
        actions.push(Action::Send(Message::NetworkState(network)));
        actions.push(Action::Send(Message::End(totals.mark(self.input, shipment.entropy))));
        actions.push(Action::SeedEntropy(Some(shipment.entropy)));
        self.peer_entitled = true;
        self.counters.pages += shipment.pages;
        self.counters.page_bytes += shipment.bytes;
        self.counters.last_shipment = (shipment.pages, shipment.bytes);
        self.state = State::Awaiting { trigger, asked, tag };
    }

    fn acknowledged(&mut self, now: Instant, tag: Tag, actions: &mut Vec<Action>) {
        let State::Awaiting {
            trigger,
            asked,
            tag: awaited,
        } = self.state
        else {
            return self.misbehaved(now, "it acknowledged a checkpoint that was not sent", actions);
        };
        if tag != awaited {
            return self.misbehaved(now, "it acknowledged another checkpoint than the one sent", actions);
        }
        self.committed = tag.epoch;
        *self.counters.checkpoints.entry(trigger).or_default() += 1;
        self.counters.last_checkpoint = Some(now);
        self.counters.last_pause = now.since(asked);
        self.state = State::Protected { since: now };
        if self.ending.is_none() {
            actions.push(Action::ResumeVm);
        } else {
            self.running = false;
        }
        if trigger == Trigger::Sync {
            self.comparator.protect(self.epoch);
        } else {
            self.comparator.commit(now, tag.epoch, &mut self.verdicts);
        }
        self.act_on_verdicts(now, actions);
        self.report_state(actions);
    }

    // The peer.

    fn connected(&mut self, now: Instant, welcome: Welcome, actions: &mut Vec<Action>) {
        if self.state != State::Alone || self.ending.is_some() {
            actions.push(Action::CloseLink);
            return;
        }
        let term = self.generation.next();
        self.peer = Some(welcome.node);
        self.peer_entitled = false;
        self.liveness = Some(Liveness::new(self.options.takeover_limit, now));
        self.state = State::Pairing { term, won: false };
        if self.options.witness {
            actions.push(Action::Claim(term));
        } else {
            self.pairing_won(term, actions);
        }
        self.report_state(actions);
    }

    fn pairing_won(&mut self, term: Generation, actions: &mut Vec<Action>) {
        self.generation = term;
        self.state = State::Pairing { term, won: true };
        self.store_record(false, actions);
    }

    fn begin_sync(&mut self, actions: &mut Vec<Action>) {
        if self.ending.is_some() {
            return;
        }
        let common = Tag {
            generation: self.generation,
            epoch: Epoch(self.epoch.0 - 1),
        };
        self.changed = ChangedBlocks::new(self.options.disk_bytes, common);
        self.totals = Totals::new(self.tag(), None);
        self.write_bytes = 0;
        self.input = InputNumber(0);
        self.confirmed = InputNumber(0);
        self.state = State::Syncing {
            disk: false,
            memory: false,
        };
        let tag = self.tag();
        actions.push(Action::Send(Message::Begin(tag)));
        actions.push(Action::SyncMemory(self.totals.clone()));
    }

    fn synced(&mut self, now: Instant, shipment: Option<Shipment>, actions: &mut Vec<Action>) {
        let State::Syncing { disk, memory } = self.state else {
            return;
        };
        if self.ending.is_some() {
            return;
        }
        let (disk, memory) = (disk || shipment.is_none(), memory || shipment.is_some());
        self.state = State::Syncing { disk, memory };
        if let Some(shipment) = shipment {
            self.counters.pages += shipment.pages;
            self.counters.page_bytes += shipment.bytes;
            self.totals = shipment.totals;
        }
        if disk && memory {
            self.stop_for(now, Trigger::Sync, actions);
        }
    }

    fn peer_sent(&mut self, now: Instant, message: Message, actions: &mut Vec<Action>) {
        let Some(liveness) = &mut self.liveness else { return };
        liveness.heard(now);
        if let Some(generation) = message.generation()
            && generation != self.generation
        {
            return self.misbehaved(now, "it speaks of another generation", actions);
        }
        match message {
            Message::Heartbeat(heartbeat) => {
                if let Err(error) = liveness.heartbeat(now, heartbeat) {
                    self.misbehaved(now, &error.to_string(), actions);
                }
            }
            Message::Goodbye(reason) => self.link_lost(now, &format!("the secondary said goodbye: {reason}"), actions),
            Message::BlockHashes(hashes) if matches!(self.state, State::Syncing { disk: false, .. }) => {
                actions.push(Action::CompareBlocks(hashes));
            }
            Message::Output(output) if self.protected() => {
                self.comparator
                    .secondary_output(now, output.tag.epoch, output.frame, &mut self.verdicts);
                self.act_on_verdicts(now, actions);
            }
            Message::Confirm(_, number) if number <= self.input && number >= self.confirmed => {
                self.confirmed = number;
                self.hold_input(actions);
            }
            Message::Want(_) => self.trigger(now, Trigger::Limit, actions),
            Message::Acknowledge(tag) => self.acknowledged(now, tag, actions),
            Message::Loaded(tag) => self.comparator.loaded(now, tag.epoch),
            Message::Committed(tag) => self.peer_committed(now, tag, actions),
            Message::Output(_) | Message::BlockHashes(_) => {}
            _ => self.misbehaved(now, "it sent a message that only a primary sends", actions),
        }
    }

    fn peer_committed(&mut self, now: Instant, tag: Tag, actions: &mut Vec<Action>) {
        if tag.epoch > self.committed {
            return self.misbehaved(now, "it committed a checkpoint that it had not acknowledged", actions);
        }
        self.changed.clear_committed(tag);
        if self.ending.as_ref().is_some_and(|ending| !ending.recorded) && tag.epoch == self.committed && !self.running {
            self.store_record(true, actions);
        }
    }

    /// The peer broke the protocol: its connections are closed, and it counts as lost.
    fn misbehaved(&mut self, now: Instant, what: &str, actions: &mut Vec<Action>) {
        actions.push(Action::Report(Report::Alarm(format!(
            "the secondary broke the protocol: {what}"
        ))));
        self.link_lost(now, "it broke the protocol", actions);
    }

    fn link_lost(&mut self, now: Instant, cause: &str, actions: &mut Vec<Action>) {
        if self.liveness.take().is_none() {
            return;
        }
        let peer = self.peer.take().unwrap_or_default();
        actions.push(Action::CloseLink);
        actions.push(Action::Report(Report::Note(format!("secondary {peer} lost: {cause}"))));
        if let State::Sending { .. } | State::Awaiting { .. } = self.state {
            if self.comparator.mode() == Mode::Comparing {
                self.comparator.abandon();
            }
            self.changed.reopen();
            actions.push(Action::KeepDirty);
        }
        self.hold_input(actions);
        if self.peer_entitled {
            self.contend(now, actions)
        } else {
            self.go_alone(now, actions)
        }
    }

    fn contend(&mut self, now: Instant, actions: &mut Vec<Action>) {
        let term = self.generation.next();
        self.pause(actions);
        self.state = State::Contending {
            term,
            retry: None,
            won: false,
        };
        if self.options.witness {
            actions.push(Action::Claim(term));
        } else {
            self.contest_won(now, term, actions);
        }
        self.report_state(actions);
    }

    fn contest_won(&mut self, _now: Instant, term: Generation, actions: &mut Vec<Action>) {
        self.generation = term;
        self.state = State::Contending {
            term,
            retry: None,
            won: true,
        };
        self.store_record(false, actions);
    }

    fn go_alone(&mut self, now: Instant, actions: &mut Vec<Action>) {
        self.state = State::Alone;
        self.peer_entitled = false;
        self.comparator.release_all(&mut self.verdicts);
        self.act_on_verdicts(now, actions);
        self.report_state(actions);
        actions.push(Action::SeedEntropy(None));
        if self.ending.is_some() {
            self.store_record(true, actions);
            return;
        }
        actions.push(Action::ResumeVm);
        self.running = true;
        actions.push(Action::Dial);
    }

    fn witness_answered(&mut self, now: Instant, term: Generation, answer: WitnessAnswer, actions: &mut Vec<Action>) {
        match (self.state, answer) {
            (
                State::Pairing {
                    term: asked,
                    won: false,
                },
                answer,
            ) if asked == term => match answer {
                WitnessAnswer::Won => self.pairing_won(term, actions),
                WitnessAnswer::LostTo(owner) => self.fenced(&owner, term, actions),
                WitnessAnswer::Unreachable(cause) => {
                    actions.push(Action::Report(Report::Alarm(format!("witness unreachable: {cause}"))));
                    actions.push(Action::CloseLink);
                }
            },
            // A pairing that ended before the witness answered: the term is still this side's.
            (State::Alone, WitnessAnswer::Won) if term > self.generation => self.generation = term,
            (
                State::Contending {
                    term: asked,
                    won: false,
                    ..
                },
                answer,
            ) if asked == term => match answer {
                WitnessAnswer::Won => self.contest_won(now, term, actions),
                WitnessAnswer::LostTo(owner) => self.fenced(&owner, term, actions),
                WitnessAnswer::Unreachable(cause) => {
                    actions.push(Action::Report(Report::Alarm(format!("witness unreachable: {cause}"))));
                    self.state = State::Contending {
                        term,
                        retry: Some(now + CLAIM_RETRY),
                        won: false,
                    };
                }
            },
            _ => {}
        }
    }

    fn fenced(&mut self, owner: &str, term: Generation, actions: &mut Vec<Action>) {
        self.pause(actions);
        actions.push(Action::CloseLink);
        let reason = format!("{owner} owns the VM since term {term}: this side's VM and its output are stopped");
        actions.push(Action::Report(Report::State("fenced")));
        self.finish(Outcome::Fenced(reason), actions);
    }

    fn recorded(&mut self, now: Instant, record: RecordUpdate, actions: &mut Vec<Action>) {
        if record.clean {
            return self.goodbye(actions);
        }
        if record.generation != self.generation {
            return;
        }
        match self.state {
            State::Pairing { won: true, .. } => self.begin_sync(actions),
            State::Contending { won: true, .. } => self.go_alone(now, actions),
            _ => {}
        }
    }

    // Ends.

    /// Ends in order: a protected pair takes a last checkpoint, so that both disks are equal.
    fn end(&mut self, now: Instant, reason: GoodbyeReason, actions: &mut Vec<Action>) {
        if self.ending.is_some() {
            return;
        }
        self.ending = Some(Ending {
            reason,
            by: now + ENDING_MAX,
            recorded: false,
        });
        match self.state {
            State::Protected { .. } => self.trigger(now, Trigger::Admin, actions),
            State::Stopping { .. } | State::Sending { .. } | State::Awaiting { .. } => {}
            State::Contending { .. } => self.goodbye(actions),
            State::Alone | State::Pairing { .. } | State::Syncing { .. } => {
                self.running = true;
                self.pause(actions);
            }
            State::Over => {}
        }
    }

    fn goodbye(&mut self, actions: &mut Vec<Action>) {
        let reason = self
            .ending
            .as_ref()
            .map_or(GoodbyeReason::Operator, |ending| ending.reason.clone());
        if self.liveness.is_some() {
            actions.push(Action::SendControl(Message::Goodbye(reason.clone())));
            actions.push(Action::CloseLink);
        }
        self.finish(Outcome::Ended(reason), actions);
    }

    fn finish(&mut self, outcome: Outcome, actions: &mut Vec<Action>) {
        self.state = State::Over;
        self.liveness = None;
        self.ending = None;
        self.announce = None;
        actions.push(Action::End(outcome));
    }

    // Time.

    fn timeout(&mut self, now: Instant, actions: &mut Vec<Action>) {
        if self.ending.as_ref().is_some_and(|ending| ending.by <= now) {
            actions.push(Action::Report(Report::Alarm(
                "the last checkpoint was not committed in time".to_owned(),
            )));
            return self.goodbye(actions);
        }
        self.beat(now, actions);
        if let State::Contending {
            term,
            retry: Some(retry),
            ..
        } = self.state
            && retry <= now
        {
            self.state = State::Contending {
                term,
                retry: None,
                won: false,
            };
            actions.push(Action::Claim(term));
        }
        if let State::Protected { since } = self.state {
            if since + self.options.epoch_age_max <= now {
                self.trigger(now, Trigger::Age, actions);
            } else if self.comparator.deadline().is_some_and(|deadline| deadline <= now) {
                self.comparator.timeout(now, &mut self.verdicts);
                self.act_on_verdicts(now, actions);
            }
        }
        self.announce(now, actions);
    }

    fn beat(&mut self, now: Instant, actions: &mut Vec<Action>) {
        let Some(liveness) = &mut self.liveness else { return };
        if liveness.is_suspect(now) {
            let limit = self.options.takeover_limit;
            return self.link_lost(now, &format!("silent for more than {limit}"), actions);
        }
        if liveness.heartbeat_due() <= now {
            actions.push(Action::SendControl(Message::Heartbeat(liveness.beat(now))));
        }
    }

    fn announce(&mut self, now: Instant, actions: &mut Vec<Action>) {
        let Some((start, next)) = self.announce else { return };
        if start + ANNOUNCE_AFTER[next] > now {
            return;
        }
        // While contending nothing leaves; the next repetition may.
        if !matches!(self.state, State::Contending { .. }) {
            self.transmit(self.network.announcements(), self.lease(), actions);
        }
        self.announce = (next + 1 < ANNOUNCE_AFTER.len()).then_some((start, next + 1));
    }

    // Helpers.

    fn trigger(&mut self, now: Instant, trigger: Trigger, actions: &mut Vec<Action>) {
        if let State::Protected { .. } = self.state {
            self.stop_for(now, trigger, actions);
        }
    }

    fn stop_for(&mut self, now: Instant, trigger: Trigger, actions: &mut Vec<Action>) {
        self.state = State::Stopping { trigger, asked: now };
        actions.push(Action::PauseVm);
    }

    fn pause(&mut self, actions: &mut Vec<Action>) {
        self.running = false;
        actions.push(Action::PauseVm);
    }

    fn act_on_verdicts(&mut self, now: Instant, actions: &mut Vec<Action>) {
        let mut frames = Vec::new();
        let mut trigger = None;
        let mut violation = None;
        for verdict in core::mem::take(&mut self.verdicts) {
            match verdict {
                Verdict::Release(frame) => frames.push(frame),
                Verdict::Diverged(divergence) => {
                    trigger = Some(match divergence.reason {
                        Reason::Mismatch(_) => {
                            self.counters.divergences += 1;
                            Trigger::Mismatch
                        }
                        Reason::Unmatched { .. } => Trigger::Unmatched,
                        Reason::Limit(_) => Trigger::Limit,
                    });
                    actions.push(Action::Report(Report::Note(divergence.to_string())));
                }
                Verdict::Violation(what) => violation = Some(what),
            }
        }
        self.transmit(frames, self.lease(), actions);
        if let Some(what) = violation {
            self.misbehaved(now, &what, actions);
        }
        if let Some(trigger) = trigger {
            self.trigger(now, trigger, actions);
        }
    }

    fn transmit(&self, frames: Vec<Bytes>, not_after: Option<Instant>, actions: &mut Vec<Action>) {
        if !frames.is_empty() {
            actions.push(Action::Transmit { frames, not_after });
        }
    }

    /// Returns until when output may leave, if that is bounded: as soon as the peer may contend.
    fn lease(&self) -> Option<Instant> {
        let liveness = self.liveness.as_ref().filter(|_| self.peer_entitled)?;
        Some(liveness.lease_until())
    }

    fn hold_input(&mut self, actions: &mut Vec<Action>) {
        let hold = self.mirroring() && self.inputs_unconfirmed() >= limits::INPUTS_UNCONFIRMED_MAX;
        if hold != self.input_held {
            self.input_held = hold;
            actions.push(Action::HoldInput(hold));
        }
    }

    /// Output is compared: the secondary has a VM that follows.
    fn protected(&self) -> bool {
        self.comparator.mode() == Mode::Comparing
            && matches!(
                self.state,
                State::Protected { .. } | State::Stopping { .. } | State::Sending { .. } | State::Awaiting { .. }
            )
    }

    /// Inputs and disk writes go to the secondary as they happen.
    fn mirroring(&self) -> bool {
        self.protected()
    }

    fn store_record(&mut self, clean: bool, actions: &mut Vec<Action>) {
        if clean && let Some(ending) = &mut self.ending {
            ending.recorded = true;
        }
        actions.push(Action::StoreRecord(RecordUpdate {
            generation: self.generation,
            role: Role::Primary,
            committed: self.committed,
            complete: true,
            clean,
        }));
    }

    fn report_state(&self, actions: &mut Vec<Action>) {
        actions.push(Action::Report(Report::State(self.state_name())));
    }
}
