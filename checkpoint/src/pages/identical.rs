//! Pages that both guests made alike.
//!
//! Two guests that ran the same hold the same in most of the pages they wrote. After both have stopped for an epoch the
//! primary asks, and sends only what differs:
//!
//! ```text
//!   primary    Halt: my VM has stopped for this epoch         ─► secondary   stops its VM
//!              Halted                                         ◄─
//!              PageHashes: a seed, and for each page its hash ─►             compares with the memory its VM sees
//!              PageMatches: one bit for each page             ◄─
//!              page batches: `own` for those, content for the others ─►      copies its own pages to the stage
//! ```
//!
//! # The hash, and what it assumes
//! Two NH sums (Black, Halevi, Krawczyk, Krovetz and Rogaway, "UMAC", 1999) over 64-bit words, the key of the second
//! shifted by two words (their Toeplitz construction): two different pages have the same pair of sums with a probability
//! of at most 2⁻¹²⁸ over the choice of the key. A random linear function over the field of 2¹²⁷ − 1 elements then makes
//! 127 bits of the 256, which adds at most 2⁻¹²⁷. So two different pages are taken for equal with a probability
//! below 2⁻¹²⁶, whatever they contain, **if the key is random and independent of both contents**. That holds since
//!
//! - the seed is fresh from the host's entropy for every question, and is drawn after both contents are fixed: the
//!   secondary has said that its VM has stopped, and the primary's content is a copy or its VM has stopped, too;
//! - the key is the seed's BLAKE3 output stream, which is assumed to be as good as random.
//!
//! A guest therefore can't prepare two pages that collide, and the hash need not withstand one who knows the key: a seed
//! is used for one question and never before its contents exist. NH is many times as fast as a cryptographic hash of a page.
//!
//! Driven by the shells. Reads no memory itself, draws no seed itself.

use bytes::{BufMut, Bytes, BytesMut};

use super::varint;
use super::{Page, PageError, ZERO_PAGE};
use crate::epoch::Tag;
use crate::limits::{BODY_BYTES_MAX, PAGE_BYTES};

/// Pages that one message may ask about.
pub const HASHES_MAX: usize = 32 * 1024;

const SEED_BYTES: usize = 32;
const HASH_BYTES: usize = 16;
const WORDS: usize = PAGE_BYTES / 8;
/// Words by which the key of the second sum is shifted.
const SHIFT: usize = 2;
/// 64-bit halves of both sums.
const HALVES: usize = 4;
/// The prime 2¹²⁷ − 1.
const PRIME: u128 = u128::MAX >> 1;

const _: () = assert!(SEED_BYTES + HASHES_MAX * (HASH_BYTES + varint::BYTES_MAX) <= BODY_BYTES_MAX);

/// A page's hash under one seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageHash(pub [u8; HASH_BYTES]);

/// Hashes pages under one seed.
pub struct PageHasher {
    sums: [u64; WORDS + SHIFT],
    fold: [u128; HALVES],
}

impl PageHasher {
    /// Makes the key of a seed. The seed is random, and drawn after the contents are fixed.
    #[must_use]
    pub fn new(seed: &[u8; SEED_BYTES]) -> Self {
        let mut stream = blake3::Hasher::new_keyed(seed).finalize_xof();
        let mut sums = [0; WORDS + SHIFT];
        let mut word = [0; 8];
        for part in &mut sums {
            stream.fill(&mut word);
            *part = u64::from_le_bytes(word);
        }
        let mut fold = [0; HALVES];
        let mut word = [0; 16];
        for part in &mut fold {
            stream.fill(&mut word);
            *part = u128::from_le_bytes(word) & PRIME;
        }
        Self { sums, fold }
    }

    /// Hashes a page.
    #[must_use]
    pub fn hash(&self, page: &Page) -> PageHash {
        let (mut first, mut second) = (0_u128, 0_u128);
        let keys = self.sums[..WORDS].as_chunks::<2>().0;
        let shifted = self.sums[SHIFT..].as_chunks::<2>().0;
        for ((pair, key), shifted) in page.as_chunks::<16>().0.iter().zip(keys).zip(shifted) {
            let [a, b] = words(pair);
            first = first.wrapping_add(wide(a.wrapping_add(key[0]), b.wrapping_add(key[1])));
            second = second.wrapping_add(wide(a.wrapping_add(shifted[0]), b.wrapping_add(shifted[1])));
        }
        let halves = [low(first), high(first), low(second), high(second)];
        let folded = self
            .fold
            .iter()
            .zip(halves)
            .fold(0, |sum, (key, half)| reduce(sum + multiply(*key, half)));
        PageHash(folded.to_le_bytes())
    }
}

