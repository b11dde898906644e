//! The disk: one queue of reads, writes, flushes, discards, requests for zeros and for the identity.
//!
//! Requests are carried out one after the other, in the order in which the guest queued them, and each
//! is answered before the next one begins: between two requests nothing is in flight, and a checkpoint
//! taken there has each request either done and answered or not begun. A back end's error becomes the
//! guest's I/O error. A driver that does not know flushes gets one after each write.
//!
//! What was discarded reads as zeros: the back end sees zeros only, with or without leave to give the room back.

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES,
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::virtio::mmio::VirtioMmio;
use super::virtio::queue::{Chain, QueueError, Ring};
use super::virtio::{Complaints, Device, DeviceError, QUEUE_SIZE_MAX, Turn, Work};
use crate::devices::Interrupt;
use crate::memory::Memory;

/// Bytes of a sector, in which the guest counts.
pub const SECTOR_BYTES: u64 = 512;
/// The most data that one request may carry; more is an I/O error, as it would delay a checkpoint.
pub const REQUEST_BYTES_MAX: u32 = 32 * 1024 * 1024;

const HEADER_BYTES: u32 = 16;
const STATUS_BYTES: u32 = 1;
/// Data is copied through a buffer of this size.
const CHUNK_BYTES: u32 = 256 * 1024;
/// Requests in one turn.
const BATCH: usize = 32;
/// Of a chain of the longest possible length, header and status are not data.
const SEGMENTS_MAX: u32 = QUEUE_SIZE_MAX as u32 - 2;
const FEATURE_FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
const FEATURE_DISCARD: u64 = 1 << VIRTIO_BLK_F_DISCARD;
const FEATURE_ZEROES: u64 = 1 << VIRTIO_BLK_F_WRITE_ZEROES;

/// The most sectors that one range of zeros may have, and
pub const ZEROS_SECTORS_MAX: u32 = 128 * 1024;
/// the most ranges of a request: together 256 MiB, which a file system gives back in a tenth of a second. A stop waits for the request that
/// is under way.
pub const ZEROS_RANGES_MAX: u32 = 4;
/// Discards that begin and end at pages of the host's file system give all of their room back.
const DISCARD_ALIGNMENT: u32 = 8;
/// Bytes of `struct virtio_blk_discard_write_zeroes`: sector, sectors, flags.
const RANGE_BYTES: u32 = 16;

/// The disk's content. Called on the disk's worker, never while the disk is frozen.
pub trait Backend: Send {
    /// The size in bytes; it does not change. What lies after the last whole sector is not shown.
    fn size(&self) -> u64;
    /// Fills `data` from `offset`. Within [`Backend::size`].
    fn read(&mut self, offset: u64, data: &mut [u8]) -> io::Result<()>;
    /// Writes `data` at `offset`. Within [`Backend::size`].
    fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Makes a range zeros, from `offset` on. Within [`Backend::size`]. Its room may go back to the host if `give_back`.
    fn zero(&mut self, offset: u64, length: u64, give_back: bool) -> io::Result<()>;
    /// Returns when everything written so far is as durable as this disk can make it.
    fn flush(&mut self) -> io::Result<()>;
}

/// A handle on the disk.
#[derive(Clone)]
pub struct Block {
    mmio: Arc<VirtioMmio>,
}

impl Block {
    /// Makes a disk in front of `backend`; the guest can ask for `serial`, of which 20 bytes are kept.
    pub fn new(
        name: &str,
        serial: &str,
        backend: Box<dyn Backend>,
        ram: Memory,
        line: Arc<dyn Interrupt>,
    ) -> Result<Self, DeviceError> {
        let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
        for (to, from) in id.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        let disk = Disk {
            size: backend.size(),
            backend,
            id,
            features: 0,
            buffer: Vec::new(),
            complaints: Complaints::default(),
        };
        Ok(Self {
            mmio: Arc::new(VirtioMmio::new(name, Box::new(disk), ram, line)?),
        })
    }

    /// The disk's transport.
    #[must_use]
    pub fn mmio(&self) -> &Arc<VirtioMmio> {
        &self.mmio
    }

    /// Puts another content of the same size behind the disk, between two requests, and returns the one it had.
    pub fn set_backend(&self, backend: Box<dyn Backend>) -> Result<Box<dyn Backend>, DeviceError> {
        let offered = backend.size();
        self.mmio.change(|disk: &mut Disk| {
            if disk.size == offered {
                Ok(std::mem::replace(&mut disk.backend, backend))
            } else {
                Err(DeviceError::Size {
                    device: self.mmio.name().to_owned(),
                    has: disk.size,
                    offered,
                })
            }
        })
    }
}

struct Disk {
    backend: Box<dyn Backend>,
    size: u64,
    id: [u8; VIRTIO_BLK_ID_BYTES as usize],
    features: u64,
    buffer: Vec<u8>,
    complaints: Complaints,
}

