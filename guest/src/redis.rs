//! The Redis-protocol service: commands on the key-value store.
//!
//! Commands are executed as they arrive and answered in order; an answer that tells of a change leaves once that
//! change is durable. Input, output and what waits for the disk are bounded: beyond the bounds the connection is
//! read no further until its client or the disk has caught up.

use alloc::collections::VecDeque;
use alloc::format;
use alloc::vec::Vec;

use smoltcp::socket::tcp::Socket;

use crate::clock::Moment;
use crate::kv::{Kv, Refused, Status, Ticket};
use crate::resp;
use crate::tcp::{Stream, is_finished};
use crate::world::World;

/// The port of the service.
pub(crate) const PORT: u16 = 6379;

const OUTPUT_MAX: usize = 256 * 1024;
const HELD_MAX: usize = 4096;
const HELD_BYTES: usize = size_of::<(usize, Ticket)>();
const REPLY_MAX: usize = 1024 * 1024;
/// What a connection may always buffer, however crowded it is.
const SMALL: usize = 16 * 1024;

/// One connection.
#[derive(Debug, Default)]
pub(crate) struct Redis {
    input: Vec<u8>,
    output: Output,
    closing: bool,
    /// What is counted of this connection in `World::buffered`.
    counted: usize,
}

/// Replies, and which of them still wait for the disk.
#[derive(Debug, Default)]
struct Output {
    bytes: Vec<u8>,
    sent: usize,
    /// From which byte on a change must be durable; both ascend.
    held: VecDeque<(usize, Ticket)>,
}

impl Stream for Redis {
    fn serve(&mut self, socket: &mut Socket<'static>, world: &mut World, now: Moment) -> bool {
        if matches!(world.kv.status(), Status::Failed(_)) && !self.output.held.is_empty() {
            // Whether these changes are on the disk is not known: no answer can be right.
            socket.abort();
            return true;
        }
        let mut moved = self.output.send(socket, world.kv.durable());
        loop {
            moved |= self.execute_all(world, now);
            moved |= self.output.send(socket, world.kv.durable());
            self.count(world);
            if !self.receive(socket, world) {
                break;
            }
            moved = true;
        }
        let done = self.closing || (is_finished(socket) && !self.is_blocked(world));
        if done && self.output.is_empty() && socket.may_send() {
            socket.close();
            moved = true;
        }
        moved
    }

    fn end(&mut self, world: &mut World) {
        *self = Self {
            counted: self.counted,
            ..Self::default()
        };
        self.count(world);
    }
}

impl Redis {
    fn is_blocked(&self, world: &World) -> bool {
        let most = if is_crowded(world) { SMALL } else { OUTPUT_MAX };
        self.output.is_full(most) || world.kv.is_congested()
    }

    /// Takes in more of what the client has sent; returns whether there was any.
    fn receive(&mut self, socket: &mut Socket<'static>, world: &World) -> bool {
        if self.closing || self.input.len() >= resp::COMMAND_MAX {
            return false;
        }
        if is_crowded(world) && self.input.len() > SMALL && !self.is_blocked(world) && socket.can_recv() {
            // Commands that wait for their ends hold the memory; this one would wait for ever.
            resp::error(&mut self.output.bytes, "ERR too many large commands at once: try again");
            self.input = Vec::new();
            self.closing = true;
            return true;
        }
        let input = &mut self.input;
        let taken = socket.recv(|bytes| {
            let count = bytes.len().min(resp::COMMAND_MAX - input.len());
            if input.capacity() - input.len() < count {
                // In small steps, not by doubling: what is reserved counts.
                input.reserve_exact(count.max(SMALL));
            }
            input.extend_from_slice(&bytes[..count]);
            (count, count)
        });
        matches!(taken, Ok(1..))
    }

    /// Gives back memory that is not needed any more, and counts the rest.
    fn count(&mut self, world: &mut World) {
        if self.input.is_empty() && self.input.capacity() > SMALL {
            self.input = Vec::new();
        }
        if self.output.bytes.is_empty() && self.output.bytes.capacity() > SMALL {
            self.output.bytes = Vec::new();
        }
        let now = self.input.capacity() + self.output.bytes.capacity() + self.output.held.capacity() * HELD_BYTES;
        world.buffered = world.buffered + now - self.counted;
        self.counted = now;
    }

