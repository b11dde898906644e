//! The primary's account of mirrored disk writes: how much the secondary has to hold, and when the guest must wait.
//!
//! Writes are counted by their [`footprint`], which is never less than what the secondary's buffers
//! need, so a write that is admitted here is never refused there. Nothing is dropped: near the bound of an epoch a
//! checkpoint is asked for, at the bound the guest's request waits.
//!
//! Driven by the primary's protocol core; holds no data.

use std::collections::VecDeque;

use checkpoint::Epoch;
use checkpoint::limits::EPOCH_WRITES_BYTES_MAX;

use crate::sectors::footprint;

/// What to do with a write of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admit {
    /// Write it and send it; it has been counted.
    Now,
    /// The same, and take a checkpoint soon.
    NowAndCheckpoint,
    /// Keep the request until an epoch is committed or its queue is sent, then ask again; it has not been counted.
    Wait,
    /// Larger than any epoch may be: an I/O error for the guest.
    Never,
}

/// The account. See the module's documentation.
#[derive(Clone, Debug)]
pub struct Mirror {
    /// Bound for each epoch's footprint, and for what waits to be sent.
    limit: u64,
    running: u64,
    /// Stopped epochs that the secondary has not committed, oldest first.
    closed: VecDeque<(Epoch, u64)>,
    /// Bytes handed to the link and not yet on the wire.
    unsent: u64,
}

impl Default for Mirror {
    fn default() -> Self {
        Self::new(EPOCH_WRITES_BYTES_MAX)
    }
}

impl Mirror {
    /// Starts with nothing mirrored.
    #[must_use]
    pub fn new(limit: u64) -> Self {
        Self {
            limit,
            running: 0,
            closed: VecDeque::new(),
            unsent: 0,
        }
    }

    /// Asks whether the guest's write may be made and mirrored now, and counts it if so.
    #[must_use]
    pub fn admit(&mut self, offset: u64, len: u64) -> Admit {
        let cost = footprint(offset, len);
        if cost > self.limit {
            return Admit::Never;
        }
        if self.running + cost > self.limit || self.unsent + len > self.limit {
            return Admit::Wait;
        }
        self.running += cost;
        self.unsent += len;
        if self.wants_checkpoint() {
            Admit::NowAndCheckpoint
        } else {
            Admit::Now
        }
    }

    /// Tells whether the running epoch is near its bound.
    #[must_use]
    pub fn wants_checkpoint(&self) -> bool {
        self.running >= self.limit / 4 * 3
    }

    /// Notes that the link has written `len` bytes of disk data. A report that is late, after a
    /// [`reset`](Self::reset), does no harm.
    pub fn sent(&mut self, len: u64) {
        self.unsent = self.unsent.saturating_sub(len);
    }

    /// Ends the running epoch, at the stop of its checkpoint.
    ///
    /// # Panics
    /// If epochs do not come in ascending order.
    pub fn close(&mut self, epoch: Epoch) {
        assert!(
            self.closed.back().is_none_or(|(last, _)| *last < epoch),
            "epoch {epoch} closed late"
        );
        self.closed.push_back((epoch, std::mem::take(&mut self.running)));
    }

    /// Notes that the secondary has committed everything up to `epoch`.
    pub fn committed(&mut self, epoch: Epoch) {
        while self.closed.front().is_some_and(|(closed, _)| *closed <= epoch) {
            self.closed.pop_front();
        }
    }

    /// Forgets everything: the link is gone, or a new one begins.
    pub fn reset(&mut self) {
        *self = Self::new(self.limit);
    }

    /// Returns the footprint of the running epoch.
    #[must_use]
    pub fn running_bytes(&self) -> u64 {
        self.running
    }

    /// Returns the footprint of all epochs that the secondary still buffers.
    #[must_use]
    pub fn uncommitted_bytes(&self) -> u64 {
        self.running + self.closed.iter().map(|(_, bytes)| bytes).sum::<u64>()
    }

    /// Returns the bytes that wait for the link.
    #[must_use]
    pub fn unsent_bytes(&self) -> u64 {
        self.unsent
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replica::{Limits, Replica};
    use crate::sim::SimDisk;
    use checkpoint::Tag;
    use proptest::prelude::*;

    #[test]
    fn a_checkpoint_is_asked_for_before_the_guest_must_wait() {
        let mut mirror = Mirror::new(8 * 4096);
        for _ in 0..5 {
            assert_eq!(mirror.admit(0, 4096), Admit::Now);
        }
        assert_eq!(mirror.admit(0, 4096), Admit::NowAndCheckpoint);
        assert_eq!(mirror.admit(0, 4096), Admit::NowAndCheckpoint);
        assert_eq!(mirror.admit(0, 4096), Admit::NowAndCheckpoint);
        assert_eq!(mirror.admit(0, 512), Admit::Wait);
        mirror.sent(8 * 4096);
        assert_eq!(mirror.admit(0, 512), Admit::Wait, "the epoch is full, sent or not");
        mirror.close(Epoch(1));
        assert_eq!(mirror.admit(0, 512), Admit::Now);
        assert_eq!(mirror.uncommitted_bytes(), 9 * 4096);
        mirror.committed(Epoch(1));
        assert_eq!(mirror.uncommitted_bytes(), 4096);
    }

    #[test]
    fn a_slow_link_holds_the_guest_back() {
        let mut mirror = Mirror::new(8 * 4096);
        assert_eq!(mirror.admit(0, 8 * 4096), Admit::NowAndCheckpoint);
        mirror.close(Epoch(1));
        assert_eq!(mirror.admit(0, 512), Admit::Wait);
        mirror.sent(512);
        assert_eq!(mirror.admit(0, 512), Admit::Now);
        assert_eq!(mirror.admit(0, 9 * 4096), Admit::Never);
        mirror.reset();
        assert_eq!((mirror.unsent_bytes(), mirror.uncommitted_bytes()), (0, 0));
    }

    proptest! {
        /// What the account admits, a replica with twice the bound takes: two epochs are uncommitted at most.
        #[test]
        fn what_is_admitted_is_never_refused(writes in prop::collection::vec((0_u64..120, 1_usize..9, prop::bool::weighted(0.1)), 1..200)) {
            let disk = SimDisk::new(1);
            let limits = Limits { overlay: 4096, staged: 2 * 8 * 4096 };
            let (image, journal) = (disk.image(65_536), disk.image(crate::journal::size_for(65_536)));
            let mut replica = Replica::new(image, journal, limits, Tag::default());
            let mut mirror = Mirror::new(8 * 4096);
            let mut epoch = Epoch(1);
            for (sector, count, stop) in writes {
                let data = vec![1; count * 512];
                if mirror.admit(sector * 512, data.len() as u64) == Admit::Wait || stop {
                    if let Some(job) = { replica.reserve(epoch).unwrap(); replica.commit(epoch) } {
                        let done = job.run().unwrap();
                        prop_assert!(replica.committed(&done).is_none());
                    }
                    mirror.sent(mirror.unsent_bytes());
                    mirror.close(epoch);
                    mirror.committed(epoch);
                    epoch = epoch.next();
                } else {
                    replica.stage(epoch, sector * 512, &data).unwrap();
                    prop_assert!(replica.staged_bytes() <= mirror.uncommitted_bytes());
                }
            }
        }
    }
}
