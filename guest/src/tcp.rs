//! Connections of one listening port: a pool of sockets of which a few always listen.
//!
//! The server takes in one frame at a time and re-arms the pool after each, so a few listening sockets stand for
//! any backlog. Which socket gets a connection, and in which order connections are served, depends on the order
//! of frames alone: a socket is re-used by its place, never by its age. Only when all sockets of a port are taken
//! is the one that has been of no use for longest given up, if it is half closed or has been idle for minutes.

use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, Ordering};

use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::wire::IpEndpoint;

use crate::clock::Moment;
use crate::gate::Opening;
use crate::settings::Settings;
use crate::world::World;

const LISTENING: usize = 4;
const IDLE_NS: u64 = 300 * 1_000_000_000;

/// A service on a TCP connection.
pub(crate) trait Stream: Default {
    /// Moves what can be moved between the socket and the service; returns whether anything was.
    fn serve(&mut self, socket: &mut Socket<'static>, world: &mut World, now: Moment) -> bool;

    /// Gives back what is shared; the connection is over.
    fn end(&mut self, _world: &mut World) {}
}

/// All connections of a port.
#[derive(Debug)]
pub(crate) struct Pool<S> {
    port: u16,
    most: usize,
    slots: Vec<Slot<S>>,
    listening: usize,
    opening: Vec<(u16, IpEndpoint)>,
}

#[derive(Debug)]
struct Slot<S> {
    handle: SocketHandle,
    stream: S,
    taken: bool,
    active_ns: u64,
}

impl<S: Stream> Pool<S> {
    pub(crate) fn new(port: u16, most: usize) -> Self {
        Self {
            port,
            most,
            slots: Vec::new(),
            listening: 0,
            opening: Vec::new(),
        }
    }

    /// Serves every connection once, in order; returns whether anything moved.
    pub(crate) fn serve(&mut self, sockets: &mut SocketSet<'static>, world: &mut World, now: Moment) -> bool {
        let mut moved = false;
        self.listening = 0;
        self.opening.clear();
        for slot in &mut self.slots {
            let socket = sockets.get_mut::<Socket<'_>>(slot.handle);
            if socket.state() == State::SynReceived
                && let Some(peer) = socket.remote_endpoint()
            {
                self.opening.push((self.port, peer));
            }
            match socket.state() {
                State::Listen => self.listening += 1,
                State::Closed | State::TimeWait => slot.release(world),
                _ => {
                    if !slot.taken {
                        slot.taken = true;
                        slot.active_ns = now.ns;
                        world.counters.accepted += 1;
                    }
                    if slot.stream.serve(socket, world, now) {
                        slot.active_ns = now.ns;
                        moved = true;
                    }
                }
            }
        }
        moved
    }

    /// The connections that are being opened.
    pub(crate) fn opening(&self) -> &Opening {
        &self.opening
    }

    /// The port, if it takes no new connection now.
    pub(crate) fn full(&self) -> Option<u16> {
        (self.listening == 0).then_some(self.port)
    }

    /// Makes sure that some sockets listen. To be called when all output has been sent.
    pub(crate) fn rearm(&mut self, sockets: &mut SocketSet<'static>, world: &mut World, now: Moment) {
        while self.listening < LISTENING {
            let free = |slot: &&mut Slot<S>| !sockets.get::<Socket<'_>>(slot.handle).is_open();
            if let Some(slot) = self.slots.iter_mut().find(free) {
                slot.release(world);
                listen(sockets.get_mut(slot.handle), self.port, &world.settings);
            } else if self.slots.len() < self.most {
                let mut socket = socket(&world.settings);
                listen(&mut socket, self.port, &world.settings);
                let handle = sockets.add(socket);
                self.slots.push(Slot {
                    handle,
                    stream: S::default(),
                    taken: false,
                    active_ns: 0,
                });
            } else {
                self.give_up_one(sockets, now);
                return;
            }
            self.listening += 1;
        }
    }

    fn give_up_one(&mut self, sockets: &mut SocketSet<'static>, now: Moment) {
        let useless = |slot: &&Slot<S>| match sockets.get::<Socket<'_>>(slot.handle).state() {
            State::Listen => false,
            State::Established => now.ns.saturating_sub(slot.active_ns) > IDLE_NS,
            _ => now.ns.saturating_sub(slot.active_ns) > IDLE_NS / 100,
        };
        let oldest = self.slots.iter().filter(useless).min_by_key(|slot| slot.active_ns);
        if let Some(handle) = oldest.map(|slot| slot.handle) {
            sockets.get_mut::<Socket<'_>>(handle).abort();
        }
    }
}

impl<S: Stream> Slot<S> {
    fn release(&mut self, world: &mut World) {
        if self.taken {
            self.taken = false;
            self.stream.end(world);
            self.stream = S::default();
        }
    }
}

/// Makes a socket whose output depends on what it is given and not on time.
pub(crate) fn socket(settings: &Settings) -> Socket<'static> {
    let mut socket = Socket::new(buffer(settings.tcp_receive), buffer(settings.tcp_send));
    socket.set_ack_delay(None);
    socket.set_nagle_enabled(false);
    socket
}

/// The guest's clock in milliseconds: smoltcp asks a bare function for the time that it puts into segments.
static TIME: AtomicU32 = AtomicU32::new(0);

/// Tells the time that segments are to carry from now on.
pub(crate) fn set_time(now: Moment) {
    let milliseconds = u32::try_from((now.ns / 1_000_000) & u64::from(u32::MAX)).unwrap_or(0);
    TIME.store(milliseconds, Ordering::Relaxed);
}

/// Lets the next connection of a socket have timestamps, if they are wanted; a peer without them has ended that.
pub(crate) fn use_timestamps(socket: &mut Socket<'static>, settings: &Settings) {
    let time: Option<fn() -> u32> = settings.timestamps.then_some(|| TIME.load(Ordering::Relaxed));
    socket.set_tsval_generator(time);
}

/// Makes a socket's buffer.
pub(crate) fn buffer(bytes: usize) -> SocketBuffer<'static> {
    SocketBuffer::new(vec![0; bytes])
}

/// Whether the peer has sent all it will send, and all of that was taken.
pub(crate) fn is_finished(socket: &Socket<'_>) -> bool {
    let ended = matches!(
        socket.state(),
        State::CloseWait | State::LastAck | State::Closing | State::TimeWait | State::Closed
    );
    ended && socket.recv_queue() == 0
}

fn listen(socket: &mut Socket<'static>, port: u16, settings: &Settings) {
    use_timestamps(socket, settings);
    let outcome = socket.listen(port);
    assert!(
        outcome.is_ok(),
        "a socket that is not open can listen on a port that is not 0"
    );
}
