//! The thread that owns the VM: it stops, ships and resumes it, and reports each as an event.
//!
//! Pages go from guest memory through the encoder into the data connection's queue; the protocol sees
//! only their number and digest. No decision is made here.

use std::sync::Arc;

use bytes::Bytes;
use checkpoint::limits::{BODY_BYTES_MAX, PAGE_BYTES};
use checkpoint::pages::{BatchEncoder, Chooser, is_zero};
use checkpoint::staging::Totals;
use checkpoint::wire::{BlockHashes, DeviceState, DiskWrite, Message, PageBatch, Section};
use link::describe;
use link::peer::BulkSender;
use link::record::RecordPlace;
use link::worker::{Inbox, Worker};
use machine::{GuestRam, MemoryError, PageSet, Vm, VmError};
use storage::verify::{BlockHash, HashKey, block_count, block_range};
use storage::{FileImage, Image};
use tokio::sync::mpsc as events;

use crate::event::{Event, Shipment};

/// Encoded bytes after which a batch is sent.
const BATCH_BYTES: usize = 256 * 1024;
const _: () = assert!(BATCH_BYTES + 2 * PAGE_BYTES < BODY_BYTES_MAX);

/// What the VM's thread is told.
pub(crate) enum Command {
    KeepDirty,
    Pause,
    Reseed,
    Resume,
    Seed(Option<[u8; 32]>),
    Ship {
        blocks: Vec<u64>,
        totals: Totals,
        bulk: BulkSender,
    },
    Sync {
        totals: Totals,
        bulk: BulkSender,
    },
}

/// The thread; it ends with the VM, stopped.
pub(crate) type VmThread = Worker<Command, Box<dyn Vm>>;

/// Starts the thread that owns the VM.
pub(crate) fn spawn(
    vm: Box<dyn Vm>,
    image: Arc<FileImage>,
    events: events::Sender<Event>,
) -> std::io::Result<VmThread> {
    let ram = vm.ram();
    let shipper = Shipper {
        vm,
        ram,
        image,
        events,
        unacknowledged: None,
    };
    Worker::spawn("vm", move |inbox| shipper.run(&inbox))
}

struct Shipper {
    vm: Box<dyn Vm>,
    ram: GuestRam,
    image: Arc<FileImage>,
    events: events::Sender<Event>,
    /// Dirty pages of the checkpoint that is not acknowledged yet.
    unacknowledged: Option<PageSet>,
}

/// The connection ended in the middle of a shipment; the protocol hears of it from the connection.
struct LinkGone;

/// Why a shipment ended early.
enum ShipError {
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

impl Shipper {
    fn run(mut self, inbox: &Inbox<Command>) -> Box<dyn Vm> {
        while let Some(order) = inbox.next() {
            let event = match order {
                Command::Pause => self.vm.pause().map(|()| Some(Event::Paused)).map_err(ShipError::from),
                Command::Resume => self.vm.resume().map(|()| None).map_err(ShipError::from),
                Command::Reseed => {
                    let mut seed = [0; 32];
                    link::entropy::fill(&mut seed);
                    self.vm.reseed(seed);
                    Ok(None)
                }
                Command::Seed(seed) => {
                    self.vm.set_entropy_seed(seed);
                    Ok(None)
                }
                Command::KeepDirty => {
                    if let Some(pages) = self.unacknowledged.take() {
                        self.vm.put_back_dirty(&pages);
                    }
                    Ok(None)
                }
                Command::Ship { blocks, totals, bulk } => self
                    .ship(&blocks, totals, &bulk)
                    .map(|shipment| Some(Event::CheckpointSent(shipment))),
                Command::Sync { totals, bulk } => self
                    .sync(totals, &bulk)
                    .map(|shipment| Some(Event::MemorySynced(shipment))),
            };
            match event {
                Ok(Some(event)) => self.report(event),
                Ok(None) | Err(ShipError::Link) => {}
                Err(ShipError::Vm(reason)) => self.report(Event::VmFailed(reason)),
            }
        }
        drop(self.vm.pause());
        self.vm
    }

    fn report(&self, event: Event) {
        // A closed channel means that the role has ended; the next receive ends this thread.
        let _ = self.events.blocking_send(event);
    }

    /// Ships all of memory while the VM runs: what it dirties meanwhile is left to the first checkpoint.
    fn sync(&mut self, totals: Totals, bulk: &BulkSender) -> Result<Shipment, ShipError> {
        self.unacknowledged = None;
        self.vm.take_dirty()?;
        let pages = self.ram.populated()?;
        let mut out = Outbox::new(totals, bulk);
        out.pages(&self.ram, &pages, true)?;
        Ok(out.shipment([0; 32]))
    }

