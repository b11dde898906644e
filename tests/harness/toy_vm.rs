//! A toy guest: counters in pages of memory and sectors of a disk, served over UDP.
//!
//! It is deterministic but for the noise that a request may ask for: then its answer and its memory
//! depend on the host, and two copies diverge.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use checkpoint::limits::PAGE_BYTES;
use etherparse::{PacketBuilder, SlicedPacket, TransportSlice};

/// Pages of the toy's memory: counters, then the last answer to each client, then noise.
pub const PAGES: u64 = 40;
/// Counters, one a page.
pub const KEYS: u64 = 16;
/// Clients, one page each for the last answer.
pub const CLIENTS: u64 = 8;
/// Bytes of the toy's disk: one block of the comparison, and a short one.
pub const DISK_BYTES: u64 = 72 * 1024;
const ANSWERS: u64 = KEYS;
const NOISE: u64 = KEYS + CLIENTS;

/// What a client asks: to add one to a counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Who asks.
    pub client: u8,
    /// Number of the request; a repetition has the same.
    pub id: u64,
    /// Which counter.
    pub key: u8,
    /// Whether the answer is to depend on the host.
    pub noisy: bool,
}

/// What it is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Who asked.
    pub client: u8,
    /// Number of the request.
    pub id: u64,
    /// The counter's value after it.
    pub value: u64,
}

/// Pages that are copied when written.
pub type Memory = Vec<Arc<Vec<u8>>>;

/// The guest.
#[derive(Clone, Debug)]
pub struct ToyVm {
    /// Memory; a copy shares the pages that neither has written since.
    pub pages: Memory,
    /// Pages written since last asked.
    pub dirty: BTreeSet<u64>,
    /// Requests served: the registers.
    pub served: u64,
}

/// What came of a frame.
#[derive(Debug, Default)]
pub struct Served {
    /// What the guest sent.
    pub output: Option<Bytes>,
    /// What it wrote to its disk: offset and one sector.
    pub write: Option<(u64, Bytes)>,
}

impl Default for ToyVm {
    fn default() -> Self {
        let zero = Arc::new(vec![0; PAGE_BYTES]);
        Self {
            pages: (0..PAGES).map(|_| Arc::clone(&zero)).collect(),
            dirty: BTreeSet::new(),
            served: 0,
        }
    }
}

impl ToyVm {
    /// Serves one frame on a host with this noise.
    pub fn serve(&mut self, frame: &[u8], noise: u64) -> Served {
        let Some(request) = Request::parse(frame) else {
            return Served::default();
        };
        self.served += 1;
        let (key, client) = (u64::from(request.key) % KEYS, u64::from(request.client) % CLIENTS);
        let last = ANSWERS + client;
        // A repetition that was overtaken by a later request: its client has the answer.
        if self.word(last, 0) > request.id {
            return Served::default();
        }
        if self.word(last, 0) == request.id {
            let answer = Answer {
                client: request.client,
                id: request.id,
                value: self.word(last, 1),
            };
            return Served {
                output: Some(answer.frame(self.word(last, 2))),
                write: None,
            };
        }
        let value = self.word(key, 0) + 1;
        let noise = if request.noisy { noise } else { 0 };
        self.set(key, 0, value);
        self.set(last, 0, request.id);
        self.set(last, 1, value);
        self.set(last, 2, noise);
        if request.noisy {
            self.set(NOISE + noise % (PAGES - NOISE), 0, noise);
        }
        let mut sector = vec![0; 512];
        sector[..8].copy_from_slice(&value.to_le_bytes());
        let answer = Answer {
            client: request.client,
            id: request.id,
            value,
        };
        Served {
            output: Some(answer.frame(noise)),
            write: Some((key * 512 + key % 2 * 64 * 1024, sector.into())),
        }
    }

    fn word(&self, page: u64, word: usize) -> u64 {
        let bytes = &self.pages[index(page)][word * 8..word * 8 + 8];
        u64::from_le_bytes(bytes.try_into().expect("eight bytes"))
    }

    fn set(&mut self, page: u64, word: usize, value: u64) {
        Arc::make_mut(&mut self.pages[index(page)])[word * 8..word * 8 + 8].copy_from_slice(&value.to_le_bytes());
        self.dirty.insert(page);
    }
}

impl Request {
    /// Makes the frame that a client sends.
    #[must_use]
    pub fn frame(self) -> Bytes {
        let mut payload = vec![self.client, self.key, u8::from(self.noisy)];
        payload.extend_from_slice(&self.id.to_le_bytes());
        udp(
            client_address(self.client),
            [10, 0, 0, 1],
            1000 + u16::from(self.client),
            7,
            &payload,
        )
    }

    fn parse(frame: &[u8]) -> Option<Self> {
        let payload = udp_payload(frame)?;
        let [client, key, noisy, id @ ..] = payload else {
            return None;
        };
        Some(Self {
            client: *client,
            key: *key,
            noisy: *noisy != 0,
            id: u64::from_le_bytes(id.try_into().ok()?),
        })
    }
}

impl Answer {
    fn frame(self, noise: u64) -> Bytes {
        let mut payload = vec![self.client];
        for word in [self.id, self.value, noise] {
            payload.extend_from_slice(&word.to_le_bytes());
        }
        udp(
            [10, 0, 0, 1],
            client_address(self.client),
            7,
            1000 + u16::from(self.client),
            &payload,
        )
    }

    /// Reads the frame that a client receives.
    #[must_use]
    pub fn parse(frame: &[u8]) -> Option<Self> {
        let payload = udp_payload(frame)?;
        let (client, words) = payload.split_first()?;
        let word = |at: usize| words.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes);
        Some(Self {
            client: *client,
            id: word(0)?,
            value: word(8)?,
        })
    }
}

fn client_address(client: u8) -> [u8; 4] {
    [10, 0, 0, 100 + client]
}

fn udp(source: [u8; 4], destination: [u8; 4], from: u16, to: u16, payload: &[u8]) -> Bytes {
    let hardware = |address: [u8; 4]| [2, 0, address[0], address[1], address[2], address[3]];
    let builder = PacketBuilder::ethernet2(hardware(source), hardware(destination))
        .ipv4(source, destination, 64)
        .udp(from, to);
    let mut frame = Vec::with_capacity(builder.size(payload.len()));
    builder.write(&mut frame, payload).expect("a short packet fits");
    frame.into()
}

fn udp_payload(frame: &[u8]) -> Option<&[u8]> {
    match SlicedPacket::from_ethernet(frame).ok()?.transport? {
        TransportSlice::Udp(udp) => Some(udp.payload()),
        _ => None,
    }
}

fn index(page: u64) -> usize {
    usize::try_from(page).expect("the toy is small")
}
