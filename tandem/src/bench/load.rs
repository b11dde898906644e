//! Load: so many connections, each with one request at a time, from one thread.
//!
//! It must cost little, since it shares the processors with what it measures: one `epoll`, one read and one write for a
//! request, answers compared with the first one and not parsed. How busy the thread was is part of the outcome: a load that
//! keeps its thread busy all the time would measure itself.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{Timespec, epoll};
use rustix::net::sockopt::set_socket_send_buffer_size;
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::clients::Target;

/// The first answer must come within this.
const FIRST_LIMIT: Duration = Duration::from_secs(10);
/// A datagram that was not answered for so long is lost, and sent again.
const DATAGRAM_LIMIT: Duration = Duration::from_millis(500);
const LOOK_EVERY: Duration = Duration::from_millis(20);
const PORTION_BYTES: usize = 256 * 1024;
/// What an upload may have on its way: more would be counted before it has arrived.
const UPLOAD_WINDOW: usize = 128 * 1024;
const FILE_BYTES: usize = 1 << 20;
const DATAGRAM_BYTES: usize = 64;
const VALUE_BYTES: usize = 100;
const DISCARD_PORT: u16 = 9;
const READY_MAX: usize = 64;

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Kind {
    /// The small page, by HTTP with keep-alive.
    HttpSmall,
    /// The small page, by HTTP on a connection of its own.
    HttpClose,
    /// A file of 1 MiB, by HTTP with keep-alive.
    #[serde(rename = "http-1mib")]
    HttpLarge,
    /// A key of the store.
    Get,
    /// A counter of the store, one for each connection; answered once it is on the disk.
    Increment,
    /// An echo by UDP.
    UdpEcho,
    /// Bytes to the guest, as fast as they go.
    BulkIn,
    /// Bytes from the guest, as fast as they come.
    BulkOut,
}

/// How a load is made.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    pub(super) kind: Kind,
    pub(super) connections: usize,
    /// Whether all answers are the same; else, where a server writes the date, they are of the same length.
    pub(super) alike: bool,
    /// Not counted.
    pub(super) warm_up: Duration,
    pub(super) span: Duration,
}

/// What came of it.
#[derive(Clone, Debug, Default)]
pub(super) struct Outcome {
    /// Requests answered, or bytes moved if the kind is of bytes, each second.
    pub(super) rate: f64,
    /// From each request to its answer, in microseconds; none if the kind is of bytes.
    pub(super) latencies: Vec<f64>,
    /// Datagrams that were not answered.
    pub(super) lost: u64,
    /// Share of the time for which the load's own thread ran.
    pub(super) busy: f64,
}

impl Kind {
    /// Returns the name as it is in the JSON.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::HttpSmall => "http-small",
            Self::HttpClose => "http-close",
            Self::HttpLarge => "http-1mib",
            Self::Get => "get",
            Self::Increment => "increment",
            Self::UdpEcho => "udp-echo",
            Self::BulkIn => "bulk-in",
            Self::BulkOut => "bulk-out",
        }
    }

    pub(super) fn is_bulk(self) -> bool {
        matches!(self, Self::BulkIn | Self::BulkOut)
    }

    fn address(self, target: &Target) -> SocketAddr {
        match self {
            Self::HttpSmall | Self::HttpClose | Self::HttpLarge => target.http_address(),
            Self::BulkOut => (target.v4, target.source).into(),
            Self::Get | Self::Increment => target.store_address(),
            Self::UdpEcho => (target.v4, target.echo).into(),
            Self::BulkIn => (target.v4, DISCARD_PORT).into(),
        }
    }

    fn request(self, connection: usize) -> Vec<u8> {
        let get = |path: String| format!("GET {path} HTTP/1.1\r\nHost: guest\r\n\r\n").into_bytes();
        match self {
            Self::HttpSmall => get("/".to_owned()),
            Self::HttpClose => b"GET / HTTP/1.1\r\nHost: guest\r\nConnection: close\r\n\r\n".to_vec(),
            Self::HttpLarge => get(format!("/file/{FILE_BYTES}")),
            Self::Get => command(&["GET", "bench"]),
            Self::Increment => command(&["INCR", &format!("bench:{connection}")]),
            Self::UdpEcho => {
                let mut datagram = vec![b'.'; DATAGRAM_BYTES];
                datagram[..8].copy_from_slice(&(connection as u64).to_le_bytes());
                datagram
            }
            Self::BulkIn => vec![b'x'; PORTION_BYTES],
            Self::BulkOut => get(format!("/file/{}", 1 << 30)),
        }
    }
}