/// Why a request was not carried out.
enum Refusal {
    /// The guest gets this status.
    Status(u32),
    /// The queue is not to be trusted any more.
    Queue(QueueError),
}

impl From<QueueError> for Refusal {
    fn from(error: QueueError) -> Self {
        Self::Queue(error)
    }
}

impl Device for Disk {
    fn kind(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        FEATURE_FLUSH | FEATURE_DISCARD | FEATURE_ZEROES | 1 << VIRTIO_BLK_F_SEG_MAX
    }

    fn queues(&self) -> usize {
        1
    }

    fn config(&self) -> Vec<u8> {
        // struct virtio_blk_config: capacity, size_max (not offered), seg_max.
        let mut config = (self.size / SECTOR_BYTES).to_le_bytes().to_vec();
        config.extend_from_slice(&0u32.to_le_bytes());
        config.extend_from_slice(&SEGMENTS_MAX.to_le_bytes());
        // Geometry to num_queues: not offered.
        config.resize(36, 0);
        let limits = [ZEROS_SECTORS_MAX, ZEROS_RANGES_MAX];
        for field in [&limits[..], &[DISCARD_ALIGNMENT], &limits].concat() {
            config.extend_from_slice(&field.to_le_bytes());
        }
        // write_zeroes_may_unmap, and the rest of the structure.
        config.extend_from_slice(&[1, 0, 0, 0]);
        config
    }

    fn activate(&mut self, features: u64) {
        self.features = features;
    }

    fn turn(&mut self, rings: &mut [Ring], work: &Work<'_>) -> Result<Turn, QueueError> {
        let ring = &mut rings[0];
        for _ in 0..BATCH {
            if work.stopping() {
                break;
            }
            let Some(chain) = ring.pop(work.ram)? else {
                return Ok(Turn {
                    more: ring.listen(work.ram)?,
                    watch: false,
                });
            };
            let written = self.serve(&chain, work.ram)?;
            ring.complete(work.ram, &chain, written)?;
            ring.tell(work)?;
        }
        Ok(Turn {
            more: true,
            watch: false,
        })
    }
}

impl Disk {
    /// Carries out one request and returns how many bytes of the chain were written.
    fn serve(&mut self, chain: &Chain, ram: &Memory) -> Result<u32, QueueError> {
        if chain.readable() < HEADER_BYTES {
            return Err(QueueError::Layout("a disk request is shorter than its header"));
        }
        let Some(room) = chain.writable().checked_sub(STATUS_BYTES) else {
            return Err(QueueError::Layout("a disk request has no room for its status"));
        };
        let (written, status) = match self.execute(chain, room, ram) {
            Ok(written) => (written, VIRTIO_BLK_S_OK),
            Err(Refusal::Status(status)) => (0, status),
            Err(Refusal::Queue(error)) => return Err(error),
        };
        let [status, ..] = status.to_le_bytes();
        chain.write(ram, room, &[status])?;
        Ok(written + STATUS_BYTES)
    }

    fn execute(&mut self, chain: &Chain, room: u32, ram: &Memory) -> Result<u32, Refusal> {
        let mut header = [0; HEADER_BYTES as usize];
        chain.read(ram, 0, &mut header)?;
        let [k0, k1, k2, k3, _, _, _, _, s @ ..] = header;
        let sector = u64::from_le_bytes(s);
        match u32::from_le_bytes([k0, k1, k2, k3]) {
            VIRTIO_BLK_T_IN => {
                let offset = self.extent(sector, room)?;
                self.read(chain, offset, room, ram)?;
                Ok(room)
            }
            VIRTIO_BLK_T_OUT => {
                let length = chain.readable() - HEADER_BYTES;
                let offset = self.extent(sector, length)?;
                self.write(chain, offset, length, ram)?;
                Ok(0)
            }
            VIRTIO_BLK_T_FLUSH => {
                let flushed = self.backend.flush();
                self.io(flushed, "flush", sector)?;
                Ok(0)
            }
            VIRTIO_BLK_T_GET_ID => {
                let length = room.min(VIRTIO_BLK_ID_BYTES);
                chain.write(ram, 0, &self.id[..crate::index(length.into())])?;
                Ok(length)
            }
            VIRTIO_BLK_T_DISCARD if self.features & FEATURE_DISCARD != 0 => self.zero(chain, 0, ram),
            VIRTIO_BLK_T_WRITE_ZEROES if self.features & FEATURE_ZEROES != 0 => {
                self.zero(chain, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP, ram)
            }
            _ => Err(Refusal::Status(VIRTIO_BLK_S_UNSUPP)),
        }
    }

