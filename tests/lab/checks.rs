//! What watches a Linux guest from inside, in the lab: clocks that must not go back, memory that must keep what was written, the
//! kernel's log, and records that are on the disk before anybody is told. Clients ask over TCP, a line a question (`answer`).
//!
//! Built alone and statically for the guest's image (`tests/lab/guest`): only the standard library.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

const PORT: u16 = 7000;
const RECORDS: &str = "/var/lib/checks/records";
const RECORD_BYTES: usize = 64;
const MEMORY_WORDS: usize = 2 << 20;
const O_NONBLOCK: i32 = 0o4000;
// Two guests share an emulated processor with all that protects them: what watches must leave the most of it to the others.
const CLOCK_REST: Duration = Duration::from_millis(100);
const MEMORY_REST: Duration = Duration::from_millis(100);
/// What a healthy kernel does not say.
const TROUBLE: [&str; 12] = [
    "BUG:",
    "WARNING:",
    "Oops",
    "soft lockup",
    "hard LOCKUP",
    "rcu: INFO",
    "hung_task",
    "unable to handle",
    "Marking TSC unstable",
    "Marking clocksource",
    "EXT4-fs error",
    "I/O error",
];
/// What the processor lacks is no trouble of this guest's.
const NO_TROUBLE: [&str; 1] = ["hw-vuln"];

#[derive(Default)]
struct Watched {
    /// How often some processor has read the monotonic clock, in thousands.
    clock_rounds: AtomicU64,
    /// How often it was earlier than what had been read before, on whatever processor.
    clock_back: AtomicU64,
    clock_leap_ms: AtomicU64,
    wall_back_ms: AtomicU64,
    /// How many parts of the memory were read and written anew, of 64 a round.
    memory_parts: AtomicU64,
    memory_errors: AtomicU64,
}

fn main() -> io::Result<()> {
    if std::env::args().nth(1).as_deref() == Some("verify") {
        let path = std::env::args().nth(2).unwrap_or_else(|| RECORDS.into());
        println!("{}", verified(&fs::read(path)?));
        return Ok(());
    }
    let watched = Arc::new(Watched::default());
    let begun = Instant::now();
    let latest = Arc::new(AtomicU64::new(0));
    for _ in 0..thread::available_parallelism()?.get() {
        let (watched, latest) = (Arc::clone(&watched), Arc::clone(&latest));
        thread::spawn(move || watch_clocks(&watched, begun, &latest));
    }
    let of_memory = Arc::clone(&watched);
    thread::spawn(move || watch_memory(&of_memory));
    let records = Arc::new(Mutex::new(Records::open()?));
    for stream in TcpListener::bind(("0.0.0.0", PORT))?.incoming().flatten() {
        let (watched, records) = (Arc::clone(&watched), Arc::clone(&records));
        thread::spawn(move || serve(&stream, &watched, &records));
    }
    Ok(())
}

fn serve(stream: &TcpStream, watched: &Watched, records: &Mutex<Records>) {
    for line in BufReader::new(stream).lines().map_while(Result::ok) {
        let mut to = stream;
        if writeln!(to, "{}", answer(line.trim(), watched, records)).is_err() {
            return;
        }
    }
}

/// One line for one question.
fn answer(question: &str, watched: &Watched, records: &Mutex<Records>) -> String {
    match question {
        "record" => match records.lock().map(|mut records| records.append()) {
            Ok(Ok(number)) => format!("record {number}"),
            Ok(Err(failure)) => format!("failed: {failure}"),
            Err(_) => "failed: a record before this one".into(),
        },
        "records" => fs::read(RECORDS).map_or_else(|failure| format!("failed: {failure}"), |bytes| verified(&bytes)),
        "kernel" => match trouble() {
            Ok(lines) if lines.is_empty() => "kernel ok".into(),
            Ok(lines) => format!("kernel said: {}", lines.join(" | ")),
            Err(failure) => format!("failed: {failure}"),
        },
        "report" => {
            let of = |number: &AtomicU64| number.load(SeqCst);
            format!(
                "clock_rounds={} clock_back={} clock_leap_ms={} wall_back_ms={} memory_parts={} memory_errors={}",
                of(&watched.clock_rounds),
                of(&watched.clock_back),
                of(&watched.clock_leap_ms),
                of(&watched.wall_back_ms),
                of(&watched.memory_parts),
                of(&watched.memory_errors),
            )
        }
        other => match other.strip_prefix("do ") {
            Some(command) => begin(command).map_or_else(|failure| format!("failed: {failure}"), |()| "begun".into()),
            None => format!("failed: '{other}' is none of record, records, kernel, report, do COMMAND"),
        },
    }
}

