//! One side's part in the contest for the right to run: who may run, from when on, and what may leave.
//!
//! ```text
//!   the primary                                       the secondary
//!   Alone ◄──────────────┐                            Idle ──Begun──► Syncing ──Committed──► Following
//!     │ Connected        │ lost, or it said goodbye     │ lost           │ lost               │      │
//!   Pairing ──won────────┤                              ▼                ▼     a connection   │      │ it broke
//!     │ recorded         │                            Over (unpaired)          ended          ▼      ▼ the protocol
//!   Leading, not         │                                                          Draining ──► Severed
//!     │ entitled ────────┘                                     ended by its kernel, and read  │      │
//!     │ CheckpointSent                                         to the end; or its lease over  │      │
//!   Leading, entitled ── lost ──► Contending ◄────────────────────────────────────────────────┴──────┘
//!                                   │  │ won
//!               Over (fenced) ◄─lost┘  └──► won, being recorded ──recorded──► Alone
//! ```
//!
//! The rules that this machine keeps:
//! - a side that may be replaced lets output leave only within its lease, and one that contends none at all;
//! - only a side that holds a complete state of its generation contends, for the next term and no other;
//! - a side runs in a generation only after the witness gave it the term and its record of that is durable;
//! - no answer is neither won nor lost: the claim is repeated until there is one;
//! - a secondary contends only when its primary can't release any more: its kernel ended a connection, or its lease is over;
//! - a side that said goodbye, or heard it, never contends: the other goes on without asking.
//!
//! Driven by the protocols of both roles, and by the model checker in `tests/contest_model.rs`. Never reads a clock: it
//! compares the instants that it is given, nothing else.

use crate::epoch::Generation;
use crate::mutants::{self, Mutant};
use crate::pair::WitnessAnswer;
use crate::time::{Duration, Instant};

/// Time between two claims of a term that the witness did not answer.
const CLAIM_RETRY: Duration = Duration::from_millis(100);

/// The state machine.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Contest {
    /// Whether a witness is configured.
    witness: bool,
    generation: Generation,
    standing: Standing,
    /// The operator has been told of this outage of the witness.
    alarmed: bool,
}

/// Where a side stands in the contest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Standing {
    /// It owns its generation, runs, and nobody follows it.
    Alone,
    /// It owns its generation and runs; with the peer that has come it will be in the next.
    Pairing(Claim),
    /// It owns its generation and runs; its peer is being synced, or follows.
    Leading {
        /// The peer may hold a complete state of this generation, so it may contend.
        peer_entitled: bool,
    },
    /// It has accepted a primary, which has not begun a sync.
    Idle,
    /// It receives its first complete state of the generation.
    Syncing,
    /// It holds a complete state of the generation.
    Following,
    /// A connection is gone. What the primary had sent is still read; it may hold a lease until then.
    Draining {
        /// When no lease can be in use any more.
        until: Instant,
        /// A connection was ended by the primary's kernel: no lease is in use.
        ended: bool,
        /// Whether the control and the data connection may still bring something.
        open: [bool; 2],
    },
    /// The primary broke the protocol: nothing more of it is taken. It may hold a lease until then.
    Severed {
        /// When no lease can be in use any more.
        until: Instant,
    },
    /// The peer is lost, this side holds a complete state: whoever gets the next term goes on.
    Contending(Claim),
    /// One of the two said goodbye: this side never contends in this run.
    Leaving,
    /// The contest is lost: this side never runs or contends again in this run, which ends.
    Fenced,
    /// This run has ended.
    Over,
}

/// How far a term's claim has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Claim {
    /// The witness or the operator has not answered.
    Open {
        /// When to claim again; `None` while an answer is outstanding.
        retry: Option<Instant>,
    },
    /// The term is this side's; the record of that is being written.
    Won,
}

/// What kind of a pair's connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Connection {
    /// Heartbeats and goodbyes.
    Control,
    /// Everything else but pages.
    Data,
    /// A page stream. What has not come of it is part of no complete checkpoint: nobody waits for its end.
    Pages,
}

