//! What must hold after every step, watched from outside the protocol.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use checkpoint::{Epoch, EpochMode, Generation, Nic, Tag, limits};
use primary::protocol::Primary;
use secondary::protocol::Secondary;

use crate::packet;
use crate::streams::Streams;
use crate::toy_vm::Registers;

/// Frames that may have been read before the network is held: more than all clients say again at a time.
const INPUTS_READ_MAX: u64 = 256;

/// A machine's whole state, for comparison.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Memory.
    pub pages: Vec<Arc<Vec<u8>>>,
    /// Registers.
    pub registers: Registers,
    /// Disk, as the guest sees it.
    pub disk: Vec<u8>,
}

/// The record of what happened, and the rules.
#[derive(Debug, Default)]
pub struct Checkers {
    /// What the guests have said.
    pub streams: Streams,
    /// Last epoch acknowledged in each generation.
    acknowledged: BTreeMap<Generation, Epoch>,
    stops: BTreeMap<Tag, Snapshot>,
    /// Whether the secondary's guest runs in the last epochs, by who said so first.
    modes: BTreeMap<Tag, EpochMode>,
    owners: BTreeMap<Generation, usize>,
    newest: Generation,
    /// Answers that reached a client.
    pub answers: u64,
    /// Checkpoints loaded.
    pub loads: u64,
    /// Frames released while paired.
    pub released: u64,
    /// Frames dropped because the lease was over.
    pub late: u64,
    /// A primary went over to buffered epochs, and back.
    pub switched: bool,
    /// A primary did not compare some flow.
    pub buffered_flow: bool,
    /// The epoch whose pages were as many as may be.
    outgrown: Option<Tag>,
    /// An epoch whose secondary asked for the checkpoint that ends it.
    wanted: Option<Tag>,
}

impl Checkers {
    /// The secondary decided that this checkpoint is complete.
    pub fn acknowledge(&mut self, tag: Tag) {
        let last = self.acknowledged.entry(tag.generation).or_default();
        assert!(
            tag.epoch > *last,
            "rule 5: checkpoint {tag} is acknowledged twice, or after {last}"
        );
        *last = tag.epoch;
        self.streams.acknowledge(tag);
    }

    /// A protected side is in this epoch, and takes it for one of this mode.
    pub fn mode(&mut self, tag: Tag, mode: EpochMode) {
        let said = *self.modes.entry(tag).or_insert(mode);
        assert_eq!(
            said, mode,
            "rule 1: the sides do not agree on whether the secondary's guest runs in {tag}"
        );
        while self.modes.len() > 4 {
            self.modes.pop_first();
        }
    }

    /// The primary stopped for this checkpoint in this state.
    pub fn stopped(&mut self, tag: Tag, snapshot: Snapshot) {
        let last = self.stops.last_key_value().map_or_else(Tag::default, |(tag, _)| *tag);
        assert!(tag > last, "rule 5: {tag} is stopped for twice, or after {last}");
        self.stops.insert(tag, snapshot);
        // At most one is uncommitted.
        while self.stops.len() > 4 {
            self.stops.pop_first();
        }
    }

    /// A host rests, and would tell a primary that its disk is this checkpoint.
    pub fn rests(&self, tag: Tag, disk: &[u8]) {
        if let Some(stop) = self.stops.get(&tag) {
            assert!(
                stop.disk == disk,
                "rule 3: a disk is not checkpoint {tag}, as it is said to be (byte {:?})",
                stop.disk.iter().zip(disk).position(|(one, other)| one != other)
            );
        }
    }

    /// A primary goes on in this epoch, after that one.
    pub fn goes_on(before: Epoch, epoch: Epoch) {
        assert!(before <= epoch, "rule 5: epoch {epoch} comes after {before}");
    }

    /// Returns the last epoch whose end the primary stopped for.
    #[must_use]
    pub fn last_stop(&self) -> Epoch {
        self.stops.last_key_value().map_or(Epoch(0), |(tag, _)| tag.epoch)
    }

    /// The secondary made this checkpoint its state.
    pub fn loaded(&mut self, epoch: Epoch, snapshot: &Snapshot) {
        let stop = self
            .stops
            .iter()
            .rev()
            .find_map(|(tag, stop)| (tag.epoch == epoch).then_some(stop))
            .expect("rule 3: a checkpoint is loaded that was never taken");
        assert!(
            stop.pages == snapshot.pages,
            "rule 3: memory differs after checkpoint {epoch}"
        );
        assert_eq!(
            stop.registers, snapshot.registers,
            "rule 3: registers differ after checkpoint {epoch}"
        );
        assert!(
            stop.disk == snapshot.disk,
            "rule 3: the disks differ after checkpoint {epoch} (byte {:?} of what is compared)",
            stop.disk
                .iter()
                .zip(&snapshot.disk)
                .position(|(one, other)| one != other)
        );
        self.loads += 1;
    }

