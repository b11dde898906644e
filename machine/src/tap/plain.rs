//! A TAP device that hands over and takes complete frames, as they are on a wire.
//!
//! The crate behind it can't attach to a device that was made for several queues, hence the second way.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};

use tun_tap::{Iface, Mode};

use super::vnet::attach;

/// An attached device.
#[derive(Debug)]
pub(super) enum Plain {
    /// One that was made for one queue.
    Single(Iface),
    /// One of the queues of one that was made for several.
    Several(File),
}

impl Plain {
    /// Attaches to the TAP device `name`, which was made for several queues or for one; returns the name that it has.
    pub(super) fn open(name: &str, several: bool) -> io::Result<(String, Self)> {
        if several {
            let (name, file) = attach(name, libc::IFF_MULTI_QUEUE)?;
            return Ok((name, Self::Several(file)));
        }
        let iface = Iface::without_packet_info(name, Mode::Tap)?;
        iface.set_non_blocking()?;
        let name = iface.name().to_owned();
        Ok((name, Self::Single(iface)))
    }

    /// Takes the next frame and returns its length. A longer one than there is room for is cut.
    pub(super) fn recv(&self, frame: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Single(iface) => iface.recv(frame),
            Self::Several(file) => { file }.read(frame),
        }
    }

    /// Sends a frame.
    pub(super) fn send(&self, frame: &[u8]) -> io::Result<usize> {
        match self {
            Self::Single(iface) => iface.send(frame),
            Self::Several(file) => { file }.write(frame),
        }
    }
}

impl AsRawFd for Plain {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Self::Single(iface) => iface.as_raw_fd(),
            Self::Several(file) => file.as_raw_fd(),
        }
    }
}
