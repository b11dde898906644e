//! Messages to bytes and back.
//!
//! Bulk kinds (frames, disk writes, pages, the network's state) travel as they are, and are slices of
//! the received body, never copies. Control values and device state are rkyv archives, validated before
//! anything in them is read.
//!
//! Decoding is total: any bytes give a message or a [`WireError`], and take memory in proportion to
//! their length only. Texts are bounded and free of control characters, since they end up on terminals.
//! Encoding panics on a message over its bound: that is a fault of this side, not of a peer.
//!
//! Driven by the connections' readers and writers. Never does I/O.

use bytes::Bytes;
use rkyv::api::high::{HighDeserializer, HighSerializer, HighValidator};
use rkyv::bytecheck::CheckBytes;
use rkyv::rancor;
use rkyv::ser::allocator::ArenaHandle;
use rkyv::util::AlignedVec;
use rkyv::{Archive, Deserialize, Serialize};

use crate::cpu::CpuModel;
use crate::epoch::{Epoch, EpochMode, InputNumber, Tag};
use crate::limits::{
    DEVICE_NAME_BYTES_MAX, DEVICES_MAX, MEMORY_BYTES_MAX, NAME_BYTES_MAX, PAGE_BYTES, SECTION_NAME_BYTES_MAX,
    SECTIONS_MAX, STREAMS_MAX, TEXT_BYTES_MAX, ZEROS_BYTES_MAX,
};
use crate::nic::Nic;
use crate::pages::PageError;
use crate::pages::identical::{PageHashes, PageMatches};
use crate::time::Instant;
use crate::wire::header::{HEADER_BYTES, Header, Kind};
use crate::wire::{
    Attach, Begin, BlockHashes, DeviceState, DiskWrite, EndMark, GoodbyeReason, Heartbeat, Hello, Input, Message,
    NetworkState, Output, PROTOCOL_VERSION, PageBatch, PageSum, PageSums, Refusal, Section, Session, Welcome, Written,
};

/// Pages of the largest memory; whether the machine has a page is seen when it is read.
const PAGES_MAX: u64 = MEMORY_BYTES_MAX / PAGE_BYTES as u64;
/// Bytes of a sector of the disk, in which zeros are counted.
const SECTOR_BYTES: u64 = 512;
/// Bytes of one block hash.
const HASH_BYTES: usize = 16;

/// Why bytes are not a message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The connection is something else altogether.
    #[error("the bytes do not begin a message (magic {0:02x?})")]
    Magic([u8; 4]),
    /// A proper header of another protocol version.
    #[error(
        "the peer speaks protocol version {theirs}, this host {PROTOCOL_VERSION}: run the same tandem release on both"
    )]
    Version {
        /// The peer's version.
        theirs: u16,
    },
    /// The header was damaged.
    #[error("a header's checksum does not hold")]
    HeaderChecksum,
    /// The body was damaged.
    #[error("the checksum of a {kind} body does not hold")]
    BodyChecksum {
        /// The message's kind.
        kind: &'static str,
    },
    /// No such kind of message.
    #[error("unknown message kind {0}")]
    Kind(u16),
    /// A body over the bound of its kind.
    #[error("a {kind} body of {bytes} bytes is over the limit of {most}")]
    TooLong {
        /// The message's kind.
        kind: &'static str,
        /// Its length.
        bytes: usize,
        /// The bound.
        most: usize,
    },
    /// A body of a length that is none of its kind's, or not the one in the header.
    #[error("a {kind} body has {bytes} bytes")]
    Length {
        /// The message's kind.
        kind: &'static str,
        /// Its length.
        bytes: usize,
    },
    /// A value out of its range.
    #[error("a {kind} message has {what} out of range")]
    Field {
        /// The message's kind.
        kind: &'static str,
        /// The value.
        what: &'static str,
    },
    /// A question about pages, or its answer, that is none.
    #[error("a {kind} body is malformed")]
    Pages {
        /// The message's kind.
        kind: &'static str,
        /// What is wrong with it.
        #[source]
        source: PageError,
    },
    /// An archive that is not valid.
    #[error("a {kind} body is not well-formed")]
    Archive {
        /// The message's kind.
        kind: &'static str,
    },
}

impl WireError {
    /// Returns what to answer a peer that sent such bytes.
    #[must_use]
    pub fn refusal(&self) -> Refusal {
        match self {
            Self::Version { theirs } => Refusal::Version {
                ours: PROTOCOL_VERSION,
                theirs: *theirs,
            },
            other => Refusal::Protocol(other.to_string()),
        }
    }
}

