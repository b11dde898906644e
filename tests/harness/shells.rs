//! The two roles' shells in the world: they carry out what the protocols order, and decide nothing.

use bytes::Bytes;
use checkpoint::limits::PAGE_BYTES;
use checkpoint::pair::{Delivery, Report};
use checkpoint::wire::{Begin, Message};
use checkpoint::{Duration, Instant, Nic, Role as PairRole};
use primary::event::{Action as PrimaryAction, Event as PrimaryEvent, Outcome as PrimaryOutcome};
use primary::protocol::pace::Budget;
use primary::protocol::{Options as PrimaryOptions, Patience, Primary, Start};
use proxy::FlowPatience;
use secondary::event::{Action as SecondaryAction, Event as SecondaryEvent, LinkEnd, Outcome as SecondaryOutcome};

use crate::checkers::Checkers;
use crate::disk::DiskOrder;
use crate::network::Channel;
use crate::node::Role;
use crate::toy_vm::{DISK_BYTES, PAGES};
use crate::trace::{Line, brief};
use crate::world::{Happening, MILLISECOND, TAKEOVER_LIMIT, VmOrder, World};

/// The hardware addresses of the VM's network cards.
const MACS: [[u8; 6]; 2] = [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 1, 1]];

impl World {
    // The primary's shell.

    pub(crate) fn start_primary(&mut self, node: usize, start: Start) {
        let options = PrimaryOptions {
            mode: self.mode,
            checkpoint_every: self.checkpoint_every,
            // A world lives for seconds.
            patience: Patience {
                window: Duration::from_millis(30),
                backoff_min: Duration::from_millis(60),
                backoff_max: Duration::from_millis(1_000),
                cost: 5,
                waiting: 5,
                flow: FlowPatience {
                    service_strikes: 2,
                    service_row: Duration::from_millis(1_000),
                    strikes: 1,
                    row: Duration::from_millis(1_000),
                    backoff_min: Duration::from_millis(100),
                    backoff_max: Duration::from_millis(1_000),
                },
            },
            resume: self.resume,
            witness: self.has_witness,
            takeover_limit: TAKEOVER_LIMIT,
            epoch_age_max: Duration::from_millis(1_000),
            unmatched_max: Duration::from_millis(200),
            ahead: Some(Budget {
                every: Duration::from_millis(15),
                seldom: Duration::from_millis(60),
                few_pages: 2,
                ..Budget::default()
            }),
            pause_budget: self.pause_budget,
            room: self.room,
            memory_bytes: PAGES * PAGE_BYTES as u64,
            disk_bytes: DISK_BYTES,
            macs: MACS[..self.cards].to_vec(),
            flow_secret: 0,
        };
        self.nodes[node].output_held = false;
        let mut actions = Vec::new();
        let primary = Primary::new(options, start, self.nodes[node].clock(self.now), &mut actions);
        self.nodes[node].role = Role::Primary(Box::new(primary));
        self.act_primary(node, actions);
    }

    pub(crate) fn step_primary(&mut self, node: usize, event: PrimaryEvent) {
        let mut actions = core::mem::take(&mut self.primary_actions);
        let now = self.nodes[node].clock(self.now);
        let Role::Primary(primary) = &mut self.nodes[node].role else {
            return;
        };
        let quiet = matches!(
            event,
            PrimaryEvent::Timeout | PrimaryEvent::PeerSent(Message::Heartbeat(_))
        );
        let line = (!quiet).then(|| Line::Primary(node, primary.tag(), event.clone()));
        let before = primary.tag().epoch;
        primary.step(now, event, &mut actions);
        Checkers::goes_on(before, primary.tag().epoch);
        if matches!(primary.state_name(), "protected" | "checkpointing") {
            self.checkers.mode(primary.tag(), primary.epoch_mode());
        }
        line.into_iter().for_each(|line| self.note(line));
        self.act_primary(node, actions);
    }

