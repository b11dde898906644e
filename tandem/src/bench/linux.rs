//! `tandem bench linux`: what clients get from a Linux guest by itself, and protected in each mode.
//!
//! The guest is the user's, with nginx on port 80 and redis on port 6379, as `docs/debian-guest` makes one. One subject is up at a time: an
//! idle Linux guest costs something too. The guest by itself is measured first and last; a ratio is to the mean of both.

use std::fmt::Write as _;
use std::net::TcpStream;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use clap::Args;
use link::control::ask_history;
use link::status::CheckpointTrace;
use serde::Serialize;

use super::load::{self, Kind, Load};
use super::report::Target as Aim;
use super::{Progress, Spread, ratio, with_logs};
use crate::clients::Target;
use crate::lab::Host;
use crate::stage::tidy::Tidy;
use crate::stage::{LinuxGuest, Stage};
use crate::units::ByteSize;

const MODES: [&str; 3] = ["lockstep", "buffered", "auto"];
/// nginx is up before redis is.
const STORE_LIMIT: Duration = Duration::from_secs(120);
/// For how long an idle pair's checkpoints are looked at.
const IDLE: Duration = Duration::from_secs(8);

/// What the benchmark of Linux guests is told.
#[derive(Args, Clone, Debug)]
pub struct LinuxOptions {
    /// The guest's kernel
    #[arg(long, value_name = "PATH")]
    pub kernel: PathBuf,
    /// Its initial RAM disk
    #[arg(long, value_name = "PATH")]
    pub initrd: PathBuf,
    /// Its disk, which is copied: with nginx on port 80, and redis on port 6379 for anybody (docs/debian-guest --minimal makes one)
    #[arg(long, value_name = "PATH")]
    pub image: PathBuf,
    /// Its virtual processors
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    pub vcpus: u8,
    /// Its memory
    #[arg(long, value_name = "SIZE", default_value_t = ByteSize::mib(192))]
    pub memory: ByteSize,
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
    loads: Vec<Measured>,
    idle: Vec<Idle>,
}

/// One load, on the guest by itself and in each mode.
#[derive(Debug, Serialize)]
struct Measured {
    kind: Kind,
    connections: usize,
    alone: Figures,
    alone_again: Figures,
    modes: Vec<Protected>,
}

#[derive(Clone, Copy, Debug, Default, Serialize)]
struct Figures {
    /// Requests, or bytes, a second.
    rate: f64,
    latency_us: Spread,
}

#[derive(Debug, Serialize)]
struct Protected {
    mode: String,
    #[serde(flatten)]
    figures: Figures,
    /// The rate ÷ the mean of the guest by itself.
    to_alone: f64,
    checkpoints_per_s: f64,
    divergences: u64,
}

/// What the checkpoints of an idle guest cost.
#[derive(Debug, Serialize)]
struct Idle {
    mode: String,
    checkpoints: usize,
    pause_us: Spread,
    pages: Spread,
    bytes: Spread,
}

impl LinuxReport {
    /// The targets of protection, where lockstep or auto was measured: the better of both.
    pub(super) fn targets(&self) -> Vec<Aim> {
        let best = |kind: Kind, connections: usize| {
            let measured = self
                .loads
                .iter()
                .find(|load| (load.kind, load.connections) == (kind, connections))?;
            measured.modes.iter().map(|mode| mode.to_alone).reduce(f64::max)
        };
        let keep_alive = best(Kind::HttpSmall, 1).map(|ratio| {
            let what = "HTTP keep-alive on 1 connection, best mode ÷ the guest by itself";
            Aim::at_least(what, 0.6, ratio, "x alone")
        });
        let close = best(Kind::HttpClose, 1).map(|ratio| {
            let what = "HTTP with a connection for each request, best mode ÷ the guest by itself";
            Aim::at_least(what, 0.5, ratio, "x alone")
        });
        let idle = self.idle.iter().find(|idle| idle.mode == "lockstep");
        let idle = idle.map(|idle| {
            [
                Aim::at_most(
                    "idle checkpoint in lockstep, median pause",
                    20.0,
                    idle.pause_us.p50 / 1e3,
                    "ms",
                ),
                Aim::at_most(
                    "idle checkpoint in lockstep, median bytes of pages",
                    50.0,
                    idle.bytes.p50 / 1e3,
                    "kB",
                ),
            ]
        });
        let loads = keep_alive.into_iter().chain(close);
        loads.chain(idle.into_iter().flatten()).collect()
    }