/// Primary, after both VMs have stopped for the epoch: which of these pages do you have alike?
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageHashes {
    /// Epoch that the pages end.
    pub tag: Tag,
    /// Makes the key.
    pub seed: [u8; SEED_BYTES],
    /// Pages and their hashes, in ascending order.
    pub pages: Vec<(u64, PageHash)>,
}

/// Secondary: the answer, in the same order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageMatches {
    /// Epoch of the question.
    pub tag: Tag,
    /// Whether each page is alike.
    pub alike: Vec<bool>,
}

impl PageHashes {
    /// Encodes the body; the tag and the number of pages are the header's.
    ///
    /// # Panics
    /// Panics if the pages don't ascend, or are more than a message may ask about.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        assert!(self.pages.len() <= HASHES_MAX, "{} hashes", self.pages.len());
        let mut out = BytesMut::with_capacity(SEED_BYTES + self.pages.len() * (HASH_BYTES + 2));
        out.put_slice(&self.seed);
        let mut next = 0;
        for (index, hash) in &self.pages {
            let gap = index.checked_sub(next).expect("pages ascend");
            varint::put(&mut out, gap);
            out.put_slice(&hash.0);
            next = index + 1;
        }
        out.freeze()
    }

    /// Decodes a body that the header says is about `count` pages of a memory of `pages_total`.
    ///
    /// # Errors
    /// Says what is malformed.
    pub fn decode(tag: Tag, count: u32, body: &[u8], pages_total: u64) -> Result<Self, PageError> {
        let malformed = PageError::Body { count };
        let (seed, mut rest) = body.split_first_chunk().ok_or(malformed)?;
        let pages_most = rest.len() / (HASH_BYTES + 1);
        if count as usize > pages_most.min(HASHES_MAX) {
            return Err(malformed);
        }
        let mut pages = Vec::with_capacity(count as usize);
        let mut next = 0_u64;
        for record in 0..count {
            let gap = varint::take(&mut rest).map_err(|_malformed| PageError::Index(record))?;
            let index = next.saturating_add(gap);
            if index >= pages_total {
                return Err(PageError::Outside {
                    index,
                    pages: pages_total,
                });
            }
            let (hash, later) = rest.split_first_chunk().ok_or(PageError::Truncated(record))?;
            pages.push((index, PageHash(*hash)));
            rest = later;
            next = index + 1;
        }
        if rest.is_empty() {
            let seed = *seed;
            Ok(Self { tag, seed, pages })
        } else {
            Err(malformed)
        }
    }

    /// Answers, on the secondary whose VM has stopped. `read` gives each page as the VM sees it.
    ///
    /// # Errors
    /// Gives back what `read` said.
    pub fn answer<E>(&self, mut read: impl FnMut(u64, &mut Page) -> Result<(), E>) -> Result<PageMatches, E> {
        let hasher = PageHasher::new(&self.seed);
        let mut own = ZERO_PAGE;
        let alike = self.pages.iter().map(|(index, hash)| {
            read(*index, &mut own)?;
            Ok(hasher.hash(&own) == *hash)
        });
        Ok(PageMatches {
            tag: self.tag,
            alike: alike.collect::<Result<_, E>>()?,
        })
    }
}

impl PageMatches {
    /// Encodes the body, a bit for each page; the tag and the number of pages are the header's.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let bytes = self.alike.chunks(8).map(|few| {
            few.iter()
                .enumerate()
                .fold(0_u8, |bits, (place, alike)| bits | u8::from(*alike) << place)
        });
        bytes.collect()
    }

    /// Decodes a body that the header says is about `count` pages.
    ///
    /// # Errors
    /// Says what is malformed.
    pub fn decode(tag: Tag, count: u32, body: &[u8]) -> Result<Self, PageError> {
        let malformed = PageError::Body { count };
        let pages = count as usize;
        if pages > HASHES_MAX || body.len() != pages.div_ceil(8) {
            return Err(malformed);
        }
        let mut bits = body
            .iter()
            .flat_map(|byte| (0..8).map(move |place| byte >> place & 1 == 1));
        let alike = bits.by_ref().take(pages).collect();
        // The rest of the last byte says nothing: it has one encoding.
        if bits.any(|bit| bit) {
            return Err(malformed);
        }
        Ok(Self { tag, alike })
    }
}

