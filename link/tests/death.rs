//! A role is killed while it holds guest memory: how long does its peer take to know?
//!
//! This program plays three parts: the test, the role that dies (`victim`), and its sentinel (`sentinel`).
//! The test asserts the order of things and prints the times.

#![allow(clippy::unwrap_used, reason = "a test that meets the unexpected fails")]

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use link::Sentinel;
use machine::{GuestRam, Mapping};

const RAM_BYTES: u64 = 1 << 30;
/// What the victim has written and its peer has not read when it dies.
const LAST_WORDS_BYTES: usize = 200_000;
/// What the peer has sent and the victim has not read when it dies.
const UNREAD_BYTES: usize = 10_000;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some("sentinel") => return link::sentinel::main_loop(),
        Some("victim") => victim(&arguments[1], arguments[2] == "guarded"),
        _ => {}
    }
    let unguarded = death("unguarded");
    // A busy machine may run the sentinel late once, but not time and again.
    let guarded = (0..5)
        .map(|_| death("guarded"))
        .find(|death| death.before_teardown && death.end < unguarded.end);
    assert!(
        guarded.is_some(),
        "the peer of a guarded role must know before the role's memory is freed"
    );
    released_is_not_ended();
    lone_sentinel_ends();
    println!("test result: ok");
    ExitCode::SUCCESS
}

struct Death {
    /// From the kill to the end of the stream.
    end: Duration,
    /// The process was still there at the end of the stream.
    before_teardown: bool,
}

fn death(kind: &str) -> Death {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut child = spawn_victim(&listener, kind);
    let (mut stream, _) = listener.accept().unwrap();
    stream.read_exact(&mut [0]).unwrap();
    stream.write_all(&[0; UNREAD_BYTES]).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    let killed = Instant::now();
    child.kill().unwrap();
    let mut last_words = Vec::new();
    let ended = stream.read_to_end(&mut last_words);
    let end = killed.elapsed();
    let before_teardown = child.try_wait().unwrap().is_none();
    child.wait().unwrap();
    println!(
        "{kind}: end of the stream {:.2} ms after the kill, after {} bytes, {}; process gone after {:.2} ms",
        end.as_secs_f64() * 1e3,
        last_words.len(),
        if before_teardown {
            "memory not yet freed"
        } else {
            "memory freed"
        },
        killed.elapsed().as_secs_f64() * 1e3,
    );
    if kind == "guarded" {
        // Without a sentinel the kernel resets the connection, as there are unread bytes in it.
        ended.unwrap();
        assert_eq!(last_words.len(), LAST_WORDS_BYTES, "the peer reads the link to its end");
    }
    Death { end, before_teardown }
}

fn spawn_victim(listener: &TcpListener, kind: &str) -> Child {
    let addr = listener.local_addr().unwrap().to_string();
    let program = std::env::current_exe().unwrap();
    Command::new(program)
        .args(["victim", &addr, kind])
        .stdin(Stdio::null())
        .spawn()
        .unwrap()
}

fn victim(addr: &str, guarded: bool) -> ! {
    let program = std::env::current_exe().unwrap();
    let sentinel = guarded.then(|| Sentinel::spawn_program(&program, &[OsStr::new("sentinel")]).unwrap());
    let ram = GuestRam::new(RAM_BYTES, Mapping::Shared).unwrap();
    touch(&ram);
    let mut stream = TcpStream::connect(addr).unwrap();
    if let Some(sentinel) = &sentinel {
        sentinel.guard(&[stream.as_fd()]);
    }
    stream.write_all(&[1]).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    stream.write_all(&[2; LAST_WORDS_BYTES]).unwrap();
    loop {
        std::thread::park();
    }
}

fn touch(ram: &GuestRam) {
    use vm_memory::{Bytes, GuestAddress};
    for page in (0..RAM_BYTES).step_by(4096) {
        ram.memory().write_obj(page, GuestAddress(page)).unwrap();
    }
}

/// A released socket, or one of a role that ends its sentinel, goes on.
fn released_is_not_ended() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (mut theirs, _) = listener.accept().unwrap();
    let program = std::env::current_exe().unwrap();
    let sentinel = Sentinel::spawn_program(&program, &[OsStr::new("sentinel")]).unwrap();
    sentinel.guard(&[ours.as_fd()]);
    sentinel.release();
    sentinel.guard(&[ours.as_fd()]);
    let process = format!("/proc/{}", sentinel.pid());
    let open: Vec<_> = std::fs::read_dir(format!("{process}/fd")).unwrap().collect();
    assert!(
        open.len() <= 7,
        "three standard ones, the role's socket, the page, one guarded: {}",
        open.len()
    );
    drop(sentinel);
    ours.write_all(b"still here").unwrap();
    theirs.read_exact(&mut [0; 10]).unwrap();
    await_gone(&process);
}

/// A sentinel that is killed takes nothing with it.
fn lone_sentinel_ends() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (mut theirs, _) = listener.accept().unwrap();
    let program = std::env::current_exe().unwrap();
    let sentinel = Sentinel::spawn_program(&program, &[OsStr::new("sentinel")]).unwrap();
    sentinel.guard(&[ours.as_fd()]);
    let pid = sentinel.pid().to_string();
    for ignored in ["-INT", "-TERM"] {
        assert!(Command::new("kill").args([ignored, &pid]).status().unwrap().success());
    }
    std::thread::sleep(Duration::from_millis(50));
    sentinel.guard(&[ours.as_fd()]);
    assert!(
        Path::new(&format!("/proc/{pid}")).exists(),
        "a sentinel is deaf to a terminal's signals"
    );
    assert!(Command::new("kill").args(["-KILL", &pid]).status().unwrap().success());
    await_gone(&format!("/proc/{pid}"));
    sentinel.guard(&[ours.as_fd()]);
    ours.write_all(b"still here").unwrap();
    theirs.read_exact(&mut [0; 10]).unwrap();
}

fn await_gone(process: &str) {
    let limit = Instant::now() + Duration::from_secs(10);
    while Path::new(process).exists() {
        assert!(Instant::now() < limit, "{process} must end");
        std::thread::sleep(Duration::from_millis(5));
    }
}
