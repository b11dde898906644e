//! Pages on their way: what the primary's VM thread and courier do with them, and the secondary's stage.
//!
//! As in the shipped shells a page that is shipped ahead counts as clean first and is read later, while the guest runs; a stop
//! takes back what was not read. Which pages, their encoding and the cache of bases are the shipped code.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use checkpoint::limits::PAGE_BYTES;
use checkpoint::mutants::{self, Mutant};
use checkpoint::pages::identical::{PageHashes, PageMatches};
use checkpoint::pages::{BatchDecoder, Content, Expected, Page, PageError, Question, stream_of};
use checkpoint::staging::Totals;
use checkpoint::wire::{Message, PageBatch, PageSums};
use checkpoint::{Epoch, Tag};
use machine::PageSet;
use primary::comparison::Next;
use primary::encoding::Encoding;
use primary::event::{AheadShipment, Look, Shipment};
use primary::scout::Scout;

use crate::toy_vm::{Memory, PAGES, index};

/// Room for the committed content of most pages, not of all.
const CACHE_BYTES: usize = 24 * (PAGE_BYTES + 128);
/// Pages of a batch: few, so that there are many.
const BATCH_PAGES: usize = 8;
/// Pages of a question: few, so that several are open one after the other while batches are sent.
const QUESTION_PAGES: usize = 5;

/// A page's content at one moment.
type Copied = Arc<Vec<u8>>;

/// What the courier does, one after the other.
pub(crate) enum Errand {
    /// Ship what is unread.
    Ahead { link: usize, tag: Tag, begun: bool },
    /// Ship a checkpoint.
    Parcel(Box<Parcel>),
}

impl Errand {
    /// Returns the link that it goes to.
    pub(crate) fn link(&self) -> usize {
        match self {
            Self::Ahead { link, .. } => *link,
            Self::Parcel(parcel) => parcel.link,
        }
    }
}

/// A checkpoint on its way from the copy to the link.
pub(crate) struct Parcel {
    pub(crate) link: usize,
    pub(crate) totals: Totals,
    pub(crate) pages: Vec<(u64, Copied)>,
    /// What follows the pages: counted already.
    pub(crate) rest: VecDeque<Message>,
    pub(crate) begun: bool,
    /// How many of its pages the secondary is asked about.
    pub(crate) asks: Question,
    /// For the secondary.
    pub(crate) waits: bool,
    pub(crate) entropy: [u8; 32],
}

/// A batch and its stream.
pub(crate) type Streamed = (usize, PageBatch);

/// What a step of the courier leads to.
pub(crate) enum Step {
    CompareAsked(Tag),
    Hashed(PageHashes),
    Send(Message),
    SendPages(Streamed),
    ShippedAhead(AheadShipment),
    Sent(Shipment),
}

/// The primary's side.
pub(crate) struct Shipping {
    encoding: Encoding,
    /// Encoded, and not sent yet.
    batches: VecDeque<Streamed>,
    /// What was summed before the errand.
    before: PageSums,
    scout: Scout,
    /// Counted as clean, to be read; with what they were at the look, under a mutant.
    unread: VecDeque<(u64, Option<Copied>)>,
    pub(crate) errands: VecDeque<Errand>,
    /// The epoch that `unacknowledged` belongs to.
    open: Option<Tag>,
    unacknowledged: PageSet,
}

impl Default for Shipping {
    fn default() -> Self {
        Self {
            encoding: Encoding::new(CACHE_BYTES, 1),
            batches: VecDeque::new(),
            before: PageSums::new(1),
            scout: Scout::new(PAGES),
            unread: VecDeque::new(),
            errands: VecDeque::new(),
            open: None,
            unacknowledged: PageSet::new(PAGES),
        }
    }
}

