//! What clients ask of the toy guest and what it answers, in bytes.

/// Registers that clients change.
pub const KEYS: u8 = 6;
/// Clients that the guest tells apart.
pub const CLIENTS_MAX: u8 = 24;
/// Bytes of a request, of an answer and of a log line.
pub const RECORD_BYTES: usize = 32;

const REQUEST: u8 = 0xa5;
const ANSWER: u8 = 0x5a;
const LINE: u8 = 0x4c;
const NOISY: u8 = 0x10;
const LOGGED: u8 = 0x20;

/// An operation on one register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// Adds one; answered with the new value.
    Add,
    /// Sets it; answered with the old value.
    Swap(u64),
    /// Sets it to the second if it is the first; answered with the old value.
    CompareAndSwap(u64, u64),
    /// Answered with the value.
    Read,
}

/// What a client asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Who asks.
    pub client: u8,
    /// Which register.
    pub key: u8,
    /// Number of the request; a repetition has the same.
    pub id: u32,
    /// What to do.
    pub op: Op,
    /// The answer is to depend on the host.
    pub noisy: bool,
    /// The guest is to send a line to the log's host.
    pub logged: bool,
}

/// What it is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Who asked.
    pub client: u8,
    /// Which register.
    pub key: u8,
    /// Number of the request.
    pub id: u32,
    /// What came of it.
    pub value: u64,
    /// Nothing, or chance.
    pub noise: u64,
}

impl Op {
    /// Carries it out: returns the register's new value, and the answer.
    #[must_use]
    pub fn apply(self, value: u64) -> (u64, u64) {
        match self {
            Self::Add => (value.wrapping_add(1), value.wrapping_add(1)),
            Self::Swap(new) => (new, value),
            Self::CompareAndSwap(old, new) => (if value == old { new } else { value }, value),
            Self::Read => (value, value),
        }
    }
}

impl Request {
    /// Writes it.
    #[must_use]
    pub fn encode(&self) -> [u8; RECORD_BYTES] {
        let (kind, one, other) = match self.op {
            Op::Add => (0, 0, 0),
            Op::Swap(new) => (1, new, 0),
            Op::CompareAndSwap(old, new) => (2, old, new),
            Op::Read => (3, 0, 0),
        };
        let flags = if self.noisy { NOISY } else { 0 } | if self.logged { LOGGED } else { 0 };
        record([REQUEST, self.client, self.key, kind | flags], self.id, one, other)
    }

    /// Reads one.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let ([kind, client, key, flags], id, one, other) = fields(bytes)?;
        if kind != REQUEST || key >= KEYS || client >= CLIENTS_MAX {
            return None;
        }
        let op = match flags & 0xf {
            0 => Op::Add,
            1 => Op::Swap(one),
            2 => Op::CompareAndSwap(one, other),
            3 => Op::Read,
            _ => return None,
        };
        Some(Self {
            client,
            key,
            id,
            op,
            noisy: flags & NOISY != 0,
            logged: flags & LOGGED != 0,
        })
    }
}

impl Answer {
    /// Writes it as an answer.
    #[must_use]
    pub fn encode(&self) -> [u8; RECORD_BYTES] {
        record([ANSWER, self.client, self.key, 0], self.id, self.value, self.noise)
    }

    /// Writes it as a line of the log.
    #[must_use]
    pub fn encode_line(&self) -> [u8; RECORD_BYTES] {
        record([LINE, self.client, self.key, 0], self.id, self.value, 0)
    }

    /// Reads an answer.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        Self::of(bytes, ANSWER)
    }

    /// Reads a line of the log.
    #[must_use]
    pub fn decode_line(bytes: &[u8]) -> Option<Self> {
        Self::of(bytes, LINE)
    }

    fn of(bytes: &[u8], expected: u8) -> Option<Self> {
        let ([kind, client, key, _], id, value, noise) = fields(bytes)?;
        (kind == expected).then_some(Self {
            client,
            key,
            id,
            value,
            noise,
        })
    }
}

fn record(head: [u8; 4], id: u32, one: u64, other: u64) -> [u8; RECORD_BYTES] {
    let mut out = [0; RECORD_BYTES];
    out[..4].copy_from_slice(&head);
    out[4..8].copy_from_slice(&id.to_le_bytes());
    out[8..16].copy_from_slice(&one.to_le_bytes());
    out[16..24].copy_from_slice(&other.to_le_bytes());
    // So that a stream that slips by some bytes is noticed.
    out[24..].copy_from_slice(&(u64::from(id) ^ one ^ other.rotate_left(7)).to_le_bytes());
    out
}

fn fields(bytes: &[u8]) -> Option<([u8; 4], u32, u64, u64)> {
    let bytes: &[u8; RECORD_BYTES] = bytes.try_into().ok()?;
    let head = [bytes[0], bytes[1], bytes[2], bytes[3]];
    let long = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    let id = u32::from_le_bytes(bytes[4..8].try_into().ok()?);
    let (one, other, check) = (long(8)?, long(16)?, long(24)?);
    (check == u64::from(id) ^ one ^ other.rotate_left(7)).then_some((head, id, one, other))
}
