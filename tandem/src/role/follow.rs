//! The secondary between two primaries: it waits, follows, and waits again with what it still has.
//!
//! A secondary that lost its primary and the contest, or whose pairing was cut short, keeps its machine, stopped. Its
//! memory and its disk are a checkpoint that the primary knows, so that the next pairing ships a difference only.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use checkpoint::cpu::CpuModel;
use checkpoint::handshake;
use checkpoint::wire::Held;
use checkpoint::{Generation, Tag, limits};
use link::control::{Answer, Command, ControlRequest, Server};
use link::port::Port;
use link::status::{Peer, State, Status};
use link::{Established, Listener};
use machine::{Mapping, PowerEvent, Vm};
use primary::Outside;
use primary::protocol::Start;
use secondary::Finished;
use secondary::event::{Outcome, TakenOver};
use storage::Record;
use tokio::sync::{mpsc, watch};
use tracing::{info, warn};

use super::{Ending, Host, ImageReady};

/// A machine without a role, stopped.
struct Machine {
    vm: Box<dyn Vm>,
    /// The CPU that its guest sees.
    cpu: CpuModel,
    ports: Vec<Arc<Port>>,
    power: mpsc::UnboundedReceiver<PowerEvent>,
}

/// What a secondary that waits has, and tells.
struct Waiting {
    address: SocketAddr,
    /// The machine of the pairing before, and the checkpoint whose memory it has.
    kept: Option<(Machine, Tag)>,
    state: State,
    reason: String,
}

/// Waits for primaries, follows them, and takes over.
pub(super) async fn secondary(mut host: Host, stop: watch::Receiver<bool>) -> Result<Ending> {
    let address = host
        .settings
        .listen
        .ok_or_else(|| anyhow!("a secondary needs --listen ADDRESS:PORT"))?;
    let (_server, control) = Server::start(&host.settings.vm.control)?;
    let mut listener = Listener::bind(address)?;
    let mut outside = Outside { control, stop };
    let mut waiting = Waiting {
        address,
        kept: None,
        state: State::Starting,
        reason: "waiting for a primary".to_owned(),
    };
    info!(node = host.settings.node, %address, "waiting for a primary");
    loop {
        let recovery = host.recover()?;
        let record = host.record()?;
        let held = Held {
            memory: waiting.kept.as_ref().map(|(_, tag)| *tag),
            disk: record.as_ref().and_then(|record| record.checkpoint(&recovery)),
        };
        let Some(established) = accept(&host, record.as_ref(), held, &mut listener, &mut waiting, &mut outside).await?
        else {
            return Ok(Ending::Done);
        };
        host.keep_journal();
        let cpu = established.welcome.cpu.clone();
        let machine = match waiting.kept.take() {
            Some((machine, _)) if machine.cpu == cpu => machine,
            _ => Machine::new(&host, cpu.clone())?,
        };
        let ports = machine.ports.clone();
        let setup = setup(&host, record.as_ref(), established, machine);
        let Finished {
            outcome,
            vm,
            power,
            image_ready,
        } = secondary::run(setup, &mut outside.control, &mut outside.stop).await?;
        let vm = vm.ok_or_else(|| anyhow!("the machine was lost with its thread"))?;
        let machine = Machine { vm, cpu, ports, power };
        match outcome {
            Outcome::Ended(reason) => {
                info!("ended: {reason}");
                return Ok(Ending::Done);
            }
            Outcome::Failed(reason) => bail!("{reason}"),
            Outcome::Fenced { reason, memory } => {
                warn!("fenced: {reason}; waiting for it to pair again");
                waiting.kept = Some((machine.stand_down(&host)?, memory));
                waiting.state = State::Fenced;
                waiting.reason = reason;
            }
            Outcome::Unpaired { reason, memory } => {
                warn!("{reason}; waiting for a primary");
                if let Some(memory) = memory {
                    waiting.kept = Some((machine.stand_down(&host)?, memory));
                } else {
                    waiting.state = State::Starting;
                    waiting.reason = reason;
                }
            }
            Outcome::TakenOver(taken) => {
                drop(listener);
                return go_on(&host, *taken, machine, image_ready, outside).await;
            }
        }
    }
}

