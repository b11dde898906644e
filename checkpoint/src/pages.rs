//! Pages of guest memory in batches.
//!
//! A batch is a sequence of records, each
//!
//! ```text
//!   LEB128( page index × 4 + encoding )   encoding 0 zero: nothing more
//!                                         encoding 1 raw:  4,096 bytes
//!                                         encoding 2 lz4:  u16 length, then a block of that length
//! ```
//!
//! A page is sent as lz4 only where that saves an eighth of it; less is not worth the receiver's time.
//! Decoding is total, takes no memory beyond one page, and never hands out an index past the memory's end.
//!
//! Driven by the shells that ship and stage pages. Never touches guest memory itself.

use bytes::{BufMut, Bytes, BytesMut};
use lz4_flex::block::{CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size};

use crate::limits::{BODY_BYTES_MAX, PAGE_BYTES};

/// A page's bytes.
pub type Page = [u8; PAGE_BYTES];

/// A good capacity for a batch: long enough for the link, short enough to leave the wire to others soon.
pub const BATCH_BYTES: usize = 256 * 1024;
/// The capacity below which no batch goes: it must hold one record.
pub const BATCH_BYTES_MIN: usize = RECORD_BYTES_MAX;

const ENCODING_ZERO: u8 = 0;
const ENCODING_RAW: u8 = 1;
const ENCODING_LZ4: u8 = 2;
const ENCODING_BITS: u32 = 2;
const VARINT_BYTES_MAX: usize = 10;
const RECORD_BYTES_MAX: usize = VARINT_BYTES_MAX + PAGE_BYTES;
/// The longest lz4 block that is sent.
const LZ4_BYTES_MAX: usize = PAGE_BYTES - PAGE_BYTES / 8;
/// Page indices that can be encoded; more pages than any memory has.
const INDEX_END: u64 = 1 << (u64::BITS - ENCODING_BITS);

const ZERO_PAGE: Page = [0; PAGE_BYTES];

const _: () = assert!(BATCH_BYTES <= BODY_BYTES_MAX);
const _: () = assert!(LZ4_BYTES_MAX <= u16::MAX as usize);

/// Why bytes are not a batch of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PageError {
    /// A record ends in the middle.
    #[error("page record {0} is cut off")]
    Truncated(u32),
    /// An index is not encoded in the one proper way.
    #[error("page record {0} has a malformed index")]
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
    /// A compressed page that does not give a page.
    #[error("page {index} does not decompress to a page")]
    Compression {
        /// The page.
        index: u64,
    },
    /// The number of pages is not the one announced.
    #[error("the batch holds {found} pages instead of {announced}")]
    Count {
        /// Pages in it.
        found: u32,
        /// Pages that the message promised.
        announced: u32,
    },
}

/// Collects pages into one batch after another.
pub struct BatchEncoder {
    out: BytesMut,
    count: u32,
    capacity: usize,
    table: CompressTable,
    scratch: Box<[u8]>,
}

impl BatchEncoder {
    /// Makes an encoder of batches of at most `capacity` bytes.
    ///
    /// # Panics
    /// Panics if the capacity can't hold one page, or is over the bound of a message.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        assert!(
            (BATCH_BYTES_MIN..=BODY_BYTES_MAX).contains(&capacity),
            "a batch of {capacity} bytes"
        );
        Self {
            out: BytesMut::with_capacity(capacity),
            count: 0,
            capacity,
            table: CompressTable::small(),
            scratch: vec![0; get_maximum_output_size(PAGE_BYTES)].into_boxed_slice(),
        }
    }

    /// Adds a page. Returns whether the batch is full, and must be finished before the next page.
    ///
    /// # Panics
    /// Panics if the batch was full, or for an index that no memory has.
    pub fn push(&mut self, index: u64, page: &Page) -> bool {
        assert!(!self.is_full(), "a full batch is finished before it is continued");
        assert!(index < INDEX_END, "page index {index}");
        if is_zero(page) {
            self.put_key(index, ENCODING_ZERO);
        } else {
            let length = compress_into_with_table(page, &mut self.scratch, &mut self.table)
                .expect("the scratch is of the size that lz4 asks for");
            if length <= LZ4_BYTES_MAX {
                self.put_key(index, ENCODING_LZ4);
                self.out
                    .put_u16_le(u16::try_from(length).expect("bounded by a constant that fits"));
                self.out.put_slice(&self.scratch[..length]);
            } else {
                self.put_key(index, ENCODING_RAW);
                self.out.put_slice(page);
            }
        }
        self.count += 1;
        self.is_full()
    }

    /// Returns whether no further page is sure to fit.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.out.len() + RECORD_BYTES_MAX > self.capacity
    }

    /// Returns whether no page was added since the last batch.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Ends the batch and returns its number of pages and its bytes. The next page begins another.
    pub fn finish(&mut self) -> (u32, Bytes) {
        let batch = self.out.split().freeze();
        self.out.reserve(self.capacity);
        (core::mem::take(&mut self.count), batch)
    }

    fn put_key(&mut self, index: u64, encoding: u8) {
        let mut key = index << ENCODING_BITS | u64::from(encoding);
        while key >= 0x80 {
            self.out.put_u8(key.to_le_bytes()[0] | 0x80);
            key >>= 7;
        }
        self.out.put_u8(key.to_le_bytes()[0]);
    }
}

