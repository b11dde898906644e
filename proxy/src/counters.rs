//! What the comparator tells about itself: sums, queues and flows.

use checkpoint::Instant;

use crate::comparator::Comparator;
use crate::flow::{FlowKey, Traffic};
use crate::lag::Lag;
use crate::lane::Lane;
use crate::verdict::{Difference, Reason, Why};

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

/// What came of the primary's frames: on a flow, or of a kind of traffic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Frames released because the secondary sent the same.
    pub matched: u64,
    /// Frames released by a commit.
    pub committed: u64,
    /// Frames released at once, or on going alone.
    pub unprotected: u64,
    /// Those of them all that were not released the moment they came.
    pub waits: u64,
    /// Differences seen.
    pub mismatched: u64,
    /// Times that output of either side waited too long.
    pub unmatched: u64,
}

/// Sums over all flows since the comparator was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Flows known now.
    pub flows: usize,
    /// Frames that were released because the secondary sent the same, with an acknowledgement that was lowered.
    pub lowered: u64,
    /// Frames of the secondary on flows that are not compared.
    pub unasked: u64,
    /// Frames of the secondary that came too late for their epoch.
    pub stale: u64,
    /// Times that a bound was reached.
    pub limited: u64,
    tallies: [Tally; Traffic::ALL.len()],
}

/// What is known of one flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlowReport {
    /// Its key.
    pub key: FlowKey,
    /// What came of its frames.
    pub tally: Tally,
    /// Frames held now.
    pub held: usize,
    /// Whether they wait for a commit, uncompared.
    pub buffered: bool,
    /// Frames or pieces of the secondary kept now.
    pub pending: usize,
    /// The latest difference.
    pub difference: Option<Difference>,
}

impl Tally {
    /// Adds those of another.
    fn add(&mut self, other: &Self) {
        self.matched += other.matched;
        self.committed += other.committed;
        self.unprotected += other.unprotected;
        self.waits += other.waits;
        self.mismatched += other.mismatched;
        self.unmatched += other.unmatched;
    }

    /// Counts a frame that leaves, for this reason.
    pub(crate) fn left(&mut self, why: Why, has_waited: bool) {
        self.waits += u64::from(has_waited);
        match why {
            Why::Committed(_) => self.committed += 1,
            Why::Unprotected => self.unprotected += 1,
            Why::Equal | Why::Lowered | Why::Again => self.matched += 1,
            // Parts of frames: these are counted as wholes.
            Why::Begun | Why::Owed => {}
        }
    }

    pub(crate) fn diverged(&mut self, reason: &Reason) {
        match reason {
            Reason::Mismatch(_) => self.mismatched += 1,
            Reason::Unmatched { .. } => self.unmatched += 1,
            Reason::Limit(_) => {}
        }
    }

    /// Says whether there was anything to count.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl Counters {
    /// Adds those of another card.
    pub(crate) fn add(&mut self, other: &Self) {
        self.flows += other.flows;
        self.lowered += other.lowered;
        self.unasked += other.unasked;
        self.stale += other.stale;
        self.limited += other.limited;
        for (mine, others) in self.tallies.iter_mut().zip(&other.tallies) {
            mine.add(others);
        }
    }

    /// Returns what came of this kind of traffic, on flows that are not known any more too.
    #[must_use]
    pub fn of(&self, traffic: Traffic) -> &Tally {
        &self.tallies[traffic as usize]
    }

    pub(crate) fn of_mut(&mut self, traffic: Traffic) -> &mut Tally {
        &mut self.tallies[traffic as usize]
    }

    /// Returns what came of all traffic.
    #[must_use]
    pub fn total(&self) -> Tally {
        let mut sum = Tally::default();
        self.tallies.iter().for_each(|one| sum.add(one));
        sum
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
