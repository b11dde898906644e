//! Clients that ask over TCP, and single requests for whoever steers the VM.
//!
//! Blocking sockets with a deadline for each request; what arrives is bounded before it is kept.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::{Counter, REQUEST_LIMIT};

const ANSWER_BYTES_MAX: usize = 1 << 20;
/// Sizes of the files asked for over HTTP, in turn with the page.
const FILE_BYTES: [u64; 4] = [100, 1_400, 9_000, 40_000];
/// Sizes of the echo's messages, in turn.
const ECHO_BYTES: [usize; 3] = [1, 600, 5_000];

/// Why a request was not answered as it should be.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The time limit.
    #[error("no answer in time")]
    Late,
    /// The connection's end.
    #[error("the connection was closed")]
    Ended,
    /// Anything else of the network.
    #[error("the connection broke: {0}")]
    Io(#[source] io::Error),
    /// An answer that can't be right.
    #[error("wrong answer: {0}")]
    Wrong(String),
}

/// An answer to an HTTP request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpAnswer {
    /// The status code.
    pub status: u16,
    /// The body.
    pub body: Vec<u8>,
}

/// A client's one kind of request.
pub(super) trait Exchange {
    /// Sends a request, waits for its answer and checks it.
    fn exchange(&mut self, line: &mut Line, deadline: Instant) -> Result<(), RequestError>;

    /// Returns the counter that the client incremented, if it did.
    fn counter(self) -> Option<Counter>;
}

/// A connection, with what has arrived and not been used.
#[derive(Debug)]
pub(super) struct Line {
    stream: TcpStream,
    unread: Vec<u8>,
}

/// Asks for pages and files and checks every byte.
#[derive(Debug)]
pub(super) struct Http {
    number: usize,
    page: Option<Vec<u8>>,
}

/// Increments a key of its own: each answer must be one more than the last.
#[derive(Debug)]
pub(super) struct Increments {
    counter: Counter,
}

/// Sends bytes and expects them back.
#[derive(Debug, Default)]
pub(super) struct Echo {
    number: usize,
}

/// Asks for one page on a connection of its own.
///
/// # Errors
/// Fails if there is no whole answer before the time limit.
pub fn http_get(address: SocketAddr, path: &str, limit: Duration) -> Result<HttpAnswer, RequestError> {
    let deadline = Instant::now() + limit;
    let mut line = Line::connect_within(address, limit)?;
    line.http(path, deadline)
}

/// Asks the store for the number under a key; no such key counts as 0.
///
/// # Errors
/// Fails if there is no answer before the time limit, or if the value is no number.
pub fn stored_count(address: SocketAddr, key: &str, limit: Duration) -> Result<u64, RequestError> {
    let deadline = Instant::now() + limit;
    let mut line = Line::connect_within(address, limit)?;
    line.send(&command("GET", key), deadline)?;
    let head = line.line(deadline)?;
    if head == b"$-1" {
        return Ok(0);
    }
    let length = number(&head, b'$')?;
    if length > 32 {
        return Err(wrong(&head));
    }
    let length = usize::try_from(length).map_err(|_| wrong(&head))?;
    let value = line.exactly(length + 2, deadline)?;
    std::str::from_utf8(&value[..length])
        .ok()
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| wrong(&value))
}

impl Line {
    pub(super) fn connect(address: SocketAddr) -> Result<Self, RequestError> {
        Self::connect_within(address, REQUEST_LIMIT)
    }

    fn connect_within(address: SocketAddr, limit: Duration) -> Result<Self, RequestError> {
        let stream = TcpStream::connect_timeout(&address, limit).map_err(fault)?;
        stream.set_nodelay(true).map_err(fault)?;
        Ok(Self {
            stream,
            unread: Vec::new(),
        })
    }

    fn send(&mut self, bytes: &[u8], deadline: Instant) -> Result<(), RequestError> {
        self.stream.set_write_timeout(Some(left(deadline)?)).map_err(fault)?;
        self.stream.write_all(bytes).map_err(fault)
    }

    /// Reads on until `end` finds the end of something in what has arrived, and takes that.
    fn take(&mut self, deadline: Instant, end: impl Fn(&[u8]) -> Option<usize>) -> Result<Vec<u8>, RequestError> {
        let mut portion = [0; 16 * 1024];
        loop {
            if let Some(end) = end(&self.unread) {
                let rest = self.unread.split_off(end);
                return Ok(std::mem::replace(&mut self.unread, rest));
            }
            if self.unread.len() > ANSWER_BYTES_MAX {
                return Err(RequestError::Wrong(format!("longer than {ANSWER_BYTES_MAX} bytes")));
            }
            self.stream.set_read_timeout(Some(left(deadline)?)).map_err(fault)?;
            match self.stream.read(&mut portion) {
                Ok(0) => return Err(RequestError::Ended),
                Ok(count) => self.unread.extend_from_slice(&portion[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(fault(error)),
            }
        }
    }

    fn exactly(&mut self, count: usize, deadline: Instant) -> Result<Vec<u8>, RequestError> {
        self.take(deadline, |unread| (unread.len() >= count).then_some(count))
    }

    /// Takes one line, without its end.
    fn line(&mut self, deadline: Instant) -> Result<Vec<u8>, RequestError> {
        let mut line = self.take(deadline, |unread| find(unread, b"\r\n"))?;
        line.truncate(line.len() - 2);
        Ok(line)
    }

    fn http(&mut self, path: &str, deadline: Instant) -> Result<HttpAnswer, RequestError> {
        self.send(
            format!("GET {path} HTTP/1.1\r\nHost: guest\r\n\r\n").as_bytes(),
            deadline,
        )?;
        let head = self.take(deadline, |unread| find(unread, b"\r\n\r\n"))?;
        let text = String::from_utf8_lossy(&head);
        let mut lines = text.lines();
        let status = lines
            .next()
            .and_then(|line| line.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok());
        let length = lines.find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case("content-length")
                .then(|| value.trim().parse().ok())?
        });
        let (Some(status), Some(length)) = (status, length) else {
            return Err(wrong(&head));
        };
        Ok(HttpAnswer {
            status,
            body: self.exactly(length, deadline)?,
        })
    }
}

