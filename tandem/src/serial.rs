//! Where the guest's consoles are: its lines in the log, the terminal, or a socket.
//!
//! A vCPU waits for what it prints, so nothing here waits for a reader: who does not keep up misses something.

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
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
        /// For as long as the port is there.
        _raw: RawTerminal,
    },
    Socket {
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
            SerialPlace::Stdio => Self::Stdio {
                _raw: RawTerminal::enter().context("the terminal can't be set up")?,
            },
            SerialPlace::Socket(path) => {
                let socket = Arc::new(Socket::listen(path)?);
                let _name = SocketFile(path.clone());
                Self::Socket { socket, _name }
            }
        })
    }

    /// Returns where the port's output goes.
    pub(crate) fn output(&self) -> Box<dyn Write + Send> {
        match self {
            Self::Log => Box::new(LogLines::default()),
            Self::Stdio { .. } => Box::new(Stdout),
            Self::Socket { socket, .. } => Box::new(SocketOutput(Arc::clone(socket))),
        }
    }

    /// Gives the port what comes from there, for as long as it exists.
    pub(crate) fn feed(&self, port: &Arc<Serial>) -> Result<()> {
        let port = Arc::downgrade(port);
        let thread = thread::Builder::new().name("serial".to_owned());
        let spawned = match self {
            Self::Log => return Ok(()),
            Self::Stdio { .. } => thread.spawn(move || feed_terminal(&port)),
            Self::Socket { socket, .. } => {
                let socket = Arc::clone(socket);
                thread.spawn(move || socket.serve(&port))
            }
        };
        spawned
            .map(drop)
            .context("the host refuses a thread: raise its limits (ulimit -u)")
    }
}

/// Standard output, byte by byte as the guest prints.
struct Stdout;

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut out = io::stdout().lock();
        out.write_all(bytes)?;
        out.flush()?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
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

fn feed_terminal(port: &Weak<Serial>) {
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
        if !give(port, &typed) {
            return;
        }
    }
}

/// Gives the port all of these bytes, as it takes them; `false` when there is no port any more.
fn give(port: &Weak<Serial>, mut bytes: &[u8]) -> bool {
    loop {
        let Some(port) = port.upgrade() else { return false };
        bytes = &bytes[port.input(bytes)..];
        drop(port);
        if bytes.is_empty() {
            return true;
        }
        thread::sleep(RETRY);
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

    fn serve(&self, port: &Weak<Serial>) {
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
                if !give(port, &bytes[..count]) {
                    return;
                }
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
