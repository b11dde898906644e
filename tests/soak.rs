//! Runs the simulation for as long as one likes: seed after seed, until a rule is broken.
//!
//! The program is built to end at a panic, as the shipped one is. So a failing seed is looked at by children of this
//! process: one replays it for its trace, others leave faults out until only those remain that it takes.

use std::panic::PanicHookInfo;
use std::process::{Command, ExitCode, Output};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use harness::run;

/// Lines of a failing seed's trace that are shown.
const TRACE_LINES: usize = 80;
const PROGRESS_EVERY: Duration = Duration::from_secs(5);

/// Set by Ctrl-C.
static STOPPED: AtomicBool = AtomicBool::new(false);
/// Held by the first seed that fails, for ever.
static FAILED: Mutex<()> = Mutex::new(());

/// Runs the simulation of a pair under faults, seed after seed, until one of the rules is broken.
///
/// Ends with 0 if no seed has failed, and with 1 at the first that does: then it prints the rule, the last events, the
/// shortest list of faults that still breaks it, and how to replay it. Ctrl-C ends it with what has been found so far.
#[derive(Parser)]
#[command(name = "soak")]
struct Args {
    /// How many seeds to run.
    #[arg(long, default_value_t = 1_000_000, value_name = "N")]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 0, value_name = "SEED")]
    start: u64,
    /// Stop after so many seconds.
    #[arg(long, value_name = "S")]
    seconds: Option<u64>,
    /// How many seeds run at a time [default: one for each processor].
    #[arg(long, value_name = "T")]
    threads: Option<usize>,
    /// Run this seed only, and print every event.
    #[arg(long, value_name = "SEED")]
    replay: Option<u64>,
    /// Leave these faults of a replayed seed's list out.
    #[arg(long, value_name = "NUMBERS", value_delimiter = ',', requires = "replay")]
    skip: Vec<usize>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(seed) = args.replay {
        eprintln!("faults of seed {seed}:\n{}", run::describe_plan(seed, &args.skip));
        return match run::run(seed, &args.skip, true) {
            Ok(_) => ExitCode::SUCCESS,
            Err(failure) => {
                eprintln!("seed {seed}: {}", failure.message);
                ExitCode::FAILURE
            }
        };
    }
    std::panic::set_hook(Box::new(tell));
    if let Err(error) = watch_for_interrupt() {
        eprintln!("Ctrl-C will end this without a summary: {error}");
    }
    soak(&args);
    ExitCode::SUCCESS
}

fn soak(args: &Args) {
    let threads = args
        .threads
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    println!("seeds from {}, {threads} at a time", args.start);
    let began = Instant::now();
    let told = Mutex::new(began);
    let limit = args.seconds.map(Duration::from_secs);
    let go_on = |ran: u64| {
        let mut told = told.lock().expect("no panic while it is held");
        if told.elapsed() >= PROGRESS_EVERY {
            *told = Instant::now();
            println!("{ran} seeds, {} a second", per_second(ran, began.elapsed()));
        }
        !STOPPED.load(Ordering::Relaxed) && limit.is_none_or(|limit| began.elapsed() < limit)
    };
    let (ran, coverage, _) = run::run_many(args.start, args.seeds, threads, go_on);
    println!("{coverage}");
    println!(
        "{ran} seeds from {}, {} a second, no rule broken",
        args.start,
        per_second(ran, began.elapsed())
    );
}

fn per_second(seeds: u64, span: Duration) -> u64 {
    let millis = u64::try_from(span.as_millis()).unwrap_or(u64::MAX).max(1);
    seeds.saturating_mul(1_000) / millis
}

fn watch_for_interrupt() -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new()
        .name("interrupt".to_owned())
        .spawn(move || {
            if runtime.block_on(tokio::signal::ctrl_c()).is_ok() {
                STOPPED.store(true, Ordering::Relaxed);
            }
        })?;
    Ok(())
}

/// What the panic of a seed comes to: everything that is needed to look at it, and the end of the process.
fn tell(panic: &PanicHookInfo<'_>) {
    let Ok(_first) = FAILED.lock() else { return };
    let Some((seed, planned)) = run::current() else {
        eprintln!("{panic}");
        std::process::exit(2);
    };
    let trace = String::from_utf8_lossy(&child(seed, &[]).stderr).into_owned();
    let lines: Vec<_> = trace.lines().collect();
    let last = lines.len().saturating_sub(TRACE_LINES);
    println!(
        "seed {seed} breaks a rule; the last events:\n{}",
        lines[last..].join("\n")
    );
    println!("{panic}\nlooking for the shortest list of faults…");
    let skip = run::minimise(planned, |skip| !child(seed, skip).status.success());
    println!("it takes these:\n{}", run::describe_plan(seed, &skip));
    let skip: Vec<_> = skip.iter().map(usize::to_string).collect();
    println!(
        "replay: SEED={seed} SKIP={} cargo test --release -p tests --test simulation",
        skip.join(",")
    );
    std::process::exit(1);
}

fn child(seed: u64, skip: &[usize]) -> Output {
    let own = std::env::current_exe().expect("this process has an executable");
    let mut command = Command::new(own);
    command.env("RUST_BACKTRACE", "0");
    command.arg("--replay").arg(seed.to_string());
    if !skip.is_empty() {
        let skip: Vec<_> = skip.iter().map(usize::to_string).collect();
        command.arg("--skip").arg(skip.join(","));
    }
    command.output().expect("a child can be started")
}
