//! A pair, or a VM by itself, as real processes in a laboratory of their own: what the demo and the benchmarks play on.
//!
//! ```text
//!   demo, bench ─► Stage ─┬─ process   `tandem primary`, `secondary`, `run` as real processes
//!                         ├─ crate::lab
//!                         └─ tidy      nothing is left behind, whatever happens
//! ```
//!
//! The processes are this program itself, started as an operator would, and asked by their control sockets. There is no
//! other way into them.

pub(crate) mod process;
pub(crate) mod tidy;

use std::fs::{self, File};
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::process::Command as Program;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use link::control::{Command, ask};
use link::status::Status;

use crate::clients::{Target, http_get};
use crate::lab::{Host, Lab, TAP};
use crate::units::ByteSize;
use process::Process;
use tidy::Tidy;

const MAC: &str = "02:74:61:6e:64:6d";
const PAIR: &str = "demo";
const IMAGE_BYTES: u64 = 64 << 20;
const PORT: u16 = 7100;
/// A pair with a large memory on a slow machine takes its time.
const PROTECTED_LIMIT: Duration = Duration::from_secs(120);
/// Memory that the bundled guest needs for itself, from its size: its heap, image and page tables.
const GUEST_HEAP_MIB: RangeInclusive<u64> = 52..=128;
const GUEST_REST_MIB: u64 = 8;
const BOOT_LIMIT: Duration = Duration::from_secs(30);
/// An emulated processor takes half a minute.
const LINUX_BOOT_LIMIT: Duration = Duration::from_secs(300);
const ADMIN_LIMIT: Duration = Duration::from_secs(60);

/// One laboratory and the roles in it.
pub(crate) struct Stage {
    /// Dropped before the lab, so that no process outlives it.
    roles: Vec<(Host, Process)>,
    lab: Lab,
    folder: PathBuf,
    memory: String,
    /// Words that start another guest than the bundled one.
    guest: Vec<String>,
}

/// A Linux guest.
#[derive(Clone, Debug)]
pub(crate) struct LinuxGuest {
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: PathBuf,
    /// Copied for each host.
    pub(crate) image: PathBuf,
    pub(crate) vcpus: u8,
    /// More words for the kernel.
    pub(crate) cmdline: String,
}

impl Stage {
    /// Makes the laboratory and an image for each host, in `folder`. Nothing runs yet.
    pub(crate) fn new(folder: PathBuf, memory: String) -> Result<Self> {
        let lab = Lab::new().context("can't build the laboratory")?;
        fs::create_dir_all(folder.join("witness")).context("can't make the witness's folder")?;
        for host in [Host::A, Host::B] {
            let image = File::create(image(&folder, host)).context("can't make an image")?;
            image.set_len(IMAGE_BYTES).context("can't make an image")?;
        }
        Ok(Self {
            roles: Vec::new(),
            lab,
            folder,
            memory,
            guest: Vec::new(),
        })
    }

    /// Makes the laboratory, and a copy of the guest's image for each host, in `folder`. Nothing runs yet.
    pub(crate) fn with_linux(folder: PathBuf, memory: String, guest: &LinuxGuest) -> Result<Self> {
        let mut stage = Self::new(folder, memory)?;
        for host in [Host::A, Host::B] {
            // What knows of holes in files.
            let mut copy = Program::new("cp");
            copy.arg("--sparse=always")
                .args([&guest.image, &image(&stage.folder, host)]);
            let copied = copy.status().context("can't run cp")?;
            if !copied.success() {
                bail!(
                    "can't copy {}: check --image and the room in --folder",
                    guest.image.display()
                );
            }
        }
        let address = Target::bundled().v4;
        stage.guest = words([
            "--kernel",
            &guest.kernel.display().to_string(),
            "--initrd",
            &guest.initrd.display().to_string(),
            "--vcpus",
            &guest.vcpus.to_string(),
            "--cmdline",
            &format!("console=ttyS0 panic=-1 quiet ip={address}/24 {}", guest.cmdline),
        ]);
        Ok(stage)
    }

    /// Starts a primary on host A and a secondary on host B, with more options for both.
    pub(crate) fn start_pair<S: AsRef<str>>(&mut self, more: &[S]) -> Result<()> {
        for (host, role) in [(Host::B, "secondary"), (Host::A, "primary")] {
            let address = |host: Host| SocketAddr::from((host.replication_address(), PORT)).to_string();
            let mut arguments = self.vm_arguments(role, host);
            arguments.extend(words(["--pair", PAIR]));
            arguments.extend(words(["--listen", &address(host), "--peer", &address(host.other())]));
            arguments.extend(words([
                "--witness",
                &format!("dir:{}", self.folder.join("witness").display()),
            ]));
            arguments.extend(more.iter().map(|word| word.as_ref().to_owned()));
            let process = Process::start(&self.lab, host, role, &self.folder, &arguments)?;
            self.roles.push((host, process));
        }
        Ok(())
    }

