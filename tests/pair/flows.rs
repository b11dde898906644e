//! Connections whose sequence numbers differ between the two guests, open before and after their host dies.
//!
//! The guest is told to choose its initial sequence numbers differently on each host (`isn_skew`), and epochs are
//! long: a connection opened since the last checkpoint lives by translation only, and goes on doing so after it.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::Duration;

use guest::content;
use link::status::State;
use tandem::clients::Target;
use tandem::lab::{Host, Namespace};

use crate::load::Work;
use crate::stage::{LIMIT, Setup, Stage, await_fact};

/// Larger than any test downloads.
const FILE_BYTES: u64 = 1 << 30;
const PORTION: usize = 16 * 1024;
const TRIES: usize = 50;

#[test]
fn case_22_connections_of_the_open_epoch_outlive_two_takeovers() {
    let setup = Setup {
        more: vec!["--cmdline", "isn_skew=1", "--epoch-max-age", "60s"],
        ..Setup::default()
    };
    let Some(mut stage) = Stage::new(setup) else { return };
    stage.pair(Host::A);
    // Load brings checkpoints of its own; connections are opened until some lie within one epoch.
    let mut work = Vec::new();
    let mut downloads = Vec::new();
    for number in 0..TRIES {
        let before = stage.await_state(Host::A, State::Protected).epoch;
        downloads.push(Download::start(stage.lab.client()));
        work.push(Work::start(&stage, &format!("flow{number}:")));
        downloads.last().expect("just started").await_more();
        if stage.status(Host::A).expect("the primary answers").epoch == before {
            println!("opened within one epoch at try {number}");
            break;
        }
        work.drain(..).for_each(|work| drop(work.finish(&stage)));
        downloads.drain(..).for_each(Download::finish);
    }
    assert!(!work.is_empty(), "no epoch was long enough to open connections in it");
    for victim in [Host::A, Host::B] {
        let survivor = victim.other();
        stage.kill(victim);
        stage.await_state(survivor, State::Alone);
        work.iter().for_each(Work::await_more);
        downloads.iter().for_each(Download::await_more);
        work.push(Work::start(&stage, &format!("alone{}:", survivor.name())));
        stage.start(victim, "secondary");
        stage.await_protected();
        work.iter().for_each(Work::await_more);
        downloads.iter().for_each(Download::await_more);
    }
    work.into_iter().for_each(|work| drop(work.finish(&stage)));
    downloads.into_iter().for_each(Download::finish);
}

/// A download that goes on until it is told to end, and checks every byte.
struct Download {
    received: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<(), String>>,
}

impl Download {
    fn start(client: &Namespace) -> Self {
        let received = Arc::new(AtomicU64::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let (counted, stopped) = (Arc::clone(&received), Arc::clone(&stop));
        let thread = client.thread("download", move || download(&counted, &stopped));
        Self {
            received,
            stop,
            thread: thread.expect("a thread can be started"),
        }
    }

    /// Waits for more than any buffer may hold from before.
    fn await_more(&self) {
        let enough = self.received.load(Ordering::Relaxed) + (1 << 20);
        await_fact("more of a download", || {
            let ended = self.thread.is_finished();
            (ended || self.received.load(Ordering::Relaxed) >= enough).then_some(())
        });
    }

    fn finish(self) {
        self.stop.store(true, Ordering::Relaxed);
        let outcome = self.thread.join().expect("a download does not panic");
        assert_eq!(outcome, Ok(()), "a download broke");
    }
}

fn download(received: &AtomicU64, stop: &AtomicBool) -> Result<(), String> {
    let told = |error: std::io::Error| format!("after {} bytes: {error}", received.load(Ordering::Relaxed));
    let mut stream = TcpStream::connect(Target::bundled().http_address()).map_err(told)?;
    stream.set_read_timeout(Some(LIMIT)).map_err(told)?;
    write!(stream, "GET /file/{FILE_BYTES} HTTP/1.1\r\nHost: guest\r\n\r\n").map_err(told)?;
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).map_err(told)?;
        head.push(byte[0]);
    }
    let (mut portion, mut expected) = ([0; PORTION], [0; PORTION]);
    let mut offset = 0;
    while !stop.load(Ordering::Relaxed) {
        let count = stream.read(&mut portion).map_err(told)?;
        if count == 0 {
            return Err(format!("the connection ended after {offset} bytes"));
        }
        content::fill(offset, &mut expected[..count]);
        if portion[..count] != expected[..count] {
            return Err(format!("wrong bytes after {offset}"));
        }
        offset += count as u64;
        received.store(offset, Ordering::Relaxed);
        // Leaves the machine to the other clients.
        sleep(Duration::from_millis(1));
    }
    Ok(())
}