    /// Returns the tables.
    pub(super) fn text(&self) -> String {
        let mut text = format!(
            "\nA Linux guest of {} MiB and {} vCPUs on {} processors, in requests/s (p50, p99 in ms)\n",
            self.memory_mib, self.vcpus, self.processors
        );
        let figures = |figures: &Figures| {
            let (p50, p99) = (figures.latency_us.p50 / 1e3, figures.latency_us.p99 / 1e3);
            format!("{:.0} ({p50:.1}, {p99:.1})", figures.rate)
        };
        for load in &self.loads {
            let (alone, again) = (figures(&load.alone), figures(&load.alone_again));
            let _ = writeln!(
                text,
                "{} on {}: by itself {alone}, again {again}",
                load.kind.name(),
                load.connections
            );
            for mode in &load.modes {
                let _ = writeln!(
                    text,
                    "    {:9} {:24} {:.2} of it; {:.1} checkpoints/s, {} differences",
                    mode.mode,
                    figures(&mode.figures),
                    mode.to_alone,
                    mode.checkpoints_per_s,
                    mode.divergences
                );
            }
        }
        text.push_str("\nCheckpoints of the idle guest: median (99th percentile)\n");
        for idle in &self.idle {
            let _ = writeln!(
                text,
                "    {:9} {:4}: pause {:.1} ({:.1}) ms, {:.0} ({:.0}) pages, {:.0} ({:.0}) kB of pages",
                idle.mode,
                idle.checkpoints,
                idle.pause_us.p50 / 1e3,
                idle.pause_us.p99 / 1e3,
                idle.pages.p50,
                idle.pages.p99,
                idle.bytes.p50 / 1e3,
                idle.bytes.p99 / 1e3
            );
        }
        text
    }
}

fn loads(quick: bool) -> Vec<Load> {
    let one = |kind, connections| Load {
        kind,
        connections,
        // nginx writes the date.
        alike: false,
        warm_up: Duration::from_millis(500),
        span: Duration::from_secs(if quick { 1 } else { 5 }),
    };
    vec![
        one(Kind::HttpSmall, 1),
        one(Kind::HttpSmall, 8),
        one(Kind::HttpClose, 1),
        one(Kind::Get, 1),
        one(Kind::Get, 8),
        one(Kind::Increment, 8),
    ]
}

/// Measures everything.
pub(super) fn run(options: &LinuxOptions, tidy: &Tidy, progress: &Progress) -> Result<LinuxReport> {
    let modes: Vec<String> = match &*options.modes {
        [] => MODES.map(str::to_owned).into(),
        given => given.to_vec(),
    };
    let mut report = LinuxReport {
        processors: std::thread::available_parallelism().map_or(0, usize::from),
        vcpus: options.vcpus,
        memory_mib: options.memory.0 >> 20,
        loads: Vec::new(),
        idle: Vec::new(),
    };
    let wanted = loads(options.quick);
    let alone = measure(options, None, &wanted, tidy, progress)?.figures;
    let mut protected = Vec::new();
    for mode in &modes {
        let taken = measure(options, Some(mode), &wanted, tidy, progress)?;
        report.idle.extend(taken.idle);
        protected.push((mode, taken.figures, taken.checkpoints));
    }
    let again = measure(options, None, &wanted, tidy, progress)?.figures;
    for (number, load) in wanted.iter().enumerate() {
        let base = (alone[number].rate + again[number].rate) / 2.0;
        let modes = protected.iter().map(|(mode, figures, checkpoints)| Protected {
            mode: (*mode).clone(),
            figures: figures[number],
            to_alone: ratio(figures[number].rate, base),
            checkpoints_per_s: checkpoints[number].0,
            divergences: checkpoints[number].1,
        });
        report.loads.push(Measured {
            kind: load.kind,
            connections: load.connections,
            alone: alone[number],
            alone_again: again[number],
            modes: modes.collect(),
        });
    }
    Ok(report)
}

/// What one subject gave.
struct Taken {
    /// One for each load.
    figures: Vec<Figures>,
    /// For each load, checkpoints a second and divergences.
    checkpoints: Vec<(f64, u64)>,
    idle: Option<Idle>,
}

