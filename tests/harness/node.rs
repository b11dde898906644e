//! One simulated host: a role's protocol, a toy guest, and a toy shell around them.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use checkpoint::limits::STREAMS_MAX;
use checkpoint::pages::Question;
use checkpoint::pages::identical::{PageHashes, PageMatches};
use checkpoint::pair::{Delivery, RecordUpdate};
use checkpoint::staging::Totals;
use checkpoint::wire::{DeviceState, DiskWrite, Held, Message, PageBatch, Section, Written};
use checkpoint::{Epoch, Generation, Instant, Role as PairRole, Tag};
use primary::event::{Look, Shipment};
use primary::protocol::Primary;
use secondary::protocol::Secondary;
use storage::sim::{SimDisk, SimImage};
use storage::{CommitJob, Image, Record, Recovery, Replica};

use crate::checkers::Snapshot;
use crate::random::Random;
use crate::shipping::{Errand, Parcel, Shipping, Stage, Streamed};
use crate::toy_vm::{DISK_BYTES, Registers, SECTOR_BYTES, ToyVm, index, sectors};

/// What a host does.
pub enum Role {
    /// Nothing: it is dead, fenced or has ended.
    Off,
    /// It listens for a primary.
    Waiting,
    /// It runs the VM.
    Primary(Box<Primary>),
    /// It follows.
    Secondary(Box<Secondary>),
}

/// A host.
pub struct Node {
    /// Raised at every start and death: what was under way for an earlier life is dropped.
    pub life: u64,
    /// What it does.
    pub role: Role,
    /// Its guest.
    pub vm: ToyVm,
    /// Whether the guest runs.
    pub running: bool,
    /// Whether a turn of the guest is under way.
    pub serving: bool,
    /// When the guest is called next, by its own clock.
    pub timer: Option<u64>,
    /// Frames in front of the guest.
    pub inbox: VecDeque<Delivery>,
    /// The link it has, by its number.
    pub link: Option<usize>,
    /// The host executes nothing until then.
    pub frozen_until: u64,
    /// A deadline that is due together with an event is seen first.
    pub deadline_first: bool,
    /// When the last order to the VM's thread is carried out, and the last pages of any stream are staged.
    pub ordered_until: u64,
    pub(crate) staged_until: [u64; STREAMS_MAX],
    /// It does not read the clients' frames.
    pub input_held: bool,
    /// Its network card takes no frames from the guest.
    pub(crate) output_held: bool,
    /// Frames of the guest that the card has not taken.
    pub(crate) ring: VecDeque<(Bytes, Option<(u32, u32)>)>,
    /// How the last role ended.
    pub outcome: Option<&'static str>,
    /// Where its own clock began.
    clock_start: u64,
    /// Its speed, in millionths.
    clock_speed: u64,
    /// How far it is from its power's end: told by its disk.
    pub doomed: bool,
    /// The last life that was asked to end in order.
    pub(crate) stopping: Option<u64>,
    /// The last life that said goodbye as secondary, or heard it.
    pub(crate) parted: Option<u64>,
    /// The operator lets it be until then.
    pub off_until: u64,
    /// Longest additional time of a disk operation, and until when.
    pub slow_disk: (u64, u64),
    /// When the last order to the disk's thread is carried out.
    pub disk_until: u64,
    /// The record beside the image.
    pub record: Option<RecordUpdate>,
    /// The disk under both images.
    pub disk: Arc<SimDisk>,
    /// Disk image.
    pub image: Arc<SimImage>,
    /// The secondary's layers over it.
    pub replica: Option<Replica<SimImage>>,
    journal: Arc<SimImage>,
    /// Its pages on their way to the other.
    pub(crate) shipping: Shipping,
    /// Its courier waits for room in the connection until then.
    pub(crate) courier_until: u64,
    committed: Vec<Arc<Vec<u8>>>,
    /// What it was after the last load.
    loaded: Option<Vec<Arc<Vec<u8>>>>,
    stage: Stage,
    /// The epoch that the committed pages are, once one was loaded in this pairing.
    base: Option<Epoch>,
    devices: Option<DeviceState>,
    /// The checkpoint of an earlier pairing whose memory it still has.
    kept: Option<Tag>,
    recovery: Recovery,
    /// Where the record is.
    records: Arc<SimImage>,
    failing: BTreeSet<DiskFault>,
    /// The life in which a flush of the image failed: what reads show may not be on the medium, and no flush brings it there.
    unsure: Option<u64>,
}