fn command(words: &[&str]) -> Vec<u8> {
    let mut text = format!("*{}\r\n", words.len());
    for word in words {
        text.push_str(&format!("${}\r\n{word}\r\n", word.len()));
    }
    text.into_bytes()
}

/// Makes a load, for as long as it says. Must be called in the clients' namespace.
pub(super) fn run(target: &Target, load: Load) -> Result<Outcome> {
    if load.kind == Kind::Get {
        store_value(target)?;
    }
    let mut lines = Vec::new();
    for number in 0..load.connections {
        lines.push(Line::open(target, load, number)?);
    }
    let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let events = if load.kind == Kind::BulkIn {
        epoll::EventFlags::OUT
    } else {
        epoll::EventFlags::IN
    };
    for (number, line) in lines.iter().enumerate() {
        epoll::add(
            &poll,
            line.socket.fd(),
            epoll::EventData::new_u64(number as u64),
            events,
        )?;
    }
    let mut worker = Worker {
        target: *target,
        load,
        lines,
        poll,
        portion: vec![0; PORTION_BYTES],
        counting: false,
        count: 0,
        outcome: Outcome::default(),
    };
    worker.run()?;
    Ok(worker.outcome)
}

fn store_value(target: &Target) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&target.store_address(), FIRST_LIMIT).context("no connection")?;
    stream.set_read_timeout(Some(FIRST_LIMIT))?;
    stream.write_all(&command(&["SET", "bench", &"v".repeat(VALUE_BYTES)]))?;
    let mut answer = [0; 5];
    stream.read_exact(&mut answer).context("the store does not answer")?;
    ensure!(
        &answer == b"+OK\r\n",
        "the store refuses a value: {}",
        answer.escape_ascii()
    );
    Ok(())
}

enum Socket {
    Stream(TcpStream),
    Datagrams(UdpSocket),
}

impl Socket {
    /// Connects, and waits for that.
    fn open(target: &Target, kind: Kind) -> Result<Self> {
        let address = kind.address(target);
        if kind == Kind::UdpEcho {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.connect(address)?;
            return Ok(Self::Datagrams(socket));
        }
        let stream =
            TcpStream::connect_timeout(&address, FIRST_LIMIT).with_context(|| format!("no connection to {address}"))?;
        stream.set_nodelay(true)?;
        if kind == Kind::BulkIn {
            set_socket_send_buffer_size(&stream, UPLOAD_WINDOW)?;
        }
        Ok(Self::Stream(stream))
    }

    fn set_nonblocking(&self) -> io::Result<()> {
        match self {
            Self::Stream(stream) => stream.set_nonblocking(true),
            Self::Datagrams(socket) => socket.set_nonblocking(true),
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Stream(stream) => stream.as_fd(),
            Self::Datagrams(socket) => socket.as_fd(),
        }
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Stream(stream) => stream.write(bytes),
            Self::Datagrams(socket) => socket.send(bytes),
        }
    }

    fn receive(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Stream(stream) => stream.read(bytes),
            Self::Datagrams(socket) => socket.recv(bytes),
        }
    }
}

/// One connection, with one request on its way.
struct Line {
    socket: Socket,
    request: Vec<u8>,
    /// The whole answer to expect; none if its length is not known.
    expected: Option<Vec<u8>>,
    /// Whether each answer is that, to the byte.
    alike: bool,
    received: usize,
    asked: Instant,
}

