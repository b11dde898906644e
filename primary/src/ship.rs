//! The thread that ships while the VM runs: pages ahead of a stop, and what was copied at one.
//!
//! ```text
//!   VM's thread: clears bits ─► Unread ─► courier reads a few, encodes, queues      (ahead)
//!                   stop: takes the unread back, copies all that is to be shipped ─► Parcel ─► courier
//! ```
//!
//! A page that is to be shipped ahead must be read before the next stop ends, or not at all: what the guest writes after it is
//! of another epoch. So the courier reads under a lock, a few pages at a time, and a stop takes back what is not read.
//! Where it pays, the secondary is asked first which of the copied pages its stopped VM has alike: then the parcel waits here.
//! The pages take their streams (see [`crate::lanes`]), everything else the data connection. The protocol sees only numbers and
//! digests. No decision is made here.

use core::ops::ControlFlow;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Instant;

use checkpoint::Tag;
use checkpoint::pages::identical::PageMatches;
use checkpoint::pages::{Amount, Question};
use checkpoint::staging::Totals;
use checkpoint::wire::{DeviceState, DiskWrite, Message, PageSums, Section, Written};
use link::PageSenders;
use link::mailbox;
use link::peer::BulkSender;
use link::worker::{Inbox, Worker};
use link::{clock, describe};
use machine::{GuestRam, MemoryError, PageSet, VmError};
use storage::FileImage;
use storage::verify::read_block;

use crate::comparison::Next;
use crate::copies::Copies;
use crate::encoding::Encoding;
use crate::event::{AheadShipment, Event, Shipment};
use crate::lanes;
use crate::trace::Traces;

/// Pages read at a time when pages are shipped ahead: a stop waits for so many copies at most.
const READ_AT_ONCE: usize = 16;

/// Pages to be shipped ahead: they count as clean already, and are not read yet. Shared by the VM's thread and the courier.
#[derive(Clone, Default)]
pub(crate) struct Unread(Arc<Mutex<VecDeque<u64>>>);

impl Unread {
    pub(crate) fn add(&self, pages: &PageSet) {
        self.lock().extend(pages.iter());
    }

    /// Takes them back. Nothing of them is read afterwards: the VM stands, or they are dirty again.
    pub(crate) fn take_back(&self) -> VecDeque<u64> {
        core::mem::take(&mut *self.lock())
    }

