//! The durable record beside an image: whose state it is, and how far it got.
//!
//! It is what decides, after a power loss of both hosts, whose disk is the newest. It is replaced as a whole and
//! synced, so a crash leaves the old record or the new one; anything else is an error that a person has to settle,
//! never a guess.
//!
//! ```text
//!   tandem-record 1 crc32=8f1c02aa
//!   {"pair":"shop","node":"left","generation":4,"role":"primary","epoch":811,"clean":false,"complete":true,"witness":null}
//! ```
//!
//! Written by the shells before they run in a new generation and at an orderly stop, not at every commit: between
//! those the journal tells the last epoch (see [`crate::Recovery::last`]).

use std::io;
use std::path::{Path, PathBuf};

use checkpoint::{Epoch, Generation, Role, Tag};
use serde::{Deserialize, Serialize};

use crate::beside;
use crate::journal::{Kind, Recovery};

const MAGIC: &str = "tandem-record";
const VERSION: u32 = 1;
const BYTES_MAX: u64 = 4096;

/// What is known about an image. See the module's documentation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Name of the pair.
    pub pair: String,
    /// Name of this node.
    pub node: String,
    /// Generation and last committed epoch of the image's state.
    pub tag: Tag,
    /// What this node was.
    pub role: Role,
    /// Whether it was stopped in order: nothing was written after this record.
    pub clean: bool,
    /// Whether the image is a whole state; `false` from the start of a sync to its end.
    pub complete: bool,
    /// The witness this node has contended at, if any; another one proves nothing.
    pub witness: Option<String>,
}

/// Why a record cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// Torn, changed, or not a record.
    #[error(
        "the record {path} is damaged ({what}). It says which host's disk is the newest, so nothing is started. \
         If this host's disk is to be resynchronised from its peer, or is new, delete the file"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// Written by a later version of the program.
    #[error("the record {path} has version {version}, this program knows {VERSION}; run the newer program")]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// The file cannot be read or written.
    #[error("cannot access the record {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    pair: String,
    node: String,
    generation: u64,
    role: StoredRole,
    epoch: u64,
    clean: bool,
    complete: bool,
    witness: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum StoredRole {
    Primary,
    Secondary,
}

impl Record {
    /// Returns where the record of an image is kept.
    #[must_use]
    pub fn path_for(image: &Path) -> PathBuf {
        beside::with_suffix(image, ".tandem")
    }

    /// Returns where the journal of an image is kept.
    #[must_use]
    pub fn journal_for(image: &Path) -> PathBuf {
        beside::with_suffix(image, ".journal")
    }

    /// Reads a record; `None` if there has never been one.
    ///
    /// # Errors
    /// If there is one and it cannot be trusted.
    pub fn load(path: &Path) -> Result<Option<Self>, RecordError> {
        match beside::read(path, BYTES_MAX) {
            Ok(None) => Ok(None),
            Ok(Some(bytes)) => Self::decode(path, &bytes).map(Some),
            Err(source) => Err(RecordError::Io {
                path: path.into(),
                source,
            }),
        }
    }

    /// Replaces the record, durably.
    ///
    /// # Errors
    /// If it cannot be written; the old one may still be there.
    pub fn store(&self, path: &Path) -> Result<(), RecordError> {
        beside::replace(path, self.encode().as_bytes()).map_err(|source| RecordError::Io {
            path: path.into(),
            source,
        })
    }

    /// Brings the record up to what the journal says of the same generation. Not stored.
    pub fn advance(&mut self, recovery: &Recovery) {
        if let Some(last) = recovery
            .last()
            .filter(|last| last.tag.generation == self.tag.generation)
        {
            self.tag = self.tag.max(last.tag);
        }
    }

    /// Returns the checkpoint that the image durably is, exactly: what a primary may build on. `None` unless the image
    /// followed a primary to the last and the journal confirms it: whoever runs on the image alone becomes a primary
    /// in the record, or makes the journal forget.
    #[must_use]
    pub fn checkpoint(&self, recovery: &Recovery) -> Option<Tag> {
        let last = recovery.last()?;
        let followed = self.complete && self.role == Role::Secondary && last.kind == Kind::Commit;
        (followed && last.tag.generation == self.tag.generation).then(|| self.tag.max(last.tag))
    }

    fn encode(&self) -> String {
        let stored = Stored {
            pair: self.pair.clone(),
            node: self.node.clone(),
            generation: self.tag.generation.0,
            role: match self.role {
                Role::Primary => StoredRole::Primary,
                Role::Secondary => StoredRole::Secondary,
            },
            epoch: self.tag.epoch.0,
            clean: self.clean,
            complete: self.complete,
            witness: self.witness.clone(),
        };
        let body = serde_json::to_string(&stored).expect("strings and numbers are always JSON");
        format!(
            "{MAGIC} {VERSION} crc32={:08x}\n{body}\n",
            crc32fast::hash(body.as_bytes())
        )
    }

