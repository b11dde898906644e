//! Two hosts, a client and their networks on one machine, as anonymous network namespaces.
//!
//! ```text
//!   host-a                     switch                      host-b
//!   tap0 ─ br0 ─ uplink ────── clients ─────── uplink ─ br0 ─ tap0
//!          repl 10.99.0.1 ──── replication ─── 10.99.0.2 repl
//!                                 │ (of `clients`)
//!                              client: eth0 10.77.0.1, fd77::1
//! ```
//!
//! Used by the demo and by the tests. A namespace belongs to the threads in it: each has one thread that
//! carries out what is to happen there, and everything vanishes when [`Lab`] is dropped or the process
//! dies. Nothing is written below /run, nothing in the machine's own network is touched. A cut takes a
//! port out of its bridge, so that both sides keep their carrier and just hear nothing, as when a switch
//! fails. The processes started in the lab belong to the caller, who ends them.

mod extra;
mod namespace;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;
use std::process::{Child, Command};
use std::sync::Arc;

use machine::netns::make_lasting_tap;

pub use extra::{CLIENT_TAP, SECOND_CLIENT_V4, SECOND_CLIENT_V6, SECOND_TAP, TRUNK_TAP};
pub use namespace::{Namespace, Netlink};

/// Name of the TAP on each host.
pub const TAP: &str = "tap0";
/// The client's IPv4 address; the network has 24 bits of prefix.
pub const CLIENT_V4: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// The client's IPv6 address; the network has 64 bits of prefix.
pub const CLIENT_V6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1);
/// The client's addresses with their prefixes.
const CLIENT_ADDRESSES: [(IpAddr, u8); 2] = [(IpAddr::V4(CLIENT_V4), 24), (IpAddr::V6(CLIENT_V6), 64)];

const BRIDGE: &str = "br0";
const CLIENTS_BRIDGE: &str = "clients";
const REPLICATION_BRIDGE: &str = "replication";
const REPLICATION: &str = "repl";

/// Why a part of the lab can't be made or changed.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// No right to make namespaces.
    #[error("can't make a network namespace: the lab needs root (CAP_SYS_ADMIN and CAP_NET_ADMIN); run it with sudo")]
    Namespace(#[source] io::Error),
    /// No TAP.
    #[error("can't make a TAP device: load the kernel's module with `modprobe tun` and check /dev/net/tun")]
    Tap(#[source] io::Error),
    /// A netlink request failed.
    #[error("can't {what} in the lab's namespace {place}: the kernel must have bridge and veth support")]
    Netlink {
        /// What was asked.
        what: String,
        /// Where.
        place: &'static str,
        /// Why.
        #[source]
        source: rtnetlink::Error,
    },
    /// Anything else of the host.
    #[error("can't {what} in the lab's namespace {place}")]
    Host {
        /// What was asked.
        what: String,
        /// Where.
        place: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// One of the two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    /// The first, where the primary starts.
    A,
    /// The second.
    B,
}

/// The whole laboratory.
#[derive(Debug)]
pub struct Lab {
    switch: Namespace,
    client: Namespace,
    host_a: Namespace,
    host_b: Namespace,
}

impl Host {
    /// Returns the other host.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    /// Returns the host's name, which is also a good name for its node.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::A => "host-a",
            Self::B => "host-b",
        }
    }

    /// Returns the host's address on the replication network.
    #[must_use]
    pub fn replication_address(self) -> Ipv4Addr {
        match self {
            Self::A => Ipv4Addr::new(10, 99, 0, 1),
            Self::B => Ipv4Addr::new(10, 99, 0, 2),
        }
    }

    fn client_port(self) -> &'static str {
        match self {
            Self::A => "up-a",
            Self::B => "up-b",
        }
    }

    fn replication_port(self) -> &'static str {
        match self {
            Self::A => "repl-a",
            Self::B => "repl-b",
        }
    }
}

impl Lab {
    /// Makes the namespaces and networks.
    ///
    /// # Errors
    /// Fails without root or without the kernel's bridges, veths and TAPs; nothing is left then.
    pub fn new() -> Result<Self, LabError> {
        let lab = Self {
            switch: Namespace::new("switch")?,
            client: Namespace::new("client")?,
            host_a: Namespace::new(Host::A.name())?,
            host_b: Namespace::new(Host::B.name())?,
        };
        for silent in [&lab.switch, &lab.host_a, &lab.host_b] {
            silent.sysctl("ipv6/conf/all/disable_ipv6", "1")?;
            silent.sysctl("ipv6/conf/default/disable_ipv6", "1")?;
        }
        // No link-local address, no wait for duplicate detection: the client speaks when it is told to.
        lab.client.sysctl("ipv6/conf/default/addr_gen_mode", "1")?;
        lab.client.sysctl("ipv6/conf/default/accept_dad", "0")?;
        lab.client.sysctl("ipv6/conf/default/accept_ra", "0")?;
        lab.client.sysctl("ipv6/conf/default/router_solicitations", "0")?;
        lab.connect()?;
        Ok(lab)
    }

