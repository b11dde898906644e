//! What the secondary's protocol hears and what it orders.

use core::fmt;

use bytes::Bytes;
use checkpoint::pages::identical::{PageHashes, PageMatches};
use checkpoint::pair::{Delivery, RecordUpdate, Report, WitnessAnswer};
use checkpoint::wire::{Begin, DeviceState, DiskWrite, GoodbyeReason, Message, PageBatch};
use checkpoint::{Epoch, Generation, Nic, Tag};
use proxy::Pictures;

/// Something happened.
///
/// `GuestSent` and `InputConsumed` arrive in the order in which they happened, and before the `Paused`
/// or `Loaded` that stopped the VM after them.
#[derive(Clone, Debug)]
pub enum Event {
    /// Everything that could fail at the load of that checkpoint has been tried.
    Checked(Tag, Result<(), String>),
    /// Which pages of the stopped VM are those that the primary asked about.
    Compared(PageMatches),
    /// So many pages the guest has written in that epoch.
    Counted(Tag, u64),
    /// The control connection is gone.
    ControlClosed(LinkEnd),
    /// The data connection is gone; every complete message before has been delivered.
    DataClosed(LinkEnd),
    /// The disk writes up to this epoch are durable in the base image.
    DiskCommitted(Epoch),
    /// The guest sent a frame on that card.
    GuestSent(Nic, Bytes),
    /// The guest ended by itself; its VM is stopped.
    GuestStopped(String),
    /// A frame is on the guest's receive ring.
    InputConsumed(Delivery),
    /// The checkpoint is the VM's state; the VM is stopped.
    Loaded(Tag),
    /// The overlay or the stage is near its limit.
    NearLimit,
    /// All that was sent on the data connection is on its way. Said when [`Secondary::awaits_drain`] tells that it matters.
    ///
    /// [`Secondary::awaits_drain`]: crate::protocol::Secondary::awaits_drain
    OutputDrained,
    /// Pages came on this page stream. Not said before `Secondary::takes_pages`.
    PagesArrived(usize, PageBatch),
    /// A page stream is gone; every complete message before has been delivered, or never will be.
    PagesClosed(LinkEnd),
    /// The VM is stopped and its devices are quiet.
    Paused,
    /// The primary said something.
    PeerSent(Message),
    /// That record is durable.
    RecordStored(RecordUpdate),
    /// Something that the primary sent can't be staged.
    StageFailed(String),
    /// The operator asks for an orderly end.
    StopAsked,
    /// The operator says that the old primary is off for good.
    TakeOverAsked,
    /// The deadline has passed.
    Timeout,
    /// A machine or disk operation failed after which this side can't go on.
    VmFailed(String),
    /// The witness answered a claim.
    WitnessAnswered(Generation, WitnessAnswer),
}

/// How a connection ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkEnd {
    /// The primary's kernel ended it in order. A primary does that when it dies, or stops its output first.
    PeerEnded,
    /// In any other way: the primary may live, and believe in its lease.
    Broken(String),
}

impl fmt::Display for LinkEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PeerEnded => f.write_str("it ended the connection"),
            Self::Broken(cause) => f.write_str(cause),
        }
    }
}

/// Something is to be done. Actions of one step are carried out in their order.
#[derive(Debug)]
pub enum Action {
    /// Write these pages, which came on that stream, into the committed image at once: no VM runs on it yet.
    ApplyPages(usize, PageBatch),
    /// Write to the base image at once: it is being synced.
    ApplyWrite(DiskWrite),
    /// Try everything that could fail at the load of the staged checkpoint; answered by `Checked`.
    Check(Tag),
    /// Make memory and disk ready for what is sent: what is not built on is forgotten or compared. The hashes of all
    /// blocks of the disk are queued as `BlockHashes` unless the disk is built on.
    BeginSync(Begin),
    /// Ask the witness for a term; answered by `WitnessAnswered`.
    Claim(Generation),
    /// Close all connections; `ControlClosed`, `DataClosed` and `PagesClosed` follow after what was still in them.
    CloseLink,
    /// The VM is stopped: make the writes up to this epoch the disk, drop the overlay; answered by
    /// `DiskCommitted` when that is durable.
    CommitDisk(Epoch),
    /// Compare these pages with those of the VM, which is stopped; answered by `Compared`.
    Compare(PageHashes),
    /// Count the pages that the guest has written; answered by `Counted`.
    CountOwn(Tag),
    /// Put a frame in front of the guest's network card.
    Deliver(Delivery),
    /// Forget the frames that the guest has not yet received.
    DropDeliveries,
    /// Forget the staged pages, devices and writes of an epoch that was not committed.
    DropStage,
    /// The run is over; nothing follows.
    End(Outcome),
    /// Let the guest's network cards take no more frames from it, or go on: what the guest has queued stays in its memory.
    HoldOutput(bool),
    /// Stop the VM if it runs, apply the staged checkpoint, restore the devices; answered by `Loaded`.
    Load(Tag),
    /// Stop the VM; answered by `Paused`.
    PauseVm,
    /// Tell the operator.
    Report(Report),
    /// Let the VM run.
    ResumeVm,
    /// Queue a message on the data connection.
    Send(Message),
    /// Send a message on the control connection.
    SendControl(Message),
    /// Let the entropy device draw from this seed.
    SeedEntropy([u8; 32]),
    /// Keep the devices' state for the load.
    StageDevices(DeviceState),
    /// Keep these pages, which came on that stream, for the load.
    StagePages(usize, PageBatch),
    /// Keep this write for the commit.
    StageWrite(DiskWrite),
    /// Write the record beside the image, durably; answered by `RecordStored`.
    StoreRecord(RecordUpdate),
}

/// How a run as secondary ended.
#[derive(Debug)]
pub enum Outcome {
    /// In order, for this reason.
    Ended(GoodbyeReason),
    /// The other side owns the VM. This one waits for it, and still has a whole checkpoint.
    Fenced {
        /// Who owns it.
        reason: String,
        /// The checkpoint whose memory is in the committed image.
        memory: Tag,
    },
    /// This side can't go on.
    Failed(String),
    /// This side owns the VM; boxed for its size.
    TakenOver(Box<TakenOver>),
    /// The primary was lost before this side held a complete state; it may wait for another.
    Unpaired {
        /// How it was lost.
        reason: String,
        /// The checkpoint of an earlier pairing whose memory is still in the committed image.
        memory: Option<Tag>,
    },
}

/// What a side that took over goes on with.
#[derive(Debug)]
pub struct TakenOver {
    /// The generation that it owns, won and recorded.
    pub generation: Generation,
    /// The epoch that its guest ran in.
    pub last_epoch: Epoch,
    /// Translation offsets and learned addresses.
    pub network: Pictures,
    /// Frames that the guest has not yet received, in order, beside those that the shell still holds.
    pub inputs: Vec<Delivery>,
    /// Frames to be sent first, and by which card: the last TCP segments of the epoch, and what the guest sent since the peer
    /// was lost.
    pub outputs: Vec<(Nic, Bytes)>,
}
