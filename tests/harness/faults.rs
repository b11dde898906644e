//! What can go wrong in the world, and what it does there.

use checkpoint::wire::{Decoder, Message, encode_into};

use crate::network::{Channel, Item};
use crate::node::{DiskFault, Role};
use crate::random::Random;
use crate::trace::Line;
use crate::world::{Happening, MILLISECOND, World};

/// What a fault does. Hosts are given by their number, spans in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A page stream breaks for both hosts, not at the same moment; the other connections stand.
    BreakStream,
    /// All connections break for both hosts, not at the same moment; what is under way is lost in part.
    CloseLink,
    /// The next message to this host on that connection loses its integrity on the way.
    Corrupt(usize, Channel, Damage),
    /// Nothing passes any more, and nobody is told.
    CutLink,
    /// Nothing more reaches this host from the other, and nobody is told.
    CutTo(usize),
    /// The host's file system takes nothing that needs more room.
    DiskFull(usize, u64),
    /// What the host flushes is lost, and the flush fails.
    FlushFails(usize, u64),
    /// The host executes nothing.
    Freeze(usize, u64),
    /// The connections break for this host only; the other believes them up.
    HalfOpen(usize),
    /// The process dies; its kernel ends its connections.
    Kill(usize),
    /// Both processes die, the second so much later.
    KillBoth(u64),
    /// The power fails in the middle of the host's disk work: instead of its write or flush of that number from now on.
    PowerCut(usize, u64),
    /// The host loses power: nobody ends its connections, and what its disk had not flushed is lost.
    PowerLoss(usize),
    /// Both hosts lose power, the second so much later.
    PowerLossBoth(u64),
    /// The next message to this host on that connection comes twice, or its next acknowledgement again in the checkpoint
    /// after: the peer breaks the protocol.
    Repeat(usize, Channel),
    /// Each of the host's disk operations takes up to so much longer, for the second span.
    SlowDisk(usize, u64, u64),
    /// Each message on that connection takes up to so much longer, for the second span.
    SlowLink(Channel, u64, u64),
    /// Nothing passes for a time; then everything, in order.
    Stall(u64),
    /// The process is asked to end, and does so in order.
    Stop(usize),
    /// The host is suspended, and its clock is further on than it should be when it wakes.
    Suspend(usize, u64),
    /// The witness can't be reached from this host.
    WitnessCut(usize, u64),
    /// The witness answers nobody.
    WitnessDown(u64),
    /// The witness does what it is asked, and its answers are lost.
    WitnessMute(u64),
    /// The witness takes up to half a second for an answer, and each comes again within a second.
    WitnessSlow(u64),
    /// The host's disk writes fail half-way.
    WriteFails(usize, u64),
}

/// What happens to the bytes of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// One to eight bits are flipped, from this source of chance.
    Flip(u64),
    /// Some bytes are missing.
    Cut(u64),
    /// Some bytes come twice.
    Double(u64),
}

