//! What the services share: the store, the memory to write, counters and wishes.

use alloc::vec::Vec;
use core::net::IpAddr;

use crate::dirtier::{Arena, Dirtier, Touch};
use crate::kv::Kv;
use crate::settings::Settings;

/// How the guest wants to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Power {
    /// Off, in order.
    Off,
    /// Start again.
    Reset,
}

/// A wish to open connections outwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dial {
    /// Where to.
    pub address: IpAddr,
    /// The port there.
    pub port: u16,
    /// How many.
    pub count: u32,
}

/// Counts that depend on the frames received only, not on time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// HTTP requests answered.
    pub http_requests: u64,
    /// Redis commands executed.
    pub redis_commands: u64,
    /// Bytes taken in by TCP echo.
    pub echo_bytes: u64,
    /// Bytes taken in by TCP discard.
    pub discard_bytes: u64,
    /// Datagrams taken in by UDP echo.
    pub udp_echo: u64,
    /// Datagrams taken in by UDP discard.
    pub udp_discard: u64,
    /// TCP connections accepted.
    pub accepted: u64,
    /// Outgoing connections asked for.
    pub dials_asked: u64,
    /// Outgoing connections that were established.
    pub dials_opened: u64,
    /// Outgoing connections that got their line back.
    pub dials_echoed: u64,
    /// Outgoing connections that failed.
    pub dials_failed: u64,
}

/// All shared state of the services.
#[derive(Debug)]
pub struct World {
    /// The settings now in force.
    pub settings: Settings,
    /// The key-value store.
    pub kv: Kv,
    /// Memory to write.
    pub arena: Arena,
    /// Writes memory at a set rate.
    pub dirtier: Dirtier,
    /// Writes memory once.
    pub touch: Touch,
    /// Counts.
    pub counters: Counters,
    /// Outgoing connections asked for and not yet taken up.
    pub dials: Vec<Dial>,
    /// Set when the guest is to end.
    pub power: Option<Power>,
    /// What the heap's size allows.
    pub(crate) limits: Limits,
    /// Bytes that connections have taken in or made and not yet sent.
    pub(crate) buffered: usize,
    pub(crate) scratch: Vec<u8>,
}

/// How the heap is divided, so that no client can use it up.
///
/// Of the heap, 9/20 are for the TCP sockets' buffers, 1/4 for the key-value store, 1/12 for commands and replies
/// under way; the rest is for what has a fixed size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections at the same time to each of HTTP and Redis, on each network card.
    pub connections: usize,
    /// Connections at the same time to each of echo and discard, on each network card.
    pub side_connections: usize,
    /// Bytes of commands and replies under way.
    pub buffered: usize,
    /// Bytes of the key-value store.
    pub store: usize,
}

impl Limits {
    /// Divides a heap of `heap` bytes for so many network cards.
    ///
    /// # Errors
    /// What of the settings does not fit.
    pub fn new(settings: &Settings, cards: usize, heap: usize) -> Result<Self, &'static str> {
        let cards = cards.max(1);
        let heap = heap.saturating_sub((cards - 1) * CARD_BYTES);
        let sockets = heap / 20 * 9 / cards / (settings.tcp_receive + settings.tcp_send);
        let limits = Self {
            connections: (sockets * 2 / 5).min(CONNECTIONS_MAX),
            side_connections: (sockets / 10).min(CONNECTIONS_MAX),
            buffered: heap / 12,
            store: heap / 4,
        };
        if limits.side_connections < SIDE_CONNECTIONS_MIN {
            return Err(
                "settings tcp_rx, tcp_tx: the machine has too little memory for buffers this large, on each network card",
            );
        }
        Ok(limits)
    }
}

const CONNECTIONS_MAX: usize = 256;
/// What a further network card takes besides its connections.
const CARD_BYTES: usize = 2 << 20;
const SIDE_CONNECTIONS_MIN: usize = 8;

impl World {
    /// Puts the parts together, and starts what the settings ask for.
    ///
    /// # Errors
    /// What of the settings is impossible on this machine.
    pub fn new(settings: Settings, limits: Limits, kv: Kv, arena: Arena, now_ns: u64) -> Result<Self, &'static str> {
        let mut dirtier = Dirtier::default();
        let mut touch = Touch::default();
        dirtier
            .set(settings.dirty, &arena, now_ns)
            .map_err(|_| "setting dirty: the working set is larger than the memory: give the machine more")?;
        let mib = usize::try_from(settings.touch_mib).unwrap_or(usize::MAX);
        if mib > 0 {
            touch
                .start(&arena, mib)
                .map_err(|_| "setting touch: there is less memory: give the machine more")?;
        }
        Ok(Self {
            settings,
            kv,
            arena,
            dirtier,
            touch,
            counters: Counters::default(),
            dials: Vec::new(),
            power: None,
            limits,
            buffered: 0,
            scratch: Vec::new(),
        })
    }
}
