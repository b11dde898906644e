//! A TAP device that hands over and takes frames with a header that says what is left to do.
//!
//! The crate behind plain TAPs can't open one, hence the system calls here.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use super::request;
use crate::offload::{HEADER_BYTES, Offloads};

const DEVICE: &str = "/dev/net/tun";

/// An attached device.
#[derive(Debug)]
pub(super) struct Vnet(File);

impl Vnet {
    /// Attaches to the TAP device `name`, which was made for several queues or for one; returns the name that it has.
    pub(super) fn open(name: &str, several: bool) -> io::Result<(String, Self)> {
        if !knows_headers(&open()?)? {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let several = if several { libc::IFF_MULTI_QUEUE } else { 0 };
        let (name, file) = attach(name, libc::IFF_VNET_HDR | several)?;
        let length = libc::c_int::try_from(HEADER_BYTES).map_err(io::Error::other)?;
        // SAFETY: TUNSETVNETHDRSZ reads one number, which is here and lives until the call returns.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const length) })?;
        Ok((name, Self(file)))
    }

    /// Takes the next frame and returns its length with the header. A longer one than there is room for is cut.
    pub(super) fn recv(&self, header: &mut [u8; HEADER_BYTES], bytes: &mut [u8]) -> io::Result<usize> {
        let length = (&self.0).read_vectored(&mut [IoSliceMut::new(header), IoSliceMut::new(bytes)])?;
        if length < HEADER_BYTES {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(length)
    }

    /// Sends a frame with its header.
    pub(super) fn send(&self, frame: &[u8]) -> io::Result<usize> {
        (&self.0).write(frame)
    }
}

impl AsRawFd for Vnet {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Attaches to the TAP device `name` with these flags besides those that all have; returns the name that it has.
pub(super) fn attach(name: &str, flags: libc::c_int) -> io::Result<(String, File)> {
    let file = open()?;
    let mut request = request(name);
    request.ifr_ifru.ifru_flags = all_flags(flags);
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which is here and lives until the call returns.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    let name = request.ifr_name.iter().map(|byte| byte.cast_unsigned());
    let name = name.take_while(|byte| *byte != 0).map(char::from).collect();
    Ok((name, file))
}

/// Says whether the kernel knows such headers.
fn knows_headers(file: &File) -> io::Result<bool> {
    let mut features: libc::c_uint = 0;
    // SAFETY: TUNGETFEATURES writes one number, which is here and lives until the call returns.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNGETFEATURES, &raw mut features) })?;
    Ok(features & libc::IFF_VNET_HDR.cast_unsigned() != 0)
}

/// Has the kernel leave this much to do of the frames that it hands over.
pub(super) fn set_offloads(tap: &impl AsRawFd, offloads: Offloads) -> io::Result<()> {
    let flags = [
        (offloads.checksum, libc::TUN_F_CSUM),
        (offloads.tcp4, libc::TUN_F_TSO4),
        (offloads.tcp6, libc::TUN_F_TSO6),
        (offloads.congestion, libc::TUN_F_TSO_ECN),
    ];
    let flags = flags
        .iter()
        .filter(|(wanted, _)| *wanted)
        .fold(0, |flags, (_, flag)| flags | flag);
    // SAFETY: TUNSETOFFLOAD takes a number and touches no memory of ours.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) })
}

fn open() -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(DEVICE)
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "the flags lie in the low 16 bits, as the kernel's field has"
)]
fn all_flags(flags: libc::c_int) -> libc::c_short {
    (libc::IFF_TAP | libc::IFF_NO_PI | flags) as libc::c_short
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
