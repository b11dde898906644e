//! The secondary dies again and again while it commits large writes to its image; the image recovers each time.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::Duration;

use guest::content;
use link::control::Command;
use link::status::State;
use tandem::clients::Target;
use tandem::lab::{Host, Namespace};

use crate::stage::{LIMIT, Setup, Stage, await_fact};
use crate::survival::random_span;

const WRITERS: usize = 3;
const KEYS: u64 = 8;
const VALUE_BYTES: usize = 40_000;
const ROUNDS: u64 = 5;
/// An epoch of these writes takes some tens of milliseconds to commit.
const COMMIT: Duration = Duration::from_millis(40);
const IMAGE_BYTES: u64 = 4 << 20;

/// With so small a disk the guest's store changes halves all the time, and discards the one that it leaves.
fn small() -> Setup {
    Setup {
        image_bytes: IMAGE_BYTES,
        ..Setup::default()
    }
}

#[test]
fn case_31_commits_are_interrupted_and_every_acknowledged_value_is_there() {
    let Some(mut stage) = Stage::new(small()) else {
        return;
    };
    stage.pair(Host::A);
    let writers: Vec<_> = (0..WRITERS)
        .map(|number| Writer::start(stage.lab.client(), number))
        .collect();
    for round in 0..ROUNDS {
        writers.iter().for_each(Writer::await_more);
        // Refused if one is being taken right now, which is as good.
        let _ = stage.ask(Host::A, &Command::Checkpoint);
        let delay = random_span(COMMIT);
        println!("round {round}: the secondary dies after {delay:?}");
        sleep(delay);
        stage.kill(Host::B);
        stage.await_state(Host::A, State::Alone);
        stage.start(Host::B, "secondary");
        stage.await_protected();
    }
    writers.iter().for_each(Writer::await_more);
    stage.kill(Host::A);
    stage.await_state(Host::B, State::Alone);
    writers.iter().for_each(Writer::await_more);
    let acknowledged: Vec<_> = writers.into_iter().map(Writer::finish).collect();
    assert_values(&stage, &acknowledged, |found, last| found == last);

    // The survivor's own last folding of its writes is on its disk, too.
    stage.kill(Host::B);
    stage.start(Host::B, "primary");
    stage.await_state(Host::B, State::Alone);
    stage.await_guest();
    assert_values(&stage, &acknowledged, |found, last| found == last);
    for host in [Host::A, Host::B] {
        let room = std::fs::metadata(stage.image(host))
            .expect("there is an image")
            .blocks()
            * 512;
        assert!(
            room < IMAGE_BYTES / 4 * 3,
            "{host:?}: discards gave no room back: {room}"
        );
    }
}

/// Both die while commits are under way: the image of the secondary is old then, but it is one state.
#[test]
fn case_33_an_image_whose_commit_was_interrupted_is_whole() {
    let Some(mut stage) = Stage::new(small()) else {
        return;
    };
    stage.pair(Host::A);
    let writers: Vec<_> = (0..WRITERS)
        .map(|number| Writer::start(stage.lab.client(), number))
        .collect();
    writers.iter().for_each(Writer::await_more);
    let _ = stage.ask(Host::A, &Command::Checkpoint);
    sleep(random_span(COMMIT));
    stage.kill(Host::B);
    stage.kill(Host::A);
    let written: Vec<_> = writers.into_iter().map(Writer::abandon).collect();
    for host in [Host::B, Host::A] {
        stage.start(host, "run");
        stage.await_guest();
        if host == Host::A {
            assert_values(&stage, &written, |found, last| found.is_some() && found >= last);
        } else {
            assert_values(&stage, &written, |_, _| true);
        }
        stage.terminate(host);
        assert_eq!(stage.await_end(host).code(), Some(0));
    }
}

/// Sets large values, one after the other, on a connection of its own.
struct Writer {
    number: usize,
    /// How many values were acknowledged; value *n* is under key *n* modulo `KEYS`.
    acknowledged: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<(), String>>,
}

