//! What some tests add to the lab: a second network, for a VM with two network cards, and a client in two halves.
//!
//! ```text
//!   host-a                     switch                      host-b
//!   tap1 ─ br1 ─ uplink1 ───── clients1 ───── uplink1 ─ br1 ─ tap1
//!                                 │
//!                              client: eth1 10.78.0.1, fd78::1
//! ```

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;
use std::sync::Arc;

use machine::netns::make_lasting_tap;

use super::{BRIDGE, CLIENT_ADDRESSES, Host, Lab, LabError};

/// Name of the TAP that has the client's addresses after [`Lab::split_client`].
pub const CLIENT_TAP: &str = "client0";
/// Name of the TAP that leads to the client's network after [`Lab::split_client`].
pub const TRUNK_TAP: &str = "trunk0";
/// Name of the second network's TAP on each host.
pub const SECOND_TAP: &str = "tap1";
/// The client's IPv4 address on the second network; the network has 24 bits of prefix.
pub const SECOND_CLIENT_V4: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 1);
/// The client's IPv6 address on the second network; the network has 64 bits of prefix.
pub const SECOND_CLIENT_V6: Ipv6Addr = Ipv6Addr::new(0xfd78, 0, 0, 0, 0, 0, 0, 1);

const SECOND_BRIDGE: &str = "br1";
const SECOND_CLIENTS_BRIDGE: &str = "clients1";
const SECOND_CLIENT: &str = "eth1";
const SECOND_UPLINK: &str = "uplink1";

impl Lab {
    /// Moves the client's addresses to the TAP [`CLIENT_TAP`], and joins the TAP [`TRUNK_TAP`] to its cable: what passes
    /// between the two is the caller's.
    ///
    /// # Errors
    /// Fails if the kernel refuses.
    pub fn split_client(&self) -> Result<(), LabError> {
        for tap in [CLIENT_TAP, TRUNK_TAP] {
            self.client.run(move || make_lasting_tap(tap)).map_err(LabError::Tap)?;
        }
        self.client.netlink(async |net| {
            net.add_bridge(BRIDGE).await?;
            for (address, prefix) in CLIENT_ADDRESSES {
                net.remove_address("eth0", address, prefix).await?;
            }
            for port in ["eth0", TRUNK_TAP] {
                net.join_bridge(port, BRIDGE).await?;
                net.up(port).await?;
            }
            net.up(CLIENT_TAP).await?;
            for (address, prefix) in CLIENT_ADDRESSES {
                net.add_address(CLIENT_TAP, address, prefix).await?;
            }
            Ok(())
        })
    }

    /// Adds a network that has nothing in common with the first but the client and the hosts.
    ///
    /// # Errors
    /// Fails if the kernel refuses.
    pub fn add_second_network(&self) -> Result<(), LabError> {
        let targets = [
            ("to-client1", SECOND_CLIENT, Arc::clone(&self.client.fd)),
            ("up-a1", SECOND_UPLINK, Arc::clone(&self.host_a.fd)),
            ("up-b1", SECOND_UPLINK, Arc::clone(&self.host_b.fd)),
        ];
        self.switch.netlink(async move |net| {
            net.add_bridge(SECOND_CLIENTS_BRIDGE).await?;
            for (port, far, target) in targets {
                net.add_veth(port, far, target.as_raw_fd()).await?;
                net.join_bridge(port, SECOND_CLIENTS_BRIDGE).await?;
                net.up(port).await?;
            }
            Ok(())
        })?;
        self.client.netlink(async |net| {
            net.up(SECOND_CLIENT).await?;
            let addresses = [(IpAddr::V4(SECOND_CLIENT_V4), 24), (IpAddr::V6(SECOND_CLIENT_V6), 64)];
            for (address, prefix) in addresses {
                net.add_address(SECOND_CLIENT, address, prefix).await?;
            }
            Ok(())
        })?;
        for host in [Host::A, Host::B] {
            let namespace = self.host(host);
            namespace.run(|| make_lasting_tap(SECOND_TAP)).map_err(LabError::Tap)?;
            namespace.netlink(async |net| {
                net.add_bridge(SECOND_BRIDGE).await?;
                for port in [SECOND_TAP, SECOND_UPLINK] {
                    net.join_bridge(port, SECOND_BRIDGE).await?;
                    net.up(port).await?;
                }
                Ok(())
            })?;
        }
        Ok(())
    }
}
