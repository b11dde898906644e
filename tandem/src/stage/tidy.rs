//! Leaves nothing behind: no process and no file, whether the program ends well, fails, is interrupted or panics.
//!
//! Files live in one temporary folder. Processes are children or, through the subreaper's rule of Linux,
//! become children when their own parent dies; those of a stage die with it by themselves. Namespaces and
//! interfaces vanish with their last process.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::process::{Pid, Signal, WaitOptions, getpid, kill_process, set_child_subreaper, waitpid};
use tempfile::TempDir;
use tokio::signal::unix::{SignalKind, signal};

/// Every name of a folder begins so.
const PREFIXES: [&str; 2] = ["tandem-demo-", "tandem-bench-"];
/// A folder that is this old, and not locked, is nobody's any more.
const ABANDONED: Duration = Duration::from_secs(60);
const NO_SYMLINK: i32 = (OFlags::NOFOLLOW.union(OFlags::DIRECTORY).union(OFlags::NONBLOCK))
    .bits()
    .cast_signed();
const PERIOD: Duration = Duration::from_millis(5);
/// Orphans that end by themselves, as sentinels do, get this long.
const ORPHANS_LIMIT: Duration = Duration::from_millis(500);

/// Who makes the folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// `tandem demo`.
    Demo,
    /// `tandem bench`.
    Bench,
}

/// The broom. Dropping it removes what there is.
#[derive(Debug)]
pub(crate) struct Tidy {
    folder: TempDir,
    /// Says to later ones that the folder is in use.
    _lock: File,
    interrupted: Arc<AtomicBool>,
}

impl Tidy {
    /// Makes the folder in `parent`, or else where temporary files go, and begins to listen for Ctrl-C.
    pub(crate) fn start(owner: Owner, parent: Option<&Path>) -> Result<Self> {
        let parent = parent.map_or_else(std::env::temp_dir, Path::to_owned);
        sweep(&parent);
        let folder = tempfile::Builder::new()
            .prefix(PREFIXES[owner as usize])
            .tempdir_in(&parent)
            .with_context(|| format!("can't make a folder in {}: check that it is writable", parent.display()))?;
        let lock = File::open(folder.path()).context("can't open the temporary folder")?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).context("can't lock the temporary folder")?;
        set_child_subreaper(Some(getpid())).context("can't adopt orphaned processes")?;
        clean_at_panic(folder.path().to_owned());
        let interrupted = Arc::new(AtomicBool::new(false));
        listen_for_signals(Arc::clone(&interrupted))?;
        Ok(Self {
            _lock: lock,
            folder,
            interrupted,
        })
    }

    /// Makes a folder for the files of a stage.
    pub(crate) fn folder(&self, name: &str) -> Result<PathBuf> {
        // Not the locked one: who locks what is in there may lock its folder as well.
        let folder = self.folder.path().join(name);
        fs::create_dir_all(&folder).context("can't make a temporary folder")?;
        Ok(folder)
    }

    pub(crate) fn is_interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }

    /// Waits until `ready` has something. Fails at the time limit, at Ctrl-C, or if `ready` does.
    pub(crate) fn wait<T>(
        &self,
        what: &str,
        limit: Duration,
        mut ready: impl FnMut() -> Result<Option<T>>,
    ) -> Result<T> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(value) = ready()? {
                return Ok(value);
            }
            if Instant::now() > deadline {
                bail!("{what} did not come about within {limit:?}");
            }
            self.sleep(PERIOD)?;
        }
    }

    /// Sleeps, unless interrupted.
    pub(crate) fn sleep(&self, span: Duration) -> Result<()> {
        let end = Instant::now() + span;
        loop {
            if self.is_interrupted() {
                bail!("interrupted");
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(Duration::from_millis(20)));
        }
    }

    /// Ends the processes and removes the files of all stages. All that it started itself has been waited for.
    pub(crate) fn clear(&self) {
        end_children();
        for entry in fs::read_dir(self.folder.path()).into_iter().flatten().flatten() {
            let path = entry.path();
            // What can't be removed now is tried again, and told of, when the folder is.
            let _ = if path.is_dir() {
                fs::remove_dir_all(path)
            } else {
                fs::remove_file(path)
            };
        }
    }
}

