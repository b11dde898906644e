//! Inputs in front of the guest, and how far it has come with them.
//!
//! They are numbered over all network cards, and each card's guest takes them in their order; but a card may have to wait for the
//! guest's buffers while another goes on. What is confirmed, and so may be forgotten, are all up to a number.

use std::collections::VecDeque;

use checkpoint::{InputNumber, Nic};

/// The numbers of what the guest has not consumed, by card.
#[derive(Debug)]
pub(super) struct Inputs {
    cards: Vec<VecDeque<InputNumber>>,
    delivered: InputNumber,
}

impl Inputs {
    pub(super) fn new(cards: usize) -> Self {
        Self {
            cards: vec![VecDeque::new(); cards],
            delivered: InputNumber(0),
        }
    }

    /// An input is put in front of a card.
    pub(super) fn delivered(&mut self, nic: Nic, number: InputNumber) {
        self.cards[nic.index()].push_back(number);
        self.delivered = number;
    }

    /// A card's guest has consumed this input. Returns the one up to which all have been consumed.
    pub(super) fn consumed(&mut self, nic: Nic, number: InputNumber) -> InputNumber {
        let waiting = &mut self.cards[nic.index()];
        while waiting.front().is_some_and(|first| *first <= number) {
            waiting.pop_front();
        }
        let oldest = self.cards.iter().filter_map(|waiting| waiting.front()).min();
        oldest.map_or(self.delivered, |oldest| InputNumber(oldest.0 - 1))
    }

    /// A checkpoint is loaded that has consumed all up to this one.
    pub(super) fn loaded(&mut self, number: InputNumber) {
        self.cards.iter_mut().for_each(VecDeque::clear);
        self.delivered = number;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_input_counts_once_all_before_it_are_consumed_on_every_card() {
        let [first, second] = [0, 1].map(|number| Nic::new(number).unwrap());
        let mut inputs = Inputs::new(2);
        for (number, nic) in (1..).zip([first, second, first, second]) {
            inputs.delivered(nic, InputNumber(number));
        }
        assert_eq!(inputs.consumed(second, InputNumber(2)), InputNumber(0));
        assert_eq!(inputs.consumed(second, InputNumber(4)), InputNumber(0));
        assert_eq!(inputs.consumed(first, InputNumber(1)), InputNumber(2));
        assert_eq!(inputs.consumed(first, InputNumber(3)), InputNumber(4));
        inputs.delivered(first, InputNumber(5));
        inputs.loaded(InputNumber(9));
        inputs.delivered(second, InputNumber(10));
        assert_eq!(inputs.consumed(second, InputNumber(10)), InputNumber(10));
    }
}