impl Http {
    pub(super) fn new(number: usize) -> Self {
        Self { number, page: None }
    }
}

impl Exchange for Http {
    fn exchange(&mut self, line: &mut Line, deadline: Instant) -> Result<(), RequestError> {
        self.number += 1;
        let file = FILE_BYTES[self.number / 2 % FILE_BYTES.len()];
        let (path, expected) = if self.number.is_multiple_of(2) {
            let mut body = vec![0; usize::try_from(file).unwrap_or(0)];
            guest::content::fill(0, &mut body);
            (format!("/file/{file}"), Some(body))
        } else {
            ("/".to_owned(), self.page.clone())
        };
        let answer = line.http(&path, deadline)?;
        if answer.status != 200 {
            return Err(RequestError::Wrong(format!("status {} for {path}", answer.status)));
        }
        let expected = expected.unwrap_or_else(|| answer.body.clone());
        if answer.body != expected {
            return Err(RequestError::Wrong(format!(
                "another body for {path}: {}",
                shown(&answer.body)
            )));
        }
        if path == "/" {
            self.page = Some(expected);
        }
        Ok(())
    }

    fn counter(self) -> Option<Counter> {
        None
    }
}

impl Increments {
    pub(super) fn new(key: String) -> Self {
        Self {
            counter: Counter {
                key,
                ..Counter::default()
            },
        }
    }
}

impl Exchange for Increments {
    fn exchange(&mut self, line: &mut Line, deadline: Instant) -> Result<(), RequestError> {
        let counter = &mut self.counter;
        counter.requested += 1;
        line.send(&command("INCR", &counter.key), deadline)?;
        let answer = line.line(deadline)?;
        let value = number(&answer, b':')?;
        if value != counter.acknowledged + 1 {
            let expected = counter.acknowledged + 1;
            return Err(RequestError::Wrong(format!(
                "{} became {value}, not {expected}",
                counter.key
            )));
        }
        counter.acknowledged = value;
        Ok(())
    }

    fn counter(self) -> Option<Counter> {
        Some(self.counter)
    }
}

impl Exchange for Echo {
    fn exchange(&mut self, line: &mut Line, deadline: Instant) -> Result<(), RequestError> {
        self.number += 1;
        let length = ECHO_BYTES[self.number % ECHO_BYTES.len()];
        let mut sent = vec![0; length];
        // Other bytes each time, so that an answer repeated or skipped shows.
        guest::content::fill(u64::try_from(self.number).unwrap_or(0) * 8, &mut sent);
        line.send(&sent, deadline)?;
        let back = line.exactly(length, deadline)?;
        if back == sent { Ok(()) } else { Err(wrong(&back)) }
    }

    fn counter(self) -> Option<Counter> {
        None
    }
}

fn command(verb: &str, key: &str) -> Vec<u8> {
    format!("*2\r\n${}\r\n{verb}\r\n${}\r\n{key}\r\n", verb.len(), key.len()).into_bytes()
}

/// Reads a number behind its one-byte mark, as the store's protocol has it.
fn number(line: &[u8], mark: u8) -> Result<u64, RequestError> {
    let digits = line
        .strip_prefix(&[mark])
        .and_then(|digits| std::str::from_utf8(digits).ok());
    digits.and_then(|digits| digits.parse().ok()).ok_or_else(|| wrong(line))
}

/// Finds where the first occurrence of `pattern` ends.
fn find(bytes: &[u8], pattern: &[u8]) -> Option<usize> {
    bytes
        .windows(pattern.len())
        .position(|window| window == pattern)
        .map(|at| at + pattern.len())
}

fn left(deadline: Instant) -> Result<Duration, RequestError> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        Err(RequestError::Late)
    } else {
        Ok(left)
    }
}

fn fault(error: io::Error) -> RequestError {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => RequestError::Late,
        _ => RequestError::Io(error),
    }
}

fn wrong(answer: &[u8]) -> RequestError {
    RequestError::Wrong(shown(answer))
}

fn shown(answer: &[u8]) -> String {
    let beginning = &answer[..answer.len().min(60)];
    format!("{} bytes, '{}'", answer.len(), beginning.escape_ascii())
}
