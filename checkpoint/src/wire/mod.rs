//! What the two hosts say to each other.
//!
//! TCP connections, all opened by the primary: *control* (handshake, heartbeats, goodbye), one to eight *page streams*,
//! and *data* (everything else, in order). Every message is a fixed header and a body, each with its own
//! checksum. Nothing a peer sends is trusted to be well-formed.
//!
//! Protocol versions: 1 — the first; 2 — `Welcome` tells what the secondary still holds, `Begin` what the sync builds on;
//! 3 — `End` tells whether the secondary's guest runs in the next epoch; `Halt`, `Halted`, `PageHashes` and `PageMatches`
//! compare pages before they are sent; 4 — pages travel on streams of their own: `Hello` and `Welcome` agree on their number,
//! `Attach` says which connection it is, `End` has the sums of each; 5 — the network's state has clocks of TCP connections;
//! 6 — `Input`, `Output` and the network's state name the network card; 7 — a frame has a header that says what is left to do on it;
//! 8 — `Hello` and `Welcome` agree on the VM's CPU; 9 — `Write` and `SyncBlock` can be zeros without a body.

pub mod codec;
pub mod decoder;
pub mod header;
mod reasons;
mod sums;

use bytes::Bytes;
use rkyv::{Archive, Deserialize, Serialize};

pub use codec::{Encoded, WireError, decode, encode, encode_into};
pub use decoder::{Decoder, take_body};
pub use header::{HEADER_BYTES, Header};
pub use reasons::{GoodbyeReason, Refusal};
pub use sums::{PageBatch, PageSum, PageSums};

use crate::cpu::CpuModel;
use crate::epoch::{Epoch, EpochMode, Generation, InputNumber, Tag};
use crate::nic::Nic;
#[cfg(test)]
use crate::pages::identical::PageHash;
use crate::pages::identical::{PageHashes, PageMatches};
use crate::time::Instant;

/// The protocol version that this build speaks. Both sides must speak the same.
pub const PROTOCOL_VERSION: u16 = 9;

/// One message of either connection.
#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    /// Primary, first on the control connection: who I am and what machine I bring.
    Hello(Hello),
    /// Secondary's answer: we fit.
    Welcome(Welcome),
    /// Either: we do not fit; the connection ends.
    Refuse(Refusal),
    /// Primary, first on the data connection and on each page stream: this belongs to the session of that `Welcome`.
    Attach(Attach),
    /// Either, control: I live. Sent every eighth of the takeover limit; the secondary also answers each at once.
    Heartbeat(Heartbeat),
    /// Either, control: I end in order; this is no failure.
    Goodbye(GoodbyeReason),

    /// Primary: the witness's term for this pairing; the initial sync begins.
    Begin(Begin),
    /// Secondary, during the initial sync: hashes of its disk's blocks, in order, from `first` on.
    BlockHashes(BlockHashes),
    /// Primary, during the initial sync: a block that differed. Written at once.
    SyncBlock(DiskWrite),

    /// Primary: a frame its device put on the guest's receive ring.
    Input(Input),
    /// Primary: a disk write of its guest.
    Write(DiskWrite),
    /// Primary, on a page stream: encoded pages of a checkpoint (or of the initial sync, which are applied at once).
    Pages(PageBatch),
    /// Primary: the devices' and vCPUs' state at the stop.
    DeviceState(DeviceState),
    /// Primary: translation offsets and learned addresses at the stop, encoded by the proxy.
    NetworkState(NetworkState),
    /// Primary: the checkpoint is complete if all of this holds.
    End(Box<EndMark>),
    /// Primary: its VM has stopped for this epoch, and the secondary's is to stop, too: pages will be compared.
    Halt(Tag),
    /// Primary, after `Halted`: which of these pages does your VM have alike?
    PageHashes(PageHashes),

    /// Secondary: a frame its guest sent.
    Output(Output),
    /// Secondary: every input up to this number is held by this host.
    Confirm(Tag, InputNumber),
    /// Secondary: one of my queues is near its limit; take a checkpoint.
    Want(Tag),
    /// Secondary: the checkpoint that ends this epoch is committed. Irrevocable.
    Acknowledge(Tag),
    /// Secondary: that checkpoint is loaded and its VM runs again.
    Loaded(Tag),
    /// Secondary: that checkpoint's disk writes are durable here.
    Committed(Tag),
    /// Secondary: its VM has stopped for this epoch, and stands until the checkpoint is loaded.
    Halted(Tag),
    /// Secondary: the answer to `PageHashes`.
    PageMatches(PageMatches),
}

