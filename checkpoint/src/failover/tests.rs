//! The decision table, and a pair of hosts that start, pair, part and crash at random.

use std::collections::BTreeMap;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

fn known(generation: u64, role: Role, complete: bool) -> Option<KnownState> {
    Some(KnownState {
        generation: Generation(generation),
        role,
        complete,
    })
}

#[test]
fn the_table_holds_for_every_record_and_every_latest_term() {
    for role in [Role::Primary, Role::Secondary] {
        for complete in [true, false] {
            for ours in 1..4 {
                assert_eq!(
                    starts(known(ours, role, complete), None),
                    complete && role == Role::Primary
                );
                for term in 1..5 {
                    for owner in ["a", "b"] {
                        let newer_claim = owner == "a" && term > ours;
                        let own_run = owner == "a" && role == Role::Primary;
                        assert_eq!(
                            starts(known(ours, role, complete), Some((term, owner))),
                            complete && (newer_claim || own_run),
                            "{role} of {ours}, complete: {complete}, term {term} is {owner}'s"
                        );
                    }
                }
            }
        }
    }
    assert!(starts(None, None));
    assert!(starts(None, Some((1, "a"))));
    // However often it is cut short, it stays in the first term: in a later one the image would be a foreign one.
    let term = Generation(1);
    assert_eq!(decide(None, Some((1, "a"))), Decision::Start { term });
    assert!(!starts(None, Some((1, "b"))));
    assert!(!starts(None, Some((2, "a"))));
}

fn decide(known: Option<KnownState>, latest: Option<(u64, &str)>) -> Decision {
    start_decision(
        known,
        latest.map(|(term, owner)| (Generation(term), owner.to_owned())),
        "a",
    )
}

/// Whether host `a` starts; if so, with a term after all others, but for a first start that is tried again.
fn starts(known: Option<KnownState>, latest: Option<(u64, &str)>) -> bool {
    match decide(known, latest) {
        Decision::Start { term } => {
            assert!(known.is_none_or(|known| term > known.generation));
            assert!(latest.is_none_or(|(latest, _)| term.0 > latest || known.is_none()));
            true
        }
        Decision::Refuse(_) => false,
    }
}

#[test]
fn each_refusal_says_why_and_what_to_do() {
    let refusal = |known, latest| match decide(known, latest) {
        Decision::Refuse(refusal) => refusal.to_string(),
        Decision::Start { term } => panic!("starts with {term}"),
    };
    let (primary, secondary) = (Role::Primary, Role::Secondary);
    for (text, cause, cure) in [
        (refusal(None, Some((3, "b"))), "no record", "secondary of b"),
        (
            refusal(known(3, primary, false), None),
            "not complete",
            "start this host as a secondary",
        ),
        (
            refusal(known(3, primary, true), Some((4, "b"))),
            "b has owned the VM since term 4",
            "secondary of b",
        ),
        (
            refusal(known(3, secondary, true), Some((3, "b"))),
            "generation 3",
            "start b",
        ),
        (
            refusal(known(3, secondary, true), None),
            "secondary in generation 3",
            "start the former primary",
        ),
        (
            refusal(known(3, primary, true), Some((2, "b"))),
            "ends at b's term 2",
            "--witness",
        ),
    ] {
        assert!(text.contains(cause) && text.contains(cure), "{text}");
    }
}

const NODES: [&str; 2] = ["a", "b"];

/// What happens next, to host 0 or 1.
#[derive(Clone, Copy, Debug)]
enum Happening {
    Start(usize),
    Crash(usize),
    /// The other host, if it is down, comes up as this one's secondary.
    Pair(usize),
    /// The sync with the secondary is complete.
    Protect,
    /// The guest writes; where it is protected, clients may see it once both hosts hold it.
    Write,
    /// A checkpoint makes the secondary's disk equal.
    Commit,
    /// Both lose each other.
    Part,
    /// A contending host reaches the witness; it may not get the answer.
    Claim(usize, bool),
    /// A host that won puts its record and its disk in order, and runs alone.
    Record(usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    Down,
    Alone,
    Pairing,
    Primary { protected: bool },
    Secondary { entitled: bool },
    Contending,
    Won,
}

#[derive(Clone, Copy, Debug)]
struct Host {
    life: Life,
    generation: u64,
    record: Option<KnownState>,
    /// Number of the last write on the disk, and in the running machine's disk.
    disk: u64,
    live: u64,
}

/// Two hosts and a witness that follow the rules of the protocols.
struct Model {
    hosts: [Host; 2],
    witness: BTreeMap<u64, usize>,
    newest: u64,
}

impl Model {
    fn new() -> Self {
        let host = Host {
            life: Life::Down,
            generation: 0,
            record: None,
            disk: 0,
            live: 0,
        };
        Self {
            hosts: [host; 2],
            witness: BTreeMap::new(),
            newest: 0,
        }
    }

