//! The two hosts of a scenario, what is between them, and time: steps the protocols and notes what they order.
//!
//! Nothing happens unless the script says so, but for heartbeats: they pass unseen while the link is whole, unless the
//! script asks to see them.

use std::collections::BTreeMap;

use checkpoint::wire::{Begin, Message};
use checkpoint::{Duration, Epoch, Generation, Nic};
use primary::event::{Action as PrimaryAction, Event as PrimaryEvent};
use primary::protocol::pace::Budget;
use primary::protocol::{Mode, Patience, Primary, Resume, Room, Start};
use secondary::event::{Action as SecondaryAction, Event as SecondaryEvent, LinkEnd, Outcome};

use super::frames::Frames;
use super::host::{Host, Order, Role, Snapshot, Thread, stream_of_batch};
use super::link::{Connection, Item, Link};
use super::show::{Shown, milliseconds};

/// Times that a deadline may come again without time going on.
const SAME_MOMENT_MAX: u32 = 100;

/// Time between two looks at the dirty pages, where they are shipped ahead.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// The same while few are dirty.
const LOOK_SELDOM: Duration = Duration::from_millis(200);

/// What a protocol hears.
pub(super) enum Event {
    Primary(PrimaryEvent),
    Secondary(SecondaryEvent),
}

/// The hosts and everything around them.
pub(super) struct Pair {
    pub(super) hosts: [Host; 2],
    pub(super) link: Option<Link>,
    pub(super) frames: Frames,
    pub(super) now: Duration,
    pub(super) options: Options,
    pub(super) witness: tempfile::TempDir,
    /// The script sees and delivers heartbeats.
    pub(super) shows_heartbeats: bool,
    /// Frames that reached the clients, with the host that let them out.
    pub(super) released: Vec<(usize, String)>,
    pub(super) output: Vec<String>,
    /// The primary's state at the stop that ended each epoch.
    pub(super) stops: BTreeMap<Epoch, Snapshot>,
    newest_release: Generation,
}

/// What the script sets.
#[derive(Clone, Copy, Debug)]
pub(super) struct Options {
    pub(super) witness: bool,
    pub(super) epoch_age_max: Duration,
    pub(super) resume: Resume,
    pub(super) mode: Mode,
    pub(super) checkpoint_every: Duration,
    /// Pages are shipped ahead of a stop,
    pub(super) ahead: bool,
    /// unless there are fewer than these.
    pub(super) few_pages: u64,
    /// The pages of checkpoints are compared with the secondary's.
    pub(super) compare: bool,
    /// Network cards of the VM.
    pub(super) cards: usize,
    /// Page streams.
    pub(super) streams: usize,
    /// How long a stop may take; with one, pages are only looked at.
    pub(super) budget: Option<Duration>,
    /// What an epoch may keep waiting.
    pub(super) room: Room,
    /// Bytes of output that may wait to be sent.
    pub(super) unsent_bytes: usize,
}

/// The hardware addresses of the VM's network cards.
const MACS: [[u8; 6]; 2] = [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 1, 1]];

impl Pair {
    pub(super) fn new() -> Self {
        Self {
            hosts: [
                Host::new("a", Duration::from_millis(1_000_000)),
                Host::new("b", Duration::from_millis(7_000_000)),
            ],
            link: None,
            frames: Frames::default(),
            now: Duration(0),
            options: Options {
                witness: true,
                epoch_age_max: checkpoint::limits::EPOCH_AGE_MAX,
                resume: Resume::default(),
                mode: Mode::default(),
                checkpoint_every: checkpoint::limits::CHECKPOINT_EVERY,
                ahead: false,
                few_pages: 0,
                compare: false,
                cards: 1,
                streams: 1,
                budget: None,
                room: Room::default(),
                unsent_bytes: checkpoint::limits::UNSENT_BYTES_MAX,
            },
            witness: tempfile::tempdir().expect("a directory for the witness"),
            shows_heartbeats: false,
            released: Vec::new(),
            output: Vec::new(),
            stops: BTreeMap::new(),
            newest_release: Generation(0),
        }
    }