/// A sign of life, and the proof of an earlier one (see `liveness`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Heartbeat {
    /// When it was sent, by the sender's clock.
    pub sent: Instant,
    /// The newest `sent` that the sender has received, by the receiver's clock; 0 if none.
    pub echo: Instant,
}

/// Random number that ties a pair's other connections to its control connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Archive, Serialize, Deserialize)]
pub struct Session(pub u128);

/// What a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attach {
    /// The session of the control connection that it belongs to.
    pub session: Session,
    /// The page stream that it is, from 0 on; without one it is the data connection.
    pub stream: Option<usize>,
}

/// The machine as both hosts must build it.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct MachineShape {
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// Number of virtual CPUs.
    pub vcpus: u32,
    /// The devices in bus order, each `name` or `name=parameter` (`net=52:54:00:00:00:01`).
    pub devices: Vec<String>,
    /// Size of the disk image in bytes.
    pub disk_bytes: u64,
    /// The primary's: the VM's CPU. The secondary's: what its host can give.
    pub cpu: CpuModel,
}

/// The primary's opening.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Hello {
    /// Name of the pair; both hosts must be set to the same.
    pub pair: String,
    /// Name of this host.
    pub node: String,
    /// The machine.
    pub shape: MachineShape,
    /// The VM is not made yet: of its CPU, it gets what the secondary's host can give, too.
    pub adapts: bool,
    /// Last generation this side ran in.
    pub generation: u64,
    /// Last epoch it knows to be committed in that generation.
    pub committed: u64,
    /// The takeover limit it is set to, in milliseconds; both must agree.
    pub takeover_limit_ms: u64,
    /// Whether a witness is configured; both must agree.
    pub witness: bool,
    /// Page streams that it would open.
    pub streams: u32,
}

/// The secondary's answer.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Welcome {
    /// Name of the secondary host.
    pub node: String,
    /// To be repeated on the data connection and the page streams.
    pub session: Session,
    /// The VM's CPU.
    pub cpu: CpuModel,
    /// Last generation this side held a complete state of, 0 if none.
    pub generation: u64,
    /// Last committed epoch of that generation.
    pub committed: u64,
    /// What it still has of the pairing before.
    pub held: Held,
    /// Page streams that are to be opened: the lesser of what both are set to.
    pub streams: u32,
}

/// Checkpoints of an earlier pairing: which ones a secondary still has, or which ones a sync builds on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Held {
    /// The memory is that of the end of this epoch, exactly.
    pub memory: Option<Tag>,
    /// The disk image is that of the end of this epoch, exactly and durably.
    pub disk: Option<Tag>,
}

/// The begin of a sync.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Begin {
    /// The generation of the pairing, and the epoch that its first checkpoint ends.
    pub tag: Tag,
    /// What is changed by what follows; without it, memory is sent as a whole, and the disks are compared.
    pub base: Held,
}

/// A run of block hashes of the secondary's disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockHashes {
    /// Generation and epoch of the sync.
    pub tag: Tag,
    /// Index of the first block.
    pub first: u64,
    /// One hash a block of `limits::BLOCK_BYTES`, the last block may be short.
    pub hashes: Vec<[u8; 16]>,
}

/// What a piece of the disk becomes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Written {
    /// These bytes.
    Data(Bytes),
    /// So many zeros, up to `limits::ZEROS_BYTES_MAX`, whole sectors: the guest has discarded what was there, or wants zeros.
    Zeros(u64),
}

