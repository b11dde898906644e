//! From checked settings to a running role, and from its outcome to the next one.
//!
//! Order of a start: what can be refused without a trace first (KVM, image, TAP, witness), then the contest
//! for the right to run, then the machine. Nothing is left half-started: everything is dropped on the way out.

mod follow;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use checkpoint::cpu::{self, CpuModel};
use checkpoint::failover::{self, Decision};
use checkpoint::handshake::{self, Local};
use checkpoint::pair::RecordUpdate;
use checkpoint::wire::{GoodbyeReason, Held, MachineShape};
use checkpoint::{Duration, Epoch, Generation, Role, Tag, limits};
use link::control::Server;
use link::port::{Port, UnattachedDisk};
use link::record::RecordPlace;
use link::{Established, Sentinel};
use machine::devices::net;
use machine::tap::Tap;
use machine::{KvmVm, MachineConfig, Mapping, PcConfig, Platform, PowerEvent, Vm};
use primary::Outside;
use primary::event::Outcome as PrimaryOutcome;
use primary::protocol::pace::Budget;
use primary::protocol::{Mode, Patience, Resume, Room, Start};
use storage::replica::Limits;
use storage::witness::{Claim, DirectoryWitness};
use storage::{FileImage, Image, NewFile, Record, Recovery, Replica};
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tracing::info;

use crate::bundle::GUEST_IMAGE;
use crate::cards::Card;
use crate::serial::{LogLines, Terminal};
use crate::settings::{RunSettings, Settings, VmSettings, Witness};

/// How a role's process ends when nothing failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// In order.
    Done,
    /// The contest was lost: the other side runs. Holds the reason.
    Fenced(String),
}

/// Runs the VM and has it protected by the other host.
///
/// # Errors
/// Fails if anything that the role needs is missing; nothing was started then. Later, if this side can't go on.
pub fn run_primary(settings: Settings) -> Result<Ending> {
    run(async {
        let stop = stop_signals()?;
        primary(Host::open(settings.into())?, stop).await
    })
}

/// Protects the VM of the other host.
///
/// # Errors
/// Fails if anything that the role needs is missing; nothing was started then. Later, if this side can't go on.
pub fn run_secondary(settings: Settings) -> Result<Ending> {
    run(async {
        let stop = stop_signals()?;
        follow::secondary(Host::open(settings.into())?, stop).await
    })
}

/// Runs the VM unprotected.
///
/// # Errors
/// Fails if anything that the VM needs is missing; nothing was started then.
pub fn run_alone(settings: RunSettings) -> Result<Ending> {
    run(async {
        let stop = stop_signals()?;
        primary(Host::open(settings.into())?, stop).await
    })
}

fn run(role: impl Future<Output = Result<Ending>> + Send + 'static) -> Result<Ending> {
    // The loop and the connections' tasks take turns on one thread: between two, each message would wake the other.
    let runtime = Builder::new_current_thread()
        .enable_all()
        .build()
        .context("the host refuses threads: raise its limits (ulimit -u)")?;
    // A task among theirs: what `block_on` itself runs is woken by a descriptor, by its own thread too.
    runtime.block_on(async {
        let ended = tokio::spawn(role).await;
        ended.unwrap_or_else(|panicked| std::panic::resume_unwind(panicked.into_panic()))
    })
}

/// Turns Ctrl-C and SIGTERM into an orderly end.
fn stop_signals() -> Result<watch::Receiver<bool>> {
    let (stop, asked) = watch::channel(false);
    let mut interrupt = signal(SignalKind::interrupt()).context("can't listen for SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("can't listen for SIGTERM")?;
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            stop.send_replace(true);
        }
    });
    Ok(asked)
}

