//! Takes batches apart.
//!
//! Every byte may be hostile: what is malformed is an error that says how, nothing is read or handed out past an end, and
//! no length on the wire makes this take memory.
//!
//! Driven by the shell that stages pages.

use lz4_flex::block::decompress_into;

use super::varint::{self, Malformed};
use super::{CODEC_BITS, Codec, Page, PageError, VERSION, ZERO_PAGE, delta};
use crate::epoch::Epoch;
use crate::limits::PAGE_BYTES;

/// What a page of a checkpoint is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content<'a> {
    /// These bytes.
    Page(&'a Page),
    /// The committed content, whatever was staged for it in this epoch: drop that. What the own guest wrote is reverted as
    /// ever.
    Unchanged,
    /// What the own VM has there, stopped: to be copied to the stage. Valid only where `PageMatches` said so.
    Own,
}

/// What a batch is checked against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    /// Pages that the message announced.
    pub count: u32,
    /// Pages of the memory.
    pub pages: u64,
    /// The epoch that this side has committed.
    pub base: Option<Epoch>,
}

/// Decodes batches, one after another.
pub struct BatchDecoder {
    page: Box<Page>,
    /// Made at the first page that needs it.
    zstd: Option<zstd::bulk::Decompressor<'static>>,
}

impl Default for BatchDecoder {
    fn default() -> Self {
        Self {
            page: Box::new(ZERO_PAGE),
            zstd: None,
        }
    }
}

impl BatchDecoder {
    /// Decodes a batch, giving each page to `apply` in ascending order. `base` reads a page's committed content.
    ///
    /// Pages before a fault have been given out when it is found: a stage that had one is dropped as a whole.
    ///
    /// # Errors
    /// Says what is wrong with the batch, or what `base` or `apply` said.
    pub fn decode<E: From<PageError>>(
        &mut self,
        encoded: &[u8],
        expected: &Expected,
        base: impl FnMut(u64, &mut Page) -> Result<(), E>,
        apply: impl FnMut(u64, Content<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let found = self.records(encoded, expected, base, apply)?;
        if found == expected.count {
            Ok(())
        } else {
            let announced = expected.count;
            Err(PageError::Count { found, announced }.into())
        }
    }

    /// As `decode`, for at most `expected.count` pages. Returns how many there are.
    fn records<E: From<PageError>>(
        &mut self,
        encoded: &[u8],
        expected: &Expected,
        mut base: impl FnMut(u64, &mut Page) -> Result<(), E>,
        mut apply: impl FnMut(u64, Content<'_>) -> Result<(), E>,
    ) -> Result<u32, E> {
        let mut rest = encoded;
        let based = take_head(&mut rest, expected.base)?;
        let mut next = 0;
        let mut record = 0;
        while !rest.is_empty() {
            if record == expected.count {
                let (found, announced) = (record.saturating_add(1), record);
                return Err(PageError::Count { found, announced }.into());
            }
            let (index, codec) = take_key(&mut rest, record, next, expected.pages)?;
            if matches!(codec, Codec::Delta | Codec::Unchanged) && !based {
                return Err(PageError::Misplaced { index, codec }.into());
            }
            match codec {
                Codec::Zero => apply(index, Content::Page(&ZERO_PAGE))?,
                Codec::Unchanged => apply(index, Content::Unchanged)?,
                Codec::Own => apply(index, Content::Own)?,
                Codec::Raw => {
                    let (raw, later) = rest
                        .split_first_chunk::<PAGE_BYTES>()
                        .ok_or(PageError::Truncated(record))?;
                    rest = later;
                    apply(index, Content::Page(raw))?;
                }
                Codec::Lz4 | Codec::Zstd | Codec::Delta => {
                    let (length, later) = rest.split_first_chunk::<2>().ok_or(PageError::Truncated(record))?;
                    let length = usize::from(u16::from_le_bytes(*length));
                    let (packed, later) = later.split_at_checked(length).ok_or(PageError::Truncated(record))?;
                    rest = later;
                    if codec == Codec::Delta {
                        base(index, &mut self.page)?;
                    }
                    self.unpack(codec, packed).ok_or(PageError::Content { index, codec })?;
                    apply(index, Content::Page(&self.page))?;
                }
            }
            next = index + 1;
            record += 1;
        }
        Ok(record)
    }

    fn unpack(&mut self, codec: Codec, packed: &[u8]) -> Option<()> {
        if codec == Codec::Delta {
            return delta::apply(packed, &mut self.page);
        }
        let length = if codec == Codec::Lz4 {
            decompress_into(packed, &mut self.page[..]).ok()?
        } else {
            self.zstd
                .get_or_insert_with(|| zstd::bulk::Decompressor::new().expect("memory for a decompressor"))
                .decompress_to_buffer(packed, &mut self.page[..])
                .ok()?
        };
        (length == PAGE_BYTES).then_some(())
    }
}

/// Returns whether the batch builds on the committed state.
fn take_head(rest: &mut &[u8], held: Option<Epoch>) -> Result<bool, PageError> {
    let (version, later) = rest.split_first().ok_or(PageError::Head)?;
    if *version != VERSION {
        return Err(PageError::Version(*version));
    }
    *rest = later;
    let base = varint::take(rest).map_err(|_malformed| PageError::Head)?;
    let Some(found) = base.checked_sub(1).map(Epoch) else {
        return Ok(false);
    };
    if held == Some(found) {
        Ok(true)
    } else {
        Err(PageError::Base { found, held })
    }
}

fn take_key(rest: &mut &[u8], record: u32, next: u64, pages: u64) -> Result<(u64, Codec), PageError> {
    let key = varint::take(rest).map_err(|malformed| match malformed {
        Malformed::Truncated => PageError::Truncated(record),
        Malformed::Overlong => PageError::Index(record),
    })?;
    let encoding = key.to_le_bytes()[0] & ((1 << CODEC_BITS) - 1);
    let codec = *Codec::ALL
        .get(usize::from(encoding))
        .ok_or(PageError::Encoding { record, encoding })?;
    // Neither is near 2⁶⁴: `next` is at most the number of pages, and a gap has lost its low bits.
    let index = next.saturating_add(key >> CODEC_BITS);
    if index < pages {
        Ok((index, codec))
    } else {
        Err(PageError::Outside { index, pages })
    }
}
