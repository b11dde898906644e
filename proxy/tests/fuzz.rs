//! The fuzzers' steps, briefly, from random bytes; `tests/fuzz/README.md` tells of the fuzzers.

use proptest::prelude::*;

#[path = "../../tests/fuzz/src/lib.rs"]
#[allow(unreachable_pub, reason = "it is a crate of its own for the fuzzers")]
mod steps;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3_000))]

    #[test]
    fn the_comparator_loses_and_leaks_nothing(data in proptest::collection::vec(any::<u8>(), 0..1_500)) {
        steps::comparator(&data);
    }

    #[test]
    fn the_translator_changes_numbers_only(data in proptest::collection::vec(any::<u8>(), 0..1_500)) {
        steps::picture(&data);
    }
}