/// What is wrong with a host's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum DiskFault {
    Flushes,
    Full,
    Writes,
}

/// Returns the checkpoint that a disk is, by its record and its journal.
pub(crate) fn durable_checkpoint(record: Option<RecordUpdate>, recovery: &Recovery) -> Option<Tag> {
    let record = record?;
    let record = Record {
        pair: String::new(),
        node: String::new(),
        tag: Tag {
            generation: record.generation,
            epoch: record.committed,
        },
        role: record.role,
        clean: record.clean,
        complete: record.complete,
        witness: None,
    };
    record.checkpoint(recovery)
}

impl Node {
    /// Makes a host with an empty disk.
    #[must_use]
    pub fn new(seed: u64, random: &mut Random) -> Self {
        let disk = SimDisk::new(seed);
        let limits = storage::replica::Limits::default();
        let journal = disk.image(storage::journal::size_for(limits.batch(DISK_BYTES)));
        Self {
            life: 0,
            role: Role::Off,
            vm: ToyVm::default(),
            running: false,
            serving: false,
            timer: None,
            inbox: VecDeque::new(),
            link: None,
            frozen_until: 0,
            deadline_first: false,
            ordered_until: 0,
            staged_until: [0; STREAMS_MAX],
            input_held: false,
            output_held: false,
            ring: VecDeque::new(),
            outcome: None,
            doomed: false,
            stopping: None,
            parted: None,
            off_until: 0,
            slow_disk: (0, 0),
            disk_until: 0,
            clock_start: 1 + random.below(1 << 40),
            clock_speed: 950_000 + random.below(100_000),
            record: None,
            image: disk.image(DISK_BYTES),
            records: disk.image(512),
            disk,
            replica: None,
            journal,
            shipping: Shipping::default(),
            courier_until: 0,
            committed: ToyVm::default().memory.pages,
            loaded: None,
            stage: Stage::default(),
            base: None,
            devices: None,
            kept: None,
            recovery: Recovery::Fresh,
            failing: BTreeSet::new(),
            unsure: None,
        }
    }

    /// Returns what its clock shows.
    #[must_use]
    pub fn clock(&self, world: u64) -> Instant {
        Instant(
            self.clock_start + world / 1_000_000 * self.clock_speed + world % 1_000_000 * self.clock_speed / 1_000_000,
        )
    }

    /// Returns the first moment at which its clock shows that time or a later one.
    #[must_use]
    pub fn world_time(&self, clock: Instant) -> u64 {
        let span = u128::from(clock.0.saturating_sub(self.clock_start)) * 1_000_000;
        let world = span.div_ceil(u128::from(self.clock_speed));
        // The clock rounds down twice; one more nanosecond makes up for it.
        u64::try_from(world).map_or(u64::MAX, |world| world.saturating_add(2))
    }

