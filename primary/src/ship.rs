//! The thread that ships a checkpoint while the VM runs on: it encodes the copied pages and queues them.
//!
//! Pages go from the copy, or from guest memory, through the encoder into the data connection's queue; the protocol
//! sees only their number and digest. No decision is made here.

use std::sync::{Arc, mpsc};
use std::time::Instant;

use bytes::Bytes;
use checkpoint::Epoch;
use checkpoint::limits::{BODY_BYTES_MAX, PAGE_BYTES};
use checkpoint::pages::{BASE_BYTES_DEFAULT, BaseCache, BatchEncoder, Chooser, CodecStats, Page, is_zero};
use checkpoint::staging::Totals;
use checkpoint::wire::{DeviceState, DiskWrite, Message, PageBatch, Section};
use link::describe;
use link::peer::BulkSender;
use link::worker::{Inbox, Worker};
use machine::{GuestRam, MemoryError, PageSet, VmError};
use storage::verify::block_range;
use storage::{FileImage, Image};
use tokio::sync::mpsc as events;

use crate::event::{Event, Shipment};
use crate::trace::Traces;

/// Encoded bytes after which a batch is sent.
const BATCH_BYTES: usize = 256 * 1024;
const _: () = assert!(BATCH_BYTES + 2 * PAGE_BYTES < BODY_BYTES_MAX);
/// Pages copied at a stop. What is dirty beyond them is shipped while the VM stands, so that the copy is bounded.
const COPIED_PAGES_MAX: usize = 64 * 1024;

/// What is copied at a stop, and what is known for encoding it. It is with the VM's thread or with the courier.
pub(crate) struct Kit {
    numbers: Vec<u64>,
    content: Vec<u8>,
    encoder: BatchEncoder,
    cache: BaseCache,
    chooser: Chooser,
    /// What the encoder had done before this checkpoint.
    before: CodecStats,
}

impl Kit {
    fn new() -> Self {
        Self {
            numbers: Vec::new(),
            content: Vec::new(),
            encoder: BatchEncoder::new(BATCH_BYTES, None),
            cache: BaseCache::new(BASE_BYTES_DEFAULT),
            chooser: Chooser::default(),
            before: CodecStats::default(),
        }
    }

    /// Begins another checkpoint. `committed` is the epoch of the one before, if it was acknowledged.
    pub(crate) fn begin(&mut self, committed: Option<Epoch>) {
        match committed {
            Some(epoch) => self.cache.commit(epoch),
            None => self.cache.abandon(),
        }
        self.encoder.rebase(self.cache.committed());
        self.before = *self.encoder.stats();
    }

    /// Returns what was encoded for this checkpoint.
    fn stats(&self) -> CodecStats {
        self.encoder.stats().since(&self.before)
    }

    /// Forgets what a secondary holds: there will be another, or the same with another state.
    pub(crate) fn forget(&mut self) {
        self.cache.clear();
    }

    /// Copies pages until the bound, and returns those beyond it.
    pub(crate) fn copy(&mut self, ram: &GuestRam, pages: &PageSet) -> Result<Vec<u64>, MemoryError> {
        let mut pages = pages.iter();
        self.numbers.clear();
        self.numbers.extend(pages.by_ref().take(COPIED_PAGES_MAX));
        self.content.resize(self.numbers.len() * PAGE_BYTES, 0);
        for (page, content) in self.numbers.iter().zip(self.content.as_chunks_mut().0) {
            ram.read_page(*page, content)?;
        }
        Ok(pages.collect())
    }

    /// Encodes a page, and sends the batch that it fills.
    fn push(&mut self, out: &mut Outbox, page: u64, content: &Page) -> Result<(), LinkGone> {
        let reference = self.cache.base(page);
        let pushed = self.encoder.push(page, content, reference, &mut self.chooser);
        self.cache.shipped(page, content, pushed.codec);
        if pushed.full {
            out.batch(&mut self.encoder)
        } else {
            Ok(())
        }
    }

    fn finish(&mut self, out: &mut Outbox) -> Result<(), LinkGone> {
        if self.encoder.is_empty() {
            Ok(())
        } else {
            out.batch(&mut self.encoder)
        }
    }

    /// Ships pages out of memory: the VM stands.
    pub(crate) fn ship(&mut self, out: &mut Outbox, ram: &GuestRam, pages: &[u64]) -> Result<(), ShipError> {
        let mut content = [0; PAGE_BYTES];
        for &page in pages {
            ram.read_page(page, &mut content)?;
            self.push(out, page, &content)?;
        }
        Ok(self.finish(out)?)
    }

    fn ship_copied(&mut self, out: &mut Outbox) -> Result<(), LinkGone> {
        let (numbers, content) = (core::mem::take(&mut self.numbers), core::mem::take(&mut self.content));
        let sent = numbers
            .iter()
            .zip(content.as_chunks().0)
            .try_for_each(|(page, content)| self.push(out, *page, content));
        (self.numbers, self.content) = (numbers, content);
        sent?;
        self.finish(out)
    }
}

/// Everything that a checkpoint ships, independent of the running VM.
pub(crate) struct Parcel {
    pub(crate) out: Outbox,
    pub(crate) kit: Kit,
    /// Disk blocks of a first checkpoint: the VM stands until it is acknowledged.
    pub(crate) blocks: Vec<u64>,
    pub(crate) sections: Vec<Section>,
    pub(crate) entropy: [u8; 32],
}

/// The thread, and the kit that comes back from it.
pub(crate) struct Courier {
    thread: Worker<Parcel>,
    returned: mpsc::Receiver<Kit>,
}

