//! Which codec is worth its time.
//!
//! The cheapest is the one with the least *expected time*: the time to encode the page, plus its bytes divided by the
//! link's speed. What is measured comes in from the shell: the link's speed, and the time each packer takes. How well
//! pages pack comes from the encoder. All of it is averaged, recent pages counting most.
//!
//! Zero, unchanged and delta are the encoder's to try, always: they cost next to nothing. This decides whether a delta is
//! kept, and what happens to all other pages: lz4, zstd (which only a slow link makes worth its time) or neither.
//!
//! - While more than an eighth of the pages do not pack, the first bytes of each are tried before the whole.
//! - Now and then the second best is used, so that what is known of it does not grow old.
//!
//! Driven by the batch encoder; one for each connection. Integers only, so that equal inputs make equal batches.

use super::{Codec, PACKED_BYTES_MAX};
use crate::limits::PAGE_BYTES;
use crate::time::Duration;

/// One page in so many is packed by the second best codec.
const PROBE_EVERY: u32 = 128;
/// The weight of a new value in an average is one in so many; a link's samples are fewer and longer.
const WEIGHT: u64 = 16;
const LINK_WEIGHT: u64 = 4;
/// Averages are kept in parts of their unit, so that small steps are not lost.
const PARTS: u64 = 256;
/// Share of pages that do not pack from which on pages are sampled, in parts.
const SAMPLE_SHARE: u64 = PARTS / 8;
/// The share before anything is known.
const UNPACKED_SHARE: u64 = PARTS / 4;
/// Longest time of one page that is believed; a shell that was stopped by its host measures anything.
const PAGE_TIME_MAX: u64 = 10_000_000;

/// What is known of the link before it is measured, and whether zstd may be used at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Bytes per second that this connection can carry.
    pub bytes_per_second: u64,
    /// Whether the peer may be sent zstd.
    pub zstd: bool,
}

impl Default for Link {
    /// A gigabit.
    fn default() -> Self {
        Self {
            bytes_per_second: 125_000_000,
            zstd: true,
        }
    }
}

/// What to do with a page that is neither zero nor close to its base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Plan {
    Raw,
    Lz4,
    Zstd,
}

/// Chooses, and learns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chooser {
    link: u64,
    zstd_allowed: bool,
    lz4: Packing,
    zstd: Packing,
    /// Share of pages that did not pack, in parts.
    unpacked: u64,
    until_probe: u32,
}

/// What is known of a packer, in parts of a nanosecond and of a byte for each page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Packing {
    time: u64,
    bytes: u64,
}

impl Default for Chooser {
    fn default() -> Self {
        Self::new(Link::default())
    }
}

impl Chooser {
    /// Makes a chooser that knows nothing but the link.
    #[must_use]
    pub fn new(link: Link) -> Self {
        let known = |nanoseconds: u64, bytes: usize| Packing {
            time: nanoseconds * PARTS,
            bytes: bytes as u64 * PARTS,
        };
        // The times are those of one ordinary core, until this host's are measured.
        Self {
            link: link.bytes_per_second.max(1),
            zstd_allowed: link.zstd,
            lz4: known(4_000, PAGE_BYTES / 2),
            zstd: known(25_000, PAGE_BYTES * 3 / 8),
            unpacked: UNPACKED_SHARE,
            until_probe: PROBE_EVERY,
        }
    }

    /// Takes note of the speed at which the connection carried something, in bytes per second. With several connections on
    /// one link each is told of its share.
    pub fn link_measured(&mut self, bytes_per_second: u64) {
        self.link = average(self.link, bytes_per_second, LINK_WEIGHT).max(1);
    }

    /// Takes note of the time that packing took: `Pushed::timed` says by what. Codecs that are always tried are ignored.
    pub fn timed(&mut self, codec: Codec, pages: u32, took: Duration) {
        let time = took.0.checked_div(pages.into()).unwrap_or(0).min(PAGE_TIME_MAX) * PARTS;
        if let Some(packing) = self.packing(codec) {
            packing.time = average(packing.time, time, WEIGHT);
        }
    }

    /// Returns the link's speed as far as it is known, in bytes per second.
    #[must_use]
    pub fn link(&self) -> u64 {
        self.link
    }

