//! Memory for frames that is used again, so that a frame costs no allocation.
//!
//! A [`FramePool`] copies each frame into a buffer of its own, of one of a few sizes, and keeps a second handle on it. Once
//! every holder of the frame has dropped it the buffer is free for another. So a frame that is kept for long keeps no more than its own
//! buffer alive, at most about four times its length, and nobody has to give anything back.
//!
//! Pure: whoever reads frames has a pool.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

/// The sizes of buffers, and how many of each are used again; what is larger is not. Of usual ones, more than a secondary keeps of what
/// has left for the primary (512), or none would be free when its turn comes.
const SIZES: [(usize, usize); 6] = [
    (128, 1024),
    (512, 1024),
    (2 * 1024, 1024),
    (4 * 1024, 256),
    (16 * 1024, 128),
    (68 * 1024, 64),
];
/// How many buffers are looked at before another is made.
const PROBES: usize = 4;

/// Buffers for frames; see the module.
#[derive(Debug, Default)]
pub struct FramePool {
    /// Of each size, the longest used first.
    rings: [VecDeque<BytesMut>; SIZES.len()],
}

impl FramePool {
    /// Makes a pool without any buffer.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns a copy of a frame.
    pub fn copy(&mut self, frame: &[u8]) -> Bytes {
        self.copy_mut(frame).freeze()
    }

    /// Returns a copy of a frame that can be changed.
    pub fn copy_mut(&mut self, frame: &[u8]) -> BytesMut {
        let class = SIZES.iter().position(|(size, _)| frame.len() <= *size);
        let Some((ring, (size, count))) = class.map(|class| (&mut self.rings[class], SIZES[class])) else {
            return BytesMut::from(frame);
        };
        let mut buffer = take(ring, size, count);
        buffer.extend_from_slice(frame);
        let copy = buffer.split();
        ring.push_back(buffer);
        copy
    }
}

/// A pool's buffers are its own: a copy of whoever has it begins without any.
impl Clone for FramePool {
    fn clone(&self) -> Self {
        Self::new()
    }
}

/// Returns an empty buffer: one that nobody holds any more, or a new one.
fn take(ring: &mut VecDeque<BytesMut>, size: usize, count: usize) -> BytesMut {
    for _ in 0..PROBES.min(ring.len()) {
        let Some(mut buffer) = ring.pop_front() else { break };
        if buffer.try_reclaim(size) {
            return buffer;
        }
        ring.push_back(buffer);
    }
    if ring.len() >= count {
        // Whoever holds its frame keeps it.
        ring.pop_front();
    }
    BytesMut::with_capacity(size)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_buffer_is_used_again_once_its_frame_is_dropped() {
        let mut pool = FramePool::new();
        let frame = pool.copy(&[1; 60]);
        let place = frame.as_ptr();
        let part = frame.slice(10..20);
        drop(frame);
        let other = pool.copy(&[2; 60]);
        assert_ne!(other.as_ptr(), place, "a part of it is held");
        assert_eq!(part, [1; 10][..]);
        drop(part);
        assert_eq!(pool.copy(&[3; 100]).as_ptr(), place);
        assert_eq!(other, [2; 60][..]);
    }

    #[test]
    fn frames_that_are_kept_are_not_the_pools_for_long() {
        let mut pool = FramePool::new();
        let kept: Vec<Bytes> = (0..5_000).map(|_| pool.copy(&[7; 1_500])).collect();
        assert_eq!(pool.rings.iter().map(VecDeque::len).sum::<usize>(), 1024);
        drop(kept);
        let places: std::collections::BTreeSet<_> = (0..1_000).map(|_| pool.copy(&[7; 1_500]).as_ptr()).collect();
        assert!(places.len() <= 1024);
    }

    #[test]
    fn a_holder_of_the_last_frames_leaves_enough_to_be_used_again() {
        let mut pool = FramePool::new();
        let mut last = VecDeque::new();
        let mut places = std::collections::BTreeSet::new();
        let mut new = 0;
        for number in 0..20_000 {
            let frame = pool.copy(&[7; 1_500]);
            new += usize::from(places.insert(frame.as_ptr()) && number >= 10_000);
            last.push_back(frame);
            if last.len() > 600 {
                last.pop_front();
            }
        }
        assert_eq!(new, 0, "once there are enough, none is made");
    }

    proptest! {
        #[test]
        fn no_frame_changes_while_it_is_held(
            steps in proptest::collection::vec((0usize..70_000, any::<u8>(), any::<bool>()), 1..60),
        ) {
            let mut pool = FramePool::new();
            let mut held: Vec<(Bytes, usize, u8)> = Vec::new();
            for (length, byte, drops) in steps {
                held.push((pool.copy(&vec![byte; length]), length, byte));
                if drops {
                    held.swap_remove(length % held.len());
                }
                for (frame, length, byte) in &held {
                    prop_assert!(frame.len() == *length && frame.iter().all(|other| other == byte));
                }
            }
        }
    }
}
