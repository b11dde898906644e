//! What a role can be told, by options and by a configuration file.
//!
//! Both have the same names; an option wins over the file. The file is flat TOML:
//!
//! ```toml
//! pair = "shop"
//! memory = "1G"
//! witness = "dir:/mnt/shared/witness"
//! ```
//!
//! Nothing is checked here beyond the form of each value; `settings` decides whether they fit together.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Args;
use primary::protocol::{Mode, Resume};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::cards::CardOption;
use crate::cpu::{Base, Hidden};
use crate::linux::LinuxOptions;
use crate::settings::{Mac, Witness};
use crate::units::{ByteSize, Span};

/// How much a process tells about what it does.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
#[command(next_help_heading = "Logging")]
pub struct LogOptions {
    /// What is logged: error, warn, info, debug, trace, or a filter such as `info,primary=debug`
    #[arg(long, value_name = "LEVEL", env = "TANDEM_LOG")]
    pub log: Option<String>,
    /// Log one JSON object a line
    #[arg(long)]
    pub log_json: bool,
}

/// What any VM is told, protected or not.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "The VM")]
pub struct VmOptions {
    /// File with the same options as `name = "value"` lines (TOML); options win over it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// This host's name [default: the host name]
    #[arg(long, value_name = "NODE")]
    pub name: Option<String>,
    /// The VM's disk, a raw image file
    #[arg(long, value_name = "PATH")]
    pub image: Option<PathBuf>,
    /// The VM's memory, a multiple of 2M [default: 256M]
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<ByteSize>,
    /// The processor that the guest sees, decided by the host that starts the VM and kept for the VM's life. `host`: what this host
    /// has and, if the secondary is there already, that has, too. `x86-64-v2`, `x86-64-v3`, `x86-64-v4`: a level of the psABI,
    /// alike on all hosts of one vendor that have it [default: host]
    #[arg(long, value_name = "MODEL")]
    pub cpu: Option<Base>,
    /// Features of that processor that the guest does not see, by their names in /proc/cpuinfo, such as `rdrand,rdseed`
    #[arg(long, value_name = "FEATURE[,FEATURE]")]
    pub hide: Option<Hidden>,
    /// The TAP device, made beforehand, that connects the VM to the clients. May be given up to eight times, on both hosts alike: each
    /// is a network card of the VM, with a MAC address of its own [default: derived from the pair's name]. With `offloads=off`, to
    /// be said on both hosts, the guest computes checksums and cuts its TCP segments itself. With `queues=N`, up to 8 and on both
    /// hosts alike, it has as many pairs of queues, over which a guest with several vCPUs spreads its work [default: 1]
    #[arg(long, value_name = "IFACE[,mac=MAC][,offloads=off][,queues=N]")]
    pub tap: Vec<CardOption>,
    /// The MAC address of the VM's first network card [default: derived from the pair's name]
    #[arg(long, value_name = "MAC")]
    pub mac: Option<Mac>,
    /// Settings of the bundled guest, such as "ip=192.168.1.5/24 gw=192.168.1.1", or a Linux kernel's command line
    /// [default: none, or "console=ttyS0 root=/dev/vda rw"]
    #[arg(long, value_name = "SETTINGS")]
    pub cmdline: Option<String>,
    /// The control socket [default: /run/tandem/<pair>-<node>.sock]
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,
    /// What Linux needs.
    #[command(flatten)]
    pub linux: LinuxOptions,
    /// How to log.
    #[command(flatten)]
    pub logging: LogOptions,
}

