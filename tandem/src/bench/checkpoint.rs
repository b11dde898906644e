//! `tandem bench checkpoint`: what a checkpoint costs, by the number of dirty pages and by what is in them.
//!
//! A pair and the floor's machine run side by side. A case is a number of pages and a content; a round of it is: the guest
//! of the floor writes the pages and is stopped; the pair's guest writes as many, and as soon as it says so, a
//! checkpoint is taken. Contents differ between the pair's two guests unless said otherwise, so that no page can be
//! found on the other host. The primary tells what each checkpoint cost; nothing is measured from outside but processor
//! time and memory.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use link::control::ask_history;
use link::status::{CheckpointTrace, PauseParts};
use machine::floor::Stop;
use serde::Serialize;

use super::buffered::{self, Buffered};
use super::cost::{Memory, Used};
use super::floor::Floor;
use super::{BenchOptions, Progress, Spread, need_memory, ratio, with_logs};
use crate::lab::Host;
use crate::stage::tidy::Tidy;
use crate::stage::{Stage, touchable_mib};
use crate::units::ByteSize;

const MEMORY: ByteSize = ByteSize::mib(512);
/// Of the guest whose secondary's memory is weighed.
const WEIGHED: ByteSize = ByteSize::mib(1024);
const WEIGHED_QUICK: ByteSize = ByteSize::mib(256);
/// Memory that both pairs, the floor's machine and its copies need, and some to spare.
const NEEDED: ByteSize = ByteSize::mib(4 * 512 + 512);
const NEEDED_WEIGHED: u64 = 4;
/// No checkpoint but those asked for, as far as that can be chosen.
const ASKED_ONLY: [&str; 6] = [
    "--epoch-max-age",
    "60s",
    "--unmatched-limit",
    "10s",
    "--checkpoint-memory",
    "4G",
];
/// Rounds that are not counted: they bring caches, queues and what the codecs have learned to where they stay.
const WARM_UP: usize = 3;
const SETTLE: Duration = Duration::from_millis(1_500);
const HISTORY_LIMIT: Duration = Duration::from_secs(10);
const PAGE_BYTES: f64 = 4096.0;
const GIB: f64 = (1u64 << 30) as f64;

/// What was found.
#[derive(Debug, Serialize)]
pub(super) struct CheckpointReport {
    pub(super) quick: bool,
    pub(super) memory_mib: u64,
    pub(super) processors: usize,
    pub(super) cases: Vec<Case>,
    pub(super) buffered: Vec<Buffered>,
    pub(super) secondary_memory: SecondaryMemory,
}

/// One number of pages with one content.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Case {
    /// Pages that the guest was told to write.
    pub(super) pages: u64,
    pub(super) content: &'static str,
    /// Both guests write the same.
    pub(super) equal: bool,
    pub(super) rounds: usize,
    /// Pages dirty at the stop, in the middle; the floor's below.
    pub(super) dirty_pages: u64,
    pub(super) floor_pages: u64,
    /// Pages shipped ahead of the stop, in the middle.
    pub(super) pages_ahead: u64,
    pub(super) pause_us: Spread,
    pub(super) floor_us: Spread,
    /// The pause ÷ the floor, of the medians.
    pub(super) pause_to_floor: f64,
    /// The median of each part by itself.
    pub(super) parts: PauseParts,
    pub(super) floor_parts: FloorParts,
    pub(super) encode_us: Spread,
    pub(super) commit_us: Spread,
    /// Bytes sent ÷ pages sent, those shipped ahead of the stop included.
    pub(super) bytes_per_page: f64,
    pub(super) codecs: Vec<CodecShare>,
    /// Processor seconds of both processes, their guests' own left out, for each GiB of pages sent.
    pub(super) cpu_s_per_gib: f64,
}

/// Medians of the parts of the floor, in microseconds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct FloorParts {
    pub(super) halt_us: f64,
    pub(super) harvest_us: f64,
    pub(super) copy_us: f64,
    pub(super) save_us: f64,
    pub(super) resume_us: f64,
}

/// What one codec did in a case.
#[derive(Clone, Debug, Serialize)]
pub(super) struct CodecShare {
    pub(super) codec: String,
    pub(super) pages: u64,
    pub(super) bytes: u64,
    pub(super) bytes_per_page: f64,
}

