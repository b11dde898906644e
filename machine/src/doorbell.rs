//! Where an idle guest waits: its deadline, and whether a device has something for it.
//!
//! The guest polls its queues. When it finds nothing it writes a deadline to the doorbell; the vCPU's
//! thread then sleeps here until a device has used a buffer, the deadline has passed, or the machine
//! is to pause. Devices report through [`Interrupt`], after the used ring is written; a report
//! that comes before the guest waits is kept, so no wake-up is lost.
//!
//! `waiting` and its deadline are machine state: a guest saved asleep sleeps on where it is restored.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How a device says that it has used a buffer.
pub trait Interrupt: Send + Sync {
    /// Reports that the used ring has something new; called after it was written.
    fn trigger(&self);
}

/// Why a wait has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Woken {
    /// A device has used a buffer, or the deadline has passed: the guest goes on.
    Guest,
    /// The machine pauses; the guest still waits.
    Pause,
}

/// Where an idle guest waits.
#[derive(Debug, Default)]
pub(crate) struct Doorbell {
    bell: Mutex<Bell>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Bell {
    /// A device has used a buffer since the guest last went on.
    pending: bool,
    /// The machine is to pause.
    pause: bool,
    /// The vCPU's thread sleeps in [`Doorbell::wait`].
    asleep: bool,
}

impl Doorbell {
    /// Waits until the guest may go on, or the machine pauses. Without a deadline it may last for ever.
    pub(crate) fn wait(&self, deadline: Option<Instant>) -> Woken {
        let mut bell = self.lock();
        loop {
            if bell.pause {
                return Woken::Pause;
            }
            if bell.pending {
                bell.pending = false;
                return Woken::Guest;
            }
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Woken::Guest;
            }
            bell.asleep = true;
            bell = match left {
                Some(left) => {
                    self.changed
                        .wait_timeout(bell, left)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
                None => self.changed.wait(bell).unwrap_or_else(PoisonError::into_inner),
            };
            bell.asleep = false;
        }
    }

    /// Makes waits end at once from now on (`true`), or last again (`false`).
    pub(crate) fn pause(&self, pause: bool) {
        let mut bell = self.lock();
        bell.pause = pause;
        self.wake(&bell);
    }

    /// Says whether the guest is asleep with nothing to wake it.
    #[cfg(test)]
    pub(crate) fn sleeps(&self) -> bool {
        let bell = self.lock();
        bell.asleep && !bell.pending
    }

    fn lock(&self) -> MutexGuard<'_, Bell> {
        self.bell.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self, bell: &Bell) {
        if bell.asleep {
            self.changed.notify_one();
        }
    }
}

impl Interrupt for Doorbell {
    fn trigger(&self) {
        let mut bell = self.lock();
        if !bell.pending {
            bell.pending = true;
            self.wake(&bell);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::thread;

    #[test]
    fn report_before_the_wait_is_kept_and_counts_once() {
        let bell = Doorbell::default();
        bell.trigger();
        bell.trigger();
        assert_eq!(bell.wait(None), Woken::Guest);
        let start = Instant::now();
        assert_eq!(bell.wait(Some(start + Duration::from_millis(5))), Woken::Guest);
        assert!(
            start.elapsed() >= Duration::from_millis(5),
            "the second wait had only its deadline"
        );
    }

    #[test]
    fn deadline_in_the_past_does_not_sleep() {
        let bell = Doorbell::default();
        assert_eq!(bell.wait(Some(Instant::now())), Woken::Guest);
    }

    #[test]
    fn pause_ends_the_wait_and_keeps_the_report() {
        let bell = Arc::new(Doorbell::default());
        let sleeper = thread::spawn({
            let bell = Arc::clone(&bell);
            move || bell.wait(None)
        });
        thread::sleep(Duration::from_millis(5));
        bell.pause(true);
        assert_eq!(sleeper.join().unwrap(), Woken::Pause);
        bell.trigger();
        assert_eq!(bell.wait(None), Woken::Pause);
        bell.pause(false);
        assert_eq!(bell.wait(None), Woken::Guest);
    }

    #[test]
    fn report_wakes_a_sleeper() {
        let bell = Arc::new(Doorbell::default());
        let sleeper = thread::spawn({
            let bell = Arc::clone(&bell);
            move || bell.wait(None)
        });
        thread::sleep(Duration::from_millis(5));
        bell.trigger();
        assert_eq!(sleeper.join().unwrap(), Woken::Guest);
    }
}
