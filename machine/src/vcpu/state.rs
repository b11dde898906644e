//! The registers of a vCPU, saved and loaded.
//!
//! They are byte strings in KVM's own layout, one for each group, and a list of MSRs. Loading goes in
//! the order KVM needs and stops at the first thing that KVM refuses, naming it; a vCPU that has
//! been loaded in part must never run. [`Scratch`] is a vCPU that never runs, on which all of it is
//! tried first.

use std::io;

use kvm_bindings::{
    CpuId, Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{VcpuFd, VmFd};
use thiserror::Error;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::clock;
use crate::kvm::{self, Chips, Host, HostError};
use crate::pc::chipset::ChipsetState;
use crate::state::{Reader, StateError, Writer};

/// MSRs in one saved state, at most; hosts have between 40 and 200.
const MSRS_MAX: usize = 1024;

const MSR_TSC: u32 = 0x10;
/// MSRs that tell features, and that no guest can write (microcode, platform, capabilities): KVM keeps them as they are once a vCPU has run.
const TELLING_MSRS: [u32; 4] = [0x8b, 0xce, 0x10a, 0x345];
/// MSRs that follow from where the time stamp counter is. A guest with a clock page has no use for them.
const TSC_MSRS: [u32; 2] = [0x3b, 0x6e0];
/// The memory type range registers (Intel SDM vol. 3, 12.11): KVM keeps them, but does not list them. Eight variable ranges, the
/// fixed ones, and the default.
const MTRRS: [std::ops::RangeInclusive<u32>; 5] = [
    0x200..=0x20f,
    0x250..=0x250,
    0x258..=0x259,
    0x268..=0x26f,
    0x2ff..=0x2ff,
];

/// Registers of the APIC's timer.
const APIC_LVT_TIMER: usize = 0x320;
const APIC_INITIAL_COUNT: usize = 0x380;
const APIC_CURRENT_COUNT: usize = 0x390;

/// Why registers can't be saved or loaded.
#[derive(Debug, Error)]
pub enum RegisterError {
    /// KVM doesn't tell them.
    #[error("KVM can't save {register}")]
    Save {
        /// Which of them.
        register: &'static str,
        /// What it said.
        #[source]
        source: io::Error,
    },
    /// KVM doesn't take them.
    #[error("this host's KVM refuses the saved {register}: the two hosts' processors or kernels differ too much")]
    Refused {
        /// Which of them.
        register: &'static str,
        /// What it said.
        #[source]
        source: io::Error,
    },
    /// The hosts' time stamp counters differ.
    #[error(
        "the guest's time stamp counter runs at {saved} kHz, this host's at {host} kHz: use hosts with processors of the same speed"
    )]
    Frequency {
        /// The guest's.
        saved: u32,
        /// This host's.
        host: u32,
    },
    /// KVM doesn't take a model-specific register.
    #[error(
        "this host's KVM refuses the saved MSR {index:#x} = {value:#x}: the two hosts' processors or kernels differ too much"
    )]
    Msr {
        /// Its number.
        index: u32,
        /// The value refused.
        value: u64,
    },
}

/// All registers of a vCPU.
pub(crate) struct Registers {
    pub(crate) regs: kvm_regs,
    pub(crate) sregs: kvm_sregs,
    pub(crate) xsave: Box<kvm_xsave>,
    pub(crate) xcrs: kvm_xcrs,
    pub(crate) debug: kvm_debugregs,
    pub(crate) events: kvm_vcpu_events,
    pub(crate) run_state: kvm_mp_state,
    /// Only with the chips of a PC.
    pub(crate) timing: Option<Timing>,
    pub(crate) msrs: Vec<kvm_msr_entry>,
}

/// A vCPU's interrupts and its time.
pub(crate) struct Timing {
    pub(crate) apic: Box<kvm_lapic_state>,
    /// The guest's time stamp counter.
    pub(crate) tsc: u64,
}

pub(crate) fn save<T, E: Into<io::Error>>(register: &'static str, result: Result<T, E>) -> Result<T, RegisterError> {
    result.map_err(|error| RegisterError::Save {
        register,
        source: error.into(),
    })
}

