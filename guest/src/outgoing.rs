//! The client: opens TCP connections outwards, sends a line on each, expects it back, and closes.
//!
//! Ports are drawn once from the guest's random numbers and then counted up, so that two guests that are asked
//! for the same connections open the same ones.

use alloc::collections::VecDeque;
use alloc::format;
use alloc::vec::Vec;

use smoltcp::iface::{Interface, SocketHandle, SocketSet};
use smoltcp::socket::tcp::{Socket, State};
use smoltcp::time::Duration;
use smoltcp::wire::IpAddress;

use crate::random::Random;
use crate::settings::Settings;
use crate::tcp;
use crate::world::{Dial, World};

const AT_ONCE: usize = 16;
const FIRST_PORT: u16 = 49152;
const PORTS: u64 = 16384;
const TIME_LIMIT: Duration = Duration::from_secs(20);

/// All outgoing connections.
#[derive(Debug)]
pub(crate) struct Outgoing {
    waiting: VecDeque<Dial>,
    calls: Vec<Call>,
    next_port: u64,
    number: u64,
}

#[derive(Debug)]
struct Call {
    handle: SocketHandle,
    /// What must come back; `None` when this socket is free.
    expected: Option<Vec<u8>>,
    opened: bool,
    received: Vec<u8>,
}

impl Outgoing {
    pub(crate) fn new(random: &mut Random) -> Self {
        Self {
            waiting: VecDeque::new(),
            calls: Vec::new(),
            next_port: random.draw(),
            number: 0,
        }
    }

    /// Will open these connections, behind those that were asked for before.
    pub(crate) fn ask(&mut self, dial: Dial) {
        self.waiting.push_back(dial);
    }

    /// Goes on with every connection; returns whether anything moved.
    pub(crate) fn serve(
        &mut self,
        interface: &mut Interface,
        sockets: &mut SocketSet<'static>,
        world: &mut World,
    ) -> bool {
        let mut moved = false;
        for call in &mut self.calls {
            moved |= call.serve(sockets.get_mut(call.handle), world);
        }
        while let Some(dial) = self.waiting.front().copied() {
            let Some(place) = self.free_call(sockets, &world.settings) else {
                break;
            };
            match self.waiting.front_mut() {
                Some(first) if first.count > 1 => first.count -= 1,
                _ => drop(self.waiting.pop_front()),
            }
            self.dial(place, dial, interface, sockets, world);
            moved = true;
        }
        moved
    }

    fn free_call(&mut self, sockets: &mut SocketSet<'static>, settings: &Settings) -> Option<usize> {
        let free = |call: &Call| call.expected.is_none() && !sockets.get::<Socket<'_>>(call.handle).is_open();
        if let Some(place) = self.calls.iter().position(free) {
            return Some(place);
        }
        if self.calls.len() == AT_ONCE {
            return None;
        }
        let mut socket = tcp::socket(settings);
        socket.set_timeout(Some(TIME_LIMIT));
        let handle = sockets.add(socket);
        self.calls.push(Call {
            handle,
            expected: None,
            opened: false,
            received: Vec::new(),
        });
        Some(self.calls.len() - 1)
    }

    fn dial(
        &mut self,
        place: usize,
        dial: Dial,
        interface: &mut Interface,
        sockets: &mut SocketSet<'static>,
        world: &mut World,
    ) {
        self.number += 1;
        self.next_port = self.next_port.wrapping_add(1);
        let port = FIRST_PORT + u16::try_from(self.next_port % PORTS).unwrap_or(0);
        let call = &mut self.calls[place];
        let socket = sockets.get_mut::<Socket<'_>>(call.handle);
        let remote = (IpAddress::from(dial.address), dial.port);
        tcp::use_timestamps(socket, &world.settings);
        if socket.connect(interface.context(), remote, port).is_err() {
            world.counters.dials_failed += 1;
            return;
        }
        call.expected = Some(format!("tandem {}\n", self.number).into_bytes());
        call.opened = false;
        call.received.clear();
    }
}

impl Call {
    fn serve(&mut self, socket: &mut Socket<'static>, world: &mut World) -> bool {
        let Some(expected) = &self.expected else { return false };
        match socket.state() {
            State::SynSent | State::SynReceived => return false,
            State::Closed => {
                world.counters.dials_failed += 1;
                self.expected = None;
                return true;
            }
            _ => {}
        }
        let mut moved = false;
        if !self.opened {
            self.opened = true;
            world.counters.dials_opened += 1;
            // The line is shorter than the smallest send buffer.
            moved = socket.send_slice(expected).is_ok();
        }
        let received = &mut self.received;
        while let Ok(1..) = socket.recv(|bytes| {
            let room = expected.len().saturating_sub(received.len());
            received.extend_from_slice(&bytes[..bytes.len().min(room)]);
            (bytes.len(), bytes.len())
        }) {
            moved = true;
        }
        if received.len() == expected.len() || tcp::is_finished(socket) {
            if received == expected {
                world.counters.dials_echoed += 1;
            } else {
                world.counters.dials_failed += 1;
            }
            socket.close();
            self.expected = None;
            moved = true;
        }
        moved
    }
}