/// What one host of a pair is told.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "The pair")]
pub struct PairOptions {
    /// The pair's name, the same on both hosts
    #[arg(long, value_name = "NAME")]
    pub pair: Option<String>,
    /// The other host, to be called
    #[arg(long, value_name = "ADDR:PORT")]
    pub peer: Option<String>,
    /// Where the other host may call
    #[arg(long, value_name = "ADDR:PORT")]
    pub listen: Option<SocketAddr>,
    /// Who decides which side may run alone: `dir:PATH`, a directory that both hosts reach. Without one the
    /// secondary takes over only when told to
    #[arg(long, value_name = "WITNESS")]
    pub witness: Option<Witness>,
    /// How long a silent peer is waited for before it is held for dead [default: 300ms]
    #[arg(long, value_name = "SPAN")]
    pub takeover_limit: Option<Span>,
    /// Who runs between two checkpoints. `lockstep`: both hosts, and output leaves when it is the same on both, or a
    /// checkpoint covers it. `buffered`: this host only; a checkpoint is taken every few milliseconds, and output waits
    /// for it. `auto`: lockstep, but a flow whose output keeps differing waits for checkpoints, and while differences
    /// cost more than that the whole VM is buffered. The host that runs the VM decides [default: lockstep]
    #[arg(long, value_name = "MODE")]
    pub mode: Option<Mode>,
    /// The time between two checkpoints that output waits for, with --mode buffered or auto [default: 5ms]
    #[arg(long, value_name = "SPAN")]
    pub checkpoint_every: Option<Span>,
    /// Longest time between two checkpoints [default: 1s]
    #[arg(long, value_name = "SPAN")]
    pub epoch_max_age: Option<Span>,
    /// How long an output may wait for its equal before a checkpoint is taken [default: 200ms]
    #[arg(long, value_name = "SPAN")]
    pub unmatched_limit: Option<Span>,
    /// Memory that the pages of one checkpoint may take on the secondary, staged there and in its own VM: near it a checkpoint is taken
    /// early, and the VM waits for one that is under way [default: half of the VM's memory, at least 64M]
    #[arg(long, value_name = "SIZE")]
    pub checkpoint_memory: Option<ByteSize>,
    /// How long the VM may stand for a checkpoint: one is taken before the pause that it is expected to take gets longer than this
    /// [default: no budget]
    #[arg(long, value_name = "SPAN")]
    pub pause_budget: Option<Span>,
    /// Bytes a second that may be sent of pages that have gone quiet, while the VM runs, so that a stop has less to copy;
    /// 0 leaves all of them to the stop [default: 128M]
    #[arg(long, value_name = "SIZE")]
    pub ahead_rate: Option<ByteSize>,
    /// When the VM runs on after a stop for a checkpoint: after the `copy` of what is shipped, or after the secondary's
    /// `acknowledgement`, which needs no memory for the copy [default: copy]
    #[arg(long, value_name = "POLICY")]
    pub resume_after: Option<Resume>,
    /// Connections that carry nothing but memory, 1 to 8, each with threads of its own on both hosts; the lesser of what both
    /// hosts are set to is used [default: 2]
    #[arg(long, value_name = "COUNT")]
    pub streams: Option<usize>,
    /// The options that any VM has.
    #[command(flatten)]
    pub vm: VmOptions,
}

/// Why the configuration file can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It can't be read.
    #[error("can't read the configuration file {}: check --config", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is no TOML.
    #[error("{} is no valid TOML: correct it as told below", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: toml::de::Error,
    },
    /// A key that is no option.
    #[error("{}:{line}: unknown key '{key}'{}", path.display(), suggestion(nearest.as_deref(), keys))]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The key.
        key: String,
        /// The nearest right one.
        nearest: Option<String>,
    },
    /// A value that does not fit its key.
    #[error("{}:{line}: {key}: {reason}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The key.
        key: String,
        /// What is wrong and how it should be.
        reason: String,
    },
}

/// All keys of the file. `config` can't be in it.
const KEYS: [&str; 29] = [
    "ahead-rate",
    "checkpoint-every",
    "checkpoint-memory",
    "cmdline",
    "control",
    "cpu",
    "epoch-max-age",
    "hide",
    "image",
    "initrd",
    "kernel",
    "listen",
    "log",
    "log-json",
    "mac",
    "memory",
    "mode",
    "name",
    "pair",
    "pause-budget",
    "peer",
    "resume-after",
    "serial",
    "streams",
    "takeover-limit",
    "tap",
    "unmatched-limit",
    "vcpus",
    "witness",
];

/// A word this unlike every key is no misspelling of one.
const SIMILARITY_MIN: f64 = 0.7;

