//! How hosts start and meet: from their records and the witness, as the program has them do it.

use checkpoint::cpu::CpuModel;
use checkpoint::failover::{Decision, KnownState, start_decision};
use checkpoint::handshake::{Local, hello, judge_hello, judge_welcome};
use checkpoint::pair::{RecordUpdate, WitnessAnswer};
use checkpoint::wire::{MachineShape, Session};
use checkpoint::{Duration, Epoch, Generation, Role as PairRole, limits};
use primary::event::Event as PrimaryEvent;
use primary::protocol::Start;
use secondary::protocol::{Options as SecondaryOptions, Secondary};

use super::commands::{Done, span_of};
use super::host::{DISK_BYTES, Role};
use super::link::Link;
use super::pair::{Event, Pair};

/// Bytes of memory that the guest is said to have.
pub(super) const MEMORY_BYTES: u64 = 1 << 20;

impl Pair {
    pub(super) fn set(&mut self, options: &[&str]) -> Done {
        for option in options {
            match option.split_once('=') {
                Some(("witness", "yes")) => self.options.witness = true,
                Some(("witness", "no")) => self.options.witness = false,
                Some(("age", span)) => self.options.epoch_age_max = span_of(&format!("+{span}"))?,
                Some(("compare", "yes")) => self.options.compare = true,
                Some(("resume", policy)) => self.options.resume = policy.parse()?,
                Some(("ahead", "yes")) => self.options.ahead = true,
                Some(("few", pages)) => {
                    self.options.ahead = true;
                    self.options.few_pages = pages.parse().map_err(|_| format!("'{pages}' is no number"))?;
                }
                Some(("cards", number)) => {
                    self.options.cards = number.parse().map_err(|_| "cards have a number")?;
                }
                Some(("streams", number)) => {
                    self.options.streams = number.parse().map_err(|_| "streams have a number")?;
                }
                Some(("budget", span)) => {
                    self.options.ahead = true;
                    self.options.budget = Some(span_of(&format!("+{span}"))?);
                }
                Some(("written", writes)) => {
                    let writes: u64 = writes.parse().map_err(|_| format!("'{writes}' is no number"))?;
                    self.options.room.written_bytes = writes * limits::PAGE_BYTES as u64;
                }
                Some(("pages", pages)) => {
                    self.options.ahead = true;
                    self.options.room.pages = pages.parse().map_err(|_| format!("'{pages}' is no number"))?;
                }
                Some(("inputs", inputs)) => {
                    self.options.room.inputs = inputs.parse().map_err(|_| format!("'{inputs}' is no number"))?;
                }
                Some(("unsent", bytes)) => {
                    self.options.unsent_bytes = bytes.parse().map_err(|_| format!("'{bytes}' is no number"))?;
                }
                Some(("mode", mode)) => self.options.mode = mode.parse()?,
                Some(("every", span)) => self.options.checkpoint_every = span_of(&format!("+{span}"))?,
                _ => {
                    return Err(format!(
                        "'{option}' is no option: witness=no, age=10s, resume=copy, mode=buffered, every=5ms, ahead=yes, few=2, compare=yes, budget=1ms, written=2, pages=3, inputs=4, unsent=100, streams=2"
                    ));
                }
            }
        }
        Ok(())
    }

    /// Begins again with new hosts and a new witness; frames keep their names.
    pub(super) fn renew(&mut self) {
        let frames = core::mem::take(&mut self.frames);
        *self = Self::new();
        self.frames = frames;
    }

    /// Makes both hosts, pairs them, and says only what has come of it. The announcements of the start are over, the
    /// lease has been renewed, and epoch 3 has just begun.
    pub(super) fn protect(&mut self, options: &[&str]) -> Done {
        self.renew();
        self.set(options)?;
        self.start_primary(0)?;
        self.start_secondary(1)?;
        self.wait(Duration::from_millis(5_000))?;
        self.connect(0, 1)?;
        self.stabilize()?;
        self.wait(Duration::from_millis(75))?;
        self.step(0, Event::Primary(PrimaryEvent::CheckpointAsked));
        self.stabilize()?;
        self.output.clear();
        self.released.clear();
        super::checks::run(self, &["states"])
    }

