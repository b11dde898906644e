//! What is written into a page on purpose, by its name.
//!
//! Driven by the dirtier and by a touch. A pattern is a function of the page's old content and of one number, so that two
//! guests that are given the same numbers have the same pages.

use crate::content;
use crate::dirtier::Page;
use crate::settings::Pattern;

const RUN_WORDS: usize = 8;
const RUNS: usize = 8;
/// Words of prose of about the lengths and frequencies that a language has.
const WORDS: [&str; 32] = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "a",
    "is",
    "that",
    "for",
    "it",
    "was",
    "on",
    "are",
    "as",
    "with",
    "his",
    "they",
    "at",
    "be",
    "this",
    "have",
    "from",
    "other",
    "between",
    "machine",
    "network",
    "although",
    "together",
    "number",
    "without",
    "question",
    "something",
];

/// Writes a pattern into a page; `noise` chooses its place and its content.
pub(crate) fn fill(page: &mut Page, pattern: Pattern, noise: u64) {
    let at = usize::try_from(noise >> 40).unwrap_or(0) % page.len();
    match pattern {
        Pattern::Zero => page.fill(0),
        Pattern::Sparse => page[at] ^= noise | 1,
        Pattern::Run => {
            let start = at / RUN_WORDS * RUN_WORDS;
            for (index, word) in page[start..start + RUN_WORDS].iter_mut().enumerate() {
                *word = !*word ^ (content::word(noise ^ index as u64) >> 8);
            }
        }
        Pattern::Runs => {
            let stretch = page.len() / RUNS;
            for part in page.chunks_mut(stretch) {
                part[at % stretch] ^= content::word(noise) | 0x0101_0101_0101_0101;
            }
        }
        Pattern::Text => prose(page, noise),
        Pattern::Random => {
            for (at, word) in page.iter_mut().enumerate() {
                *word = random(noise.wrapping_add(at as u64));
            }
        }
    }
}

/// Mixes a number well: neighbours have nothing in common that a compressor could find.
fn random(index: u64) -> u64 {
    let mut mixed = content::word(index).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed ^= mixed >> 27;
    mixed = mixed.wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// Fills the page with words, which a compressor makes about half as long.
fn prose(page: &mut Page, noise: u64) {
    let mut state = noise | 1;
    let mut text = core::iter::from_fn(move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let one = usize::try_from(state >> 59).unwrap_or(0);
        let other = usize::try_from((state >> 54) & 31).unwrap_or(0);
        // The first words of the list are the frequent ones.
        Some(WORDS[one.min(other)].bytes().chain([b' ']))
    })
    .flatten();
    for word in page.iter_mut() {
        let mut bytes = [b' '; 8];
        for (byte, letter) in bytes.iter_mut().zip(&mut text) {
            *byte = letter;
        }
        *word = u64::from_le_bytes(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed(pattern: Pattern, noise: u64) -> usize {
        let mut page = [7; 512];
        fill(&mut page, pattern, noise);
        page.iter()
            .flat_map(|word| word.to_le_bytes())
            .zip([7, 0, 0, 0, 0, 0, 0, 0].into_iter().cycle())
            .filter(|(new, old)| new != old)
            .count()
    }

    #[test]
    fn a_pattern_changes_as_much_as_its_name_says() {
        for noise in [0, 1, 99, 0x1234_5678_9abc_def0, u64::MAX] {
            assert!((1..=8).contains(&changed(Pattern::Sparse, noise)), "{noise}");
            assert!((33..=64).contains(&changed(Pattern::Run, noise)), "{noise}");
            assert_eq!(changed(Pattern::Zero, noise), 512);
            assert!((8..=64).contains(&changed(Pattern::Runs, noise)), "{noise}");
            assert!(changed(Pattern::Random, noise) > 3_900);
        }
    }

    #[test]
    fn prose_is_made_of_words_and_no_two_pages_are_the_same() {
        let text = |noise| {
            let mut page = [0; 512];
            fill(&mut page, Pattern::Text, noise);
            page.iter()
                .flat_map(|word| word.to_le_bytes())
                .collect::<alloc::vec::Vec<_>>()
        };
        let page = text(5);
        assert!(page.iter().all(|byte| byte.is_ascii_lowercase() || *byte == b' '));
        assert_ne!(page, text(7));
        assert_eq!(page, text(5));
    }
}