/// A write to the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskWrite {
    /// Epoch in which the guest wrote.
    pub tag: Tag,
    /// First byte on the disk.
    pub offset: u64,
    /// What is there from then on.
    pub written: Written,
}

/// A frame that reached the primary's guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Input {
    /// Epoch in which the primary's device consumed it.
    pub tag: Tag,
    /// Its number, counted over all cards.
    pub number: InputNumber,
    /// The card that consumed it.
    pub nic: Nic,
    /// The Ethernet frame.
    pub frame: Bytes,
}

/// A frame that the secondary's guest sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Epoch in which the secondary's guest sent it.
    pub tag: Tag,
    /// The card that sent it.
    pub nic: Nic,
    /// The Ethernet frame, in the clients' sequence space. A part of what its receiver has read at once: whoever keeps it copies it.
    pub frame: Bytes,
}

/// One device's saved state, opaque here.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Section {
    /// The device.
    pub name: String,
    /// Version of its format.
    pub version: u32,
    /// The state.
    pub bytes: Vec<u8>,
}

/// All devices' state at the stop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceState {
    /// Epoch that it ends.
    pub tag: Tag,
    /// One section a device.
    pub sections: Vec<Section>,
}

/// The network's state at the stop, encoded by `proxy`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkState {
    /// Epoch that it ends.
    pub tag: Tag,
    /// Opaque here.
    pub encoded: Bytes,
}

/// What a complete checkpoint consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndMark {
    /// Epoch that it ends.
    pub tag: Tag,
    /// The epoch whose committed state the pages are relative to; `None` when they are the whole of memory.
    pub base: Option<Epoch>,
    /// Pages sent for it since the previous end mark (or since `Begin`), on each stream.
    pub pages: PageSums,
    /// Disk writes tagged with it.
    pub writes: u64,
    /// crc32 of those writes, in order: of each the offset, then the data, or `zeros` and how many (numbers little endian).
    pub writes_digest: u32,
    /// Sections of device state.
    pub sections: u32,
    /// Number of the last input the guest had consumed at the stop; later ones belong to the next epoch.
    pub input: InputNumber,
    /// Whether the secondary's guest runs in the next epoch.
    pub next: EpochMode,
    /// Seed of the entropy device for the next epoch.
    pub entropy: [u8; 32],
}

impl Written {
    /// Returns how many bytes of the disk are written.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "nobody asks")]
    pub fn len(&self) -> u64 {
        match self {
            Self::Data(data) => data.len() as u64,
            Self::Zeros(len) => *len,
        }
    }
}

impl From<Bytes> for Written {
    fn from(data: Bytes) -> Self {
        Self::Data(data)
    }
}

impl Message {
    /// Returns the generation and epoch that the message carries, if its kind has them.
    #[must_use]
    pub fn tag(&self) -> Option<Tag> {
        match self {
            Self::Hello(_)
            | Self::Welcome(_)
            | Self::Refuse(_)
            | Self::Attach(_)
            | Self::Heartbeat(_)
            | Self::Goodbye(_) => None,
            Self::Begin(begin) => Some(begin.tag),
            Self::Confirm(tag, _)
            | Self::Want(tag)
            | Self::Acknowledge(tag)
            | Self::Loaded(tag)
            | Self::Committed(tag)
            | Self::Halt(tag)
            | Self::Halted(tag) => Some(*tag),
            Self::BlockHashes(hashes) => Some(hashes.tag),
            Self::SyncBlock(write) | Self::Write(write) => Some(write.tag),
            Self::Input(input) => Some(input.tag),
            Self::Pages(batch) => Some(batch.tag),
            Self::DeviceState(state) => Some(state.tag),
            Self::NetworkState(state) => Some(state.tag),
            Self::End(mark) => Some(mark.tag),
            Self::Output(output) => Some(output.tag),
            Self::PageHashes(hashes) => Some(hashes.tag),
            Self::PageMatches(matches) => Some(matches.tag),
        }
    }