/// The kind of a fault, and the only thing that coverage tells apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// [`Fault::CloseLink`] and [`Fault::BreakStream`].
    CloseLink,
    /// [`Fault::Corrupt`].
    Corrupt,
    /// [`Fault::CutLink`].
    CutLink,
    /// [`Fault::CutTo`].
    CutTo,
    /// [`Fault::DiskFull`].
    DiskFull,
    /// [`Fault::FlushFails`].
    FlushFails,
    /// [`Fault::Freeze`].
    Freeze,
    /// [`Fault::HalfOpen`].
    HalfOpen,
    /// [`Fault::Kill`].
    Kill,
    /// [`Fault::KillBoth`].
    KillBoth,
    /// [`Fault::PowerCut`].
    PowerCut,
    /// [`Fault::PowerLoss`].
    PowerLoss,
    /// [`Fault::PowerLossBoth`].
    PowerLossBoth,
    /// [`Fault::Repeat`].
    Repeat,
    /// [`Fault::SlowDisk`].
    SlowDisk,
    /// [`Fault::SlowLink`].
    SlowLink,
    /// [`Fault::Stall`].
    Stall,
    /// [`Fault::Stop`].
    Stop,
    /// [`Fault::Suspend`].
    Suspend,
    /// [`Fault::WitnessCut`].
    WitnessCut,
    /// [`Fault::WitnessDown`].
    WitnessDown,
    /// [`Fault::WitnessMute`].
    WitnessMute,
    /// [`Fault::WitnessSlow`].
    WitnessSlow,
    /// [`Fault::WriteFails`].
    WriteFails,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 24] = [
        Self::CloseLink,
        Self::Corrupt,
        Self::CutLink,
        Self::CutTo,
        Self::DiskFull,
        Self::FlushFails,
        Self::Freeze,
        Self::HalfOpen,
        Self::Kill,
        Self::KillBoth,
        Self::PowerCut,
        Self::PowerLoss,
        Self::PowerLossBoth,
        Self::Repeat,
        Self::SlowDisk,
        Self::SlowLink,
        Self::Stall,
        Self::Stop,
        Self::Suspend,
        Self::WitnessCut,
        Self::WitnessDown,
        Self::WitnessMute,
        Self::WitnessSlow,
        Self::WriteFails,
    ];

    /// Makes a fault of this kind against that host, or the link or witness that it uses.
    #[must_use]
    pub fn against(self, host: usize, random: &mut Random) -> Fault {
        match self {
            Self::CloseLink if random.one_in(3) => Fault::BreakStream,
            Self::CloseLink => Fault::CloseLink,
            Self::Corrupt => Fault::Corrupt(host, Channel::random(random), Damage::random(random)),
            Self::CutLink => Fault::CutLink,
            Self::CutTo => Fault::CutTo(host),
            Self::DiskFull => Fault::DiskFull(host, 20 + random.below(800)),
            Self::FlushFails => Fault::FlushFails(host, 20 + random.below(800)),
            Self::Freeze => Fault::Freeze(host, 20 + random.below(900)),
            Self::HalfOpen => Fault::HalfOpen(host),
            Self::Kill => Fault::Kill(host),
            Self::KillBoth => Fault::KillBoth(random.below(4).pow(4)),
            Self::PowerCut => Fault::PowerCut(host, random.below(12)),
            Self::PowerLoss => Fault::PowerLoss(host),
            Self::PowerLossBoth => Fault::PowerLossBoth(random.below(6).pow(4)),
            Self::Repeat => Fault::Repeat(host, Channel::random_bulk(random)),
            Self::SlowDisk => Fault::SlowDisk(host, 1 + random.below(200), 50 + random.below(900)),
            Self::SlowLink => Fault::SlowLink(Channel::random(random), 1 + random.below(250), 50 + random.below(500)),
            Self::Stall => Fault::Stall(20 + random.below(500)),
            Self::Stop => Fault::Stop(host),
            Self::Suspend => Fault::Suspend(host, 350 + random.below(600)),
            Self::WitnessCut => Fault::WitnessCut(host, 50 + random.below(1_500)),
            Self::WitnessDown => Fault::WitnessDown(50 + random.below(1_500)),
            Self::WitnessMute => Fault::WitnessMute(50 + random.below(800)),
            Self::WitnessSlow => Fault::WitnessSlow(50 + random.below(1_500)),
            Self::WriteFails => Fault::WriteFails(host, 20 + random.below(800)),
        }
    }

    /// Tells whether the step that it meets is over at once, so that no other fault meets the same.
    #[must_use]
    pub fn ends_the_step(self) -> bool {
        matches!(
            self,
            Self::CloseLink
                | Self::HalfOpen
                | Self::Kill
                | Self::KillBoth
                | Self::PowerCut
                | Self::PowerLoss
                | Self::PowerLossBoth
                | Self::Stop
        )
    }

    /// Tells whether it strikes the link; without a link nothing happens.
    #[must_use]
    pub fn strikes_the_link(self) -> bool {
        matches!(
            self,
            Self::CloseLink
                | Self::Corrupt
                | Self::CutLink
                | Self::CutTo
                | Self::HalfOpen
                | Self::Repeat
                | Self::SlowLink
                | Self::Stall
        )
    }
}