    /// A secondary took over in this epoch and generation, and lets out what its guest had sent meanwhile.
    pub fn taken_over(&mut self, generation: Generation, epoch: Epoch, outputs: &[(Nic, Bytes)]) {
        self.streams.taken_over(generation, epoch);
        for (_, frame) in outputs {
            assert!(
                self.streams.allows(generation, frame),
                "rule 1: a frame of an execution that was replaced is let out at the takeover in epoch {epoch}: {}",
                self.streams.describe(frame)
            );
        }
    }

    /// A frame leaves by the card behind which its receiver is: there the guest has sent it.
    ///
    /// # Panics
    /// If it is another.
    pub fn leaves_by(nic: Nic, cards: usize, frame: &[u8]) {
        if let Some([_, sent_by]) = packet::cards_of(frame, cards) {
            assert_eq!(nic, sent_by, "rule 1: what the guest sent on {sent_by} leaves by {nic}");
        }
    }

    /// A node let a frame out.
    ///
    /// `recorded` is the generation that its record says it owns, if any.
    pub fn released(
        &mut self,
        node: usize,
        generation: Generation,
        recorded: Option<Generation>,
        paired: bool,
        frame: &Bytes,
    ) {
        // The term of a pairing is won before it is recorded, by a side that runs already.
        assert!(
            recorded.is_some_and(|recorded| recorded == generation || !paired && recorded < generation),
            "rule 2: node {node} releases in generation {generation}, and its record says {recorded:?}"
        );
        assert!(
            generation >= self.newest,
            "rule 2: node {node} releases in generation {generation} after a release in {}",
            self.newest
        );
        self.newest = generation;
        let owner = *self.owners.entry(generation).or_insert(node);
        assert_eq!(owner, node, "rule 2: two nodes release in generation {generation}");
        if !paired {
            return;
        }
        self.released += 1;
        assert!(
            self.streams.allows(generation, frame),
            "rule 1: released what the secondary neither sent in the same epoch nor has committed: {}",
            self.streams.describe(frame)
        );
    }

    /// Notes what a primary has done of what it decides by itself.
    pub fn watch(&mut self, primary: &Primary) {
        self.switched |= primary.counters().switches > 1;
        self.buffered_flow |= primary.comparators().counters().unasked > 0;
    }

    /// No queue of a secondary's is longer than its bound.
    ///
    /// # Panics
    /// If one is.
    pub fn bounded_secondary(secondary: &Secondary) {
        for (name, length, bound) in secondary.queues() {
            assert!(length <= bound, "rule 5: {length} {name} wait, and {bound} may");
        }
        assert!(
            !matches!(secondary.state_name(), "protected" | "checkpointing") || secondary.holds_output_if_full(),
            "rule 5: the guest of a secondary may go on sending though its output does not get through"
        );
    }

    /// The primary has looked at the pages of its epoch; they may be as many as it is allowed, or more: then it looks no further.
    ///
    /// # Panics
    /// If it does.
    pub fn looked(&mut self, tag: Tag, is_outgrown: bool) {
        assert!(
            self.outgrown != Some(tag),
            "rule 5: epoch {tag} goes on though its pages take all the memory that they may"
        );
        if is_outgrown {
            self.outgrown = Some(tag);
        }
    }

    /// A secondary asks for a checkpoint.
    pub fn wants(&mut self, tag: Tag) {
        self.wanted = Some(tag);
    }

    /// A secondary's guest, which runs, has written so many pages.
    ///
    /// # Panics
    /// If these take all the memory that they may, and no checkpoint has been asked for.
    pub fn counted(&self, tag: Tag, is_outgrown: bool) {
        assert!(
            !is_outgrown || self.wanted == Some(tag),
            "rule 5: the secondary's pages in epoch {tag} take all the memory that they may, and it asks for no checkpoint"
        );
    }

    /// No queue of a primary's is longer than its bound, and a guest that has filled its epoch has been told to stand. Until it
    /// does it may send and write what it has begun.
    ///
    /// # Panics
    /// If one is, or it has not.
    pub fn bounded(primary: &Primary) {
        let (comparators, room) = (primary.comparators(), primary.options().room);
        let (held, pending) = (comparators.held(), comparators.pending());
        let mirrors = matches!(primary.state_name(), "protected" | "checkpointing");
        let has_inputs =
            primary.inputs_unconfirmed() >= room.inputs || primary.input_bytes_unconfirmed() >= room.input_bytes;
        assert!(
            (!mirrors || primary.is_held_back() || !primary.has_no_room())
                && (!mirrors || primary.is_input_held() || !has_inputs)
                && pending.bytes <= limits::PENDING_BYTES_MAX + limits::FRAME_BYTES_MAX
                && primary.inputs_unconfirmed() <= room.inputs + INPUTS_READ_MAX
                && primary.input_bytes_unconfirmed()
                    <= room.input_bytes + INPUTS_READ_MAX * limits::FRAME_BYTES_MAX as u64,
            "rule 5: a queue is over its bound: {held:?}, {pending:?}, {} inputs of {} bytes, {} bytes written",
            primary.inputs_unconfirmed(),
            primary.input_bytes_unconfirmed(),
            primary.writes_uncommitted_bytes()
        );
    }
}