    /// Starts a process: nothing in memory, the journal brought in, the record read.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn start(&mut self) -> Result<(), String> {
        self.vm = ToyVm::default();
        self.committed = self.vm.memory.pages.clone();
        self.kept = None;
        self.rest()
    }

    /// Lets it listen for a primary with the memory of this checkpoint.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn stand_down(&mut self, memory: Tag) -> Result<(), String> {
        self.kept = Some(memory);
        self.rest()?;
        self.wait();
        Ok(())
    }

    /// Returns what it tells a primary that it still has.
    #[must_use]
    pub fn held(&self) -> Held {
        Held {
            memory: self.kept,
            disk: durable_checkpoint(self.record, &self.recovery),
        }
    }

    /// The clock makes a leap.
    pub(crate) fn jump_ahead(&mut self, nanoseconds: u64) {
        self.clock_start += nanoseconds;
    }

    fn rest(&mut self) -> Result<(), String> {
        self.life += 1;
        self.outcome = None;
        self.input_held = false;
        self.output_held = false;
        self.ring.clear();
        self.role = Role::Off;
        self.running = false;
        self.serving = false;
        self.inbox.clear();
        self.link = None;
        self.shipping = Shipping::default();
        self.replica = None;
        self.stage.take();
        self.devices = None;
        self.replica = None;
        self.record = self.stored_record();
        self.recovery = storage::recover(&*self.image, &*self.journal).map_err(|error| error.to_string())?;
        let Some(update) = self.record else { return Ok(()) };
        let mut record = full(update);
        let before = record.tag;
        record.advance(&self.recovery);
        if record.tag != before {
            self.store(RecordUpdate {
                committed: record.tag.epoch,
                ..update
            })?;
        }
        Ok(())
    }

    /// Listens for a primary.
    pub fn wait(&mut self) {
        self.role = Role::Waiting;
        let limits = storage::replica::Limits::default();
        let at = self.record.map_or_else(Tag::default, |record| full(record).tag);
        self.replica = Some(Replica::new(
            Arc::clone(&self.image),
            Arc::clone(&self.journal),
            limits,
            at,
        ));
    }

    /// Tells whether it has been asked to end in order, and has not ended.
    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping == Some(self.life)
    }

    /// Kills it.
    pub fn die(&mut self) {
        self.life += 1;
        self.role = Role::Off;
        self.running = false;
        self.serving = false;
        self.link = None;
        self.replica = None;
    }

    /// The power fails, and comes back for the next start.
    pub(crate) fn lose_power(&mut self) {
        self.disk.power_cycle();
        self.doomed = false;
        self.unsure = None;
        for fault in self.failing.clone() {
            self.fail_disk(fault);
        }
    }

    pub(crate) fn fail_disk(&mut self, fault: DiskFault) {
        self.failing.insert(fault);
        self.set_faults();
    }

    pub(crate) fn heal_disk(&mut self, fault: DiskFault) {
        self.failing.remove(&fault);
        self.set_faults();
    }

    fn set_faults(&self) {
        self.disk.fail_flushes(self.failing.contains(&DiskFault::Flushes));
        self.disk.fail_writes(self.failing.contains(&DiskFault::Writes));
        let full = self.failing.contains(&DiskFault::Full);
        self.disk.set_free(if full { 0 } else { u64::MAX });
    }

    /// Tells whether the guest waits for its disk: for what it can't write, or for the end of a takeover's fold.
    #[must_use]
    pub(crate) fn disk_is_stuck(&self) -> bool {
        match self.role {
            Role::Primary(_) => {
                let refuses = [DiskFault::Full, DiskFault::Writes];
                self.replica.is_some() || refuses.iter().any(|fault| self.failing.contains(fault))
            }
            _ => self.failing.contains(&DiskFault::Full),
        }
    }

    /// Flushes the image for the guest, which writes everything again if that fails.
    pub(crate) fn flush_image(&mut self) -> std::io::Result<()> {
        let result = self.image.flush();
        if result.is_err() {
            self.unsure = Some(self.life);
        } else if self.unsure == Some(self.life) {
            self.unsure = None;
        }
        result
    }

    /// Tells whether the medium holds what reads of the image show, or will after a flush.
    pub(crate) fn is_sure(&self) -> bool {
        self.unsure.is_none()
    }

    /// Tells whether some fault of its disk has not been healed.
    pub(crate) fn disk_fails(&self) -> bool {
        !self.failing.is_empty()
    }

    pub(crate) fn flushes_fail(&self) -> bool {
        self.failing.contains(&DiskFault::Flushes)
    }

    /// Replaces the record: the old one or the new one is there after a crash.
    ///
    /// # Errors
    /// If the disk fails.
    pub(crate) fn store(&mut self, update: RecordUpdate) -> Result<(), String> {
        let mut sector = [0; 512];
        for (at, word) in [1, update.generation.0, update.committed.0].into_iter().enumerate() {
            sector[at * 8..at * 8 + 8].copy_from_slice(&word.to_le_bytes());
        }
        sector[24] = u8::from(update.role == PairRole::Primary);
        sector[25] = u8::from(update.complete);
        sector[26] = u8::from(update.clean);
        let written = self.records.write_at(0, &sector).and_then(|()| self.records.flush());
        written.map_err(|error| format!("the record can't be written: {error}"))?;
        self.record = Some(update);
        Ok(())
    }

    fn stored_record(&self) -> Option<RecordUpdate> {
        let sector = self.records.content();
        let word = |at: usize| u64::from_le_bytes(sector[at * 8..at * 8 + 8].try_into().expect("eight bytes"));
        (word(0) == 1).then(|| RecordUpdate {
            generation: Generation(word(1)),
            committed: Epoch(word(2)),
            role: if sector[24] == 1 {
                PairRole::Primary
            } else {
                PairRole::Secondary
            },
            complete: sector[25] == 1,
            clean: sector[26] == 1,
        })
    }

    /// Returns the state at the end of an epoch, as the guest sees it: of its disk what a toy writes, and all of it at every
    /// eighth.
    #[must_use]
    pub fn snapshot(&self, epoch: Epoch) -> Snapshot {
        Snapshot {
            pages: self.vm.memory.pages.clone(),
            registers: self.vm.registers,
            disk: self.disk_sample(epoch),
        }
    }

    /// Returns of the disk what is compared at the end of an epoch.
    pub(crate) fn disk_sample(&self, epoch: Epoch) -> Vec<u8> {
        if epoch.0.is_multiple_of(8) {
            return self.disk_content();
        }
        let mut disk = vec![0; sectors().count() * SECTOR_BYTES];
        for (offset, sector) in sectors().zip(disk.chunks_exact_mut(SECTOR_BYTES)) {
            self.read_disk(offset, sector);
        }
        disk
    }

    /// Returns the disk, as the guest sees it.
    #[must_use]
    pub fn disk_content(&self) -> Vec<u8> {
        let mut disk = vec![0; usize::try_from(DISK_BYTES).expect("small")];
        self.read_disk(0, &mut disk);
        disk
    }

    /// A disk whose power has just failed shows nothing any more; its host is about to be told.
    fn read_disk(&self, offset: u64, bytes: &mut [u8]) {
        let failed = match &self.replica {
            Some(replica) => replica.read(offset, bytes).is_err(),
            None => self.image.read_at(offset, bytes).is_err(),
        };
        assert!(!failed || self.doomed, "a disk can be read");
    }

    // Primary's shell.

    /// Ships memory, or what is dirty of it.
    pub(crate) fn sync_memory(&mut self, totals: Totals, difference: bool) -> (Vec<Streamed>, Shipment) {
        self.shipping.sync(&mut self.vm.memory, totals, difference)
    }

    /// Looks at the dirty pages, of which some are shipped ahead; nothing without a link.
    pub(crate) fn look(&mut self, tag: Tag, most: u64) -> Option<Look> {
        let link = self.link?;
        Some(self.shipping.look(&mut self.vm.memory, tag, most, link))
    }

    /// Copies what a checkpoint ships; returns how many pages, and the seed of the next epoch.
    pub fn copy(&mut self, blocks: &[u64], mut totals: Totals, asks: Question, entropy: u64) -> (u64, [u8; 32]) {
        let tag = totals.tag();
        let copied = self.shipping.stop(&mut self.vm.memory, tag);
        let pages = copied.len() as u64;
        let mut rest = VecDeque::new();
        for &block in blocks {
            let (offset, written) = storage::verify::read_block(&*self.image, block).expect("in range");
            let write = DiskWrite { tag, offset, written };
            totals.write(&write).expect("of this epoch");
            rest.push_back(Message::Write(write));
        }
        let registers = Section {
            name: "toy".to_owned(),
            version: 1,
            bytes: self.vm.registers.store(),
        };
        let devices = DeviceState {
            tag,
            sections: vec![registers],
        };
        totals.device_state(&devices).expect("once");
        rest.push_back(Message::DeviceState(devices));
        let mut seed = [0; 32];
        seed[..8].copy_from_slice(&entropy.to_le_bytes());
        if let Some(link) = self.link {
            let parcel = Parcel {
                link,
                totals,
                pages: copied,
                asks,
                waits: false,
                rest,
                begun: false,
                entropy: seed,
            };
            self.shipping.errands.push_back(Errand::Parcel(Box::new(parcel)));
        }
        (pages, seed)
    }

    /// The dirty pages of the abandoned checkpoint belong to the next one.
    pub fn keep_dirty(&mut self) {
        self.shipping.keep_dirty(&mut self.vm.memory);
    }

    // Secondary's shell.

    /// Makes memory ready for a sync; forgets the memory unless the primary builds on it.
    pub fn begin_sync(&mut self, keep: bool) {
        if !keep {
            self.committed = ToyVm::default().memory.pages;
            self.vm = ToyVm::default();
        }
        self.kept = None;
        self.loaded = None;
        self.base = None;
        self.stage.take();
        self.drop_own_writes();
    }

    /// Applies pages to the committed image.
    pub fn apply(&mut self, stream: (usize, usize), batch: &PageBatch) {
        self.stage_pages(stream, batch);
        self.apply_stage();
    }

    fn apply_stage(&mut self) {
        for (page, content) in self.stage.take() {
            let at = index(page);
            self.committed[at] = content;
            // As a private mapping does: a page that the guest has not written is the committed one.
            if !self.vm.memory.is_written(page) {
                self.vm.memory.pages[at] = Arc::clone(&self.committed[at]);
            }
        }
    }

    /// Compares pages with the guest's, which stands.
    pub(crate) fn compare(&mut self, hashes: &PageHashes) -> PageMatches {
        self.stage.compare(hashes, &self.vm.memory)
    }

    /// Keeps pages for the load, which came on a stream of so many.
    pub fn stage_pages(&mut self, stream: (usize, usize), batch: &PageBatch) {
        self.stage
            .put(stream, batch, self.base, &self.committed, &self.vm.memory);
    }

    /// Keeps device state for the load.
    pub fn stage_devices(&mut self, state: DeviceState) {
        self.devices = Some(state);
    }

    /// Forgets what is staged.
    ///
    /// # Panics
    /// If some of it is in the committed image.
    pub fn drop_stage(&mut self) {
        assert!(
            self.loaded.as_ref().is_none_or(|loaded| *loaded == self.committed),
            "rule 3: pages of a checkpoint that was not committed are in the image"
        );
        self.stage.take();
        self.devices = None;
        if let Some(replica) = &mut self.replica {
            replica.abandon();
        }
    }

    /// Tries what could fail.
    ///
    /// # Errors
    /// If there is no room, or the disk fails.
    pub fn prepare(&mut self, tag: Tag, first: bool) -> Result<(), String> {
        let replica = self.replica.as_mut().ok_or("not a secondary any more")?;
        if first {
            if let Err(error) = self.image.flush() {
                self.unsure = Some(self.life);
                return Err(error.to_string());
            }
            replica.end_sync(Tag {
                generation: tag.generation,
                epoch: Epoch(tag.epoch.0 - 1),
            });
        }
        replica.reserve(tag.epoch).map_err(|error| error.to_string())
    }

    /// Makes the staged checkpoint the guest's state.
    pub fn load(&mut self, tag: Tag) {
        self.running = false;
        self.ring.clear();
        let late = self.stage.take_late();
        self.apply_stage();
        self.base = Some(tag.epoch);
        self.drop_own_writes();
        for page in late {
            self.committed[index(page)] = Arc::clone(&self.vm.memory.pages[index(page)]);
        }
        self.loaded = Some(self.committed.clone());
        let devices = self.devices.take().expect("checked");
        self.vm.registers = Registers::load(&devices.sections[0].bytes).expect("the toy's section");
    }

    /// As the shell does: private copies are dropped where something was written, by whomever.
    fn drop_own_writes(&mut self) {
        for page in self.vm.memory.harvest().iter() {
            let page = index(page);
            self.vm.memory.pages[page] = Arc::clone(&self.committed[page]);
        }
    }

    /// Runs the I/O of a commit, and of those that came while it ran; returns the last epoch that is durable now.
    ///
    /// # Errors
    /// If the disk fails.
    pub(crate) fn run_jobs(&mut self, job: Option<CommitJob<SimImage>>) -> Result<Option<Epoch>, String> {
        let mut last = None;
        let mut next = job;
        while let Some(job) = next {
            let done = job.run().map_err(|error| error.to_string())?;
            last = Some(done.last().tag.epoch);
            next = self.replica.as_mut().and_then(|replica| replica.committed(&done));
        }
        Ok(last)
    }

    /// Makes the guest's own writes the disk, behind the commits before.
    ///
    /// # Errors
    /// If the disk fails, or has failed before.
    pub(crate) fn fold(&mut self, job: Option<CommitJob<SimImage>>) -> Result<(), String> {
        self.run_jobs(job)?;
        let settled = self.replica.take_if(|replica| replica.is_settled());
        let replica = settled.ok_or("an earlier commit failed")?;
        let mut seen = vec![0; usize::try_from(DISK_BYTES).expect("small")];
        replica.read(0, &mut seen).map_err(|error| error.to_string())?;
        replica.into_image().map_err(|error| error.to_string())?;
        let disk = self.disk_content();
        assert!(disk == seen, "rule 3: a takeover changes the disk under the guest");
        assert!(
            self.vm.wrote(&disk),
            "rule 3: the guest takes over with the disk of another"
        );
        Ok(())
    }

    /// Cuts the power, and returns what the image is when it is on again.
    ///
    /// # Panics
    /// If the journal can't be recovered.
    pub fn disk_after_power_loss(&self) -> Vec<u8> {
        self.disk.power_cycle();
        storage::recover(&*self.image, &*self.journal).expect("the journal is whole or empty");
        self.image.content()
    }

    /// Writes to the disk that the guest sees.
    ///
    /// # Errors
    /// If the power fails: the guest waits for a disk that only refuses.
    pub fn write_disk(&mut self, offset: u64, written: &Written) -> Result<(), String> {
        match (&mut self.replica, written) {
            (Some(replica), Written::Data(data)) => replica.write(offset, data).map_err(|error| error.to_string()),
            (Some(replica), Written::Zeros(len)) => replica.zero(offset, *len).map_err(|error| error.to_string()),
            (None, _) => storage::put(&*self.image, offset, written).map_err(|error| error.to_string()),
        }
    }
}

/// A record as the shells keep it.
pub(crate) fn full(update: RecordUpdate) -> Record {
    Record {
        pair: "pair".to_owned(),
        node: "host".to_owned(),
        tag: Tag {
            generation: update.generation,
            epoch: update.committed,
        },
        role: update.role,
        clean: update.clean,
        complete: update.complete,
        witness: None,
    }
}