fn measure(
    options: &LinuxOptions,
    mode: Option<&str>,
    loads: &[Load],
    tidy: &Tidy,
    progress: &Progress,
) -> Result<Taken> {
    let told = mode.unwrap_or("the guest by itself");
    progress.tell(&format!("{told}: starts"));
    let guest = LinuxGuest {
        kernel: options.kernel.clone(),
        initrd: options.initrd.clone(),
        image: options.image.clone(),
        vcpus: options.vcpus,
    };
    let folder = tidy.folder(mode.unwrap_or("alone"))?;
    let mut stage = Stage::with_linux(folder.clone(), options.memory.to_string(), &guest)?;
    let taken = load_stage(&mut stage, mode, loads, tidy, progress);
    let taken = taken.map_err(|error| with_logs(error, &stage, tidy).context(told.to_owned()));
    stage.clear();
    drop(stage);
    std::fs::remove_dir_all(&folder).with_context(|| format!("can't remove {}", folder.display()))?;
    taken
}

fn load_stage(
    stage: &mut Stage,
    mode: Option<&str>,
    loads: &[Load],
    tidy: &Tidy,
    progress: &Progress,
) -> Result<Taken> {
    match mode {
        None => stage.start_alone(Host::A)?,
        // A host that carries both sides and a client stands still for longer than one of its own.
        Some(mode) => stage.start_pair(&["--mode", mode, "--takeover-limit", "10s"])?,
    }
    stage.await_guest(tidy)?;
    let lab = stage.lab();
    tidy.wait("the guest's store", STORE_LIMIT, || {
        let connect = || TcpStream::connect_timeout(&Target::bundled().store_address(), Duration::from_secs(1));
        Ok(lab.client().run(connect).ok())
    })?;
    let mut taken = Taken {
        figures: Vec::new(),
        checkpoints: Vec::new(),
        idle: None,
    };
    if let Some(mode) = mode {
        stage.await_protected(tidy)?;
        // What a boot leaves to do is no idling.
        tidy.sleep(Duration::from_secs(3))?;
        taken.idle = Some(idle(stage, mode, tidy)?);
    }
    for load in loads {
        let load = *load;
        let before = stage.role(Host::A)?.status()?.context("the primary tells no status")?;
        let client = stage.lab().client();
        let outcome = client.thread("load", move || load::run(&Target::bundled(), load));
        let outcome = outcome.context("can't start a load")?.join();
        let outcome = outcome
            .map_err(|_| anyhow!("the load panicked"))?
            .with_context(|| format!("{} on {} connections", load.kind.name(), load.connections))?;
        let after = stage.role(Host::A)?.status()?.context("the primary tells no status")?;
        let seconds = (load.warm_up + load.span).as_secs_f64();
        let checkpoints = after.checkpoints.total.saturating_sub(before.checkpoints.total) as f64 / seconds;
        let divergences = after.divergences.saturating_sub(before.divergences);
        progress.tell(&format!(
            "{:10} {:2} connections: {:.0}/s, {checkpoints:.1} checkpoints/s",
            load.kind.name(),
            load.connections,
            outcome.rate
        ));
        taken.figures.push(Figures {
            rate: outcome.rate,
            latency_us: Spread::of(outcome.latencies),
        });
        taken.checkpoints.push((checkpoints, divergences));
    }
    Ok(taken)
}

fn idle(stage: &mut Stage, mode: &str, tidy: &Tidy) -> Result<Idle> {
    let seen = |stage: &mut Stage| -> Result<_> {
        ask_history(stage.role(Host::A)?.control()).context("the primary tells no history")
    };
    let before = seen(stage)?.last().map(|trace| trace.epoch);
    tidy.sleep(IDLE)?;
    let traces = seen(stage)?;
    let own: Vec<_> = traces.iter().filter(|trace| Some(trace.epoch) > before).collect();
    let spread = |of: fn(&CheckpointTrace) -> f64| Spread::of(own.iter().map(|trace| of(trace)).collect());
    Ok(Idle {
        mode: mode.to_owned(),
        checkpoints: own.len(),
        pause_us: spread(|trace| trace.pause_us),
        pages: spread(|trace| trace.pages as f64),
        bytes: spread(|trace| trace.bytes as f64),
    })
}