impl Shipping {
    /// Looks at the dirty pages and takes those that have gone quiet.
    pub(crate) fn look(&mut self, memory: &mut Memory, tag: Tag, most: u64, link: usize) -> Look {
        let dirty = memory.dirty();
        let cold = self.scout.look(&dirty, most);
        let ahead = cold.len();
        if most > 0 {
            self.unacknowledged_in(tag).union(&cold);
        }
        if ahead > 0 {
            if mutants::on(Mutant::CopyBeforeClear) {
                let copied = |page| (page, Some(Arc::clone(&memory.pages[index(page)])));
                self.unread.extend(cold.iter().map(copied));
            } else {
                memory.clear_dirty(&cold);
                self.unread.extend(cold.iter().map(|page| (page, None)));
            }
            self.errands.push_back(Errand::Ahead {
                link,
                tag,
                begun: false,
            });
        }
        Look {
            tag,
            dirty: dirty.len() - ahead,
            ahead,
            took: checkpoint::Duration(0),
        }
    }

    /// Returns how many pages the checkpoint of this epoch has already: dirty, or counted as clean to be shipped ahead.
    pub(crate) fn pages_of_epoch(&self, memory: &Memory, tag: Tag) -> u64 {
        let mut pages = memory.dirty();
        if self.open == Some(tag) {
            pages.union(&self.unacknowledged);
        }
        pages.len()
    }

    /// Takes the dirty pages at a stop, with those that are still to be shipped ahead, and copies them.
    pub(crate) fn stop(&mut self, memory: &mut Memory, tag: Tag) -> Vec<(u64, Copied)> {
        let mut dirty = memory.harvest();
        self.scout.stopped();
        if !mutants::on(Mutant::ReadAheadAfterStop) {
            dirty.extend(self.unread.drain(..).map(|(page, _)| page));
        }
        if mutants::on(Mutant::TrustPagesAhead) && self.open == Some(tag) {
            dirty.subtract(&self.unacknowledged);
        }
        self.unacknowledged_in(tag).union(&dirty);
        let copied = |page| (page, Arc::clone(&memory.pages[index(page)]));
        dirty.iter().map(copied).collect()
    }

    /// Ships memory, or what is dirty of it, before the first checkpoint.
    pub(crate) fn sync(
        &mut self,
        memory: &mut Memory,
        mut totals: Totals,
        difference: bool,
    ) -> (Vec<Streamed>, Shipment) {
        let dirty = memory.harvest();
        self.scout.stopped();
        self.batches.clear();
        self.encoding.forget(totals.streams());
        let pages = if difference {
            dirty.clone()
        } else {
            PageSet::full(PAGES)
        };
        let unacknowledged = self.unacknowledged_in(totals.tag());
        if difference {
            unacknowledged.union(&dirty);
        }
        let mut plain = Encoding::new(0, totals.streams());
        plain.begin(totals.tag());
        let numbers: Vec<u64> = pages.iter().collect();
        let mut batches = VecDeque::new();
        for few in numbers.chunks(BATCH_PAGES) {
            let few = few.iter().map(|page| (*page, &memory.pages[index(*page)]));
            encode(&mut plain, few, &mut batches);
        }
        totals.add_pages(&plain.sums());
        (batches.into(), shipment(totals, pages.len(), [0; 32]))
    }

    /// Nothing became of what was taken or cleared since the last acknowledgement.
    pub(crate) fn keep_dirty(&mut self, memory: &mut Memory) {
        self.errands.clear();
        self.unread.clear();
        self.batches.clear();
        self.encoding.abandon();
        memory.put_back(&self.unacknowledged);
        self.unacknowledged.clear();
        self.open = None;
    }

    fn unacknowledged_in(&mut self, tag: Tag) -> &mut PageSet {
        if self.open != Some(tag) {
            self.open = Some(tag);
            self.unacknowledged.clear();
        }
        &mut self.unacknowledged
    }

