//! The disk: one queue of reads, writes, flushes and identity requests.
//!
//! Requests are carried out one after the other, in the order in which the guest queued them, and each
//! is answered before the next one begins: between two requests nothing is in flight, and a checkpoint
//! taken there has each request either done and answered or not begun. A back end's error becomes the
//! guest's I/O error. A driver that does not know flushes gets one after each write.

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
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

/// The disk's content. Called on the disk's worker, never while the disk is frozen.
pub trait Backend: Send {
    /// The size in bytes; it does not change. What lies after the last whole sector is not shown.
    fn size(&self) -> u64;
    /// Fills `data` from `offset`. Within [`Backend::size`].
    fn read(&mut self, offset: u64, data: &mut [u8]) -> io::Result<()>;
    /// Writes `data` at `offset`. Within [`Backend::size`].
    fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()>;
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
        FEATURE_FLUSH | 1 << VIRTIO_BLK_F_SEG_MAX
    }

    fn queues(&self) -> usize {
        1
    }

    fn config(&self) -> Vec<u8> {
        // struct virtio_blk_config: capacity, size_max (not offered), seg_max.
        let mut config = (self.size / SECTOR_BYTES).to_le_bytes().to_vec();
        config.extend_from_slice(&0u32.to_le_bytes());
        config.extend_from_slice(&SEGMENTS_MAX.to_le_bytes());
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
            _ => Err(Refusal::Status(VIRTIO_BLK_S_UNSUPP)),
        }
    }

    /// Returns the offset of `sector` if `length` bytes from there are whole sectors of this disk.
    fn extent(&mut self, sector: u64, length: u32) -> Result<u64, Refusal> {
        let sectors = u64::from(length) / SECTOR_BYTES;
        let inside = sector
            .checked_add(sectors)
            .is_some_and(|end| end <= self.size / SECTOR_BYTES);
        if inside && u64::from(length).is_multiple_of(SECTOR_BYTES) && length <= REQUEST_BYTES_MAX {
            return Ok(sector * SECTOR_BYTES);
        }
        if let Some(count) = self.complaints.due() {
            tracing::warn!(
                sector,
                length,
                count,
                "disk request refused: not whole sectors inside the disk, or too long"
            );
        }
        Err(Refusal::Status(VIRTIO_BLK_S_IOERR))
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
        if self.features & FEATURE_FLUSH == 0 {
            let flushed = self.backend.flush();
            self.io(flushed, "flush", offset / SECTOR_BYTES)?;
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
