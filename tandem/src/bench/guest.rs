//! What clients get from a Linux guest, whoever runs it: the loads, the small requests every 20 ms, and how both are told.
//!
//! The guest has nginx on port 80, redis on port 6379, and the services of RFC 862 to 864: echo, discard, characters.

use std::fmt::Write as _;
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use serde::{Deserialize, Serialize};

use super::load::{self, Kind, Load};
use super::report::Target as Aim;
use super::{Progress, Spread, ratio};
use crate::clients::{self, Clients, Target};
use crate::lab::Namespace;
use crate::stage::tidy::Tidy;

/// nginx is up before the others are.
const SERVICES_LIMIT: Duration = Duration::from_secs(120);
const STEADY_EVERY: Duration = Duration::from_millis(20);

/// What one subject gave: the guest by itself, or protected somehow.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct GuestFigures {
    pub(super) loads: Vec<LoadFigures>,
    pub(super) steady: Steady,
}

/// One load.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct LoadFigures {
    pub(super) kind: Kind,
    pub(super) connections: usize,
    /// Requests, or bytes, a second.
    pub(super) rate: f64,
    /// None if the kind is of bytes.
    pub(super) latency_us: Spread,
}

/// A datagram and a line of TCP every 20 ms, echoed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Steady {
    pub(super) udp_us: Spread,
    pub(super) udp_sent: u64,
    pub(super) udp_lost: u64,
    /// The longest time without an answer to a datagram.
    pub(super) udp_silence_us: f64,
    /// The longest time from one answer to the next on the connection.
    pub(super) tcp_gap_us: f64,
    /// Connections that broke.
    pub(super) tcp_broken: u64,
}

/// Returns the loads, for each so long as is asked.
pub(super) fn loads(quick: bool) -> Vec<Load> {
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
        one(Kind::BulkOut, 1),
        one(Kind::BulkIn, 1),
    ]
}

/// Returns for how long a datagram is sent every 20 ms.
pub(super) fn steady_span(quick: bool) -> Duration {
    Duration::from_secs(if quick { 3 } else { 10 })
}

/// Waits until the guest offers all that is asked for.
pub(super) fn await_services(namespace: &Namespace, target: Target, tidy: &Tidy) -> Result<()> {
    for (what, port) in [
        ("the guest's pages", target.http),
        ("the guest's store", target.store),
        ("the guest's echo", target.echo),
        ("the guest's characters", target.source),
    ] {
        let connect = move || TcpStream::connect_timeout(&(target.v4, port).into(), Duration::from_secs(1));
        tidy.wait(what, SERVICES_LIMIT, || Ok(namespace.run(connect).ok()))?;
    }
    Ok(())
}

/// Makes one load from a namespace.
pub(super) fn measure(namespace: &Namespace, target: Target, load: Load, progress: &Progress) -> Result<LoadFigures> {
    let made = namespace.thread("load", move || load::run(&target, load));
    let outcome = made.context("can't start a load")?.join();
    let outcome = outcome
        .map_err(|_| anyhow!("the load panicked"))?
        .with_context(|| format!("{} on {} connections", load.kind.name(), load.connections))?;
    let figures = LoadFigures {
        kind: load.kind,
        connections: load.connections,
        rate: outcome.rate,
        latency_us: Spread::of(outcome.latencies),
    };
    progress.tell(&format!("{:14}{}", figures.title(), figures.told()));
    Ok(figures)
}

/// Starts the clients that ask every 20 ms.
pub(super) fn start_steady(namespace: &Namespace, target: Target) -> Result<Clients> {
    let load = clients::Load {
        http: 0,
        increments: 0,
        pause: STEADY_EVERY,
        udp_every: STEADY_EVERY,
    };
    Clients::start(namespace, target, load, "").context("can't start the clients")
}

