//! Decides, on the primary, when output of its guest may leave.
//!
//! ```text
//!   Syncing --protect--> Comparing --release_all--> Alone --protect--> Comparing
//!   at once              held until equal or        at once
//!                        committed
//! ```
//!
//! Driven by `primary::protocol`: frames of both sides come in with their epoch, verdicts go out. A
//! frame of epoch *n* is compared with what the secondary's guest sent in epoch *n*; what the primary's
//! guest sends after [`Comparator::stop`] belongs to *n + 1* and waits, uncompared, until *n* is
//! committed. So a flow knows one epoch at a time, and its state at a commit is the primary's at the stop.
//! In a buffered epoch the secondary's guest does not run: everything waits, uncompared, for the epoch's own commit.
//!
//! Never drops a frame of the primary, never reads a clock. Nothing leaves while comparing that was
//! neither equal nor committed.

use std::collections::VecDeque;

use bytes::Bytes;
use checkpoint::mutants::{self, Mutant};
use checkpoint::{Duration, Epoch, EpochMode, Instant, Role, limits};

use crate::counters::{Counters, Pending};
use crate::crossing::Crossings;
use crate::flow::FlowKey;
use crate::frame::{self, Body, Frame};
use crate::hold::{HeldFrame, Hold};
use crate::lag::LagMeter;
use crate::lane::{Lane, Unblocked};
use crate::picture::Leaving;
use crate::service::Services;
use crate::shared::Shared;
use crate::table::{FlowId, FlowTable};
use crate::temper::FlowPatience;
use crate::verdict::{Divergence, Limit, Reason, Verdict, Why};

/// The bounds of a comparator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ComparatorLimits {
    /// Bytes of the primary that wait for release.
    pub held_bytes: usize,
    /// Frames of the primary that wait for release.
    pub held_frames: usize,
    /// Bytes of the secondary that wait for the primary's.
    pub pending_bytes: usize,
    /// Frames and pieces of the secondary that wait for the primary's.
    pub pending_frames: usize,
    /// Flows known at a time.
    pub flows: usize,
    /// How long a frame of either side may wait for its equal, at most.
    pub unmatched: Duration,
    /// The least time that a frame of the primary may, however soon the secondary's came lately.
    pub unmatched_min: Duration,
    /// When a flow on which the sides keep differing is no longer compared for a time; nothing: each flow is.
    pub flow_patience: Option<FlowPatience>,
    /// How long two unequal datagrams of a flow may wait for equals that come in another order.
    pub reorder: Duration,
    /// How long a segment waits until its first bytes leave without the rest, if they may.
    pub begin: Duration,
}

/// What the comparator does with output of the primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// No secondary that could take over yet: output leaves at once.
    Syncing,
    /// Output leaves when it is equal or committed.
    Comparing,
    /// Owner of the witness, without a secondary: output leaves at once.
    Alone,
}

/// The state machine; see the module.
#[derive(Debug)]
pub struct Comparator {
    pub(crate) limits: ComparatorLimits,
    pub(crate) mode: Mode,
    /// The epoch that the primary's guest runs in.
    pub(crate) running: Epoch,
    /// Whether the secondary's guest runs it too.
    pub(crate) running_mode: EpochMode,
    /// The epoch that has been stopped and is not committed.
    pub(crate) uncommitted: Option<Epoch>,
    /// Whether the secondary's guest runs that.
    pub(crate) uncommitted_mode: EpochMode,
    /// The last epoch that is committed; the secondary's output of it and before is stale.
    pub(crate) committed: Option<Epoch>,
    pub(crate) loaded_at: Option<Instant>,
    /// The last epoch for which a divergence was told.
    pub(crate) diverged: Option<Epoch>,
    pub(crate) hold: Hold,
    pub(crate) shared: Shared,
    pub(crate) flows: FlowTable<Lane>,
    /// Flows with state of the epoch being compared.
    pub(crate) touched: Vec<FlowId>,
    /// Output of the secondary that came before its commit was known.
    pub(crate) early: VecDeque<(Instant, Bytes)>,
    pub(crate) early_bytes: usize,
    /// Output of the secondary that waits, oldest first; entries may be outdated.
    pub(crate) waiting: VecDeque<(Instant, FlowId)>,
    /// Flows on which both sides keep something unequal, oldest first; entries may be outdated.
    pub(crate) suspects: VecDeque<(Instant, FlowId)>,
    /// Flows that the two sides may have opened from different ports.
    pub(crate) crossings: Crossings,
    pub(crate) lag: LagMeter,
    /// Services that have differed lately.
    pub(crate) services: Services,
    pub(crate) pending: Pending,
    pub(crate) counters: Counters,
    /// An epoch was abandoned, and what waited for its commit has not been compared yet.
    pub(crate) behind: bool,
    /// Flows that are not compared, whatever their services are.
    pub(crate) buffered: Vec<FlowId>,
    /// Output of the running epoch waits that only its commit can release.
    pub(crate) waits_for_commit: bool,
    /// Flows that hold something of which a part may leave before the rest, in the order in which they are looked at.
    pub(crate) beginning: VecDeque<(Instant, FlowId)>,
}

