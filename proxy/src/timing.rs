//! The comparator's clock: how long output may wait for its equal.

use checkpoint::{Duration, EpochMode, Instant, Role};

use crate::comparator::{Comparator, Mode};
use crate::flow::FlowKey;
use crate::hold::HeldFrame;
use crate::lane::Lane;
use crate::verdict::{Reason, Verdict, Why};

impl Comparator {
    /// Returns when to call [`Comparator::timeout`].
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        if self.behind {
            return Some(Instant::default());
        }
        let loaded = self.counting_since()?;
        let bound = |arrived: Instant, bound| arrived.max(loaded) + bound;
        let primary = self.primary_due(loaded).map(|(due, _)| due);
        let secondary = self.waiting.front();
        let secondary = secondary.map(|(arrived, _)| bound(*arrived, self.limits.unmatched));
        let suspect = self.suspects.front().map(|(since, _)| *since);
        let suspect = suspect.into_iter().chain(self.crossings.oldest()).min();
        let suspect = suspect.map(|since| since + self.limits.reorder);
        let begin = self.beginning.front();
        let begin = begin.map(|(since, _)| bound(*since, self.limits.begin));
        [primary, secondary, suspect, begin].into_iter().flatten().min()
    }

    /// Tells a divergence if output of either side has waited too long.
    pub fn timeout(&mut self, now: Instant, verdicts: &mut Vec<Verdict>) {
        self.catch_up_if_behind(now, verdicts);
        self.tidy();
        self.lag.forget(now);
        let Some(loaded) = self.counting_since() else { return };
        self.begin(now, loaded, verdicts);
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

    /// Returns when the oldest frame of the primary has waited too long, and that frame. When a part of it leaves, the time
    /// that the secondary usually takes begins anew.
    fn primary_due(&self, loaded: Instant) -> Option<(Instant, &HeldFrame)> {
        let held = self.oldest_compared()?;
        let since = held.arrived.max(loaded);
        let begun = held.begun.unwrap_or(since);
        let due = (begun + self.unmatched_bound()).min(since + self.limits.unmatched);
        Some((due, held))
    }

    /// Lets leave what may of segments that have waited for the rest for some time.
    fn begin(&mut self, now: Instant, loaded: Instant, verdicts: &mut Vec<Verdict>) {
        let is_due = |since: Instant| since.max(loaded) + self.limits.begin <= now;
        // Each once: those that wait on are put behind the others.
        for _ in 0..self.beginning.len() {
            let Some(&(since, id)) = self.beginning.front() else {
                break;
            };
            if !is_due(since) {
                break;
            }
            self.beginning.pop_front();
            let Some(lane) = self.flows.get_mut(id) else { continue };
            let Some(arrived) = lane.may_begin(&self.hold) else {
                lane.begins = false;
                continue;
            };
            // What it waited for when it was noted may have left, and this come since.
            if !is_due(arrived) {
                self.beginning.push_back((arrived, id));
                continue;
            }
            if let Some((serial, frame)) = lane.begin(&self.hold) {
                self.hold.begin(serial, now);
                verdicts.push(Verdict::Release(frame, Why::Begun));
            }
            self.beginning.push_back((now, id));
        }
    }

    /// Nothing waits for the rest of anything any more.
    pub(crate) fn forget_beginning(&mut self) {
        for (_, id) in self.beginning.drain(..) {
            if let Some(lane) = self.flows.get_mut(id) {
                lane.begins = false;
            }
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
        if let Some((due, held)) = self.primary_due(loaded)
            && due <= now
        {
            let unknown = || crate::frame::parse(&held.frame).key;
            return Some((
                Some(held.flow.and_then(key).unwrap_or_else(unknown)),
                Reason::Unmatched {
                    side: Role::Primary,
                    waited: now.since(held.arrived.max(loaded)),
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