    /// A term once won is never lost, and none before the latest can be won.
    fn claim(&mut self, host: usize, term: u64) -> bool {
        let latest = self.witness.last_key_value().map_or(0, |(term, _)| *term);
        if latest > term {
            return false;
        }
        *self.witness.entry(term).or_insert(host) == host
    }

    fn store(&mut self, host: usize, role: Role, complete: bool) {
        let generation = Generation(self.hosts[host].generation);
        self.hosts[host].record = Some(KnownState {
            generation,
            role,
            complete,
        });
    }

    fn happens(&mut self, happening: Happening) {
        match happening {
            Happening::Start(host) if self.hosts[host].life == Life::Down => self.start(host),
            Happening::Crash(host) => self.crash(host),
            Happening::Pair(host) => self.pair(host),
            Happening::Protect => self.protect(),
            Happening::Write => self.write(),
            Happening::Commit => self.commit(),
            Happening::Part => (0..2).for_each(|host| self.lose_peer(host)),
            Happening::Claim(host, answered) if self.hosts[host].life == Life::Contending => {
                let won = self.claim(host, self.hosts[host].generation + 1);
                if answered {
                    self.hosts[host].life = if won { Life::Won } else { Life::Down };
                }
            }
            Happening::Record(host) if self.hosts[host].life == Life::Won => {
                self.hosts[host].generation += 1;
                self.hosts[host].disk = self.hosts[host].live;
                self.store(host, Role::Primary, true);
                self.hosts[host].life = Life::Alone;
            }
            _ => {}
        }
    }

    fn start(&mut self, host: usize) {
        let latest = self.witness.last_key_value();
        let latest = latest.map(|(term, owner)| (Generation(*term), NODES[*owner].to_owned()));
        let Decision::Start { term } = start_decision(self.hosts[host].record, latest, NODES[host]) else {
            return;
        };
        if self.claim(host, term.0) {
            self.hosts[host].generation = term.0 - 1;
            self.hosts[host].live = self.hosts[host].disk;
            self.hosts[host].life = Life::Won;
        }
    }

    fn crash(&mut self, host: usize) {
        let other = 1 - host;
        let Host {
            life, generation, disk, ..
        } = self.hosts[host];
        self.hosts[host].life = Life::Down;
        // The host that owns the next term takes what only its memory held with it. That is a second failure:
        // the first parted the pair.
        if matches!(life, Life::Won | Life::Contending) && self.witness.get(&(generation + 1)) == Some(&host) {
            self.newest = disk;
        }
        // A side that has lost its peer hears nothing of this; one that has not, loses it now.
        if !matches!(life, Life::Down | Life::Alone | Life::Won | Life::Contending) {
            self.lose_peer(other);
        }
    }

    fn pair(&mut self, host: usize) {
        let other = 1 - host;
        if self.hosts[host].life != Life::Alone || self.hosts[other].life != Life::Down {
            return;
        }
        let generation = self.hosts[host].generation;
        if self.hosts[other]
            .record
            .is_some_and(|record| record.generation.0 > generation)
        {
            return;
        }
        self.hosts[host].life = Life::Pairing;
        assert!(
            self.claim(host, generation + 1),
            "nobody but the owner of a term can be entitled to the next"
        );
        self.hosts[host].generation += 1;
        self.store(host, Role::Primary, true);
        self.hosts[host].life = Life::Primary { protected: false };
        self.hosts[other].generation = generation + 1;
        self.hosts[other].life = Life::Secondary { entitled: false };
        self.store(other, Role::Secondary, false);
    }

