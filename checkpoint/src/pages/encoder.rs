//! Collects pages into batches.
//!
//! Everything that needs no compressor is tried first: the base itself, zero, the difference from the base. What the
//! compressors may do is the chooser's decision. Payloads are written into the batch at once, those of the compressors by
//! way of one scratch page.
//!
//! Driven by the shell that ships pages, one encoder for each connection.

use bytes::{BufMut, Bytes, BytesMut};
use lz4_flex::block::{CompressTable, compress_into_with_table, get_maximum_output_size};

use super::chooser::{Chooser, Plan};
use super::{
    Amount, BATCH_BYTES_MIN, CODEC_BITS, Codec, CodecStats, HEAD_BYTES_MAX, INDEX_END, PACKED_BYTES_MAX, Page,
    RECORD_BYTES_MAX, Reference, VERSION, delta, is_zero, varint,
};
use crate::epoch::Epoch;
use crate::limits::{BODY_BYTES_MAX, PAGE_BYTES};

/// The level that is faster than the slow links it is made for.
const ZSTD_LEVEL: i32 = 1;
/// The part of a page whose compression tells whether the rest is worth the attempt.
const SAMPLE_BYTES: usize = 512;
const LENGTH_BYTES: usize = 2;

/// Collects pages into one batch after another.
pub struct BatchEncoder {
    out: BytesMut,
    capacity: usize,
    base: Option<Epoch>,
    count: u32,
    /// The lowest page that may come next.
    next: u64,
    packer: Packer,
    stats: CodecStats,
}

/// What became of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Pushed {
    /// How it was encoded.
    pub codec: Codec,
    /// Bytes it takes; 0 if it was left out because it is as in the base.
    pub bytes: usize,
    /// The one packer that ran: `Chooser::timed` wants its time. `None` if none or several ran.
    pub timed: Option<Codec>,
    /// Whether the batch is full, and must be finished before the next page.
    pub full: bool,
}

/// Both compressors and the room they write to.
struct Packer {
    table: CompressTable,
    /// Made at the first page that needs it: on ordinary links none does.
    zstd: Option<zstd::bulk::Compressor<'static>>,
    scratch: Box<[u8]>,
}

impl BatchEncoder {
    /// Makes an encoder of batches of at most `capacity` bytes. `base` is the epoch that the receiver has committed, if
    /// pages may be encoded against it.
    ///
    /// # Panics
    /// Panics if the capacity can't hold one page, or is over the bound of a message.
    #[must_use]
    pub fn new(capacity: usize, base: Option<Epoch>) -> Self {
        Self::with_buffer(BytesMut::with_capacity(capacity), base)
    }

    /// Makes an encoder that writes its first batch into `buffer`, whose capacity is that of all batches.
    ///
    /// # Panics
    /// Panics if the buffer is not empty, can't hold one page, or is over the bound of a message.
    #[must_use]
    pub fn with_buffer(buffer: BytesMut, base: Option<Epoch>) -> Self {
        let capacity = buffer.capacity();
        assert!(
            buffer.is_empty() && (BATCH_BYTES_MIN..=BODY_BYTES_MAX).contains(&capacity),
            "a batch of {capacity} bytes"
        );
        Self {
            out: buffer,
            capacity,
            base,
            count: 0,
            next: 0,
            packer: Packer {
                table: CompressTable::small(),
                zstd: None,
                scratch: vec![0; get_maximum_output_size(PAGE_BYTES)].into_boxed_slice(),
            },
            stats: CodecStats::default(),
        }
    }

    /// Goes on to another epoch; its compressors and its buffer are kept.
    ///
    /// # Panics
    /// Panics if a batch is begun: its head names the epoch it builds on.
    pub fn rebase(&mut self, base: Option<Epoch>) {
        assert!(self.is_empty(), "a batch builds on one epoch");
        self.base = base;
    }

    /// Adds a page. `reference` is its content in the base, if the cache has it.
    ///
    /// # Panics
    /// Panics if the batch was full, for pages that do not ascend, for an index that no memory has, and for a reference
    /// that is not of this encoder's base.
    pub fn push(&mut self, index: u64, page: &Page, reference: Option<Reference<'_>>, chooser: &mut Chooser) -> Pushed {
        self.assert_fits(index);
        if let Some(reference) = reference {
            assert_eq!(self.base, Some(reference.epoch), "a reference from another base");
            if reference.page == page {
                return if reference.shipped {
                    self.put_bare(index, Codec::Unchanged)
                } else {
                    self.stats.count(Codec::Unchanged, Amount { pages: 1, bytes: 0 });
                    self.pushed(Codec::Unchanged, 0, None)
                };
            }
        }
        if is_zero(page) {
            return self.put_bare(index, Codec::Zero);
        }
        let mark = self.begin();
        let mut ran = None;
        if let Some(reference) = reference {
            ran = Some(Codec::Delta);
            let body = self.put_key(index, Codec::Delta);
            self.out.put_u16_le(0);
            let whole = delta::put(&mut self.out, page, reference.page);
            let length = self.out.len() - body - LENGTH_BYTES;
            if whole && chooser.keeps_delta(length) {
                self.out[body..body + LENGTH_BYTES].copy_from_slice(&length_bytes(length));
                return self.end(index, mark, Codec::Delta, ran);
            }
            self.out.truncate(mark.record);
        }
        let (codec, length) = self.packer.pack(page, chooser);
        let several = ran.is_some();
        if let Some(length) = length {
            self.put_key(index, codec);
            self.out.put_slice(&length_bytes(length));
            self.out.put_slice(&self.packer.scratch[..length]);
            self.end(index, mark, codec, (!several).then_some(codec))
        } else {
            self.put_key(index, Codec::Raw);
            self.out.put_slice(page);
            let timed = (!several && codec != Codec::Raw).then_some(codec);
            self.end(index, mark, Codec::Raw, timed)
        }
    }

