//! The directory witness: a shared directory in which each term has at most one owner, for ever.
//!
//! A side that wants term *N* writes a file with its own name, syncs it, and links it to `PAIR.term-N`. A link either
//! is made or is there already, also on NFS, so exactly one side wins. There is no lease: a term once won is
//! never lost, and a side that finds its own name in it has won it, also if it crashed in between.
//!
//! The directory carries a random mark of its own. A side that knows the mark from before refuses a directory without
//! it: a share that is not mounted is an empty local directory, in which both sides would win.
//!
//! Blocks for as long as the file system does; the shell calls it on a thread of its own.

use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use checkpoint::Generation;

use crate::beside;

const NAME_BYTES_MAX: usize = 64;
const FILE_BYTES_MAX: u64 = 1024;
/// Names looked at in the directory; several pairs may share it, each with one small file for every failover.
const ENTRIES_MAX: usize = 100_000;
/// Terms that [`DirectoryWitness::prune`] leaves.
const TERMS_KEPT: u64 = 64;

/// How a contest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Claim {
    /// The term is this node's, durably.
    Won,
    /// The term belongs to another node, or there is a later one, whose owner this is (perhaps this node itself).
    LostTo(String),
}

/// Why the witness gives no answer. None of these means won or lost.
#[derive(Debug, thiserror::Error)]
pub enum WitnessError {
    /// A name that cannot be part of a file name.
    #[error(
        "{name:?} cannot be used as a name: 1 to {NAME_BYTES_MAX} letters, digits, '-', '_' or '.', not starting with '.'"
    )]
    Name {
        /// The name.
        name: String,
    },
    /// There is no such directory.
    #[error(
        "the witness directory {path} does not exist; mount the share that holds it, or make it once, on the share: mkdir -p {path}"
    )]
    Missing {
        /// The directory.
        path: PathBuf,
    },
    /// Another directory than the one this node knows.
    #[error(
        "{path} is not the witness directory that this pair has used ({found}, expected {known}); is the share mounted?"
    )]
    Another {
        /// The directory.
        path: PathBuf,
        /// The mark this node knows.
        known: String,
        /// What is there instead.
        found: String,
    },
    /// A file of the witness that no node can have written.
    #[error("the witness file {path} is damaged; find out which host owns that term before removing it")]
    Damaged {
        /// The file.
        path: PathBuf,
    },
    /// The file system does not answer as it should.
    #[error("the witness {path} is unreachable")]
    Unreachable {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// One node's access to the witness of one pair.
#[derive(Clone, Debug)]
pub struct DirectoryWitness {
    dir: PathBuf,
    pair: String,
    node: String,
    mark: String,
}

impl DirectoryWitness {
    /// Opens the witness directory for a pair. `known` is the mark from this node's durable record; without it the
    /// directory's mark is taken as it is, and made if there is none.
    ///
    /// The two nodes of a pair must have different names, and must compare their marks when they meet.
    ///
    /// # Errors
    /// See [`WitnessError`].
    pub fn open(dir: impl AsRef<Path>, pair: &str, node: &str, known: Option<&str>) -> Result<Self, WitnessError> {
        let dir = dir.as_ref().to_path_buf();
        for name in [pair, node] {
            check_name(name)?;
        }
        match std::fs::metadata(&dir) {
            Ok(metadata) if metadata.is_dir() => {}
            Ok(_) => return Err(WitnessError::Missing { path: dir }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(WitnessError::Missing { path: dir }),
            Err(source) => return Err(WitnessError::Unreachable { path: dir, source }),
        }
        let mut witness = Self {
            dir,
            pair: pair.into(),
            node: node.into(),
            mark: String::new(),
        };
        let path = witness.dir.join("tandem-witness");
        witness.mark = match (witness.read_owner(&path)?, known) {
            (Some(found), Some(known)) if found == known => found,
            (found, Some(known)) => {
                let found = found.unwrap_or_else(|| "no mark".into());
                return Err(WitnessError::Another {
                    path: witness.dir,
                    known: known.into(),
                    found,
                });
            }
            (Some(found), None) => found,
            (None, None) => {
                witness.link_new(&path, &random_mark()?)?;
                witness.read_owner(&path)?.ok_or(WitnessError::Damaged { path })?
            }
        };
        Ok(witness)
    }

    /// Returns the directory's mark: to be kept in the durable record and compared with the peer's.
    #[must_use]
    pub fn mark(&self) -> &str {
        &self.mark
    }

    /// Contends for a term. May be repeated after an error; a term that was won stays won.
    ///
    /// # Errors
    /// If there is no certain answer.
    pub fn claim(&self, term: Generation) -> Result<Claim, WitnessError> {
        self.check_mark()?;
        if let Some(lost) = self.lost_already(term)? {
            return Ok(lost);
        }
        let path = self.term_path(term.0);
        self.link_new(&path, &self.node)?;
        let owner = self
            .read_owner(&path)?
            .ok_or_else(|| WitnessError::Damaged { path: path.clone() })?;
        if owner != self.node {
            return Ok(Claim::LostTo(owner));
        }
        // Also for a link found from before: it may not have been durable yet.
        beside::sync_parent(&path).map_err(|source| WitnessError::Unreachable { path, source })?;
        Ok(self.lost_already(term)?.unwrap_or(Claim::Won))
    }

    /// Returns the latest term that anyone has won, and its owner.
    ///
    /// # Errors
    /// If there is no certain answer.
    pub fn latest(&self) -> Result<Option<(Generation, String)>, WitnessError> {
        self.check_mark()?;
        let Some(term) = self.terms()?.into_iter().max() else {
            return Ok(None);
        };
        let path = self.term_path(term);
        let owner = self.read_owner(&path)?.ok_or(WitnessError::Damaged { path })?;
        Ok(Some((Generation(term), owner)))
    }

    /// Removes the pair's terms that are far below the latest.
    ///
    /// # Errors
    /// If the directory cannot be read or a file cannot be removed.
    pub fn prune(&self) -> Result<(), WitnessError> {
        self.check_mark()?;
        let terms = self.terms()?;
        let latest = terms.iter().copied().max().unwrap_or(0);
        for term in terms
            .into_iter()
            .filter(|term| *term < latest.saturating_sub(TERMS_KEPT))
        {
            let path = self.term_path(term);
            match std::fs::remove_file(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(WitnessError::Unreachable { path, source });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// A share that went away leaves the empty directory under its mount point: no answer is better than that one's.
    fn check_mark(&self) -> Result<(), WitnessError> {
        let path = self.dir.join("tandem-witness");
        match self.read_owner(&path)? {
            Some(found) if found == self.mark => Ok(()),
            found => Err(WitnessError::Another {
                path: self.dir.clone(),
                known: self.mark.clone(),
                found: found.unwrap_or_else(|| "no mark".into()),
            }),
        }
    }

    /// Returns who has a later term, if another node does, or if this node does and so may not go back.
    fn lost_already(&self, term: Generation) -> Result<Option<Claim>, WitnessError> {
        Ok(self
            .latest()?
            .filter(|(latest, _)| *latest > term)
            .map(|(_, owner)| Claim::LostTo(owner)))
    }

    fn term_path(&self, term: u64) -> PathBuf {
        self.dir.join(format!("{}.term-{term}", self.pair))
    }

    fn terms(&self) -> Result<Vec<u64>, WitnessError> {
        let unreachable = |source| WitnessError::Unreachable {
            path: self.dir.clone(),
            source,
        };
        let prefix = format!("{}.term-", self.pair);
        let mut terms = Vec::new();
        for (count, entry) in std::fs::read_dir(&self.dir).map_err(unreachable)?.enumerate() {
            if count >= ENTRIES_MAX {
                return Err(unreachable(io::Error::other(format!(
                    "more than {ENTRIES_MAX} files in it"
                ))));
            }
            let name = entry.map_err(unreachable)?.file_name();
            let term = name.to_str().and_then(|name| name.strip_prefix(&prefix));
            // Only the one spelling that `term_path` makes: no sign, no leading zeros.
            terms.extend(term.and_then(|term| term.parse::<u64>().ok().filter(|number| number.to_string() == term)));
        }
        Ok(terms)
    }

    /// Makes `path` with this content unless it exists. Whose it is then, the caller reads: an answer can get lost.
    fn link_new(&self, path: &Path, name: &str) -> Result<(), WitnessError> {
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let claim = format!("{}.claim-{}-{}-{serial}", self.pair, self.node, std::process::id());
        let temporary = self.dir.join(claim);
        let linked = (|| {
            // A file of that name can only be a leftover of this node: process numbers come round again.
            let mut file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o644)
                .open(&temporary)?;
            file.write_all(encode(name).as_bytes())?;
            file.sync_all()?;
            match std::fs::hard_link(&temporary, path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
                other => other,
            }
        })();
        let removed = std::fs::remove_file(&temporary);
        linked
            .and(removed)
            .and_then(|()| beside::sync_parent(path))
            .map_err(|source| match source.kind() {
                io::ErrorKind::NotFound => WitnessError::Missing { path: self.dir.clone() },
                _ => WitnessError::Unreachable {
                    path: path.into(),
                    source,
                },
            })
    }

    fn read_owner(&self, path: &Path) -> Result<Option<String>, WitnessError> {
        match beside::read(path, FILE_BYTES_MAX) {
            Ok(None) => Ok(None),
            Ok(Some(bytes)) => decode(&bytes)
                .map(Some)
                .ok_or_else(|| WitnessError::Damaged { path: path.into() }),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                Err(WitnessError::Damaged { path: path.into() })
            }
            Err(source) => Err(WitnessError::Unreachable {
                path: path.into(),
                source,
            }),
        }
    }
}

fn check_name(name: &str) -> Result<(), WitnessError> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if name.is_empty() || name.len() > NAME_BYTES_MAX || name.starts_with('.') || !name.bytes().all(good) {
        return Err(WitnessError::Name { name: name.into() });
    }
    Ok(())
}

fn encode(name: &str) -> String {
    format!(
        "tandem-witness 1 crc32={:08x}\n{name}\n",
        crc32fast::hash(name.as_bytes())
    )
}

fn decode(bytes: &[u8]) -> Option<String> {
    let name = str::from_utf8(bytes).ok()?.split_once('\n')?.1.strip_suffix('\n')?;
    check_name(name).ok()?;
    (encode(name).as_bytes() == bytes).then(|| name.to_owned())
}

fn random_mark() -> Result<String, WitnessError> {
    let path = Path::new("/dev/urandom");
    let mut random = [0; 16];
    std::fs::File::open(path)
        .and_then(|mut file| file.read_exact(&mut random))
        .map_err(|source| WitnessError::Unreachable {
            path: path.into(),
            source,
        })?;
    Ok(random.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;

    fn open(dir: &Path, node: &str) -> DirectoryWitness {
        DirectoryWitness::open(dir, "shop", node, None).unwrap()
    }

    #[test]
    fn case_11_one_winner_for_each_term() {
        let dir = tempfile::tempdir().unwrap();
        let names: Vec<String> = (0..8).map(|number| format!("node-{number}")).collect();
        let barrier = Barrier::new(names.len());
        let claims: Vec<Vec<Result<Claim, WitnessError>>> = std::thread::scope(|scope| {
            let contend = |name: &String| {
                let name = name.clone();
                let barrier = &barrier;
                let dir = dir.path();
                scope.spawn(move || {
                    let witness = open(dir, &name);
                    (1..=20)
                        .map(|term| {
                            barrier.wait();
                            // No panic here: the others would wait at the barrier for ever.
                            witness.claim(Generation(term))
                        })
                        .collect()
                })
            };
            let threads: Vec<_> = names.iter().map(contend).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for term in 1..=20 {
            let answers: Vec<&Claim> = claims.iter().map(|node| node[term - 1].as_ref().unwrap()).collect();
            let winner = answers
                .iter()
                .position(|answer| **answer == Claim::Won)
                .expect("someone wins");
            for (node, answer) in answers.into_iter().enumerate() {
                let expected = if node == winner {
                    Claim::Won
                } else {
                    Claim::LostTo(names[winner].clone())
                };
                assert_eq!(*answer, expected, "term {term}, node {node}");
            }
        }
        assert!(
            std::fs::read_dir(dir.path()).unwrap().count() <= 21,
            "no temporary files are left"
        );
    }

    #[test]
    fn case_13_a_term_once_won_stays_won_and_never_goes_back() {
        let dir = tempfile::tempdir().unwrap();
        let (left, right) = (open(dir.path(), "left"), open(dir.path(), "right"));
        assert_eq!(left.latest().unwrap(), None);
        assert_eq!(left.claim(Generation(1)).unwrap(), Claim::Won);
        assert_eq!(right.claim(Generation(1)).unwrap(), Claim::LostTo("left".into()));
        assert_eq!(
            open(dir.path(), "left").claim(Generation(1)).unwrap(),
            Claim::Won,
            "after a restart"
        );
        assert_eq!(right.claim(Generation(2)).unwrap(), Claim::Won);
        assert_eq!(
            left.claim(Generation(1)).unwrap(),
            Claim::LostTo("right".into()),
            "its time is over"
        );
        assert_eq!(left.latest().unwrap(), Some((Generation(2), "right".into())));
    }

    #[test]
    fn pairs_share_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        let shop = open(dir.path(), "left");
        let bank = DirectoryWitness::open(dir.path(), "shop.term-7", "right", None).unwrap();
        assert_eq!(bank.claim(Generation(9)).unwrap(), Claim::Won);
        assert_eq!(shop.latest().unwrap(), None);
        assert_eq!(shop.claim(Generation(1)).unwrap(), Claim::Won);
    }

    #[test]
    fn case_12_a_directory_that_is_not_the_witness_gives_no_answer() {
        let dir = tempfile::tempdir().unwrap();
        let share = dir.path().join("share");
        let missing = DirectoryWitness::open(&share, "shop", "left", None)
            .unwrap_err()
            .to_string();
        assert!(missing.contains("mkdir -p"), "{missing}");
        std::fs::create_dir(&share).unwrap();
        let left = open(&share, "left");
        assert_eq!(open(&share, "right").mark(), left.mark());
        // The share is unmounted: the mount point is an empty directory.
        std::fs::rename(&share, dir.path().join("away")).unwrap();
        std::fs::create_dir(&share).unwrap();
        assert!(matches!(left.claim(Generation(1)), Err(WitnessError::Another { .. })));
        assert!(matches!(left.latest(), Err(WitnessError::Another { .. })));
        let known = DirectoryWitness::open(&share, "shop", "left", Some(left.mark()));
        assert!(matches!(known, Err(WitnessError::Another { .. })));
        std::fs::remove_dir(&share).unwrap();
        left.claim(Generation(1)).unwrap_err();
        std::fs::rename(dir.path().join("away"), &share).unwrap();
        assert_eq!(left.claim(Generation(1)).unwrap(), Claim::Won);
    }

    #[test]
    fn hostile_files_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let left = open(dir.path(), "left");
        let term = dir.path().join("shop.term-3");
        for content in [
            "",
            "left\n",
            "tandem-witness 1 crc32=00000000\nleft\n",
            &"x".repeat(4096),
        ] {
            std::fs::write(&term, content).unwrap();
            assert!(
                matches!(left.latest(), Err(WitnessError::Damaged { .. })),
                "{content:.20}"
            );
            assert!(matches!(left.claim(Generation(3)), Err(WitnessError::Damaged { .. })));
        }
        std::fs::remove_file(&term).unwrap();
        std::fs::create_dir(&term).unwrap();
        assert!(matches!(left.latest(), Err(WitnessError::Damaged { .. })));
        std::fs::remove_dir(&term).unwrap();
        for name in [
            "shop.term-",
            "shop.term-+4",
            "shop.term-04",
            "shop.term-99999999999999999999",
            "shop.term-x",
        ] {
            std::fs::write(dir.path().join(name), "?").unwrap();
        }
        assert_eq!(left.latest().unwrap(), None);
        for name in ["", ".x", "a/b", "a b", "ä", &"x".repeat(65)] {
            assert!(matches!(
                DirectoryWitness::open(dir.path(), name, "left", None),
                Err(WitnessError::Name { .. })
            ));
            assert!(matches!(
                DirectoryWitness::open(dir.path(), "shop", name, None),
                Err(WitnessError::Name { .. })
            ));
        }
    }

    #[test]
    fn old_terms_are_pruned_far_below_the_latest_only() {
        let dir = tempfile::tempdir().unwrap();
        let left = open(dir.path(), "left");
        for term in [1, 2, 36, 37, 100] {
            assert_eq!(left.claim(Generation(term)).unwrap(), Claim::Won);
        }
        left.prune().unwrap();
        let mut terms = left.terms().unwrap();
        terms.sort_unstable();
        assert_eq!(terms, [36, 37, 100]);
        assert_eq!(left.claim(Generation(1)).unwrap(), Claim::LostTo("left".into()));
    }
}
