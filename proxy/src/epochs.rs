//! The comparator's epochs: when one ends, is committed, loaded or abandoned, and when comparing begins and ends.
//!
//! Called by `primary::protocol` in the order of design: stop, then commit or abandon, then loaded.

use checkpoint::mutants::{self, Mutant};
use checkpoint::{Epoch, EpochMode, Instant};

use crate::comparator::{Comparator, Mode};
use crate::counters::Pending;
use crate::lane::Lane;
use crate::temper::FlowPatience;
use crate::verdict::{Verdict, Why};

impl Comparator {
    /// Ends the running epoch: the primary's guest has stopped, and what it sends next belongs to the next one, which is
    /// run in this mode.
    ///
    /// # Panics
    /// Panics if an epoch is uncommitted already.
    pub fn stop(&mut self, next: EpochMode) -> Epoch {
        let ended = self.running;
        if self.mode == Mode::Comparing {
            assert!(self.uncommitted.is_none(), "at most one epoch is uncommitted");
            self.uncommitted = Some(ended);
            self.uncommitted_mode = self.running_mode;
        }
        self.running = ended.next();
        self.running_mode = next;
        ended
    }

    /// Takes the commit of `epoch`: releases everything held up to it, in order.
    ///
    /// # Panics
    /// Panics if `epoch` has not been stopped.
    pub fn commit(&mut self, now: Instant, epoch: Epoch, verdicts: &mut Vec<Verdict>) {
        if self.mode != Mode::Comparing || self.committed.is_some_and(|committed| epoch <= committed) {
            return;
        }
        assert!(
            self.uncommitted == Some(epoch),
            "epoch {epoch} is committed, but {:?} is open",
            self.uncommitted
        );
        while let Some((serial, held)) = self.hold.oldest() {
            if held.epoch > epoch && !mutants::on(Mutant::ReleaseNextEpoch) {
                break;
            }
            self.release_unequal(serial, Why::Committed(epoch), verdicts);
        }
        // Which flows are compared changes here only: nothing of the next epoch has been compared yet.
        let flows = &mut self.flows;
        let patience = self.limits.flow_patience.as_ref();
        if let Some(patience) = patience {
            self.services.decide(now, &patience.of_services());
        }
        let patience = patience.map(FlowPatience::of_flows);
        let mut waits = |lane: &mut Lane| patience.is_some_and(|patience| lane.is_buffered_after(now, &patience));
        self.buffered.retain(|id| flows.get_mut(*id).is_some_and(&mut waits));
        for id in std::mem::take(&mut self.touched) {
            if let Some(lane) = flows.get_mut(id) {
                verdicts.extend(lane.commit().map(|frame| Verdict::Release(frame, Why::Owed)));
                lane.rest(&mut self.shared);
                if !lane.is_buffered() && waits(lane) {
                    self.buffered.push(id);
                }
            }
        }
        self.waits_for_commit = false;
        self.committed = Some(epoch);
        self.uncommitted = None;
        self.behind = false;
        self.loaded_at = None;
        self.waiting.clear();
        self.suspects.clear();
        self.crossings.clear();
        self.forget_beginning();
        self.pending = Pending::default();
        self.flows.committed();
        self.catch_up(now, verdicts);
    }

    /// Notes that the secondary has loaded `epoch` and runs: only now can it produce output of the next one.
    pub fn loaded(&mut self, now: Instant, epoch: Epoch) {
        if self.mode == Mode::Comparing && self.committed == Some(epoch) {
            self.loaded_at = Some(now);
        }
    }

    /// Joins the uncommitted epoch to the running one, because the link was lost before its commit was known. The
    /// secondary's output since the last commit goes on being compared.
    pub fn abandon(&mut self) {
        if self.uncommitted.take().is_some() {
            self.hold.retag(self.running);
            // A guest that did not run the one has not loaded it, and so does not run the other.
            if self.uncommitted_mode == EpochMode::Buffered {
                self.running_mode = EpochMode::Buffered;
            }
            self.behind = self.running_mode == EpochMode::Lockstep;
        }
    }

    /// Runs alone from here on, as owner of the witness: releases everything held, in order.
    pub fn release_all(&mut self, verdicts: &mut Vec<Verdict>) {
        while let Some((serial, _)) = self.hold.oldest() {
            self.release_unequal(serial, Why::Unprotected, verdicts);
        }
        for id in std::mem::take(&mut self.touched) {
            if let Some(lane) = self.flows.get_mut(id) {
                verdicts.extend(lane.commit().map(|frame| Verdict::Release(frame, Why::Owed)));
            }
        }
        self.forget_secondary();
        self.flows.committed();
        self.waits_for_commit = false;
        self.shared.said.clear();
        self.mode = Mode::Alone;
        self.uncommitted = None;
        self.behind = false;
    }

    /// Holds and compares from `epoch` on, the one now running, which is run in this mode. To be called before the primary's guest may run past
    /// the state that the secondary starts from.
    ///
    /// # Panics
    /// Panics if it compares already, or if `epoch` is in the past.
    pub fn protect(&mut self, epoch: Epoch, mode: EpochMode) {
        assert!(self.mode != Mode::Comparing, "protection begins once");
        assert!(
            epoch >= self.running,
            "epoch {epoch} has passed, {} is running",
            self.running
        );
        self.mode = Mode::Comparing;
        self.running = epoch;
        self.running_mode = mode;
        self.committed = epoch.0.checked_sub(1).map(Epoch);
        self.diverged = None;
        self.forget_secondary();
        for lane in self.flows.iter_mut() {
            let _paid_on_going_alone = lane.commit();
        }
    }
}
