//! Translates TCP sequence numbers and timestamps at the guest's edge, on both sides.
//!
//! Clients know the numbers of the primary's guest. The secondary's guest chooses its own for each
//! connection that is opened after the last load, so its segments are translated on the way out and
//! acknowledgements on the way in, by the connection's *offset* = guest's number − clients' number:
//!
//! ```text
//!   own SYN sent while following --> Awaited --first inbound ACK of the SYN--> Known(offset)
//!   own SYN sent while leading   --> Known(0)
//!   load: replaced by the primary's connections and offsets, zeros included
//! ```
//!
//! A zero is remembered until the handshake is over, so a SYN-ACK that is repeated after a load is not
//! taken for a new connection. After a takeover offsets go on for the life of their connections. A
//! connection is forgotten when both sides' FIN are acknowledged or one resets it; the last ones of a
//! non-zero offset a little later, for a repeated last ACK. Timestamps are translated too, see `timestamps`: while
//! following for each connection that has them, while leading as long as it shows.
//!
//! Never drops, delays or adds a frame, never changes a signed one. What is not TCP passes untouched, fragments as well, except
//! the numbers that an ICMP error quotes, see `quote`.

mod quote;
mod snapshot;
mod timestamps;

use std::collections::{BTreeMap, VecDeque};

use checkpoint::limits::FLOWS_MAX;
use checkpoint::mutants::{self, Mutant};

use crate::flow::{Class, FlowKey};
use crate::frame::{Body, Frame, Segment};
use crate::seq::Seq;

pub use snapshot::Snapshot;
use timestamps::Clock;

/// Ended connections with an offset that are still translated.
const ENDED_MAX: usize = 256;
/// How far past the expected number the first segment of the client may be: the window of a SYN is not scaled.
const FIRST_WINDOW: i32 = 0xffff;

/// The translator; see the module.
#[derive(Clone, Debug)]
pub struct Translator {
    connections: BTreeMap<FlowKey, Connection>,
    /// Ended connections that are still translated, oldest first; entries may be outdated.
    ended: VecDeque<FlowKey>,
    following: bool,
    limit: usize,
    tick: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Connection {
    /// The number of the guest's own SYN, if it was seen.
    isn: Option<Seq>,
    offset: Offset,
    clock: Clock,
    /// The client has acknowledged the SYN.
    opened: bool,
    /// After the FIN of each side, and whether it has been acknowledged.
    fin_out: Option<Seq>,
    fin_in: Option<Seq>,
    fin_out_acked: bool,
    fin_in_acked: bool,
    ended: bool,
    used: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Offset {
    Known(u32),
    /// Not known yet; with the number that the client is to begin with, once the guest has acknowledged its SYN.
    Awaited(Option<Seq>),
}

/// What is to be changed in a segment that the guest sends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Edits {
    seq: Option<Seq>,
    time: Option<Seq>,
}

impl Edits {
    pub(crate) fn is_empty(self) -> bool {
        self == Self::default()
    }

    /// Changes the frame, and what was read of it.
    pub(crate) fn apply(self, parsed: &mut Frame, frame: &mut [u8]) {
        let Body::Tcp(segment) = &mut parsed.body else { return };
        if let Some(seq) = self.seq {
            segment.set_seq(frame, seq);
            segment.seq = seq;
        }
        if let Some(time) = self.time
            && let Some(times) = &mut segment.options.timestamps
        {
            times.value = time;
            segment.set_time(frame, time);
        }
    }
}

impl Default for Translator {
    fn default() -> Self {
        Self::new()
    }
}

impl Translator {
    /// Makes a translator that leads and knows no connection.
    #[must_use]
    pub fn new() -> Self {
        Self::with_limit(FLOWS_MAX)
    }

    /// Makes a translator that knows at most `limit` connections at a time.
    #[must_use]
    pub fn with_limit(limit: usize) -> Self {
        Self {
            connections: BTreeMap::new(),
            ended: VecDeque::new(),
            following: false,
            limit,
            tick: 0,
        }
    }

    /// Follows a primary from here on: the offsets of connections that its own guest opens are to be learnt.
    pub fn follow(&mut self) {
        self.following = true;
    }

    /// Leads from here on: clients know its own guest's numbers, but for the connections opened before.
    pub fn lead(&mut self) {
        if std::mem::take(&mut self.following) {
            let known = |connection: &&mut Connection| matches!(connection.offset, Offset::Known(_));
            for connection in self.connections.values_mut().filter(known) {
                connection.clock.lead();
            }
        }
        if mutants::on(Mutant::ForgetOffsets) {
            self.connections.clear();
        }
    }