    /// Starts the VM of a host's image by itself, unprotected.
    pub(crate) fn start_alone(&mut self, host: Host) -> Result<()> {
        let arguments = self.vm_arguments("run", host);
        let alone = Process::start(&self.lab, host, "alone", &self.folder, &arguments)?;
        self.roles.push((host, alone));
        Ok(())
    }

    fn vm_arguments(&self, command: &str, host: Host) -> Vec<String> {
        let image = image(&self.folder, host).display().to_string();
        // The VM that boots from the survivor's image is the same machine to the clients.
        let vm = ["--image", &image, "--memory", &self.memory, "--tap", TAP, "--mac", MAC];
        [words([command, "--name", host.name()]), words(vm), self.guest.clone()].concat()
    }

    pub(crate) fn lab(&self) -> &Lab {
        &self.lab
    }

    /// Returns the role on a host.
    pub(crate) fn role(&mut self, host: Host) -> Result<&mut Process> {
        let found = self.roles.iter_mut().find(|(at, _)| *at == host);
        found
            .map(|(_, process)| process)
            .context("a role that was ended is not asked")
    }

    /// Takes the role on a host out of the stage.
    pub(crate) fn take(&mut self, host: Host) -> Result<Process> {
        let at = self.roles.iter().position(|(at, _)| *at == host);
        let (_, process) = self
            .roles
            .swap_remove(at.context("a role that was ended can't end again")?);
        Ok(process)
    }

    /// Kills all roles.
    pub(crate) fn clear(&mut self) {
        self.roles.clear();
    }

    /// Returns the primary's status once both sides say that they are protected.
    pub(crate) fn await_protected(&mut self, tidy: &Tidy) -> Result<Status> {
        tidy.wait("protection", PROTECTED_LIMIT, || {
            let secondary = self.role(Host::B)?.status()?;
            let primary = self.role(Host::A)?.status()?;
            let protected = |status: &Status| status.state.is_protected();
            Ok(primary
                .filter(protected)
                .filter(|_| secondary.as_ref().is_some_and(protected)))
        })
    }

    /// Waits until the guest answers.
    pub(crate) fn await_guest(&mut self, tidy: &Tidy) -> Result<()> {
        let limit = if self.guest.is_empty() {
            BOOT_LIMIT
        } else {
            LINUX_BOOT_LIMIT
        };
        tidy.wait("an answer of the guest", limit, || {
            for (_, process) in &mut self.roles {
                process.check()?;
            }
            let asked = self
                .lab
                .client()
                .run(|| http_get(Target::bundled().http_address(), "/", Duration::from_secs(1)));
            Ok(asked.is_ok().then_some(()))
        })
    }

    /// Asks the guest for a page that makes it do something.
    pub(crate) fn admin(&self, path: &str) -> Result<()> {
        let (path, asked) = (path.to_owned(), path.to_owned());
        let answer = self
            .lab
            .client()
            .run(move || http_get(Target::bundled().http_address(), &asked, ADMIN_LIMIT));
        let answer = answer.with_context(|| format!("the guest does not answer {path}"))?;
        if answer.status != 200 {
            bail!(
                "the guest refuses {path}: {}",
                String::from_utf8_lossy(&answer.body).trim_end()
            );
        }
        Ok(())
    }

    /// Has all that the guest has done until now taken over by the secondary.
    pub(crate) fn commit(&mut self) -> Result<()> {
        ask(self.role(Host::A)?.control(), &Command::Checkpoint).context("the primary takes no checkpoint")?;
        Ok(())
    }

    /// Returns the end of each role's log.
    pub(crate) fn last_words(&self) -> String {
        let logs = self
            .roles
            .iter()
            .map(|(host, role)| format!("the log on {} ends:\n{}", host.name(), role.log_end()));
        logs.collect::<Vec<_>>().join("\n")
    }
}

/// Returns how much of its memory the bundled guest can be told to write.
pub(crate) fn touchable_mib(memory: ByteSize) -> u64 {
    let memory = memory.0 >> 20;
    let own = (memory / 4).clamp(*GUEST_HEAP_MIB.start(), *GUEST_HEAP_MIB.end()) + GUEST_REST_MIB;
    memory.saturating_sub(own)
}

fn image(folder: &Path, host: Host) -> PathBuf {
    folder.join(format!("{}.img", host.name()))
}

fn words<const N: usize>(words: [&str; N]) -> Vec<String> {
    words.map(str::to_owned).into()
}
