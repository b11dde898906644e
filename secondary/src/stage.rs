//! The threads that keep a checkpoint's pages until its load, one for each page stream.
//!
//! ```text
//!   loop ──Apply, Stage, Drop──► stager k: decode, keep ──Take──► VM's thread: check, load
//!     VM's thread ──Begin, Alike, Committed──┘
//! ```
//!
//! No page takes two streams, so what they keep has no page in common, and they work side by side without a lock. During the
//! initial sync they write into the committed image instead: no VM runs on it then. Never decides, and never touches the VM.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::mpsc;

use checkpoint::Epoch;
use checkpoint::pages::{BatchDecoder, Content, Expected, Page, PageError, stream_of};
use checkpoint::wire::PageBatch;
use link::describe;
use link::mailbox;
use link::pages::Held;
use link::worker::{Inbox, Orders, Worker};
use machine::{GuestRam, MemoryError};

use crate::event::Event;

/// What a stager is told.
enum Order {
    /// These pages will be copied from the VM, which stands: it has them as the primary has.
    Alike(Vec<u64>),
    Apply(PageBatch, Held),
    /// A sync begins: go on once the image is ready for it.
    Begin(mpsc::Receiver<()>),
    /// That epoch is what the committed image holds.
    Committed(Epoch),
    Drop,
    Stage(PageBatch, Held),
    Take(mpsc::Sender<Staged>),
}

/// Pages of one stream, and the last content that came of each.
#[derive(Default)]
pub(crate) struct Staged {
    pub(crate) pages: Vec<u64>,
    pub(crate) content: Vec<u8>,
    /// Where each page is in both.
    places: BTreeMap<u64, usize>,
    /// Pages that are as the VM has them, which stands until the load takes them from there; none of those above.
    pub(crate) own: BTreeSet<u64>,
}

/// The threads.
pub(crate) struct Stagers(Vec<Worker<Order>>);

/// A way to give them orders.
#[derive(Clone)]
pub(crate) struct StagerOrders(Vec<Orders<Order>>);

impl Stagers {
    /// Starts one for each of so many streams.
    pub(crate) fn spawn(streams: usize, ram: &GuestRam, events: &mailbox::Sender<Event>) -> std::io::Result<Self> {
        let spawn = |stream| {
            let stager = Stager {
                stream,
                streams,
                ram: ram.clone(),
                events: events.clone(),
                decoder: BatchDecoder::default(),
                committed: None,
                staged: Staged::default(),
                alike: BTreeSet::new(),
                failed: false,
            };
            Worker::spawn(&format!("stage-{stream}"), move |inbox| stager.run(&inbox))
        };
        (0..streams).map(spawn).collect::<std::io::Result<_>>().map(Self)
    }

    /// Writes pages into the committed image.
    pub(crate) fn apply(&self, stream: usize, batch: PageBatch, room: Held) {
        self.0[stream].send(Order::Apply(batch, room));
    }

    /// Keeps pages for the load.
    pub(crate) fn stage(&self, stream: usize, batch: PageBatch, room: Held) {
        self.0[stream].send(Order::Stage(batch, room));
    }

    /// Forgets what is staged.
    pub(crate) fn drop_staged(&self) {
        self.0.iter().for_each(|stager| stager.send(Order::Drop));
    }

    /// Lets pages wait from here on until the image is ready for the sync: until something is sent on each of these.
    pub(crate) fn begin(&self) -> Vec<mpsc::Sender<()>> {
        let begin = |stager: &Worker<Order>| {
            let (ready, wait) = mpsc::channel();
            stager.send(Order::Begin(wait));
            ready
        };
        self.0.iter().map(begin).collect()
    }

    pub(crate) fn orders(&self) -> StagerOrders {
        StagerOrders(self.0.iter().map(Worker::orders).collect())
    }

    /// Waits until all orders given so far are done: nothing is written after this.
    pub(crate) fn join(self) {
        for stager in self.0 {
            stager.join();
        }
    }
}

