//! The secondary's disk: the guest's view of the replica, and the thread that makes commits durable.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use checkpoint::pair::RecordUpdate;
use checkpoint::wire::{BlockHashes, DiskWrite, Message};
use checkpoint::{Epoch, Tag};
use link::mailbox;
use link::peer::BulkSender;
use link::record::RecordPlace;
use link::worker::{Orders, Worker};
use machine::devices::block;
use storage::replica::{DiskError, ReserveError};
use storage::verify::{HashKey, block_count};
use storage::{CommitJob, FileImage, Image, Replica};

use crate::event::Event;
use crate::vm;

/// The replica, shared by the guest's block device, the loop and the disk's thread.
#[derive(Clone)]
pub(crate) struct Disk {
    pub(crate) image: Arc<FileImage>,
    replica: Arc<Mutex<Replica<FileImage>>>,
    asked: Arc<AtomicBool>,
}

impl Disk {
    pub(crate) fn new(image: Arc<FileImage>, replica: Replica<FileImage>) -> Self {
        Self {
            image,
            replica: Arc::new(Mutex::new(replica)),
            asked: Arc::default(),
        }
    }

    pub(crate) fn replica(&self) -> MutexGuard<'_, Replica<FileImage>> {
        self.replica.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes writes up to `epoch` the disk; the VM is stopped. The job is to be run on the disk's thread.
    pub(crate) fn commit(&self, epoch: Epoch) -> Option<CommitJob<FileImage>> {
        self.asked.store(false, Ordering::Relaxed);
        self.replica().commit(epoch)
    }
}

/// The block device's back end while this side follows.
pub(crate) struct Follower {
    disk: Disk,
    events: mailbox::Sender<Event>,
}

impl Follower {
    pub(crate) fn new(disk: Disk, events: mailbox::Sender<Event>) -> Self {
        Self { disk, events }
    }

    fn change(&self, change: impl FnOnce(&mut Replica<FileImage>) -> Result<(), DiskError>) -> io::Result<()> {
        let near = {
            let mut replica = self.disk.replica();
            change(&mut replica).map_err(io::Error::other)?;
            replica.near_limit()
        };
        if near && !self.disk.asked.swap(true, Ordering::Relaxed) {
            self.events.send(Event::NearLimit);
        }
        Ok(())
    }
}

impl block::Backend for Follower {
    fn size(&self) -> u64 {
        self.disk.image.size()
    }

    fn read(&mut self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.disk.replica().read(offset, bytes).map_err(io::Error::other)
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.change(|replica| replica.write(offset, bytes))
    }

    /// Room is given back at a takeover, or by the primary's discard.
    fn zero(&mut self, offset: u64, length: u64, _give_back: bool) -> io::Result<()> {
        self.change(|replica| replica.zero(offset, length))
    }

