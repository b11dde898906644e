//! The VM's network cards: what is said of each with `--tap`, and what follows for the rest.
//!
//! The first card is the only one that most VMs have: it takes its MAC address from `--mac` or the pair's name, as it would if
//! there were no others. Both hosts come to the same addresses.

use std::fmt;
use std::str::FromStr;

use machine::CardConfig;
use machine::devices::net::QUEUE_PAIRS_MAX;

use checkpoint::limits::NICS_MAX;

use crate::settings::{Mac, SettingsError, missing, wrong};

const INTERFACE_BYTES_MAX: usize = 15;
const _: () = assert!(
    NICS_MAX == guest::abi::NETS_MAX,
    "the bundled guest serves on every card"
);

/// What is said of one network card: `NAME[,mac=MAC][,offloads=off][,queues=N]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CardOption {
    /// The TAP device.
    pub tap: String,
    /// Its MAC address, if it was said here.
    pub mac: Option<Mac>,
    /// Whether the guest may leave checksums and the cutting of TCP segments to the host, if it was said.
    pub offloads: Option<bool>,
    /// How many pairs of queues it has, if it was said.
    pub queues: Option<u16>,
}

/// One network card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Card {
    /// The TAP device.
    pub tap: String,
    /// Its MAC address.
    pub mac: Mac,
    /// Whether the guest may leave checksums and the cutting of TCP segments to the host.
    pub offloads: bool,
    /// Its pairs of queues.
    pub queues: u16,
}

impl Card {
    /// Returns what the machine has to know of it.
    pub(crate) fn config(&self) -> CardConfig {
        CardConfig {
            mac: self.mac.0,
            offloads: self.offloads,
            queues: self.queues,
        }
    }
}

impl fmt::Display for Card {
    /// What must be alike on both hosts.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let offloads = if self.offloads { "on" } else { "off" };
        write!(f, "net={},offloads={offloads}", self.mac)?;
        match self.queues {
            1 => Ok(()),
            queues => write!(f, ",queues={queues}"),
        }
    }
}

impl FromStr for CardOption {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let mut card = Self {
            tap: parts.next().unwrap_or_default().to_owned(),
            mac: None,
            offloads: None,
            queues: None,
        };
        for part in parts {
            match part.split_once('=') {
                Some(("mac", mac)) if card.mac.is_none() => card.mac = Some(mac.parse()?),
                Some(("offloads", "on")) if card.offloads.is_none() => card.offloads = Some(true),
                Some(("offloads", "off")) if card.offloads.is_none() => card.offloads = Some(false),
                Some(("queues", queues)) if card.queues.is_none() => card.queues = Some(pairs(queues)?),
                _ => {
                    return Err(format!(
                        "'{part}' says nothing about a TAP device: write NAME, NAME,mac=MAC, NAME,offloads=off or NAME,queues=2"
                    ));
                }
            }
        }
        Ok(card)
    }
}

fn pairs(text: &str) -> Result<u16, String> {
    let queues = text
        .parse()
        .ok()
        .filter(|queues| (1..=QUEUE_PAIRS_MAX).contains(queues));
    queues.ok_or_else(|| format!("'queues={text}': a network card has 1 to {QUEUE_PAIRS_MAX} pairs of queues"))
}

