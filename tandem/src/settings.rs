//! What a role runs with: options that were checked and fit together.
//!
//! Made from `options` before anything is started, so that a mistake starts nothing. Whether files,
//! devices and peers are there is found out by those who use them.

use std::fmt;
use std::fs;
use std::net::{SocketAddr, ToSocketAddrs};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use guest::settings::Settings as GuestSettings;
use primary::protocol::pace::Budget;
use primary::protocol::{Mode, Resume};

use crate::cards::{Card, cards};
use crate::cpu::CpuChoice;
use crate::linux::LinuxSettings;
use crate::options::{ConfigError, LogOptions, PairOptions, VmOptions};
use crate::units::{ByteSize, Span};

/// Where control sockets are, unless an option says otherwise.
pub const CONTROL_FOLDER: &str = "/run/tandem";

const MEMORY_DEFAULT: ByteSize = ByteSize::mib(256);
const LINUX_CMDLINE: &str = "console=ttyS0 root=/dev/vda rw";
const MEMORY_UNIT: ByteSize = ByteSize::mib(2);
const MEMORY: RangeInclusive<ByteSize> = ByteSize::mib(32)..=ByteSize::mib(1 << 20);
const TAKEOVER_LIMIT_DEFAULT: Span = Span::ms(300);
const TAKEOVER_LIMIT: RangeInclusive<Span> = Span::ms(50)..=Span::ms(60_000);
const EPOCH_MAX_AGE_DEFAULT: Span = Span::ms(1_000);
const EPOCH_MAX_AGE: RangeInclusive<Span> = Span::ms(10)..=Span::ms(60_000);
const CHECKPOINT_EVERY_DEFAULT: Span = Span::ms(5);
const CHECKPOINT_EVERY: RangeInclusive<Span> = Span::ms(1)..=Span::ms(1_000);
const UNMATCHED_LIMIT_DEFAULT: Span = Span::ms(200);
const UNMATCHED_LIMIT: RangeInclusive<Span> = Span::ms(1)..=Span::ms(10_000);
/// Memory for a checkpoint's pages, unless the user says otherwise, and the least that can be said.
const CHECKPOINT_MEMORY_DEFAULT_MIN: ByteSize = ByteSize::mib(64);
const CHECKPOINT_MEMORY_MIN: ByteSize = ByteSize::mib(1);
const PAUSE_BUDGET: RangeInclusive<Span> = Span(Duration::from_micros(100))..=Span::ms(10_000);
const STREAMS_DEFAULT: usize = 2;
const STREAMS: RangeInclusive<usize> = 1..=checkpoint::limits::STREAMS_MAX;
const NAME_BYTES_MAX: usize = 32;

/// What a host of a pair runs with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The pair's name.
    pub pair: String,
    /// This host's name.
    pub node: String,
    /// The VM.
    pub vm: VmSettings,
    /// The other host, to be called. This or `listen` is set.
    pub peer: Option<SocketAddr>,
    /// Where the other host may call.
    pub listen: Option<SocketAddr>,
    /// Who decides who may run alone.
    pub witness: Option<Witness>,
    /// How long a silent peer is waited for.
    pub takeover_limit: Duration,
    /// Who runs between two checkpoints.
    pub mode: Mode,
    /// The time between two checkpoints that output waits for.
    pub checkpoint_every: Duration,
    /// Longest time between two checkpoints.
    pub epoch_max_age: Duration,
    /// How long an output may wait for its equal.
    pub unmatched_limit: Duration,
    /// How long the VM may stand for a checkpoint, if that matters.
    pub pause_budget: Option<Duration>,
    /// Bytes that the pages of one checkpoint may take on the secondary.
    pub checkpoint_memory: u64,
    /// Bytes a second that may be sent ahead of a stop; 0 for none.
    pub ahead_rate: u64,
    /// When the VM runs on after a stop for a checkpoint.
    pub resume: Resume,
    /// Most page streams of a pairing.
    pub streams: usize,
}

