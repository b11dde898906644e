//! One end of a TCP connection, as small as it can be: the toy guest's and its clients'.
//!
//! Driven by its owner with segments and a time in milliseconds; says what to send. Takes data in order only, goes
//! back to the first unacknowledged byte when its timer runs out, delays acknowledgements that nothing
//! carries. Where it cuts its segments is the host's choice.

use crate::packet::{ACK, FIN, Header, PSH, RST, SYN};
use crate::random::Random;

/// Bytes that an end takes at a time, and has in flight at most.
pub const WINDOW: u16 = 2_000;
/// Bytes that may wait to be sent or acknowledged.
pub const OUT_MAX: usize = 1_800;
const RETRY_FIRST: u64 = 150;
const RETRY_MAX: u64 = 600;
const ACK_DELAY: u64 = 20;
/// How long an end that closed first answers for the connection.
const LINGER: u64 = 400;
/// A SYN that is answered this often without an acknowledgement was nobody's.
const HALF_OPEN_RETRIES: u8 = 5;
/// No stream of these is so long that a repetition could lie so far back.
const LONG_AGO: i32 = 1 << 20;
/// Bytes of a stored end before its stream.
const STORED_BYTES: usize = 51;

/// How far a connection is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Phase {
    /// There is none.
    #[default]
    Free,
    /// It has asked.
    SynSent,
    /// It was asked.
    SynReceived,
    /// Both have agreed.
    Open,
    /// Both have ended, and this one repeats the last acknowledgement if need be.
    Lingers,
    /// The other end knows of no such connection.
    Reset,
}

/// What is wrong with a segment: no correct other end sends one like it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strange {
    /// It acknowledges what was never sent.
    Acknowledges,
    /// Its bytes are outside of the window.
    Outside,
}

/// One end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Socket {
    /// How far it is.
    pub phase: Phase,
    /// Own first number.
    pub iss: u32,
    /// The other's first number.
    pub irs: u32,
    /// First number that is not acknowledged.
    pub una: u32,
    /// Next number to be sent.
    next: u32,
    /// After the last number ever sent.
    pub max: u32,
    /// The number that is awaited.
    pub awaited: u32,
    /// What is not acknowledged, from `una` on.
    out: Vec<u8>,
    closing: bool,
    fin_acked: bool,
    /// The other's FIN has come, in its place.
    pub fin_in: bool,
    closed_first: bool,
    ack_now: bool,
    ack_at: Option<u64>,
    retry_at: Option<u64>,
    retries: u8,
}

impl Socket {
    /// Makes the end that asks.
    #[must_use]
    pub fn connect(iss: u32) -> Self {
        Self {
            phase: Phase::SynSent,
            iss,
            una: iss,
            next: iss,
            max: iss,
            ..Self::default()
        }
    }

    /// Makes the end that was asked with this number.
    #[must_use]
    pub fn accept(iss: u32, irs: u32) -> Self {
        Self {
            phase: Phase::SynReceived,
            irs,
            awaited: irs.wrapping_add(1),
            ..Self::connect(iss)
        }
    }

    /// Tells whether it takes this many bytes more.
    #[must_use]
    pub fn has_room(&self, bytes: usize) -> bool {
        !self.closing && self.out.len() + bytes <= OUT_MAX
    }

    /// Tells whether all that was to be sent has been acknowledged.
    #[must_use]
    pub fn is_acknowledged(&self) -> bool {
        self.out.is_empty() && self.una == self.max
    }

    /// Adds bytes to the stream.
    pub fn send(&mut self, bytes: &[u8]) {
        assert!(self.has_room(bytes.len()), "room was asked for");
        self.out.extend_from_slice(bytes);
    }

    /// Ends the own stream after what is in it.
    pub fn close(&mut self) {
        if !self.closing {
            self.closing = true;
            self.closed_first = !self.fin_in;
        }
    }

    /// Tells whether it has ended its own stream.
    #[must_use]
    pub fn is_closing(&self) -> bool {
        self.closing
    }

    /// Returns when it wants to be called again.
    #[must_use]
    pub fn deadline(&self) -> Option<u64> {
        self.ack_at.into_iter().chain(self.retry_at).min()
    }

