//! What the store's disk does: reading the log at start, writing batches of changes, compacting.
//!
//! ```text
//! ReadSuperblock ─► Replay ─► Quiet ─► Batch: write, flush ──────────────────────► Quiet
//!        │ blank      │ torn    │ the half is full
//!        └────────────┴─────────┴────► Compact: copy …, flush, superblock, flush, discard … ► Quiet
//! any request that fails, but a discard ─► Off (the store says why)
//! ```
//! One request at a time. A compaction writes the whole map, as it was when it began, into the other half under
//! the next generation, and changes halves with one superblock write; it covers the changes queued before it. The half that it
//! leaves is discarded, so that its room goes back to the host.
//! Driven by [`super::Kv`]; never blocks.

use alloc::collections::btree_map;
use alloc::format;
use alloc::rc::Rc;
use alloc::string::String;
use alloc::vec::Vec;

use super::log::{self, Decoded, Entry, RECORD_HEADER, SECTOR, Superblock, SuperblockSector};
use super::{Data, Status, Ticket};

/// The most bytes of one request.
pub const REQUEST_BYTES_MAX: usize = 128 * 1024;
const BATCH_BYTES: usize = 96 * 1024;
const READ_BYTES: usize = 64 * 1024;

/// Sectors of one discard.
const DISCARD_SECTORS: u64 = 128 * 1024;

/// What the disk is to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// Read whole sectors.
    Read {
        /// The first sector.
        sector: u64,
        /// How many bytes, a multiple of the sector size.
        bytes: usize,
    },
    /// Write whole sectors.
    Write {
        /// The first sector.
        sector: u64,
        /// What to write.
        data: &'a [u8],
    },
    /// Make durable what has been written.
    Flush,
    /// Forget what these sectors hold. That it can't is no failure.
    Discard {
        /// The first sector.
        sector: u64,
        /// How many.
        sectors: u32,
    },
}

/// The disk could not do it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskError;

/// The state machine.
#[derive(Debug)]
pub(super) struct Engine {
    capacity: u64,
    read_only: bool,
    busy: bool,
    phase: Phase,
    buffer: Vec<u8>,
    pub(super) batches: u64,
    pub(super) compactions: u64,
}

#[derive(Debug)]
enum Phase {
    ReadSuperblock {
        copy: u64,
        found: Vec<SuperblockSector>,
    },
    Replay(Replay),
    Quiet(Appender),
    Batch {
        log: Appender,
        step: BatchStep,
        ticket: Ticket,
    },
    Compact(Compaction),
    Off,
}

#[derive(Clone, Copy, Debug)]
enum BatchStep {
    Write(u64),
    Flush,
}

#[derive(Debug)]
struct Replay {
    superblock: Superblock,
    /// Bytes of the half read so far.
    read: u64,
    /// What was read and is still of use, from a sector's beginning on.
    carry: Vec<u8>,
    /// Where in the half `carry` begins.
    carry_start: u64,
    /// Where in `carry` the next record begins.
    at: usize,
    index: u64,
}

/// Bytes that the map and a copy of it share.
type Bytes = Rc<[u8]>;

/// The end of the log, where the next record goes.
#[derive(Debug)]
struct Appender {
    superblock: Superblock,
    position: u64,
    index: u64,
    /// The bytes of the last sector before `position`.
    tail: Vec<u8>,
}

#[derive(Debug)]
struct Compaction {
    target: Appender,
    rest: btree_map::IntoIter<Bytes, Bytes>,
    next: Option<(Bytes, Bytes)>,
    ticket: Ticket,
    step: CompactionStep,
}

#[derive(Clone, Copy, Debug)]
enum CompactionStep {
    Copy(u64),
    CopyFlush,
    Superblock,
    SuperblockFlush,
    /// The half that was left, from this sector of it on.
    Discard(u64),
}

impl Engine {
    pub(super) fn off() -> Self {
        Self {
            capacity: 0,
            read_only: true,
            busy: false,
            phase: Phase::Off,
            buffer: Vec::new(),
            batches: 0,
            compactions: 0,
        }
    }

    pub(super) fn new(capacity: u64, read_only: bool) -> Self {
        let phase = Phase::ReadSuperblock {
            copy: 0,
            found: Vec::new(),
        };
        Self {
            capacity,
            read_only,
            phase,
            ..Self::off()
        }
    }

