//! Hostile bytes on every port, before, during and after the pairing: logged, and without effect.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use checkpoint::cpu::CpuModel;
use checkpoint::wire::{self, Attach, Hello, MachineShape, Message, Session};
use checkpoint::{Epoch, Generation, Tag};
use link::status::State;
use tandem::lab::Host;

use crate::load::Work;
use crate::stage::{Setup, Stage};

/// Where fields lie in a header, all little endian: what another version of the program would still find there.
const VERSION_AT: usize = 4;
const BODY_BYTES_AT: usize = 32;
const CHECKED_BYTES: usize = 44;
const HEADER_BYTES: usize = 48;
const IDLE_CONNECTIONS: usize = 40;
const ANSWER_LIMIT: Duration = Duration::from_secs(3);

#[test]
fn case_10_44_garbage_on_every_port_changes_nothing() {
    let Some(mut stage) = Stage::new(Setup::default()) else {
        return;
    };
    stage.start(Host::B, "secondary");
    stage.await_state(Host::B, State::Starting);
    assault(&mut stage, Host::B);
    stage.start(Host::A, "primary");
    assault(&mut stage, Host::B);
    stage.await_protected();
    stage.await_guest();
    let generation = stage.status(Host::B).expect("the secondary answers").generation;
    let work = Work::start(&stage, "garbage:");
    assault(&mut stage, Host::B);
    assault_control(&mut stage, Host::A);
    stage.await_protected();
    for host in [Host::A, Host::B] {
        let status = stage.status(host).expect("both sides answer");
        assert_eq!(
            status.generation,
            generation,
            "{} is in the pairing of before",
            host.name()
        );
    }
    let told = stage.log(Host::B);
    for expected in ["turned a connection away", "speaks protocol version"] {
        assert!(told.contains(expected), "'{expected}' is not in the log");
    }

    // Nobody listens at the primary; what took over does not either, and its control socket stands the same.
    work.await_more();
    stage.kill(Host::A);
    stage.await_state(Host::B, State::Alone);
    assault_control(&mut stage, Host::B);
    work.await_more();
    work.finish(&stage);
}

/// Throws everything at the port and the control socket of a secondary.
fn assault(stage: &mut Stage, host: Host) {
    let address = Stage::listen_address(host);
    let attacks: [(&str, Vec<u8>); 10] = [
        ("noise", noise(70_000)),
        ("another protocol", b"GET / HTTP/1.1\r\nHost: tandem\r\n\r\n".to_vec()),
        ("a cut header", frame(&hello())[..HEADER_BYTES / 2].to_vec()),
        ("a cut body", frame(&hello())[..HEADER_BYTES + 3].to_vec()),
        ("an old version", changed(VERSION_AT, &0_u16.to_le_bytes())),
        (
            "an announced length of 4 GiB",
            changed(BODY_BYTES_AT, &u32::MAX.to_le_bytes()),
        ),
        ("a changed body", flipped(HEADER_BYTES + 5)),
        ("a message out of place", frame(&out_of_place())),
        ("a session that is not", frame(&attach(None))),
        ("a page stream of none", frame(&attach(Some(0)))),
    ];
    for (what, bytes) in attacks {
        send(stage, host, address, what, bytes);
    }
    // Connections that say nothing take nobody's place.
    let idle = stage.lab.host(host.other()).run(move || {
        let open = |_| TcpStream::connect_timeout(&address, ANSWER_LIMIT).expect("the port takes connections");
        (0..IDLE_CONNECTIONS).map(open).collect::<Vec<_>>()
    });
    assault_control(stage, host);
    drop(idle);
}

fn send(stage: &Stage, host: Host, address: SocketAddr, what: &'static str, bytes: Vec<u8>) {
    stage.lab.host(host.other()).run(move || {
        let mut stream = TcpStream::connect_timeout(&address, ANSWER_LIMIT)
            .unwrap_or_else(|error| panic!("no connection for {what}: {error}"));
        stream.set_read_timeout(Some(ANSWER_LIMIT)).expect("a limit can be set");
        // It may be thrown out before it has said everything.
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(Shutdown::Write);
        // Not more than a refusal comes back, and then the end.
        let mut answer = Vec::new();
        let _ = stream.take(1 << 20).read_to_end(&mut answer);
        assert!(
            answer.len() < 64 << 10,
            "{what} was answered with {} bytes",
            answer.len()
        );
    });
}

fn assault_control(stage: &mut Stage, host: Host) {
    let attacks: [&[u8]; 8] = [
        &noise(10_000),
        b"\n",
        b"{\"command\":\n",
        b"{\"command\":\"fly\"}\n",
        b"{\"command\":\"takeover\",\"old_primary_is_off\":true,\"more\":1}\n",
        &[b'['; 3_000],
        &[b'x'; 100_000],
        b"{\"command\":\"status\"}",
    ];
    for bytes in attacks {
        let mut stream = UnixStream::connect(stage.control(host)).expect("the socket takes connections");
        stream.set_read_timeout(Some(ANSWER_LIMIT)).expect("a limit can be set");
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.take(1 << 20).read_to_end(&mut answer);
    }
    let held: Vec<_> = (0..4).map(|_| UnixStream::connect(stage.control(host))).collect();
    assert!(stage.status(host).is_some(), "others are answered all the same");
    drop(held);
}

fn hello() -> Message {
    Message::Hello(Hello {
        pair: "test".to_owned(),
        node: "stranger".to_owned(),
        shape: MachineShape {
            memory_bytes: 64 << 20,
            vcpus: 1,
            devices: vec!["net".to_owned()],
            disk_bytes: 64 << 20,
            cpu: CpuModel::default(),
        },
        adapts: false,
        generation: 99,
        committed: 0,
        takeover_limit_ms: 300,
        witness: true,
        streams: 8,
    })
}

fn attach(stream: Option<usize>) -> Message {
    let session = Session(7);
    Message::Attach(Attach { session, stream })
}

fn out_of_place() -> Message {
    let tag = Tag {
        generation: Generation(9),
        epoch: Epoch(9),
    };
    Message::Acknowledge(tag)
}

fn frame(message: &Message) -> Vec<u8> {
    let mut bytes = Vec::new();
    wire::encode_into(message, &mut bytes);
    bytes
}

/// A message with another value in its header, whose checksum holds.
fn changed(at: usize, value: &[u8]) -> Vec<u8> {
    let mut bytes = frame(&hello());
    bytes[at..at + value.len()].copy_from_slice(value);
    let sum = crc32fast::hash(&bytes[..CHECKED_BYTES]);
    bytes[CHECKED_BYTES..HEADER_BYTES].copy_from_slice(&sum.to_le_bytes());
    bytes
}

fn flipped(at: usize) -> Vec<u8> {
    let mut bytes = frame(&hello());
    bytes[at] ^= 0x10;
    bytes
}

/// Bytes without any order, and the same each time.
fn noise(count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    guest::content::fill(5, &mut bytes);
    bytes
}
