//! What the clients did and saw, and whether one register after the other could explain it.
//!
//! Every operation is a call and a return. Linearizability is judged by stateright's tester, for each register by itself (it is
//! compositional) and for each stretch between moments at which nothing is under way on that register: every answer
//! tells the old or the new value, so a stretch that can be explained has one end, from which the next one begins.

use std::collections::BTreeMap;

use stateright::semantics::{ConsistencyTester, LinearizabilityTester, SequentialSpec};

use crate::ops::{KEYS, Op};

/// A register as it ought to be. That a repeated request changes nothing is part of it: each is in the history once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Register(u64);

impl SequentialSpec for Register {
    type Op = Op;
    type Ret = u64;

    fn invoke(&mut self, op: &Op) -> u64 {
        let (value, answer) = op.apply(self.0);
        self.0 = value;
        answer
    }
}

/// Who calls: a client, with one request for a register at a time.
pub type Caller = u8;

#[derive(Clone, Copy, Debug)]
enum Event {
    Call(Caller, Op),
    Return(Caller, u64),
}

/// One register's stretch.
#[derive(Clone, Debug, Default)]
struct Stretch {
    /// Before it.
    register: Register,
    events: Vec<Event>,
    open: usize,
    /// The value before it is not known: nothing is judged.
    unknown: bool,
}

/// The record.
#[derive(Clone, Debug)]
pub struct History {
    stretches: Vec<Stretch>,
    /// Calls that were answered.
    pub answers: u64,
    /// Calls.
    pub calls: u64,
    /// Lines that the log's host has, by client and request, and the answers that clients have to such requests.
    lines: BTreeMap<(u8, u32), u64>,
    logged: BTreeMap<(u8, u32), u64>,
}

impl Default for History {
    fn default() -> Self {
        Self {
            stretches: vec![Stretch::default(); usize::from(KEYS)],
            answers: 0,
            calls: 0,
            lines: BTreeMap::new(),
            logged: BTreeMap::new(),
        }
    }
}

impl History {
    /// A client sends a request for the first time.
    pub fn call(&mut self, caller: Caller, key: u8, op: Op) {
        let stretch = &mut self.stretches[usize::from(key)];
        stretch.push(Event::Call(caller, op));
        stretch.open += 1;
        self.calls += 1;
    }

    /// It has the answer.
    pub fn returned(&mut self, caller: Caller, key: u8, value: u64) {
        let stretch = &mut self.stretches[usize::from(key)];
        stretch.push(Event::Return(caller, value));
        stretch.open -= 1;
        self.answers += 1;
        if stretch.open == 0 {
            stretch.check(key);
        }
    }

    /// It has the answer to a request of which the guest was to write a line.
    pub fn returned_logged(&mut self, client: u8, id: u32, value: u64) {
        self.logged.insert((client, id), value);
        self.compare_log(client, id);
    }

    /// The log's host has a line; a guest that lives on writes each once.
    pub fn line(&mut self, client: u8, id: u32, value: u64, once: bool) {
        let before = self.lines.insert((client, id), value);
        assert!(
            before.is_none() || !once,
            "rule 4: request {id} of client {client} is in the log twice"
        );
        self.compare_log(client, id);
    }

    fn compare_log(&self, client: u8, id: u32) {
        if let (Some(line), Some(answer)) = (self.lines.get(&(client, id)), self.logged.get(&(client, id))) {
            assert_eq!(
                line, answer,
                "rule 4: the log says other than the answer to request {id} of client {client}"
            );
        }
    }

    /// Returns an answered request that is not in the log.
    #[must_use]
    pub fn missing_line(&self) -> Option<(u8, u32)> {
        self.logged
            .keys()
            .find(|request| !self.lines.contains_key(request))
            .copied()
    }

    /// The guest goes on from an older state, and was not promised to do otherwise: what was before proves nothing.
    pub fn forget(&mut self) {
        for stretch in &mut self.stretches {
            stretch.events.clear();
            stretch.unknown = true;
        }
        self.lines.clear();
        self.logged.clear();
    }

    /// Tells whether some register's value is not known.
    #[must_use]
    pub fn has_forgotten(&self) -> bool {
        self.stretches.iter().any(|stretch| stretch.unknown)
    }