/// A message ready to be written: first the header, then the body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// The header's bytes.
    pub header: [u8; HEADER_BYTES],
    /// The body, shared with the message where it is bulk. May be empty.
    pub body: Bytes,
}

impl Encoded {
    /// Returns the length on the wire.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> usize {
        HEADER_BYTES + self.body.len()
    }
}

/// Encodes a message without copying bulk bodies.
///
/// Texts of refusals and goodbyes are cut to their bound; everything else must be within its bound.
///
/// # Panics
/// Panics if a body, name or count is over its bound.
#[must_use]
pub fn encode(message: &Message) -> Encoded {
    let (kind, number, count, body) = match message {
        Message::Hello(hello) => {
            check_hello(hello).expect("this side's own opening is within its bounds");
            (Kind::Hello, 0, 0, archive(hello))
        }
        Message::Welcome(welcome) => (Kind::Welcome, 0, 0, archive(welcome)),
        Message::Refuse(refusal) => (Kind::Refuse, 0, 0, archive(&cut_refusal(refusal))),
        Message::Attach(attach) => (
            Kind::Attach,
            place(*attach),
            0,
            Bytes::copy_from_slice(&attach.session.0.to_le_bytes()),
        ),
        Message::Heartbeat(heartbeat) => (Kind::Heartbeat, 0, 0, encode_heartbeat(heartbeat)),
        Message::Goodbye(reason) => (Kind::Goodbye, 0, 0, archive(&cut_goodbye(reason))),
        Message::Begin(begin) => (Kind::Begin, 0, 0, archive(&begin.base)),
        Message::BlockHashes(hashes) => (Kind::BlockHashes, hashes.first, 0, Bytes::from(hashes.hashes.concat())),
        Message::SyncBlock(write) => encode_write(Kind::SyncBlock, write),
        Message::Input(input) => (
            Kind::Input,
            input.number.0,
            input.nic.number().into(),
            input.frame.clone(),
        ),
        Message::Write(write) => encode_write(Kind::Write, write),
        Message::Pages(batch) => (Kind::Pages, 0, batch.count, batch.encoded.clone()),
        Message::DeviceState(state) => {
            check_sections(&state.sections).expect("this machine's own state is within its bounds");
            (Kind::DeviceState, 0, 0, archive(&state.sections))
        }
        Message::NetworkState(state) => (Kind::NetworkState, 0, 0, state.encoded.clone()),
        Message::End(mark) => (Kind::End, 0, 0, archive(&EndBody::of(mark))),
        Message::Output(output) => (Kind::Output, 0, output.nic.number().into(), output.frame.clone()),
        Message::Confirm(_, number) => (Kind::Confirm, number.0, 0, Bytes::new()),
        Message::Want(_) => (Kind::Want, 0, 0, Bytes::new()),
        Message::Acknowledge(_) => (Kind::Acknowledge, 0, 0, Bytes::new()),
        Message::Loaded(_) => (Kind::Loaded, 0, 0, Bytes::new()),
        Message::Committed(_) => (Kind::Committed, 0, 0, Bytes::new()),
        Message::Halt(_) => (Kind::Halt, 0, 0, Bytes::new()),
        Message::Halted(_) => (Kind::Halted, 0, 0, Bytes::new()),
        Message::PageHashes(hashes) => (Kind::PageHashes, 0, length(hashes.pages.len()), hashes.encode()),
        Message::PageMatches(matches) => (Kind::PageMatches, 0, length(matches.alike.len()), matches.encode()),
    };
    assert!(
        body.len() <= kind.body_bytes_max(),
        "a {} body of {} bytes is over its bound of {}",
        kind.name(),
        body.len(),
        kind.body_bytes_max()
    );
    let header = Header {
        kind,
        tag: message.tag().unwrap_or_default(),
        number,
        count,
        body_bytes: u32::try_from(body.len()).expect("every bound fits"),
        body_crc: match message {
            Message::Pages(batch) => batch.crc(),
            _ => crc32fast::hash(&body),
        },
    };
    Encoded {
        header: header.to_bytes(),
        body,
    }
}

/// Appends a message's bytes to a buffer.
///
/// # Panics
/// Panics as [`encode`] does.
pub fn encode_into(message: &Message, out: &mut Vec<u8>) {
    let encoded = encode(message);
    out.extend_from_slice(&encoded.header);
    out.extend_from_slice(&encoded.body);
}

