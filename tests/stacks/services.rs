//! The server program: the same on both hosts, and what it says depends on nothing but what it hears.
//!
//! Only how it hands its bytes to the kernel depends on the host, so that the two cut their streams into other segments.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, spawn};
use std::time::Duration;

use guest::content;
use harness::random::Random;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use tandem::lab::Namespace;

/// Answers with what it hears, over TCP and UDP.
pub(crate) const ECHO: u16 = 7;
/// Hears eight bytes, answers with so many of [`content`], and closes.
pub(crate) const DOWNLOAD: u16 = 19;
/// Hears all to its end, and tells its length and checksum.
pub(crate) const UPLOAD: u16 = 9;
/// Hears one byte and resets.
pub(crate) const RESET: u16 = 5;
/// Hears two ports, and opens a connection from its own of the first to the client's of the second, which it serves as [`ECHO`].
pub(crate) const CALL: u16 = 20;
/// Answers requests for `/N` with so many bytes of [`content`], and tells no date.
pub(crate) const HTTP: u16 = 80;
/// As [`ECHO`], and asks every second whether the client is still there.
pub(crate) const PATIENT: u16 = 21;

/// No datagram that is asked for is longer.
pub(crate) const DATAGRAM_MAX: usize = 16 << 10;

/// How often a thread that waits looks whether it is to end.
const LOOK_EVERY: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 50_000_000,
};
const TIMEOUT: Duration = Duration::from_millis(50);
const PORTION: usize = 64 << 10;

/// How a program hands its bytes to the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Style {
    /// As they are.
    Whole,
    /// In pieces.
    #[default]
    Pieces,
}

/// The running program; dropping it ends it.
pub(crate) struct Program {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

struct Peer {
    stream: TcpStream,
    style: Style,
    stop: Arc<AtomicBool>,
    random: Random,
}

type Service = fn(&mut Peer) -> io::Result<()>;

const SERVICES: [(u16, Service); 7] = [
    (ECHO, echo),
    (DOWNLOAD, download),
    (UPLOAD, upload),
    (RESET, reset),
    (CALL, call),
    (PATIENT, patient),
    (HTTP, http),
];

impl Program {
    /// Starts it on a host.
    pub(crate) fn start(host: &Namespace, style: Style) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for (port, service) in SERVICES {
            let (listener, stopped) = (host.run(move || listener(port)), Arc::clone(&stop));
            let thread = host.thread("service", move || serve(&listener, service, style, &stopped));
            threads.push(thread.expect("a thread can be started"));
        }
        let stopped = Arc::clone(&stop);
        let socket = host.run(|| UdpSocket::bind(("::", ECHO)).expect("the port is free"));
        let thread = host.thread("datagrams", move || datagrams(&socket, &stopped));
        threads.push(thread.expect("a thread can be started"));
        Self { stop, threads }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let ended = thread.join();
            assert!(std::thread::panicking() || ended.is_ok(), "a service has panicked");
        }
    }
}

fn listener(port: u16) -> TcpListener {
    let listener = TcpListener::bind(("::", port)).expect("the port is free");
    listener.set_nonblocking(true).expect("a socket's flag");
    listener
}

fn serve(listener: &TcpListener, service: Service, style: Style, stop: &Arc<AtomicBool>) {
    let mut peers: Vec<JoinHandle<()>> = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let Ok((stream, _)) = listener.accept() else {
            // An interrupted wait is a short one.
            let _ = poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&LOOK_EVERY));
            continue;
        };
        peers.retain(|peer| !peer.is_finished());
        let stop = Arc::clone(stop);
        peers.push(spawn(move || {
            // A client that ends a connection as it likes is no failure of the program.
            let _ = Peer::new(stream, style, stop).and_then(|mut peer| service(&mut peer));
        }));
    }
    for peer in peers {
        peer.join().expect("a peer's thread ends");
    }
}

fn datagrams(socket: &UdpSocket, stop: &AtomicBool) {
    socket.set_read_timeout(Some(TIMEOUT)).expect("a socket's timeout");
    let mut datagram = [0; DATAGRAM_MAX];
    while !stop.load(Ordering::Relaxed) {
        if let Ok((length, from)) = socket.recv_from(&mut datagram) {
            // What is lost is asked for again.
            let _ = socket.send_to(&datagram[..length], from);
        }
    }
}

