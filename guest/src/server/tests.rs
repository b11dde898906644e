//! Tests of the whole guest against a client stack of the same kind, frame by frame.

#![expect(
    clippy::cast_possible_truncation,
    reason = "the numbers of these tests are small, or meant to wrap"
)]

use alloc::collections::VecDeque;
use std::string::String;
use std::vec::Vec;

use smoltcp::phy::{Checksum, DeviceCapabilities, Medium, RxToken, TxToken};

use smoltcp::iface::{Config, Interface, PollResult, SocketHandle, SocketSet};
use smoltcp::socket::{tcp as smol_tcp, udp};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpAddress, IpCidr, IpEndpoint};

use super::*;
use crate::dirtier::Arena;
use crate::kv::{Kv, Request};
use crate::settings::Settings;
use crate::stack::{instant, udp_socket};
use crate::vlan::Tagged;
use crate::world::Limits;

mod cards;
mod frames;

/// One end of a wire.
#[derive(Default)]
struct Wire {
    inbound: VecDeque<Vec<u8>>,
    outbound: VecDeque<Vec<u8>>,
    room: usize,
    /// Wrong checksums are taken for right ones.
    trusting: bool,
}

struct Received(Vec<u8>);
struct Sending<'a>(&'a mut VecDeque<Vec<u8>>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.push_back(frame);
        result
    }
}

impl Device for Wire {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(Received, Sending<'_>)> {
        if self.outbound.len() >= self.room {
            return None;
        }
        Some((Received(self.inbound.pop_front()?), Sending(&mut self.outbound)))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Sending<'_>> {
        (self.outbound.len() < self.room).then_some(Sending(&mut self.outbound))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        if self.trusting {
            for sum in [
                &mut capabilities.checksum.ipv4,
                &mut capabilities.checksum.tcp,
                &mut capabilities.checksum.udp,
                &mut capabilities.checksum.icmpv4,
                &mut capabilities.checksum.icmpv6,
            ] {
                *sum = Checksum::Tx;
            }
        }
        capabilities
    }
}

/// A guest, its disk, and a client on the same wire.
struct Lab {
    server: Server,
    /// Of each of its cards; the client is on the last.
    wires: Vec<Wire>,
    client: Interface,
    client_wire: Wire,
    sockets: SocketSet<'static>,
    disk: Vec<u8>,
    disk_delay: usize,
    disk_wait: usize,
    now: u64,
    tsc: u64,
    /// All frames that the guest has sent.
    sent: Vec<Vec<u8>>,
    /// All frames that the client has sent.
    given: Vec<Vec<u8>>,
    next_port: u16,
    wants_timestamps: bool,
    log: bool,
}

const SERVER4: IpAddress = IpAddress::v4(10, 77, 0, 10);
const SERVER6: IpAddress = IpAddress::v6(0xfd77, 0, 0, 0, 0, 0, 0, 0x10);

impl Lab {
    fn new(line: &'static str) -> Self {
        Self::with(line, false)
    }

    fn with(line: &'static str, trusting: bool) -> Self {
        Self::on_card(line, trusting, 0)
    }

    /// The guest has cards up to that one, and the client is on its wire.
    fn on_card(line: &'static str, trusting: bool, card: u8) -> Self {
        let settings = Settings::parse(line).unwrap();
        let pages = vec![[0_u64; 512]; 1024].leak();
        let kv = Kv::on_disk(4096, false, 16 << 20);
        let limits = Limits::new(&settings, 1 + usize::from(card), 64 << 20).unwrap();
        let world = World::new(settings, limits, kv, Arena::new(vec![pages]), 0).unwrap();
        let wire = |_| Wire {
            room: 256,
            trusting,
            ..Wire::default()
        };
        let mut wires: Vec<_> = (0..=card).map(wire).collect();
        let macs: Vec<_> = (0..=card).map(|card| [2, 0, 0, 0, card, 1]).collect();
        let server = Server::new(world, &macs, &[7; 32], &mut wires, Moment::default()).unwrap();
        let mut client_wire = Wire {
            room: 1 << 20,
            ..Wire::default()
        };
        let config = Config::new(HardwareAddress::Ethernet(EthernetAddress([2, 0, 0, 0, 0, 2])));
        let mut client = Interface::new(config, &mut client_wire, Instant::ZERO);
        client.update_ip_addrs(|addresses| {
            addresses
                .push(IpCidr::new(IpAddress::v4(10, 77 + card, 0, 1), 24))
                .unwrap();
            addresses
                .push(IpCidr::new(
                    IpAddress::v6(0xfd77 + u16::from(card), 0, 0, 0, 0, 0, 0, 1),
                    64,
                ))
                .unwrap();
        });
        let mut lab = Self {
            server,
            wires,
            client,
            client_wire,
            sockets: SocketSet::new(vec![]),
            disk: vec![0; 4096 * 512],
            disk_delay: 0,
            disk_wait: 0,
            now: 0,
            tsc: 0,
            sent: Vec::new(),
            given: Vec::new(),
            next_port: 50_000,
            wants_timestamps: false,
            log: true,
        };
        while lab.disk_step() {}
        lab
    }

