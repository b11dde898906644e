//! The benchmarks, run as a user would: that they come to their end, clean up, and that what they print can be true.
//!
//! Nothing here judges how fast anything was.

use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tandem::lab::Lab;

use crate::program;

/// Runs a benchmark for its short length and returns its report; nothing without KVM or root.
fn report(name: &str, plots: &[&str]) -> Option<Value> {
    let lacks = machine::host_check().err().map(|lack| lack.to_string());
    if let Some(lack) = lacks.or_else(|| Lab::new().err().map(|lack| lack.to_string())) {
        return crate::stage::skip(&lack);
    }
    let folder = tempfile::tempdir().expect("a folder can be made");
    let figures = folder.path().join("figures");
    let mut command = Command::new(program::path());
    command
        .args(["bench", name, "--quick", "--json", "--plot"])
        .arg(&figures);
    command.arg("--folder").arg(folder.path()).stdin(Stdio::null());
    let _turn = crate::stage::turn();
    let Output { status, stdout, stderr } = command.output().expect("the program starts");
    let story = String::from_utf8_lossy(&stderr);
    assert!(status.success(), "{status}\n{story}");
    for plot in plots {
        let text = std::fs::read_to_string(figures.join(plot)).expect("a figure");
        assert!(text.len() > 100, "{plot}: {text}");
    }
    let left: Vec<_> = std::fs::read_dir(folder.path())
        .expect("the folder is there")
        .map(|entry| entry.expect("an entry").file_name())
        .collect();
    assert_eq!(left, ["figures"], "nothing else is left");
    let report: Value = serde_json::from_slice(&stdout).expect("one JSON object");
    assert_eq!(report["benchmark"], name);
    for target in report["targets"].as_array().expect("targets") {
        let (bound, measured) = (number(&target["target"]), number(&target["measured"]));
        let met = if target["at_most"] == true {
            measured <= bound
        } else {
            measured >= bound
        };
        assert_eq!(target["met"], met, "{target}");
    }
    println!(
        "{}",
        serde_json::to_string_pretty(&report["targets"]).expect("it is JSON")
    );
    Some(report)
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

#[test]
fn bench_checkpoint_tells_what_can_be_true() {
    let Some(report) = report(
        "checkpoint",
        &["checkpoint.csv", "checkpoint-sparse.svg", "checkpoint-bytes.svg"],
    ) else {
        return;
    };
    let cases = report["cases"].as_array().expect("cases");
    assert!(cases.len() >= 8, "{}", cases.len());
    for case in cases {
        let [pages, dirty, floor_pages] = ["pages", "dirty_pages", "floor_pages"].map(|name| number(&case[name]));
        assert!(floor_pages >= pages && dirty < pages + 2_000.0, "{case}");
        for spread in ["pause_us", "floor_us", "commit_us", "encode_us"] {
            let (median, high) = (number(&case[spread]["p50"]), number(&case[spread]["p99"]));
            assert!(0.0 < median && median <= high && high < 60e6, "{case}");
        }
        assert!(
            number(&case["commit_us"]["p50"]) >= number(&case["pause_us"]["p50"]) / 2.0,
            "{case}"
        );
        let parts = case["parts"].as_object().expect("parts");
        assert!(
            parts.values().all(|part| number(part) >= 0.0) && number(&parts["save_us"]) > 0.0,
            "{case}"
        );
        let codecs = case["codecs"].as_array().expect("codecs");
        let sum = |name: &str| codecs.iter().map(|codec| number(&codec[name])).sum::<f64>();
        assert!(
            sum("pages") > 0.0 && number(&case["bytes_per_page"]) < 4_200.0,
            "{case}"
        );
        assert!(number(&case["cpu_s_per_gib"]) > 0.0, "{case}");
    }
    let buffered = report["buffered"].as_array().expect("spans");
    assert_eq!(buffered.len(), 3);
    for one in buffered {
        for name in ["checkpoints_per_s", "requests_per_s"] {
            assert!(number(&one[name]) > 0.0, "{one}");
        }
    }
    let memory = &report["secondary_memory"];
    let touched = number(&memory["touched_mib"]);
    for role in ["secondary", "primary", "unprotected"] {
        let held = number(&memory[role]["held"]) / 1024.0 / 1024.0;
        assert!(held >= touched && held < 3.0 * touched, "{memory}");
    }
}

#[test]
fn what_a_benchmark_needs_is_told_before_it_begins() {
    let run = |arguments: &[&str]| {
        let mut command = Command::new(program::path());
        let output = command.args(["bench", "checkpoint"]).args(arguments).output();
        let output = output.expect("the program starts");
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    if machine::host_check().is_ok() {
        let told = run(&["--folder", "/nowhere/at/all"]);
        assert!(
            told.contains("can't make a folder in /nowhere/at/all: check that it is writable"),
            "{told}"
        );
        let told = run(&["--plot", "/proc/none"]);
        assert!(told.contains("check --plot"), "{told}");
    }
}

#[test]
fn bench_protect_tells_what_can_be_true() {
    let Some(report) = report("protect", &["protect.csv", "protect.svg"]) else {
        return;
    };
    let scenarios = report["scenarios"].as_array().expect("scenarios");
    assert!(scenarios.len() >= 8, "{}", scenarios.len());
    for scenario in scenarios {
        let modes = scenario["modes"].as_array().expect("modes");
        assert_eq!(
            (&modes[0]["mode"], &modes[1]["mode"]),
            (&"lockstep".into(), &"buffered".into())
        );
        for figures in [&scenario["two"], &scenario["bare"]].into_iter().chain(modes) {
            assert!(number(&figures["rate"]) > 0.0, "{scenario}");
            assert!((0.0..=1.1).contains(&number(&figures["load_busy"])), "{scenario}");
            let threads = figures["threads_percent"].as_object().expect("threads");
            assert!(threads.contains_key("vcpu"), "{scenario}");
            if scenario["unit"] == "requests/s" {
                let [p50, p99, p999] = ["p50", "p99", "p999"].map(|name| number(&figures["latency_us"][name]));
                assert!(0.0 < p50 && p50 <= p99 && p99 <= p999, "{scenario}");
            }
        }
        for mode in modes {
            assert!(
                number(&mode["to_two"]) > 0.0 && number(&mode["to_bare"]) > 0.0,
                "{scenario}"
            );
        }
    }
    assert!(report["file_system"].is_string());
}