pub(crate) fn load<E: Into<io::Error>>(register: &'static str, result: Result<(), E>) -> Result<(), RegisterError> {
    result.map_err(|error| RegisterError::Refused {
        register,
        source: error.into(),
    })
}

impl Registers {
    /// Saves the registers of a vCPU that is not running and has completed its last exit. With the chips of a PC its time
    /// is that at the host's counter `at`.
    pub(crate) fn save(vcpu: &VcpuFd, msrs: &MsrList, at: u64) -> Result<Self, RegisterError> {
        // First: KVM takes note of start-up interrupts then, which change the others.
        let run_state = save("run state", vcpu.get_mp_state())?;
        let timing = match msrs.chips {
            Chips::None => None,
            Chips::Pc => Some(Timing {
                apic: Box::new(save("local APIC", vcpu.get_lapic())?),
                tsc: guest_tsc(vcpu, at)?,
            }),
        };
        Ok(Self {
            regs: save("general registers", vcpu.get_regs())?,
            sregs: save("special registers", vcpu.get_sregs())?,
            xsave: Box::new(save("XSAVE state", vcpu.get_xsave())?),
            xcrs: save("XCR registers", vcpu.get_xcrs())?,
            debug: save("debug registers", vcpu.get_debug_regs())?,
            events: save("pending events", vcpu.get_vcpu_events())?,
            run_state,
            timing,
            msrs: msrs.read(vcpu)?,
        })
    }

    /// Loads the registers into a vCPU that is not running; its time goes on from the host's counter `at`.
    pub(crate) fn load(&self, vcpu: &VcpuFd, at: u64) -> Result<(), RegisterError> {
        load("general registers", vcpu.set_regs(&self.regs))?;
        load("special registers", vcpu.set_sregs(&self.sregs))?;
        load("XCR registers", vcpu.set_xcrs(&self.xcrs))?;
        // SAFETY: KVM reads the 4096 bytes of the structure; no dynamically enabled feature, which would
        // need more, is ever asked for.
        load("XSAVE state", unsafe { vcpu.set_xsave(&self.xsave) })?;
        if let Some(timing) = &self.timing {
            // The APIC says what its timer counts, the MSRs until when, and both go by the counter.
            set_guest_tsc(vcpu, timing.tsc, at)?;
            // What the vCPU had before may count towards a moment of its own, in another mode: KVM would keep the one, or forget the
            // timer that is loaded at the other. So it is stopped first.
            load("local APIC", vcpu.set_lapic(&without_timer(&timing.apic)))?;
            load("local APIC", vcpu.set_lapic(&timing.apic))?;
        }
        write_msrs(vcpu, &self.msrs)?;
        load("run state", vcpu.set_mp_state(self.run_state))?;
        load("pending events", vcpu.set_vcpu_events(&self.events))?;
        load("debug registers", vcpu.set_debug_regs(&self.debug))
    }

    /// Says which of these MSRs, as a vCPU has them for good, has another value here.
    pub(crate) fn check_lasting(&self, lasting: &[kvm_msr_entry]) -> Result<(), RegisterError> {
        let differs = |msr: &&kvm_msr_entry| lasting.iter().any(|has| has.index == msr.index && has.data != msr.data);
        match self.msrs.iter().find(differs) {
            Some(msr) => Err(RegisterError::Msr {
                index: msr.index,
                value: msr.data,
            }),
            None => Ok(()),
        }
    }

    /// Appends the registers to a section.
    pub(crate) fn encode(&self, to: &mut Writer) {
        to.bytes(self.regs.as_bytes())
            .bytes(self.sregs.as_bytes())
            .bytes(self.xsave.as_bytes());
        to.bytes(self.xcrs.as_bytes())
            .bytes(self.debug.as_bytes())
            .bytes(self.events.as_bytes());
        to.bytes(self.run_state.as_bytes());
        if let Some(timing) = &self.timing {
            to.bytes(timing.apic.as_bytes()).u64(timing.tsc);
        }
        to.u32(u32::try_from(self.msrs.len()).expect("KVM lists few MSRs"));
        for msr in &self.msrs {
            to.u32(msr.index).u64(msr.data);
        }
    }

