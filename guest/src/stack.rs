//! The network stack of one card, and the services on it.
//!
//! Each card has a stack of its own: addresses, sockets, connections. What is served is the [`World`]'s, and the same on all.

use alloc::vec;
use alloc::vec::Vec;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use smoltcp::iface::{Config, Interface, PollIngressSingleResult, PollResult, SocketHandle, SocketSet};
use smoltcp::phy::Device;
use smoltcp::socket::{tcp as smol_tcp, udp};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpAddress, IpCidr, IpEndpoint, IpListenEndpoint};

use crate::clock::Moment;
use crate::echo::{DISCARD_PORT, Discard, ECHO_PORT, Echo};
use crate::gate::Gate;
use crate::http::{self, Http};
use crate::outgoing::Outgoing;
use crate::random::Random;
use crate::redis::{self, Redis};
use crate::settings::Addresses;
use crate::tcp::{Pool, buffer};
use crate::vlan::Tagged;
use crate::world::{Dial, World};

const UDP_PACKETS: usize = 64;
const UDP_BYTES: usize = 128 * 1024;
/// The address that the burnt sequence numbers pretend to connect to (RFC 5737).
const NOWHERE: IpEndpoint = IpEndpoint {
    addr: IpAddress::v4(192, 0, 2, 1),
    port: 9,
};
const NOWHERE_LOCAL: IpListenEndpoint = IpListenEndpoint {
    addr: Some(IpAddress::v4(192, 0, 2, 2)),
    port: 9,
};

/// One card's stack and services.
pub(crate) struct Stack {
    interface: Interface,
    sockets: SocketSet<'static>,
    http: Pool<Http>,
    redis: Pool<Redis>,
    echo: Pool<Echo>,
    discard: Pool<Discard>,
    udp_echo: SocketHandle,
    udp_discard: SocketHandle,
    outgoing: Outgoing,
    burner: smol_tcp::Socket<'static>,
    stalled: bool,
}

/// The default gateways, which are reached by the first card.
pub(crate) type Gateways = (Option<Ipv4Addr>, Option<Ipv6Addr>);

impl Stack {
    /// Sets up the stack of a card with these addresses.
    ///
    /// # Errors
    /// What of it can't be had.
    pub(crate) fn new(
        world: &mut World,
        mac: [u8; 6],
        (addresses, gateways): (Addresses, Gateways),
        random: &mut Random,
        device: &mut impl Device,
        now: Moment,
    ) -> Result<Self, &'static str> {
        let mac = EthernetAddress(mac);
        if !mac.is_unicast() {
            return Err("the network device's MAC address is not a unicast address: give it another");
        }
        let mut config = Config::new(HardwareAddress::Ethernet(mac));
        config.random_seed = random.draw();
        let mut interface = Interface::new(config, device, instant(now));
        configure(&mut interface, mac, addresses, gateways)?;
        let mut sockets = SocketSet::new(vec![]);
        let udp_echo = sockets.add(udp_socket(ECHO_PORT)?);
        let udp_discard = sockets.add(udp_socket(DISCARD_PORT)?);
        let limits = world.limits;
        let mut stack = Self {
            interface,
            sockets,
            http: Pool::new(http::PORT, limits.connections),
            redis: Pool::new(redis::PORT, limits.connections),
            echo: Pool::new(ECHO_PORT, limits.side_connections),
            discard: Pool::new(DISCARD_PORT, limits.side_connections),
            udp_echo,
            udp_discard,
            outgoing: Outgoing::new(random),
            burner: smol_tcp::Socket::new(buffer(1), buffer(1)),
            stalled: false,
        };
        stack.rearm(world, now);
        Ok(stack)
    }

    /// Takes in at most one frame; returns whether there was one.
    pub(crate) fn take_in(&mut self, now: Moment, world: &World, device: &mut impl Device) -> bool {
        let at = instant(now);
        let device = &mut Tagged {
            device,
            vlan: world.settings.vlan,
        };
        self.interface.poll_maintenance(at);
        let full = [
            self.http.full(),
            self.redis.full(),
            self.echo.full(),
            self.discard.full(),
        ];
        let opening: Vec<_> = [
            self.http.opening(),
            self.redis.opening(),
            self.echo.opening(),
            self.discard.opening(),
        ]
        .concat();
        let opening = &opening[..];
        let mut gate = Gate { device, full, opening };
        let ingress = self.interface.poll_ingress_single(at, &mut gate, &mut self.sockets);
        ingress != PollIngressSingleResult::None
    }

    /// Serves the connections of clients; returns whether anything moved.
    pub(crate) fn serve(&mut self, now: Moment, world: &mut World) -> bool {
        let sockets = &mut self.sockets;
        let mut moved = self.http.serve(sockets, world, now);
        moved |= self.redis.serve(sockets, world, now);
        moved |= self.echo.serve(sockets, world, now);
        moved |= self.discard.serve(sockets, world, now);
        moved
    }

    /// Tells whether an address is in a network of this card.
    pub(crate) fn is_near(&self, address: IpAddr) -> bool {
        let address = IpAddress::from(address);
        self.interface
            .ip_addrs()
            .iter()
            .any(|near| near.contains_addr(&address))
    }

    /// Will open these connections, with what it opens already.
    pub(crate) fn dial(&mut self, dial: Dial) {
        self.outgoing.ask(dial);
    }

    /// Goes on with connections outwards and with datagrams; returns whether anything moved.
    pub(crate) fn serve_rest(&mut self, world: &mut World) -> bool {
        let sockets = &mut self.sockets;
        let mut moved = self.outgoing.serve(&mut self.interface, sockets, world);
        moved |= serve_udp_echo(sockets.get_mut(self.udp_echo), world);
        moved |= serve_udp_discard(sockets.get_mut(self.udp_discard), world);
        moved
    }

    /// Sends all that follows; returns whether anything did.
    pub(crate) fn send(&mut self, now: Moment, world: &mut World, device: &mut impl Device) -> bool {
        let at = instant(now);
        let device = &mut Tagged {
            device,
            vlan: world.settings.vlan,
        };
        let mut egress = false;
        while self.interface.poll_egress(at, device, &mut self.sockets) == PollResult::SocketStateChanged {
            egress = true;
        }
        // A device without room ends the egress early: then some sockets may still have their last word to say.
        self.stalled = device.transmit(at).is_none();
        if !self.stalled {
            self.rearm(world, now);
        }
        egress
    }

    /// Whether the device had no room for all that was to be sent.
    pub(crate) fn is_stalled(&self) -> bool {
        self.stalled
    }

    /// When the stack has something to do at the latest, in guest nanoseconds.
    pub(crate) fn deadline(&mut self, now: Moment) -> Option<u64> {
        self.interface.poll_at(instant(now), &self.sockets).map(|due| {
            let micros = u64::try_from(due.total_micros()).unwrap_or(0);
            micros.saturating_mul(1000).max(now.ns)
        })
    }

    fn rearm(&mut self, world: &mut World, now: Moment) {
        let sockets = &mut self.sockets;
        self.http.rearm(sockets, world, now);
        self.redis.rearm(sockets, world, now);
        self.echo.rearm(sockets, world, now);
        self.discard.rearm(sockets, world, now);
    }

    /// Draws `rounds` initial sequence numbers and throws them away: smoltcp gives no other access to its generator.
    pub(crate) fn burn(&mut self, rounds: u64) {
        for _ in 0..rounds {
            // It never gets into the socket set, so it never sends.
            let _ = self.burner.connect(self.interface.context(), NOWHERE, NOWHERE_LOCAL);
            self.burner.abort();
        }
    }
}