/// What a VM runs with, protected or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmSettings {
    /// The raw image file.
    pub image: PathBuf,
    /// Bytes of memory, a multiple of 2 MiB.
    pub memory: u64,
    /// Its processor, if this host boots it.
    pub cpu: CpuChoice,
    /// Its network cards.
    pub cards: Vec<Card>,
    /// The bundled guest's settings, checked, or the kernel's command line.
    pub cmdline: String,
    /// What is there to run Linux; without it the bundled guest runs.
    pub linux: Option<LinuxSettings>,
    /// The control socket.
    pub control: PathBuf,
    /// How to log.
    pub logging: LogOptions,
}

/// What an unprotected VM runs with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunSettings {
    /// This host's name.
    pub node: String,
    /// The VM.
    pub vm: VmSettings,
}

/// A MAC address of one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

/// Who decides which side may run alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Witness {
    /// A directory on storage that both hosts reach.
    Directory(PathBuf),
}

/// Why options can't be used.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The configuration file.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Something that must be said was not.
    #[error("--{option} is missing: {cure}")]
    Missing {
        /// The option's name.
        option: &'static str,
        /// What to write.
        cure: &'static str,
    },
    /// An option that only Linux has a use for.
    #[error("--{option} is for Linux guests: give the kernel with --kernel, or leave --{option} out")]
    Linux {
        /// The option's name.
        option: &'static str,
    },
    /// A value that can't be used.
    #[error("--{option} {value}: {reason}")]
    Value {
        /// The option's name.
        option: &'static str,
        /// Its value.
        value: String,
        /// What is wrong and how it should be.
        reason: String,
    },
}

impl Settings {
    /// Checks the options of a host of a pair, the configuration file's included.
    ///
    /// # Errors
    /// Fails with the first of them that is missing or can't be used.
    pub fn from_options(options: PairOptions) -> Result<Self, SettingsError> {
        let options = options.with_file()?;
        let pair = options
            .pair
            .ok_or_else(|| missing("pair", "give the pair a name, the same on both hosts"))?;
        let pair = plain_name("pair", pair)?;
        if options.peer.is_none() && options.listen.is_none() {
            return Err(missing(
                "peer",
                "say where the other host listens, or with --listen where it may call",
            ));
        }
        let node = node(options.vm.name.as_ref())?;
        let vm = VmSettings::from_options(options.vm, &pair, &node)?;
        Ok(Self {
            checkpoint_memory: checkpoint_memory(options.checkpoint_memory, vm.memory)?,
            vm,
            peer: options.peer.map(|peer| resolve(&peer)).transpose()?,
            listen: options.listen,
            witness: options.witness,
            takeover_limit: span(
                "takeover-limit",
                options.takeover_limit,
                TAKEOVER_LIMIT_DEFAULT,
                &TAKEOVER_LIMIT,
            )?,
            mode: options.mode.unwrap_or_default(),
            checkpoint_every: span(
                "checkpoint-every",
                options.checkpoint_every,
                CHECKPOINT_EVERY_DEFAULT,
                &CHECKPOINT_EVERY,
            )?,
            epoch_max_age: span(
                "epoch-max-age",
                options.epoch_max_age,
                EPOCH_MAX_AGE_DEFAULT,
                &EPOCH_MAX_AGE,
            )?,
            unmatched_limit: span(
                "unmatched-limit",
                options.unmatched_limit,
                UNMATCHED_LIMIT_DEFAULT,
                &UNMATCHED_LIMIT,
            )?,
            pause_budget: options
                .pause_budget
                .map(|given| span("pause-budget", Some(given), given, &PAUSE_BUDGET))
                .transpose()?,
            ahead_rate: options
                .ahead_rate
                .map_or_else(|| Budget::default().bytes_per_second, |rate| rate.0),
            resume: options.resume_after.unwrap_or_default(),
            streams: streams(options.streams)?,
            pair,
            node,
        })
    }
}

