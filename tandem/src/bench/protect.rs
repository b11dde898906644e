//! `tandem bench protect`: what clients get from a protected VM, beside what they get without.
//!
//! ```text
//!   two    two unprotected copies of the VM at once, each with its own identical clients: the mean of one copy
//!   bare   one unprotected VM by itself
//!   modes  a pair
//! ```
//!
//! Protection runs the guest twice, so what both copies can do on these processors is what it is measured against. All are
//! up for the whole run and take turns, forwards and then backwards; a ratio is the median of the ratios of the rounds.
//! The disk images lie on the file system that the user chose: an increment is answered once it is on the disk.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use serde::Serialize;

use super::cost::Used;
use super::load::{self, Kind, Load, Outcome};
use super::{BenchOptions, Progress, file_system, need_memory, percentile, ratio};
use crate::clients::Target;
use crate::lab::Host;
use crate::stage::Stage;
use crate::stage::tidy::Tidy;
use crate::units::ByteSize;

const MEMORY: ByteSize = ByteSize::mib(256);
const NEEDED: ByteSize = ByteSize::mib(3_072);

/// How a pair protects, and what it is told for that.
const MODES: [(&str, &[&str]); 2] = [
    ("lockstep", &["--mode", "lockstep"]),
    ("buffered", &["--mode", "buffered", "--checkpoint-every", "5ms"]),
];

/// What was found.
#[derive(Debug, Serialize)]
pub(super) struct ProtectReport {
    pub(super) quick: bool,
    pub(super) memory_mib: u64,
    pub(super) processors: usize,
    /// Where the disk images were.
    pub(super) file_system: String,
    pub(super) rounds: usize,
    /// The largest share of the time for which one load's thread ran: below 1 it was not what limited anything.
    pub(super) load_busy_max: f64,
    pub(super) scenarios: Vec<Scenario>,
}

/// One kind of request on so many connections.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Scenario {
    pub(super) kind: Kind,
    pub(super) connections: usize,
    /// Of the rates.
    pub(super) unit: &'static str,
    pub(super) two: Figures,
    pub(super) bare: Figures,
    pub(super) modes: Vec<ModeFigures>,
}

/// What clients got.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Figures {
    /// The median of the rounds.
    pub(super) rate: f64,
    /// None if the kind is of bytes.
    pub(super) latency_us: Option<Latency>,
    pub(super) lost: u64,
    pub(super) load_busy: f64,
    /// Processor time of all processes by thread, in percent of one processor.
    pub(super) threads_percent: BTreeMap<String, f64>,
}

/// Percentiles of all rounds together.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Latency {
    pub(super) p50: f64,
    pub(super) p99: f64,
    pub(super) p999: f64,
}

/// What clients got from a pair.
#[derive(Clone, Debug, Serialize)]
pub(super) struct ModeFigures {
    pub(super) mode: &'static str,
    #[serde(flatten)]
    pub(super) figures: Figures,
    /// The rate ÷ that of `two`, and of `bare`.
    pub(super) to_two: f64,
    pub(super) to_bare: f64,
    /// The latencies ÷ those of `two`.
    pub(super) latency_to_two: Option<Latency>,
    pub(super) checkpoints_per_s: f64,
    pub(super) divergences: u64,
}

struct Wanted {
    kind: Kind,
    connections: usize,
}

/// Everything that is up.
struct Stages {
    copies: [Stage; 2],
    pairs: Vec<Stage>,
}

/// Who is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Subject {
    Two,
    Bare,
    Mode(usize),
}

/// What one subject gave in all rounds.
#[derive(Default)]
struct Taken {
    rates: Vec<f64>,
    latencies: Vec<f64>,
    lost: u64,
    busy: f64,
    used: BTreeMap<String, Duration>,
    /// The time for which `used` and `checkpoints` are.
    took: Duration,
    checkpoints: u64,
    divergences: u64,
}

/// Measures everything.
pub(super) fn run(options: &BenchOptions, tidy: &Tidy, progress: &Progress) -> Result<ProtectReport> {
    need_memory(NEEDED)?;
    progress.tell("two VMs, and a pair for each mode, start");
    let folder = tidy.folder("copy-0")?;
    let file_system = file_system(&folder)?;
    if file_system == "tmpfs" {
        progress.tell("the images are in memory, so a flush costs nothing: name a folder on a disk with --folder");
    }
    let alone = |folder| Stage::new(folder, MEMORY.to_string());
    let mut stages = Stages {
        copies: [alone(folder)?, alone(tidy.folder("copy-1")?)?],
        pairs: Vec::new(),
    };
    for (name, _) in MODES {
        stages.pairs.push(Stage::new(tidy.folder(name)?, MEMORY.to_string())?);
    }
    let rounds = if options.quick { 1 } else { 5 };
    let scenarios = measure(&mut stages, options, rounds, tidy, progress).map_err(|error| {
        let stages = stages.copies.iter().chain(&stages.pairs);
        let words: Vec<_> = stages.map(Stage::last_words).collect();
        if tidy.is_interrupted() {
            error
        } else {
            error.context(words.join("\n"))
        }
    })?;
    let busy = scenarios.iter().flat_map(|scenario| {
        let modes = scenario.modes.iter().map(|mode| mode.figures.load_busy);
        modes.chain([scenario.two.load_busy, scenario.bare.load_busy])
    });
    Ok(ProtectReport {
        quick: options.quick,
        memory_mib: MEMORY.0 >> 20,
        processors: std::thread::available_parallelism().map_or(0, usize::from),
        file_system,
        rounds,
        load_busy_max: busy.fold(0.0, f64::max),
        scenarios,
    })
}