impl ComparatorLimits {
    /// Says whether so many bytes and slots of held output are more than what is under way may add to what makes a checkpoint
    /// necessary.
    pub(crate) fn are_passed_twice(&self, bytes: usize, slots: usize) -> bool {
        bytes > self.held_bytes.saturating_mul(2) || slots > self.held_frames.saturating_mul(2)
    }
}

impl Default for ComparatorLimits {
    fn default() -> Self {
        Self {
            held_bytes: limits::HELD_BYTES_MAX,
            held_frames: 65_536,
            pending_bytes: limits::PENDING_BYTES_MAX,
            pending_frames: 65_536,
            flows: limits::FLOWS_MAX,
            unmatched: limits::UNMATCHED_MAX,
            unmatched_min: limits::UNMATCHED_MIN,
            flow_patience: None,
            reorder: Duration::from_millis(1),
            begin: Duration::from_millis(10),
        }
    }
}

impl Comparator {
    /// Makes a comparator that releases at once, until [`Comparator::protect`].
    #[must_use]
    pub fn new(limits: ComparatorLimits, first_epoch: Epoch) -> Self {
        Self {
            limits,
            mode: Mode::Syncing,
            running: first_epoch,
            running_mode: EpochMode::default(),
            uncommitted: None,
            uncommitted_mode: EpochMode::default(),
            committed: None,
            loaded_at: None,
            diverged: None,
            hold: Hold::default(),
            shared: Shared::default(),
            flows: FlowTable::new(limits.flows, 0),
            touched: Vec::new(),
            early: VecDeque::new(),
            early_bytes: 0,
            waiting: VecDeque::new(),
            suspects: VecDeque::new(),
            crossings: Crossings::default(),
            lag: LagMeter::default(),
            services: Services::default(),
            pending: Pending::default(),
            counters: Counters::default(),
            behind: false,
            buffered: Vec::new(),
            waits_for_commit: false,
            beginning: VecDeque::new(),
        }
    }

    /// Finds flows by a digest that is keyed with this secret, so that nobody outside can make flows that are slow to find.
    /// To be given before the first frame.
    #[must_use]
    pub fn keyed(self, secret: u64) -> Self {
        Self {
            flows: FlowTable::new(self.limits.flows, secret),
            ..self
        }
    }

    /// Takes a frame that the primary's guest sent in the epoch now running.
    pub fn primary_output(&mut self, now: Instant, frame: impl Into<Leaving>, verdicts: &mut Vec<Verdict>) {
        let Leaving { wire, parsed } = frame.into();
        self.take_primary(now, wire, &parsed, verdicts);
    }

    /// Takes a frame that the secondary's guest sent in `epoch`.
    pub fn secondary_output(&mut self, now: Instant, epoch: Epoch, frame: Bytes, verdicts: &mut Vec<Verdict>) {
        if epoch > self.running {
            verdicts.push(Verdict::Violation(format!(
                "the secondary sent output of epoch {epoch}, but the primary has only reached {}",
                self.running
            )));
            return;
        }
        if frame.len() > limits::FRAME_BYTES_MAX {
            verdicts.push(Verdict::Violation(format!(
                "the secondary sent a frame of {} bytes",
                frame.len()
            )));
            return;
        }
        if self.mode != Mode::Comparing || self.committed.is_some_and(|committed| epoch <= committed) {
            self.counters.stale += 1;
            return;
        }
        if self.mode_of(epoch) == EpochMode::Buffered {
            verdicts.push(Verdict::Violation(format!(
                "the secondary sent output of epoch {epoch}, in which its guest does not run"
            )));
            return;
        }
        self.catch_up_if_behind(now, verdicts);
        if self.is_pending_full() {
            // Losing the secondary's output is safe: the primary's waits for the commit.
            let is_early = self.uncommitted.is_some_and(|stopped| epoch > stopped);
            let epoch = if is_early { self.running } else { self.comparing() };
            self.diverge(now, epoch, None, Reason::Limit(Limit::Pending), verdicts);
            return;
        }
        if self.uncommitted.is_some_and(|stopped| epoch > stopped) {
            self.early_bytes += frame.len();
            self.early.push_back((now, self.shared.pool.copy(&frame)));
            return;
        }
        self.take_secondary(now, &frame, verdicts);
    }