    pub(super) fn next_request(&mut self, data: &mut Data) -> Option<Request<'_>> {
        if self.busy {
            return None;
        }
        if matches!(self.phase, Phase::Quiet(_)) && !data.queue.is_empty() {
            self.begin_batch(data);
        }
        let request = match &self.phase {
            Phase::Off | Phase::Quiet(_) => return None,
            Phase::ReadSuperblock { .. } if self.capacity < log::CAPACITY_MIN => {
                let least = log::CAPACITY_MIN * SECTOR as u64 / 1024;
                self.stop(
                    data,
                    format!("the disk is smaller than {least} KiB: give it a larger image"),
                );
                return None;
            }
            Phase::ReadSuperblock { copy, .. } => Request::Read {
                sector: Superblock::copy_sector(*copy),
                bytes: SECTOR,
            },
            Phase::Replay(replay) => replay.request(),
            Phase::Batch {
                step: BatchStep::Write(sector),
                ..
            } => Request::Write {
                sector: *sector,
                data: &self.buffer,
            },
            Phase::Batch {
                step: BatchStep::Flush, ..
            } => Request::Flush,
            Phase::Compact(compaction) => match compaction.step {
                CompactionStep::Copy(sector) => Request::Write {
                    sector,
                    data: &self.buffer,
                },
                CompactionStep::CopyFlush | CompactionStep::SuperblockFlush => Request::Flush,
                CompactionStep::Superblock => Request::Write {
                    sector: compaction.target.superblock.sector(),
                    data: &self.buffer,
                },
                CompactionStep::Discard(from) => {
                    let left = compaction.target.superblock.half_sectors - from;
                    Request::Discard {
                        sector: compaction.target.superblock.next().half_start() + from,
                        sectors: u32::try_from(left.min(DISCARD_SECTORS)).unwrap_or(0),
                    }
                }
            },
        };
        self.busy = true;
        Some(request)
    }

    pub(super) fn completed(&mut self, data: &mut Data, outcome: Result<&[u8], DiskError>) {
        assert!(self.busy, "a completion without a request");
        self.busy = false;
        let discards = matches!(
            &self.phase,
            Phase::Compact(Compaction {
                step: CompactionStep::Discard(_),
                ..
            })
        );
        let Ok(bytes) = outcome.or(if discards { Ok(&[][..]) } else { Err(DiskError) }) else {
            let what = match &self.phase {
                Phase::ReadSuperblock { .. } | Phase::Replay(_) => "read",
                _ => "write",
            };
            self.stop(data, format!("the disk reported an error on {what}"));
            return;
        };
        match core::mem::replace(&mut self.phase, Phase::Off) {
            Phase::ReadSuperblock { copy, mut found } => {
                found.push(Superblock::decode(bytes));
                if copy == 0 {
                    self.phase = Phase::ReadSuperblock { copy: 1, found };
                } else {
                    self.choose(data, &found);
                }
            }
            Phase::Replay(replay) => self.replay(data, replay, bytes),
            Phase::Batch {
                log,
                step: BatchStep::Write(_),
                ticket,
            } => {
                self.phase = Phase::Batch {
                    log,
                    step: BatchStep::Flush,
                    ticket,
                };
            }
            Phase::Batch {
                log,
                step: BatchStep::Flush,
                ticket,
            } => {
                data.advance(ticket);
                self.batches += 1;
                self.phase = Phase::Quiet(log);
            }
            Phase::Compact(compaction) => self.continue_compaction(data, compaction),
            Phase::Quiet(_) | Phase::Off => unreachable!("no request is made in this phase"),
        }
    }

    fn stop(&mut self, data: &mut Data, reason: String) {
        self.phase = Phase::Off;
        data.fail(reason);
    }

    fn choose(&mut self, data: &mut Data, found: &[SuperblockSector]) {
        let mut best: Option<Superblock> = None;
        let mut other = None;
        for sector in found {
            match sector {
                SuperblockSector::Valid(superblock)
                    if best.is_none_or(|best| best.generation < superblock.generation) =>
                {
                    best = Some(*superblock);
                }
                SuperblockSector::OtherVersion(version) => other = Some(*version),
                _ => {}
            }
        }
        let blank = found.iter().all(|sector| *sector == SuperblockSector::Blank);
        match best {
            Some(superblock) if !superblock.fits(self.capacity) => {
                self.stop(
                    data,
                    "the disk is smaller than its superblock says: use the whole image".into(),
                );
            }
            Some(superblock) => {
                data.limit = data.limit.min(limit_of(&superblock));
                self.phase = Phase::Replay(Replay::new(superblock));
            }
            None if blank && self.read_only => {
                data.messages
                    .push("key-value store: the disk is read-only and blank".into());
                data.status = Status::ReadOnly("the disk is read-only".into());
            }
            None if blank => self.format(data),
            None => {
                let what = other.map_or_else(
                    || "the disk holds something else, or both superblocks are damaged".into(),
                    |version| format!("the disk was written in format version {version}, this guest knows 1"),
                );
                self.stop(data, format!("{what}: give it a blank image or the right one"));
            }
        }
    }

    fn format(&mut self, data: &mut Data) {
        match Superblock::first(self.capacity) {
            Some(superblock) => {
                data.messages.push("key-value store: formatting a blank disk".into());
                data.limit = data.limit.min(limit_of(&superblock));
                self.compact(data, superblock);
            }
            None => self.stop(data, "the disk is too small".into()),
        }
    }

    fn replay(&mut self, data: &mut Data, mut replay: Replay, bytes: &[u8]) {
        let ended = replay.take(data, bytes);
        if data.used > data.limit {
            self.stop(
                data,
                "the store on the disk needs more memory than this machine has: give it more".into(),
            );
            return;
        }
        let clean = match ended {
            Ended::NotYet => {
                self.phase = Phase::Replay(replay);
                return;
            }
            Ended::Clean => true,
            Ended::Torn => false,
        };
        let end = replay.carry_start + replay.at as u64;
        data.messages.push(format!(
            "key-value store: {} keys from {} records",
            data.map.len(),
            replay.index
        ));
        if !clean {
            data.messages.push(format!(
                "key-value store: the log is torn at byte {end}; dropped everything from there"
            ));
        }
        if self.read_only {
            data.status = Status::ReadOnly("the disk is read-only".into());
        } else if clean {
            data.status = Status::Ready;
            self.phase = Phase::Quiet(replay.into_appender());
        } else {
            // A later write must never make records beyond the tear valid again: start a new generation.
            self.compact(data, replay.superblock.next());
        }
    }

    fn begin_batch(&mut self, data: &mut Data) {
        let Phase::Quiet(mut log) = core::mem::replace(&mut self.phase, Phase::Off) else {
            return;
        };
        let mut count = 0;
        self.buffer.clear();
        self.buffer.extend_from_slice(&log.tail);
        let tail = self.buffer.len();
        while let Some(change) = data.queue.front() {
            let entry = change.entry();
            let bytes = self.buffer.len() - tail + entry.bytes();
            if bytes > BATCH_BYTES || !log.has_room(bytes) {
                break;
            }
            entry.encode(log.superblock.generation, log.index + count, &mut self.buffer);
            data.queue_bytes -= entry.bytes();
            data.queue.pop_front();
            count += 1;
        }
        if count == 0 {
            let target = log.superblock.next();
            self.compact(data, target);
            return;
        }
        let ticket = data.executed - data.queue.len() as u64;
        let sector = log.finish(&mut self.buffer, count);
        self.phase = Phase::Batch {
            log,
            step: BatchStep::Write(sector),
            ticket,
        };
    }

    fn compact(&mut self, data: &mut Data, target: Superblock) {
        data.queue.clear();
        data.queue_bytes = 0;
        let mut rest = data.map.clone().into_iter();
        let next = rest.next();
        let target = Appender {
            superblock: target,
            position: 0,
            index: 0,
            tail: Vec::new(),
        };
        let step = CompactionStep::CopyFlush;
        let mut compaction = Compaction {
            target,
            rest,
            next,
            ticket: data.executed,
            step,
        };
        compaction.fill(&mut self.buffer);
        self.compactions += 1;
        self.phase = Phase::Compact(compaction);
    }

    fn continue_compaction(&mut self, data: &mut Data, mut compaction: Compaction) {
        match compaction.step {
            CompactionStep::Copy(_) if compaction.next.is_some() => compaction.fill(&mut self.buffer),
            CompactionStep::Copy(_) => compaction.step = CompactionStep::CopyFlush,
            CompactionStep::CopyFlush => {
                self.buffer.clear();
                self.buffer.extend_from_slice(&compaction.target.superblock.encode());
                compaction.step = CompactionStep::Superblock;
            }
            CompactionStep::Superblock => compaction.step = CompactionStep::SuperblockFlush,
            CompactionStep::SuperblockFlush => {
                data.advance(compaction.ticket);
                data.status = Status::Ready;
                compaction.step = CompactionStep::Discard(0);
            }
            CompactionStep::Discard(from) => {
                let next = from + DISCARD_SECTORS;
                if next >= compaction.target.superblock.half_sectors {
                    self.phase = Phase::Quiet(compaction.target);
                    return;
                }
                compaction.step = CompactionStep::Discard(next);
            }
        }
        self.phase = Phase::Compact(compaction);
    }
}

