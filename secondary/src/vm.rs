//! The thread that owns the VM: it stages what the primary ships, tries it, and makes it the VM.
//!
//! Nothing of a checkpoint touches the machine before `Load`. No decision is made here.

use std::collections::{BTreeMap, BTreeSet};

use checkpoint::pages::identical::{PageHashes, PageMatches};
use checkpoint::pages::{BatchDecoder, Content, Expected, Page, PageError, decode_batch};
use checkpoint::wire::{DeviceState, PageBatch};
use checkpoint::{Epoch, Tag};
use link::describe;
use link::mailbox;
use link::worker::{Inbox, Worker};
use machine::{GuestRam, MachineState, MemoryError, PageSet, Section, Vm};

use crate::event::Event;

/// What the VM's thread is told.
pub(crate) enum Command {
    ApplyPages(PageBatch),
    /// Drop the guest's own writes, and the committed image too unless it is kept.
    BeginSync {
        keep: bool,
    },
    Check(Tag, Result<(), String>),
    Compare(PageHashes),
    DropStage,
    Load(Tag),
    Pause,
    Resume,
    Seed([u8; 32]),
    StageDevices(DeviceState),
    StagePages(PageBatch),
}

/// The thread; it ends with the VM as the last order left it.
pub(crate) type VmThread = Worker<Command, Box<dyn Vm>>;

/// Starts the thread that owns the VM.
pub(crate) fn spawn(vm: Box<dyn Vm>, events: mailbox::Sender<Event>) -> std::io::Result<VmThread> {
    let ram = vm.ram();
    let loader = Loader {
        vm,
        ram,
        events,
        stage: Stage::default(),
        decoder: BatchDecoder::default(),
        committed: None,
    };
    Worker::spawn("vm", move |inbox| loader.run(&inbox))
}

/// A checkpoint in flight: decoded pages, the last that came of each, and the devices' state.
#[derive(Default)]
struct Stage {
    pages: Vec<u64>,
    content: Vec<u8>,
    /// Where each page is in both.
    places: BTreeMap<u64, usize>,
    devices: Option<MachineState>,
    /// Pages that the stopped VM was found to have as the primary has them.
    alike: BTreeSet<u64>,
    /// Those of them that are staged as the VM's own: it stands until the load, which takes them from there.
    own: BTreeSet<u64>,
}

struct Loader {
    vm: Box<dyn Vm>,
    ram: GuestRam,
    events: mailbox::Sender<Event>,
    stage: Stage,
    decoder: BatchDecoder,
    /// The epoch that the committed image holds, once one was loaded in this pairing.
    committed: Option<Epoch>,
}

impl Loader {
    fn run(mut self, inbox: &Inbox<Command>) -> Box<dyn Vm> {
        while let Some(order) = inbox.next() {
            if let Some(event) = self.obey(order) {
                self.events.send(event);
            }
        }
        self.vm
    }

    fn obey(&mut self, order: Command) -> Option<Event> {
        match order {
            Command::ApplyPages(batch) => self.apply(&batch).err().map(Event::StageFailed),
            Command::BeginSync { keep } => self.begin_sync(keep).err().map(Event::VmFailed),
            Command::Check(tag, disk) => Some(Event::Checked(tag, disk.and_then(|()| self.check()))),
            Command::Compare(hashes) => Some(match self.compare(&hashes) {
                Ok(matches) => Event::Compared(matches),
                Err(error) => Event::StageFailed(format!("pages can't be compared: {}", describe(&error))),
            }),
            Command::DropStage => {
                self.stage = Stage::default();
                None
            }
            Command::Load(tag) => Some(match self.load() {
                Ok(()) => {
                    self.committed = Some(tag.epoch);
                    Event::Loaded(tag)
                }
                Err(error) => Event::VmFailed(format!(
                    "checkpoint {tag} failed after its commit: {}",
                    describe(&*error)
                )),
            }),
            Command::Pause => Some(
                self.vm
                    .pause()
                    .map_or_else(|error| Event::VmFailed(describe(&error)), |()| Event::Paused),
            ),
            Command::Resume => self.vm.resume().err().map(|error| Event::VmFailed(describe(&error))),
            Command::Seed(seed) => {
                self.vm.set_entropy_seed(Some(seed));
                None
            }
            Command::StageDevices(state) => {
                let sections = state.sections.into_iter();
                self.stage.devices = Some(MachineState(
                    sections
                        .map(|section| Section {
                            name: section.name,
                            version: section.version,
                            bytes: section.bytes,
                        })
                        .collect(),
                ));
                None
            }
            Command::StagePages(batch) => self.stage_pages(&batch).err().map(Event::StageFailed),
        }
    }