    fn pair_of(&self) -> Option<(usize, usize)> {
        let primary = self
            .hosts
            .iter()
            .position(|host| matches!(host.life, Life::Primary { .. }))?;
        matches!(self.hosts[1 - primary].life, Life::Secondary { .. }).then_some((primary, 1 - primary))
    }

    fn protect(&mut self) {
        let Some((primary, secondary)) = self.pair_of() else {
            return;
        };
        self.hosts[primary].life = Life::Primary { protected: true };
        self.hosts[secondary].life = Life::Secondary { entitled: true };
        self.hosts[secondary].disk = self.hosts[primary].disk;
        self.hosts[secondary].live = self.hosts[primary].live;
        self.store(secondary, Role::Secondary, true);
    }

    fn write(&mut self) {
        for host in 0..2 {
            if matches!(self.hosts[host].life, Life::Alone | Life::Primary { .. }) {
                self.newest += 1;
                self.hosts[host].disk = self.newest;
                self.hosts[host].live = self.newest;
            }
        }
        if let Some((primary, secondary)) = self.pair_of()
            && self.hosts[secondary].life == (Life::Secondary { entitled: true })
        {
            self.hosts[secondary].live = self.hosts[primary].live;
        }
    }

    fn commit(&mut self) {
        if let Some((_, secondary)) = self.pair_of()
            && self.hosts[secondary].life == (Life::Secondary { entitled: true })
        {
            self.hosts[secondary].disk = self.hosts[secondary].live;
        }
    }

    fn lose_peer(&mut self, host: usize) {
        let life = &mut self.hosts[host].life;
        *life = match *life {
            Life::Primary { protected: false } => Life::Alone,
            Life::Secondary { entitled: false } => Life::Down,
            Life::Primary { protected: true } | Life::Secondary { entitled: true } => Life::Contending,
            other => other,
        };
    }

    fn check(&self) {
        let owners = |host: &&Host| matches!(host.life, Life::Alone | Life::Pairing | Life::Primary { .. });
        let running: Vec<_> = self.hosts.iter().filter(owners).collect();
        assert!(running.len() <= 1, "two owners: {:?}", self.hosts);
        for host in running {
            assert_eq!(host.live, self.newest, "an older state runs: {:?}", self.hosts);
        }
    }
}

fn happenings() -> impl Strategy<Value = Happening> {
    prop_oneof![
        4 => (0..2usize).prop_map(Happening::Start),
        2 => (0..2usize).prop_map(Happening::Crash),
        4 => (0..2usize).prop_map(Happening::Pair),
        4 => Just(Happening::Protect),
        3 => Just(Happening::Write),
        2 => Just(Happening::Commit),
        2 => Just(Happening::Part),
        4 => (0..2usize, any::<bool>()).prop_map(|(host, answered)| Happening::Claim(host, answered)),
        4 => (0..2usize).prop_map(Happening::Record),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn never_two_owners_and_never_an_older_state(happenings in vec(happenings(), 1..120)) {
        let mut model = Model::new();
        for happening in happenings {
            model.happens(happening);
            model.check();
        }
    }
}

#[test]
fn the_model_gets_somewhere() {
    use Happening::{Claim, Commit, Crash, Pair, Part, Protect, Record, Start, Write};
    let mut model = Model::new();
    let run = |model: &mut Model, happenings: &[Happening]| {
        for happening in happenings {
            model.happens(*happening);
            model.check();
        }
    };
    run(
        &mut model,
        &[
            Start(0),
            Record(0),
            Pair(0),
            Protect,
            Write,
            Commit,
            Part,
            Claim(1, true),
            Claim(0, true),
        ],
    );
    run(&mut model, &[Record(1)]);
    assert_eq!((model.hosts[0].life, model.hosts[1].life), (Life::Down, Life::Alone));
    run(&mut model, &[Write, Start(0)]);
    assert_eq!(model.hosts[0].life, Life::Down, "its disk is older");
    run(
        &mut model,
        &[Pair(1), Protect, Crash(1), Claim(0, true), Record(0), Start(1)],
    );
    assert_eq!((model.hosts[0].life, model.hosts[1].life), (Life::Alone, Life::Down));
    assert_eq!(model.hosts[0].generation, 5);
}