impl PairOptions {
    /// Adds what the configuration file says, if there is one, where no option says otherwise.
    ///
    /// # Errors
    /// Fails if the file can't be read, or says something unknown or wrong.
    pub fn with_file(self) -> Result<Self, ConfigError> {
        let Some(path) = &self.vm.config else { return Ok(self) };
        let file = read(path)?;
        Ok(Self {
            pair: self.pair.or(file.pair),
            peer: self.peer.or(file.peer),
            listen: self.listen.or(file.listen),
            witness: self.witness.or(file.witness),
            takeover_limit: self.takeover_limit.or(file.takeover_limit),
            mode: self.mode.or(file.mode),
            checkpoint_every: self.checkpoint_every.or(file.checkpoint_every),
            epoch_max_age: self.epoch_max_age.or(file.epoch_max_age),
            unmatched_limit: self.unmatched_limit.or(file.unmatched_limit),
            checkpoint_memory: self.checkpoint_memory.or(file.checkpoint_memory),
            pause_budget: self.pause_budget.or(file.pause_budget),
            ahead_rate: self.ahead_rate.or(file.ahead_rate),
            resume_after: self.resume_after.or(file.resume_after),
            streams: self.streams.or(file.streams),
            vm: self.vm.or(file.vm),
        })
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        match key {
            "ahead-rate" => self.ahead_rate = Some(parsed(value)?),
            "checkpoint-every" => self.checkpoint_every = Some(parsed(value)?),
            "cmdline" => self.vm.cmdline = Some(value.to_owned()),
            "control" => self.vm.control = Some(value.into()),
            "cpu" => self.vm.cpu = Some(parsed(value)?),
            "epoch-max-age" => self.epoch_max_age = Some(parsed(value)?),
            "hide" => self.vm.hide = Some(parsed(value)?),
            "image" => self.vm.image = Some(value.into()),
            "initrd" => self.vm.linux.initrd = Some(value.into()),
            "kernel" => self.vm.linux.kernel = Some(value.into()),
            "listen" => self.listen = Some(parsed(value).map_err(|e| format!("'{value}': {e}, as in 10.0.0.1:7100"))?),
            "log" => self.vm.logging.log = Some(value.to_owned()),
            "log-json" => self.vm.logging.log_json = parsed(value).map_err(|_| "write true or false")?,
            "mac" => self.vm.mac = Some(parsed(value)?),
            "memory" => self.vm.memory = Some(parsed(value)?),
            "mode" => self.mode = Some(parsed(value)?),
            "name" => self.vm.name = Some(value.to_owned()),
            "pair" => self.pair = Some(value.to_owned()),
            "checkpoint-memory" => self.checkpoint_memory = Some(parsed(value)?),
            "pause-budget" => self.pause_budget = Some(parsed(value)?),
            "peer" => self.peer = Some(value.to_owned()),
            "resume-after" => self.resume_after = Some(parsed(value)?),
            "serial" => self.vm.linux.serial = Some(parsed(value)?),
            "streams" => self.streams = Some(parsed(value).map_err(|_| "write a whole number")?),
            "takeover-limit" => self.takeover_limit = Some(parsed(value)?),
            "tap" => self.vm.tap.push(parsed(value)?),
            "unmatched-limit" => self.unmatched_limit = Some(parsed(value)?),
            "vcpus" => self.vm.linux.vcpus = Some(parsed(value).map_err(|_| "write a whole number")?),
            "witness" => self.witness = Some(parsed(value)?),
            _ => unreachable!("the keys are checked before"),
        }
        Ok(())
    }
}

impl VmOptions {
    /// Adds what the configuration file says, if there is one, where no option says otherwise.
    ///
    /// Keys that only a pair has are allowed and ignored: one file serves the VM alone and protected.
    ///
    /// # Errors
    /// Fails if the file can't be read, or says something unknown or wrong.
    pub fn with_file(self) -> Result<(Self, Option<String>), ConfigError> {
        let options = PairOptions {
            vm: self,
            ..PairOptions::default()
        }
        .with_file()?;
        Ok((options.vm, options.pair))
    }

    fn or(self, mut file: Self) -> Self {
        // The first card's address can be said in two ways.
        if let Some(card) = file.tap.first_mut()
            && self.mac.is_some()
        {
            card.mac = None;
        }
        if self.tap.first().is_some_and(|card| card.mac.is_some()) {
            file.mac = None;
        }
        Self {
            config: self.config,
            name: self.name.or(file.name),
            image: self.image.or(file.image),
            memory: self.memory.or(file.memory),
            cpu: self.cpu.or(file.cpu),
            hide: self.hide.or(file.hide),
            tap: if self.tap.is_empty() { file.tap } else { self.tap },
            mac: self.mac.or(file.mac),
            cmdline: self.cmdline.or(file.cmdline),
            control: self.control.or(file.control),
            linux: self.linux.or(file.linux),
            logging: LogOptions {
                log: self.logging.log.or(file.logging.log),
                log_json: self.logging.log_json || file.logging.log_json,
            },
        }
    }
}

fn read(path: &Path) -> Result<PairOptions, ConfigError> {
    let text = fs::read_to_string(path).map_err(|source| ConfigError::Read {
        path: path.to_owned(),
        source,
    })?;
    parse(path, &text)
}

