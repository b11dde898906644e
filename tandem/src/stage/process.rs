//! A role as a real process on a host of the lab: started, asked, killed, ended in order.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use link::control::ask_status;
use link::status::Status;
use rustix::process::{Pid, Signal, kill_process};

use super::tidy::Tidy;
use crate::lab::{Host, Lab};

const END_LIMIT: Duration = Duration::from_secs(10);
const LOG_LINES_SHOWN: usize = 15;

/// One running role. Dropping it kills it.
#[derive(Debug)]
pub(crate) struct Process {
    name: String,
    child: Child,
    control: PathBuf,
    log: PathBuf,
}

impl Process {
    /// Starts this program with `arguments` on a host. Its log goes to a file in `folder`.
    pub(crate) fn start(lab: &Lab, host: Host, name: &str, folder: &Path, arguments: &[String]) -> Result<Self> {
        let control = folder.join(format!("{name}.sock"));
        let log = folder.join(format!("{name}.log"));
        let mut command = Command::new("/proc/self/exe");
        command.args(arguments).arg("--control").arg(&control);
        command.args(["--parent", &std::process::id().to_string()]);
        // The real name is seen by `ps`, and the guest's console, on standard output, belongs to the log.
        let out = File::create(&log).with_context(|| format!("can't write {}", log.display()))?;
        let err = out.try_clone().context("can't write the log")?;
        command.stdin(Stdio::null()).stdout(out).stderr(err);
        let child = lab
            .spawn_in(host, command)
            .with_context(|| format!("can't start the {name}"))?;
        Ok(Self {
            name: name.to_owned(),
            child,
            control,
            log,
        })
    }

    /// Returns what the role tells, or nothing while it does not answer.
    ///
    /// Fails if the process has ended.
    pub(crate) fn status(&mut self) -> Result<Option<Status>> {
        if let Ok(status) = ask_status(&self.control) {
            return Ok(Some(status));
        }
        self.check()?;
        Ok(None)
    }

    /// Fails, with the end of its log, if the process has ended.
    pub(crate) fn check(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait().context("can't wait for a process")? {
            bail!(
                "the {} ended too early ({status}); the end of its log:\n{}",
                self.name,
                self.log_end()
            );
        }
        Ok(())
    }

    /// Returns the process's number.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Returns the control socket, for threads that ask on their own.
    pub(crate) fn control(&self) -> &Path {
        &self.control
    }

    /// Kills the process as a power cut would, and returns the moment right before.
    pub(crate) fn kill(&mut self) -> Result<Instant> {
        self.check()?;
        let moment = Instant::now();
        self.child
            .kill()
            .with_context(|| format!("can't kill the {}", self.name))?;
        Ok(moment)
    }

    /// Asks the process to end, as Ctrl-C does, and waits for that.
    pub(crate) fn end(mut self, tidy: &Tidy) -> Result<ExitStatus> {
        self.check()?;
        let pid = i32::try_from(self.child.id())
            .ok()
            .and_then(Pid::from_raw)
            .context("a process has a number")?;
        kill_process(pid, Signal::TERM).with_context(|| format!("can't end the {}", self.name))?;
        let what = format!("the orderly end of the {}", self.name);
        let ended = tidy.wait(&what, END_LIMIT, || Ok(self.child.try_wait()?));
        ended.with_context(|| format!("the end of its log:\n{}", self.log_end()))
    }

    /// Returns the last lines of its log.
    pub(crate) fn log_end(&self) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<_> = text.lines().collect();
        let shown = &lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..];
        shown.iter().map(|line| format!("  | {line}\n")).collect()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Ended already is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
