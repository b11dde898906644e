//! The numbers of the demo: each round's, and all in all. Its JSON is an interface; scripts read it.

use serde::Serialize;

use super::{DemoOptions, Victim};

/// The whole report.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// Nothing was lost, wrong or broken.
    pub(super) passed: bool,
    seed: u64,
    memory_mib: u64,
    touched_mib: u64,
    /// `primary`, `secondary`, or `link` if that was cut.
    killed: &'static str,
    rounds: Vec<Round>,
    totals: Totals,
}

/// One round. All times are in milliseconds.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Round {
    /// From the start of both processes to `protected`.
    pub(super) protected_ms: f64,
    /// Checkpoint epochs until the kill.
    pub(super) epochs: u64,
    /// Outputs of the two VMs that differed until the kill.
    pub(super) divergences: u64,
    /// Whether a checkpoint was under way at the kill, as far as the status told.
    pub(super) mid_checkpoint: bool,
    /// TCP requests answered.
    pub(super) requests: u64,
    /// TCP requests cut off, or not answered within 10 s.
    pub(super) failed_requests: u64,
    /// Answers with a wrong byte, increments by more or less than one.
    pub(super) wrong_answers: u64,
    /// Increments acknowledged.
    pub(super) writes: u64,
    /// Increments acknowledged and not found afterwards, in the survivor or in a VM booted from its image.
    pub(super) lost_writes: u64,
    /// TCP connections that did not outlive the kill.
    pub(super) broken_connections: u64,
    /// From the kill until the survivor noticed.
    pub(super) detection_ms: Option<f64>,
    /// From the kill to the first answer to a UDP request sent after it.
    pub(super) takeover_ms: Option<f64>,
    /// UDP requests, sent every 2 ms.
    pub(super) udp_requests: u64,
    /// Those never answered.
    pub(super) udp_lost: u64,
    /// Those of them that were sent well before the kill, or after the first answer that followed it.
    pub(super) udp_lost_elsewhere: u64,
    /// Longest time from one answer to the next on one TCP connection.
    pub(super) longest_tcp_gap_ms: f64,
    /// Pings, and those answered at once.
    pub(super) pings: u64,
    /// See `pings`.
    pub(super) pings_answered: u64,
}

/// All rounds: sums, except for what is named otherwise.
#[derive(Clone, Debug, Default, Serialize)]
struct Totals {
    /// Median.
    protected_ms: Option<f64>,
    epochs: u64,
    divergences: u64,
    requests: u64,
    failed_requests: u64,
    wrong_answers: u64,
    writes: u64,
    lost_writes: u64,
    broken_connections: u64,
    /// Median.
    detection_ms: Option<f64>,
    /// Median.
    takeover_ms: Option<f64>,
    takeover_ms_p99: Option<f64>,
    takeover_ms_max: Option<f64>,
    udp_lost: u64,
    udp_lost_elsewhere: u64,
    /// Longest of all.
    longest_tcp_gap_ms: f64,
}

impl Report {
    pub(super) fn new(options: &DemoOptions, seed: u64) -> Self {
        let killed = match (options.cut, options.kill) {
            (true, _) => "link",
            (false, Victim::Primary) => "primary",
            (false, Victim::Secondary) => "secondary",
        };
        Self {
            passed: false,
            seed,
            memory_mib: options.memory.0 >> 20,
            touched_mib: options.touch_mib(),
            killed,
            rounds: Vec::new(),
            totals: Totals::default(),
        }
    }

    pub(super) fn add(&mut self, round: Round) {
        self.rounds.push(round);
    }

    /// Sums up the rounds and gives the verdict.
    pub(super) fn finish(&mut self) {
        self.totals = Totals::of(&self.rounds);
        self.passed = !self.rounds.is_empty() && self.rounds.iter().all(Round::passed);
    }

    pub(super) fn summary(&self) -> Vec<String> {
        let totals = &self.totals;
        let time = |ms: Option<f64>| ms.map_or_else(|| "none".to_owned(), |ms| format!("{ms:.1} ms"));
        let mut lines = vec![
            String::new(),
            format!(
                "{} requests, {} of them increments; {} epochs, {} divergences",
                totals.requests, totals.writes, totals.epochs, totals.divergences
            ),
            format!(
                "failed requests {}, wrong answers {}, lost writes {}, broken connections {}",
                totals.failed_requests, totals.wrong_answers, totals.lost_writes, totals.broken_connections
            ),
        ];
        if self.rounds.len() > 1 {
            lines.push(format!(
                "from kill to answer: median {}, p99 {}; noticed after {} (median); longest TCP gap {:.1} ms",
                time(totals.takeover_ms),
                time(totals.takeover_ms_p99),
                time(totals.detection_ms),
                totals.longest_tcp_gap_ms
            ));
        } else {
            lines.push(format!(
                "from kill to answer: {}; noticed after {}; longest TCP gap {:.1} ms",
                time(totals.takeover_ms),
                time(totals.detection_ms),
                totals.longest_tcp_gap_ms
            ));
        }
        let verdict = if self.passed {
            "Nothing was lost."
        } else {
            "SOMETHING WAS LOST: see the numbers above."
        };
        lines.push(verdict.to_owned());
        lines
    }
}