    /// Reads the registers of a machine with these chips from a section.
    pub(crate) fn decode(from: &mut Reader<'_>, chips: Chips) -> Result<Self, StateError> {
        let registers = Self {
            regs: group(from, "general registers")?,
            sregs: group(from, "special registers")?,
            xsave: Box::new(group(from, "XSAVE state")?),
            xcrs: group(from, "XCR registers")?,
            debug: group(from, "debug registers")?,
            events: group(from, "pending events")?,
            run_state: group(from, "run state")?,
            timing: match chips {
                Chips::None => None,
                Chips::Pc => Some(Timing {
                    apic: Box::new(group(from, "local APIC")?),
                    tsc: from.u64("time stamp counter")?,
                }),
            },
            msrs: Vec::new(),
        };
        let count = crate::index(from.u32("the number of MSRs")?.into());
        if count > MSRS_MAX {
            return Err(from.value("the number of MSRs"));
        }
        let msr = |from: &mut Reader<'_>| {
            Ok(kvm_msr_entry {
                index: from.u32("an MSR")?,
                data: from.u64("an MSR")?,
                ..Default::default()
            })
        };
        let msrs = (0..count).map(|_| msr(from)).collect::<Result<_, StateError>>()?;
        Ok(Self { msrs, ..registers })
    }
}

/// Returns the guest's time stamp counter at the host's counter `at`.
fn guest_tsc(vcpu: &VcpuFd, at: u64) -> Result<u64, RegisterError> {
    if let Some(offset) = kvm::tsc_offset(vcpu) {
        return Ok(at.wrapping_add(offset));
    }
    let msrs = read_msrs(vcpu, &[MSR_TSC]).ok_or_else(|| RegisterError::Save {
        register: "time stamp counter",
        source: io::ErrorKind::Unsupported.into(),
    })?;
    Ok(msrs[0].data)
}

/// Lets the guest's time stamp counter go on with `tsc` at the host's counter `at`.
fn set_guest_tsc(vcpu: &VcpuFd, tsc: u64, at: u64) -> Result<(), RegisterError> {
    if kvm::set_tsc_offset(vcpu, tsc.wrapping_sub(at)) {
        return Ok(());
    }
    let entry = kvm_msr_entry {
        index: MSR_TSC,
        data: tsc,
        ..Default::default()
    };
    write_msrs(vcpu, &[entry])
}

pub(crate) fn group<T: FromBytes + IntoBytes + Immutable>(
    from: &mut Reader<'_>,
    register: &'static str,
) -> Result<T, StateError> {
    let bytes = from.bytes(register, size_of::<T>())?;
    T::read_from_bytes(bytes).map_err(|_| from.value(register))
}

/// The MSRs that this host can both save and load, in machines with these chips.
#[derive(Clone, Debug)]
pub(crate) struct MsrList {
    indexes: Vec<u32>,
    chips: Chips,
}

impl MsrList {
    /// Finds them among these by trying each on a vCPU that never runs.
    fn probe(indexes: &[u32], vcpu: &VcpuFd, chips: Chips) -> Self {
        let wanted = |index: &u32| *index != MSR_TSC && (chips == Chips::Pc || !TSC_MSRS.contains(index));
        let usable =
            |index: &u32| wanted(index) && read_msrs(vcpu, &[*index]).is_some_and(|msr| write_msrs(vcpu, &msr).is_ok());
        let unlisted = MTRRS.into_iter().flatten().filter(|_| chips == Chips::Pc);
        let unlisted = unlisted.filter(|index| !indexes.contains(index));
        let indexes = indexes.iter().copied().chain(unlisted).filter(usable).collect();
        Self { indexes, chips }
    }

    pub(crate) fn indexes(&self) -> &[u32] {
        &self.indexes
    }

