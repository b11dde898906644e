//! What the comparator tells about itself: sums, queues and flows.

use checkpoint::Instant;

use crate::comparator::Comparator;
use crate::flow::FlowKey;
use crate::lag::Lag;
use crate::lane::Lane;
use crate::verdict::Reason;

/// What is held of the primary's output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Frames.
    pub frames: usize,
    /// Bytes.
    pub bytes: usize,
    /// When the oldest of them came.
    pub oldest: Option<Instant>,
}

/// What is kept of the secondary's output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pending {
    /// Frames, or pieces of TCP streams.
    pub frames: usize,
    /// Bytes.
    pub bytes: usize,
}

/// Sums over all flows since the comparator was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Flows known now.
    pub flows: usize,
    /// Frames released because the secondary sent the same.
    pub matched: u64,
    /// Those of them whose acknowledgement was lowered.
    pub lowered: u64,
    /// Frames released by a commit.
    pub released_by_commit: u64,
    /// Frames released at once, or on going alone.
    pub released_at_once: u64,
    /// Frames of the secondary on flows that are not compared.
    pub unasked: u64,
    /// Frames of the secondary that came too late for their epoch.
    pub stale: u64,
    /// Differences seen.
    pub mismatched: u64,
    /// Times that output waited too long.
    pub unmatched: u64,
    /// Times that a bound was reached.
    pub limited: u64,
}

/// What is known of one flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowReport {
    /// Its key.
    pub key: FlowKey,
    /// Frames released because the secondary sent the same.
    pub matched: u64,
    /// Differences seen.
    pub mismatched: u64,
    /// Frames that were not released the moment they came.
    pub waits: u64,
    /// Frames held now.
    pub held: usize,
    /// Whether they wait for a commit, uncompared.
    pub buffered: bool,
    /// Frames or pieces of the secondary kept now.
    pub pending: usize,
}

impl Counters {
    /// Adds those of another card.
    pub(crate) fn add(&mut self, other: &Self) {
        self.flows += other.flows;
        self.matched += other.matched;
        self.lowered += other.lowered;
        self.released_by_commit += other.released_by_commit;
        self.released_at_once += other.released_at_once;
        self.unasked += other.unasked;
        self.stale += other.stale;
        self.mismatched += other.mismatched;
        self.unmatched += other.unmatched;
        self.limited += other.limited;
    }

    pub(crate) fn count(&mut self, reason: &Reason) {
        match reason {
            Reason::Mismatch(_) => self.mismatched += 1,
            Reason::Unmatched { .. } => self.unmatched += 1,
            Reason::Limit(_) => self.limited += 1,
        }
    }
}

impl Pending {
    /// Replaces one flow's part.
    pub(crate) fn change(&mut self, before: (usize, usize), after: (usize, usize)) {
        self.frames = (self.frames + after.0).saturating_sub(before.0);
        self.bytes = (self.bytes + after.1).saturating_sub(before.1);
    }
}

impl Comparator {
    /// Returns what is held of the primary's output.
    #[must_use]
    pub fn held(&self) -> Held {
        Held {
            frames: self.hold.frames(),
            bytes: self.hold.bytes(),
            oldest: self.hold.oldest().map(|(_, held)| held.arrived),
        }
    }

    /// Returns what is kept of the secondary's output.
    #[must_use]
    pub fn pending(&self) -> Pending {
        Pending {
            frames: self.pending.frames + self.early.len(),
            bytes: self.pending.bytes + self.early_bytes,
        }
    }

    /// Returns the sums over all flows.
    #[must_use]
    pub fn counters(&self) -> Counters {
        Counters {
            flows: self.flows.len(),
            ..self.counters
        }
    }

    /// Says whether output of the running epoch waits that only its commit can release, though the epoch is compared.
    #[must_use]
    pub fn waits_for_commit(&self) -> bool {
        self.waits_for_commit
    }

    /// Returns how many flows wait for commits, uncompared, those of buffered services aside.
    #[must_use]
    pub fn buffered_flows(&self) -> usize {
        self.buffered.len()
    }

    /// Returns how many services' flows all wait for commits, uncompared.
    #[must_use]
    pub fn buffered_services(&self) -> usize {
        self.services.buffered()
    }

    /// Returns how far the secondary's output trails, and how long output of the primary may wait for it.
    #[must_use]
    pub fn lag(&self) -> Lag {
        Lag {
            most: self.lag.most(),
            matches: self.lag.matches(),
            bound: self.unmatched_bound(),
        }
    }

    /// Returns what is known of each flow, in order of their keys.
    pub fn flows(&self) -> impl Iterator<Item = FlowReport> + '_ {
        let report = |lane: &Lane| FlowReport {
            buffered: lane.is_buffered() || self.services.is_buffered(lane.service()),
            ..lane.report()
        };
        let mut flows: Vec<FlowReport> = self.flows.iter().map(report).collect();
        flows.sort_unstable_by_key(|flow| flow.key);
        flows.into_iter()
    }
}