impl Round {
    pub(super) fn passed(&self) -> bool {
        let faults = [
            self.failed_requests,
            self.wrong_answers,
            self.lost_writes,
            self.broken_connections,
            self.udp_lost_elsewhere,
        ];
        self.takeover_ms.is_some() && faults.iter().all(|count| *count == 0)
    }
}

impl Totals {
    fn of(rounds: &[Round]) -> Self {
        let sum = |count: fn(&Round) -> u64| rounds.iter().map(count).sum();
        let takeovers = sorted(rounds.iter().filter_map(|round| round.takeover_ms));
        Self {
            protected_ms: percentile(&sorted(rounds.iter().map(|round| round.protected_ms)), 50),
            epochs: sum(|round| round.epochs),
            divergences: sum(|round| round.divergences),
            requests: sum(|round| round.requests),
            failed_requests: sum(|round| round.failed_requests),
            wrong_answers: sum(|round| round.wrong_answers),
            writes: sum(|round| round.writes),
            lost_writes: sum(|round| round.lost_writes),
            broken_connections: sum(|round| round.broken_connections),
            detection_ms: percentile(&sorted(rounds.iter().filter_map(|round| round.detection_ms)), 50),
            takeover_ms: percentile(&takeovers, 50),
            takeover_ms_p99: percentile(&takeovers, 99),
            takeover_ms_max: percentile(&takeovers, 100),
            udp_lost: sum(|round| round.udp_lost),
            udp_lost_elsewhere: sum(|round| round.udp_lost_elsewhere),
            longest_tcp_gap_ms: rounds.iter().map(|round| round.longest_tcp_gap_ms).fold(0.0, f64::max),
        }
    }
}

fn sorted(numbers: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut numbers: Vec<_> = numbers.collect();
    numbers.sort_by(f64::total_cmp);
    numbers
}

/// The smallest number that at least `percent` of all do not exceed.
fn percentile(sorted: &[f64], percent: usize) -> Option<f64> {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: DemoOptions,
    }

    fn report(rounds: impl IntoIterator<Item = Round>) -> Report {
        let mut report = Report::new(&Line::parse_from(["demo"]).options, 7);
        rounds.into_iter().for_each(|round| report.add(round));
        report.finish();
        report
    }

    fn good(takeover_ms: f64) -> Round {
        Round {
            takeover_ms: Some(takeover_ms),
            requests: 10,
            longest_tcp_gap_ms: takeover_ms * 2.0,
            ..Round::default()
        }
    }

    #[test]
    fn the_json_has_the_agreed_names_in_each_round_and_in_the_totals() {
        let json = serde_json::to_value(report([good(5.0), good(7.0), good(6.0)])).unwrap();
        for part in [&json["rounds"][0], &json["totals"]] {
            for name in [
                "protected_ms",
                "epochs",
                "divergences",
                "requests",
                "failed_requests",
                "wrong_answers",
                "lost_writes",
                "broken_connections",
                "detection_ms",
                "takeover_ms",
                "udp_lost",
                "longest_tcp_gap_ms",
            ] {
                assert!(part.get(name).is_some(), "{name} is missing in {part}");
            }
        }
        assert_eq!(json["totals"]["takeover_ms"], 6.0);
        assert_eq!(json["totals"]["takeover_ms_p99"], 7.0);
        assert_eq!(json["totals"]["requests"], 30);
        assert_eq!(json["totals"]["longest_tcp_gap_ms"], 14.0);
        assert_eq!(json["passed"], true);
        assert_eq!(json["seed"], 7);
    }

    #[test]
    fn anything_lost_in_any_round_fails_the_whole() {
        let faults: [fn(&mut Round); 6] = [
            |round| round.failed_requests = 1,
            |round| round.wrong_answers = 1,
            |round| round.lost_writes = 1,
            |round| round.broken_connections = 1,
            |round| round.udp_lost_elsewhere = 1,
            |round| round.takeover_ms = None,
        ];
        for fault in faults {
            let mut bad = good(5.0);
            fault(&mut bad);
            let report = report([good(5.0), bad]);
            assert!(!report.passed);
            assert!(report.summary().concat().contains("LOST"));
        }
        let lost_in_between = Round {
            udp_lost: 9,
            ..good(5.0)
        };
        assert!(report([lost_in_between]).passed, "UDP may be lost while nobody answers");
        assert!(!report([]).passed);
    }

    #[test]
    fn percentiles_are_members_of_the_list() {
        let list = [1.0, 2.0, 3.0, 4.0];
        assert_eq!(percentile(&list, 50), Some(2.0));
        assert_eq!(percentile(&list, 99), Some(4.0));
        assert_eq!(percentile(&list, 0), Some(1.0));
        assert_eq!(percentile(&[], 50), None);
    }
}