    pub(super) fn start_primary(&mut self, host: usize) -> Done {
        if !matches!(self.hosts[host].role, Role::Off(_) | Role::Waiting) {
            return Err("that host runs already".to_owned());
        }
        self.hosts[host].start();
        let latest = if self.options.witness {
            let latest = self.witness_of(host).latest().expect("the directory is there");
            latest.filter(|_| self.hosts[host].reaches_witness)
        } else {
            None
        };
        let at = &self.hosts[host];
        let known = at.record.map(|record| KnownState {
            generation: record.generation,
            role: record.role,
            complete: record.complete,
        });
        let term = match start_decision(known, latest, at.name) {
            Decision::Start { term } => term,
            Decision::Refuse(why) => {
                self.print(format!("{} may not start: {why}", self.hosts[host].name));
                return Ok(());
            }
        };
        if self.options.witness {
            match self.ask_witness(host, term) {
                WitnessAnswer::Won => {}
                answer => {
                    self.print(format!(
                        "{} does not get term {term}: {answer:?}",
                        self.hosts[host].name
                    ));
                    return Ok(());
                }
            }
        }
        let model = self.cpu_of_a_new_vm(host);
        let at = &mut self.hosts[host];
        at.processor.model = model;
        let last_epoch = at.record.map_or(Epoch(0), |record| record.committed);
        at.record = Some(RecordUpdate {
            generation: term,
            role: PairRole::Primary,
            committed: last_epoch,
            complete: true,
            clean: false,
        });
        self.lead(
            host,
            Start::Boot {
                generation: term,
                last_epoch,
            },
        );
        Ok(())
    }

    pub(super) fn start_secondary(&mut self, host: usize) -> Done {
        if !matches!(self.hosts[host].role, Role::Off(_)) {
            return Err("that host runs already".to_owned());
        }
        self.hosts[host].start();
        self.hosts[host].wait();
        Ok(())
    }

    /// A secondary that waits is met before the VM is made: the VM gets what both have.
    fn cpu_of_a_new_vm(&self, host: usize) -> CpuModel {
        let (ours, theirs) = (self.local(host), self.local(1 - host));
        let ours = Local { adapts: true, ..ours };
        let waits = matches!(self.hosts[1 - host].role, Role::Waiting);
        let welcome = waits
            .then(|| judge_hello(&theirs, &hello(&ours), Session(1)).ok())
            .flatten();
        let fits = welcome.filter(|welcome| judge_welcome(&ours, welcome).is_ok());
        fits.map_or(ours.shape.cpu, |welcome| welcome.cpu)
    }

    fn local(&self, host: usize) -> Local {
        let at = &self.hosts[host];
        Local {
            pair: "pair".to_owned(),
            node: at.name.to_owned(),
            shape: MachineShape {
                memory_bytes: MEMORY_BYTES,
                vcpus: 1,
                devices: vec!["net=02:00:00:00:00:01".to_owned(); self.options.cards],
                disk_bytes: DISK_BYTES,
                cpu: match at.role {
                    Role::Primary(_) => at.processor.model.clone(),
                    _ => at.processor.gives.clone(),
                },
            },
            adapts: false,
            generation: at.record.map_or(Generation(0), |record| record.generation),
            owner: at.record.is_some_and(|record| record.role == PairRole::Primary),
            committed: at.record.map_or(Epoch(0), |record| record.committed),
            held: at.held(),
            held_cpu: Some(at.processor.model.clone()),
            takeover_limit_ms: limits::TAKEOVER_LIMIT_DEFAULT.as_millis(),
            witness: self.options.witness,
            streams: self.options.streams,
        }
    }

    /// The handshake of the two, and both protocols' first steps.
    pub(super) fn connect(&mut self, from: usize, to: usize) -> Done {
        if !self.hosts[from].dials || !matches!(self.hosts[to].role, Role::Waiting) {
            return Err("the one does not dial, or the other does not wait".to_owned());
        }
        let (ours, theirs) = (self.local(from), self.local(to));
        let welcome = match judge_hello(&theirs, &hello(&ours), Session(1)) {
            Ok(welcome) => welcome,
            Err(why) => {
                self.print(format!("{} refuses: {why}", theirs.node));
                return Ok(());
            }
        };
        if let Err(why) = judge_welcome(&ours, &welcome) {
            self.print(format!("{} refuses: {why}", ours.node));
            return Ok(());
        }
        let options = SecondaryOptions {
            witness: self.options.witness,
            takeover_limit: limits::TAKEOVER_LIMIT_DEFAULT,
            generation: theirs.generation,
            held: theirs.held,
            cards: self.options.cards,
            streams: self.options.streams,
            room: self.options.room.pages.saturating_mul(2),
            unsent_bytes: self.options.unsent_bytes,
        };
        self.hosts[to].processor.model = welcome.cpu.clone();
        let now = self.hosts[to].clock(self.now);
        let secondary = Secondary::new(options, ours.node, now);
        self.hosts[to].role = Role::Secondary(Box::new(secondary));
        self.hosts[from].dials = false;
        self.link = Some(Link::default());
        self.step(from, Event::Primary(PrimaryEvent::Connected(welcome)));
        Ok(())
    }
}
