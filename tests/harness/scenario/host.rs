//! One host of a scenario: a role's protocol, a guest of a few words of memory, a real replica over a simulated disk.
//!
//! What the shipped shells give to other threads waits here in queues, until the script has it carried out.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use checkpoint::limits::PAGE_BYTES;
use checkpoint::pages::identical::{PageHasher, PageHashes, PageMatches};
use checkpoint::pages::{Page, stream_of};
use checkpoint::pair::{Delivery, RecordUpdate};
use checkpoint::staging::Totals;
use checkpoint::wire::{
    BlockHashes, DeviceState, DiskWrite, Held, Message, PageBatch, PageSum, PageSums, Section, Written,
};
use checkpoint::{Duration, Epoch, Generation, Instant, Nic, Tag};
use primary::event::{AheadShipment, Look, Shipment};
use primary::protocol::Primary;
use secondary::protocol::Secondary;
use storage::sim::{SimDisk, SimImage};
use storage::verify::{BlockHash, HashKey};
use storage::witness::DirectoryWitness;
use storage::{CommitJob, Image, Recovery, Replica};

use super::processor::Processor;
use crate::node::durable_checkpoint;

/// Bytes of a scenario's disk: two blocks of the comparison.
pub(super) const DISK_BYTES: u64 = 2 * 65_536;
/// Bytes of a write of the guest.
pub(super) const SECTOR: usize = 512;
/// Seed of every epoch.
pub(super) const ENTROPY: [u8; 32] = [1; 32];
const KEY: HashKey = HashKey([7; 32]);

/// A page that the secondary has alike, in a batch.
const OWN: &str = "(own)";

/// Guest memory: what each page that was ever written holds.
pub(super) type Memory = BTreeMap<u64, String>;

/// What a host does.
pub(super) enum Role {
    /// Nothing; why.
    Off(String),
    /// It waits for a primary.
    Waiting,
    Primary(Box<Primary>),
    Secondary(Box<Secondary>),
}

/// The threads of a shell beside its loop. Each carries out its orders one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Thread {
    Vm,
    Disk,
    Witness,
    Tap,
    Courier,
}

/// What a thread is to do.
pub(super) enum Order {
    Ahead(Tag),
    Alike(PageMatches),
    Apply(PageBatch),
    Ask(Tag),
    Check(Tag),
    Claim(Generation),
    Commit,
    Compare(BlockHashes),
    ComparePages(PageHashes),
    Copy(Totals, Vec<u64>, bool),
    Count(Tag),
    DropStage,
    KeepDirty,
    Load(Tag),
    Pause,
    Resume,
    SendBlocks(Tag, Vec<u64>),
    SendHashes(Tag),
    Ship,
    ShipAhead(Tag, u64),
    StageDevices(DeviceState),
    StagePages(PageBatch),
    Store(RecordUpdate),
    Sync(Totals, bool),
    Transmit(Nic, Vec<Bytes>, Option<Instant>),
}

impl Order {
    /// Returns its name, if something follows from it that the script must see; others are carried out when their turn
    /// comes.
    pub(super) fn name(&self) -> Option<&'static str> {
        Some(match self {
            Self::Ahead(_) => "Ahead",
            Self::Alike(_) => "Alike",
            Self::Ask(_) => "AskAlike",
            Self::Check(_) => "Check",
            Self::Claim(_) => "Claim",
            Self::Commit => "CommitDisk",
            Self::Compare(_) => "CompareBlocks",
            Self::ComparePages(_) => "Compare",
            Self::Load(_) => "Load",
            Self::Pause => "PauseVm",
            Self::Copy(..) => "SendCheckpoint",
            Self::Count(_) => "CountOwn",
            Self::Ship => "Ship",
            Self::ShipAhead(..) => "ShipAhead",
            Self::Store(_) => "StoreRecord",
            Self::SendBlocks(..) => "SendBlocks",
            Self::Sync(..) => "SyncMemory",
            Self::Transmit(..) => "Transmit",
            Self::Apply(_)
            | Self::DropStage
            | Self::KeepDirty
            | Self::Resume
            | Self::SendHashes(_)
            | Self::StageDevices(_)
            | Self::StagePages(_) => return None,
        })
    }

    /// The check waits for earlier commits, as the shell's does.
    fn thread(&self) -> Thread {
        match self {
            Self::Check(_)
            | Self::Commit
            | Self::Compare(_)
            | Self::SendBlocks(..)
            | Self::SendHashes(_)
            | Self::Store(_) => Thread::Disk,
            Self::Claim(_) => Thread::Witness,
            Self::Transmit(..) => Thread::Tap,
            Self::Ahead(_) | Self::Ship | Self::Alike(_) | Self::Ask(_) => Thread::Courier,
            _ => Thread::Vm,
        }
    }
}

