//! The guest's own random numbers: a ChaCha12 stream, seeded from the entropy device.
//!
//! Two guests that were given the same seeds in the same order draw the same numbers; fresh seeds are mixed in,
//! never put in place of what was there.

use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// A seed, as the entropy device and the clock page give it.
pub type Seed = [u8; 32];

/// The random number generator.
#[derive(Clone, Debug)]
pub struct Random {
    stream: ChaCha12Rng,
}

impl Random {
    /// Starts a stream.
    #[must_use]
    pub fn new(seed: Seed) -> Self {
        Self {
            stream: ChaCha12Rng::from_seed(seed),
        }
    }

    /// Mixes `fresh` into the state: the new stream depends on both.
    pub fn mix(&mut self, fresh: &Seed) {
        let mut seed = Seed::default();
        self.stream.fill_bytes(&mut seed);
        for (mine, theirs) in seed.iter_mut().zip(fresh) {
            *mine ^= theirs;
        }
        self.stream = ChaCha12Rng::from_seed(seed);
    }

    /// Draws 64 bits.
    pub fn draw(&mut self) -> u64 {
        self.stream.next_u64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_seeds_draw_equally_and_a_mixed_seed_does_not() {
        let (mut one, mut other) = (Random::new([1; 32]), Random::new([1; 32]));
        assert_eq!(one.draw(), other.draw());
        one.mix(&[2; 32]);
        other.mix(&[2; 32]);
        assert_eq!(one.draw(), other.draw());
        one.mix(&[3; 32]);
        assert_ne!(one.draw(), other.draw());
        let mut replaced = Random::new([3; 32]);
        assert_ne!(one.draw(), replaced.draw());
    }
}
