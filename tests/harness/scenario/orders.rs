//! Carries out what waits in the hosts' threads, and reports it to the protocols as the shells do.

use checkpoint::Generation;
use checkpoint::pair::{RecordUpdate, WitnessAnswer};
use checkpoint::wire::{BlockHashes, Message};
use primary::event::Event as PrimaryEvent;
use secondary::event::Event as SecondaryEvent;
use storage::witness::{Claim, DirectoryWitness};

use super::host::{Order, Role};
use super::link::Connection;
use super::pair::{Event, Pair};

impl Pair {
    /// Carries out the orders from which nothing follows, as far as their turn has come.
    pub(super) fn settle(&mut self, host: usize) {
        for thread in 0..self.hosts[host].threads.len() {
            while let Some(order) = self.hosts[host].threads[thread].front() {
                let unseen = match order {
                    Order::Transmit(..) => !self.hosts[host].slow_tap,
                    order => order.name().is_none(),
                };
                if !unseen {
                    break;
                }
                let order = self.hosts[host].threads[thread].pop_front().expect("just seen");
                self.carry_out(host, order);
            }
        }
    }

    /// Returns the names of what waits at a host.
    pub(super) fn waiting(&self, host: usize) -> Vec<&'static str> {
        self.hosts[host]
            .threads
            .iter()
            .flatten()
            .filter_map(Order::name)
            .collect()
    }

    /// Carries out the next order of that name, or the next of all.
    pub(super) fn carry_out_next(
        &mut self,
        host: usize,
        name: Option<&str>,
        fails: Option<&str>,
    ) -> Result<(), String> {
        let due = |order: Option<&Order>| order.and_then(Order::name);
        let threads = &self.hosts[host].threads;
        let thread = threads
            .iter()
            .position(|thread| due(thread.front()).is_some_and(|front| name.is_none_or(|name| name == front)));
        let Some(thread) = thread else {
            return Err(format!(
                "nothing of that kind is due; outstanding: {}",
                self.waiting(host).join(" ")
            ));
        };
        let order = self.hosts[host].threads[thread].pop_front().expect("just seen");
        match fails {
            Some(why) => self.fail(host, &order, why),
            None => self.carry_out(host, order),
        }
        self.settle(host);
        Ok(())
    }

    fn fail(&mut self, host: usize, order: &Order, why: &str) {
        let why = why.to_owned();
        let event = match (&self.hosts[host].role, order) {
            (Role::Primary(_), _) => Event::Primary(PrimaryEvent::VmFailed(why)),
            (_, Order::Check(tag)) => Event::Secondary(SecondaryEvent::Checked(*tag, Err(why))),
            _ => Event::Secondary(SecondaryEvent::VmFailed(why)),
        };
        self.step(host, event);
    }

    fn carry_out(&mut self, host: usize, order: Order) {
        let at = &mut self.hosts[host];
        match order {
            Order::Ahead(tag) => {
                let (messages, shipment) = at.ship_ahead(tag, self.options.streams);
                self.send_all(host, messages);
                self.step(host, Event::Primary(PrimaryEvent::ShippedAhead(shipment)));
            }
            Order::Apply(batch) => at.apply(&batch),
            Order::DropStage => at.drop_stage(),
            Order::KeepDirty => at.keep_dirty(),
            Order::Resume => at.running = true,
            Order::StageDevices(state) => at.stage_devices(state),
            Order::StagePages(batch) => at.stage_pages(&batch),
            Order::SendHashes(tag) => {
                let hashes = at.hashes();
                let hashes = BlockHashes { tag, first: 0, hashes };
                self.send(host, Connection::Data, Message::BlockHashes(hashes));
            }
            Order::Transmit(nic, frames, not_after) => self.transmit(host, nic, &frames, not_after),
            Order::Check(tag) => {
                let first = matches!(&at.role, Role::Secondary(secondary) if secondary.is_first());
                let result = at.prepare(tag, first);
                self.step(host, Event::Secondary(SecondaryEvent::Checked(tag, result)));
            }
            Order::Claim(term) => self.claim(host, term),
            Order::Commit => {
                if let Some(epoch) = at.run_jobs() {
                    self.step(host, Event::Secondary(SecondaryEvent::DiskCommitted(epoch)));
                }
            }
            Order::Compare(hashes) => {
                for write in at.differing(&hashes) {
                    self.send(host, Connection::Data, Message::SyncBlock(write));
                }
                let synced = PrimaryEvent::DiskSynced(hashes.tag.generation);
                self.step(host, Event::Primary(synced));
            }
            Order::SendBlocks(tag, blocks) => {
                for block in blocks {
                    let write = self.hosts[host].block(tag, block);
                    self.send(host, Connection::Data, Message::SyncBlock(write));
                }
                let synced = PrimaryEvent::DiskSynced(tag.generation);
                self.step(host, Event::Primary(synced));
            }
            Order::Load(tag) => {
                at.load();
                self.step(host, Event::Secondary(SecondaryEvent::Loaded(tag)));
            }
            Order::Pause => {
                at.running = false;
                let event = match at.role {
                    Role::Primary(_) => Event::Primary(PrimaryEvent::Paused),
                    _ => Event::Secondary(SecondaryEvent::Paused),
                };
                self.step(host, event);
            }
            Order::Copy(totals, blocks, both_ran) => {
                let (tag, snapshot) = (totals.tag(), at.snapshot());
                let pages = at.copy(&blocks, totals);
                self.stops.insert(tag.epoch, snapshot);
                let entropy = super::host::ENTROPY;
                let compares = self.options.compare && both_ran;
                if !compares {
                    at.order(Order::Ship);
                }
                self.step(host, Event::Primary(PrimaryEvent::Copied { tag, pages, entropy }));
                if compares {
                    self.step(host, Event::Primary(PrimaryEvent::CompareAsked(tag)));
                }
            }
            Order::Alike(matches) => {
                at.alike(&matches);
                at.order(Order::Ship);
            }
            Order::Ask(tag) => match at.hash(tag) {
                Some(hashes) => self.step(host, Event::Primary(PrimaryEvent::Hashed(hashes))),
                None => at.order(Order::Ship),
            },
            Order::ComparePages(hashes) => {
                let matches = at.compare(&hashes);
                self.step(host, Event::Secondary(SecondaryEvent::Compared(matches)));
            }
            Order::Count(tag) => {
                let own = at.written();
                self.step(host, Event::Secondary(SecondaryEvent::Counted(tag, own)));
            }
            Order::Ship => {
                let (messages, shipment) = at.parcel();
                self.send_all(host, messages);
                self.step(host, Event::Primary(PrimaryEvent::CheckpointSent(shipment)));
            }
            Order::ShipAhead(tag, most) => {
                let look = at.look(tag, most);
                if look.ahead > 0 {
                    at.order(Order::Ahead(tag));
                }
                self.step(host, Event::Primary(PrimaryEvent::Looked(look)));
            }
            Order::Store(record) => self.store(host, record),
            Order::Sync(totals, difference) => {
                let (messages, shipment) = at.sync_memory(totals, difference);
                self.send_all(host, messages);
                self.step(host, Event::Primary(PrimaryEvent::MemorySynced(shipment)));
            }
        }
    }

    fn send_all(&mut self, host: usize, messages: Vec<Message>) {
        for message in messages {
            self.send(host, Connection::Data, message);
        }
    }

    fn store(&mut self, host: usize, record: RecordUpdate) {
        self.hosts[host].record = Some(record);
        let event = match self.hosts[host].role {
            Role::Primary(_) => Event::Primary(PrimaryEvent::RecordStored(record)),
            _ => Event::Secondary(SecondaryEvent::RecordStored(record)),
        };
        self.step(host, event);
    }

    fn claim(&mut self, host: usize, term: Generation) {
        let answer = self.ask_witness(host, term);
        let event = match self.hosts[host].role {
            Role::Primary(_) => Event::Primary(PrimaryEvent::WitnessAnswered(term, answer)),
            _ => Event::Secondary(SecondaryEvent::WitnessAnswered(term, answer)),
        };
        self.step(host, event);
    }

    /// Asks the directory that ships.
    pub(super) fn ask_witness(&mut self, host: usize, term: Generation) -> WitnessAnswer {
        if !self.hosts[host].reaches_witness {
            return WitnessAnswer::Unreachable("it does not answer".to_owned());
        }
        match self.witness_of(host).claim(term).expect("the directory is there") {
            Claim::Won => WitnessAnswer::Won,
            Claim::LostTo(owner) => WitnessAnswer::LostTo(owner),
        }
    }

    pub(super) fn witness_of(&mut self, host: usize) -> &DirectoryWitness {
        let path = self.witness.path();
        let at = &mut self.hosts[host];
        at.witness
            .get_or_insert_with(|| DirectoryWitness::open(path, "pair", at.name, None).expect("the directory is there"))
    }
}
