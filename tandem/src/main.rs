//! The tandem program: reads the command line, does it, and tells how it ended.

#![forbid(unsafe_code)]

use std::process::ExitCode;

const _: () = assert!(
    !checkpoint::mutants::ENABLED,
    "a program with deliberate bugs must not exist: build without the feature `mutants`"
);

fn main() -> ExitCode {
    tandem::cli::main()
}
