//! Disk images: the trait that the rest of the crate writes to, and the raw file behind it.
//!
//! A [`FileImage`] is locked for as long as it is open: two processes on one image would destroy it. Once a flush
//! has failed, every later flush fails as well, because the kernel reports a lost write only once.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use checkpoint::wire::Written;
use rustix::fs::{FallocateFlags, FlockOperation, SeekFrom};
use rustix::io::Errno;

use crate::sectors::to_usize;

/// The unit of every disk access, in bytes.
pub const SECTOR_BYTES: u64 = SECTOR as u64;
pub(crate) const SECTOR: usize = 512;

/// Free space that must stay on a file system that cannot reserve, in bytes.
const SPACE_MARGIN: u64 = 16 * 1024 * 1024;

/// A disk of fixed size. Reads see every earlier write; only [`flush`](Self::flush) makes them durable.
pub trait Image: Send + Sync {
    /// Returns the size in bytes.
    fn size(&self) -> u64;
    /// Fills `buf` from the bytes at `offset`.
    ///
    /// # Errors
    /// If the range is outside the image or the medium fails.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
    /// Writes `data` at `offset`. Not durable yet.
    ///
    /// # Errors
    /// If the range is outside the image or the medium fails; some of the data may have been written.
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Makes every earlier write durable.
    ///
    /// # Errors
    /// If any earlier write may have been lost. It may then be lost for good: trying again proves nothing.
    fn flush(&self) -> io::Result<()>;
    /// Makes sure that a later write to this range cannot fail for lack of space. Changes no content.
    ///
    /// # Errors
    /// If there is no room (`StorageFull`) or the medium fails.
    fn reserve(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Makes a range zeros. Not durable yet.
    ///
    /// # Errors
    /// If the range is outside the image or the medium fails; some of it may have become zeros.
    fn zero(&self, offset: u64, len: u64, room: Room) -> io::Result<()>;
}

/// What becomes of the room on the host of what becomes zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// A later write to the range can't fail for lack of space, if it could not before.
    Keep,
    /// It goes back to the host's file system, if that can take it.
    GiveBack,
}

/// Makes a write that was mirrored, in an image that has no replica before it. Not durable yet.
///
/// # Errors
/// As those of the image.
pub fn put<I: Image + ?Sized>(image: &I, offset: u64, written: &Written) -> io::Result<()> {
    match written {
        Written::Data(data) => image.write_at(offset, data),
        Written::Zeros(len) => image.zero(offset, *len, Room::GiveBack),
    }
}

impl<I: Image + ?Sized> Image for Arc<I> {
    fn size(&self) -> u64 {
        (**self).size()
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        (**self).read_at(offset, buf)
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        (**self).write_at(offset, data)
    }
    fn flush(&self) -> io::Result<()> {
        (**self).flush()
    }
    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        (**self).reserve(offset, len)
    }
    fn zero(&self, offset: u64, len: u64, room: Room) -> io::Result<()> {
        (**self).zero(offset, len, room)
    }
}

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// There is no such file.
    #[error("there is no disk image {path}; make an empty one with: truncate -s 1G {path}")]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// The file may not be opened for reading and writing.
    #[error("no permission to read and write {path}; run as its owner, or: chmod u+rw {path}")]
    Permission {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A directory, device, socket or pipe.
    #[error("{path} is {kind}; a disk image must be a regular file (raw format), made with: truncate -s 1G FILE")]
    NotAFile {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        kind: &'static str,
    },
    /// A file of no bytes.
    #[error("the disk image {path} is empty; give it a size with: truncate -s 1G {path}")]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A size that no disk has.
    #[error(
        "the disk image {path} has {size} bytes, not a multiple of 512; round it up with: truncate -s %512 {path} \
         (an image in another format, such as qcow2, must be converted: qemu-img convert -O raw)"
    )]
    Ragged {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// Another process has the image open.
    #[error("{path} is in use by {}; stop that process first, or use another image", holder(.pid))]
    Locked {
        /// The file.
        path: PathBuf,
        /// The process that holds the lock, if the system tells.
        pid: Option<u32>,
    },
    /// There is no room for the file beside the image.
    #[error("no room for {bytes} bytes in {path}; free some space on that file system")]
    NoSpace {
        /// The file.
        path: PathBuf,
        /// Bytes it needs.
        bytes: u64,
        /// What the system said.
        source: io::Error,
    },
    /// Anything else that the system refused.
    #[error("cannot use {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// A raw image in a file, locked while open.
#[derive(Debug)]
pub struct FileImage {
    file: File,
    path: PathBuf,
    size: u64,
    flush_failed: AtomicBool,
}

/// A file that was made for something that has not begun: removed with this, unless it is kept.
#[derive(Debug)]
#[must_use]
pub struct NewFile(Option<PathBuf>);

impl NewFile {
    /// It has begun: the file stays.
    pub fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(path) = self.0.take() {
            // What is left of it does no harm.
            let _ = std::fs::remove_file(path);
        }
    }
}

