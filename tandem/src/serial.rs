//! Where the guest's consoles are: its lines in the log, the terminal, or a socket.
//!
//! A vCPU waits for what it prints, so nothing here waits for a reader: who does not keep up misses something. Input is read by one thread
//! for as long as the place is open, whatever machine has the port: what comes while none has is dropped.

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use machine::Serial;
use rustix::net::{SendFlags, send};
use rustix::process::{Signal, getpid, kill_process};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};
use tracing::{info, warn};

use crate::linux::SerialPlace;

/// Ctrl-A, after which `x` ends the process in order.
const ESCAPE: u8 = 1;
/// How long input waits for the guest to take what it has.
const RETRY: Duration = Duration::from_millis(10);
/// What may wait for the terminal; a guest prints byte by byte.
const PRINTED_MAX: usize = 64 * 1024;
/// At the end the terminal gets so long to show the rest.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// The guest's console, a log line for each of its lines.
#[derive(Default)]
pub(crate) struct LogLines(Vec<u8>);

impl Write for LogLines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        const LINE_BYTES_MAX: usize = 4_096;
        for &byte in bytes {
            if byte == b'\n' || self.0.len() == LINE_BYTES_MAX {
                info!(target: "guest", "{}", String::from_utf8_lossy(&self.0).trim_end());
                self.0.clear();
            } else {
                self.0.push(byte);
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A serial port's place, open.
pub(crate) enum Terminal {
    Log,
    Stdio {
        input: Arc<Input>,
        screen: Screen,
        /// For as long as the port is there.
        _raw: RawTerminal,
    },
    Socket {
        input: Arc<Input>,
        socket: Arc<Socket>,
        /// For as long as the port is there.
        _name: SocketFile,
    },
}

impl Terminal {
    /// Opens the place of a serial port.
    pub(crate) fn open(place: &SerialPlace) -> Result<Self> {
        Ok(match place {
            SerialPlace::Log => Self::Log,
            SerialPlace::Stdio => {
                let _raw = RawTerminal::enter().context("the terminal can't be set up")?;
                let (input, screen) = (Arc::<Input>::default(), Screen::start()?);
                let port = Arc::clone(&input);
                start("serial", move || feed_terminal(&port))?;
                Self::Stdio { input, screen, _raw }
            }
            SerialPlace::Socket(path) => {
                let (input, socket) = (Arc::<Input>::default(), Arc::new(Socket::listen(path)?));
                let _name = SocketFile(path.clone());
                let (port, served) = (Arc::clone(&input), Arc::clone(&socket));
                start("serial", move || served.serve(&port))?;
                Self::Socket { input, socket, _name }
            }
        })
    }

    /// Returns where the port's output goes.
    pub(crate) fn output(&self) -> Box<dyn Write + Send> {
        match self {
            Self::Log => Box::new(LogLines::default()),
            Self::Stdio { screen, .. } => Box::new(screen.clone()),
            Self::Socket { socket, .. } => Box::new(SocketOutput(Arc::clone(socket))),
        }
    }

    /// Gives this port what comes from there, and no other any more, for as long as it exists.
    pub(crate) fn feed(&self, port: &Arc<Serial>) {
        match self {
            Self::Log => {}
            Self::Stdio { input, .. } | Self::Socket { input, .. } => *input.port() = Arc::downgrade(port),
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Self::Stdio { screen, .. } = self {
            screen.finish();
        }
    }
}

fn start(name: &str, body: impl FnOnce() + Send + 'static) -> Result<()> {
    let spawned = thread::Builder::new().name(name.to_owned()).spawn(body);
    spawned
        .map(drop)
        .context("the host refuses a thread: raise its limits (ulimit -u)")
}

/// The port that gets what is typed.
#[derive(Default)]
pub(crate) struct Input(Mutex<Weak<Serial>>);

impl Input {
    fn port(&self) -> MutexGuard<'_, Weak<Serial>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the port all of these bytes, as it takes them. Without a port they are lost.
    fn give(&self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let Some(port) = self.port().upgrade() else { return };
            let taken = port.input(bytes);
            drop(port);
            bytes = &bytes[taken..];
            if !bytes.is_empty() {
                thread::sleep(RETRY);
            }
        }
    }
}

/// Standard output, which a thread of its own waits for.
#[derive(Clone)]
pub(crate) struct Screen(SyncSender<Shown>);

/// What the screen's thread is told.
pub(crate) enum Shown {
    Byte(u8),
    /// All that came before is out: say so.
    End(SyncSender<()>),
}

impl Screen {
    fn start() -> Result<Self> {
        let (printed, shown) = mpsc::sync_channel(PRINTED_MAX);
        start("screen", move || show(&shown))?;
        Ok(Self(printed))
    }

    /// Waits until all is out, but not for a terminal that hangs.
    fn finish(&self) {
        let (told, done) = mpsc::sync_channel(1);
        if self.0.try_send(Shown::End(told)).is_ok() {
            // Late or not, it is the end.
            let _ = done.recv_timeout(LAST_WORDS);
        }
    }
}

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            // A terminal that does not keep up misses what there is no room for.
            let _ = self.0.try_send(Shown::Byte(*byte));
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn show(shown: &Receiver<Shown>) {
    let mut bytes = Vec::new();
    while let Ok(first) = shown.recv() {
        let mut end = None;
        for next in std::iter::once(first).chain(shown.try_iter()).take(PRINTED_MAX) {
            match next {
                Shown::Byte(byte) => bytes.push(byte),
                Shown::End(told) => end = Some(told),
            }
        }
        let mut out = io::stdout().lock();
        // Nobody is there to be told of an output that is closed.
        let _ = out.write_all(&bytes).and_then(|()| out.flush());
        bytes.clear();
        if let Some(told) = end {
            let _ = told.try_send(());
        }
    }
}

/// The terminal in the mode in which all keys are the guest's; as it was when dropped.
pub(crate) struct RawTerminal(Option<Termios>);

impl RawTerminal {
    fn enter() -> io::Result<Self> {
        if !isatty(io::stdin()) {
            return Ok(Self(None));
        }
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        // Lines of the log go to the same screen.
        raw.output_modes = before.output_modes;
        tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
        Ok(Self(Some(before)))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(before) = &self.0
            && let Err(error) = tcsetattr(io::stdin(), OptionalActions::Now, before)
        {
            warn!(%error, "the terminal can't be set back: type `reset`");
        }
    }
}

fn feed_terminal(port: &Input) {
    let mut bytes = [0; 256];
    let mut escaped = false;
    while let Ok(count) = io::stdin().read(&mut bytes) {
        if count == 0 {
            return;
        }
        let mut typed = Vec::with_capacity(count);
        for &byte in &bytes[..count] {
            match (std::mem::take(&mut escaped), byte) {
                (true, b'x' | b'X') => {
                    info!("ended from the terminal");
                    // What SIGTERM does is the orderly end.
                    if let Err(error) = kill_process(getpid(), Signal::TERM) {
                        warn!(%error, "can't end this process");
                    }
                }
                (false, ESCAPE) => escaped = true,
                _ => typed.push(byte),
            }
        }
        port.give(&typed);
    }
}

/// A socket on which one client at a time has the port.
pub(crate) struct Socket {
    listener: UnixListener,
    client: Mutex<Option<UnixStream>>,
}

impl Socket {
    fn listen(path: &Path) -> Result<Self> {
        let bind = || UnixListener::bind(path);
        let listener = match bind() {
            // What an earlier process has left is in the way; a socket that someone serves is not touched.
            Err(error) if error.kind() == ErrorKind::AddrInUse && UnixStream::connect(path).is_err() => {
                fs::remove_file(path).and_then(|()| bind())
            }
            other => other,
        };
        let listener = listener.with_context(|| {
            format!(
                "the serial port's socket {} can't be made: is another VM using it, and does its folder exist?",
                path.display()
            )
        })?;
        Ok(Self {
            listener,
            client: Mutex::default(),
        })
    }

    fn serve(&self, port: &Input) {
        for client in self.listener.incoming() {
            let Ok(mut client) = client else { continue };
            match client.try_clone() {
                Ok(writer) => *self.client() = Some(writer),
                Err(error) => {
                    warn!(%error, "a client of the serial port can't be served");
                    continue;
                }
            }
            let mut bytes = [0; 256];
            while let Ok(count @ 1..) = client.read(&mut bytes) {
                port.give(&bytes[..count]);
            }
            *self.client() = None;
        }
    }

    fn client(&self) -> MutexGuard<'_, Option<UnixStream>> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The socket's name, which goes when this is dropped.
pub(crate) struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = fs::remove_file(&self.0);
    }
}

/// The output of a port on a socket.
struct SocketOutput(Arc<Socket>);

impl Write for SocketOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(client) = &*self.0.client() {
            // A client that does not read misses what its buffer has no room for.
            let _ = send(client, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
