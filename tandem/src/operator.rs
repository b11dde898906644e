//! The commands that ask a running role: `status`, `flows`, `takeover`, `checkpoint`, `stop`. `capture` is in its own module.
//!
//! Each finds the role's control socket, asks, and prints the answer. The role decides.

use std::fmt::Display;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use link::control::{Command, ControlError, ask, ask_flows, ask_status};
use serde::Serialize;
use serde_json::Value;

use crate::args::{ControlOptions, FlowsOptions, StatusOptions, TakeoverOptions};
use crate::settings::CONTROL_FOLDER;

const WATCH_PERIOD: Duration = Duration::from_secs(1);
/// Moves the cursor to the top left and clears what is below.
const CLEAR: &str = "\x1b[H\x1b[J";

/// Why a role could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum OperatorError {
    /// Nothing to ask.
    #[error("no role runs on this host (no live socket in {}): start one, or name its socket with --control", .0.display())]
    NoRole(PathBuf),
    /// Not one role but several.
    #[error("several roles run on this host: choose one with --control: {}", list(.0))]
    SeveralRoles(Vec<PathBuf>),
    /// The folder can't be searched.
    #[error("can't search {} for control sockets: name the socket with --control, or run as root", path.display())]
    Search {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The role did not do it.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The answer can't be printed.
    #[error("can't print the answer")]
    Print(#[from] io::Error),
}

/// Prints a role's status, once or until interrupted.
///
/// # Errors
/// Fails if there is no role, or if it does not answer.
pub fn status(options: &StatusOptions) -> Result<(), OperatorError> {
    show(options, ask_status)
}

/// Prints what a primary knows of the VM's traffic, once or until interrupted.
///
/// # Errors
/// Fails if there is no role, if it is no primary, or if it does not answer.
pub fn flows(options: &FlowsOptions) -> Result<(), OperatorError> {
    show(&options.shown, |path| ask_flows(path, options.most))
}

fn show<T: Serialize + Display>(
    options: &StatusOptions,
    ask: impl Fn(&Path) -> Result<T, ControlError>,
) -> Result<(), OperatorError> {
    let path = find(&options.control)?;
    loop {
        print(&mut io::stdout().lock(), &ask(&path)?, options)?;
        if !options.watch {
            return Ok(());
        }
        sleep(WATCH_PERIOD);
    }
}

/// Makes the secondary go on without the primary.
///
/// # Errors
/// Fails if there is no role, or if it refuses.
pub fn takeover(options: &TakeoverOptions) -> Result<(), OperatorError> {
    order(
        &options.control,
        &Command::Takeover {
            old_primary_is_off: options.old_primary_is_off,
        },
    )
}

/// Has a checkpoint taken.
///
/// # Errors
/// Fails if there is no role, or if it refuses.
pub fn checkpoint(options: &ControlOptions) -> Result<(), OperatorError> {
    order(options, &Command::Checkpoint)
}

/// Ends a role in order.
///
/// # Errors
/// Fails if there is no role, or if it refuses.
pub fn stop(options: &ControlOptions) -> Result<(), OperatorError> {
    order(options, &Command::Stop)
}

fn order(options: &ControlOptions, command: &Command) -> Result<(), OperatorError> {
    let answer = ask(&find(options)?, command)?;
    let mut out = io::stdout().lock();
    match answer {
        Value::String(text) => writeln!(out, "{text}")?,
        other => writeln!(out, "{other}")?,
    }
    Ok(())
}

fn print<T: Serialize + Display>(out: &mut impl Write, report: &T, options: &StatusOptions) -> io::Result<()> {
    if options.json {
        serde_json::to_writer(&mut *out, report)?;
        writeln!(out)
    } else if options.watch {
        writeln!(out, "{CLEAR}{report}")
    } else {
        writeln!(out, "{report}")
    }
}

/// Finds the socket that is meant.
pub(crate) fn find(options: &ControlOptions) -> Result<PathBuf, OperatorError> {
    match &options.control {
        Some(path) => Ok(path.clone()),
        None => find_in(Path::new(CONTROL_FOLDER)),
    }
}

/// Finds the only socket behind which a role lives. One that a killed role left behind does not count.
fn find_in(folder: &Path) -> Result<PathBuf, OperatorError> {
    let search = |source| OperatorError::Search {
        path: folder.to_owned(),
        source,
    };
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(OperatorError::NoRole(folder.to_owned())),
        Err(error) => return Err(search(error)),
    };
    let mut live = Vec::new();
    for entry in entries {
        let path = entry.map_err(search)?.path();
        let socket = path.extension().is_some_and(|extension| extension == "sock");
        if socket && !matches!(ask_status(&path), Err(ControlError::NotRunning(_))) {
            live.push(path);
        }
    }
    live.sort();
    match live.len() {
        0 => Err(OperatorError::NoRole(folder.to_owned())),
        1 => Ok(live.remove(0)),
        _ => Err(OperatorError::SeveralRoles(live)),
    }
}

fn list(paths: &[PathBuf]) -> String {
    paths
        .iter()
        .map(|path| path.display().to_string())
        .collect::<Vec<_>>()
        .join(", ")
}

#[cfg(test)]
mod tests {
    use link::control::{Answer, Server};
    use tempfile::TempDir;
    use tokio::runtime::Runtime;

    use link::status::Status;

    use super::*;

    /// Serves a socket that tells its own name, until the runtime is dropped.
    fn serve(runtime: &Runtime, path: &Path) {
        let path = path.to_owned();
        let _guard = runtime.enter();
        let (server, mut requests) = Server::start(&path).unwrap();
        runtime.spawn(async move {
            let _server = server;
            while let Some(request) = requests.recv().await {
                let status = Status {
                    pair: "shop".into(),
                    ..Status::default()
                };
                let _ = request.reply.send(Ok(Answer::Status(Box::new(status))));
            }
        });
    }

    #[test]
    fn the_only_live_socket_is_found() {
        let folder = TempDir::new().unwrap();
        assert!(matches!(
            find_in(&folder.path().join("none")),
            Err(OperatorError::NoRole(_))
        ));
        assert!(matches!(find_in(folder.path()), Err(OperatorError::NoRole(_))));
        drop(std::os::unix::net::UnixListener::bind(folder.path().join("dead.sock")).unwrap());
        fs::write(folder.path().join("shop-a.lock"), "").unwrap();
        assert!(matches!(find_in(folder.path()), Err(OperatorError::NoRole(_))));

        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let (one, two) = (folder.path().join("one.sock"), folder.path().join("two.sock"));
        serve(&runtime, &one);
        assert_eq!(find_in(folder.path()).unwrap(), one);
        serve(&runtime, &two);
        let error = find_in(folder.path()).unwrap_err().to_string();
        assert!(error.contains("one.sock, ") && error.contains("two.sock"), "{error}");
    }

    #[test]
    fn status_is_printed_for_scripts_and_for_humans() {
        let status = Status {
            pair: "shop".into(),
            ..Status::default()
        };
        let mut json = Vec::new();
        let options = StatusOptions {
            json: true,
            ..StatusOptions::default()
        };
        print(&mut json, &status, &options).unwrap();
        assert_eq!(serde_json::from_slice::<Status>(&json).unwrap(), status);
        assert!(json.ends_with(b"}\n"));
        let mut text = Vec::new();
        print(&mut text, &status, &StatusOptions::default()).unwrap();
        assert!(String::from_utf8(text).unwrap().starts_with("pair "));
    }
}