impl FileImage {
    /// Opens an existing image and locks it.
    ///
    /// # Errors
    /// See [`ImageError`]; each names the cure.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, ImageError> {
        let path = path.as_ref();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            // A FIFO would otherwise block here for ever.
            .custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed())
            .open(path)
            .map_err(|source| open_error(path, source))?;
        let image = Self::lock(file, path)?;
        if image.size == 0 {
            return Err(ImageError::Empty { path: path.into() });
        }
        if !image.size.is_multiple_of(SECTOR_BYTES) {
            return Err(ImageError::Ragged {
                path: path.into(),
                size: image.size,
            });
        }
        Ok(image)
    }

    /// Opens the journal at `path`, or makes one, with room for batches of `batch` bytes that can be filled without
    /// asking for more space. Whether it was made now is known by what comes with it.
    ///
    /// # Errors
    /// If another process has it, or there is no room.
    pub fn open_journal(path: impl AsRef<Path>, batch: u64) -> Result<(Self, Option<NewFile>), ImageError> {
        let path = path.as_ref();
        let open = |new| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .create_new(new)
                .mode(0o600)
                .custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed())
                .open(path)
        };
        let (file, new) = match open(true) {
            Ok(file) => (Ok(file), Some(NewFile(Some(path.into())))),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => (open(false), None),
            Err(error) => (Err(error), None),
        };
        let file = file.map_err(|source| open_error(path, source))?;
        let mut image = Self::lock(file, path)?;
        let bytes = crate::journal::size_for(batch).max(image.size);
        let grown = (|| {
            reserve(&image.file, 0, bytes)?;
            image.file.set_len(bytes)?;
            image.file.sync_all()?;
            crate::beside::sync_parent(path)
        })();
        grown.map_err(|source| match source.kind() {
            io::ErrorKind::StorageFull => ImageError::NoSpace {
                path: path.into(),
                bytes,
                source,
            },
            _ => ImageError::Io {
                path: path.into(),
                source,
            },
        })?;
        image.size = bytes;
        Ok((image, new))
    }

    /// Returns the path it was opened with.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn lock(file: File, path: &Path) -> Result<Self, ImageError> {
        let metadata = file.metadata().map_err(|source| ImageError::Io {
            path: path.into(),
            source,
        })?;
        if !metadata.is_file() {
            return Err(ImageError::NotAFile {
                path: path.into(),
                kind: kind_of(metadata.file_type()),
            });
        }
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let pid = std::fs::read_to_string("/proc/locks")
                    .ok()
                    .and_then(|locks| lock_holder(&locks, metadata.dev(), metadata.ino()));
                return Err(ImageError::Locked { path: path.into(), pid });
            }
            Err(errno) => {
                return Err(ImageError::Io {
                    path: path.into(),
                    source: errno.into(),
                });
            }
        }
        Ok(Self {
            file,
            path: path.into(),
            size: metadata.len(),
            flush_failed: AtomicBool::new(false),
        })
    }

    fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "{len} bytes at {offset} are outside {} ({} bytes)",
                    self.path.display(),
                    self.size
                ),
            )),
        }
    }
}

impl Image for FileImage {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.check(offset, buf.len() as u64)?;
        self.file.read_exact_at(buf, offset)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.check(offset, data.len() as u64)?;
        self.file.write_all_at(data, offset)
    }

    fn flush(&self) -> io::Result<()> {
        if self.flush_failed.load(Ordering::Acquire) {
            return Err(io::Error::other(format!(
                "an earlier flush of {} failed",
                self.path.display()
            )));
        }
        self.file
            .sync_data()
            .inspect_err(|_| self.flush_failed.store(true, Ordering::Release))
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check(offset, len)?;
        reserve(&self.file, offset, len)
    }

    fn zero(&self, offset: u64, len: u64, room: Room) -> io::Result<()> {
        self.check(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let how = match room {
            Room::Keep => FallocateFlags::ZERO_RANGE,
            Room::GiveBack => FallocateFlags::PUNCH_HOLE,
        };
        match rustix::fs::fallocate(&self.file, how | FallocateFlags::KEEP_SIZE, offset, len) {
            Ok(()) => Ok(()),
            // A file system that can't, or has no room to note it: what is there can still be overwritten.
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NOSPC) => self.write_zeros(offset, offset + len, room),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl FileImage {
    /// Writes zeros; where room is not to be kept, over what is there only, or a discard would fill the file system.
    fn write_zeros(&self, mut at: u64, end: u64, room: Room) -> io::Result<()> {
        static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];
        while at < end {
            let mut stop = end;
            if room == Room::GiveBack {
                at = match rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
                    Ok(data) if data < end => data,
                    Ok(_) | Err(Errno::NXIO) => return Ok(()),
                    Err(errno) => return Err(errno.into()),
                };
                stop = end.min(rustix::fs::seek(&self.file, SeekFrom::Hole(at))?);
            }
            let piece = to_usize((stop - at).min(ZEROS.len() as u64));
            self.file.write_all_at(&ZEROS[..piece], at)?;
            at += piece as u64;
        }
        Ok(())
    }
}