    /// Returns whether a delta of that many bytes beats everything else that could be done.
    pub(crate) fn keeps_delta(&self, bytes: usize) -> bool {
        let delta = self.transfer(bytes as u64 * PARTS);
        delta
            <= self
                .cost(Plan::Raw)
                .min(self.cost(Plan::Lz4))
                .min(self.cost(Plan::Zstd))
    }

    /// Decides on a page. `packs` tells from a sample of it whether it would pack.
    pub(crate) fn plan(&mut self, packs: impl FnOnce() -> bool) -> Plan {
        let mut plans = [Plan::Raw, Plan::Lz4, Plan::Zstd].map(|plan| (self.cost(plan), plan));
        plans.sort_by_key(|(cost, _)| *cost);
        let [(_, best), (second_cost, second), _] = plans;
        self.until_probe -= 1;
        let probe = self.until_probe == 0;
        if probe {
            self.until_probe = PROBE_EVERY;
        }
        let chosen = match (probe, best) {
            (true, Plan::Raw) if second_cost < u64::MAX => second,
            // Raw teaches nothing.
            (true, Plan::Lz4) if self.zstd_allowed => Plan::Zstd,
            (true, Plan::Zstd) => Plan::Lz4,
            _ => best,
        };
        if chosen != Plan::Raw && self.unpacked >= SAMPLE_SHARE && !packs() {
            self.unpacked = average(self.unpacked, PARTS, WEIGHT);
            return Plan::Raw;
        }
        chosen
    }

    /// Takes note of what a packer made of a page.
    pub(crate) fn packed(&mut self, codec: Codec, bytes: usize) {
        let failed = if bytes > PACKED_BYTES_MAX { PARTS } else { 0 };
        self.unpacked = average(self.unpacked, failed, WEIGHT);
        if let Some(packing) = self.packing(codec) {
            packing.bytes = average(packing.bytes, bytes as u64 * PARTS, WEIGHT);
        }
    }

    fn packing(&mut self, codec: Codec) -> Option<&mut Packing> {
        match codec {
            Codec::Lz4 => Some(&mut self.lz4),
            Codec::Zstd => Some(&mut self.zstd),
            _ => None,
        }
    }

    /// Expected time of a page, in parts of a nanosecond; what is not allowed takes for ever.
    fn cost(&self, plan: Plan) -> u64 {
        let packing = match plan {
            Plan::Raw => return self.transfer(PAGE_BYTES as u64 * PARTS),
            Plan::Lz4 => self.lz4,
            Plan::Zstd if self.zstd_allowed => self.zstd,
            Plan::Zstd => return u64::MAX,
        };
        packing.time.saturating_add(self.transfer(packing.bytes))
    }

    fn transfer(&self, byte_parts: u64) -> u64 {
        // At most a page's parts: 2²⁰ times 2³⁰.
        byte_parts * 1_000_000_000 / self.link
    }
}