    pub(super) fn print(&mut self, line: impl Into<String>) {
        self.output.push(line.into());
    }

    /// Gives a host's protocol an event; its name stands before what it orders.
    pub(super) fn step(&mut self, host: usize, event: Event) {
        self.step_after(host, event, None);
    }

    fn step_after(&mut self, host: usize, event: Event, waited: Option<Duration>) {
        let name = self.hosts[host].name;
        let waited = waited.map_or_else(String::new, |span| format!("+{} ", milliseconds(span)));
        match event {
            Event::Primary(event) => self.step_primary(host, &format!("{waited}{name}"), event),
            Event::Secondary(event) => self.step_secondary(host, &format!("{waited}{name}"), event),
        }
        if !self.shows_heartbeats {
            self.pass_heartbeats();
        }
    }

    fn step_primary(&mut self, host: usize, prefix: &str, event: PrimaryEvent) {
        let now = self.hosts[host].clock(self.now);
        let Role::Primary(primary) = &mut self.hosts[host].role else {
            return;
        };
        let shown = Shown {
            frames: &self.frames,
            now,
        };
        let line = format!("{prefix} {}", shown.primary_event(&event));
        let quiet = matches!(
            event,
            PrimaryEvent::Timeout | PrimaryEvent::PeerSent(Message::Heartbeat(_))
        );
        let before = primary.phase();
        let mut actions = Vec::new();
        primary.step(now, event, &mut actions);
        let after = primary.phase();
        let seen = |action: &PrimaryAction| {
            self.shows_heartbeats || !matches!(action, PrimaryAction::SendControl(Message::Heartbeat(_)))
        };
        let lines = actions
            .iter()
            .filter(|action| seen(action))
            .map(|action| shown.primary_action(action));
        let lines = lines.collect();
        self.note(line, lines, quiet, before, after);
        self.act_primary(host, actions);
    }

    fn step_secondary(&mut self, host: usize, prefix: &str, event: SecondaryEvent) {
        let now = self.hosts[host].clock(self.now);
        let Role::Secondary(secondary) = &mut self.hosts[host].role else {
            return;
        };
        let shown = Shown {
            frames: &self.frames,
            now,
        };
        let line = format!("{prefix} {}", shown.secondary_event(&event));
        let quiet = matches!(
            event,
            SecondaryEvent::Timeout | SecondaryEvent::PeerSent(Message::Heartbeat(_))
        );
        let before = secondary.phase();
        let mut actions = Vec::new();
        secondary.step(now, event, &mut actions);
        let after = secondary.phase();
        let seen = |action: &SecondaryAction| {
            self.shows_heartbeats || !matches!(action, SecondaryAction::SendControl(Message::Heartbeat(_)))
        };
        let lines = actions
            .iter()
            .filter(|action| seen(action))
            .map(|action| shown.secondary_action(action));
        let lines = lines.collect();
        self.note(line, lines, quiet, before, after);
        self.act_secondary(host, actions);
    }

    fn note(&mut self, event: String, actions: Vec<String>, quiet: bool, before: &str, after: &str) {
        if quiet && !self.shows_heartbeats && actions.is_empty() && before == after {
            return;
        }
        self.print(event);
        for action in actions {
            self.print(format!("  {action}"));
        }
        if before != after {
            self.print(format!("  = {before} -> {after}"));
        }
    }