    fn act_primary(&mut self, node: usize, mut actions: Vec<PrimaryAction>) {
        let life = self.nodes[node].life;
        for action in actions.drain(..) {
            match action {
                PrimaryAction::Alike(matches) => self.order(node, VmOrder::Alike(matches)),
                PrimaryAction::AskAlike(tag) => self.order(node, VmOrder::Ask(tag)),
                PrimaryAction::Claim(term) => self.claim(node, term),
                PrimaryAction::CloseLink => self.close(node),
                PrimaryAction::CompareBlocks(hashes) => self.disk_order(node, DiskOrder::Compare(hashes)),
                PrimaryAction::Deliver(delivery) => self.deliver(node, delivery),
                PrimaryAction::Dial => self.later(20 * MILLISECOND, Happening::Dial(node, life)),
                PrimaryAction::End(outcome) => return self.primary_ended(node, &outcome),
                PrimaryAction::HoldInput(hold) => self.nodes[node].input_held = hold,
                PrimaryAction::Reseed | PrimaryAction::SeedEntropy(_) => {}
                PrimaryAction::Report(report) => self.report(node, &report),
                PrimaryAction::KeepDirty => self.order(node, VmOrder::KeepDirty),
                PrimaryAction::PauseVm => self.order(node, VmOrder::Pause),
                PrimaryAction::ResumeVm => self.order(node, VmOrder::Resume),
                PrimaryAction::Send(message) => self.send(node, Channel::Data, message),
                PrimaryAction::SendCheckpoint {
                    tag,
                    blocks,
                    totals,
                    both_ran,
                } => {
                    let snapshot = self.nodes[node].snapshot(tag.epoch);
                    self.checkers.stopped(tag, snapshot);
                    self.order(node, VmOrder::Ship(totals, blocks, both_ran));
                }
                PrimaryAction::ShipAhead { tag, pages } => self.order(node, VmOrder::ShipAhead(tag, pages)),
                PrimaryAction::SendBlocks { tag, blocks } => self.disk_order(node, DiskOrder::Send { tag, blocks }),
                PrimaryAction::SendControl(message) => self.send(node, Channel::Control, message),
                PrimaryAction::StoreRecord(record) => self.disk_order(node, DiskOrder::Store(record)),
                PrimaryAction::SyncMemory { totals, difference } => self.order(node, VmOrder::Sync(totals, difference)),
                PrimaryAction::Transmit { nic, frames, not_after } => self.transmit(node, nic, &frames, not_after),
            }
        }
        self.primary_actions = actions;
    }

    fn transmit(&mut self, node: usize, nic: Nic, frames: &[Bytes], not_after: Option<Instant>) {
        if not_after.is_some_and(|limit| self.nodes[node].clock(self.now) > limit) {
            self.checkers.late += frames.len() as u64;
            return self.note(Line::Note(format!(
                "host {node} drops {} frames that are late",
                frames.len()
            )));
        }
        let Role::Primary(primary) = &self.nodes[node].role else {
            return;
        };
        let paired = matches!(primary.state_name(), "protected" | "checkpointing");
        let generation = primary.tag().generation;
        let record = self.nodes[node]
            .record
            .filter(|record| record.role == PairRole::Primary);
        let recorded = record.map(|record| record.generation);
        for frame in frames {
            Checkers::leaves_by(nic, self.cards, frame);
            self.checkers.released(node, generation, recorded, paired, frame);
            self.frame_leaves(frame.clone());
        }
    }

    fn primary_ended(&mut self, node: usize, outcome: &PrimaryOutcome) {
        self.note(Line::Note(format!("host {node} ended as primary: {outcome:?}")));
        let name = match outcome {
            PrimaryOutcome::Ended(_) => "ended",
            PrimaryOutcome::Fenced(_) => "fenced",
            PrimaryOutcome::Failed(_) => "failed",
        };
        self.ended(node, name);
    }

    // The secondary's shell.

