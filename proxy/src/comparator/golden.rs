//! Reads the golden vectors, `proxy/tests/golden/*.txt`, and holds the comparator to them, both ways round.
//!
//! `case P7 …` begins a comparator of its own. `primary`, `secondary` and `both` send a frame: `tcp`, `udp`, `ip`, `fragment`,
//! `arp`, `ether` or `raw`, then what is special about it, then its payload (`"text"`, `hex:0a0b`, `60*9`: sixty times the
//! character). `checkpoint` commits and loads. The last line says what comes of it: `equal` (all has left and nothing waits),
//! `differs` (the fact, and where), `waits` (until the bound), `policy` (for a commit that is due soon), `ack` (with which all has left).

use std::collections::BTreeMap;
use std::path::Path;

use bytes::Bytes;
use checkpoint::Duration;
use checkpoint::limits::FRAME_HEADER_BYTES;

use crate::comparator::ComparatorLimits;
use crate::offload;
use crate::testkit::*;
use crate::verdict::{Reason, Verdict};

/// One frame as written.
struct Line<'a> {
    kind: &'a str,
    settings: BTreeMap<&'a str, &'a str>,
    payload: Vec<u8>,
}

impl<'a> Line<'a> {
    fn read(words: &[&'a str]) -> Self {
        let mut payload = Vec::new();
        let mut settings = BTreeMap::new();
        for word in &words[1..] {
            if let Some(text) = word.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) {
                payload.extend(text.bytes());
            } else if let Some(digits) = word.strip_prefix("hex:") {
                payload.extend(hex(digits));
            } else if let Some((count, byte)) = word.split_once('*') {
                payload.extend(vec![byte.as_bytes()[0]; count.parse::<usize>().unwrap()]);
            } else {
                let (name, value) = word.split_once('=').unwrap_or((word, ""));
                settings.insert(name, value);
            }
        }
        Self {
            kind: words[0],
            settings,
            payload,
        }
    }

    fn number(&mut self, name: &str) -> Option<u32> {
        let text = self.settings.remove(name)?;
        let (digits, radix) = text.strip_prefix("0x").map_or((text, 10), |digits| (digits, 16));
        Some(u32::from_str_radix(digits, radix).unwrap_or_else(|_| panic!("{text} is no number")))
    }

    fn byte(&mut self, name: &str, unless: u8) -> u8 {
        self.number(name).map_or(unless, |number| u8::try_from(number).unwrap())
    }

    fn short(&mut self, name: &str, unless: u16) -> u16 {
        self.number(name)
            .map_or(unless, |number| u16::try_from(number).unwrap())
    }

    fn vlans(&mut self) -> Vec<(u16, u16)> {
        let outer = self.number("qinq").map(|vlan| (0x88a8, u16::try_from(vlan).unwrap()));
        let inner = self.number("vlan").map(|vlan| (0x8100, u16::try_from(vlan).unwrap()));
        outer.into_iter().chain(inner).collect()
    }

    fn frame(mut self) -> Bytes {
        let v6 = self.settings.remove("v6").is_some();
        let vlans = self.vlans();
        let (from, to) = ends(v6, false);
        let payload = core::mem::take(&mut self.payload);
        let at = IP_AT + 4 * vlans.len();
        let frame = match self.kind {
            "tcp" => self.tcp(v6, vlans, payload),
            "udp" => {
                let mut datagram = self.short("from", 53).to_be_bytes().to_vec();
                datagram.extend(self.short("port", 9).to_be_bytes());
                datagram.extend(u16::try_from(8 + payload.len()).unwrap().to_be_bytes());
                datagram.extend(self.short("sum", 0).to_be_bytes());
                datagram.extend(payload);
                ip(from, to, 17, 64, &vlans, &datagram)
            }
            "ip" => ip(from, to, self.byte("protocol", 0xfd), 64, &vlans, &payload),
            "fragment" => {
                let (number, protocol) = (self.number("id").unwrap(), self.byte("protocol", 17));
                let place = self.short("at", 0);
                let more = u16::from(self.settings.remove("last").is_none());
                if v6 {
                    let mut extended = vec![protocol, 0];
                    extended.extend((place | more).to_be_bytes());
                    extended.extend(number.to_be_bytes());
                    extended.extend(payload);
                    ip(from, to, 44, 64, &vlans, &extended)
                } else {
                    let mut frame = ip(from, to, protocol, 64, &vlans, &payload).to_vec();
                    frame[at + 4..at + 6].copy_from_slice(&u16::try_from(number).unwrap().to_be_bytes());
                    frame[at + 6..at + 8].copy_from_slice(&((place / 8) | (more << 13)).to_be_bytes());
                    frame.into()
                }
            }
            "arp" => arp(self.short("operation", 1), [10, 0, 0, self.byte("sender", 1)]),
            "ether" => ethernet(&vlans, self.short("type", 0x88cc), &payload),
            "raw" => offload::complete(&payload),
            other => panic!("there is no kind {other}"),
        };
        self.changed(frame.to_vec(), at, v6)
    }

