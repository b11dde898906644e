//! The whole guest behind its devices: takes in a frame, serves, sends.
//!
//! Driven by the freestanding program's loop: [`Server::round`] with the time and a network device, then the
//! store's disk requests, then [`Server::deadline`] when there was nothing to do. One round takes in at most one
//! frame and then sends all that follows from it, so that what is sent depends on the order of frames and not on
//! how many lay ready. Time enters only where TCP itself needs it, and where it was asked for.

use alloc::vec;
use core::net::IpAddr;

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
use crate::random::{Random, Seed};
use crate::redis::{self, Redis};
use crate::settings::Settings;
use crate::tcp::{Pool, buffer, set_time};
use crate::vlan::Tagged;
use crate::world::World;

/// Accepted connections after which fresh entropy is mixed in.
const CONNECTIONS_PER_SEED: u64 = 16;
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

/// The services and the network stack under them.
pub struct Server {
    interface: Interface,
    sockets: SocketSet<'static>,
    world: World,
    http: Pool<Http>,
    redis: Pool<Redis>,
    echo: Pool<Echo>,
    discard: Pool<Discard>,
    udp_echo: SocketHandle,
    udp_discard: SocketHandle,
    outgoing: Outgoing,
    random: Random,
    burner: smol_tcp::Socket<'static>,
    accepted: u64,
    seeded_at: u64,
    stalled: bool,
}

impl core::fmt::Debug for Server {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Server")
            .field("world", &self.world)
            .finish_non_exhaustive()
    }
}