enum Ended {
    NotYet,
    Clean,
    Torn,
}

impl Replay {
    fn new(superblock: Superblock) -> Self {
        Self {
            superblock,
            read: 0,
            carry: Vec::new(),
            carry_start: 0,
            at: 0,
            index: 0,
        }
    }

    fn request(&self) -> Request<'static> {
        let left = self.superblock.half_bytes() - self.read;
        let bytes = usize::try_from(left).unwrap_or(READ_BYTES).min(READ_BYTES);
        Request::Read {
            sector: self.superblock.half_start() + self.read / SECTOR as u64,
            bytes,
        }
    }

    fn take(&mut self, data: &mut Data, bytes: &[u8]) -> Ended {
        let done = self.at / SECTOR * SECTOR;
        self.carry.drain(..done);
        self.carry_start += done as u64;
        self.at -= done;
        self.carry.extend_from_slice(bytes);
        self.read += bytes.len() as u64;
        loop {
            match log::decode(&self.carry[self.at..], self.superblock.generation, self.index) {
                Decoded::Record(Entry::End, _) => return Ended::Clean,
                Decoded::Record(entry, length) => {
                    match entry {
                        Entry::Set { key, value } => data.insert(key.into(), value.into()),
                        Entry::Delete { key } => data.remove(key),
                        Entry::Clear => {
                            data.map.clear();
                            data.used = 0;
                        }
                        Entry::End => {}
                    }
                    self.at += length;
                    self.index += 1;
                    if data.used > data.limit {
                        return Ended::Torn;
                    }
                }
                Decoded::Short if self.read < self.superblock.half_bytes() && !bytes.is_empty() => {
                    return Ended::NotYet;
                }
                Decoded::Short | Decoded::Broken => return Ended::Torn,
            }
        }
    }

    fn into_appender(self) -> Appender {
        let from = self.at / SECTOR * SECTOR;
        Appender {
            superblock: self.superblock,
            position: self.carry_start + self.at as u64,
            index: self.index,
            tail: self.carry[from..self.at].to_vec(),
        }
    }
}