    fn act_primary(&mut self, host: usize, actions: Vec<PrimaryAction>) {
        for action in actions {
            let at = &mut self.hosts[host];
            match action {
                PrimaryAction::Alike(matches) => at.order(Order::Alike(matches)),
                PrimaryAction::AskAlike(tag) => at.order(Order::Ask(tag)),
                PrimaryAction::Claim(term) => at.order(Order::Claim(term)),
                PrimaryAction::CloseLink => self.close(host),
                PrimaryAction::CompareBlocks(hashes) => at.order(Order::Compare(hashes)),
                PrimaryAction::Deliver(delivery) => at.inbox.push_back(delivery),
                PrimaryAction::Dial => at.dials = true,
                PrimaryAction::End(outcome) => {
                    let why = match outcome {
                        primary::event::Outcome::Ended(_) => "ended",
                        primary::event::Outcome::Fenced(_) => "fenced",
                        primary::event::Outcome::Failed(_) => "failed",
                    };
                    return self.ended(host, why);
                }
                PrimaryAction::HoldInput(hold) => at.holds_input = hold,
                PrimaryAction::KeepDirty => at.order(Order::KeepDirty),
                PrimaryAction::PauseVm => at.order(Order::Pause),
                PrimaryAction::Report(_) | PrimaryAction::Reseed | PrimaryAction::SeedEntropy(_) => {}
                PrimaryAction::ResumeVm => at.order(Order::Resume),
                PrimaryAction::Send(message) => self.send(host, Connection::Data, message),
                PrimaryAction::SendBlocks { tag, blocks } => at.order(Order::SendBlocks(tag, blocks)),
                PrimaryAction::SendControl(message) => self.send(host, Connection::Control, message),
                PrimaryAction::ShipAhead { tag, pages } => at.order(Order::ShipAhead(tag, pages)),
                PrimaryAction::SendCheckpoint {
                    blocks,
                    totals,
                    both_ran,
                    ..
                } => at.order(Order::Copy(totals, blocks, both_ran)),
                PrimaryAction::StoreRecord(record) => at.order(Order::Store(record)),
                PrimaryAction::SyncMemory { totals, difference } => at.order(Order::Sync(totals, difference)),
                PrimaryAction::Transmit { nic, frames, not_after } => {
                    at.order(Order::Transmit(nic, frames.into_vec(), not_after))
                }
            }
        }
        self.settle(host);
    }

    fn act_secondary(&mut self, host: usize, actions: Vec<SecondaryAction>) {
        for action in actions {
            let at = &mut self.hosts[host];
            match action {
                SecondaryAction::ApplyPages(_, batch) => at.order(Order::Apply(batch)),
                SecondaryAction::ApplyWrite(write) => {
                    storage::put(&*at.image, write.offset, &write.written).expect("in range");
                }
                SecondaryAction::BeginSync(Begin { tag, base }) => {
                    at.begin_sync(base.memory.is_some());
                    if base.disk.is_none() {
                        at.order(Order::SendHashes(tag));
                    }
                }
                SecondaryAction::Check(tag) => at.order(Order::Check(tag)),
                SecondaryAction::Claim(term) => at.order(Order::Claim(term)),
                SecondaryAction::CloseLink => self.close(host),
                SecondaryAction::Compare(hashes) => at.order(Order::ComparePages(hashes)),
                SecondaryAction::CommitDisk(epoch) => {
                    at.commit_disk(epoch);
                    self.equals_the_stop(host);
                }
                SecondaryAction::CountOwn(tag) => at.order(Order::Count(tag)),
                SecondaryAction::Deliver(delivery) => at.inbox.push_back(delivery),
                SecondaryAction::DropDeliveries => at.inbox.clear(),
                SecondaryAction::DropStage => at.order(Order::DropStage),
                SecondaryAction::End(outcome) => return self.secondary_ended(host, outcome),
                SecondaryAction::HoldOutput(hold) => at.holds_output = hold,
                SecondaryAction::Load(tag) => at.order(Order::Load(tag)),
                SecondaryAction::PauseVm => at.order(Order::Pause),
                SecondaryAction::Report(_) | SecondaryAction::SeedEntropy(_) => {}
                SecondaryAction::ResumeVm => at.order(Order::Resume),
                SecondaryAction::Send(message) => self.send(host, Connection::Data, message),
                SecondaryAction::SendControl(message) => self.send(host, Connection::Control, message),
                SecondaryAction::StageDevices(state) => at.order(Order::StageDevices(state)),
                SecondaryAction::StagePages(_, batch) => at.order(Order::StagePages(batch)),
                SecondaryAction::StageWrite(write) => {
                    let replica = at.replica.as_mut().expect("a secondary");
                    replica
                        .stage(write.tag.epoch, write.offset, &write.written)
                        .expect("the primary keeps the rules");
                }
                SecondaryAction::StoreRecord(record) => at.order(Order::Store(record)),
            }
        }
        self.settle(host);
    }

