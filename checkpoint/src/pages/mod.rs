//! Pages of guest memory in batches: how they are encoded, chosen, remembered and decoded.
//!
//! ```text
//!   batch   version 1 · varint( 0: no base | base epoch + 1 ) · record …
//!   record  varint( gap × 8 + codec ) · payload      gap = page − the page after the last record's (at first: − 0)
//!
//!   codec  0 zero       nothing
//!          1 raw        4,096 bytes
//!          2 lz4        u16 length, a block
//!          3 zstd       u16 length, a frame
//!          4 delta      u16 length, then runs: varint bytes skipped, varint bytes changed, the changed bytes
//!          5 unchanged  nothing: as in the base (takes back what was shipped of the page earlier in the epoch)
//!          6 own        nothing: as the receiver's VM has it (it answered so to a hash of the page)
//! ```
//!
//! Page numbers ascend strictly within a batch, since no gap is negative. The *base* is the memory that the receiver has
//! committed: `delta` and `unchanged` mean that and nothing that was shipped since. A page that is as in the base need
//! not be in a batch at all, unless an earlier batch of the same epoch said otherwise: the receiver reverts what its own
//! guest wrote in any case.
//!
//! [`BatchEncoder`] makes batches, [`Chooser`] picks the codec of each page, [`BaseCache`] remembers on the primary what
//! the secondary has committed, [`BatchDecoder`] takes batches apart, [`identical`] finds the pages that both sides
//! have, and [`Asking`] decides when it pays to look for them.
//! Decoding is total, takes the memory of one page and of one decompressor, and never hands out a page past memory's end.
//!
//! Driven by the shells that ship and stage pages. Never touches guest memory itself, never reads a clock.

mod asking;
mod cache;
mod chooser;
mod decoder;
mod delta;
mod encoder;
pub mod identical;
mod streams;
mod varint;

#[cfg(test)]
mod tests;

pub use asking::{Asking, Question, SAMPLE_PAGES, Tells};
pub use cache::{BASE_BYTES_DEFAULT, BaseCache, CacheStats, Reference};
pub use chooser::{Chooser, Link};
pub use decoder::{BatchDecoder, Content, Expected};
pub use encoder::{BatchEncoder, Pushed};
pub use streams::stream_of;

use crate::epoch::Epoch;
use crate::limits::{BODY_BYTES_MAX, PAGE_BYTES};

/// A page's bytes.
pub type Page = [u8; PAGE_BYTES];

/// A good capacity for a batch: long enough for the link, short enough to leave the wire to others soon.
pub const BATCH_BYTES: usize = 256 * 1024;
/// The capacity below which no batch goes: it must hold its head and one record.
pub const BATCH_BYTES_MIN: usize = HEAD_BYTES_MAX + RECORD_BYTES_MAX;

/// The version of the batch format.
const VERSION: u8 = 1;
const CODEC_BITS: u32 = 3;
const HEAD_BYTES_MAX: usize = 1 + varint::BYTES_MAX;
const RECORD_BYTES_MAX: usize = varint::BYTES_MAX + PAGE_BYTES;
/// The longest payload of a packed page; less saved than an eighth is not worth the receiver's time.
const PACKED_BYTES_MAX: usize = PAGE_BYTES - PAGE_BYTES / 8;
/// Page numbers that can be encoded; more pages than any memory has.
const INDEX_END: u64 = 1 << (u64::BITS - CODEC_BITS);

const ZERO_PAGE: Page = [0; PAGE_BYTES];

const _: () = assert!(BATCH_BYTES <= BODY_BYTES_MAX);
const _: () = assert!(PACKED_BYTES_MAX <= u16::MAX as usize);

/// How a page is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Codec {
    /// Nothing but zeros.
    Zero,
    /// As it is.
    Raw,
    /// One lz4 block.
    Lz4,
    /// One zstd frame.
    Zstd,
    /// What differs from the base.
    Delta,
    /// The base itself.
    Unchanged,
    /// What the receiver's VM has there.
    Own,
}

impl Codec {
    /// Every codec, by its number on the wire.
    pub const ALL: [Self; 7] = [
        Self::Zero,
        Self::Raw,
        Self::Lz4,
        Self::Zstd,
        Self::Delta,
        Self::Unchanged,
        Self::Own,
    ];

