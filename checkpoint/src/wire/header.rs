//! The fixed header before every message body.
//!
//! ```text
//!   0 magic    4 version  6 kind   8 generation  16 epoch  24 number
//!  32 body length  36 count  40 body crc32  44 header crc32 (of bytes 0..44)     48
//! ```
//!
//! All fields are little endian. This layout is the same in every protocol version, so that a peer of
//! another version is recognised as one and told so; what `kind`, `number` and `count` mean is not.
//!
//! Driven by the codec and by readers that take header and body one after the other. Never allocates.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::epoch::{Epoch, Generation, Tag};
use crate::limits::{BLOCK_BYTES, BODY_BYTES_MAX, FRAME_BYTES_MAX, STATE_BYTES_MAX};
use crate::pages::identical::HASHES_MAX;
use crate::wire::PROTOCOL_VERSION;
use crate::wire::codec::WireError;

/// Bytes of a header.
pub const HEADER_BYTES: usize = 48;

const MAGIC: [u8; 4] = *b"TNDM";
const CHECKED_BYTES: usize = HEADER_BYTES - 4;

/// The header as it lies on the wire.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Raw {
    magic: [u8; 4],
    version: U16,
    kind: U16,
    generation: U64,
    epoch: U64,
    number: U64,
    body_bytes: U32,
    count: U32,
    body_crc: U32,
    header_crc: U32,
}

const _: () = assert!(size_of::<Raw>() == HEADER_BYTES);
const _: () = assert!(STATE_BYTES_MAX <= u32::MAX as usize);

/// A checked header: the bytes are this protocol, this version, and the body length is within the kind's bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub(super) kind: Kind,
    pub(super) tag: Tag,
    pub(super) number: u64,
    pub(super) count: u32,
    pub(super) body_bytes: u32,
    pub(super) body_crc: u32,
}

/// What a message is. The numbers are the wire's and are never used again for something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Hello = 1,
    Welcome = 2,
    Refuse = 3,
    Attach = 4,
    Heartbeat = 5,
    Goodbye = 6,
    Begin = 16,
    BlockHashes = 17,
    SyncBlock = 18,
    Input = 19,
    Write = 20,
    Pages = 21,
    DeviceState = 22,
    NetworkState = 23,
    End = 24,
    Halt = 25,
    PageHashes = 26,
    Output = 32,
    Confirm = 33,
    Want = 34,
    Acknowledge = 35,
    Loaded = 36,
    Committed = 37,
    Halted = 38,
    PageMatches = 39,
}