    /// Rule 2: what is loaded is exactly what the primary was at the stop.
    fn equals_the_stop(&self, host: usize) {
        let Role::Secondary(secondary) = &self.hosts[host].role else {
            return;
        };
        let epoch = secondary.committed();
        assert!(
            self.stops[&epoch] == self.hosts[host].snapshot(),
            "rule 2: checkpoint {epoch} was loaded as another state than it was stopped in"
        );
    }

    fn secondary_ended(&mut self, host: usize, outcome: Outcome) {
        let taken = match outcome {
            Outcome::Ended(_) => return self.ended(host, "ended"),
            Outcome::Failed(_) => return self.ended(host, "failed"),
            Outcome::Fenced { memory, .. }
            | Outcome::Unpaired {
                memory: Some(memory), ..
            } => {
                self.close(host);
                return self.hosts[host].stand_down(memory);
            }
            Outcome::Unpaired { memory: None, .. } => {
                self.close(host);
                self.hosts[host].start();
                return self.hosts[host].wait();
            }
            Outcome::TakenOver(taken) => *taken,
        };
        self.close(host);
        self.hosts[host].fold();
        self.lead(
            host,
            Start::TakenOver {
                generation: taken.generation,
                last_epoch: taken.last_epoch,
                network: taken.network,
                inputs: taken.inputs,
                outputs: taken.outputs,
            },
        );
    }

    /// A host becomes primary.
    pub(super) fn lead(&mut self, host: usize, start: Start) {
        let options = primary::protocol::Options {
            mode: self.options.mode,
            checkpoint_every: self.options.checkpoint_every,
            patience: Patience::default(),
            resume: self.options.resume,
            witness: self.options.witness,
            takeover_limit: checkpoint::limits::TAKEOVER_LIMIT_DEFAULT,
            epoch_age_max: self.options.epoch_age_max,
            unmatched_max: checkpoint::limits::UNMATCHED_MAX,
            ahead: self.options.ahead.then(|| Budget {
                every: LOOK_EVERY,
                seldom: LOOK_SELDOM,
                few_pages: self.options.few_pages,
                bytes_per_second: if self.options.budget.is_some() { 0 } else { u64::MAX },
                ..Budget::default()
            }),
            pause_budget: self.options.budget,
            room: self.options.room,
            memory_bytes: super::starts::MEMORY_BYTES,
            disk_bytes: super::host::DISK_BYTES,
            macs: MACS[..self.options.cards].to_vec(),
            flow_secret: 0,
        };
        let now = self.hosts[host].clock(self.now);
        let mut actions = Vec::new();
        let primary = Primary::new(options, start, now, &mut actions);
        let shown = Shown {
            frames: &self.frames,
            now,
        };
        let lines: Vec<String> = actions.iter().map(|action| shown.primary_action(action)).collect();
        let (name, tag) = (self.hosts[host].name, primary.tag());
        self.hosts[host].role = Role::Primary(Box::new(primary));
        self.print(format!("{name} is primary in {tag}"));
        lines.into_iter().for_each(|line| self.print(format!("  {line}")));
        self.act_primary(host, actions);
    }

    fn ended(&mut self, host: usize, why: &str) {
        self.close(host);
        self.hosts[host].die(why, false);
    }

    /// Frames are written to the TAP, unless their moment has passed.
    pub(super) fn transmit(
        &mut self,
        host: usize,
        nic: Nic,
        frames: &[bytes::Bytes],
        not_after: Option<checkpoint::Instant>,
    ) {
        let names: Vec<String> = frames.iter().map(|frame| self.frames.show_at(nic, frame)).collect();
        if not_after.is_some_and(|limit| self.hosts[host].clock(self.now) > limit) {
            return self.print(format!("  late, dropped: {}", names.join(" ")));
        }
        let Role::Primary(primary) = &self.hosts[host].role else {
            return;
        };
        let generation = primary.tag().generation;
        assert!(
            generation >= self.newest_release,
            "rule 3: generation {generation} lets output leave after {} did",
            self.newest_release
        );
        self.newest_release = generation;
        self.released.extend(names.into_iter().map(|name| (host, name)));
    }