fn wanted(quick: bool) -> Vec<Wanted> {
    use Kind::{BulkIn, BulkOut, Get, HttpLarge, HttpSmall, Increment, UdpEcho};
    let all: &[(Kind, &[usize])] = if quick {
        &[
            (HttpSmall, &[1, 16]),
            (HttpLarge, &[1]),
            (Get, &[16]),
            (Increment, &[16]),
            (UdpEcho, &[1]),
            (BulkIn, &[1]),
            (BulkOut, &[1]),
        ]
    } else {
        &[
            (HttpSmall, &[1, 16, 64]),
            (HttpLarge, &[1, 16]),
            (Get, &[1, 16, 64]),
            (Increment, &[1, 16, 64]),
            (UdpEcho, &[1, 16]),
            (BulkIn, &[1]),
            (BulkOut, &[1]),
        ]
    };
    let each = |(kind, connections): &(Kind, &[usize])| {
        let kind = *kind;
        connections
            .iter()
            .map(move |&connections| Wanted { kind, connections })
            .collect::<Vec<_>>()
    };
    all.iter().flat_map(each).collect()
}

fn measure(
    stages: &mut Stages,
    options: &BenchOptions,
    rounds: usize,
    tidy: &Tidy,
    progress: &Progress,
) -> Result<Vec<Scenario>> {
    let quick = options.quick;
    for copy in &mut stages.copies {
        copy.start_alone(Host::A)?;
    }
    for (pair, (_, mode)) in stages.pairs.iter_mut().zip(MODES) {
        pair.start_pair(&options.with(mode))?;
        pair.await_protected(tidy)?;
    }
    for stage in stages.copies.iter_mut().chain(&mut stages.pairs) {
        stage.await_guest(tidy)?;
    }
    let mut subjects = vec![Subject::Two, Subject::Bare];
    subjects.extend((0..MODES.len()).map(Subject::Mode));
    let mut scenarios = Vec::new();
    for wanted in wanted(quick) {
        let load = Load {
            kind: wanted.kind,
            connections: wanted.connections,
            alike: true,
            warm_up: Duration::from_millis(if quick { 200 } else { 300 }),
            span: Duration::from_millis(if quick { 600 } else { 1_000 }),
        };
        let mut taken: Vec<_> = subjects.iter().map(|_| Taken::default()).collect();
        for round in 0..rounds {
            let mut order: Vec<_> = (0..subjects.len()).collect();
            if round % 2 == 1 {
                order.reverse();
            }
            for at in order {
                tidy.sleep(Duration::ZERO)?;
                let told = format!("{} on {} connections", load.kind.name(), load.connections);
                stages
                    .load(subjects[at], load, &mut taken[at])
                    .with_context(|| format!("{told}, {:?}", subjects[at]))?;
            }
        }
        let scenario = scenario(load, &taken);
        for mode in &scenario.modes {
            progress.tell(&format!(
                "{:10} {:3} connections: {:.0} {} of two, {} {:.0}, {:.2} of it",
                load.kind.name(),
                load.connections,
                scenario.two.rate,
                scenario.unit,
                mode.mode,
                mode.figures.rate,
                mode.to_two,
            ));
        }
        scenarios.push(scenario);
    }
    Ok(scenarios)
}