async fn primary(mut host: Host, stop: watch::Receiver<bool>) -> Result<Ending> {
    let offered = host.settings.vm.cpu.model(&host.cpu, host.settings.vm.memory)?;
    let met = host.meet(&offered).await?;
    let cpu = met
        .as_ref()
        .map_or_else(|| offered.clone(), |met| met.welcome.cpu.clone());
    if let Some(bits) = crate::cpu::too_few_bits(&cpu, host.settings.vm.memory) {
        bail!(
            "the secondary's host has {bits} bits for an address, too few for this much memory: give both less --memory, \
             or take another host for the secondary"
        );
    }
    let left_out = offered.missing_from(&cpu);
    if !left_out.is_empty() {
        info!("the secondary's host lacks {}: so does the VM", cpu::listed(&left_out));
    }
    let (_server, control) = Server::start(&host.settings.vm.control)?;
    let (generation, last_epoch) = host.contest()?;
    host.keep_journal();
    let mut outside = Outside { control, stop };
    let ports = host.ports();
    let (mut vm, power) = host.machine(Mapping::Shared, &ports, &cpu)?;
    match host.settings.vm.linux {
        Some(_) => vm.start_pc(),
        None => vm.boot(GUEST_IMAGE, &host.settings.vm.cmdline),
    }
    .context("the guest can't be booted")?;
    info!(node = host.settings.node, generation = generation.0, "running");
    let start = Start::Boot { generation, last_epoch };
    host.be_primary((Box::new(vm), cpu), ports, power, start, (met, None), &mut outside)
        .await
}

/// Told when the image holds all that the guest was told is written.
type ImageReady = std::sync::mpsc::Receiver<Result<(), String>>;

/// What both kinds of settings have in common for a role.
struct RoleSettings {
    /// Name of the pair; an unprotected VM has none.
    pair: Option<String>,
    node: String,
    vm: VmSettings,
    peer: Option<SocketAddr>,
    listen: Option<SocketAddr>,
    witness: Option<Witness>,
    takeover_limit: Duration,
    mode: Mode,
    checkpoint_every: Duration,
    epoch_age_max: Duration,
    unmatched_max: Duration,
    ahead: Option<Budget>,
    pause_budget: Option<Duration>,
    checkpoint_memory: u64,
    resume: Resume,
    streams: usize,
}

impl From<Settings> for RoleSettings {
    fn from(settings: Settings) -> Self {
        Self {
            pair: Some(settings.pair),
            node: settings.node,
            vm: settings.vm,
            peer: settings.peer,
            listen: settings.listen,
            witness: settings.witness,
            takeover_limit: settings.takeover_limit.into(),
            mode: settings.mode,
            checkpoint_every: settings.checkpoint_every.into(),
            epoch_age_max: settings.epoch_max_age.into(),
            unmatched_max: settings.unmatched_limit.into(),
            ahead: Some(Budget {
                bytes_per_second: settings.ahead_rate,
                // Few beside the room that there is, too.
                few_pages: (Budget::default().few_pages)
                    .min(settings.checkpoint_memory / limits::PAGE_BYTES as u64 / 4),
                ..Budget::default()
            }),
            pause_budget: settings.pause_budget.map(Into::into),
            checkpoint_memory: settings.checkpoint_memory,
            resume: settings.resume,
            streams: settings.streams,
        }
    }
}

impl From<RunSettings> for RoleSettings {
    fn from(settings: RunSettings) -> Self {
        Self {
            pair: None,
            node: settings.node,
            vm: settings.vm,
            peer: None,
            listen: None,
            witness: None,
            takeover_limit: limits::TAKEOVER_LIMIT_DEFAULT,
            mode: Mode::default(),
            checkpoint_every: limits::CHECKPOINT_EVERY,
            epoch_age_max: limits::EPOCH_AGE_MAX,
            unmatched_max: limits::UNMATCHED_MAX,
            ahead: None,
            pause_budget: None,
            checkpoint_memory: u64::MAX,
            resume: Resume::default(),
            streams: 1,
        }
    }
}