    fn moment(&self) -> Moment {
        Moment {
            ns: self.now,
            wall_ns: self.now,
            tsc: self.tsc + self.now,
        }
    }

    fn disk_step(&mut self) -> bool {
        if self.disk_wait > 0 {
            self.disk_wait -= 1;
            return true;
        }
        let kv = &mut self.server.world_mut().kv;
        let Some(request) = kv.next_request() else { return false };
        match request {
            Request::Read { sector, bytes } => {
                let at = sector as usize * 512;
                kv.completed(Ok(&self.disk[at..at + bytes]));
            }
            Request::Write { sector, data } => {
                let at = sector as usize * 512;
                self.disk[at..at + data.len()].copy_from_slice(data);
                kv.completed(Ok(&[]));
            }
            Request::Discard { sector, sectors } => {
                let (at, bytes) = (sector as usize * 512, sectors as usize * 512);
                self.disk[at..at + bytes].fill(0);
                kv.completed(Ok(&[]));
            }
            Request::Flush => kv.completed(Ok(&[])),
        }
        self.disk_wait = self.disk_delay;
        true
    }

    /// Lets both ends work once; returns whether anything happened.
    fn step(&mut self) -> bool {
        let at = instant(self.moment());
        let vlan = self.server.world().settings.vlan;
        let device = &mut self.client_wire;
        let mut wire = Tagged { device, vlan };
        let client = self.client.poll(at, &mut wire, &mut self.sockets) == PollResult::SocketStateChanged;
        if self.log {
            self.given.extend(self.client_wire.outbound.iter().cloned());
        }
        let near = self.wires.len() - 1;
        self.wires[near].inbound.extend(self.client_wire.outbound.drain(..));
        let server = self.server.round(self.moment(), &mut self.wires);
        let disk = self.disk_step();
        let outbound = &mut self.wires[near].outbound;
        let sent = !outbound.is_empty();
        if self.log {
            self.sent.extend(outbound.iter().cloned());
        }
        self.client_wire.inbound.extend(outbound.drain(..));
        client || server || disk || sent
    }

    /// Runs until `done`, with time passing when nothing else happens.
    fn run_until(&mut self, mut done: impl FnMut(&mut Self) -> bool) {
        for _ in 0..200_000 {
            if done(self) {
                return;
            }
            self.now += if self.step() { 1_000 } else { 1_000_000 };
        }
        panic!("it never happened");
    }

    fn settle(&mut self) {
        while self.step() {
            self.now += 1_000;
        }
    }

    fn connect(&mut self, to: IpAddress, port: u16) -> SocketHandle {
        let settings = Settings {
            timestamps: self.wants_timestamps,
            ..Settings::default()
        };
        let mut socket = crate::tcp::socket(&settings);
        crate::tcp::use_timestamps(&mut socket, &settings);
        self.next_port += 1;
        socket
            .connect(self.client.context(), (to, port), self.next_port)
            .unwrap();
        self.sockets.add(socket)
    }

    fn socket(&mut self, handle: SocketHandle) -> &mut smol_tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    fn send(&mut self, handle: SocketHandle, bytes: &[u8]) {
        let mut at = 0;
        self.run_until(|lab| {
            let socket = lab.socket(handle);
            if socket.may_send() {
                at += socket.send_slice(&bytes[at..]).unwrap();
            }
            at == bytes.len()
        });
    }

    /// Receives until `expected` bytes are there, or until the server closes.
    fn receive(&mut self, handle: SocketHandle, expected: usize) -> Vec<u8> {
        let mut got = Vec::new();
        self.run_until(|lab| {
            let socket = lab.socket(handle);
            while let Ok(1..) = socket.recv(|bytes| {
                got.extend_from_slice(bytes);
                (bytes.len(), bytes.len())
            }) {}
            got.len() >= expected || (!socket.may_recv() && socket.state() != smol_tcp::State::SynSent)
        });
        got
    }

