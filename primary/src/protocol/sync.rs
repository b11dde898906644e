//! The initial sync: as much of memory and disk as the secondary lacks.
//!
//! A returning secondary tells in its welcome which checkpoint its memory and its disk are. If that is one that this
//! side has sent, and nothing since then has been forgotten, only the difference is sent: the pages that are dirty, the
//! blocks that are marked. Both only ever grow until a checkpoint is safe on the other side: pages count as clean from
//! the acknowledgement on, since from there the secondary's memory has them, and blocks from `Committed` on, since a
//! secondary that loses power before goes back to an older disk.

use std::collections::VecDeque;

use super::{
    Action, BlockHashes, ChangedBlocks, Duration, Epoch, InputNumber, Instant, Message, Primary, Report, Shipment,
    State, Tag, Totals, Trigger, limits,
};
use checkpoint::wire::{Begin, Held};

/// Checkpoints that are remembered; a secondary that is further behind is synced as a whole.
const KNOWN_MAX: usize = 64;
/// Longest time to the next of the secondary's block hashes, [`limits::HASHED_BLOCKS_PER_MESSAGE`] of them: heartbeats may pass though
/// its disk hangs or the data connection is stuck.
const HASHES_WAIT_MAX: Duration = Duration::from_millis(5_000);

/// The checkpoints to which the difference is known: a secondary may hold any of them.
#[derive(Debug, Default)]
pub(super) struct Known(VecDeque<Tag>);

impl Known {
    /// The secondary may hold this checkpoint from now on.
    pub(super) fn sent(&mut self, tag: Tag) {
        if self.0.len() == KNOWN_MAX {
            self.0.pop_front();
        }
        self.0.push_back(tag);
    }

    /// The difference to what came before this checkpoint is forgotten.
    pub(super) fn forget_before(&mut self, tag: Tag) {
        self.0.retain(|known| *known >= tag);
    }

    /// The difference to everything is forgotten.
    fn forget(&mut self) {
        self.0.clear();
    }

    fn has(&self, tag: Tag) -> bool {
        self.0.contains(&tag)
    }
}

/// What the last initial sync sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SyncCounts {
    /// Pages that were sent while the guest ran.
    pub pages: u64,
    /// Pages of the whole memory.
    pub pages_total: u64,
    /// Whether only pages were sent that had changed since the last common checkpoint.
    pub memory_by_difference: bool,
    /// Blocks known to have changed since the last common checkpoint; `None` if the disks were compared.
    pub blocks: Option<u64>,
    /// Blocks of the whole disk.
    pub blocks_total: u64,
}

impl Primary {
    pub(super) fn begin_sync(&mut self, now: Instant, actions: &mut Vec<Action>) {
        if self.ending.is_some() {
            return;
        }
        let base = Held {
            memory: self.held.memory.filter(|tag| self.memory_known.has(*tag)),
            disk: self.held.disk.filter(|tag| self.disk_known.has(*tag)),
        };
        let tag = self.tag();
        self.totals = Totals::new(tag, base.memory.map(|tag| tag.epoch), self.streams);
        self.hashed = 0;
        self.write_bytes = 0;
        self.is_full = false;
        self.input = InputNumber(0);
        self.confirmed = InputNumber(0);
        self.unconfirmed.clear();
        self.state = State::Syncing {
            disk: false,
            memory: false,
        };
        actions.push(Action::Send(Message::Begin(Begin { tag, base })));
        if base.memory.is_none() {
            self.memory_known.forget();
        }
        actions.push(Action::SyncMemory {
            totals: self.totals.clone(),
            difference: base.memory.is_some(),
        });
        let blocks = self.begin_disk_sync(tag, base.disk.is_some(), actions);
        self.hashes_by = blocks.is_none().then_some(now + HASHES_WAIT_MAX);
        self.counters.sync = SyncCounts {
            pages: 0,
            pages_total: self.options.memory_bytes / limits::PAGE_BYTES as u64,
            memory_by_difference: base.memory.is_some(),
            blocks,
            blocks_total: storage::verify::block_count(self.options.disk_bytes),
        };
    }

    /// What is marked from here on goes with the first checkpoint. Returns how many blocks go before.
    fn begin_disk_sync(&mut self, tag: Tag, difference: bool, actions: &mut Vec<Action>) -> Option<u64> {
        let common = Tag {
            generation: tag.generation,
            epoch: Epoch(tag.epoch.0 - 1),
        };
        if !difference {
            self.disk_known.forget();
            self.changed = ChangedBlocks::new(self.options.disk_bytes, common);
            return None;
        }
        self.changed.reopen();
        let blocks: Vec<u64> = self.changed.running_blocks().iter().collect();
        self.changed.close(common);
        let count = blocks.len() as u64;
        actions.push(Action::SendBlocks { tag, blocks });
        Some(count)
    }

    pub(super) fn synced(&mut self, now: Instant, shipment: Option<Shipment>, actions: &mut Vec<Action>) {
        let State::Syncing { disk, memory } = self.state else {
            return;
        };
        if self.ending.is_some() {
            return;
        }
        let (disk, memory) = (disk || shipment.is_none(), memory || shipment.is_some());
        self.state = State::Syncing { disk, memory };
        if let Some(shipment) = shipment {
            self.counters.pages += shipment.pages;
            self.counters.page_bytes += shipment.bytes;
            self.counters.sync.pages = shipment.pages;
            self.totals = shipment.totals;
        }
        if disk && memory {
            self.stop_for(now, Trigger::Sync, actions);
        }
    }

    /// Hashes come in order and once each, so that the last of them ends the comparison.
    pub(super) fn hashes_arrived(&mut self, now: Instant, hashes: BlockHashes, actions: &mut Vec<Action>) {
        let blocks = storage::verify::block_count(self.options.disk_bytes);
        let end = hashes.first.saturating_add(hashes.hashes.len() as u64);
        let wanted = matches!(self.state, State::Syncing { disk: false, .. })
            && self.counters.sync.blocks.is_none()
            && hashes.tag == self.tag();
        if !wanted || hashes.first != self.hashed || end > blocks {
            return self.misbehaved(now, "its block hashes are out of order", actions);
        }
        self.hashed = end;
        self.hashes_by = (end < blocks).then_some(now + HASHES_WAIT_MAX);
        actions.push(Action::CompareBlocks(hashes));
    }

    /// Tells what the sync has saved, once its checkpoint is acknowledged.
    pub(super) fn report_sync(&self, actions: &mut Vec<Action>) {
        let SyncCounts {
            pages,
            pages_total,
            memory_by_difference,
            blocks,
            blocks_total,
        } = self.counters.sync;
        let told = match (memory_by_difference, blocks) {
            (true, Some(blocks)) => {
                format!("resync by difference: {pages} of {pages_total} pages, {blocks} of {blocks_total} blocks")
            }
            (false, Some(blocks)) => format!(
                "sync of all memory, {pages} of {pages_total} pages, and of the disk by difference: {blocks} of {blocks_total} blocks"
            ),
            (true, None) => format!(
                "resync of memory by difference: {pages} of {pages_total} pages; {blocks_total} blocks of the disk compared"
            ),
            (false, None) => format!(
                "sync of all memory, {pages} of {pages_total} pages; {blocks_total} blocks of the disk compared"
            ),
        };
        actions.push(Action::Report(Report::Note(told)));
    }
}
