//! The guest's settings: `key=value` words on the command line that the machine passes.
//!
//! | key | value | default |
//! |---|---|---|
//! | `ip` | IPv4 address/prefix, or `none` | `10.77.0.10/24` |
//! | `ip6` | IPv6 address/prefix, or `none` | `fd77::10/64` |
//! | `ip.1` … `ip.7` | the same of a further network card | `10.78.0.10/24` … `10.84.0.10/24` |
//! | `ip6.1` … `ip6.7` | the same of a further network card | `fd78::10/64` … `fd7e::10/64` |
//! | `gw`, `gw6` | default gateway, on the first card's network, or `none` | none |
//! | `nondeterminism` | permille of HTTP answers that carry time and noise, 0 to 1000 | 0 |
//! | `dirty` | `MiB,pages per second,zero\|sparse\|run\|runs\|text\|random[,sequential\|random]`, or `off` | off |
//! | `touch` | MiB of memory to write once at start | 0 |
//! | `tcp_rx`, `tcp_tx` | bytes of each TCP socket's buffers, 4096 to 1048576 | 16384, 65536 |
//! | `isn_skew` | 1: initial sequence numbers differ between hosts | 0 |
//! | `timestamps` | 1: TCP connections have timestamps, if the peer offers them too | 0 |
//! | `vlan` | the VLAN of all frames, 1 to 4094, or `none` | none |
//!
//! Parsing is total: an unknown key or a bad value is an error that names it. The same parser serves `/set`.

use core::fmt;
use core::net::{Ipv4Addr, Ipv6Addr};
use core::str::FromStr;

use crate::abi::NETS_MAX;

/// An address and the length of its network's prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network<A> {
    /// The guest's address.
    pub address: A,
    /// The prefix length in bits.
    pub prefix: u8,
}

/// The addresses of one network card.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// IPv4 address.
    pub ip: Option<Network<Ipv4Addr>>,
    /// IPv6 address.
    pub ip6: Option<Network<Ipv6Addr>>,
}

/// What is written into a page on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Only zeroes.
    Zero,
    /// One changed word; the rest of the page stays.
    Sparse,
    /// One changed run of 64 bytes.
    Run,
    /// Eight changed runs of 8 bytes.
    Runs,
    /// Printable, compressible text.
    Text,
    /// Incompressible bytes.
    Random,
}

/// In which order the dirtier goes through its working set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// From the first page to the last, again and again.
    Sequential,
    /// Pages drawn at random.
    Random,
}

/// What the memory dirtier does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dirty {
    /// Size of the working set in MiB.
    pub working_set_mib: u32,
    /// Pages written each second.
    pub pages_per_second: u32,
    /// What is written.
    pub pattern: Pattern,
    /// In which order.
    pub order: Order,
}

/// All settings of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The addresses of each network card.
    pub cards: [Addresses; NETS_MAX],
    /// IPv4 default gateway.
    pub gateway: Option<Ipv4Addr>,
    /// IPv6 default gateway.
    pub gateway6: Option<Ipv6Addr>,
    /// Permille of HTTP answers made non-deterministic.
    pub nondeterminism: u16,
    /// The memory dirtier, `None` if it is off.
    pub dirty: Option<Dirty>,
    /// MiB of memory to write once at start.
    pub touch_mib: u32,
    /// Bytes of each TCP receive buffer.
    pub tcp_receive: usize,
    /// Bytes of each TCP send buffer.
    pub tcp_send: usize,
    /// Whether initial sequence numbers get noise from the time stamp counter.
    pub isn_skew: bool,
    /// Whether TCP connections have timestamps.
    pub timestamps: bool,
    /// The VLAN that all frames are tagged with.
    pub vlan: Option<u16>,
}

/// The cards, by number.
const CARDS: [u8; NETS_MAX] = [0, 1, 2, 3, 4, 5, 6, 7];

impl Addresses {
    /// Returns what a card has unless something else is said.
    fn of_card(card: u8) -> Self {
        Self {
            ip: Some(Network {
                address: Ipv4Addr::new(10, 77 + card, 0, 10),
                prefix: 24,
            }),
            ip6: Some(Network {
                address: Ipv6Addr::new(0xfd77 + u16::from(card), 0, 0, 0, 0, 0, 0, 0x10),
                prefix: 64,
            }),
        }
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            cards: CARDS.map(Addresses::of_card),
            gateway: None,
            gateway6: None,
            nondeterminism: 0,
            dirty: None,
            touch_mib: 0,
            tcp_receive: 16 * 1024,
            tcp_send: 64 * 1024,
            isn_skew: false,
            timestamps: false,
            vlan: None,
        }
    }
}