impl Appender {
    /// Whether records of `bytes`, and the end record, fit into the half.
    fn has_room(&self, bytes: usize) -> bool {
        self.position + (bytes + RECORD_HEADER) as u64 <= self.superblock.half_bytes()
    }

    /// Completes a write of the tail and `count` new records, which are in `buffer`; returns its sector.
    fn finish(&mut self, buffer: &mut Vec<u8>, count: u64) -> u64 {
        let start = self.position - self.tail.len() as u64;
        self.position = start + buffer.len() as u64;
        self.index += count;
        self.tail.clear();
        self.tail.extend_from_slice(&buffer[buffer.len() / SECTOR * SECTOR..]);
        Entry::End.encode(self.superblock.generation, self.index, buffer);
        buffer.resize(buffer.len().next_multiple_of(SECTOR), 0);
        self.superblock.half_start() + start / SECTOR as u64
    }
}

impl Compaction {
    fn fill(&mut self, buffer: &mut Vec<u8>) {
        let mut count = 0;
        buffer.clear();
        buffer.extend_from_slice(&self.target.tail);
        let tail = buffer.len();
        while let Some((key, value)) = &self.next {
            let entry = Entry::Set { key, value };
            let bytes = buffer.len() - tail + entry.bytes();
            if bytes > BATCH_BYTES {
                break;
            }
            assert!(
                self.target.has_room(bytes),
                "the store's limit leaves room for all of it in a half"
            );
            entry.encode(self.target.superblock.generation, self.target.index + count, buffer);
            self.next = self.rest.next();
            count += 1;
        }
        self.step = CompactionStep::Copy(self.target.finish(buffer, count));
    }
}

/// The most the store may hold, so that a compaction leaves room for batches.
fn limit_of(superblock: &Superblock) -> usize {
    usize::try_from(superblock.half_bytes() / 4 * 3).unwrap_or(usize::MAX)
}

const _: () = assert!(BATCH_BYTES + 2 * SECTOR + RECORD_HEADER <= REQUEST_BYTES_MAX);
const _: () = assert!(log::KEY_MAX + log::VALUE_MAX + RECORD_HEADER <= BATCH_BYTES);
const _: () = assert!((BATCH_BYTES + RECORD_HEADER) as u64 <= (log::CAPACITY_MIN - 16) / 2 * SECTOR as u64 / 4);