impl Header {
    /// Checks a header's bytes.
    ///
    /// # Errors
    /// Says what is wrong with them. The version is judged before everything that may differ between
    /// versions, so that [`WireError::Version`] can be answered with a refusal.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, WireError> {
        let raw: Raw = zerocopy::transmute!(*bytes);
        if raw.magic != MAGIC {
            return Err(WireError::Magic(raw.magic));
        }
        if crc32fast::hash(&bytes[..CHECKED_BYTES]) != raw.header_crc.get() {
            return Err(WireError::HeaderChecksum);
        }
        if raw.version.get() != PROTOCOL_VERSION {
            return Err(WireError::Version {
                theirs: raw.version.get(),
            });
        }
        let kind = Kind::from_number(raw.kind.get()).ok_or_else(|| WireError::Kind(raw.kind.get()))?;
        let header = Self {
            kind,
            tag: Tag {
                generation: Generation(raw.generation.get()),
                epoch: Epoch(raw.epoch.get()),
            },
            number: raw.number.get(),
            count: raw.count.get(),
            body_bytes: raw.body_bytes.get(),
            body_crc: raw.body_crc.get(),
        };
        if header.body_len() > kind.body_bytes_max() {
            return Err(WireError::TooLong {
                kind: kind.name(),
                bytes: header.body_len(),
                most: kind.body_bytes_max(),
            });
        }
        header.check_unused_fields()?;
        Ok(header)
    }

    /// Returns the length of the body that follows.
    #[must_use]
    pub fn body_len(&self) -> usize {
        self.body_bytes as usize
    }

    /// Tells whether pages follow.
    #[must_use]
    pub fn is_pages(&self) -> bool {
        self.kind == Kind::Pages
    }

    /// Returns the name of the message's kind, for logs.
    #[must_use]
    pub fn kind_name(&self) -> &'static str {
        self.kind.name()
    }

    /// Returns the header's bytes.
    pub(super) fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut raw = Raw {
            magic: MAGIC,
            version: U16::new(PROTOCOL_VERSION),
            kind: U16::new(self.kind as u16),
            generation: U64::new(self.tag.generation.0),
            epoch: U64::new(self.tag.epoch.0),
            number: U64::new(self.number),
            body_bytes: U32::new(self.body_bytes),
            count: U32::new(self.count),
            body_crc: U32::new(self.body_crc),
            header_crc: U32::ZERO,
        };
        raw.header_crc = U32::new(crc32fast::hash(&raw.as_bytes()[..CHECKED_BYTES]));
        zerocopy::transmute!(raw)
    }

    /// A field that a kind does not use must be zero, so that each message has one encoding only.
    fn check_unused_fields(&self) -> Result<(), WireError> {
        let uses = self.kind.uses();
        let stray = (!uses.tag && self.tag != Tag::default())
            || (!uses.number && self.number != 0)
            || (!uses.count && self.count != 0);
        if stray {
            Err(WireError::Field {
                kind: self.kind.name(),
                what: "an unused header field",
            })
        } else {
            Ok(())
        }
    }
}

/// Which header fields a kind uses.
struct Uses {
    tag: bool,
    number: bool,
    count: bool,
}

impl Kind {
    const ALL: [Self; 25] = [
        Self::Hello,
        Self::Welcome,
        Self::Refuse,
        Self::Attach,
        Self::Heartbeat,
        Self::Goodbye,
        Self::Begin,
        Self::BlockHashes,
        Self::SyncBlock,
        Self::Input,
        Self::Write,
        Self::Pages,
        Self::DeviceState,
        Self::NetworkState,
        Self::End,
        Self::Halt,
        Self::PageHashes,
        Self::Output,
        Self::Confirm,
        Self::Want,
        Self::Acknowledge,
        Self::Loaded,
        Self::Committed,
        Self::Halted,
        Self::PageMatches,
    ];