    fn exchange(&mut self, to: IpAddress, port: u16, request: &[u8], expected: usize) -> Vec<u8> {
        let handle = self.connect(to, port);
        self.send(handle, request);
        let answer = self.receive(handle, expected);
        self.socket(handle).abort();
        self.settle();
        self.sockets.remove(handle);
        answer
    }

    fn get(&mut self, path: &str) -> String {
        let request = std::format!("GET {path} HTTP/1.1\r\nConnection: close\r\n\r\n");
        let answer = self.exchange(SERVER4, 80, request.as_bytes(), usize::MAX);
        String::from_utf8_lossy(&answer).into_owned()
    }

    fn redis(&mut self, commands: &str, reply: &str) {
        let got = self.exchange(SERVER4, 6379, commands.as_bytes(), reply.len());
        assert_eq!(String::from_utf8_lossy(&got), reply);
    }
}

#[test]
fn http_serves_over_both_families_and_keeps_the_connection() {
    for address in [SERVER4, SERVER6] {
        let mut lab = Lab::new("");
        let handle = lab.connect(address, 80);
        // Pipelined, the last with the end of the connection.
        let requests =
            b"GET / HTTP/1.1\r\n\r\nHEAD /file/5 HTTP/1.1\r\n\r\nGET /none HTTP/1.1\r\nConnection: close\r\n\r\n";
        lab.send(handle, requests);
        let answer = String::from_utf8(lab.receive(handle, usize::MAX)).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(answer.contains("outlives its host"));
        assert!(answer.contains("Content-Length: 5\r\n\r\nHTTP/1.1 404"), "{answer}");
        assert!(answer.ends_with("there is no such page\n"));
    }
}

#[test]
fn files_are_the_documented_bytes() {
    let mut lab = Lab::new("");
    lab.log = false;
    for bytes in [0_usize, 1, 4097, 1_000_003] {
        let request = std::format!("GET /file/{bytes} HTTP/1.0\r\n\r\n");
        let answer = lab.exchange(SERVER4, 80, request.as_bytes(), usize::MAX);
        let body = answer.windows(4).position(|window| window == b"\r\n\r\n").unwrap() + 4;
        assert_eq!(answer.len() - body, bytes);
        let mut expected = vec![0; bytes];
        crate::content::fill(0, &mut expected);
        assert!(answer[body..] == expected, "{bytes}");
    }
    assert!(lab.get("/file/1073741825").starts_with("HTTP/1.1 400"));
}

#[test]
fn redis_commands_answer_like_redis() {
    let mut lab = Lab::new("");
    lab.redis(
        "PING\r\nECHO hi\r\nSELECT 0\r\nSELECT 1\r\n",
        "+PONG\r\n$2\r\nhi\r\n+OK\r\n-ERR DB index is out of range\r\n",
    );
    lab.redis(
        "SET a 1\r\nINCR a\r\nGET a\r\nGET b\r\nDECRBY a 5\r\n",
        "+OK\r\n:2\r\n$1\r\n2\r\n$-1\r\n:-3\r\n",
    );
    lab.redis(
        "MSET x 1 y two\r\nMGET x y z\r\nEXISTS x x z\r\nDBSIZE\r\n",
        "+OK\r\n*3\r\n$1\r\n1\r\n$3\r\ntwo\r\n$-1\r\n:2\r\n:3\r\n",
    );
    lab.redis("INCR y\r\n", "-ERR value is not an integer or out of range\r\n");
    lab.redis(
        "SET x 9223372036854775807\r\nINCR x\r\n",
        "+OK\r\n-ERR increment or decrement would overflow\r\n",
    );
    lab.redis(
        "GET\r\nSET a b NX\r\nSET q 1 XX\r\nSET a b PX 5\r\n",
        "-ERR wrong number of arguments for 'get' command\r\n$-1\r\n$-1\r\n-ERR keys that expire are not supported\r\n",
    );
    lab.redis(
        "nope x\r\n",
        "-ERR unknown command 'nope', with args beginning with: 'x' \r\n",
    );
    lab.redis(
        "DEL x y z\r\nSTRLEN a\r\nFLUSHALL\r\nDBSIZE\r\n",
        ":2\r\n:2\r\n+OK\r\n:0\r\n",
    );
    lab.redis(
        "CONFIG GET save\r\nCOMMAND DOCS\r\n",
        "*2\r\n$4\r\nsave\r\n$0\r\n\r\n*0\r\n",
    );
    lab.redis("*1\r\n$99999999\r\n", "-ERR Protocol error: invalid bulk length\r\n");
    lab.redis("QUIT\r\nPING\r\n", "+OK\r\n");
}