fn reserve(file: &File, offset: u64, len: u64) -> io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    match rustix::fs::fallocate(file, FallocateFlags::empty(), offset, len) {
        Ok(()) => Ok(()),
        // Such a file system gives no promise; the best there is is not to start when it is nearly full.
        Err(Errno::OPNOTSUPP) => {
            let free = rustix::fs::fstatvfs(file)?;
            if free.f_bavail.saturating_mul(free.f_frsize) < len.saturating_add(SPACE_MARGIN) {
                return Err(io::ErrorKind::StorageFull.into());
            }
            Ok(())
        }
        Err(errno) => Err(errno.into()),
    }
}

fn open_error(path: &Path, source: io::Error) -> ImageError {
    let path = path.to_path_buf();
    match source.kind() {
        io::ErrorKind::NotFound => ImageError::Missing { path },
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => ImageError::Permission { path, source },
        io::ErrorKind::IsADirectory => ImageError::NotAFile {
            path,
            kind: "a directory",
        },
        _ => ImageError::Io { path, source },
    }
}

fn kind_of(kind: std::fs::FileType) -> &'static str {
    use std::os::unix::fs::FileTypeExt;
    if kind.is_dir() {
        "a directory"
    } else if kind.is_block_device() {
        "a block device"
    } else if kind.is_char_device() {
        "a character device"
    } else if kind.is_fifo() {
        "a pipe"
    } else {
        "not a regular file"
    }
}

fn holder(pid: &Option<u32>) -> String {
    match pid {
        Some(pid) => format!("process {pid}"),
        None => "another process".into(),
    }
}