    /// Returns the mode.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Returns the epoch that the primary's guest runs in.
    #[must_use]
    pub fn running(&self) -> Epoch {
        self.running
    }

    /// Returns whether the secondary's guest runs an epoch that is not committed.
    fn mode_of(&self, epoch: Epoch) -> EpochMode {
        if self.uncommitted.is_some_and(|stopped| epoch <= stopped) {
            self.uncommitted_mode
        } else {
            self.running_mode
        }
    }

    /// Says whether no more output of the primary's guest should be taken until a commit. Between the
    /// divergence that a limit tells and this there is as much room again, for what is under way.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.limits.are_passed_twice(self.hold.bytes(), self.hold.slots())
    }

    /// Tells a divergence, at most one for an epoch, and none for an epoch that is being checkpointed.
    pub(crate) fn diverge(
        &mut self,
        now: Instant,
        epoch: Epoch,
        flow: Option<FlowKey>,
        reason: Reason,
        verdicts: &mut Vec<Verdict>,
    ) {
        if let Reason::Limit(_) = reason {
            self.counters.limited += 1;
        } else if let Some(key) = &flow {
            self.counters.of_mut(key.class.traffic()).diverged(&reason);
            let lane = self.flows.find(key).and_then(|id| self.flows.get_mut(id));
            if let Some(lane) = lane {
                lane.diverged(&reason);
                if let Some(patience) = &self.limits.flow_patience {
                    lane.differed(now, epoch, &patience.of_flows());
                    if let Some(service) = lane.service()
                        && lane.is_news_to_service()
                    {
                        self.services.differed(now, epoch, service, &patience.of_services());
                    }
                }
            }
        }
        if self.uncommitted == Some(epoch) || self.diverged == Some(epoch) {
            return;
        }
        self.diverged = Some(epoch);
        verdicts.push(Verdict::Diverged(Divergence { epoch, flow, reason }));
    }

    /// Says whether what is said on a flow waits for commits, uncompared.
    pub(crate) fn is_buffered(&self, id: FlowId) -> bool {
        let lane = self.flows.get(id);
        lane.is_some_and(|lane| lane.is_buffered() || self.services.is_buffered(lane.service()))
    }

    /// Says whether a divergence was told for the running epoch.
    pub(crate) fn has_diverged(&self) -> bool {
        self.diverged == Some(self.running)
    }

    /// Returns the epoch whose output is being compared.
    pub(crate) fn comparing(&self) -> Epoch {
        self.uncommitted.unwrap_or(self.running)
    }

    fn lane(&mut self, parsed: &Frame) -> Option<FlowId> {
        let id = match self.flows.find(&parsed.key) {
            Some(id) => id,
            None => self.flows.insert(Lane::new(parsed))?,
        };
        if let Some(lane) = self.flows.get_mut(id) {
            lane.used = true;
        }
        Some(id)
    }

    /// Puts a held frame, for which there was no room in the flow table, into its flow.
    fn late_lane(&mut self, serial: u64, parsed: &Frame) -> Option<FlowId> {
        let id = self.lane(parsed)?;
        self.hold.assign(serial, id);
        self.flows.get_mut(id)?.push(serial);
        Some(id)
    }

    fn touch(&mut self, id: FlowId) {
        if let Some(lane) = self.flows.get_mut(id)
            && !std::mem::replace(&mut lane.touched, true)
        {
            self.touched.push(id);
        }
    }

    /// Keeps up with the primary's streams and unfinished datagrams while its output leaves at once.
    fn follow(&mut self, now: Instant, parsed: &Frame, why: Why) {
        let id = match parsed.body {
            // There is nothing to know of those; a flow that was known before counts them.
            Body::Whole(_) => self.flows.find(&parsed.key),
            _ => self.lane(parsed),
        };
        if let Some(lane) = id.and_then(|id| self.flows.get_mut(id)) {
            lane.tally.left(why, false);
            match &parsed.body {
                Body::Tcp(segment) => lane.follow(segment, None),
                Body::Fragment(fragment) => lane.follow_fragment(now, fragment),
                Body::Whole(_) => {}
            }
        }
    }

    fn take_primary(&mut self, now: Instant, frame: Bytes, parsed: &Frame, verdicts: &mut Vec<Verdict>) {
        self.catch_up_if_behind(now, verdicts);
        if self.mode != Mode::Comparing {
            let why = Why::Unprotected;
            self.follow(now, parsed, why);
            self.counters.of_mut(parsed.key.class.traffic()).left(why, false);
            verdicts.push(Verdict::Release(frame, why));
            return;
        }
        let flow = self.lane(parsed);
        let serial = self.hold.push(HeldFrame {
            frame,
            arrived: now,
            epoch: self.running,
            flow,
            begun: None,
        });
        if let Some(id) = flow {
            let comparing = self.running_mode == EpochMode::Lockstep
                && (self.uncommitted.is_none() || mutants::on(Mutant::MatchAcrossEpochs));
            let buffered = comparing && self.is_buffered(id);
            self.waits_for_commit |= buffered;
            if comparing && !buffered {
                self.touch(id);
                self.compare_primary(now, id, serial, parsed, Lane::take, verdicts);
                self.settle(now, id, verdicts);
                self.note_opening(now, id, Role::Primary);
            } else if let Some(lane) = self.flows.get_mut(id) {
                lane.push(serial);
            }
        } else {
            self.diverge(
                now,
                self.running,
                Some(parsed.key),
                Reason::Limit(Limit::Flows),
                verdicts,
            );
        }
        if self.hold.bytes() > self.limits.held_bytes || self.hold.slots() > self.limits.held_frames {
            self.diverge(now, self.running, None, Reason::Limit(Limit::Held), verdicts);
        }
    }

    /// Compares a held frame of the primary as its flow does it.
    fn compare_primary(
        &mut self,
        now: Instant,
        id: FlowId,
        serial: u64,
        parsed: &Frame,
        compare: impl FnOnce(&mut Lane, Instant, u64, &Frame, &Bytes, &mut Shared) -> Result<(), Reason>,
        verdicts: &mut Vec<Verdict>,
    ) {
        let (Some(lane), Some(held)) = (self.flows.get_mut(id), self.hold.get(serial)) else {
            return;
        };
        let before = lane.pending();
        let result = compare(lane, now, serial, parsed, &held.frame, &mut self.shared);
        let (key, after) = (lane.key(), lane.pending());
        self.pending.change(before, after);
        if let Err(reason) = result {
            self.diverge(now, self.comparing(), Some(key), reason, verdicts);
        }
    }

    fn take_secondary(&mut self, now: Instant, frame: &[u8], verdicts: &mut Vec<Verdict>) {
        let parsed = frame::parse(frame);
        let Some(id) = self.lane(&parsed) else {
            self.diverge(
                now,
                self.comparing(),
                Some(parsed.key),
                Reason::Limit(Limit::Flows),
                verdicts,
            );
            return;
        };
        if self.is_buffered(id) {
            self.counters.unasked += 1;
            return;
        }
        self.touch(id);
        let Some(lane) = self.flows.get_mut(id) else { return };
        let before = lane.pending();
        let result = lane.secondary(now, &parsed, frame, &self.hold, &mut self.shared);
        let (key, after) = (lane.key(), lane.pending());
        if after.0 > before.0 || lane.waits_since() == Some(now) {
            self.waiting.push_back((now, id));
        }
        self.pending.change(before, after);
        if let Err(reason) = result {
            self.diverge(now, self.comparing(), Some(key), reason, verdicts);
        }
        self.settle(now, id, verdicts);
        self.note_opening(now, id, Role::Secondary);
    }

    /// Lets leave what may, lets both sides go on to a new connection, and notes what is left unequal.
    fn settle(&mut self, now: Instant, id: FlowId, verdicts: &mut Vec<Verdict>) {
        loop {
            let Some(lane) = self.flows.get_mut(id) else { return };
            while let Some(next) = lane.next_to_leave() {
                let Some(held) = self.hold.take(next.serial) else { break };
                let (why, has_waited) = (next.why(), held.arrived != now);
                lane.tally.left(why, has_waited);
                let traffic = lane.key().class.traffic();
                self.counters.of_mut(traffic).left(why, has_waited);
                if let Some(loaded) = self.loaded_at {
                    self.lag.matched(now, now.since(held.arrived.max(loaded)));
                }
                self.counters.lowered += u64::from(next.leave.is_lowered());
                verdicts.push(Verdict::Release(lane.pass(&next, held.frame), why));
            }
            verdicts.extend(lane.pay().map(|frame| Verdict::Release(frame, Why::Owed)));
            let before = lane.pending();
            let unblocked = lane.unblock(now, &self.hold, &mut self.shared);
            let (key, after) = (lane.key(), lane.pending());
            self.pending.change(before, after);
            match unblocked {
                Unblocked::Nothing => break,
                Unblocked::Restarted => {}
                Unblocked::Diverged(reason) => {
                    self.diverge(now, self.comparing(), Some(key), reason, verdicts);
                    break;
                }
            }
        }
        if let Some(lane) = self.flows.get_mut(id) {
            if lane.becomes_suspect() {
                self.suspects.push_back((now, id));
            }
            if lane.comes_to_wait(&self.hold) {
                self.beginning.push_back((now, id));
            }
            lane.rest(&mut self.shared);
        }
        self.tidy();
    }

    /// Drops outdated entries of the time-ordered queues.
    pub(crate) fn tidy(&mut self) {
        while let Some(&(at, id)) = self.waiting.front() {
            if self
                .flows
                .get(id)
                .and_then(Lane::waits_since)
                .is_some_and(|since| since <= at)
            {
                break;
            }
            self.waiting.pop_front();
        }
        while let Some(&(_, id)) = self.suspects.front() {
            if self.flows.get(id).is_some_and(Lane::is_suspect) {
                break;
            }
            if let Some(lane) = self.flows.get_mut(id) {
                lane.suspected = false;
            }
            self.suspects.pop_front();
        }
        while let Some(&(_, id)) = self.beginning.front() {
            let lane = self.flows.get_mut(id);
            if lane.as_ref().is_some_and(|lane| lane.may_begin(&self.hold).is_some()) {
                break;
            }
            if let Some(lane) = lane {
                lane.begins = false;
            }
            self.beginning.pop_front();
        }
    }

    /// Releases the oldest held frame without an equal, and lets its flow follow it.
    pub(crate) fn release_unequal(&mut self, serial: u64, why: Why, verdicts: &mut Vec<Verdict>) {
        let Some(held) = self.hold.take(serial) else { return };
        if let Some(id) = held.flow {
            self.touch(id);
        }
        let lane = held.flow.and_then(|id| self.flows.get_mut(id));
        let (class, frame) = match lane {
            Some(lane) => {
                lane.tally.left(why, true);
                let frame = lane.pass_unequal(serial, held.arrived, held.frame, &mut self.shared.said);
                (lane.key().class, frame)
            }
            None => (frame::parse(&held.frame).key.class, held.frame),
        };
        self.counters.of_mut(class.traffic()).left(why, true);
        verdicts.push(Verdict::Release(frame, why));
    }

    pub(crate) fn catch_up_if_behind(&mut self, now: Instant, verdicts: &mut Vec<Verdict>) {
        if std::mem::take(&mut self.behind) {
            self.catch_up(now, verdicts);
        }
    }

    /// Compares what has waited, uncompared, for an earlier epoch.
    pub(crate) fn catch_up(&mut self, now: Instant, verdicts: &mut Vec<Verdict>) {
        if self.running_mode == EpochMode::Buffered {
            return;
        }
        for serial in self.hold.serials() {
            let Some((flow, frame)) = self.hold.get(serial).map(|held| (held.flow, held.frame.clone())) else {
                continue;
            };
            if flow.is_some_and(|id| !self.flows.get(id).is_some_and(|lane| lane.is_next_raw(serial))) {
                continue;
            }
            let parsed = frame::parse(&frame);
            let Some(id) = flow.or_else(|| self.late_lane(serial, &parsed)) else {
                continue;
            };
            if self.is_buffered(id) {
                self.waits_for_commit = true;
                continue;
            }
            self.touch(id);
            self.compare_primary(now, id, serial, &parsed, Lane::primary, verdicts);
            self.settle(now, id, verdicts);
            self.note_opening(now, id, Role::Primary);
        }
        self.early_bytes = 0;
        for (arrived, frame) in std::mem::take(&mut self.early) {
            self.take_secondary(arrived, &frame, verdicts);
        }
    }

    fn is_pending_full(&self) -> bool {
        let pending = self.pending();
        pending.bytes > self.limits.pending_bytes
            || pending.frames > self.limits.pending_frames
            || self.waiting.len() > self.limits.pending_frames.saturating_mul(2)
    }

    pub(crate) fn forget_secondary(&mut self) {
        self.waiting.clear();
        self.suspects.clear();
        self.crossings.clear();
        self.forget_beginning();
        self.early.clear();
        self.early_bytes = 0;
        self.pending = Pending::default();
        self.loaded_at = None;
    }
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Syncing => "syncing",
            Self::Comparing => "comparing",
            Self::Alone => "alone",
        })
    }
}

#[cfg(test)]
mod conversations;
#[cfg(test)]
mod frames_tests;
#[cfg(test)]
mod golden;
#[cfg(test)]
mod modes_tests;
#[cfg(test)]
mod order_tests;
#[cfg(test)]
pub(crate) mod properties;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod streams_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod waiting_tests;
