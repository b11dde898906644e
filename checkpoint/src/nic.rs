//! Which of the VM's network cards a frame belongs to.

use core::fmt;

use crate::limits::NICS_MAX;

/// A network card of the VM: its place among them, from 0 on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nic(u8);

impl Nic {
    /// The card that every VM has.
    pub const FIRST: Self = Self(0);

    /// Returns the card of that number, if a VM may have so many.
    #[must_use]
    pub fn new(number: u32) -> Option<Self> {
        let number = u8::try_from(number).ok()?;
        (usize::from(number) < NICS_MAX).then_some(Self(number))
    }

    /// Returns the cards of a VM that has so many.
    ///
    /// # Panics
    /// Panics if there are more than a VM may have.
    pub fn all(count: usize) -> impl Iterator<Item = Self> + Clone {
        assert!(count <= NICS_MAX, "a VM has at most {NICS_MAX} network cards");
        let count = u8::try_from(count).expect("few");
        (0..count).map(Self)
    }

    /// Returns its place in a list of the cards.
    #[must_use]
    pub fn index(self) -> usize {
        self.0.into()
    }

    /// Returns its number.
    #[must_use]
    pub fn number(self) -> u8 {
        self.0
    }
}

impl fmt::Display for Nic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "net{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_no_card_past_the_last() {
        let most = u32::try_from(NICS_MAX).unwrap();
        assert_eq!(Nic::new(0), Some(Nic::FIRST));
        assert_eq!(Nic::new(most - 1).map(Nic::index), Some(NICS_MAX - 1));
        for number in [most, 256, u32::MAX] {
            assert_eq!(Nic::new(number), None);
        }
        assert_eq!(
            Nic::all(2).map(|nic| nic.to_string()).collect::<Vec<_>>(),
            ["net0", "net1"]
        );
    }
}
