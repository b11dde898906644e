//! In which order the copied pages of a checkpoint are asked about and encoded.
//!
//! ```text
//!   All:      ask 1 ─► (answer) ask 2, encode 1 ─► (answer) ask 3, encode 2 ─► …       one question is open at a time
//!   Sample:   ask about a few of them, encode the first ones meanwhile ─► (answer) the rest as All, or as Nothing
//!   Nothing:  encode
//! ```
//!
//! While the secondary hashes for one question, this side encodes what the one before has told of, and while it stops, what is spared: nobody waits for long. Nothing
//! is asked before the secondary's VM stands. Pure: knows places in the copy, and neither pages nor time.

use core::ops::Range;
use std::collections::BTreeSet;

use checkpoint::pages::{Question, SAMPLE_PAGES, Tells};

/// Pages of the first question about all of them, so that the answer comes soon, and of the others.
const FIRST_PLACES: usize = 256;
const CHUNK_PLACES: usize = 1_024;
/// Pages that are encoded until an answer is looked for.
const STEP_PLACES: usize = 256;
const SAMPLE_STEP_PLACES: usize = 32;
/// The same where none is awaited: enough for each stream to have a thread for a while.
const UNASKED_STEP_PLACES: usize = 8_192;

/// What is to be done next with the copied pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Ask a question.
    Ask,
    /// Encode the pages at these places.
    Encode(Range<usize>),
    /// Wait for the secondary.
    Wait,
    /// All are encoded.
    Done,
}

/// How far the copied pages of a checkpoint are.
#[derive(Debug)]
pub(crate) struct Comparison {
    asks: Question,
    /// The secondary's VM stands.
    halted: bool,
    total: usize,
    /// Places before this are encoded.
    encoded: usize,
    /// Places before this are asked about.
    asked: usize,
    open: Option<Open>,
    /// What the time until the next answer tells.
    tells: Tells,
    alike: BTreeSet<u64>,
    /// Most places of a question, and of a step where nothing is asked.
    chunk: usize,
    unasked: usize,
}

/// A question that is not answered.
#[derive(Debug)]
struct Open {
    pages: Vec<u64>,
    /// The first of its places.
    from: usize,
}

impl Comparison {
    /// Begins with that many places. A `chunk` bounds the questions.
    pub(crate) fn new(total: usize, asks: Question, chunk: Option<usize>) -> Self {
        Self {
            asks,
            halted: false,
            total,
            encoded: 0,
            asked: match asks {
                Question::All(spared) => total.min(usize::try_from(spared).unwrap_or(usize::MAX)),
                Question::Sample | Question::Nothing => 0,
            },
            open: None,
            tells: if let Question::All(_) = asks {
                Tells::Round
            } else {
                Tells::Nothing
            },
            alike: BTreeSet::new(),
            chunk: chunk.unwrap_or(CHUNK_PLACES),
            unasked: chunk.unwrap_or(UNASKED_STEP_PLACES),
        }
    }

    /// Decides what comes next. Places that it gives to be encoded count as such.
    pub(crate) fn next(&mut self) -> Next {
        let may_ask = self.halted && self.open.is_none();
        let (end, step) = match self.asks {
            Question::All(_) if may_ask && self.asked < self.total => return Next::Ask,
            Question::Sample if may_ask && self.encoded < self.total => return Next::Ask,
            Question::All(_) => (
                self.open.as_ref().map_or(self.asked, |open| open.from),
                STEP_PLACES.min(self.chunk),
            ),
            Question::Sample => (self.total, SAMPLE_STEP_PLACES.min(self.chunk)),
            Question::Nothing => (self.total, self.unasked),
        };
        if self.encoded < end {
            let from = self.encoded;
            self.encoded = end.min(from + step);
            Next::Encode(from..self.encoded)
        } else if self.open.is_some() || (self.asks != Question::Nothing && !self.halted) {
            Next::Wait
        } else {
            Next::Done
        }
    }

