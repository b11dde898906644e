//! Three kernels' stacks as three network namespaces: two hosts that are told the same, and a client; the switch between them.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use machine::netns::make_lasting_tap;
use machine::offload::Offloads;
use machine::tap::Tap;
use tandem::lab::{CLIENT_V4, CLIENT_V6, LabError, Namespace, TAP};

use crate::services::{Program, Style};
use crate::switch::{Conditions, Switch, Told};

/// The server's addresses.
const SERVER_V4: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
const SERVER_V6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 2);
const SERVER_MAC: [u8; 6] = [2, 0x74, 0x61, 0x6e, 0, 2];
const CLIENT_MAC: [u8; 6] = [2, 0x74, 0x61, 0x6e, 0, 1];
/// Frames that a TAP holds for the switch: more than a stack sends at once, however long the switch's thread has to wait for a
/// processor. A guest's frames are never lost between it and the comparator, and what only one of two stacks has lost costs a
/// retransmission timeout for each frame.
const TAP_FRAMES: u32 = 16_384;

/// Ends a test that would wait for ever.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// Which addresses a connection uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ip {
    V4,
    V6,
}

/// What a stage is made with.
#[derive(Clone, Debug, Default)]
pub(crate) struct Setup {
    pub(crate) conditions: Conditions,
    /// Whether the kernels' TCP has timestamps, and whether the two count from the same moment.
    pub(crate) timestamps: Timestamps,
    /// How the secondary's program hands its bytes to its kernel; the primary's does as they are.
    pub(crate) style: Style,
    /// What the stacks of the primary, the secondary and the client leave to the network.
    pub(crate) offloads: [Offloads; 3],
    /// Where captures are written.
    pub(crate) captures: Option<PathBuf>,
}

/// See [`Setup`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Timestamps {
    /// As they are by default, and the two hosts' differ by as much as they are apart.
    #[default]
    Alike,
    /// The two hosts' differ by an arbitrary number.
    Apart,
    /// None.
    Off,
}

/// The whole; what runs in it ends when it is dropped.
pub(crate) struct Stage {
    // In the order of their ends.
    _programs: [Program; 2],
    pub(crate) switch: Switch,
    hosts: [Namespace; 2],
    client: Namespace,
    _turn: MutexGuard<'static, ()>,
}

impl Ip {
    /// Returns the address of one of the server's ports.
    pub(crate) fn server(self, port: u16) -> SocketAddr {
        SocketAddr::new(self.choose(SERVER_V4, SERVER_V6), port)
    }

    /// Returns the address of one of the client's ports.
    pub(crate) fn client(self, port: u16) -> SocketAddr {
        SocketAddr::new(self.choose(CLIENT_V4, CLIENT_V6), port)
    }

    fn choose(self, v4: Ipv4Addr, v6: Ipv6Addr) -> IpAddr {
        match self {
            Self::V4 => v4.into(),
            Self::V6 => v6.into(),
        }
    }
}

impl Stage {
    /// Makes a stage, and has output compared; without root it says so and returns nothing.
    pub(crate) fn new(setup: &Setup) -> Option<Self> {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        match Self::make(setup, turn) {
            Ok(stage) => Some(stage),
            Err(lack) => {
                assert!(
                    std::env::var_os("TANDEM_REQUIRE_KVM").is_none(),
                    "TANDEM_REQUIRE_KVM is set, and this machine can't run the test: {lack}"
                );
                eprintln!("SKIPPED, nothing was tested: {lack}");
                None
            }
        }
    }