    /// Returns the namespace of a host.
    #[must_use]
    pub fn host(&self, host: Host) -> &Namespace {
        match host {
            Host::A => &self.host_a,
            Host::B => &self.host_b,
        }
    }

    /// Returns the clients' namespace.
    #[must_use]
    pub fn client(&self) -> &Namespace {
        &self.client
    }

    /// Starts a process on a host. The caller ends it and waits for it.
    ///
    /// # Errors
    /// Fails as [`Command::spawn`] does.
    pub fn spawn_in(&self, host: Host, command: Command) -> io::Result<Child> {
        self.host(host).spawn(command)
    }

    /// Lets the hosts no longer hear each other on the replication network. Clients still hear both.
    ///
    /// # Errors
    /// Fails if the kernel refuses.
    pub fn cut_replication(&self) -> Result<(), LabError> {
        self.switch
            .netlink(async |net| net.leave_bridge(Host::A.replication_port()).await)
    }

    /// Ends [`Self::cut_replication`].
    ///
    /// # Errors
    /// Fails if the kernel refuses.
    pub fn heal_replication(&self) -> Result<(), LabError> {
        self.switch
            .netlink(async |net| net.join_bridge(Host::A.replication_port(), REPLICATION_BRIDGE).await)
    }

    /// Lets the clients no longer hear the host, nor the host the clients.
    ///
    /// # Errors
    /// Fails if the kernel refuses.
    pub fn cut_client_port(&self, host: Host) -> Result<(), LabError> {
        self.switch
            .netlink(async move |net| net.leave_bridge(host.client_port()).await)
    }

    /// Ends [`Self::cut_client_port`].
    ///
    /// # Errors
    /// Fails if the kernel refuses.
    pub fn heal_client_port(&self, host: Host) -> Result<(), LabError> {
        self.switch
            .netlink(async move |net| net.join_bridge(host.client_port(), CLIENTS_BRIDGE).await)
    }

