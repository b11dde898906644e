//! The comparator's clock: how long output may wait for its equal.

use checkpoint::{Duration, EpochMode, Instant, Role};

use crate::comparator::{Comparator, Mode};
use crate::flow::FlowKey;
use crate::hold::HeldFrame;
use crate::lane::Lane;
use crate::verdict::{Reason, Verdict};

impl Comparator {
    /// Returns when to call [`Comparator::timeout`].
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        if self.behind {
            return Some(Instant::default());
        }
        let loaded = self.counting_since()?;
        let bound = |arrived: Instant| arrived.max(loaded) + self.limits.unmatched;
        let primary = self.oldest_compared().map(|held| bound(held.arrived));
        let secondary = self.waiting.front().map(|(arrived, _)| bound(*arrived));
        let suspect = self.suspects.front().map(|(since, _)| *since + self.limits.reorder);
        [primary, secondary, suspect].into_iter().flatten().min()
    }

    /// Tells a divergence if output of either side has waited too long.
    pub fn timeout(&mut self, now: Instant, verdicts: &mut Vec<Verdict>) {
        self.catch_up_if_behind(now, verdicts);
        self.tidy();
        let Some(loaded) = self.counting_since() else { return };
        if let Some((key, reason)) = self.suspect_at(now).or_else(|| self.unmatched_at(now, loaded)) {
            self.diverge(now, self.running, key, reason, verdicts);
        }
    }

    /// Returns when the secondary began to run in the epoch being compared; nothing if no bound counts now.
    fn counting_since(&self) -> Option<Instant> {
        let compares = self.mode == Mode::Comparing && self.running_mode == EpochMode::Lockstep;
        if !compares || self.uncommitted.is_some() || self.has_diverged() {
            return None;
        }
        self.loaded_at
    }

    /// Returns the oldest frame of the primary, unless that waits for a commit: then one is due before any equal is late.
    fn oldest_compared(&self) -> Option<&HeldFrame> {
        let (_, held) = self.hold.oldest()?;
        let lane = held.flow.and_then(|id| self.flows.get(id));
        (!lane.is_some_and(Lane::is_buffered)).then_some(held)
    }

    fn suspect_at(&mut self, now: Instant) -> Option<(Option<FlowKey>, Reason)> {
        while let Some(&(since, id)) = self.suspects.front() {
            if now < since + self.limits.reorder {
                return None;
            }
            self.suspects.pop_front();
            if let Some(lane) = self.flows.get_mut(id) {
                lane.suspected = false;
                if lane.is_suspect()
                    && let Some(reason) = lane.difference(&self.hold)
                {
                    return Some((Some(lane.key()), reason));
                }
            }
        }
        None
    }

    fn unmatched_at(&self, now: Instant, loaded: Instant) -> Option<(Option<FlowKey>, Reason)> {
        let late = |arrived: Instant| -> Option<Duration> {
            (now >= arrived.max(loaded) + self.limits.unmatched).then(|| now.since(arrived.max(loaded)))
        };
        let key = |id| self.flows.get(id).map(Lane::key);
        if let Some(held) = self.oldest_compared()
            && let Some(waited) = late(held.arrived)
        {
            return Some((
                held.flow.and_then(key),
                Reason::Unmatched {
                    side: Role::Primary,
                    waited,
                },
            ));
        }
        let (arrived, id) = *self.waiting.front()?;
        let waited = late(arrived)?;
        Some((
            key(id),
            Reason::Unmatched {
                side: Role::Secondary,
                waited,
            },
        ))
    }
}
