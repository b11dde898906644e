//! The HTTP/1.1 service: keep-alive, pipelining, GET and HEAD.
//!
//! Answers carry no date and no other trace of time, so that two guests give the same bytes; the setting
//! `nondeterminism` makes an even share of them carry time and noise, on purpose. Requests and their bodies are
//! bounded. Long bodies are made while they are sent.

mod pages;

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use smoltcp::socket::tcp::Socket;

use crate::clock::Moment;
use crate::content;
use crate::tcp::{Stream, is_finished};
use crate::world::World;
use pages::{Answer, Body};

/// The port of the service.
pub(crate) const PORT: u16 = 80;

const HEAD_MAX: usize = 8 * 1024;
const HEADERS_MAX: usize = 64;
const BODY_MAX: u64 = 64 * 1024;

/// One connection.
#[derive(Debug, Default)]
pub(crate) struct Http {
    input: Vec<u8>,
    output: Vec<u8>,
    sent: usize,
    /// Bytes of a request's body still to be skipped.
    skip: u64,
    file: Option<File>,
    waiting_for_touch: bool,
    closing: bool,
}

/// The part of a file that is still to be sent.
#[derive(Clone, Copy, Debug)]
struct File {
    at: u64,
    end: u64,
}

struct Request {
    path: String,
    head_only: bool,
    keep_alive: bool,
    body: u64,
}

/// A request that is answered with an error and the end of the connection.
#[derive(Clone, Copy, Debug)]
enum Bad {
    Syntax,
    TooLong,
    BodyTooLong,
    Encoding,
    Method,
    Version,
}

impl Stream for Http {
    fn serve(&mut self, socket: &mut Socket<'static>, world: &mut World, now: Moment) -> bool {
        let mut moved = false;
        loop {
            moved |= self.send(socket);
            if !self.output.is_empty() || self.file.is_some() {
                return moved;
            }
            if self.waiting_for_touch {
                if !world.touch.is_done() {
                    return moved;
                }
                self.waiting_for_touch = false;
                self.respond(world, now, &pages::touched(), false);
                continue;
            }
            if self.closing {
                if socket.may_send() {
                    socket.close();
                    moved = true;
                }
                // What the peer still sends is dropped, so that closing does not reset the connection.
                while let Ok(1..) = socket.recv(|bytes| (bytes.len(), bytes.len())) {}
                return moved;
            }
            if self.answer_next(world, now) || self.receive(socket) {
                moved = true;
            } else {
                if is_finished(socket) {
                    self.closing = true;
                    continue;
                }
                return moved;
            }
        }
    }
}

impl Http {
    fn send(&mut self, socket: &mut Socket<'static>) -> bool {
        let mut moved = false;
        if !self.output.is_empty() {
            let count = socket.send_slice(&self.output[self.sent..]).unwrap_or(0);
            self.sent += count;
            moved |= count > 0;
            if self.sent < self.output.len() {
                return moved;
            }
            self.output.clear();
            self.sent = 0;
        }
        while let Some(file) = &mut self.file {
            if file.at == file.end {
                self.file = None;
                break;
            }
            let outcome = socket.send(|buffer| {
                let left = usize::try_from(file.end - file.at).unwrap_or(usize::MAX);
                let count = buffer.len().min(left);
                content::fill(file.at, &mut buffer[..count]);
                (count, count)
            });
            let Ok(count @ 1..) = outcome else { break };
            file.at += count as u64;
            moved = true;
        }
        moved
    }

    fn receive(&mut self, socket: &mut Socket<'static>) -> bool {
        let input = &mut self.input;
        let taken = socket.recv(|bytes| {
            let count = bytes.len().min(HEAD_MAX.saturating_sub(input.len()));
            input.extend_from_slice(&bytes[..count]);
            (count, count)
        });
        matches!(taken, Ok(1..))
    }

    /// Answers the next request in the input, if there is a whole one; returns whether anything was done.
    fn answer_next(&mut self, world: &mut World, now: Moment) -> bool {
        if self.skip > 0 && !self.input.is_empty() {
            let count = usize::try_from(self.skip).unwrap_or(usize::MAX).min(self.input.len());
            self.input.drain(..count);
            self.skip -= count as u64;
            return true;
        }
        match parse(&self.input) {
            Ok(None) => false,
            Ok(Some((request, bytes))) => {
                self.input.drain(..bytes);
                self.skip = request.body;
                self.closing = !request.keep_alive;
                let answer = pages::answer(world, now, &request.path);
                self.respond(world, now, &answer, request.head_only);
                true
            }
            Err(bad) => {
                self.input.clear();
                self.closing = true;
                self.respond(world, now, &bad.answer(), false);
                true
            }
        }
    }

