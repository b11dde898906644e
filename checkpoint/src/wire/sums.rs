//! What travelled on the page streams of a checkpoint: counts, and the crc32 of all bytes in their order, for each stream apart.
//!
//! A batch carries the crc32 of its bytes, which was computed when it was made or verified when it was read. Sums are put
//! together from those, so that nobody who only counts reads the bytes again.
//!
//! Part of the wire format, see the parent module. Never holds the data.

use bytes::Bytes;
use rkyv::{Archive, Deserialize, Serialize};

use crate::epoch::Tag;
use crate::limits::STREAMS_MAX;

/// Encoded pages, see `pages`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageBatch {
    /// Epoch that the pages end.
    pub tag: Tag,
    /// Number of pages encoded.
    pub count: u32,
    /// The encoded pages.
    pub encoded: Bytes,
    crc: u32,
}

impl PageBatch {
    /// Makes a batch, and sums its bytes.
    #[must_use]
    pub fn new(tag: Tag, count: u32, encoded: Bytes) -> Self {
        let crc = crc32fast::hash(&encoded);
        Self::summed(tag, count, encoded, crc)
    }

    /// Makes a batch of bytes whose sum is known.
    pub(super) fn summed(tag: Tag, count: u32, encoded: Bytes, crc: u32) -> Self {
        Self {
            tag,
            count,
            encoded,
            crc,
        }
    }

    pub(super) fn crc(&self) -> u32 {
        self.crc
    }
}

#[allow(missing_docs, reason = "the rkyv derive leaves a generated field undocumented")]
mod sum {
    use super::{Archive, Deserialize, Serialize};

    /// What travelled on one stream.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Archive, Serialize, Deserialize)]
    pub struct PageSum {
        /// Pages.
        pub pages: u64,
        /// Their encoded bytes.
        pub bytes: u64,
        /// crc32 of all these bytes, in the order in which they travelled.
        pub digest: u32,
    }
}

pub use sum::PageSum;

impl PageSum {
    /// Returns the sum of one batch.
    #[must_use]
    pub fn of(batch: &PageBatch) -> Self {
        Self {
            pages: batch.count.into(),
            bytes: batch.encoded.len() as u64,
            digest: batch.crc,
        }
    }

    /// Goes on with what travelled after it.
    pub fn add(&mut self, next: Self) {
        let mut digest = crc32fast::Hasher::new_with_initial_len(self.digest, self.bytes);
        digest.combine(&crc32fast::Hasher::new_with_initial_len(next.digest, next.bytes));
        self.digest = digest.finalize();
        self.pages = self.pages.saturating_add(next.pages);
        self.bytes = self.bytes.saturating_add(next.bytes);
    }
}

/// One sum for each page stream of a pairing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageSums {
    streams: usize,
    sums: [PageSum; STREAMS_MAX],
}

impl PageSums {
    /// Makes the sums of so many streams, on which nothing has travelled.
    ///
    /// # Panics
    /// Panics on a number of streams that no pairing has.
    #[must_use]
    pub fn new(streams: usize) -> Self {
        assert!((1..=STREAMS_MAX).contains(&streams), "{streams} page streams");
        Self {
            streams,
            sums: [PageSum::default(); STREAMS_MAX],
        }
    }

    /// Returns those sums, if it is as many as a pairing may have.
    #[must_use]
    pub fn of(sums: &[PageSum]) -> Option<Self> {
        let streams = sums.len();
        (1..=STREAMS_MAX).contains(&streams).then(|| {
            let mut all = Self::new(streams);
            all.sums[..streams].copy_from_slice(sums);
            all
        })
    }

    /// Returns one sum a stream.
    #[must_use]
    pub fn as_slice(&self) -> &[PageSum] {
        &self.sums[..self.streams]
    }

    /// Goes on with what travelled on a stream.
    ///
    /// # Panics
    /// Panics on a stream that the pairing does not have.
    pub fn add(&mut self, stream: usize, next: PageSum) {
        self.sums[..self.streams][stream].add(next);
    }

    /// Goes on with what travelled on all of them.
    ///
    /// # Panics
    /// Panics if it is another number of streams.
    pub fn add_all(&mut self, next: &Self) {
        assert_eq!(self.streams, next.streams, "page streams of one pairing");
        for (sum, next) in self.sums.iter_mut().zip(next.sums) {
            sum.add(next);
        }
    }

    /// Returns the encoded bytes of all streams.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.as_slice().iter().map(|sum| sum.bytes).sum()
    }

    /// Returns the pages of all streams.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.as_slice().iter().map(|sum| sum.pages).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(bytes: Vec<u8>) -> PageBatch {
        PageBatch::new(Tag::default(), 3, bytes.into())
    }

    #[test]
    fn the_digest_is_the_crc_of_all_bytes_in_their_order() {
        let (first, second) = (vec![7; 3_000], (0..=255).cycle().take(70_001).collect::<Vec<u8>>());
        let mut sum = PageSum::default();
        for part in [&first, &Vec::new(), &second] {
            sum.add(PageSum::of(&batch(part.clone())));
        }
        let whole = [first, second].concat();
        assert_eq!((sum.pages, sum.bytes), (9, whole.len() as u64));
        assert_eq!(sum.digest, crc32fast::hash(&whole));
    }

    #[test]
    fn streams_are_summed_apart() {
        let mut sums = PageSums::new(3);
        sums.add(0, PageSum::of(&batch(vec![1])));
        sums.add(2, PageSum::of(&batch(vec![2])));
        assert_eq!(sums.pages(), 6);
        assert_eq!(sums.as_slice()[1], PageSum::default());
        let mut twice = sums;
        twice.add_all(&sums);
        assert_eq!(twice.as_slice()[2].digest, crc32fast::hash(&[2, 2]));
        assert_eq!(PageSums::of(sums.as_slice()), Some(sums));
        assert_eq!(PageSums::of(&[]), None);
        assert_eq!(PageSums::of(&[PageSum::default(); STREAMS_MAX + 1]), None);
    }
}
