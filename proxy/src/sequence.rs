//! Translates TCP sequence numbers at the guest's edge, on both sides.
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
//! non-zero offset a little later, for a repeated last ACK.
//!
//! Never drops, delays or adds a frame. What is not TCP, and fragments, pass untouched.

use std::collections::{BTreeMap, VecDeque};

use checkpoint::limits::FLOWS_MAX;
use checkpoint::mutants::{self, Mutant};

use crate::codec::{Reader, StateError, VERSION, put_address, put_vlans};
use crate::flow::{Class, FlowKey};
use crate::frame::{self, Body, Segment};
use crate::seq::Seq;

/// Ended connections with an offset that are still translated.
const ENDED_MAX: usize = 256;
/// Most bytes of a snapshot; what does not fit is left out, connections without an offset first.
const SNAPSHOT_BYTES_MAX: usize = 768 * 1024;
/// Fewest bytes of one connection in a snapshot.
const CONNECTION_BYTES_MIN: usize = 1 + 5 + 5 + 4 + 1 + 4;
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
    /// The number of the guest's own SYN.
    isn: Seq,
    offset: Offset,
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
        self.following = false;
        if mutants::on(Mutant::ForgetOffsets) {
            self.connections.clear();
        }
    }

    /// Translates a frame that the guest sends.
    pub fn outbound(&mut self, frame: &mut [u8]) {
        let parsed = frame::parse(frame);
        let Body::Tcp(segment) = parsed.body else { return };
        if segment.syn {
            self.own_syn(parsed.key, &segment);
        }
        let tick = self.next_tick();
        let Some(connection) = self.connections.get_mut(&parsed.key) else {
            return;
        };
        connection.used = tick;
        if let Offset::Known(offset) = connection.offset
            && offset != 0
        {
            segment.set_seq(frame, segment.seq.minus(offset));
        }
        let forget = connection.sent(&segment);
        if segment.rst || connection.is_finished() {
            self.end(parsed.key);
        } else if forget {
            self.connections.remove(&parsed.key);
        }
    }

    /// Translates a frame that the guest is about to receive.
    pub fn inbound(&mut self, frame: &mut [u8]) {
        let parsed = frame::parse(frame);
        let Body::Tcp(segment) = parsed.body else { return };
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
        connection.received(&segment, ack);
        if (segment.rst && connection.may_be_reset(&segment)) || connection.is_finished() {
            self.end(key);
        }
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
            .filter(|connection| connection.matters())
            .count()
    }

    /// Returns the connections for a checkpoint.
    #[must_use]
    pub fn snapshot(&self) -> Vec<u8> {
        let mut order: Vec<(&FlowKey, &Connection)> = self.connections.iter().collect();
        order.sort_by_key(|(_, connection)| (!connection.matters(), std::cmp::Reverse(connection.used)));
        let mut out = vec![VERSION, 0, 0, 0, 0];
        let mut count: u32 = 0;
        for (key, connection) in order {
            let before = out.len();
            put_connection(&mut out, key, connection);
            if out.len() > SNAPSHOT_BYTES_MAX {
                out.truncate(before);
                break;
            }
            count += 1;
        }
        out[1..5].copy_from_slice(&count.to_le_bytes());
        out
    }

    /// Replaces the connections by those of a checkpoint, all or nothing.
    ///
    /// # Errors
    /// Fails if the bytes are not a snapshot within the bounds.
    pub fn replace(&mut self, bytes: &[u8]) -> Result<(), StateError> {
        let mut reader = Reader(bytes);
        reader.version()?;
        let count = reader.count("connections", self.limit, CONNECTION_BYTES_MIN)?;
        let mut connections = BTreeMap::new();
        let mut ended = VecDeque::new();
        for _ in 0..count {
            let (key, connection) = connection(&mut reader)?;
            if connection.ended {
                ended.push_back(key);
            }
            if connections.insert(key, connection).is_some() {
                return Err(StateError::Invalid("second connection on the same ports"));
            }
        }
        reader.end()?;
        self.connections = connections;
        self.ended = ended;
        self.tick = 0;
        Ok(())
    }

    /// Takes in a SYN of the guest: a new connection, or the same again.
    fn own_syn(&mut self, key: FlowKey, segment: &Segment) {
        if let Some(connection) = self.connections.get_mut(&key)
            && connection.isn == segment.seq
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
        if self.connections.len() >= self.limit && !self.connections.contains_key(&key) {
            self.evict();
        }
        self.connections.insert(key, Connection::new(segment.seq, offset));
    }

    fn end(&mut self, key: FlowKey) {
        let Some(connection) = self.connections.get_mut(&key) else {
            return;
        };
        if !matches!(connection.offset, Offset::Known(offset) if offset != 0) {
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

    /// Makes room: a sixteenth of the connections, those without an offset first, then the longest unused.
    fn evict(&mut self) {
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
    fn new(isn: Seq, offset: Offset) -> Self {
        Self {
            isn,
            offset,
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
        if plausible {
            self.offset = Offset::Known(self.isn.plus(1).0.wrapping_sub(ack.0));
        }
    }

    /// Says whether the guest may take this reset. Once its offset is known a connection outlives a false one anyway.
    fn may_be_reset(&self, segment: &Segment) -> bool {
        match self.offset {
            Offset::Known(_) => true,
            Offset::Awaited(first) => first == Some(segment.seq),
        }
    }

    /// Notes a segment of the guest; says whether there is nothing left to remember.
    fn sent(&mut self, segment: &Segment) -> bool {
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
        // Frames leave in order: after this the guest does not repeat the SYN.
        self.opened && self.offset == Offset::Known(0) && !segment.syn && !segment.rst
    }

    /// Notes a segment of the client, its acknowledgement in the guest's numbers.
    fn received(&mut self, segment: &Segment, ack: Option<Seq>) {
        if segment.fin {
            self.fin_in = Some(segment.end_seq());
        }
        if let Some(ack) = ack {
            self.opened |= self.isn.plus(1).at_most(ack);
            self.fin_out_acked |= self.fin_out.is_some_and(|fin| fin.at_most(ack));
        }
    }

    fn is_finished(&self) -> bool {
        self.fin_out_acked && self.fin_in_acked
    }

    /// Says whether forgetting it would break it.
    fn matters(&self) -> bool {
        self.offset != Offset::Known(0)
    }
}

const HAS_FIN_OUT: u8 = 1;
const HAS_FIN_IN: u8 = 1 << 1;
const FIN_OUT_ACKED: u8 = 1 << 2;
const FIN_IN_ACKED: u8 = 1 << 3;
const ENDED: u8 = 1 << 4;
const OPENED: u8 = 1 << 5;
const AWAITED: u8 = 1 << 6;
const AWAITED_FIRST: u8 = 1 << 7;

fn put_connection(out: &mut Vec<u8>, key: &FlowKey, connection: &Connection) {
    put_vlans(out, &key.vlans);
    for end in [key.source, key.destination] {
        put_address(out, end.address);
        out.extend(end.port.to_le_bytes());
    }
    let flag = |set: bool, flag: u8| if set { flag } else { 0 };
    out.push(
        flag(connection.fin_out.is_some(), HAS_FIN_OUT)
            | flag(connection.fin_in.is_some(), HAS_FIN_IN)
            | flag(connection.fin_out_acked, FIN_OUT_ACKED)
            | flag(connection.fin_in_acked, FIN_IN_ACKED)
            | flag(connection.ended, ENDED)
            | flag(connection.opened, OPENED)
            | flag(matches!(connection.offset, Offset::Awaited(_)), AWAITED)
            | flag(matches!(connection.offset, Offset::Awaited(Some(_))), AWAITED_FIRST),
    );
    let offset = match connection.offset {
        Offset::Known(offset) => Some(offset),
        Offset::Awaited(first) => first.map(|first| first.0),
    };
    let numbers = [
        Some(connection.isn.0),
        offset,
        connection.fin_out.map(|fin| fin.0),
        connection.fin_in.map(|fin| fin.0),
    ];
    for number in numbers.into_iter().flatten() {
        out.extend(number.to_le_bytes());
    }
}

fn connection(reader: &mut Reader<'_>) -> Result<(FlowKey, Connection), StateError> {
    let vlans = reader.vlans()?;
    let source = (reader.address()?, reader.u16()?);
    let destination = (reader.address()?, reader.u16()?);
    if source.0.is_ipv4() != destination.0.is_ipv4() {
        return Err(StateError::Invalid("pair of addresses"));
    }
    let key = FlowKey::addressed(Class::Tcp, vlans, (source.0, destination.0), (source.1, destination.1));
    let flags = reader.u8()?;
    let has = |flag: u8| flags & flag != 0;
    let isn = Seq(reader.u32()?);
    let offset = match (has(AWAITED), has(AWAITED_FIRST)) {
        (false, false) => Offset::Known(reader.u32()?),
        (true, true) => Offset::Awaited(Some(Seq(reader.u32()?))),
        (true, false) => Offset::Awaited(None),
        (false, true) => return Err(StateError::Invalid("connection state")),
    };
    let fin_out = if has(HAS_FIN_OUT) {
        Some(Seq(reader.u32()?))
    } else {
        None
    };
    let fin_in = if has(HAS_FIN_IN) {
        Some(Seq(reader.u32()?))
    } else {
        None
    };
    let connection = Connection {
        isn,
        offset,
        opened: has(OPENED),
        fin_out,
        fin_in,
        fin_out_acked: has(FIN_OUT_ACKED),
        fin_in_acked: has(FIN_IN_ACKED),
        ended: has(ENDED),
        used: 0,
    };
    Ok((key, connection))
}

#[cfg(test)]
mod tests;