    fn decode(path: &Path, bytes: &[u8]) -> Result<Self, RecordError> {
        let damaged = |what| RecordError::Damaged {
            path: path.into(),
            what,
        };
        let text = str::from_utf8(bytes).map_err(|_| damaged("not text"))?;
        let (head, body) = text.split_once('\n').ok_or_else(|| damaged("too short"))?;
        let mut words = head.split(' ');
        if words.next() != Some(MAGIC) {
            return Err(damaged("not a record"));
        }
        let version = words
            .next()
            .and_then(|version| version.parse().ok())
            .ok_or_else(|| damaged("no version"))?;
        if version != VERSION {
            return Err(RecordError::Version {
                path: path.into(),
                version,
            });
        }
        let checksum = words
            .next()
            .and_then(|word| word.strip_prefix("crc32="))
            .filter(|word| word.len() == 8);
        let body = body.strip_suffix('\n').ok_or_else(|| damaged("too short"))?;
        if checksum != Some(&format!("{:08x}", crc32fast::hash(body.as_bytes()))) || words.next().is_some() {
            return Err(damaged("its checksum does not hold"));
        }
        let stored: Stored = serde_json::from_str(body).map_err(|_| damaged("not the fields of a record"))?;
        Ok(Self {
            pair: stored.pair,
            node: stored.node,
            tag: Tag {
                generation: Generation(stored.generation),
                epoch: Epoch(stored.epoch),
            },
            role: match stored.role {
                StoredRole::Primary => Role::Primary,
                StoredRole::Secondary => Role::Secondary,
            },
            clean: stored.clean,
            complete: stored.complete,
            witness: stored.witness,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::Last;

    fn record() -> Record {
        Record {
            pair: "shop".into(),
            node: "left \"one\"".into(),
            tag: Tag {
                generation: Generation(4),
                epoch: Epoch(u64::MAX),
            },
            role: Role::Primary,
            clean: false,
            complete: true,
            witness: Some("ab12".into()),
        }
    }

    #[test]
    fn case_33_what_was_stored_is_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let path = Record::path_for(&dir.path().join("disk.img"));
        assert_eq!(Record::load(&path).unwrap(), None);
        record().store(&path).unwrap();
        assert_eq!(Record::load(&path).unwrap(), Some(record()));
        let other = Record {
            role: Role::Secondary,
            witness: None,
            ..record()
        };
        other.store(&path).unwrap();
        assert_eq!(Record::load(&path).unwrap(), Some(other));
        assert_eq!(
            std::fs::read_dir(dir.path()).unwrap().count(),
            1,
            "nothing temporary is left"
        );
    }

    #[test]
    fn a_record_torn_at_any_byte_is_an_error_with_a_cure() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img.tandem");
        let whole = record().encode();
        for len in 0..whole.len() {
            std::fs::write(&path, &whole[..len]).unwrap();
            let error = Record::load(&path).unwrap_err().to_string();
            assert!(
                error.contains("disk.img.tandem") && error.contains("delete the file"),
                "{len}: {error}"
            );
        }
        for at in 0..whole.len() {
            let mut bytes = whole.clone().into_bytes();
            bytes[at] ^= 1;
            std::fs::write(&path, &bytes).unwrap();
            Record::load(&path).unwrap_err();
        }
    }

    #[test]
    fn hostile_files_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r");
        std::fs::write(&path, vec![b'x'; 1 << 20]).unwrap();
        assert!(matches!(Record::load(&path), Err(RecordError::Io { .. })));
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
        assert!(matches!(Record::load(&path), Err(RecordError::Io { .. })));
        assert!(matches!(Record::load(dir.path()), Err(RecordError::Io { .. })));
        let body = "{\"pair\":1}";
        let forged = format!(
            "tandem-record 1 crc32={:08x}\n{body}\n",
            crc32fast::hash(body.as_bytes())
        );
        assert!(matches!(
            Record::decode(&path, forged.as_bytes()),
            Err(RecordError::Damaged { .. })
        ));
        assert!(matches!(
            Record::decode(&path, b"tandem-record 2 crc32=00000000\n\n"),
            Err(RecordError::Version { version: 2, .. })
        ));
    }

    #[test]
    fn only_an_image_that_followed_to_the_last_is_a_checkpoint() {
        let tag = |generation, epoch| Tag {
            generation: Generation(generation),
            epoch: Epoch(epoch),
        };
        let found = |generation, epoch, kind| {
            Recovery::Clean(Last {
                tag: tag(generation, epoch),
                kind,
            })
        };
        let followed = Record {
            role: Role::Secondary,
            tag: tag(4, 10),
            ..record()
        };
        assert_eq!(followed.checkpoint(&found(4, 10, Kind::Commit)), Some(tag(4, 10)));
        assert_eq!(followed.checkpoint(&found(4, 12, Kind::Commit)), Some(tag(4, 12)));
        assert_eq!(followed.checkpoint(&found(3, 9, Kind::Commit)), None);
        assert_eq!(followed.checkpoint(&found(4, 10, Kind::TakeOver)), None);
        assert_eq!(followed.checkpoint(&Recovery::Fresh), None);
        assert_eq!(followed.checkpoint(&Recovery::Discarded), None);
        let half = Record {
            complete: false,
            ..followed.clone()
        };
        assert_eq!(half.checkpoint(&found(4, 10, Kind::Commit)), None);
        let ran = Record {
            role: Role::Primary,
            ..followed
        };
        assert_eq!(ran.checkpoint(&found(4, 10, Kind::Commit)), None);
    }

    #[test]
    fn the_journal_advances_a_record_of_its_own_generation_only() {
        let tag = |generation, epoch| Tag {
            generation: Generation(generation),
            epoch: Epoch(epoch),
        };
        let found = |tag| {
            Recovery::Clean(Last {
                tag,
                kind: Kind::Commit,
            })
        };
        let mut record = Record {
            tag: tag(4, 10),
            ..record()
        };
        record.advance(&found(tag(4, 12)));
        assert_eq!(record.tag, tag(4, 12));
        record.advance(&found(tag(4, 11)));
        record.advance(&found(tag(3, 99)));
        record.advance(&found(tag(5, 1)));
        record.advance(&Recovery::Fresh);
        assert_eq!(record.tag, tag(4, 12));
    }
}
