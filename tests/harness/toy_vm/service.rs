//! The toy's registers: requests are carried out once, and answered in order when their changes are durable.

use bytes::Bytes;
use checkpoint::wire::Written;

use super::{
    Effect, MISC, NOISE, PAGES, QUEUE, RARE_BLOCKS, RARE_EVERY, SECTOR_BYTES, ToyVm, Turn, rare_discard, rare_sector,
    sector,
};
use crate::ops::{Answer, Op, RECORD_BYTES, Request};
use crate::packet::{self, End, GUEST, SERVICE_PORT};

/// Numbers in the page for this and that.
pub(super) const FLUSHES_ASKED: usize = 0;
pub(super) const FLUSHES_DONE: usize = 1;
const QUEUE_HEAD: usize = 2;
const QUEUE_TAIL: usize = 3;

/// When between two writes to rare blocks something is discarded.
const DISCARD_AT: u64 = RARE_EVERY / 2;
const QUEUE_MAX: u64 = 32;
const ENTRY_BYTES: usize = 16 + RECORD_BYTES;
const LAST_REQUESTS: usize = 8;
const LAST_REQUEST_BYTES: usize = 16;

/// Who waits for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asker {
    Datagram(End),
    /// A connection: its place, and the client's first number, so that a later one there is not taken for it.
    Connection(u8, u32),
}

/// An answer that waits.
#[derive(Clone, Copy, Debug)]
struct Entry {
    flush: u64,
    asker: Asker,
    logged: bool,
    answer: Answer,
}

impl ToyVm {
    pub(super) fn queue_has_room(&self) -> bool {
        self.queued() < QUEUE_MAX
    }

    fn queued(&self) -> u64 {
        self.memory.number(MISC, QUEUE_TAIL) - self.memory.number(MISC, QUEUE_HEAD)
    }

    /// Carries a request out, unless it has been; its answer waits for the last flush.
    pub(super) fn execute(&mut self, request: &Request, asker: Asker, turn: &mut Turn<'_>) {
        let page = u64::from(request.key);
        let last = LAST_REQUESTS + usize::from(request.client) * LAST_REQUEST_BYTES;
        let value = self.memory.number(page, 0);
        let last_id = self.memory.number(page, last / 8);
        let id = u64::from(request.id);
        let mut fresh = false;
        let result = if request.op == Op::Read {
            value
        } else if id == last_id {
            self.memory.number(page, last / 8 + 1)
        } else if id < last_id {
            return;
        } else {
            let (new, result) = request.op.apply(value);
            self.memory.set_number(page, 0, new);
            self.memory.set_number(page, last / 8, id);
            self.memory.set_number(page, last / 8 + 1, result);
            turn.effects.push(self.write_sector(request.key));
            turn.effects.extend(self.write_rarely(request.key));
            turn.effects.push(self.ask_flush());
            fresh = true;
            result
        };
        let noise = if request.noisy { turn.random.draw() | 1 } else { 0 };
        if request.noisy {
            self.memory.set_number(NOISE + noise % (PAGES - NOISE), 0, noise);
        }
        let answer = Answer {
            client: request.client,
            key: request.key,
            id: request.id,
            value: result,
            noise,
        };
        self.enqueue(Entry {
            flush: self.memory.number(MISC, FLUSHES_ASKED),
            asker,
            logged: request.logged && fresh,
            answer,
        });
    }

    pub(super) fn write_sector(&self, key: u8) -> Effect {
        Effect::Write {
            offset: sector(key),
            written: Written::Data(self.memory.page(u64::from(key))[..SECTOR_BYTES].repeat(2).into()),
        }
    }

    /// Some changes are also written down in a block that is seldom written; others discard it.
    fn write_rarely(&self, key: u8) -> Option<Effect> {
        let changes = self.memory.number(MISC, FLUSHES_ASKED);
        let rare = changes / RARE_EVERY % RARE_BLOCKS;
        match changes % RARE_EVERY {
            0 => Some(self.write_rare(rare, key)),
            DISCARD_AT => {
                let (offset, len) = rare_discard(rare);
                let written = Written::Zeros(len);
                Some(Effect::Write { offset, written })
            }
            _ => None,
        }
    }

    pub(super) fn write_rare(&self, rare: u64, key: u8) -> Effect {
        Effect::Write {
            offset: rare_sector(rare),
            written: Written::Data(Bytes::copy_from_slice(
                &self.memory.page(u64::from(key))[..SECTOR_BYTES],
            )),
        }
    }

