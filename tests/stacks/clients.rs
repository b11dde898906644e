//! What clients do, on their host: each checks every byte, and panics when one is not as it must be.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

use guest::content;
use rustix::net::sockopt;

use crate::services::{CALL, DATAGRAM_MAX, DOWNLOAD, ECHO, RESET, UPLOAD};
use crate::stage::{Ip, LIMIT};

/// How long a datagram's answer is waited for, and how often it is asked for.
const ANSWER: Duration = Duration::from_millis(500);
const ASKED_MAX: usize = 40;
const PORTION: usize = 64 << 10;

/// Opens a connection.
pub(crate) fn connect(to: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect_timeout(&to, LIMIT).expect("the server accepts");
    patient(&stream);
    stream
}

fn patient(stream: &TcpStream) {
    stream.set_read_timeout(Some(LIMIT)).expect("a socket's timeout");
    stream.set_write_timeout(Some(LIMIT)).expect("a socket's timeout");
}

/// Says the content from an offset on, and waits for its echo.
pub(crate) fn exchange(stream: &mut TcpStream, offset: u64, length: usize) {
    let mut said = vec![0; length];
    content::fill(offset, &mut said);
    let mut heard = vec![0; length];
    stream.write_all(&said).expect("the server takes it");
    stream.read_exact(&mut heard).expect("the server answers");
    assert!(said == heard, "the echo has other bytes, from {offset} on");
}

/// Ends a connection in order: there must be nothing left to hear.
pub(crate) fn close(mut stream: TcpStream) {
    stream.shutdown(Shutdown::Write).expect("the connection stands");
    let rest = stream.read(&mut [0]).expect("the server ends in order");
    assert_eq!(rest, 0, "the server said too much");
}

/// A connection with some exchanges of growing size.
pub(crate) fn echo(ip: Ip, exchanges: u32) {
    let mut stream = connect(ip.server(ECHO));
    let mut offset = 0;
    for round in 0..exchanges {
        let length = 1_usize << (round % 15);
        exchange(&mut stream, offset, length);
        offset += length as u64;
    }
    close(stream);
}

/// Both directions at once.
pub(crate) fn echo_flood(ip: Ip, length: u64) {
    let mut stream = connect(ip.server(ECHO));
    let mut sender = stream.try_clone().expect("a descriptor is left");
    let sending = thread::spawn(move || {
        send_content(&mut sender, length);
        sender.shutdown(Shutdown::Write).expect("the connection stands");
    });
    hear_content(&mut stream, 0, length, |_| {});
    assert_eq!(stream.read(&mut [0]).expect("the server ends in order"), 0);
    sending.join().expect("the sender ends");
}

/// Asks for so many bytes; `heard` is told how many have come, and may take its time.
pub(crate) fn download(ip: Ip, length: u64, heard: impl FnMut(u64)) {
    let mut stream = connect(ip.server(DOWNLOAD));
    stream.write_all(&length.to_be_bytes()).expect("the server takes it");
    hear_content(&mut stream, 0, length, heard);
    close(stream);
}

/// The same, with the own direction ended first.
pub(crate) fn download_half_closed(ip: Ip, length: u64, heard: impl FnMut(u64)) {
    let mut stream = connect(ip.server(DOWNLOAD));
    stream.write_all(&length.to_be_bytes()).expect("the server takes it");
    stream.shutdown(Shutdown::Write).expect("the connection stands");
    hear_content(&mut stream, 0, length, heard);
    assert_eq!(stream.read(&mut [0]).expect("the server ends in order"), 0);
}

/// Sends so many bytes and has them counted.
pub(crate) fn upload(ip: Ip, length: u64) {
    let mut stream = connect(ip.server(UPLOAD));
    let checksum = send_content(&mut stream, length);
    stream.shutdown(Shutdown::Write).expect("the connection stands");
    let mut told = [0; 12];
    stream.read_exact(&mut told).expect("the server tells");
    assert_eq!(told[..8], length.to_be_bytes(), "the length");
    assert_eq!(told[8..], checksum.to_be_bytes(), "the checksum");
    assert_eq!(stream.read(&mut [0]).expect("the server ends in order"), 0);
}

