//! A TAP device of the host, through which the machine's frames reach the world.
//!
//! The device must exist before; whoever sets the host up decides which bridge it belongs to. Opening
//! attaches to it, dropping detaches, and nothing else about it is changed. Each frame has the header of
//! [`crate::offload`] before it. With a plain TAP that is all zero: the kernel hands over complete frames, and takes no
//! others. One that was opened with offloads takes frames of which something is left to do, and hands over such as it is
//! told to. Never blocks.
//!
//! A device that was made with `multi_queue` is attached to by one of its queues, to which the kernel then brings all frames: one
//! thread moves a role's frames, and finds them no sooner in several places.

mod plain;
mod vnet;

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice};
use thiserror::Error;

use self::plain::Plain;
use self::vnet::Vnet;
use crate::offload::{HEADER_BYTES, Offloads};

/// The longest name the kernel takes.
pub const NAME_BYTES_MAX: usize = libc::IFNAMSIZ - 1;

/// How many frames [`Tap::drain`] throws away at most: more than any device queues.
const DRAIN_MAX: usize = 100_000;

/// Why a TAP device can't be used.
#[derive(Debug, Error)]
pub enum TapError {
    /// No interface can have that name.
    #[error(
        "`{name}` can't be the name of a TAP device: use 1 to {NAME_BYTES_MAX} printable characters without `/`, `:` and `%`"
    )]
    Name {
        /// The name.
        name: String,
    },
    /// There is no such interface in this network namespace.
    #[error(
        "the TAP device {name} does not exist here: create it with \
         `ip tuntap add dev {name} mode tap && ip link set {name} master <bridge> up`"
    )]
    Missing {
        /// The name.
        name: String,
    },
    /// The interface is something else.
    #[error("{name} exists, but is no TAP device: name another, or make one with `ip tuntap add dev <name> mode tap`")]
    Kind {
        /// The name.
        name: String,
    },
    /// Another process is attached.
    #[error("the TAP device {name} is in use by another process: stop that one, or use another device")]
    Busy {
        /// The name.
        name: String,
    },
    /// This process may not attach.
    #[error(
        "not permitted to use the TAP device {name}: run as root or with CAP_NET_ADMIN, \
         or create the device with `ip tuntap add dev {name} mode tap user $USER`"
    )]
    Permission {
        /// The name.
        name: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The kernel has no TAP devices.
    #[error("/dev/net/tun can't be opened: load the driver with `modprobe tun`, and let the container have the device")]
    Unsupported {
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The driver knows no headers before frames.
    #[error("this host's TAP devices know no offloads: say --tap {name},offloads=off on both hosts")]
    Offloads {
        /// The name.
        name: String,
    },
    /// The interface is switched off.
    #[error("the TAP device {name} is down: switch it on with `ip link set {name} up`")]
    Down {
        /// The name.
        name: String,
    },
    /// Anything else.
    #[error("the TAP device {name} can't be used")]
    Host {
        /// The name.
        name: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// An open TAP device.
#[derive(Debug)]
pub struct Tap {
    name: String,
    way: Way,
    /// Keeps others away from a device that has room for more than one process.
    _claim: Option<UnixDatagram>,
}

/// How it was opened.
#[derive(Debug)]
enum Way {
    Plain(Plain),
    Vnet(Vnet),
}

impl Tap {
    /// Attaches to the TAP device `name` of the calling thread's network namespace.
    pub fn open(name: &str) -> Result<Self, TapError> {
        Self::open_as(name, |name, several| {
            let (name, plain) = Plain::open(name, several)?;
            Ok((name, Way::Plain(plain)))
        })
    }

    /// The same, and takes frames of which something is left to do. It hands over complete ones until it is told
    /// otherwise.
    pub fn open_with_offloads(name: &str) -> Result<Self, TapError> {
        Self::open_as(name, |name, several| {
            let (name, vnet) = Vnet::open(name, several)?;
            Ok((name, Way::Vnet(vnet)))
        })
    }

    /// Attaches by `attach`, which is told whether the device was made for several queues.
    fn open_as(name: &str, attach: impl Fn(&str, bool) -> io::Result<(String, Way)>) -> Result<Self, TapError> {
        // The kernel cuts long names silently and treats `%` as a pattern for a new device.
        let printable = name
            .bytes()
            .all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'/' | b':' | b'%'));
        if name.is_empty() || name.len() > NAME_BYTES_MAX || !printable || matches!(name, "." | "..") {
            return Err(TapError::Name { name: name.to_owned() });
        }
        let host = |source| TapError::Host {
            name: name.to_owned(),
            source,
        };
        let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
            .map_err(|error| host(error.into()))?;
        // Attaching to a name that does not exist would make a device that nobody has set up.
        let index = netdevice::name_to_index(&socket, name).map_err(|error| match error {
            rustix::io::Errno::NODEV => TapError::Missing { name: name.to_owned() },
            other => host(other.into()),
        })?;
        // The kernel wants to be told what the device is; that it is no TAP at all has the same answer.
        let single = attach(name, false);
        let several = matches!(&single, Err(error) if error.raw_os_error() == Some(libc::EINVAL));
        let claim = several.then(|| claim(name)).transpose();
        let claim = claim.map_err(|error| refused(name, error))?;
        let attached = if several { attach(name, true) } else { single };
        let (attached, way) = attached.map_err(|error| refused(name, error))?;
        if attached != name {
            return Err(TapError::Missing { name: name.to_owned() });
        }
        let tap = Self {
            name: attached,
            way,
            _claim: claim,
        };
        let flags = tap.flags().map_err(host)?;
        if flags & libc::IFF_TAP == 0 {
            return Err(TapError::Kind { name: name.to_owned() });
        }
        // Who had it before may have taken more.
        vnet::set_offloads(&tap, Offloads::NONE).map_err(host)?;
        // One that was made just now, because the existing one went away in between, is not persistent.
        if flags & libc::IFF_PERSIST == 0 {
            return Err(TapError::Missing { name: name.to_owned() });
        }
        if interface_flags(&socket, name).map_err(host)? & libc::IFF_UP == 0 {
            return Err(TapError::Down { name: name.to_owned() });
        }
        if bridge(name, index) == Some(None) {
            tracing::warn!(
                tap = name,
                "the TAP device belongs to no bridge: only this host reaches the machine by it"
            );
        }
        Ok(tap)
    }

    /// The device's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Has the kernel hand over frames of which this much is left to do, from the next one on that it gets.
    ///
    /// # Errors
    /// Fails, besides, if it is a plain TAP and shall hand over others than complete frames.
    pub fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        if matches!(self.way, Way::Plain(_)) && offloads != Offloads::NONE {
            return Err(io::ErrorKind::Unsupported.into());
        }
        vnet::set_offloads(self, offloads)
    }

    /// Takes the next frame and returns its length, header and all; `None` if there is none now. A longer frame than
    /// `frame` is cut.
    ///
    /// # Panics
    /// If `frame` has no room for a header.
    pub fn recv(&self, frame: &mut [u8]) -> io::Result<Option<usize>> {
        let (header, bytes) = frame
            .split_first_chunk_mut::<HEADER_BYTES>()
            .expect("there is room for the header");
        ready(|| match &self.way {
            Way::Plain(plain) => {
                *header = [0; HEADER_BYTES];
                plain.recv(bytes).map(|length| HEADER_BYTES + length)
            }
            Way::Vnet(vnet) => vnet.recv(header, bytes),
        })
    }

    /// Sends a whole frame, with its header. The error is `WouldBlock` if the host can't take it now.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        let (header, bytes) = frame
            .split_first_chunk::<HEADER_BYTES>()
            .ok_or(io::ErrorKind::InvalidInput)?;
        match &self.way {
            Way::Plain(_) if header[..2] != [0, 0] => Err(io::ErrorKind::Unsupported.into()),
            Way::Plain(plain) => whole(bytes.len(), || plain.send(bytes)),
            Way::Vnet(vnet) => whole(frame.len(), || vnet.send(frame)),
        }
    }

    /// Takes the next frame of a TAP without offloads, as it would be on a wire.
    ///
    /// # Errors
    /// Fails, besides, if it has offloads.
    pub fn recv_bare(&self, frame: &mut [u8]) -> io::Result<Option<usize>> {
        let Way::Plain(plain) = &self.way else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        ready(|| plain.recv(frame))
    }

    /// Sends a frame of which nothing is left to do by a TAP without offloads.
    ///
    /// # Errors
    /// Fails, besides, if it has offloads.
    pub fn send_bare(&self, frame: &[u8]) -> io::Result<()> {
        let Way::Plain(plain) = &self.way else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        whole(frame.len(), || plain.send(frame))
    }

    /// Throws away what has queued up and returns the number of frames.
    pub fn drain(&self) -> io::Result<usize> {
        // A frame that does not fit is cut, and gone all the same.
        let mut frame = [0; 64];
        for count in 0..DRAIN_MAX {
            if self.recv(&mut frame)?.is_none() {
                return Ok(count);
            }
        }
        Ok(DRAIN_MAX)
    }

    /// Asks the driver how the device was made.
    fn flags(&self) -> io::Result<i32> {
        let mut request = request("");
        // SAFETY: TUNGETIFF writes one `ifreq`, which is here and lives until the call returns.
        let result = unsafe { libc::ioctl(self.as_raw_fd(), libc::TUNGETIFF, &raw mut request) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the driver has filled the flags; every bit pattern is a number.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        Ok(i32::from(flags.cast_unsigned()))
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor belongs to `self.way`, which is open as long as `self` lives.
        unsafe { BorrowedFd::borrow_raw(self.as_raw_fd()) }
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        match &self.way {
            Way::Plain(plain) => plain.as_raw_fd(),
            Way::Vnet(vnet) => vnet.as_raw_fd(),
        }
    }
}

