//! Runs a role from its settings to its end, and feeds a takeover into the next role.
//!
//! Order of a start: what can be refused without a trace first (KVM, image, TAP, witness), then the contest
//! for the right to run, then the machine. Nothing is left half-started: everything is dropped on the way out.

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use checkpoint::failover::{self, Decision};
use checkpoint::handshake::{self, Local};
use checkpoint::pair::RecordUpdate;
use checkpoint::wire::{GoodbyeReason, MachineShape};
use checkpoint::{Duration, Epoch, Generation, Role, Tag};
use link::control::{Answer, Command, ControlRequest, Server};
use link::port::Port;
use link::record::RecordPlace;
use link::{Listener, Sentinel};
use link::status::{Peer, State, Status};
use machine::tap::Tap;
use machine::{KvmVm, MachineConfig, Mapping, PowerEvent, Vm};
use primary::Outside;
use primary::event::Outcome as PrimaryOutcome;
use primary::protocol::Start;
use secondary::event::{Outcome as SecondaryOutcome, TakenOver};
use storage::replica::Limits;
use storage::witness::{Claim, DirectoryWitness};
use storage::{FileImage, Image, Record, Replica};
use tokio::sync::{mpsc, watch};
use tracing::{info, warn};

/// The bundled guest, built with the program.
pub const BUNDLED_GUEST: &[u8] = include_bytes!(env!("TANDEM_GUEST"));

/// What a role is set to.
#[derive(Clone, Debug)]
pub struct RoleSettings {
    /// Name of the pair.
    pub pair: String,
    /// Name of this host.
    pub node: String,
    /// The disk's image.
    pub image: PathBuf,
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// The TAP device.
    pub tap: String,
    /// The guest's hardware address.
    pub mac: [u8; 6],
    /// Where the secondary listens.
    pub peer: Option<SocketAddr>,
    /// Where this host listens as secondary.
    pub listen: Option<SocketAddr>,
    /// The witness's directory.
    pub witness: Option<PathBuf>,
    /// Silence after which the peer is lost.
    pub takeover_limit: Duration,
    /// Longest epoch.
    pub epoch_age_max: Duration,
    /// Longest wait of a frame for its equal.
    pub unmatched_max: Duration,
    /// The bundled guest's settings.
    pub command_line: String,
    /// The control socket.
    pub control: PathBuf,
}

/// How a role ended, for the exit code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// In order.
    Orderly(String),
    /// The other side owns the VM.
    Fenced(String),
    /// It can't go on.
    Failed(String),
}

/// Runs a primary, or the VM unprotected if no peer is set.
///
/// # Errors
/// Fails if it can't start; the error names cause and cure.
pub async fn run_primary(settings: RoleSettings, stop: watch::Receiver<bool>) -> Result<End> {
    let host = Host::open(settings)?;
    let (generation, last_epoch) = host.contest()?;
    let (_server, control) = Server::start(&host.settings.control)?;
    let mut outside = Outside { control, stop };
    let port = Port::new().context("the host refuses a descriptor")?;
    let (mut vm, power) = host.machine(Mapping::Shared, &port)?;
    vm.boot(BUNDLED_GUEST, &host.settings.command_line).context("the guest can't be booted")?;
    info!(node = host.settings.node, generation = generation.0, "running");
    let start = Start::Boot { generation, last_epoch };
    host.be_primary(Box::new(vm), port, power, start, None, &mut outside).await
}