/// Memory of an idle secondary whose guest has written all of its memory, beside an unprotected VM's.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct SecondaryMemory {
    pub(super) guest_mib: u64,
    pub(super) touched_mib: u64,
    pub(super) secondary: Memory,
    pub(super) primary: Memory,
    pub(super) unprotected: Memory,
    /// PSS of the secondary less that of the unprotected VM, in percent of the guest's memory.
    pub(super) extra_pss_percent: f64,
    /// The same of all that is held, memory files that are not mapped included.
    pub(super) extra_held_percent: f64,
}

struct Wanted {
    pages: u64,
    content: &'static str,
    equal: bool,
    rounds: usize,
}

/// Measures everything.
pub(super) fn run(options: &BenchOptions, tidy: &Tidy, progress: &Progress) -> Result<CheckpointReport> {
    need_memory(NEEDED)?;
    progress.tell("a pair, and the same guest by itself, start");
    let mut stage = Stage::new(tidy.folder("pair")?, MEMORY.to_string())?;
    let cases = measure(&mut stage, options, tidy, progress).map_err(|error| with_logs(error, &stage, tidy))?;
    drop(stage);
    let guest = if options.quick { WEIGHED_QUICK } else { WEIGHED };
    Ok(CheckpointReport {
        quick: options.quick,
        memory_mib: MEMORY.0 >> 20,
        processors: std::thread::available_parallelism().map_or(0, usize::from),
        cases,
        buffered: buffered::run(options.quick, tidy, progress)?,
        secondary_memory: weigh(guest, tidy, progress)?,
    })
}

fn wanted(quick: bool) -> Vec<Wanted> {
    let sizes: &[(u64, usize)] = if quick {
        &[(100, 30), (1_000, 30), (10_000, 12)]
    } else {
        &[(100, 100), (1_000, 100), (10_000, 40), (50_000, 15)]
    };
    let contents: &[_] = if quick {
        &["sparse", "text"]
    } else {
        &["zero", "sparse", "text", "random"]
    };
    let case = |pages, rounds, content, equal| Wanted {
        pages,
        content,
        equal,
        rounds,
    };
    let mut cases = vec![case(0, if quick { 30 } else { 200 }, "sparse", false)];
    for content in contents {
        cases.extend(
            sizes
                .iter()
                .map(|(pages, rounds)| case(*pages, *rounds, content, false)),
        );
    }
    // What the targets for bytes ask of: enough pages that what the guest writes besides does not count.
    let (pages, rounds) = if quick { (2_000, 4) } else { (10_000, 10) };
    cases.push(case(pages, rounds, "run", false));
    cases.push(case(pages, rounds, "runs", false));
    cases.push(case(pages, rounds, "random", true));
    cases
}

fn measure(stage: &mut Stage, options: &BenchOptions, tidy: &Tidy, progress: &Progress) -> Result<Vec<Case>> {
    let quick = options.quick;
    stage.start_pair(&options.with(&ASKED_ONLY))?;
    let mut floor = Floor::start(MEMORY, tidy)?;
    stage.await_protected(tidy)?;
    stage.await_guest(tidy)?;
    // Every page that will be written has been written once, and both sides hold it.
    let most = wanted(quick).iter().map(|case| case.pages).max().unwrap_or(0);
    stage.admin(&format!("/write/{most},random"))?;
    floor.write(&format!("{most},random"))?;
    stage.commit()?;
    floor.stop()?;
    let mut cases = Vec::new();
    for wanted in wanted(quick) {
        let case = measure_case(stage, &mut floor, &wanted, tidy)?;
        progress.tell(&format!(
            "{:6} pages, {}{}: pause {:.0} µs (floor {:.0}), {:.1} bytes a page, committed after {:.1} ms",
            case.pages,
            case.content,
            if case.equal { ", equal" } else { "" },
            case.pause_us.p50,
            case.floor_us.p50,
            case.bytes_per_page,
            case.commit_us.p50 / 1e3,
        ));
        cases.push(case);
    }
    Ok(cases)
}

