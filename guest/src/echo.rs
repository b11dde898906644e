//! Echo (RFC 862) and discard (RFC 863) over TCP.

use smoltcp::socket::tcp::Socket;

use crate::clock::Moment;
use crate::tcp::{Stream, is_finished};
use crate::world::World;

/// The port of echo, TCP and UDP.
pub(crate) const ECHO_PORT: u16 = 7;
/// The port of discard, TCP and UDP.
pub(crate) const DISCARD_PORT: u16 = 9;

const PORTION: usize = 4096;

/// Sends back what it gets.
#[derive(Debug, Default)]
pub(crate) struct Echo;

/// Drops what it gets.
#[derive(Debug, Default)]
pub(crate) struct Discard;

impl Stream for Echo {
    fn serve(&mut self, socket: &mut Socket<'static>, world: &mut World, _now: Moment) -> bool {
        let mut moved = false;
        world.scratch.resize(PORTION, 0);
        loop {
            let room = socket.send_capacity() - socket.send_queue();
            let portion = room.min(PORTION).min(socket.recv_queue());
            if portion == 0 || !socket.may_send() {
                break;
            }
            let Ok(count) = socket.recv_slice(&mut world.scratch[..portion]) else {
                break;
            };
            if socket.send_slice(&world.scratch[..count]).is_err() {
                break;
            }
            world.counters.echo_bytes += count as u64;
            moved = true;
        }
        close_when_finished(socket) || moved
    }
}

impl Stream for Discard {
    fn serve(&mut self, socket: &mut Socket<'static>, world: &mut World, _now: Moment) -> bool {
        let mut moved = false;
        while let Ok(count @ 1..) = socket.recv(|bytes| (bytes.len(), bytes.len())) {
            world.counters.discard_bytes += count as u64;
            moved = true;
        }
        close_when_finished(socket) || moved
    }
}

fn close_when_finished(socket: &mut Socket<'static>) -> bool {
    let close = is_finished(socket) && socket.may_send();
    if close {
        socket.close();
    }
    close
}
