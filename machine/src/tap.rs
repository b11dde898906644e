//! A TAP device of the host, through which the machine's frames reach the world.
//!
//! The device must exist before; whoever sets the host up decides which bridge it belongs to. Opening
//! attaches to it, dropping detaches, and nothing else about it is changed. Frames are Ethernet
//! frames without any header before them. Never blocks.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice};
use thiserror::Error;
use tun_tap::{Iface, Mode};

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
    #[error(
        "{name} exists, but is no plain TAP device: remove it, or make another one with `ip tuntap add dev <name> mode tap` \
         (without multi_queue)"
    )]
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
    iface: Iface,
}

impl Tap {
    /// Attaches to the TAP device `name` of the calling thread's network namespace.
    pub fn open(name: &str) -> Result<Self, TapError> {
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
        let iface = Iface::without_packet_info(name, Mode::Tap).map_err(|error| refused(name, error))?;
        if iface.name() != name {
            return Err(TapError::Missing { name: name.to_owned() });
        }
        iface.set_non_blocking().map_err(host)?;
        let tap = Self { iface };
        let flags = tap.flags().map_err(host)?;
        if flags & libc::IFF_TAP == 0 || flags & (libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE) != 0 {
            return Err(TapError::Kind { name: name.to_owned() });
        }
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
        self.iface.name()
    }

