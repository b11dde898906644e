//! The toy's connections, a page each: those that clients open to ask, and those that it opens to log.

use super::{CONNECTIONS, Effect, KEYS_END, MISC, ToyVm, Turn};
use crate::clients::LOG_HOST;
use crate::ops::{Answer, RECORD_BYTES, Request};
use crate::packet::{self, ACK, End, GUEST, Header, Packet, RST, SERVICE_PORT, SYN};
use crate::tcp::{Phase, Socket};

use super::service::Asker;

/// Numbers in the page for this and that: connections ever opened, the place of the one to the log (counted
/// from 1) with its first number, and the lines on it.
pub(super) const CONNECTS: usize = 4;
const LOG_PLACE: usize = 5;
const LOG_LINES: usize = 6;
/// First numbers ever chosen.
const FIRST_NUMBERS: usize = 7;

/// Lines after which the guest closes a connection to the log.
const LOG_LINES_MAX: u64 = 6;

const SOCKET_AT: usize = 16;
const INPUT_AT: usize = 2_048;

/// A connection as it is in its page.
struct Connection {
    place: u8,
    /// The guest's port.
    port: u16,
    peer: End,
    socket: Socket,
    /// Bytes of the client that are not a whole request, or for which there was no room.
    input: Vec<u8>,
}

impl ToyVm {
    pub(super) fn hear_segment(&mut self, packet: &Packet<'_>, header: &Header, turn: &mut Turn<'_>) {
        let Some(mut connection) = self.find(packet.to.1, packet.from) else {
            return self.hear_stranger(packet, header, turn);
        };
        let clock = self.registers.clock;
        // What is strange is ignored, as by any stack.
        let _ = connection
            .socket
            .hear(clock, header, packet.payload, &mut connection.input);
        self.read_requests(&mut connection, turn);
        self.go_on(connection, turn);
    }

    fn hear_stranger(&mut self, packet: &Packet<'_>, header: &Header, turn: &mut Turn<'_>) {
        if packet.to.1 == SERVICE_PORT && header.flags & (SYN | ACK | RST) == SYN {
            let Some(place) = self.free_place() else { return };
            let socket = Socket::accept(self.first_number(turn), header.seq);
            return self.go_on(
                Connection {
                    place,
                    port: packet.to.1,
                    peer: packet.from,
                    socket,
                    input: Vec::new(),
                },
                turn,
            );
        }
        if let Some(reset) = Socket::refusal(header, packet.payload.len()) {
            turn.effects.push(Effect::Send {
                frame: packet::tcp(packet.to, packet.from, &reset, &[]),
                first: None,
            });
        }
    }

    /// Reads requests from the connections that wait for room; says whether there were any.
    pub(super) fn read_waiting_requests(&mut self, turn: &mut Turn<'_>) -> bool {
        let mut any = false;
        for place in places() {
            let page = self.memory.page(page(place));
            if phase_of(page) == Phase::Free || input_length(page) < RECORD_BYTES {
                continue;
            }
            let mut connection = self.load(place);
            any |= self.read_requests(&mut connection, turn);
            self.go_on(connection, turn);
        }
        any
    }

    fn read_requests(&mut self, connection: &mut Connection, turn: &mut Turn<'_>) -> bool {
        let mut any = false;
        while connection.input.len() >= RECORD_BYTES && self.queue_has_room() {
            let record: Vec<u8> = connection.input.drain(..RECORD_BYTES).collect();
            if let Some(request) = Request::decode(&record) {
                let asker = Asker::Connection(connection.place, connection.socket.irs);
                self.execute(&request, asker, turn);
                any = true;
            }
        }
        any
    }

    pub(super) fn connection_has_room(&self, place: u8, first: u32) -> bool {
        let connection = self.load(place);
        !connection.serves(first) || connection.socket.has_room(RECORD_BYTES)
    }

    /// Sends on a connection, if it is still the one that was meant.
    pub(super) fn send_on(&mut self, place: u8, first: u32, bytes: &[u8], turn: &mut Turn<'_>) {
        let mut connection = self.load(place);
        if connection.serves(first) {
            connection.socket.send(bytes);
            self.go_on(connection, turn);
        }
    }

    /// Tells whether the connection to the log takes a line; opens one if there is none.
    pub(super) fn can_log(&mut self, turn: &mut Turn<'_>) -> bool {
        if let Some(connection) = self.log_connection() {
            return connection.socket.has_room(RECORD_BYTES);
        }
        let Some(place) = self.free_place() else { return false };
        let connects = self.memory.number(MISC, CONNECTS) + 1;
        self.memory.set_number(MISC, CONNECTS, connects);
        let odd = if turn.random.one_in(24) {
            turn.random.below(8)
        } else {
            0
        };
        let port = u16::try_from(20_000 + connects % 5_000 * 8 + odd).expect("a port");
        let socket = Socket::connect(self.first_number(turn));
        self.memory.set_number(MISC, LOG_PLACE, 1 + u64::from(place));
        self.memory.set_number(MISC, LOG_LINES, 0);
        self.go_on(
            Connection {
                place,
                port,
                peer: LOG_HOST,
                socket,
                input: Vec::new(),
            },
            turn,
        );
        true
    }