    fn execute_all(&mut self, world: &mut World, now: Moment) -> bool {
        let mut at = 0;
        while !self.closing && !self.is_blocked(world) {
            match resp::parse(&self.input[at..]) {
                Ok(Some(command)) => {
                    let rest = &self.input[at..];
                    let words: Vec<&[u8]> = command.words.iter().map(|word| &rest[word.clone()]).collect();
                    at += command.bytes;
                    let start = self.output.bytes.len();
                    let done = execute(world, now, &words, &mut self.output.bytes);
                    self.output.hold(start, done.ticket, world.kv.durable());
                    self.closing = done.close;
                }
                Ok(None) => break,
                Err(error) => {
                    resp::error(&mut self.output.bytes, &format!("ERR Protocol error: {error}"));
                    self.closing = true;
                }
            }
        }
        self.input.drain(..at);
        at > 0
    }
}

impl Output {
    fn is_empty(&self) -> bool {
        self.sent == self.bytes.len()
    }

    fn is_full(&self, most: usize) -> bool {
        self.bytes.len() - self.sent > most || self.held.len() > HELD_MAX
    }

    fn hold(&mut self, start: usize, ticket: Ticket, durable: Ticket) {
        let before = self.held.back().map_or(durable, |(_, ticket)| *ticket);
        if ticket > before {
            self.held.push_back((start, ticket));
        }
    }

    fn send(&mut self, socket: &mut Socket<'static>, durable: Ticket) -> bool {
        while self.held.front().is_some_and(|(_, ticket)| *ticket <= durable) {
            self.held.pop_front();
        }
        let end = self.held.front().map_or(self.bytes.len(), |(start, _)| *start);
        let count = socket.send_slice(&self.bytes[self.sent..end]).unwrap_or(0);
        self.sent += count;
        if self.sent == self.bytes.len() || self.sent >= OUTPUT_MAX {
            self.bytes.drain(..self.sent);
            for (start, _) in &mut self.held {
                *start -= self.sent;
            }
            self.sent = 0;
        }
        count > 0
    }
}

/// Whether commands and replies under way take up all the memory they may.
fn is_crowded(world: &World) -> bool {
    world.buffered > world.limits.buffered
}

/// What is left to do after a reply was written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Done {
    /// The change that must be durable before the reply leaves.
    ticket: Ticket,
    close: bool,
}

fn execute(world: &mut World, now: Moment, words: &[&[u8]], out: &mut Vec<u8>) -> Done {
    let Some((name, args)) = words.split_first() else {
        return Done::default();
    };
    world.counters.redis_commands += 1;
    let upper = name.to_ascii_uppercase();
    if let Status::Failed(reason) = world.kv.status()
        && !matches!(
            &upper[..],
            b"PING" | b"ECHO" | b"QUIT" | b"INFO" | b"COMMAND" | b"CONFIG"
        )
    {
        resp::error(out, &format!("ERR the store has failed: {reason}"));
        return Done::default();
    }
    let longest = REPLY_MAX.min(world.limits.buffered.saturating_sub(world.buffered) / 2);
    let kv = &mut world.kv;
    let ticket = match (&upper[..], args) {
        (b"PING", []) => plain(|| resp::status(out, "PONG")),
        (b"PING" | b"ECHO", [text]) => plain(|| resp::bulk(out, Some(text))),
        (b"GET", [key]) => value_reply(kv, key, out),
        (b"SET", [key, value, options @ ..]) => set(kv, key, value, options, out),
        (b"SETNX", [key, value]) => set_if_absent(kv, key, value, out),
        (b"INCR", [key]) => add(kv, key, Some(1), out),
        (b"DECR", [key]) => add(kv, key, Some(-1), out),
        (b"INCRBY", [key, step]) => add(kv, key, resp::integer(step), out),
        (b"DECRBY", [key, step]) => add(kv, key, resp::integer(step).and_then(i64::checked_neg), out),
        (b"DEL" | b"UNLINK", [_, ..]) => delete(kv, args, out),
        (b"EXISTS", [_, ..]) => exists(kv, args, out),
        (b"STRLEN", [key]) => {
            let (value, ticket) = kv.value(key);
            resp::number_reply(out, count(value.map_or(0, |value| value.len())));
            ticket
        }
        (b"MGET", [_, ..]) => values_reply(kv, args, longest, out),
        (b"MSET", [_, _, ..]) if args.len().is_multiple_of(2) => set_many(kv, args, out),
        (b"DBSIZE", []) => {
            resp::number_reply(out, count(kv.keys()));
            kv.executed()
        }
        (b"FLUSHALL" | b"FLUSHDB", [] | [_]) => match kv.clear() {
            Ok(ticket) => ok(out, ticket),
            Err(refused) => refuse(out, refused),
        },
        (b"SELECT", [index]) => plain(|| match resp::integer(index) {
            Some(0) => resp::status(out, "OK"),
            _ => resp::error(out, "ERR DB index is out of range"),
        }),
        (b"INFO", _) => {
            let text = info(world);
            resp::bulk(out, Some(text.as_bytes()));
            world.kv.executed()
        }
        (b"TIME", []) => plain(|| {
            resp::array(out, 2);
            resp::bulk(out, Some(format!("{}", now.wall_ns / 1_000_000_000).as_bytes()));
            resp::bulk(out, Some(format!("{}", now.wall_ns / 1000 % 1_000_000).as_bytes()));
        }),
        (b"COMMAND", _) => plain(|| resp::array(out, 0)),
        (b"CONFIG", [verb, names @ ..]) if verb.eq_ignore_ascii_case(b"GET") => plain(|| config(names, out)),
        (b"CLIENT", [verb, ..]) if verb.eq_ignore_ascii_case(b"SETNAME") || verb.eq_ignore_ascii_case(b"SETINFO") => {
            plain(|| resp::status(out, "OK"))
        }
        (b"QUIT", _) => {
            resp::status(out, "OK");
            return Done { ticket: 0, close: true };
        }
        _ => plain(|| unknown(&upper, name, args, out)),
    };
    Done { ticket, close: false }
}