    /// Carries out a discard or a request for zeros, whose ranges may have these flags; all of it is checked before any of it is done.
    fn zero(&mut self, chain: &Chain, flags_known: u32, ram: &Memory) -> Result<u32, Refusal> {
        let length = chain.readable() - HEADER_BYTES;
        let ranges = length / RANGE_BYTES;
        if !length.is_multiple_of(RANGE_BYTES) || !(1..=ZEROS_RANGES_MAX).contains(&ranges) {
            return Err(self.refuse("no whole ranges to make zeros, or too many", 0, length.into()));
        }
        let mut bytes = vec![0; crate::index(length.into())];
        chain.read(ram, HEADER_BYTES, &mut bytes)?;
        let (ranges, _) = bytes.as_chunks::<{ RANGE_BYTES as usize }>();
        let mut extents = Vec::with_capacity(ranges.len());
        for [s0, s1, s2, s3, s4, s5, s6, s7, c0, c1, c2, c3, flags @ ..] in ranges {
            let sector = u64::from_le_bytes([*s0, *s1, *s2, *s3, *s4, *s5, *s6, *s7]);
            let count = u32::from_le_bytes([*c0, *c1, *c2, *c3]);
            let flags = u32::from_le_bytes(*flags);
            if flags & !flags_known != 0 {
                return Err(Refusal::Status(VIRTIO_BLK_S_UNSUPP));
            }
            if !self.holds(sector, count.into()) || count > ZEROS_SECTORS_MAX {
                return Err(self.refuse("zeros outside the disk, or too many", sector, count.into()));
            }
            // A discard is there to give room back; zeros may, if the guest says so.
            let give_back = flags_known == 0 || flags != 0;
            extents.push((sector * SECTOR_BYTES, u64::from(count) * SECTOR_BYTES, give_back));
        }
        for (offset, length, give_back) in extents {
            let zeroed = self.backend.zero(offset, length, give_back);
            self.io(zeroed, "zero", offset / SECTOR_BYTES)?;
        }
        self.write_through()?;
        Ok(0)
    }

    /// Returns the offset of `sector` if `length` bytes from there are whole sectors of this disk.
    fn extent(&mut self, sector: u64, length: u32) -> Result<u64, Refusal> {
        let sectors = u64::from(length) / SECTOR_BYTES;
        let whole = u64::from(length).is_multiple_of(SECTOR_BYTES);
        if self.holds(sector, sectors) && whole && length <= REQUEST_BYTES_MAX {
            return Ok(sector * SECTOR_BYTES);
        }
        Err(self.refuse("not whole sectors inside the disk, or too long", sector, length.into()))
    }

    /// Tells whether all these sectors are inside the disk.
    fn holds(&self, sector: u64, sectors: u64) -> bool {
        let end = sector.checked_add(sectors);
        end.is_some_and(|end| end <= self.size / SECTOR_BYTES)
    }

    fn refuse(&mut self, what: &'static str, sector: u64, length: u64) -> Refusal {
        if let Some(count) = self.complaints.due() {
            tracing::warn!(sector, length, count, what, "disk request refused");
        }
        Refusal::Status(VIRTIO_BLK_S_IOERR)
    }

    fn read(&mut self, chain: &Chain, offset: u64, length: u32, ram: &Memory) -> Result<(), Refusal> {
        let mut done = 0;
        while done < length {
            let chunk = CHUNK_BYTES.min(length - done);
            self.buffer.resize(crate::index(chunk.into()), 0);
            let read = self.backend.read(offset + u64::from(done), &mut self.buffer);
            self.io(read, "read", offset / SECTOR_BYTES)?;
            chain.write(ram, done, &self.buffer)?;
            done += chunk;
        }
        Ok(())
    }

    fn write(&mut self, chain: &Chain, offset: u64, length: u32, ram: &Memory) -> Result<(), Refusal> {
        let mut done = 0;
        while done < length {
            let chunk = CHUNK_BYTES.min(length - done);
            self.buffer.resize(crate::index(chunk.into()), 0);
            chain.read(ram, HEADER_BYTES + done, &mut self.buffer)?;
            let written = self.backend.write(offset + u64::from(done), &self.buffer);
            self.io(written, "write", offset / SECTOR_BYTES)?;
            done += chunk;
        }
        self.write_through()
    }

    /// A driver that does not know flushes counts on each write to be durable.
    fn write_through(&mut self) -> Result<(), Refusal> {
        if self.features & FEATURE_FLUSH == 0 {
            let flushed = self.backend.flush();
            self.io(flushed, "flush", 0)?;
        }
        Ok(())
    }

    fn io(&mut self, result: io::Result<()>, what: &'static str, sector: u64) -> Result<(), Refusal> {
        result.map_err(|error| {
            if let Some(count) = self.complaints.due() {
                tracing::error!(%error, what, sector, count, "the disk's back end failed; the guest sees an I/O error");
            }
            Refusal::Status(VIRTIO_BLK_S_IOERR)
        })
    }
}
