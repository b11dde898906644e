//! Which CPU a VM is given: what the user says, out of what the host can give.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use checkpoint::cpu::{self, CpuLeaf, CpuModel, Level};

use crate::options::{nearest, suggestion};

/// The address space between the memory below 4 GiB and that above it, at most, in bytes.
const HOLE_BYTES: u64 = 4 << 30;

/// What a VM's CPU is made from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Base {
    /// All that the host can give, and the secondary's host, too, if that is met before the VM is made.
    #[default]
    Host,
    /// A level of the psABI.
    Level(Level),
}

/// Names of features that a VM is not to have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hidden(Vec<&'static str>);

/// The CPU of a VM that this host boots.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuChoice {
    /// What it is made from.
    pub base: Base,
    /// What of that is left out.
    pub hidden: Hidden,
}

impl FromStr for Base {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let level = Level::ALL.into_iter().find(|level| level.name() == text);
        match level {
            Some(level) => Ok(Self::Level(level)),
            None if text == "host" => Ok(Self::Host),
            None => Err(format!(
                "'{text}' is no CPU: write host, {}",
                Level::ALL.map(Level::name).join(", ")
            )),
        }
    }
}

impl fmt::Display for Base {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Host => "host",
            Self::Level(level) => level.name(),
        })
    }
}

impl FromStr for Hidden {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names = text.split(',').map(|name| {
            let name = name.trim();
            let known = cpu::feature(name).ok_or_else(|| {
                let nearest = nearest(&name.replace('-', "_"), cpu::feature_names());
                let hint = suggestion(nearest, || ": the names are those of /proc/cpuinfo".to_owned());
                format!("'{name}' is no feature of a CPU{hint}")
            })?;
            if cpu::is_needed(known) {
                return Err(format!("no 64-bit guest runs without {known}: leave it out"));
            }
            Ok(known)
        });
        Ok(Self(names.collect::<Result<_, _>>()?))
    }
}

impl CpuChoice {
    /// Returns the CPU of a VM with so much memory on this host.
    ///
    /// # Errors
    /// Names what the host lacks.
    pub fn model(&self, host: &CpuModel, memory_bytes: u64) -> Result<CpuModel> {
        let base = match self.base {
            Base::Host => host.clone(),
            Base::Level(level) => level.of(host).with_context(|| {
                format!(
                    "this host can't give --cpu {}: take --cpu host, or a lower level",
                    self.base
                )
            })?,
        };
        let model = base.without(self.hidden.0.iter().copied());
        if let Some(bits) = too_few_bits(&model, memory_bytes) {
            bail!(
                "a guest with --cpu {} has {bits} bits for an address, too few for this much memory: take --cpu host",
                self.base
            );
        }
        Ok(model)
    }

    /// Tells whether the VM may get less than that if the secondary can't give all of it.
    #[must_use]
    pub fn adapts(&self) -> bool {
        self.base == Base::Host
    }
}

/// Returns how many bits an address has if they are too few for that much memory.
#[must_use]
pub fn too_few_bits(cpu: &CpuModel, memory_bytes: u64) -> Option<u32> {
    let bits = u32::from(cpu.physical_bits());
    (bits < u64::BITS && (memory_bytes + HOLE_BYTES - 1) >> bits > 0).then_some(bits)
}

/// Returns the CPU that this host can give.
///
/// # Errors
/// Fails if it has no KVM that can run a machine.
pub fn of_host() -> Result<CpuModel> {
    let machine::CpuModel { leaves, msrs } = machine::CpuModel::host()?;
    let leaf =
        |leaf: machine::CpuLeaf| CpuLeaf::new(leaf.function, leaf.index, [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]);
    Ok(CpuModel::new(leaves.into_iter().map(leaf).collect(), msrs))
}

/// Returns a CPU as a machine takes it.
#[must_use]
pub fn for_machine(model: &CpuModel) -> machine::CpuModel {
    let leaf =
        |leaf: &CpuLeaf| machine::CpuLeaf::new(leaf.function, leaf.index, [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]);
    machine::CpuModel {
        leaves: model.leaves.iter().map(leaf).collect(),
        msrs: model.msrs.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bases_have_the_names_that_are_told() {
        for text in ["host", "x86-64-v2", "x86-64-v3", "x86-64-v4"] {
            assert_eq!(text.parse::<Base>().unwrap().to_string(), text);
        }
        let error = "haswell".parse::<Base>().unwrap_err();
        assert_eq!(
            error,
            "'haswell' is no CPU: write host, x86-64-v2, x86-64-v3, x86-64-v4"
        );
    }

    #[test]
    fn features_are_hidden_by_their_linux_names() {
        let hidden: Hidden = "rdrand, RDSEED,tsc-deadline,sse4-2".parse().unwrap();
        assert_eq!(hidden.0, ["rdrand", "rdseed", "tsc_deadline_timer", "sse4_2"]);
        let refused = |text: &str| text.parse::<Hidden>().unwrap_err();
        assert_eq!(
            refused("rdrandd"),
            "'rdrandd' is no feature of a CPU: did you mean 'rdrand'?"
        );
        assert_eq!(
            refused("sse4.2"),
            "'sse4.2' is no feature of a CPU: did you mean 'sse4_2'?"
        );
        assert_eq!(
            refused(""),
            "'' is no feature of a CPU: the names are those of /proc/cpuinfo"
        );
        assert_eq!(refused("lm"), "no 64-bit guest runs without lm: leave it out");
    }

    #[test]
    fn a_choice_says_what_the_host_lacks() {
        let choice = |base: Base| CpuChoice {
            base,
            hidden: Hidden(Vec::new()),
        };
        let bare = CpuModel::default();
        let error = choice(Base::Level(Level::V2)).model(&bare, 1 << 30).unwrap_err();
        assert!(
            error.to_string().starts_with("this host can't give --cpu x86-64-v2"),
            "{error:#}"
        );
        let small = CpuModel::new(
            vec![CpuLeaf {
                function: 0x8000_0008,
                eax: 0x3024,
                ..CpuLeaf::default()
            }],
            Vec::new(),
        );
        assert!(choice(Base::Host).model(&small, 60 << 30).is_ok());
        let error = choice(Base::Host).model(&small, 61 << 30).unwrap_err();
        assert!(error.to_string().contains("36 bits"), "{error}");
        assert!(choice(Base::Host).adapts() && !choice(Base::Level(Level::V2)).adapts());
    }
}
