//! The translator's connections in a checkpoint.
//!
//! Bounded: those whose sequence numbers are translated come first, then those whose timestamps are, then the others, the
//! latest used first; what does not fit is left out, and counted.

use std::cmp::Reverse;
use std::collections::{BTreeMap, VecDeque};

use crate::codec::{Reader, StateError, VERSION, put_address, put_vlans};
use crate::flow::{Class, FlowKey};
use crate::seq::Seq;

use super::timestamps::Clock;
use super::{Connection, Offset, Translator};

/// Most bytes of a snapshot.
pub(super) const BYTES_MAX: usize = 768 * 1024;
/// Fewest bytes of one connection in a snapshot.
const CONNECTION_BYTES_MIN: usize = 1 + 7 + 7 + 2;

/// The connections for a checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// As they are sent.
    pub encoded: Vec<u8>,
    /// How many did not fit that a takeover would break or delay.
    pub left_out: usize,
}

impl Translator {
    /// Returns the connections for a checkpoint.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let mut order: Vec<(&FlowKey, &Connection)> = self.connections.iter().collect();
        order.sort_by_key(|(_, connection)| {
            let breaks = connection.offset != Offset::Known(0);
            (!breaks, !connection.matters(), Reverse(connection.used))
        });
        let mut encoded = vec![VERSION, 0, 0, 0, 0];
        let mut count: u32 = 0;
        let mut order = order.into_iter();
        let mut left_out = 0;
        for (key, connection) in order.by_ref() {
            let before = encoded.len();
            put_connection(&mut encoded, key, connection);
            if encoded.len() > BYTES_MAX {
                encoded.truncate(before);
                left_out = usize::from(connection.matters());
                break;
            }
            count += 1;
        }
        left_out += order.filter(|(_, connection)| connection.matters()).count();
        encoded[1..5].copy_from_slice(&count.to_le_bytes());
        Snapshot { encoded, left_out }
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
}

const FIN_OUT_ACKED: u16 = 1;
const FIN_IN_ACKED: u16 = 1 << 1;
const ENDED: u16 = 1 << 2;
const OPENED: u16 = 1 << 3;
const AWAITED: u16 = 1 << 4;
/// The flags of the numbers that follow, in their order.
const NUMBERS: [u16; 7] = [1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14];
const KNOWN: u16 = 0x7f1f;

fn put_connection(out: &mut Vec<u8>, key: &FlowKey, connection: &Connection) {
    put_vlans(out, &key.vlans);
    for end in [key.source, key.destination] {
        put_address(out, end.address);
        out.extend(end.port.to_le_bytes());
    }
    let some = |number: u32| (number != 0).then_some(number);
    let (awaited, offset) = match connection.offset {
        Offset::Known(offset) => (false, some(offset)),
        Offset::Awaited(first) => (true, first.map(|first| first.0)),
    };
    let raw = |number: Option<Seq>| number.map(|number| number.0);
    let clock = &connection.clock;
    let numbers = [
        raw(connection.isn),
        offset,
        raw(connection.fin_out),
        raw(connection.fin_in),
        some(clock.shift),
        raw(clock.sent),
        raw(clock.floor),
    ];
    let mut flags = 0;
    for (set, flag) in [
        (connection.fin_out_acked, FIN_OUT_ACKED),
        (connection.fin_in_acked, FIN_IN_ACKED),
        (connection.ended, ENDED),
        (connection.opened, OPENED),
        (awaited, AWAITED),
    ] {
        flags |= if set { flag } else { 0 };
    }
    for (number, flag) in numbers.iter().zip(NUMBERS) {
        flags |= if number.is_some() { flag } else { 0 };
    }
    out.extend(flags.to_le_bytes());
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
    let flags = reader.u16()?;
    if flags & !KNOWN != 0 {
        return Err(StateError::Invalid("connection state"));
    }
    let has = |flag: u16| flags & flag != 0;
    let mut numbers = [None; NUMBERS.len()];
    for (number, flag) in numbers.iter_mut().zip(NUMBERS) {
        if has(flag) {
            *number = Some(reader.u32()?);
        }
    }
    let [isn, offset, fin_out, fin_in, shift, sent, floor] = numbers;
    let connection = Connection {
        isn: isn.map(Seq),
        offset: if has(AWAITED) {
            Offset::Awaited(offset.map(Seq))
        } else {
            Offset::Known(offset.unwrap_or(0))
        },
        clock: Clock {
            shift: shift.unwrap_or(0),
            sent: sent.map(Seq),
            echoed: None,
            floor: floor.map(Seq),
        },
        opened: has(OPENED),
        fin_out: fin_out.map(Seq),
        fin_in: fin_in.map(Seq),
        fin_out_acked: has(FIN_OUT_ACKED),
        fin_in_acked: has(FIN_IN_ACKED),
        ended: has(ENDED),
        used: 0,
    };
    Ok((key, connection))
}
