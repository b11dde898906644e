//! A toy guest: registers that clients change over UDP and TCP, kept on a disk.
//!
//! All of its state is in pages of memory and a few registers, so that a checkpoint carries it. It writes a register's sector and
//! flushes before it answers a change; the sector also holds each client's last request, so that a guest that
//! starts from its disk alone repeats no change. It is deterministic but for its initial sequence numbers, the cuts of its segments, its
//! timers, sometimes a port, and the noise that a request may ask for: then answer and memory depend on the host.
//!
//! Driven by the world: frames are put into its receive ring ([`ToyVm::receive`]), then it takes turns. It orders disk writes and flushes,
//! and waits for their end as long as the world likes.

mod connections;
mod memory;
mod service;

use bytes::Bytes;
use checkpoint::wire::Written;

pub(crate) use memory::index;
pub use memory::{Memory, PAGES};

use crate::ops::{KEYS, Request};
use crate::packet::{self, Packet, SERVICE_PORT};
use crate::random::Random;

/// Bytes of the toy's disk: blocks of the comparison, and a short one.
pub const DISK_BYTES: u64 = SHORT_BLOCK + 4 * 1024;
const BLOCK: u64 = checkpoint::limits::BLOCK_BYTES as u64;
/// Blocks between the first and the last, which are written seldom: a disk that lacks one does so for a while.
const RARE_BLOCKS: u64 = 4;
const SHORT_BLOCK: u64 = (1 + RARE_BLOCKS) * BLOCK;
/// Changes of registers between two writes to one of the rare blocks.
const RARE_EVERY: u64 = 16;
/// Bytes of a sector: all of one register, which is kept twice.
pub const SECTOR_BYTES: usize = 512;

/// Frames that fit into the receive ring.
const RING: u64 = 4;
/// Connections.
const CONNECTIONS: u64 = 5 * RING - KEYS_END;

const KEYS_END: u64 = KEYS as u64;
const CONNECTIONS_END: u64 = KEYS_END + CONNECTIONS;
/// A page for each frame of the ring.
const RING_FIRST: u64 = CONNECTIONS_END;
/// Written by the machine: frames ever put into the ring.
const RING_STATE: u64 = RING_FIRST + RING;
/// Answers that wait for their flush.
const QUEUE: u64 = RING_STATE + 1;
const MISC: u64 = QUEUE + 1;
const NOISE: u64 = MISC + 1;
const _: () = assert!(NOISE < PAGES);

/// Something that the guest does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// It sends a frame.
    Send {
        /// The frame, in the guest's own numbers.
        frame: Bytes,
        /// First number of the guest and of the client, for a segment of a connection.
        first: Option<(u32, u32)>,
    },
    /// It writes a register, to two sectors, or discards a piece of its disk.
    Write {
        /// Where.
        offset: u64,
        /// What.
        written: Written,
    },
    /// It wants all it has written to be durable; answered by [`ToyVm::flushed`] or [`ToyVm::flush_failed`].
    Flush(u64),
}

/// What is not in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Registers {
    /// Frames ever taken from the ring.
    taken: u64,
    /// The guest's clock in milliseconds; it stands between two timers.
    clock: u64,
}

/// The guest.
#[derive(Clone, Debug, Default)]
pub struct ToyVm {
    /// Its memory.
    pub memory: Memory,
    /// The rest.
    pub registers: Registers,
}

/// One turn: the host's chance, and what the guest does.
struct Turn<'a> {
    random: Random,
    effects: &'a mut Vec<Effect>,
}

impl Registers {
    /// Writes them.
    #[must_use]
    pub fn store(self) -> Vec<u8> {
        [self.taken, self.clock].map(u64::to_le_bytes).concat()
    }

    /// Reads them; nothing if these are not the toy's.
    #[must_use]
    pub fn load(bytes: &[u8]) -> Option<Self> {
        let number = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        Some(Self {
            taken: number(0)?,
            clock: number(8)?,
        })
    }
}

impl ToyVm {
    /// Starts a guest that finds this disk.
    ///
    /// # Panics
    /// If the disk is not a toy's.
    #[must_use]
    pub fn boot(disk: &[u8], noise: u64) -> Self {
        let mut vm = Self::default();
        for key in 0..KEYS {
            vm.memory.write(u64::from(key), 0, sector_of(disk, key));
        }
        // Ports of its last life may still be known to others.
        vm.memory.set_number(MISC, connections::CONNECTS, noise % 4_096);
        vm
    }

    /// Returns a register's value.
    #[must_use]
    pub fn value(&self, key: u8) -> u64 {
        self.memory.number(u64::from(key), 0)
    }