    /// Reads some of them, so that they stay as they are now whatever the guest does; false if there were none.
    fn read(&self, ram: &GuestRam, few: &mut Copies) -> Result<bool, MemoryError> {
        let mut unread = self.lock();
        let count = unread.len().min(READ_AT_ONCE);
        few.read(ram, unread.drain(..count))?;
        Ok(count > 0)
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Everything that a checkpoint ships, independent of the running VM.
pub(crate) struct Parcel {
    pub(crate) totals: Totals,
    pub(crate) bulk: BulkSender,
    pub(crate) streams: PageSenders,
    pub(crate) copies: Copies,
    /// Pages that were not copied: the VM stands until they have been read, which is told as `Copied`.
    pub(crate) beyond: Vec<u64>,
    /// All pages of both kinds.
    pub(crate) pages: u64,
    /// Disk blocks of a first checkpoint: the VM stands until it is acknowledged.
    pub(crate) blocks: Vec<u64>,
    pub(crate) sections: Vec<Section>,
    pub(crate) entropy: [u8; 32],
    /// The secondary's guest has run, too: pages may be compared.
    pub(crate) both_ran: bool,
}

/// What the courier is told.
enum Errand {
    Abandon,
    /// With the time at which it came.
    Alike(PageMatches, checkpoint::Instant),
    Ask(Tag),
    Ahead {
        tag: Tag,
        streams: PageSenders,
    },
    /// Pages will take so many streams.
    Forget(usize),
    Ship(Box<Parcel>),
}

/// The thread's handle, and the room for copies that comes back from it.
pub(crate) struct Courier {
    thread: Worker<Errand>,
    unread: Unread,
    returned: mpsc::Receiver<Copies>,
}

impl Courier {
    /// Starts the thread. It remembers at most `cache_bytes` of what the secondary has committed.
    pub(crate) fn spawn(
        image: Arc<FileImage>,
        ram: GuestRam,
        traces: Traces,
        events: mailbox::Sender<Event>,
        cache_bytes: usize,
    ) -> std::io::Result<Self> {
        let unread = Unread::default();
        let (give_back, returned) = mpsc::channel();
        // Received by the first checkpoint.
        let _ = give_back.send(Copies::default());
        let carrier = Carrier {
            image,
            ram,
            traces,
            events,
            unread: unread.clone(),
            few: Copies::default(),
            give_back,
            encoding: Encoding::new(cache_bytes, 1),
            broken: false,
            shipping: None,
        };
        let thread = Worker::spawn("courier", move |inbox| carrier.run(&inbox))?;
        Ok(Self {
            thread,
            unread,
            returned,
        })
    }

    /// Returns the room for copies, once the shipment before has left it.
    pub(crate) fn room(&self) -> Copies {
        self.returned.recv().unwrap_or_default()
    }

    /// Ships pages that count as clean from before this call on; answered by `ShippedAhead`.
    pub(crate) fn ship_ahead(&self, tag: Tag, pages: &PageSet, streams: PageSenders) {
        self.unread.add(pages);
        self.thread.send(Errand::Ahead { tag, streams });
    }

    /// Takes back the pages that are still to be shipped ahead: none is read after this.
    pub(crate) fn stop_ahead(&self) -> VecDeque<u64> {
        self.unread.take_back()
    }

    /// Ships; answered by `CheckpointSent`, and by `CompareAsked` before.
    pub(crate) fn send(&self, parcel: Parcel) {
        self.thread.send(Errand::Ship(Box::new(parcel)));
    }

    /// The secondary's VM stands for this epoch; answered by `Hashed`.
    pub(crate) fn ask(&self, tag: Tag) {
        self.thread.send(Errand::Ask(tag));
    }

    /// The answer to `Hashed`; answered by the next one, or by `CheckpointSent`.
    pub(crate) fn alike(&self, matches: PageMatches) {
        self.thread.send(Errand::Alike(matches, clock::now()));
    }

    /// The checkpoint that is being shipped will not be acknowledged.
    pub(crate) fn abandon(&self) {
        self.unread.take_back();
        self.thread.send(Errand::Abandon);
    }

    /// There will be another secondary, with so many page streams.
    pub(crate) fn forget(&self, streams: usize) {
        self.thread.send(Errand::Forget(streams));
    }
}

/// The courier itself.
struct Carrier {
    image: Arc<FileImage>,
    ram: GuestRam,
    traces: Traces,
    events: mailbox::Sender<Event>,
    unread: Unread,
    few: Copies,
    give_back: mpsc::Sender<Copies>,
    encoding: Encoding,
    /// A connection of this pairing takes no more: nothing is shipped until it is over.
    broken: bool,
    /// The checkpoint that is being shipped.
    shipping: Option<Shipping>,
}

/// A checkpoint on its way.
struct Shipping {
    parcel: Box<Parcel>,
    began: Instant,
    /// What of it was shipped ahead, and its sums.
    ahead: Amount,
    before: PageSums,
    /// When the open question was asked; the first one counts from when the secondary's VM was to stop.
    asked: checkpoint::Instant,
    is_asked: bool,
    /// Bytes of questions and answers.
    bytes_asked: u64,
    /// Nothing can be done before the secondary has answered.
    waits: bool,
}

impl Carrier {
    fn run(mut self, inbox: &Inbox<Errand>) {
        loop {
            // Between two steps of a checkpoint an answer may come, or its end.
            let errand = if self.shipping.as_ref().is_some_and(|shipping| !shipping.waits) {
                inbox.poll()
            } else {
                inbox
                    .next()
                    .map_or(ControlFlow::Break(()), |errand| ControlFlow::Continue(Some(errand)))
            };
            let done = match errand {
                ControlFlow::Break(()) => return,
                ControlFlow::Continue(Some(errand)) => self.obey(errand),
                ControlFlow::Continue(None) => self.go_on(),
            };
            match done {
                Ok(Some(event)) => self.report(event),
                Ok(None) => {}
                Err(error) => {
                    self.end_shipping();
                    match error {
                        ShipError::Link => self.broken = true,
                        ShipError::Vm(reason) => self.report(Event::VmFailed(reason)),
                    }
                }
            }
        }
    }

    fn obey(&mut self, errand: Errand) -> Result<Option<Event>, ShipError> {
        match errand {
            Errand::Abandon => {
                self.broken = false;
                self.encoding.abandon();
                self.end_shipping();
            }
            Errand::Forget(streams) => {
                self.broken = false;
                self.encoding.forget(streams);
            }
            // What did not get through is missing in the sums: the loss of the link is about to be told.
            Errand::Ahead { .. } if self.broken => {}
            Errand::Ship(parcel) if self.broken => self.give_back(*parcel),
            Errand::Ahead { tag, streams } => return self.ship_ahead(tag, &streams).map(Some),
            Errand::Alike(matches, at) => {
                if let Some(shipping) = of(&mut self.shipping, matches.tag) {
                    self.encoding.answered(&matches, at.since(shipping.asked));
                    shipping.bytes_asked += matches.encode().len() as u64;
                    shipping.waits = false;
                }
            }
            Errand::Ask(tag) => {
                if let Some(shipping) = of(&mut self.shipping, tag) {
                    self.encoding.halted();
                    shipping.waits = false;
                }
            }
            Errand::Ship(parcel) => return self.begin(parcel),
        }
        Ok(None)
    }

    fn report(&self, event: Event) {
        self.events.send(event);
    }

    fn end_shipping(&mut self) {
        if let Some(shipping) = self.shipping.take() {
            self.give_back(*shipping.parcel);
        }
    }

    fn give_back(&self, mut parcel: Parcel) {
        parcel.copies.used();
        // Closed when the role has ended.
        let _ = self.give_back.send(parcel.copies);
    }

    /// Begins to ship a checkpoint; has the secondary's VM stopped if it pays to ask what it has alike.
    fn begin(&mut self, parcel: Box<Parcel>) -> Result<Option<Event>, ShipError> {
        let tag = parcel.totals.tag();
        self.encoding.begin(tag);
        let ahead = self.encoding.stats().total();
        let shipping = self.shipping.insert(Shipping {
            began: Instant::now(),
            ahead,
            before: self.encoding.sums(),
            asked: clock::now(),
            is_asked: false,
            bytes_asked: 0,
            waits: false,
            parcel,
        });
        let parcel = &shipping.parcel;
        let pages = parcel.copies.len();
        // While pages are left that were not copied the VM stands, and is not to wait for the secondary.
        let asks = if parcel.both_ran && parcel.beyond.is_empty() {
            self.encoding.choose(pages)
        } else {
            Question::Nothing
        };
        let compares = self.encoding.compare(pages, asks, None);
        if !parcel.beyond.is_empty() {
            let beyond = || parcel.beyond.iter().copied();
            lanes::ship_memory(&mut self.encoding, &parcel.streams, &self.ram, beyond, false)?;
            let (pages, entropy) = (parcel.pages, parcel.entropy);
            return Ok(Some(Event::Copied { tag, pages, entropy }));
        }
        Ok(compares.then_some(Event::CompareAsked(tag)))
    }

    /// Does what comes next in shipping a checkpoint.
    fn go_on(&mut self) -> Result<Option<Event>, ShipError> {
        let Some(shipping) = &mut self.shipping else {
            return Ok(None);
        };
        let parcel = &shipping.parcel;
        match self.encoding.next_step() {
            Next::Ask => {
                let mut seed = [0; 32];
                link::entropy::fill(&mut seed);
                let tag = parcel.totals.tag();
                let question = self.encoding.question(tag, seed, |place| parcel.copies.at(place));
                return Ok(question.map(|hashes| {
                    if core::mem::replace(&mut shipping.is_asked, true) {
                        shipping.asked = clock::now();
                    }
                    shipping.bytes_asked += hashes.encode().len() as u64;
                    Event::Hashed(hashes)
                }));
            }
            Next::Encode(places) => {
                let began = clock::now();
                let copies = || parcel.copies.range(places.clone());
                lanes::ship_copied(&mut self.encoding, &parcel.streams, places.len(), copies)?;
                self.encoding.took(clock::now().since(began));
            }
            Next::Wait => shipping.waits = true,
            Next::Done => return self.finish().map(Some),
        }
        Ok(None)
    }

    /// Ships what follows the pages.
    fn finish(&mut self) -> Result<Event, ShipError> {
        let mut shipping = self.shipping.take().expect("a checkpoint is being shipped");
        let sent = self.send_rest(&mut shipping);
        self.give_back(*shipping.parcel);
        sent.map(Event::CheckpointSent)
    }

    fn send_rest(&mut self, shipping: &mut Shipping) -> Result<Shipment, ShipError> {
        let Shipping { parcel, before, .. } = shipping;
        lanes::finish_all(&mut self.encoding, &parcel.streams)?;
        let sums = self.encoding.sums();
        let mut out = Outbox {
            totals: parcel.totals.clone(),
            bulk: parcel.bulk.clone(),
        };
        out.totals.add_pages(&sums);
        for &block in &parcel.blocks {
            let (offset, written) =
                read_block(&*self.image, block).map_err(|error| ShipError::Vm(error.to_string()))?;
            out.write(offset, written)?;
        }
        out.devices(core::mem::take(&mut parcel.sections))?;
        self.encoding.shipped();
        let (tag, took, stats) = (parcel.totals.tag(), shipping.began.elapsed(), self.encoding.stats());
        let (pages, bytes) = (sums.pages() - before.pages(), sums.bytes() - before.bytes());
        self.traces.sent(
            tag,
            took,
            &stats,
            shipping.ahead,
            bytes + shipping.bytes_asked,
            self.encoding.bases(),
        );
        Ok(Shipment {
            totals: out.totals,
            pages,
            bytes,
            entropy: parcel.entropy,
        })
    }

    /// Ships the pages that are unread, until there are none: they are shipped, or a stop has taken them back.
    fn ship_ahead(&mut self, tag: Tag, streams: &PageSenders) -> Result<Event, ShipError> {
        let began = clock::now();
        self.encoding.begin(tag);
        let before = self.encoding.sums();
        let mut few = core::mem::take(&mut self.few);
        while self.unread.read(&self.ram, &mut few)? {
            for (page, content) in few.iter() {
                let (stream, lane) = self.encoding.lane_of(page);
                lanes::push(lane, stream, streams, page, content)?;
            }
        }
        lanes::finish_all(&mut self.encoding, streams)?;
        self.few = few;
        let sums = self.encoding.sums();
        Ok(Event::ShippedAhead(AheadShipment {
            tag,
            pages: sums.pages() - before.pages(),
            bytes: sums.bytes() - before.bytes(),
            took: clock::now().since(began),
        }))
    }
}

fn of(shipping: &mut Option<Shipping>, tag: Tag) -> Option<&mut Shipping> {
    shipping.as_mut().filter(|shipping| shipping.parcel.totals.tag() == tag)
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

/// Where the parts of one checkpoint that are no pages are counted and queued.
struct Outbox {
    totals: Totals,
    bulk: BulkSender,
}

impl Outbox {
    fn write(&mut self, offset: u64, written: Written) -> Result<(), LinkGone> {
        let write = DiskWrite {
            tag: self.totals.tag(),
            offset,
            written,
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
}

pub(crate) fn send(bulk: &BulkSender, message: Message) -> Result<(), LinkGone> {
    bulk.blocking_send(message).map_err(|_closed| LinkGone)
}
