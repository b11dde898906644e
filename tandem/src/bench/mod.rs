//! The benchmarks: what protection costs, measured on real pairs on this machine.
//!
//! ```text
//!   run ─┬─ proxy        a frame's way through translator and comparator, beside a copy
//!        │    └─ traffic    the frames, and the TAPs that they come from and go to
//!        ├─ checkpoint   the pause, its floor, bytes, commits, processor time, memory
//!        │    ├─ floor      the same guest, stopped with nothing around it
//!        │    └─ buffered   how often a pair in buffered mode gets to it
//!        ├─ linux        clients at a Linux guest by itself, and protected
//!        ├─ clients      the same clients at a guest that runs somewhere
//!        │    └─ guest      what both ask, and how it is told
//!        └─ protect      clients at one VM, at two at once, at a pair
//!             └─ load    many connections from one thread
//!        cost   what processes use        report   targets, met or missed        plot   SVG and CSV
//! ```
//!
//! Everything that is compared is measured in the same run, in turns: other work on the machine, and its clock, drift by
//! half from one minute to the next. Figures are read as ratios.

mod buffered;
mod checkpoint;
mod clients;
mod cost;
mod floor;
mod guest;
mod linux;
mod load;
mod plot;
mod protect;
mod proxy;
mod report;
mod traffic;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};

use crate::stage::Stage;
use crate::stage::tidy::{Owner, Tidy};
use crate::units::ByteSize;
pub use clients::ClientsOptions;
pub use linux::LinuxOptions;
use report::Report;

/// What is measured.
#[derive(Clone, Debug, Subcommand)]
pub enum Bench {
    /// What a checkpoint costs, by the number of dirty pages and their content, beside what the hardware costs at least
    Checkpoint(BenchOptions),
    /// What clients get from a protected VM, beside what they get without protection
    Protect(BenchOptions),
    /// What clients get from a Linux guest by itself, and protected in each mode; needs hardware KVM
    Linux(LinuxOptions),
    /// What clients on this host get from a guest that runs already, protected or not; needs root, and no KVM
    Clients(ClientsOptions),
    /// What a frame costs in the proxy, beside a plain copy from TAP to TAP; needs root, and no KVM
    Proxy(ProxyOptions),
}

/// What the benchmark of the proxy is told.
#[derive(Args, Clone, Debug, Default)]
pub struct ProxyOptions {
    /// Measure for some seconds only
    #[arg(long)]
    pub quick: bool,
    /// Print one JSON object instead of tables
    #[arg(long)]
    pub json: bool,
}

/// What a benchmark is told.
#[derive(Args, Clone, Debug, Default)]
pub struct BenchOptions {
    /// Measure for about a minute: fewer rounds, fewer cases
    #[arg(long)]
    pub quick: bool,
    /// Print one JSON object instead of tables
    #[arg(long)]
    pub json: bool,
    /// Write the figures as SVG and CSV files into this directory
    #[arg(long, value_name = "DIR")]
    pub plot: Option<PathBuf>,
    /// Where the disk images of the run are kept; must be on a disk, or a flush costs nothing [default: TMPDIR, or /tmp]
    #[arg(long, value_name = "DIR")]
    pub folder: Option<PathBuf>,
    /// Page streams of the pairs whose checkpoints and clients are measured [default: that of any pair]
    #[arg(long, value_name = "COUNT")]
    pub streams: Option<usize>,
}

impl BenchOptions {
    /// Returns a pair's options with these.
    fn with(&self, options: &[&str]) -> Vec<String> {
        let streams = self
            .streams
            .map(|streams| ["--streams".to_owned(), streams.to_string()]);
        let options = options.iter().map(|&option| option.to_owned());
        options.chain(streams.into_iter().flatten()).collect()
    }
}