    /// Returns the name for reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Zero => "zero",
            Self::Raw => "raw",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
            Self::Delta => "delta",
            Self::Unchanged => "unchanged",
            Self::Own => "own",
        }
    }
}

/// Pages and bytes on the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amount {
    /// Pages.
    pub pages: u64,
    /// Bytes that they took, with their page numbers.
    pub bytes: u64,
}

/// What was encoded, by codec. `Unchanged` counts the pages that were left out, too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CodecStats([Amount; Codec::ALL.len()]);

impl CodecStats {
    /// Returns what a codec encoded.
    #[must_use]
    pub fn of(&self, codec: Codec) -> Amount {
        self.0[codec as usize]
    }

    /// Returns all codecs together.
    #[must_use]
    pub fn total(&self) -> Amount {
        let mut total = Self::default();
        for amount in self.0 {
            total.count(Codec::Zero, amount);
        }
        total.of(Codec::Zero)
    }

    /// Returns what was encoded after `earlier`, which the same encoder told before.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let mut since = *self;
        for (amount, before) in since.0.iter_mut().zip(earlier.0) {
            amount.pages = amount.pages.saturating_sub(before.pages);
            amount.bytes = amount.bytes.saturating_sub(before.bytes);
        }
        since
    }

    /// Adds what another encoder did.
    pub fn add(&mut self, other: &Self) {
        for codec in Codec::ALL {
            self.count(codec, other.of(codec));
        }
    }

    fn count(&mut self, codec: Codec, more: Amount) {
        let amount = &mut self.0[codec as usize];
        amount.pages = amount.pages.saturating_add(more.pages);
        amount.bytes = amount.bytes.saturating_add(more.bytes);
    }
}

/// Why bytes are not a batch of pages, or not the pages that were asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PageError {
    /// The head is malformed.
    #[error("a page batch begins with a malformed head")]
    Head,
    /// A format that this build does not know.
    #[error("a page batch has format {0}, this host reads format {VERSION}: run the same tandem release on both")]
    Version(u8),
    /// The pages change a state that this side does not hold.
    #[error("a page batch changes epoch {found}, this host holds {}", shown(*.held))]
    Base {
        /// What the batch builds on.
        found: Epoch,
        /// What this side has committed.
        held: Option<Epoch>,
    },
    /// A record ends in the middle.
    #[error("page record {0} is cut off")]
    Truncated(u32),
    /// A page number is not encoded in the one proper way.
    #[error("page record {0} has a malformed page number")]
    Index(u32),
    /// An encoding that does not exist.
    #[error("page record {record} has the unknown encoding {encoding}")]
    Encoding {
        /// The record, counted from 0.
        record: u32,
        /// The encoding.
        encoding: u8,
    },
    /// A page past the end of guest memory.
    #[error("page {index} is outside a memory of {pages} pages")]
    Outside {
        /// The page.
        index: u64,
        /// Pages that the memory has.
        pages: u64,
    },
    /// A payload that does not give a page.
    #[error("page {index} does not decode to a page by {}", .codec.name())]
    Content {
        /// The page.
        index: u64,
        /// Its encoding.
        codec: Codec,
    },
    /// An encoding that this batch can't have.
    #[error("page {index} is encoded by {}, which has no meaning here", .codec.name())]
    Misplaced {
        /// The page.
        index: u64,
        /// Its encoding.
        codec: Codec,
    },
    /// The number of pages is not the one announced.
    #[error("the batch holds {found} pages instead of {announced}")]
    Count {
        /// Pages in it; if more than announced, those up to the first one too many.
        found: u32,
        /// Pages that the message promised.
        announced: u32,
    },
    /// The length of a body is not what its count asks for.
    #[error("a message about {count} pages has a malformed body")]
    Body {
        /// Pages that the message promised.
        count: u32,
    },
}

/// Returns whether a page holds nothing but zeros.
#[must_use]
pub fn is_zero(page: &Page) -> bool {
    // Blocks are folded without a branch in each word, which the compiler turns into wide vector code.
    page.as_chunks::<256>().0.iter().all(|block| {
        block
            .as_chunks::<8>()
            .0
            .iter()
            .fold(0, |seen, word| seen | u64::from_ne_bytes(*word))
            == 0
    })
}

fn shown(epoch: Option<Epoch>) -> String {
    epoch.map_or_else(|| "no committed state".to_owned(), |epoch| format!("epoch {epoch}"))
}