/// The server resets it.
pub(crate) fn is_reset(ip: Ip) {
    let mut stream = connect(ip.server(RESET));
    stream.write_all(b"!").expect("the server takes it");
    let end = stream.read(&mut [0]).expect_err("a reset is no orderly end");
    assert_eq!(end.kind(), std::io::ErrorKind::ConnectionReset);
}

/// The client resets it in the middle.
pub(crate) fn resets(ip: Ip) {
    let mut stream = connect(ip.server(ECHO));
    exchange(&mut stream, 0, 1_000);
    sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).expect("a socket's option");
}

/// There is nobody on that port.
pub(crate) fn is_refused(ip: Ip) {
    let error = TcpStream::connect_timeout(&ip.server(4_444), LIMIT).expect_err("nobody listens");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
}

/// Has the server call back, from its port, or from any if that is 0, to the client's. Returns both connections.
pub(crate) fn called(ip: Ip, near: u16, far: u16) -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind(ip.client(far)).expect("the port is free");
    let mut asks = connect(ip.server(CALL));
    let ports = [near.to_be_bytes(), far.to_be_bytes()].concat();
    asks.write_all(&ports).expect("the server takes it");
    let (stream, from) = listener.accept().expect("the server calls");
    assert!(near == 0 || from == ip.server(near), "the server calls");
    patient(&stream);
    (asks, stream)
}

/// Has the server say that its call has succeeded, uses it, and ends both connections.
pub(crate) fn use_call(mut asks: TcpStream, mut stream: TcpStream) {
    let mut told = [0; 6];
    asks.read_exact(&mut told).expect("the server tells");
    assert_eq!(&told, b"called");
    for round in 0..10 {
        exchange(&mut stream, 1_000 * round, 1_000);
    }
    close(stream);
    close(asks);
}

/// Exchanges datagrams of up to so many bytes; each is asked for again until it is answered.
pub(crate) fn datagrams(ip: Ip, count: u64, longest: u64) {
    let socket = UdpSocket::bind(ip.client(0)).expect("a port is free");
    socket.connect(ip.server(ECHO)).expect("the server's address");
    socket.set_read_timeout(Some(ANSWER)).expect("a socket's timeout");
    for number in 0..count {
        let mut said = vec![0; 8 + usize::try_from(number * 997 % (longest - 8)).expect("small")];
        content::fill(number, &mut said);
        said[..8].copy_from_slice(&number.to_be_bytes());
        let answered = (0..ASKED_MAX).any(|_| {
            socket.send(&said).expect("the kernel takes it");
            hears(&socket, &said)
        });
        assert!(answered, "no answer to datagram {number}");
    }
}

/// Waits for an answer; older ones, which came twice or late, are passed over.
fn hears(socket: &UdpSocket, wanted: &[u8]) -> bool {
    let mut heard = [0; DATAGRAM_MAX];
    while let Ok(length) = socket.recv(&mut heard) {
        if heard[..length] == *wanted {
            return true;
        }
        assert!(heard[..8] < wanted[..8], "another answer than the question");
    }
    false
}

fn send_content(stream: &mut TcpStream, length: u64) -> u32 {
    let (mut offset, mut hasher) = (0, crc32fast::Hasher::new());
    let mut bytes = vec![0; PORTION];
    while offset < length {
        let portion = usize::try_from(length - offset).map_or(PORTION, |left| left.min(PORTION));
        content::fill(offset, &mut bytes[..portion]);
        hasher.update(&bytes[..portion]);
        stream.write_all(&bytes[..portion]).expect("the server takes it");
        offset += portion as u64;
    }
    hasher.finalize()
}

fn hear_content(stream: &mut TcpStream, from: u64, to: u64, mut heard: impl FnMut(u64)) {
    let (mut offset, mut bytes, mut wanted) = (from, vec![0; PORTION], vec![0; PORTION]);
    while offset < to {
        let most = usize::try_from(to - offset).map_or(PORTION, |left| left.min(PORTION));
        let length = stream.read(&mut bytes[..most]).expect("the server goes on");
        assert!(length > 0, "the server ended after {offset} bytes");
        content::fill(offset, &mut wanted[..length]);
        assert!(bytes[..length] == wanted[..length], "other bytes, from {offset} on");
        offset += length as u64;
        heard(offset);
    }
}