/// What the guest sees of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Snapshot {
    memory: Memory,
    cpu: u64,
    disk: Vec<u8>,
}

/// What a checkpoint ships.
struct Parcel {
    totals: Totals,
    pages: Memory,
    /// Pages that the secondary is asked about.
    asked: Vec<u64>,
    /// Those that it has alike.
    alike: BTreeSet<u64>,
    /// What follows the pages.
    rest: Vec<Message>,
}

/// A host.
pub(super) struct Host {
    pub(super) name: &'static str,
    pub(super) role: Role,
    pub(super) memory: Memory,
    /// The guest's registers: how many things it has done.
    pub(super) cpu: u64,
    pub(super) processor: Processor,
    pub(super) running: bool,
    pub(super) frozen: bool,
    /// Released frames wait for the script.
    pub(super) slow_tap: bool,
    pub(super) dials: bool,
    pub(super) holds_input: bool,
    /// Its network card takes no frames from the guest.
    pub(super) holds_output: bool,
    pub(super) inbox: VecDeque<Delivery>,
    pub(super) record: Option<RecordUpdate>,
    pub(super) witness: Option<DirectoryWitness>,
    pub(super) reaches_witness: bool,
    pub(super) threads: [VecDeque<Order>; 5],
    pub(super) image: Arc<SimImage>,
    pub(super) replica: Option<Replica<SimImage>>,
    disk: Arc<SimDisk>,
    journal: Arc<SimImage>,
    clock_start: Duration,
    dirty: BTreeSet<u64>,
    /// Clean, and not read yet.
    unread: BTreeSet<u64>,
    /// The sums of what was shipped ahead.
    ahead: Option<PageSums>,
    /// The epoch that `unacknowledged` belongs to.
    open: Option<Tag>,
    unacknowledged: BTreeSet<u64>,
    /// The checkpoint of an earlier pairing whose memory it still has.
    kept: Option<Tag>,
    recovery: Recovery,
    committed: Memory,
    stage: Memory,
    /// What was copied at the stop, and is to be shipped.
    parcel: Option<Parcel>,
    devices: Option<DeviceState>,
    job: Option<CommitJob<SimImage>>,
}

impl Host {
    /// Makes a host that is off, with an empty disk.
    pub(super) fn new(name: &'static str, clock_start: Duration) -> Self {
        let disk = SimDisk::new(0);
        let limits = storage::replica::Limits::default();
        let journal = disk.image(storage::journal::size_for(limits.batch(DISK_BYTES)));
        Self {
            name,
            role: Role::Off("off".to_owned()),
            memory: Memory::new(),
            cpu: 0,
            processor: Processor::default(),
            running: false,
            frozen: false,
            slow_tap: false,
            dials: false,
            holds_input: false,
            holds_output: false,
            inbox: VecDeque::new(),
            record: None,
            witness: None,
            reaches_witness: true,
            threads: Default::default(),
            image: disk.image(DISK_BYTES),
            replica: None,
            disk,
            journal,
            clock_start,
            dirty: BTreeSet::new(),
            unread: BTreeSet::new(),
            ahead: None,
            open: None,
            unacknowledged: BTreeSet::new(),
            kept: None,
            recovery: Recovery::Fresh,
            committed: Memory::new(),
            stage: Memory::new(),
            parcel: None,
            devices: None,
            job: None,
        }
    }

