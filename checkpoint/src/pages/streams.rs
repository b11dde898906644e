//! Which stream a page travels on.
//!
//! A page always takes the same stream within a pairing, so that what is shipped of it keeps its order, and what is staged
//! of different streams never has a page in common. Neighbours take the same one, so that their numbers stay short in a batch.

/// Pages in a row that take the same stream.
const CHUNK_PAGES: u64 = 8;

/// Returns the stream of a page, of so many.
///
/// # Panics
/// Panics without a stream.
#[must_use]
pub fn stream_of(page: u64, streams: usize) -> usize {
    let stream = page / CHUNK_PAGES % streams as u64;
    usize::try_from(stream).expect("below the number of streams")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::STREAMS_MAX;

    #[test]
    fn each_stream_has_its_share() {
        for streams in 1..=STREAMS_MAX {
            let mut shares = vec![0; streams];
            (0..840 * CHUNK_PAGES).for_each(|page| shares[stream_of(page, streams)] += 1);
            assert_eq!(shares, vec![840 * CHUNK_PAGES / streams as u64; streams]);
        }
        assert_eq!((stream_of(7, 2), stream_of(8, 2), stream_of(u64::MAX, 1)), (0, 1, 0));
    }
}