fn parse(path: &Path, text: &str) -> Result<PairOptions, ConfigError> {
    let table = DeTable::parse(text)
        .map_err(|source| ConfigError::Syntax {
            path: path.to_owned(),
            source,
        })?
        .into_inner();
    let mut options = PairOptions::default();
    // In the order of the file, so that the first fault is the one told.
    let mut entries: Vec<_> = table.iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    for (spanned, value) in entries {
        let (key, line) = (spanned.get_ref().as_ref(), line_of(text, spanned.span().start));
        if !KEYS.contains(&key) {
            let nearest = nearest(&key.replace('_', "-"), KEYS).map(str::to_owned);
            return Err(ConfigError::UnknownKey {
                path: path.to_owned(),
                line,
                key: key.to_owned(),
                nearest,
            });
        }
        let wrong = |reason| ConfigError::Value {
            path: path.to_owned(),
            line,
            key: key.to_owned(),
            reason,
        };
        // One network card may be said without brackets, as if there could not be others.
        let values = match value.get_ref() {
            DeValue::Array(list) if key == "tap" => list.iter().map(Spanned::get_ref).collect(),
            value => vec![value],
        };
        for value in values {
            let value = match value {
                DeValue::String(text) => text.to_string(),
                DeValue::Integer(number) if number.radix() == 10 => number.as_str().to_owned(),
                DeValue::Boolean(flag) => flag.to_string(),
                _ => return Err(wrong("write one value in quotes".to_owned())),
            };
            options.set(key, &value).map_err(wrong)?;
        }
    }
    Ok(options)
}

fn parsed<T: FromStr<Err: ToString>>(value: &str) -> Result<T, String> {
    value.parse().map_err(|error: T::Err| error.to_string())
}

fn line_of(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|byte| *byte == b'\n').count() + 1
}

/// Returns the known word that is most like this one, if one is.
pub(crate) fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_ascii_lowercase();
    let scored = known
        .into_iter()
        .map(|known| (strsim::jaro_winkler(&word, known), known));
    let best = scored.max_by(|(a, _), (b, _)| a.total_cmp(b))?;
    (best.0 >= SIMILARITY_MIN).then_some(best.1)
}

/// Names the nearest right word, or says what else helps.
pub(crate) fn suggestion(nearest: Option<&str>, otherwise: impl FnOnce() -> String) -> String {
    nearest.map_or_else(otherwise, |near| format!(": did you mean '{near}'?"))
}

fn keys() -> String {
    format!(": the keys are {}", KEYS.join(", "))
}

#[cfg(test)]
mod tests {
    use clap::{Args as _, Command};

    use super::*;

    fn parse_text(text: &str) -> Result<PairOptions, ConfigError> {
        parse(Path::new("pair.toml"), text)
    }

    #[test]
    fn a_whole_file_is_read() {
        let options = parse_text(
            "# a pair\npair = \"shop\"\nname = 'a'\nimage = \"/srv/shop.img\"\nmemory = \"1G\"\ntap = \"tap0\"\n\
             mac = \"02:00:00:00:00:01\"\ncmdline = \"ip=10.0.0.5/24\"\ncontrol = \"/tmp/c.sock\"\nlog = \"debug\"\n\
             log-json = true\npeer = \"b:7100\"\nlisten = \"0.0.0.0:7100\"\nwitness = \"dir:/mnt/w\"\n\
             takeover-limit = \"300ms\"\nmode = \"buffered\"\ncheckpoint-every = \"10ms\"\nepoch-max-age = \"1s\"\nunmatched-limit = \"200ms\"\n",
        )
        .unwrap();
        assert_eq!(options.pair.as_deref(), Some("shop"));
        assert_eq!(options.vm.memory, Some(ByteSize(1 << 30)));
        assert_eq!(options.witness, Some(Witness::Directory("/mnt/w".into())));
        assert_eq!(options.takeover_limit, Some(Span::ms(300)));
        assert_eq!(options.mode, Some(Mode::Buffered));
        assert_eq!(options.checkpoint_every, Some(Span::ms(10)));
        assert!(options.vm.logging.log_json);
        let cards = parse_text("tap = ['tap0', 'tap1,mac=02:00:00:00:00:02']")
            .unwrap()
            .vm
            .tap;
        assert_eq!(
            cards.iter().map(|card| card.tap.as_str()).collect::<Vec<_>>(),
            ["tap0", "tap1"]
        );
        assert_eq!(
            parse_text("memory = 268435456").unwrap().vm.memory,
            Some(ByteSize::mib(256))
        );
    }