    /// Returns what its clock shows at that moment of the scenario.
    pub(super) fn clock(&self, moment: Duration) -> Instant {
        Instant(0) + self.clock_start + moment
    }

    /// Returns the moment of the scenario at which its clock shows that.
    pub(super) fn moment(&self, clock: Instant) -> Duration {
        clock.since(Instant(0) + self.clock_start)
    }

    /// Ends its process. What it had not made durable is lost if its power is, too.
    pub(super) fn die(&mut self, why: &str, power: bool) {
        self.role = Role::Off(why.to_owned());
        self.running = false;
        self.frozen = false;
        self.holds_input = false;
        self.holds_output = false;
        self.dials = false;
        self.threads = Default::default();
        self.replica = None;
        self.job = None;
        if power {
            self.disk.power_cycle();
        }
    }

    /// Starts its process: memory is empty, the disk is what is on the medium.
    pub(super) fn start(&mut self) {
        self.memory.clear();
        self.cpu = 0;
        self.committed.clear();
        self.kept = None;
        self.rest();
    }

    /// Its role ends, not its process: it still has the memory of this checkpoint, and waits for a primary.
    pub(super) fn stand_down(&mut self, memory: Tag) {
        self.kept = Some(memory);
        self.rest();
        self.wait();
    }

    fn rest(&mut self) {
        self.die("starting", false);
        self.inbox.clear();
        self.dirty.clear();
        self.unread.clear();
        self.ahead = None;
        self.open = None;
        self.unacknowledged.clear();
        self.stage.clear();
        self.devices = None;
        self.recovery = storage::recover(&*self.image, &*self.journal).expect("the journal is whole or empty");
    }

    /// Returns what it tells a primary that it still has.
    pub(super) fn held(&self) -> Held {
        Held {
            memory: self.kept,
            disk: durable_checkpoint(self.record, &self.recovery),
        }
    }

    /// Waits for a primary.
    pub(super) fn wait(&mut self) {
        self.role = Role::Waiting;
        let limits = storage::replica::Limits::default();
        let (image, journal) = (Arc::clone(&self.image), Arc::clone(&self.journal));
        self.replica = Some(Replica::new(image, journal, limits, Tag::default()));
    }

    pub(super) fn order(&mut self, order: Order) {
        self.threads[order.thread() as usize].push_back(order);
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        Snapshot {
            memory: self.memory.clone(),
            cpu: self.cpu,
            disk: self.disk(),
        }
    }

    /// Returns the disk as the guest sees it.
    pub(super) fn disk(&self) -> Vec<u8> {
        let mut disk = vec![0; usize::try_from(DISK_BYTES).expect("small")];
        match &self.replica {
            Some(replica) => replica.read(0, &mut disk).expect("in range"),
            None => self.image.read_at(0, &mut disk).expect("in range"),
        }
        disk
    }

    /// The guest writes a page.
    pub(super) fn write_page(&mut self, page: u64, content: &str) {
        self.cpu += 1;
        self.memory.insert(page, content.to_owned());
        self.dirty.insert(page);
    }

    /// The guest writes to its disk.
    pub(super) fn write_disk(&mut self, offset: u64, written: &Written) {
        self.cpu += 1;
        match (&mut self.replica, written) {
            (Some(replica), Written::Data(data)) => replica.write(offset, data).expect("the overlay has room"),
            (Some(replica), Written::Zeros(len)) => replica.zero(offset, *len).expect("the overlay has room"),
            (None, _) => storage::put(&*self.image, offset, written).expect("in range"),
        }
    }

    // A primary's threads.

