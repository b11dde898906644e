//! The thread that owns the VM: it stops, ships and resumes it, and reports each as an event.
//!
//! At a stop it copies what a checkpoint ships, so that the VM can run on while [`crate::ship`] encodes and queues the
//! copy. No decision is made here.

use std::sync::{Arc, mpsc};

use checkpoint::Tag;
use checkpoint::pages::identical::PageMatches;
use checkpoint::staging::Totals;
use checkpoint::wire::{BlockHashes, DiskWrite, Message, Section};
use link::PageSenders;
use link::mailbox;
use link::peer::BulkSender;
use link::record::RecordPlace;
use link::worker::{Inbox, Worker};
use link::{clock, describe};
use machine::{GuestRam, PageSet, Vm};
use storage::verify::{BlockHash, HashKey, block_count, read_block};
use storage::{FileImage, Image as _};

use crate::encoding::Encoding;
use crate::event::{Event, GuestEnd, Look, Shipment};
use crate::lanes;
use crate::scout::Scout;
use crate::ship::{Courier, Parcel, ShipError, send};
use crate::trace::{Stopwatch, Traces};

/// What the VM's thread is told.
pub(crate) enum Command {
    Alike(PageMatches),
    AskAlike(Tag),
    /// The protocol knows that the checkpoint is copied, and has said what follows.
    Dispatch,
    KeepDirty,
    Pause,
    Reseed,
    /// The guest has asked for a reset.
    Restart,
    Resume,
    Seed(Option<[u8; 32]>),
    Ship(Box<ShipOrder>),
    ShipAhead {
        tag: Tag,
        pages: u64,
        streams: PageSenders,
    },
    Sync {
        totals: Box<Totals>,
        difference: bool,
        streams: PageSenders,
    },
}

/// The checkpoint that is to be copied and shipped.
pub(crate) struct ShipOrder {
    pub(crate) tag: Tag,
    pub(crate) blocks: Vec<u64>,
    pub(crate) totals: Totals,
    pub(crate) both_ran: bool,
    pub(crate) bulk: BulkSender,
    pub(crate) streams: PageSenders,
}

/// The thread; it ends with the VM, stopped.
pub(crate) type VmThread = Worker<Command, Box<dyn Vm>>;

/// Starts the thread that owns the VM.
pub(crate) fn spawn(
    vm: Box<dyn Vm>,
    image: Arc<FileImage>,
    traces: Traces,
    events: mailbox::Sender<Event>,
    cache_bytes: usize,
) -> std::io::Result<VmThread> {
    let ram = vm.ram();
    let keeper = Keeper {
        courier: Courier::spawn(image, vm.ram(), traces.clone(), events.clone(), cache_bytes)?,
        scout: Scout::new(ram.pages()),
        events,
        open: None,
        unacknowledged: PageSet::new(ram.pages()),
        traces,
        watch: None,
        parcel: None,
        vm,
        ram,
    };
    Worker::spawn("vm", move |inbox| keeper.run(&inbox))
}

struct Keeper {
    vm: Box<dyn Vm>,
    ram: GuestRam,
    courier: Courier,
    scout: Scout,
    events: mailbox::Sender<Event>,
    /// The epoch that `unacknowledged` belongs to, unless it was abandoned.
    open: Option<Tag>,
    /// Pages of the checkpoint that is not acknowledged yet, shipped ahead or at the stop, with those of the sync before it.
    unacknowledged: PageSet,
    traces: Traces,
    /// Runs while the VM stands.
    watch: Option<Stopwatch>,
    /// What was copied, until the protocol has said whether the VM goes on.
    parcel: Option<Parcel>,
}