impl Line {
    fn open(target: &Target, load: Load, number: usize) -> Result<Self> {
        let kind = load.kind;
        let mut line = Self {
            socket: Socket::open(target, kind).with_context(|| format!("connection {number}"))?,
            request: kind.request(number),
            expected: None,
            alike: load.alike,
            received: 0,
            asked: Instant::now(),
        };
        match kind {
            Kind::HttpSmall | Kind::HttpClose | Kind::HttpLarge | Kind::Get => {
                line.expected = Some(line.first_answer()?);
            }
            Kind::UdpEcho => line.expected = Some(line.request.clone()),
            Kind::Increment | Kind::BulkIn | Kind::BulkOut => {}
        }
        if kind == Kind::HttpClose {
            line.socket = Socket::open(target, kind)?;
        }
        line.socket.set_nonblocking()?;
        Ok(line)
    }

    /// Asks once and returns the answer, whose length it tells itself.
    fn first_answer(&mut self) -> Result<Vec<u8>> {
        let Socket::Stream(stream) = &mut self.socket else {
            bail!("only streams are asked beforehand");
        };
        stream.set_read_timeout(Some(FIRST_LIMIT))?;
        stream.write_all(&self.request)?;
        let (mut answer, mut portion) = (Vec::new(), vec![0; PORTION_BYTES]);
        while whole_length(&answer).is_none_or(|length| answer.len() < length) {
            let count = stream.read(&mut portion).context("no answer")?;
            ensure!(count > 0, "the guest has closed a connection");
            answer.extend_from_slice(&portion[..count]);
        }
        ensure!(
            answer.starts_with(b"HTTP/1.1 200") || answer.starts_with(b"$"),
            "the guest answers {}",
            answer[..answer.len().min(60)].escape_ascii()
        );
        Ok(answer)
    }

    fn ask(&mut self) -> Result<()> {
        self.received = 0;
        self.asked = Instant::now();
        let sent = self.socket.send(&self.request).context("can't send a request")?;
        ensure!(sent == self.request.len(), "a request does not fit into its socket");
        Ok(())
    }

    /// Notes what has arrived, and tells whether the answer is whole.
    fn note(&mut self, arrived: &[u8]) -> Result<bool> {
        let from = self.received;
        self.received += arrived.len();
        let Some(expected) = &self.expected else {
            // A number on a line of its own.
            return Ok(arrived.ends_with(b"\n"));
        };
        let same = expected.get(from..self.received);
        ensure!(
            same == Some(arrived) || !self.alike && same.is_some(),
            "an answer differs from the first"
        );
        Ok(self.received == expected.len())
    }
}

/// Returns how long an answer is in all, as soon as its beginning tells.
fn whole_length(answer: &[u8]) -> Option<usize> {
    let after = |pattern: &[u8]| Some(answer.windows(pattern.len()).position(|at| at == pattern)? + pattern.len());
    if let Some(rest) = answer.strip_prefix(b"$") {
        let head = after(b"\r\n")?;
        let length: usize = std::str::from_utf8(rest).ok()?.lines().next()?.parse().ok()?;
        return Some(head + length + 2);
    }
    let head = after(b"\r\n\r\n")?;
    let text = String::from_utf8_lossy(&answer[..head]).to_ascii_lowercase();
    let length = text
        .lines()
        .find_map(|line| line.strip_prefix("content-length:")?.trim().parse::<usize>().ok())?;
    Some(head + length)
}

struct Worker {
    target: Target,
    load: Load,
    lines: Vec<Line>,
    poll: OwnedFd,
    portion: Vec<u8>,
    counting: bool,
    /// Answers, or bytes if the kind is of bytes.
    count: u64,
    outcome: Outcome,
}