    /// Copies what a checkpoint ships; returns the number of pages.
    pub(super) fn copy(&mut self, blocks: &[u64], mut totals: Totals) -> u64 {
        let tag = totals.tag();
        let mut dirty = core::mem::take(&mut self.dirty);
        dirty.append(&mut self.unread);
        let mut rest = Vec::new();
        if let Some(ahead) = self.ahead.take() {
            totals.add_pages(&ahead);
        }
        let pages = self.content(&dirty);
        let count = pages.len() as u64;
        self.unacknowledged_in(tag).extend(dirty);
        for &block in blocks {
            let write = self.block(tag, block);
            totals.write(&write).expect("of this epoch");
            rest.push(Message::Write(write));
        }
        let devices = DeviceState {
            tag,
            sections: vec![Section {
                name: "cpu".to_owned(),
                version: 1,
                bytes: self.cpu.to_le_bytes().to_vec(),
            }],
        };
        totals.device_state(&devices).expect("once");
        rest.push(Message::DeviceState(devices));
        self.parcel = Some(Parcel {
            totals,
            pages,
            asked: Vec::new(),
            alike: BTreeSet::new(),
            rest,
        });
        count
    }

    /// Hashes the copied pages, if there are any.
    pub(super) fn hash(&mut self, tag: Tag) -> Option<PageHashes> {
        let parcel = self.parcel.as_mut().expect("copied");
        let seed = [5; 32];
        let hasher = PageHasher::new(&seed);
        let hash = |(page, content): (&u64, &String)| (*page, hasher.hash(&page_of(content)));
        let pages: Vec<_> = parcel.pages.iter().map(hash).collect();
        parcel.asked = parcel.pages.keys().copied().collect();
        (!pages.is_empty()).then_some(PageHashes { tag, seed, pages })
    }

    /// Takes note of what the secondary has alike.
    pub(super) fn alike(&mut self, matches: &PageMatches) {
        let parcel = self.parcel.as_mut().expect("copied");
        let asked = parcel.asked.iter().zip(&matches.alike);
        parcel.alike = asked.filter_map(|(page, alike)| alike.then_some(*page)).collect();
    }

    /// Makes the messages of what was copied, and continues its sums.
    pub(super) fn parcel(&mut self) -> (Vec<Message>, Shipment) {
        let Parcel {
            mut totals,
            pages,
            alike,
            rest,
            ..
        } = self.parcel.take().expect("copied");
        let mut messages = Vec::new();
        let mut sums = PageSums::new(totals.streams());
        encode(totals.tag(), &pages, &alike, &mut sums, &mut messages);
        totals.add_pages(&sums);
        messages.extend(rest);
        (messages, shipment(totals, sums.pages()))
    }

    /// Returns how many pages are dirty.
    pub(super) fn written(&self) -> u64 {
        self.dirty.len() as u64
    }

    /// Looks at the dirty pages; the script's guest writes so seldom that all of them have gone quiet.
    pub(super) fn look(&mut self, tag: Tag, most: u64) -> Look {
        if most == 0 {
            return Look {
                tag,
                dirty: self.dirty.len() as u64,
                ahead: 0,
                took: Duration(0),
            };
        }
        let cold = core::mem::take(&mut self.dirty);
        self.unacknowledged_in(tag).extend(&cold);
        self.unread = cold;
        Look {
            tag,
            dirty: 0,
            ahead: self.unread.len() as u64,
            took: Duration(0),
        }
    }

    /// Ships what was not read yet, ahead of the stop.
    pub(super) fn ship_ahead(&mut self, tag: Tag, streams: usize) -> (Vec<Message>, AheadShipment) {
        let unread = core::mem::take(&mut self.unread);
        let sums = self.ahead.get_or_insert_with(|| PageSums::new(streams));
        let before = sums.pages();
        let mut messages = Vec::new();
        let pages = unread.iter().map(|page| (*page, self.memory[page].clone())).collect();
        encode(tag, &pages, &BTreeSet::new(), sums, &mut messages);
        let pages = sums.pages() - before;
        let shipment = AheadShipment {
            tag,
            pages,
            bytes: 0,
            took: Duration(0),
        };
        (messages, shipment)
    }

    fn unacknowledged_in(&mut self, tag: Tag) -> &mut BTreeSet<u64> {
        if self.open.replace(tag) != Some(tag) {
            self.unacknowledged.clear();
        }
        &mut self.unacknowledged
    }