/// Decodes the body that followed a header.
///
/// # Errors
/// Says what is wrong with the body.
pub fn decode(header: &Header, body: Bytes) -> Result<Message, WireError> {
    let (kind, tag) = (header.kind, header.tag);
    let name = kind.name();
    if body.len() != header.body_len() {
        return Err(WireError::Length {
            kind: name,
            bytes: body.len(),
        });
    }
    if crc32fast::hash(&body) != header.body_crc {
        return Err(WireError::BodyChecksum { kind: name });
    }
    Ok(match kind {
        Kind::Hello => {
            let hello: Hello = unarchive(kind, &body)?;
            check_hello(&hello)?;
            Message::Hello(hello)
        }
        Kind::Welcome => {
            let welcome: Welcome = unarchive(kind, &body)?;
            check_text(kind, "a name", &welcome.node, NAME_BYTES_MAX)?;
            check_cpu(kind, &welcome.cpu)?;
            Message::Welcome(welcome)
        }
        Kind::Refuse => Message::Refuse(checked_refusal(unarchive(kind, &body)?)?),
        Kind::Goodbye => Message::Goodbye(checked_goodbye(unarchive(kind, &body)?)?),
        Kind::Attach => Message::Attach(decode_attach(header, &body)?),
        Kind::Heartbeat => Message::Heartbeat(decode_heartbeat(fixed(kind, &body)?)),
        Kind::Begin => Message::Begin(Begin {
            tag,
            base: unarchive(kind, &body)?,
        }),
        Kind::BlockHashes => Message::BlockHashes(decode_hashes(header, &body)?),
        Kind::SyncBlock => Message::SyncBlock(decode_write(header, body)?),
        Kind::Write => Message::Write(decode_write(header, body)?),
        Kind::Input => Message::Input(Input {
            tag,
            number: InputNumber(header.number),
            nic: decode_nic(header)?,
            frame: body,
        }),
        Kind::Pages => Message::Pages(decode_pages(header, body)?),
        Kind::DeviceState => {
            let sections: Vec<Section> = unarchive(kind, &body)?;
            check_sections(&sections)?;
            Message::DeviceState(DeviceState { tag, sections })
        }
        Kind::NetworkState => Message::NetworkState(NetworkState { tag, encoded: body }),
        Kind::End => Message::End(Box::new(unarchive::<EndBody>(kind, &body)?.mark(tag)?)),
        Kind::Output => Message::Output(Output {
            tag,
            nic: decode_nic(header)?,
            frame: body,
        }),
        Kind::Confirm => Message::Confirm(tag, InputNumber(header.number)),
        Kind::Want => Message::Want(tag),
        Kind::Acknowledge => Message::Acknowledge(tag),
        Kind::Loaded => Message::Loaded(tag),
        Kind::Committed => Message::Committed(tag),
        Kind::Halt => Message::Halt(tag),
        Kind::Halted => Message::Halted(tag),
        Kind::PageHashes => Message::PageHashes(
            PageHashes::decode(tag, header.count, &body, PAGES_MAX).map_err(|error| malformed(kind, error))?,
        ),
        Kind::PageMatches => {
            Message::PageMatches(PageMatches::decode(tag, header.count, &body).map_err(|error| malformed(kind, error))?)
        }
    })
}

/// Makes a text fit for the wire: no control characters, no longer than `most` bytes.
#[must_use]
pub fn cut_text(text: &str, most: usize) -> String {
    let mut end = text.len().min(most);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end]
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

fn length(count: usize) -> u32 {
    u32::try_from(count).expect("bounded by a constant that fits")
}

fn malformed(kind: Kind, source: PageError) -> WireError {
    WireError::Pages {
        kind: kind.name(),
        source,
    }
}

fn encode_heartbeat(heartbeat: &Heartbeat) -> Bytes {
    Bytes::copy_from_slice(
        [heartbeat.sent, heartbeat.echo]
            .map(|at| at.0.to_le_bytes())
            .as_flattened(),
    )
}

/// Which connection it is: 0 is the data connection.
fn place(attach: Attach) -> u64 {
    attach.stream.map_or(0, |stream| stream as u64 + 1)
}

fn decode_attach(header: &Header, body: &[u8]) -> Result<Attach, WireError> {
    let place = usize::try_from(header.number)
        .ok()
        .filter(|place| *place <= STREAMS_MAX);
    let Some(place) = place else {
        return Err(WireError::Field {
            kind: header.kind.name(),
            what: "a page stream",
        });
    };
    Ok(Attach {
        session: Session(u128::from_le_bytes(fixed(header.kind, body)?)),
        stream: place.checked_sub(1),
    })
}

fn decode_nic(header: &Header) -> Result<Nic, WireError> {
    Nic::new(header.count).ok_or_else(|| WireError::Field {
        kind: header.kind.name(),
        what: "a network card",
    })
}