    fn connect(&self) -> Result<(), LabError> {
        let targets = [
            ("to-client", "eth0", Arc::clone(&self.client.fd)),
            (Host::A.client_port(), "uplink", Arc::clone(&self.host_a.fd)),
            (Host::B.client_port(), "uplink", Arc::clone(&self.host_b.fd)),
            (Host::A.replication_port(), REPLICATION, Arc::clone(&self.host_a.fd)),
            (Host::B.replication_port(), REPLICATION, Arc::clone(&self.host_b.fd)),
        ];
        self.switch.netlink(async move |net| {
            net.add_bridge(CLIENTS_BRIDGE).await?;
            net.add_bridge(REPLICATION_BRIDGE).await?;
            for (port, far, target) in targets {
                let bridge = if far == REPLICATION {
                    REPLICATION_BRIDGE
                } else {
                    CLIENTS_BRIDGE
                };
                net.add_veth(port, far, target.as_raw_fd()).await?;
                net.join_bridge(port, bridge).await?;
                net.up(port).await?;
            }
            Ok(())
        })?;
        self.client.netlink(async |net| {
            net.up("lo").await?;
            net.up("eth0").await?;
            for (address, prefix) in CLIENT_ADDRESSES {
                net.add_address("eth0", address, prefix).await?;
            }
            Ok(())
        })?;
        for host in [Host::A, Host::B] {
            let namespace = self.host(host);
            namespace.run(|| make_lasting_tap(TAP)).map_err(LabError::Tap)?;
            namespace.netlink(async move |net| {
                net.up("lo").await?;
                net.add_bridge(BRIDGE).await?;
                for port in [TAP, "uplink"] {
                    net.join_bridge(port, BRIDGE).await?;
                    net.up(port).await?;
                }
                net.up(REPLICATION).await?;
                net.add_address(REPLICATION, host.replication_address().into(), 24)
                    .await
            })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{Read, Write};
    use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
    use std::time::Duration;

    use super::*;

    fn lab() -> Option<Lab> {
        match Lab::new() {
            Ok(lab) => Some(lab),
            Err(error) => {
                assert!(
                    std::env::var_os("TANDEM_REQUIRE_KVM").is_none(),
                    "the lab needs root: {error}"
                );
                eprintln!("SKIPPED: the lab needs root: {error}");
                None
            }
        }
    }

    #[test]
    fn hosts_reach_each_other_until_the_replication_network_is_cut() {
        let Some(lab) = lab() else { return };
        let address = SocketAddr::from((Host::B.replication_address(), 7));
        let (from, to) = lab.host(Host::B).run(move || {
            let listener = TcpListener::bind(address).unwrap();
            (listener.local_addr().unwrap(), listener)
        });
        let mut near = lab
            .host(Host::A)
            .run(move || TcpStream::connect_timeout(&from, Duration::from_secs(2)).unwrap());
        let mut far = to.accept().unwrap().0;
        far.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let mut heard = [0; 4];
        near.write_all(b"ping").unwrap();
        far.read_exact(&mut heard).unwrap();

        lab.cut_replication().unwrap();
        near.write_all(b"lost").unwrap();
        let silence = far.read(&mut heard).unwrap_err();
        assert_eq!(silence.kind(), io::ErrorKind::WouldBlock, "silence, not an end");

        lab.heal_replication().unwrap();
        far.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        far.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"lost", "TCP sends it again");
    }

    #[test]
    fn a_client_reaches_a_host_until_its_port_is_cut() {
        let Some(lab) = lab() else { return };
        for (host, last) in [(Host::A, 11), (Host::B, 12)] {
            let address = IpAddr::from([10, 77, 0, last]);
            lab.host(host)
                .netlink(async move |net| net.add_address(BRIDGE, address, 24).await)
                .unwrap();
            let server = lab.host(host).run(move || UdpSocket::bind((address, 7)).unwrap());
            let client = lab.client().run(move || {
                let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
                socket.connect((address, 7)).unwrap();
                socket
            });
            let waits = |limit| server.set_read_timeout(Some(Duration::from_millis(limit))).unwrap();
            waits(10_000);
            client.send(b"hello").unwrap();
            assert_eq!(server.recv(&mut [0; 8]).unwrap(), 5);
            lab.cut_client_port(host).unwrap();
            client.send(b"lost").unwrap();
            waits(300);
            server.recv(&mut [0; 8]).unwrap_err();
            waits(10_000);
            lab.heal_client_port(host).unwrap();
            client.send(b"again").unwrap();
            assert_eq!(server.recv(&mut [0; 8]).unwrap(), 5);
        }
    }

    #[test]
    fn nothing_speaks_on_a_tap_of_its_own_accord_and_nothing_is_left() {
        let Some(lab) = lab() else { return };
        let own = fs::read_to_string("/proc/net/dev").unwrap();
        assert!(!own.contains(TAP), "the machine's own network is not touched: {own}");
        // The client may speak, and does: it joins its multicast groups.
        lab.client().netlink(async |net| net.down("eth0").await).unwrap();
        let sent = || [Host::A, Host::B].map(|host| packets_sent_to_tap(&lab, host));
        let before = sent();
        std::thread::sleep(Duration::from_millis(700));
        assert_eq!(sent(), before);

        let inode = fs::read_link(format!("/proc/self/fd/{}", lab.client.fd.as_raw_fd())).unwrap();
        drop(lab);
        for task in fs::read_dir("/proc/self/task").unwrap() {
            let Ok(namespace) = fs::read_link(task.unwrap().path().join("ns/net")) else {
                continue;
            };
            assert_ne!(namespace, inode, "a thread stayed behind");
        }
    }

    fn packets_sent_to_tap(lab: &Lab, host: Host) -> u64 {
        let counters = lab
            .host(host)
            .run(|| fs::read_to_string("/proc/thread-self/net/dev").unwrap());
        let tap: Vec<_> = counters
            .lines()
            .find(|line| line.contains(TAP))
            .unwrap()
            .split_whitespace()
            .collect();
        tap[10].parse::<u64>().unwrap() + tap[12].parse::<u64>().unwrap()
    }

    #[test]
    fn a_child_is_in_the_namespace_that_it_was_started_in() {
        let Some(lab) = lab() else { return };
        let mut command = Command::new("cat");
        command.arg("/proc/self/net/dev").stdout(std::process::Stdio::piped());
        let seen = lab.spawn_in(Host::B, command).unwrap().wait_with_output().unwrap();
        assert!(String::from_utf8(seen.stdout).unwrap().contains("repl:"));
    }
}