/// Claims a TAP device for this process among all of its kind in this network namespace: a device for several queues would
/// let a second one attach, and each would get a part of the frames.
fn claim(name: &str) -> io::Result<UnixDatagram> {
    let address = SocketAddr::from_abstract_name(format!("tandem/tap/{name}"))?;
    UnixDatagram::bind_addr(&address)
}

/// Takes a frame if there is one now.
fn ready(mut receive: impl FnMut() -> io::Result<usize>) -> io::Result<Option<usize>> {
    loop {
        match receive() {
            Ok(length) => return Ok(Some(length)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Sends a frame of this length, all of it.
fn whole(length: usize, mut send: impl FnMut() -> io::Result<usize>) -> io::Result<()> {
    loop {
        match send() {
            Ok(sent) if sent == length => return Ok(()),
            Ok(_) => return Err(io::ErrorKind::WriteZero.into()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn refused(name: &str, source: io::Error) -> TapError {
    let name = name.to_owned();
    match source.raw_os_error() {
        Some(libc::EBUSY | libc::EADDRINUSE) => TapError::Busy { name },
        Some(libc::EPERM | libc::EACCES) => TapError::Permission { name, source },
        Some(libc::EINVAL) => TapError::Kind { name },
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => TapError::Unsupported { source },
        _ if source.kind() == io::ErrorKind::Unsupported => TapError::Offloads { name },
        _ => TapError::Host { name, source },
    }
}

fn request(name: &str) -> libc::ifreq {
    let mut ifr_name = [0; libc::IFNAMSIZ];
    for (to, from) in ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    // An address of zeros is the union's largest member: no byte of it is left undefined.
    let zero = libc::sockaddr {
        sa_family: 0,
        sa_data: [0; 14],
    };
    libc::ifreq {
        ifr_name,
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_addr: zero },
    }
}

fn interface_flags(socket: &impl AsFd, name: &str) -> io::Result<i32> {
    let mut request = request(name);
    let socket = socket.as_fd().as_raw_fd();
    // SAFETY: SIOCGIFFLAGS reads the name and writes the flags of one `ifreq`, which is here.
    if unsafe { libc::ioctl(socket, libc::SIOCGIFFLAGS, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has filled the flags; every bit pattern is a number.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok(i32::from(flags.cast_unsigned()))
}

/// The bridge that interface `name` belongs to. `None`: not known, because the mounted /sys shows
/// another network namespace.
fn bridge(name: &str, index: u32) -> Option<Option<String>> {
    let directory = format!("/sys/class/net/{name}");
    let shown = fs::read_to_string(format!("{directory}/ifindex")).ok()?;
    if shown.trim().parse() != Ok(index) {
        return None;
    }
    let master = fs::read_link(format!("{directory}/master")).ok();
    Some(master.and_then(|path| Some(path.file_name()?.to_str()?.to_owned())))
}

#[cfg(test)]
mod tests;
