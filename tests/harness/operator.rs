//! The operator: starts hosts that have died or ended, as `tandem/src/role.rs` starts them.
//!
//! If the other host has the VM, or is about to, a host starts as its secondary. Otherwise the operator tries to start
//! it as primary; what refuses waits for the other as a secondary, and is tried again while nobody has the VM.

use checkpoint::failover::{self, Decision, KnownState};
use checkpoint::pair::RecordUpdate;
use checkpoint::{Epoch, Generation, Role as PairRole};
use primary::protocol::Start;
use storage::Image;
use storage::witness::Claim;

use crate::network::name;
use crate::node::Role;
use crate::toy_vm::ToyVm;
use crate::trace::Line;
use crate::world::{Happening, MILLISECOND, World};

pub(crate) const OPERATOR_LOOKS_EVERY: u64 = 100 * MILLISECOND;

impl World {
    /// The very first start of a pair: host 0 boots, host 1 waits.
    pub(crate) fn first_start(&mut self) {
        for node in 0..2 {
            self.nodes[node].start().expect("a disk without faults");
        }
        self.nodes[1].wait();
        self.boot(0, Generation(1), Epoch(0)).expect("a disk without faults");
    }

    pub(crate) fn operate(&mut self) {
        self.later(OPERATOR_LOOKS_EVERY, Happening::Operator);
        if !self.restarts {
            return;
        }
        let first = usize::from(self.random.one_in(2));
        for node in [first, 1 - first] {
            let host = &self.nodes[node];
            if host.off_until > self.now || host.frozen_until > self.now {
                continue;
            }
            let other_has_it = matches!(self.nodes[1 - node].role, Role::Primary(_) | Role::Secondary(_));
            match (&host.role, other_has_it) {
                (Role::Off, true) => self.start_waiting(node),
                (Role::Off | Role::Waiting, false) => {
                    if let Err(refusal) = self.try_primary(node) {
                        self.note(Line::Note(format!("host {node} does not start as primary: {refusal}")));
                        self.start_waiting(node);
                    }
                }
                _ => {}
            }
        }
    }

    fn start_waiting(&mut self, node: usize) {
        match self.nodes[node].start() {
            Ok(()) => {
                self.rests(node);
                self.note(Line::Note(format!("host {node} starts and waits for a primary")));
                self.nodes[node].wait();
            }
            Err(error) => self.note(Line::Note(format!("host {node} does not start: {error}"))),
        }
    }

    /// It has read what is beside its image.
    pub(crate) fn rests(&self, node: usize) {
        let host = &self.nodes[node];
        if let Some(tag) = host.held().disk.filter(|_| host.is_sure()) {
            self.checkers.rests(tag, &host.disk_sample(tag.epoch));
        }
    }

    /// A start without a peer is a contest.
    fn try_primary(&mut self, node: usize) -> Result<(), String> {
        self.nodes[node].start()?;
        self.rests(node);
        let record = self.nodes[node].record;
        let known = record.map(|record| KnownState {
            generation: record.generation,
            role: record.role,
            complete: record.complete,
        });
        let latest = self.latest_term(node).ok_or("the witness does not answer")?;
        let latest = latest.map(|(term, owner)| (term, name(owner)));
        let term = match failover::start_decision(known, latest, &name(node)) {
            Decision::Start { term } => term,
            Decision::Refuse(reason) => return Err(reason.to_string()),
        };
        let flushed = self.nodes[node].flush_image();
        flushed.map_err(|error| format!("the disk image can't be flushed: {error}"))?;
        match self.claim_now(node, term) {
            Some(Claim::Won) => {}
            Some(Claim::LostTo(owner)) => return Err(format!("{owner} won term {term} a moment ago")),
            None => return Err("the witness does not answer".to_owned()),
        }
        self.boot(node, term, record.map_or(Epoch(0), |record| record.committed))
    }

    fn boot(&mut self, node: usize, generation: Generation, last_epoch: Epoch) -> Result<(), String> {
        if self.nodes[node].record.is_none() && self.first_starts_cut > 0 {
            self.first_starts_cut -= 1;
            let operations = self.random.below(2);
            self.note(Line::Note(format!(
                "host {node} is about to lose power in its first start"
            )));
            self.nodes[node].disk.cut_power_after(operations);
            self.nodes[node].doomed = true;
        }
        self.nodes[node].store(RecordUpdate {
            generation,
            role: PairRole::Primary,
            committed: last_epoch,
            complete: true,
            clean: false,
        })?;
        assert!(
            self.current.is_none_or(|current| current == node),
            "rule 4: host {node} boots the VM, and what was flushed is on the other's disk"
        );
        let host = &mut self.nodes[node];
        let mut disk = vec![0; usize::try_from(host.image.size()).expect("small")];
        host.image.read_at(0, &mut disk).map_err(|error| error.to_string())?;
        host.vm = ToyVm::boot(&disk, self.random.draw());
        self.note(Line::Note(format!("host {node} boots the VM as owner of {generation}")));
        let sure = self.nodes[node].is_sure();
        if core::mem::replace(&mut self.booted, true) {
            self.vm_rebooted(sure && self.current == Some(node));
        }
        self.current = sure.then_some(node);
        self.start_primary(node, Start::Boot { generation, last_epoch });
        Ok(())
    }
}
