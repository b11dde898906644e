//! The scenarios of `tests/scenarios/*.txt`, each run against the shipped protocols.
//!
//! `REWRITE=1 cargo test -p tests --test scenarios` writes what the protocols do into the files; read the difference
//! before committing it. `docs/TESTING.md` describes the language.

use std::path::PathBuf;

/// Each has a file whose name begins with it: the steps of the protocol, the takeover, and the failure cases of groups A
/// and B, 25 and 38.
const STORIES: [&str; 34] = [
    "handshake",
    "step_01",
    "step_02",
    "step_03",
    "step_04",
    "step_05",
    "step_06",
    "step_07",
    "step_08",
    "step_09",
    "step_10",
    "takeover",
    "case_a01",
    "case_a02",
    "case_a02b",
    "case_a03",
    "case_a04",
    "case_a05",
    "case_a06",
    "case_a07",
    "case_a08",
    "case_a09",
    "case_a10",
    "case_b11",
    "case_b12",
    "case_b13",
    "case_b14",
    "case_b15",
    "case_b16",
    "case_b17",
    "case_b18",
    "case_b19",
    "case_c25",
    "case_e38",
];
fn files() -> Vec<(String, PathBuf)> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("scenarios");
    let mut files: Vec<(String, PathBuf)> = std::fs::read_dir(folder)
        .expect("the folder can be listed")
        .map(|entry| entry.expect("the folder can be listed").path())
        .map(|path| {
            (
                path.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
                path,
            )
        })
        .collect();
    files.sort();
    files
}

#[test]
fn scenarios_end_as_expected() {
    let rewrite = std::env::var_os("REWRITE").is_some();
    let mut complaints = Vec::new();
    for (name, path) in files() {
        let text = std::fs::read_to_string(&path).expect("the file can be read");
        let found = std::panic::catch_unwind(|| harness::scenario::run(&text))
            .unwrap_or_else(|_| Err("it panicked, see above".to_owned()));
        let result = match found {
            Ok(found) if rewrite => std::fs::write(&path, found).map_err(|error| error.to_string()),
            Ok(found) => harness::scenario::compare(&text, &found),
            Err(error) => Err(error),
        };
        if let Err(error) = result {
            complaints.push(format!("{name}: {error}"));
        }
    }
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

#[test]
fn every_step_and_case_has_a_scenario_and_no_other_file_is_there() {
    let mut complaints = Vec::new();
    let tells = |name: &str, story: &str| {
        name.strip_prefix(story)
            .is_some_and(|rest| rest.starts_with('_') && rest.len() > 1)
    };
    for story in STORIES {
        if !files().iter().any(|(name, _)| tells(name, story)) {
            complaints.push(format!("{story} has no file"));
        }
    }
    for (name, path) in files() {
        if !STORIES.iter().any(|story| tells(&name, story)) || path.extension().is_none_or(|end| end != "txt") {
            complaints.push(format!("{} tells no step and no case", path.display()));
        }
    }
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}
