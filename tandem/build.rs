//! Builds the bundled guest, which `src/bundle.rs` embeds.
//!
//! The guest is another package of this workspace, for a machine without an operating system. It is
//! built by a cargo of its own, with a target folder of its own below OUT_DIR, so that neither waits for
//! the other's locks. What the outer cargo or clippy set for this package would mislead that one, so it
//! does not see it.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, exit};

/// Variables by which the outer build would leak into the guest's, by their beginnings. The rest of
/// cargo's settings (home, registries, proxies, offline) applies to both.
const LEAKS: [&str; 19] = [
    "CARGO_BUILD_",
    "CARGO_CFG_",
    "CARGO_CRATE_",
    "CARGO_ENCODED_",
    "CARGO_FEATURE_",
    "CARGO_INCREMENTAL",
    "CARGO_LLVM_COV",
    "CARGO_MANIFEST_",
    "CARGO_PKG_",
    "CARGO_PRIMARY_",
    "CARGO_PROFILE_",
    "CARGO_TARGET_",
    "CLIPPY_",
    "DEP_",
    "LLVM_PROFILE_FILE",
    "RUSTC_",
    "RUSTDOC",
    "RUSTFLAGS",
    "__CARGO_",
];
/// Single variables that a build script gets and that mean something to another build.
const LEAKING_NAMES: [&str; 8] = [
    "DEBUG",
    "HOST",
    "NUM_JOBS",
    "OPT_LEVEL",
    "OUT_DIR",
    "PROFILE",
    "TARGET",
    "CARGO_UNSTABLE",
];

fn main() {
    let package = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    let workspace = package.parent().unwrap_or(&package).to_owned();
    let target = Path::new(&variable("OUT_DIR")).join("guest-target");
    for input in [
        "guest/src",
        "guest/build.rs",
        "guest/link.ld",
        "guest/Cargo.toml",
        "Cargo.toml",
        "Cargo.lock",
    ] {
        println!("cargo::rerun-if-changed={}", workspace.join(input).display());
    }
    println!("cargo::rerun-if-changed=build.rs");

    // First with what is there already, which is nearly always enough: the outer cargo may be offline.
    let mut output = build(&workspace, &target, true);
    if !output.status.success() && wants_network(&output) && env::var("CARGO_NET_OFFLINE").as_deref() != Ok("true") {
        output = build(&workspace, &target, false);
    }
    if !output.status.success() {
        let told = String::from_utf8_lossy(&output.stderr);
        println!(
            "cargo::error=the bundled guest could not be built: `cargo build -p guest --features bare --profile guest` tells why"
        );
        eprintln!("{told}");
        exit(1);
    }
    let image = target.join("guest").join("guest");
    println!("cargo::rustc-env=TANDEM_GUEST_IMAGE={}", image.display());
}

fn build(workspace: &Path, target: &Path, offline: bool) -> Output {
    let mut command = Command::new(variable("CARGO"));
    command.current_dir(workspace);
    command.args([
        "build",
        "--package",
        "guest",
        "--bin",
        "guest",
        "--features",
        "bare",
        "--profile",
        "guest",
    ]);
    command
        .args(["--locked", "--color", "never", "--target-dir"])
        .arg(target);
    if offline {
        command.arg("--offline");
    }
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        if LEAKING_NAMES.contains(&text.as_ref()) || LEAKS.iter().any(|leak| text.starts_with(leak)) {
            command.env_remove(&name);
        }
    }
    // Set and empty: flags from a configuration file are not for the guest either.
    command.env("CARGO_ENCODED_RUSTFLAGS", "");
    match command.output() {
        Ok(output) => output,
        Err(error) => {
            println!("cargo::error=can't run cargo for the bundled guest: {error}");
            exit(1);
        }
    }
}

/// Whether cargo failed only since it may not download what is missing.
fn wants_network(output: &Output) -> bool {
    String::from_utf8_lossy(&output.stderr).contains("--offline")
}

fn variable(name: &str) -> String {
    match env::var(name) {
        Ok(value) => value,
        Err(error) => {
            println!("cargo::error={name}: {error}; this program is run by cargo");
            exit(1);
        }
    }
}
