//! How often a pair in buffered mode takes checkpoints while clients keep it at work, and what each costs.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use link::control::ask_history;
use serde::Serialize;

use super::cost::Used;
use super::load::{self, Kind, Load};
use super::{Progress, Spread};
use crate::clients::Target;
use crate::lab::Host;
use crate::stage::Stage;
use crate::stage::tidy::Tidy;
use crate::units::ByteSize;

const MEMORY: ByteSize = ByteSize::mib(256);
/// The spans between two checkpoints that are asked for.
const EVERY_MS: [u64; 3] = [1, 5, 25];
/// Enough that there is always output to wait for a checkpoint.
const CONNECTIONS: usize = 16;

/// One span between two checkpoints.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Buffered {
    pub(super) every_ms: u64,
    /// Committed in each second.
    pub(super) checkpoints_per_s: f64,
    pub(super) requests_per_s: f64,
    /// Of the last checkpoints.
    pub(super) pause_us: Spread,
    pub(super) commit_us: Spread,
    pub(super) pages: Spread,
    /// Processor time of both processes, their guests' left out, in percent of one processor.
    pub(super) cpu_percent: f64,
}

/// Measures each span with a pair of its own.
pub(super) fn run(quick: bool, tidy: &Tidy, progress: &Progress) -> Result<Vec<Buffered>> {
    let span = Duration::from_millis(if quick { 800 } else { 4_000 });
    let mut all = Vec::new();
    for every_ms in EVERY_MS {
        let mut stage = Stage::new(tidy.folder(&format!("buffered-{every_ms}"))?, MEMORY.to_string())?;
        let one = measure(&mut stage, every_ms, span, tidy).map_err(|error| super::with_logs(error, &stage, tidy))?;
        progress.tell(&format!(
            "buffered, a checkpoint every {every_ms} ms: {:.0} each second, pause {:.0} µs, {:.0} requests each second",
            one.checkpoints_per_s, one.pause_us.p50, one.requests_per_s
        ));
        all.push(one);
    }
    Ok(all)
}

fn measure(stage: &mut Stage, every_ms: u64, span: Duration, tidy: &Tidy) -> Result<Buffered> {
    stage.start_pair(&["--mode", "buffered", "--checkpoint-every", &format!("{every_ms}ms")])?;
    stage.await_protected(tidy)?;
    stage.await_guest(tidy)?;
    let load = Load {
        kind: Kind::HttpSmall,
        connections: CONNECTIONS,
        alike: true,
        warm_up: Duration::from_millis(200),
        span,
    };
    let pids = [stage.role(Host::A)?.pid(), stage.role(Host::B)?.pid()];
    let before = stage.role(Host::A)?.status()?.context("the primary tells no status")?;
    let used = Used::by(&pids)?;
    let began = Instant::now();
    let client = stage
        .lab()
        .client()
        .thread("load", move || load::run(&Target::bundled(), load));
    let outcome = client.context("can't start a load")?.join();
    let outcome = outcome.map_err(|_| anyhow!("the load panicked"))??;
    let used = Used::by(&pids)?.since(&used).own();
    // Longer than the load: its connections are opened one after the other, and each waits for a checkpoint.
    let seconds = began.elapsed().as_secs_f64();
    let after = stage.role(Host::A)?.status()?.context("the primary tells no status")?;
    let history = ask_history(stage.role(Host::A)?.control()).context("the primary tells no history")?;
    let spread = |of: fn(&link::status::CheckpointTrace) -> f64| Spread::of(history.iter().map(of).collect());
    let taken = after.checkpoints.total.saturating_sub(before.checkpoints.total);
    Ok(Buffered {
        every_ms,
        checkpoints_per_s: taken as f64 / seconds,
        requests_per_s: outcome.rate,
        pause_us: spread(|trace| trace.pause_us),
        commit_us: spread(|trace| trace.commit_us),
        pages: spread(|trace| trace.pages as f64),
        cpu_percent: used.as_secs_f64() * 100.0 / seconds,
    })
}