impl StagerOrders {
    /// Tells which pages of the stopped VM are as the primary's.
    pub(crate) fn alike(&self, pages: impl Iterator<Item = u64>) {
        let mut alike = vec![Vec::new(); self.0.len()];
        for page in pages {
            alike[stream_of(page, self.0.len())].push(page);
        }
        for (stager, pages) in self.0.iter().zip(alike).filter(|(_, pages)| !pages.is_empty()) {
            stager.send(Order::Alike(pages));
        }
    }

    /// The image holds that epoch.
    pub(crate) fn committed(&self, epoch: Epoch) {
        self.0.iter().for_each(|stager| stager.send(Order::Committed(epoch)));
    }

    /// Takes what is staged of all streams, once all of it is; nothing if some could not be.
    pub(crate) fn take(&self) -> Option<Vec<Staged>> {
        let take = |stager: &Orders<Order>| {
            let (reply, staged) = mpsc::channel();
            stager.send(Order::Take(reply));
            staged
        };
        let all: Vec<_> = self.0.iter().map(take).collect();
        all.into_iter().map(|staged| staged.recv().ok()).collect()
    }
}

struct Stager {
    stream: usize,
    streams: usize,
    ram: GuestRam,
    events: mailbox::Sender<Event>,
    decoder: BatchDecoder,
    /// The epoch that the committed image holds, once one was loaded in this pairing.
    committed: Option<Epoch>,
    staged: Staged,
    /// Pages that the stopped VM was found to have as the primary has them.
    alike: BTreeSet<u64>,
    /// Something could not be staged, which has been told.
    failed: bool,
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
    #[error("page {page} came on page stream {stream}, and is not one of its pages")]
    Stream { page: u64, stream: usize },
}

impl Stager {
    fn run(mut self, inbox: &Inbox<Order>) {
        while let Some(order) = inbox.next() {
            let done = match order {
                Order::Apply(..) | Order::Stage(..) if self.failed => Ok(()),
                Order::Apply(batch, room) => {
                    let done = self.apply(&batch);
                    // Not given back before it is where it belongs.
                    drop(room);
                    done
                }
                Order::Stage(batch, room) => {
                    let done = self.stage(&batch);
                    drop(room);
                    done
                }
                order => {
                    self.obey(order);
                    Ok(())
                }
            };
            if let Err(error) = done {
                self.failed = true;
                let reason = format!("a page can't be staged: {}", describe(&error));
                self.events.send(Event::StageFailed(reason));
            }
        }
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Alike(pages) => self.alike.extend(pages),
            Order::Begin(ready) => {
                self.clear();
                self.committed = None;
                // If it never will be, that has been told.
                self.failed = ready.recv().is_err();
            }
            Order::Committed(epoch) => self.committed = Some(epoch),
            Order::Drop => self.clear(),
            Order::Take(reply) if !self.failed => {
                let staged = core::mem::take(&mut self.staged);
                self.clear();
                // Nobody waits for it any more if the role has ended.
                let _ = reply.send(staged);
            }
            // The answer is that there is none.
            Order::Take(_) => {}
            Order::Apply(..) | Order::Stage(..) => unreachable!("done before"),
        }
    }

    fn clear(&mut self) {
        self.staged = Staged::default();
        self.alike.clear();
    }

    fn apply(&mut self, batch: &PageBatch) -> Result<(), StageError> {
        self.decode(batch, None, |_, ram, _, page, content| match content {
            Content::Page(content) => Ok(ram.write_committed(page, content)?),
            // Without a base there is nothing else.
            Content::Unchanged | Content::Own => Err(StageError::NotAlike(page)),
        })
    }

    fn stage(&mut self, batch: &PageBatch) -> Result<(), StageError> {
        self.decode(batch, self.committed, Staged::put)
    }

    fn decode(
        &mut self,
        batch: &PageBatch,
        base: Option<Epoch>,
        mut put: impl FnMut(&mut Staged, &GuestRam, &BTreeSet<u64>, u64, Content<'_>) -> Result<(), StageError>,
    ) -> Result<(), StageError> {
        let Self {
            stream,
            streams,
            ram,
            decoder,
            staged,
            alike,
            ..
        } = self;
        let expected = Expected {
            count: batch.count,
            pages: ram.pages(),
            base,
        };
        decoder.decode(
            &batch.encoded,
            &expected,
            |page, content| Ok(ram.read_committed(page, content)?),
            |page, content| {
                check_stream(page, *stream, *streams)?;
                put(staged, ram, alike, page, content)
            },
        )
    }
}