    pub(super) fn send(&mut self, from: usize, connection: Connection, message: Message) {
        if let Some(link) = &mut self.link {
            link.send(1 - from, connection, message);
        }
    }

    pub(super) fn close(&mut self, host: usize) {
        self.hosts[host].threads[Thread::Courier as usize].clear();
        if let Some(link) = &mut self.link {
            link.close(host);
        }
    }

    /// Something arrives at a host.
    pub(super) fn arrive(&mut self, host: usize, connection: Connection, item: Item) {
        let event = match (&self.hosts[host].role, item) {
            (Role::Primary(_), Item::Message(message)) => Event::Primary(PrimaryEvent::PeerSent(message)),
            (Role::Primary(_), Item::End(end)) => {
                // As its shell does: the end of one closes both.
                self.close(host);
                Event::Primary(PrimaryEvent::LinkClosed(end.to_string()))
            }
            (Role::Secondary(_), Item::Message(Message::Pages(batch))) => {
                let stream = stream_of_batch(&batch, self.options.streams);
                Event::Secondary(SecondaryEvent::PagesArrived(stream, batch))
            }
            (Role::Secondary(_), Item::Message(message)) => Event::Secondary(SecondaryEvent::PeerSent(message)),
            (Role::Secondary(_), Item::End(end)) => Event::Secondary(closed(connection, end)),
            (Role::Off(_) | Role::Waiting, _) => return,
        };
        self.step(host, event);
    }

    /// A page stream is reset; the other connections stand.
    pub(super) fn break_stream(&mut self) {
        for host in 0..2 {
            let end = LinkEnd::Broken("a page stream broke".to_owned());
            let event = match &self.hosts[host].role {
                Role::Primary(_) => {
                    self.close(host);
                    Event::Primary(PrimaryEvent::LinkClosed(end.to_string()))
                }
                Role::Secondary(_) => Event::Secondary(SecondaryEvent::PagesClosed(end)),
                Role::Off(_) | Role::Waiting => continue,
            };
            self.step(host, event);
        }
    }

    fn pass_heartbeats(&mut self) {
        for host in [0, 1, 0, 1] {
            if self.hosts[host].frozen {
                continue;
            }
            while let Some(item) = self.link.as_mut().and_then(|link| link.next_heartbeat(host)) {
                self.arrive(host, Connection::Control, item);
            }
        }
    }

    /// Lets time pass; deadlines on the way are met in their order.
    pub(super) fn wait(&mut self, span: Duration) -> Result<(), String> {
        let (start, end) = (self.now, Duration(self.now.0 + span.0));
        let mut again = 0;
        while let Some((due, host)) = self.deadline()
            && due <= end
        {
            again = if due > self.now { 0 } else { again + 1 };
            if again > SAME_MOMENT_MAX {
                return Err(format!("{}'s deadline does not move on", self.hosts[host].name));
            }
            self.now = self.now.max(due);
            let event = match &self.hosts[host].role {
                Role::Primary(_) => Event::Primary(PrimaryEvent::Timeout),
                _ => Event::Secondary(SecondaryEvent::Timeout),
            };
            self.step_after(host, event, Some(Duration(self.now.0 - start.0)));
        }
        self.now = end;
        Ok(())
    }

    fn deadline(&self) -> Option<(Duration, usize)> {
        let of = |host: usize| {
            let at = &self.hosts[host];
            let deadline = match &at.role {
                _ if at.frozen => None,
                Role::Primary(primary) => primary.deadline(),
                Role::Secondary(secondary) => secondary.deadline(),
                Role::Off(_) | Role::Waiting => None,
            };
            deadline.map(|clock| (at.moment(clock), host))
        };
        [of(0), of(1)].into_iter().flatten().min()
    }
}

fn closed(connection: Connection, end: LinkEnd) -> SecondaryEvent {
    match connection {
        Connection::Control => SecondaryEvent::ControlClosed(end),
        Connection::Data => SecondaryEvent::DataClosed(end),
    }
}
