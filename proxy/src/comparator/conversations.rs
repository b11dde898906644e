//! Two guests that say the same stream, cut, repeated and acknowledged each in its own way: equal if and only if the bytes are.

use bytes::Bytes;
use proptest::prelude::*;

use crate::seq::Seq;
use crate::testkit::*;
use crate::verdict::{Fact, Reason, Verdict};

const LENGTH: usize = 400;

/// What a guest does next.
#[derive(Clone, Copy, Debug)]
enum Act {
    /// It sends so many new bytes.
    Says(usize),
    /// It sends so many bytes again that it has said so long ago.
    Repeats(usize, usize),
    /// It acknowledges so many more bytes, and nothing else.
    Acknowledges(u32),
}

/// A segment of the stream.
#[derive(Clone, Copy, Debug)]
struct Piece {
    start: usize,
    end: usize,
    is_new: bool,
    ack: u32,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => (1usize..60).prop_map(Act::Says),
        2 => (1usize..120, 1usize..60).prop_map(|(back, length)| Act::Repeats(back, length)),
        2 => (0u32..4).prop_map(Act::Acknowledges),
    ]
}

/// Returns what a guest sends from the beginning to the end of the stream.
fn pieces() -> impl Strategy<Value = Vec<Piece>> {
    proptest::collection::vec(act(), 1..60).prop_map(|acts| {
        let (mut at, mut ack) = (0, 0);
        let mut pieces = Vec::new();
        for act in acts.into_iter().chain([Act::Says(LENGTH), Act::Acknowledges(1)]) {
            let (start, end) = match act {
                Act::Says(length) => (at, (at + length).min(LENGTH)),
                Act::Repeats(back, length) => (at.saturating_sub(back), (at.saturating_sub(back) + length).min(at)),
                Act::Acknowledges(more) => {
                    ack += more;
                    (at, at)
                }
            };
            let is_new = end > at;
            at = at.max(end);
            pieces.push(Piece {
                start,
                end,
                is_new,
                ack,
            });
        }
        pieces
    })
}

/// The bytes of which one side has another than the other, and when.
#[derive(Clone, Copy, Debug)]
enum Flaw {
    None,
    /// The secondary has another byte here.
    Other(usize),
    /// The primary has, when it repeats it for this often.
    Repeated(usize),
}

fn flaw() -> impl Strategy<Value = Flaw> {
    prop_oneof![
        2 => Just(Flaw::None),
        1 => (0..LENGTH).prop_map(Flaw::Other),
        1 => any::<usize>().prop_map(Flaw::Repeated),
    ]
}

struct Conversation {
    base: u32,
    bench: Bench,
    verdicts: Vec<Verdict>,
}

impl Conversation {
    fn new(base: u32) -> Self {
        let mut bench = Bench::new();
        bench.primary(Tcp::data(base.wrapping_sub(1), 500, b"-").frame());
        bench.checkpoint();
        Self {
            base,
            bench,
            verdicts: Vec::new(),
        }
    }

    fn frame(&self, piece: &Piece, bytes: &[u8]) -> Bytes {
        let seq = self.base.wrapping_add(u32::try_from(piece.start).unwrap());
        Tcp::data(seq, 500 + piece.ack, bytes).frame()
    }

    /// Returns where the segments that have left start, and their bytes.
    fn left(&self) -> Vec<(usize, Vec<u8>)> {
        let frames = released(&self.verdicts);
        let parts = frames.iter().map(|frame| {
            let (segment, payload) = segment(frame);
            (usize::try_from(segment.seq.after(Seq(self.base))).unwrap(), payload)
        });
        parts.collect()
    }
}