    /// The overlay lives as long as this process, which is all that survives the primary; it becomes durable at a takeover.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What the disk's thread is told.
pub(crate) enum Command {
    Apply(DiskWrite),
    /// Make the image ready to be written to, and send the hashes of its blocks if there is something to send them with.
    BeginSync {
        tag: Tag,
        hashes: Option<(HashKey, BulkSender)>,
    },
    /// The own writes become the disk; told when the image holds them.
    Fold(Option<CommitJob<FileImage>>, mpsc::Sender<Result<(), String>>),
    /// Room for the epoch's writes, or for a first checkpoint the synced image on stable storage.
    Prepare {
        tag: Tag,
        first: bool,
    },
    /// The I/O of a commit, and of those that came while it ran.
    Run(CommitJob<FileImage>),
    Store(RecordUpdate),
}

/// Starts the thread that does the disk's work; `vm` gets the result of each `Prepare`.
pub(crate) fn spawn(
    disk: Disk,
    place: RecordPlace,
    events: mailbox::Sender<Event>,
    vm: Orders<vm::Command>,
) -> io::Result<Worker<Command>> {
    Worker::spawn("disk", move |inbox| {
        while let Some(order) = inbox.next() {
            let event = match order {
                Command::Prepare { tag, first } => {
                    vm.send(vm::Command::Check(tag, prepare(&disk, tag, first)));
                    None
                }
                // Without a record that says so, the image must not become anything else.
                Command::Store(update) => match place.store(update) {
                    Ok(()) => Some(Event::RecordStored(update)),
                    Err(error) => {
                        events.send(Event::VmFailed(link::describe(&error)));
                        return;
                    }
                },
                order => obey(&disk, order),
            };
            if let Some(event) = event {
                events.send(event);
            }
        }
    })
}

fn obey(disk: &Disk, order: Command) -> Option<Event> {
    match order {
        Command::Apply(write) => storage::put(&*disk.image, write.offset, &write.written)
            .err()
            .map(|error| Event::StageFailed(error.to_string())),
        Command::Fold(job, done) => {
            let result = run_jobs(disk, job).and_then(|_| settled(disk));
            // The next role may have ended already; the image is whole all the same.
            let _ = done.send(result);
            None
        }
        Command::BeginSync { tag, hashes } => begin_sync(disk, tag, hashes),
        Command::Prepare { .. } | Command::Store(_) => unreachable!("handled by the caller"),
        Command::Run(job) => match run_jobs(disk, Some(job)) {
            Ok(last) => last.map(Event::DiskCommitted),
            Err(error) => Some(Event::VmFailed(error)),
        },
    }
}

fn prepare(disk: &Disk, tag: Tag, first: bool) -> Result<(), String> {
    if first {
        disk.image
            .flush()
            .map_err(|error| format!("the synced image can't be flushed: {error}"))?;
        disk.replica().end_sync(Tag {
            generation: tag.generation,
            epoch: Epoch(tag.epoch.0 - 1),
        });
    }
    match disk.replica().reserve(tag.epoch) {
        Ok(()) => Ok(()),
        Err(error @ ReserveError::Busy) => unreachable!("this thread has run every commit before it: {error}"),
        Err(error) => Err(error.to_string()),
    }
}

/// Runs a job and those that were committed meanwhile; returns the last epoch that is durable now.
fn run_jobs(disk: &Disk, job: Option<CommitJob<FileImage>>) -> Result<Option<Epoch>, String> {
    let mut last = None;
    let mut next = job;
    while let Some(job) = next {
        let done = job.run().map_err(|error| error.to_string())?;
        last = Some(done.last().tag.epoch);
        next = disk.replica().committed(&done);
    }
    Ok(last)
}

/// A commit that failed before has left the fold undone, and its own error nobody has heard.
fn settled(disk: &Disk) -> Result<(), String> {
    if disk.replica().is_settled() {
        Ok(())
    } else {
        Err("an earlier commit of the disk failed: the guest's last writes are not in the image".to_owned())
    }
}

fn begin_sync(disk: &Disk, tag: Tag, hashes: Option<(HashKey, BulkSender)>) -> Option<Event> {
    if let Err(error) = disk.replica().begin_sync() {
        return Some(Event::VmFailed(format!("the journal can't be flushed: {error}")));
    }
    let (key, bulk) = hashes?;
    send_hashes(disk, tag, &key, &bulk)
}

fn send_hashes(disk: &Disk, tag: Tag, key: &HashKey, bulk: &BulkSender) -> Option<Event> {
    let blocks = block_count(disk.image.size());
    let mut first = 0;
    while first < blocks {
        match storage::verify::hashes(&*disk.image, key, first, checkpoint::limits::HASHED_BLOCKS_PER_MESSAGE) {
            Ok(hashes) => {
                let count = hashes.len() as u64;
                let hashes = hashes.into_iter().map(|hash| hash.0).collect();
                // A closed connection is reported by its reader.
                bulk.blocking_send(Message::BlockHashes(BlockHashes { tag, first, hashes }))
                    .ok()?;
                first += count;
            }
            Err(error) => return Some(Event::VmFailed(format!("the disk image can't be read: {error}"))),
        }
    }
    None
}