/// One acceptance until it succeeds: giving it up would end a handshake that is under way. `None` at an orderly end. What waits is its
/// alone meanwhile: a machine can't be shared between threads.
async fn accept(
    host: &Host,
    record: Option<&Record>,
    held: Held,
    listener: &mut Listener,
    waiting: &mut Waiting,
    outside: &mut Outside,
) -> Result<Option<Established>> {
    let local = handshake::Local {
        held,
        held_cpu: waiting.kept.as_ref().map(|(machine, _)| machine.cpu.clone()),
        ..host.local(record, &host.cpu)
    };
    let judge = |hello: &_, session| handshake::judge_hello(&local, hello, session);
    let mut accepted = pin!(listener.accept(judge));
    loop {
        tokio::select! {
            established = &mut accepted => return Ok(Some(established)),
            Some(request) = outside.control.recv() => waiting.answer(host, request),
            _ = outside.stop.changed() => return Ok(None),
        }
    }
}

fn setup(host: &Host, record: Option<&Record>, established: Established, machine: Machine) -> secondary::Setup {
    secondary::Setup {
        options: secondary::protocol::Options {
            witness: host.witness.is_some(),
            takeover_limit: host.settings.takeover_limit,
            generation: record.map_or(Generation(0), |record| record.tag.generation),
            held: established.welcome.held,
            cards: host.settings.vm.cards.len(),
            // Judged in the handshake.
            streams: established.welcome.streams as usize,
            room: host.settings.checkpoint_memory / limits::PAGE_BYTES as u64,
            unsent_bytes: checkpoint::limits::UNSENT_BYTES_MAX,
        },
        pair: host.pair().to_owned(),
        node: host.settings.node.clone(),
        established,
        vm: machine.vm,
        ports: machine.ports,
        image: Arc::clone(&host.image),
        replica: host.replica(record),
        record: host.place(),
        witness: host.witness.clone(),
        power: machine.power,
        sentinel: Arc::clone(&host.sentinel),
    }
}

/// Runs on as the primary.
async fn go_on(
    host: &Host,
    taken: TakenOver,
    machine: Machine,
    image_ready: Option<ImageReady>,
    mut outside: Outside,
) -> Result<Ending> {
    let TakenOver {
        generation,
        last_epoch,
        network,
        inputs,
        outputs,
    } = taken;
    info!(generation = generation.0, "took over");
    let mut stale = 0;
    for tap in &host.taps {
        stale += tap.drain().context("a TAP can't be read")?;
    }
    tracing::debug!(stale, "frames that the primary's guest already had");
    let start = Start::TakenOver {
        generation,
        last_epoch,
        network,
        inputs,
        outputs,
    };
    let Machine {
        vm,
        cpu,
        ports,
        mut power,
    } = machine;
    // What the guest did with its power switch here may have been undone by a load since. A guest that is at its end says so again
    // when it is resumed.
    while power.try_recv().is_ok() {}
    host.be_primary((vm, cpu), ports, power, start, (None, image_ready), &mut outside)
        .await
}

impl Machine {
    fn new(host: &Host, cpu: CpuModel) -> Result<Self> {
        let ports = host.ports();
        let (vm, power) = host.machine(Mapping::Private, &ports, &cpu)?;
        Ok(Self {
            vm: Box::new(vm),
            cpu,
            ports,
            power,
        })
    }

    /// Takes the machine out of its role: nothing reaches its devices any more, and what its guest wrote to the disk is
    /// forgotten.
    fn stand_down(mut self, host: &Host) -> Result<Self> {
        self.ports.iter().for_each(|port| port.clear());
        let (nets, disk) = host.unattached(&self.ports);
        self.vm.set_backends(nets, Box::new(disk))?;
        Ok(self)
    }
}

impl Waiting {
    fn answer(&self, host: &Host, request: ControlRequest) {
        let reply = match request.command {
            Command::Status => Ok(Answer::Status(Box::new(Status {
                pair: host.pair().to_owned(),
                node: host.settings.node.clone(),
                role: "secondary".to_owned(),
                state: self.state,
                generation: self.kept.as_ref().map_or(0, |(_, tag)| tag.generation.0),
                peer: Peer {
                    node: None,
                    addr: self.address.to_string(),
                    connected: false,
                    ..Peer::default()
                },
                reason: Some(self.reason.clone()),
                pid: std::process::id(),
                ..Status::default()
            }))),
            Command::Stop => Err("nothing runs here: end the process (SIGTERM)".to_owned()),
            Command::History | Command::Flows { .. } | Command::Capture => {
                Err("this side is the secondary: ask the primary".to_owned())
            }
            Command::Checkpoint | Command::Takeover { .. } => {
                Err("this secondary has no primary: nothing to take over or to checkpoint".to_owned())
            }
        };
        // The asker may have gone.
        let _ = request.reply.send(reply);
    }
}