    /// Takes a frame that the guest sends and returns what is to be changed in it.
    pub(crate) fn outbound(&mut self, parsed: &Frame) -> Edits {
        let mut edits = Edits::default();
        let Body::Tcp(segment) = parsed.body else { return edits };
        if segment.options.signed {
            return edits;
        }
        if segment.syn {
            self.own_syn(parsed.key, &segment);
        } else if self.following && segment.options.timestamps.is_some() && !segment.rst {
            self.watch(parsed.key);
        }
        let tick = self.next_tick();
        let Some(connection) = self.connections.get_mut(&parsed.key) else {
            return edits;
        };
        connection.used = tick;
        if let Offset::Known(offset) = connection.offset
            && offset != 0
        {
            edits.seq = Some(segment.seq.minus(offset));
        }
        if let Some(times) = segment.options.timestamps {
            let time = connection.clock.outbound(times.value);
            edits.time = Some(time).filter(|time| *time != times.value);
        }
        connection.sent(&segment);
        let forget = connection.is_common(&segment) && !(self.following && connection.clock.sent.is_some());
        if segment.rst || connection.is_finished() {
            self.end(parsed.key);
        } else if forget {
            self.connections.remove(&parsed.key);
        }
        edits
    }

    /// Says whether anything may have to be changed in a frame that the guest is about to receive.
    pub(crate) fn concerns(&self, parsed: &Frame) -> bool {
        match parsed.body {
            Body::Tcp(_) => self.connections.contains_key(&parsed.key.reversed()),
            Body::Fragment(_) => false,
            Body::Whole(_) => matches!(parsed.key.class, Class::Icmp | Class::Icmpv6),
        }
    }

    /// Translates a frame that the guest is about to receive.
    pub(crate) fn inbound(&mut self, parsed: &Frame, frame: &mut [u8]) {
        let segment = match parsed.body {
            Body::Tcp(segment) if !segment.options.signed => segment,
            Body::Tcp(_) | Body::Fragment(_) => return,
            Body::Whole(_) => return self.quoted(&parsed.key, frame),
        };
        let key = parsed.key.reversed();
        let tick = self.next_tick();
        let Some(connection) = self.connections.get_mut(&key) else {
            return;
        };
        connection.used = tick;
        connection.infer(&segment);
        let mut ack = segment.ack;
        if let (Offset::Known(offset), Some(wire)) = (connection.offset, segment.ack)
            && offset != 0
        {
            ack = Some(wire.plus(offset));
            segment.set_ack(frame, wire.plus(offset));
            segment.map_sack(frame, |edge| edge.plus(offset));
        }
        if let Some(echo) = echo(&segment) {
            segment.set_echo(frame, connection.clock.inbound(echo));
        }
        connection.received(&segment, ack);
        if (segment.rst && connection.may_be_reset(&segment)) || connection.is_finished() {
            self.end(key);
        }
    }

    /// Prepares a frame of the guest that was translated before for leaving now; says whether it is still of use. A SYN is
    /// not once the client has acknowledged one: it may have left with another number.
    pub(crate) fn again(&self, parsed: &Frame, frame: &mut [u8]) -> bool {
        let Body::Tcp(segment) = parsed.body else { return true };
        let Some(connection) = self.connections.get(&parsed.key) else {
            return true;
        };
        if segment.syn && connection.opened {
            return false;
        }
        if let Some(times) = segment.options.timestamps.filter(|_| !segment.options.signed) {
            segment.set_time(frame, connection.clock.again(times.value));
        }
        true
    }

    /// Returns how many connections are known.
    #[must_use]
    pub fn len(&self) -> usize {
        self.connections.len()
    }

    /// Says whether no connection is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.connections.is_empty()
    }

    /// Returns how many connections have an offset.
    #[must_use]
    pub fn translated(&self) -> usize {
        self.connections
            .values()
            .filter(|connection| connection.offset != Offset::Known(0))
            .count()
    }

    /// Takes in a SYN of the guest: a new connection, or the same again.
    fn own_syn(&mut self, key: FlowKey, segment: &Segment) {
        if let Some(connection) = self.connections.get_mut(&key)
            && connection.isn == Some(segment.seq)
        {
            if let (Offset::Awaited(first), Some(ack)) = (&mut connection.offset, segment.ack) {
                *first = Some(ack);
            }
            return;
        }
        let offset = if self.following {
            Offset::Awaited(segment.ack)
        } else {
            Offset::Known(0)
        };
        self.make_room(&key);
        self.connections.insert(key, Connection::new(Some(segment.seq), offset));
    }

    /// Keeps an eye on the timestamps of a connection.
    fn watch(&mut self, key: FlowKey) {
        if !self.connections.contains_key(&key) {
            self.make_room(&key);
            let connection = Connection::new(None, Offset::Known(0));
            self.connections.insert(
                key,
                Connection {
                    opened: true,
                    ..connection
                },
            );
        }
    }

