//! The durable record beside an image, as both roles write it.

use std::path::PathBuf;

use checkpoint::Tag;
use checkpoint::pair::RecordUpdate;
use storage::Record;
use storage::record::RecordError;

/// Where the record is, and what in it never changes while a role runs.
#[derive(Clone, Debug)]
pub struct RecordPlace {
    /// The file; an unprotected VM keeps none.
    pub path: Option<PathBuf>,
    /// Name of the pair.
    pub pair: String,
    /// Name of this host.
    pub node: String,
    /// The witness that this host contends at.
    pub witness: Option<String>,
}

impl RecordPlace {
    /// Replaces the record, durably.
    ///
    /// # Errors
    /// Fails if the file can't be written.
    pub fn store(&self, update: RecordUpdate) -> Result<(), RecordError> {
        let Some(path) = &self.path else { return Ok(()) };
        let record = Record {
            pair: self.pair.clone(),
            node: self.node.clone(),
            tag: Tag {
                generation: update.generation,
                epoch: update.committed,
            },
            role: update.role,
            clean: update.clean,
            complete: update.complete,
            witness: self.witness.clone(),
        };
        record.store(path)
    }
}