    /// The secondary's VM stands.
    pub(crate) fn halted(&mut self) {
        self.halted = true;
    }

    /// Takes the places of the next question; `page` gives the pages at those that are worth asking about. None if there are no
    /// such places left.
    pub(crate) fn question(&mut self, mut page: impl FnMut(usize) -> Option<u64>) -> Option<&[u64]> {
        let (from, pages) = match self.asks {
            Question::Nothing => return None,
            Question::Sample => {
                let (from, few) = (self.encoded, usize::try_from(SAMPLE_PAGES).unwrap_or(1).min(self.chunk));
                let step = (self.total - from).div_ceil(few).max(1);
                let pages: Vec<_> = (from..self.total).step_by(step).filter_map(&mut page).collect();
                if pages.is_empty() {
                    self.asks = Question::Nothing;
                }
                (from, pages)
            }
            Question::All(_) => loop {
                let chunk = if self.tells == Tells::Round {
                    self.chunk.min(FIRST_PLACES)
                } else {
                    self.chunk
                };
                let from = self.asked;
                self.asked = self.total.min(from + chunk);
                let pages: Vec<_> = (from..self.asked).filter_map(&mut page).collect();
                if !pages.is_empty() || self.asked == self.total {
                    break (from, pages);
                }
            },
        };
        if pages.is_empty() {
            return None;
        }
        Some(&self.open.insert(Open { pages, from }).pages)
    }

    /// Takes an answer, and says about how many pages it was, how many of them are alike, and what its time tells.
    ///
    /// # Panics
    /// Panics if it is about another number of pages, which the protocol refuses.
    pub(crate) fn answered(&mut self, alike: &[bool]) -> (u64, u64, Tells) {
        let open = self.open.take().expect("an answer to a question");
        assert_eq!(open.pages.len(), alike.len(), "an answer to the last question");
        let asked = open.pages.len() as u64;
        let pairs = open.pages.into_iter().zip(alike);
        let alike: Vec<u64> = pairs.filter_map(|(page, alike)| alike.then_some(page)).collect();
        let count = alike.len() as u64;
        self.alike.extend(alike);
        let tells = self.tells;
        if tells == Tells::Round {
            self.tells = Tells::Pages;
        }
        (asked, count, tells)
    }

    /// Returns how many pages are left that no question was about.
    pub(crate) fn unasked(&self) -> u64 {
        let from = match self.asks {
            Question::All(_) => self.asked,
            Question::Sample | Question::Nothing => self.encoded,
        };
        (self.total - from) as u64
    }

    /// After an answer: those that are left are all asked about, or none.
    pub(crate) fn go_on(&mut self, asks: bool) {
        if self.asks == Question::Sample {
            self.asked = self.encoded;
        }
        self.asks = if asks { Question::All(0) } else { Question::Nothing };
    }