impl Fault {
    /// Returns its kind.
    #[must_use]
    pub fn kind(self) -> Kind {
        match self {
            Self::BreakStream | Self::CloseLink => Kind::CloseLink,
            Self::Corrupt(..) => Kind::Corrupt,
            Self::CutLink => Kind::CutLink,
            Self::CutTo(_) => Kind::CutTo,
            Self::DiskFull(..) => Kind::DiskFull,
            Self::FlushFails(..) => Kind::FlushFails,
            Self::Freeze(..) => Kind::Freeze,
            Self::HalfOpen(_) => Kind::HalfOpen,
            Self::Kill(_) => Kind::Kill,
            Self::KillBoth(_) => Kind::KillBoth,
            Self::PowerCut(..) => Kind::PowerCut,
            Self::PowerLoss(_) => Kind::PowerLoss,
            Self::PowerLossBoth(_) => Kind::PowerLossBoth,
            Self::Repeat(..) => Kind::Repeat,
            Self::SlowDisk(..) => Kind::SlowDisk,
            Self::SlowLink(..) => Kind::SlowLink,
            Self::Stall(_) => Kind::Stall,
            Self::Stop(_) => Kind::Stop,
            Self::Suspend(..) => Kind::Suspend,
            Self::WitnessCut(..) => Kind::WitnessCut,
            Self::WitnessDown(_) => Kind::WitnessDown,
            Self::WitnessMute(_) => Kind::WitnessMute,
            Self::WitnessSlow(_) => Kind::WitnessSlow,
            Self::WriteFails(..) => Kind::WriteFails,
        }
    }

    /// Returns how long it lasts, in milliseconds, if it ends by itself.
    fn span(self) -> u64 {
        match self {
            Self::DiskFull(_, span)
            | Self::FlushFails(_, span)
            | Self::Freeze(_, span)
            | Self::SlowDisk(_, _, span)
            | Self::SlowLink(_, _, span)
            | Self::Stall(span)
            | Self::Suspend(_, span)
            | Self::WitnessCut(_, span)
            | Self::WitnessDown(span)
            | Self::WitnessMute(span)
            | Self::WitnessSlow(span)
            | Self::WriteFails(_, span) => span,
            _ => 0,
        }
    }

    /// Returns the host that it strikes, if it strikes one.
    fn host(self) -> Option<usize> {
        match self {
            Self::DiskFull(host, _)
            | Self::FlushFails(host, _)
            | Self::Freeze(host, _)
            | Self::Kill(host)
            | Self::PowerCut(host, _)
            | Self::PowerLoss(host)
            | Self::SlowDisk(host, ..)
            | Self::Stop(host)
            | Self::Suspend(host, _)
            | Self::WitnessCut(host, _)
            | Self::WriteFails(host, _) => Some(host),
            _ => None,
        }
    }
}

impl Channel {
    fn random(random: &mut Random) -> Self {
        if random.one_in(4) {
            Self::Control
        } else {
            Self::random_bulk(random)
        }
    }

    /// On a page stream only what is sent to a secondary is something.
    fn random_bulk(random: &mut Random) -> Self {
        if random.one_in(2) {
            Self::Data
        } else {
            Self::Pages(index(random.below(8)))
        }
    }
}

impl Damage {
    fn random(random: &mut Random) -> Self {
        let source = random.draw();
        match random.below(4) {
            0 | 1 => Self::Flip(source),
            2 => Self::Cut(source),
            _ => Self::Double(source),
        }
    }

