//! What the own guest does: frames, inputs, disk writes, its end. And what may leave to the clients.

use smallvec::SmallVec;

use super::{
    ANNOUNCE_AFTER, Action, Bytes, Delivery, DiskWrite, EpochMode, GoodbyeReason, GuestEnd, Input, Instant, Liveness,
    Message, Mutant, Nic, Outcome, Place, Primary, Reason, Report, State, Trigger, Verdict, Written, mutants, proxy,
};

/// Divergences that the operator can look back at.
const DIVERGENCES_KEPT: usize = 32;

impl Primary {
    pub(super) fn guest_sent(&mut self, now: Instant, nic: Nic, frame: Bytes, actions: &mut Vec<Action>) {
        self.counters.outputs += 1;
        let frame = self.network.leaving(nic, frame);
        let epoch = self.epoch;
        self.seen.see(now, nic, frame.wire(), Place::Primary, || {
            format!("sent in epoch {epoch}")
        });
        self.comparators.primary_output(now, nic, frame);
        self.act_on_verdicts(now, actions);
        self.stand_if_full(actions);
    }

    pub(super) fn input_consumed(&mut self, now: Instant, delivery: Delivery, actions: &mut Vec<Action>) {
        self.counters.inputs += 1;
        if !self.mirroring() {
            return;
        }
        self.input = self.input.next();
        self.unconfirmed.add(delivery.wire.len());
        let input = Input {
            tag: self.tag(),
            number: self.input,
            nic: delivery.nic,
            frame: delivery.wire,
        };
        actions.push(Action::Send(Message::Input(input)));
        self.hold_input(actions);
        // A guest that does not run confirms at a load only; one that takes no frames, too.
        let share = match self.epoch_mode {
            EpochMode::Buffered => 2,
            EpochMode::Lockstep => 1,
        };
        if self.has_inputs(share) {
            self.trigger(now, Trigger::Limit, actions);
        }
    }

    pub(super) fn guest_wrote(&mut self, now: Instant, offset: u64, written: Written, actions: &mut Vec<Action>) {
        if matches!(written, Written::Data(_)) || !mutants::on(Mutant::ForgetDiscards) {
            self.changed.mark(offset, written.len());
        }
        let stopping = matches!(self.state, State::Stopping { .. });
        if !self.mirroring() || (stopping && mutants::on(Mutant::MirrorStopsAtTrigger)) {
            return;
        }
        self.write_bytes += storage::footprint(offset, &written);
        let write = DiskWrite {
            tag: self.tag(),
            offset,
            written,
        };
        self.totals.write(&write).expect("the sums are of the running epoch");
        actions.push(Action::Send(Message::Write(write)));
        if self.write_bytes >= self.options.room.written_bytes {
            self.trigger(now, Trigger::Limit, actions);
            self.stand_if_full(actions);
        }
    }

    pub(super) fn guest_stopped(&mut self, now: Instant, end: GuestEnd, actions: &mut Vec<Action>) {
        let reason = match end {
            GuestEnd::PowerOff => GoodbyeReason::PowerOff,
            GuestEnd::Reset => GoodbyeReason::Failed("the guest asked for a reset; start it again".to_owned()),
            GuestEnd::Crashed(reason) => GoodbyeReason::Failed(format!("the guest crashed: {reason}")),
        };
        self.end(now, reason, actions);
    }

    /// This host can't run the VM: the secondary, which can, is left to win the witness.
    pub(super) fn vm_failed(&mut self, reason: String, actions: &mut Vec<Action>) {
        actions.push(Action::CloseLink);
        self.finish(Outcome::Failed(reason), actions);
    }

    pub(super) fn act_on_verdicts(&mut self, now: Instant, actions: &mut Vec<Action>) {
        for nic in Nic::all(self.comparators.count()) {
            if !self.comparators.verdicts(nic).is_empty() {
                self.act_on_verdicts_of(now, nic, actions);
            }
        }
    }