/// Ends them, and returns what they saw.
pub(super) fn end_steady(clients: Clients) -> Result<Steady> {
    let report = clients.stop();
    let us = |time: Duration| time.as_secs_f64() * 1e6;
    ensure!(
        report.udp.wrong == 0 && report.tcp.wrong == 0,
        "the guest's echo differs from what was sent: {}",
        report.tcp.faults.join("; ")
    );
    Ok(Steady {
        udp_us: Spread::of(report.udp.latencies().map(us).collect()),
        udp_sent: report.udp.sent(),
        udp_lost: report.udp.lost(),
        udp_silence_us: report.udp.longest_silence().map_or(0.0, us),
        tcp_gap_us: report.tcp.longest_gap.map_or(0.0, |gap| us(gap.length())),
        tcp_broken: report.tcp.broken,
    })
}

/// Asks every 20 ms, for so long.
pub(super) fn steady(namespace: &Namespace, target: Target, span: Duration, tidy: &Tidy) -> Result<Steady> {
    let clients = start_steady(namespace, target)?;
    tidy.sleep(span)?;
    end_steady(clients)
}

impl LoadFigures {
    pub(super) fn title(&self) -> String {
        format!("{} on {}", self.kind.name(), self.connections)
    }

    /// Returns the figures in words.
    pub(super) fn told(&self) -> String {
        if self.kind.is_bulk() {
            return format!("{:.1} MB/s", self.rate / 1e6);
        }
        let (p50, p99) = (self.latency_us.p50 / 1e3, self.latency_us.p99 / 1e3);
        format!("{:.0}/s ({p50:.1}, {p99:.1} ms)", self.rate)
    }
}

impl Steady {
    /// Returns the figures in words.
    pub(super) fn told(&self) -> String {
        format!(
            "UDP {:.1}, {:.1} ms, {} of {} lost, longest silence {:.0} ms; longest gap of TCP {:.0} ms",
            self.udp_us.p50 / 1e3,
            self.udp_us.p99 / 1e3,
            self.udp_lost,
            self.udp_sent,
            self.udp_silence_us / 1e3,
            self.tcp_gap_us / 1e3
        )
    }
}

impl GuestFigures {
    /// Returns the mean of two runs, by load.
    pub(super) fn mean(&self, other: &Self) -> Self {
        let mean = |one: f64, other: f64| (one + other) / 2.0;
        let spread = |one: Spread, other: Spread| Spread {
            p50: mean(one.p50, other.p50),
            p99: mean(one.p99, other.p99),
        };
        let loads = self.loads.iter().zip(&other.loads).map(|(one, other)| LoadFigures {
            rate: mean(one.rate, other.rate),
            latency_us: spread(one.latency_us, other.latency_us),
            ..*one
        });
        Self {
            loads: loads.collect(),
            steady: Steady {
                udp_us: spread(self.steady.udp_us, other.steady.udp_us),
                ..self.steady
            },
        }
    }

    /// Returns the rate of a load ÷ that of the base.
    pub(super) fn rate_to(&self, base: &Self, kind: Kind, connections: usize) -> Option<f64> {
        let of = |figures: &Self| {
            let same = |load: &&LoadFigures| (load.kind, load.connections) == (kind, connections);
            figures.loads.iter().find(same).map(|load| load.rate)
        };
        Some(ratio(of(self)?, of(base)?))
    }

    /// Returns the table, beside a base if there is one.
    pub(super) fn text(&self, base: Option<&Self>) -> String {
        let mut text = String::new();
        for load in &self.loads {
            let beside = base.and_then(|base| self.rate_to(base, load.kind, load.connections));
            let beside = beside.map_or_else(String::new, |ratio| format!("{ratio:.2} of it"));
            let _ = writeln!(text, "    {:16} {:28} {beside}", load.title(), load.told());
        }
        let beside = base.map(|base| ratio(self.steady.udp_us.p50, base.steady.udp_us.p50));
        let beside = beside.map_or_else(String::new, |ratio| format!("; UDP's median {ratio:.1} times"));
        let _ = writeln!(text, "    {:16} {}{beside}", "every 20 ms", self.steady.told());
        text
    }
}

