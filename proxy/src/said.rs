//! What the primary has said lately on its TCP streams, to compare what it says again.
//!
//! Bytes that are settled leave again at once, but only if they are the same bytes: a guest that sends from memory that has
//! changed says something new. So its last bytes are kept, copied, those of all streams together and up to a bound. What was
//! said before them is unknown, and has to be said by the secondary again, too.
//!
//! Driven by `stream`. Finds a stream's pieces by its [`Thread`]: each piece knows the one before it.

use std::collections::VecDeque;
use std::ops::Range;

use crate::span::length;
use crate::verdict::context;

/// Bytes that are kept.
const BYTES_MAX: usize = 8 * 1024 * 1024;
/// Most pieces that are kept.
const PIECES_MAX: usize = 16_384;
/// Most pieces of a stream that are looked at for one segment.
const WALK_MAX: usize = 1_024;

/// The last pieces of all streams, oldest first.
#[derive(Debug, Default)]
pub(crate) struct Said {
    pieces: VecDeque<Piece>,
    /// The number of the oldest piece.
    first: u64,
    /// Their bytes: a ring that grows to its full size once.
    bytes: Vec<u8>,
    /// How many bytes have ever been put into it, gaps at its end included.
    end: usize,
}

/// One stream's end of its pieces.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Thread {
    newest: Option<u64>,
    /// How far the stream's positions have been moved back.
    moved: u64,
}

#[derive(Debug)]
struct Piece {
    start: u64,
    /// Where its bytes are, counted as `end` is.
    at: usize,
    length: usize,
    /// The same stream's piece before it.
    before: Option<u64>,
}

/// Where what is said again differs, and what was said there.
#[derive(Debug)]
pub(crate) struct Differs {
    pub(crate) position: u64,
    pub(crate) before: Vec<u8>,
}

impl Thread {
    /// The stream's positions are counted from further on.
    pub(crate) fn move_back(&mut self, shift: u64) {
        self.moved = self.moved.wrapping_add(shift);
    }
}

impl Said {
    /// Keeps bytes after all those that the stream has said.
    pub(crate) fn add(&mut self, thread: &mut Thread, start: u64, bytes: &[u8]) {
        let at = self.keep(bytes);
        self.pieces.push_back(Piece {
            start: start.wrapping_add(thread.moved),
            at,
            length: bytes.len(),
            before: thread.newest,
        });
        thread.newest = Some(self.first + self.pieces.len() as u64 - 1);
        while let Some(oldest) = self.pieces.front()
            && (oldest.at + BYTES_MAX < self.end || self.pieces.len() > PIECES_MAX)
        {
            self.pieces.pop_front();
            self.first += 1;
        }
    }

    /// Compares what a stream says again; calls `unknown` with each part of which it is not known what was said.
    pub(crate) fn compare(
        &self,
        thread: &Thread,
        start: u64,
        payload: &[u8],
        mut unknown: impl FnMut(Range<u64>),
    ) -> Result<(), Differs> {
        let start = start.wrapping_add(thread.moved);
        let mut unknown = |part: Range<u64>| {
            if !part.is_empty() {
                unknown(part.start.wrapping_sub(thread.moved)..part.end.wrapping_sub(thread.moved));
            }
        };
        // Everything from here on is compared, or was told.
        let mut end = start + payload.len() as u64;
        let mut at = thread.newest;
        for _ in 0..WALK_MAX {
            let Some(piece) = at.and_then(|at| self.piece(at)) else {
                break;
            };
            at = piece.before;
            let shared = piece.start.max(start)..piece.end().min(end);
            if shared.is_empty() {
                if piece.end() <= start {
                    break;
                }
                continue;
            }
            unknown(shared.end..end);
            let mine = &payload[length(&(start..shared.start))..length(&(start..shared.end))];
            let skipped = length(&(piece.start..shared.start));
            let said = self.bytes_of(piece);
            if let Some(same) = mine.iter().zip(&said[skipped..]).position(|(a, b)| a != b) {
                return Err(Differs {
                    position: (shared.start + same as u64).wrapping_sub(thread.moved),
                    before: context(said, skipped + same),
                });
            }
            end = shared.start;
        }
        unknown(start..end);
        Ok(())
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        *self = Self {
            first: self.first + self.pieces.len() as u64,
            ..Self::default()
        };
    }

