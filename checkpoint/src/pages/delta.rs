//! A page as the bytes in which it differs from another.
//!
//! Runs of `varint bytes skipped, varint bytes changed, the changed bytes`; a skip counts from the end of the run before.
//! Blocks of 64 bytes are compared first, then words; a run begins and ends with a byte that differs.
//!
//! Used by the batch encoder and decoder.

use bytes::{BufMut, BytesMut};

use super::{PACKED_BYTES_MAX, Page, varint};

/// Equal bytes between two runs that are sent along, since a run of its own takes as many.
const GAP_MERGED: usize = 2;
const BLOCK: usize = 64;
const WORD: usize = 8;

/// Appends the runs that turn `base` into `page`. Returns `false`, with a part of them appended, if they would not pay.
pub(crate) fn put(out: &mut BytesMut, page: &Page, base: &Page) -> bool {
    let most = out.len() + PACKED_BYTES_MAX;
    let mut written = 0;
    // The open run; empty at first.
    let (mut start, mut end) = (0, 0);
    let blocks = page.as_chunks::<BLOCK>().0.iter().zip(base.as_chunks::<BLOCK>().0);
    for (number, (new, old)) in blocks.enumerate() {
        if new == old {
            continue;
        }
        let words = new.as_chunks::<WORD>().0.iter().zip(old.as_chunks::<WORD>().0);
        for (place, (new, old)) in words.enumerate() {
            let change = u64::from_le_bytes(*new) ^ u64::from_le_bytes(*old);
            if change == 0 {
                continue;
            }
            let at = number * BLOCK + place * WORD;
            let first = at + change.trailing_zeros() as usize / 8;
            let last = at + WORD - change.leading_zeros() as usize / 8;
            if first > end + GAP_MERGED || start == end {
                if !put_run(out, page, written, start, end, most) {
                    return false;
                }
                written = end;
                start = first;
            }
            end = last;
        }
    }
    put_run(out, page, written, start, end, most)
}

/// Applies runs to the base, which becomes the page. Returns `None`, with the base spoilt, if they are malformed.
pub(crate) fn apply(mut runs: &[u8], page: &mut Page) -> Option<()> {
    let mut rest = &mut page[..];
    if runs.is_empty() {
        return None;
    }
    while !runs.is_empty() {
        let skipped = usize::try_from(varint::take(&mut runs).ok()?).ok()?;
        let changed = usize::try_from(varint::take(&mut runs).ok()?).ok()?;
        if changed == 0 {
            return None;
        }
        let (bytes, later) = runs.split_at_checked(changed)?;
        let (_, after) = rest.split_at_mut_checked(skipped)?;
        let (run, after) = after.split_at_mut_checked(changed)?;
        run.copy_from_slice(bytes);
        (runs, rest) = (later, after);
    }
    Some(())
}

fn put_run(out: &mut BytesMut, page: &Page, written: usize, start: usize, end: usize, most: usize) -> bool {
    if start == end {
        return true;
    }
    // Two numbers of two bytes each at most.
    if out.len() + 4 + (end - start) > most {
        return false;
    }
    varint::put(out, (start - written) as u64);
    varint::put(out, (end - start) as u64);
    out.put_slice(&page[start..end]);
    true
}
