//! `tandem bench linux`: what clients get from a Linux guest by itself, and protected in each mode.
//!
//! The guest is the user's, with what [`super::guest`] asks for. One subject is up at a time: an idle Linux guest costs something
//! too. The guest by itself is measured first and last; a ratio is to the mean of both. At the end of each mode its primary is
//! killed.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use link::control::ask_history;
use link::status::{CheckpointTrace, Status};
use serde::Serialize;

use super::guest::{self, GuestFigures, LoadFigures};
use super::load::Load;
use super::report::Target as Aim;
use super::{Progress, Spread, with_logs};
use crate::clients::Target;
use crate::lab::Host;
use crate::stage::tidy::Tidy;
use crate::stage::{LinuxGuest, Stage};
use crate::units::{ByteSize, Span};

const MODES: [&str; 3] = ["lockstep", "buffered", "auto"];
/// For how long an idle pair's checkpoints are looked at.
const IDLE: Duration = Duration::from_secs(8);
/// Connections are up, and have had answers, before the primary is killed.
const BEFORE_KILL: Duration = Duration::from_secs(2);
const AFTER_KILL: Duration = Duration::from_secs(2);
const TAKEOVER_LIMIT: Duration = Duration::from_secs(60);

/// What the benchmark of Linux guests is told.
#[derive(Args, Clone, Debug)]
pub struct LinuxOptions {
    /// The guest's kernel
    #[arg(long, value_name = "PATH")]
    pub kernel: PathBuf,
    /// Its initial RAM disk
    #[arg(long, value_name = "PATH")]
    pub initrd: PathBuf,
    /// Its disk, which is copied: with nginx on port 80, redis on port 6379 for anybody (docs/debian-guest --minimal makes
    /// one), and echo, discard and characters on ports 7, 9 and 19
    #[arg(long, value_name = "PATH")]
    pub image: PathBuf,
    /// Its virtual processors
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    pub vcpus: u8,
    /// Its memory
    #[arg(long, value_name = "SIZE", default_value_t = ByteSize::mib(192))]
    pub memory: ByteSize,
    /// More words for its kernel's command line
    #[arg(long, value_name = "WORDS", default_value = "")]
    pub cmdline: String,
    /// The pair's --takeover-limit: an emulated host that carries both sides and the clients stands still for long
    #[arg(long, value_name = "TIME", default_value = "10s")]
    pub takeover_limit: Span,
    /// Modes to measure, with commas between them [default: lockstep,buffered,auto]
    #[arg(long, value_name = "MODE,…", value_delimiter = ',', value_parser = MODES)]
    pub modes: Vec<String>,
    /// Measure each load for a second only
    #[arg(long)]
    pub quick: bool,
    /// Print one JSON object instead of tables
    #[arg(long)]
    pub json: bool,
    /// Where the copies of the disk are kept [default: TMPDIR, or /tmp]
    #[arg(long, value_name = "DIR")]
    pub folder: Option<PathBuf>,
}

/// What was found.
#[derive(Debug, Serialize)]
pub(super) struct LinuxReport {
    processors: usize,
    vcpus: u8,
    memory_mib: u64,
    alone: GuestFigures,
    alone_again: GuestFigures,
    modes: Vec<Protected>,
}

/// The guest, protected in one mode.
#[derive(Debug, Serialize)]
struct Protected {
    mode: String,
    #[serde(flatten)]
    figures: GuestFigures,
    /// For each load.
    under_load: Vec<UnderLoad>,
    idle: Checkpoints,
    killed: Killed,
}

/// The pair, while there was load.
#[derive(Debug, Serialize)]
struct UnderLoad {
    checkpoints_per_s: f64,
    divergences: u64,
    checkpoints: Checkpoints,
}

/// What checkpoints cost; those that the primary still knew of.
#[derive(Debug, Serialize)]
struct Checkpoints {
    count: usize,
    pause_us: Spread,
    pages: Spread,
    bytes: Spread,
}

/// What clients saw when the primary's host process was killed.
#[derive(Debug, Serialize)]
struct Killed {
    /// From the kill to the first answer to a datagram sent after it.
    first_answer_ms: f64,
    /// The longest time from one answer to the next on a connection with a line every 20 ms.
    tcp_gap_ms: f64,
    tcp_broken: u64,
}

