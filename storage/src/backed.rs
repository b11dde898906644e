//! Which blocks of the base have room on the host, shared by those who count on it and the job that gives room back.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::changed::BlockSet;

/// The blocks, and how many wait for them.
///
/// A plain mutex is not fair: a job that takes it for one piece after the other, with hardly a moment between two, could keep a
/// guest's write out for all of its pieces.
#[derive(Debug, Default)]
pub(crate) struct Backed {
    blocks: Mutex<BlockSet>,
    waiting: AtomicUsize,
}

impl Backed {
    /// Waits for the piece that is under way, at most.
    pub(crate) fn lock(&self) -> MutexGuard<'_, BlockSet> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        blocks
    }

    /// Waits until nobody else does. For who takes it again and again, and holds it for long.
    pub(crate) fn lock_after_others(&self) -> MutexGuard<'_, BlockSet> {
        while self.waiting.load(Ordering::Relaxed) > 0 {
            thread::yield_now();
        }
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_that_takes_it_again_lets_others_have_it_first() {
        let (backed, order) = (Backed::default(), Mutex::new(Vec::new()));
        let (backed, order) = (&backed, &order);
        let note = |who| order.lock().unwrap().push(who);
        thread::scope(|scope| {
            let piece = backed.lock_after_others();
            scope.spawn(move || {
                let _held = backed.lock();
                note("a guest's write");
            });
            while backed.waiting.load(Ordering::Relaxed) == 0 {
                thread::yield_now();
            }
            drop(piece);
            let _held = backed.lock_after_others();
            note("the next piece");
        });
        assert_eq!(*order.lock().unwrap(), ["a guest's write", "the next piece"]);
    }
}
