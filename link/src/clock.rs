//! The one clock of a role: `CLOCK_BOOTTIME`, which goes on while the host sleeps.
//!
//! A side that was stopped by its host must see, when it wakes, how long it was away; a clock that
//! stands still meanwhile would let it release output that is no longer its own.

use std::future::pending;

use checkpoint::{Duration, Instant};
use rustix::time::{ClockId, clock_gettime};

/// Sleeps are cut into pieces of this length, because the runtime's own timer stands still while the host sleeps.
const PIECE: Duration = Duration::from_millis(100);

/// Returns the time since the host booted, its sleep included.
///
/// # Panics
/// Panics if the kernel gives a time before the boot, which it does not.
#[must_use]
pub fn now() -> Instant {
    let time = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).expect("no time before the boot");
    let nanoseconds = u64::try_from(time.tv_nsec).expect("nanoseconds are positive");
    Instant(seconds * 1_000_000_000 + nanoseconds)
}

/// Waits until `deadline`, for ever without one. May be dropped and made anew at any time.
pub async fn sleep_until(deadline: Option<Instant>) {
    let Some(deadline) = deadline else {
        return pending().await;
    };
    loop {
        let left = deadline.since(now());
        if left == Duration::default() {
            return;
        }
        tokio::time::sleep(left.min(PIECE).into()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_does_not_go_back() {
        let times: Vec<_> = (0..1_000).map(|_| now()).collect();
        assert!(times.is_sorted());
        assert!(times[0] > Instant(0));
    }

    #[tokio::test]
    async fn a_sleep_ends_at_its_deadline_and_not_before() {
        let deadline = now() + Duration::from_millis(150);
        sleep_until(Some(deadline)).await;
        assert!(now() >= deadline);
        sleep_until(Some(Instant(1))).await;
    }

    #[tokio::test]
    async fn without_a_deadline_there_is_no_end() {
        let limit = std::time::Duration::from_millis(30);
        assert!(tokio::time::timeout(limit, sleep_until(None)).await.is_err());
    }
}
