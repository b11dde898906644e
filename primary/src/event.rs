//! What the primary's protocol hears and what it orders.

use bytes::Bytes;
use checkpoint::pages::identical::{PageHashes, PageMatches};
use checkpoint::pair::{Delivery, RecordUpdate, Report, WitnessAnswer};
use checkpoint::staging::Totals;
use checkpoint::wire::{BlockHashes, GoodbyeReason, Message, Welcome, Written};
use checkpoint::{Duration, Generation, Instant, Nic, Tag};
use smallvec::SmallVec;

/// Something happened.
///
/// Events of the machine (`GuestSent`, `InputConsumed`, `GuestWrote`, `Paused`) arrive in the order in
/// which they happened: what comes before `Paused` belongs to the epoch that it ends.
#[derive(Clone, Debug)]
pub enum Event {
    /// The operator asks for a checkpoint.
    CheckpointAsked,
    /// Pages of the checkpoint that ends this epoch are to be compared with the secondary's; comes after its `Copied`.
    CompareAsked(Tag),
    /// Everything of that checkpoint but the network state and the end mark is queued, its pages on the page streams.
    CheckpointSent(Shipment),
    /// A secondary accepted the handshake.
    Connected(Welcome),
    /// What the checkpoint that ends this epoch ships of the VM has been copied: the VM may run on.
    Copied {
        /// The epoch.
        tag: Tag,
        /// Pages that were dirty at the stop.
        pages: u64,
        /// Fresh seed for the entropy device of the next epoch; the end mark has the same.
        entropy: [u8; 32],
    },
    /// The secondary's disk has been compared, or its difference read, and the blocks it lacks are queued.
    DiskSynced(Generation),
    /// A frame came from the clients, at the TAP of that card.
    FrameArrived(Nic, Bytes),
    /// The guest sent a frame on that card.
    GuestSent(Nic, Bytes),
    /// The guest ended by itself; its VM is stopped.
    GuestStopped(GuestEnd),
    /// The guest wrote to its disk, and this host's image has it.
    GuestWrote {
        /// First byte on the disk.
        offset: u64,
        /// What is there now.
        written: Written,
    },
    /// A frame is on the guest's receive ring.
    InputConsumed(Delivery),
    /// A connection to the secondary is gone, and with it all of them; every complete message before has been delivered.
    LinkClosed(String),
    /// The dirty pages have been looked at; if some are shipped ahead, `ShippedAhead` follows.
    Looked(Look),
    /// Memory, or its difference, is queued on the page streams.
    MemorySynced(Shipment),
    /// The hashes of pages of a checkpoint: which of them the secondary has alike is to be asked.
    Hashed(PageHashes),
    /// The VM is stopped and its devices are quiet.
    Paused,
    /// The secondary said something.
    PeerSent(Message),
    /// That record is durable.
    RecordStored(RecordUpdate),
    /// Pages are queued on the page streams ahead of the stop; less than was said if a stop came first.
    ShippedAhead(AheadShipment),
    /// The operator asks for an orderly end.
    StopAsked,
    /// The deadline has passed.
    Timeout,
    /// A machine operation failed; the VM can't go on.
    VmFailed(String),
    /// The witness answered a claim.
    WitnessAnswered(Generation, WitnessAnswer),
}

/// How a guest ended by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestEnd {
    /// It powered off.
    PowerOff,
    /// It wants to start again.
    Reset,
    /// It panicked or its CPU can't go on; the text says why.
    Crashed(String),
}

/// What a look at the dirty pages found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Look {
    /// The epoch that the guest ran in.
    pub tag: Tag,
    /// Pages that were dirty, and stay so.
    pub dirty: u64,
    /// Pages that are shipped ahead: they count as clean from now on.
    pub ahead: u64,
    /// How long it took.
    pub took: Duration,
}

/// What the shell queued ahead of a stop, in one round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AheadShipment {
    /// The epoch whose checkpoint it is part of.
    pub tag: Tag,
    /// Pages queued.
    pub pages: u64,
    /// Their encoded bytes.
    pub bytes: u64,
    /// How long it took.
    pub took: Duration,
}