    /// Returns the damaged bytes, which are never those that came.
    pub(crate) fn apply(self, bytes: &[u8]) -> Vec<u8> {
        let mut changed = bytes.to_vec();
        match self {
            Self::Flip(source) => {
                let mut random = Random::new(source);
                while changed == bytes {
                    for _ in 0..=random.below(8) {
                        let at = index(random.below(bytes.len() as u64));
                        changed[at] ^= 1 << random.below(8);
                    }
                }
            }
            Self::Cut(source) => {
                let mut random = Random::new(source);
                let from = index(random.below(bytes.len() as u64));
                let count = index(1 + random.below((bytes.len() - from) as u64));
                changed.drain(from..from + count);
            }
            Self::Double(source) => {
                let mut random = Random::new(source);
                let from = index(random.below(bytes.len() as u64));
                // Not all of it: a message that comes twice is a message.
                let most = (bytes.len() - from).min(bytes.len() - 1).max(1);
                let count = index(1 + random.below(most as u64));
                changed.splice(from..from, bytes[from..from + count].iter().copied());
            }
        }
        changed
    }
}

/// One direction of a connection whose bytes have been damaged: everything goes through the shipped decoder from then on.
#[derive(Debug, Default)]
pub(crate) struct Damaged {
    decoder: Decoder,
    sent: Vec<Message>,
}

impl Damaged {
    /// Passes a message through, damaged or whole; returns what its reader sees.
    pub(crate) fn pass(&mut self, message: Message, damage: Option<Damage>) -> Vec<Item> {
        let mut bytes = Vec::new();
        encode_into(&message, &mut bytes);
        self.sent.push(message);
        self.decoder
            .push(&damage.map_or_else(|| bytes.clone(), |damage| damage.apply(&bytes)));
        let mut seen = Vec::new();
        loop {
            match self.decoder.next() {
                Ok(None) => return seen,
                Ok(Some(message)) => {
                    assert!(
                        self.sent.contains(&message),
                        "the decoder takes damaged bytes for a message that nobody sent: {message:?}"
                    );
                    seen.push(Item::Message(message));
                }
                Err(error) => {
                    seen.push(Item::garbage(&error.to_string()));
                    return seen;
                }
            }
        }
    }
}

impl World {
    /// Lets a fault happen now.
    pub fn fault(&mut self, fault: Fault) {
        let first = usize::from(!matches!(self.nodes[0].role, Role::Primary(_)));
        let phases = [self.phase(first), self.phase(1 - first)];
        let link = self.nodes[0].link.or(self.nodes[1].link);
        if link.is_none() && fault.kind().strikes_the_link() || !self.survivable(fault) {
            return;
        }
        self.note(Line::Note(format!("FAULT {fault:?} at {} / {}", phases[0], phases[1])));
        self.faults += 1;
        self.disturbed_until = self.disturbed_until.max(self.now + fault.span() * MILLISECOND);
        match fault.host() {
            Some(host) => self.coverage.note(self.phase(host), fault.kind()),
            None => phases.iter().for_each(|phase| self.coverage.note(phase, fault.kind())),
        }
        match link.filter(|_| fault.kind().strikes_the_link()) {
            Some(link) => self.strike_link(link, fault),
            None => self.strike(fault),
        }
    }

    fn strike_link(&mut self, link: usize, fault: Fault) {
        match fault {
            Fault::BreakStream => self.break_stream(link),
            Fault::CloseLink => self.break_link(link),
            Fault::Corrupt(to, channel, damage) => self.links[link].damage(to, channel, damage),
            Fault::CutLink => self.links[link].cut = [true; 2],
            Fault::CutTo(node) => self.links[link].cut[node] = true,
            Fault::HalfOpen(node) => self.half_open(link, node),
            Fault::Repeat(to, _) if matches!(self.nodes[to].role, Role::Primary(_)) && self.random.one_in(2) => {
                self.links[link].replay(to);
            }
            Fault::Repeat(to, channel) => self.links[link].repeat(to, channel),
            Fault::SlowLink(channel, extra, span) => {
                let until = self.now + span * MILLISECOND;
                self.links[link].slow(channel, extra * MILLISECOND, until);
            }
            Fault::Stall(span) => self.stall(link, self.now + span * MILLISECOND),
            _ => unreachable!("a fault of the link"),
        }
    }