pub(crate) fn instant(now: Moment) -> Instant {
    Instant::from_micros(i64::try_from(now.ns / 1000).unwrap_or(i64::MAX))
}

fn configure(
    interface: &mut Interface,
    mac: EthernetAddress,
    given: Addresses,
    (gateway, gateway6): Gateways,
) -> Result<(), &'static str> {
    let mut full = false;
    interface.update_ip_addrs(|addresses| {
        let mut add = |address: IpCidr| full |= addresses.push(address).is_err();
        if let Some(ip) = given.ip {
            add(IpCidr::new(IpAddress::from(IpAddr::V4(ip.address)), ip.prefix));
        }
        if let Some(ip6) = given.ip6 {
            add(IpCidr::new(IpAddress::from(IpAddr::V6(ip6.address)), ip6.prefix));
        }
        let m = mac.0;
        let word = |high: u8, low: u8| u16::from_be_bytes([high, low]);
        let link_local = [
            0xfe80,
            0,
            0,
            0,
            word(m[0] ^ 2, m[1]),
            word(m[2], 0xff),
            word(0xfe, m[3]),
            word(m[4], m[5]),
        ];
        let [a, b, c, d, e, f, g, h] = link_local;
        add(IpCidr::new(IpAddress::v6(a, b, c, d, e, f, g, h), 64));
    });
    if full {
        return Err("the network stack has no room for these addresses");
    }
    let routes = interface.routes_mut();
    let v4 = gateway.map_or(Ok(None), |gateway| routes.add_default_ipv4_route(gateway));
    let v6 = gateway6.map_or(Ok(None), |gateway| routes.add_default_ipv6_route(gateway));
    v4.and(v6)
        .map(|_| ())
        .map_err(|_| "the network stack has no room for these routes")
}

pub(crate) fn udp_socket(port: u16) -> Result<udp::Socket<'static>, &'static str> {
    let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; UDP_PACKETS], vec![0; UDP_BYTES]);
    let mut socket = udp::Socket::new(buffer(), buffer());
    socket.bind(port).map_err(|_| "a UDP port can't be bound")?;
    Ok(socket)
}

fn serve_udp_echo(socket: &mut udp::Socket<'static>, world: &mut World) -> bool {
    let mut moved = false;
    while socket.can_recv() && socket.can_send() {
        let Ok((bytes, meta)) = socket.recv() else { break };
        world.scratch.clear();
        world.scratch.extend_from_slice(bytes);
        world.counters.udp_echo += 1;
        // `meta` also names the address it was sent to, which becomes the source. A datagram that does not fit
        // into what is left of the buffer is lost, as datagrams are.
        let _ = socket.send_slice(&world.scratch, meta);
        moved = true;
    }
    moved
}

fn serve_udp_discard(socket: &mut udp::Socket<'static>, world: &mut World) -> bool {
    let mut moved = false;
    while socket.recv().is_ok() {
        world.counters.udp_discard += 1;
        moved = true;
    }
    moved
}
