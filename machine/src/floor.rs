//! What a stop costs this host at least: no protocol, no encoding, no network, only the hardware and its kernel.
//!
//! One stop: the machine pauses, the dirty pages are harvested, processor and devices saved, the pages copied, and the machine
//! goes on. Whoever reports the pause of a checkpoint reports this beside it, from the same run.

use std::time::{Duration, Instant};

use crate::{CopyBuffer, Vm, VmError};

/// One stop, and how long each part of it took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stop {
    /// Pages harvested and copied.
    pub pages: u64,
    /// Bytes of the processor's and devices' state.
    pub state_bytes: usize,
    /// Until the processor and all devices are at rest.
    pub pause: Duration,
    /// Until the dirty pages are known, and watched again.
    pub harvest: Duration,
    /// Until processor and devices are saved.
    pub save: Duration,
    /// Until the pages are copied.
    pub copy: Duration,
    /// Until the machine goes on.
    pub resume: Duration,
}

impl Stop {
    /// Returns how long the guest stood.
    #[must_use]
    pub fn total(&self) -> Duration {
        self.pause + self.harvest + self.save + self.copy + self.resume
    }
}

/// Stops the machine once and lets it go on; `buffer` is emptied first. The pages are clean afterwards, so this is for a
/// machine that nobody checkpoints, or whose next checkpoint is told of `buffer`'s pages.
///
/// # Panics
/// If there is not room in `buffer` for all dirty pages.
pub fn measure(vm: &mut dyn Vm, buffer: &mut CopyBuffer) -> Result<Stop, VmError> {
    let ram = vm.ram();
    buffer.clear();
    let mut last = Instant::now();
    let mut lap = || {
        let now = Instant::now();
        now - core::mem::replace(&mut last, now)
    };
    vm.pause()?;
    let pause = lap();
    let dirty = vm.take_dirty()?;
    let harvest = lap();
    let state = vm.save()?;
    let save = lap();
    let rest = buffer.copy(&ram, &dirty).expect("a machine's dirty pages are its own");
    let copy = lap();
    vm.resume()?;
    let resume = lap();
    assert!(
        rest.is_empty(),
        "the floor's buffer is too small by {} pages",
        rest.len()
    );
    Ok(Stop {
        pages: dirty.len(),
        state_bytes: state.bytes(),
        pause,
        harvest,
        save,
        copy,
        resume,
    })
}

/// Returns for each part by itself, and for the number of pages, the value that `percent` of the stops do not exceed; none
/// without stops. The total of the result is no percentile of the totals.
#[must_use]
pub fn percentile(stops: &[Stop], percent: usize) -> Stop {
    fn of<T: Ord + Copy + Default>(stops: &[Stop], percent: usize, part: impl Fn(&Stop) -> T) -> T {
        let mut values: Vec<_> = stops.iter().map(part).collect();
        values.sort_unstable();
        let rank = (values.len() * percent.min(100)).div_ceil(100).saturating_sub(1);
        values.get(rank).copied().unwrap_or_default()
    }
    Stop {
        pages: of(stops, percent, |stop| stop.pages),
        state_bytes: of(stops, percent, |stop| stop.state_bytes),
        pause: of(stops, percent, |stop| stop.pause),
        harvest: of(stops, percent, |stop| stop.harvest),
        save: of(stops, percent, |stop| stop.save),
        copy: of(stops, percent, |stop| stop.copy),
        resume: of(stops, percent, |stop| stop.resume),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_each_part_by_itself() {
        let stops: Vec<_> = (1..=100)
            .map(|number| Stop {
                pages: number,
                copy: Duration::from_micros(101 - number),
                ..Stop::default()
            })
            .collect();
        let median = percentile(&stops, 50);
        assert_eq!((median.pages, median.copy), (50, Duration::from_micros(50)));
        assert_eq!(percentile(&stops, 99).pages, 99);
        assert_eq!(percentile(&stops, 100).pages, 100);
        assert_eq!(percentile(&stops[..1], 1), stops[0]);
        assert_eq!(percentile(&[], 50), Stop::default());
        assert_eq!(median.total(), Duration::from_micros(50));
    }
}