impl LinuxReport {
    /// The targets of protection.
    pub(super) fn targets(&self) -> Vec<Aim> {
        let base = self.alone.mean(&self.alone_again);
        let figures: Vec<_> = self.modes.iter().map(|mode| &mode.figures).collect();
        let mut targets = guest::targets(&base, &figures);
        if let Some(lockstep) = self.modes.iter().find(|mode| mode.mode == "lockstep") {
            let (pause, bytes) = (lockstep.idle.pause_us.p50 / 1e3, lockstep.idle.bytes.p50 / 1e3);
            targets.extend([
                Aim::at_most("idle checkpoint in lockstep, median pause", 20.0, pause, "ms"),
                Aim::at_most("idle checkpoint in lockstep, median bytes of pages", 50.0, bytes, "kB"),
            ]);
        }
        targets
    }

    /// Returns the tables.
    pub(super) fn text(&self) -> String {
        let mut text = format!(
            "\nA Linux guest of {} MiB and {} vCPUs on {} processors: requests/s (p50, p99)\n",
            self.memory_mib, self.vcpus, self.processors
        );
        let base = self.alone.mean(&self.alone_again);
        for (title, figures) in [("by itself", &self.alone), ("by itself, again", &self.alone_again)] {
            let _ = write!(text, "{title}\n{}", figures.text(None));
        }
        for mode in &self.modes {
            let _ = write!(text, "{}\n{}", mode.mode, mode.figures.text(Some(&base)));
            let _ = writeln!(text, "    {:16} {}", "primary killed", mode.killed.told());
        }
        text.push_str("\nCheckpoints: pause in ms, pages, kB of pages, each median (99th percentile)\n");
        for mode in &self.modes {
            let _ = writeln!(text, "{}\n    {:16} {}", mode.mode, "idle", mode.idle.told());
            for (load, under) in mode.figures.loads.iter().zip(&mode.under_load) {
                let _ = writeln!(
                    text,
                    "    {:16} {}; {:.1}/s, {} differences",
                    load.title(),
                    under.checkpoints.told(),
                    under.checkpoints_per_s,
                    under.divergences
                );
            }
        }
        text
    }
}

impl Killed {
    fn told(&self) -> String {
        format!(
            "first answer after {:.0} ms, longest gap of TCP {:.0} ms, {} connections broken",
            self.first_answer_ms, self.tcp_gap_ms, self.tcp_broken
        )
    }
}

impl Checkpoints {
    fn of(traces: &[CheckpointTrace]) -> Self {
        let spread = |of: fn(&CheckpointTrace) -> f64| Spread::of(traces.iter().map(of).collect());
        Self {
            count: traces.len(),
            pause_us: spread(|trace| trace.pause_us),
            pages: spread(|trace| trace.pages as f64),
            bytes: spread(|trace| trace.bytes as f64),
        }
    }

    fn told(&self) -> String {
        format!(
            "{:.1} ({:.1}), {:.0} ({:.0}), {:.0} ({:.0})",
            self.pause_us.p50 / 1e3,
            self.pause_us.p99 / 1e3,
            self.pages.p50,
            self.pages.p99,
            self.bytes.p50 / 1e3,
            self.bytes.p99 / 1e3
        )
    }
}

/// Measures everything.
pub(super) fn run(options: &LinuxOptions, tidy: &Tidy, progress: &Progress) -> Result<LinuxReport> {
    let modes: Vec<String> = match &*options.modes {
        [] => MODES.map(str::to_owned).into(),
        given => given.to_vec(),
    };
    let bench = Bench {
        options,
        loads: guest::loads(options.quick),
        target: Target::linux(Target::bundled().v4),
        tidy,
        progress,
    };
    let alone = bench.on_stage("by itself", |stage| bench.alone(stage))?;
    let modes = modes
        .iter()
        .map(|mode| bench.on_stage(mode, |stage| bench.protected(stage, mode)));
    let modes = modes.collect::<Result<_>>()?;
    Ok(LinuxReport {
        processors: std::thread::available_parallelism().map_or(0, usize::from),
        vcpus: options.vcpus,
        memory_mib: options.memory.0 >> 20,
        alone,
        modes,
        alone_again: bench.on_stage("by itself", |stage| bench.alone(stage))?,
    })
}

struct Bench<'a> {
    options: &'a LinuxOptions,
    loads: Vec<Load>,
    target: Target,
    tidy: &'a Tidy,
    progress: &'a Progress,
}