/// A word of the command line that can't be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SettingsError<'a> {
    /// The word has no `=`.
    NotAPair(&'a str),
    /// No setting has this name.
    UnknownKey(&'a str),
    /// The setting's value can't be used.
    BadValue {
        /// The setting.
        key: &'a str,
        /// The value given.
        value: &'a str,
        /// What would be right.
        expected: &'static str,
    },
}

impl fmt::Display for SettingsError<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAPair(word) => write!(f, "setting '{word}' is not of the form key=value"),
            Self::UnknownKey(key) => {
                write!(f, "unknown setting '{key}': the settings are {KEYS}")
            }
            Self::BadValue { key, value, expected } => {
                write!(f, "setting {key}={value} can't be used: expected {expected}")
            }
        }
    }
}

impl core::error::Error for SettingsError<'_> {}

const KEYS: &str =
    "ip ip6 ip.1 … ip.7 ip6.1 … ip6.7 gw gw6 nondeterminism dirty touch tcp_rx tcp_tx isn_skew timestamps vlan";
/// How a dirtier is set, for messages.
pub(crate) const EXPECTED_DIRTY: &str =
    "MiB,pages per second,zero|sparse|run|runs|text|random[,sequential|random] or off";
const EXPECTED_PERMILLE: &str = "a permille from 0 to 1000";

impl Settings {
    /// Reads a whole command line, starting from the defaults.
    ///
    /// # Errors
    /// The first word that can't be used.
    pub fn parse(line: &str) -> Result<Self, SettingsError<'_>> {
        let mut settings = Self::default();
        for word in line.split_ascii_whitespace() {
            let (key, value) = word.split_once('=').ok_or(SettingsError::NotAPair(word))?;
            settings.set(key, value)?;
        }
        Ok(settings)
    }

    fn set<'a>(&mut self, key: &'a str, value: &'a str) -> Result<(), SettingsError<'a>> {
        let bad = |expected| SettingsError::BadValue { key, value, expected };
        let (name, card) = match key.split_once('.') {
            Some((name, number)) => (name, card(number).ok_or(SettingsError::UnknownKey(key))?),
            None => (key, &CARDS[0]),
        };
        let addresses = &mut self.cards[usize::from(*card)];
        match name {
            "ip" => addresses.ip = network(value, 32).ok_or_else(|| bad("an IPv4 address/prefix or none"))?,
            "ip6" => addresses.ip6 = network(value, 128).ok_or_else(|| bad("an IPv6 address/prefix or none"))?,
            _ if *card > 0 => return Err(SettingsError::UnknownKey(key)),
            "gw" => self.gateway = or_none(value).ok_or_else(|| bad("an IPv4 address or none"))?,
            "gw6" => self.gateway6 = or_none(value).ok_or_else(|| bad("an IPv6 address or none"))?,
            "nondeterminism" => self.nondeterminism = permille(value).ok_or_else(|| bad(EXPECTED_PERMILLE))?,
            "dirty" => self.dirty = dirty(value).ok_or_else(|| bad(EXPECTED_DIRTY))?,
            "touch" => self.touch_mib = value.parse().map_err(|_| bad("a number of MiB"))?,
            "tcp_rx" => self.tcp_receive = buffer(value).ok_or_else(|| bad("bytes from 4096 to 1048576"))?,
            "tcp_tx" => self.tcp_send = buffer(value).ok_or_else(|| bad("bytes from 4096 to 1048576"))?,
            "isn_skew" => self.isn_skew = switch(value).ok_or_else(|| bad("0 or 1"))?,
            "timestamps" => self.timestamps = switch(value).ok_or_else(|| bad("0 or 1"))?,
            "vlan" => self.vlan = vlan(value).ok_or_else(|| bad("a number from 1 to 4094 or none"))?,
            _ => return Err(SettingsError::UnknownKey(key)),
        }
        Ok(())
    }
}

/// Reads a permille.
#[must_use]
pub fn permille(value: &str) -> Option<u16> {
    value.parse().ok().filter(|share| *share <= 1000)
}

/// Reads the dirtier's setting; the inner `None` is `off`.
#[must_use]
pub fn dirty(value: &str) -> Option<Option<Dirty>> {
    if value == "off" {
        return Some(None);
    }
    let mut parts = value.split(',');
    let working_set_mib = parts.next()?.parse().ok().filter(|mib| *mib > 0)?;
    let pages_per_second = parts.next()?.parse().ok().filter(|rate| *rate > 0)?;
    let pattern = pattern(parts.next()?)?;
    let order = match parts.next() {
        None | Some("sequential") => Order::Sequential,
        Some("random") => Order::Random,
        Some(_) => return None,
    };
    if parts.next().is_some() {
        return None;
    }
    Some(Some(Dirty {
        working_set_mib,
        pages_per_second,
        pattern,
        order,
    }))
}

/// Reads the name of a pattern.
#[must_use]
pub fn pattern(name: &str) -> Option<Pattern> {
    Some(match name {
        "zero" => Pattern::Zero,
        "sparse" => Pattern::Sparse,
        "run" => Pattern::Run,
        "runs" => Pattern::Runs,
        "text" => Pattern::Text,
        "random" => Pattern::Random,
        _ => return None,
    })
}