    /// The image is what the primary's difference builds on, or zero, which the primary leaves out.
    fn begin_sync(&mut self, keep: bool) -> Result<(), String> {
        self.stage = Stage::default();
        self.committed = None;
        self.vm.pause().map_err(|error| describe(&error))?;
        let own = self.vm.take_dirty().map_err(|error| describe(&error))?;
        self.ram.revert(&own).map_err(|error| describe(&error))?;
        if !keep {
            self.ram.clear_image().map_err(|error| describe(&error))?;
        }
        Ok(())
    }

    fn apply(&mut self, batch: &PageBatch) -> Result<(), String> {
        let ram = &self.ram;
        let mut failed = None;
        let decoded = decode_batch(&batch.encoded, ram.pages(), |page, content| {
            if let Err(error) = ram.write_committed(page, content) {
                failed = Some(describe(&error));
            }
        });
        counted(batch, decoded.map_err(|error| describe(&error)))?;
        failed.map_or(Ok(()), Err)
    }

    fn stage_pages(&mut self, batch: &PageBatch) -> Result<(), String> {
        let ram = &self.ram;
        let stage = &mut self.stage;
        let expected = Expected {
            count: batch.count,
            pages: ram.pages(),
            base: self.committed,
        };
        let decoded = self.decoder.decode(
            &batch.encoded,
            &expected,
            |page, content| Ok(ram.read_committed(page, content)?),
            |page, content| stage.put(ram, page, content),
        );
        decoded.map_err(|error| format!("a page can't be staged: {}", describe(&error)))
    }

    /// The VM stands, and does until the load: what is found alike here is what will be copied to the image.
    fn compare(&mut self, hashes: &PageHashes) -> Result<PageMatches, MemoryError> {
        let matches = hashes.answer(|page, content| self.ram.read_page(page, content))?;
        let alike = hashes.pages.iter().zip(&matches.alike);
        self.stage
            .alike
            .extend(alike.filter_map(|((page, _), alike)| alike.then_some(*page)));
        Ok(matches)
    }

    fn check(&mut self) -> Result<(), String> {
        let devices = self.stage.devices.as_ref().ok_or("the devices' state is missing")?;
        self.vm.check(devices).map_err(|error| describe(&error))
    }

    /// Stops the VM before the first byte is applied: a page that it has only read would show it.
    fn load(&mut self) -> Result<(), Box<dyn std::error::Error>> {
        let stage = core::mem::take(&mut self.stage);
        let devices = stage.devices.unwrap_or_default();
        self.vm.pause()?;
        let own = self.vm.take_dirty()?;
        self.ram.write_committed_pages(&stage.pages, &stage.content)?;
        let mut alike = PageSet::new(self.ram.pages());
        alike.extend(stage.own);
        self.ram.commit_own(&alike)?;
        self.ram.revert(&own)?;
        Ok(self.vm.restore(&devices)?)
    }
}

/// Why a batch can't be staged.
#[derive(Debug, thiserror::Error)]
enum StageError {
    #[error(transparent)]
    Page(#[from] PageError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error("page {0} is said to be alike on both sides, and was not found to be")]
    NotAlike(u64),
}

impl Stage {
    fn put(&mut self, ram: &GuestRam, page: u64, content: Content<'_>) -> Result<(), StageError> {
        // What comes last of a page counts.
        if let Content::Own = content {
            if !self.alike.contains(&page) {
                return Err(StageError::NotAlike(page));
            }
            self.own.insert(page);
            return Ok(());
        }
        self.own.remove(&page);
        let place = self.places.get(&page).copied();
        let staged = place.map(|place| &mut self.content.as_chunks_mut().0[place]);
        match (content, staged) {
            (Content::Page(bytes), Some(staged)) => *staged = *bytes,
            (Content::Page(bytes), None) => self.add(page, bytes),
            (Content::Unchanged, Some(staged)) => ram.read_committed(page, staged)?,
            (Content::Unchanged | Content::Own, _) => {}
        }
        Ok(())
    }

    fn add(&mut self, page: u64, content: &Page) {
        self.places.insert(page, self.pages.len());
        self.pages.push(page);
        self.content.extend_from_slice(content);
    }
}

fn counted(batch: &PageBatch, decoded: Result<u32, String>) -> Result<(), String> {
    match decoded {
        Ok(count) if count == batch.count => Ok(()),
        Ok(count) => Err(format!("a batch of {} pages has {count}", batch.count)),
        Err(error) => Err(format!("a page can't be decoded: {error}")),
    }
}