/// Decodes a batch, giving each page to `apply` in order. Returns the number of pages.
///
/// Pages before a fault have been given out when it is found: use [`check_batch`] first where that matters.
///
/// # Errors
/// Says what is wrong with the batch.
pub fn decode_batch(encoded: &[u8], pages_total: u64, mut apply: impl FnMut(u64, &Page)) -> Result<u32, PageError> {
    let mut page = ZERO_PAGE;
    let mut rest = encoded;
    let mut record = 0;
    while !rest.is_empty() {
        let key = take_key(&mut rest, record)?;
        let index = key >> ENCODING_BITS;
        let encoding = key.to_le_bytes()[0] & ((1 << ENCODING_BITS) - 1);
        if index >= pages_total {
            return Err(PageError::Outside {
                index,
                pages: pages_total,
            });
        }
        match encoding {
            ENCODING_ZERO => apply(index, &ZERO_PAGE),
            ENCODING_RAW => {
                let (raw, later) = rest
                    .split_first_chunk::<PAGE_BYTES>()
                    .ok_or(PageError::Truncated(record))?;
                apply(index, raw);
                rest = later;
            }
            ENCODING_LZ4 => {
                let (length, later) = rest.split_first_chunk::<2>().ok_or(PageError::Truncated(record))?;
                let length = usize::from(u16::from_le_bytes(*length));
                let (block, later) = later.split_at_checked(length).ok_or(PageError::Truncated(record))?;
                if !matches!(decompress_into(block, &mut page), Ok(PAGE_BYTES)) {
                    return Err(PageError::Compression { index });
                }
                apply(index, &page);
                rest = later;
            }
            encoding => return Err(PageError::Encoding { record, encoding }),
        }
        record = record.checked_add(1).ok_or(PageError::Truncated(record))?;
    }
    Ok(record)
}