    fn respond(&mut self, world: &mut World, now: Moment, answer: &Answer, head_only: bool) {
        let length = match &answer.body {
            Body::Text(text) => text.len() as u64,
            Body::File(bytes) => *bytes,
            Body::WhenTouched => {
                self.waiting_for_touch = true;
                return;
            }
        };
        let counters = &mut world.counters;
        counters.http_requests += 1;
        let mut head = format!(
            "HTTP/1.1 {}\r\nServer: tandem-guest\r\nContent-Type: {}\r\nContent-Length: {length}\r\n",
            answer.status, answer.kind
        );
        if self.closing {
            head.push_str("Connection: close\r\n");
        }
        if pages::is_chosen(counters.http_requests, world.settings.nondeterminism) {
            head.push_str(&format!("X-Noise: {:016x}-{:016x}\r\n", now.ns, now.tsc));
        }
        head.push_str("\r\n");
        self.output.extend_from_slice(head.as_bytes());
        match &answer.body {
            _ if head_only => {}
            Body::Text(text) => self.output.extend_from_slice(text.as_bytes()),
            Body::File(bytes) => self.file = Some(File { at: 0, end: *bytes }),
            Body::WhenTouched => {}
        }
    }
}

impl Bad {
    fn answer(self) -> Answer {
        let (status, why) = match self {
            Self::Syntax => ("400 Bad Request", "this is not HTTP"),
            Self::TooLong => (
                "431 Request Header Fields Too Large",
                "the request's head is longer than 8192 bytes",
            ),
            Self::BodyTooLong => ("413 Content Too Large", "the request's body is longer than 65536 bytes"),
            Self::Encoding => (
                "501 Not Implemented",
                "transfer encodings are not supported in requests",
            ),
            Self::Method => ("405 Method Not Allowed", "only GET and HEAD are supported"),
            Self::Version => ("505 HTTP Version Not Supported", "only HTTP/1.0 and 1.1 are supported"),
        };
        Answer::text(status, format!("{why}\n"))
    }
}

fn parse(input: &[u8]) -> Result<Option<(Request, usize)>, Bad> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut parsed = httparse::Request::new(&mut headers);
    let bytes = match parsed.parse(input) {
        Ok(httparse::Status::Complete(bytes)) => bytes,
        Ok(httparse::Status::Partial) if input.len() >= HEAD_MAX => return Err(Bad::TooLong),
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err(Bad::TooLong),
        Err(httparse::Error::Version) => return Err(Bad::Version),
        Err(_) => return Err(Bad::Syntax),
    };
    let mut keep_alive = parsed.version == Some(1);
    let mut body = 0;
    for header in parsed.headers.iter() {
        let value = header.value.trim_ascii();
        if header.name.eq_ignore_ascii_case("connection") {
            for word in value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii) {
                if word.eq_ignore_ascii_case(b"close") {
                    keep_alive = false;
                } else if word.eq_ignore_ascii_case(b"keep-alive") {
                    keep_alive = true;
                }
            }
        } else if header.name.eq_ignore_ascii_case("content-length") {
            body = core::str::from_utf8(value)
                .ok()
                .and_then(|text| text.parse().ok())
                .ok_or(Bad::Syntax)?;
        } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(Bad::Encoding);
        }
    }
    if body > BODY_MAX {
        return Err(Bad::BodyTooLong);
    }
    let head_only = match parsed.method {
        Some("GET") => false,
        Some("HEAD") => true,
        _ => return Err(Bad::Method),
    };
    let path = parsed.path.unwrap_or("/").into();
    Ok(Some((
        Request {
            path,
            head_only,
            keep_alive,
            body,
        },
        bytes,
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn requests_are_read() {
        let text = b"GET /a?b HTTP/1.1\r\nHost: x\r\nconnection: Close\r\nContent-Length: 3\r\n\r\nabcGET";
        let (request, bytes) = parse(text).unwrap_or(None).unwrap();
        assert_eq!(
            (request.path.as_str(), request.keep_alive, request.body),
            ("/a?b", false, 3)
        );
        assert_eq!(&text[bytes..], b"abcGET");
        let old = parse(b"HEAD / HTTP/1.0\r\n\r\n").unwrap_or(None).unwrap().0;
        assert!(old.head_only && !old.keep_alive);
        assert!(matches!(parse(b"GET / HTTP/1.1\r\nHost"), Ok(None)));
    }

    #[test]
    fn bad_requests_are_told_apart() {
        assert!(matches!(parse(b"\x16\x03\x01\x02\x00"), Err(Bad::Syntax)));
        assert!(matches!(parse(b"POST / HTTP/1.1\r\n\r\n"), Err(Bad::Method)));
        assert!(matches!(parse(b"GET / HTTP/2.0\r\n\r\n"), Err(Bad::Version)));
        assert!(matches!(
            parse(b"GET / HTTP/1.1\r\nContent-Length: 65537\r\n\r\n"),
            Err(Bad::BodyTooLong)
        ));
        assert!(matches!(
            parse(b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n"),
            Err(Bad::Syntax)
        ));
        assert!(matches!(
            parse(b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"),
            Err(Bad::Encoding)
        ));
        let mut long = b"GET /".to_vec();
        long.resize(HEAD_MAX, b'a');
        assert!(matches!(parse(&long), Err(Bad::TooLong)));
    }

    proptest! {
        #[test]
        fn any_bytes_get_an_answer(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
        }
    }
}