    /// Sends a line to the log.
    pub(super) fn log(&mut self, answer: &Answer, turn: &mut Turn<'_>) {
        let mut connection = self.log_connection().expect("room was asked for");
        connection.socket.send(&answer.encode_line());
        let lines = self.memory.number(MISC, LOG_LINES) + 1;
        self.memory.set_number(MISC, LOG_LINES, lines);
        if lines == LOG_LINES_MAX {
            connection.socket.close();
            self.memory.set_number(MISC, LOG_PLACE, 0);
        }
        self.go_on(connection, turn);
    }

    fn log_connection(&self) -> Option<Connection> {
        let place = self.memory.number(MISC, LOG_PLACE).checked_sub(1)?;
        let connection = self.load(u8::try_from(place).expect("few"));
        let lives = connection.peer == LOG_HOST && !connection.socket.is_closing();
        (lives && connection.socket.phase != Phase::Free).then_some(connection)
    }

    pub(super) fn connection_deadlines(&self) -> impl Iterator<Item = u64> + '_ {
        places().filter_map(|place| {
            let page = self.memory.page(page(place));
            Socket::stored_deadline(&page[SOCKET_AT..])
        })
    }

    pub(super) fn connection_timers(&mut self, turn: &mut Turn<'_>) {
        let clock = self.registers.clock;
        for place in places() {
            let page = self.memory.page(page(place));
            if Socket::stored_deadline(&page[SOCKET_AT..]).is_some_and(|at| at <= clock) {
                let mut connection = self.load(place);
                connection.socket.timeout(clock);
                self.go_on(connection, turn);
            }
        }
    }

    /// Sends what is due on a connection, and puts it back into its page.
    fn go_on(&mut self, mut connection: Connection, turn: &mut Turn<'_>) {
        let socket = &mut connection.socket;
        let asked = self.has_queued(connection.place, socket.irs);
        if socket.phase == Phase::Open && socket.fin_in && connection.input.len() < RECORD_BYTES && !asked {
            socket.close();
        }
        let ends = ((GUEST, connection.port), connection.peer);
        // Before its answer a client's first number is not known.
        let first = Some((socket.iss, socket.irs));
        let Turn { random, effects } = turn;
        socket.transmit(self.registers.clock, random, |header, payload| {
            effects.push(Effect::Send {
                frame: packet::tcp(ends.0, ends.1, &header, payload),
                first,
            });
        });
        if matches!(socket.phase, Phase::Free | Phase::Reset) {
            *socket = Socket::default();
            connection.input.clear();
        }
        self.store(&connection);
    }

    /// A host-dependent number, often close to the end of the numbers; not one that a connection before on the same
    /// ports may have had, as in any stack.
    fn first_number(&mut self, turn: &mut Turn<'_>) -> u32 {
        let count = self.memory.number(MISC, FIRST_NUMBERS) + 1;
        self.memory.set_number(MISC, FIRST_NUMBERS, count);
        let chance = turn.random.draw();
        let before_end = 1 + (count * 16 + chance % 16) % 8_192;
        u32::try_from(if turn.random.one_in(4) {
            (1 << 32) - before_end
        } else {
            chance >> 32
        })
        .expect("32 bits")
    }

    fn find(&self, port: u16, peer: End) -> Option<Connection> {
        let key = key(port, peer);
        places()
            .find(|place| {
                let page = self.memory.page(page(*place));
                page[..key.len()] == key && phase_of(page) != Phase::Free
            })
            .map(|place| self.load(place))
    }

    fn free_place(&self) -> Option<u8> {
        places().find(|place| phase_of(self.memory.page(page(*place))) == Phase::Free)
    }

    fn load(&self, place: u8) -> Connection {
        let page = self.memory.page(page(place));
        let length = input_length(page);
        Connection {
            place,
            port: u16::from_le_bytes([page[0], page[1]]),
            peer: (page[2], u16::from_le_bytes([page[3], page[4]])),
            socket: Socket::load(&page[SOCKET_AT..]),
            input: page[INPUT_AT + 2..INPUT_AT + 2 + length].to_vec(),
        }
    }

    fn store(&mut self, connection: &Connection) {
        let page = page(connection.place);
        let length = u16::try_from(connection.input.len()).expect("a window at most");
        self.memory.write(page, 0, &key(connection.port, connection.peer));
        self.memory.write(page, SOCKET_AT, &connection.socket.store());
        self.memory.write(page, INPUT_AT, &length.to_le_bytes());
        self.memory.write(page, INPUT_AT + 2, &connection.input);
    }
}

impl Connection {
    /// Tells whether this is the connection whose client began with that number.
    fn serves(&self, first: u32) -> bool {
        self.socket.phase == Phase::Open && self.socket.irs == first && !self.socket.is_closing()
    }
}

fn places() -> impl Iterator<Item = u8> {
    (0..CONNECTIONS).map(|place| u8::try_from(place).expect("few"))
}

fn page(place: u8) -> u64 {
    KEYS_END + u64::from(place)
}

fn key(port: u16, peer: End) -> [u8; 5] {
    let ([a, b], [c, d]) = (port.to_le_bytes(), peer.1.to_le_bytes());
    [a, b, peer.0, c, d]
}

fn phase_of(page: &[u8]) -> Phase {
    Socket::stored_phase(&page[SOCKET_AT..])
}

fn input_length(page: &[u8]) -> usize {
    usize::from(u16::from_le_bytes([page[INPUT_AT], page[INPUT_AT + 1]]))
}