    /// Takes the courier's next step, if it has any errand.
    pub(crate) fn step(&mut self, memory: &mut Memory, seed: u64) -> Option<Step> {
        let errand = self.errands.front_mut()?;
        if let Some(batch) = self.batches.pop_front() {
            return Some(Step::SendPages(batch));
        }
        match errand {
            Errand::Ahead { tag, begun, .. } => {
                let tag = *tag;
                if !core::mem::replace(begun, true) {
                    self.encoding.begin(tag);
                    self.before = self.encoding.sums();
                }
                loop {
                    let few = self.read(memory);
                    if few.is_empty() {
                        break;
                    }
                    let few = few.iter().map(|(page, content)| (*page, content));
                    encode(&mut self.encoding, few, &mut self.batches);
                    // Pages that are as in the base are in none.
                    if let Some(batch) = self.batches.pop_front() {
                        return Some(Step::SendPages(batch));
                    }
                }
                self.errands.pop_front();
                let sums = self.encoding.sums();
                Some(Step::ShippedAhead(AheadShipment {
                    tag,
                    pages: sums.pages() - self.before.pages(),
                    bytes: sums.bytes() - self.before.bytes(),
                    took: checkpoint::Duration(0),
                }))
            }
            Errand::Parcel(parcel) => {
                if !core::mem::replace(&mut parcel.begun, true) {
                    self.encoding.begin(parcel.totals.tag());
                    self.before = self.encoding.sums();
                    if self
                        .encoding
                        .compare(parcel.pages.len(), parcel.asks, Some(QUESTION_PAGES))
                    {
                        return Some(Step::CompareAsked(parcel.totals.tag()));
                    }
                }
                loop {
                    match self.encoding.next_step() {
                        Next::Ask => {
                            let mut full = [0; 32];
                            full[..8].copy_from_slice(&seed.to_le_bytes());
                            let page = |place: usize| (parcel.pages[place].0, page_of(&parcel.pages[place].1));
                            if let Some(hashes) = self.encoding.question(parcel.totals.tag(), full, page) {
                                return Some(Step::Hashed(hashes));
                            }
                        }
                        Next::Encode(places) => {
                            let few = parcel.pages[places].iter().map(|(page, content)| (*page, content));
                            encode(&mut self.encoding, few, &mut self.batches);
                            if let Some(batch) = self.batches.pop_front() {
                                return Some(Step::SendPages(batch));
                            }
                        }
                        Next::Wait => {
                            parcel.waits = true;
                            return None;
                        }
                        Next::Done => break,
                    }
                }
                if let Some(message) = parcel.rest.pop_front() {
                    return Some(Step::Send(message));
                }
                let Some(Errand::Parcel(mut parcel)) = self.errands.pop_front() else {
                    unreachable!("just seen")
                };
                let sums = self.encoding.sums();
                parcel.totals.add_pages(&sums);
                let sent = sums.pages() - self.before.pages();
                Some(Step::Sent(shipment(parcel.totals, sent, parcel.entropy)))
            }
        }
    }

    /// Tells whether the courier has something to do.
    pub(crate) fn is_busy(&self) -> bool {
        match self.errands.front() {
            None => false,
            Some(Errand::Ahead { .. }) => true,
            Some(Errand::Parcel(parcel)) => !parcel.waits,
        }
    }

    /// The secondary's guest stands.
    pub(crate) fn halted(&mut self, tag: Tag) {
        if let Some(parcel) = self.parcel(tag) {
            parcel.waits = false;
            self.encoding.halted();
        }
    }

    /// Takes the secondary's answer.
    pub(crate) fn answered(&mut self, matches: &PageMatches) {
        if let Some(parcel) = self.parcel(matches.tag) {
            parcel.waits = false;
            self.encoding.answered(matches, checkpoint::Duration(0));
        }
    }

    fn parcel(&mut self, tag: Tag) -> Option<&mut Parcel> {
        match self.errands.front_mut() {
            Some(Errand::Parcel(parcel)) if parcel.totals.tag() == tag => Some(parcel),
            _ => None,
        }
    }

