//! The wires of the world: the pair's connections, the clients' switch, the witness.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use checkpoint::Generation;
use checkpoint::pair::WitnessAnswer;
use checkpoint::wire::{Message, Session, Welcome};
use primary::event::Event as PrimaryEvent;
use secondary::event::{Event as SecondaryEvent, LinkEnd};
use secondary::protocol::{Options as SecondaryOptions, Secondary};

use crate::node::Role;
use crate::trace::Line;
use crate::world::{Happening, MILLISECOND, TAKEOVER_LIMIT, World};

/// What arrives on a connection.
pub(crate) enum Item {
    Message(Message),
    Closed(LinkEnd),
}

/// The two connections of a pair.
#[derive(Debug, Default)]
pub(crate) struct Link {
    /// Nothing reaches this host any more.
    pub(crate) cut: [bool; 2],
    /// Nothing passes until then.
    stalled_until: u64,
    /// When the last item of (receiver, control?) arrives, for order.
    last: BTreeMap<(usize, bool), u64>,
    /// Hosts that have closed it.
    closed: [bool; 2],
    /// Connections that have ended for a receiver.
    ended: BTreeSet<(usize, bool)>,
}

/// Something that arrives on a link.
pub(crate) struct Wire {
    pub(crate) link: usize,
    pub(crate) to: usize,
    control: bool,
    item: Item,
}

impl World {
    // The switch.

    pub(crate) fn frame_at_switch(&mut self, frame: &Bytes) {
        for node in 0..2 {
            if matches!(self.nodes[node].role, Role::Primary(_)) && !self.nodes[node].input_held {
                let life = self.nodes[node].life;
                let event = PrimaryEvent::FrameArrived(frame.clone());
                self.later(10_000, Happening::PrimaryEvent(node, life, event));
            }
        }
    }

    // The pair's connections.

    pub(crate) fn dial(&mut self, node: usize, life: u64) {
        let other = 1 - node;
        let Role::Primary(primary) = &self.nodes[node].role else {
            return;
        };
        if primary.state_name() != "alone" {
            return;
        }
        if !matches!(self.nodes[other].role, Role::Waiting) || self.nodes[other].frozen_until > self.now {
            return self.later(50 * MILLISECOND, Happening::Dial(node, life));
        }
        let link = self.links.len();
        self.links.push(Link::default());
        self.nodes[node].link = Some(link);
        self.nodes[other].link = Some(link);
        let generation = Generation(self.nodes[other].record.map_or(0, |record| record.generation.0));
        let options = SecondaryOptions {
            witness: self.witness,
            takeover_limit: TAKEOVER_LIMIT,
            generation,
            held: self.nodes[other].held(),
        };
        let secondary = Secondary::new(options, format!("host {node}"), self.nodes[other].clock(self.now));
        self.nodes[other].role = Role::Secondary(Box::new(secondary));
        self.note(Line::Note(format!("host {node} pairs with host {other}")));
        let welcome = Welcome {
            node: format!("host {other}"),
            session: Session(0),
            generation: 0,
            committed: 0,
            held: self.nodes[other].held(),
        };
        self.step_primary(node, PrimaryEvent::Connected(welcome));
    }

    pub(crate) fn send(&mut self, from: usize, control: bool, message: Message) {
        self.put(from, control, Item::Message(message));
    }

    fn put(&mut self, from: usize, control: bool, item: Item) {
        let Some(number) = self.nodes[from].link else { return };
        let delay = 30_000 + self.random.below(100_000);
        let to = 1 - from;
        let link = &mut self.links[number];
        if link.closed[from] && matches!(item, Item::Message(_)) {
            return;
        }
        let last = link.last.entry((to, control)).or_default();
        let at = (self.now + delay).max(link.stalled_until).max(*last);
        *last = at;
        self.wire(at, number, to, control, item);
    }

    fn wire(&mut self, at: u64, link: usize, to: usize, control: bool, item: Item) {
        let wire = Wire {
            link,
            to,
            control,
            item,
        };
        self.later(at.saturating_sub(self.now), Happening::Wire(wire));
    }

    pub(crate) fn arrive(&mut self, wire: Wire) {
        let Wire {
            link: number,
            to,
            control,
            item,
        } = wire;
        let link = &mut self.links[number];
        if link.cut[to] || link.ended.contains(&(to, control)) {
            return;
        }
        if let Item::Closed(_) = item {
            link.ended.insert((to, control));
        }
        match (&self.nodes[to].role, item) {
            (Role::Primary(_), Item::Message(message)) => self.step_primary(to, PrimaryEvent::PeerSent(message)),
            (Role::Primary(_), Item::Closed(end)) => {
                // As the shell does: the first end of a connection closes both.
                self.close(to);
                self.step_primary(to, PrimaryEvent::LinkClosed(end.to_string()));
            }
            (Role::Secondary(_), Item::Message(message)) => self.step_secondary(to, SecondaryEvent::PeerSent(message)),
            (Role::Secondary(_), Item::Closed(end)) if control => {
                self.step_secondary(to, SecondaryEvent::ControlClosed(end));
            }
            (Role::Secondary(_), Item::Closed(end)) => self.step_secondary(to, SecondaryEvent::DataClosed(end)),
            (Role::Off | Role::Waiting, _) => {}
        }
    }

    /// Lets a host believe that the other sent this.
    pub fn forge(&mut self, to: usize, control: bool, message: Message) {
        let link = self.nodes[to].link.expect("paired");
        self.wire(self.now, link, to, control, Item::Message(message));
    }

    /// One end closes: the other reads what is under way, then the end; this one hears nothing more.
    pub(crate) fn close(&mut self, node: usize) {
        let Some(number) = self.nodes[node].link else { return };
        if core::mem::replace(&mut self.links[number].closed[node], true) {
            return;
        }
        self.put(node, true, Item::Closed(LinkEnd::PeerEnded));
        self.put(node, false, Item::Closed(LinkEnd::PeerEnded));
        self.links[number].ended.extend([(node, true), (node, false)]);
        if let Role::Primary(_) = self.nodes[node].role {
            self.nodes[node].link = None;
        }
    }

    /// A reset in the middle: each end of each connection breaks at a moment of its own.
    pub(crate) fn break_link(&mut self, link: usize) {
        for to in 0..2 {
            for control in [true, false] {
                let delay = self.random.below(3 * MILLISECOND);
                let end = Item::Closed(LinkEnd::Broken("reset".to_owned()));
                self.wire(self.now + delay, link, to, control, end);
            }
        }
    }

    pub(crate) fn stall(&mut self, link: usize, until: u64) {
        self.links[link].stalled_until = until;
        let late: Vec<_> = self
            .queue
            .iter()
            .filter(|((at, _), happening)| {
                *at < until && matches!(happening, Happening::Wire(wire) if wire.link == link)
            })
            .map(|(key, _)| *key)
            .collect();
        for key in late {
            let happening = self.queue.remove(&key).expect("just seen");
            self.queue.insert((until, key.1), happening);
        }
    }

    // The witness.

    pub(crate) fn claim(&mut self, node: usize, term: Generation) -> WitnessAnswer {
        if self.witness_down_until > self.now {
            return WitnessAnswer::Unreachable("the witness is down".to_owned());
        }
        let latest = self.terms.last_key_value().map(|(term, owner)| (*term, *owner));
        let owner = match latest {
            Some((last, owner)) if last > term && owner != node => owner,
            _ => *self.terms.entry(term).or_insert(node),
        };
        if owner == node {
            WitnessAnswer::Won
        } else {
            WitnessAnswer::LostTo(format!("host {owner}"))
        }
    }
}
