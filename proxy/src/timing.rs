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
        let bound = |arrived: Instant, bound| arrived.max(loaded) + bound;
        let primary = self.oldest_compared();
        let primary = primary.map(|held| bound(held.arrived, self.unmatched_bound()));
        let secondary = self.waiting.front();
        let secondary = secondary.map(|(arrived, _)| bound(*arrived, self.limits.unmatched));
        let suspect = self.suspects.front().map(|(since, _)| *since);
        let suspect = suspect.into_iter().chain(self.crossings.oldest()).min();
        let suspect = suspect.map(|since| since + self.limits.reorder);
        [primary, secondary, suspect].into_iter().flatten().min()
    }

    /// Tells a divergence if output of either side has waited too long.
    pub fn timeout(&mut self, now: Instant, verdicts: &mut Vec<Verdict>) {
        self.catch_up_if_behind(now, verdicts);
        self.tidy();
        self.lag.forget(now);
        let Some(loaded) = self.counting_since() else { return };
        let found = self.suspect_at(now).or_else(|| self.crossed_at(now));
        if let Some((key, reason)) = found.or_else(|| self.unmatched_at(now, loaded)) {
            if let Reason::Unmatched {
                side: Role::Primary, ..
            } = reason
            {
                self.lag.exceeded(now, self.unmatched_bound());
            }
            self.diverge(now, self.running, key, reason, verdicts);
        }
    }

    /// Returns how long output of the primary may wait for its equal, by what is known of the secondary. Its own output holds
    /// up no client: the limit itself is its bound.
    pub(crate) fn unmatched_bound(&self) -> Duration {
        self.lag.bound(self.limits.unmatched_min, self.limits.unmatched)
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
        let is_buffered = held.flow.is_some_and(|id| self.is_buffered(id));
        (!is_buffered).then_some(held)
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
        let late = |arrived: Instant, bound: Duration| -> Option<Duration> {
            (now >= arrived.max(loaded) + bound).then(|| now.since(arrived.max(loaded)))
        };
        let key = |id| self.flows.get(id).map(Lane::key);
        if let Some(held) = self.oldest_compared()
            && let Some(waited) = late(held.arrived, self.unmatched_bound())
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
        let waited = late(arrived, self.limits.unmatched)?;
        Some((
            key(id),
            Reason::Unmatched {
                side: Role::Secondary,
                waited,
            },
        ))
    }
}