    /// Reads some of the pages that are to be shipped ahead, as they are now.
    fn read(&mut self, memory: &mut Memory) -> Vec<(u64, Copied)> {
        let count = self.unread.len().min(BATCH_PAGES);
        let read = |(page, before): (u64, Option<Copied>)| {
            if before.is_some() {
                let mut one = PageSet::new(PAGES);
                one.insert(page);
                memory.clear_dirty(&one);
            }
            (page, before.unwrap_or_else(|| Arc::clone(&memory.pages[index(page)])))
        };
        self.unread.drain(..count).map(read).collect()
    }
}

/// Encodes a few pages into a batch a stream.
fn encode<'a>(
    encoding: &mut Encoding,
    pages: impl Iterator<Item = (u64, &'a Copied)>,
    batches: &mut VecDeque<Streamed>,
) {
    for (page, content) in pages {
        let full = encoding.lane_of(page).1.push(page, page_of(content));
        assert!(!full, "a few pages fit");
    }
    for (stream, lane) in encoding.lanes().iter_mut().enumerate() {
        batches.extend(lane.finish().map(|batch| (stream, batch)));
    }
}

fn page_of(content: &Copied) -> &Page {
    content.as_slice().try_into().expect("a page")
}

fn shipment(totals: Totals, pages: u64, entropy: [u8; 32]) -> Shipment {
    Shipment {
        totals,
        pages,
        bytes: 0,
        entropy,
    }
}

/// The secondary's side: pages that wait for the load.
#[derive(Default)]
pub(crate) struct Stage {
    decoder: BatchDecoder,
    pages: BTreeMap<u64, Copied>,
    /// Pages that the guest, which stands, was found to have as the primary has them.
    alike: BTreeSet<u64>,
    /// Under a mutant: pages whose content is looked for at the load.
    late: Vec<u64>,
}

impl Stage {
    /// Compares pages with the guest's.
    pub(crate) fn compare(&mut self, hashes: &PageHashes, own: &Memory) -> PageMatches {
        let answer = hashes.answer(|page, content| {
            content.copy_from_slice(&own.pages[index(page)]);
            Ok::<_, core::convert::Infallible>(())
        });
        let Ok(matches) = answer;
        let alike = hashes.pages.iter().zip(&matches.alike);
        self.alike
            .extend(alike.filter_map(|((page, _), alike)| alike.then_some(*page)));
        matches
    }

    /// Keeps the pages of a batch, which may build on `committed`.
    pub(crate) fn put(
        &mut self,
        (stream, streams): (usize, usize),
        batch: &PageBatch,
        base: Option<Epoch>,
        committed: &[Copied],
        own: &Memory,
    ) {
        let expected = Expected {
            count: batch.count,
            pages: PAGES,
            base,
        };
        let (staged, alike, late) = (&mut self.pages, &self.alike, &mut self.late);
        let read = |page, content: &mut Page| {
            content.copy_from_slice(&committed[index(page)]);
            Ok(())
        };
        let decoded = self
            .decoder
            .decode::<PageError>(&batch.encoded, &expected, read, |page, content| {
                assert_eq!(
                    stream_of(page, streams),
                    stream,
                    "rule 3: a page takes two streams, which have no order"
                );
                match content {
                    Content::Page(content) => drop(staged.insert(page, Arc::new(content.to_vec()))),
                    Content::Unchanged => drop(staged.remove(&page)),
                    Content::Own => {
                        assert!(alike.contains(&page), "rule 3: a page is said to be alike, and is not");
                        if mutants::on(Mutant::CopyAfterRevert) {
                            late.push(page);
                        } else {
                            staged.insert(page, Arc::clone(&own.pages[index(page)]));
                        }
                    }
                }
                Ok(())
            });
        decoded.expect("rule 3: the primary builds on what the secondary has committed");
    }

    /// Takes the pages whose content is looked for at the load.
    pub(crate) fn take_late(&mut self) -> Vec<u64> {
        core::mem::take(&mut self.late)
    }

    /// Takes what is staged, the last of each page.
    pub(crate) fn take(&mut self) -> BTreeMap<u64, Copied> {
        self.alike.clear();
        self.late.clear();
        core::mem::take(&mut self.pages)
    }
}
