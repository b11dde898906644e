//! The clients of the toy guest, and the host to which it logs.
//!
//! Half of the clients ask over UDP and repeat what is not answered, half over TCP, several requests at once. A TCP client throws away what is
//! acknowledged, believes each answer to be the next bytes of the stream, and takes a reset for a failure: so an acknowledgement, a byte or a
//! sequence number that the survivor can't stand by is seen. Driven by the world with frames and a time; no network of their own.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;

use crate::history::History;
use crate::ops::{Answer, KEYS, Op, RECORD_BYTES, Request};
use crate::packet::{self, ACK, Assembly, End, GUEST, Header, Packet, RST, SERVICE_PORT, SYN};
use crate::random::Random;
use crate::tcp::{Phase, Socket, ahead};

/// Where the guest sends its lines.
pub const LOG_HOST: End = (200, 514);
/// The first client's address.
const FIRST_ADDRESS: u8 = 100;
/// Clients over UDP; as many ask over TCP.
const HALF: u8 = 6;
/// Milliseconds after which a datagram is repeated.
const RETRY: u64 = 250;
/// Longest time between an answer and the next request.
const THINK_MAX: u64 = 300;
/// Connections that a client remembers: more than there are in an epoch.
const BEFORE_MAX: usize = 24;
/// Requests that are sent at once at most.
const AT_ONCE_MAX: u64 = 3;

/// All of them.
#[derive(Debug)]
pub struct Clients {
    list: Vec<Client>,
    log: BTreeMap<u16, Line>,
    /// What they did and saw.
    pub history: History,
    /// How often the VM has lost its memory: then connections may be reset, and lines written again.
    reboots: u64,
    /// No new requests.
    quiet: bool,
    /// First numbers that have been used.
    numbers: BTreeSet<u32>,
    random: Random,
    assembly: Assembly,
    out: Vec<Bytes>,
}

#[derive(Debug)]
struct Client {
    number: u8,
    next_id: u32,
    /// Requests without an answer, oldest first.
    asked: Vec<Request>,
    think_until: u64,
    /// What it last knew of each register.
    seen: [u64; KEYS as usize],
    wire: Wire,
}

#[derive(Debug)]
enum Wire {
    Datagrams {
        retry_at: Option<u64>,
    },
    Stream {
        line: Option<Box<Line>>,
        port: u16,
        /// The last connections and their ports: at a takeover their frames may come again.
        before: VecDeque<(u16, Socket)>,
    },
}

/// One connection, as its end far from the guest has it.
#[derive(Debug)]
struct Line {
    socket: Socket,
    input: Vec<u8>,
    /// Requests until it is closed.
    left: u64,
    /// The requests without an answer have been sent on it.
    sent: bool,
    /// When it was opened.
    reboots: u64,
}