    pub(super) fn ask_flush(&mut self) -> Effect {
        let number = self.memory.number(MISC, FLUSHES_ASKED) + 1;
        self.memory.set_number(MISC, FLUSHES_ASKED, number);
        Effect::Flush(number)
    }

    /// Answers what may be answered, then goes on with requests for which there was no room.
    pub(super) fn drain(&mut self, turn: &mut Turn<'_>) {
        loop {
            let mut answered = false;
            while let Some(entry) = self.front()
                && entry.flush <= self.memory.number(MISC, FLUSHES_DONE)
                && (!entry.logged || self.can_log(turn))
                && self.answer(&entry, turn)
            {
                if entry.logged {
                    self.log(&entry.answer, turn);
                }
                answered = true;
            }
            if !answered || !self.read_waiting_requests(turn) {
                return;
            }
        }
    }

    /// Takes an entry out and answers it; false if its connection has no room.
    fn answer(&mut self, entry: &Entry, turn: &mut Turn<'_>) -> bool {
        let record = entry.answer.encode();
        if let Asker::Connection(place, first) = entry.asker
            && !self.connection_has_room(place, first)
        {
            return false;
        }
        let head = self.memory.number(MISC, QUEUE_HEAD);
        self.memory.set_number(MISC, QUEUE_HEAD, head + 1);
        match entry.asker {
            Asker::Datagram(to) => {
                let frame = packet::udp((GUEST, SERVICE_PORT), to, &record);
                if entry.answer.id.is_multiple_of(3) {
                    send_in_fragments(&frame, turn);
                } else {
                    turn.effects.push(Effect::Send { frame, first: None });
                }
            }
            Asker::Connection(place, first) => self.send_on(place, first, &record, turn),
        }
        true
    }

    /// Tells whether answers for a connection wait.
    pub(super) fn has_queued(&self, place: u8, first: u32) -> bool {
        let [head, tail] = [QUEUE_HEAD, QUEUE_TAIL].map(|at| self.memory.number(MISC, at));
        (head..tail).any(|number| self.entry(number).asker == Asker::Connection(place, first))
    }

    fn front(&self) -> Option<Entry> {
        (self.queued() > 0).then(|| self.entry(self.memory.number(MISC, QUEUE_HEAD)))
    }

    fn enqueue(&mut self, entry: Entry) {
        assert!(self.queue_has_room(), "room was asked for");
        let tail = self.memory.number(MISC, QUEUE_TAIL);
        self.memory.write(QUEUE, place(tail), &entry.store());
        self.memory.set_number(MISC, QUEUE_TAIL, tail + 1);
    }

    fn entry(&self, number: u64) -> Entry {
        Entry::load(&self.memory.page(QUEUE)[place(number)..][..ENTRY_BYTES])
    }
}

impl Entry {
    fn store(&self) -> [u8; ENTRY_BYTES] {
        let mut out = [0; ENTRY_BYTES];
        out[..8].copy_from_slice(&self.flush.to_le_bytes());
        match self.asker {
            Asker::Datagram((address, port)) => {
                out[9] = address;
                out[10..12].copy_from_slice(&port.to_le_bytes());
            }
            Asker::Connection(place, first) => {
                out[8] = 1;
                out[9] = place;
                out[10..14].copy_from_slice(&first.to_le_bytes());
            }
        }
        out[14] = u8::from(self.logged);
        out[16..].copy_from_slice(&self.answer.encode());
        out
    }

    fn load(bytes: &[u8]) -> Self {
        let first = u32::from_le_bytes(bytes[10..14].try_into().expect("four bytes"));
        Self {
            flush: u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")),
            asker: if bytes[8] == 0 {
                Asker::Datagram((bytes[9], u16::from_le_bytes([bytes[10], bytes[11]])))
            } else {
                Asker::Connection(bytes[9], first)
            },
            logged: bytes[14] != 0,
            answer: Answer::decode(&bytes[16..]).expect("the guest's memory is what it wrote"),
        }
    }
}

/// Where a datagram is cut, under which number and which part is sent first is each host's own.
fn send_in_fragments(frame: &Bytes, turn: &mut Turn<'_>) {
    let [number, place] = [1 << 16, 3].map(|end| turn.random.below(end));
    let [number, place] = [number, 8 * (1 + place)].map(|number| u16::try_from(number).expect("small"));
    let mut parts = packet::cut(frame, number, place);
    if turn.random.one_in(2) {
        parts.reverse();
    }
    let sends = parts.map(|frame| Effect::Send { frame, first: None });
    turn.effects.extend(sends);
}

fn place(number: u64) -> usize {
    usize::try_from(number % QUEUE_MAX).expect("small") * ENTRY_BYTES
}