impl Bench<'_> {
    /// Measures one subject on a stage of its own.
    fn on_stage<T>(&self, what: &str, measure: impl Fn(&mut Stage) -> Result<T>) -> Result<T> {
        self.progress.tell(&format!("{what}: starts"));
        let options = self.options;
        let guest = LinuxGuest {
            kernel: options.kernel.clone(),
            initrd: options.initrd.clone(),
            image: options.image.clone(),
            vcpus: options.vcpus,
            cmdline: options.cmdline.clone(),
        };
        let folder = self.tidy.folder("stage")?;
        let mut stage = Stage::with_linux(folder.clone(), options.memory.to_string(), &guest)?;
        let measured = measure(&mut stage);
        let measured = measured.map_err(|error| with_logs(error, &stage, self.tidy).context(what.to_owned()));
        stage.clear();
        drop(stage);
        std::fs::remove_dir_all(&folder).with_context(|| format!("can't remove {}", folder.display()))?;
        measured
    }

    fn alone(&self, stage: &mut Stage) -> Result<GuestFigures> {
        stage.start_alone(Host::A)?;
        stage.await_guest(self.tidy)?;
        guest::await_services(stage.lab().client(), self.target, self.tidy)?;
        let loads = self.loads.iter();
        let loads = loads.map(|load| guest::measure(stage.lab().client(), self.target, *load, self.progress));
        let loads = loads.collect::<Result<_>>()?;
        self.with_steady(stage, loads)
    }

    fn protected(&self, stage: &mut Stage, mode: &str) -> Result<Protected> {
        let limit = self.options.takeover_limit.to_string();
        stage.start_pair(&["--mode", mode, "--takeover-limit", &limit])?;
        stage.await_guest(self.tidy)?;
        guest::await_services(stage.lab().client(), self.target, self.tidy)?;
        stage.await_protected(self.tidy)?;
        // What a boot leaves to do is no idling.
        self.tidy.sleep(Duration::from_secs(3))?;
        let from = newest(stage)?;
        self.tidy.sleep(IDLE)?;
        let idle = Checkpoints::of(&since(stage, from)?);
        let (mut loads, mut under_load) = (Vec::new(), Vec::new());
        for load in &self.loads {
            let (before, from) = (status(stage)?, newest(stage)?);
            loads.push(guest::measure(stage.lab().client(), self.target, *load, self.progress)?);
            let after = status(stage)?;
            let seconds = (load.warm_up + load.span).as_secs_f64();
            let under = UnderLoad {
                checkpoints_per_s: after.checkpoints.total.saturating_sub(before.checkpoints.total) as f64 / seconds,
                divergences: after.divergences.saturating_sub(before.divergences),
                checkpoints: Checkpoints::of(&since(stage, from)?),
            };
            under_load.push(under);
        }
        let figures = self.with_steady(stage, loads)?;
        Ok(Protected {
            mode: mode.to_owned(),
            figures,
            under_load,
            idle,
            killed: self.kill(stage)?,
        })
    }

    fn with_steady(&self, stage: &Stage, loads: Vec<LoadFigures>) -> Result<GuestFigures> {
        let span = guest::steady_span(self.options.quick);
        let steady = guest::steady(stage.lab().client(), self.target, span, self.tidy)?;
        self.progress.tell(&steady.told());
        Ok(GuestFigures { loads, steady })
    }

    /// Kills the primary's process while clients ask every 20 ms.
    fn kill(&self, stage: &mut Stage) -> Result<Killed> {
        stage.await_protected(self.tidy)?;
        let clients = guest::start_steady(stage.lab().client(), self.target)?;
        self.tidy.sleep(BEFORE_KILL)?;
        let killed = stage.take(Host::A)?.kill()?;
        let answered = || Ok(clients.first_answer_since(killed));
        let answered = self
            .tidy
            .wait("an answer after the primary was killed", TAKEOVER_LIMIT, answered)?;
        self.tidy.sleep(AFTER_KILL)?;
        let steady = guest::end_steady(clients)?;
        let killed = Killed {
            first_answer_ms: answered.saturating_duration_since(killed).as_secs_f64() * 1e3,
            tcp_gap_ms: steady.tcp_gap_us / 1e3,
            tcp_broken: steady.tcp_broken,
        };
        self.progress.tell(&format!("killed: {}", killed.told()));
        Ok(killed)
    }
}

fn status(stage: &mut Stage) -> Result<Status> {
    stage.role(Host::A)?.status()?.context("the primary tells no status")
}

fn history(stage: &mut Stage) -> Result<Vec<CheckpointTrace>> {
    ask_history(stage.role(Host::A)?.control()).context("the primary tells no history")
}

/// Returns the epoch of the last checkpoint.
fn newest(stage: &mut Stage) -> Result<Option<u64>> {
    Ok(history(stage)?.last().map(|trace| trace.epoch))
}

/// Returns the checkpoints after an epoch that the primary still knows of.
fn since(stage: &mut Stage, epoch: Option<u64>) -> Result<Vec<CheckpointTrace>> {
    let traces = history(stage)?.into_iter();
    Ok(traces.filter(|trace| Some(trace.epoch) > epoch).collect())
}