    /// Learns registers on which nothing is under way.
    pub fn learn(&mut self, value: impl Fn(u8) -> u64) {
        for (key, stretch) in (0..KEYS).zip(&mut self.stretches) {
            if stretch.unknown && stretch.open == 0 {
                stretch.register = Register(value(key));
                stretch.unknown = false;
            }
        }
    }

    /// Returns a register's value; nothing while something is under way.
    #[must_use]
    pub fn value(&self, key: u8) -> Option<u64> {
        let stretch = &self.stretches[usize::from(key)];
        (stretch.open == 0 && !stretch.unknown).then_some(stretch.register.0)
    }

    /// Judges what is left at the end: what is still under way may have happened or not.
    pub fn finish(&mut self) {
        for (key, stretch) in (0..KEYS).zip(&mut self.stretches) {
            stretch.check(key);
        }
    }
}

impl Stretch {
    fn push(&mut self, event: Event) {
        if !self.unknown {
            self.events.push(event);
        }
    }

    fn check(&mut self, key: u8) {
        let events = core::mem::take(&mut self.events);
        if let [Event::Call(_, op), Event::Return(_, value)] = events[..] {
            let before = self.register.clone();
            assert!(
                self.register.is_valid_step(&op, &value),
                "rule 4: register {key} was {before:?} and {op:?} is answered {value}"
            );
            return;
        }
        let mut tester = LinearizabilityTester::new(self.register.clone());
        for event in &events {
            match *event {
                Event::Call(caller, op) => tester.on_invoke(caller, op),
                Event::Return(caller, value) => tester.on_return(caller, value),
            }
            .expect("a caller has one call at a time");
        }
        let Some(order) = tester.serialized_history() else {
            panic!(
                "rule 4: no order of its operations explains register {key} from {:?} on: {events:x?}",
                self.register
            )
        };
        for (op, _) in order {
            self.register.invoke(&op);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Caller = 1;
    const OTHER: Caller = 2;

    #[test]
    fn overlapping_calls_may_be_answered_in_either_order() {
        let mut history = History::default();
        history.call(ONE, 0, Op::Add);
        history.call(OTHER, 0, Op::Swap(70));
        history.returned(ONE, 0, 71);
        history.returned(OTHER, 0, 0);
        assert_eq!(history.value(0), Some(71));
        history.call(ONE, 0, Op::CompareAndSwap(71, 5));
        history.returned(ONE, 0, 71);
        history.call(OTHER, 0, Op::Read);
        assert_eq!(history.value(0), None);
        history.returned(OTHER, 0, 5);
        history.finish();
    }

    #[test]
    fn a_call_under_way_at_the_end_may_have_happened() {
        for seen in [0, 1] {
            let mut history = History::default();
            history.call(ONE, 3, Op::Add);
            history.call(OTHER, 3, Op::Read);
            history.returned(OTHER, 3, seen);
            history.finish();
        }
    }

    fn wrong(record: fn(&mut History)) {
        let mut history = History::default();
        record(&mut history);
    }

    #[test]
    #[should_panic(expected = "rule 4")]
    fn a_lost_change_is_found() {
        wrong(|history| {
            history.call(ONE, 0, Op::Add);
            history.returned(ONE, 0, 1);
            history.call(OTHER, 0, Op::Add);
            history.returned(OTHER, 0, 1);
        });
    }

    #[test]
    #[should_panic(expected = "rule 4")]
    fn a_change_that_happens_twice_is_found() {
        wrong(|history| {
            history.call(ONE, 0, Op::Add);
            history.call(OTHER, 0, Op::Read);
            history.returned(ONE, 0, 1);
            history.returned(OTHER, 0, 2);
        });
    }

    #[test]
    #[should_panic(expected = "rule 4")]
    fn a_read_of_the_past_is_found() {
        wrong(|history| {
            history.call(OTHER, 0, Op::Add);
            history.call(ONE, 0, Op::Swap(9));
            history.returned(ONE, 0, 0);
            history.call(ONE, 0, Op::Read);
            history.returned(ONE, 0, 0);
            history.finish();
        });
    }

    #[test]
    #[should_panic(expected = "in the log twice")]
    fn a_second_line_is_found() {
        wrong(|history| {
            history.line(1, 1, 5, true);
            history.line(1, 1, 5, true);
        });
    }

    #[test]
    #[should_panic(expected = "other than the answer")]
    fn a_line_that_lies_is_found() {
        wrong(|history| {
            history.line(1, 1, 5, true);
            history.returned_logged(1, 1, 6);
        });
    }
}