    fn act_on_verdicts_of(&mut self, now: Instant, nic: Nic, actions: &mut Vec<Action>) {
        let mut frames = SmallVec::new();
        let mut trigger = None;
        let mut violation = None;
        let cards = self.comparators.count();
        for verdict in self.comparators.verdicts(nic).drain(..) {
            match verdict {
                Verdict::Release(frame, why) => {
                    self.seen.see(now, nic, &frame, Place::Released, || why.to_string());
                    frames.push(frame);
                }
                Verdict::Diverged(divergence) => {
                    trigger = Some(match divergence.reason {
                        Reason::Mismatch(_) => {
                            self.counters.divergences += 1;
                            Trigger::Mismatch
                        }
                        Reason::Unmatched { .. } => Trigger::Unmatched,
                        Reason::Limit(_) => Trigger::Limit,
                    });
                    let note = if cards == 1 {
                        divergence.to_string()
                    } else {
                        format!("{nic}: {divergence}")
                    };
                    self.seen.note(&note);
                    actions.push(Action::Report(Report::Note(note)));
                    self.divergences.truncate(DIVERGENCES_KEPT - 1);
                    self.divergences.push_front((now, nic, divergence));
                }
                Verdict::Violation(what) => violation = Some(what),
            }
        }
        let by = if mutants::on(Mutant::ReleaseOnFirstCard) {
            Nic::FIRST
        } else {
            nic
        };
        self.transmit(by, frames, self.lease(), actions);
        if let Some(what) = violation {
            self.misbehaved(now, &what, actions);
        }
        if let Some(trigger) = trigger {
            self.trigger(now, trigger, actions);
        }
    }

    pub(super) fn transmit(
        &self,
        nic: Nic,
        frames: SmallVec<[Bytes; 1]>,
        not_after: Option<Instant>,
        actions: &mut Vec<Action>,
    ) {
        if !frames.is_empty() {
            actions.push(Action::Transmit { nic, frames, not_after });
        }
    }

    pub(super) fn announce(&mut self, now: Instant, actions: &mut Vec<Action>) {
        let Some((start, next)) = self.announce else { return };
        if start + ANNOUNCE_AFTER[next] > now {
            return;
        }
        // While contending nothing leaves; the next repetition may.
        let early = mutants::on(Mutant::AnnounceBeforeWinning);
        if early || !matches!(self.state, State::Contending) {
            let lease = if early { None } else { self.lease() };
            for (nic, announcements) in self.network.announcements() {
                for frame in &announcements {
                    let why = || "announces where the VM is".to_owned();
                    self.seen.see(now, nic, frame, Place::Released, why);
                }
                self.transmit(nic, announcements.into(), lease, actions);
            }
        }
        self.announce = (next + 1 < ANNOUNCE_AFTER.len()).then_some((start, next + 1));
    }

    /// Returns until when output may leave, if that is bounded: as soon as the peer may contend.
    pub(super) fn lease(&self) -> Option<Instant> {
        let leased_until = self.liveness.as_ref().map_or(Instant(0), Liveness::lease_until);
        self.contest.release_until(leased_until)
    }

    pub(super) fn hold_input(&mut self, actions: &mut Vec<Action>) {
        let hold = self.mirroring() && self.has_inputs(1) && !mutants::on(Mutant::OutrunTheInputs);
        if hold != self.input_held {
            self.input_held = hold;
            actions.push(Action::HoldInput(hold));
        }
    }

    /// Tells whether the network has been told to wait.
    #[must_use]
    pub fn is_input_held(&self) -> bool {
        self.input_held
    }

    /// Output is compared: the secondary has a VM that follows.
    pub(crate) fn protected(&self) -> bool {
        self.comparators.mode() == proxy::Mode::Comparing
            && matches!(
                self.state,
                State::Protected { .. }
                    | State::Stopping { .. }
                    | State::Copying(_)
                    | State::Sending(_)
                    | State::Awaiting(_)
            )
    }

    /// Inputs and disk writes go to the secondary as they happen.
    pub(super) fn mirroring(&self) -> bool {
        self.protected()
    }
}