    fn tcp(&mut self, v6: bool, vlans: Vec<(u16, u16)>, payload: Vec<u8>) -> Bytes {
        let letters = self.settings.remove("flags").unwrap_or("A");
        let bits = [
            ('F', FIN),
            ('S', SYN),
            ('R', RST),
            ('P', 8),
            ('A', ACK),
            ('U', URG),
            ('E', 64),
        ];
        let flag = |letter| bits.iter().find(|(known, _)| *known == letter).expect("a flag").1;
        let mut tcp = Tcp {
            v6,
            vlans,
            ports: (self.short("from", 80), self.short("port", 5_000)),
            urgent: self.short("urgent", 0),
            window: self.short("window", 1_000),
            ..Tcp::new(
                self.number("seq").unwrap(),
                self.number("ack").unwrap_or(0),
                letters.chars().map(flag).sum(),
                &payload,
            )
        };
        if let Some((left, right)) = self.settings.remove("sack").and_then(|text| text.split_once('-')) {
            tcp = tcp.sack(&[(left.parse().unwrap(), right.parse().unwrap())]);
        }
        if let Some((value, echo)) = self.settings.remove("times").and_then(|text| text.split_once('-')) {
            tcp = tcp.times(value.parse().unwrap(), echo.parse().unwrap());
        }
        tcp.options
            .extend(self.settings.remove("options").map(hex).unwrap_or_default());
        tcp.frame()
    }

    /// Changes what nobody but the sender would compute.
    fn changed(mut self, mut frame: Vec<u8>, ip: usize, v6: bool) -> Bytes {
        let tos = if v6 { ip } else { ip + 1 };
        for (name, at) in [
            ("station", FRAME_HEADER_BYTES + 5),
            ("tos", tos),
            ("ttl", ip + if v6 { 7 } else { 8 }),
            ("ipid", ip + 5),
        ] {
            if let Some(value) = self.number(name) {
                frame[at] = u8::try_from(value).unwrap();
            }
        }
        if let Some(count) = self.number("pad") {
            frame.resize(frame.len() + usize::try_from(count).unwrap(), 0xee);
        }
        assert!(
            self.settings.is_empty(),
            "{} has no {:?}",
            self.kind,
            self.settings.keys()
        );
        frame.into()
    }
}

