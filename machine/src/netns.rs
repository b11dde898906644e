//! Network namespaces and lasting TAP devices, for laboratories that play several hosts on one machine.
//!
//! Only what needs a raw system call is here. Used by `tandem::lab`, never by a role: a role finds its
//! TAP already made by the host's operator.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;

use libc::c_short;
use rustix::thread::{UnshareFlags, unshare_unsafe};

const NAME_BYTES_MAX: usize = libc::IFNAMSIZ - 1;

/// Moves the calling thread, and no other, into a new, empty network namespace.
///
/// The namespace lives as long as a thread, a socket or a file descriptor refers to it.
///
/// # Errors
/// Fails without CAP_SYS_ADMIN.
pub fn unshare_network() -> io::Result<()> {
    // SAFETY: a new network namespace changes which network later system calls of this thread see; memory,
    // file descriptors and other threads stay as they are.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
    Ok(())
}

/// Makes a TAP device in the calling thread's network namespace that stays when nobody has it open.
///
/// # Errors
/// Fails without CAP_NET_ADMIN, without /dev/net/tun, if the name is too long, or if it is in use.
pub fn make_lasting_tap(name: &str) -> io::Result<()> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX || name.contains(['\0', '/', '%']) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("'{name}' can't name a network interface"),
        ));
    }
    let tun = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: `ifreq` is plain data; all zeroes is a valid value of it.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = flags();
    // SAFETY: `request` is an `ifreq` that lives through the call, as TUNSETIFF wants it.
    let made = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    check(made)?;
    // SAFETY: TUNSETPERSIST takes a number and touches no memory of ours.
    let kept = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETPERSIST, 1) };
    check(kept)
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "both flags lie in the low 16 bits, as the kernel's field has"
)]
fn flags() -> c_short {
    (libc::IFF_TAP | libc::IFF_NO_PI) as c_short
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lasting_tap_stays_in_its_namespace() {
        let run = std::thread::spawn(|| {
            if let Err(error) = unshare_network() {
                assert!(std::env::var_os("TANDEM_REQUIRE_KVM").is_none(), "needs root: {error}");
                eprintln!("SKIPPED: a network namespace needs root: {error}");
                return;
            }
            make_lasting_tap("tap0").unwrap();
            let seen = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
            assert!(seen.contains("tap0:"), "{seen}");
        });
        run.join().unwrap();
        let seen = std::fs::read_to_string("/proc/net/dev").unwrap();
        assert!(!seen.contains("tap0:"), "{seen}");
    }

    #[test]
    fn a_name_that_the_kernel_would_cut_is_refused() {
        let refused = make_lasting_tap("a-name-of-seventeen").unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
    }
}