    /// Takes a segment; appends what comes in its place of the stream.
    ///
    /// # Errors
    /// Says what no correct other end would send; the segment is ignored.
    pub fn hear(&mut self, now: u64, header: &Header, payload: &[u8], stream: &mut Vec<u8>) -> Result<(), Strange> {
        if header.has(RST) {
            self.hear_reset(header);
            return Ok(());
        }
        match self.phase {
            Phase::Free | Phase::Reset => return Ok(()),
            Phase::SynSent => {
                if header.flags & (SYN | ACK) == SYN | ACK && header.ack == self.iss.wrapping_add(1) {
                    self.irs = header.seq;
                    self.awaited = header.seq.wrapping_add(1);
                    self.phase = Phase::Open;
                    self.acknowledged(now, header.ack);
                    self.ack_now = true;
                }
                return Ok(());
            }
            Phase::SynReceived if header.has(SYN) && header.seq == self.irs => {
                self.next = self.iss;
                return Ok(());
            }
            _ if header.has(SYN) => {
                self.ack_now = true;
                return Ok(());
            }
            Phase::SynReceived | Phase::Open | Phase::Lingers => {}
        }
        if !header.has(ACK) {
            return Ok(());
        }
        let strange = if ahead(header.ack, self.max) > 0 {
            Some(Strange::Acknowledges)
        } else {
            let end = header.seq.wrapping_add(length(payload));
            let outside = ahead(end, self.awaited) > i32::from(WINDOW) || ahead(self.awaited, header.seq) > LONG_AGO;
            outside.then_some(Strange::Outside)
        };
        if let Some(strange) = strange {
            self.ack_now = true;
            return Err(strange);
        }
        if ahead(header.ack, self.una) > 0 {
            self.acknowledged(now, header.ack);
        }
        if self.phase == Phase::SynReceived {
            return Ok(());
        }
        self.take(now, header, payload, stream);
        self.end_if_over(now);
        Ok(())
    }

    fn hear_reset(&mut self, header: &Header) {
        match self.phase {
            Phase::SynSent if header.has(ACK) && header.ack == self.iss.wrapping_add(1) => self.phase = Phase::Reset,
            Phase::SynReceived | Phase::Open if header.seq == self.awaited => self.phase = Phase::Reset,
            _ => self.ack_now = matches!(self.phase, Phase::SynReceived | Phase::Open),
        }
    }

    fn acknowledged(&mut self, now: u64, ack: u32) {
        let mut count = usize::try_from(ack.wrapping_sub(self.una)).expect("a short stream");
        if self.una == self.iss {
            count -= 1;
            if self.phase == Phase::SynReceived {
                self.phase = Phase::Open;
            }
        }
        if count > self.out.len() {
            self.fin_acked = true;
            count = self.out.len();
        }
        self.out.drain(..count);
        self.una = ack;
        if ahead(ack, self.next) > 0 {
            self.next = ack;
        }
        self.retries = 0;
        self.retry_at = (self.una != self.max).then_some(now + RETRY_FIRST);
    }

    fn take(&mut self, now: u64, header: &Header, payload: &[u8], stream: &mut Vec<u8>) {
        let fin = header.has(FIN);
        if payload.is_empty() && !fin {
            return;
        }
        let end = header.seq.wrapping_add(length(payload));
        let known = ahead(self.awaited, header.seq);
        if known < 0 || ahead(self.awaited, end) > 0 || self.fin_in {
            // Too early, or a repetition of what is known.
            self.ack_now = true;
            return;
        }
        let fresh = payload
            .get(usize::try_from(known).expect("not negative")..)
            .unwrap_or(&[]);
        stream.extend_from_slice(fresh);
        if fresh.is_empty() && !fin {
            self.ack_now = true;
            return;
        }
        self.awaited = end;
        if fin {
            self.fin_in = true;
            self.awaited = end.wrapping_add(1);
            self.ack_now = true;
        } else if self.ack_at.is_none() {
            self.ack_at = Some(now + ACK_DELAY);
        }
    }

    fn end_if_over(&mut self, now: u64) {
        if self.phase == Phase::Open && self.fin_in && self.fin_acked {
            self.retry_at = self.closed_first.then_some(now + LINGER);
            self.phase = if self.closed_first { Phase::Lingers } else { Phase::Free };
        }
    }

    /// Lets what is due happen.
    pub fn timeout(&mut self, now: u64) {
        if self.ack_at.is_some_and(|at| at <= now) {
            self.ack_at = None;
            self.ack_now = true;
        }
        if self.retry_at.is_none_or(|at| at > now) {
            return;
        }
        self.retry_at = None;
        if self.phase == Phase::Lingers || (self.phase == Phase::SynReceived && self.retries >= HALF_OPEN_RETRIES) {
            self.phase = Phase::Free;
        } else {
            self.next = self.una;
            self.retries = self.retries.saturating_add(1);
        }
    }

    /// Hands out what is to be sent now.
    pub fn transmit(&mut self, now: u64, cuts: &mut Random, mut send: impl FnMut(Header, &[u8])) {
        if matches!(self.phase, Phase::SynSent | Phase::SynReceived) {
            let flags = if self.phase == Phase::SynSent { SYN } else { SYN | ACK };
            if self.next == self.iss {
                send(self.header(flags), &[]);
                self.advance(now, 1);
            }
            return;
        }
        if !matches!(self.phase, Phase::Open | Phase::Lingers | Phase::Free) {
            return;
        }
        if self.phase == Phase::Open {
            self.transmit_stream(now, cuts, &mut send);
        }
        if core::mem::take(&mut self.ack_now) {
            self.ack_at = None;
            send(self.header(ACK), &[]);
        }
    }