    fn from_number(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u16 == number)
    }

    /// Returns the bound of a body of this kind.
    pub(super) const fn body_bytes_max(self) -> usize {
        match self {
            Self::Confirm
            | Self::Want
            | Self::Acknowledge
            | Self::Loaded
            | Self::Committed
            | Self::Halt
            | Self::Halted => 0,
            Self::Attach | Self::Heartbeat => 16,
            Self::End => 512,
            Self::PageMatches => HASHES_MAX.div_ceil(8),
            Self::Welcome => 16 * 1024,
            Self::Begin => 64,
            Self::Refuse | Self::Goodbye => 8 * 1024,
            Self::Hello => 32 * 1024,
            Self::Input | Self::Output => FRAME_BYTES_MAX,
            Self::SyncBlock => BLOCK_BYTES,
            Self::BlockHashes | Self::Write | Self::Pages | Self::PageHashes => BODY_BYTES_MAX,
            Self::DeviceState | Self::NetworkState => STATE_BYTES_MAX,
        }
    }

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Hello => "Hello",
            Self::Welcome => "Welcome",
            Self::Refuse => "Refuse",
            Self::Attach => "Attach",
            Self::Heartbeat => "Heartbeat",
            Self::Goodbye => "Goodbye",
            Self::Begin => "Begin",
            Self::BlockHashes => "BlockHashes",
            Self::SyncBlock => "SyncBlock",
            Self::Input => "Input",
            Self::Write => "Write",
            Self::Pages => "Pages",
            Self::DeviceState => "DeviceState",
            Self::NetworkState => "NetworkState",
            Self::End => "End",
            Self::Halt => "Halt",
            Self::PageHashes => "PageHashes",
            Self::Output => "Output",
            Self::Confirm => "Confirm",
            Self::Want => "Want",
            Self::Acknowledge => "Acknowledge",
            Self::Loaded => "Loaded",
            Self::Committed => "Committed",
            Self::Halted => "Halted",
            Self::PageMatches => "PageMatches",
        }
    }

    const fn uses(self) -> Uses {
        let (tag, number, count) = match self {
            Self::Hello | Self::Welcome | Self::Refuse | Self::Heartbeat | Self::Goodbye => (false, false, false),
            Self::Attach => (false, true, false),
            Self::Begin
            | Self::DeviceState
            | Self::NetworkState
            | Self::End
            | Self::Want
            | Self::Acknowledge
            | Self::Loaded
            | Self::Committed
            | Self::Halt
            | Self::Halted => (true, false, false),
            Self::BlockHashes | Self::Confirm => (true, true, false),
            // The count is that of zero sectors instead of a body.
            Self::SyncBlock | Self::Write => (true, true, true),
            // The count is the card's number.
            Self::Input => (true, true, true),
            Self::Output | Self::Pages | Self::PageHashes | Self::PageMatches => (true, false, true),
        };
        Uses { tag, number, count }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Header {
        Header {
            kind: Kind::Pages,
            tag: Tag {
                generation: Generation(0x0102_0304_0506_0708),
                epoch: Epoch(0x1112_1314_1516_1718),
            },
            number: 0,
            count: 0x2122_2324,
            body_bytes: 0x0003_3233,
            body_crc: 0x4142_4344,
        }
    }

    #[test]
    fn bytes_on_the_wire_are_fixed() {
        #[rustfmt::skip]
        let golden = [
            b'T', b'N', b'D', b'M', 9, 0, 21, 0,
            8, 7, 6, 5, 4, 3, 2, 1,
            0x18, 0x17, 0x16, 0x15, 0x14, 0x13, 0x12, 0x11,
            0, 0, 0, 0, 0, 0, 0, 0,
            0x33, 0x32, 3, 0, 0x24, 0x23, 0x22, 0x21,
            0x44, 0x43, 0x42, 0x41, 1, 117, 147, 168,
        ];
        assert_eq!(sample().to_bytes(), golden);
        assert_eq!(Header::parse(&golden), Ok(sample()));
    }

    #[test]
    fn kinds_have_one_number_each() {
        for kind in Kind::ALL {
            assert_eq!(Kind::from_number(kind as u16), Some(kind));
        }
        assert_eq!(
            (0..=u16::MAX)
                .filter(|number| Kind::from_number(*number).is_some())
                .count(),
            Kind::ALL.len()
        );
    }

    #[test]
    fn another_version_is_told_from_garbage() {
        let mut bytes = sample().to_bytes();
        bytes[4] = 10;
        assert_eq!(
            Header::parse(&bytes),
            Err(WireError::HeaderChecksum),
            "a flip is no version"
        );
        bytes[6] = 0xff; // A kind that this version does not know.
        let crc = crc32fast::hash(&bytes[..CHECKED_BYTES]);
        bytes[CHECKED_BYTES..].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(Header::parse(&bytes), Err(WireError::Version { theirs: 10 }));
    }

    #[test]
    fn every_flipped_bit_is_detected() {
        let good = sample().to_bytes();
        for bit in 0..HEADER_BYTES * 8 {
            let mut bytes = good;
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::parse(&bytes).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn bodies_over_the_bound_of_their_kind_are_refused() {
        for kind in Kind::ALL {
            let longest = u32::try_from(kind.body_bytes_max()).unwrap();
            let mut header = Header {
                kind,
                tag: Tag::default(),
                number: 0,
                count: 0,
                body_bytes: longest,
                body_crc: 0,
            };
            assert_eq!(Header::parse(&header.to_bytes()), Ok(header));
            header.body_bytes += 1;
            assert!(
                matches!(Header::parse(&header.to_bytes()), Err(WireError::TooLong { .. })),
                "{}",
                kind.name()
            );
        }
    }
}
