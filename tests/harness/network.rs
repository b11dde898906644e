//! The wires of the world: the pair's connections, the clients' switch, the witness.

use std::collections::BTreeMap;

use bytes::Bytes;
use checkpoint::Generation;
use checkpoint::cpu::CpuModel;
use checkpoint::limits::STREAMS_MAX;
use checkpoint::pair::WitnessAnswer;
use checkpoint::wire::{Message, PageBatch, Session, Welcome};
use primary::event::Event as PrimaryEvent;
use secondary::event::{Event as SecondaryEvent, LinkEnd};
use secondary::protocol::{Options as SecondaryOptions, Secondary};
use storage::witness::Claim;

use crate::faults::{Damage, Damaged};
use crate::node::Role;
use crate::packet;
use crate::trace::Line;
use crate::world::{Happening, MILLISECOND, TAKEOVER_LIMIT, World};

/// One of a pair's connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Channel {
    /// Heartbeats and goodbyes.
    Control,
    /// Everything else but pages.
    Data,
    /// The page stream of that number.
    Pages(usize),
}

impl Channel {
    fn index(self) -> usize {
        match self {
            Self::Control => 0,
            Self::Data => 1,
            Self::Pages(stream) => 2 + stream,
        }
    }
}

/// What arrives on a connection.
#[derive(Debug)]
pub(crate) enum Item {
    Message(Message),
    Closed(LinkEnd),
}

impl Item {
    /// The reader has met bytes that are no message.
    pub(crate) fn garbage(error: &str) -> Self {
        Self::Closed(LinkEnd::Broken(error.to_owned()))
    }
}

/// The connections of a pair.
#[derive(Debug, Default)]
pub(crate) struct Link {
    /// Nothing reaches this host any more.
    pub(crate) cut: [bool; 2],
    /// Nothing passes until then.
    stalled_until: u64,
    /// Hosts that have closed it.
    closed: [bool; 2],
    /// Hosts that have said goodbye.
    parted: [bool; 2],
    /// Page streams.
    streams: usize,
    /// What is on its way to a host on a connection.
    lanes: [[Lane; 2 + STREAMS_MAX]; 2],
    /// What came on page streams whose reader is not yet asked for it, in its order.
    unread: Vec<(usize, Item)>,
    /// Messages on the data connection that have not arrived, by who sent them.
    on_their_way: [usize; 2],
}

/// One direction of one connection.
#[derive(Debug, Default)]
struct Lane {
    /// When the last item arrives, for order.
    last: u64,
    /// It has ended for its receiver.
    ended: bool,
    /// Longest additional delay, and until when.
    slow: (u64, u64),
    repeat: bool,
    /// The next acknowledgement comes again when its receiver has sent the next end mark.
    replay: bool,
    kept: Option<Item>,
    damage: Option<Damage>,
    damaged: Option<Damaged>,
}

impl Link {
    /// The next message to this host on that connection is damaged.
    pub(crate) fn damage(&mut self, to: usize, channel: Channel, damage: Damage) {
        // Missing bytes are missed with those that follow, which may be long in coming on a page stream; TCP loses none.
        let damage = match (channel, damage) {
            (Channel::Pages(_), Damage::Cut(source) | Damage::Double(source)) => Damage::Flip(source),
            (_, damage) => damage,
        };
        let lane = self.lane(to, channel);
        lane.damage = Some(damage);
        lane.damaged.get_or_insert_default();
    }

    /// The next message to this host on that connection comes twice.
    pub(crate) fn repeat(&mut self, to: usize, channel: Channel) {
        self.lane(to, channel).repeat = true;
    }

    /// The next acknowledgement that is sent to this host comes again in the checkpoint after.
    pub(crate) fn replay(&mut self, to: usize) {
        self.lane(to, Channel::Data).replay = true;
    }

    /// Messages on that connection take up to so much longer.
    pub(crate) fn slow(&mut self, channel: Channel, extra: u64, until: u64) {
        for to in 0..2 {
            self.lane(to, channel).slow = (extra, until);
        }
    }

    fn channels(&self) -> impl Iterator<Item = Channel> + use<> {
        [Channel::Control, Channel::Data]
            .into_iter()
            .chain((0..self.streams).map(Channel::Pages))
    }

    /// Any number is that of a stream.
    fn lane(&mut self, to: usize, channel: Channel) -> &mut Lane {
        let channel = match channel {
            Channel::Pages(stream) => Channel::Pages(stream % self.streams),
            channel => channel,
        };
        &mut self.lanes[to][channel.index()]
    }
}

