//! Frames in a file that Wireshark reads, in the old format: time and bytes are all that is wanted of it.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use checkpoint::Instant;

const MAGIC_NANOSECONDS: u32 = 0xa1b2_3c4d;
const ETHERNET: u32 = 1;
const SECOND: u64 = 1_000_000_000;

/// An open capture.
pub(crate) struct Capture(BufWriter<File>);

impl Capture {
    /// Makes the file.
    pub(crate) fn new(path: &Path) -> io::Result<Self> {
        let mut file = BufWriter::new(File::create(path)?);
        let snapshot = u32::try_from(checkpoint::limits::FRAME_BYTES_MAX).map_err(io::Error::other)?;
        let version = 2 | (4 << 16);
        for word in [MAGIC_NANOSECONDS, version, 0, 0, snapshot, ETHERNET] {
            file.write_all(&word.to_le_bytes())?;
        }
        Ok(Self(file))
    }

    /// Adds a frame.
    pub(crate) fn write(&mut self, at: Instant, frame: &[u8]) -> io::Result<()> {
        let length = frame.len() as u64;
        for number in [at.0 / SECOND, at.0 % SECOND, length, length] {
            let word = u32::try_from(number).map_err(io::Error::other)?;
            self.0.write_all(&word.to_le_bytes())?;
        }
        self.0.write_all(frame)
    }
}
