//! The small services of RFC 862 to 864 for a guest in the lab: what the benchmark's clients ask for, as the bundled guest offers it.
//!
//! Echo by TCP and UDP on port 7, discard on port 9, a generator of characters on port 19, whatever it is sent. Built alone and
//! statically for the guest's image (`tests/lab/guest`): only the standard library.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::thread;

const ECHO: u16 = 7;
const DISCARD: u16 = 9;
const CHARACTERS: u16 = 19;
const PORTION_BYTES: usize = 64 * 1024;

fn main() -> io::Result<()> {
    let datagrams = UdpSocket::bind(("0.0.0.0", ECHO))?;
    let services: [(u16, fn(TcpStream) -> io::Result<()>); 3] =
        [(ECHO, echo), (DISCARD, discard), (CHARACTERS, characters)];
    for (port, serve) in services {
        let listener = TcpListener::bind(("0.0.0.0", port))?;
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // A client that goes away ends its own service only.
                thread::spawn(move || serve(stream));
            }
        });
    }
    let mut datagram = vec![0; PORTION_BYTES];
    loop {
        let (length, from) = datagrams.recv_from(&mut datagram)?;
        let _ = datagrams.send_to(&datagram[..length], from);
    }
}

fn echo(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut portion = vec![0; PORTION_BYTES];
    loop {
        match stream.read(&mut portion)? {
            0 => return Ok(()),
            length => stream.write_all(&portion[..length])?,
        }
    }
}

fn discard(mut stream: TcpStream) -> io::Result<()> {
    let mut portion = vec![0; PORTION_BYTES];
    while stream.read(&mut portion)? > 0 {}
    Ok(())
}

fn characters(mut stream: TcpStream) -> io::Result<()> {
    let portion: Vec<u8> = (0..PORTION_BYTES).map(|at| b' ' + (at % 95) as u8).collect();
    loop {
        stream.write_all(&portion)?;
    }
}