impl RunSettings {
    /// Checks the options of an unprotected VM, the configuration file's included.
    ///
    /// # Errors
    /// Fails with the first of them that is missing or can't be used.
    pub fn from_options(options: VmOptions) -> Result<Self, SettingsError> {
        let (options, pair) = options.with_file()?;
        let node = node(options.name.as_ref())?;
        let pair = plain_name("pair", pair.unwrap_or_else(|| "run".to_owned()))?;
        Ok(Self {
            vm: VmSettings::from_options(options, &pair, &node)?,
            node,
        })
    }
}

impl VmSettings {
    fn from_options(options: VmOptions, pair: &str, node: &str) -> Result<Self, SettingsError> {
        let image = options
            .image
            .ok_or_else(|| missing("image", "give the path of the VM's raw image file"))?;
        let cards = cards(options.tap, options.mac, pair)?;
        let linux = LinuxSettings::from_options(options.linux)?;
        let cmdline = match linux {
            Some(_) => options.cmdline.unwrap_or_else(|| LINUX_CMDLINE.to_owned()),
            None => bundled_cmdline(options.cmdline.unwrap_or_default())?,
        };
        let control = options
            .control
            .unwrap_or_else(|| Path::new(CONTROL_FOLDER).join(format!("{pair}-{node}.sock")));
        Ok(Self {
            image,
            memory: memory(options.memory.unwrap_or(MEMORY_DEFAULT))?,
            cpu: CpuChoice {
                base: options.cpu.unwrap_or_default(),
                hidden: options.hide.unwrap_or_default(),
            },
            cards,
            cmdline,
            linux,
            control,
            logging: options.logging,
        })
    }
}

/// Checks the bundled guest's settings.
fn bundled_cmdline(cmdline: String) -> Result<String, SettingsError> {
    GuestSettings::parse(&cmdline).map_err(|error| wrong("cmdline", &cmdline, error.to_string()))?;
    if cmdline.len() > guest::abi::COMMAND_LINE_MAX {
        return Err(wrong(
            "cmdline",
            "…",
            format!("longer than {} bytes", guest::abi::COMMAND_LINE_MAX),
        ));
    }
    Ok(cmdline)
}

impl Mac {
    /// Derives a locally administered address from a name: both hosts come to the same.
    #[must_use]
    pub fn derived(name: &str) -> Self {
        // FNV-1a: short, and the same in every build.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
        });
        let [a, b, c, d, e, ..] = hash.to_be_bytes();
        Self([0x02, a, b, c, d, e])
    }
}

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("'{text}' is no MAC address: write six bytes, as in 02:12:34:56:78:9a");
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts
                .next()
                .filter(|part| part.len() == 2 && !part.starts_with('+'))
                .ok_or_else(wrong)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() {
            return Err(wrong());
        }
        if bytes[0] & 1 == 1 || bytes == [0; 6] {
            return Err(format!(
                "'{text}' can't be the address of one device: take an even first byte, such as 02"
            ));
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Witness {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("dir", path)) if path.starts_with('/') => Ok(Self::Directory(path.into())),
            Some(("dir", path)) => Err(format!(
                "'{path}' is not a full path: write dir:/path/on/shared/storage"
            )),
            _ => Err(format!(
                "'{text}' is no witness: write dir:/path, a directory that both hosts reach"
            )),
        }
    }
}

impl fmt::Display for Witness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => write!(f, "dir:{}", path.display()),
        }
    }
}

fn node(given: Option<&String>) -> Result<String, SettingsError> {
    let name = match given {
        Some(name) => name.clone(),
        None => {
            let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
            let host = host.trim().split('.').next().unwrap_or_default().to_owned();
            if !is_plain(&host) {
                return Err(missing("name", "this host's own name can't serve: give it one"));
            }
            host
        }
    };
    plain_name("name", name)
}

/// Says whether a name can be part of paths and of messages.
fn is_plain(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !name.is_empty() && name.len() <= NAME_BYTES_MAX && !name.starts_with('.') && name.chars().all(plain)
}

fn plain_name(option: &'static str, name: String) -> Result<String, SettingsError> {
    if !is_plain(&name) {
        return Err(wrong(
            option,
            name,
            "a name has 1 to 32 letters, digits, '-', '_' or '.', no '.' first",
        ));
    }
    Ok(name)
}