/// What a host has open for as long as a role runs.
struct Host {
    /// The journal, if it was made now and nothing is in it. Removed, by this place before the image, while that is locked: nobody else
    /// can have it.
    new_journal: Option<NewFile>,
    settings: RoleSettings,
    image: Arc<FileImage>,
    journal: Arc<FileImage>,
    record_path: PathBuf,
    /// One a network card.
    taps: Vec<Arc<Tap>>,
    witness: Option<Arc<DirectoryWitness>>,
    sentinel: Arc<Sentinel>,
    /// Where the serial port of a Linux guest is.
    terminal: Option<Terminal>,
    /// What a Linux guest boots, as the other host is told.
    program: Option<String>,
    /// What it can give a VM.
    cpu: CpuModel,
}

impl Host {
    fn open(settings: RoleSettings) -> Result<Self> {
        machine::host_check()?;
        // Before guest memory is mapped: it must never be part of the sentinel.
        let sentinel = Arc::new(Sentinel::spawn()?);
        let cpu = crate::cpu::of_host()?;
        let image = Arc::new(FileImage::open(&settings.vm.image)?);
        let record_path = Record::path_for(&settings.vm.image);
        let record = Record::load(&record_path)?;
        if let (Some(record), Some(pair)) = (&record, &settings.pair)
            && record.pair != *pair
        {
            bail!(
                "the image {} belongs to pair '{}', not '{pair}': say --pair {}, or use another image",
                settings.vm.image.display(),
                record.pair,
                record.pair
            );
        }
        let open = |card: &Card| match card.offloads {
            true => Tap::open_with_offloads(&card.tap),
            false => Tap::open(&card.tap),
        };
        let taps = settings.vm.cards.iter().map(|card| open(card).map(Arc::new));
        let taps = taps.collect::<Result<_, _>>()?;
        let known = record.as_ref().and_then(|record| record.witness.as_deref());
        let witness = match (&settings.witness, &settings.pair) {
            (Some(Witness::Directory(path)), Some(pair)) => {
                Some(Arc::new(DirectoryWitness::open(path, pair, &settings.node, known)?))
            }
            _ => None,
        };
        let linux = settings.vm.linux.as_ref();
        if let Some(linux) = linux {
            // Refused now, and opened again when there is a machine for it.
            linux.program(&settings.vm.cmdline)?;
        }
        let program = linux.map(|linux| linux.fingerprint(&settings.vm.cmdline)).transpose()?;
        let terminal = linux.map(|linux| Terminal::open(&linux.serial)).transpose()?;
        let batch = Limits::default().batch(image.size());
        let (journal, new_journal) = FileImage::open_journal(Record::journal_for(&settings.vm.image), batch)?;
        let host = Self {
            new_journal,
            settings,
            image,
            journal: Arc::new(journal),
            record_path,
            taps,
            witness,
            sentinel,
            terminal,
            program,
            cpu,
        };
        host.recover()?;
        Ok(host)
    }

    /// Brings the image and its record up to what the journal has. Nothing else writes to them.
    fn recover(&self) -> Result<Recovery> {
        let recovery = storage::recover(&*self.image, &*self.journal)?;
        if let Some(mut record) = self.record()? {
            let before = record.tag;
            record.advance(&recovery);
            if record.tag != before {
                record.store(&self.record_path)?;
            }
        }
        Ok(recovery)
    }

    fn keep_journal(&mut self) {
        self.new_journal.take().into_iter().for_each(NewFile::keep);
    }

    fn pair(&self) -> &str {
        self.settings.pair.as_deref().unwrap_or("none")
    }

    fn place(&self) -> RecordPlace {
        RecordPlace {
            path: self.settings.pair.is_some().then(|| self.record_path.clone()),
            pair: self.pair().to_owned(),
            node: self.settings.node.clone(),
            witness: self.witness.as_ref().map(|witness| witness.mark().to_owned()),
        }
    }