    /// Makes the messages of the memory part of the initial sync.
    pub(super) fn sync_memory(&mut self, mut totals: Totals, difference: bool) -> (Vec<Message>, Shipment) {
        let dirty = core::mem::take(&mut self.dirty);
        let all = self.memory.keys().copied().collect();
        let mut messages = Vec::new();
        let pages = self.content(if difference { &dirty } else { &all });
        let mut sums = PageSums::new(totals.streams());
        encode(totals.tag(), &pages, &BTreeSet::new(), &mut sums, &mut messages);
        totals.add_pages(&sums);
        let unacknowledged = self.unacknowledged_in(totals.tag());
        if difference {
            unacknowledged.extend(dirty);
        }
        (messages, shipment(totals, sums.pages()))
    }

    /// The dirty pages of the abandoned checkpoint belong to the next one.
    pub(super) fn keep_dirty(&mut self) {
        self.dirty.append(&mut self.unacknowledged);
        self.unread.clear();
        self.ahead = None;
        self.open = None;
        self.parcel = None;
    }

    /// Returns the blocks that differ.
    pub(super) fn differing(&self, hashes: &BlockHashes) -> Vec<DiskWrite> {
        let theirs: Vec<BlockHash> = hashes.hashes.iter().copied().map(BlockHash).collect();
        storage::verify::differing(&*self.image, &KEY, hashes.first, &theirs)
            .expect("in range")
            .into_iter()
            .map(|block| self.block(hashes.tag, block))
            .collect()
    }

    pub(super) fn block(&self, tag: Tag, block: u64) -> DiskWrite {
        let (offset, written) = storage::verify::read_block(&*self.image, block).expect("in range");
        DiskWrite { tag, offset, written }
    }

    fn content(&self, pages: &BTreeSet<u64>) -> Memory {
        pages.iter().map(|page| (*page, self.memory[page].clone())).collect()
    }

    // A secondary's threads.

    /// Makes memory and disk ready for a sync; forgets the memory unless the primary builds on it.
    pub(super) fn begin_sync(&mut self, keep: bool) {
        if !keep {
            self.committed.clear();
        }
        self.kept = None;
        self.memory = self.committed.clone();
        let replica = self.replica.as_mut().expect("a secondary");
        replica.begin_sync().expect("the disk is whole");
    }

    /// Forgets what is staged.
    pub(super) fn drop_stage(&mut self) {
        self.stage.clear();
        self.devices = None;
        if let Some(replica) = &mut self.replica {
            replica.abandon();
        }
    }

    /// A page that is alike is copied at once: the guest stands.
    pub(super) fn stage_pages(&mut self, batch: &PageBatch) {
        for (page, content) in decoded(batch) {
            let content = match content.as_str() {
                OWN => self.own(page),
                _ => content,
            };
            self.stage.insert(page, content);
        }
    }

    /// Compares pages with the guest's.
    pub(super) fn compare(&self, hashes: &PageHashes) -> PageMatches {
        let read = |page, own: &mut Page| {
            *own = page_of(&self.own(page));
            Ok::<_, core::convert::Infallible>(())
        };
        let Ok(matches) = hashes.answer(read);
        matches
    }

    fn own(&self, page: u64) -> String {
        assert!(!self.running, "pages are compared with those of a guest that stands");
        self.memory.get(&page).cloned().unwrap_or_default()
    }

    pub(super) fn stage_devices(&mut self, state: DeviceState) {
        self.devices = Some(state);
    }

    /// Writes pages into the committed image.
    pub(super) fn apply(&mut self, batch: &PageBatch) {
        self.committed.extend(decoded(batch));
    }

    /// Returns the hashes of the disk.
    pub(super) fn hashes(&self) -> Vec<[u8; 16]> {
        let hashes = storage::verify::hashes(&*self.image, &KEY, 0, usize::MAX).expect("in range");
        hashes.into_iter().map(|hash| hash.0).collect()
    }