    /// Takes the pages that were found alike.
    pub(crate) fn take_alike(&mut self) -> BTreeSet<u64> {
        core::mem::take(&mut self.alike)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Plays both sides; returns the places in the order in which they were encoded, those found alike, and those asked about
    /// before they were encoded.
    fn play(
        total: usize,
        asks: Question,
        chunk: usize,
        patience: usize,
        alike: impl Fn(u64) -> bool,
    ) -> (Vec<usize>, Vec<u64>) {
        let mut comparison = Comparison::new(total, asks, Some(chunk));
        let (mut encoded, mut own, mut open, mut steps) = (Vec::new(), Vec::new(), None::<Vec<bool>>, 0);
        let mut known = BTreeSet::new();
        loop {
            match comparison.next() {
                Next::Ask => {
                    let from = encoded.len();
                    let worth = |place: usize| (!place.is_multiple_of(3)).then_some(place as u64);
                    if let Some(pages) = comparison.question(worth) {
                        assert!(open.is_none(), "one question at a time");
                        assert!(
                            pages.iter().all(|page| *page >= from as u64),
                            "a page is asked about before it is sent"
                        );
                        open = Some(pages.iter().map(|page| alike(*page)).collect());
                    }
                }
                Next::Encode(places) => {
                    assert_eq!(places.start, encoded.len());
                    own.extend(
                        places
                            .clone()
                            .map(|place| place as u64)
                            .filter(|page| known.remove(page)),
                    );
                    encoded.extend(places);
                }
                Next::Wait => steps = patience,
                Next::Done => return (encoded, own),
            }
            steps += 1;
            if steps > patience {
                steps = 0;
                if asks != Question::Nothing {
                    comparison.halted();
                }
                if let Some(answer) = open.take() {
                    let (asked, count, _) = comparison.answered(&answer);
                    known.append(&mut comparison.take_alike());
                    let more = comparison.unasked();
                    comparison.go_on(more > 0 && count * 2 > asked);
                }
            }
        }
    }

    proptest! {
        #[test]
        fn every_page_is_encoded_once_and_in_order(
            total in 0_usize..3_000,
            asks in prop::sample::select(vec![Question::All(0), Question::All(7), Question::Sample, Question::Nothing]),
            chunk in 1_usize..600,
            patience in 0_usize..20,
            alike_of in 1_u64..5,
        ) {
            let (encoded, own) = play(total, asks, chunk, patience, |page: u64| page.is_multiple_of(alike_of));
            prop_assert_eq!(encoded, (0..total).collect::<Vec<_>>());
            prop_assert!(own.iter().all(|page| page.is_multiple_of(alike_of) && !page.is_multiple_of(3)));
        }
    }

    #[test]
    fn all_pages_worth_it_are_found_alike_where_all_are_asked_about() {
        let (_, own) = play(2_000, Question::All(0), 300, 2, |_| true);
        assert_eq!(own.len(), (0..2_000_u64).filter(|page| !page.is_multiple_of(3)).count());
    }

    #[test]
    fn a_sample_is_followed_by_all_that_is_left_or_by_nothing() {
        let (_, own) = play(2_000, Question::Sample, 1_024, 1, |_| true);
        assert!(own.len() > 1_200, "{}", own.len());
        let (_, own) = play(2_000, Question::Sample, 1_024, 1, |page| page % 100 == 1);
        assert!(own.len() <= 2, "{}", own.len());
    }

    #[test]
    fn a_question_is_open_while_the_answer_before_is_encoded() {
        let mut comparison = Comparison::new(20, Question::All(0), Some(10));
        assert_eq!(comparison.next(), Next::Wait);
        comparison.halted();
        assert_eq!(comparison.next(), Next::Ask);
        assert_eq!(
            comparison.question(|place| Some(place as u64)).map(<[u64]>::len),
            Some(10)
        );
        assert_eq!(comparison.next(), Next::Wait);
        assert_eq!(comparison.answered(&[true; 10]), (10, 10, Tells::Round));
        comparison.go_on(true);
        assert_eq!(comparison.next(), Next::Ask);
        assert!(comparison.question(|place| Some(place as u64)).is_some());
        assert_eq!(comparison.next(), Next::Encode(0..10));
        assert_eq!(comparison.next(), Next::Wait);
        assert_eq!(comparison.answered(&[false; 10]), (10, 0, Tells::Pages));
        comparison.go_on(true);
        assert_eq!(comparison.next(), Next::Encode(10..20));
        assert_eq!(comparison.next(), Next::Done);
    }

    #[test]
    fn what_is_encoded_before_the_secondary_stands_needs_no_question() {
        let mut comparison = Comparison::new(30, Question::Sample, None);
        assert_eq!(comparison.next(), Next::Encode(0..30));
        assert_eq!(comparison.next(), Next::Wait);
        comparison.halted();
        assert_eq!(comparison.next(), Next::Done);
    }
}