fn decode_heartbeat(body: [u8; 16]) -> Heartbeat {
    let [sent, echo]: [[u8; 8]; 2] = zerocopy::transmute!(body);
    Heartbeat {
        sent: Instant(u64::from_le_bytes(sent)),
        echo: Instant(u64::from_le_bytes(echo)),
    }
}

/// The end mark without its tag, which the header carries.
#[derive(Archive, Serialize, Deserialize)]
struct EndBody {
    base: Option<u64>,
    pages: Vec<PageSum>,
    writes: u64,
    writes_digest: u32,
    sections: u32,
    input: u64,
    next: EpochMode,
    entropy: [u8; 32],
}

impl EndBody {
    fn of(mark: &EndMark) -> Self {
        Self {
            base: mark.base.map(|epoch| epoch.0),
            pages: mark.pages.as_slice().to_vec(),
            writes: mark.writes,
            writes_digest: mark.writes_digest,
            sections: mark.sections,
            input: mark.input.0,
            next: mark.next,
            entropy: mark.entropy,
        }
    }

    fn mark(self, tag: Tag) -> Result<EndMark, WireError> {
        let Some(pages) = PageSums::of(&self.pages) else {
            return Err(WireError::Field {
                kind: Kind::End.name(),
                what: "the number of page streams",
            });
        };
        Ok(EndMark {
            tag,
            base: self.base.map(Epoch),
            pages,
            writes: self.writes,
            writes_digest: self.writes_digest,
            sections: self.sections,
            input: InputNumber(self.input),
            next: self.next,
            entropy: self.entropy,
        })
    }
}

fn archive<T>(value: &T) -> Bytes
where
    T: for<'a> Serialize<HighSerializer<AlignedVec, ArenaHandle<'a>, rancor::Error>>,
{
    Bytes::from_owner(rkyv::to_bytes::<rancor::Error>(value).expect("only allocation could fail, and that aborts"))
}

fn unarchive<T>(kind: Kind, body: &[u8]) -> Result<T, WireError>
where
    T: Archive,
    T::Archived: for<'a> CheckBytes<HighValidator<'a, rancor::Error>> + Deserialize<T, HighDeserializer<rancor::Error>>,
{
    // An archive is read in place, which needs its alignment; bodies come in at any.
    let mut aligned: AlignedVec<16> = AlignedVec::with_capacity(body.len());
    aligned.extend_from_slice(body);
    rkyv::from_bytes::<T, rancor::Error>(&aligned).map_err(|_| WireError::Archive { kind: kind.name() })
}

fn fixed<const N: usize>(kind: Kind, body: &[u8]) -> Result<[u8; N], WireError> {
    body.try_into().map_err(|_| WireError::Length {
        kind: kind.name(),
        bytes: body.len(),
    })
}

fn decode_hashes(header: &Header, body: &[u8]) -> Result<BlockHashes, WireError> {
    let (hashes, rest) = body.as_chunks::<HASH_BYTES>();
    if !rest.is_empty() {
        return Err(WireError::Length {
            kind: header.kind.name(),
            bytes: body.len(),
        });
    }
    if header.number.checked_add(hashes.len() as u64).is_none() {
        return Err(WireError::Field {
            kind: header.kind.name(),
            what: "the first block's index",
        });
    }
    Ok(BlockHashes {
        tag: header.tag,
        first: header.number,
        hashes: hashes.to_vec(),
    })
}

fn encode_write(kind: Kind, write: &DiskWrite) -> (Kind, u64, u32, Bytes) {
    let (sectors, body) = match &write.written {
        Written::Data(data) => (0, data.clone()),
        Written::Zeros(len) => {
            let within = (1..=ZEROS_BYTES_MAX).contains(len) && len.is_multiple_of(SECTOR_BYTES);
            assert!(within, "{len} zeros in one disk write");
            let sectors = u32::try_from(len / SECTOR_BYTES).expect("the bound fits");
            (sectors, Bytes::new())
        }
    };
    (kind, write.offset, sectors, body)
}

fn decode_write(header: &Header, body: Bytes) -> Result<DiskWrite, WireError> {
    let field = |what| WireError::Field {
        kind: header.kind.name(),
        what,
    };
    let zeros = u64::from(header.count) * SECTOR_BYTES;
    let written = match (zeros, body.is_empty()) {
        (0, _) => Written::Data(body),
        (1..=ZEROS_BYTES_MAX, true) => Written::Zeros(zeros),
        _ => return Err(field("the number of zeros")),
    };
    // Files end at 2⁶³ − 1, so that an offset plus a length never wraps further on.
    let end = header.number.checked_add(written.len());
    if end.is_none_or(|end| i64::try_from(end).is_err()) {
        return Err(field("an offset"));
    }
    Ok(DiskWrite {
        tag: header.tag,
        offset: header.number,
        written,
    })
}

