//! The two connections of a pair in the model: what is under way, what arrives, how they end.
//!
//! A connection delivers in order what was sent on it, or from a cut on nothing; between the two there is no order.

use checkpoint::cpu::CpuModel;
use checkpoint::failover::{Connection, Contest, Event, Standing};
use checkpoint::handshake::{Local, hello, judge_hello};
use checkpoint::wire::{Held, MachineShape, Session};
use checkpoint::{Epoch, Generation, Instant, Role, limits};

use crate::world::{Bounds, LEASE_ENDS, NAMES, Process, World};

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Link {
    /// Which host is the primary on it.
    pub(crate) primary: usize,
    /// Which hosts have not closed it.
    pub(crate) open: [bool; 2],
    /// By sender and connection.
    pub(crate) pipes: [[Pipe; 2]; 2],
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Pipe {
    /// Nothing comes through any more.
    pub(crate) cut: bool,
    pub(crate) queue: Vec<Message>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Message {
    /// A heartbeat of the primary, or its echo; and the ticks since the primary sent it.
    Beat(u8),
    Begin(Generation),
    /// The end mark of the first checkpoint; whether its state has all that clients were told.
    End(bool),
    Goodbye,
    /// The sender's kernel ended the connection.
    Eof,
}

impl World {
    pub(crate) fn connect(&mut self, bounds: &Bounds, primary: usize) {
        let secondary = 1 - primary;
        let generation = self.hosts[secondary]
            .record
            .map_or(Generation(0), |record| record.generation);
        self.hosts[secondary].process = Process::Secondary {
            contest: Contest::follower(bounds.witness, generation),
            silent: 0,
        };
        self.link = Some(Link {
            primary,
            open: [true; 2],
            pipes: Default::default(),
        });
        self.pairings -= 1;
        self.tell(bounds, primary, Instant(0), Event::Connected);
    }

    /// Tells whether the secondary, as shipped, accepts this primary.
    pub(crate) fn accepts(&self, bounds: &Bounds, primary: usize) -> bool {
        let local = |host: usize, generation: Generation, owner: bool| Local {
            pair: "p".to_owned(),
            node: NAMES[host].to_owned(),
            shape: MachineShape {
                memory_bytes: limits::PAGE_BYTES as u64,
                vcpus: 1,
                devices: Vec::new(),
                disk_bytes: 0,
                cpu: CpuModel::default(),
            },
            adapts: false,
            generation,
            owner,
            held_cpu: None,
            committed: Epoch(0),
            held: Held::default(),
            takeover_limit_ms: limits::TAKEOVER_LIMIT_DEFAULT.as_millis(),
            witness: bounds.witness,
            streams: 1,
        };
        let secondary = 1 - primary;
        let record = self.hosts[secondary].record;
        let owner = record.is_some_and(|record| record.role == Role::Primary);
        let ours = local(
            secondary,
            record.map_or(Generation(0), |record| record.generation),
            owner,
        );
        let theirs = hello(&local(
            primary,
            self.generation(primary).expect("a primary dials"),
            true,
        ));
        judge_hello(&ours, &theirs, Session(1)).is_ok()
    }

    pub(crate) fn send(&mut self, from: usize, connection: Connection, message: Message) {
        let Some(link) = &mut self.link else { return };
        let pipe = &mut link.pipes[from][usize::from(connection == Connection::Data)];
        if !link.open[0] || !link.open[1] || pipe.cut {
            return;
        }
        if let Message::Beat(_) = message {
            // One in flight at a time: the newer replaces the older.
            pipe.queue.retain(|message| !matches!(message, Message::Beat(_)));
        }
        pipe.queue.push(message);
    }

    pub(crate) fn close(&mut self, host: usize) {
        if !self.attached(host) {
            return;
        }
        for connection in [Connection::Control, Connection::Data] {
            self.send(host, connection, Message::Eof);
        }
        let Some(link) = &mut self.link else { return };
        link.open[host] = false;
        for pipe in &mut link.pipes[1 - host] {
            pipe.queue.clear();
        }
        if link.open == [false; 2] {
            self.link = None;
        }
    }

    pub(crate) fn deliver(&mut self, bounds: &Bounds, from: usize, connection: Connection) {
        let link = self.link.as_mut().expect("there is a message");
        let message = link.pipes[from][usize::from(connection == Connection::Data)]
            .queue
            .remove(0);
        if link.primary == from {
            self.secondary_reads(bounds, 1 - from, connection, message);
        } else {
            self.primary_reads(bounds, 1 - from, message);
        }
    }

    fn primary_reads(&mut self, bounds: &Bounds, host: usize, message: Message) {
        match message {
            Message::Beat(echoed) => {
                if let Process::Primary { age, .. } = &mut self.hosts[host].process {
                    *age = echoed.min(*age);
                }
            }
            Message::Goodbye => self.tell(bounds, host, Instant(0), Event::Goodbye),
            Message::Eof => {
                self.close(host);
                self.tell(bounds, host, Instant(0), Event::Lost);
            }
            Message::Begin(_) | Message::End(_) => unreachable!("a secondary sends neither"),
        }
    }

    fn secondary_reads(&mut self, bounds: &Bounds, host: usize, connection: Connection, message: Message) {
        let Process::Secondary { contest, silent } = &mut self.hosts[host].process else {
            return;
        };
        let standing = contest.standing();
        let generation = contest.generation();
        let draining = matches!(standing, Standing::Draining { .. });
        if message != Message::Eof && !draining {
            *silent = 0;
        }
        match message {
            // Not answered after the loss of a connection: the lease is to run out.
            Message::Beat(_) if draining => {}
            Message::Beat(age) => {
                if age <= bounds.lease {
                    self.send(host, Connection::Control, Message::Beat(age));
                }
            }
            Message::Begin(begun) if standing == Standing::Idle && begun > generation => {
                self.tell(bounds, host, Instant(0), Event::Begun(begun));
                self.hosts[host].current = false;
                self.store(host, begun, Role::Secondary, false, false);
            }
            Message::Begin(_) => self.misbehaved(bounds, host),
            Message::End(fresh) if standing == Standing::Syncing => {
                self.store(host, generation, Role::Secondary, true, fresh);
            }
            Message::End(_) => {}
            Message::Goodbye => self.leave(bounds, host),
            Message::Eof => self.closed(bounds, host, connection, true),
        }
    }

    pub(crate) fn closed(&mut self, bounds: &Bounds, host: usize, connection: Connection, ended: bool) {
        let event = Event::Closed {
            connection,
            ended,
            leased_until: LEASE_ENDS,
        };
        self.tell(bounds, host, Instant(0), event);
    }

    pub(crate) fn misbehaved(&mut self, bounds: &Bounds, host: usize) {
        let leased_until = LEASE_ENDS;
        self.tell(bounds, host, Instant(0), Event::Misbehaved { leased_until });
    }

    /// A secondary said or heard goodbye: it ends, and an image that is not complete stays so.
    pub(crate) fn leave(&mut self, bounds: &Bounds, host: usize) {
        let syncing = self.standing(host) == Some(Standing::Syncing);
        self.tell(bounds, host, Instant(0), Event::Goodbye);
        if self.standing(host) == Some(Standing::Leaving) {
            self.exit(host, Process::Waiting);
            if let Some(record) = &mut self.hosts[host].record
                && syncing
            {
                record.complete = false;
                self.hosts[host].current = false;
            }
        }
    }

    /// From now on nothing comes through from these hosts.
    pub(crate) fn cut(&mut self, from: [bool; 2]) {
        let pipes = self.link.iter_mut().flat_map(|link| link.pipes.iter_mut());
        for (pipes, cut) in pipes.zip(from) {
            if cut {
                pipes.fill(Pipe {
                    cut: true,
                    queue: Vec::new(),
                });
            }
        }
    }
}