/// The targets of protected guests, each the best of those that were measured beside the base.
pub(super) fn targets(base: &GuestFigures, protected: &[&GuestFigures]) -> Vec<Aim> {
    let best = |kind, connections| {
        let ratios = protected
            .iter()
            .filter_map(|figures| figures.rate_to(base, kind, connections));
        ratios.reduce(f64::max)
    };
    let rates = [
        ("HTTP keep-alive, best mode", Kind::HttpSmall, 0.6),
        (
            "HTTP with a connection for each request, best mode",
            Kind::HttpClose,
            0.5,
        ),
        ("bulk from the guest, best mode", Kind::BulkOut, 0.5),
        ("bulk to the guest, best mode", Kind::BulkIn, 0.5),
    ];
    let rates = rates.into_iter().filter_map(|(what, kind, target)| {
        let ratio = [1, 8].into_iter().filter_map(|connections| best(kind, connections));
        Some(Aim::at_least(what, target, ratio.reduce(f64::max)?, "x alone"))
    });
    let udp = protected
        .iter()
        .map(|figures| {
            let times = ratio(figures.steady.udp_us.p50, base.steady.udp_us.p50);
            (times, figures.steady.udp_lost)
        })
        .min_by(|one, other| one.0.total_cmp(&other.0));
    let udp = udp.map(|(times, lost)| {
        [
            Aim::at_most("UDP echo every 20 ms, median, best mode", 3.0, times, "x alone"),
            Aim::at_most(
                "UDP echo every 20 ms, lost, the same mode",
                0.0,
                lost as f64,
                "datagrams",
            ),
        ]
    });
    rates.chain(udp.into_iter().flatten()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(rate: f64, udp: f64, lost: u64) -> GuestFigures {
        let load = |kind, connections, rate| LoadFigures {
            kind,
            connections,
            rate,
            latency_us: Spread { p50: 1.0, p99: 2.0 },
        };
        GuestFigures {
            loads: vec![
                load(Kind::HttpSmall, 1, rate),
                load(Kind::HttpSmall, 8, rate * 2.0),
                load(Kind::BulkOut, 1, rate * 1e6),
            ],
            steady: Steady {
                udp_us: Spread { p50: udp, p99: udp },
                udp_lost: lost,
                ..Steady::default()
            },
        }
    }

    #[test]
    fn ratios_are_to_the_same_load_and_targets_take_the_best() {
        let base = figures(100.0, 1000.0, 0).mean(&figures(300.0, 1000.0, 0));
        let (slow, fast) = (figures(20.0, 4000.0, 0), figures(130.0, 2000.0, 1));
        assert_eq!(slow.rate_to(&base, Kind::HttpSmall, 8), Some(0.1));
        assert_eq!(slow.rate_to(&base, Kind::Get, 1), None);
        let told: Vec<_> = targets(&base, &[&slow, &fast])
            .into_iter()
            .map(|aim| (aim.measured, aim.met))
            .collect();
        assert_eq!(told, [(0.65, true), (0.65, true), (2.0, true), (1.0, false)]);
        let text = fast.text(Some(&base));
        assert!(
            text.contains("http-small on 8") && text.contains("0.65 of it"),
            "{text}"
        );
        assert!(text.contains("2.0 times"), "{text}");
    }

    #[test]
    fn what_was_saved_is_read_again() {
        let figures = figures(100.0, 1000.0, 2);
        let saved = serde_json::to_string(&figures).unwrap();
        let read: GuestFigures = serde_json::from_str(&saved).unwrap();
        assert_eq!(read.steady, figures.steady);
        assert_eq!(read.rate_to(&figures, Kind::BulkOut, 1), Some(1.0));
    }
}
