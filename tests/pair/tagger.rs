//! Puts a client on a VLAN: a kernel may lack the interfaces for that.
//!
//! Passes frames between the client's TAP and the one of its cable, with a tag (802.1Q) on the cable. Other frames of the
//! cable are dropped.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use machine::tap::Tap;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tandem::lab::{CLIENT_TAP, Lab, TRUNK_TAP};

const FRAME_BYTES: usize = 2048;
/// The two Ethernet addresses, before the tag.
const ADDRESSES: usize = 12;
const TAG: usize = 4;
/// How often it looks whether it is to end.
const PATIENCE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 50_000_000,
};

/// Passes frames until it is dropped.
pub(crate) struct Tagger {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Tagger {
    /// Puts the client on this VLAN.
    pub(crate) fn start(lab: &Lab, vlan: u16) -> Self {
        lab.split_client().expect("the lab has TAPs");
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = lab.client().thread("tagger", move || {
            let taps = [CLIENT_TAP, TRUNK_TAP].map(|name| Tap::open(name).expect("the TAP was just made"));
            while !stopped.load(Ordering::Relaxed) {
                pass(&taps, vlan).expect("a TAP takes and gives frames");
            }
        });
        Self {
            stop,
            thread: Some(thread.expect("a thread can be started")),
        }
    }
}

impl Drop for Tagger {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // Its panic has failed the test: the clients heard nothing.
            let _ = thread.join();
        }
    }
}

/// Waits for frames and passes those that are there.
fn pass([client, trunk]: &[Tap; 2], vlan: u16) -> io::Result<()> {
    let mut ready = [client, trunk].map(|tap| PollFd::new(tap, PollFlags::IN));
    poll(&mut ready, Some(&PATIENCE))?;
    let mut frame = [0; FRAME_BYTES];
    while let Some(length) = client.recv_bare(&mut frame)? {
        let (addresses, rest) = frame[..length].split_at(ADDRESSES);
        send(trunk, &[addresses, &[0x81, 0], &vlan.to_be_bytes(), rest].concat())?;
    }
    while let Some(length) = trunk.recv_bare(&mut frame)? {
        let (addresses, rest) = frame[..length].split_at(ADDRESSES);
        if rest.len() >= TAG && rest[..2] == [0x81, 0] && rest[2..TAG] == vlan.to_be_bytes() {
            send(client, &[addresses, &rest[TAG..]].concat())?;
        }
    }
    Ok(())
}

/// Sends, or loses as a network does.
fn send(tap: &Tap, frame: &[u8]) -> io::Result<()> {
    match tap.send_bare(frame) {
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
        _ => Ok(()),
    }
}