/// Checks a batch as a whole, so that decoding it later can't fail.
///
/// # Errors
/// Says what is wrong with the batch.
pub fn check_batch(encoded: &[u8], pages_total: u64, announced: u32) -> Result<(), PageError> {
    let found = decode_batch(encoded, pages_total, |_, _| ())?;
    if found == announced {
        Ok(())
    } else {
        Err(PageError::Count { found, announced })
    }
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

fn take_key(rest: &mut &[u8], record: u32) -> Result<u64, PageError> {
    let mut key = 0_u64;
    for place in 0..VARINT_BYTES_MAX {
        let (byte, later) = rest.split_first().ok_or(PageError::Truncated(record))?;
        *rest = later;
        let bits = u64::from(byte & 0x7f);
        let shift = 7 * place;
        if bits << shift >> shift != bits {
            return Err(PageError::Index(record));
        }
        key |= bits << shift;
        if byte & 0x80 == 0 {
            // A last byte of zero adds nothing: the same index would have two encodings.
            return if *byte == 0 && place > 0 {
                Err(PageError::Index(record))
            } else {
                Ok(key)
            };
        }
    }
    Err(PageError::Index(record))
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Content {
        Zero,
        Pattern(u8, u8),
        Noise(u64),
    }

    fn page(content: &Content) -> Box<Page> {
        let mut page = Box::new(ZERO_PAGE);
        match content {
            Content::Zero => {}
            Content::Pattern(value, step) => {
                page.iter_mut()
                    .step_by(usize::from(*step) + 1)
                    .for_each(|byte| *byte = *value);
            }
            Content::Noise(seed) => {
                let mut seed = seed | 1;
                for byte in page.iter_mut() {
                    seed = seed
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1_442_695_040_888_963_407);
                    *byte = seed.to_le_bytes()[7];
                }
            }
        }
        page
    }

    fn contents() -> impl Strategy<Value = Content> {
        prop_oneof![
            Just(Content::Zero),
            (any::<u8>(), any::<u8>()).prop_map(|(value, step)| Content::Pattern(value, step)),
            any::<u64>().prop_map(Content::Noise),
        ]
    }

    fn encode(pages: &[(u64, Content)]) -> Vec<(u32, Bytes)> {
        let mut encoder = BatchEncoder::new(BATCH_BYTES_MIN * 4);
        let mut batches = Vec::new();
        for (index, content) in pages {
            if encoder.push(*index, &page(content)) {
                batches.push(encoder.finish());
            }
        }
        batches.push(encoder.finish());
        assert!(encoder.is_empty());
        batches
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn pages_come_back_as_they_were(pages in vec((0..INDEX_END, contents()), 0..40)) {
            let mut decoded = Vec::new();
            for (count, batch) in encode(&pages) {
                prop_assert!(batch.len() <= BATCH_BYTES_MIN * 4);
                prop_assert_eq!(check_batch(&batch, INDEX_END, count), Ok(()));
                prop_assert_eq!(
                    check_batch(&batch, INDEX_END, count + 1),
                    Err(PageError::Count { found: count, announced: count + 1 })
                );
                decode_batch(&batch, INDEX_END, |index, page| decoded.push((index, Box::new(*page)))).unwrap();
            }
            let expected: Vec<_> = pages.iter().map(|(index, content)| (*index, page(content))).collect();
            prop_assert!(decoded == expected);
        }

        #[test]
        fn damaged_batches_never_leave_the_memory(
            pages in vec((0..64u64, contents()), 1..6),
            damage in vec((any::<prop::sample::Index>(), any::<u8>()), 1..5),
            length in any::<prop::sample::Index>(),
        ) {
            for (_, batch) in encode(&pages) {
                let mut bytes = batch.to_vec();
                if bytes.is_empty() {
                    continue;
                }
                for (at, value) in &damage {
                    let at = at.index(bytes.len());
                    bytes[at] = *value;
                }
                bytes.truncate(length.index(bytes.len() + 1));
                let _ = decode_batch(&bytes, 64, |index, _| assert!(index < 64));
            }
        }
    }

    #[test]
    fn garbage_is_an_error_or_pages_within_the_memory() {
        let mut seed = 0x2545_f491_4f6c_dd1d_u64;
        for round in 0..100_000_usize {
            let mut bytes = [0; 96];
            for byte in &mut bytes {
                seed = seed
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                *byte = seed.to_le_bytes()[6] >> (round % 5);
            }
            let _ = decode_batch(&bytes[..round % 97], 32, |index, _| assert!(index < 32));
        }
    }

    #[test]
    fn each_encoding_is_used_where_it_pays() {
        let lengths = [Content::Zero, Content::Pattern(1, 7), Content::Noise(3)].map(|content| {
            let [(1, batch)] = &encode(&[(5, content)])[..] else {
                panic!("one page, one batch")
            };
            batch.len()
        });
        assert_eq!(lengths[0], 1);
        assert!(lengths[1] < 100, "{lengths:?}");
        assert_eq!(lengths[2], 1 + PAGE_BYTES);
    }

    #[test]
    fn bytes_of_a_batch_are_fixed() {
        let mut encoder = BatchEncoder::new(BATCH_BYTES);
        encoder.push(0, &ZERO_PAGE);
        encoder.push(40, &ZERO_PAGE);
        assert_eq!(encoder.finish(), (2, Bytes::from_static(&[0, 0xa0, 1])));
    }

    #[test]
    fn hostile_batches_are_named() {
        let decode = |bytes: &[u8]| decode_batch(bytes, 10, |_, _| ());
        assert_eq!(decode(&[3]), Err(PageError::Encoding { record: 0, encoding: 3 }));
        assert_eq!(decode(&[40]), Err(PageError::Outside { index: 10, pages: 10 }));
        assert_eq!(decode(&[0, 1, 0]), Err(PageError::Truncated(1)));
        assert_eq!(decode(&[2, 5]), Err(PageError::Truncated(0)));
        assert_eq!(decode(&[2, 5, 0, 1]), Err(PageError::Truncated(0)));
        assert_eq!(decode(&[2, 1, 0, 0]), Err(PageError::Compression { index: 0 }));
        assert_eq!(
            decode(&[0x80, 0]),
            Err(PageError::Index(0)),
            "two encodings of one index"
        );
        assert_eq!(decode(&[0xff; 11]), Err(PageError::Index(0)), "an index over 64 bits");
        assert_eq!(decode(&[0x80]), Err(PageError::Truncated(0)));
    }

    #[test]
    fn a_block_of_more_than_a_page_is_refused() {
        let long = lz4_flex::block::compress(&[7; PAGE_BYTES + 1]);
        let short = lz4_flex::block::compress(&[7; PAGE_BYTES - 1]);
        for block in [long, short] {
            let mut bytes = vec![2];
            bytes.extend_from_slice(&u16::try_from(block.len()).unwrap().to_le_bytes());
            bytes.extend_from_slice(&block);
            assert_eq!(
                decode_batch(&bytes, 1, |_, _| ()),
                Err(PageError::Compression { index: 0 })
            );
        }
    }

    #[test]
    fn one_bit_anywhere_is_not_zero() {
        assert!(is_zero(&ZERO_PAGE));
        for at in 0..PAGE_BYTES {
            let mut page = ZERO_PAGE;
            page[at] = 0x10;
            assert!(!is_zero(&page), "byte {at}");
        }
    }
}