    fn transmit_stream(&mut self, now: u64, cuts: &mut Random, send: &mut impl FnMut(Header, &[u8])) {
        let sent = usize::try_from(self.next.wrapping_sub(self.una)).expect("a short stream");
        let mut rest = self.out.get(sent..).unwrap_or(&[]).to_vec();
        while !rest.is_empty() {
            let length = if cuts.one_in(3) {
                1 + usize::try_from(cuts.below(rest.len() as u64)).expect("short")
            } else {
                rest.len()
            };
            let later = rest.split_off(length);
            send(self.header(ACK | PSH), &rest);
            self.advance(now, u32::try_from(length).expect("short"));
            self.acknowledges();
            rest = later;
        }
        let end = u32::try_from(self.out.len()).expect("short");
        if self.closing && !self.fin_acked && self.next.wrapping_sub(self.una) == end {
            send(self.header(ACK | FIN), &[]);
            self.advance(now, 1);
            self.acknowledges();
        }
    }

    fn acknowledges(&mut self) {
        self.ack_now = false;
        self.ack_at = None;
    }

    fn advance(&mut self, now: u64, count: u32) {
        self.next = self.next.wrapping_add(count);
        if ahead(self.next, self.max) > 0 {
            self.max = self.next;
        }
        if self.retry_at.is_none() {
            let wait = (RETRY_FIRST << self.retries.min(6)).min(RETRY_MAX);
            self.retry_at = Some(now + wait);
        }
    }

    fn header(&self, flags: u8) -> Header {
        Header {
            seq: self.next,
            ack: if flags & ACK == 0 { 0 } else { self.awaited },
            flags,
            window: WINDOW,
        }
    }

    /// Returns the reset with which an end answers a segment of a connection that it does not know.
    #[must_use]
    pub fn refusal(header: &Header, length: usize) -> Option<Header> {
        if header.has(RST) {
            return None;
        }
        let occupied = length + usize::from(header.has(SYN)) + usize::from(header.has(FIN));
        let ack = header.seq.wrapping_add(u32::try_from(occupied).expect("short"));
        Some(if header.has(ACK) {
            Header {
                seq: header.ack,
                ack: 0,
                flags: RST,
                window: 0,
            }
        } else {
            Header {
                seq: 0,
                ack,
                flags: RST | ACK,
                window: 0,
            }
        })
    }

    /// Writes it down.
    #[must_use]
    pub fn store(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(STORED_BYTES + self.out.len());
        out.extend([self.phase as u8, self.retries]);
        out.extend(
            [
                self.closing,
                self.fin_acked,
                self.fin_in,
                self.closed_first,
                self.ack_now,
                self.ack_at.is_some(),
                self.retry_at.is_some(),
            ]
            .map(u8::from),
        );
        for number in [self.iss, self.irs, self.una, self.next, self.max, self.awaited] {
            out.extend(number.to_le_bytes());
        }
        for time in [self.ack_at, self.retry_at] {
            out.extend(time.unwrap_or_default().to_le_bytes());
        }
        out.extend(u16::try_from(self.out.len()).expect("short").to_le_bytes());
        out.extend_from_slice(&self.out);
        out
    }

    /// Reads the phase of a stored end.
    ///
    /// # Panics
    /// If the bytes are not a stored end.
    #[must_use]
    pub fn stored_phase(bytes: &[u8]) -> Phase {
        [
            Phase::Free,
            Phase::SynSent,
            Phase::SynReceived,
            Phase::Open,
            Phase::Lingers,
            Phase::Reset,
        ][usize::from(bytes[0])]
    }

    /// Reads the deadline of a stored end.
    #[must_use]
    pub fn stored_deadline(bytes: &[u8]) -> Option<u64> {
        let time = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let ack = (bytes[7] != 0).then(|| time(33));
        ack.into_iter().chain((bytes[8] != 0).then(|| time(41))).min()
    }

    /// Reads it back.
    ///
    /// # Panics
    /// If the bytes are not a stored end.
    #[must_use]
    pub fn load(bytes: &[u8]) -> Self {
        let flag = |at: usize| bytes[2 + at] != 0;
        let number = |at: usize| u32::from_le_bytes(bytes[9 + 4 * at..13 + 4 * at].try_into().expect("four bytes"));
        let time = |at: usize| u64::from_le_bytes(bytes[33 + 8 * at..41 + 8 * at].try_into().expect("eight bytes"));
        let length = usize::from(u16::from_le_bytes([bytes[49], bytes[50]]));
        Self {
            phase: Self::stored_phase(bytes),
            retries: bytes[1],
            closing: flag(0),
            fin_acked: flag(1),
            fin_in: flag(2),
            closed_first: flag(3),
            ack_now: flag(4),
            ack_at: flag(5).then(|| time(0)),
            retry_at: flag(6).then(|| time(1)),
            iss: number(0),
            irs: number(1),
            una: number(2),
            next: number(3),
            max: number(4),
            awaited: number(5),
            out: bytes[STORED_BYTES..STORED_BYTES + length].to_vec(),
        }
    }
}

/// Returns how far one number is after another; negative if it is before.
#[must_use]
pub fn ahead(one: u32, other: u32) -> i32 {
    one.wrapping_sub(other).cast_signed()
}

fn length(payload: &[u8]) -> u32 {
    u32::try_from(payload.len()).expect("a short frame")
}
