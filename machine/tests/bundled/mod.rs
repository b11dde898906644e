//! The bundled guest's image, for the tests and benchmarks that run it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Builds the guest once, and reads it.
pub(crate) fn guest_image() -> &'static [u8] {
    static IMAGE: OnceLock<Vec<u8>> = OnceLock::new();
    IMAGE.get_or_init(|| {
        let path = std::env::var_os("TANDEM_GUEST_ELF").map_or_else(build_guest, PathBuf::from);
        std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    })
}

fn build_guest() -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("guest");
    let status = Command::new(env!("CARGO"))
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args([
            "build",
            "--package",
            "guest",
            "--features",
            "bare",
            "--profile",
            "guest",
            "--target-dir",
        ])
        .arg(&target)
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("RUSTFLAGS")
        .status()
        .expect("cargo is there, it runs this test");
    assert!(status.success(), "the guest builds");
    target.join("guest/guest")
}
