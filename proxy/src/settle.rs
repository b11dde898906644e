//! How two byte streams become settled: new bytes of one side against what the other has sent.
//!
//! Bytes that are settled already are passed over; bytes that the other side has sent too are compared
//! and become settled; the rest is kept until the other side sends it. Driven by `stream`.

use std::ops::Range;

use bytes::Bytes;
use checkpoint::Instant;
use checkpoint::mutants::{self, Mutant};

use crate::span::{Chunk, Chunks, Found, Ranges, length};
use crate::stream::ORIGIN;
use crate::verdict::{Difference, Fact, Reason, context};

/// Takes bytes of one side: settles what equals the other side's, keeps the rest among its own as `share` gives it.
pub(crate) fn settle(
    settled: &mut Ranges,
    own: &mut Chunks,
    other: &mut Chunks,
    arrived: Instant,
    start: u64,
    payload: &[u8],
    mut share: impl FnMut(Range<usize>) -> Bytes,
) -> Result<(), Clash> {
    let end = start + payload.len() as u64;
    let mut at = start;
    while at < end {
        if let Some(until) = settled.end_of(at) {
            at = until;
            continue;
        }
        let limit = settled.next_start(at).unwrap_or(end).min(end);
        match other.find(at) {
            Found::At(index) => {
                let theirs = other.chunk(index);
                let until = theirs.end().min(limit);
                let mine = &payload[length(&(start..at))..length(&(start..until))];
                let offset = length(&(theirs.start..at));
                let difference = first_difference(mine, &theirs.bytes[offset..]);
                if let Some(same) = difference {
                    let clash = Clash {
                        fact: Fact::Bytes,
                        offset: (at + same as u64).saturating_sub(ORIGIN),
                        new: context(payload, length(&(start..at)) + same),
                        old: context(&theirs.bytes, offset + same),
                    };
                    settled.insert(at..at + same as u64);
                    return Err(clash);
                }
                other.cut(index, &(at..until));
                let until = if mutants::on(Mutant::CompareBySegment) {
                    limit
                } else {
                    until
                };
                settled.insert(at..until);
                at = until;
            }
            Found::Gap(next) => {
                let until = next.unwrap_or(limit).min(limit);
                keep(own, arrived, start, payload, at..until, &mut share)?;
                at = until;
            }
        }
    }
    Ok(())
}

/// Keeps the bytes of `range` that are not kept yet; those that are must be the same.
fn keep(
    own: &mut Chunks,
    arrived: Instant,
    start: u64,
    payload: &[u8],
    range: Range<u64>,
    share: &mut impl FnMut(Range<usize>) -> Bytes,
) -> Result<(), Clash> {
    let mut at = range.start;
    while at < range.end {
        match own.find(at) {
            Found::At(index) => {
                let kept = own.chunk(index);
                let until = kept.end().min(range.end);
                let mine = &payload[length(&(start..at))..length(&(start..until))];
                let offset = length(&(kept.start..at));
                if let Some(same) = first_difference(mine, &kept.bytes[offset..]) {
                    return Err(Clash {
                        fact: Fact::Resent,
                        offset: (at + same as u64).saturating_sub(ORIGIN),
                        new: context(payload, length(&(start..at)) + same),
                        old: context(&kept.bytes, offset + same),
                    });
                }
                at = until;
            }
            Found::Gap(next) => {
                let until = next.unwrap_or(range.end).min(range.end);
                let bytes = share(length(&(start..at))..length(&(start..until)));
                own.insert(Chunk {
                    start: at,
                    bytes,
                    arrived,
                });
                at = until;
            }
        }
    }
    Ok(())
}

/// A difference found while settling, seen from the side whose bytes came last.
pub(crate) struct Clash {
    fact: Fact,
    offset: u64,
    new: Vec<u8>,
    old: Vec<u8>,
}

impl Clash {
    pub(crate) fn into_reason(self, new_is_primary: bool) -> Reason {
        let (primary, secondary) = if new_is_primary {
            (self.new, self.old)
        } else {
            (self.old, self.new)
        };
        Reason::Mismatch(Difference {
            fact: self.fact,
            offset: self.offset,
            primary,
            secondary,
        })
    }
}

/// Returns the offset of the first differing byte within `mine`; `theirs` is at least as long.
fn first_difference(mine: &[u8], theirs: &[u8]) -> Option<usize> {
    if mine == &theirs[..mine.len()] {
        None
    } else {
        mine.iter().zip(theirs).position(|(a, b)| a != b)
    }
}