    fn end(&mut self, key: FlowKey) {
        let Some(connection) = self.connections.get_mut(&key) else {
            return;
        };
        if matches!(connection.offset, Offset::Awaited(_)) || !connection.matters() {
            self.connections.remove(&key);
            return;
        }
        if !std::mem::replace(&mut connection.ended, true) {
            self.ended.push_back(key);
        }
        while self.ended.len() > ENDED_MAX {
            if let Some(oldest) = self.ended.pop_front()
                && self.connections.get(&oldest).is_some_and(|connection| connection.ended)
            {
                self.connections.remove(&oldest);
            }
        }
    }

    /// Makes room for one more: a sixteenth of the connections, those without an offset first, then the longest unused.
    fn make_room(&mut self, key: &FlowKey) {
        if self.connections.len() < self.limit || self.connections.contains_key(key) {
            return;
        }
        let mut order: Vec<(bool, u64, FlowKey)> = self
            .connections
            .iter()
            .map(|(key, connection)| (connection.matters() && !connection.ended, connection.used, *key))
            .collect();
        order.sort_unstable();
        for (_, _, key) in order.iter().take(self.limit / 16 + 1) {
            self.connections.remove(key);
        }
    }

    fn next_tick(&mut self) -> u64 {
        self.tick += 1;
        self.tick
    }
}

impl Connection {
    fn new(isn: Option<Seq>, offset: Offset) -> Self {
        Self {
            isn,
            offset,
            clock: Clock::default(),
            opened: false,
            fin_out: None,
            fin_in: None,
            fin_out_acked: false,
            fin_in_acked: false,
            ended: false,
            used: 0,
        }
    }

    /// Learns the offset from the first segment that acknowledges the guest's SYN.
    fn infer(&mut self, segment: &Segment) {
        let (Offset::Awaited(first), Some(ack)) = (self.offset, segment.ack) else {
            return;
        };
        let plausible = match first {
            // The answer to the guest's own SYN.
            None => segment.syn || segment.rst,
            // Simultaneous open: the other SYN may come again, with an ACK.
            Some(first) if segment.syn => segment.seq.plus(1) == first,
            Some(first) => (0..=FIRST_WINDOW).contains(&segment.seq.after(first)),
        };
        let Some(isn) = self.isn.filter(|_| plausible) else {
            return;
        };
        self.offset = Offset::Known(isn.plus(1).0.wrapping_sub(ack.0));
        if let Some(echo) = echo(segment) {
            self.clock.learn(echo);
        }
    }

    /// Says whether the guest may take this reset. Once its offset is known a connection outlives a false one anyway.
    fn may_be_reset(&self, segment: &Segment) -> bool {
        match self.offset {
            Offset::Known(_) => true,
            Offset::Awaited(first) => first == Some(segment.seq),
        }
    }

    /// Notes a segment of the guest.
    fn sent(&mut self, segment: &Segment) {
        if segment.fin {
            self.fin_out = Some(segment.end_seq());
        }
        if let (Some(fin), Some(ack)) = (self.fin_in, segment.ack) {
            self.fin_in_acked |= fin.at_most(ack);
        }
        // A guest that goes on has not taken a reset for good.
        if !segment.rst && !self.is_finished() {
            self.ended = false;
        }
    }

    /// Says whether, after this segment of the guest, it is one like any other. Frames leave in order: the guest does not
    /// repeat the SYN.
    fn is_common(&self, segment: &Segment) -> bool {
        self.opened && !self.matters() && !segment.syn && !segment.rst
    }

    /// Notes a segment of the client, its acknowledgement in the guest's numbers.
    fn received(&mut self, segment: &Segment, ack: Option<Seq>) {
        if segment.fin {
            self.fin_in = Some(segment.end_seq());
        }
        if let Some(ack) = ack {
            self.opened |= self.isn.is_some_and(|isn| isn.plus(1).at_most(ack));
            self.fin_out_acked |= self.fin_out.is_some_and(|fin| fin.at_most(ack));
        }
    }

    fn is_finished(&self) -> bool {
        self.fin_out_acked && self.fin_in_acked
    }

    /// Says whether forgetting it would break it.
    fn matters(&self) -> bool {
        self.offset != Offset::Known(0) || self.clock.matters()
    }
}

/// Returns the time that a segment returns; a zero is none.
fn echo(segment: &Segment) -> Option<Seq> {
    let times = segment.options.timestamps.filter(|_| segment.ack.is_some())?;
    (times.echo != Seq(0)).then_some(times.echo)
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod times_tests;
