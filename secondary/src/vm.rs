//! The thread that owns the VM: it tries what the primary has shipped, and makes it the VM.
//!
//! The pages are staged by threads of their own ([`crate::stage`]). Nothing of a checkpoint touches the machine before `Load`. No decision is made here.

use std::sync::mpsc;

use checkpoint::Tag;
use checkpoint::pages::identical::{PageHashes, PageMatches};
use checkpoint::wire::DeviceState;
use link::describe;
use link::mailbox;
use link::worker::{Inbox, Worker};
use machine::{GuestRam, MachineState, MemoryError, PageSet, Section, Vm};

use crate::event::Event;
use crate::stage::{Staged, StagerOrders};

/// What the VM's thread is told.
pub(crate) enum Command {
    /// Drop the guest's own writes, and the committed image too unless it is kept.
    BeginSync {
        keep: bool,
        /// Told when the image is ready.
        ready: Vec<mpsc::Sender<()>>,
    },
    Check(Tag, Result<(), String>),
    Compare(PageHashes),
    Count(Tag),
    DropStage,
    Load(Tag),
    Pause,
    /// The guest has asked for a reset.
    Restart,
    Resume,
    Seed([u8; 32]),
    StageDevices(DeviceState),
}

/// The thread; it ends with the VM as the last order left it.
pub(crate) type VmThread = Worker<Command, Box<dyn Vm>>;

/// Starts the thread that owns the VM.
pub(crate) fn spawn(
    vm: Box<dyn Vm>,
    stagers: StagerOrders,
    events: mailbox::Sender<Event>,
) -> std::io::Result<VmThread> {
    let ram = vm.ram();
    let loader = Loader {
        written: PageSet::new(ram.pages()),
        kept: PageSet::new(ram.pages()),
        vm,
        ram,
        stagers,
        events,
        pages: Vec::new(),
        devices: None,
    };
    Worker::spawn("vm", move |inbox| loader.run(&inbox))
}

struct Loader {
    vm: Box<dyn Vm>,
    ram: GuestRam,
    stagers: StagerOrders,
    events: mailbox::Sender<Event>,
    /// The pages of the checkpoint in flight, once all have come.
    pages: Vec<Staged>,
    /// Its devices' state.
    devices: Option<MachineState>,
    /// Pages that the guest had written when the last checkpoint was loaded.
    written: PageSet,
    /// Pages of which the guest kept copies then: of what was committed.
    kept: PageSet,
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
            Command::BeginSync { keep, ready } => match self.begin_sync(keep) {
                Ok(()) => {
                    for ready in ready {
                        // Its stager may have ended with the role.
                        let _ = ready.send(());
                    }
                    None
                }
                Err(error) => Some(Event::VmFailed(error)),
            },
            Command::Check(tag, disk) => Some(Event::Checked(tag, disk.and_then(|()| self.check()))),
            Command::Compare(hashes) => Some(match self.compare(&hashes) {
                Ok(matches) => Event::Compared(matches),
                Err(error) => Event::StageFailed(format!("pages can't be compared: {}", describe(&error))),
            }),
            Command::Count(tag) => Some(self.vm.dirty_now().map_or_else(
                |error| Event::VmFailed(describe(&error)),
                |mut own| {
                    own.union(&self.kept);
                    Event::Counted(tag, own.len())
                },
            )),
            Command::DropStage => {
                self.drop_stage();
                None
            }
            Command::Load(tag) => Some(match self.load() {
                Ok(()) => {
                    self.stagers.committed(tag.epoch);
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
            Command::Restart => match self.vm.restart() {
                Ok(true) => None,
                Ok(false) => Some(Event::GuestStopped("it asked for a reset".to_owned())),
                Err(error) => Some(Event::VmFailed(describe(&error))),
            },
            Command::Resume => self.vm.resume().err().map(|error| Event::VmFailed(describe(&error))),
            Command::Seed(seed) => {
                self.vm.set_entropy_seed(Some(seed));
                None
            }
            Command::StageDevices(state) => {
                let sections = state.sections.into_iter();
                self.devices = Some(MachineState(
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
        }
    }

    /// The image is what the primary's difference builds on, or zero, which the primary leaves out.
    fn begin_sync(&mut self, keep: bool) -> Result<(), String> {
        self.drop_stage();
        self.vm.pause().map_err(|error| describe(&error))?;
        self.vm.take_dirty().map_err(|error| describe(&error))?;
        self.ram.revert_all().map_err(|error| describe(&error))?;
        self.written.clear();
        self.kept.clear();
        if !keep {
            self.ram.clear_image().map_err(|error| describe(&error))?;
        }
        Ok(())
    }

    fn drop_stage(&mut self) {
        self.pages.clear();
        self.devices = None;
    }

    /// The VM stands, and does until the load: what is found alike here is what will be copied to the image.
    fn compare(&mut self, hashes: &PageHashes) -> Result<PageMatches, MemoryError> {
        let matches = hashes.answer(|page, content| self.ram.read_page(page, content))?;
        let alike = hashes.pages.iter().zip(&matches.alike);
        self.stagers
            .alike(alike.filter_map(|((page, _), alike)| alike.then_some(*page)));
        Ok(matches)
    }

    fn check(&mut self) -> Result<(), String> {
        self.pages = self.stagers.take().ok_or("its pages can't be staged")?;
        let devices = self.devices.as_ref().ok_or("the devices' state is missing")?;
        self.vm.check(devices).map_err(|error| describe(&error))
    }

    /// Stops the VM before the first byte is applied: a page that it has only read would show it.
    fn load(&mut self) -> Result<(), Box<dyn std::error::Error>> {
        let (pages, devices) = (core::mem::take(&mut self.pages), self.devices.take());
        self.vm.pause()?;
        let own = self.vm.take_dirty()?;
        let mut alike = PageSet::new(self.ram.pages());
        for staged in &pages {
            alike.extend(staged.own.iter().copied());
        }
        // What was written in this epoch and the one before will be in the next. Copies that are not written any more go.
        let mut kept = own.clone();
        kept.intersect(&self.written);
        let mut stale = own.clone();
        stale.union(&self.kept);
        let staged = pages.iter().map(|staged| (&*staged.pages, &*staged.content));
        self.ram.commit(staged, &alike, stale, &kept)?;
        (self.written, self.kept) = (own, kept);
        Ok(self.vm.restore(&devices.unwrap_or_default())?)
    }
}
