//! The primary's half of the pair protocol, pure: events in, actions out.
//!
//! ```text
//!   Alone ──Connected──► Pairing ──term won, recorded──► Syncing ──all sent──► Stopping ──Paused──► Copying
//!     ▲                     │ link lost                     │ link lost                               │ Copied
//!     ├─────────────────────┴───────────────────────────────┘                                         ▼
//!     │                             ┌──────── trigger ── Protected ◄──ack── Awaiting ◄──sent────── Sending
//!     │ won, recorded               └──► Stopping             │ link lost: from any of these
//!   Contending ◄──────────────────────────────────────────────┘
//!     │ lost
//!   Fenced
//! ```
//!
//! When the VM resumes is one policy, [`Resume`]. What the guest does after the stop is epoch *n* + 1 in any case, and
//! nothing of it leaves before *n* is committed. The first checkpoint of a pairing is always acknowledged first: until
//! then the secondary's disk is no whole state, and must not be written by a later epoch.
//! This is the only place that says "checkpoint acknowledged ⇒ release output". It never reads a
//! clock, never blocks, and holds bulk data by reference only.

mod ahead;
mod alike;
mod end;
mod epochs;
mod guest;
mod loss;
mod mode;
pub mod pace;
mod peer;
mod policy;
mod predict;
mod room;
mod seen;
mod sync;

use core::str::FromStr;
use std::collections::VecDeque;

use bytes::Bytes;
use checkpoint::backlog::Backlog;
use checkpoint::failover::{self, Contest, Order};
use checkpoint::limits;
use checkpoint::liveness::Liveness;
use checkpoint::mutants::{self, Mutant};
use checkpoint::pages::identical::{PageHashes, PageMatches};
use checkpoint::pair::{Delivery, Place, RecordUpdate, Report, Sight, Trigger, WitnessAnswer};
use checkpoint::staging::Totals;
use checkpoint::wire::{
    BlockHashes, DiskWrite, GoodbyeReason, Held, Input, Message, NetworkState, Output, Welcome, Written,
};
use checkpoint::{Duration, Epoch, EpochMode, Generation, InputNumber, Instant, Nic, Role, Tag};
use proxy::{self, ComparatorLimits, Comparators, Divergence, Pictures, Reason, Verdict};
use storage::ChangedBlocks;

use crate::event::{Action, AheadShipment, Event, GuestEnd, Look, Outcome, Shipment};

use ahead::{Ahead, Answers};
use alike::Alike;
pub use mode::Mode;
use pace::Budget;
pub use policy::Patience;
use policy::Policy;
use predict::Predictor;
pub use room::Room;
use seen::Seen;
use sync::Known;
pub use sync::SyncCounts;

/// Longest time that an orderly end waits for its last checkpoint.
const ENDING_MAX: Duration = Duration::from_millis(5_000);
/// Longest time from a secondary's acknowledgement to its load.
const LOAD_MAX: Duration = Duration::from_millis(10_000);
/// A checkpoint that takes longer from its stop to its acknowledgement is abandoned: heartbeats may pass on their connection
/// though the data's is stuck, and meanwhile no output leaves.
const CHECKPOINT_MAX: Duration = Duration::from_millis(10_000);
/// The same for the first of a pairing, which ships whatever was written during the sync.
const FIRST_CHECKPOINT_MAX: Duration = Duration::from_millis(30_000);
/// When announcements are repeated after a start or a takeover.
const ANNOUNCE_AFTER: [Duration; 6] = [
    Duration(0),
    Duration::from_millis(20),
    Duration::from_millis(100),
    Duration::from_millis(500),
    Duration::from_millis(1_500),
    Duration::from_millis(4_000),
];

/// When the primary's VM resumes after the stop for a checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Resume {
    /// As soon as what is to be shipped has been copied: the pause is what the copy costs.
    #[default]
    AfterCopy,
    /// When the secondary has acknowledged: no memory for the copy, and no output of the next epoch is held meanwhile.
    AfterAcknowledgement,
}