fn hex(digits: &str) -> Vec<u8> {
    let pairs = digits.as_bytes().chunks(2);
    pairs
        .map(|pair| u8::from_str_radix(core::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

/// What has come of a case so far.
struct Run {
    bench: Bench,
    /// The sides change places.
    swapped: bool,
    sent: usize,
    verdicts: Vec<Verdict>,
}

impl Run {
    fn new(swapped: bool) -> Self {
        Self {
            // The vectors are about whole frames.
            bench: Bench::with(ComparatorLimits {
                begin: Duration::from_millis(10_000),
                ..ComparatorLimits::default()
            }),
            swapped,
            sent: 0,
            verdicts: Vec::new(),
        }
    }

    fn step(&mut self, words: &[&str]) {
        match (words[0], self.swapped) {
            ("both", _) => [true, false]
                .map(|primary| self.send(primary, words))
                .into_iter()
                .collect(),
            ("primary", false) | ("secondary", true) => self.send(true, words),
            ("primary", true) | ("secondary", false) => self.send(false, words),
            ("checkpoint", _) => {
                (self.sent, self.verdicts) = (0, Vec::new());
                drop(self.bench.checkpoint());
            }
            _ => self.ends_as(words),
        }
    }

    fn send(&mut self, primary: bool, words: &[&str]) {
        let frame = Line::read(&words[1..]).frame();
        self.verdicts.extend(if primary {
            self.sent += 1;
            self.bench.primary(frame)
        } else {
            self.bench.secondary(frame)
        });
    }

    fn told(&self) -> Option<&Reason> {
        divergence(&self.verdicts).map(|told| &told.reason)
    }

    fn ends_as(&mut self, words: &[&str]) {
        let left = |run: &Self| released(&run.verdicts);
        self.verdicts.extend(self.bench.wait(Duration::from_millis(150)));
        match words {
            ["equal"] => {
                self.verdicts.extend(self.bench.wait(Duration::from_millis(1_000)));
                assert_eq!((self.told(), left(self).len()), (None, self.sent), "all leaves");
                assert_eq!(self.bench.comparator.pending(), crate::Pending::default());
            }
            ["ack", number] => {
                let acks: Vec<u32> = left(self).iter().map(|frame| segment(frame).0.ack.unwrap().0).collect();
                assert_eq!((self.told(), acks.len()), (None, self.sent), "all leaves");
                assert_eq!(acks.last(), Some(&number.parse().unwrap()));
            }
            ["differs", fact, rest @ ..] => {
                let Some(Reason::Mismatch(found)) = self.told() else {
                    panic!("a difference is to be seen, not {:?}", self.told())
                };
                assert_eq!(format!("{:?}", found.fact), **fact);
                if let [at] = rest {
                    assert_eq!(found.offset.to_string(), **at, "{found}");
                }
                assert!(left(self).len() < self.sent, "not all leaves");
                assert_eq!(left(self).len() + released(&self.bench.checkpoint()).len(), self.sent);
            }
            ["waits"] => {
                assert_eq!(self.told(), None, "nothing is known yet");
                assert!(self.swapped || left(self).len() < self.sent, "not all leaves");
                self.verdicts.extend(self.bench.wait(Duration::from_millis(60)));
                assert!(
                    matches!(self.told(), Some(Reason::Unmatched { .. })),
                    "{:?}",
                    self.told()
                );
            }
            ["policy"] => {
                assert!(self.bench.comparator.waits_for_commit() && left(self).is_empty());
                assert_eq!(released(&self.bench.checkpoint()).len(), self.sent);
            }
            other => panic!("there is no {other:?}"),
        }
    }
}

/// Runs one case; `ack` is about the primary's only.
fn run(case: &[Vec<&str>]) {
    for swapped in [false, true] {
        if !(swapped
            && case
                .last()
                .is_some_and(|end| end[0] == "ack" || end.contains(&"one-way")))
        {
            let mut run = Run::new(swapped);
            let lines = case.iter().map(|line| line.strip_suffix(&["one-way"]).unwrap_or(line));
            lines.for_each(|line| run.step(line));
        }
    }
}

#[test]
fn the_golden_vectors_hold() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut failed = Vec::new();
    let mut count = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let mut cases: Vec<(&str, Vec<Vec<&str>>)> = Vec::new();
        for line in text
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
        {
            if let Some(name) = line.strip_prefix("case ") {
                assert!(name.starts_with('P'), "{name} names the case of docs/CASES.md");
                cases.push((name, Vec::new()));
            } else {
                cases
                    .last_mut()
                    .expect("a case")
                    .1
                    .push(line.split_whitespace().collect());
            }
        }
        for (name, case) in &cases {
            count += 1;
            if std::panic::catch_unwind(|| run(case)).is_err() {
                failed.push(format!("{}: case {name}", path.display()));
            }
        }
    }
    assert!(count > 80, "{count} vectors were found");
    assert!(failed.is_empty(), "\n{}", failed.join("\n"));
}