fn measure_case(stage: &mut Stage, floor: &mut Floor, wanted: &Wanted, tidy: &Tidy) -> Result<Case> {
    let pids = [stage.role(Host::A)?.pid(), stage.role(Host::B)?.pid()];
    let what = format!("{},{}", wanted.pages, wanted.content);
    let own = if wanted.equal { "" } else { ",differ" };
    let (mut traces, mut stops, mut used) = (Vec::new(), Vec::new(), Duration::ZERO);
    let mut last = last_epoch(stage)?;
    for round in 0..WARM_UP + wanted.rounds {
        tidy.sleep(Duration::ZERO)?;
        if wanted.content == "zero" {
            // Zeros over zeros would be no change at all.
            let before = format!("{},random{own}", wanted.pages);
            stage.admin(&format!("/write/{before}"))?;
            floor.write(&before)?;
            stage.commit()?;
            floor.stop()?;
            last = traced(stage, last)?.epoch;
        }
        floor.write(&what)?;
        let stop = floor.stop()?;
        stage.admin(&format!("/write/{what}{own}"))?;
        let before = Used::by(&pids)?;
        stage.commit()?;
        let trace = traced(stage, last)?;
        last = trace.epoch;
        if round >= WARM_UP {
            // Once the guest answers again, the secondary has loaded.
            stage.admin("/")?;
            used += Used::by(&pids)?.since(&before).own();
            stops.push(stop);
            traces.push(trace);
        }
    }
    Ok(case(wanted, &traces, &stops, used))
}

fn last_epoch(stage: &mut Stage) -> Result<u64> {
    let history = ask_history(stage.role(Host::A)?.control()).context("the primary tells no history")?;
    Ok(history.last().map_or(0, |trace| trace.epoch))
}