fn check_stream(page: u64, stream: usize, streams: usize) -> Result<(), StageError> {
    if stream_of(page, streams) == stream {
        Ok(())
    } else {
        Err(StageError::Stream { page, stream })
    }
}

impl Staged {
    fn put(
        &mut self,
        ram: &GuestRam,
        alike: &BTreeSet<u64>,
        page: u64,
        content: Content<'_>,
    ) -> Result<(), StageError> {
        let place = self.places.get(&page).copied();
        let staged = place.map(|place| &mut self.content.as_chunks_mut().0[place]);
        match (content, staged) {
            (Content::Page(bytes), Some(staged)) => *staged = *bytes,
            (Content::Page(bytes), None) => self.add(page, bytes),
            (Content::Own, _) if !alike.contains(&page) => return Err(StageError::NotAlike(page)),
            // What came of it before goes into the image at the load, where the VM may see it: it is replaced.
            (Content::Own, Some(staged)) => ram.read_page(page, staged)?,
            (Content::Own, None) => drop(self.own.insert(page)),
            (Content::Unchanged, Some(staged)) => ram.read_committed(page, staged)?,
            (Content::Unchanged, None) => drop(self.own.remove(&page)),
        }
        Ok(())
    }

    fn add(&mut self, page: u64, content: &Page) {
        self.own.remove(&page);
        self.places.insert(page, self.pages.len());
        self.pages.push(page);
        self.content.extend_from_slice(content);
    }
}

#[cfg(test)]
mod tests {
    use checkpoint::limits::PAGE_BYTES;
    use machine::Mapping;

    use super::*;

    const VMS: Page = [7; PAGE_BYTES];
    const SENT: Page = [1; PAGE_BYTES];

    /// Puts these into a stage, one after the other, for page 3, which the VM has as [`VMS`].
    fn staged(contents: &[Content<'_>]) -> Staged {
        let ram = GuestRam::new(64 << 20, Mapping::Private).unwrap();
        ram.write_committed(3, &VMS).unwrap();
        let mut staged = Staged::default();
        for content in contents {
            staged.put(&ram, &BTreeSet::from([3]), 3, *content).unwrap();
        }
        staged
    }

    #[test]
    fn the_last_that_came_of_a_page_counts() {
        let page = Content::Page(&SENT);
        for (contents, copied, own) in [
            (vec![page], Some(SENT), false),
            (vec![Content::Own], None, true),
            (vec![page, Content::Own], Some(VMS), false),
            (vec![Content::Own, page], Some(SENT), false),
            (vec![Content::Own, Content::Unchanged], None, false),
            (vec![page, Content::Unchanged], Some(VMS), false),
        ] {
            let staged = staged(&contents);
            let content = copied.map_or_else(Vec::new, |copied| copied.to_vec());
            assert_eq!(
                (staged.content, staged.own.contains(&3)),
                (content, own),
                "{contents:?}"
            );
        }
    }

    #[test]
    fn a_page_that_was_not_found_alike_is_not_taken_from_the_vm() {
        let ram = GuestRam::new(64 << 20, Mapping::Private).unwrap();
        let error = Staged::default()
            .put(&ram, &BTreeSet::from([3]), 4, Content::Own)
            .unwrap_err();
        assert!(matches!(error, StageError::NotAlike(4)));
    }
}