/// What the shell queued for a checkpoint or for the memory part of the initial sync.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shipment {
    /// The sums that came with the order, continued over what was queued.
    pub totals: Totals,
    /// Pages queued by this order.
    pub pages: u64,
    /// Their encoded bytes.
    pub bytes: u64,
    /// Fresh seed for the entropy device of the next epoch.
    pub entropy: [u8; 32],
}

/// Something is to be done. Actions of one step are carried out in their order.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Ask the witness for a term; answered by `WitnessAnswered`.
    Claim(Generation),
    /// The secondary's VM stands for this epoch: its pages may be asked about, by `Hashed`, or not.
    AskAlike(Tag),
    /// Close all connections; `LinkClosed` follows after what was still in them.
    CloseLink,
    /// Compare these blocks with the own image and send the differing ones; after the last one, `DiskSynced`.
    CompareBlocks(BlockHashes),
    /// Put a frame in front of the guest's network card.
    Deliver(Delivery),
    /// The secondary has these pages alike: the answer to `Hashed`.
    Alike(PageMatches),
    /// Look for a secondary, from now on and until `Connected`.
    Dial,
    /// The run is over; nothing follows.
    End(Outcome),
    /// Stop (or go on) reading frames from the clients, on all cards.
    HoldInput(bool),
    /// The dirty pages of the abandoned sync or checkpoint, those shipped ahead included, belong to the next one.
    KeepDirty,
    /// Stop the VM; answered by `Paused`.
    PauseVm,
    /// Tell the operator.
    Report(Report),
    /// Mix fresh host entropy into the stopped guest.
    Reseed,
    /// Let the VM run.
    ResumeVm,
    /// Queue a message on the data connection.
    Send(Message),
    /// Read these blocks of the own image and queue them as `SyncBlock`s; after the last one, `DiskSynced`.
    SendBlocks {
        /// The epoch of the sync.
        tag: Tag,
        /// Their indexes.
        blocks: Vec<u64>,
    },
    /// Copy the dirty pages and the device state, answered by `Copied`; then queue them and these disk blocks, answered by
    /// `CheckpointSent`. Pages may be compared with the secondary's first: `CompareAsked` and what follows.
    SendCheckpoint {
        /// The epoch that it ends.
        tag: Tag,
        /// Indexes of the disk blocks that changed since the sync began; empty once protected.
        blocks: Vec<u64>,
        /// The sums so far: what the shell queues is added to them.
        totals: Totals,
        /// The secondary's guest has run in this epoch, too: pages may be compared.
        both_ran: bool,
    },
    /// Send a message on the control connection.
    SendControl(Message),
    /// Let the entropy device draw from this seed, or from the host.
    SeedEntropy(Option<[u8; 32]>),
    /// Write the record beside the image, durably; answered by `RecordStored`.
    StoreRecord(RecordUpdate),
    /// Look at the dirty pages while the VM runs, answered by `Looked`. Up to so many of those that have gone quiet count as clean from
    /// then on, are read after that, and are queued as part of the checkpoint that will end this epoch, unless they are dirty again
    /// at its stop: answered by `ShippedAhead`. What was not read when the VM stops is part of what is copied then.
    ShipAhead {
        /// The running epoch.
        tag: Tag,
        /// How many.
        pages: u64,
    },
    /// Queue memory while the VM runs; answered by `MemorySynced`.
    SyncMemory {
        /// The sums of the checkpoint that the sync is part of.
        totals: Totals,
        /// Only what is dirty, instead of all of it.
        difference: bool,
    },
    /// Let frames leave to the clients, unless `not_after` has passed when they are written.
    Transmit {
        /// By the TAP of that card.
        nic: Nic,
        /// The frames, in order: mostly one.
        frames: SmallVec<[Bytes; 1]>,
        /// Last moment at which this side is known to be entitled to let them leave.
        not_after: Option<Instant>,
    },
}

/// How a run as primary ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// In order, for this reason.
    Ended(GoodbyeReason),
    /// The other side owns the VM; the reason.
    Fenced(String),
    /// This side can't go on.
    Failed(String),
}
