//! Flows that the two guests have opened to the same destination from different ports.
//!
//! A guest that opens a connection, or asks a name server, takes a port of its own choice. If the two choose differently
//! neither flow will ever find its equal. Both are told from flows on which one side is only late by there being one on each
//! side: after the reorder window that is a difference, and nobody waits for the bound.
//!
//! Part of the comparator; knows one epoch at a time. What does not fit into its bounds is found by the bound on waiting.

use std::collections::{BTreeMap, VecDeque};

use checkpoint::mutants::{self, Mutant};
use checkpoint::{Instant, Role};

use crate::comparator::Comparator;
use crate::flow::{Class, FlowKey};
use crate::lane::Lane;
use crate::table::{FlowId, FlowTable};
use crate::verdict::{Difference, Fact, Reason};

/// Openings of one epoch that are looked through.
const OPENINGS_MAX: usize = 1_024;

/// What one side alone has opened, by where to.
#[derive(Debug, Default)]
pub(crate) struct Crossings {
    openings: BTreeMap<FlowKey, Vec<Opening>>,
    count: usize,
    /// Since when there is one of either side to the same destination, oldest first; entries may be outdated.
    crossed: VecDeque<(Instant, FlowId)>,
}

#[derive(Clone, Copy, Debug)]
struct Opening {
    id: FlowId,
    side: Role,
    since: Instant,
}

impl Crossings {
    /// Takes a flow that only this side has spoken on.
    fn add(&mut self, now: Instant, id: FlowId, side: Role, flows: &FlowTable<Lane>) {
        if self.count == OPENINGS_MAX {
            self.openings.retain(|_, openings| {
                openings.retain(|opening| opening.is_alone(flows));
                !openings.is_empty()
            });
            self.count = self.openings.values().map(Vec::len).sum();
            if self.count == OPENINGS_MAX {
                return;
            }
        }
        let Some(lane) = flows.get(id) else { return };
        let openings = self.openings.entry(destination(lane.key())).or_default();
        if openings.iter().any(|other| other.side != side && other.is_alone(flows)) {
            self.crossed.push_back((now, id));
        }
        let since = now;
        openings.push(Opening { id, side, since });
        self.count += 1;
    }

    /// Returns since when the oldest two wait.
    pub(crate) fn oldest(&self) -> Option<Instant> {
        self.crossed.front().map(|(since, _)| *since)
    }

    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Takes out the oldest two that have waited since `until`; returns the primary's flow and the difference.
    fn take(&mut self, until: Instant, flows: &FlowTable<Lane>) -> Option<(FlowKey, Reason)> {
        while self.crossed.front().is_some_and(|(since, _)| *since <= until) {
            let (_, id) = self.crossed.pop_front()?;
            let Some(key) = flows.get(id).map(Lane::key) else {
                continue;
            };
            let openings = self.openings.get(&destination(key)).into_iter().flatten();
            let mut alone = openings.filter(|opening| opening.since <= until && opening.is_alone(flows));
            let Some(own) = alone.clone().find(|opening| opening.id == id) else {
                continue;
            };
            let Some(other) = alone.find(|opening| opening.side != own.side) else {
                continue;
            };
            let Some(other_key) = flows.get(other.id).map(Lane::key) else {
                continue;
            };
            let (primary, secondary) = match own.side {
                Role::Primary => (key, other_key),
                Role::Secondary => (other_key, key),
            };
            let port = |key: &FlowKey| key.source.port.to_be_bytes().to_vec();
            let difference = Difference {
                fact: Fact::Port,
                offset: 0,
                primary: port(&primary),
                secondary: port(&secondary),
            };
            return Some((primary, Reason::Mismatch(difference)));
        }
        None
    }
}

impl Opening {
    fn is_alone(&self, flows: &FlowTable<Lane>) -> bool {
        flows.get(self.id).is_some_and(|lane| lane.speaks_alone(self.side))
    }
}

impl Comparator {
    /// Notes that this side has spoken on a flow on which the other has not, if it is a new one.
    pub(crate) fn note_opening(&mut self, now: Instant, id: FlowId, side: Role) {
        let Some(lane) = self.flows.get_mut(id) else { return };
        if lane.noted || !lane.speaks_alone(side) || mutants::on(Mutant::WaitForAnotherPort) {
            return;
        }
        lane.noted = true;
        self.crossings.add(now, id, side, &self.flows);
    }

    /// Returns the flow of the primary that the secondary's guest has opened from another port.
    pub(crate) fn crossed_at(&mut self, now: Instant) -> Option<(Option<FlowKey>, Reason)> {
        let until = now - self.limits.reorder;
        let (key, reason) = self.crossings.take(until, &self.flows)?;
        Some((Some(key), reason))
    }
}

/// Returns where a flow leads, whatever port it comes from.
fn destination(mut key: FlowKey) -> FlowKey {
    key.source.port = 0;
    key
}

/// Says whether flows of this kind come from ports of the guest's choice.
pub(crate) fn has_ports(class: Class) -> bool {
    matches!(class, Class::Tcp | Class::Udp)
}