impl Clients {
    /// Makes them.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let wire = |number| {
            if number < HALF {
                Wire::Datagrams { retry_at: None }
            } else {
                Wire::Stream {
                    line: None,
                    port: 3_000,
                    before: VecDeque::new(),
                }
            }
        };
        let client = |number| Client {
            number,
            next_id: 1,
            asked: Vec::new(),
            think_until: 0,
            seen: [0; KEYS as usize],
            wire: wire(number),
        };
        Self {
            list: (0..2 * HALF).map(client).collect(),
            log: BTreeMap::new(),
            history: History::default(),
            reboots: 0,
            quiet: false,
            numbers: BTreeSet::new(),
            random: Random::new(seed),
            assembly: Assembly::default(),
            out: Vec::new(),
        }
    }

    /// Returns how many there are, the log's host among them.
    #[must_use]
    pub fn count(&self) -> usize {
        self.list.len() + 1
    }

    /// The VM has lost its memory, and starts from its disk: only now may connections be reset. Who waits for an answer
    /// asks again on a new one; all are to be scheduled anew.
    pub fn vm_rebooted(&mut self) {
        self.reboots += 1;
        for client in self.list.iter_mut().filter(|client| !client.asked.is_empty()) {
            client.forget_line();
        }
    }

    /// Lets them finish what they have begun and ask nothing more, or go on.
    pub fn be_quiet(&mut self, quiet: bool) {
        self.quiet = quiet;
    }

    /// Tells whether every request has been answered.
    #[must_use]
    pub fn are_answered(&self) -> bool {
        self.list.iter().all(|client| client.asked.is_empty())
    }

    /// Returns an answered request that should be in the log and is not.
    #[must_use]
    pub fn missing_line(&self) -> Option<(u8, u32)> {
        self.history.missing_line().filter(|_| self.reboots == 0)
    }

    /// Returns when that one wants to be woken.
    #[must_use]
    pub fn deadline(&self, number: usize) -> Option<u64> {
        match self.list.get(number) {
            Some(client) => client.deadline(self.quiet),
            None => self.log.values().filter_map(|line| line.socket.deadline()).min(),
        }
    }

    /// Lets one do what is due.
    pub fn wake(&mut self, number: usize, now: u64) {
        if number == self.list.len() {
            for line in self.log.values_mut() {
                line.socket.timeout(now);
            }
            return self.log_goes_on(now);
        }
        let client = &mut self.list[number];
        if let Wire::Stream { line: Some(line), .. } = &mut client.wire {
            line.socket.timeout(now);
        }
        self.go_on(number, now);
    }

    /// Gives them a frame of the guest; returns who has heard it.
    ///
    /// # Panics
    /// If the frame is not what a client of one uninterrupted machine can get.
    pub fn hear(&mut self, frame: &[u8], now: u64) -> Option<usize> {
        if packet::fragment(frame).is_some() {
            let whole = self.assembly.add(frame)?;
            return self.hear(&whole, now);
        }
        let packet = packet::parse(frame)?;
        assert!(packet.intact, "rule 4: a frame with wrong sums reached {:?}", packet.to);
        if packet.to.0 == LOG_HOST.0 {
            self.log_hears(&packet, now);
            return Some(self.list.len());
        }
        let number = usize::from(packet.to.0.checked_sub(FIRST_ADDRESS)?);
        if number >= self.list.len() || packet.from != (GUEST, SERVICE_PORT) {
            return None;
        }
        match packet.tcp {
            None => self.hear_datagram(number, packet.payload, now),
            Some(header) => self.hear_segment(number, &packet, &header, now),
        }
        self.go_on(number, now);
        Some(number)
    }

    /// Returns what they send.
    pub fn sent(&mut self) -> std::vec::Drain<'_, Bytes> {
        self.out.drain(..)
    }

    fn hear_datagram(&mut self, number: usize, payload: &[u8], now: u64) {
        let answer = Answer::decode(payload).expect("rule 4: the guest's answers are whole");
        let client = &self.list[number];
        if !matches!(client.wire, Wire::Datagrams { .. }) {
            return;
        }
        if let [request] = client.asked[..]
            && request.id == answer.id
        {
            self.answered(number, &answer, now);
        }
    }

    fn hear_segment(&mut self, number: usize, packet: &Packet<'_>, header: &Header, now: u64) {
        let Wire::Stream { line, before, port } = &mut self.list[number].wire else {
            return;
        };
        let known = line.as_mut().filter(|_| *port == packet.to.1);
        let Some(line) = known else {
            return self.refuse(packet, header);
        };
        let belongs = fits(&line.socket, header);
        let is_old = |(old, socket): &(u16, Socket)| *old == packet.to.1 && fits(socket, header);
        if !belongs && before.iter().any(is_old) {
            return;
        }
        if line.socket.phase == Phase::SynSent && !belongs && !header.has(RST) {
            return self.refuse(packet, header);
        }
        if let Err(strange) = line.socket.hear(now, header, packet.payload, &mut line.input) {
            panic!(
                "rule 4: client {number} gets a segment that is not its connection's: {strange:?}, {header:?}, of {:?}",
                line.socket
            );
        }
        let reset = line.socket.phase == Phase::Reset;
        let (rebooted, ended) = (line.reboots != self.reboots, line.socket.fin_in);
        assert!(!reset || rebooted, "rule 4: the connection of client {number} is reset");
        while let Some(record) = self.list[number].next_record() {
            let answer = Answer::decode(&record)
                .unwrap_or_else(|| panic!("rule 4: client {number} gets bytes that are no answer: {record:x?}"));
            self.answered(number, &answer, now);
        }
        assert!(
            !ended || self.list[number].asked.is_empty(),
            "rule 4: the guest ends the connection of client {number} before it has answered"
        );
    }

    fn refuse(&mut self, packet: &Packet<'_>, header: &Header) {
        if let Some(reset) = Socket::refusal(header, packet.payload.len()) {
            self.out.push(packet::tcp(packet.to, packet.from, &reset, &[]));
        }
    }

    /// An answer counts for the oldest request.
    fn answered(&mut self, number: usize, answer: &Answer, now: u64) {
        let client = &mut self.list[number];
        assert!(
            !client.asked.is_empty(),
            "rule 4: client {number} gets {answer:?} unasked"
        );
        let request = client.asked.remove(0);
        assert!(
            (answer.client, answer.key, answer.id) == (request.client, request.key, request.id),
            "rule 4: client {number} gets {answer:?} as answer to {request:?}"
        );
        let (value, _) = request.op.apply(answer.value);
        client.seen[usize::from(request.key)] = if request.op == Op::Add { answer.value } else { value };
        if client.asked.is_empty() {
            client.think_until = now + self.random.below(THINK_MAX);
        }
        self.history.returned(request.client, request.key, answer.value);
        if request.logged {
            self.history.returned_logged(request.client, request.id, answer.value);
        }
    }

    fn go_on(&mut self, number: usize, now: u64) {
        let (random, out) = (&mut self.random, &mut self.out);
        let client = &mut self.list[number];
        let ready = client.asked.is_empty() && client.think_until <= now && !self.quiet;
        if let Wire::Datagrams { retry_at } = client.wire {
            if ready {
                client.ask(1, random, &mut self.history);
            } else if client.asked.is_empty() || retry_at.is_some_and(|at| at > now) {
                return;
            }
            let end = client.end(1_000);
            out.extend(
                client
                    .asked
                    .iter()
                    .map(|request| packet::udp(end, (GUEST, SERVICE_PORT), &request.encode())),
            );
            client.wire = Wire::Datagrams {
                retry_at: Some(now + RETRY),
            };
            return;
        }
        let waits = client.asked.is_empty() && (self.quiet || client.think_until > now);
        client.renew_line(waits, self.reboots, random, &mut self.numbers);
        let Wire::Stream {
            line: Some(line), port, ..
        } = &client.wire
        else {
            return;
        };
        let (port, left) = (*port, line.left);
        if ready && line.socket.phase == Phase::Open && !line.socket.is_closing() && left > 0 {
            let count = (1 + random.below(AT_ONCE_MAX)).min(left);
            client.ask(count, random, &mut self.history);
        }
        let end = client.end(port);
        let Client { asked, wire, .. } = client;
        let Wire::Stream { line: Some(line), .. } = wire else {
            return;
        };
        if line.socket.phase == Phase::Open && !line.sent {
            for request in &*asked {
                line.socket.send(&request.encode());
            }
            line.left = line.left.saturating_sub(asked.len() as u64);
            line.sent = true;
        }
        if line.left == 0 && asked.is_empty() {
            line.socket.close();
        }
        line.socket.transmit(now, random, |header, payload| {
            out.push(packet::tcp(end, (GUEST, SERVICE_PORT), &header, payload));
        });
    }

    fn log_hears(&mut self, packet: &Packet<'_>, now: u64) {
        let Some(header) = packet.tcp else { return };
        let port = packet.from.1;
        let opens = header.flags & (SYN | ACK | RST) == SYN;
        let outlived = |line: &mut Line| line.reboots != self.reboots;
        if opens && self.log.get_mut(&port).is_none_or(outlived) {
            let iss = number(&mut self.numbers, &mut self.random);
            let line = Line {
                socket: Socket::accept(iss, header.seq),
                input: Vec::new(),
                left: 0,
                sent: false,
                reboots: self.reboots,
            };
            self.log.insert(port, line);
        }
        let Some(line) = self.log.get_mut(&port) else {
            return self.refuse(packet, &header);
        };
        if let Err(strange) = line.socket.hear(now, &header, packet.payload, &mut line.input) {
            // A takeover may repeat what the guest sent on a connection that is over, its SYN first.
            let may = line.reboots != self.reboots || line.socket.phase == Phase::SynReceived;
            assert!(
                may,
                "rule 4: the log's host gets a segment that is not its connection's: {strange:?}, {header:?}, of {:?}",
                line.socket
            );
            return self.refuse(packet, &header);
        }
        while line.input.len() >= RECORD_BYTES {
            let record: Vec<u8> = line.input.drain(..RECORD_BYTES).collect();
            let said = Answer::decode_line(&record)
                .unwrap_or_else(|| panic!("rule 4: the log gets bytes that are no line: {record:x?}"));
            let asked = self.list.get(usize::from(said.client));
            assert!(
                asked.is_some_and(|client| said.id < client.next_id),
                "rule 4: the log gets a line about a request that nobody made"
            );
            self.history.line(said.client, said.id, said.value, self.reboots == 0);
        }
        if line.socket.fin_in {
            line.socket.close();
        }
        self.log_goes_on(now);
    }

    fn log_goes_on(&mut self, now: u64) {
        let (random, out) = (&mut self.random, &mut self.out);
        self.log.retain(|port, line| {
            line.socket.transmit(now, random, |header, payload| {
                out.push(packet::tcp(LOG_HOST, (GUEST, *port), &header, payload));
            });
            !matches!(line.socket.phase, Phase::Free | Phase::Reset)
        });
    }
}