/// Runs a command that nobody waits for, such as one that ends the guest.
fn begin(command: &str) -> io::Result<()> {
    Command::new("sh")
        .args(["-c", command])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map(drop)
}

/// Reads both clocks, beside the other processors, each time after what some processor has read last.
fn watch_clocks(watched: &Watched, begun: Instant, latest: &AtomicU64) -> ! {
    let since = |at: Instant| {
        at.checked_duration_since(begun)
            .map(|since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
    };
    let mut wall = SystemTime::now();
    loop {
        for _ in 0..1000 {
            let before = latest.load(SeqCst);
            match since(Instant::now()) {
                Some(now) if now >= before => {
                    latest.fetch_max(now, SeqCst);
                    watched.clock_leap_ms.fetch_max((now - before) / 1_000_000, SeqCst);
                }
                _ => {
                    watched.clock_back.fetch_add(1, SeqCst);
                }
            }
            let now = SystemTime::now();
            if let Ok(back) = wall.duration_since(now) {
                watched.wall_back_ms.fetch_max(
                    u64::try_from(back.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX),
                    SeqCst,
                );
            }
            wall = now;
        }
        watched.clock_rounds.fetch_add(1, SeqCst);
        thread::sleep(CLOCK_REST);
    }
}

/// Writes a pattern that says where and when it was written, lets it lie, and reads it.
fn watch_memory(watched: &Watched) -> ! {
    let mut memory = vec![0u64; MEMORY_WORDS];
    let pattern = |round: u64, at: usize| {
        (at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ round.wrapping_mul(0xd1b5_4a32_d192_ed03)
    };
    for round in 0u64.. {
        // A part of it at a time, so that some is old and some is new at any moment.
        for part in memory.chunks_mut(MEMORY_WORDS / 64).enumerate() {
            let (number, words) = part;
            let first = number * (MEMORY_WORDS / 64);
            for (at, word) in words.iter_mut().enumerate() {
                if round > 0 && *word != pattern(round - 1, first + at) {
                    watched.memory_errors.fetch_add(1, SeqCst);
                }
                *word = pattern(round, first + at);
            }
            watched.memory_parts.fetch_add(1, SeqCst);
            thread::sleep(MEMORY_REST);
        }
    }
    unreachable!("the rounds do not end")
}

/// The records of this guest: each has its number, and is on the disk before it is told.
struct Records {
    file: File,
    next: u64,
}

impl Records {
    fn open() -> io::Result<Self> {
        fs::create_dir_all("/var/lib/checks")?;
        let file = OpenOptions::new().create(true).append(true).open(RECORDS)?;
        let next = file.metadata()?.len() / RECORD_BYTES as u64;
        Ok(Self { file, next })
    }

    fn append(&mut self) -> io::Result<u64> {
        self.file.write_all(record(self.next).as_bytes())?;
        self.file.sync_data()?;
        self.next += 1;
        Ok(self.next - 1)
    }
}

fn record(number: u64) -> String {
    let told = format!("record {number} {:016x}", number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    format!("{told:.<width$}\n", width = RECORD_BYTES - 1)
}

/// How many records there are, all whole, or which is not.
fn verified(bytes: &[u8]) -> String {
    for (number, bytes) in bytes.chunks(RECORD_BYTES).enumerate() {
        if bytes != record(number as u64).as_bytes() {
            return format!("failed: record {number} is {:?}", String::from_utf8_lossy(bytes));
        }
    }
    format!("records {}", bytes.len() / RECORD_BYTES)
}

/// The lines of the kernel's log that tell of trouble.
fn trouble() -> io::Result<Vec<String>> {
    let mut log = OpenOptions::new()
        .read(true)
        .custom_flags(O_NONBLOCK)
        .open("/dev/kmsg")?;
    let mut lines = Vec::new();
    let mut entry = [0; 8192];
    loop {
        match log.read(&mut entry) {
            Ok(length) => {
                let said = String::from_utf8_lossy(&entry[..length]).into_owned();
                let said = said.split_once(';').map_or(said.as_str(), |(_, text)| text).trim();
                if TROUBLE.iter().any(|word| said.contains(word)) && !NO_TROUBLE.iter().any(|word| said.contains(word))
                {
                    lines.push(said.lines().next().unwrap_or_default().to_owned());
                }
            }
            Err(failure) if failure.kind() == io::ErrorKind::WouldBlock => return Ok(lines),
            // What was overwritten meanwhile.
            Err(failure) if failure.raw_os_error() == Some(32) => {}
            Err(failure) => return Err(failure),
        }
    }
}
