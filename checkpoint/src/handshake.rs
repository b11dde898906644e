//! Whether two hosts make a pair.
//!
//! ```text
//!   primary    hello(local) ──Hello──►                          judge_welcome ──► data connection
//!   secondary                  judge_hello ──Welcome or Refuse──►
//! ```
//!
//! Both must be set up alike, since the secondary runs what the primary sends: every field of the
//! machine's shape is compared, and the refusal names the first that differs with both values. The VM's CPU
//! is the primary's matter: the secondary's host must be able to give it. Their names must differ, since the
//! witness knows them by nothing else.
//!
//! Driven by the protocols of both roles. Never trusts a value before its range was checked.

use crate::cpu::{self, CpuError, CpuModel, Level};
use crate::epoch::{Epoch, Generation};
use crate::limits::{
    DEVICE_NAME_BYTES_MAX, DEVICES_MAX, MEMORY_BYTES_MAX, NAME_BYTES_MAX, NICS_MAX, PAGE_BYTES, STREAMS_MAX,
    TAKEOVER_LIMIT_MAX, TAKEOVER_LIMIT_MIN, VCPUS_MAX,
};
use crate::wire::{Held, Hello, MachineShape, Refusal, Session, Welcome};

/// This host's side of a handshake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Local {
    /// Name of the pair.
    pub pair: String,
    /// Name of this host.
    pub node: String,
    /// The machine as this host would build it.
    pub shape: MachineShape,
    /// As a primary: the VM is not made yet, so its CPU may become less than that of the shape.
    pub adapts: bool,
    /// Last generation this side held a complete state of, 0 if none.
    pub generation: Generation,
    /// It was that generation's owner: it ran the VM without a peer, or may have.
    pub owner: bool,
    /// Last committed epoch of it.
    pub committed: Epoch,
    /// What this side, as a secondary, still has of the pairing before.
    pub held: Held,
    /// The CPU of the machine whose memory that is.
    pub held_cpu: Option<CpuModel>,
    /// The takeover limit in milliseconds.
    pub takeover_limit_ms: u64,
    /// Whether a witness is configured.
    pub witness: bool,
    /// Most page streams of a pairing.
    pub streams: usize,
}

