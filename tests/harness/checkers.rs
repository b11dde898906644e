//! What must hold after every step, watched from outside the protocol.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use checkpoint::{Epoch, Generation, Tag};

use crate::toy_vm::{Answer, Memory, Request};

/// A machine's whole state, for comparison.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Memory.
    pub pages: Memory,
    /// Registers.
    pub served: u64,
    /// Disk, as the guest sees it.
    pub disk: Vec<u8>,
}

/// The record of what happened, and the rules.
#[derive(Debug, Default)]
pub struct Checkers {
    /// Frames by the epochs in which the primary's guest sent them.
    sent: BTreeMap<Bytes, BTreeSet<Tag>>,
    /// Frames that the secondary's guest sent while it followed, by epoch.
    followed: BTreeSet<(Tag, Bytes)>,
    /// Last epoch acknowledged in each generation.
    acknowledged: BTreeMap<Generation, Epoch>,
    /// By epoch, whose numbers are never used twice.
    stops: BTreeMap<Epoch, Snapshot>,
    owners: BTreeMap<Generation, usize>,
    newest: Generation,
    values: BTreeMap<u8, (u64, u64)>,
    /// Answers that reached a client.
    pub answers: u64,
    /// Checkpoints loaded.
    pub loads: u64,
    /// Frames released while paired.
    pub released: u64,
    /// Frames dropped because the lease was over.
    pub late: u64,
}

impl Checkers {
    /// The primary's guest sent a frame in this epoch.
    pub fn primary_sent(&mut self, tag: Tag, frame: &Bytes) {
        self.sent.entry(frame.clone()).or_default().insert(tag);
    }

    /// The secondary's guest sent a frame in this epoch.
    pub fn secondary_sent(&mut self, tag: Tag, frame: &Bytes) {
        self.followed.insert((tag, frame.clone()));
    }

    /// The secondary decided that this checkpoint is complete.
    pub fn acknowledge(&mut self, tag: Tag) {
        let last = self.acknowledged.entry(tag.generation).or_default();
        assert!(
            tag.epoch > *last,
            "rule 5: checkpoint {tag} is acknowledged twice, or after {last}"
        );
        *last = tag.epoch;
    }

    /// The primary stopped for this checkpoint in this state.
    pub fn stopped(&mut self, tag: Tag, snapshot: Snapshot) {
        let last = self.stops.last_key_value().map_or(Epoch(0), |(epoch, _)| *epoch);
        assert!(tag.epoch > last, "rule 5: {tag} is stopped for twice, or after {last}");
        self.stops.insert(tag.epoch, snapshot);
        // At most one is uncommitted.
        while self.stops.len() > 4 {
            self.stops.pop_first();
        }
    }

    /// Returns the last epoch whose end the primary stopped for.
    #[must_use]
    pub fn last_stop(&self) -> Epoch {
        self.stops.last_key_value().map_or(Epoch(0), |(epoch, _)| *epoch)
    }

    /// The secondary made this checkpoint its state.
    pub fn loaded(&mut self, epoch: Epoch, snapshot: &Snapshot) {
        let stop = self
            .stops
            .get(&epoch)
            .expect("rule 3: a checkpoint is loaded that was never taken");
        assert!(
            stop.pages == snapshot.pages,
            "rule 3: memory differs after checkpoint {epoch}"
        );
        assert_eq!(
            stop.served, snapshot.served,
            "rule 3: registers differ after checkpoint {epoch}"
        );
        assert!(
            stop.disk == snapshot.disk,
            "rule 3: the disks differ after checkpoint {epoch}"
        );
        self.loads += 1;
    }

    /// A secondary took over in this epoch, and lets out what its guest had sent meanwhile.
    pub fn taken_over(&self, epoch: Epoch, outputs: &[Bytes]) {
        for frame in outputs {
            assert!(
                self.followed
                    .iter()
                    .any(|(tag, sent)| tag.epoch == epoch && sent == frame),
                "rule 1: a frame of an execution that was replaced is let out at the takeover in epoch {epoch}"
            );
        }
    }

    /// A node let a frame out.
    pub fn released(&mut self, node: usize, generation: Generation, paired: bool, frame: &Bytes) {
        assert!(
            generation >= self.newest,
            "rule 2: node {node} releases in generation {generation} after a release in {}",
            self.newest
        );
        self.newest = generation;
        let owner = *self.owners.entry(generation).or_insert(node);
        assert_eq!(owner, node, "rule 2: two nodes release in generation {generation}");
        if !paired || Answer::parse(frame).is_none() {
            return;
        }
        self.released += 1;
        let tags = self
            .sent
            .get(frame)
            .expect("rule 1: a frame is released that the guest never sent");
        let covered = tags.iter().any(|tag| {
            self.followed.contains(&(*tag, frame.clone()))
                || tag.generation < generation
                || self
                    .acknowledged
                    .get(&tag.generation)
                    .is_some_and(|last| *last >= tag.epoch)
        });
        assert!(
            covered,
            "rule 1: released what the secondary neither sent in the same epoch nor has committed: {tags:?}"
        );
    }

    /// A client got an answer: each request adds exactly one.
    pub fn answered(&mut self, request: Request, answer: Answer) {
        let (id, value) = self.values.get(&request.key).copied().unwrap_or_default();
        if answer.id == id {
            assert_eq!(
                answer.value, value,
                "rule 4: two answers to request {id} of client {}",
                request.client
            );
            return;
        }
        assert_eq!(
            answer.value,
            value + 1,
            "rule 4: client {} had {value} acknowledged by request {id}, and {} by request {}",
            request.client,
            answer.value,
            answer.id
        );
        self.values.insert(request.key, (answer.id, answer.value));
        self.answers += 1;
    }
}