fn plain(reply: impl FnOnce()) -> Ticket {
    reply();
    0
}

fn ok(out: &mut Vec<u8>, ticket: Ticket) -> Ticket {
    resp::status(out, "OK");
    ticket
}

fn refuse(out: &mut Vec<u8>, refused: Refused) -> Ticket {
    resp::error(
        out,
        match refused {
            Refused::ReadOnly => "READONLY there is no block device that can be written to",
            Refused::Full => "OOM command not allowed when used memory > 'maxmemory'.",
            Refused::KeyTooLong => "ERR the key is longer than 1024 bytes",
            Refused::ValueTooLong => "ERR the value is longer than 65536 bytes",
        },
    );
    0
}

fn value_reply(kv: &Kv, key: &[u8], out: &mut Vec<u8>) -> Ticket {
    let (value, ticket) = kv.value(key);
    resp::bulk(out, value.as_deref());
    ticket
}

fn values_reply(kv: &Kv, keys: &[&[u8]], most: usize, out: &mut Vec<u8>) -> Ticket {
    let start = out.len();
    let mut last = 0;
    resp::array(out, keys.len());
    for key in keys {
        last = value_reply(kv, key, out).max(last);
        if out.len() - start > most {
            out.truncate(start);
            resp::error(out, "ERR the reply is too long: ask for fewer keys");
            return 0;
        }
    }
    last
}

fn set(kv: &mut Kv, key: &[u8], value: &[u8], options: &[&[u8]], out: &mut Vec<u8>) -> Ticket {
    let (before, seen) = kv.value(key);
    let wanted = match options {
        [] => true,
        [option] if option.eq_ignore_ascii_case(b"NX") => before.is_none(),
        [option] if option.eq_ignore_ascii_case(b"XX") => before.is_some(),
        [option, ..]
            if [&b"EX"[..], b"PX", b"EXAT", b"PXAT"]
                .iter()
                .any(|name| option.eq_ignore_ascii_case(name)) =>
        {
            resp::error(out, "ERR keys that expire are not supported");
            return 0;
        }
        _ => {
            resp::error(out, "ERR syntax error");
            return 0;
        }
    };
    if !wanted {
        resp::bulk(out, None);
        return seen;
    }
    match kv.set(key, value) {
        Ok(ticket) => ok(out, ticket),
        Err(refused) => refuse(out, refused),
    }
}

fn set_if_absent(kv: &mut Kv, key: &[u8], value: &[u8], out: &mut Vec<u8>) -> Ticket {
    let (before, seen) = kv.value(key);
    if before.is_some() {
        resp::number_reply(out, 0);
        return seen;
    }
    match kv.set(key, value) {
        Ok(ticket) => {
            resp::number_reply(out, 1);
            ticket
        }
        Err(refused) => refuse(out, refused),
    }
}

fn set_many(kv: &mut Kv, pairs: &[&[u8]], out: &mut Vec<u8>) -> Ticket {
    if let Err(refused) = kv.check(pairs.chunks(2).map(|pair| (pair[0], pair[1]))) {
        return refuse(out, refused);
    }
    let mut last = 0;
    for pair in pairs.chunks(2) {
        match kv.set(pair[0], pair[1]) {
            Ok(ticket) => last = ticket,
            Err(refused) => return refuse(out, refused).max(last),
        }
    }
    ok(out, last)
}

