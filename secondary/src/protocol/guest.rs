//! What the own guest does: frames and inputs.

use super::{
    Action, Bytes, CONFIRM_EVERY, Delivery, Flight, Message, NetworkPicture, Output, PENDING_OUTPUTS_MAX,
    RECENT_OUTPUTS_MAX, Secondary, Standing,
};

impl Secondary {
    pub(super) fn guest_sent(&mut self, frame: Bytes, actions: &mut Vec<Action>) {
        self.counters.outputs += 1;
        if matches!(self.flight, Flight::Loading(..)) {
            return;
        }
        let frame = self.network.leaving(frame);
        match self.standing() {
            Standing::Following => {
                self.remember(&frame);
                actions.push(Action::Send(Message::Output(Output { tag: self.tag(), frame })));
            }
            Standing::Draining { .. } | Standing::Severed { .. } | Standing::Contending(_) | Standing::Alone
                if self.outputs.len() < PENDING_OUTPUTS_MAX =>
            {
                self.outputs.push(frame);
            }
            _ => {}
        }
    }

    /// Keeps a segment for the takeover: without it the client would wait for the guest's retransmission.
    fn remember(&mut self, frame: &Bytes) {
        if !NetworkPicture::is_repeatable(frame) {
            return;
        }
        if self.recent.len() == RECENT_OUTPUTS_MAX {
            self.recent.pop_front();
        }
        self.recent.push_back(frame.clone());
    }

    pub(super) fn input_consumed(&mut self, delivery: &Delivery, actions: &mut Vec<Action>) {
        self.counters.inputs += 1;
        let Some(number) = delivery.number else { return };
        if self.standing() != Standing::Following || matches!(self.flight, Flight::Loading(..)) {
            return;
        }
        self.consumed = number;
        if self.consumed.0 - self.confirmed.0 >= CONFIRM_EVERY {
            self.confirm(actions);
        }
    }

    pub(super) fn confirm(&mut self, actions: &mut Vec<Action>) {
        if self.consumed > self.confirmed && self.standing() == Standing::Following {
            self.confirmed = self.consumed;
            actions.push(Action::Send(Message::Confirm(self.tag(), self.confirmed)));
        }
    }
}
