//! The program under test: found beside this test's own executable, and built first so that it is never an old one.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Returns the path of the `tandem` program, built in the profile of this test.
pub(crate) fn path() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(build)
}

/// Cargo builds a package's program before that package's own tests only, and these tests are another package's.
fn build() -> PathBuf {
    let test = env::current_exe().expect("this test has an executable");
    // <target>/<profile>/deps/pair-<hash>
    let folder = test
        .ancestors()
        .nth(2)
        .expect("the executable lies in the target folder");
    let target = folder.parent().expect("a profile's folder lies in the target folder");
    let profile = match folder.file_name().and_then(|name| name.to_str()) {
        Some("debug") | None => "dev",
        Some(profile) => profile,
    };
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml");
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // The whole workspace chooses the features, as it did for this test: what is built already is used again.
    cargo.args([
        "build",
        "--quiet",
        "--workspace",
        "--bin",
        "tandem",
        "--profile",
        profile,
    ]);
    cargo
        .arg("--manifest-path")
        .arg(manifest)
        .arg("--target-dir")
        .arg(target);
    let built = cargo.status().expect("cargo can be started");
    assert!(built.success(), "the program could not be built: {cargo:?}");
    folder.join("tandem")
}

/// A program that could misbehave on purpose keeps the symbols of what switches that on.
#[test]
fn the_program_has_no_deliberate_bugs() {
    let program = std::fs::read(path()).expect("the program is there");
    let symbol = ["7mutants", "6active"].concat();
    let found = program.windows(symbol.len()).any(|bytes| bytes == symbol.as_bytes());
    assert!(!found, "the program was built with the feature `mutants`");
}