fn memory(size: ByteSize) -> Result<u64, SettingsError> {
    if !MEMORY.contains(&size) {
        return Err(wrong(
            "memory",
            size,
            format!("must be from {} to {}", MEMORY.start(), MEMORY.end()),
        ));
    }
    if !size.0.is_multiple_of(MEMORY_UNIT.0) {
        let near = ByteSize(size.0.next_multiple_of(MEMORY_UNIT.0));
        return Err(wrong(
            "memory",
            size,
            format!("must be a multiple of {MEMORY_UNIT}: take {near}"),
        ));
    }
    Ok(size.0)
}

/// The bound is met before the pages of a few milliseconds come: those need room, too.
fn checkpoint_memory(given: Option<ByteSize>, memory: u64) -> Result<u64, SettingsError> {
    let size = given.unwrap_or_else(|| ByteSize(memory / 2).max(CHECKPOINT_MEMORY_DEFAULT_MIN));
    if size < CHECKPOINT_MEMORY_MIN {
        let cure = format!(
            "a checkpoint needs room for what the VM writes in a few milliseconds: give at least {CHECKPOINT_MEMORY_MIN}"
        );
        return Err(wrong("checkpoint-memory", size, cure));
    }
    Ok(size.0)
}

fn span(
    option: &'static str,
    given: Option<Span>,
    default: Span,
    range: &RangeInclusive<Span>,
) -> Result<Duration, SettingsError> {
    let span = given.unwrap_or(default);
    if range.contains(&span) {
        Ok(span.0)
    } else {
        Err(wrong(
            option,
            span,
            format!("must be from {} to {}", range.start(), range.end()),
        ))
    }
}

fn streams(given: Option<usize>) -> Result<usize, SettingsError> {
    let streams = given.unwrap_or(STREAMS_DEFAULT);
    if STREAMS.contains(&streams) {
        Ok(streams)
    } else {
        let reason = format!("must be from {} to {}", STREAMS.start(), STREAMS.end());
        Err(wrong("streams", streams, reason))
    }
}

fn resolve(peer: &str) -> Result<SocketAddr, SettingsError> {
    let mut found = peer.to_socket_addrs().map_err(|error| {
        wrong(
            "peer",
            peer,
            format!("{error}: write the other host's address and port, as in 10.0.0.2:7100"),
        )
    })?;
    found
        .next()
        .ok_or_else(|| wrong("peer", peer, "the name has no address"))
}

pub(crate) fn missing(option: &'static str, cure: &'static str) -> SettingsError {
    SettingsError::Missing { option, cure }
}