/// Returns what the last checkpoint cost, once it is one after `last`.
fn traced(stage: &mut Stage, last: u64) -> Result<CheckpointTrace> {
    let deadline = Instant::now() + HISTORY_LIMIT;
    while Instant::now() < deadline {
        let history = ask_history(stage.role(Host::A)?.control()).context("the primary tells no history")?;
        if let Some(trace) = history.last().filter(|trace| trace.epoch > last) {
            return Ok(trace.clone());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    bail!("the primary has forgotten a checkpoint")
}

fn case(wanted: &Wanted, traces: &[CheckpointTrace], stops: &[Stop], used: Duration) -> Case {
    let spread = |of: fn(&CheckpointTrace) -> f64| Spread::of(traces.iter().map(of).collect());
    let part = |of: fn(&PauseParts) -> f64| Spread::of(traces.iter().map(|trace| of(&trace.parts)).collect()).p50;
    let floor = |of: fn(&Stop) -> Duration| Spread::of(stops.iter().map(|stop| micros(of(stop))).collect());
    let mut codecs = BTreeMap::<&str, (u64, u64)>::new();
    for share in traces.iter().flat_map(|trace| &trace.codecs) {
        let (pages, bytes) = codecs.entry(&share.codec).or_default();
        *pages += share.pages;
        *bytes += share.bytes;
    }
    let pages: u64 = traces.iter().map(|trace| trace.pages + trace.pages_ahead).sum();
    let bytes: u64 = traces.iter().map(|trace| trace.bytes).sum();
    let (pause_us, floor_us) = (spread(|trace| trace.pause_us), floor(Stop::total));
    Case {
        pages: wanted.pages,
        content: wanted.content,
        equal: wanted.equal,
        rounds: traces.len(),
        dirty_pages: middle(traces.iter().map(|trace| trace.pages)),
        pages_ahead: middle(traces.iter().map(|trace| trace.pages_ahead)),
        floor_pages: middle(stops.iter().map(|stop| stop.pages)),
        pause_us,
        floor_us,
        pause_to_floor: ratio(pause_us.p50, floor_us.p50),
        parts: PauseParts {
            halt_us: part(|parts| parts.halt_us),
            order_us: part(|parts| parts.order_us),
            harvest_us: part(|parts| parts.harvest_us),
            room_us: part(|parts| parts.room_us),
            copy_us: part(|parts| parts.copy_us),
            save_us: part(|parts| parts.save_us),
            handover_us: part(|parts| parts.handover_us),
            resume_us: part(|parts| parts.resume_us),
        },
        floor_parts: FloorParts {
            halt_us: floor(|stop| stop.pause).p50,
            harvest_us: floor(|stop| stop.harvest).p50,
            copy_us: floor(|stop| stop.copy).p50,
            save_us: floor(|stop| stop.save).p50,
            resume_us: floor(|stop| stop.resume).p50,
        },
        encode_us: spread(|trace| trace.encode_us),
        commit_us: spread(|trace| trace.commit_us),
        bytes_per_page: ratio(bytes as f64, pages as f64),
        codecs: codecs
            .into_iter()
            .map(|(codec, (pages, bytes))| CodecShare {
                codec: codec.to_owned(),
                pages,
                bytes,
                bytes_per_page: ratio(bytes as f64, pages as f64),
            })
            .collect(),
        cpu_s_per_gib: ratio(used.as_secs_f64(), pages as f64 * PAGE_BYTES / GIB),
    }
}

/// Weighs an idle secondary beside an unprotected VM.
fn weigh(guest: ByteSize, tidy: &Tidy, progress: &Progress) -> Result<SecondaryMemory> {
    need_memory(ByteSize(guest.0 * NEEDED_WEIGHED))?;
    let touched_mib = touchable_mib(guest);
    progress.tell(&format!(
        "memory of an idle secondary: a guest of {guest} writes {touched_mib} MiB"
    ));
    let mut pair = Stage::new(tidy.folder("weighed")?, guest.to_string())?;
    let mut alone = Stage::new(tidy.folder("alone")?, guest.to_string())?;
    let outcome = weigh_both(&mut pair, &mut alone, touched_mib, tidy);
    let [secondary, primary, unprotected] = outcome.map_err(|error| with_logs(error, &pair, tidy))?;
    let percent = |of: fn(&Memory) -> u64| {
        let extra = of(&secondary) as f64 - of(&unprotected) as f64;
        extra * 100.0 / guest.0 as f64
    };
    Ok(SecondaryMemory {
        guest_mib: guest.0 >> 20,
        touched_mib,
        secondary,
        primary,
        unprotected,
        extra_pss_percent: percent(|memory| memory.pss),
        extra_held_percent: percent(|memory| memory.held),
    })
}

fn weigh_both(pair: &mut Stage, alone: &mut Stage, touched_mib: u64, tidy: &Tidy) -> Result<[Memory; 3]> {
    pair.start_pair::<&str>(&[])?;
    alone.start_alone(Host::A)?;
    pair.await_protected(tidy)?;
    for stage in [&mut *pair, alone] {
        stage.await_guest(tidy)?;
        stage.admin(&format!("/touch/{touched_mib}"))?;
    }
    pair.commit()?;
    // Some checkpoints of an idle guest.
    tidy.sleep(SETTLE)?;
    pair.await_protected(tidy)?;
    Ok([
        Memory::of(pair.role(Host::B)?.pid())?,
        Memory::of(pair.role(Host::A)?.pid())?,
        Memory::of(alone.role(Host::A)?.pid())?,
    ])
}

fn middle(values: impl Iterator<Item = u64>) -> u64 {
    let mut values: Vec<_> = values.collect();
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or_default()
}

fn micros(span: Duration) -> f64 {
    span.as_secs_f64() * 1e6
}

#[cfg(test)]
mod tests {
    use super::*;
    use link::status::CodecTrace;

    #[test]
    fn a_case_sums_up_its_rounds() {
        let trace = |pages, bytes, pause_us| CheckpointTrace {
            pages,
            bytes,
            pause_us,
            codecs: vec![CodecTrace {
                codec: "delta".to_owned(),
                pages,
                bytes,
            }],
            ..CheckpointTrace::default()
        };
        let stop = Stop {
            pages: 9,
            copy: Duration::from_micros(50),
            ..Stop::default()
        };
        let wanted = Wanted {
            pages: 10,
            content: "sparse",
            equal: false,
            rounds: 2,
        };
        let case = case(
            &wanted,
            &[trace(10, 200, 100.0), trace(30, 200, 100.0)],
            &[stop, stop],
            Duration::from_secs(1),
        );
        assert_eq!(
            (case.pause_to_floor, case.bytes_per_page, case.floor_pages),
            (2.0, 10.0, 9)
        );
        assert_eq!((case.codecs.len(), case.codecs[0].pages), (1, 40));
        assert!((case.cpu_s_per_gib - GIB / (40.0 * PAGE_BYTES)).abs() < 1e-6);
    }

    #[test]
    fn both_lengths_have_the_cases_that_the_targets_ask_for() {
        for quick in [true, false] {
            let cases = wanted(quick);
            let has = |pages, content, equal| {
                cases
                    .iter()
                    .any(|case| (case.pages, case.content, case.equal) == (pages, content, equal))
            };
            assert!(has(0, "sparse", false) && has(10_000, "sparse", false));
            assert!(cases.iter().any(|case| case.content == "run"));
            assert!(cases.iter().any(|case| case.content == "runs"));
            assert!(cases.iter().any(|case| case.equal));
        }
    }
}