impl Worker {
    fn run(&mut self) -> Result<()> {
        if self.load.kind != Kind::BulkIn {
            for line in &mut self.lines {
                line.ask()?;
            }
        }
        let start = Instant::now();
        self.turn_until(start + self.load.warm_up)?;
        self.counting = true;
        let (from, used) = (Instant::now(), own_time());
        self.turn_until(from + self.load.span)?;
        let seconds = from.elapsed().as_secs_f64();
        self.outcome.rate = self.count as f64 / seconds;
        self.outcome.busy = (own_time() - used).as_secs_f64() / seconds;
        Ok(())
    }

    fn turn_until(&mut self, end: Instant) -> Result<()> {
        let mut ready: Vec<epoll::Event> = Vec::with_capacity(READY_MAX);
        let mut look = Instant::now() + LOOK_EVERY;
        loop {
            let now = Instant::now();
            if now >= end {
                return Ok(());
            }
            if now >= look {
                self.look_after(now)?;
                look = now + LOOK_EVERY;
            }
            let wait = Timespec::try_from(end.min(look).saturating_duration_since(now)).context("a short time")?;
            ready.clear();
            match epoll::wait(&self.poll, rustix::buffer::spare_capacity(&mut ready), Some(&wait)) {
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            for event in &ready {
                let number = usize::try_from(event.data.u64()).context("the number of a line")?;
                self.serve(number)?;
            }
        }
    }

    fn serve(&mut self, number: usize) -> Result<()> {
        let line = &mut self.lines[number];
        let moved = if self.load.kind == Kind::BulkIn {
            line.socket.send(&line.request)
        } else {
            line.socket.receive(&mut self.portion)
        };
        let bytes = match moved {
            Ok(0) => bail!("the guest has closed a connection"),
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error).context("a connection broke"),
        };
        if self.load.kind.is_bulk() {
            self.count += if self.counting { bytes as u64 } else { 0 };
            return Ok(());
        }
        if line.note(&self.portion[..bytes])? {
            if self.counting {
                self.count += 1;
                self.outcome.latencies.push(line.asked.elapsed().as_secs_f64() * 1e6);
            }
            if self.load.kind == Kind::HttpClose {
                return self.ask_anew(number);
            }
            line.ask()?;
        }
        Ok(())
    }

    /// Asks on a connection of its own, whose beginning is part of what it takes.
    fn ask_anew(&mut self, number: usize) -> Result<()> {
        let line = &mut self.lines[number];
        let begun = Instant::now();
        // The old one leaves the poll with its last descriptor.
        line.socket = Socket::open(&self.target, self.load.kind)?;
        line.socket.set_nonblocking()?;
        let data = epoll::EventData::new_u64(number as u64);
        epoll::add(&self.poll, line.socket.fd(), data, epoll::EventFlags::IN)?;
        line.ask()?;
        line.asked = begun;
        Ok(())
    }

    /// Sends again what was lost.
    fn look_after(&mut self, now: Instant) -> Result<()> {
        if self.load.kind == Kind::UdpEcho {
            for line in &mut self.lines {
                if now.saturating_duration_since(line.asked) > DATAGRAM_LIMIT {
                    self.outcome.lost += u64::from(self.counting);
                    line.ask()?;
                }
            }
        }
        Ok(())
    }
}

/// Returns the processor time that this thread has used.
fn own_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_tells_its_length() {
        assert_eq!(whole_length(b"$3\r\nabc"), Some(9));
        assert_eq!(whole_length(b"$3\r"), None);
        assert_eq!(
            whole_length(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nab"),
            Some(42)
        );
        assert_eq!(whole_length(b"HTTP/1.1 200 OK\r\nContent-Len"), None);
    }

    #[test]
    fn requests_are_as_the_protocols_have_them() {
        assert_eq!(Kind::Increment.request(7), b"*2\r\n$4\r\nINCR\r\n$7\r\nbench:7\r\n");
        assert_eq!(Kind::HttpSmall.request(0), b"GET / HTTP/1.1\r\nHost: guest\r\n\r\n");
        assert_eq!(Kind::UdpEcho.request(3).len(), DATAGRAM_BYTES);
    }
}