impl Client {
    fn end(&self, port: u16) -> End {
        (FIRST_ADDRESS + self.number, port)
    }

    fn deadline(&self, quiet: bool) -> Option<u64> {
        let next = (self.asked.is_empty() && !quiet).then_some(self.think_until);
        match &self.wire {
            Wire::Datagrams { retry_at } if !self.asked.is_empty() => *retry_at,
            Wire::Datagrams { .. } => next,
            Wire::Stream { line: None, .. } if self.asked.is_empty() => next,
            Wire::Stream { line: None, .. } => Some(0),
            Wire::Stream { line: Some(line), .. } => {
                let free = line.socket.phase == Phase::Open && !line.socket.is_closing();
                line.socket.deadline().into_iter().chain(next.filter(|_| free)).min()
            }
        }
    }

    /// Makes requests, each for another register.
    fn ask(&mut self, count: u64, random: &mut Random, history: &mut History) {
        let first = random.below(u64::from(KEYS));
        for place in 0..count {
            let key = u8::try_from((first + place) % u64::from(KEYS)).expect("few");
            let id = self.next_id;
            self.next_id += 1;
            let new = 1 << 62 | u64::from(self.number) << 32 | u64::from(id);
            let op = match random.below(8) {
                0 => Op::Swap(new),
                1 => Op::CompareAndSwap(self.seen[usize::from(key)], new),
                2 | 3 => Op::Read,
                _ => Op::Add,
            };
            let request = Request {
                client: self.number,
                key,
                id,
                op,
                noisy: random.one_in(32),
                logged: op != Op::Read && random.one_in(5),
            };
            history.call(self.number, key, op);
            self.asked.push(request);
        }
        if let Wire::Stream { line: Some(line), .. } = &mut self.wire {
            line.sent = false;
        }
    }