impl Writer {
    fn start(client: &Namespace, number: usize) -> Self {
        let acknowledged = Arc::new(AtomicU64::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let (counted, stopped) = (Arc::clone(&acknowledged), Arc::clone(&stop));
        let thread = client.thread("writer", move || write(number, &counted, &stopped));
        Self {
            number,
            acknowledged,
            stop,
            thread: thread.expect("a thread can be started"),
        }
    }

    fn await_more(&self) {
        let enough = self.acknowledged.load(Ordering::Relaxed) + 2 * KEYS;
        await_fact("more writes", || {
            let ended = self.thread.is_finished();
            (ended || self.acknowledged.load(Ordering::Relaxed) >= enough).then_some(())
        });
    }

    fn finish(self) -> (usize, u64) {
        self.stop.store(true, Ordering::Relaxed);
        let outcome = self.thread.join().expect("a writer does not panic");
        assert_eq!(outcome, Ok(()), "writer {} broke", self.number);
        (self.number, self.acknowledged.load(Ordering::Relaxed))
    }

    /// Lets go of a writer whose VM is dead: it waits for an answer that does not come.
    fn abandon(self) -> (usize, u64) {
        self.stop.store(true, Ordering::Relaxed);
        (self.number, self.acknowledged.load(Ordering::Relaxed))
    }
}

fn write(number: usize, acknowledged: &AtomicU64, stop: &AtomicBool) -> Result<(), String> {
    let told = |error: std::io::Error| error.to_string();
    let mut stream = connect().map_err(told)?;
    while !stop.load(Ordering::Relaxed) {
        let next = acknowledged.load(Ordering::Relaxed) + 1;
        let (key, value) = (key(number, next % KEYS), value(number, next));
        let mut command = format!("*3\r\n$3\r\nSET\r\n${}\r\n{key}\r\n${VALUE_BYTES}\r\n", key.len()).into_bytes();
        command.extend(value);
        command.extend(b"\r\n");
        stream.write_all(&command).map_err(told)?;
        let mut answer = [0; 5];
        stream.read_exact(&mut answer).map_err(told)?;
        if answer != *b"+OK\r\n" {
            return Err(format!("answered {}", answer.escape_ascii()));
        }
        acknowledged.store(next, Ordering::Relaxed);
    }
    Ok(())
}

/// Reads every key and judges the number of the value under it, given that of the last one acknowledged there.
fn assert_values(stage: &Stage, written: &[(usize, u64)], judge: impl Fn(Option<u64>, Option<u64>) -> bool) {
    for &(number, acknowledged) in written {
        for slot in 0..KEYS {
            let last = (acknowledged.saturating_sub(KEYS - 1)..=acknowledged).find(|n| n % KEYS == slot && *n > 0);
            let found = stage.lab.client().run(move || read(number, slot));
            let found = found.unwrap_or_else(|error| panic!("{}: {error}", key(number, slot)));
            assert!(
                judge(found, last),
                "{} holds value {found:?}, the last acknowledged is {last:?}",
                key(number, slot)
            );
        }
    }
}

/// Returns which value is under a key; fails if it is not one that was written there, in full.
fn read(number: usize, slot: u64) -> Result<Option<u64>, String> {
    let told = |error: std::io::Error| error.to_string();
    let mut stream = connect().map_err(told)?;
    let key = key(number, slot);
    write!(stream, "*2\r\n$3\r\nGET\r\n${}\r\n{key}\r\n", key.len()).map_err(told)?;
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n") {
        stream.read_exact(&mut byte).map_err(told)?;
        head.push(byte[0]);
    }
    if head == b"$-1\r\n" {
        return Ok(None);
    }
    if head != format!("${VALUE_BYTES}\r\n").as_bytes() {
        return Err(format!("answered {}", head.escape_ascii()));
    }
    let mut found = vec![0; VALUE_BYTES];
    stream.read_exact(&mut found).map_err(told)?;
    let (mark, _) = found.split_first_chunk::<8>().expect("values are longer");
    let which = u64::from_le_bytes(*mark);
    if which % KEYS == slot && found == value(number, which) {
        Ok(Some(which))
    } else {
        Err("a value that was never written".to_owned())
    }
}

fn connect() -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&Target::bundled().store_address(), LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn key(number: usize, slot: u64) -> String {
    format!("big:{number}:{slot}")
}

/// Its number, and then bytes that no other value has at that place.
fn value(number: usize, which: u64) -> Vec<u8> {
    let mut value = vec![0; VALUE_BYTES];
    let writer = u64::try_from(number).expect("a small number");
    content::fill((writer << 32) + (which << 3), &mut value);
    value[..8].copy_from_slice(&which.to_le_bytes());
    value
}
