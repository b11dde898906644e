//! What a host's disk thread does: one order after the other, each with its own end, good or bad.
//!
//! Mirrors `primary/src/vm.rs` and `secondary/src/disk.rs`: which failure becomes which event.

use checkpoint::Tag;
use checkpoint::pair::RecordUpdate;
use checkpoint::wire::{BlockHashes, DiskWrite, Message};
use primary::event::Event as PrimaryEvent;
use secondary::event::Event as SecondaryEvent;
use storage::CommitJob;
use storage::sim::SimImage;
use storage::verify::{BlockHash, HashKey};

use crate::network::Channel;
use crate::node::Role;
use crate::world::{Happening, VmOrder, World};

const KEY: HashKey = HashKey([7; 32]);

/// What the disk's thread is told.
pub(crate) enum DiskOrder {
    Apply(DiskWrite),
    /// Makes the disk ready for a sync, and sends its hashes if they are wanted.
    BeginSync {
        tag: Tag,
        hashes: bool,
    },
    Compare(BlockHashes),
    Fold(Option<CommitJob<SimImage>>),
    Prepare {
        tag: Tag,
        first: bool,
    },
    Run(CommitJob<SimImage>),
    Send {
        tag: Tag,
        blocks: Vec<u64>,
    },
    Store(RecordUpdate),
}

impl World {
    /// Orders of one host's disk thread are carried out one after the other.
    pub(crate) fn disk_order(&mut self, node: usize, order: DiskOrder) {
        let host = &self.nodes[node];
        let slow = if host.slow_disk.1 > self.now {
            host.slow_disk.0
        } else {
            0
        };
        let (busy, life) = (host.disk_until, host.life);
        let work = 20_000 + self.random.below(280_000) + self.random.below(slow + 1);
        let at = self.now.max(busy) + work;
        self.nodes[node].disk_until = at;
        self.later(at - self.now, Happening::Disk(node, life, order));
    }

    pub(crate) fn obey_disk(&mut self, node: usize, order: DiskOrder) {
        let host = &mut self.nodes[node];
        match order {
            DiskOrder::Apply(write) => {
                if let Err(error) = storage::put(&*host.image, write.offset, &write.written) {
                    self.step_secondary(node, SecondaryEvent::StageFailed(error.to_string()));
                }
            }
            DiskOrder::Compare(hashes) => {
                if let Err(error) = self.compare(node, &hashes) {
                    self.machine_failed(node, format!("the disk image can't be read: {error}"));
                }
            }
            DiskOrder::Fold(job) => match host.fold(job) {
                Ok(()) => self.current = host.is_sure().then_some(node),
                Err(error) => self.machine_failed(node, error),
            },
            DiskOrder::BeginSync { tag, hashes } => {
                if let Err(error) = self.begin_sync(node, tag, hashes) {
                    self.machine_failed(node, format!("the disk can't be made ready: {error}"));
                }
            }
            DiskOrder::Send { tag, blocks } => {
                if let Err(error) = self.send_blocks(node, tag, &blocks) {
                    self.machine_failed(node, format!("the disk image can't be read: {error}"));
                }
            }
            DiskOrder::Prepare { tag, first } => {
                let result = host.prepare(tag, first);
                self.order(node, VmOrder::Check(tag, result));
            }
            DiskOrder::Run(job) => match host.run_jobs(Some(job)) {
                Ok(Some(epoch)) => self.step_secondary(node, SecondaryEvent::DiskCommitted(epoch)),
                Ok(None) => {}
                // Once it has taken over, nobody hears of this but the fold.
                Err(error) => self.step_secondary(node, SecondaryEvent::VmFailed(error)),
            },
            DiskOrder::Store(update) => match host.store(update) {
                Ok(()) => match host.role {
                    Role::Primary(_) => self.step_primary(node, PrimaryEvent::RecordStored(update)),
                    _ => self.step_secondary(node, SecondaryEvent::RecordStored(update)),
                },
                Err(error) => self.machine_failed(node, error),
            },
        }
    }

    /// A failure after which the role can't go on.
    pub(crate) fn machine_failed(&mut self, node: usize, reason: String) {
        match self.nodes[node].role {
            Role::Primary(_) => self.step_primary(node, PrimaryEvent::VmFailed(reason)),
            _ => self.step_secondary(node, SecondaryEvent::VmFailed(reason)),
        }
    }

    /// The disk's thread does what it has been told before the role's end; nobody hears of it.
    pub(crate) fn finish_disk_work(&mut self, node: usize) {
        let life = self.nodes[node].life;
        let is_due =
            |happening: &Happening| matches!(happening, Happening::Disk(other, at, _) if (*other, *at) == (node, life));
        let due: Vec<_> = self
            .queue
            .iter()
            .filter(|(_, happening)| is_due(happening))
            .map(|(key, _)| *key)
            .collect();
        for key in due {
            let Some(Happening::Disk(_, _, order)) = self.queue.remove(&key) else {
                continue;
            };
            let host = &mut self.nodes[node];
            let done = match order {
                DiskOrder::Apply(write) => storage::put(&*host.image, write.offset, &write.written).is_ok(),
                DiskOrder::Run(job) => host.run_jobs(Some(job)).is_ok(),
                // Without a record that says so, the image must not become anything else.
                DiskOrder::Store(update) => host.store(update).is_ok(),
                _ => true,
            };
            if !done {
                return;
            }
        }
    }

    fn compare(&mut self, node: usize, hashes: &BlockHashes) -> std::io::Result<()> {
        let theirs: Vec<BlockHash> = hashes.hashes.iter().copied().map(BlockHash).collect();
        let image = self.nodes[node].image.clone();
        let different = storage::verify::differing(&*image, &KEY, hashes.first, &theirs)?;
        self.send_blocks(node, hashes.tag, &different)
    }

    fn send_blocks(&mut self, node: usize, tag: Tag, blocks: &[u64]) -> std::io::Result<()> {
        let image = self.nodes[node].image.clone();
        for &block in blocks {
            let (offset, written) = storage::verify::read_block(&*image, block)?;
            let write = DiskWrite { tag, offset, written };
            self.send(node, Channel::Data, Message::SyncBlock(write));
        }
        if self.nodes[node].link.is_some() {
            self.step_primary(node, PrimaryEvent::DiskSynced(tag.generation));
        }
        Ok(())
    }

    fn begin_sync(&mut self, node: usize, tag: Tag, hashes: bool) -> std::io::Result<()> {
        let host = &mut self.nodes[node];
        let image = host.image.clone();
        let Some(replica) = &mut host.replica else {
            return Ok(());
        };
        replica.begin_sync()?;
        if hashes {
            let hashes = storage::verify::hashes(&*image, &KEY, 0, usize::MAX)?;
            let hashes = hashes.into_iter().map(|hash| hash.0).collect();
            self.send(
                node,
                Channel::Data,
                Message::BlockHashes(BlockHashes { tag, first: 0, hashes }),
            );
        }
        Ok(())
    }
}
