//! What was found, as JSON and as tables, and which targets were met. The JSON's names are an interface; scripts read it.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use super::checkpoint::{Case, CheckpointReport};
use super::clients::ClientsReport;
use super::linux::LinuxReport;
use super::load::Kind;
use super::plot::{self, Line, Sheet};
use super::protect::{Figures, Latency, ProtectReport};
use super::proxy::ProxyReport;
use super::ratio;

/// The report of one benchmark.
pub(super) enum Report {
    Checkpoint(CheckpointReport),
    Clients(ClientsReport),
    Linux(LinuxReport),
    Protect(ProtectReport),
    Proxy(ProxyReport),
}

/// What was wished for, and what came out.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Target {
    pub(super) what: String,
    /// The bound, in `unit`.
    pub(super) target: f64,
    /// Whether the measured value may be at most the bound; else at least.
    pub(super) at_most: bool,
    pub(super) measured: f64,
    pub(super) unit: &'static str,
    pub(super) met: bool,
}

impl Target {
    pub(super) fn at_most(what: &str, target: f64, measured: f64, unit: &'static str) -> Self {
        Self {
            what: what.to_owned(),
            target,
            at_most: true,
            measured,
            unit,
            met: measured <= target,
        }
    }

    pub(super) fn at_least(what: &str, target: f64, measured: f64, unit: &'static str) -> Self {
        Self {
            at_most: false,
            met: measured >= target,
            ..Self::at_most(what, target, measured, unit)
        }
    }
}

impl Serialize for Report {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        /// The figures, with the targets beside them.
        #[derive(Serialize)]
        struct Whole<'a, T> {
            benchmark: &'static str,
            #[serde(flatten)]
            figures: &'a T,
            targets: Vec<Target>,
        }
        let targets = self.targets();
        match self {
            Self::Checkpoint(figures) => Whole {
                benchmark: "checkpoint",
                figures,
                targets,
            }
            .serialize(serializer),
            Self::Clients(figures) => Whole {
                benchmark: "clients",
                figures,
                targets,
            }
            .serialize(serializer),
            Self::Linux(figures) => Whole {
                benchmark: "linux",
                figures,
                targets,
            }
            .serialize(serializer),
            Self::Protect(figures) => Whole {
                benchmark: "protect",
                figures,
                targets,
            }
            .serialize(serializer),
            Self::Proxy(figures) => Whole {
                benchmark: "proxy",
                figures,
                targets,
            }
            .serialize(serializer),
        }
    }
}

impl Report {
    fn targets(&self) -> Vec<Target> {
        match self {
            Self::Checkpoint(report) => checkpoint_targets(report),
            Self::Clients(report) => report.targets(),
            Self::Linux(report) => report.targets(),
            Self::Protect(report) => protect_targets(report),
            Self::Proxy(report) => report.targets(),
        }
    }

    /// Returns the tables.
    pub(super) fn text(&self) -> String {
        let mut text = match self {
            Self::Checkpoint(report) => checkpoint_text(report),
            Self::Clients(report) => report.text(),
            Self::Linux(report) => report.text(),
            Self::Protect(report) => protect_text(report),
            Self::Proxy(report) => report.text(),
        };
        let targets = self.targets();
        if !targets.is_empty() {
            text.push_str("\nTargets\n");
        }
        for target in targets {
            let bound = if target.at_most { "at most" } else { "at least" };
            let verdict = if target.met { "met" } else { "MISSED" };
            line(
                &mut text,
                format_args!(
                    "  {verdict:6}  {:10.3} {:10} {bound} {:8.2}  {}",
                    target.measured, target.unit, target.target, target.what
                ),
            );
        }
        text
    }

    /// Writes figures and data into a folder.
    pub(super) fn plot(&self, folder: &Path) -> Result<()> {
        match self {
            Self::Checkpoint(report) => checkpoint_plot(report, folder),
            Self::Protect(report) => protect_plot(report, folder),
            // Their options name no folder.
            Self::Clients(_) | Self::Linux(_) | Self::Proxy(_) => Ok(()),
        }
    }
}

