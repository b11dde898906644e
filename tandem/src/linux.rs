//! What a VM is told that runs Linux instead of the bundled guest.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Args;
use machine::{Program, VCPUS_MAX};

use crate::settings::SettingsError;

/// A kernel is read in portions of this size.
const PORTION_BYTES: usize = 1 << 20;

/// The options of a VM with Linux.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Linux")]
pub struct LinuxOptions {
    /// The kernel of a Linux guest, as distributions ship it (bzImage) or an uncompressed vmlinux with a PVH entry. Give it on both hosts of
    /// a pair: the guest boots it again when it is reset. Without it the bundled guest runs
    #[arg(long, value_name = "PATH")]
    pub kernel: Option<PathBuf>,
    /// The initial RAM disk that belongs to the kernel
    #[arg(long, value_name = "PATH")]
    pub initrd: Option<PathBuf>,
    /// The number of virtual processors of a Linux guest, 1 to 8 [default: 1]
    #[arg(long, value_name = "COUNT")]
    pub vcpus: Option<u8>,
    /// Where the serial port of a Linux guest (ttyS0) is: `log`, a line of the log for each of its lines; `stdio`, this terminal, which Ctrl-A x
    /// leaves; `unix:PATH`, a socket that is made there, for one client at a time [default: log]
    #[arg(long, value_name = "PLACE")]
    pub serial: Option<SerialPlace>,
}

/// What a VM with Linux runs with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinuxSettings {
    /// The kernel's file.
    pub kernel: PathBuf,
    /// The file of the initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The number of virtual processors.
    pub vcpus: u8,
    /// Where the serial port is.
    pub serial: SerialPlace,
}

/// Where a guest's serial port is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum SerialPlace {
    /// In the log, a line for each line.
    #[default]
    Log,
    /// On the terminal.
    Stdio,
    /// On a socket.
    Socket(PathBuf),
}

impl FromStr for SerialPlace {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("unix:")) {
            ("log", _) => Ok(Self::Log),
            ("stdio", _) => Ok(Self::Stdio),
            (_, Some(path)) if !path.is_empty() => Ok(Self::Socket(path.into())),
            _ => Err(format!(
                "'{text}' is no place for a serial port: write log, stdio or unix:PATH"
            )),
        }
    }
}

impl LinuxOptions {
    /// Adds what `file` says where these do not.
    #[must_use]
    pub fn or(self, file: Self) -> Self {
        Self {
            kernel: self.kernel.or(file.kernel),
            initrd: self.initrd.or(file.initrd),
            vcpus: self.vcpus.or(file.vcpus),
            serial: self.serial.or(file.serial),
        }
    }
}

impl LinuxSettings {
    /// Checks the options; `None` if the bundled guest is to run.
    ///
    /// # Errors
    /// Fails with the first of them that can't be used, or that only Linux has a use for.
    pub fn from_options(options: LinuxOptions) -> Result<Option<Self>, SettingsError> {
        let Some(kernel) = options.kernel else {
            let given = [
                ("initrd", options.initrd.is_some()),
                ("vcpus", options.vcpus.is_some()),
                ("serial", options.serial.is_some()),
            ];
            return match given.into_iter().find(|(_, given)| *given) {
                Some((option, _)) => Err(SettingsError::Linux { option }),
                None => Ok(None),
            };
        };
        let vcpus = options.vcpus.unwrap_or(1);
        if !(1..=VCPUS_MAX).contains(&vcpus) {
            return Err(SettingsError::Value {
                option: "vcpus",
                value: vcpus.to_string(),
                reason: format!("a VM has 1 to {VCPUS_MAX} virtual processors"),
            });
        }
        Ok(Some(Self {
            kernel,
            initrd: options.initrd,
            vcpus,
            serial: options.serial.unwrap_or_default(),
        }))
    }

    /// Says in a few words what is booted, for comparing it with the other host's: a guest that is reset after a takeover is to
    /// start as it did before.
    ///
    /// # Errors
    /// Fails if one of the files can't be read.
    pub fn fingerprint(&self, command_line: &str) -> Result<String, SettingsError> {
        let kernel = sum("kernel", &self.kernel)?;
        let initrd = self.initrd.as_deref().map(|path| sum("initrd", path)).transpose()?;
        let initrd = initrd.map_or_else(String::new, |sum| format!(", --initrd {sum:08x}"));
        let command_line = crc32fast::hash(command_line.as_bytes());
        Ok(format!(
            "Linux (checksums: --kernel {kernel:08x}{initrd}, --cmdline {command_line:08x})"
        ))
    }