/// Finds the holder of a `flock` in the text of `/proc/locks`: `1: FLOCK  ADVISORY  WRITE 4711 fe:00:131 0 EOF`.
fn lock_holder(locks: &str, device: u64, inode: u64) -> Option<u32> {
    let file = format!(
        "{:02x}:{:02x}:{inode}",
        rustix::fs::major(device),
        rustix::fs::minor(device)
    );
    locks.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        match fields.as_slice() {
            [_, "FLOCK", _, _, pid, at, ..] if *at == file => pid.parse().ok().filter(|pid| *pid != 0),
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image_of(bytes: u64) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        File::create(&path).unwrap().set_len(bytes).unwrap();
        (dir, path)
    }

    #[test]
    fn what_was_written_is_read_back() {
        let (_dir, path) = image_of(8192);
        let image = FileImage::open(&path).unwrap();
        image.reserve(512, 1024).unwrap();
        image.write_at(512, &[7; 1024]).unwrap();
        image.flush().unwrap();
        let mut buf = [1; 2048];
        image.read_at(0, &mut buf).unwrap();
        assert_eq!(buf[..512], [0; 512]);
        assert_eq!(buf[512..1536], [7; 1024]);
        assert_eq!(buf[1536..], [0; 512]);
        assert_eq!(image.size(), 8192);
    }

    /// Blocks that the file has on the host, in bytes.
    fn room(path: &Path) -> u64 {
        std::fs::metadata(path).unwrap().blocks() * 512
    }

    #[test]
    fn a_discard_gives_room_back_and_zeros_can_keep_it() {
        const MIB: u64 = 1 << 20;
        let (_dir, path) = image_of(4 * MIB);
        let image = FileImage::open(&path).unwrap();
        image.write_at(0, &vec![7; to_usize(4 * MIB)]).unwrap();
        image.flush().unwrap();
        let before = room(&path);
        image.zero(MIB, MIB, Room::Keep).unwrap();
        image.flush().unwrap();
        assert!(room(&path) >= before);
        image.zero(512, MIB, Room::GiveBack).unwrap();
        image.zero(2 * MIB, 2 * MIB, Room::GiveBack).unwrap();
        image.flush().unwrap();
        assert!(room(&path) <= before - 2 * MIB, "{} of {before}", room(&path));
        let mut content = vec![1; to_usize(4 * MIB)];
        image.read_at(0, &mut content).unwrap();
        assert_eq!(content[..512], [7; 512]);
        assert!(crate::verify::is_zero(&content[512..]));
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 4 * MIB);
        image.zero(3 * MIB, 2 * MIB, Room::GiveBack).unwrap_err();
        image.zero(u64::MAX, 2, Room::Keep).unwrap_err();
        image.zero(4 * MIB, 0, Room::GiveBack).unwrap();
    }

    /// As on a file system that can neither punch nor zero.
    #[test]
    fn zeros_are_written_over_what_is_there_only() {
        let (_dir, path) = image_of(8 << 20);
        let image = FileImage::open(&path).unwrap();
        image.write_at(1 << 20, &[7; 200_704]).unwrap();
        image.flush().unwrap();
        let before = room(&path);
        image.write_zeros((1 << 20) + 512, 8 << 20, Room::GiveBack).unwrap();
        image.flush().unwrap();
        assert!(room(&path) <= before, "no hole is filled");
        let mut content = vec![1; 200_704];
        image.read_at(1 << 20, &mut content).unwrap();
        assert_eq!(content[..512], [7; 512]);
        assert!(crate::verify::is_zero(&content[512..]));
        image.write_zeros(4 << 20, 5 << 20, Room::Keep).unwrap();
        image.flush().unwrap();
        assert!(room(&path) >= before + (1 << 20));
    }

    #[test]
    fn nothing_is_read_or_written_outside() {
        let (_dir, path) = image_of(1024);
        let image = FileImage::open(&path).unwrap();
        assert_eq!(
            image.write_at(1024, &[0]).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
        assert_eq!(
            image.read_at(u64::MAX, &mut [0; 2]).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 1024);
    }

    #[test]
    fn each_wrong_file_is_named_with_its_cure() {
        let dir = tempfile::tempdir().unwrap();
        let missing = FileImage::open(dir.path().join("none.img")).unwrap_err();
        assert!(missing.to_string().contains("truncate -s 1G"), "{missing}");
        assert!(matches!(
            FileImage::open(dir.path()),
            Err(ImageError::NotAFile {
                kind: "a directory",
                ..
            })
        ));
        assert!(matches!(
            FileImage::open("/dev/null"),
            Err(ImageError::NotAFile {
                kind: "a character device",
                ..
            })
        ));
        let (_dir, path) = image_of(0);
        assert!(matches!(FileImage::open(&path), Err(ImageError::Empty { .. })));
        let (_dir, path) = image_of(1000);
        assert!(matches!(
            FileImage::open(&path),
            Err(ImageError::Ragged { size: 1000, .. })
        ));
    }

    #[test]
    fn case_37_a_second_opener_is_refused_and_told_who_has_it() {
        let (_dir, path) = image_of(1024);
        let first = FileImage::open(&path).unwrap();
        match FileImage::open(&path) {
            Err(ImageError::Locked { pid, .. }) => assert!(pid.is_none_or(|pid| pid == std::process::id())),
            other => panic!("{other:?}"),
        }
        drop(first);
        FileImage::open(&path).unwrap();
    }

    #[test]
    fn the_lock_table_is_read() {
        let locks = "1: POSIX  ADVISORY  WRITE 11 fe:00:131 0 EOF\n2: FLOCK  ADVISORY  WRITE 4711 fe:00:131 0 EOF\n";
        let device = rustix::fs::makedev(0xfe, 0);
        assert_eq!(lock_holder(locks, device, 131), Some(4711));
        assert_eq!(lock_holder(locks, device, 132), None);
        assert_eq!(lock_holder("garbage\n\n1:", device, 131), None);
    }

    #[test]
    fn a_journal_is_made_with_room_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img.journal");
        let size = {
            let (journal, new) = FileImage::open_journal(&path, 64 * 1024).unwrap();
            new.expect("it was made").keep();
            journal.write_at(0, &[9; 512]).unwrap();
            journal.size()
        };
        assert!(std::fs::metadata(&path).unwrap().blocks() * 512 >= size);
        let (journal, new) = FileImage::open_journal(&path, 4096).unwrap();
        assert!(new.is_none(), "it was there");
        assert_eq!(journal.size(), size, "never smaller than it was");
        let mut head = [0; 512];
        journal.read_at(0, &mut head).unwrap();
        assert_eq!(head, [9; 512]);
    }

    #[test]
    fn a_journal_that_nothing_has_begun_with_is_not_left_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img.journal");
        drop(FileImage::open_journal(&path, 4096).unwrap());
        assert!(!path.exists());
        let more_than_there_is = 1 << 60;
        assert!(FileImage::open_journal(&path, more_than_there_is).is_err());
        assert!(!path.exists());
    }
}