fn checkpoint_targets(report: &CheckpointReport) -> Vec<Target> {
    let case = |content: &str, equal: bool, pages: Option<u64>| {
        let mut found = report
            .cases
            .iter()
            .filter(move |case| (case.content, case.equal) == (content, equal));
        found.find(|case| pages.is_none_or(|pages| case.pages == pages))
    };
    let mut targets = Vec::new();
    let mut add = |found: Option<&Case>, target: fn(&Case) -> Target| targets.extend(found.map(target));
    add(case("sparse", false, Some(10_000)), |case| {
        let what = "pause with 10000 pages written right before the trigger, sparse change ÷ floor, medians";
        Target::at_most(what, 1.5, case.pause_to_floor, "x floor")
    });
    add(case("sparse", false, Some(0)), |case| {
        Target::at_most("idle checkpoint's pause, p99", 2.0, case.pause_us.p99 / 1e3, "ms")
    });
    add(case("run", false, None), |case| {
        let what = "bytes on the wire per page with one run of 64 bytes changed";
        Target::at_most(what, 150.0, case.bytes_per_page, "bytes")
    });
    add(case("runs", false, None), |case| {
        let what = "bytes on the wire per page with 8 runs of 8 bytes changed";
        Target::at_most(what, 200.0, case.bytes_per_page, "bytes")
    });
    add(case("random", true, None), |case| {
        Target::at_most(
            "bytes on the wire per page that is equal on both sides",
            40.0,
            case.bytes_per_page,
            "bytes",
        )
    });
    let memory = &report.secondary_memory;
    let guest = format!(
        "extra memory of an idle secondary, guest of {} MiB with {} MiB written",
        memory.guest_mib, memory.touched_mib
    );
    targets.push(Target::at_most(
        &format!("{guest}: PSS"),
        5.0,
        memory.extra_pss_percent,
        "% of guest",
    ));
    targets.push(Target::at_most(
        &format!("{guest}: all that is held, memory files included"),
        5.0,
        memory.extra_held_percent,
        "% of guest",
    ));
    targets
}

fn checkpoint_text(report: &CheckpointReport) -> String {
    let mut text = String::new();
    line(
        &mut text,
        format_args!(
            "\nCheckpoints of a guest of {} MiB on {} processors. Times in µs; floor: the same guest, stopped with nothing around it.\n",
            report.memory_mib, report.processors
        ),
    );
    line(
        &mut text,
        format_args!(
            "{:>6} {:8} {:>6} | {:>9} {:>9} | {:>9} {:>9} | {:>6} | {:>9} {:>9} | {:>9} | {:>8}",
            "pages",
            "content",
            "rounds",
            "pause p50",
            "p99",
            "floor p50",
            "p99",
            "ratio",
            "commit",
            "p99",
            "byte/page",
            "cpu/GiB"
        ),
    );
    for case in &report.cases {
        let content = if case.equal { "equal" } else { case.content };
        line(
            &mut text,
            format_args!(
                "{:6} {content:8} {:6} | {:9.0} {:9.0} | {:9.0} {:9.0} | {:6.2} | {:9.0} {:9.0} | {:9.1} | {:6.2} s",
                case.pages,
                case.rounds,
                case.pause_us.p50,
                case.pause_us.p99,
                case.floor_us.p50,
                case.floor_us.p99,
                case.pause_to_floor,
                case.commit_us.p50,
                case.commit_us.p99,
                case.bytes_per_page,
                case.cpu_s_per_gib,
            ),
        );
    }
    text.push_str("\nWhat the guest stood for (medians in µs), the floor's beside it; codecs by bytes a page\n");
    for case in &report.cases {
        let (parts, floor) = (&case.parts, &case.floor_parts);
        let codecs: Vec<_> = case
            .codecs
            .iter()
            .map(|share| {
                format!(
                    "{} {}×{:.0}",
                    share.codec,
                    share.pages / case.rounds.max(1) as u64,
                    share.bytes_per_page
                )
            })
            .collect();
        line(
            &mut text,
            format_args!(
                "{:6} {:8} halt {:.0}|{:.0} order {:.0} harvest {:.0}|{:.0} room {:.0} copy {:.0}|{:.0} save {:.0}|{:.0} handover {:.0} resume {:.0}|{:.0}; encode {:.0}; {} ahead; {}",
                case.pages,
                if case.equal { "equal" } else { case.content },
                parts.halt_us,
                floor.halt_us,
                parts.order_us,
                parts.harvest_us,
                floor.harvest_us,
                parts.room_us,
                parts.copy_us,
                floor.copy_us,
                parts.save_us,
                floor.save_us,
                parts.handover_us,
                parts.resume_us,
                floor.resume_us,
                case.encode_us.p50,
                case.pages_ahead,
                codecs.join(", "),
            ),
        );
    }
    text.push_str("\nBuffered mode, 16 clients at work\n");
    for one in &report.buffered {
        line(
            &mut text,
            format_args!(
                "  every {:2} ms: {:6.1} checkpoints/s, pause {:.0} µs (p99 {:.0}), commit {:.0} µs (p99 {:.0}), {:.0} pages, {:.0} requests/s, {:.0} % of a processor",
                one.every_ms,
                one.checkpoints_per_s,
                one.pause_us.p50,
                one.pause_us.p99,
                one.commit_us.p50,
                one.commit_us.p99,
                one.pages.p50,
                one.requests_per_s,
                one.cpu_percent,
            ),
        );
    }
    let memory = &report.secondary_memory;
    let mib = |bytes: u64| bytes >> 20;
    line(
        &mut text,
        format_args!(
            "\nMemory in MiB (RSS, PSS, held), guest of {} MiB: secondary {} {} {}, primary {} {} {}, unprotected {} {} {}",
            memory.guest_mib,
            mib(memory.secondary.rss),
            mib(memory.secondary.pss),
            mib(memory.secondary.held),
            mib(memory.primary.rss),
            mib(memory.primary.pss),
            mib(memory.primary.held),
            mib(memory.unprotected.rss),
            mib(memory.unprotected.pss),
            mib(memory.unprotected.held),
        ),
    );
    text
}