    /// Reads those that can't be set any more once this vCPU has run.
    pub(crate) fn read_lasting(&self, vcpu: &VcpuFd) -> Result<Vec<kvm_msr_entry>, RegisterError> {
        let lasting = TELLING_MSRS.into_iter().filter(|msr| self.indexes.contains(msr));
        read(vcpu, &lasting.collect::<Vec<_>>())
    }

    fn read(&self, vcpu: &VcpuFd) -> Result<Vec<kvm_msr_entry>, RegisterError> {
        read(vcpu, &self.indexes)
    }
}

fn read(vcpu: &VcpuFd, indexes: &[u32]) -> Result<Vec<kvm_msr_entry>, RegisterError> {
    read_msrs(vcpu, indexes).ok_or_else(|| RegisterError::Save {
        register: "model-specific registers",
        source: io::ErrorKind::Unsupported.into(),
    })
}

/// Returns the state of an APIC with its timer masked and stopped (Intel SDM vol. 3, 11.5.4).
fn without_timer(apic: &kvm_lapic_state) -> kvm_lapic_state {
    const MASKED: u32 = 1 << 16;
    let mut quiet = *apic;
    for (register, value) in [
        (APIC_LVT_TIMER, MASKED),
        (APIC_INITIAL_COUNT, 0),
        (APIC_CURRENT_COUNT, 0),
    ] {
        for (to, from) in quiet.regs[register..].iter_mut().zip(value.to_le_bytes()) {
            *to = from.cast_signed();
        }
    }
    quiet
}

fn read_msrs(vcpu: &VcpuFd, indexes: &[u32]) -> Option<Vec<kvm_msr_entry>> {
    let entries: Vec<_> = indexes
        .iter()
        .map(|index| kvm_msr_entry {
            index: *index,
            ..Default::default()
        })
        .collect();
    let mut msrs = Msrs::from_entries(&entries).ok()?;
    let read = vcpu.get_msrs(&mut msrs).ok()?;
    (read == entries.len()).then(|| msrs.as_slice().to_vec())
}

fn write_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), RegisterError> {
    let refused = |source: io::Error| RegisterError::Refused {
        register: "model-specific registers",
        source,
    };
    let msrs = Msrs::from_entries(entries).map_err(|_| refused(io::ErrorKind::InvalidInput.into()))?;
    let written = vcpu.set_msrs(&msrs).map_err(|error| refused(error.into()))?;
    match entries.get(written) {
        Some(entry) => Err(RegisterError::Msr {
            index: entry.index,
            value: entry.data,
        }),
        None => Ok(()),
    }
}

/// vCPUs that never run. What KVM could refuse is tried here while the machine runs.
pub(crate) struct Scratch {
    vcpus: Vec<VcpuFd>,
    vm: VmFd,
    chips: Chips,
}

impl Scratch {
    /// Makes a vCPU for each of these CPUIDs.
    pub(crate) fn new(host: &Host, chips: Chips, cpuids: &[CpuId]) -> Result<Self, HostError> {
        let vm = host.create_vm(chips)?;
        let vcpus = (0..).zip(cpuids);
        let vcpus = vcpus.map(|(number, cpuid)| host.create_vcpu(&vm, number, cpuid));
        Ok(Self {
            vcpus: vcpus.collect::<Result<_, _>>()?,
            vm,
            chips,
        })
    }

    /// Finds the MSRs among these that this host can both save and load.
    pub(crate) fn msrs(&self, indexes: &[u32]) -> MsrList {
        MsrList::probe(indexes, &self.vcpus[0], self.chips)
    }

    /// Loads the registers of all vCPUs, and then what they share, as a restore does. After an error these vCPUs are spoilt for further trials.
    pub(crate) fn try_load<'a>(
        &self,
        registers: impl Iterator<Item = &'a Registers>,
        chipset: Option<&ChipsetState>,
    ) -> Result<(), RegisterError> {
        let at = clock::host_tsc();
        for (vcpu, registers) in self.vcpus.iter().zip(registers) {
            registers.load(vcpu, at)?;
        }
        chipset.map_or(Ok(()), |chipset| chipset.load(&self.vm))
    }
}