    pub(crate) fn step_secondary(&mut self, node: usize, event: SecondaryEvent) {
        let mut actions = core::mem::take(&mut self.secondary_actions);
        let now = self.nodes[node].clock(self.now);
        let Role::Secondary(secondary) = &mut self.nodes[node].role else {
            return;
        };
        let quiet = matches!(
            event,
            SecondaryEvent::Timeout | SecondaryEvent::PeerSent(Message::Heartbeat(_))
        );
        let line = (!quiet).then(|| Line::Secondary(node, secondary.tag(), event.clone()));
        if matches!(
            event,
            SecondaryEvent::StopAsked | SecondaryEvent::PeerSent(Message::Goodbye(_))
        ) {
            self.nodes[node].parted = Some(self.nodes[node].life);
        }
        secondary.step(now, event, &mut actions);
        if matches!(secondary.state_name(), "protected" | "checkpointing") {
            self.checkers.mode(secondary.tag(), secondary.epoch_mode());
        }
        line.into_iter().for_each(|line| self.note(line));
        self.act_secondary(node, actions);
    }

    fn act_secondary(&mut self, node: usize, mut actions: Vec<SecondaryAction>) {
        let life = self.nodes[node].life;
        for action in actions.drain(..) {
            match action {
                SecondaryAction::ApplyPages(stream, batch) => self.pages(node, stream, VmOrder::Apply(stream, batch)),
                SecondaryAction::ApplyWrite(write) => self.disk_order(node, DiskOrder::Apply(write)),
                SecondaryAction::BeginSync(Begin { tag, base }) => {
                    let hashes = base.disk.is_none();
                    self.disk_order(node, DiskOrder::BeginSync { tag, hashes });
                    self.order(node, VmOrder::BeginSync(base.memory.is_some()));
                }
                SecondaryAction::Check(tag) => {
                    let first = matches!(&self.nodes[node].role, Role::Secondary(secondary) if secondary.is_first());
                    self.disk_order(node, DiskOrder::Prepare { tag, first });
                }
                SecondaryAction::Claim(term) => {
                    assert_ne!(
                        self.nodes[node].parted,
                        Some(life),
                        "rule 2: host {node} contends for {term}, and has said goodbye or heard it"
                    );
                    self.claim(node, term);
                }
                SecondaryAction::CloseLink => self.close_secondary(node),
                SecondaryAction::Compare(hashes) => self.order(node, VmOrder::Compare(hashes)),
                SecondaryAction::CommitDisk(epoch) => {
                    let job = self.nodes[node].replica.as_mut().expect("a secondary").commit(epoch);
                    let snapshot = self.nodes[node].snapshot(epoch);
                    self.checkers.loaded(epoch, &snapshot);
                    if let Some(job) = job {
                        self.disk_order(node, DiskOrder::Run(job));
                    }
                }
                SecondaryAction::CountOwn(tag) => self.order(node, VmOrder::Count(tag)),
                SecondaryAction::Deliver(delivery) => self.deliver(node, delivery),
                SecondaryAction::DropDeliveries => self.nodes[node].inbox.clear(),
                SecondaryAction::DropStage => self.order(node, VmOrder::DropStage),
                SecondaryAction::End(outcome) => return self.secondary_ended(node, outcome),
                SecondaryAction::HoldOutput(hold) => {
                    self.nodes[node].output_held = hold;
                    if !hold {
                        self.ring_goes_on(node);
                    }
                }
                SecondaryAction::Load(tag) => self.order(node, VmOrder::Load(tag)),
                SecondaryAction::PauseVm => self.order(node, VmOrder::Pause),
                SecondaryAction::Report(report) => self.report(node, &report),
                SecondaryAction::SeedEntropy(_) => {}
                SecondaryAction::ResumeVm => self.order(node, VmOrder::Resume),
                SecondaryAction::Send(message) => {
                    if let Message::Acknowledge(tag) = &message {
                        self.checkers.acknowledge(*tag);
                    }
                    if let Message::Want(tag) = &message {
                        self.checkers.wants(*tag);
                    }
                    self.send(node, Channel::Data, message);
                }
                SecondaryAction::SendControl(message) => {
                    let renews = matches!(message, Message::Heartbeat(_));
                    assert!(
                        !renews || !matches!(self.phase(node), "draining" | "severed" | "claiming"),
                        "rule 2: host {node} renews the lease of a primary that it is about to succeed"
                    );
                    self.send(node, Channel::Control, message);
                }
                SecondaryAction::StageDevices(state) => self.order(node, VmOrder::StageDevices(state)),
                SecondaryAction::StagePages(stream, batch) => {
                    self.pages(node, stream, VmOrder::StagePages(stream, batch))
                }
                SecondaryAction::StageWrite(write) => {
                    let replica = self.nodes[node].replica.as_mut().expect("a secondary");
                    if let Err(error) = replica.stage(write.tag.epoch, write.offset, &write.written) {
                        let failed = SecondaryEvent::StageFailed(error.to_string());
                        self.later(0, Happening::SecondaryEvent(node, life, failed));
                    }
                }
                SecondaryAction::StoreRecord(record) => self.disk_order(node, DiskOrder::Store(record)),
            }
        }
        self.secondary_actions = actions;
    }