    /// Puts bytes over the oldest, in one piece, and returns where they are.
    fn keep(&mut self, bytes: &[u8]) -> usize {
        let left = BYTES_MAX - self.end % BYTES_MAX;
        if left < bytes.len() {
            self.end += left;
        }
        let (at, place) = (self.end, self.end % BYTES_MAX);
        if self.bytes.len() < place + bytes.len() {
            self.bytes.resize(place + bytes.len(), 0);
        }
        self.bytes[place..place + bytes.len()].copy_from_slice(bytes);
        self.end += bytes.len();
        at
    }

    fn bytes_of(&self, piece: &Piece) -> &[u8] {
        &self.bytes[piece.at % BYTES_MAX..][..piece.length]
    }

    fn piece(&self, number: u64) -> Option<&Piece> {
        self.pieces.get(usize::try_from(number.checked_sub(self.first)?).ok()?)
    }
}

impl Piece {
    fn end(&self) -> u64 {
        self.start + self.length as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unknown(said: &Said, thread: &Thread, start: u64, payload: &[u8]) -> Result<Vec<(u64, u64)>, u64> {
        let mut parts = Vec::new();
        said.compare(thread, start, payload, |part| parts.push((part.start, part.end)))
            .map(|()| parts)
            .map_err(|differs| differs.position)
    }

    #[test]
    fn what_is_said_again_is_compared_and_the_rest_is_told() {
        let mut said = Said::default();
        let (mut one, mut other) = (Thread::default(), Thread::default());
        said.add(&mut one, 100, b"abcd");
        said.add(&mut other, 100, b"ABCD");
        said.add(&mut one, 106, b"ghij");
        assert_eq!(unknown(&said, &one, 100, b"abcd"), Ok(vec![]));
        assert_eq!(unknown(&said, &one, 102, b"cd"), Ok(vec![]));
        assert_eq!(unknown(&said, &other, 102, b"CD"), Ok(vec![]));
        assert_eq!(
            unknown(&said, &one, 98, b"..abcd..ghij.."),
            Ok(vec![(110, 112), (104, 106), (98, 100)])
        );
        assert_eq!(unknown(&said, &one, 100, b"abXd"), Err(102));
        one.move_back(50);
        assert_eq!(unknown(&said, &one, 57, b"hi"), Ok(vec![]));
        said.clear();
        assert_eq!(unknown(&said, &one, 57, b"hi"), Ok(vec![(57, 59)]));
        said.add(&mut one, 60, b"kl");
        assert_eq!(unknown(&said, &one, 57, b"hijkl"), Ok(vec![(57, 60)]));
    }

    #[test]
    fn what_is_kept_is_bounded() {
        for size in [1, 1_448, 3_000] {
            let mut said = Said::default();
            let mut thread = Thread::default();
            for number in 0..40_000_u64 {
                let piece = vec![u8::try_from(number % 251).unwrap(); size];
                said.add(&mut thread, number * size as u64, &piece);
                assert!(said.bytes.len() <= BYTES_MAX && said.pieces.len() <= PIECES_MAX);
            }
            let kept = said.pieces.len() as u64;
            assert!(kept == PIECES_MAX as u64 || kept * size as u64 > BYTES_MAX as u64 - 2 * size as u64);
            for number in 40_000 - kept.min(1_000)..40_000 {
                let piece = vec![u8::try_from(number % 251).unwrap(); size];
                assert_eq!(unknown(&said, &thread, number * size as u64, &piece), Ok(vec![]));
            }
            assert_eq!(unknown(&said, &thread, 0, b"x"), Ok(vec![(0, 1)]));
        }
    }
}