fn decode_pages(header: &Header, body: Bytes) -> Result<PageBatch, WireError> {
    // An encoded page takes a byte at least.
    if header.count as usize > body.len() {
        return Err(WireError::Field {
            kind: header.kind.name(),
            what: "the page count",
        });
    }
    Ok(PageBatch::summed(header.tag, header.count, body, header.body_crc))
}

fn check_text(kind: Kind, what: &'static str, text: &str, most: usize) -> Result<(), WireError> {
    if text.len() > most || text.chars().any(char::is_control) {
        return Err(WireError::Field {
            kind: kind.name(),
            what,
        });
    }
    Ok(())
}

fn check_hello(hello: &Hello) -> Result<(), WireError> {
    let kind = Kind::Hello;
    check_text(kind, "a name", &hello.pair, NAME_BYTES_MAX)?;
    check_text(kind, "a name", &hello.node, NAME_BYTES_MAX)?;
    if hello.shape.devices.len() > DEVICES_MAX {
        return Err(WireError::Field {
            kind: kind.name(),
            what: "the number of devices",
        });
    }
    hello
        .shape
        .devices
        .iter()
        .try_for_each(|name| check_text(kind, "a device", name, DEVICE_NAME_BYTES_MAX))?;
    check_cpu(kind, &hello.shape.cpu)?;
    if !hello.shape.memory_bytes.is_multiple_of(PAGE_BYTES as u64) {
        return Err(WireError::Field {
            kind: kind.name(),
            what: "the memory size",
        });
    }
    Ok(())
}

fn check_cpu(kind: Kind, cpu: &CpuModel) -> Result<(), WireError> {
    cpu.check_bounds().map_err(|_| WireError::Field {
        kind: kind.name(),
        what: "the size of a CPU's description",
    })
}

fn check_sections(sections: &[Section]) -> Result<(), WireError> {
    let kind = Kind::DeviceState;
    if sections.len() > SECTIONS_MAX {
        return Err(WireError::Field {
            kind: kind.name(),
            what: "the number of sections",
        });
    }
    sections
        .iter()
        .try_for_each(|section| check_text(kind, "a section's name", &section.name, SECTION_NAME_BYTES_MAX))
}

/// Applies a function to each text of a refusal.
fn map_refusal<E>(refusal: &Refusal, text: impl Fn(&str) -> Result<String, E>) -> Result<Refusal, E> {
    Ok(match refusal {
        Refusal::Version { .. } | Refusal::OlderGeneration { .. } | Refusal::BothRan(_) => refusal.clone(),
        Refusal::Pair { ours, theirs } => Refusal::Pair {
            ours: text(ours)?,
            theirs: text(theirs)?,
        },
        Refusal::SameNode(node) => Refusal::SameNode(text(node)?),
        Refusal::Differs {
            what,
            primary,
            secondary,
        } => Refusal::Differs {
            what: text(what)?,
            primary: text(primary)?,
            secondary: text(secondary)?,
        },
        Refusal::Cpu { missing, cure } => Refusal::Cpu {
            missing: text(missing)?,
            cure: text(cure)?,
        },
        Refusal::Busy(node) => Refusal::Busy(text(node)?),
        Refusal::Protocol(why) => Refusal::Protocol(text(why)?),
    })
}

fn cut_refusal(refusal: &Refusal) -> Refusal {
    let cut = |text: &str| Ok::<_, core::convert::Infallible>(cut_text(text, TEXT_BYTES_MAX));
    let Ok(refusal) = map_refusal(refusal, cut);
    refusal
}

fn checked_refusal(refusal: Refusal) -> Result<Refusal, WireError> {
    map_refusal(&refusal, |text| {
        check_text(Kind::Refuse, "a text", text, TEXT_BYTES_MAX)?;
        Ok(text.to_owned())
    })
}

fn cut_goodbye(reason: &GoodbyeReason) -> GoodbyeReason {
    match reason {
        GoodbyeReason::Failed(why) => GoodbyeReason::Failed(cut_text(why, TEXT_BYTES_MAX)),
        GoodbyeReason::Operator | GoodbyeReason::PowerOff => reason.clone(),
    }
}

fn checked_goodbye(reason: GoodbyeReason) -> Result<GoodbyeReason, WireError> {
    if let GoodbyeReason::Failed(why) = &reason {
        check_text(Kind::Goodbye, "a text", why, TEXT_BYTES_MAX)?;
    }
    Ok(reason)
}

#[cfg(test)]
mod tests;
