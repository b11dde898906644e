//! What processes use: processor time and memory, as Linux tells it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use anyhow::{Context, Result};

/// The unit of a file's size on disk.
const BLOCK_BYTES: u64 = 512;
const VCPU_THREAD: &str = "vcpu";

/// Processor time of processes, in user and system mode, by the names of their threads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Used {
    pub(super) threads: BTreeMap<String, Duration>,
}

impl Used {
    /// Returns what the processes have used until now.
    pub(super) fn by(pids: &[u32]) -> Result<Self> {
        let mut used = Self::default();
        for pid in pids {
            let folder = format!("/proc/{pid}/task");
            let tasks =
                fs::read_dir(&folder).with_context(|| format!("can't read {folder}: has the process ended?"))?;
            for task in tasks.flatten() {
                // A thread may end while it is looked at.
                let read = |name| fs::read_to_string(task.path().join(name)).unwrap_or_default();
                let spent = read("schedstat").split(' ').next().and_then(|ns| ns.parse().ok());
                let spent = Duration::from_nanos(spent.unwrap_or(0));
                *used.threads.entry(read("comm").trim_end().to_owned()).or_default() += spent;
            }
        }
        Ok(used)
    }

    /// Returns what was used since `earlier`. A thread that has ended in between is not in it.
    pub(super) fn since(mut self, earlier: &Self) -> Self {
        for (name, time) in &mut self.threads {
            *time = time.saturating_sub(earlier.threads.get(name).copied().unwrap_or_default());
        }
        self
    }

    /// Returns all but what their guests used.
    pub(super) fn own(&self) -> Duration {
        let own = self.threads.iter().filter(|(name, _)| *name != VCPU_THREAD);
        own.map(|(_, time)| *time).sum()
    }
}

/// Memory of one process, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub(super) struct Memory {
    /// Resident.
    pub(super) rss: u64,
    /// Its share of what is resident.
    pub(super) pss: u64,
    /// All that would be free without it: pages of its own, and its memory files, mapped or not.
    pub(super) held: u64,
}

impl Memory {
    /// Returns what the process has now.
    pub(super) fn of(pid: u32) -> Result<Self> {
        let path = format!("/proc/{pid}/smaps_rollup");
        let text = fs::read_to_string(&path).with_context(|| format!("can't read {path}"))?;
        let field = |name: &str| kib(&text, name).with_context(|| format!("{path} does not tell {name}"));
        Ok(Self {
            rss: field("Rss:")?,
            pss: field("Pss:")?,
            held: field("Pss_Anon:")? + field("Pss_File:")? + memory_files(pid)?,
        })
    }
}

fn kib(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim()
        .strip_suffix(" kB")?
        .trim()
        .parse::<u64>()
        .ok()
        .map(|kib| kib << 10)
}

/// Counts the bytes of the files in memory that the process has open: each once.
fn memory_files(pid: u32) -> Result<u64> {
    let folder = format!("/proc/{pid}/fd");
    let mut seen = BTreeSet::new();
    let mut bytes = 0;
    for entry in fs::read_dir(&folder)
        .with_context(|| format!("can't read {folder}"))?
        .flatten()
    {
        let in_memory = fs::read_link(entry.path()).is_ok_and(|to| to.to_string_lossy().starts_with("/memfd:"));
        if let (true, Ok(file)) = (in_memory, fs::metadata(entry.path()))
            && seen.insert((file.dev(), file.ino()))
        {
            bytes += file.blocks() * BLOCK_BYTES;
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn work_is_counted_and_a_guests_apart() {
        let pid = std::process::id();
        let before = Used::by(&[pid]).unwrap();
        let guest = std::thread::Builder::new().name(VCPU_THREAD.to_owned());
        let (ready, is_ready) = std::sync::mpsc::channel();
        let (end, may_end) = std::sync::mpsc::channel::<()>();
        let guest = guest
            .spawn(move || {
                spin();
                ready.send(()).unwrap();
                let _ = may_end.recv();
            })
            .unwrap();
        spin();
        is_ready.recv().unwrap();
        let used = Used::by(&[pid]).unwrap().since(&before);
        let long = Duration::from_millis(1);
        assert!(used.threads[VCPU_THREAD] > long && used.own() > long, "{used:?}");
        drop(end);
        guest.join().unwrap();
        assert!(Used::by(&[u32::MAX]).is_err());
    }

    fn spin() {
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(50) {
            std::hint::spin_loop();
        }
    }

    #[test]
    fn memory_files_count_whether_mapped_or_not() {
        let pid = std::process::id();
        let before = Memory::of(pid).unwrap();
        assert!(before.rss > 0 && before.pss > 0 && before.held > 0, "{before:?}");
        let file = rustix::fs::memfd_create("counted", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::io::write(&file, &vec![1; 8 << 20]).unwrap();
        let after = Memory::of(pid).unwrap();
        assert!(after.held >= before.held + (4 << 20), "{before:?} {after:?}");
    }
}
