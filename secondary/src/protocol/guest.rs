//! What the own guest does: frames and inputs.

use super::{Action, Bytes, CONFIRM_EVERY, Delivery, Flight, Message, Output, PENDING_OUTPUTS_MAX, Secondary, State};

impl Secondary {
    pub(super) fn guest_sent(&mut self, frame: Bytes, actions: &mut Vec<Action>) {
        self.counters.outputs += 1;
        if matches!(self.flight, Flight::Loading(..)) {
            return;
        }
        let frame = self.network.leaving(frame);
        match self.state {
            State::Following => actions.push(Action::Send(Message::Output(Output { tag: self.tag(), frame }))),
            State::Draining { .. } | State::Severed { .. } | State::Contending { .. }
                if self.outputs.len() < PENDING_OUTPUTS_MAX =>
            {
                self.outputs.push(frame);
            }
            _ => {}
        }
    }

    pub(super) fn input_consumed(&mut self, delivery: &Delivery, actions: &mut Vec<Action>) {
        self.counters.inputs += 1;
        let Some(number) = delivery.number else { return };
        if self.state != State::Following || matches!(self.flight, Flight::Loading(..)) {
            return;
        }
        self.consumed = number;
        if self.consumed.0 - self.confirmed.0 >= CONFIRM_EVERY {
            self.confirm(actions);
        }
    }

    pub(super) fn confirm(&mut self, actions: &mut Vec<Action>) {
        if self.consumed > self.confirmed && self.state == State::Following {
            self.confirmed = self.consumed;
            actions.push(Action::Send(Message::Confirm(self.tag(), self.confirmed)));
        }
    }
}