    fn record(&self) -> Result<Option<Record>> {
        Ok(Record::load(&self.record_path)?)
    }

    fn replica(&self, record: Option<&Record>) -> Replica<FileImage> {
        let at = record.map_or_else(Tag::default, |record| record.tag);
        Replica::new(
            Arc::clone(&self.image),
            Arc::clone(&self.journal),
            Limits::default(),
            at,
        )
    }

    fn shape(&self, cpu: &CpuModel) -> MachineShape {
        let cards = self.settings.vm.cards.iter();
        let mut devices: Vec<String> = cards.map(Card::to_string).collect();
        devices.extend(["block", "console", "entropy"].map(str::to_owned));
        let linux = self.settings.vm.linux.as_ref();
        devices.extend(self.program.clone());
        MachineShape {
            memory_bytes: self.settings.vm.memory,
            vcpus: linux.map_or(1, |linux| linux.vcpus.into()),
            devices,
            disk_bytes: self.image.size(),
            cpu: cpu.clone(),
        }
    }

    /// This host's side of a handshake with that CPU: the VM's, or what this host can give.
    fn local(&self, record: Option<&Record>, cpu: &CpuModel) -> Local {
        Local {
            pair: self.pair().to_owned(),
            node: self.settings.node.clone(),
            shape: self.shape(cpu),
            adapts: false,
            generation: record.map_or(Generation(0), |record| record.tag.generation),
            owner: record.is_some_and(|record| record.role == Role::Primary),
            committed: record.map_or(Epoch(0), |record| record.tag.epoch),
            held: Held::default(),
            held_cpu: None,
            takeover_limit_ms: self.settings.takeover_limit.as_millis(),
            witness: self.witness.is_some(),
            streams: self.settings.streams,
        }
    }