#[test]
fn a_write_is_answered_after_its_flush_and_a_read_of_it_too() {
    let mut lab = Lab::new("");
    lab.disk_delay = 100;
    let (one, other) = (lab.connect(SERVER4, 6379), lab.connect(SERVER6, 6379));
    lab.send(other, b"PING\r\n");
    lab.receive(other, 7);
    lab.send(one, b"SET a 1\r\n");
    lab.run_until(|lab| lab.server.world().kv.executed() == 1);
    lab.send(other, b"GET b\r\nGET a\r\nGET b\r\n");
    let first = lab.receive(other, 5);
    assert_eq!(first, b"$-1\r\n");
    assert_eq!(lab.server.world().kv.durable(), 0);
    lab.run_until(|lab| {
        let waiting = lab.server.world().kv.durable() == 0;
        assert!(!waiting || (!lab.socket(one).can_recv() && !lab.socket(other).can_recv()));
        !waiting
    });
    assert_eq!(lab.receive(one, 5), b"+OK\r\n");
    assert_eq!(lab.receive(other, 12), b"$1\r\n1\r\n$-1\r\n");
}

#[test]
fn large_values_and_deep_pipelines_come_back_whole() {
    let mut lab = Lab::new("");
    lab.log = false;
    let value = "v".repeat(65_536);
    let set = std::format!("*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$65536\r\n{value}\r\nGET k\r\n");
    lab.redis(&set, &std::format!("+OK\r\n$65536\r\n{value}\r\n"));
    let commands = "INCR n\r\n".repeat(5000);
    let replies: String = (1..=5000).map(|number| std::format!(":{number}\r\n")).collect();
    lab.redis(&commands, &replies);
}

