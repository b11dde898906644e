//! A claim at the witness, on a thread that may wait for its storage.

use std::sync::Arc;

use checkpoint::Generation;
use checkpoint::pair::WitnessAnswer;
use storage::witness::{Claim, DirectoryWitness};

/// Asks the witness for a term and hands its answer over. Never blocks the caller.
pub fn claim(
    witness: &Arc<DirectoryWitness>,
    term: Generation,
    hand_over: impl FnOnce(WitnessAnswer) + Send + 'static,
) {
    let witness = Arc::clone(witness);
    tokio::task::spawn_blocking(move || {
        hand_over(match witness.claim(term) {
            Ok(Claim::Won) => WitnessAnswer::Won,
            Ok(Claim::LostTo(owner)) => WitnessAnswer::LostTo(owner),
            Err(error) => WitnessAnswer::Unreachable(crate::describe(&error)),
        });
    });
}
