//! What the own guest does: frames and inputs.

use super::{
    Action, Bytes, CONFIRM_EVERY, Delivery, Flight, InputNumber, Message, Mutant, Nic, Output, PENDING_OUTPUTS_MAX,
    RECENT_OUTPUTS_MAX, Secondary, Standing, mutants,
};

impl Secondary {
    pub(super) fn guest_sent(&mut self, nic: Nic, frame: Bytes, actions: &mut Vec<Action>) {
        self.counters.outputs += 1;
        if matches!(self.flight, Flight::Loading(..)) {
            return;
        }
        let leaving = self.network.leaving(nic, frame);
        let is_repeatable = leaving.is_repeatable();
        let frame = leaving.into_wire();
        match self.standing() {
            Standing::Following => {
                if is_repeatable {
                    self.remember(nic, &frame);
                }
                self.unsent += frame.len();
                let tag = self.tag();
                actions.push(Action::Send(Message::Output(Output { tag, nic, frame })));
                self.hold_output(actions);
            }
            Standing::Draining { .. } | Standing::Severed { .. } | Standing::Contending(_) | Standing::Alone
                if self.outputs.len() < PENDING_OUTPUTS_MAX =>
            {
                self.outputs.push((nic, frame));
            }
            _ => {}
        }
    }

    /// A guest must not outrun the connection: its output would fill this host's memory while the primary can't take it.
    fn hold_output(&mut self, actions: &mut Vec<Action>) {
        if self.unsent >= self.options.unsent_bytes && !self.output_held && !mutants::on(Mutant::OutrunTheData) {
            self.output_held = true;
            actions.push(Action::HoldOutput(true));
        }
    }

    pub(super) fn output_drained(&mut self, actions: &mut Vec<Action>) {
        self.unsent = 0;
        if core::mem::take(&mut self.output_held) {
            actions.push(Action::HoldOutput(false));
        }
    }

    /// Tells whether so much was sent that `OutputDrained` is to be said as soon as it is true.
    #[must_use]
    pub fn awaits_drain(&self) -> bool {
        self.unsent >= self.options.unsent_bytes / 2
    }

    /// Tells whether the guest's network card has been told to wait, as it must be with so much unsent.
    #[must_use]
    pub fn holds_output_if_full(&self) -> bool {
        self.output_held || self.unsent < self.options.unsent_bytes
    }

    /// Keeps a segment for the takeover: without it the client would wait for the guest's retransmission.
    fn remember(&mut self, nic: Nic, frame: &Bytes) {
        if self.recent.len() == RECENT_OUTPUTS_MAX {
            self.recent.pop_front();
        }
        self.recent.push_back((nic, frame.clone()));
    }

    pub(super) fn input_consumed(&mut self, delivery: &Delivery, actions: &mut Vec<Action>) {
        self.counters.inputs += 1;
        let Some(number) = delivery.number else { return };
        if self.standing() != Standing::Following || matches!(self.flight, Flight::Loading(..)) {
            return;
        }
        let number = self.inputs.consumed(delivery.nic, number);
        self.consume(number);
        if self.consumed.0 - self.confirmed.0 >= CONFIRM_EVERY {
            self.confirm(actions);
        }
    }

    pub(super) fn consume(&mut self, number: InputNumber) {
        self.unconsumed.settle(number.0.saturating_sub(self.consumed.0));
        self.consumed = number;
    }

    pub(super) fn confirm(&mut self, actions: &mut Vec<Action>) {
        if self.consumed > self.confirmed && self.standing() == Standing::Following {
            self.confirmed = self.consumed;
            actions.push(Action::Send(Message::Confirm(self.tag(), self.confirmed)));
        }
    }
}
