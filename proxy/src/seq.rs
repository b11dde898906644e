//! TCP sequence numbers in serial arithmetic.
//!
//! Every comparison of sequence and acknowledgement numbers in this crate goes through [`Seq`], so
//! that nothing changes its meaning where the numbers wrap at 2³².

/// A TCP sequence or acknowledgement number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seq(pub(crate) u32);

impl Seq {
    /// Returns the number `count` bytes later.
    pub(crate) fn plus(self, count: u32) -> Self {
        Self(self.0.wrapping_add(count))
    }

    /// Returns the number `count` bytes earlier.
    pub(crate) fn minus(self, count: u32) -> Self {
        Self(self.0.wrapping_sub(count))
    }

    /// Returns how far `self` is after `other`; negative if it is before.
    pub(crate) fn after(self, other: Self) -> i32 {
        self.0.wrapping_sub(other.0).cast_signed()
    }

    /// Says whether `self` is `other` or before it.
    pub(crate) fn at_most(self, other: Self) -> bool {
        self.after(other) <= 0
    }

    /// Returns the later of the two.
    pub(crate) fn later(self, other: Self) -> Self {
        if self.at_most(other) { other } else { self }
    }

    /// Returns the later of two numbers that may not be known.
    pub(crate) fn later_known(one: Option<Self>, other: Option<Self>) -> Option<Self> {
        match (one, other) {
            (Some(one), Some(other)) => Some(one.later(other)),
            (known, None) | (None, known) => known,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Seq;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn case_p05_order_and_distance_hold_across_the_wrap(base: u32, ahead in 1u32..0x7fff_ffff) {
            let (early, late) = (Seq(base), Seq(base).plus(ahead));
            prop_assert!(early.at_most(late));
            prop_assert!(!late.at_most(early));
            prop_assert_eq!(late.after(early).unsigned_abs(), ahead);
            prop_assert_eq!(early.later(late), late);
            prop_assert_eq!(late.later(early), late);
            prop_assert_eq!(late.minus(ahead), early);
        }
    }
}