    fn ship(&mut self, blocks: &[u64], totals: Totals, bulk: &BulkSender) -> Result<Shipment, ShipError> {
        let mut out = Outbox::new(totals, bulk);
        let dirty = self.vm.take_dirty()?;
        let sent = out.pages(&self.ram, &dirty, false);
        self.unacknowledged = Some(dirty);
        sent?;
        for &block in blocks {
            let (offset, data) = read_block(&*self.image, block).map_err(|error| ShipError::Vm(error.to_string()))?;
            out.write(offset, data)?;
        }
        let sections = self.vm.save()?.0.into_iter();
        out.devices(
            sections
                .map(|section| Section {
                    name: section.name,
                    version: section.version,
                    bytes: section.bytes,
                })
                .collect(),
        )?;
        let mut entropy = [0; 32];
        link::entropy::fill(&mut entropy);
        Ok(out.shipment(entropy))
    }
}

/// Where the parts of one checkpoint are counted and queued.
struct Outbox<'a> {
    totals: Totals,
    pages: u64,
    bytes: u64,
    bulk: &'a BulkSender,
}

impl<'a> Outbox<'a> {
    fn new(totals: Totals, bulk: &'a BulkSender) -> Self {
        Self {
            totals,
            pages: 0,
            bytes: 0,
            bulk,
        }
    }

    /// A fresh image is zero: `skip_zero` leaves such pages out.
    fn pages(&mut self, ram: &GuestRam, pages: &PageSet, skip_zero: bool) -> Result<(), ShipError> {
        let mut content = [0; PAGE_BYTES];
        let mut encoder = BatchEncoder::new(BATCH_BYTES, None);
        let mut chooser = Chooser::default();
        for page in pages.iter() {
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
        send(self.bulk, Message::Pages(batch))
    }

    fn write(&mut self, offset: u64, data: Bytes) -> Result<(), LinkGone> {
        let write = DiskWrite {
            tag: self.totals.tag(),
            offset,
            data,
        };
        self.totals.write(&write).expect("the write has the tag of the sums");
        send(self.bulk, Message::Write(write))
    }

    fn devices(&mut self, sections: Vec<Section>) -> Result<(), LinkGone> {
        let state = DeviceState {
            tag: self.totals.tag(),
            sections,
        };
        self.totals
            .device_state(&state)
            .expect("the devices' state is counted once");
        send(self.bulk, Message::DeviceState(state))
    }

    fn shipment(self, entropy: [u8; 32]) -> Shipment {
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

fn send(bulk: &BulkSender, message: Message) -> Result<(), LinkGone> {
    bulk.blocking_send(message).map_err(|_closed| LinkGone)
}

/// What the disk's thread is told.
pub(crate) enum DiskCommand {
    Compare {
        hashes: BlockHashes,
        key: HashKey,
        bulk: BulkSender,
    },
    Store(checkpoint::pair::RecordUpdate),
}

/// Starts the thread that compares the disk and keeps the record.
pub(crate) fn spawn_disk(
    image: Arc<FileImage>,
    record: RecordPlace,
    events: events::Sender<Event>,
) -> std::io::Result<Worker<DiskCommand>> {
    Worker::spawn("disk", move |inbox| {
        while let Some(order) = inbox.next() {
            let event = match order {
                DiskCommand::Compare { hashes, key, bulk } => compare(&image, &hashes, &key, &bulk),
                DiskCommand::Store(update) => Some(store(&record, update)),
            };
            if let Some(event) = event {
                // A closed channel means that the role has ended; what is queued is still to be done.
                let _ = events.blocking_send(event);
            }
        }
    })
}

fn store(record: &RecordPlace, update: checkpoint::pair::RecordUpdate) -> Event {
    match record.store(update) {
        Ok(()) => Event::RecordStored(update),
        Err(error) => Event::VmFailed(describe(&error)),
    }
}

fn compare(image: &FileImage, hashes: &BlockHashes, key: &HashKey, bulk: &BulkSender) -> Option<Event> {
    let theirs: Vec<BlockHash> = hashes.hashes.iter().copied().map(BlockHash).collect();
    let different = match storage::verify::differing(image, key, hashes.first, &theirs) {
        Ok(different) => different,
        Err(error) => return Some(Event::VmFailed(format!("the disk image can't be read: {error}"))),
    };
    for block in different {
        match read_block(image, block) {
            Ok((offset, data)) => {
                send(
                    bulk,
                    Message::SyncBlock(DiskWrite {
                        tag: hashes.tag,
                        offset,
                        data,
                    }),
                )
                .ok()?;
            }
            Err(error) => return Some(Event::VmFailed(format!("the disk image can't be read: {error}"))),
        }
    }
    let compared = hashes.first + hashes.hashes.len() as u64;
    (compared >= block_count(image.size())).then_some(Event::DiskSynced(hashes.tag.generation))
}