fn byte(at: usize) -> u8 {
    u8::try_from((at * 7 + at / 5) % 251).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn case_p05_to_p09_two_conversations_are_equal_if_and_only_if_their_bytes_are(
        base in prop_oneof![(0u32..400).prop_map(|back| u32::MAX - back), any::<u32>()],
        mine in pieces(),
        theirs in pieces(),
        swaps in proptest::collection::vec(any::<bool>(), 60),
        order in proptest::collection::vec(any::<bool>(), 1..100),
        flaw in flaw(),
    ) {
        let stream: Vec<u8> = (0..LENGTH).map(byte).collect();
        let mut other = stream.clone();
        if let Flaw::Other(at) = flaw {
            other[at] ^= 1;
        }
        let repeated = mine.iter().filter(|piece| !piece.is_new && piece.start < piece.end).count();
        let flawed = match flaw {
            Flaw::Repeated(number) if repeated > 0 => Some(number % repeated),
            _ => None,
        };
        // The secondary's arrive in another order.
        let mut theirs = theirs;
        for (at, swap) in swaps.iter().enumerate().take(theirs.len() - 1) {
            if *swap {
                theirs.swap(at, at + 1);
            }
        }
        let most = mine.iter().chain(&theirs).map(|piece| piece.ack).max().unwrap();
        theirs.push(Piece { start: LENGTH, end: LENGTH, is_new: false, ack: most });

        let mut talk = Conversation::new(base);
        let mut sent = Vec::new();
        let mut bad = None;
        let mut repeats = 0;
        let (mut one, mut two) = (mine.iter(), theirs.iter());
        let mut order = order.into_iter().cycle();
        while one.len() + two.len() > 0 {
            let verdicts = if two.len() == 0 || one.len() > 0 && order.next().unwrap() {
                let piece = one.next().unwrap();
                let mut bytes = stream[piece.start..piece.end].to_vec();
                if !piece.is_new && !bytes.is_empty() {
                    if flawed == Some(repeats) {
                        bytes[0] ^= 1;
                        bad = Some((piece.start, bytes.clone()));
                    }
                    repeats += 1;
                }
                if !bytes.is_empty() {
                    sent.push((piece.start, bytes.clone()));
                }
                talk.bench.primary(talk.frame(piece, &bytes))
            } else {
                let piece = two.next().unwrap();
                talk.bench.secondary(talk.frame(piece, &other[piece.start..piece.end]))
            };
            talk.verdicts.extend(verdicts);
        }

        let left = talk.left();
        for (start, bytes) in &left {
            let end = start + bytes.len();
            prop_assert_eq!(bytes, &other[*start..end], "what leaves was said by both");
        }
        let told = divergence(&talk.verdicts).map(|told| &told.reason);
        let probe = bad.as_ref().is_some_and(|(_, bytes)| bytes.len() == 1);
        match flaw {
            Flaw::Other(at) => {
                let exact = matches!(told, Some(Reason::Mismatch(found))
                    if found.fact == Fact::Bytes && found.primary[0] == stream[at] && found.secondary[0] == other[at]);
                prop_assert!(exact, "the first differing byte is shown: {:?}", told);
            }
            _ if bad.is_some() && probe => {}
            _ if bad.is_some() => {
                let exact = matches!(told, Some(Reason::Mismatch(found)) if found.fact == Fact::Resent);
                prop_assert!(exact, "what is repeated differs: {:?}", told);
            }
            _ => {
                prop_assert_eq!(told, None);
                let mut data: Vec<_> = left.into_iter().filter(|(_, bytes)| !bytes.is_empty()).collect();
                data.sort();
                sent.sort();
                prop_assert_eq!(data, sent, "everything leaves, once");
                prop_assert_eq!(talk.bench.comparator.held().frames, 0);
                prop_assert_eq!(talk.bench.comparator.pending(), crate::Pending::default());
            }
        }
        // And a commit lets go of the rest.
        let held = talk.bench.comparator.held().frames;
        prop_assert!(released(&talk.bench.checkpoint()).len() >= held);
        prop_assert_eq!(talk.bench.comparator.held().frames, 0);
    }
}
