//! The block device: one request at a time, never waited for.

use alloc::boxed::Box;
use alloc::vec;

use guest::kv::{REQUEST_BYTES_MAX, Request};
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::Transport;

use super::devices::{self, Direct, Features, Registers};

const QUEUE_SIZE: usize = 16;
const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const DISCARD: u32 = 11;
/// Where in the configuration the longest discard is, in sectors.
const MAX_DISCARD_SECTORS: usize = 36;
const NOT_DONE: u8 = 0xff;

type Queue = VirtQueue<Direct, QUEUE_SIZE>;

/// The block device.
pub(crate) struct Block {
    registers: Registers,
    queue: Queue,
    features: Features,
    capacity: u64,
    /// The longest discard, in sectors.
    discard_max: u32,
    header: Box<[u8; 16]>,
    data: Box<[u8]>,
    status: Box<[u8; 1]>,
    running: Option<Running>,
}

#[derive(Clone, Copy)]
struct Running {
    token: u16,
    what: What,
}

#[derive(Clone, Copy)]
enum What {
    Read(usize),
    Write(usize),
    Flush,
    /// Of the range that is the data.
    Discard,
    /// What the device does not need, or can't do and may leave.
    Nothing,
}

/// What became of the last request.
pub(crate) enum Polled<'a> {
    /// It is still under way.
    Busy,
    /// There is none.
    Idle,
    /// It is done; a read's data.
    Done(&'a [u8]),
    /// The device says that it failed.
    Failed,
}

impl Block {
    /// Sets up the device.
    pub(crate) fn new(mut registers: Registers) -> Self {
        let wanted = Features::READ_ONLY | Features::FLUSH | Features::DISCARD;
        let features = devices::begin(&mut registers, wanted);
        let word = |registers: &Registers, offset| registers.read_config_space::<u32>(offset);
        let (Ok(low), Ok(high)) = (word(&registers, 0), word(&registers, 4)) else {
            panic!("the block device has no configuration");
        };
        let discard_max = if features.contains(Features::DISCARD) {
            word(&registers, MAX_DISCARD_SECTORS).unwrap_or(0)
        } else {
            0
        };
        let queue = devices::queue(&mut registers, 0);
        registers.finish_init();
        Self {
            registers,
            queue,
            features,
            capacity: u64::from(high) << 32 | u64::from(low),
            discard_max,
            header: Box::new([0; 16]),
            data: vec![0; REQUEST_BYTES_MAX].into_boxed_slice(),
            status: Box::new([0]),
            running: None,
        }
    }

    /// Sectors of the disk.
    pub(crate) fn capacity(&self) -> u64 {
        self.capacity
    }

    pub(crate) fn is_read_only(&self) -> bool {
        self.features.contains(Features::READ_ONLY)
    }

    pub(crate) fn can_flush(&self) -> bool {
        self.features.contains(Features::FLUSH)
    }

    /// Hands a request to the device; none may be running.
    pub(crate) fn start(&mut self, request: &Request<'_>) {
        assert!(self.running.is_none(), "one request at a time");
        let (kind, sector, what) = match request {
            Request::Read { sector, bytes } => (READ, *sector, What::Read(*bytes)),
            Request::Write { sector, data } => {
                self.data[..data.len()].copy_from_slice(data);
                (WRITE, *sector, What::Write(data.len()))
            }
            Request::Flush if !self.can_flush() => (FLUSH, 0, What::Nothing),
            Request::Flush => (FLUSH, 0, What::Flush),
            Request::Discard { sectors, .. } if *sectors > self.discard_max => (DISCARD, 0, What::Nothing),
            Request::Discard { sector, sectors } => {
                self.data[..8].copy_from_slice(&sector.to_le_bytes());
                self.data[8..12].copy_from_slice(&sectors.to_le_bytes());
                self.data[12..16].fill(0);
                (DISCARD, 0, What::Discard)
            }
        };
        if matches!(what, What::Nothing) {
            self.running = Some(Running { token: 0, what });
            return;
        }
        self.header[..4].copy_from_slice(&kind.to_le_bytes());
        self.header[8..].copy_from_slice(&sector.to_le_bytes());
        self.status[0] = NOT_DONE;
        // SAFETY: header, data and status live as long as the queue and are not touched until popped.
        let added = self.with_buffers(what, |queue, inputs, outputs| unsafe { queue.add(inputs, outputs) });
        match added {
            Ok(token) => self.running = Some(Running { token, what }),
            Err(error) => panic!("block queue: {error}"),
        }
        devices::kick(&mut self.registers, &self.queue, 0);
    }

    /// Looks what has become of the request.
    pub(crate) fn poll(&mut self) -> Polled<'_> {
        let Some(Running { token, what }) = self.running else {
            return Polled::Idle;
        };
        if matches!(what, What::Nothing) {
            self.running = None;
            return Polled::Done(&[]);
        }
        if !self.queue.can_pop() {
            return Polled::Busy;
        }
        // SAFETY: these are the buffers that the token was given for.
        let popped = self.with_buffers(what, |queue, inputs, outputs| unsafe {
            queue.pop_used(token, inputs, outputs)
        });
        if let Err(error) = popped {
            panic!("block queue: {error}");
        }
        self.running = None;
        // SAFETY: the device has written it; a plain read could be taken from before.
        let status = unsafe { (&raw const self.status[0]).read_volatile() };
        match (status, what) {
            (0, What::Read(bytes)) => Polled::Done(&self.data[..bytes]),
            (0, _) => Polled::Done(&[]),
            _ => Polled::Failed,
        }
    }

    /// Calls `act` with the buffers that make up a request of this kind: what the device reads, what it writes.
    fn with_buffers<R>(
        &mut self,
        what: What,
        act: impl for<'a> FnOnce(&mut Queue, &'a [&'a [u8]], &'a mut [&'a mut [u8]]) -> R,
    ) -> R {
        let Self {
            queue,
            header,
            data,
            status,
            ..
        } = self;
        match what {
            What::Read(bytes) => act(queue, &[&header[..]], &mut [&mut data[..bytes], &mut status[..]]),
            What::Write(bytes) => act(queue, &[&header[..], &data[..bytes]], &mut [&mut status[..]]),
            What::Discard => act(queue, &[&header[..], &data[..16]], &mut [&mut status[..]]),
            What::Flush | What::Nothing => act(queue, &[&header[..]], &mut [&mut status[..]]),
        }
    }
}