/// A setting of this host that can't be part of any pair. To be found before a peer is called.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LocalError {
    /// A name that is empty, too long or holds control characters.
    #[error("the {what} '{name}' must have 1 to {NAME_BYTES_MAX} bytes and no control characters")]
    Name {
        /// Which name.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// A size or number out of range.
    #[error("{what} of {value} is out of range ({least} to {most}, in whole units of {unit})")]
    Range {
        /// Which value.
        what: &'static str,
        /// The value.
        value: u64,
        /// The least permitted.
        least: u64,
        /// The most permitted.
        most: u64,
        /// What it must be a multiple of.
        unit: u64,
    },
    /// More devices, or longer descriptions of them, than a shape may hold.
    #[error("at most {DEVICES_MAX} devices of at most {DEVICE_NAME_BYTES_MAX} bytes each can be described to a peer")]
    Devices,
    /// A CPU that is none.
    #[error(transparent)]
    Cpu(#[from] CpuError),
}

impl Local {
    /// Checks that these settings can be told to a peer at all.
    ///
    /// # Errors
    /// Names the setting that is out of range.
    pub fn check(&self) -> Result<(), LocalError> {
        check_name("pair name", &self.pair)?;
        check_name("node name", &self.node)?;
        check_shape(&self.shape)?;
        check_takeover_limit(self.takeover_limit_ms)?;
        check_streams(wire_streams(self.streams))
    }
}

/// Makes the primary's opening.
#[must_use]
pub fn hello(local: &Local) -> Hello {
    Hello {
        pair: local.pair.clone(),
        node: local.node.clone(),
        shape: local.shape.clone(),
        adapts: local.adapts,
        generation: local.generation.0,
        committed: local.committed.0,
        takeover_limit_ms: local.takeover_limit_ms,
        witness: local.witness,
        streams: wire_streams(local.streams),
    }
}

/// Judges the primary's opening, on the secondary. `session` is a fresh random number.
///
/// # Errors
/// Gives the refusal to answer.
pub fn judge_hello(local: &Local, hello: &Hello, session: Session) -> Result<Welcome, Refusal> {
    check_name("pair name", &hello.pair)
        .and_then(|()| check_name("node name", &hello.node))
        .and_then(|()| check_shape(&hello.shape))
        .and_then(|()| check_takeover_limit(hello.takeover_limit_ms))
        .and_then(|()| check_streams(hello.streams))
        .map_err(|error| Refusal::Protocol(error.to_string()))?;
    if hello.pair != local.pair {
        return Err(Refusal::Pair {
            ours: local.pair.clone(),
            theirs: hello.pair.clone(),
        });
    }
    if hello.node == local.node {
        return Err(Refusal::SameNode(local.node.clone()));
    }
    compare_shapes(&hello.shape, &local.shape)?;
    let cpu = agree_on_cpu(&hello.shape.cpu, hello.adapts, &local.shape.cpu)?;
    let limit = |ms: u64| format!("{ms} ms");
    compare(
        "the takeover limit",
        limit(hello.takeover_limit_ms),
        limit(local.takeover_limit_ms),
    )?;
    let witness = |configured: bool| String::from(if configured { "one" } else { "none" });
    compare("the witness", witness(hello.witness), witness(local.witness))?;
    if hello.generation < local.generation.0 {
        return Err(Refusal::OlderGeneration {
            ours: local.generation.0,
            theirs: hello.generation,
        });
    }
    // A witness gives a term once. Without one, a takeover may have been asked for while the old primary went on.
    if local.owner && hello.generation == local.generation.0 {
        return Err(Refusal::BothRan(hello.generation));
    }
    // Memory goes with its machine, which a VM with another CPU can't be.
    let memory = local.held.memory.filter(|_| local.held_cpu.as_ref() == Some(&cpu));
    Ok(Welcome {
        node: local.node.clone(),
        session,
        cpu,
        generation: local.generation.0,
        committed: local.committed.0,
        held: Held { memory, ..local.held },
        // Each side has threads for as many as it is set to.
        streams: hello.streams.min(wire_streams(local.streams)),
    })
}

/// Judges the secondary's answer, on the primary.
///
/// # Errors
/// Gives the refusal to end the connection with.
pub fn judge_welcome(local: &Local, welcome: &Welcome) -> Result<(), Refusal> {
    check_name("node name", &welcome.node)
        .and_then(|()| check_streams(welcome.streams))
        .and_then(|()| Ok(welcome.cpu.check()?))
        .map_err(|error| Refusal::Protocol(error.to_string()))?;
    let offered = &local.shape.cpu;
    if local.adapts && !welcome.cpu.missing_from(offered).is_empty() || !local.adapts && welcome.cpu != *offered {
        let why = "it wants another CPU than the one that was offered";
        return Err(Refusal::Protocol(why.to_owned()));
    }
    if welcome.streams > wire_streams(local.streams) {
        let (theirs, ours) = (welcome.streams, local.streams);
        return Err(Refusal::Protocol(format!(
            "it wants {theirs} page streams of the {ours} that were offered"
        )));
    }
    if welcome.node == local.node {
        return Err(Refusal::SameNode(local.node.clone()));
    }
    if welcome.generation > local.generation.0 {
        let (theirs, ours) = (welcome.generation, local.generation);
        return Err(Refusal::Protocol(format!(
            "it follows a primary of generation {ours} although it has seen generation {theirs}"
        )));
    }
    Ok(())
}

fn check_name(what: &'static str, name: &str) -> Result<(), LocalError> {
    let good = (1..=NAME_BYTES_MAX).contains(&name.len()) && !name.chars().any(char::is_control);
    if good {
        Ok(())
    } else {
        Err(LocalError::Name {
            what,
            name: name.escape_default().to_string(),
        })
    }
}

fn check_range(what: &'static str, value: u64, least: u64, most: u64, unit: u64) -> Result<(), LocalError> {
    let good = (least..=most).contains(&value) && value.is_multiple_of(unit);
    if good {
        Ok(())
    } else {
        Err(LocalError::Range {
            what,
            value,
            least,
            most,
            unit,
        })
    }
}

fn check_shape(shape: &MachineShape) -> Result<(), LocalError> {
    let page = PAGE_BYTES as u64;
    check_range("a memory size", shape.memory_bytes, page, MEMORY_BYTES_MAX, page)?;
    check_range("a number of vCPUs", shape.vcpus.into(), 1, VCPUS_MAX.into(), 1)?;
    check_range("a disk size", shape.disk_bytes, 0, i64::MAX.unsigned_abs(), 512)?;
    check_range("a number of network cards", nics(shape) as u64, 0, NICS_MAX as u64, 1)?;
    let describable = |name: &String| name.len() <= DEVICE_NAME_BYTES_MAX && !name.chars().any(char::is_control);
    if shape.devices.len() > DEVICES_MAX || !shape.devices.iter().all(describable) {
        return Err(LocalError::Devices);
    }
    Ok(shape.cpu.check()?)
}

fn check_takeover_limit(ms: u64) -> Result<(), LocalError> {
    check_range(
        "a takeover limit in ms",
        ms,
        TAKEOVER_LIMIT_MIN.as_millis(),
        TAKEOVER_LIMIT_MAX.as_millis(),
        1,
    )
}

fn check_streams(streams: u32) -> Result<(), LocalError> {
    check_range("a number of page streams", streams.into(), 1, STREAMS_MAX as u64, 1)
}

fn wire_streams(streams: usize) -> u32 {
    u32::try_from(streams).unwrap_or(u32::MAX)
}

fn compare(what: &str, primary: String, secondary: String) -> Result<(), Refusal> {
    if primary == secondary {
        return Ok(());
    }
    Err(Refusal::Differs {
        what: what.to_owned(),
        primary,
        secondary,
    })
}

fn compare_shapes(primary: &MachineShape, secondary: &MachineShape) -> Result<(), Refusal> {
    let bytes = |bytes: u64| format!("{bytes} bytes");
    compare(
        "the memory size",
        bytes(primary.memory_bytes),
        bytes(secondary.memory_bytes),
    )?;
    compare(
        "the number of vCPUs",
        primary.vcpus.to_string(),
        secondary.vcpus.to_string(),
    )?;
    compare(
        "the number of network cards (one --tap each)",
        nics(primary).to_string(),
        nics(secondary).to_string(),
    )?;
    let none = || String::from("no such device");
    for slot in 0..primary.devices.len().max(secondary.devices.len()) {
        let device = |shape: &MachineShape| shape.devices.get(slot).cloned().unwrap_or_else(none);
        compare(&format!("device {slot}"), device(primary), device(secondary))?;
    }
    compare("the disk size", bytes(primary.disk_bytes), bytes(secondary.disk_bytes))?;
    Ok(())
}

/// Returns the CPU that the VM has on both hosts.
fn agree_on_cpu(offered: &CpuModel, adapts: bool, host: &CpuModel) -> Result<CpuModel, Refusal> {
    let common = if adapts { offered.intersection(host).ok() } else { None };
    // What adapting can't help is told as it is of a VM that runs.
    let model = common.as_ref().unwrap_or(offered);
    let missing = model.missing_from(host);
    if missing.is_empty() {
        return Ok(model.clone());
    }
    Err(Refusal::Cpu {
        cure: cure(model, host, &missing),
        missing: cpu::listed(&missing),
    })
}

/// Says what to do about a host that can't give a VM's CPU.
fn cure(model: &CpuModel, host: &CpuModel, missing: &[String]) -> String {
    if model.vendor() != host.vendor() {
        return "a pair needs two processors of one vendor".to_owned();
    }
    let level = Level::ALL.into_iter().rev().map(|level| (level, level.of(model)));
    let fits =
        |(level, cpu): (Level, Result<CpuModel, CpuError>)| cpu.ok()?.missing_from(host).is_empty().then_some(level);
    let level = level
        .filter_map(fits)
        .map(|level| format!("with --cpu {}", level.name()))
        .next();
    let names = || missing.iter().map(String::as_str);
    let roots: Vec<_> = names()
        .filter(|name| !names().any(|other| cpu::rests_on(name, other)))
        .collect();
    let hidable = model.without(roots.iter().copied()).missing_from(host).is_empty();
    let hide = hidable.then(|| format!("with --hide {}", roots.join(",")));
    let common = model
        .intersection(host)
        .is_ok_and(|common| common.missing_from(host).is_empty());
    let common = common.then(|| "with --cpu host while this secondary waits".to_owned());
    let ways: Vec<_> = level.into_iter().chain(hide).chain(common).collect();
    if ways.is_empty() {
        return "a pair needs two processors that are more alike".to_owned();
    }
    format!(
        "a VM keeps its CPU until it is started again; start it {}",
        ways.join(", or ")
    )
}

/// Returns how many network cards a shape has.
fn nics(shape: &MachineShape) -> usize {
    shape.devices.iter().filter(|device| device.starts_with("net=")).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::samples::{INTEL, made_by, server};
    use crate::epoch::Tag;

    const HELD: Held = Held {
        memory: None,
        disk: Some(Tag {
            generation: Generation(4),
            epoch: Epoch(60),
        }),
    };

    fn primary() -> Local {
        Local {
            pair: "shop".into(),
            node: "a".into(),
            shape: MachineShape {
                memory_bytes: 64 << 20,
                vcpus: 2,
                devices: vec!["serial".into(), "net=52:54:00:00:00:01".into()],
                disk_bytes: 1 << 20,
                cpu: server(),
            },
            adapts: false,
            generation: Generation(5),
            owner: true,
            committed: Epoch(70),
            held: Held::default(),
            held_cpu: None,
            takeover_limit_ms: 300,
            witness: true,
            streams: 4,
        }
    }

    fn secondary() -> Local {
        Local {
            node: "b".into(),
            generation: Generation(4),
            owner: false,
            committed: Epoch(60),
            held: HELD,
            streams: 2,
            ..primary()
        }
    }

    #[test]
    fn memory_is_held_for_a_machine_with_the_same_cpu_only() {
        let tag = Tag {
            generation: Generation(4),
            epoch: Epoch(60),
        };
        let held = |cpu| {
            let secondary = Local {
                held: Held {
                    memory: Some(tag),
                    ..HELD
                },
                held_cpu: cpu,
                ..secondary()
            };
            judge_hello(&secondary, &hello(&primary()), Session(1)).unwrap().held
        };
        assert_eq!(held(Some(server())).memory, Some(tag));
        assert_eq!(held(Some(server().without(["rdseed"]))), HELD);
        assert_eq!(held(None), HELD);
    }

    fn refusal(change: impl FnOnce(&mut Local)) -> Refusal {
        let mut primary = primary();
        change(&mut primary);
        judge_hello(&secondary(), &hello(&primary), Session(1)).expect_err("a changed setting is refused")
    }

    #[test]
    fn hosts_that_are_set_alike_fit() {
        assert_eq!(primary().check(), Ok(()));
        let welcome = judge_hello(&secondary(), &hello(&primary()), Session(9)).unwrap();
        assert_eq!(
            welcome,
            Welcome {
                node: "b".into(),
                session: Session(9),
                cpu: server(),
                generation: 4,
                committed: 60,
                held: HELD,
                streams: 2,
            }
        );
        assert_eq!(judge_welcome(&primary(), &welcome), Ok(()));
    }

    #[test]
    fn each_setting_that_differs_is_named_with_both_values() {
        let differs = |what: &str, primary: &str, secondary: &str| Refusal::Differs {
            what: what.into(),
            primary: primary.into(),
            secondary: secondary.into(),
        };
        assert_eq!(
            refusal(|p| p.shape.memory_bytes = 32 << 20),
            differs("the memory size", "33554432 bytes", "67108864 bytes")
        );
        assert_eq!(refusal(|p| p.shape.vcpus = 1), differs("the number of vCPUs", "1", "2"));
        assert_eq!(
            refusal(|p| p.shape.devices[1] = "net=other".into()),
            differs("device 1", "net=other", "net=52:54:00:00:00:01")
        );
        assert_eq!(
            refusal(|p| p.shape.devices.push("block".into())),
            differs("device 2", "block", "no such device")
        );
        assert_eq!(
            refusal(|p| p.shape.devices.push("net=52:54:00:00:00:02".into())),
            differs("the number of network cards (one --tap each)", "2", "1")
        );
        assert_eq!(
            refusal(|p| p.shape.disk_bytes = 512),
            differs("the disk size", "512 bytes", "1048576 bytes")
        );
        assert_eq!(
            refusal(|p| p.takeover_limit_ms = 500),
            differs("the takeover limit", "500 ms", "300 ms")
        );
        assert_eq!(refusal(|p| p.witness = false), differs("the witness", "none", "one"));
    }

    fn told(vm: CpuModel, host: CpuModel, adapts: bool) -> Result<CpuModel, String> {
        let (mut primary, mut secondary) = (primary(), secondary());
        (primary.shape.cpu, primary.adapts, secondary.shape.cpu) = (vm, adapts, host);
        let welcome = judge_hello(&secondary, &hello(&primary), Session(1)).map_err(|refusal| refusal.to_string())?;
        assert_eq!(judge_welcome(&primary, &welcome), Ok(()));
        Ok(welcome.cpu)
    }

    #[test]
    fn a_cpu_that_the_secondary_lacks_is_refused_by_name() {
        assert_eq!(told(server(), server(), false), Ok(server()));
        let less = server().without(["rdrand"]);
        assert_eq!(
            told(less.clone(), server(), false),
            Ok(less.clone()),
            "the host may have more"
        );
        let lacks = "the secondary's processor, or its KVM, lacks what the VM's CPU has: ";
        let again = "a VM keeps its CPU until it is started again; start it";
        assert_eq!(
            told(server(), less, false),
            Err(format!(
                "{lacks}rdrand: {again} with --cpu x86-64-v4, or with --hide rdrand, or with --cpu host while this secondary waits"
            ))
        );
        let old = server().without(["avx512f", "sse4_2", "arch_capabilities"]);
        let text = told(server(), old, false).unwrap_err();
        assert!(text.starts_with(&format!("{lacks}sse4_2, avx512f, ")), "{text}");
        assert!(
            text.contains("start it with --hide sse4_2,avx512f,arch_capabilities, or ") && !text.contains("--cpu x86"),
            "{text}"
        );
        let mut small = server();
        small.msrs.clear();
        assert_eq!(
            told(server(), small, false),
            Err(format!(
                "{lacks}MSR 0x10a, MSR 0x174, MSR 0xc0000081: {again} with --cpu host while this secondary waits"
            ))
        );
        let mut strange = server();
        strange
            .leaves
            .iter_mut()
            .filter(|leaf| leaf.function == 1)
            .for_each(|leaf| leaf.ebx = 0x1000);
        let text = told(server(), strange, true).unwrap_err();
        assert!(
            text.ends_with("cache lines of 64 bytes (it has 128): a pair needs two processors that are more alike"),
            "{text}"
        );
        for adapts in [false, true] {
            let text = told(server(), made_by(INTEL), adapts).unwrap_err();
            assert!(text.ends_with("a pair needs two processors of one vendor"), "{text}");
        }
    }

    #[test]
    fn a_vm_that_is_not_made_yet_gets_what_both_hosts_have() {
        let (ours, theirs) = (server().without(["rdrand"]), server().without(["avx512f"]));
        let both = told(ours.clone(), theirs.clone(), true).unwrap();
        assert_eq!(both, ours.intersection(&theirs).unwrap());
        assert!(!both.has("rdrand") && !both.has("avx512vl") && both.has("avx2"));
        let mut primary = primary();
        let welcome = judge_hello(&secondary(), &hello(&primary), Session(1)).unwrap();
        primary.shape.cpu = ours;
        for adapts in [false, true] {
            let primary = Local {
                adapts,
                ..primary.clone()
            };
            assert!(
                matches!(judge_welcome(&primary, &welcome), Err(Refusal::Protocol(why)) if why.contains("another CPU"))
            );
        }
    }

    #[test]
    fn there_are_as_many_page_streams_as_both_are_set_to() {
        let agreed = |ours, theirs| {
            let (primary, secondary) = (
                Local {
                    streams: ours,
                    ..primary()
                },
                Local {
                    streams: theirs,
                    ..secondary()
                },
            );
            let welcome = judge_hello(&secondary, &hello(&primary), Session(1))?;
            judge_welcome(&primary, &welcome).map(|()| welcome.streams)
        };
        assert_eq!((agreed(4, 2), agreed(1, 8), agreed(8, 8)), (Ok(1 + 1), Ok(1), Ok(8)));
        for wrong in [0, STREAMS_MAX + 1] {
            assert!(matches!(agreed(wrong, 2), Err(Refusal::Protocol(text)) if text.contains("page streams")));
            assert!(
                Local {
                    streams: wrong,
                    ..primary()
                }
                .check()
                .is_err()
            );
        }
        let mut welcome = judge_hello(&secondary(), &hello(&primary()), Session(1)).unwrap();
        for wrong in [0, 5] {
            welcome.streams = wrong;
            assert!(matches!(judge_welcome(&primary(), &welcome), Err(Refusal::Protocol(_))));
        }
    }

    #[test]
    fn who_the_peer_is_matters() {
        assert!(matches!(refusal(|p| p.pair = "bank".into()), Refusal::Pair { .. }));
        assert_eq!(refusal(|p| p.node = "b".into()), Refusal::SameNode("b".into()));
        assert_eq!(
            refusal(|p| p.generation = Generation(3)),
            Refusal::OlderGeneration { ours: 4, theirs: 3 }
        );
        let ran = Local {
            generation: Generation(5),
            owner: true,
            ..secondary()
        };
        assert_eq!(
            judge_hello(&ran, &hello(&primary()), Session(1)),
            Err(Refusal::BothRan(5))
        );
        let newer = Welcome {
            node: "b".into(),
            session: Session(1),
            cpu: server(),
            generation: 6,
            committed: 0,
            held: Held::default(),
            streams: 1,
        };
        assert!(matches!(judge_welcome(&primary(), &newer), Err(Refusal::Protocol(_))));
        let twin = Welcome {
            node: "a".into(),
            generation: 5,
            ..newer
        };
        assert_eq!(judge_welcome(&primary(), &twin), Err(Refusal::SameNode("a".into())));
    }

    #[test]
    fn values_out_of_range_are_refused_before_they_are_compared() {
        let changes: [fn(&mut Local); 11] = [
            |p| p.pair = String::new(),
            |p| p.node = "x".repeat(NAME_BYTES_MAX + 1),
            |p| p.node = "a\u{1b}".into(),
            |p| p.shape.memory_bytes = 0,
            |p| p.shape.memory_bytes = MEMORY_BYTES_MAX + 4096,
            |p| p.shape.vcpus = VCPUS_MAX + 1,
            |p| p.shape.disk_bytes = 511,
            |p| p.shape.devices = vec![String::new(); DEVICES_MAX + 1],
            |p| p.shape.devices = vec!["net=52:54:00:00:00:01".into(); NICS_MAX + 1],
            |p| p.takeover_limit_ms = 1,
            |p| p.shape.cpu.leaves.reverse(),
        ];
        for (number, change) in changes.into_iter().enumerate() {
            assert!(matches!(refusal(change), Refusal::Protocol(_)), "change {number}");
            let mut local = primary();
            change(&mut local);
            assert!(local.check().is_err(), "change {number}");
        }
    }
}