    fn make(setup: &Setup, turn: MutexGuard<'static, ()>) -> Result<Self, LabError> {
        let hosts = ["primary", "secondary", "client"].map(Namespace::new);
        let [primary, secondary, client] = hosts;
        let (primary, secondary, client) = (primary?, secondary?, client?);
        let [near, far] = match setup.timestamps {
            Timestamps::Alike => ["1", "1"],
            // Without an offset of each connection's own.
            Timestamps::Apart => ["1", "2"],
            Timestamps::Off => ["0", "0"],
        };
        let server: [IpAddr; 2] = [SERVER_V4.into(), SERVER_V6.into()];
        let taps = [
            furnish(&primary, SERVER_MAC, server, near)?,
            furnish(&secondary, SERVER_MAC, server, far)?,
            furnish(&client, CLIENT_MAC, [CLIENT_V4.into(), CLIENT_V6.into()], "1")?,
        ];
        // Room from the beginning, and as much on both: it would grow by how fast a program reads. What finds no room on the secondary
        // is repeated by the client only after a time, and these tests can't take the checkpoint that a pair would.
        for host in [&primary, &secondary] {
            set(host, "ipv4/tcp_rmem", "4096 4194304 8388608");
        }
        for (tap, offloads) in taps.iter().zip(setup.offloads) {
            tap.set_offloads(offloads).map_err(LabError::Tap)?;
        }
        let programs = [
            Program::start(&primary, Style::Whole),
            Program::start(&secondary, setup.style),
        ];
        let asked = std::env::var_os("STACKS_CAPTURES").map(PathBuf::from);
        let captures = setup.captures.as_deref().or(asked.as_deref());
        let switch = Switch::start(taps, setup.conditions, captures);
        switch.protect();
        Ok(Self {
            _programs: programs,
            switch,
            hosts: [primary, secondary],
            client,
            _turn: turn,
        })
    }

    /// Returns the two hosts.
    pub(crate) fn hosts(&self) -> &[Namespace; 2] {
        &self.hosts
    }

    /// Runs a client to its end.
    pub(crate) fn client<T: Send + 'static>(&self, body: impl FnOnce() -> T + Send + 'static) -> T {
        end(self.start_client(body))
    }

    /// Starts a client.
    pub(crate) fn start_client<T: Send + 'static>(&self, body: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        self.client.thread("client", body).expect("a thread can be started")
    }

    /// Returns what has happened, and asserts that the two sides have never differed.
    pub(crate) fn agreed(&self) -> Told {
        let told = self.switch.tell();
        println!("{told:?}");
        assert!(
            told.divergences.is_empty(),
            "the two sides differed: {:#?}",
            told.divergences
        );
        told
    }
}

/// Waits for a client, and panics if it did.
pub(crate) fn end<T>(client: JoinHandle<T>) -> T {
    client.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Sets one of a host's `net` parameters.
pub(crate) fn set(host: &Namespace, name: &str, value: &'static str) {
    let path = format!("/proc/sys/net/{name}");
    host.run(move || fs::write(&path, value).unwrap_or_else(|error| panic!("{path} can't be set: {error}")));
}

/// Gives a namespace its TAP, addresses, and silence: it says nothing of its own accord once it has its addresses.
fn furnish(host: &Namespace, mac: [u8; 6], addresses: [IpAddr; 2], timestamps: &'static str) -> Result<Tap, LabError> {
    for (name, value) in [
        // No link-local address, no wait for duplicate detection, no routers; groups are joined at once, and told once.
        ("ipv6/conf/default/addr_gen_mode", "1"),
        ("ipv6/conf/default/accept_dad", "0"),
        ("ipv6/conf/default/accept_ra", "0"),
        ("ipv6/conf/default/router_solicitations", "0"),
        ("ipv6/conf/default/mldv2_unsolicited_report_interval", "0"),
        ("ipv4/tcp_timestamps", timestamps),
    ] {
        set(host, name, value);
    }
    host.run(|| make_lasting_tap(TAP)).map_err(LabError::Tap)?;
    host.netlink(async move |net| {
        net.set_mac(TAP, mac).await?;
        net.set_queue(TAP, TAP_FRAMES).await?;
        net.up("lo").await?;
        net.up(TAP).await
    })?;
    let tap = host
        .run(|| Tap::open_with_offloads(TAP))
        .expect("the TAP was just made");
    host.netlink(async move |net| {
        for address in addresses {
            net.add_address(TAP, address, if address.is_ipv4() { 24 } else { 64 })
                .await?;
        }
        Ok(())
    })?;
    Ok(tap)
}