impl Drop for Tidy {
    fn drop(&mut self) {
        end_children();
    }
}

/// Removes what a demo or a benchmark left that was killed itself. One that lives holds its folder's lock.
fn sweep(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let path = entry.path();
        let ours = PREFIXES
            .iter()
            .any(|prefix| entry.file_name().to_string_lossy().starts_with(prefix));
        let aged = |file: &File| file.metadata().and_then(|data| data.modified()).ok()?.elapsed().ok();
        let Ok(file) = OpenOptions::new().read(true).custom_flags(NO_SYMLINK).open(&path) else {
            continue;
        };
        if ours
            && aged(&file).is_some_and(|age| age > ABANDONED)
            && flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()
        {
            // Another user's, perhaps: theirs to remove.
            let _ = fs::remove_dir_all(path);
        }
    }
}

/// Lets children end by themselves for a moment, then kills the rest. Only for the demo's or the
/// benchmark's own process: whatever its children are, it started them.
fn end_children() {
    let deadline = Instant::now() + ORPHANS_LIMIT;
    loop {
        while let Ok(Some(_)) = waitpid(None, WaitOptions::NOHANG) {}
        let children = children();
        if children.is_empty() {
            return;
        }
        if Instant::now() > deadline {
            for child in children {
                // Gone already is as good.
                let _ = kill_process(child, Signal::KILL);
            }
        }
        if Instant::now() > deadline + ORPHANS_LIMIT {
            return;
        }
        std::thread::sleep(PERIOD);
    }
}

fn children() -> Vec<Pid> {
    let own = getpid();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers
        .filter(|number| parent_of(*number) == Some(own))
        .filter_map(Pid::from_raw)
        .collect()
}

fn parent_of(process: i32) -> Option<Pid> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The name, in brackets, may contain anything; the state and the parent follow it.
    let (_, rest) = stat.rsplit_once(')')?;
    Pid::from_raw(rest.split_whitespace().nth(1)?.parse().ok()?)
}

/// A panic aborts this program, without any drop; its children die with it.
fn clean_at_panic(folder: PathBuf) {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        let _ = fs::remove_dir_all(&folder);
    }));
}

fn listen_for_signals(interrupted: Arc<AtomicBool>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.context("can't listen for Ctrl-C")?;
    let signals = runtime.block_on(async {
        let listen = |kind| signal(kind).context("can't listen for Ctrl-C");
        Ok::<_, anyhow::Error>((
            listen(SignalKind::interrupt())?,
            listen(SignalKind::terminate())?,
            listen(SignalKind::hangup())?,
        ))
    });
    let (mut interrupt, mut terminate, mut hangup) = signals?;
    let listener = std::thread::Builder::new().name("signals".into());
    let spawned = listener.spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hangup.recv() => {}
            }
            interrupted.store(true, Ordering::Relaxed);
        });
    });
    spawned.context("can't listen for Ctrl-C").map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_abandoned_folders_of_ours_are_swept() {
        let parent = TempDir::new().unwrap();
        let folder = |name: &str| {
            let path = parent.path().join(name);
            fs::create_dir(&path).unwrap();
            fs::write(path.join("host-a.img"), "x").unwrap();
            let file = File::open(&path).unwrap();
            file.set_modified(std::time::SystemTime::now() - 2 * ABANDONED).unwrap();
            (path, file)
        };
        let (abandoned, _) = folder("tandem-demo-1");
        let (locked, lock) = folder("tandem-bench-2");
        let (other, _) = folder("other");
        let (young, file) = folder("tandem-demo-3");
        file.set_modified(std::time::SystemTime::now()).unwrap();
        flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
        sweep(parent.path());
        assert_eq!(
            [abandoned, locked, other, young].map(|path| path.exists()),
            [false, true, true, true]
        );
    }

    #[test]
    fn a_parent_is_found_whatever_its_child_is_called() {
        let mut child = std::process::Command::new("sleep").arg("10").spawn().unwrap();
        let number = i32::try_from(child.id()).unwrap();
        assert_eq!(parent_of(number), Some(getpid()));
        assert!(children().contains(&Pid::from_raw(number).unwrap()));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(parent_of(number), None);
    }
}
