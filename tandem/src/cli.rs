//! The way from the command line to a command, and from its result to the exit code.

use std::error::Error;
use std::io::{self, IsTerminal};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;
use rustix::process::{Signal, getppid, set_parent_process_death_signal};
use tracing_subscriber::EnvFilter;

use crate::args::{Cli, Command};
use crate::bench;
use crate::capture;
use crate::demo;
use crate::operator;
use crate::role::{self, Ending};
use crate::settings::{CONTROL_FOLDER, RunSettings, Settings, SettingsError, VmSettings};

const FAILED: u8 = 1;
const MISUSED: u8 = 2;
const FENCED: u8 = 3;
const LOG_DEFAULT: &str = "info";

/// Does what the command line says. `args::Cli` documents the exit codes.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    // The sentinel must not have started any thread, nor read any setting.
    if matches!(cli.command, Command::Sentinel) {
        return link::sentinel::main_loop();
    }
    match die_with(cli.parent).and_then(|()| run(cli.command)) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprint!("{}", report(error.as_ref()));
            ExitCode::from(if error.is::<SettingsError>() { MISUSED } else { FAILED })
        }
    }
}

fn run(command: Command) -> Result<u8> {
    match command {
        Command::Primary(options) => {
            let settings = Settings::from_options(options)?;
            prepare(&settings.vm)?;
            Ok(ended(role::run_primary(settings)?))
        }
        Command::Secondary(options) => {
            let settings = Settings::from_options(options)?;
            prepare(&settings.vm)?;
            Ok(ended(role::run_secondary(settings)?))
        }
        Command::Run(options) => {
            let settings = RunSettings::from_options(options)?;
            prepare(&settings.vm)?;
            Ok(ended(role::run_alone(settings)?))
        }
        Command::Demo(options) => Ok(if demo::run(&options)? { 0 } else { FAILED }),
        Command::Bench(bench) => Ok(bench::run(&bench).map(|()| 0)?),
        Command::Status(options) => Ok(operator::status(&options).map(|()| 0)?),
        Command::Capture(options) => Ok(capture::capture(&options).map(|()| 0)?),
        Command::Flows(options) => Ok(operator::flows(&options).map(|()| 0)?),
        Command::Takeover(options) => Ok(operator::takeover(&options).map(|()| 0)?),
        Command::Checkpoint(options) => Ok(operator::checkpoint(&options).map(|()| 0)?),
        Command::Stop(options) => Ok(operator::stop(&options).map(|()| 0)?),
        Command::Sentinel => unreachable!("handled before"),
    }
}

fn ended(ending: Ending) -> u8 {
    match ending {
        Ending::Done => 0,
        Ending::Fenced(reason) => {
            eprintln!("fenced: {reason}");
            FENCED
        }
    }
}

/// Starts the log, and makes the folder of the control sockets if that is where the socket goes.
fn prepare(vm: &VmSettings) -> Result<()> {
    let level = vm.logging.log.as_deref().unwrap_or(LOG_DEFAULT);
    let filter = EnvFilter::try_new(level).map_err(|error| SettingsError::Value {
        option: "log",
        value: level.to_owned(),
        reason: error.to_string(),
    })?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal());
    if vm.logging.log_json {
        log.json().init()
    } else {
        log.init()
    }
    if vm.control.parent() == Some(Path::new(CONTROL_FOLDER)) {
        std::fs::create_dir_all(CONTROL_FOLDER)
            .with_context(|| format!("can't make {CONTROL_FOLDER}: run as root, or give another --control path"))?;
    }
    Ok(())
}

/// Ties this process's life to its parent's.
fn die_with(parent: Option<i32>) -> Result<()> {
    let Some(parent) = parent else { return Ok(()) };
    set_parent_process_death_signal(Some(Signal::KILL)).context("can't ask for the parent's death to be told")?;
    if getppid().map(|pid| pid.as_raw_nonzero().get()) != Some(parent) {
        bail!("the parent process {parent} is gone already");
    }
    Ok(())
}

/// Writes an error and its causes, one a line. A cause that its effect already tells is left out.
fn report(error: &(dyn Error + 'static)) -> String {
    let mut told = error.to_string();
    let mut text = format!("error: {told}\n");
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !told.contains(&next) {
            text.push_str(&format!("  cause: {}\n", next.trim_end().replace('\n', "\n         ")));
        }
        told = next;
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    #[test]
    fn an_error_is_told_with_its_causes_and_nothing_twice() {
        let error = anyhow!("no such file")
            .context("can't read x: no such file")
            .context("can't start");
        let text = report(error.as_ref());
        assert_eq!(text, "error: can't start\n  cause: can't read x: no such file\n");
    }

    #[test]
    fn a_parent_that_is_not_ours_is_noticed() {
        let refused = die_with(Some(i32::MAX)).unwrap_err();
        assert!(refused.to_string().contains("gone already"), "{refused}");
        set_parent_process_death_signal(None).unwrap();
    }
}
