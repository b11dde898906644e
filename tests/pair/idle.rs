//! What a pair costs that protects a guest which does nothing.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use tandem::lab::Host;

use crate::stage::{Setup, Stage};

const SPAN: Duration = Duration::from_secs(5);
/// The unit of times in /proc.
const TICKS_PER_SECOND: f64 = 100.0;
/// Far above what it should be: other work on the machine must not fail the test.
const SHARE_MAX: f64 = 0.5;

#[test]
fn an_idle_pair_uses_little_of_a_core() {
    let Some(mut stage) = Stage::new(Setup::default()) else {
        return;
    };
    stage.pair(Host::A);
    let pids = [Host::A, Host::B].map(|host| stage.pid(host));
    let used = || pids.iter().map(|pid| cpu_ticks(*pid)).sum::<u64>();
    let (before, start) = (used(), Instant::now());
    sleep(SPAN);
    let ticks = used() - before;
    let share = ticks as f64 / TICKS_PER_SECOND / start.elapsed().as_secs_f64();
    println!(
        "both processes of an idle, protected pair use {:.1} % of a core",
        share * 100.0
    );
    assert!(share < SHARE_MAX, "{share} of a core");
    stage.await_protected();
}

/// Returns what a process has used in user and system mode.
fn cpu_ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process is there");
    // Its name may hold anything; the fields after it do not.
    let (_, fields) = stat.rsplit_once(')').expect("the name is in parentheses");
    let times = fields.split_whitespace().skip(11).take(2);
    times.map(|ticks| ticks.parse::<u64>().expect("a number")).sum()
}