impl FromStr for Resume {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "copy" => Ok(Self::AfterCopy),
            "acknowledgement" => Ok(Self::AfterAcknowledgement),
            _ => Err(format!("'{text}' is no policy: say copy or acknowledgement")),
        }
    }
}

/// What the operator set.
#[derive(Clone, Debug)]
pub struct Options {
    /// When a checkpoint is taken, and who runs between two.
    pub mode: Mode,
    /// The time between two checkpoints of buffered output.
    pub checkpoint_every: Duration,
    /// How long the mode is watched before it is changed, if that is left to the primary.
    pub patience: Patience,
    /// When the VM resumes after the stop for a checkpoint.
    pub resume: Resume,
    /// Whether a witness is configured; without one the primary goes on alone unasked.
    pub witness: bool,
    /// Silence after which the peer is lost.
    pub takeover_limit: Duration,
    /// An epoch is never older than this.
    pub epoch_age_max: Duration,
    /// A frame never waits longer than this for its equal.
    pub unmatched_max: Duration,
    /// What may be spent on looking at dirty pages and shipping them ahead of a stop; `None` never looks.
    pub ahead: Option<Budget>,
    /// A checkpoint is taken before the pause that it is expected to take is longer than this.
    pub pause_budget: Option<Duration>,
    /// What an epoch may keep waiting.
    pub room: Room,
    /// Size of guest memory in bytes.
    pub memory_bytes: u64,
    /// Size of the disk in bytes.
    pub disk_bytes: u64,
    /// The hardware addresses of the guest's network cards, one each, announced when it boots.
    pub macs: Vec<[u8; 6]>,
    /// Nobody outside can know it: flows are found by it.
    pub flow_secret: u64,
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
        network: Pictures,
        /// Frames that the guest has not yet received, in order.
        inputs: Vec<Delivery>,
        /// Frames that the guest sent since the peer was lost.
        outputs: Vec<(Nic, Bytes)>,
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
    /// Those of them that were shipped ahead of a stop.
    pub pages_ahead: u64,
    /// Encoded page bytes shipped.
    pub page_bytes: u64,
    /// When the last checkpoint was acknowledged.
    pub last_checkpoint: Option<Instant>,
    /// Changes of the mode, to buffered and back.
    pub switches: u64,
    /// How long the last stop was expected to take.
    pub last_predicted: Duration,
    /// The last initial sync.
    pub sync: SyncCounts,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Alone,
    /// The contest for the pairing's term is open, or won and being recorded.
    Pairing,
    Syncing {
        disk: bool,
        memory: bool,
    },
    /// `stands`: the VM was not resumed, because the run ends with the last checkpoint.
    Protected {
        since: Instant,
        stands: bool,
    },
    Stopping {
        trigger: Trigger,
        asked: Instant,
    },
    /// The VM is stopped, and what the checkpoint ships of it is being copied.
    Copying(Taken),
    Sending(Taken),
    Awaiting(Taken),
    Contending,
    Over,
}

/// A checkpoint between its stop and its acknowledgement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Taken {
    trigger: Trigger,
    asked: Instant,
    tag: Tag,
    /// Of the epoch that has begun.
    next: EpochMode,
    /// In lockstep, output waited for it.
    difference: bool,
    /// Number of the last input before the stop.
    input: InputNumber,
    /// The VM runs again, in the next epoch.
    resumed: bool,
    alike: Alike,
    /// How long its pause was expected to take.
    predicted: Duration,
    /// Pages that were dirty at the stop.
    pages: u64,
}

