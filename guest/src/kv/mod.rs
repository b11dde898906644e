//! The key-value store: a map in memory, and on disk a log of its changes.
//!
//! Commands are executed on the map at once, in the order in which they arrive, so that two guests that see the
//! same frames agree whatever their disks do. Each change gets a [`Ticket`]; an answer that tells of a change
//! (its own, or one it has read) may leave once that ticket is durable, which is after the change's record was
//! written and a flush issued after that write has completed. Changes that come in meanwhile form the next batch.
//!
//! Nothing here touches a disk: [`Kv::next_request`] says what the disk is to do and [`Kv::completed`] is told
//! what came of it. The size of keys, values, the store and the queue of changes is bounded.

mod engine;
pub mod log;

use alloc::collections::{BTreeMap, VecDeque};
use alloc::rc::Rc;
use alloc::string::String;
use alloc::vec::Vec;

use engine::Engine;
pub use engine::{DiskError, REQUEST_BYTES_MAX, Request};
use log::{Entry, KEY_MAX, VALUE_MAX};

/// A change's number: later changes have greater ones, 0 is no change.
pub type Ticket = u64;

/// What an entry costs in memory beside its key and value.
const ENTRY_COST: usize = 160;
/// Changes wait for the disk up to this many bytes; beyond it, no more commands are taken.
const QUEUE_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Why a change was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// There is no disk, or it can't be written to.
    ReadOnly,
    /// The store would outgrow its limit.
    Full,
    /// The key is longer than [`KEY_MAX`].
    KeyTooLong,
    /// The value is longer than [`VALUE_MAX`].
    ValueTooLong,
}

/// Whether the store serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Status {
    /// The log is being read.
    Loading,
    /// Reads and writes are served.
    Ready,
    /// Reads are served; writes are refused for this reason.
    ReadOnly(String),
    /// Nothing is served for this reason.
    Failed(String),
}

/// The store.
#[derive(Debug)]
pub struct Kv {
    data: Data,
    engine: Engine,
}

/// The map and the changes to it that the disk does not have yet.
#[derive(Debug)]
struct Data {
    map: BTreeMap<Rc<[u8]>, Rc<[u8]>>,
    used: usize,
    limit: usize,
    queue: VecDeque<Change>,
    queue_bytes: usize,
    executed: Ticket,
    durable: Ticket,
    /// Keys whose last change is not durable yet.
    recent: BTreeMap<Rc<[u8]>, Ticket>,
    /// The last change that concerned all keys.
    floor: Ticket,
    status: Status,
    messages: Vec<String>,
}

#[derive(Debug)]
enum Change {
    Set(Rc<[u8]>, Rc<[u8]>),
    Delete(Rc<[u8]>),
    Clear,
}

impl Kv {
    /// A store that refuses every write.
    #[must_use]
    pub fn without_disk() -> Self {
        let status = Status::ReadOnly("there is no block device".into());
        Self {
            data: Data::new(0, status),
            engine: Engine::off(),
        }
    }

    /// A store on a disk of `capacity` sectors, of at most `memory` bytes; it is loading until the disk was read.
    #[must_use]
    pub fn on_disk(capacity: u64, read_only: bool, memory: usize) -> Self {
        Self {
            data: Data::new(memory, Status::Loading),
            engine: Engine::new(capacity, read_only),
        }
    }