#[test]
fn clients_cannot_use_up_the_memory() {
    let mut lab = Lab::new("");
    lab.log = false;
    let handles: Vec<_> = (0..100).map(|_| lab.connect(SERVER4, 6379)).collect();
    // Each begins a command that it does not end.
    let mut half = b"*3\r\n$4\r\nMSET\r\n$65536\r\n".to_vec();
    half.resize(60_000, b'x');
    let mut sent = vec![0; handles.len()];
    for _ in 0..30_000 {
        for (handle, sent) in handles.iter().zip(&mut sent) {
            let socket = lab.socket(*handle);
            if socket.may_send() {
                *sent += socket.send_slice(&half[*sent..]).unwrap();
            }
        }
        lab.step();
        lab.now += 1_000;
        let world = lab.server.world();
        assert!(world.buffered <= world.limits.buffered + 200_000, "{}", world.buffered);
    }
    let refused = handles
        .iter()
        .filter(|handle| lab.sockets.get_mut::<smol_tcp::Socket<'_>>(**handle).can_recv())
        .count();
    assert!(refused > 0);
    lab.redis("SET a 1\r\nGET a\r\n", "+OK\r\n$1\r\n1\r\n");
    for handle in handles {
        lab.socket(handle).abort();
        lab.settle();
        lab.sockets.remove(handle);
    }
    lab.redis("PING\r\n", "+PONG\r\n");
    assert!(lab.server.world().buffered < 100_000);
}

#[test]
fn many_connections_at_once_and_again() {
    let mut lab = Lab::new("");
    lab.log = false;
    for _ in 0..3 {
        let handles: Vec<_> = (0..100).map(|_| lab.connect(SERVER4, 6379)).collect();
        for handle in &handles {
            lab.send(*handle, b"INCR n\r\n");
        }
        for handle in handles {
            assert!(lab.receive(handle, 4).starts_with(b":"));
            lab.socket(handle).close();
            lab.settle();
            lab.sockets.remove(handle);
        }
    }
    lab.redis("GET n\r\n", "$3\r\n300\r\n");
}

#[test]
fn a_full_port_lets_newcomers_wait() {
    let mut lab = Lab::new("");
    lab.log = false;
    let most = lab.server.world().limits.connections;
    let mut handles: Vec<_> = (0..most + 20).map(|_| lab.connect(SERVER4, 6379)).collect();
    lab.run_until(|lab| lab.server.world().counters.accepted == most as u64);
    lab.settle();
    let waiting = handles.split_off(most);
    for handle in &waiting {
        assert_eq!(lab.socket(*handle).state(), smol_tcp::State::SynSent);
    }
    for handle in handles {
        lab.socket(handle).close();
    }
    for handle in waiting {
        lab.send(handle, b"PING\r\n");
        assert_eq!(lab.receive(handle, 7), b"+PONG\r\n");
    }
}

/// A held SYN-ACK makes the client repeat its SYN; meanwhile a socket that stands before the one that has it listens again.
#[test]
fn a_repeated_syn_does_not_open_a_second_connection() {
    let mut lab = Lab::new("");
    let earlier = lab.connect(SERVER4, 80);
    lab.settle();
    let late = lab.connect(SERVER4, 80);
    let at = instant(lab.moment());
    lab.client.poll(at, &mut lab.client_wire, &mut lab.sockets);
    let syn: Vec<Vec<u8>> = lab.client_wire.outbound.drain(..).collect();
    lab.wires[0].inbound.extend(syn.iter().cloned());
    lab.server.round(lab.moment(), &mut lab.wires);
    let held: Vec<Vec<u8>> = lab.wires[0].outbound.drain(..).collect();
    assert_eq!((syn.len(), held.len()), (1, 1), "a SYN and its answer");
    lab.socket(earlier).close();
    lab.settle();
    lab.connect(SERVER4, 80);
    lab.settle();
    lab.wires[0].inbound.extend(syn);
    lab.server.round(lab.moment(), &mut lab.wires);
    lab.client_wire.inbound.extend(held);
    lab.settle();
    assert_eq!(lab.socket(late).state(), smol_tcp::State::Established);
    lab.send(late, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    assert!(lab.receive(late, 15).starts_with(b"HTTP/1.1 200"));
}

#[test]
fn the_server_closing_first_does_not_use_up_its_sockets() {
    let mut lab = Lab::new("");
    for number in 0..300 {
        assert!(lab.get("/").starts_with("HTTP/1.1 200"), "request {number}");
        // Less than a TIME-WAIT in all.
        assert!(lab.now < 9_000_000_000);
    }
}

#[test]
fn echo_and_discard() {
    let mut lab = Lab::new("");
    let data: Vec<u8> = (0..200_000_u32).map(|number| number as u8).collect();
    let handle = lab.connect(SERVER6, 7);
    let (mut sent, mut got) = (0, Vec::new());
    lab.run_until(|lab| {
        let socket = lab.socket(handle);
        if socket.may_send() {
            sent += socket.send_slice(&data[sent..]).unwrap();
        }
        while let Ok(1..) = socket.recv(|bytes| {
            got.extend_from_slice(bytes);
            (bytes.len(), bytes.len())
        }) {}
        got.len() == data.len()
    });
    assert!(got == data);
    lab.socket(handle).close();
    lab.run_until(|lab| !lab.socket(handle).is_open());
    let handle = lab.connect(SERVER4, 9);
    lab.send(handle, &data);
    lab.run_until(|lab| lab.server.world().counters.discard_bytes == 200_000);
}

#[test]
fn udp_echo_answers_from_the_address_it_was_sent_to() {
    for address in [SERVER4, SERVER6] {
        let mut lab = Lab::new("");
        let handle = lab.sockets.add(udp_socket(5000).unwrap());
        let send = |lab: &mut Lab, port, bytes: &[u8]| {
            let socket = lab.sockets.get_mut::<udp::Socket<'_>>(handle);
            socket.send_slice(bytes, IpEndpoint { addr: address, port }).unwrap();
            lab.settle();
        };
        send(&mut lab, 7, b"hello");
        let mut answer = None;
        lab.run_until(|lab| {
            let socket = lab.sockets.get_mut::<udp::Socket<'_>>(handle);
            answer = socket.recv().ok().map(|(bytes, meta)| (bytes.to_vec(), meta.endpoint));
            answer.is_some()
        });
        assert_eq!(answer, Some((b"hello".to_vec(), IpEndpoint { addr: address, port: 7 })));
        send(&mut lab, 9, b"x");
        lab.run_until(|lab| lab.server.world().counters.udp_discard == 1);
    }
}

#[test]
fn connections_are_opened_outwards() {
    let mut lab = Lab::new("");
    let listeners: Vec<_> = (0..40)
        .map(|_| {
            let mut socket = crate::tcp::socket(&Settings::default());
            socket.listen(4000).unwrap();
            lab.sockets.add(socket)
        })
        .collect();
    assert!(lab.get("/set?connect=10.77.0.1:4000,40").contains("ok"));
    assert!(lab.get("/set?connect=[fd77::1]:4001,3").contains("ok"));
    assert!(lab.get("/set?connect=10.77.0.1,40").starts_with("HTTP/1.1 400"));
    lab.run_until(|lab| {
        for handle in &listeners {
            let socket = lab.socket(*handle);
            if socket.can_recv() {
                let line = socket.recv(|bytes| (bytes.len(), bytes.to_vec())).unwrap();
                assert!(line.starts_with(b"tandem "));
                socket.send_slice(&line).unwrap();
            }
            if crate::tcp::is_finished(socket) {
                socket.close();
            }
        }
        let counters = lab.server.world().counters;
        counters.dials_echoed == 40 && counters.dials_failed == 3
    });
    assert!(
        lab.get("/stats")
            .contains("\"outgoing\":{\"asked\":43,\"opened\":40,\"echoed\":40,\"failed\":3}")
    );
}

#[test]
fn settings_change_at_run_time() {
    let mut lab = Lab::new("nondeterminism=0");
    assert!(!lab.get("/").contains("X-Noise"));
    assert!(lab.get("/set?nondeterminism=1000").contains("ok"));
    assert!(lab.get("/").contains("X-Noise: "));
    assert!(lab.get("/set?nondeterminism=1001").starts_with("HTTP/1.1 400"));
    assert!(lab.get("/set?dirty=1,1000,random").contains("ok"));
    assert!(
        lab.get("/set?dirty=9,1000,random")
            .contains("the working set can have 4 MiB")
    );
    lab.run_until(|lab| lab.server.world().dirtier.written() > 100);
    assert!(lab.get("/set?dirty=off").contains("ok"));
    assert!(lab.get("/touch/4").ends_with("touched\n"));
    assert!(lab.get("/touch/5").contains("only 4 MiB"));
    assert!(lab.get("/stats?time=1").contains("\"touching\":false"));
    assert!(lab.get("/poweroff").starts_with("HTTP/1.1 200"));
    assert_eq!(lab.server.world().power, Some(crate::world::Power::Off));
}

#[test]
fn idle_means_no_deadline() {
    let mut lab = Lab::new("");
    let handle = lab.connect(SERVER4, 6379);
    lab.send(handle, b"INCR n\r\n");
    assert_eq!(lab.receive(handle, 4), b":1\r\n");
    lab.settle();
    let now = lab.moment();
    assert_eq!(lab.server.deadline(now), None);
    assert!(!lab.server.round(now, &mut lab.wires));
}

#[test]
fn a_device_without_room_loses_nothing() {
    let mut lab = Lab::new("");
    lab.log = false;
    lab.wires[0].room = 1;
    let answer = lab.exchange(SERVER4, 80, b"GET /file/100000 HTTP/1.0\r\n\r\n", usize::MAX);
    assert!(answer.len() > 100_000);
}

#[test]
fn garbage_frames_are_survived() {
    let mut lab = Lab::with("", true);
    lab.get("/");
    lab.redis("SET a 1\r\nGET a\r\n", "+OK\r\n$1\r\n1\r\n");
    lab.exchange(SERVER6, 7, b"echo", 4);
    lab.log = false;
    let real = lab.given.clone();
    let mut noise = Random::new([3; 32]);
    let mut below = |limit: usize| usize::try_from(noise.draw()).unwrap() % limit;
    for _ in 0..20_000 {
        // Each round opens something, or disturbs it: frames of real conversations, a few bytes changed.
        let mut frame = real[below(real.len())].clone();
        for _ in 0..below(4) {
            let at = below(frame.len() - 12) + 12;
            frame[at] = if below(2) == 0 { 1 << below(8) } else { below(256) as u8 };
        }
        if below(8) == 0 {
            frame.truncate(below(frame.len()).max(1));
        }
        lab.wires[0].inbound.push_back(frame);
        lab.settle();
        lab.now += (below(100) as u64).pow(3) * 1_000;
    }
    assert!(lab.server.world().counters.accepted > 100);
    assert!(lab.get("/").starts_with("HTTP/1.1 200"));
}