impl Server {
    /// Sets up the network stack and all services.
    ///
    /// # Errors
    /// What of the settings can't be had.
    pub fn new(
        world: World,
        mac: [u8; 6],
        seed: &Seed,
        device: &mut impl Device,
        now: Moment,
    ) -> Result<Self, &'static str> {
        let mac = EthernetAddress(mac);
        if !mac.is_unicast() {
            return Err("the network device's MAC address is not a unicast address: give it another");
        }
        let mut random = Random::new(*seed);
        let mut config = Config::new(HardwareAddress::Ethernet(mac));
        config.random_seed = random.draw();
        let mut interface = Interface::new(config, device, instant(now));
        configure(&mut interface, mac, &world.settings)?;
        let mut sockets = SocketSet::new(vec![]);
        let udp_echo = sockets.add(udp_socket(ECHO_PORT)?);
        let udp_discard = sockets.add(udp_socket(DISCARD_PORT)?);
        let outgoing = Outgoing::new(&mut random);
        let limits = world.limits;
        let mut server = Self {
            interface,
            sockets,
            world,
            http: Pool::new(http::PORT, limits.connections),
            redis: Pool::new(redis::PORT, limits.connections),
            echo: Pool::new(ECHO_PORT, limits.side_connections),
            discard: Pool::new(DISCARD_PORT, limits.side_connections),
            udp_echo,
            udp_discard,
            outgoing,
            random,
            burner: smol_tcp::Socket::new(buffer(1), buffer(1)),
            accepted: 0,
            seeded_at: 0,
            stalled: false,
        };
        server.rearm(now);
        Ok(server)
    }

    /// What the services share.
    #[must_use]
    pub fn world(&self) -> &World {
        &self.world
    }

    /// What the services share.
    pub fn world_mut(&mut self) -> &mut World {
        &mut self.world
    }

    /// Takes in at most one frame, serves, and sends; returns whether anything happened.
    pub fn round(&mut self, now: Moment, device: &mut impl Device) -> bool {
        let at = instant(now);
        set_time(now);
        let vlan = self.world.settings.vlan;
        let device = &mut Tagged { device, vlan };
        if self.world.settings.isn_skew {
            self.burn((now.tsc >> 3) & 15);
        }
        self.interface.poll_maintenance(at);
        let full = [
            self.http.full(),
            self.redis.full(),
            self.echo.full(),
            self.discard.full(),
        ];
        let opening = [
            self.http.opening(),
            self.redis.opening(),
            self.echo.opening(),
            self.discard.opening(),
        ]
        .concat();
        let opening = &opening[..];
        let mut gate = Gate { device, full, opening };
        let ingress = self.interface.poll_ingress_single(at, &mut gate, &mut self.sockets);
        let mut moved = ingress != PollIngressSingleResult::None;
        moved |= self.serve(now);
        let mut egress = false;
        while self.interface.poll_egress(at, device, &mut self.sockets) == PollResult::SocketStateChanged {
            egress = true;
        }
        // A device without room ends the egress early: then some sockets may still have their last word to say.
        self.stalled = device.transmit(at).is_none();
        if !self.stalled {
            self.rearm(now);
        }
        self.spend_accepted();
        moved || egress
    }

    /// Whether the device had no room for all that was to be sent: wait for it, not for time.
    #[must_use]
    pub fn is_stalled(&self) -> bool {
        self.stalled
    }

    /// When [`Self::round`] must be called again at the latest, in guest nanoseconds; `None`: when a frame comes.
    pub fn deadline(&mut self, now: Moment) -> Option<u64> {
        if !self.world.touch.is_done() {
            return Some(now.ns);
        }
        let at = instant(now);
        let network = self.interface.poll_at(at, &self.sockets).map(|due| {
            let micros = u64::try_from(due.total_micros()).unwrap_or(0);
            micros.saturating_mul(1000).max(now.ns)
        });
        let dirtier = self.world.dirtier.deadline();
        match (network, dirtier) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        }
    }

    /// Whether it is time to draw from the entropy device; depends on the connections accepted only.
    #[must_use]
    pub fn wants_seed(&self) -> bool {
        self.accepted - self.seeded_at >= CONNECTIONS_PER_SEED
    }

    /// Mixes fresh entropy into the random state: what [`Self::wants_seed`] asked for, or what came at a takeover.
    pub fn mix(&mut self, fresh: &Seed) {
        self.seeded_at = self.accepted;
        self.random.mix(fresh);
        let rounds = self.random.draw() % 16384;
        self.burn(rounds);
    }

    fn serve(&mut self, now: Moment) -> bool {
        let Self {
            sockets,
            world,
            interface,
            ..
        } = self;
        let mut moved = world.touch.run(&mut world.arena);
        moved |= world.dirtier.run(&mut world.arena, now.ns);
        moved |= self.http.serve(sockets, world, now);
        moved |= self.redis.serve(sockets, world, now);
        moved |= self.echo.serve(sockets, world, now);
        moved |= self.discard.serve(sockets, world, now);
        moved |= self.outgoing.serve(interface, sockets, world);
        moved |= serve_udp_echo(sockets.get_mut(self.udp_echo), world);
        moved |= serve_udp_discard(sockets.get_mut(self.udp_discard), world);
        moved
    }

    fn rearm(&mut self, now: Moment) {
        let Self { sockets, world, .. } = self;
        self.http.rearm(sockets, world, now);
        self.redis.rearm(sockets, world, now);
        self.echo.rearm(sockets, world, now);
        self.discard.rearm(sockets, world, now);
    }

    /// After each accepted connection the next initial sequence number is moved on by an unknown distance.
    fn spend_accepted(&mut self) {
        while self.accepted < self.world.counters.accepted {
            self.accepted += 1;
            let rounds = self.random.draw() % 256;
            self.burn(rounds);
        }
    }

    /// Draws `rounds` initial sequence numbers and throws them away: smoltcp gives no other access to its generator.
    fn burn(&mut self, rounds: u64) {
        for _ in 0..rounds {
            // It never gets into the socket set, so it never sends.
            let _ = self.burner.connect(self.interface.context(), NOWHERE, NOWHERE_LOCAL);
            self.burner.abort();
        }
    }
}

fn instant(now: Moment) -> Instant {
    Instant::from_micros(i64::try_from(now.ns / 1000).unwrap_or(i64::MAX))
}

fn configure(interface: &mut Interface, mac: EthernetAddress, settings: &Settings) -> Result<(), &'static str> {
    let mut full = false;
    interface.update_ip_addrs(|addresses| {
        let mut add = |address: IpCidr| full |= addresses.push(address).is_err();
        if let Some(ip) = settings.ip {
            add(IpCidr::new(IpAddress::from(IpAddr::V4(ip.address)), ip.prefix));
        }
        if let Some(ip6) = settings.ip6 {
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
    let v4 = settings
        .gateway
        .map_or(Ok(None), |gateway| routes.add_default_ipv4_route(gateway));
    let v6 = settings
        .gateway6
        .map_or(Ok(None), |gateway| routes.add_default_ipv6_route(gateway));
    v4.and(v6)
        .map(|_| ())
        .map_err(|_| "the network stack has no room for these routes")
}

fn udp_socket(port: u16) -> Result<udp::Socket<'static>, &'static str> {
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

#[cfg(test)]
mod tests;