/// The witness, and how it can be reached.
#[derive(Debug, Default)]
pub(crate) struct Witness {
    pub(crate) terms: BTreeMap<Generation, usize>,
    pub(crate) down_until: [u64; 2],
    pub(crate) mute_until: u64,
    pub(crate) slow_until: u64,
}

/// Something that arrives on a link.
pub(crate) struct Wire {
    pub(crate) link: usize,
    pub(crate) to: usize,
    channel: Channel,
    item: Item,
}

impl World {
    // The switch.

    pub(crate) fn frame_at_switch(&mut self, frame: &Bytes) {
        let Some([nic, _]) = packet::cards_of(frame, self.cards) else {
            return;
        };
        for node in 0..2 {
            if matches!(self.nodes[node].role, Role::Primary(_)) && !self.nodes[node].input_held {
                let life = self.nodes[node].life;
                let event = PrimaryEvent::FrameArrived(nic, frame.clone());
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
        self.links.push(Link {
            streams: self.streams,
            ..Link::default()
        });
        self.nodes[node].link = Some(link);
        self.nodes[other].link = Some(link);
        let generation = Generation(self.nodes[other].record.map_or(0, |record| record.generation.0));
        let options = SecondaryOptions {
            witness: self.has_witness,
            takeover_limit: TAKEOVER_LIMIT,
            generation,
            held: self.nodes[other].held(),
            cards: self.cards,
            streams: self.streams,
            room: self.room.pages.saturating_mul(2),
            unsent_bytes: self.unsent_bytes,
        };
        let secondary = Secondary::new(options, name(node), self.nodes[other].clock(self.now));
        self.nodes[other].role = Role::Secondary(Box::new(secondary));
        self.note(Line::Note(format!("host {node} pairs with host {other}")));
        let welcome = Welcome {
            node: name(other),
            session: Session(0),
            // The toys' guests ask for no processor.
            cpu: CpuModel::default(),
            generation: 0,
            committed: 0,
            held: self.nodes[other].held(),
            streams: u32::try_from(self.streams).expect("few"),
        };
        self.step_primary(node, PrimaryEvent::Connected(welcome));
    }

    pub(crate) fn send(&mut self, from: usize, channel: Channel, message: Message) {
        self.put(from, channel, Item::Message(message));
    }

    pub(crate) fn send_pages(&mut self, from: usize, stream: usize, batch: PageBatch) {
        self.send(from, Channel::Pages(stream), Message::Pages(batch));
    }

    fn put(&mut self, from: usize, channel: Channel, item: Item) {
        let Some(number) = self.nodes[from].link else { return };
        let to = 1 - from;
        let (now, link) = (self.now, &mut self.links[number]);
        if let Item::Message(Message::End(_)) = item
            && let Some(copy) = link.lane(from, Channel::Data).kept.take()
        {
            self.wire(now + 1_000, number, from, Channel::Data, copy);
        }
        let link = &mut self.links[number];
        if link.closed[from] && matches!(item, Item::Message(_)) {
            return;
        }
        link.parted[from] |= matches!(item, Item::Message(Message::Goodbye(_)));
        if link.parted[from] && matches!(item, Item::Closed(_)) {
            // As the shell does: the end of another connection does not overtake the goodbye.
            let control = link.lane(to, Channel::Control).last;
            let lane = link.lane(to, channel);
            lane.last = lane.last.max(control);
        }
        let stalled_until = link.stalled_until;
        let lane = link.lane(to, channel);
        let extra = if lane.slow.1 > now { lane.slow.0 } else { 0 };
        let delay = 30_000 + self.random.below(100_000) + self.random.below(extra + 1);
        let at = (now + delay).max(stalled_until).max(lane.last);
        lane.last = at;
        let mut again = None;
        let items = match (item, &mut lane.damaged) {
            (Item::Message(message), Some(damaged)) => damaged.pass(message, lane.damage.take()),
            (Item::Message(message), None) if core::mem::take(&mut lane.repeat) => {
                again = Some(Item::Message(message.clone()));
                vec![Item::Message(message)]
            }
            (Item::Message(message @ Message::Acknowledge(_)), None) if core::mem::take(&mut lane.replay) => {
                lane.kept = Some(Item::Message(message.clone()));
                vec![Item::Message(message)]
            }
            (item, _) => vec![item],
        };
        if let Some(item) = again {
            self.wire(at, number, to, channel, item);
        }
        for item in items {
            self.wire(at, number, to, channel, item);
        }
    }

    fn wire(&mut self, at: u64, link: usize, to: usize, channel: Channel, item: Item) {
        if channel == Channel::Data {
            self.links[link].on_their_way[1 - to] += 1;
        }
        let wire = Wire {
            link,
            to,
            channel,
            item,
        };
        self.later(at.saturating_sub(self.now), Happening::Wire(wire));
    }

    pub(crate) fn arrive(&mut self, wire: Wire) {
        let Wire {
            link: number,
            to,
            channel,
            item,
        } = wire;
        let link = &mut self.links[number];
        let lane = &mut link.lanes[to][channel.index()];
        let lost = lane.ended || link.cut[to];
        // What is lost by a cut stays with its sender.
        if channel == Channel::Data && !link.cut[to] {
            link.on_their_way[1 - to] -= 1;
            self.drained(1 - to);
        }
        if lost {
            return;
        }
        let link = &mut self.links[number];
        let lane = &mut link.lanes[to][channel.index()];
        if let Item::Closed(_) = item {
            lane.ended = true;
        }
        if let (Role::Secondary(secondary), Channel::Pages(stream)) = (&self.nodes[to].role, channel)
            && !secondary.takes_pages()
        {
            return link.unread.push((stream, item));
        }
        self.hear(to, channel, item);
        if let Role::Secondary(secondary) = &self.nodes[to].role
            && secondary.takes_pages()
        {
            for (stream, item) in core::mem::take(&mut self.links[number].unread) {
                self.hear(to, Channel::Pages(stream), item);
            }
        }
    }

    /// Tells a secondary that waits for it that all of its output is on its way.
    pub(crate) fn drained(&mut self, node: usize) {
        let host = &self.nodes[node];
        let link = host.link.map(|link| &self.links[link]);
        if let Role::Secondary(secondary) = &host.role
            && secondary.awaits_drain()
            && link.is_none_or(|link| link.on_their_way[node] == 0)
        {
            self.soon(Happening::SecondaryEvent(
                node,
                host.life,
                SecondaryEvent::OutputDrained,
            ));
        }
    }

    fn hear(&mut self, to: usize, channel: Channel, item: Item) {
        match (&self.nodes[to].role, item) {
            (Role::Primary(_), Item::Message(message)) => self.step_primary(to, PrimaryEvent::PeerSent(message)),
            (Role::Primary(_), Item::Closed(end)) => {
                // As the shell does: the first end of a connection closes both.
                self.close(to);
                self.step_primary(to, PrimaryEvent::LinkClosed(end.to_string()));
            }
            (Role::Secondary(_), item) => {
                let event = match (channel, item) {
                    (Channel::Pages(stream), Item::Message(Message::Pages(batch))) => {
                        SecondaryEvent::PagesArrived(stream, batch)
                    }
                    (_, Item::Message(message)) => SecondaryEvent::PeerSent(message),
                    (Channel::Control, Item::Closed(end)) => SecondaryEvent::ControlClosed(end),
                    (Channel::Data, Item::Closed(end)) => SecondaryEvent::DataClosed(end),
                    (Channel::Pages(_), Item::Closed(end)) => SecondaryEvent::PagesClosed(end),
                };
                self.step_secondary(to, event);
            }
            (Role::Off | Role::Waiting, _) => {}
        }
    }

    /// Lets a host believe that the other sent this.
    pub fn forge(&mut self, to: usize, channel: Channel, message: Message) {
        let link = self.nodes[to].link.expect("paired");
        self.wire(self.now, link, to, channel, Item::Message(message));
    }

    /// One end closes: the other reads what is under way, then the end; this one hears nothing more.
    pub(crate) fn close(&mut self, node: usize) {
        let Some(number) = self.nodes[node].link else { return };
        if core::mem::replace(&mut self.links[number].closed[node], true) {
            return;
        }
        for channel in self.links[number].channels() {
            self.put(node, channel, Item::Closed(LinkEnd::PeerEnded));
        }
        for lane in &mut self.links[number].lanes[node] {
            lane.ended = true;
        }
        if let Role::Primary(_) = self.nodes[node].role {
            self.nodes[node].link = None;
        }
    }

    /// A reset in the middle: each end of each connection breaks at a moment of its own.
    pub(crate) fn break_link(&mut self, link: usize) {
        for to in 0..2 {
            for channel in self.links[link].channels() {
                let delay = self.random.below(3 * MILLISECOND);
                let end = Item::Closed(LinkEnd::Broken("reset".to_owned()));
                self.wire(self.now + delay, link, to, channel, end);
            }
        }
    }

    /// A reset of one page stream only.
    pub(crate) fn break_stream(&mut self, link: usize) {
        let stream = self.random.below(self.links[link].streams as u64);
        let channel = Channel::Pages(usize::try_from(stream).expect("few"));
        for to in 0..2 {
            let delay = self.random.below(3 * MILLISECOND);
            let end = Item::Closed(LinkEnd::Broken("reset".to_owned()));
            self.wire(self.now + delay, link, to, channel, end);
        }
    }

    /// The connections are reset at one end; the other is not told, and nothing passes any more.
    pub(crate) fn half_open(&mut self, link: usize, node: usize) {
        self.links[link].cut[1 - node] = true;
        for channel in self.links[link].channels() {
            let end = Item::Closed(LinkEnd::Broken("reset".to_owned()));
            self.wire(self.now, link, node, channel, end);
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

    /// A claim is on its way to the witness.
    pub(crate) fn claim(&mut self, node: usize, term: Generation) {
        let slow = if self.witness.slow_until > self.now {
            250 * MILLISECOND
        } else {
            0
        };
        let delay = 20_000 + self.random.below(300_000) + self.random.below(slow + 1);
        let life = self.nodes[node].life;
        self.later(delay, Happening::Claim(node, life, term));
    }

    /// The claim is there; whoever made it may be dead by now.
    pub(crate) fn claimed(&mut self, node: usize, life: u64, term: Generation) {
        let answer = match self.claim_now(node, term) {
            Some(Claim::Won) => WitnessAnswer::Won,
            Some(Claim::LostTo(owner)) => WitnessAnswer::LostTo(owner),
            None => WitnessAnswer::Unreachable("the witness does not answer".to_owned()),
        };
        // From here on the VM's state is what this host has, in its memory too.
        if self.witness.latest() == Some((term, node)) && self.current.is_some_and(|current| current != node) {
            self.current = None;
        }
        let answered = || match self.nodes[node].role {
            Role::Primary(_) => {
                Happening::PrimaryEvent(node, life, PrimaryEvent::WitnessAnswered(term, answer.clone()))
            }
            _ => Happening::SecondaryEvent(node, life, SecondaryEvent::WitnessAnswered(term, answer.clone())),
        };
        let (first, again) = (answered(), answered());
        let slow = self.witness.slow_until > self.now;
        let extra = if slow { 250 * MILLISECOND } else { 0 };
        let delay = 20_000 + self.random.below(300_000) + self.random.below(extra + 1);
        self.later(delay, first);
        if slow {
            let delay = delay + self.random.below(1_000 * MILLISECOND);
            self.later(delay, again);
        }
    }

    /// Carries a claim out; nothing if no answer gets through, which does not mean that nothing was done.
    ///
    /// As in the shipped witness: a term once won stays, and nobody wins one before the latest.
    pub(crate) fn claim_now(&mut self, node: usize, term: Generation) -> Option<Claim> {
        if self.witness.down_until[node] > self.now {
            return None;
        }
        let (claim, owner) = match self.witness.latest() {
            // Also if it is its own: the owner of a later term may not go back.
            Some((last, owner)) if last > term => (false, owner),
            _ => {
                let owner = *self.witness.terms.entry(term).or_insert(node);
                (owner == node, owner)
            }
        };
        let answered = self.witness.mute_until <= self.now;
        answered.then(|| if claim { Claim::Won } else { Claim::LostTo(name(owner)) })
    }

    /// Returns the latest term and its owner, if the witness can be read from this host.
    pub(crate) fn latest_term(&self, node: usize) -> Option<Option<(Generation, usize)>> {
        let down = self.witness.down_until[node] > self.now || self.witness.mute_until > self.now;
        (!down).then(|| self.witness.latest())
    }
}

impl Witness {
    fn latest(&self) -> Option<(Generation, usize)> {
        self.terms.last_key_value().map(|(term, owner)| (*term, *owner))
    }
}

/// A host's name, as the pair and the witness know it.
pub(crate) fn name(node: usize) -> String {
    format!("host {node}")
}