impl Peer {
    fn new(stream: TcpStream, style: Style, stop: Arc<AtomicBool>) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_nodelay(style == Style::Pieces)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        Ok(Self {
            stream,
            style,
            stop,
            random: Random::new(1),
        })
    }

    /// Waits for bytes; none is the end.
    fn hear(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.stream.read(bytes) {
                Err(error) => self.bear(error)?,
                heard => return heard,
            }
        }
    }

    fn hear_all(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        let mut filled = 0;
        while filled < bytes.len() {
            match self.hear(&mut bytes[filled..])? {
                0 => return Err(ErrorKind::UnexpectedEof.into()),
                more => filled += more,
            }
        }
        Ok(())
    }

    fn say(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let most = match self.style {
                Style::Whole => bytes.len(),
                Style::Pieces => usize::try_from(300 + self.random.below(3_000)).map_err(io::Error::other)?,
            };
            match self.stream.write(&bytes[..most.min(bytes.len())]) {
                Err(error) => self.bear(error)?,
                Ok(said) => bytes = &bytes[said..],
            }
        }
        Ok(())
    }

    /// Goes on after a wait, unless the program ends.
    fn bear(&self, error: io::Error) -> io::Result<()> {
        let waited = matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut);
        if waited && !self.stop.load(Ordering::Relaxed) {
            Ok(())
        } else {
            Err(error)
        }
    }
}

fn echo(peer: &mut Peer) -> io::Result<()> {
    let mut bytes = vec![0; PORTION];
    loop {
        match peer.hear(&mut bytes)? {
            0 => return Ok(()),
            length => peer.say(&bytes[..length])?,
        }
    }
}

fn download(peer: &mut Peer) -> io::Result<()> {
    let mut length = [0; 8];
    peer.hear_all(&mut length)?;
    say_content(peer, u64::from_be_bytes(length))?;
    peer.stream.shutdown(Shutdown::Write)?;
    while peer.hear(&mut [0; 1_024])? > 0 {}
    Ok(())
}

fn say_content(peer: &mut Peer, length: u64) -> io::Result<()> {
    let mut offset = 0;
    let mut bytes = vec![0; PORTION];
    while offset < length {
        let portion = usize::try_from(length - offset).map_or(PORTION, |left| left.min(PORTION));
        content::fill(offset, &mut bytes[..portion]);
        peer.say(&bytes[..portion])?;
        offset += portion as u64;
    }
    Ok(())
}

fn http(peer: &mut Peer) -> io::Result<()> {
    let mut request = Vec::new();
    let mut byte = [0];
    while peer.hear(&mut byte)? > 0 {
        request.push(byte[0]);
        if !request.ends_with(b"\r\n\r\n") {
            continue;
        }
        let text = String::from_utf8_lossy(&request).into_owned();
        let path = text.split(' ').nth(1).and_then(|path| path.strip_prefix('/'));
        let length = path.and_then(|path| path.parse().ok()).unwrap_or(0);
        peer.say(format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n").as_bytes())?;
        say_content(peer, length)?;
        request.clear();
    }
    Ok(())
}

fn upload(peer: &mut Peer) -> io::Result<()> {
    let (mut hasher, mut length) = (crc32fast::Hasher::new(), 0_u64);
    let mut bytes = vec![0; PORTION];
    loop {
        match peer.hear(&mut bytes)? {
            0 => break,
            more => {
                hasher.update(&bytes[..more]);
                length += more as u64;
            }
        }
    }
    peer.say(&length.to_be_bytes())?;
    peer.say(&hasher.finalize().to_be_bytes())
}

fn reset(peer: &mut Peer) -> io::Result<()> {
    peer.hear_all(&mut [0])?;
    sockopt::set_socket_linger(&peer.stream, Some(Duration::ZERO))?;
    Ok(())
}

fn call(peer: &mut Peer) -> io::Result<()> {
    let mut ports = [0; 4];
    peer.hear_all(&mut ports)?;
    let [near, far] = [[ports[0], ports[1]], [ports[2], ports[3]]].map(u16::from_be_bytes);
    let mut called = peer.stream.peer_addr()?;
    called.set_port(far);
    let mut own = peer.stream.local_addr()?;
    own.set_port(near);
    let stream = connect_from(own, called, &peer.stop)?;
    peer.say(b"called")?;
    echo(&mut Peer::new(stream, peer.style, Arc::clone(&peer.stop))?)
}

fn patient(peer: &mut Peer) -> io::Result<()> {
    sockopt::set_socket_keepalive(&peer.stream, true)?;
    sockopt::set_tcp_keepidle(&peer.stream, Duration::from_secs(1))?;
    sockopt::set_tcp_keepintvl(&peer.stream, Duration::from_secs(1))?;
    echo(peer)
}

/// Connects from a port of one's choice: what the kernel would choose is left to chance.
fn connect_from(own: SocketAddr, to: SocketAddr, stop: &AtomicBool) -> io::Result<TcpStream> {
    let family = if own.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket: OwnedFd = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    rustix::net::bind(&socket, &own)?;
    match rustix::net::connect(&socket, &to) {
        Err(Errno::INPROGRESS) => {}
        outcome => outcome?,
    }
    while poll(&mut [PollFd::new(&socket, PollFlags::OUT)], Some(&LOOK_EVERY))? == 0 {
        if stop.load(Ordering::Relaxed) {
            return Err(ErrorKind::TimedOut.into());
        }
    }
    sockopt::socket_error(&socket)??;
    Ok(socket.into())
}
