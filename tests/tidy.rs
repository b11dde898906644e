//! What the documents promise about the source, checked against the source.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

const CRATES: [&str; 10] = [
    "checkpoint",
    "guest",
    "link",
    "machine",
    "primary",
    "proxy",
    "secondary",
    "storage",
    "tandem",
    "tests",
];
/// What each crate may use of the others; `docs/ARCHITECTURE.md` draws it. `tests` may use everything.
const MAY_USE: [(&str, &[&str]); 9] = [
    ("checkpoint", &[]),
    ("guest", &[]),
    ("link", &["checkpoint", "machine", "storage"]),
    ("machine", &["guest"]),
    ("primary", &["checkpoint", "link", "machine", "proxy", "storage"]),
    ("proxy", &["checkpoint"]),
    ("secondary", &["checkpoint", "link", "machine", "proxy", "storage"]),
    ("storage", &["checkpoint"]),
    (
        "tandem",
        &[
            "checkpoint",
            "guest",
            "link",
            "machine",
            "primary",
            "proxy",
            "secondary",
            "storage",
        ],
    ),
];
const MAY_BE_UNSAFE: [&str; 2] = ["guest", "machine"];
const FILE_LINES_MAX: usize = 700;
/// Words that no file may leave behind, in halves so that this file does not either.
const LEFTOVERS: [(&str, &str); 4] = [("TO", "DO"), ("FIX", "ME"), ("XX", "X"), ("#[ign", "ore")];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Every Rust file of a crate.
fn sources(krate: &str) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(krate)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("the folder can be listed") {
            let path = entry.expect("the folder can be listed").path();
            let is = |name: &str| path.file_name().is_some_and(|last| last == name);
            if path.is_dir() && !is("target") {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = read(&path);
                found.push((path, text));
            }
        }
    }
    found.sort();
    found
}

/// Collects what is wrong, so that one run shows all of it.
fn none(complaints: &[String]) {
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

/// Code without comments and texts in quotes; good enough to look for a word.
fn code(text: &str) -> String {
    text.lines()
        .map(|line| line.split("//").next().unwrap_or_default())
        .filter(|line| !line.contains("reason = "))
        .collect::<Vec<_>>()
        .join("\n")
}

fn has_word(text: &str, word: &str) -> bool {
    text.split(|c: char| !c.is_alphanumeric() && c != '_')
        .any(|other| other == word)
}

#[test]
fn crates_depend_on_each_other_only_as_drawn() {
    let allowed: BTreeMap<_, _> = MAY_USE.into_iter().collect();
    let mut complaints = Vec::new();
    for krate in CRATES.iter().filter(|krate| **krate != "tests") {
        let manifest = read(&root().join(krate).join("Cargo.toml"));
        let mut section = "";
        let mut uses = BTreeSet::new();
        for line in manifest.lines() {
            if line.starts_with('[') {
                section = line;
            } else if section.contains("dependencies") && !section.contains("dev-") {
                uses.extend(CRATES.iter().filter(|other| {
                    line.strip_prefix(**other)
                        .is_some_and(|rest| rest.starts_with([' ', '.', '=']))
                }));
            }
        }
        let may = allowed[krate];
        for other in uses.iter().filter(|other| !may.contains(*other)) {
            complaints.push(format!("{krate} uses {other}"));
        }
    }
    none(&complaints);
}

#[test]
fn unsafe_code_is_in_machine_and_guest_only() {
    let mut complaints = Vec::new();
    for krate in CRATES {
        if MAY_BE_UNSAFE.contains(&krate) {
            continue;
        }
        for (path, text) in sources(krate) {
            if has_word(&code(&text), "unsafe") && !path.ends_with("tidy.rs") {
                complaints.push(format!("{} has unsafe code", path.display()));
            }
        }
        let lib = if krate == "tests" {
            "harness/lib.rs"
        } else {
            "src/lib.rs"
        };
        if !read(&root().join(krate).join(lib)).contains("#![forbid(unsafe_code)]") {
            complaints.push(format!("{krate} does not forbid unsafe code"));
        }
    }
    none(&complaints);
}

#[test]
fn the_protocols_do_no_input_or_output() {
    let mut complaints = Vec::new();
    for krate in ["primary", "secondary"] {
        let folder = root().join(krate).join("src/protocol");
        let files: Vec<_> = sources(krate)
            .into_iter()
            .filter(|(path, _)| path.starts_with(&folder))
            .collect();
        assert!(!files.is_empty(), "{krate} has no protocol");
        for (path, text) in files {
            for module in [
                "std::net",
                "std::fs",
                "std::thread",
                "std::time",
                "std::sync",
                "tokio",
                "link::",
                "machine::",
            ] {
                if code(&text).contains(module) {
                    complaints.push(format!("{} uses {module}", path.display()));
                }
            }
        }
    }
    none(&complaints);
}

/// `tandem` does not compile with deliberate bugs; this finds what would try.
#[test]
fn no_manifest_but_that_of_the_tests_enables_mutants() {
    let allowed = |krate: &str| match krate {
        "checkpoint" => &["mutants = []"][..],
        "tests" => &[
            r#"mutants = ["checkpoint/mutants"]"#,
            r#"name = "mutants""#,
            r#"path = "mutants.rs""#,
            r#"required-features = ["mutants"]"#,
        ],
        _ => &[],
    };
    let mut complaints = Vec::new();
    for krate in CRATES.into_iter().chain(["."]) {
        for line in read(&root().join(krate).join("Cargo.toml")).lines() {
            let says = line.split('#').next().unwrap_or_default().trim();
            if says.contains("mutants") && !allowed(krate).contains(&says) {
                complaints.push(format!("the manifest of {krate} says {says}"));
            }
        }
    }
    none(&complaints);
}

#[test]
fn files_say_what_they_are_and_stay_short() {
    let mut complaints = Vec::new();
    for krate in CRATES {
        for (path, text) in sources(krate) {
            if !text.starts_with("//!") {
                complaints.push(format!("{} does not begin with what it is", path.display()));
            }
            let lines = text.lines().count();
            if lines > FILE_LINES_MAX {
                complaints.push(format!("{} has {lines} lines", path.display()));
            }
            for (half, rest) in LEFTOVERS {
                if text.contains(&format!("{half}{rest}")) {
                    complaints.push(format!("{} has a {half}{rest}", path.display()));
                }
            }
        }
    }
    none(&complaints);
}