    /// Takes the next frame and returns its length; `None` if there is none now. A longer frame than
    /// `frame` is cut.
    pub fn recv(&self, frame: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match self.iface.recv(frame) {
                Ok(bytes) => return Ok(Some(bytes)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Sends a whole frame. The error is `WouldBlock` if the host can't take it now.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        loop {
            match self.iface.send(frame) {
                Ok(bytes) if bytes == frame.len() => return Ok(()),
                Ok(_) => return Err(io::ErrorKind::WriteZero.into()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
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
        let result = unsafe { libc::ioctl(self.as_raw_fd(), TUNGETIFF, &raw mut request) };
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
        // SAFETY: the descriptor belongs to `self.iface`, which is open as long as `self` lives.
        unsafe { BorrowedFd::borrow_raw(self.iface.as_raw_fd()) }
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.iface.as_raw_fd()
    }
}

/// `_IOR('T', 210, unsigned int)`; the C library has no name for it.
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;

fn refused(name: &str, source: io::Error) -> TapError {
    let name = name.to_owned();
    match source.raw_os_error() {
        Some(libc::EBUSY) => TapError::Busy { name },
        Some(libc::EPERM | libc::EACCES) => TapError::Permission { name, source },
        Some(libc::EINVAL) => TapError::Kind { name },
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => TapError::Unsupported { source },
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
mod tests {
    use super::*;
    use std::net::UdpSocket;
    use std::process::Command;
    use std::thread;
    use std::time::{Duration, Instant};

    /// Runs `test` on a thread with a network namespace of its own, which ends with it.
    fn in_own_network(test: fn()) {
        let thread = thread::spawn(move || {
            // SAFETY: a new network namespace for this thread changes nothing that other threads rely on.
            let result = unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) };
            let able = result.is_ok() && fs::metadata("/dev/net/tun").is_ok() && run("ip link set lo up");
            if able {
                test();
                return;
            }
            assert!(
                std::env::var_os("TANDEM_REQUIRE_KVM").is_none(),
                "this test needs root, /dev/net/tun and the command ip"
            );
            println!("SKIPPED: this test needs root, /dev/net/tun and the command ip");
        });
        thread.join().unwrap();
    }

    fn run(command: &str) -> bool {
        let mut words = command.split(' ');
        Command::new(words.next().unwrap())
            .args(words)
            .status()
            .is_ok_and(|status| status.success())
    }

    /// Sends from the host until the frame comes out at the TAP: its carrier comes up a moment after opening.
    fn frame_of(tap: &Tap, text: &[u8], send: impl Fn()) -> Vec<u8> {
        let start = Instant::now();
        let mut frame = vec![0; 2048];
        while start.elapsed() < Duration::from_secs(5) {
            send();
            match tap.recv(&mut frame).unwrap() {
                Some(bytes) if frame[..bytes].ends_with(text) => return frame[..bytes].to_vec(),
                Some(_) => {}
                None => thread::sleep(Duration::from_millis(5)),
            }
        }
        panic!("no such frame within 5 s");
    }

    #[test]
    fn refuses_names_that_no_device_can_have() {
        for name in ["", "sixteen-letters-", "tap%d", "a/b", "two words", "a:b", "..", "ü"] {
            assert!(matches!(Tap::open(name), Err(TapError::Name { .. })), "{name:?}");
        }
    }

    #[test]
    fn refuses_what_is_not_there_or_not_a_tap_and_says_why() {
        in_own_network(|| {
            let error = Tap::open("absent0").unwrap_err();
            assert!(matches!(error, TapError::Missing { .. }), "{error:?}");
            assert!(error.to_string().contains("ip tuntap add dev absent0 mode tap"));
            assert!(!run("ip link show absent0"), "a refused device is not created");
            assert!(matches!(Tap::open("lo"), Err(TapError::Kind { .. })));
            assert!(run("ip tuntap add dev tun0 mode tun"));
            assert!(matches!(Tap::open("tun0"), Err(TapError::Kind { .. })));
            assert!(run("ip tuntap add dev many0 mode tap multi_queue"));
            assert!(matches!(Tap::open("many0"), Err(TapError::Kind { .. })));
            assert!(run("ip tuntap add dev tap0 mode tap"));
            assert!(matches!(Tap::open("tap0"), Err(TapError::Down { .. })));
        });
    }

    #[test]
    fn one_process_at_a_time() {
        in_own_network(|| {
            assert!(run("ip tuntap add dev tap0 mode tap") && run("ip link set tap0 up"));
            let first = Tap::open("tap0").unwrap();
            assert!(matches!(Tap::open("tap0"), Err(TapError::Busy { .. })));
            drop(first);
            // A child that another test is just starting may hold the descriptor until it executes.
            let start = Instant::now();
            let second = loop {
                match Tap::open("tap0") {
                    Err(TapError::Busy { .. }) if start.elapsed() < Duration::from_secs(5) => thread::yield_now(),
                    other => break other.unwrap(),
                }
            };
            assert_eq!(second.name(), "tap0");
        });
    }

    #[test]
    fn carries_frames_both_ways_and_drains() {
        in_own_network(|| {
            for command in [
                "ip tuntap add dev tap0 mode tap",
                "ip addr add 10.9.9.1/24 dev tap0",
                "ip link set tap0 up",
                "ip neigh add 10.9.9.2 lladdr 02:00:00:00:00:02 dev tap0",
            ] {
                assert!(run(command), "{command}");
            }
            let tap = Tap::open("tap0").unwrap();
            let socket = UdpSocket::bind("10.9.9.1:4000").unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            let mut frame = frame_of(&tap, b"out and back", || {
                socket.send_to(b"out and back", "10.9.9.2:4000").unwrap();
            });
            // The answer: both ends swapped, which leaves every checksum right.
            for (a, b, bytes) in [(0, 6, 6), (26, 30, 4), (34, 36, 2)] {
                let (left, right) = frame.split_at_mut(b);
                left[a..a + bytes].swap_with_slice(&mut right[..bytes]);
            }
            tap.send(&frame).unwrap();
            let mut text = [0; 64];
            let (bytes, from) = socket.recv_from(&mut text).unwrap();
            assert_eq!(
                (&text[..bytes], from.to_string().as_str()),
                (&b"out and back"[..], "10.9.9.2:4000")
            );

            for _ in 0..10 {
                socket.send_to(b"stale", "10.9.9.2:4000").unwrap();
            }
            assert!(tap.drain().unwrap() >= 10);
            assert_eq!(tap.recv(&mut text).unwrap(), None);
        });
    }
}