/// Reads the number of a further card.
fn card(number: &str) -> Option<&'static u8> {
    CARDS[1..].iter().find(|card| number.as_bytes() == [b'0' + **card])
}

fn network<A: FromStr>(value: &str, longest: u8) -> Option<Option<Network<A>>> {
    if value == "none" {
        return Some(None);
    }
    let (address, prefix) = value.split_once('/')?;
    let address = address.parse().ok()?;
    let prefix = prefix.parse().ok().filter(|bits| (1..=longest).contains(bits))?;
    Some(Some(Network { address, prefix }))
}

fn or_none<A: FromStr>(value: &str) -> Option<Option<A>> {
    if value == "none" {
        Some(None)
    } else {
        value.parse().ok().map(Some)
    }
}

fn buffer(value: &str) -> Option<usize> {
    value.parse().ok().filter(|bytes| (4096..=1_048_576).contains(bytes))
}

fn vlan(value: &str) -> Option<Option<u16>> {
    or_none(value).filter(|vlan| vlan.is_none_or(|vlan| (1..=4094).contains(&vlan)))
}

fn switch(value: &str) -> Option<bool> {
    match value {
        "0" => Some(false),
        "1" => Some(true),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::string::ToString;

    #[test]
    fn a_full_line_is_read() {
        let line = "ip=192.168.1.5/16 ip6=none gw=192.168.0.1 nondeterminism=50 dirty=8,100,text,random touch=3 \
                    tcp_rx=8192 tcp_tx=4096 isn_skew=1 timestamps=1 vlan=4094";
        let settings = Settings::parse(line).unwrap();
        let first = settings.cards[0];
        assert_eq!(
            first.ip,
            Some(Network {
                address: Ipv4Addr::new(192, 168, 1, 5),
                prefix: 16
            })
        );
        assert_eq!(first.ip6, None);
        assert_eq!(settings.gateway, Some(Ipv4Addr::new(192, 168, 0, 1)));
        assert_eq!(settings.nondeterminism, 50);
        let dirty = Dirty {
            working_set_mib: 8,
            pages_per_second: 100,
            pattern: Pattern::Text,
            order: Order::Random,
        };
        assert_eq!(settings.dirty, Some(dirty));
        assert_eq!(
            (settings.tcp_receive, settings.tcp_send, settings.touch_mib),
            (8192, 4096, 3)
        );
        assert!(settings.isn_skew && settings.timestamps);
        assert_eq!(settings.vlan, Some(4094));
        assert_eq!(Settings::parse("  "), Ok(Settings::default()));
    }

    #[test]
    fn each_card_has_addresses_of_its_own() {
        let settings = Settings::parse("ip=none ip.1=192.168.1.5/16 ip6.7=none").unwrap();
        let addresses = |card: usize| settings.cards[card];
        assert_eq!(addresses(0).ip, None);
        assert_eq!(addresses(1).ip.unwrap().address, Ipv4Addr::new(192, 168, 1, 5));
        assert_eq!(addresses(2).ip.unwrap().address, Ipv4Addr::new(10, 79, 0, 10));
        assert_eq!(addresses(6).ip6.unwrap().address.segments()[0], 0xfd7d);
        assert_eq!(addresses(7).ip6, None);
        for key in ["ip.0", "ip.8", "ip.01", "ip.", "gw.1", "vlan.1", "ip.1.1"] {
            let line = std::format!("{key}=none");
            assert_eq!(Settings::parse(&line), Err(SettingsError::UnknownKey(key)));
        }
    }

    #[test]
    fn errors_name_the_word() {
        let text = |line| Settings::parse(line).unwrap_err().to_string();
        assert!(text("ipp=1").contains("unknown setting 'ipp': the settings are ip "));
        assert!(text("quiet").contains("'quiet' is not of the form"));
        assert!(text("nondeterminism=1001").contains("nondeterminism=1001 can't be used: expected a permille"));
        for line in [
            "ip=10.0.0.1",
            "ip=10.0.0.1/33",
            "ip6=fd77::1/0",
            "gw=x",
            "dirty=1,1",
            "dirty=0,1,text",
            "vlan=0",
            "vlan=4095",
        ] {
            assert!(
                matches!(Settings::parse(line), Err(SettingsError::BadValue { .. })),
                "{line}"
            );
        }
    }

    proptest! {
        #[test]
        fn any_line_gets_an_answer(line in ".*") {
            let _ = Settings::parse(&line);
        }

        #[test]
        fn any_value_gets_an_answer(key in "(ip|ip6|gw|gw6|dirty|tcp_rx|touch)", value in "[0-9a-f:./,]{0,30}") {
            let _ = Settings::parse(&std::format!("{key}={value}"));
        }
    }
}