    /// Forgets a connection that is over, and opens the next when it is time.
    fn renew_line(&mut self, waits: bool, reboots: u64, random: &mut Random, numbers: &mut BTreeSet<u32>) {
        let number_of_client = u16::from(self.number);
        if let Wire::Stream { line: Some(line), .. } = &self.wire
            && matches!(line.socket.phase, Phase::Free | Phase::Reset)
        {
            self.forget_line();
        }
        let Wire::Stream { line, port, before } = &mut self.wire else {
            return;
        };
        if line.is_some() || waits {
            return;
        }
        // Sometimes on the same port as before.
        if before.front().is_none_or(|(last, _)| last != port) || !random.one_in(3) {
            let step = 1 + u16::try_from(random.below(7)).expect("few");
            *port = 3_000 + number_of_client * 16 + (*port + step) % 16;
        }
        *line = Some(Box::new(Line {
            socket: Socket::connect(number(numbers, random)),
            input: Vec::new(),
            left: 1 + random.below(12),
            sent: false,
            reboots,
        }));
    }

    /// Gives its connection up; only its numbers are remembered.
    fn forget_line(&mut self) {
        let Wire::Stream { line, port, before } = &mut self.wire else {
            return;
        };
        if let Some(line) = line.take() {
            before.truncate(BEFORE_MAX - 1);
            before.push_front((*port, line.socket));
        }
    }

    fn next_record(&mut self) -> Option<Vec<u8>> {
        let Wire::Stream { line: Some(line), .. } = &mut self.wire else {
            return None;
        };
        (line.input.len() >= RECORD_BYTES).then(|| line.input.drain(..RECORD_BYTES).collect())
    }
}

/// Tells whether a segment may be of this connection.
fn fits(socket: &Socket, header: &Header) -> bool {
    let acknowledges = header.has(ACK) && ahead(header.ack, socket.iss) > 0 && ahead(header.ack, socket.max) <= 0;
    let near = ahead(header.seq, socket.awaited).unsigned_abs() < 1 << 16;
    acknowledges && (near || header.has(SYN))
}

/// Often close to the end of the numbers; never the same again, as if all old segments had to be told apart.
fn number(used: &mut BTreeSet<u32>, random: &mut Random) -> u32 {
    loop {
        let chance = u32::try_from(random.draw() >> 32).expect("half of it");
        let number = if chance.is_multiple_of(4) {
            chance | 0xffff_fe00
        } else {
            chance
        };
        if used.insert(number) {
            return number;
        }
    }
}