fn words(pair: &[u8; 16]) -> [u64; 2] {
    let both = u128::from_le_bytes(*pair);
    [low(both), high(both)]
}

fn wide(a: u64, b: u64) -> u128 {
    u128::from(a) * u128::from(b)
}

#[expect(clippy::cast_possible_truncation, reason = "the low half is meant")]
fn low(both: u128) -> u64 {
    both as u64
}

fn high(both: u128) -> u64 {
    low(both >> 64)
}

/// Brings a number below 2¹²⁸ under 2¹²⁷, keeping its remainder; the prime itself becomes 0.
fn reduce(number: u128) -> u128 {
    let once = (number & PRIME) + (number >> 127);
    if once >= PRIME { once - PRIME } else { once }
}

/// Returns the product's remainder.
fn multiply(key: u128, half: u64) -> u128 {
    // key × half = upper × 2⁶⁴ + lower, and 2¹²⁷ leaves 1: the bits of `upper` from the 63rd on come back at the bottom.
    let lower = wide(low(key), half);
    let upper = wide(high(key), half);
    let turned = ((upper << 64) & PRIME) + (upper >> 63);
    reduce(reduce(turned) + reduce(lower))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::epoch::{Epoch, Generation};

    const TAG: Tag = Tag {
        generation: Generation(3),
        epoch: Epoch(9),
    };

    fn noise(seed: u64) -> Page {
        let mut page = ZERO_PAGE;
        blake3::Hasher::new()
            .update(&seed.to_le_bytes())
            .finalize_xof()
            .fill(&mut page);
        page
    }

    fn hashes(pages: &[u64]) -> PageHashes {
        let seed = [4; 32];
        let hasher = PageHasher::new(&seed);
        PageHashes {
            tag: TAG,
            seed,
            pages: pages
                .iter()
                .map(|index| (*index, hasher.hash(&noise(*index))))
                .collect(),
        }
    }

    /// Schoolbook: the product bit by bit.
    fn product(a: u128, b: u128) -> u128 {
        (0..128).rev().fold(0, |sum, bit| {
            let doubled = reduce(reduce(sum + sum));
            if b >> bit & 1 == 1 {
                reduce(doubled + reduce(a))
            } else {
                doubled
            }
        })
    }

    proptest! {
        #[test]
        fn arithmetic_is_that_of_the_field(key in 0..=PRIME, half: u64) {
            prop_assert_eq!(multiply(key, half), product(key, half.into()));
        }

        #[test]
        fn any_change_changes_the_hash(seed: [u8; 32], content: u64, at in 0..PAGE_BYTES, flip in 1..=u8::MAX) {
            let hasher = PageHasher::new(&seed);
            for mut page in [noise(content), ZERO_PAGE] {
                let before = hasher.hash(&page);
                prop_assert_eq!(hasher.hash(&page), before);
                page[at] ^= flip;
                prop_assert_ne!(hasher.hash(&page), before);
            }
        }

        #[test]
        fn swapped_words_change_the_hash(content: u64, a in 0..WORDS, b in 0..WORDS) {
            let page = noise(content);
            let mut swapped = page;
            let words = swapped.as_chunks_mut::<8>().0;
            words.swap(a, b);
            let hasher = PageHasher::new(&[1; 32]);
            prop_assert_eq!(hasher.hash(&page) == hasher.hash(&swapped), page == swapped);
        }

        #[test]
        fn questions_and_answers_come_back(pages in proptest::collection::btree_set(0..u64::MAX - 1, 0..100), alike: Vec<bool>) {
            let pages: Vec<u64> = pages.into_iter().collect();
            let count = u32::try_from(pages.len()).unwrap();
            let question = hashes(&pages);
            prop_assert_eq!(PageHashes::decode(TAG, count, &question.encode(), u64::MAX), Ok(question));
            let count = u32::try_from(alike.len()).unwrap();
            let answer = PageMatches { tag: TAG, alike };
            prop_assert_eq!(PageMatches::decode(TAG, count, &answer.encode()), Ok(answer));
        }

        #[test]
        fn hostile_bodies_are_errors_or_pages_within_the_memory(count in 0..40_u32, body: Vec<u8>, most in 0..1_000_u64) {
            if let Ok(question) = PageHashes::decode(TAG, count, &body, most) {
                prop_assert_eq!(question.pages.len(), count as usize);
                prop_assert!(question.pages.is_sorted_by(|a, b| a.0 < b.0));
                prop_assert!(question.pages.iter().all(|page| page.0 < most));
            }
            if let Ok(answer) = PageMatches::decode(TAG, count, &body) {
                prop_assert_eq!(answer.encode(), body);
            }
        }
    }

    #[test]
    fn the_sums_are_those_of_the_paper() {
        let hasher = PageHasher::new(&[7; 32]);
        let page = noise(1);
        let message: Vec<u64> = page
            .as_chunks::<8>()
            .0
            .iter()
            .map(|word| u64::from_le_bytes(*word))
            .collect();
        let sum = |shift: usize| {
            (0..WORDS / 2).fold(0_u128, |sum, pair| {
                let a = message[2 * pair].wrapping_add(hasher.sums[2 * pair + shift]);
                let b = message[2 * pair + 1].wrapping_add(hasher.sums[2 * pair + 1 + shift]);
                sum.wrapping_add(u128::from(a) * u128::from(b))
            })
        };
        let [first, second] = [sum(0), sum(2)];
        let halves = [first, first >> 64, second, second >> 64];
        let folded = halves.iter().zip(hasher.fold).fold(0, |sum, (half, key)| {
            reduce(sum + product(key, half & u128::from(u64::MAX)))
        });
        assert_eq!(hasher.hash(&page).0, folded.to_le_bytes());
    }

    #[test]
    fn seeds_make_different_hashes() {
        let page = noise(1);
        assert_ne!(
            PageHasher::new(&[1; 32]).hash(&page),
            PageHasher::new(&[2; 32]).hash(&page)
        );
    }

    #[test]
    fn the_secondary_says_which_pages_it_has_alike() {
        let question = hashes(&[0, 5, 6, 900]);
        let answer = question.answer::<()>(|index, page| {
            *page = noise(if index == 5 { 77 } else { index });
            Ok(())
        });
        let alike = vec![true, false, true, true];
        assert_eq!(answer, Ok(PageMatches { tag: TAG, alike }));
        assert_eq!(question.answer(|index, _| Err(index)), Err(0));
    }

    #[test]
    fn an_equal_page_takes_at_most_forty_bytes() {
        let pages: Vec<u64> = (0..1_000).map(|index| index * 1_000).collect();
        let question = hashes(&pages).encode().len();
        let alike = vec![true; 1_000];
        let answer = PageMatches { tag: TAG, alike }.encode().len();
        let mut encoder = crate::pages::BatchEncoder::new(crate::pages::BATCH_BYTES, None);
        for index in pages {
            assert!(!encoder.push_own(index).full);
        }
        let headers = 3 * crate::wire::HEADER_BYTES;
        let bytes = question + answer + encoder.finish().1.len() + headers;
        assert!(bytes <= 22 * 1_000, "{bytes} bytes for 1,000 pages");
    }

    #[test]
    fn malformed_bodies_are_named() {
        let good = hashes(&[3, 9]).encode();
        let decode = |count, body: &[u8]| PageHashes::decode(TAG, count, body, 10);
        assert!(decode(2, &good).is_ok());
        for (count, body) in [(1, &good[..]), (3, &good), (u32::MAX, &good), (0, &good[..31])] {
            assert_eq!(decode(count, body), Err(PageError::Body { count }));
        }
        assert_eq!(
            PageHashes::decode(TAG, 2, &good, 9),
            Err(PageError::Outside { index: 9, pages: 9 })
        );
        let mut overlong = good.to_vec();
        overlong.splice(32..33, [0x83, 0]);
        assert_eq!(decode(2, &overlong), Err(PageError::Index(0)));
        let mut cut = overlong.clone();
        cut.splice(32..34, [0x83, 1]);
        assert!(matches!(decode(2, &cut), Err(PageError::Outside { .. })));
        for (count, body) in [(9, &[1][..]), (3, &[0x08]), (3, &[]), (0, &[0]), (u32::MAX, &[0])] {
            assert_eq!(PageMatches::decode(TAG, count, body), Err(PageError::Body { count }));
        }
    }
}