/// Checks what was said of the cards; `first_mac` is what was said of the first one's address elsewhere.
///
/// # Errors
/// Fails if there is none, if there are too many, or if two have something in common that each must have for itself.
pub(crate) fn cards(given: Vec<CardOption>, first_mac: Option<Mac>, pair: &str) -> Result<Vec<Card>, SettingsError> {
    if given.is_empty() {
        return Err(missing(
            "tap",
            "name the host's TAP device (`ip tuntap add dev tap0 mode tap` makes one)",
        ));
    }
    if given.len() > NICS_MAX {
        let reason = format!(
            "these are {} network cards, and a VM has at most {NICS_MAX}: leave some out",
            given.len()
        );
        return Err(wrong("tap", &given[NICS_MAX].tap, reason));
    }
    let mut cards: Vec<Card> = Vec::new();
    for CardOption {
        tap,
        mac,
        offloads,
        queues,
    } in given
    {
        if tap.is_empty() || tap.len() > INTERFACE_BYTES_MAX || tap.contains(['/', ' ', '%', '\0']) {
            let reason = "an interface's name has 1 to 15 characters, no / and no space";
            return Err(wrong("tap", tap, reason));
        }
        if cards.iter().any(|card| card.tap == tap) {
            return Err(wrong(
                "tap",
                tap,
                "named twice: each network card needs a TAP device of its own",
            ));
        }
        let mac = match (cards.len(), mac, first_mac) {
            (0, Some(_), Some(other)) => {
                let reason = "the first network card's address is said with --tap, too: say it once";
                return Err(wrong("mac", other, reason));
            }
            (0, said, elsewhere) => said.or(elsewhere).unwrap_or_else(|| Mac::derived(pair)),
            (number, said, _) => said.unwrap_or_else(|| Mac::derived(&format!("{pair} net{number}"))),
        };
        if cards.iter().any(|card| card.mac == mac) {
            let reason = format!("another network card has the address {mac}: give each its own, with {tap},mac=MAC");
            return Err(wrong("tap", tap, reason));
        }
        cards.push(Card {
            tap,
            mac,
            offloads: offloads.unwrap_or(true),
            queues: queues.unwrap_or(1),
        });
    }
    Ok(cards)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: &str = "02:00:00:00:00:01";

    fn card(text: &str) -> CardOption {
        text.parse().unwrap()
    }

    fn told(given: &[&str], first_mac: Option<&str>) -> Result<Vec<Card>, String> {
        let given = given.iter().map(|text| card(text)).collect();
        let mac = first_mac.map(|mac| mac.parse().unwrap());
        cards(given, mac, "shop").map_err(|error| error.to_string())
    }

    #[test]
    fn a_card_is_a_tap_and_perhaps_an_address() {
        assert_eq!(card("tap0").mac, None);
        assert_eq!(card("tap0,mac=02:00:00:00:00:01").mac, MAC.parse().ok());
        let offloads = |given| told(&[given], None).unwrap()[0].offloads;
        assert!(
            offloads("tap0") && offloads("tap0,offloads=on") && !offloads("tap0,mac=02:00:00:00:00:01,offloads=off")
        );
        let queues = |given| told(&[given], None).unwrap()[0].queues;
        assert_eq!(
            ["tap0", "tap0,queues=1", "tap0,queues=8,offloads=off"].map(queues),
            [1, 1, 8]
        );
        for wrong in [
            "tap0,",
            "tap0,offloads=no",
            "tap0,offloads=on,offloads=off",
            "tap0,queues=0",
            "tap0,queues=9",
            "tap0,queues=",
            "tap0,queues=2,queues=2",
            "tap0,mac=1",
            "tap0,mac=02:00:00:00:00:01,mac=02:00:00:00:00:02",
        ] {
            assert!(wrong.parse::<CardOption>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn both_hosts_must_give_a_card_as_many_queues() {
        let shape = |given| told(&[given], Some(MAC)).unwrap()[0].to_string();
        assert_eq!(shape("tap0"), "net=02:00:00:00:00:01,offloads=on");
        assert_eq!(shape("tap0"), shape("tap1,queues=1"));
        assert_eq!(shape("tap0,queues=2"), "net=02:00:00:00:00:01,offloads=on,queues=2");
    }

    #[test]
    fn one_card_is_as_it_was_and_each_further_has_an_address_of_its_own() {
        let one = told(&["tap0"], None).unwrap();
        assert_eq!(one[0].mac, Mac::derived("shop"));
        assert_eq!(told(&["tap0"], Some(MAC)).unwrap()[0].mac.to_string(), MAC);
        let names: Vec<String> = (0..NICS_MAX).map(|number| format!("tap{number}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let eight = told(&names, None).unwrap();
        assert_eq!(eight[0], one[0]);
        let macs: std::collections::BTreeSet<_> = eight.iter().map(|card| card.mac.0).collect();
        assert_eq!(macs.len(), NICS_MAX);
    }

    #[test]
    fn what_can_not_be_had_is_told_with_its_cure() {
        let nine: Vec<String> = (0..=NICS_MAX).map(|number| format!("tap{number}")).collect();
        let nine: Vec<&str> = nine.iter().map(String::as_str).collect();
        let first = format!("tap0,mac={MAC}");
        let second = format!("tap1,mac={MAC}");
        for (given, mac, expected) in [
            (&[][..], None, "--tap is missing: name the host's TAP device"),
            (
                &nine[..],
                None,
                "--tap tap8: these are 9 network cards, and a VM has at most 8",
            ),
            (&["tap0", "tap0"][..], None, "--tap tap0: named twice"),
            (
                &[first.as_str(), second.as_str()][..],
                None,
                "--tap tap1: another network card has the address 02:",
            ),
            (
                &[first.as_str()][..],
                Some("02:00:00:00:00:09"),
                "--mac 02:00:00:00:00:09: the first network card's",
            ),
        ] {
            let error = told(given, mac).unwrap_err();
            assert!(error.starts_with(expected), "{error}");
        }
    }
}