fn checkpoint_plot(report: &CheckpointReport, folder: &Path) -> Result<()> {
    let mut sheet = Sheet::new(&[
        "pages",
        "content",
        "equal",
        "rounds",
        "pause_p50_us",
        "pause_p99_us",
        "floor_p50_us",
        "floor_p99_us",
        "commit_p50_us",
        "commit_p99_us",
        "bytes_per_page",
        "cpu_s_per_gib",
    ]);
    for case in &report.cases {
        let figures = [
            case.pause_us.p50,
            case.pause_us.p99,
            case.floor_us.p50,
            case.floor_us.p99,
            case.commit_us.p50,
            case.commit_us.p99,
            case.bytes_per_page,
            case.cpu_s_per_gib,
        ];
        let words = [
            case.pages.to_string(),
            case.content.to_owned(),
            case.equal.to_string(),
            case.rounds.to_string(),
        ];
        sheet.row(
            words
                .into_iter()
                .chain(figures.iter().map(|figure| format!("{figure:.3}"))),
        );
    }
    sheet.write(&folder.join("checkpoint.csv"))?;
    let mut contents: Vec<&str> = Vec::new();
    for case in &report.cases {
        if !case.equal && !contents.contains(&case.content) {
            contents.push(case.content);
        }
    }
    let line = |name: &str, content: &str, value: fn(&Case) -> f64| Line {
        name: name.to_owned(),
        points: report
            .cases
            .iter()
            .filter(|case| case.content == content && !case.equal && case.pages > 0)
            .map(|case| (case.pages as f64, value(case)))
            .collect(),
    };
    for content in ["zero", "sparse", "text", "random"]
        .into_iter()
        .filter(|content| contents.contains(content))
    {
        let lines = [
            line("pause, median", content, |case| case.pause_us.p50),
            line("pause, p99", content, |case| case.pause_us.p99),
            line("floor, median", content, |case| case.floor_us.p50),
            line("commit, median", content, |case| case.commit_us.p50),
        ];
        let title = format!("A checkpoint of pages with {content} content, in µs by dirty pages");
        plot::lines(&folder.join(format!("checkpoint-{content}.svg")), &title, &lines)?;
    }
    let bytes: Vec<_> = contents
        .iter()
        .map(|content| line(content, content, |case| case.bytes_per_page))
        .filter(|line| line.points.len() > 1)
        .collect();
    plot::lines(
        &folder.join("checkpoint-bytes.svg"),
        "Bytes on the wire per page, by dirty pages",
        &bytes,
    )
}

fn protect_targets(report: &ProtectReport) -> Vec<Target> {
    let mut targets = Vec::new();
    for scenario in &report.scenarios {
        let bound = match scenario.kind {
            Kind::HttpSmall | Kind::Get => 0.9,
            Kind::Increment => 0.7,
            _ => continue,
        };
        let modes = scenario.modes.iter().filter(|mode| mode.mode == "lockstep");
        targets.extend(modes.map(|mode| {
            let what = format!(
                "{} in lockstep on {} connections ÷ two unprotected copies at once, mean per copy ({:.2} of one bare VM)",
                scenario.kind.name(),
                scenario.connections,
                mode.to_bare
            );
            Target::at_least(&what, bound, mode.to_two, "x two")
        }));
    }
    targets
}