/// Waits for primaries, follows them, and takes over.
///
/// # Errors
/// Fails if it can't start; the error names cause and cure.
pub async fn run_secondary(settings: RoleSettings, stop: watch::Receiver<bool>) -> Result<End> {
    let host = Host::open(settings)?;
    let address = host.settings.listen.ok_or_else(|| anyhow!("a secondary needs --listen ADDRESS:PORT"))?;
    let (_server, control) = Server::start(&host.settings.control)?;
    let mut listener = Listener::bind(address)?;
    let mut outside = Outside { control, stop };
    info!(node = host.settings.node, %address, "waiting for a primary");
    loop {
        let record = host.record()?;
        let local = host.local(record.as_ref());
        let judge = |hello: &_, session| handshake::judge_hello(&local, hello, session);
        let established = tokio::select! {
            established = listener.accept(judge) => established,
            Some(request) = outside.control.recv() => {
                host.answer_waiting(request, address);
                continue;
            }
            _ = outside.stop.changed() => return Ok(End::Orderly("stopped by its operator".to_owned())),
        };
        let port = Port::new().context("the host refuses a descriptor")?;
        let (vm, power) = host.machine(Mapping::Private, &port)?;
        let setup = secondary::Setup {
            options: secondary::protocol::Options {
                witness: host.witness.is_some(),
                takeover_limit: host.settings.takeover_limit,
                generation: record.as_ref().map_or(Generation(0), |record| record.tag.generation),
            },
            pair: host.settings.pair.clone(),
            node: host.settings.node.clone(),
            established,
            vm: Box::new(vm),
            port: Arc::clone(&port),
            image: Arc::clone(&host.image),
            replica: host.replica(record.as_ref()),
            record: host.place(),
            witness: host.witness.clone(),
            power,
            sentinel: Arc::clone(&host.sentinel),
        };
        let finished = secondary::run(setup, &mut outside.control, &mut outside.stop).await?;
        match finished.outcome {
            SecondaryOutcome::Ended(reason) => return Ok(End::Orderly(reason.to_string())),
            SecondaryOutcome::Fenced(reason) => return Ok(End::Fenced(reason)),
            SecondaryOutcome::Failed(reason) => return Ok(End::Failed(reason)),
            SecondaryOutcome::Unpaired(reason) => warn!("{reason}; waiting for a primary"),
            SecondaryOutcome::TakenOver(taken) => {
                drop(listener);
                let vm = finished.vm.ok_or_else(|| anyhow!("the machine was lost at the takeover"))?;
                let TakenOver { generation, last_epoch, network, inputs, outputs } = *taken;
                info!(generation = generation.0, "took over");
                let stale = host.tap.drain().context("the TAP can't be read")?;
                tracing::debug!(stale, "frames that the primary's guest already had");
                let start = Start::TakenOver { generation, last_epoch, network, inputs, outputs };
                return host.be_primary(vm, port, finished.power, start, finished.image_ready, &mut outside).await;
            }
        }
    }
}

/// What a host has open for as long as a role runs.
struct Host {
    settings: RoleSettings,
    image: Arc<FileImage>,
    journal: Arc<FileImage>,
    record_path: PathBuf,
    tap: Arc<Tap>,
    witness: Option<Arc<DirectoryWitness>>,
    sentinel: Arc<Sentinel>,
    cpu: u64,
}

impl Host {
    fn open(settings: RoleSettings) -> Result<Self> {
        machine::host_check()?;
        // Before guest memory is mapped: it must never be part of the sentinel.
        let sentinel = Arc::new(Sentinel::spawn()?);
        let cpu = machine::cpu_identity()?;
        let image = Arc::new(FileImage::open(&settings.image)?);
        let record_path = Record::path_for(&settings.image);
        let batch = Limits::default().batch(image.size());
        let journal = Arc::new(FileImage::open_journal(Record::journal_for(&settings.image), batch)?);
        let recovery = storage::recover(&*image, &*journal)?;
        let mut record = Record::load(&record_path)?;
        if let Some(record) = &mut record {
            if record.pair != settings.pair {
                bail!(
                    "the image {} belongs to pair '{}', not '{}': use --pair {}, or another image",
                    settings.image.display(), record.pair, settings.pair, record.pair
                );
            }
            record.advance(&recovery);
        }
        let tap = Arc::new(Tap::open(&settings.tap)?);
        let known = record.as_ref().and_then(|record| record.witness.as_deref());
        let witness = settings
            .witness
            .as_ref()
            .map(|directory| DirectoryWitness::open(directory, &settings.pair, &settings.node, known))
            .transpose()?
            .map(Arc::new);
        Ok(Self { settings, image, journal, record_path, tap, witness, sentinel, cpu })
    }

    fn place(&self) -> RecordPlace {
        RecordPlace {
            path: self.record_path.clone(),
            pair: self.settings.pair.clone(),
            node: self.settings.node.clone(),
            witness: self.witness.as_ref().map(|witness| witness.mark().to_owned()),
        }
    }

    fn record(&self) -> Result<Option<Record>> {
        Ok(Record::load(&self.record_path)?)
    }

    fn replica(&self, record: Option<&Record>) -> Replica<FileImage> {
        let at = record.map_or(Tag::default(), |record| record.tag);
        Replica::new(Arc::clone(&self.image), Arc::clone(&self.journal), Limits::default(), at)
    }

    fn shape(&self) -> MachineShape {
        let mac: Vec<String> = self.settings.mac.iter().map(|byte| format!("{byte:02x}")).collect();
        MachineShape {
            memory_bytes: self.settings.memory_bytes,
            vcpus: 1,
            devices: vec![format!("net={}", mac.join(":")), "block".to_owned(), "console".to_owned(), "entropy".to_owned()],
            disk_bytes: self.image.size(),
            cpu: self.cpu,
        }
    }

    fn local(&self, record: Option<&Record>) -> Local {
        Local {
            pair: self.settings.pair.clone(),
            node: self.settings.node.clone(),
            shape: self.shape(),
            generation: record.map_or(Generation(0), |record| record.tag.generation),
            committed: record.map_or(Epoch(0), |record| record.tag.epoch),
            takeover_limit_ms: self.settings.takeover_limit.as_millis(),
            witness: self.witness.is_some(),
        }
    }

