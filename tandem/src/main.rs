//! The tandem program: reads the command line, does it, and tells how it ended.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    tandem::cli::main()
}
