//! A host dies in the middle of every phase of a TCP connection's life: what its client must see.
//!
//! Each connection is opened and brought into its phase while the guests' numbers differ (`isn_skew`) and within one epoch, so
//! that it outlives its host by translation only. A client that must not hear what it is sent is made deaf by a
//! socket filter. Then the host is killed, and each client goes on with what it was about: at the same time, since some
//! wait for a repetition.

use std::fs;
use std::io::{Error, ErrorKind, Read, Result, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use guest::content;
use link::status::State;
use socket2::{Domain, SockFilter, SockRef, Socket, Type};
use tandem::clients::{Target, http_get};
use tandem::lab::{CLIENT_V4, CLIENT_V6, Host, Lab};

use crate::stage::{LIMIT, Setup, Stage, await_fact};
use crate::tagger::Tagger;

const HTTP: u16 = 80;
const ECHO: u16 = 7;
const VLAN: u16 = 7;
/// More than what the guest's and the client's buffers hold.
const FILE_BYTES: usize = 1 << 20;
/// What its own kernel takes of it at once.
const SEND_BYTES: usize = 64 << 10;
/// What a client reads of it before its host dies.
const READ_BYTES: usize = 10_000;
const TRIES: usize = 20;
const CLOSE: &[u8] = b"GET / HTTP/1.1\r\nHost: guest\r\nConnection: close\r\n\r\n";
/// The states of a connection that is over for its client, as the kernel shows them: closed, or lingering.
const OVER: [u8; 2] = [7, 6];

/// What a client does once the host is dead.
type Rest = Box<dyn FnOnce() -> Result<()> + Send>;

/// A phase's name and how a connection comes into it.
type Phase = (&'static str, fn(Guest) -> Result<Rest>);

/// All phases: each opens a connection, brings it there, and tells how its client goes on.
const PHASES: [Phase; 15] = [
    ("the guest has been asked (SYN received)", asked),
    ("open, and nothing said yet", idle),
    ("in the middle of a request", asking),
    ("in the middle of an answer", answered),
    ("in the middle of an upload", uploading),
    ("closed by the client, in the middle of an answer", closed_by_client),
    ("closed by the guest", closed_by_guest),
    ("closed by both, the client first (last ACK)", last_acknowledgement),
    ("closed by both at once (closing)", closing),
    ("over, and its ports are used again (TIME-WAIT)", used_again),
    ("the guest has asked (SYN sent)", asks),
    ("opened by the guest", opened_by_guest),
    ("opened and closed by the guest", opened_and_closed_by_guest),
    (
        "opened by the guest, closed by the client first",
        opened_by_guest_and_ended,
    ),
    (
        "opened by the guest, closed by both at once",
        opened_by_guest_and_closing,
    ),
];

/// The guest and its client, at their addresses of one family.
#[derive(Clone, Copy)]
struct Guest {
    address: IpAddr,
    client: IpAddr,
}

#[test]
fn case_22_every_phase_of_a_connection_outlives_its_host() {
    outlives("isn_skew=1 timestamps=1", None);
}

#[test]
fn case_22_every_phase_of_a_connection_on_a_vlan_outlives_its_host() {
    outlives("isn_skew=1 vlan=7", Some(VLAN));
}

#[test]
fn case_22_every_phase_of_a_connection_with_timestamps_on_a_vlan_outlives_its_host() {
    outlives("isn_skew=1 timestamps=1 vlan=7", Some(VLAN));
}

fn outlives(settings: &'static str, vlan: Option<u16>) {
    let setup = Setup {
        more: vec!["--cmdline", settings, "--epoch-max-age", "60s"],
        ..Setup::default()
    };
    let Some(mut stage) = Stage::new(setup) else { return };
    let _tagger = vlan.map(|vlan| Tagger::start(&stage.lab, vlan));
    stage.pair(Host::A);
    // Takes its time on the link: the secondary's clock lags by it.
    let (status, text) = stage.get("/touch/8", LIMIT).expect("the guest answers");
    assert_eq!(status, 200, "{text:?}");
    let (status, text) = stage.operate(Host::A, &["checkpoint"]);
    assert!(status.success(), "{text}");
    let within_one_epoch = (0..TRIES).find_map(|_| {
        let before = stage.await_state(Host::A, State::Protected).epoch;
        let phases = open(&stage.lab);
        if stage.status(Host::A).expect("the primary answers").epoch == before {
            return Some(phases);
        }
        go_on(&stage.lab, phases);
        None
    });
    let phases = within_one_epoch.expect("no epoch was long enough to open connections in it");
    stage.kill(Host::A);
    stage.await_state(Host::B, State::Alone);
    go_on(&stage.lab, phases);
    let refused = stage.lab.client().run(refused);
    assert!(
        refused.is_empty(),
        "the client's kernel has dropped segments for their times: {refused:?}"
    );
}

/// Returns how many segments the kernel has dropped for their timestamps, by reason.
fn refused() -> Vec<(String, u64)> {
    let table = fs::read_to_string("/proc/thread-self/net/netstat").expect("the kernel tells");
    let mut lines = table.lines();
    let mut refused = Vec::new();
    while let (Some(names), Some(counts)) = (lines.next(), lines.next()) {
        let pairs = names.split_whitespace().zip(counts.split_whitespace());
        let pairs = pairs.filter(|(name, _)| name.starts_with("PAWS") || *name == "TSEcrRejected");
        let pairs = pairs.map(|(name, count)| (name.to_owned(), count.parse().expect("a count")));
        refused.extend(pairs.filter(|(_, count)| *count > 0));
    }
    refused
}

/// Brings connections of both families into every phase.
fn open(lab: &Lab) -> Vec<(String, Rest)> {
    let opened = lab.client().run(|| {
        let target = Target::bundled();
        let guests = [
            (target.v4.into(), CLIENT_V4.into()),
            (target.v6.expect("it has one").into(), CLIENT_V6.into()),
        ];
        let guests = guests.map(|(address, client)| Guest { address, client });
        let phases = guests.iter().flat_map(|guest| PHASES.map(|phase| (*guest, phase)));
        let opened: Vec<_> = phases
            .map(|(guest, (name, begin))| {
                let name = format!("{name}, {}", guest.address);
                let rest = begin(guest).map_err(|error| format!("{name}: {error}"))?;
                Ok((name, rest))
            })
            .collect();
        // What the clients have said before this, the guest has heard.
        for guest in guests {
            http_get(guest.at(HTTP), "/", LIMIT).expect("the guest answers");
        }
        opened.into_iter().collect::<std::result::Result<Vec<_>, String>>()
    });
    opened.expect("a connection comes into its phase")
}

/// Lets all clients go on, and checks what they see.
fn go_on(lab: &Lab, phases: Vec<(String, Rest)>) {
    let clients: Vec<_> = phases
        .into_iter()
        .map(|(name, rest)| {
            let thread = lab.client().thread("client", rest);
            (name, thread.expect("a thread can be started"))
        })
        .collect();
    let broken: Vec<_> = clients
        .into_iter()
        .filter_map(|(name, client)| {
            let outcome = client.join().expect("a client does not panic");
            outcome.err().map(|error| format!("{name}: {error}"))
        })
        .collect();
    assert!(broken.is_empty(), "{broken:#?}");
}

/// The SYN is answered, and the client does not hear it; it gets its connection and its page.
fn asked(guest: Guest) -> Result<Rest> {
    let socket = Socket::new(Domain::for_address(guest.at(HTTP)), Type::STREAM, None)?;
    deaf(&socket)?;
    let asked = socket.connect_timeout(&guest.at(HTTP).into(), Duration::from_millis(20));
    expect(
        asked.is_err_and(|error| error.kind() == ErrorKind::TimedOut),
        "it hears",
    )?;
    Ok(Box::new(move || {
        socket.detach_filter()?;
        socket.set_write_timeout(Some(LIMIT))?;
        socket.connect(&guest.at(HTTP).into())?;
        page(&mut limited(socket.into())?)
    }))
}

/// Gets an echo, and the end after its own.
fn idle(guest: Guest) -> Result<Rest> {
    let mut stream = connect(guest, ECHO)?;
    Ok(Box::new(move || {
        stream.write_all(b"hello")?;
        stream.shutdown(Shutdown::Write)?;
        expect(rest_of(&mut stream)? == b"hello", "another echo")
    }))
}

/// Gets the page once the request is whole.
fn asking(guest: Guest) -> Result<Rest> {
    let mut stream = connect(guest, HTTP)?;
    let (before, after) = CLOSE.split_at(20);
    stream.write_all(before)?;
    Ok(Box::new(move || {
        stream.write_all(after)?;
        let answer = rest_of(&mut stream)?;
        expect(answer.starts_with(b"HTTP/1.1 200"), "another answer")
    }))
}

/// Gets the rest of the file, byte by byte as it was to be, and may ask again.
fn answered(guest: Guest) -> Result<Rest> {
    let mut stream = download(guest)?;
    Ok(Box::new(move || {
        read_file(&mut stream, READ_BYTES, FILE_BYTES)?;
        page(&mut stream)
    }))
}

/// Sends the rest, and gets all of it back. At first as much as its own kernel takes: it reads nothing of what comes back.
fn uploading(guest: Guest) -> Result<Rest> {
    let mut stream = connect(guest, ECHO)?;
    SockRef::from(&stream).set_send_buffer_size(SEND_BYTES)?;
    SockRef::from(&stream).set_recv_buffer_size(READ_BYTES)?;
    let mut file = vec![0; FILE_BYTES];
    content::fill(0, &mut file);
    let mut sent = 0;
    stream.set_nonblocking(true)?;
    loop {
        match stream.write(&file[sent..]) {
            Ok(count) => sent += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    stream.set_nonblocking(false)?;
    expect(sent < FILE_BYTES, "all of the file is on its way")?;
    Ok(Box::new(move || {
        let mut reader = stream.try_clone()?;
        let writer = thread::spawn(move || {
            stream.write_all(&file[sent..])?;
            stream.shutdown(Shutdown::Write)
        });
        read_file(&mut reader, 0, FILE_BYTES)?;
        writer.join().expect("it does not panic")?;
        expect(rest_of(&mut reader)?.is_empty(), "more than the file")
    }))
}

/// Gets the rest of the file, and the end.
fn closed_by_client(guest: Guest) -> Result<Rest> {
    let mut stream = download(guest)?;
    stream.shutdown(Shutdown::Write)?;
    Ok(Box::new(move || {
        read_file(&mut stream, READ_BYTES, FILE_BYTES)?;
        expect(rest_of(&mut stream)?.is_empty(), "more than the file")
    }))
}

/// Has seen the guest's end; what it still says is taken, and its own end acknowledged.
fn closed_by_guest(guest: Guest) -> Result<Rest> {
    let mut stream = connect(guest, HTTP)?;
    page(&mut stream)?;
    Ok(Box::new(move || {
        stream.write_all(b"nobody listens")?;
        ends(&mut stream)
    }))
}

/// Hears the guest's end when it is repeated.
fn last_acknowledgement(guest: Guest) -> Result<Rest> {
    let mut stream = connect(guest, ECHO)?;
    stream.write_all(b"bye")?;
    stream.read_exact(&mut [0; 3])?;
    deaf(&SockRef::from(&stream))?;
    stream.shutdown(Shutdown::Write)?;
    Ok(Box::new(move || {
        SockRef::from(&stream).detach_filter()?;
        ends(&mut stream)
    }))
}

/// Hears the answer and the guest's end when they are repeated.
fn closing(guest: Guest) -> Result<Rest> {
    let mut stream = connect(guest, HTTP)?;
    deaf(&SockRef::from(&stream))?;
    stream.write_all(CLOSE)?;
    http_get(guest.at(HTTP), "/", LIMIT).map_err(Error::other)?;
    stream.shutdown(Shutdown::Write)?;
    Ok(Box::new(move || {
        SockRef::from(&stream).detach_filter()?;
        let answer = rest_of(&mut stream)?;
        expect(answer.starts_with(b"HTTP/1.1 200"), "another answer")?;
        ends(&mut stream)
    }))
}

/// Gets another connection from the same port.
fn used_again(guest: Guest) -> Result<Rest> {
    let mut stream = connect_from(guest, 0)?;
    let port = stream.local_addr()?.port();
    page(&mut stream)?;
    ends(&mut stream)?;
    drop(stream);
    Ok(Box::new(move || page(&mut connect_from(guest, port)?)))
}

/// Hears the guest's SYN when it is repeated.
fn asks(guest: Guest) -> Result<Rest> {
    let listener = listen(guest, true)?;
    Ok(Box::new(move || {
        SockRef::from(&listener).detach_filter()?;
        let mut stream = accept(&listener)?;
        let line = line(&mut stream)?;
        stream.write_all(&line)?;
        ends(&mut stream)
    }))
}

/// Sends the line back that it got before; the guest is content, and closes.
fn opened_by_guest(guest: Guest) -> Result<Rest> {
    let mut stream = accept(&listen(guest, false)?)?;
    let line = line(&mut stream)?;
    Ok(Box::new(move || {
        stream.write_all(&line)?;
        ends(&mut stream)
    }))
}

/// Has seen the guest's end; its own is acknowledged.
fn opened_and_closed_by_guest(guest: Guest) -> Result<Rest> {
    let mut stream = accept(&listen(guest, false)?)?;
    let line = line(&mut stream)?;
    stream.write_all(&line)?;
    expect(rest_of(&mut stream)?.is_empty(), "more than a line")?;
    Ok(Box::new(move || ends(&mut stream)))
}

/// Hears the guest's end, which answers its own, when it is repeated.
fn opened_by_guest_and_ended(guest: Guest) -> Result<Rest> {
    let mut stream = accept(&listen(guest, false)?)?;
    line(&mut stream)?;
    deaf(&SockRef::from(&stream))?;
    stream.shutdown(Shutdown::Write)?;
    Ok(Box::new(move || {
        SockRef::from(&stream).detach_filter()?;
        ends(&mut stream)
    }))
}

/// Says its end while the guest, content, says its own.
fn opened_by_guest_and_closing(guest: Guest) -> Result<Rest> {
    let mut stream = accept(&listen(guest, false)?)?;
    let line = line(&mut stream)?;
    deaf(&SockRef::from(&stream))?;
    stream.write_all(&line)?;
    http_get(guest.at(HTTP), "/", LIMIT).map_err(Error::other)?;
    stream.shutdown(Shutdown::Write)?;
    Ok(Box::new(move || {
        SockRef::from(&stream).detach_filter()?;
        ends(&mut stream)
    }))
}

impl Guest {
    fn at(self, port: u16) -> SocketAddr {
        (self.address, port).into()
    }
}

fn expect(is_so: bool, what: &str) -> Result<()> {
    if is_so {
        Ok(())
    } else {
        Err(Error::other(what.to_owned()))
    }
}

/// Lets a socket hear nothing, of what is on its way, until its filter is detached.
fn deaf(socket: &Socket) -> Result<()> {
    // `BPF_RET | BPF_K`: keep no byte.
    socket.attach_filter(&[SockFilter::new(6, 0, 0, 0)])
}

fn limited(stream: TcpStream) -> Result<TcpStream> {
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    Ok(stream)
}

fn connect(guest: Guest, port: u16) -> Result<TcpStream> {
    limited(TcpStream::connect_timeout(&guest.at(port), LIMIT)?)
}

/// Connects from this port, or from any.
fn connect_from(guest: Guest, port: u16) -> Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(guest.at(HTTP)), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&SocketAddr::from((guest.client, port)).into())?;
    socket.connect_timeout(&guest.at(HTTP).into(), LIMIT)?;
    limited(socket.into())
}

/// Begins a download that the client does not read to its end.
fn download(guest: Guest) -> Result<TcpStream> {
    let mut stream = connect(guest, HTTP)?;
    SockRef::from(&stream).set_recv_buffer_size(READ_BYTES)?;
    write!(stream, "GET /file/{FILE_BYTES} HTTP/1.1\r\nHost: guest\r\n\r\n")?;
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    read_file(&mut stream, 0, READ_BYTES)?;
    Ok(stream)
}

fn read_file(stream: &mut TcpStream, from: usize, to: usize) -> Result<()> {
    let (mut got, mut expected) = (vec![0; to - from], vec![0; to - from]);
    stream.read_exact(&mut got)?;
    content::fill(from as u64, &mut expected);
    expect(got == expected, "other bytes")
}

/// Asks for a page and the end.
fn page(stream: &mut TcpStream) -> Result<()> {
    stream.write_all(CLOSE)?;
    let answer = rest_of(stream)?;
    expect(answer.starts_with(b"HTTP/1.1 200"), "another answer")
}

fn rest_of(stream: &mut TcpStream) -> Result<Vec<u8>> {
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest)?;
    Ok(rest)
}

fn line(stream: &mut TcpStream) -> Result<Vec<u8>> {
    let mut line = Vec::new();
    let mut byte = [0];
    while !line.ends_with(b"\n") {
        stream.read_exact(&mut byte)?;
        line.push(byte[0]);
    }
    expect(line.starts_with(b"tandem "), "another line")?;
    Ok(line)
}

/// Asks the guest to connect, to a listener that does not hear it at first if it is to be so.
fn listen(guest: Guest, is_deaf: bool) -> Result<TcpListener> {
    let listener = TcpListener::bind((guest.client, 0))?;
    if is_deaf {
        deaf(&SockRef::from(&listener))?;
    }
    let path = format!("/set?connect={},1", listener.local_addr()?);
    let answer = http_get(guest.at(HTTP), &path, LIMIT).map_err(Error::other)?;
    expect(answer.status == 200, "the guest does not connect")?;
    Ok(listener)
}

fn accept(listener: &TcpListener) -> Result<TcpStream> {
    SockRef::from(listener).set_read_timeout(Some(LIMIT))?;
    limited(listener.accept()?.0)
}

/// Says its own end, sees the guest's, and that the guest has acknowledged its own.
fn ends(stream: &mut TcpStream) -> Result<()> {
    match stream.shutdown(Shutdown::Write) {
        Err(error) if error.kind() != ErrorKind::NotConnected => return Err(error),
        _ => {}
    }
    expect(rest_of(stream)?.is_empty(), "bytes instead of the end")?;
    let port = stream.local_addr()?.port();
    await_fact("the end of a connection", || {
        let states = states_of(port);
        states.iter().all(|state| OVER.contains(state)).then_some(())
    });
    stream.take_error()?.map_or(Ok(()), Err)
}

/// Returns the states of the connections of a port of the client.
fn states_of(port: u16) -> Vec<u8> {
    let tables = ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"].map(fs::read_to_string);
    let lines: Vec<String> = tables
        .into_iter()
        .flatten()
        .flat_map(|table| table.lines().map(str::to_owned).collect::<Vec<_>>())
        .collect();
    let states = lines.iter().filter_map(|line| {
        let mut words = line.split_whitespace().skip(1);
        let (_, local) = words.next()?.rsplit_once(':')?;
        let (_, remote) = words.next()?.rsplit_once(':')?;
        let state = u8::from_str_radix(words.next()?, 16).ok()?;
        let is_it = u16::from_str_radix(local, 16) == Ok(port) && remote != "0000";
        is_it.then_some(state)
    });
    states.collect()
}