impl Taken {
    /// Returns when it is given up.
    fn deadline(&self) -> Instant {
        self.asked
            + match self.trigger {
                Trigger::Sync => FIRST_CHECKPOINT_MAX,
                _ => CHECKPOINT_MAX,
            }
    }
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
    contest: Contest,
    /// The epoch that the guest runs in.
    epoch: Epoch,
    /// Whether the secondary's guest runs it too.
    epoch_mode: EpochMode,
    /// When the guest began to run it.
    began: Instant,
    policy: Policy,
    committed: Epoch,
    liveness: Option<Liveness>,
    peer: Option<String>,
    comparators: Comparators,
    network: Pictures,
    /// As it was at the stop for the checkpoint in flight.
    network_at_stop: Bytes,
    /// Translated connections that it has no room for.
    network_left_out: usize,
    input: InputNumber,
    confirmed: InputNumber,
    unconfirmed: Backlog,
    input_held: bool,
    /// Page streams of the pairing.
    streams: usize,
    totals: Totals,
    /// Blocks of the secondary's disk whose hashes have come.
    hashed: u64,
    /// When the pairing is given up if no more hashes have come, as long as some are missing.
    hashes_by: Option<Instant>,
    write_bytes: u64,
    /// The guest stands, because the running epoch is full before it can end.
    is_full: bool,
    /// When the next look is due while a checkpoint is under way.
    flight_look: Option<Instant>,
    changed: ChangedBlocks,
    /// Checkpoints that the secondary's memory may be, to which the dirty pages are the difference.
    memory_known: Known,
    /// Checkpoints that the secondary's disk may be, to which the changed blocks are the difference.
    disk_known: Known,
    /// What the secondary of the pairing that begins says it has.
    held: Held,
    announce: Option<(Instant, usize)>,
    /// The secondary has loaded the last checkpoint: it can take the next.
    peer_loaded: bool,
    /// A checkpoint to be taken as soon as it has.
    wanted: Option<Trigger>,
    ahead: Ahead,
    /// About the pages of the checkpoint under way, or the last.
    answers: Answers,
    /// The checkpoint that is being loaded: when its stop was asked for, and whether output in lockstep waited for it.
    loading: Option<(Instant, bool)>,
    predictor: Predictor,
    /// The operator knows that the pause budget can't be kept.
    budget_told: bool,
    ending: Option<Ending>,
    counters: Counters,
    /// What somebody captures.
    seen: Seen,
    /// What made checkpoints necessary lately, the newest first.
    divergences: VecDeque<(Instant, Nic, Divergence)>,
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
                Pictures::of(&options.macs),
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
            contest: Contest::owner(options.witness, generation),
            epoch: last_epoch.next(),
            epoch_mode: EpochMode::default(),
            began: now,
            policy: Policy::new(options.patience, options.checkpoint_every, now),
            committed: last_epoch,
            liveness: None,
            peer: None,
            comparators: Comparators::new(
                options.macs.len(),
                ComparatorLimits {
                    held_bytes: options.room.held_bytes,
                    unmatched: options.unmatched_max,
                    flow_patience: (options.mode == Mode::Auto).then_some(options.patience.flow),
                    ..ComparatorLimits::default()
                },
                last_epoch.next(),
                options.flow_secret,
            ),
            network,
            network_at_stop: Bytes::new(),
            network_left_out: 0,
            input: InputNumber(0),
            confirmed: InputNumber(0),
            unconfirmed: Backlog::default(),
            input_held: false,
            totals: Totals::new(
                Tag {
                    generation,
                    epoch: last_epoch.next(),
                },
                None,
                1,
            ),
            streams: 1,
            hashed: 0,
            hashes_by: None,
            write_bytes: 0,
            is_full: false,
            flight_look: None,
            changed: ChangedBlocks::new(
                options.disk_bytes,
                Tag {
                    generation,
                    epoch: last_epoch,
                },
            ),
            memory_known: Known::default(),
            disk_known: Known::default(),
            held: Held::default(),
            announce: Some((now, 0)),
            peer_loaded: false,
            wanted: None,
            ahead: Ahead::default(),
            answers: Answers::default(),
            loading: None,
            predictor: Predictor::default(),
            budget_told: false,
            ending: None,
            counters: Counters::default(),
            seen: Seen::default(),
            divergences: VecDeque::new(),
            options,
        };
        assert_eq!(
            primary.network.count(),
            primary.comparators.count(),
            "each network card has a picture and a comparator"
        );
        primary.network.lead();
        if taken_over {
            actions.push(Action::Reseed);
        }
        actions.push(Action::SeedEntropy(None));
        primary.announce(now, actions);
        actions.extend(inputs.into_iter().map(Action::Deliver));
        for nic in Nic::all(primary.comparators.count()) {
            let sent = outputs.iter().filter(|(by, _)| *by == nic);
            let frames = sent.map(|(_, frame)| frame.clone()).collect();
            primary.transmit(nic, frames, None, actions);
        }
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
            Event::CheckpointSent(shipment) => self.checkpoint_sent(now, shipment, actions),
            Event::CompareAsked(tag) => self.compare_asked(tag, actions),
            Event::Copied { tag, pages, entropy } => self.copied(now, tag, pages, entropy, actions),
            Event::Connected(welcome) => self.connected(now, welcome, actions),
            Event::DiskSynced(generation) if generation == self.contest.generation() => self.synced(now, None, actions),
            Event::Looked(look) => self.looked(now, look, actions),
            Event::MemorySynced(shipment) if shipment.totals.tag() == self.tag() => {
                self.synced(now, Some(shipment), actions)
            }
            Event::DiskSynced(_) | Event::MemorySynced(_) => {}
            Event::FrameArrived(nic, frame) => actions.push(Action::Deliver(self.network.arriving(nic, frame))),
            Event::GuestSent(nic, frame) => self.guest_sent(now, nic, frame, actions),
            Event::GuestStopped(end) => self.guest_stopped(now, end, actions),
            Event::GuestWrote { offset, written } => self.guest_wrote(now, offset, written, actions),
            Event::Hashed(hashes) => self.hashed(hashes, actions),
            Event::InputConsumed(delivery) => self.input_consumed(now, delivery, actions),
            Event::LinkClosed(cause) => self.link_lost(now, failover::Event::Lost, &cause, actions),
            Event::Paused => self.paused(now, actions),
            Event::PeerSent(message) => self.peer_sent(now, message, actions),
            Event::RecordStored(record) => self.recorded(now, record, actions),
            Event::ShippedAhead(shipment) => self.shipped_ahead(shipment),
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
            State::Protected { since, .. } if !self.peer_loaded => Some(since + LOAD_MAX),
            State::Protected { since, .. } if self.ending.is_none() => Some(self.checkpoint_due(since).0),
            State::Copying(taken) | State::Sending(taken) | State::Awaiting(taken) => Some(taken.deadline()),
            State::Syncing { disk: false, .. } if self.hashes_by.is_some() => self.hashes_by,
            _ => self.contest.deadline(),
        };
        let comparator = (matches!(self.state, State::Protected { .. }) && self.peer_loaded && self.ending.is_none())
            .then(|| self.comparators.deadline())
            .flatten();
        let announce = self.announce.map(|(start, next)| start + ANNOUNCE_AFTER[next]);
        let ending = self.ending.as_ref().map(|ending| ending.by);
        [liveness, state, comparator, announce, ending, self.look_due()]
            .into_iter()
            .flatten()
            .min()
    }

    /// Returns the name of the state, as `tandem status` shows it.
    #[must_use]
    pub fn state_name(&self) -> &'static str {
        match self.state {
            State::Alone => "alone",
            State::Pairing
            | State::Syncing { .. }
            | State::Stopping {
                trigger: Trigger::Sync, ..
            } => "syncing",
            State::Copying(taken) | State::Sending(taken) | State::Awaiting(taken)
                if taken.trigger == Trigger::Sync =>
            {
                "syncing"
            }
            State::Stopping { .. } | State::Copying(_) | State::Sending(_) | State::Awaiting(_) => "checkpointing",
            State::Protected { .. } => "protected",
            State::Contending => "contending",
            State::Over => "ended",
        }
    }

    /// Returns what this side is in the middle of, in finer steps than its state; for logs and tests.
    #[must_use]
    pub fn phase(&self) -> &'static str {
        match self.state {
            State::Alone => "alone",
            State::Pairing => "pairing",
            State::Syncing { .. } => "syncing",
            State::Protected { .. } => "protected",
            State::Stopping {
                trigger: Trigger::Sync, ..
            } => "stopping first",
            State::Copying(taken) if taken.trigger == Trigger::Sync => "copying first",
            State::Sending(taken) if taken.trigger == Trigger::Sync => "sending first",
            State::Awaiting(taken) if taken.trigger == Trigger::Sync => "awaiting first",
            State::Stopping { .. } => "stopping",
            State::Sending(Taken {
                alike: Alike::Halting | Alike::Asking(_),
                ..
            }) => "comparing",
            State::Copying(_) => "copying",
            State::Sending(_) => "sending",
            State::Awaiting(_) => "awaiting",
            State::Contending => "contending",
            State::Over => "over",
        }
    }

    /// Returns the running epoch and its generation.
    #[must_use]
    pub fn tag(&self) -> Tag {
        Tag {
            generation: self.contest.generation(),
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

    /// Returns the number of page streams while a secondary is connected.
    #[must_use]
    pub fn streams(&self) -> Option<usize> {
        self.peer.is_some().then_some(self.streams)
    }

    /// Returns the counters of this run.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Returns the comparators, for their queues' lengths.
    #[must_use]
    pub fn comparators(&self) -> &Comparators {
        &self.comparators
    }

    /// Returns the epoch whose commit covers all that the guest has done until now.
    #[must_use]
    pub fn covering(&self) -> Epoch {
        match self.state {
            State::Copying(taken) | State::Sending(taken) | State::Awaiting(taken) if !taken.resumed => taken.tag.epoch,
            _ => self.epoch,
        }
    }

    /// Returns what the operator set.
    #[must_use]
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Returns what made checkpoints necessary lately and on which card, the newest first.
    pub fn divergences(&self) -> impl Iterator<Item = &(Instant, Nic, Divergence)> {
        self.divergences.iter()
    }

    /// Keeps what is seen of the guests' output from now on, or no more. It is to be taken after each step.
    pub fn watch_output(&mut self, on: bool) {
        self.seen.set(on);
    }

    /// Takes what was seen since the last call.
    pub fn take_seen(&mut self) -> Vec<Sight> {
        self.seen.take()
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

    /// Returns their bytes.
    #[must_use]
    pub fn input_bytes_unconfirmed(&self) -> u64 {
        self.unconfirmed.bytes()
    }

    fn timeout(&mut self, now: Instant, actions: &mut Vec<Action>) {
        if self.ending.as_ref().is_some_and(|ending| ending.by <= now) {
            actions.push(Action::Report(Report::Alarm(
                "the last checkpoint was not committed in time".to_owned(),
            )));
            return self.goodbye(actions);
        }
        self.beat(now, actions);
        self.contend(now, failover::Event::Timeout, "", actions);
        if matches!(self.state, State::Syncing { disk: false, .. }) && self.hashes_by.is_some_and(|by| by <= now) {
            let cause = "the hashes of its disk do not come, though it is there: its disk hangs";
            self.link_lost(now, failover::Event::Lost, cause, actions);
        }
        if let State::Copying(taken) | State::Sending(taken) | State::Awaiting(taken) = self.state
            && taken.deadline() <= now
        {
            let cause = "it did not acknowledge a checkpoint in time, though it is there: its link is too slow or its disk hangs";
            self.link_lost(now, failover::Event::Lost, cause, actions);
        }
        if let State::Protected { since, .. } = self.state {
            if !self.peer_loaded {
                if since + LOAD_MAX <= now {
                    self.misbehaved(now, "it did not load a checkpoint in time", actions);
                }
            } else if let (due, trigger) = self.checkpoint_due(since)
                && due <= now
            {
                self.trigger(now, trigger, actions);
            } else if self.comparators.deadline().is_some_and(|deadline| deadline <= now) {
                self.comparators.timeout(now);
                self.act_on_verdicts(now, actions);
            }
        }
        self.ship_ahead(now, actions);
        self.announce(now, actions);
    }

    fn report_state(&self, actions: &mut Vec<Action>) {
        actions.push(Action::Report(Report::State(self.state_name())));
    }
}