    /// Meets the secondary before anything is started, if there is one yet: one that refuses for good ends the start.
    async fn meet(&self, cpu: &CpuModel) -> Result<Option<Established>> {
        let Some(peer) = self.settings.peer else {
            return Ok(None);
        };
        let local = Local {
            adapts: self.settings.vm.cpu.adapts(),
            ..self.local(self.record()?.as_ref(), cpu)
        };
        let judge = |welcome: &_| handshake::judge_welcome(&local, welcome);
        match link::connect(peer, handshake::hello(&local), judge).await {
            Ok(established) => Ok(Some(established)),
            Err(error) if error.is_passing() => {
                info!("no secondary yet: {}", link::describe(&error));
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// A start without a peer is a contest too: refuses unless this host's state is provably the newest.
    fn contest(&self) -> Result<(Generation, Epoch)> {
        let record = self.record()?;
        if self.settings.pair.is_none() {
            if record.as_ref().is_some_and(|record| !record.complete) {
                bail!(
                    "the image {} is in the middle of a sync: start it as a secondary",
                    self.settings.vm.image.display()
                );
            }
            // What is written now is in no record: the image must never be taken for the checkpoint it was.
            storage::journal::forget(&*self.journal)?;
            return Ok((Generation(1), Epoch(0)));
        }
        let latest = self
            .witness
            .as_ref()
            .map(|witness| witness.latest())
            .transpose()?
            .flatten();
        let known = record.as_ref().map(|record| failover::KnownState {
            generation: record.tag.generation,
            role: record.role,
            complete: record.complete,
        });
        let term = match failover::start_decision(known, latest, &self.settings.node) {
            Decision::Start { term } => term,
            Decision::Refuse(reason) => bail!("{reason}"),
        };
        // What the guest finds at its boot it takes for durable; an earlier process may have left it in the page cache.
        self.image.flush().context("the disk image can't be flushed")?;
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

    /// Makes the network ports of a machine.
    fn ports(&self) -> Vec<Arc<Port>> {
        Port::all(self.settings.vm.cards.len())
    }

    fn macs(&self) -> Vec<[u8; 6]> {
        self.settings.vm.cards.iter().map(|card| card.mac.0).collect()
    }

    fn machine(
        &self,
        mapping: Mapping,
        ports: &[Arc<Port>],
        cpu: &CpuModel,
    ) -> Result<(KvmVm, mpsc::UnboundedReceiver<PowerEvent>)> {
        let (sender, power) = mpsc::unbounded_channel();
        let platform = match (&self.settings.vm.linux, &self.terminal) {
            (Some(linux), Some(terminal)) => Platform::Pc(PcConfig {
                vcpus: linux.vcpus,
                serial: terminal.output(),
                program: linux.program(&self.settings.vm.cmdline)?,
            }),
            _ => Platform::Bundled,
        };
        let config = MachineConfig {
            memory_bytes: self.settings.vm.memory,
            cpu: crate::cpu::for_machine(cpu),
            mapping,
            platform,
            cards: self.settings.vm.cards.iter().map(Card::config).collect(),
            console: Box::new(LogLines::default()),
            on_power: Arc::new(move |event| {
                // A closed channel means that the role has ended.
                let _ = sender.send(event);
            }),
        };
        let (nets, disk) = self.unattached(ports);
        let vm = KvmVm::new(config, nets, Box::new(disk)).context("the machine can't be built")?;
        if let (Some(terminal), Some(port)) = (&self.terminal, vm.serial()) {
            terminal.feed(&port);
        }
        Ok((vm, power))
    }

    /// What is behind the devices of a machine without a role.
    fn unattached(&self, ports: &[Arc<Port>]) -> (Vec<Box<dyn net::Backend>>, UnattachedDisk) {
        (link::port::unattached(ports), UnattachedDisk(self.image.size()))
    }

    async fn be_primary(
        &self,
        (vm, cpu): (Box<dyn Vm>, CpuModel),
        ports: Vec<Arc<Port>>,
        power: mpsc::UnboundedReceiver<PowerEvent>,
        start: Start,
        (met, image_ready): (Option<Established>, Option<ImageReady>),
        outside: &mut Outside,
    ) -> Result<Ending> {
        let setup = primary::Setup {
            options: primary::protocol::Options {
                mode: self.settings.mode,
                checkpoint_every: self.settings.checkpoint_every,
                patience: Patience::default(),
                resume: self.settings.resume,
                witness: self.witness.is_some(),
                takeover_limit: self.settings.takeover_limit,
                epoch_age_max: self.settings.epoch_age_max,
                unmatched_max: self.settings.unmatched_max,
                ahead: self.settings.ahead,
                pause_budget: self.settings.pause_budget,
                room: Room {
                    // On the secondary each page may be in its own VM and in the stage.
                    pages: self.settings.checkpoint_memory / (2 * limits::PAGE_BYTES as u64),
                    ..Room::default()
                },
                memory_bytes: self.settings.vm.memory,
                disk_bytes: self.image.size(),
                macs: self.macs(),
                flow_secret: link::entropy::secret(),
            },
            start,
            pair: self.pair().to_owned(),
            node: self.settings.node.clone(),
            peer: self.settings.peer,
            streams: self.settings.streams,
            shape: self.shape(&cpu),
            vm,
            ports,
            taps: self.taps.clone(),
            image: Arc::clone(&self.image),
            image_ready,
            record: self.place(),
            witness: self.witness.clone(),
            power,
            sentinel: Arc::clone(&self.sentinel),
            met,
        };
        Ok(match primary::run(setup, outside).await? {
            PrimaryOutcome::Ended(GoodbyeReason::Failed(reason)) | PrimaryOutcome::Failed(reason) => bail!("{reason}"),
            PrimaryOutcome::Ended(reason) => {
                info!("ended: {reason}");
                Ending::Done
            }
            PrimaryOutcome::Fenced(reason) => Ending::Fenced(reason),
        })
    }
}
