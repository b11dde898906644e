//! `tandem capture`: writes what a primary sees of the guests' output to a file for Wireshark, until it is to end.
//!
//! The primary sends pcapng; here it is cut between two blocks, so that the file is valid whenever this process ends.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use link::control::{self, ControlError};
use link::pcapng::{BLOCK_BYTES_MIN, PACKET};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep_until};

use crate::args::CaptureOptions;
use crate::operator::{OperatorError, find};

/// No block is longer: a jumbo frame and a comment.
const BLOCK_BYTES_MAX: usize = 1024 * 1024;
/// What the end of a capture takes in the file.
const END_BYTES: u64 = 8 * 1024;
/// How long the primary may take to send the end of a capture.
const END_LIMIT: Duration = Duration::from_secs(5);
/// As good as never.
const EVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// Why a capture failed.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The primary could not be asked, or refused.
    #[error(transparent)]
    Operator(#[from] OperatorError),
    /// The file can't be written.
    #[error("can't write {}: choose another --out where there is room, and that you may write to", path.display())]
    Write {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The primary is gone, or sends what is no capture.
    #[error("the capture broke off; what is in {} until then is valid", path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The host refuses what every process needs.
    #[error("can't wait for the capture")]
    Host(#[source] io::Error),
}

/// Captures until Ctrl-C, or what else the options set.
///
/// # Errors
/// Fails if there is no primary, if it refuses, if the file can't be written, or if the connection breaks.
pub fn capture(options: &CaptureOptions) -> Result<(), CaptureError> {
    let socket = find(&options.control)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(CaptureError::Host)?;
    let written = runtime.block_on(run(&socket, options))?;
    eprintln!(
        "{} packets, {} bytes in {}; its statistics say what is missing",
        written.packets,
        written.bytes,
        options.out.display()
    );
    Ok(())
}

async fn run(socket: &Path, options: &CaptureOptions) -> Result<Written, CaptureError> {
    let control = |error: ControlError| CaptureError::Operator(error.into());
    let stream = control::capture(socket).await.map_err(control)?;
    let path = options.out.clone();
    let write = |source| CaptureError::Write {
        path: path.clone(),
        source,
    };
    let file: Box<dyn Write> = if path == Path::new("-") {
        Box::new(io::stdout())
    } else {
        Box::new(File::create(&path).map_err(write)?)
    };
    let mut written = Written {
        file,
        most: options.most.map_or(u64::MAX, |most| most.0),
        bytes: 0,
        packets: 0,
        is_full: false,
    };
    eprintln!("capturing; Ctrl-C ends it");
    let deadline = Instant::now() + options.seconds.map_or(EVER, Duration::from_secs);
    follow(stream, deadline, &mut written)
        .await
        .map_err(|failed| match failed {
            Failed::Write(source) => write(source),
            Failed::Read(source) => CaptureError::Broken {
                path: path.clone(),
                source,
            },
        })?;
    Ok(written)
}

#[derive(Debug)]
enum Failed {
    Read(io::Error),
    Write(io::Error),
}

/// Takes blocks until the primary has sent the last, which it is asked for at the deadline, at a signal, or when the file is full.
async fn follow(mut stream: UnixStream, deadline: Instant, written: &mut Written) -> Result<(), Failed> {
    let mut interrupted = signal(SignalKind::interrupt()).map_err(Failed::Read)?;
    let mut terminated = signal(SignalKind::terminate()).map_err(Failed::Read)?;
    let (mut reader, mut writer) = stream.split();
    let mut arrived = Vec::new();
    let mut ending = false;
    let mut by = deadline;
    loop {
        tokio::select! {
            count = reader.read_buf(&mut arrived) => {
                if count.map_err(Failed::Read)? == 0 {
                    return written.end(&arrived);
                }
                let taken = written.take(&arrived)?;
                arrived.drain(..taken);
                if ending || !written.is_full {
                    continue;
                }
            }
            Some(()) = interrupted.recv(), if !ending => {}
            Some(()) = terminated.recv(), if !ending => {}
            () = sleep_until(by) => {
                if ending {
                    return Err(Failed::Read(io::ErrorKind::TimedOut.into()));
                }
            }
        }
        ending = true;
        by = Instant::now() + END_LIMIT;
        writer.shutdown().await.map_err(Failed::Read)?;
    }
}

/// The file, and what is in it.
struct Written {
    file: Box<dyn Write>,
    most: u64,
    bytes: u64,
    packets: u64,
    is_full: bool,
}

impl Written {
    /// Writes the whole blocks of what has arrived, and returns their length. Packets for which there is no room are left out.
    fn take(&mut self, arrived: &[u8]) -> Result<usize, Failed> {
        let mut rest = arrived;
        while let Some(length) = block_length(rest).map_err(Failed::Read)? {
            let (block, after) = rest.split_at(length);
            let is_packet = block.starts_with(&PACKET.to_le_bytes());
            self.is_full |= is_packet && self.bytes + length as u64 + END_BYTES > self.most;
            if !(is_packet && self.is_full) {
                self.file.write_all(block).map_err(Failed::Write)?;
                self.bytes += length as u64;
                self.packets += u64::from(is_packet);
            }
            rest = after;
        }
        self.file.flush().map_err(Failed::Write)?;
        Ok(arrived.len() - rest.len())
    }

    fn end(&mut self, rest: &[u8]) -> Result<(), Failed> {
        if rest.is_empty() {
            Ok(())
        } else {
            Err(Failed::Read(io::ErrorKind::UnexpectedEof.into()))
        }
    }
}

/// Returns the length of the first block if all of it is there.
fn block_length(bytes: &[u8]) -> io::Result<Option<usize>> {
    let Some(length) = bytes.get(4..8) else { return Ok(None) };
    let length = u32::from_le_bytes([length[0], length[1], length[2], length[3]]) as usize;
    if !(BLOCK_BYTES_MIN..=BLOCK_BYTES_MAX).contains(&length) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "this is no pcapng"));
    }
    Ok((bytes.len() >= length).then_some(length))
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use link::pcapng;

    use super::*;

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn written(most: u64) -> (Written, Shared) {
        let file = Shared::default();
        let written = Written {
            file: Box::new(file.clone()),
            most,
            bytes: 0,
            packets: 0,
            is_full: false,
        };
        (written, file)
    }

    fn packet(out: &mut Vec<u8>) {
        let packet = pcapng::Packet {
            interface: 0,
            time: 1,
            frame: &[7; 1_000],
            comment: "why",
            lost: 0,
        };
        pcapng::packet(out, &packet);
    }

    #[test]
    fn whole_blocks_are_written_whatever_pieces_they_come_in() {
        let mut bytes = Vec::new();
        pcapng::section(&mut bytes, "test");
        (0..5).for_each(|_| packet(&mut bytes));
        for piece in [1, 7, 100, 10_000] {
            let (mut written, file) = written(u64::MAX);
            let mut arrived = Vec::new();
            for part in bytes.chunks(piece) {
                arrived.extend(part);
                let taken = written.take(&arrived).unwrap();
                arrived.drain(..taken);
            }
            assert!(written.end(&arrived).is_ok());
            assert_eq!((written.packets, *file.0.lock().unwrap() == bytes), (5, true));
        }
    }

    #[test]
    fn a_full_file_takes_the_end_and_no_packet() {
        let mut bytes = Vec::new();
        pcapng::section(&mut bytes, "test");
        (0..3).for_each(|_| packet(&mut bytes));
        let most = bytes.len() as u64 + END_BYTES + 1_000;
        (3..10).for_each(|_| packet(&mut bytes));
        pcapng::statistics(&mut bytes, 0, 1, 10, 0, "the end");
        let (mut written, file) = written(most);
        written.take(&bytes).unwrap();
        let file = file.0.lock().unwrap();
        assert!(written.is_full && written.packets == 3 && file.len() as u64 <= most);
        assert!(String::from_utf8_lossy(&file).contains("the end"));
    }

    #[test]
    fn what_is_no_capture_is_an_error() {
        let (mut written, _) = written(u64::MAX);
        assert!(matches!(written.take(&[0xff; 64]), Err(Failed::Read(_))));
        assert!(matches!(written.end(&[1]), Err(Failed::Read(_))));
    }
}