    /// Tries what could fail at the load.
    pub(super) fn prepare(&mut self, tag: Tag, first: bool) -> Result<(), String> {
        let replica = self.replica.as_mut().expect("a secondary");
        if first {
            self.image.flush().map_err(|error| error.to_string())?;
            replica.end_sync(Tag {
                generation: tag.generation,
                epoch: Epoch(tag.epoch.0 - 1),
            });
        }
        replica.reserve(tag.epoch).map_err(|error| error.to_string())
    }

    /// Makes the staged checkpoint the guest's state; what it did by itself is forgotten.
    pub(super) fn load(&mut self) {
        self.running = false;
        self.committed.append(&mut self.stage);
        self.memory = self.committed.clone();
        self.dirty.clear();
        let devices = self.devices.take().expect("checked");
        let registers = devices.sections[0].bytes.as_slice().try_into();
        self.cpu = u64::from_le_bytes(registers.expect("the scenario's own section"));
    }

    /// Makes the writes up to this epoch the disk; durable after the order that follows.
    pub(super) fn commit_disk(&mut self, epoch: Epoch) {
        let job = self.replica.as_mut().expect("a secondary").commit(epoch);
        self.job = self.job.take().or(job);
        self.order(Order::Commit);
    }

    /// Runs the I/O of commits; returns the last epoch that is durable now, if there was something to do.
    pub(super) fn run_jobs(&mut self) -> Option<Epoch> {
        let mut last = None;
        while let Some(job) = self.job.take() {
            let done = job.run().expect("the simulated disk is whole");
            last = Some(done.last().tag.epoch);
            self.job = self.replica.as_mut()?.committed(&done);
        }
        last
    }

    /// Makes the guest's own writes the disk: it has taken over.
    pub(super) fn fold(&mut self) {
        self.run_jobs();
        self.dirty = self.memory.keys().copied().collect();
        let mut replica = self.replica.take().expect("a secondary");
        let mut next = replica.take_over();
        while let Some(job) = next {
            let done = job.run().expect("the simulated disk is whole");
            next = replica.committed(&done);
        }
        replica.into_image().expect("the simulated disk is whole");
    }
}

/// Makes a batch of pages for each stream that has some; those that are alike need no content.
fn encode(tag: Tag, pages: &Memory, alike: &BTreeSet<u64>, sums: &mut PageSums, messages: &mut Vec<Message>) {
    let streams = sums.as_slice().len();
    for stream in 0..streams {
        let of_stream = pages.iter().filter(|(page, _)| stream_of(**page, streams) == stream);
        let content = |(page, content): (&u64, &String)| {
            let content = if alike.contains(page) { OWN } else { content };
            format!("{page}={content}")
        };
        let encoded: Vec<String> = of_stream.map(content).collect();
        if !encoded.is_empty() {
            let count = u32::try_from(encoded.len()).expect("few");
            let batch = PageBatch::new(tag, count, encoded.join(" ").into());
            sums.add(stream, PageSum::of(&batch));
            messages.push(Message::Pages(batch));
        }
    }
}

/// Returns the stream that a batch takes, of so many.
pub(super) fn stream_of_batch(batch: &PageBatch, streams: usize) -> usize {
    let first = decoded(batch).into_keys().next();
    stream_of(first.expect("the scenario's own encoding"), streams)
}

fn decoded(batch: &PageBatch) -> Memory {
    let text = core::str::from_utf8(&batch.encoded).expect("the scenario's own encoding");
    let page = |page: &str| {
        let (page, content) = page.split_once('=').expect("the scenario's own encoding");
        (page.parse().expect("a number"), content.to_owned())
    };
    text.split(' ').map(page).collect()
}

fn page_of(content: &str) -> Page {
    let mut page = [0; PAGE_BYTES];
    page[..content.len()].copy_from_slice(content.as_bytes());
    page
}

fn shipment(totals: Totals, pages: u64) -> Shipment {
    Shipment {
        totals,
        pages,
        bytes: 0,
        entropy: ENTROPY,
    }
}