    /// A start without a peer is a contest too: refuses unless this host's state is provably the newest.
    fn contest(&self) -> Result<(Generation, Epoch)> {
        let record = self.record()?;
        let latest = self.witness.as_ref().map(|witness| witness.latest()).transpose()?.flatten();
        let known = record.as_ref().map(|record| failover::KnownState {
            generation: record.tag.generation,
            role: record.role,
            complete: record.complete,
        });
        let term = match failover::start_decision(known, latest, &self.settings.node) {
            Decision::Start { term } => term,
            Decision::Refuse(reason) => bail!("{reason}"),
        };
        if let Some(witness) = &self.witness
            && let Claim::LostTo(owner) = witness.claim(term)?
        {
            bail!("{owner} won term {term} a moment ago and runs the VM: start this host as its secondary");
        }
        let last_epoch = record.map_or(Epoch(0), |record| record.tag.epoch);
        self.place().store(RecordUpdate {
            generation: term,
            role: Role::Primary,
            committed: last_epoch,
            complete: true,
            clean: false,
        })?;
        Ok((term, last_epoch))
    }

    fn machine(&self, mapping: Mapping, port: &Arc<Port>) -> Result<(KvmVm, mpsc::UnboundedReceiver<PowerEvent>)> {
        let (sender, power) = mpsc::unbounded_channel();
        let config = MachineConfig {
            memory_bytes: self.settings.memory_bytes,
            mapping,
            mac: self.settings.mac,
            console: Box::new(Console(Vec::new())),
            on_power: Arc::new(move |event| {
                // A closed channel means that the role has ended.
                let _ = sender.send(event);
            }),
        };
        let net = link::port::unattached(Arc::clone(port));
        let disk = link::port::UnattachedDisk(self.image.size());
        let vm = KvmVm::new(config, Box::new(net), Box::new(disk)).context("the machine can't be built")?;
        Ok((vm, power))
    }

    async fn be_primary(
        &self,
        vm: Box<dyn Vm>,
        port: Arc<Port>,
        power: mpsc::UnboundedReceiver<PowerEvent>,
        start: Start,
        image_ready: Option<std::sync::mpsc::Receiver<Result<(), String>>>,
        outside: &mut Outside,
    ) -> Result<End> {
        let setup = primary::Setup {
            options: primary::protocol::Options {
                witness: self.witness.is_some(),
                takeover_limit: self.settings.takeover_limit,
                epoch_age_max: self.settings.epoch_age_max,
                unmatched_max: self.settings.unmatched_max,
                disk_bytes: self.image.size(),
            },
            start,
            pair: self.settings.pair.clone(),
            node: self.settings.node.clone(),
            peer: self.settings.peer.clone(),
            shape: self.shape(),
            vm,
            port,
            tap: Arc::clone(&self.tap),
            image: Arc::clone(&self.image),
            image_ready,
            record: self.place(),
            witness: self.witness.clone(),
            power,
            sentinel: Arc::clone(&self.sentinel),
        };
        Ok(match primary::run(setup, outside).await? {
            PrimaryOutcome::Ended(GoodbyeReason::Failed(reason)) => End::Failed(reason),
            PrimaryOutcome::Ended(reason) => End::Orderly(reason.to_string()),
            PrimaryOutcome::Fenced(reason) => End::Fenced(reason),
            PrimaryOutcome::Failed(reason) => End::Failed(reason),
        })
    }

    fn answer_waiting(&self, request: ControlRequest, address: SocketAddr) {
        let reply = match request.command {
            Command::Status => Ok(Answer::Status(Box::new(Status {
                pair: self.settings.pair.clone(),
                node: self.settings.node.clone(),
                role: "secondary".to_owned(),
                state: State::Starting,
                peer: Peer { node: None, addr: address.to_string(), connected: false },
                reason: Some("waiting for a primary".to_owned()),
                pid: std::process::id(),
                ..Status::default()
            }))),
            Command::Stop => Err("nothing runs here yet: end the process (SIGTERM)".to_owned()),
            Command::Checkpoint | Command::Takeover { .. } => {
                Err("this secondary has no primary yet: nothing to take over or to checkpoint".to_owned())
            }
        };
        // The asker may have gone.
        let _ = request.reply.send(reply);
    }
}

/// The guest's console, a log line for each of its lines.
struct Console(Vec<u8>);

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        const LINE_BYTES_MAX: usize = 4_096;
        for &byte in bytes {
            if byte == b'\n' || self.0.len() == LINE_BYTES_MAX {
                info!(target: "guest", "{}", String::from_utf8_lossy(&self.0).trim_end());
                self.0.clear();
            } else {
                self.0.push(byte);
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