    fn strike(&mut self, fault: Fault) {
        let until = |span| self.now + span * MILLISECOND;
        match fault {
            Fault::DiskFull(node, span) => self.disk_fault(node, DiskFault::Full, span),
            Fault::FlushFails(node, span) => self.disk_fault(node, DiskFault::Flushes, span),
            Fault::WriteFails(node, span) => self.disk_fault(node, DiskFault::Writes, span),
            Fault::Freeze(node, span) => self.freeze(node, span),
            Fault::Suspend(node, span) => {
                self.freeze(node, span);
                let ahead = self.random.below(20_000) * MILLISECOND;
                self.nodes[node].jump_ahead(ahead);
            }
            Fault::Kill(node) => {
                self.close(node);
                self.dies(node);
            }
            Fault::PowerLoss(node) => self.power_loss(node),
            Fault::PowerCut(node, operations) => {
                self.nodes[node].disk.cut_power_after(operations);
                self.nodes[node].doomed = true;
            }
            Fault::KillBoth(later) | Fault::PowerLossBoth(later) => {
                let first = usize::from(self.random.one_in(2));
                let one = |node| match fault {
                    Fault::KillBoth(_) => Fault::Kill(node),
                    _ => Fault::PowerLoss(node),
                };
                self.strike(one(first));
                self.later(later * MILLISECOND, Happening::Fault(one(1 - first)));
            }
            Fault::SlowDisk(node, extra, span) => {
                let until = until(span);
                self.nodes[node].slow_disk = (extra * MILLISECOND, until);
            }
            Fault::Stop(node) => {
                let life = self.nodes[node].life;
                self.nodes[node].stopping = Some(life);
                self.later(0, Happening::Stop(node, life));
            }
            Fault::WitnessDown(span) => self.witness.down_until = [until(span); 2],
            Fault::WitnessCut(node, span) => self.witness.down_until[node] = until(span),
            Fault::WitnessMute(span) => self.witness.mute_until = until(span),
            Fault::WitnessSlow(span) => self.witness.slow_until = until(span),
            _ => unreachable!("a fault of a host or the witness"),
        }
    }

    fn freeze(&mut self, node: usize, span: u64) {
        // What waits for the end of an earlier one is not overtaken.
        let until = self.now + span * MILLISECOND;
        self.nodes[node].frozen_until = self.nodes[node].frozen_until.max(until);
        self.nodes[node].deadline_first = self.random.one_in(2);
    }

    fn disk_fault(&mut self, node: usize, fault: DiskFault, span: u64) {
        self.nodes[node].fail_disk(fault);
        self.later(span * MILLISECOND, Happening::DiskHeals(node, fault));
    }

    /// The host is off, and nothing on the link says so.
    pub(crate) fn power_loss(&mut self, node: usize) {
        if let Some(link) = self.nodes[node].link {
            self.links[link].cut = [true; 2];
        }
        self.nodes[node].lose_power();
        self.dies(node);
    }

    fn dies(&mut self, node: usize) {
        self.nodes[node].die();
        let pause = 20 + self.random.below(700);
        self.nodes[node].off_until = self.now + pause * MILLISECOND;
    }

    /// What no pair of hosts survives, and what the world therefore does not do.
    ///
    /// Without an operator who starts hosts again, a host dies only if the other has the VM, or will have.
    fn survivable(&self, fault: Fault) -> bool {
        if self.restarts {
            return true;
        }
        let (Fault::Kill(node) | Fault::PowerLoss(node)) = fault else {
            return true;
        };
        match &self.nodes[node].role {
            Role::Primary(primary) => {
                matches!(primary.state_name(), "protected" | "checkpointing")
                    && matches!(&self.nodes[1 - node].role, Role::Secondary(other)
                        if matches!(other.state_name(), "protected" | "checkpointing" | "contending"))
            }
            Role::Secondary(secondary) => {
                matches!(secondary.state_name(), "syncing" | "protected" | "checkpointing")
                    && matches!(self.nodes[1 - node].role, Role::Primary(_))
            }
            Role::Off | Role::Waiting => false,
        }
    }
}

fn index(number: u64) -> usize {
    usize::try_from(number).expect("within a message")
}