impl Keeper {
    fn run(mut self, inbox: &Inbox<Command>) -> Box<dyn Vm> {
        while let Some(order) = inbox.next() {
            // What lets the VM run on comes before the work that shares its processors.
            if !matches!(order, Command::Resume | Command::Seed(_)) {
                self.dispatch();
            }
            let event = match order {
                Command::Dispatch => Ok(None),
                Command::Pause => self.pause().map(|()| Some(Event::Paused)),
                Command::Resume => self.resume().map(|()| None),
                Command::Reseed => {
                    let mut seed = [0; 32];
                    link::entropy::fill(&mut seed);
                    self.vm.reseed(seed);
                    Ok(None)
                }
                Command::Restart => self.restart(),
                Command::Seed(seed) => {
                    self.vm.set_entropy_seed(seed);
                    Ok(None)
                }
                Command::Alike(matches) => {
                    self.courier.alike(matches);
                    Ok(None)
                }
                Command::AskAlike(tag) => {
                    self.courier.ask(tag);
                    Ok(None)
                }
                Command::KeepDirty => {
                    self.keep_dirty();
                    Ok(None)
                }
                Command::Ship(order) => self.ship(*order).map(|()| None),
                Command::ShipAhead { tag, pages, streams } => self.ship_ahead(tag, pages, streams).map(Some),
                Command::Sync {
                    totals,
                    difference,
                    streams,
                } => self
                    .sync(*totals, difference, &streams)
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

    fn pause(&mut self) -> Result<(), ShipError> {
        let mut watch = Stopwatch::start();
        self.vm.pause()?;
        watch.parts.halt_us = watch.lap();
        self.watch = Some(watch);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), ShipError> {
        let watch = self.watch.take();
        let ordered = watch.map(|mut watch| {
            watch.parts.handover_us = watch.lap();
            watch
        });
        self.vm.resume()?;
        if let Some(mut watch) = ordered {
            watch.parts.resume_us = watch.lap();
            self.traces.resumed(&watch);
        }
        Ok(())
    }

    fn restart(&mut self) -> Result<Option<Event>, ShipError> {
        let restarts = self.vm.restart()?;
        Ok((!restarts).then_some(Event::GuestStopped(GuestEnd::Reset)))
    }

    /// Gives the courier what was copied, if it does not have it yet.
    fn dispatch(&mut self) {
        if let Some(parcel) = self.parcel.take() {
            self.courier.send(parcel);
        }
    }

    fn report(&self, event: Event) {
        self.events.send(event);
    }

    /// Nothing became of what was taken or cleared since the last acknowledgement.
    fn keep_dirty(&mut self) {
        self.courier.abandon();
        self.vm.put_back_dirty(&self.unacknowledged);
        self.unacknowledged.clear();
        self.open = None;
    }

    /// Ships memory while the VM runs: what it dirties meanwhile is left to the first checkpoint.
    fn sync(&mut self, mut totals: Totals, difference: bool, streams: &PageSenders) -> Result<Shipment, ShipError> {
        let tag = totals.tag();
        let dirty = self.vm.take_dirty()?;
        self.scout.stopped();
        self.courier.forget(streams.streams());
        // Nothing is known of what the secondary has, and nothing is remembered: this is all or most of memory.
        let mut encoding = Encoding::new(0, streams.streams());
        encoding.begin(tag);
        let populated;
        let pages = if difference {
            &dirty
        } else {
            populated = self.ram.populated()?;
            &populated
        };
        let sent = lanes::ship_memory(&mut encoding, streams, &self.ram, || pages.iter(), !difference);
        // Those of a whole sync need no mark: a secondary that lacks it holds nothing that a difference could build on.
        let unacknowledged = self.unacknowledged_in(tag);
        if difference {
            unacknowledged.union(&dirty);
        }
        sent?;
        let sums = encoding.sums();
        totals.add_pages(&sums);
        Ok(Shipment {
            totals,
            pages: sums.pages(),
            bytes: sums.bytes(),
            entropy: [0; 32],
        })
    }

    /// Looks at the dirty pages, and lets the courier ship those that have gone quiet: their bits are cleared first,
    /// then they are read.
    fn ship_ahead(&mut self, tag: Tag, most: u64, streams: PageSenders) -> Result<Event, ShipError> {
        let began = clock::now();
        let dirty = self.vm.dirty_now()?;
        let cold = self.scout.look(&dirty, most);
        let ahead = cold.len();
        if most > 0 {
            self.unacknowledged_in(tag).union(&cold);
        }
        if ahead > 0 {
            self.vm.clear_dirty(&cold)?;
            self.courier.ship_ahead(tag, &cold, streams);
        }
        Ok(Event::Looked(Look {
            tag,
            dirty: dirty.len() - ahead,
            ahead,
            took: clock::now().since(began),
        }))
    }

    /// Returns the pages that were taken or cleared in this epoch, as part of its checkpoint: the one before is acknowledged,
    /// or was abandoned and its pages are dirty again.
    fn unacknowledged_in(&mut self, tag: Tag) -> &mut PageSet {
        if self.open != Some(tag) {
            self.open = Some(tag);
            self.unacknowledged.clear();
        }
        &mut self.unacknowledged
    }

    /// Copies what a checkpoint ships, and lets the courier ship it.
    fn ship(&mut self, order: ShipOrder) -> Result<(), ShipError> {
        let tag = order.tag;
        let mut watch = self.watch.take().unwrap_or_else(Stopwatch::start);
        watch.parts.order_us = watch.lap();
        let mut dirty = self.vm.take_dirty()?;
        self.scout.stopped();
        // Clean by their bits, and not shipped: the VM stands, so they are what they were.
        dirty.extend(self.courier.stop_ahead());
        self.unacknowledged_in(tag).union(&dirty);
        watch.parts.harvest_us = watch.lap();
        let mut copies = self.courier.room();
        watch.parts.room_us = watch.lap();
        let beyond = copies.take(&self.ram, &dirty)?;
        watch.parts.copy_us = watch.lap();
        let pages = dirty.len();
        let sections = self.vm.save()?.0.into_iter();
        watch.parts.save_us = watch.lap();
        self.traces.begin(tag, &watch, pages);
        self.watch = Some(watch);
        let mut entropy = [0; 32];
        link::entropy::fill(&mut entropy);
        let is_copied = beyond.is_empty();
        self.parcel = Some(Parcel {
            totals: order.totals,
            bulk: order.bulk,
            streams: order.streams,
            copies,
            beyond,
            pages,
            blocks: order.blocks,
            sections: sections
                .map(|section| Section {
                    name: section.name,
                    version: section.version,
                    bytes: section.bytes,
                })
                .collect(),
            entropy,
            both_ran: order.both_ran,
        });
        if is_copied {
            self.report(Event::Copied { tag, pages, entropy });
        } else {
            self.dispatch();
        }
        Ok(())
    }
}

/// What the disk's thread is told.
pub(crate) enum DiskCommand {
    Compare {
        hashes: BlockHashes,
        key: HashKey,
        bulk: BulkSender,
    },
    Send {
        tag: Tag,
        blocks: Vec<u64>,
        bulk: BulkSender,
    },
    Store(checkpoint::pair::RecordUpdate),
}

/// The end of a takeover's work on the image, and whom to tell that it went well.
pub(crate) type Folded = (mpsc::Receiver<Result<(), String>>, mpsc::Sender<()>);

/// Starts the thread that compares the disk and keeps the record.
///
/// After a takeover it waits for the image first: a block that is compared before the guest's last writes are in it
/// would differ on the two hosts, and nobody would know.
pub(crate) fn spawn_disk(
    image: Arc<FileImage>,
    record: RecordPlace,
    folded: Option<Folded>,
    events: mailbox::Sender<Event>,
) -> std::io::Result<Worker<DiskCommand>> {
    Worker::spawn("disk", move |inbox| {
        if let Some((image_ready, open)) = folded
            && let Err(reason) = wait_for(&image_ready, &open)
        {
            events.send(Event::VmFailed(reason));
            return;
        }
        while let Some(order) = inbox.next() {
            let event = match order {
                DiskCommand::Compare { hashes, key, bulk } => compare(&image, &hashes, &key, &bulk),
                DiskCommand::Send { tag, blocks, bulk } => {
                    send_blocks(&image, tag, blocks, &bulk, Some(Event::DiskSynced(tag.generation)))
                }
                DiskCommand::Store(update) => Some(store(&record, update)),
            };
            if let Some(event) = event {
                events.send(event);
            }
        }
    })
}

fn wait_for(image_ready: &mpsc::Receiver<Result<(), String>>, open: &mpsc::Sender<()>) -> Result<(), String> {
    image_ready.recv().map_err(|error| error.to_string()).flatten()?;
    // The guest's device may have gone.
    let _ = open.send(());
    Ok(())
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
    let compared = hashes.first + hashes.hashes.len() as u64;
    let synced = (compared >= block_count(image.size())).then_some(Event::DiskSynced(hashes.tag.generation));
    send_blocks(image, hashes.tag, different, bulk, synced)
}

/// Queues blocks of the own image; returns `sent`, or why it can't be.
fn send_blocks(image: &FileImage, tag: Tag, blocks: Vec<u64>, bulk: &BulkSender, sent: Option<Event>) -> Option<Event> {
    for block in blocks {
        match read_block(image, block) {
            // A closed connection is reported by its reader.
            Ok((offset, written)) => send(bulk, Message::SyncBlock(DiskWrite { tag, offset, written })).ok()?,
            Err(error) => return Some(Event::VmFailed(format!("the disk image can't be read: {error}"))),
        }
    }
    sent
}

#[cfg(test)]
mod tests {
    use super::*;
    use checkpoint::pair::RecordUpdate;
    use checkpoint::{Epoch, Generation, Role};
    use storage::Record;

    fn disk(dir: &std::path::Path, folded: Option<Folded>) -> (Worker<DiskCommand>, mailbox::Receiver<Event>) {
        let path = dir.join("disk.img");
        std::fs::write(&path, [0; 4096]).unwrap();
        let image = Arc::new(FileImage::open(&path).unwrap());
        let place = RecordPlace {
            path: Some(Record::path_for(&path)),
            pair: "shop".to_owned(),
            node: "left".to_owned(),
            witness: None,
        };
        let (sender, inbox) = mailbox::mailbox(8);
        (spawn_disk(image, place, folded, sender).unwrap(), inbox)
    }

    fn update() -> RecordUpdate {
        RecordUpdate {
            generation: Generation(2),
            role: Role::Primary,
            committed: Epoch(3),
            complete: true,
            clean: false,
        }
    }

    #[tokio::test]
    async fn nothing_is_done_with_the_image_before_a_takeover_is_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let (done, image_ready) = mpsc::channel();
        let (open, ready) = mpsc::channel();
        let (worker, mut inbox) = disk(dir.path(), Some((image_ready, open)));
        worker.send(DiskCommand::Store(update()));
        assert!(ready.try_recv().is_err() && inbox.try_recv().is_none());
        done.send(Ok(())).unwrap();
        ready.recv().unwrap();
        assert!(matches!(inbox.recv().await, Event::RecordStored(record) if record == update()));
    }

    #[tokio::test]
    async fn case_30_a_takeover_that_is_not_in_the_image_ends_the_role_and_no_request_is_answered() {
        let dir = tempfile::tempdir().unwrap();
        let (done, image_ready) = mpsc::channel();
        let (open, ready) = mpsc::channel();
        let (worker, mut inbox) = disk(dir.path(), Some((image_ready, open)));
        worker.send(DiskCommand::Store(update()));
        done.send(Err("the disk is broken".to_owned())).unwrap();
        assert!(matches!(inbox.recv().await, Event::VmFailed(reason) if reason == "the disk is broken"));
        ready.recv().unwrap_err();
        ready.recv().unwrap_err();
        worker.join();
        assert!(inbox.try_recv().is_none(), "the record is not written");
    }
}
