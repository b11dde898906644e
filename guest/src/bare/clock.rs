//! The clock: the machine's page and the time stamp counter.

use core::sync::atomic::{Ordering, fence};

use guest::abi::{CLOCK_PAGE, ClockPage};
use guest::clock::Moment;
use guest::random::Seed;

use super::memory::address;

/// Reads the clock page, and notices when the machine has put fresh entropy into it.
pub(crate) struct Clock {
    page: ClockPage,
    reseeds: u64,
    last: u64,
}

impl Clock {
    /// What the page holds at the start counts as known.
    pub(crate) fn new() -> Self {
        let page = read();
        Self {
            page,
            reseeds: page.reseed_count,
            last: 0,
        }
    }

    /// The time now; never before what was told last.
    pub(crate) fn now(&mut self) -> Moment {
        loop {
            self.page = read();
            // SAFETY: every processor with 64-bit mode has it, and ring 3 may use it unless CR4.TSD is set.
            let tsc = unsafe { core::arch::x86_64::_rdtsc() };
            if sequence() == self.page.sequence {
                let mut moment = Moment::from_page(&self.page, tsc);
                moment.ns = moment.ns.max(self.last);
                self.last = moment.ns;
                return moment;
            }
        }
    }

    /// The entropy on the page.
    pub(crate) fn reseed(&self) -> Seed {
        self.page.reseed
    }

    /// The entropy on the page, once for each time the machine has put it there.
    pub(crate) fn take_reseed(&mut self) -> Option<Seed> {
        if self.page.reseed_count == self.reseeds {
            return None;
        }
        self.reseeds = self.page.reseed_count;
        Some(self.page.reseed)
    }
}

fn page() -> *const ClockPage {
    core::ptr::with_exposed_provenance(address(CLOCK_PAGE))
}

fn sequence() -> u64 {
    fence(Ordering::Acquire);
    // SAFETY: the page is mapped and aligned, and the machine keeps it; the sequence is its first field.
    let sequence = unsafe { page().cast::<u64>().read_volatile() };
    fence(Ordering::Acquire);
    sequence
}

fn read() -> ClockPage {
    loop {
        let before = sequence();
        // SAFETY: the page is mapped and aligned; a torn copy is noticed by the sequence and thrown away.
        let page = unsafe { page().read_volatile() };
        if before.is_multiple_of(2) && sequence() == before {
            return page;
        }
        core::hint::spin_loop();
    }
}