fn average(old: u64, new: u64, weight: u64) -> u64 {
    if new >= old {
        // Rounded up, so that the average reaches what stays the same.
        old + (new - old).div_ceil(weight)
    } else {
        old - (old - new).div_ceil(weight)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEGABYTE: u64 = 1_000_000;

    fn chooser(megabytes_per_second: u64) -> Chooser {
        Chooser::new(Link {
            bytes_per_second: megabytes_per_second * MEGABYTE,
            zstd: true,
        })
    }

    /// Runs `pages` pages, each packing to what `sizes` says (lz4, zstd). Returns how often each plan was made.
    fn run(chooser: &mut Chooser, pages: usize, sizes: (usize, usize)) -> [usize; 3] {
        let mut plans = [0; 3];
        for _ in 0..pages {
            let plan = chooser.plan(|| sizes.0 <= PACKED_BYTES_MAX);
            match plan {
                Plan::Raw => {}
                Plan::Lz4 => chooser.packed(Codec::Lz4, sizes.0),
                Plan::Zstd => chooser.packed(Codec::Zstd, sizes.1),
            }
            plans[plan as usize] += 1;
        }
        plans
    }

    #[test]
    fn zstd_is_for_slow_links_lz4_for_ordinary_ones_and_raw_for_the_fastest() {
        for (speed, plan) in [
            (1, Plan::Zstd),
            (8, Plan::Zstd),
            (125, Plan::Lz4),
            (300, Plan::Lz4),
            (20_000, Plan::Raw),
        ] {
            let plans = run(&mut chooser(speed), 1_000, (2_000, 1_500));
            assert!(plans[plan as usize] > 950, "{speed} MB/s: {plans:?}");
        }
    }

    #[test]
    fn zstd_can_be_ruled_out() {
        let mut chooser = Chooser::new(Link {
            bytes_per_second: MEGABYTE,
            zstd: false,
        });
        assert_eq!(run(&mut chooser, 1_000, (2_000, 100)), [0, 1_000, 0]);
    }

    #[test]
    fn a_link_that_turns_slow_or_fast_changes_the_choice() {
        let mut chooser = chooser(125);
        run(&mut chooser, 100, (2_000, 1_500));
        for (speed, plan) in [(5, Plan::Zstd), (20_000, Plan::Raw), (125, Plan::Lz4)] {
            (0..100).for_each(|_| chooser.link_measured(speed * MEGABYTE));
            assert_eq!(chooser.link(), speed * MEGABYTE);
            let plans = run(&mut chooser, 1_000, (2_000, 1_500));
            assert!(plans[plan as usize] > 900, "{speed} MB/s: {plans:?}");
        }
    }

    #[test]
    fn measured_times_change_the_choice() {
        let mut chooser = chooser(125);
        // zstd as fast as lz4 on this host: the smaller wins.
        (0..200).for_each(|_| chooser.timed(Codec::Zstd, 10, Duration::from_micros(40)));
        let plans = run(&mut chooser, 1_000, (2_000, 1_500));
        assert!(plans[Plan::Zstd as usize] > 900, "{plans:?}");
        // Both slower than sending everything.
        for codec in [Codec::Lz4, Codec::Zstd] {
            (0..200).for_each(|_| chooser.timed(codec, 1, Duration::from_micros(500)));
        }
        let plans = run(&mut chooser, 1_000, (2_000, 1_500));
        assert!(plans[Plan::Raw as usize] > 900, "{plans:?}");
    }

    #[test]
    fn pages_that_do_not_pack_cost_a_sample_only() {
        let mut chooser = chooser(125);
        let plans = run(&mut chooser, 1_000, (PAGE_BYTES, PAGE_BYTES));
        assert_eq!(plans[Plan::Raw as usize], 1_000, "{plans:?}");
    }

    #[test]
    fn pages_that_all_pack_are_not_sampled_and_the_first_that_do_not_are_noticed() {
        let mut chooser = chooser(125);
        run(&mut chooser, 100, (2_000, 1_500));
        assert_ne!(chooser.plan(|| panic!("a sample")), Plan::Raw);
        // The sample would say that they pack: only the result tells.
        for _ in 0..8 {
            if chooser.plan(|| true) == Plan::Lz4 {
                chooser.packed(Codec::Lz4, PAGE_BYTES);
            }
        }
        let mut sampled = false;
        chooser.plan(|| {
            sampled = true;
            false
        });
        assert!(sampled);
    }

    #[test]
    fn the_second_best_is_tried_now_and_then_and_wins_when_it_is_better() {
        let mut chooser = chooser(125);
        // zstd is far better here than is believed at first; only trying shows it.
        let plans = run(&mut chooser, 10_000, (3_500, 200));
        assert!(plans[Plan::Zstd as usize] > 5_000, "{plans:?}");
    }

    #[test]
    fn a_delta_is_kept_if_nothing_is_cheaper() {
        let mut chooser = chooser(125);
        assert!(chooser.keeps_delta(64));
        run(&mut chooser, 1_000, (100, 90));
        assert!(!chooser.keeps_delta(3_000), "the page packs to a thirtieth of that");
        assert!(chooser.keeps_delta(80));
    }

    #[test]
    fn absurd_measurements_are_survived() {
        let mut chooser = chooser(0);
        for speed in [0, u64::MAX, 1] {
            chooser.link_measured(speed);
            chooser.timed(Codec::Lz4, 0, Duration(u64::MAX));
            chooser.timed(Codec::Zstd, 1, Duration(u64::MAX));
            chooser.plan(|| true);
            assert!(chooser.keeps_delta(0));
        }
    }
}