    /// A reader that is being stopped may still report an end that is this side's own doing.
    fn close_secondary(&mut self, node: usize) {
        self.close(node);
        let life = self.nodes[node].life;
        let end = SecondaryEvent::DataClosed(LinkEnd::PeerEnded);
        self.soon(Happening::SecondaryEvent(node, life, end));
    }

    fn secondary_ended(&mut self, node: usize, outcome: SecondaryOutcome) {
        self.note(Line::Note(format!(
            "host {node} ended as secondary: {}",
            brief(&outcome)
        )));
        let name = match outcome {
            SecondaryOutcome::Ended(_) => "ended",
            SecondaryOutcome::Fenced { memory, .. } => return self.stands_down(node, memory, "fenced"),
            SecondaryOutcome::Unpaired {
                memory: Some(memory), ..
            } => return self.stands_down(node, memory, "unpaired"),
            SecondaryOutcome::Failed(_) => "failed",
            SecondaryOutcome::Unpaired { memory: None, .. } => "unpaired",
            SecondaryOutcome::TakenOver(taken) => {
                self.close(node);
                let host = &mut self.nodes[node];
                host.link = None;
                let job = host.replica.as_mut().expect("a secondary").take_over();
                let taken = *taken;
                self.checkers
                    .taken_over(taken.generation, taken.last_epoch, &taken.outputs);
                self.start_primary(
                    node,
                    Start::TakenOver {
                        generation: taken.generation,
                        last_epoch: taken.last_epoch,
                        network: taken.network,
                        inputs: taken.inputs,
                        outputs: taken.outputs,
                    },
                );
                self.current = None;
                return self.disk_order(node, DiskOrder::Fold(job));
            }
        };
        self.ended(node, name);
    }

    /// It waits for a primary with the memory that it has.
    fn stands_down(&mut self, node: usize, memory: checkpoint::Tag, outcome: &'static str) {
        self.close(node);
        self.finish_disk_work(node);
        if let Err(error) = self.nodes[node].stand_down(memory) {
            self.note(Line::Note(format!("host {node} can't wait: {error}")));
            return self.ended(node, "failed");
        }
        self.rests(node);
        self.nodes[node].outcome = Some(outcome);
    }

    // Both.

    /// Somebody asks it to end.
    pub(crate) fn stop(&mut self, node: usize) {
        match self.nodes[node].role {
            Role::Primary(_) => self.step_primary(node, PrimaryEvent::StopAsked),
            Role::Secondary(_) => self.step_secondary(node, SecondaryEvent::StopAsked),
            Role::Waiting => self.ended(node, "ended"),
            Role::Off => {}
        }
    }

    fn ended(&mut self, node: usize, outcome: &'static str) {
        self.close(node);
        self.nodes[node].die();
        self.nodes[node].outcome = Some(outcome);
        self.nodes[node].off_until = self.now + 300 * MILLISECOND;
    }

    fn deliver(&mut self, node: usize, delivery: Delivery) {
        self.nodes[node].inbox.push_back(delivery);
        self.wake(node);
    }

    fn report(&mut self, node: usize, report: &Report) {
        if let Report::Alarm(text) = report {
            self.note(Line::Note(format!("host {node} ALARM {text}")));
        }
    }
}