fn protect_text(report: &ProtectReport) -> String {
    let mut text = String::new();
    line(
        &mut text,
        format_args!(
            "\nA guest of {} MiB on {} processors, images on {}; {} rounds in turns. The load's own thread was busy for at most {:.0} % of the time.\n\
             Rates each second; latencies p50/p99/p99.9 in µs; two: mean of two unprotected copies at once, bare: one by itself.\n",
            report.memory_mib,
            report.processors,
            report.file_system,
            report.rounds,
            report.load_busy_max * 100.0,
        ),
    );
    for scenario in &report.scenarios {
        line(
            &mut text,
            format_args!(
                "{} on {} connections, {}",
                scenario.kind.name(),
                scenario.connections,
                scenario.unit
            ),
        );
        let mut add = |name: &str, figures: &Figures, more: String| {
            let latency = figures.latency_us.map_or_else(String::new, |latency| {
                format!("{:.0}/{:.0}/{:.0}", latency.p50, latency.p99, latency.p999)
            });
            let mut threads: Vec<_> = figures
                .threads_percent
                .iter()
                .filter(|thread| *thread.1 >= 1.0)
                .collect();
            threads.sort_by(|one, other| other.1.total_cmp(one.1));
            let threads: Vec<_> = threads
                .iter()
                .map(|(name, share)| format!("{name} {share:.0}"))
                .collect();
            line(
                &mut text,
                format_args!(
                    "  {name:9} {:12.0}  {latency:22} {more} [%: {}]",
                    figures.rate,
                    threads.join(", ")
                ),
            );
        };
        add("two", &scenario.two, String::new());
        add("bare", &scenario.bare, String::new());
        for mode in &scenario.modes {
            let latency = mode
                .latency_to_two
                .map_or_else(String::new, |Latency { p50, p99, p999 }| {
                    format!(", latency x {p50:.1}/{p99:.1}/{p999:.1}")
                });
            let more = format!(
                "= {:.2} of two, {:.2} of bare{latency}; {:.1} checkpoints/s, {} divergences, {} lost",
                mode.to_two, mode.to_bare, mode.checkpoints_per_s, mode.divergences, mode.figures.lost
            );
            add(mode.mode, &mode.figures, more);
        }
    }
    text
}

fn protect_plot(report: &ProtectReport, folder: &Path) -> Result<()> {
    let mut sheet = Sheet::new(&[
        "kind",
        "connections",
        "subject",
        "unit",
        "rate",
        "to_two",
        "to_bare",
        "p50_us",
        "p99_us",
        "p999_us",
        "lost",
        "load_busy",
    ]);
    let mut bars = Vec::new();
    for scenario in &report.scenarios {
        let mut add = |subject: &str, figures: &Figures, to_two: f64, to_bare: f64| {
            let latency = figures.latency_us.unwrap_or_default();
            let words = [
                scenario.kind.name().to_owned(),
                scenario.connections.to_string(),
                subject.to_owned(),
                scenario.unit.to_owned(),
            ];
            let numbers = [figures.rate, to_two, to_bare, latency.p50, latency.p99, latency.p999];
            let more = [figures.lost.to_string(), format!("{:.3}", figures.load_busy)];
            let numbers = numbers.iter().map(|number| format!("{number:.3}"));
            sheet.row(words.into_iter().chain(numbers).chain(more));
        };
        add("two", &scenario.two, 1.0, ratio(scenario.two.rate, scenario.bare.rate));
        add(
            "bare",
            &scenario.bare,
            ratio(scenario.bare.rate, scenario.two.rate),
            1.0,
        );
        for mode in &scenario.modes {
            add(mode.mode, &mode.figures, mode.to_two, mode.to_bare);
            let name = format!("{} × {}, {}", scenario.kind.name(), scenario.connections, mode.mode);
            bars.push((name, mode.to_two));
        }
    }
    sheet.write(&folder.join("protect.csv"))?;
    // The first is drawn at the bottom.
    bars.reverse();
    plot::bars(
        &folder.join("protect.svg"),
        "Throughput of a pair ÷ two unprotected copies at once (line: 0.9)",
        0.9,
        &bars,
    )
}

pub(super) fn line(text: &mut String, words: std::fmt::Arguments<'_>) {
    writeln!(text, "{words}").expect("a string takes everything");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_met_at_its_bound() {
        assert!(Target::at_most("x", 1.5, 1.5, "x").met && !Target::at_most("x", 1.5, 1.51, "x").met);
        assert!(Target::at_least("x", 0.9, 0.9, "x").met && !Target::at_least("x", 0.9, 0.89, "x").met);
    }
}
