//! What can go wrong in the world, and where it did: a count by fault and state of both sides.

use std::collections::BTreeMap;
use std::fmt;

use crate::node::Role;
use crate::random::Random;
use crate::trace::Line;
use crate::world::{Happening, MILLISECOND, World};

/// What a fault does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Both connections break for both hosts, not at the same moment; what is under way is lost in part.
    CloseLink,
    /// Nothing passes any more, and nobody is told.
    CutLink,
    /// Nothing more reaches this host from the other, and nobody is told.
    CutTo(usize),
    /// The host executes nothing for so many milliseconds.
    Freeze(usize, u64),
    /// The process dies; its kernel ends its connections.
    Kill(usize),
    /// The host loses power: nobody ends its connections, and what its disk had not flushed is lost.
    PowerLoss(usize),
    /// Nothing passes for so many milliseconds; then everything, in order.
    Stall(u64),
    /// The witness answers nobody for so many milliseconds.
    WitnessDown(u64),
}

impl Fault {
    /// Returns its kind.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::CloseLink => "close link",
            Self::CutLink => "cut link",
            Self::CutTo(_) => "cut one way",
            Self::Freeze(..) => "freeze",
            Self::Kill(_) => "kill",
            Self::PowerLoss(_) => "power loss",
            Self::Stall(_) => "stall",
            Self::WitnessDown(_) => "witness down",
        }
    }

    /// Chooses a fault.
    #[must_use]
    pub fn random(random: &mut Random) -> Self {
        let node = usize::from(random.one_in(2));
        match random.below(10) {
            0 => Self::CloseLink,
            1 => Self::CutLink,
            2 => Self::CutTo(node),
            3 | 4 => Self::Freeze(node, 50 + random.below(900)),
            5 | 6 => Self::Kill(node),
            7 => Self::PowerLoss(node),
            8 => Self::Stall(20 + random.below(500)),
            _ => Self::WitnessDown(100 + random.below(2_000)),
        }
    }
}

/// How often which fault met which states.
#[derive(Clone, Debug, Default)]
pub struct Coverage(BTreeMap<(&'static str, &'static str), BTreeMap<&'static str, u64>>);

impl Coverage {
    /// Notes a fault, and the states of the primary and of the other side when it came.
    pub fn note(&mut self, fault: Fault, states: [&'static str; 2]) {
        *self
            .0
            .entry((states[0], states[1]))
            .or_default()
            .entry(fault.name())
            .or_default() += 1;
    }

    /// Adds another count.
    pub fn add(&mut self, other: &Self) {
        for (states, faults) in &other.0 {
            for (fault, count) in faults {
                *self.0.entry(*states).or_default().entry(*fault).or_default() += count;
            }
        }
    }

    /// Tells whether this fault met a primary in this state.
    #[must_use]
    pub fn has(&self, fault: &str, primary: &str) -> bool {
        self.0
            .iter()
            .any(|((state, _), faults)| *state == primary && faults.contains_key(fault))
    }
}

impl fmt::Display for Coverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<14} {:<12} faults", "primary", "other side")?;
        for ((primary, other), faults) in &self.0 {
            let counts: Vec<_> = faults.iter().map(|(fault, count)| format!("{fault} {count}")).collect();
            writeln!(f, "{primary:<14} {other:<12} {}", counts.join(", "))?;
        }
        Ok(())
    }
}

impl World {
    /// Lets a fault happen now.
    pub fn fault(&mut self, fault: Fault) {
        let first = usize::from(!matches!(self.nodes[0].role, Role::Primary(_)));
        let states = [self.phase(first), self.phase(1 - first)];
        self.note(Line::Note(format!("FAULT {fault:?} at {} / {}", states[0], states[1])));
        if !self.survivable(fault) {
            return;
        }
        self.faults += 1;
        self.coverage.note(fault, states);
        let link = self.nodes[0].link.or(self.nodes[1].link);
        match (fault, link) {
            (Fault::CloseLink, Some(link)) => self.break_link(link),
            (Fault::CutLink, Some(link)) => self.links[link].cut = [true; 2],
            (Fault::CutTo(node), Some(link)) => self.links[link].cut[node] = true,
            (Fault::Stall(milliseconds), Some(link)) => self.stall(link, self.now + milliseconds * MILLISECOND),
            (Fault::CloseLink | Fault::CutLink | Fault::CutTo(_) | Fault::Stall(_), None) => {}
            (Fault::Freeze(node, milliseconds), _) => {
                self.nodes[node].frozen_until = self.now + milliseconds * MILLISECOND;
                self.nodes[node].deadline_first = self.random.one_in(2);
            }
            (Fault::Kill(node), _) => {
                self.close(node);
                self.dies(node);
            }
            (Fault::PowerLoss(node), _) => {
                if let Some(link) = self.nodes[node].link {
                    self.links[link].cut = [true; 2];
                }
                self.nodes[node].disk.power_cycle();
                self.dies(node);
            }
            (Fault::WitnessDown(milliseconds), _) => self.witness_down_until = self.now + milliseconds * MILLISECOND,
        }
    }

    fn dies(&mut self, node: usize) {
        self.nodes[node].die();
        if self.restarts {
            let life = self.nodes[node].life;
            self.later(800 * MILLISECOND, Happening::Restart(node, life));
        }
    }

    /// The world never loses the VM itself: a host dies only if the other has it too, or will have.
    fn survivable(&self, fault: Fault) -> bool {
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