impl Courier {
    /// Starts the thread.
    pub(crate) fn spawn(image: Arc<FileImage>, traces: Traces, events: events::Sender<Event>) -> std::io::Result<Self> {
        let (give_back, returned) = mpsc::channel();
        // Received by the first checkpoint.
        let _ = give_back.send(Kit::new());
        let thread = Worker::spawn("courier", move |inbox: Inbox<Parcel>| {
            while let Some(parcel) = inbox.next() {
                let (kit, sent) = parcel.send(&image, &traces);
                // Either channel is closed when the role has ended.
                let _ = give_back.send(kit);
                let event = match sent {
                    Ok(shipment) => Event::CheckpointSent(shipment),
                    Err(ShipError::Link) => continue,
                    Err(ShipError::Vm(reason)) => Event::VmFailed(reason),
                };
                let _ = events.blocking_send(event);
            }
        })?;
        Ok(Self { thread, returned })
    }

    /// Returns the kit for the next checkpoint, once the shipment before has left it.
    pub(crate) fn kit(&self) -> Kit {
        self.returned.recv().unwrap_or_else(|_gone| Kit::new())
    }

    /// Ships; answered by `CheckpointSent`.
    pub(crate) fn send(&self, parcel: Parcel) {
        self.thread.send(parcel);
    }
}

impl Parcel {
    fn send(mut self, image: &FileImage, traces: &Traces) -> (Kit, Result<Shipment, ShipError>) {
        let start = Instant::now();
        let sent = self.queue(image);
        traces.sent(
            self.out.totals.tag(),
            start.elapsed(),
            &self.kit.stats(),
            self.out.bytes,
        );
        (self.kit, sent.map(|()| self.out.shipment(self.entropy)))
    }

    fn queue(&mut self, image: &FileImage) -> Result<(), ShipError> {
        self.kit.ship_copied(&mut self.out)?;
        for &block in &self.blocks {
            let (offset, data) = read_block(image, block).map_err(|error| ShipError::Vm(error.to_string()))?;
            self.out.write(offset, data)?;
        }
        self.out.devices(core::mem::take(&mut self.sections))?;
        Ok(())
    }
}

/// The connection ended in the middle of a shipment; the protocol hears of it from the connection.
pub(crate) struct LinkGone;

/// Why a shipment ended early.
pub(crate) enum ShipError {
    Link,
    Vm(String),
}

impl From<LinkGone> for ShipError {
    fn from(LinkGone: LinkGone) -> Self {
        Self::Link
    }
}

impl From<MemoryError> for ShipError {
    fn from(error: MemoryError) -> Self {
        Self::Vm(describe(&error))
    }
}

impl From<VmError> for ShipError {
    fn from(error: VmError) -> Self {
        Self::Vm(describe(&error))
    }
}

/// Where the parts of one checkpoint are counted and queued.
pub(crate) struct Outbox {
    totals: Totals,
    pages: u64,
    bytes: u64,
    bulk: BulkSender,
}

impl Outbox {
    pub(crate) fn new(totals: Totals, bulk: BulkSender) -> Self {
        Self {
            totals,
            pages: 0,
            bytes: 0,
            bulk,
        }
    }

    /// A fresh image is zero: `skip_zero` leaves such pages out.
    pub(crate) fn pages(
        &mut self,
        ram: &GuestRam,
        pages: impl Iterator<Item = u64>,
        skip_zero: bool,
    ) -> Result<(), ShipError> {
        let mut content = [0; PAGE_BYTES];
        let mut encoder = BatchEncoder::new(BATCH_BYTES, None);
        let mut chooser = Chooser::default();
        for page in pages {
            ram.read_page(page, &mut content)?;
            if skip_zero && is_zero(&content) {
                continue;
            }
            if encoder.push(page, &content, None, &mut chooser).full {
                self.batch(&mut encoder)?;
            }
        }
        if !encoder.is_empty() {
            self.batch(&mut encoder)?;
        }
        Ok(())
    }

    fn batch(&mut self, encoder: &mut BatchEncoder) -> Result<(), LinkGone> {
        let (count, encoded) = encoder.finish();
        let batch = PageBatch {
            tag: self.totals.tag(),
            count,
            encoded,
        };
        self.totals.pages(&batch).expect("the batch has the tag of the sums");
        self.pages += u64::from(count);
        self.bytes += batch.encoded.len() as u64;
        send(&self.bulk, Message::Pages(batch))
    }

    fn write(&mut self, offset: u64, data: Bytes) -> Result<(), LinkGone> {
        let write = DiskWrite {
            tag: self.totals.tag(),
            offset,
            data,
        };
        self.totals.write(&write).expect("the write has the tag of the sums");
        send(&self.bulk, Message::Write(write))
    }

    fn devices(&mut self, sections: Vec<Section>) -> Result<(), LinkGone> {
        let state = DeviceState {
            tag: self.totals.tag(),
            sections,
        };
        self.totals
            .device_state(&state)
            .expect("the devices' state is counted once");
        send(&self.bulk, Message::DeviceState(state))
    }

    pub(crate) fn shipment(self, entropy: [u8; 32]) -> Shipment {
        Shipment {
            totals: self.totals,
            pages: self.pages,
            bytes: self.bytes,
            entropy,
        }
    }
}

/// Reads one block of the disk comparison; the last may be short.
pub(crate) fn read_block(image: &impl Image, block: u64) -> std::io::Result<(u64, Bytes)> {
    let (offset, bytes) = block_range(image.size(), block);
    let mut data = vec![0; bytes];
    image.read_at(offset, &mut data)?;
    Ok((offset, data.into()))
}

pub(crate) fn send(bulk: &BulkSender, message: Message) -> Result<(), LinkGone> {
    bulk.blocking_send(message).map_err(|_closed| LinkGone)
}