    /// Tells whether the receive ring has room.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.received() - self.registers.taken < RING
    }

    /// Tells whether a turn would do something.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.received() > self.registers.taken
    }

    /// Puts a frame into the receive ring: the machine writes the guest's memory.
    ///
    /// # Panics
    /// If the ring is full.
    pub fn receive(&mut self, frame: &[u8]) {
        assert!(self.has_room(), "room was asked for");
        let received = self.received();
        let page = RING_FIRST + received % RING;
        let length = u16::try_from(frame.len()).expect("a short frame");
        self.memory.machine_writes(page, 2, frame);
        self.memory.machine_writes(page, 0, &length.to_le_bytes());
        self.memory.machine_writes(RING_STATE, 0, &(received + 1).to_le_bytes());
    }

    /// Handles one frame of the ring, if there is any.
    pub fn turn(&mut self, noise: u64, effects: &mut Vec<Effect>) {
        if !self.is_ready() {
            return;
        }
        let page = self.memory.page(RING_FIRST + self.registers.taken % RING);
        let length = usize::from(u16::from_le_bytes([page[0], page[1]]));
        let frame = page[2..2 + length].to_vec();
        self.registers.taken += 1;
        let mut turn = Turn::new(noise, effects);
        let Some(packet) = packet::parse(&frame).filter(|packet| packet.intact && packet.to.0 == packet::GUEST) else {
            return;
        };
        match packet.tcp {
            Some(header) => self.hear_segment(&packet, &header, &mut turn),
            None => self.hear_datagram(&packet, &mut turn),
        }
        self.drain(&mut turn);
    }

    /// Returns when the guest wants to be called, by its own clock.
    #[must_use]
    pub fn deadline(&self) -> Option<u64> {
        self.connection_deadlines().min()
    }

    /// Returns how long after now that is.
    #[must_use]
    pub fn wait(&self) -> Option<u64> {
        Some(self.deadline()?.saturating_sub(self.registers.clock))
    }

    /// Moves the guest's clock to that time, and lets happen what is due.
    pub fn timer(&mut self, time: u64, noise: u64, effects: &mut Vec<Effect>) {
        self.registers.clock = self.registers.clock.max(time);
        let mut turn = Turn::new(noise, effects);
        self.connection_timers(&mut turn);
        self.drain(&mut turn);
    }

    /// Returns the last flush that has not ended.
    #[must_use]
    pub fn flush_due(&self) -> Option<u64> {
        let [asked, done] = [service::FLUSHES_ASKED, service::FLUSHES_DONE].map(|at| self.memory.number(MISC, at));
        (done < asked).then_some(asked)
    }

    /// Everything written before this flush is durable.
    pub fn flushed(&mut self, number: u64, noise: u64, effects: &mut Vec<Effect>) {
        if self.memory.number(MISC, service::FLUSHES_DONE) < number {
            self.memory.set_number(MISC, service::FLUSHES_DONE, number);
            self.drain(&mut Turn::new(noise, effects));
        }
    }

    /// A flush failed, and what was written before it may be lost: the guest writes it again.
    pub fn flush_failed(&mut self, effects: &mut Vec<Effect>) {
        for key in 0..KEYS {
            effects.push(self.write_sector(key));
        }
        effects.extend((0..RARE_BLOCKS).map(|rare| self.write_rare(rare, 0)));
        effects.push(self.ask_flush());
    }

    /// Tells whether a disk holds what this guest has written to its own: it writes at once whatever it changes.
    #[must_use]
    pub fn wrote(&self, disk: &[u8]) -> bool {
        (0..KEYS).all(|key| self.memory.page(u64::from(key))[..SECTOR_BYTES] == *sector_of(disk, key))
    }

    fn received(&self) -> u64 {
        self.memory.number(RING_STATE, 0)
    }

    fn hear_datagram(&mut self, packet: &Packet<'_>, turn: &mut Turn<'_>) {
        if packet.to.1 == SERVICE_PORT
            && self.queue_has_room()
            && let Some(request) = Request::decode(packet.payload)
        {
            self.execute(&request, service::Asker::Datagram(packet.from), turn);
        }
    }
}

impl<'a> Turn<'a> {
    fn new(noise: u64, effects: &'a mut Vec<Effect>) -> Self {
        Self {
            random: Random::new(noise),
            effects,
        }
    }
}

/// Returns where a register is on the disk: in the first block or the last, the last one in the first and the second.
#[must_use]
pub fn sector(key: u8) -> u64 {
    let record = 2 * SECTOR_BYTES as u64;
    if key == KEYS - 1 {
        BLOCK - record / 2
    } else {
        u64::from(key) * record + u64::from(key % 2) * SHORT_BLOCK
    }
}

/// Returns where the sector of a rare block is.
fn rare_sector(rare: u64) -> u64 {
    (1 + rare) * BLOCK + BLOCK / 2
}

/// Returns what is discarded with a rare block: from within it on, whole pages and parts of them, and the next one's sector.
fn rare_discard(rare: u64) -> (u64, u64) {
    let from = rare_sector(rare) - 3 * SECTOR_BYTES as u64;
    (from, (from + BLOCK + 8 * 1024).min(SHORT_BLOCK) - from)
}

/// Returns where all sectors are that a guest ever writes.
pub fn sectors() -> impl Iterator<Item = u64> {
    (0..KEYS).map(sector).chain((0..RARE_BLOCKS).map(rare_sector))
}

/// Returns a register's value as a disk holds it.
///
/// # Panics
/// If the disk is not a toy's.
#[must_use]
pub fn value_on_disk(disk: &[u8], key: u8) -> u64 {
    u64::from_le_bytes(sector_of(disk, key)[..8].try_into().expect("eight bytes"))
}

fn sector_of(disk: &[u8], key: u8) -> &[u8] {
    let at = usize::try_from(sector(key)).expect("a small disk");
    &disk[at..at + SECTOR_BYTES]
}
