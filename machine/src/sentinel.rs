//! How a process is told of another's death before that one's memory is freed.
//!
//! The kernel frees the memory of a killed process first and closes its sockets afterwards, which takes
//! 160 ms for each GiB of guest memory. But before the memory, it lets go of the *robust mutexes* of
//! each dying thread and wakes who waits for them. So one thread of a role, the [`Canary`], holds such
//! a mutex for ever, in a page that it shares with a small process, the sentinel, which waits for it in
//! [`wait_for_death`].
//!
//! ```text
//!   role      canary ─ locks ─► mutex ◄─ waits ─ wait_for_death      sentinel
//!     SIGKILL ──► threads die ──► "owner died" ──────────────────────► wakes, acts
//!             ──► memory freed, sockets closed
//! ```
//!
//! Driven by `link::sentinel`, which knows what to do about a death. Knows nothing of sockets or peers.

use std::fs::read_dir;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::mpsc;
use std::thread::{Builder, JoinHandle};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use rustix::process::{setpgid, setpriority_process};

const PAGE_BYTES: usize = 4096;
const CANARY_STACK_BYTES: usize = 64 * 1024;
const PRIORITY: i32 = -20;

const _: () = assert!(size_of::<libc::pthread_mutex_t>() <= PAGE_BYTES);

/// A thread of this process whose end the sentinel notices. Dropping it ends it in order.
#[derive(Debug)]
pub struct Canary {
    page: OwnedFd,
    thread: Option<JoinHandle<()>>,
    stop: mpsc::Sender<()>,
}

/// How the canary of the other process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CanaryEnd {
    /// Its process dies: none of it will run user code again.
    Died,
    /// It was dropped in order.
    Dropped,
}

impl Canary {
    /// Starts the thread. On return it can be waited for.
    ///
    /// # Errors
    /// Fails if the host has no memory, file descriptor or thread left.
    pub fn start() -> io::Result<Self> {
        let page = memfd_create("tandem-canary", MemfdFlags::CLOEXEC)?;
        ftruncate(&page, PAGE_BYTES as u64)?;
        let mutex = SharedMutex::map(page.as_fd())?;
        mutex.initialise()?;
        let (stop, stopped) = mpsc::channel();
        let (locked, is_locked) = mpsc::channel();
        let thread = Builder::new()
            .name("canary".into())
            .stack_size(CANARY_STACK_BYTES)
            .spawn(move || {
                // Without the right to it, the thread dies a little later among the others; nothing else is lost.
                let _ = setpriority_process(None, PRIORITY);
                let outcome = mutex.lock();
                let held = outcome.is_ok();
                let _ = locked.send(outcome.map(|_| ()));
                if held {
                    let _ = stopped.recv();
                    mutex.unlock();
                }
            })?;
        let canary = Self {
            page,
            thread: Some(thread),
            stop,
        };
        is_locked
            .recv()
            .map_err(|_| io::Error::other("the canary thread ended at once"))??;
        Ok(canary)
    }

    /// Returns the page to hand to the sentinel.
    #[must_use]
    pub fn page(&self) -> BorrowedFd<'_> {
        self.page.as_fd()
    }
}