/// Something happened.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// The witness answered a claim of that term.
    Answered(Generation, WitnessAnswer),
    /// To a secondary: its primary, which owns that generation, began a sync.
    Begun(Generation),
    /// To a primary: the end mark of a checkpoint is about to be sent.
    CheckpointSent,
    /// To a secondary: a connection is gone.
    Closed {
        /// Which.
        connection: Connection,
        /// The primary's kernel ended it.
        ended: bool,
        /// When no lease of the primary can be in use any more.
        leased_until: Instant,
    },
    /// To a secondary: the first checkpoint is complete, and the record of that durable.
    Committed,
    /// To a primary: a secondary accepted the handshake.
    Connected,
    /// One of the two said goodbye.
    Goodbye,
    /// The peer is silent for the takeover limit. To a primary also: its connections are gone, or it broke the protocol.
    Lost,
    /// To a secondary: its primary broke the protocol.
    Misbehaved {
        /// When no lease of the primary can be in use any more.
        leased_until: Instant,
    },
    /// The record of this side as primary of that generation is durable.
    Recorded(Generation),
    /// To a secondary: the operator says that the old primary is off for good.
    TakeOverAsked,
    /// The deadline has passed.
    Timeout,
}

/// Something is to be done, in this order.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Order {
    /// Tell the operator that the witness does not answer, and why.
    Alarm(String),
    /// Tell the operator that the takeover waits for them.
    AskOperator,
    /// Ask the witness for this term; answered by `Answered`.
    Claim(Generation),
    /// End the run: the other side owns the VM.
    Fence {
        /// Who.
        owner: String,
        /// Since which term.
        term: Generation,
    },
    /// End the run: there was never a complete state here.
    GiveUp,
    /// The peer counts as lost: close its connections.
    Lose,
    /// Begin the sync of the peer: the term of this pairing is won and recorded.
    Pair,
    /// Write the record of this side as primary of this generation, durably; answered by `Recorded`.
    Record(Generation),
    /// Run the VM, and let its output leave.
    Run,
    /// Close the connections and take nothing more from them.
    Sever,
    /// Stop the VM. Nothing leaves from now on.
    Stop,
}

impl Contest {
    /// Makes the part of a side that owns this generation and runs.
    #[must_use]
    pub fn owner(witness: bool, generation: Generation) -> Self {
        Self::new(witness, generation, Standing::Alone)
    }

    /// Makes the part of a side that has accepted a primary. `generation` is that of its record.
    #[must_use]
    pub fn follower(witness: bool, generation: Generation) -> Self {
        Self::new(witness, generation, Standing::Idle)
    }

    fn new(witness: bool, generation: Generation, standing: Standing) -> Self {
        Self {
            witness,
            generation,
            standing,
            alarmed: false,
        }
    }

    /// Takes one event and appends what is to be done.
    pub fn step(&mut self, now: Instant, event: Event, orders: &mut Vec<Order>) {
        match event {
            Event::Answered(term, answer) => self.answered(now, term, answer, orders),
            Event::Begun(generation) if self.standing == Standing::Idle => {
                self.generation = generation;
                self.standing = Standing::Syncing;
            }
            Event::Committed if self.standing == Standing::Syncing => self.standing = Standing::Following,
            Event::CheckpointSent => {
                if let Standing::Leading { peer_entitled } = &mut self.standing {
                    *peer_entitled = true;
                }
            }
            Event::Closed {
                connection,
                ended,
                leased_until,
            } => self.closed(connection, ended, leased_until, orders),
            Event::Connected if self.standing == Standing::Alone => self.pair(orders),
            Event::Goodbye => self.goodbye(orders),
            Event::Lost => self.lost(orders),
            Event::Misbehaved { leased_until } => self.misbehaved(leased_until, orders),
            Event::Recorded(generation) if generation == self.generation => self.recorded(orders),
            Event::TakeOverAsked if !self.witness => self.take_over(orders),
            Event::Timeout => self.timeout(now, orders),
            Event::Begun(_) | Event::Committed | Event::Connected | Event::Recorded(_) | Event::TakeOverAsked => {}
        }
    }

    /// Ends the run: nothing follows.
    pub fn end(&mut self) {
        self.standing = Standing::Over;
    }

