//! Guest time: what the clock page and the time stamp counter say together.
//!
//! Driven by the freestanding program, which reads both; nothing here reads a clock.

use crate::abi::ClockPage;

/// One reading of all clocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moment {
    /// Guest time in nanoseconds; monotonic, also across hosts.
    pub ns: u64,
    /// Nanoseconds since 1970, UTC.
    pub wall_ns: u64,
    /// The raw time stamp counter: differs between two hosts at the same guest instruction.
    pub tsc: u64,
}

impl Moment {
    /// Computes the moment at which the counter read `tsc` while the page was whole.
    ///
    /// A counter behind the page's base (the page is newer) counts as the base itself.
    #[must_use]
    pub fn from_page(page: &ClockPage, tsc: u64) -> Self {
        let ticks = tsc.saturating_sub(page.base_tsc);
        let passed = (u128::from(ticks) * u128::from(page.multiplier)) >> 32;
        let ns = page.base_ns.saturating_add(u64::try_from(passed).unwrap_or(u64::MAX));
        Self {
            ns,
            wall_ns: ns.wrapping_add(page.wall_offset_ns),
            tsc,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_follows_the_page() {
        let page = ClockPage {
            base_tsc: 1_000,
            base_ns: 5_000,
            multiplier: 1 << 31,
            wall_offset_ns: 1_000_000,
            ..ClockPage::default()
        };
        assert_eq!(
            Moment::from_page(&page, 3_000),
            Moment {
                ns: 6_000,
                wall_ns: 1_006_000,
                tsc: 3_000
            }
        );
        assert_eq!(Moment::from_page(&page, 10).ns, 5_000);
        assert!(Moment::from_page(&page, u64::MAX).ns > 1 << 60);
    }
}