    /// Adds a page that the receiver's VM has alike, as it answered to the page's hash.
    ///
    /// # Panics
    /// Panics as `push` does.
    pub fn push_own(&mut self, index: u64) -> Pushed {
        self.assert_fits(index);
        self.put_bare(index, Codec::Own)
    }

    /// Returns whether no further page is sure to fit.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.out.len().max(HEAD_BYTES_MAX) + RECORD_BYTES_MAX > self.capacity
    }

    /// Returns whether the next batch has no page yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Ends the batch and returns its number of pages and its bytes. The next page begins another, and may be any. Without
    /// a page there is no batch: it has no bytes and is not to be sent.
    pub fn finish(&mut self) -> (u32, Bytes) {
        let batch = self.out.split().freeze();
        // Takes the same memory again if the batch before has been sent and dropped.
        self.out.reserve(self.capacity);
        self.next = 0;
        (core::mem::take(&mut self.count), batch)
    }

    /// Returns what was encoded since the encoder was made.
    #[must_use]
    pub fn stats(&self) -> &CodecStats {
        &self.stats
    }

    /// Says whether this page may be next in the batch: it comes after all that are in it.
    #[must_use]
    pub fn follows(&self, index: u64) -> bool {
        index >= self.next
    }

    fn assert_fits(&self, index: u64) {
        assert!(!self.is_full(), "a full batch is finished before it is continued");
        assert!(
            (self.next..INDEX_END).contains(&index),
            "page {index} after page {} of the same batch",
            self.next
        );
    }

    fn put_bare(&mut self, index: u64, codec: Codec) -> Pushed {
        let mark = self.begin();
        self.put_key(index, codec);
        self.end(index, mark, codec, None)
    }

    /// Writes the head if this is the first record.
    fn begin(&mut self) -> Mark {
        if self.out.is_empty() {
            self.out.put_u8(VERSION);
            let base = self.base.map_or(0, |base| base.next().0);
            varint::put(&mut self.out, base);
        }
        Mark { record: self.out.len() }
    }

    /// Returns where the payload begins.
    fn put_key(&mut self, index: u64, codec: Codec) -> usize {
        varint::put(&mut self.out, (index - self.next) << CODEC_BITS | codec as u64);
        self.out.len()
    }

    fn end(&mut self, index: u64, mark: Mark, codec: Codec, timed: Option<Codec>) -> Pushed {
        let bytes = self.out.len() - mark.record;
        self.count += 1;
        self.next = index + 1;
        self.stats.count(
            codec,
            Amount {
                pages: 1,
                bytes: bytes as u64,
            },
        );
        self.pushed(codec, bytes, timed)
    }

    fn pushed(&self, codec: Codec, bytes: usize, timed: Option<Codec>) -> Pushed {
        Pushed {
            codec,
            bytes,
            timed,
            full: self.is_full(),
        }
    }
}

/// Where a record began.
#[derive(Clone, Copy)]
struct Mark {
    record: usize,
}

impl Packer {
    /// Returns the compressor that ran, `Raw` for none, and the length it left in the scratch if that pays.
    fn pack(&mut self, page: &Page, chooser: &mut Chooser) -> (Codec, Option<usize>) {
        let (codec, length) = match chooser.plan(|| self.sample(page)) {
            Plan::Raw => return (Codec::Raw, None),
            Plan::Lz4 => (
                Codec::Lz4,
                Some(self.lz4(page)).filter(|length| *length <= PACKED_BYTES_MAX),
            ),
            Plan::Zstd => (Codec::Zstd, self.zstd(page)),
        };
        chooser.packed(codec, length.unwrap_or(PAGE_BYTES));
        (codec, length)
    }

    fn sample(&mut self, page: &Page) -> bool {
        self.lz4(&page[..SAMPLE_BYTES]) <= SAMPLE_BYTES - SAMPLE_BYTES / 8
    }

    fn lz4(&mut self, bytes: &[u8]) -> usize {
        compress_into_with_table(bytes, &mut self.scratch, &mut self.table)
            .expect("the scratch is of the size that lz4 asks for")
    }

    fn zstd(&mut self, page: &Page) -> Option<usize> {
        self.zstd
            .get_or_insert_with(|| zstd::bulk::Compressor::new(ZSTD_LEVEL).expect("a level that zstd has"))
            .compress_to_buffer(page, &mut self.scratch[..PACKED_BYTES_MAX])
            .ok()
    }
}

fn length_bytes(length: usize) -> [u8; LENGTH_BYTES] {
    u16::try_from(length)
        .expect("bounded by a constant that fits")
        .to_le_bytes()
}