    /// What the disk is to do next; `None` while it is busy with the last request or there is nothing to do.
    pub fn next_request(&mut self) -> Option<Request<'_>> {
        self.engine.next_request(&mut self.data)
    }

    /// Takes the outcome of the last request; a read's data is `Ok`'s content, otherwise that is empty.
    pub fn completed(&mut self, outcome: Result<&[u8], DiskError>) {
        self.engine.completed(&mut self.data, outcome);
    }

    /// Whether the store serves.
    #[must_use]
    pub fn status(&self) -> &Status {
        &self.data.status
    }

    /// Takes the lines that the console should show.
    pub fn take_messages(&mut self) -> Vec<String> {
        core::mem::take(&mut self.data.messages)
    }

    /// The last change that is on the disk for good.
    #[must_use]
    pub fn durable(&self) -> Ticket {
        self.data.durable
    }

    /// The last change.
    #[must_use]
    pub fn executed(&self) -> Ticket {
        self.data.executed
    }

    /// Whether so many changes wait for the disk that no more commands should be taken.
    #[must_use]
    pub fn is_congested(&self) -> bool {
        self.data.queue_bytes > QUEUE_BYTES_MAX
    }

    /// Counts the keys.
    #[must_use]
    pub fn keys(&self) -> usize {
        self.data.map.len()
    }

    /// Bytes in use.
    #[must_use]
    pub fn used(&self) -> usize {
        self.data.used
    }

    /// The most bytes that can be in use.
    #[must_use]
    pub fn limit(&self) -> usize {
        self.data.limit
    }

    /// Batches of changes made durable, and compactions, since the start.
    #[must_use]
    pub fn commits(&self) -> (u64, u64) {
        (self.engine.batches, self.engine.compactions)
    }

    /// Reads `key`, and the change that the answer tells of.
    #[must_use]
    pub fn value(&self, key: &[u8]) -> (Option<Rc<[u8]>>, Ticket) {
        let ticket = self.data.recent.get(key).copied().unwrap_or(0).max(self.data.floor);
        (self.data.map.get(key).cloned(), ticket)
    }

    /// Whether `entries` can be set one after the other.
    ///
    /// # Errors
    /// Why not.
    pub fn check<'a>(&self, entries: impl Iterator<Item = (&'a [u8], &'a [u8])>) -> Result<(), Refused> {
        if self.data.status != Status::Ready {
            return Err(Refused::ReadOnly);
        }
        let mut used = self.data.used;
        for (key, value) in entries {
            if key.len() > KEY_MAX {
                return Err(Refused::KeyTooLong);
            }
            if value.len() > VALUE_MAX {
                return Err(Refused::ValueTooLong);
            }
            let before = self.data.map.get(key).map_or(0, |value| cost(key, value));
            used = used + cost(key, value) - before.min(used);
        }
        if used > self.data.limit {
            Err(Refused::Full)
        } else {
            Ok(())
        }
    }

    /// Sets `key` to `value`.
    ///
    /// # Errors
    /// See [`Refused`].
    pub fn set(&mut self, key: &[u8], value: &[u8]) -> Result<Ticket, Refused> {
        self.check(core::iter::once((key, value)))?;
        let (key, value) = (Rc::<[u8]>::from(key), Rc::<[u8]>::from(value));
        self.data.insert(Rc::clone(&key), Rc::clone(&value));
        let ticket = self.data.enqueue(Change::Set(Rc::clone(&key), value));
        self.data.recent.insert(key, ticket);
        Ok(ticket)
    }

    /// Removes `key`; returns whether it was there, and the change that the answer tells of.
    ///
    /// # Errors
    /// [`Refused::ReadOnly`].
    pub fn delete(&mut self, key: &[u8]) -> Result<(bool, Ticket), Refused> {
        self.check(core::iter::empty())?;
        let (value, ticket) = self.value(key);
        if value.is_none() {
            return Ok((false, ticket));
        }
        self.data.remove(key);
        let key = Rc::<[u8]>::from(key);
        let ticket = self.data.enqueue(Change::Delete(Rc::clone(&key)));
        self.data.recent.insert(key, ticket);
        Ok((true, ticket))
    }

    /// Removes all keys.
    ///
    /// # Errors
    /// [`Refused::ReadOnly`].
    pub fn clear(&mut self) -> Result<Ticket, Refused> {
        self.check(core::iter::empty())?;
        self.data.map.clear();
        self.data.used = 0;
        let ticket = self.data.enqueue(Change::Clear);
        self.data.recent.clear();
        self.data.floor = ticket;
        Ok(ticket)
    }
}

impl Data {
    fn new(limit: usize, status: Status) -> Self {
        Self {
            map: BTreeMap::new(),
            used: 0,
            limit,
            queue: VecDeque::new(),
            queue_bytes: 0,
            executed: 0,
            durable: 0,
            recent: BTreeMap::new(),
            floor: 0,
            status,
            messages: Vec::new(),
        }
    }

    fn insert(&mut self, key: Rc<[u8]>, value: Rc<[u8]>) {
        self.used += cost(&key, &value);
        let key_cost = cost(&key, &[]);
        if let Some(before) = self.map.insert(key, value) {
            self.used -= key_cost + before.len();
        }
    }

    fn remove(&mut self, key: &[u8]) {
        if let Some(before) = self.map.remove(key) {
            self.used -= cost(key, &before);
        }
    }

    fn enqueue(&mut self, change: Change) -> Ticket {
        self.queue_bytes += change.entry().bytes();
        self.queue.push_back(change);
        self.executed += 1;
        self.executed
    }

    fn advance(&mut self, durable: Ticket) {
        assert!(durable >= self.durable && durable <= self.executed);
        self.durable = durable;
        self.recent.retain(|_, ticket| *ticket > durable);
    }

    fn fail(&mut self, reason: String) {
        self.messages.push(alloc::format!(
            "key-value store: {reason}; nothing is served from it any more"
        ));
        self.status = Status::Failed(reason);
        self.map.clear();
        self.queue.clear();
        self.queue_bytes = 0;
        self.used = 0;
    }
}

impl Change {
    fn entry(&self) -> Entry<'_> {
        match self {
            Self::Set(key, value) => Entry::Set { key, value },
            Self::Delete(key) => Entry::Delete { key },
            Self::Clear => Entry::Clear,
        }
    }
}

fn cost(key: &[u8], value: &[u8]) -> usize {
    key.len() + value.len() + ENTRY_COST
}

#[cfg(test)]
mod tests;
