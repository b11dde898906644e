//! `tandem bench clients`: what clients on this host get from a guest that runs somewhere, beside what was measured before.
//!
//! Nothing is started: the guest, protected or not, is an operator's. It is measured by itself first, saved with `--json`, and
//! then protected, `--against` that.

use std::fs;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use serde::Serialize;

use super::Progress;
use super::guest::{self, GuestFigures, Steady};
use super::report::Target as Aim;
use crate::clients::Target;
use crate::lab::Namespace;
use crate::stage::tidy::Tidy;
use crate::units::Span;

/// What the benchmark of a running guest is told.
#[derive(Args, Clone, Debug)]
pub struct ClientsOptions {
    /// The guest's address: with nginx on port 80, redis on port 6379, and echo, discard and characters (ports 7, 9 and 19)
    #[arg(value_name = "ADDRESS")]
    pub guest: Ipv4Addr,
    /// Compare with what was measured before, and kept with --json
    #[arg(long, value_name = "FILE")]
    pub against: Option<PathBuf>,
    /// No loads: only ask every 20 ms, by UDP and on one connection, for so long, and tell of the longest silence
    #[arg(long, value_name = "TIME", conflicts_with_all = ["against", "quick"])]
    pub watch: Option<Span>,
    /// Measure each load for a second only
    #[arg(long)]
    pub quick: bool,
    /// Print one JSON object instead of tables
    #[arg(long)]
    pub json: bool,
}

/// What was found.
#[derive(Debug, Serialize)]
pub(super) struct ClientsReport {
    #[serde(flatten)]
    measured: Measured,
    #[serde(skip)]
    base: Option<GuestFigures>,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Measured {
    All(GuestFigures),
    Watched { steady: Steady },
}

impl ClientsReport {
    /// The targets of protection, where there is something to compare with.
    pub(super) fn targets(&self) -> Vec<Aim> {
        match (&self.measured, &self.base) {
            (Measured::All(figures), Some(base)) => guest::targets(base, &[figures]),
            _ => Vec::new(),
        }
    }

    /// Returns the table.
    pub(super) fn text(&self) -> String {
        match &self.measured {
            Measured::All(figures) => figures.text(self.base.as_ref()),
            Measured::Watched { steady } => format!("    {}\n", steady.told()),
        }
    }
}

/// Measures everything.
pub(super) fn run(options: &ClientsOptions, tidy: &Tidy, progress: &Progress) -> Result<ClientsReport> {
    let base = options.against.as_ref().map(|path| {
        let told = || {
            format!(
                "{} holds no figures: make it with `tandem bench clients --json`",
                path.display()
            )
        };
        let bytes = fs::read(path).with_context(|| format!("can't read {}: check --against", path.display()))?;
        serde_json::from_slice(&bytes).with_context(told)
    });
    let base = base.transpose()?;
    let here = Namespace::here("clients").context("can't start a client")?;
    let target = Target::linux(options.guest);
    if let Some(span) = options.watch {
        let steady = guest::steady(&here, target, span.0, tidy)?;
        let measured = Measured::Watched { steady };
        return Ok(ClientsReport { measured, base });
    }
    guest::await_services(&here, target, tidy)?;
    let loads = guest::loads(options.quick)
        .into_iter()
        .map(|load| guest::measure(&here, target, load, progress));
    let figures = GuestFigures {
        loads: loads.collect::<Result<_>>()?,
        steady: guest::steady(&here, target, guest::steady_span(options.quick), tidy)?,
    };
    Ok(ClientsReport {
        measured: Measured::All(figures),
        base,
    })
}