    /// Opens the files; what they hold is looked at when the guest boots.
    ///
    /// # Errors
    /// Fails if one of them can't be opened.
    pub fn program(&self, command_line: &str) -> Result<Program, SettingsError> {
        Ok(Program {
            kernel: open("kernel", &self.kernel)?,
            initrd: self.initrd.as_deref().map(|path| open("initrd", path)).transpose()?,
            command_line: command_line.to_owned(),
        })
    }
}

fn open(option: &'static str, path: &Path) -> Result<File, SettingsError> {
    File::open(path).map_err(|error| unusable(option, path, format!("can't be opened: {error}")))
}

fn sum(option: &'static str, path: &Path) -> Result<u32, SettingsError> {
    let mut file = open(option, path)?;
    let (mut sum, mut portion) = (crc32fast::Hasher::new(), vec![0; PORTION_BYTES]);
    loop {
        match file.read(&mut portion) {
            Ok(0) => return Ok(sum.finalize()),
            Ok(count) => sum.update(&portion[..count]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(unusable(option, path, format!("can't be read: {error}"))),
        }
    }
}

fn unusable(option: &'static str, path: &Path, reason: String) -> SettingsError {
    SettingsError::Value {
        option,
        value: path.display().to_string(),
        reason,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_only_linux_has_needs_a_kernel() {
        assert_eq!(LinuxSettings::from_options(LinuxOptions::default()).unwrap(), None);
        let options = LinuxOptions {
            vcpus: Some(2),
            ..LinuxOptions::default()
        };
        let error = LinuxSettings::from_options(options).unwrap_err().to_string();
        assert!(error.contains("--vcpus") && error.contains("--kernel"), "{error}");
    }

    #[test]
    fn processors_are_counted() {
        for (vcpus, possible) in [(0, false), (1, true), (8, true), (9, false)] {
            let options = LinuxOptions {
                kernel: Some("vmlinuz".into()),
                vcpus: Some(vcpus),
                ..LinuxOptions::default()
            };
            assert_eq!(LinuxSettings::from_options(options).is_ok(), possible, "{vcpus}");
        }
    }

    #[test]
    fn places_of_a_serial_port_are_read() {
        assert_eq!("unix:/run/a".parse(), Ok(SerialPlace::Socket("/run/a".into())));
        assert_eq!("stdio".parse(), Ok(SerialPlace::Stdio));
        for wrong in ["", "unix:", "tcp:1"] {
            let error = wrong.parse::<SerialPlace>().unwrap_err();
            assert!(error.contains("log, stdio or unix:PATH"), "{error}");
        }
    }

    #[test]
    fn another_kernel_or_command_line_has_another_fingerprint() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let settings = |kernel: &str, initrd: Option<&str>| LinuxSettings {
            kernel: path(kernel),
            initrd: initrd.map(path),
            vcpus: 1,
            serial: SerialPlace::Log,
        };
        for (name, content) in [("a", "one"), ("b", "one"), ("c", "another")] {
            std::fs::write(path(name), content).unwrap();
        }
        let of = |settings: LinuxSettings, line| settings.fingerprint(line).unwrap();
        assert_eq!(of(settings("a", None), "quiet"), of(settings("b", None), "quiet"));
        let others = [
            of(settings("c", None), "quiet"),
            of(settings("a", Some("b")), "quiet"),
            of(settings("a", None), "quiet ip=192.0.2.1/24"),
        ];
        for other in others {
            assert_ne!(of(settings("a", None), "quiet"), other);
        }
        assert!(settings("nowhere", None).fingerprint("").is_err());
    }

    #[test]
    fn a_missing_file_is_named() {
        let settings = LinuxSettings {
            kernel: "/nowhere/vmlinuz".into(),
            initrd: None,
            vcpus: 1,
            serial: SerialPlace::Log,
        };
        let error = settings.program("").unwrap_err().to_string();
        assert!(
            error.starts_with("--kernel /nowhere/vmlinuz: can't be opened"),
            "{error}"
        );
    }
}