fn add(kv: &mut Kv, key: &[u8], step: Option<i64>, out: &mut Vec<u8>) -> Ticket {
    let (value, seen) = kv.value(key);
    let before = value.map_or(Some(0), |value| resp::integer(&value));
    let (Some(before), Some(step)) = (before, step) else {
        resp::error(out, "ERR value is not an integer or out of range");
        return seen;
    };
    let Some(after) = before.checked_add(step) else {
        resp::error(out, "ERR increment or decrement would overflow");
        return seen;
    };
    match kv.set(key, format!("{after}").as_bytes()) {
        Ok(ticket) => {
            resp::number_reply(out, after);
            ticket
        }
        Err(refused) => refuse(out, refused),
    }
}

fn delete(kv: &mut Kv, keys: &[&[u8]], out: &mut Vec<u8>) -> Ticket {
    let mut removed = 0;
    let mut last = 0;
    for key in keys {
        match kv.delete(key) {
            Ok((was_there, ticket)) => {
                removed += i64::from(was_there);
                last = ticket.max(last);
            }
            Err(refused) => return refuse(out, refused),
        }
    }
    resp::number_reply(out, removed);
    last
}

fn exists(kv: &Kv, keys: &[&[u8]], out: &mut Vec<u8>) -> Ticket {
    let mut found = 0;
    let mut last = 0;
    for key in keys {
        let (value, ticket) = kv.value(key);
        found += i64::from(value.is_some());
        last = ticket.max(last);
    }
    resp::number_reply(out, found);
    last
}

fn config(names: &[&[u8]], out: &mut Vec<u8>) {
    let known = [("save", ""), ("appendonly", "yes"), ("appendfsync", "always")];
    let asked = |name: &str| names.iter().any(|asked| asked.eq_ignore_ascii_case(name.as_bytes()));
    let found: Vec<_> = known.into_iter().filter(|(name, _)| asked(name)).collect();
    resp::array(out, found.len() * 2);
    for (name, value) in found {
        resp::bulk(out, Some(name.as_bytes()));
        resp::bulk(out, Some(value.as_bytes()));
    }
}

fn info(world: &World) -> alloc::string::String {
    let kv = &world.kv;
    let state = match kv.status() {
        Status::Loading => "loading",
        Status::Ready => "ready",
        Status::ReadOnly(_) => "read-only",
        Status::Failed(_) => "failed",
    };
    format!(
        "# Server\r\nredis_version:7.0.0\r\nserver_name:tandem-guest\r\nredis_mode:standalone\r\ntcp_port:{PORT}\r\n\r\n\
         # Memory\r\nused_memory:{}\r\nmaxmemory:{}\r\n\r\n\
         # Persistence\r\nloading:0\r\naof_enabled:1\r\nstore:{state}\r\n\r\n\
         # Stats\r\ntotal_connections_received:{}\r\ntotal_commands_processed:{}\r\n\r\n\
         # Keyspace\r\ndb0:keys={},expires=0\r\n",
        kv.used(),
        kv.limit(),
        world.counters.accepted,
        world.counters.redis_commands,
        kv.keys(),
    )
}

fn unknown(upper: &[u8], name: &[u8], args: &[&[u8]], out: &mut Vec<u8>) {
    const KNOWN: [&[u8]; 23] = [
        b"PING",
        b"ECHO",
        b"GET",
        b"SET",
        b"SETNX",
        b"INCR",
        b"DECR",
        b"INCRBY",
        b"DECRBY",
        b"DEL",
        b"UNLINK",
        b"EXISTS",
        b"STRLEN",
        b"MGET",
        b"MSET",
        b"DBSIZE",
        b"FLUSHALL",
        b"FLUSHDB",
        b"SELECT",
        b"TIME",
        b"CONFIG",
        b"CLIENT",
        b"INFO",
    ];
    let text = |word: &[u8]| alloc::string::String::from_utf8_lossy(&word[..word.len().min(64)]).into_owned();
    if KNOWN.contains(&upper) {
        let lower = text(name).to_ascii_lowercase();
        resp::error(out, &format!("ERR wrong number of arguments for '{lower}' command"));
        return;
    }
    let mut message = format!("ERR unknown command '{}', with args beginning with: ", text(name));
    for word in args.iter().take(8) {
        message.push_str(&format!("'{}' ", text(word)));
    }
    resp::error(out, &message);
}

fn count(value: usize) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