pub(crate) fn wrong(option: &'static str, value: impl ToString, reason: impl Into<String>) -> SettingsError {
    SettingsError::Value {
        option,
        value: value.to_string(),
        reason: reason.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> PairOptions {
        PairOptions {
            pair: Some("shop".into()),
            peer: Some("10.0.0.2:7100".into()),
            vm: VmOptions {
                name: Some("a".into()),
                image: Some("shop.img".into()),
                tap: vec!["tap0".parse().unwrap()],
                ..VmOptions::default()
            },
            ..PairOptions::default()
        }
    }

    fn refused(change: impl FnOnce(&mut PairOptions)) -> String {
        let mut options = options();
        change(&mut options);
        Settings::from_options(options).unwrap_err().to_string()
    }

    #[test]
    fn the_defaults_are_those_of_the_manual() {
        let settings = Settings::from_options(options()).unwrap();
        assert_eq!(settings.takeover_limit, Duration::from_millis(300));
        assert_eq!(settings.epoch_max_age, Duration::from_secs(1));
        assert_eq!(settings.mode, Mode::Lockstep);
        assert_eq!(settings.checkpoint_every, Duration::from_millis(5));
        assert_eq!(settings.unmatched_limit, Duration::from_millis(200));
        assert_eq!(settings.ahead_rate, 128 << 20);
        assert_eq!(settings.pause_budget, None);
        assert_eq!(settings.checkpoint_memory, 128 << 20);
        assert_eq!(settings.streams, 2);
        assert_eq!(settings.vm.memory, 256 << 20);
        assert_eq!(settings.vm.control, Path::new("/run/tandem/shop-a.sock"));
        assert_eq!(settings.peer, Some("10.0.0.2:7100".parse().unwrap()));
    }

    #[test]
    fn what_is_missing_is_told_with_its_cure() {
        assert!(refused(|o| o.pair = None).starts_with("--pair is missing: give the pair a name"));
        assert!(refused(|o| o.peer = None).starts_with("--peer is missing"));
        assert!(refused(|o| o.vm.image = None).starts_with("--image is missing"));
        assert!(refused(|o| o.vm.tap.clear()).contains("ip tuntap add"));
    }

    type Change = fn(&mut PairOptions);

    #[test]
    fn what_can_not_be_used_is_told_with_its_cure() {
        let cases: [(Change, &str); 12] = [
            (|o| o.streams = Some(0), "--streams 0: must be from 1 to 8"),
            (|o| o.streams = Some(9), "--streams 9: must be from 1 to 8"),
            (
                |o| o.vm.memory = Some(ByteSize::mib(257)),
                "--memory 257M: must be a multiple of 2M: take 258M",
            ),
            (
                |o| o.vm.memory = Some(ByteSize(5)),
                "--memory 5: must be from 32M to 1024G",
            ),
            (
                |o| o.takeover_limit = Some(Span::ms(10)),
                "--takeover-limit 10ms: must be from 50ms to 60s",
            ),
            (
                |o| o.epoch_max_age = Some(Span::ms(0)),
                "--epoch-max-age 0ms: must be from 10ms to 60s",
            ),
            (
                |o| o.checkpoint_every = Some(Span::ms(0)),
                "--checkpoint-every 0ms: must be from 1ms to 1s",
            ),
            (
                |o| o.pair = Some("../x".into()),
                "--pair ../x: a name has 1 to 32 letters",
            ),
            (
                |o| o.vm.name = Some(String::new()),
                "--name : a name has 1 to 32 letters",
            ),
            (
                |o| o.vm.tap = vec!["a-name-of-seventeen".parse().unwrap()],
                "--tap a-name-of-seventeen: an interface's name has",
            ),
            (
                |o| o.vm.cmdline = Some("ipp=1".into()),
                "--cmdline ipp=1: unknown setting 'ipp'",
            ),
            (
                |o| o.peer = Some("10.0.0.2".into()),
                "--peer 10.0.0.2: invalid socket address",
            ),
        ];
        for (change, expected) in cases {
            let told = refused(change);
            assert!(told.starts_with(expected), "{told}");
        }
    }

    #[test]
    fn the_mac_is_the_same_on_both_hosts_and_belongs_to_one_device() {
        let mac = Mac::derived("shop");
        assert_eq!(mac, Mac::derived("shop"));
        assert_ne!(mac, Mac::derived("shop2"));
        assert_eq!(mac.0[0], 0x02);
        assert_eq!(mac.to_string().parse::<Mac>(), Ok(mac));
        for text in [
            "",
            "02:00",
            "02:00:00:00:00:0",
            "02:00:00:00:00:00:00",
            "0g:00:00:00:00:00",
            "+2:00:00:00:00:01",
        ] {
            assert!(text.parse::<Mac>().is_err(), "{text}");
        }
        assert!(
            "01:00:5e:00:00:01"
                .parse::<Mac>()
                .unwrap_err()
                .contains("even first byte")
        );
    }

    #[test]
    fn a_witness_is_a_full_path() {
        assert_eq!("dir:/mnt/w".parse(), Ok(Witness::Directory("/mnt/w".into())));
        assert!("dir:w".parse::<Witness>().unwrap_err().contains("not a full path"));
        assert!("etcd:x".parse::<Witness>().unwrap_err().contains("no witness"));
    }

    #[test]
    fn a_vm_alone_needs_no_pair() {
        let settings = RunSettings::from_options(options().vm).unwrap();
        assert_eq!(settings.vm.control, Path::new("/run/tandem/run-a.sock"));
    }
}