    /// Returns the generation that the message carries, if its kind has one.
    #[must_use]
    pub fn generation(&self) -> Option<Generation> {
        self.tag().map(|tag| tag.generation)
    }
}

/// One message of each kind.
#[cfg(test)]
pub(crate) fn wire_samples() -> Vec<Message> {
    let tag = Tag {
        generation: Generation(3),
        epoch: Epoch(41),
    };
    let bytes = Bytes::from_static(b"some bytes");
    let write = DiskWrite {
        tag,
        offset: 65_536,
        written: Written::Data(bytes.clone()),
    };
    let zeros = DiskWrite {
        tag,
        offset: 1 << 20,
        written: Written::Zeros(1 << 20),
    };
    let shape = MachineShape {
        memory_bytes: 256 << 20,
        vcpus: 2,
        devices: vec!["serial".into(), "net=52:54:00:00:00:01".into()],
        disk_bytes: 1 << 30,
        cpu: crate::cpu::samples::server(),
    };
    let hello = Hello {
        pair: "shop".into(),
        node: "a".into(),
        shape,
        adapts: true,
        generation: 3,
        committed: 40,
        takeover_limit_ms: 300,
        witness: true,
        streams: 4,
    };
    let mark = EndMark {
        tag,
        base: Some(Epoch(40)),
        pages: PageSums::of(&[
            PageSum {
                pages: 5,
                bytes: 60,
                digest: 6,
            },
            PageSum::default(),
        ])
        .expect("two streams"),
        writes: 7,
        writes_digest: 8,
        sections: 9,
        input: InputNumber(10),
        next: EpochMode::Buffered,
        entropy: [11; 32],
    };
    let section = Section {
        name: "vcpu0".into(),
        version: 1,
        bytes: vec![1, 2, 3],
    };
    vec![
        Message::Hello(hello),
        Message::Welcome(Welcome {
            node: "b".into(),
            session: Session(12),
            cpu: crate::cpu::samples::server(),
            generation: 3,
            committed: 40,
            held: Held {
                memory: None,
                disk: Some(tag),
            },
            streams: 2,
        }),
        Message::Refuse(Refusal::Differs {
            what: "vcpus".into(),
            primary: "2".into(),
            secondary: "4".into(),
        }),
        Message::Attach(Attach {
            session: Session(12),
            stream: Some(1),
        }),
        Message::Heartbeat(Heartbeat {
            sent: Instant(13),
            echo: Instant(14),
        }),
        Message::Goodbye(GoodbyeReason::Failed("disk full".into())),
        Message::Begin(Begin {
            tag,
            base: Held {
                memory: Some(tag),
                disk: None,
            },
        }),
        Message::BlockHashes(BlockHashes {
            tag,
            first: 16,
            hashes: vec![[1; 16], [2; 16]],
        }),
        Message::SyncBlock(write.clone()),
        Message::Input(Input {
            tag,
            number: InputNumber(10),
            nic: Nic::FIRST,
            frame: bytes.clone(),
        }),
        Message::Write(write),
        Message::Write(zeros),
        Message::Pages(PageBatch::new(tag, 2, bytes.clone())),
        Message::DeviceState(DeviceState {
            tag,
            sections: vec![section.clone(), section],
        }),
        Message::NetworkState(NetworkState {
            tag,
            encoded: bytes.clone(),
        }),
        Message::End(Box::new(mark)),
        Message::Output(Output {
            tag,
            nic: Nic::new(1).expect("a second card"),
            frame: bytes,
        }),
        Message::Confirm(tag, InputNumber(10)),
        Message::Want(tag),
        Message::Acknowledge(tag),
        Message::Loaded(tag),
        Message::Committed(tag),
        Message::Halt(tag),
        Message::Halted(tag),
        Message::PageHashes(PageHashes {
            tag,
            seed: [15; 32],
            pages: vec![(3, PageHash([1; 16])), (700, PageHash([2; 16]))],
        }),
        Message::PageMatches(PageMatches {
            tag,
            alike: vec![true, false],
        }),
    ]
}