    #[test]
    fn an_unknown_key_is_told_with_its_line_and_the_nearest_right_one() {
        for (wrong, right) in [
            ("memmory", "memory"),
            ("takeover_limit", "takeover-limit"),
            ("Witnes", "witness"),
            ("epoch-age-max", "epoch-max-age"),
            ("unmatched", "unmatched-limit"),
        ] {
            let error = parse_text(&format!("pair = \"x\"\n\n{wrong} = \"1\"\nzzz = 1\n"))
                .unwrap_err()
                .to_string();
            assert_eq!(
                error,
                format!("pair.toml:3: unknown key '{wrong}': did you mean '{right}'?")
            );
        }
        let error = parse_text("qqq = 1").unwrap_err().to_string();
        assert!(
            error.contains("the keys are ahead-rate, checkpoint-every, checkpoint-memory, cmdline,"),
            "{error}"
        );
    }

    #[test]
    fn a_wrong_value_is_told_with_its_line() {
        for (text, expected) in [
            (
                "\nmemory = \"lots\"",
                "pair.toml:2: memory: 'lots' is no size: write a whole number",
            ),
            (
                "takeover-limit = 300",
                "pair.toml:1: takeover-limit: '300' is no span of time",
            ),
            ("witness = \"etcd\"", "pair.toml:1: witness: 'etcd' is no witness"),
            ("mac = \"1:2\"", "pair.toml:1: mac: '1:2' is no MAC address"),
            (
                "listen = \"here\"",
                "pair.toml:1: listen: 'here': invalid socket address syntax, as in 10.0.0.1:7100",
            ),
            ("log-json = \"yes\"", "pair.toml:1: log-json: write true or false"),
            ("streams = \"many\"", "pair.toml:1: streams: write a whole number"),
            ("memory = [1]", "pair.toml:1: memory: write one value in quotes"),
            ("tap = [['a']]", "pair.toml:1: tap: write one value in quotes"),
            (
                "tap = ['a', 'b,c']",
                "pair.toml:1: tap: 'c' says nothing about a TAP device",
            ),
        ] {
            let error = parse_text(text).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
        assert!(matches!(parse_text("pair = "), Err(ConfigError::Syntax { .. })));
        assert!(matches!(
            parse_text("pair = 'a'\npair = 'b'"),
            Err(ConfigError::Syntax { .. })
        ));
    }

    #[test]
    fn options_win_over_the_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(&file, "pair = 'file'\nname = 'file'\nmemory = '512M'").unwrap();
        let vm = VmOptions {
            config: Some(file.path().into()),
            name: Some("flag".into()),
            ..VmOptions::default()
        };
        let options = PairOptions {
            vm,
            ..PairOptions::default()
        }
        .with_file()
        .unwrap();
        assert_eq!(options.pair.as_deref(), Some("file"));
        assert_eq!(options.vm.name.as_deref(), Some("flag"));
        assert_eq!(options.vm.memory, Some(ByteSize::mib(512)));
    }

    #[test]
    fn the_first_cards_address_of_an_option_wins_over_the_files() {
        let address = |text: &str| Some(text.parse().unwrap());
        let file = parse_text("mac = '02:00:00:00:00:01'\ntap = ['tap0', 'tap1,mac=02:00:00:00:00:09']").unwrap();
        let flag = VmOptions {
            tap: vec!["tap0,mac=02:00:00:00:00:02".parse().unwrap()],
            ..VmOptions::default()
        };
        let options = flag.or(file.vm);
        assert_eq!((options.mac, options.tap[0].mac), (None, address("02:00:00:00:00:02")));
        let file = parse_text("tap = ['tap0,mac=02:00:00:00:00:01', 'tap1,mac=02:00:00:00:00:09']").unwrap();
        let flag = VmOptions {
            mac: address("02:00:00:00:00:02"),
            ..VmOptions::default()
        };
        let options = flag.or(file.vm);
        assert_eq!((options.mac, options.tap[0].mac), (address("02:00:00:00:00:02"), None));
        assert_eq!(options.tap[1].mac, address("02:00:00:00:00:09"));
    }

    #[test]
    fn a_missing_file_is_told() {
        let vm = VmOptions {
            config: Some("/nowhere/pair.toml".into()),
            ..VmOptions::default()
        };
        let error = vm.with_file().unwrap_err();
        assert!(
            error.to_string().contains("/nowhere/pair.toml: check --config"),
            "{error}"
        );
    }

    #[test]
    fn the_file_has_a_key_for_every_option() {
        let command = PairOptions::augment_args(Command::new("primary"));
        let mut options: Vec<_> = command.get_arguments().filter_map(clap::Arg::get_long).collect();
        options.retain(|name| !["config", "help"].contains(name));
        options.sort_unstable();
        assert_eq!(options, KEYS);
    }
}