    /// Returns when to call `step` with `Event::Timeout`.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        match self.standing {
            Standing::Draining { until, .. } | Standing::Severed { until } => Some(until),
            Standing::Contending(Claim::Open { retry }) => retry,
            _ => None,
        }
    }

    /// Returns until when output may leave, if that is bounded; nothing leaves at the beginning of time or after it.
    /// `leased_until` is what the peer's signs of life permit.
    #[must_use]
    pub fn release_until(&self, leased_until: Instant) -> Option<Instant> {
        match self.standing {
            Standing::Alone | Standing::Pairing(_) | Standing::Leading { peer_entitled: false } => None,
            Standing::Leading { peer_entitled: true } if mutants::on(Mutant::IgnoreLease) => None,
            Standing::Leading { peer_entitled: true } => Some(leased_until),
            _ => Some(Instant(0)),
        }
    }

    /// Returns where this side stands.
    #[must_use]
    pub fn standing(&self) -> Standing {
        self.standing
    }

    /// Returns the generation that this side runs in, or holds a state of.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// The only term that this side ever claims.
    fn next_term(&self) -> Generation {
        if mutants::on(Mutant::ClaimOwnTerm) {
            return self.generation;
        }
        self.generation.next()
    }

    fn pair(&mut self, orders: &mut Vec<Order>) {
        self.standing = Standing::Pairing(Claim::Open { retry: None });
        if self.witness {
            orders.push(Order::Claim(self.next_term()));
        } else {
            self.won(orders);
        }
    }

    fn goodbye(&mut self, orders: &mut Vec<Order>) {
        match self.standing {
            // It has promised never to run what it holds: there is nobody to contend with.
            Standing::Pairing(_) | Standing::Leading { .. } => self.go_alone(orders),
            Standing::Idle | Standing::Syncing | Standing::Following | Standing::Draining { .. }
                if !mutants::on(Mutant::ContendAfterGoodbye) =>
            {
                self.standing = Standing::Leaving;
            }
            _ => {}
        }
    }

    fn lost(&mut self, orders: &mut Vec<Order>) {
        match self.standing {
            Standing::Pairing(_) | Standing::Leading { peer_entitled: false } => self.go_alone(orders),
            Standing::Leading { peer_entitled: true } => {
                self.contend(orders);
                if self.witness && !mutants::on(Mutant::GoAloneUnasked) {
                    orders.push(Order::Claim(self.next_term()));
                } else {
                    self.won(orders);
                }
            }
            Standing::Idle | Standing::Syncing if !mutants::on(Mutant::ContendIncomplete) => orders.push(Order::GiveUp),
            Standing::Idle
            | Standing::Syncing
            | Standing::Following
            | Standing::Draining { .. }
            | Standing::Severed { .. } => {
                self.contend(orders);
                orders.push(if self.witness {
                    Order::Claim(self.next_term())
                } else {
                    Order::AskOperator
                });
            }
            Standing::Alone | Standing::Contending(_) | Standing::Leaving | Standing::Fenced | Standing::Over => {}
        }
    }

    fn contend(&mut self, orders: &mut Vec<Order>) {
        self.standing = Standing::Contending(Claim::Open { retry: None });
        orders.push(Order::Lose);
        orders.push(Order::Stop);
    }

    fn go_alone(&mut self, orders: &mut Vec<Order>) {
        self.standing = Standing::Alone;
        orders.push(Order::Lose);
        orders.push(Order::Run);
    }

    fn closed(&mut self, connection: Connection, ended: bool, leased_until: Instant, orders: &mut Vec<Order>) {
        let (until, before, mut open) = match self.standing {
            // A goodbye may still come on the control connection, whose end follows. After a broken one it may not.
            Standing::Idle | Standing::Syncing if ended && connection != Connection::Control => return,
            Standing::Idle | Standing::Syncing => return self.lost(orders),
            Standing::Following => (leased_until, false, [true; 2]),
            Standing::Draining { until, ended, open } => (until, ended, open),
            _ => return,
        };
        let ended = ended || before || mutants::on(Mutant::ContendWithinLease);
        match connection {
            Connection::Control => open[0] = false,
            Connection::Data => open[1] = false,
            Connection::Pages => {}
        }
        self.standing = Standing::Draining { until, ended, open };
        if ended && open == [false; 2] {
            self.lost(orders);
        }
    }

    fn misbehaved(&mut self, leased_until: Instant, orders: &mut Vec<Order>) {
        let until = match self.standing {
            Standing::Following => leased_until,
            Standing::Draining {
                until, ended: false, ..
            } => until,
            _ => return self.lost(orders),
        };
        self.standing = Standing::Severed { until };
        orders.push(Order::Sever);
    }

    fn take_over(&mut self, orders: &mut Vec<Order>) {
        if let Standing::Draining { .. } | Standing::Severed { .. } = self.standing {
            self.lost(orders);
        }
        if let Standing::Contending(Claim::Open { .. }) = self.standing {
            self.won(orders);
        }
    }

    fn timeout(&mut self, now: Instant, orders: &mut Vec<Order>) {
        match self.standing {
            Standing::Draining { until, .. } | Standing::Severed { until } if until <= now => self.lost(orders),
            Standing::Contending(Claim::Open { retry: Some(retry) }) if retry <= now => {
                self.standing = Standing::Contending(Claim::Open { retry: None });
                orders.push(Order::Claim(self.next_term()));
            }
            _ => {}
        }
    }

    fn answered(&mut self, now: Instant, term: Generation, answer: WitnessAnswer, orders: &mut Vec<Order>) {
        let old = term <= self.generation && !mutants::on(Mutant::AcceptOldAnswer);
        if matches!(self.standing, Standing::Fenced | Standing::Over) || old {
            return;
        }
        let answer = match answer {
            WitnessAnswer::LostTo(_) if mutants::on(Mutant::RunAfterLosing) => WitnessAnswer::Won,
            answer => answer,
        };
        if !matches!(answer, WitnessAnswer::Unreachable(_)) {
            self.alarmed = false;
        }
        let answer = match answer {
            WitnessAnswer::Unreachable(_) if mutants::on(Mutant::UnreachableIsWon) => WitnessAnswer::Won,
            answer => answer,
        };
        match answer {
            // Whatever this side has come to meanwhile: the VM is the other's.
            WitnessAnswer::LostTo(owner) => {
                self.standing = Standing::Fenced;
                orders.push(Order::Fence { owner, term });
            }
            WitnessAnswer::Won => match self.standing {
                Standing::Pairing(Claim::Open { .. }) | Standing::Contending(Claim::Open { .. }) => self.won(orders),
                // A pairing that ended before the witness answered: the next claim is for the same term, and is won again.
                _ => {}
            },
            WitnessAnswer::Unreachable(cause) => self.unreachable(now, cause, orders),
        }
    }

    fn unreachable(&mut self, now: Instant, cause: String, orders: &mut Vec<Order>) {
        let claiming = matches!(
            self.standing,
            Standing::Pairing(Claim::Open { .. }) | Standing::Contending(Claim::Open { .. })
        );
        // Once in each outage: the claim is repeated many times.
        if claiming && !core::mem::replace(&mut self.alarmed, true) {
            orders.push(Order::Alarm(cause));
        }
        match self.standing {
            Standing::Pairing(Claim::Open { .. }) => self.go_alone(orders),
            Standing::Contending(Claim::Open { .. }) => {
                let retry = (!mutants::on(Mutant::ClaimOnce)).then_some(now + CLAIM_RETRY);
                self.standing = Standing::Contending(Claim::Open { retry });
            }
            _ => {}
        }
    }

    fn won(&mut self, orders: &mut Vec<Order>) {
        self.generation = self.generation.next();
        self.standing = match self.standing {
            Standing::Pairing(_) => Standing::Pairing(Claim::Won),
            _ => Standing::Contending(Claim::Won),
        };
        orders.push(Order::Record(self.generation));
        if mutants::on(Mutant::RunBeforeRecord) {
            self.recorded(orders);
        }
    }

    fn recorded(&mut self, orders: &mut Vec<Order>) {
        match self.standing {
            Standing::Pairing(Claim::Won) => {
                self.standing = Standing::Leading { peer_entitled: false };
                orders.push(Order::Pair);
            }
            Standing::Contending(Claim::Won) => {
                self.standing = Standing::Alone;
                orders.push(Order::Run);
            }
            _ => {}
        }
    }
}
