//! One round of the demo: a pair comes up, is loaded, loses a host or its link, and is audited.

use std::path::Path;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use link::control::ask_status;
use link::status::State;

use super::random::Random;
use super::report::Round;
use super::story::Story;
use super::{DemoOptions, Victim};
use crate::clients::{Clients, Counter, Gap, Load, Report as ClientReport, Target, stored_count};
use crate::lab::Host;
use crate::stage::Stage;
use crate::stage::tidy::Tidy;

const TAKEOVER_LIMIT: Duration = Duration::from_secs(20);
const AUDIT_LIMIT: Duration = Duration::from_secs(10);
/// The kill comes at a random moment within this span after the clients have begun.
const BEFORE_KILL: (Duration, Duration) = (Duration::from_millis(800), Duration::from_millis(2_800));
/// Work of the clients on the survivor.
const AFTER_TAKEOVER: Duration = Duration::from_millis(1_500);
/// A UDP answer may have been held back for so long when the host died.
const UDP_IN_FLIGHT: Duration = Duration::from_millis(1_000);
const WATCH_PERIOD: Duration = Duration::from_millis(2);

/// Runs a round and returns its numbers. If it can't be carried out, the roles' last words are in the error.
pub(super) fn run(options: &DemoOptions, story: &Story, tidy: &Tidy, random: &mut Random) -> Result<Round> {
    let mut stage = Stage::new(tidy.folder("round")?, options.memory.to_string())?;
    let (limit, mode) = (options.takeover_limit.to_string(), options.mode.to_string());
    stage.start_pair(&["--takeover-limit", &limit, "--mode", &mode])?;
    let outcome = play(&mut stage, options, story, tidy, random);
    outcome.map_err(|error| {
        if tidy.is_interrupted() {
            error
        } else {
            error.context(stage.last_words())
        }
    })
}

fn play(stage: &mut Stage, options: &DemoOptions, story: &Story, tidy: &Tidy, random: &mut Random) -> Result<Round> {
    let mut round = Round::default();
    stage.protect(story, tidy, &mut round)?;
    stage.prepare(options, story, tidy)?;
    let clients = Clients::start(stage.lab().client(), Target::bundled(), Load::default(), "demo:")
        .context("can't start the clients")?;
    story.tell("clients at work: HTTP, increments, echo, UDP, ping");
    tidy.sleep(random.span(BEFORE_KILL.0, BEFORE_KILL.1))?;
    let last = stage.await_protected(tidy)?;
    round.epochs = last.epoch;
    round.divergences = last.divergences;
    round.mid_checkpoint = last.state == State::Checkpointing;
    story.tell(&format!(
        "{} divergences, {} checkpoints so far",
        last.divergences, last.checkpoints.total
    ));

    let strike = stage.strike(options, story)?;
    let noticed = stage.watch(options, strike)?;
    let what = format!("an answer after the {}", blow(options));
    let answer = tidy.wait(&what, TAKEOVER_LIMIT, || Ok(clients.first_answer_since(strike)))?;
    if let Some(noticed) = noticed.join() {
        round.detection_ms = Some(ms(noticed.saturating_duration_since(strike)));
        story.tell_of(noticed, "the survivor notices");
    }
    round.takeover_ms = Some(ms(answer - strike));
    story.tell_of(
        answer,
        &format!(
            "first answer, {:.1} ms after the {}",
            ms(answer - strike),
            blow(options)
        ),
    );
    let survivor = stage.survivor(options, tidy)?;
    tidy.sleep(AFTER_TAKEOVER)?;
    let report = clients.stop();
    count(&mut round, &report, strike, answer);
    story.tell(&format!(
        "the same connections went on: {} requests, {} failed",
        round.requests, round.failed_requests
    ));
    if let Some(gap) = &report.tcp.longest_gap {
        story.tell(&format!("longest TCP gap: {}", gap_told(gap, strike)));
    }
    for fault in &report.tcp.faults {
        story.tell(&format!("FAULT {fault}"));
    }
    stage.audit(survivor, story, tidy, &report.tcp.counters, &mut round)?;
    Ok(round)
}

/// The steps of a round.
impl Stage {
    /// Waits until the pair is protected.
    fn protect(&mut self, story: &Story, tidy: &Tidy, round: &mut Round) -> Result<()> {
        let start = Instant::now();
        story.tell("two hosts, their networks, a primary and a secondary started");
        let status = self.await_protected(tidy)?;
        round.protected_ms = ms(start.elapsed());
        story.tell(&format!("protected, epoch {}", status.epoch));
        Ok(())
    }

    /// Has the guest use its memory, and lets some of its answers differ between the hosts.
    fn prepare(&mut self, options: &DemoOptions, story: &Story, tidy: &Tidy) -> Result<()> {
        self.await_guest(tidy)?;
        let touched = options.touch_mib();
        if touched > 0 {
            self.admin(&format!("/touch/{touched}"))?;
            story.tell(&format!("the guest has written {touched} MiB of its memory"));
        }
        let start = Instant::now();
        self.commit()?;
        story.tell(&format!("a checkpoint of it all took {:.0} ms", ms(start.elapsed())));
        if options.nondeterminism > 0 {
            self.admin(&format!("/set?nondeterminism={}", options.nondeterminism))?;
            story.tell(&format!(
                "{} ‰ of the HTTP answers now differ between the hosts",
                options.nondeterminism
            ));
        }
        self.await_protected(tidy).map(drop)
    }

    /// Does the harm, and returns the moment.
    fn strike(&mut self, options: &DemoOptions, story: &Story) -> Result<Instant> {
        let moment = if options.cut {
            let moment = Instant::now();
            self.lab().cut_replication()?;
            moment
        } else {
            self.role(victim(options))?.kill()?
        };
        story.tell_of(moment, &format!("the {}", blow(options)));
        Ok(moment)
    }