/// Measures, and prints what was found.
///
/// # Errors
/// Fails if it could not be carried out: a host that can't run VMs, missing rights or memory, a role that did not come up,
/// an interruption. Nothing is left behind. A missed target is no error.
pub fn run(bench: &Bench) -> Result<()> {
    let (plot, folder, json) = match bench {
        Bench::Checkpoint(options) | Bench::Protect(options) => {
            (options.plot.as_deref(), options.folder.as_deref(), options.json)
        }
        Bench::Linux(options) => (None, options.folder.as_deref(), options.json),
        Bench::Clients(options) => (None, None, options.json),
        Bench::Proxy(options) => {
            let measured = proxy::run(options.quick, &Progress(Instant::now()))?;
            return print(&Report::Proxy(measured), options.json);
        }
    };
    if !matches!(bench, Bench::Clients(_)) {
        machine::host_check().context("this machine can't run the benchmark")?;
    }
    if let Some(folder) = plot {
        std::fs::create_dir_all(folder).with_context(|| format!("can't make {}: check --plot", folder.display()))?;
    }
    let tidy = Tidy::start(Owner::Bench, folder)?;
    let progress = Progress(Instant::now());
    let measured = match bench {
        Bench::Checkpoint(options) => checkpoint::run(options, &tidy, &progress).map(Report::Checkpoint),
        Bench::Linux(options) => linux::run(options, &tidy, &progress).map(Report::Linux),
        Bench::Clients(options) => clients::run(options, &tidy, &progress).map(Report::Clients),
        Bench::Protect(options) => protect::run(options, &tidy, &progress).map(Report::Protect),
        Bench::Proxy(_) => unreachable!("measured before"),
    };
    tidy.clear();
    let report = match measured {
        Ok(report) => report,
        Err(error) if tidy.is_interrupted() => {
            tracing::debug!(%error, "the interruption's effect");
            bail!("interrupted; everything was cleaned up");
        }
        Err(error) => return Err(error),
    };
    if let Some(folder) = plot {
        report.plot(folder)?;
        progress.tell(&format!("figures and data are in {}", folder.display()));
    }
    print(&report, json)
}

fn print(report: &Report, json: bool) -> Result<()> {
    if json {
        serde_json::to_writer(io::stdout().lock(), report).context("can't print the report")?;
        println!();
    } else {
        print!("{}", report.text());
    }
    Ok(())
}

/// Tells on standard error how far it is.
struct Progress(Instant);

impl Progress {
    fn tell(&self, text: &str) {
        eprintln!("{:6.1} s  {text}", self.0.elapsed().as_secs_f64());
    }
}

/// Makes sure that this much memory is free.
fn need_memory(bytes: ByteSize) -> Result<()> {
    let text = std::fs::read_to_string("/proc/meminfo").context("can't see how much memory is free")?;
    let kib = text.lines().find_map(|line| {
        line.strip_prefix("MemAvailable:")?
            .trim()
            .strip_suffix(" kB")?
            .parse::<u64>()
            .ok()
    });
    let available = kib.context("can't see how much memory is free")? << 10;
    if available < bytes.0 {
        bail!(
            "{} MiB of memory are free, {bytes} are needed: end something else, or measure less with --quick",
            available >> 20
        );
    }
    Ok(())
}

/// Adds the ends of the roles' logs to what went wrong.
fn with_logs(error: anyhow::Error, stage: &Stage, tidy: &Tidy) -> anyhow::Error {
    if tidy.is_interrupted() {
        error
    } else {
        error.context(stage.last_words())
    }
}

/// Median and 99th percentile.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
struct Spread {
    p50: f64,
    p99: f64,
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Self {
            p50: percentile(&values, 0.5),
            p99: percentile(&values, 0.99),
        }
    }
}

/// Returns the value that a share of the sorted values do not exceed; 0 without values.
fn percentile(sorted: &[f64], share: f64) -> f64 {
    let rank = (sorted.len() as f64 * share).ceil();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between 0 and the number of values"
    )]
    let index = (rank as usize).saturating_sub(1);
    sorted.get(index).copied().unwrap_or_default()
}

fn ratio(value: f64, to: f64) -> f64 {
    if to > 0.0 { value / to } else { 0.0 }
}

/// Returns the kind of the file system that a folder is on.
fn file_system(folder: &Path) -> Result<String> {
    const TMPFS: i64 = 0x0102_1994;
    const EXT: i64 = 0xef53;
    const XFS: i64 = 0x5846_5342;
    const BTRFS: i64 = 0x9123_683e;
    const OVERLAY: i64 = 0x794c_7630;
    let kind = rustix::fs::statfs(folder)
        .context("can't ask for the file system")?
        .f_type;
    #[expect(clippy::useless_conversion, reason = "its type is another one elsewhere")]
    let kind = i64::from(kind);
    Ok(match kind {
        TMPFS => "tmpfs".to_owned(),
        EXT => "ext".to_owned(),
        XFS => "xfs".to_owned(),
        BTRFS => "btrfs".to_owned(),
        OVERLAY => "overlay".to_owned(),
        other => format!("{other:#x}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let spread = Spread::of((1..=200).rev().map(f64::from).collect());
        assert_eq!((spread.p50, spread.p99), (100.0, 198.0));
        assert_eq!(Spread::of(vec![3.0]), Spread { p50: 3.0, p99: 3.0 });
        assert_eq!(Spread::of(Vec::new()), Spread::default());
    }

    #[test]
    fn too_little_memory_is_told_with_its_cure() {
        let error = need_memory(ByteSize::mib(1 << 40)).unwrap_err().to_string();
        assert!(error.contains("are needed: end something else"), "{error}");
        need_memory(ByteSize::mib(1)).unwrap();
    }
}