impl Stages {
    /// Loads a subject once.
    fn load(&mut self, subject: Subject, load: Load, taken: &mut Taken) -> Result<()> {
        let (loaded, hosts): (Vec<&mut Stage>, &[Host]) = match subject {
            Subject::Two => (self.copies.iter_mut().collect(), &[Host::A]),
            Subject::Bare => (self.copies.iter_mut().take(1).collect(), &[Host::A]),
            Subject::Mode(number) => (
                self.pairs.iter_mut().skip(number).take(1).collect(),
                &[Host::A, Host::B],
            ),
        };
        let (mut pids, mut loaders, mut before) = (Vec::new(), Vec::new(), None);
        let mut loaded = loaded;
        for stage in &mut loaded {
            for host in hosts {
                pids.push(stage.role(*host)?.pid());
            }
        }
        if let Subject::Mode(_) = subject {
            before = loaded[0].role(Host::A)?.status()?;
        }
        let used = Used::by(&pids)?;
        let began = Instant::now();
        for stage in &loaded {
            let client = stage.lab().client();
            let loader = client.thread("load", move || load::run(&Target::bundled(), load));
            loaders.push(loader.context("can't start a load")?);
        }
        let copies = loaders.len();
        let mut rate = 0.0;
        for loader in loaders {
            let outcome = loader.join().map_err(|_| anyhow!("the load panicked"))?;
            taken.note(outcome?, &mut rate);
        }
        // With the time that opening the connections took, which in buffered mode is a checkpoint each.
        taken.took += began.elapsed();
        for (thread, time) in Used::by(&pids)?.since(&used).threads {
            *taken.used.entry(thread).or_default() += time;
        }
        taken.rates.push(rate / copies as f64);
        if let (Some(before), Some(after)) = (before, loaded[0].role(Host::A)?.status()?) {
            taken.checkpoints += after.checkpoints.total.saturating_sub(before.checkpoints.total);
            taken.divergences += after.divergences.saturating_sub(before.divergences);
        }
        Ok(())
    }
}

impl Taken {
    fn note(&mut self, outcome: Outcome, rate: &mut f64) {
        *rate += outcome.rate;
        self.latencies.extend(outcome.latencies);
        self.lost += outcome.lost;
        self.busy = self.busy.max(outcome.busy);
    }

    fn figures(&self, load: Load) -> Figures {
        let mut latencies = self.latencies.clone();
        latencies.sort_by(f64::total_cmp);
        let latency_us = (!load.kind.is_bulk()).then(|| Latency {
            p50: percentile(&latencies, 0.5),
            p99: percentile(&latencies, 0.99),
            p999: percentile(&latencies, 0.999),
        });
        let share = |time: &Duration| time.as_secs_f64() * 100.0 / self.took.as_secs_f64();
        Figures {
            rate: median(self.rates.clone()),
            latency_us,
            lost: self.lost,
            load_busy: self.busy,
            threads_percent: self
                .used
                .iter()
                .map(|(name, time)| (name.clone(), share(time)))
                .collect(),
        }
    }
}

/// The subjects are in the order of `measure`.
fn scenario(load: Load, taken: &[Taken]) -> Scenario {
    let (two, bare) = (taken[0].figures(load), taken[1].figures(load));
    let ratios =
        |of: &Taken, to: &Taken| median(of.rates.iter().zip(&to.rates).map(|(of, to)| ratio(*of, *to)).collect());
    let modes = MODES.iter().zip(&taken[2..]).map(|((mode, _), own)| {
        let figures = own.figures(load);
        let latency_to_two = figures.latency_us.zip(two.latency_us).map(|(own, two)| Latency {
            p50: ratio(own.p50, two.p50),
            p99: ratio(own.p99, two.p99),
            p999: ratio(own.p999, two.p999),
        });
        ModeFigures {
            mode,
            to_two: ratios(own, &taken[0]),
            to_bare: ratios(own, &taken[1]),
            figures,
            latency_to_two,
            checkpoints_per_s: own.checkpoints as f64 / own.took.as_secs_f64(),
            divergences: own.divergences,
        }
    });
    Scenario {
        kind: load.kind,
        connections: load.connections,
        unit: if load.kind.is_bulk() { "bytes/s" } else { "requests/s" },
        modes: modes.collect(),
        two,
        bare,
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    percentile(&values, 0.5)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_those_of_the_rounds() {
        let taken = |rates: &[f64]| Taken {
            rates: rates.to_vec(),
            latencies: vec![10.0; 100],
            ..Taken::default()
        };
        let load = Load {
            kind: Kind::Get,
            connections: 4,
            alike: true,
            warm_up: Duration::ZERO,
            span: Duration::from_secs(1),
        };
        // The machine became twice as fast in between.
        let all = [
            taken(&[100.0, 200.0, 100.0]),
            taken(&[200.0, 400.0, 200.0]),
            taken(&[90.0, 180.0, 10.0]),
            taken(&[10.0, 20.0, 10.0]),
        ];
        let scenario = scenario(load, &all);
        let mode = &scenario.modes[0];
        assert_eq!((mode.to_two, mode.to_bare), (0.9, 0.45));
        assert_eq!(mode.latency_to_two.unwrap().p99, 1.0);
        assert_eq!(scenario.two.rate, 100.0);
    }

    #[test]
    fn both_lengths_measure_every_kind() {
        for quick in [true, false] {
            let kinds: std::collections::BTreeSet<_> = wanted(quick).iter().map(|wanted| wanted.kind.name()).collect();
            assert_eq!(kinds.len(), 7);
        }
    }
}