    /// Begins to watch, from outside, when a survivor notices.
    fn watch(&mut self, options: &DemoOptions, strike: Instant) -> Result<Noticed> {
        let watched = if options.cut { Host::A } else { victim(options).other() };
        let control = self.role(watched)?.control().to_owned();
        Noticed::watch(&control, strike)
    }

    /// Waits until one side says that it runs alone, and returns its host.
    fn survivor(&mut self, options: &DemoOptions, tidy: &Tidy) -> Result<Host> {
        let hosts = if options.cut {
            vec![Host::A, Host::B]
        } else {
            vec![victim(options).other()]
        };
        tidy.wait("a survivor that runs alone", TAKEOVER_LIMIT, || {
            for host in &hosts {
                // One that lost the contest may have ended.
                let status = if options.cut {
                    self.role(*host)?.status().ok().flatten()
                } else {
                    self.role(*host)?.status()?
                };
                if status.is_some_and(|status| status.state == State::Alone) {
                    return Ok(Some(*host));
                }
            }
            Ok(None)
        })
    }

    /// Looks for every acknowledged increment: in the survivor, and in a new VM booted from its image.
    fn audit(
        &mut self,
        survivor: Host,
        story: &Story,
        tidy: &Tidy,
        counters: &[Counter],
        round: &mut Round,
    ) -> Result<()> {
        self.count_stored(counters, round)?;
        let ended = self.take(survivor)?.end(tidy)?;
        if !ended.success() {
            bail!("the survivor was asked to end, and ended with {ended}");
        }
        // The other one is dead, or stopped for good.
        self.clear();
        self.start_alone(survivor)?;
        self.await_guest(tidy)?;
        self.count_stored(counters, round)?;
        story.tell(&format!(
            "a new VM booted from the survivor's image has {} of {} increments",
            round.writes.saturating_sub(round.lost_writes),
            round.writes
        ));
        self.take(survivor)?.end(tidy).map(drop)
    }

    fn count_stored(&self, counters: &[Counter], round: &mut Round) -> Result<()> {
        let mut lost = 0;
        for counter in counters {
            let key = counter.key.clone();
            let address = Target::bundled().store_address();
            let stored = self
                .lab()
                .client()
                .run(move || stored_count(address, &key, AUDIT_LIMIT));
            let stored = stored.with_context(|| format!("can't read {} back", counter.key))?;
            lost += counter.acknowledged.saturating_sub(stored);
            // More than was ever asked for: something was done twice.
            round.wrong_answers += stored.saturating_sub(counter.requested);
        }
        round.lost_writes = round.lost_writes.max(lost);
        Ok(())
    }
}

/// A thread that finds out when a role leaves `protected`.
struct Noticed(JoinHandle<Option<Instant>>);

impl Noticed {
    fn watch(control: &Path, strike: Instant) -> Result<Self> {
        let control = control.to_owned();
        let watcher = std::thread::Builder::new().name("watch".into());
        let thread = watcher.spawn(move || {
            let deadline = Instant::now() + TAKEOVER_LIMIT;
            while Instant::now() < deadline {
                let status = ask_status(&control);
                let now = Instant::now();
                match status {
                    Ok(status) if !status.state.is_protected() => {
                        // It may have been so for a while, and its word comes late when it is busy.
                        let since = now.checked_sub(Duration::from_millis(status.since_ms));
                        return Some(since.filter(|since| *since > strike).unwrap_or(now));
                    }
                    Ok(_) | Err(_) => std::thread::sleep(WATCH_PERIOD),
                }
            }
            None
        });
        Ok(Self(thread.context("can't watch the survivor")?))
    }

    fn join(self) -> Option<Instant> {
        self.0.join().ok().flatten()
    }
}

fn count(round: &mut Round, report: &ClientReport, strike: Instant, answer: Instant) {
    round.requests = report.tcp.requests;
    round.failed_requests = report.tcp.failed;
    round.wrong_answers = report.tcp.wrong + report.udp.wrong;
    round.broken_connections = report.tcp.broken;
    round.writes = report.tcp.counters.iter().map(|counter| counter.acknowledged).sum();
    round.udp_requests = report.udp.sent();
    round.udp_lost = report.udp.lost();
    round.udp_lost_elsewhere = report
        .udp
        .lost_outside(strike.checked_sub(UDP_IN_FLIGHT).unwrap_or(strike), answer);
    round.longest_tcp_gap_ms = report.tcp.longest_gap.as_ref().map_or(0.0, |gap| ms(gap.length()));
    round.pings = report.ping.sent;
    round.pings_answered = report.ping.answered;
}

fn gap_told(gap: &Gap, strike: Instant) -> String {
    let place = if gap.until < strike {
        format!("ended {:.0} ms before the blow", ms(strike - gap.until))
    } else if gap.from < strike {
        "over the blow".to_owned()
    } else {
        format!("began {:.0} ms after the blow", ms(gap.from - strike))
    };
    format!("{:.1} ms, {}, {place}", ms(gap.length()), gap.client)
}

fn victim(options: &DemoOptions) -> Host {
    match options.kill {
        Victim::Primary => Host::A,
        Victim::Secondary => Host::B,
    }
}

fn blow(options: &DemoOptions) -> &'static str {
    match (options.cut, options.kill) {
        (true, _) => "link between the hosts is cut",
        (false, Victim::Primary) => "primary is killed (SIGKILL)",
        (false, Victim::Secondary) => "secondary is killed (SIGKILL)",
    }
}

fn ms(span: Duration) -> f64 {
    span.as_secs_f64() * 1e3
}
