//! The connections between the hosts: what is under way on each, and how it ends.

use std::collections::VecDeque;

use checkpoint::wire::Message;
use secondary::event::LinkEnd;

use super::show::message_name;

/// What arrives on a connection.
pub(super) enum Item {
    Message(Message),
    End(LinkEnd),
}

/// What arrives in the order in which it was sent, unless the script says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Connection {
    Control,
    /// The data connection, and the page streams.
    Data,
}

pub(super) const BOTH: [Connection; 2] = [Connection::Data, Connection::Control];

/// The connections. A direction is named by the host that it leads to.
#[derive(Default)]
pub(super) struct Link {
    queues: [[VecDeque<Item>; 2]; 2],
    /// Nothing that is sent to this host arrives, and nobody is told.
    pub(super) cut: [bool; 2],
    /// What is sent waits.
    pub(super) stalled: bool,
    /// This host has closed its ends.
    closed: [bool; 2],
    /// The connections were reset.
    broken: bool,
}

impl Link {
    pub(super) fn send(&mut self, to: usize, connection: Connection, message: Message) {
        if !self.cut[to] && !self.broken && self.closed == [false; 2] {
            self.queues[to][connection as usize].push_back(Item::Message(message));
        }
    }

    /// One host closes both connections: it hears nothing more, the other hears the end after what is under way.
    pub(super) fn close(&mut self, host: usize) {
        if core::mem::replace(&mut self.closed[host], true) {
            return;
        }
        self.queues[host] = Default::default();
        let other = 1 - host;
        if !self.cut[other] && !self.broken && !self.closed[other] {
            self.end(other, &LinkEnd::PeerEnded);
        }
    }

    /// Both connections are reset.
    pub(super) fn reset(&mut self) {
        self.broken = true;
        for host in 0..2 {
            if !self.closed[host] {
                self.end(host, &LinkEnd::Broken("reset".to_owned()));
            }
        }
    }

    fn end(&mut self, host: usize, end: &LinkEnd) {
        for connection in BOTH {
            self.queues[host][connection as usize].push_back(Item::End(end.clone()));
        }
    }

    /// Takes what arrives next.
    pub(super) fn next(&mut self, to: usize, connection: Connection) -> Option<Item> {
        if self.stalled || self.cut[to] {
            return None;
        }
        self.queues[to][connection as usize].pop_front()
    }

    /// Takes what arrives next of the data connection's and the page streams' items that are wanted: there is no order between
    /// them.
    pub(super) fn next_wanted(&mut self, to: usize, wanted: impl Fn(&Item) -> bool) -> Option<Item> {
        if self.stalled || self.cut[to] {
            return None;
        }
        let queue = &mut self.queues[to][Connection::Data as usize];
        let place = queue.iter().position(wanted)?;
        queue.remove(place)
    }

    /// Takes the next heartbeat, unless something else is before it.
    pub(super) fn next_heartbeat(&mut self, to: usize) -> Option<Item> {
        let queue = &self.queues[to][Connection::Control as usize];
        match queue.front() {
            Some(Item::Message(Message::Heartbeat(_))) => self.next(to, Connection::Control),
            _ => None,
        }
    }

    /// Returns the queue in which a message of that kind comes next, and its place.
    pub(super) fn find(&mut self, to: usize, kind: &str) -> Option<(&mut VecDeque<Item>, usize)> {
        self.queues[to].iter_mut().find_map(|queue| {
            let is = |item: &Item| matches!(item, Item::Message(message) if message_name(message) == kind);
            let place = queue.iter().position(is)?;
            Some((queue, place))
        })
    }

    /// Forgets the last messages of the data connection: they had not left the sender.
    pub(super) fn forget_last(&mut self, to: usize, count: usize) {
        let queue = &mut self.queues[to][Connection::Data as usize];
        queue.truncate(queue.len().saturating_sub(count));
    }

    /// Returns what is under way to this host, heartbeats aside.
    pub(super) fn under_way(&self, to: usize) -> impl Iterator<Item = &Item> {
        self.queues[to]
            .iter()
            .rev()
            .flatten()
            .filter(|item| !matches!(item, Item::Message(Message::Heartbeat(_))))
    }
}