impl Drop for Canary {
    fn drop(&mut self) {
        let _ = self.stop.send(());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Waits, in the sentinel, for the end of the canary whose page this is.
///
/// # Errors
/// Fails if the page can't be mapped, or holds no canary's mutex.
pub fn wait_for_death(page: BorrowedFd<'_>) -> io::Result<CanaryEnd> {
    let mutex = SharedMutex::map(page)?;
    let end = mutex.lock()?;
    mutex.unlock();
    Ok(end)
}

/// Makes this process one that outlives its parent: deaf to the signals of a terminal or a service
/// manager, in a process group of its own, and with no file descriptor but the first three.
///
/// Must be the first thing that the process does.
///
/// # Errors
/// Fails if the process has more than one thread, as somebody might own a descriptor then, or if the kernel refuses.
pub fn detach() -> io::Result<()> {
    if read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::other("a sentinel must detach before it starts threads"));
    }
    for signal in [
        libc::SIGHUP,
        libc::SIGINT,
        libc::SIGPIPE,
        libc::SIGQUIT,
        libc::SIGTERM,
        libc::SIGTSTP,
    ] {
        // SAFETY: ignoring a signal runs no code in its context.
        if unsafe { libc::signal(signal, libc::SIG_IGN) } == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
    }
    setpgid(None, None)?;
    // Both need a right that a role mostly has and that the sentinel can do without.
    let _ = setpriority_process(None, PRIORITY);
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    let first: libc::c_uint = 3;
    // SAFETY: this process has one thread, which is here and owns no descriptor beyond the standard three.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, 0) };
    if closed == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// A robust mutex in a page that processes share.
struct SharedMutex {
    page: NonNull<libc::pthread_mutex_t>,
}

// SAFETY: the mutex is made for use by several threads and processes; the mapping belongs to the value, not to a thread.
unsafe impl Send for SharedMutex {}

impl SharedMutex {
    fn map(page: BorrowedFd<'_>) -> io::Result<Self> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of this process.
        let address = unsafe { mmap(std::ptr::null_mut(), PAGE_BYTES, access, MapFlags::SHARED, page, 0) }?;
        let page = NonNull::new(address.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        Ok(Self { page })
    }

    /// Makes the mutex, once, before anybody else maps the page.
    fn initialise(&self) -> io::Result<()> {
        let mut attributes = MaybeUninit::uninit();
        // SAFETY: the attributes are uninitialised, as this call wants them.
        check(unsafe { libc::pthread_mutexattr_init(attributes.as_mut_ptr()) })?;
        // SAFETY: initialised by the call above.
        let mut attributes = unsafe { attributes.assume_init() };
        // SAFETY: as above.
        check(unsafe { libc::pthread_mutexattr_setrobust(&raw mut attributes, libc::PTHREAD_MUTEX_ROBUST) })?;
        // SAFETY: as above.
        check(unsafe { libc::pthread_mutexattr_setpshared(&raw mut attributes, libc::PTHREAD_PROCESS_SHARED) })?;
        // SAFETY: the page is mapped, large enough, aligned, zeroed, and known to nobody else yet.
        let made = check(unsafe { libc::pthread_mutex_init(self.page.as_ptr(), &raw const attributes) });
        // SAFETY: initialised above and not used afterwards.
        let _ = unsafe { libc::pthread_mutexattr_destroy(&raw mut attributes) };
        made
    }

    /// Locks it, and says how the owner before ended.
    fn lock(&self) -> io::Result<CanaryEnd> {
        // SAFETY: the page is mapped for as long as `self` lives, and was initialised by `Canary::start`. A page with
        // other content makes the call fail or wait; it holds no pointer that is followed before the lock is taken.
        match unsafe { libc::pthread_mutex_lock(self.page.as_ptr()) } {
            0 => Ok(CanaryEnd::Dropped),
            libc::EOWNERDEAD => {
                // SAFETY: mapped, initialised, and locked by this thread with that very result.
                let consistent = check(unsafe { libc::pthread_mutex_consistent(self.page.as_ptr()) });
                consistent.map(|()| CanaryEnd::Died)
            }
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }

    /// Unlocks it; the calling thread holds it.
    fn unlock(&self) {
        // SAFETY: mapped, initialised, and locked by this thread.
        let result = unsafe { libc::pthread_mutex_unlock(self.page.as_ptr()) };
        assert_eq!(result, 0, "a mutex that this thread holds can be unlocked");
    }
}

impl Drop for SharedMutex {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length; no reference into the page exists, and no thread of this process
        // holds the mutex, which would be in that thread's list of robust mutexes.
        let _ = unsafe { munmap(self.page.as_ptr().cast(), PAGE_BYTES) };
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(result))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_canary_that_is_dropped_is_told_from_one_that_died() {
        let canary = Canary::start().unwrap();
        let page = canary.page().try_clone_to_owned().unwrap();
        let waiter = std::thread::spawn(move || wait_for_death(page.as_fd()).unwrap());
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert!(!waiter.is_finished(), "the canary lives");
        drop(canary);
        assert_eq!(waiter.join().unwrap(), CanaryEnd::Dropped);
    }

    #[test]
    fn a_thread_that_ends_with_the_mutex_is_a_death() {
        let page = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&page, PAGE_BYTES as u64).unwrap();
        let mutex = SharedMutex::map(page.as_fd()).unwrap();
        mutex.initialise().unwrap();
        // The mapping must outlive the thread, as that of a killed process does: the kernel writes into it.
        let holder = std::thread::spawn(move || {
            mutex.lock().unwrap();
            mutex
        });
        let _mapped = holder.join().unwrap();
        assert_eq!(wait_for_death(page.as_fd()).unwrap(), CanaryEnd::Died);
    }

    #[test]
    fn detaching_is_refused_where_threads_run() {
        let refused = std::thread::spawn(detach).join().unwrap();
        assert!(refused.unwrap_err().to_string().contains("before it starts threads"));
    }
}
