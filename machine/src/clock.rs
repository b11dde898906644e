//! The guest's clock: the page it reads, and the same time as seen from here.
//!
//! Guest time is nanoseconds since the guest first started. It runs on the host's time stamp counter;
//! the page says from which count and guest time on. A machine that is restored goes on at the guest time
//! at which it was saved, whatever the counter of this host says, so guest time never runs
//! backwards. Paused time on the same host counts, once, because the counter goes on.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use guest::abi::{CLOCK_PAGE, ClockPage};
use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use crate::kvm::{HostError, refused};
use crate::memory::Memory;

const MSR_TSC: u32 = 0x10;
/// A counter that differs from the host's by less than this is the host's, read a moment later.
const SAME_TSC: u64 = 1 << 24;

/// The clock of one machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GuestClock {
    /// Guest counter minus host counter.
    tsc_offset: u64,
    multiplier: u64,
    base_tsc: u64,
    base_ns: u64,
}

impl GuestClock {
    /// Makes a clock at guest time 0 for this vCPU.
    pub(crate) fn new(vcpu: &VcpuFd) -> Result<Self, HostError> {
        let khz = tsc_khz(vcpu)?;
        let multiplier = (1_000_000_u64 << 32) / u64::from(khz);
        let tsc_offset = tsc_offset(vcpu)?;
        Ok(Self {
            tsc_offset,
            multiplier,
            base_tsc: host_tsc().wrapping_add(tsc_offset),
            base_ns: 0,
        })
    }

    /// Returns guest time, in nanoseconds.
    pub(crate) fn now(&self) -> u64 {
        let ticks = host_tsc().wrapping_add(self.tsc_offset).saturating_sub(self.base_tsc);
        self.base_ns.saturating_add(scale(ticks, self.multiplier))
    }

    /// Returns how long it is until `deadline` in guest time.
    pub(crate) fn until(&self, deadline: u64) -> Duration {
        Duration::from_nanos(deadline.saturating_sub(self.now()))
    }

    /// Goes on at guest time `now`, and tells the guest. The guest is stopped.
    pub(crate) fn set(&mut self, now: u64, memory: &Memory) {
        self.base_tsc = host_tsc().wrapping_add(self.tsc_offset);
        self.base_ns = now;
        let mut page = read(memory);
        page.base_tsc = self.base_tsc;
        page.base_ns = self.base_ns;
        page.multiplier = self.multiplier;
        page.wall_offset_ns = wall_ns().wrapping_sub(now);
        write(memory, page);
    }
}

/// Returns how fast the guest's time stamp counter is, in kHz.
pub(crate) fn tsc_khz(vcpu: &VcpuFd) -> Result<u32, HostError> {
    match vcpu.get_tsc_khz() {
        Ok(0) => Err(HostError::Capability {
            capability: "a stable time stamp counter",
        }),
        Ok(khz) => Ok(khz),
        Err(error) => Err(refused("say how fast the time stamp counter is")(error)),
    }
}

/// Gives the guest fresh randomness. The guest is stopped.
pub(crate) fn reseed(memory: &Memory, seed: [u8; 32]) {
    let mut page = read(memory);
    page.reseed = seed;
    page.reseed_count = page.reseed_count.wrapping_add(1);
    write(memory, page);
}

/// Turns ticks into nanoseconds.
#[expect(clippy::cast_possible_truncation, reason = "2^64 ns are 584 years")]
fn scale(ticks: u64, multiplier: u64) -> u64 {
    ((u128::from(ticks) * u128::from(multiplier)) >> 32) as u64
}

/// Returns the guest's counter minus the host's.
fn tsc_offset(vcpu: &VcpuFd) -> Result<u64, HostError> {
    let entry = kvm_msr_entry {
        index: MSR_TSC,
        ..Default::default()
    };
    let mut msrs = Msrs::from_entries(&[entry]).expect("one MSR is not too many");
    let before = host_tsc();
    let read = vcpu
        .get_msrs(&mut msrs)
        .map_err(refused("read the guest's time stamp counter"))?;
    if read != 1 {
        return Err(HostError::Capability {
            capability: "access to the guest's time stamp counter",
        });
    }
    let guest = msrs.as_slice()[0].data;
    let after = host_tsc();
    let middle = before + after.wrapping_sub(before) / 2;
    let offset = guest.wrapping_sub(middle);
    let distance = offset.min(offset.wrapping_neg());
    Ok(if distance < SAME_TSC { 0 } else { offset })
}

/// Returns the host's time stamp counter.
pub(crate) fn host_tsc() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, and KVM needs a host that allows it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[expect(clippy::cast_possible_truncation, reason = "2^64 ns after 1970 is the year 2554")]
fn wall_ns() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_nanos() as u64
}

const FIELDS: usize = 6;

/// Reads the page as the guest has it. What the guest may have scribbled over is only counted up.
fn read(memory: &Memory) -> ClockPage {
    let field = |number: u64| {
        let at = GuestAddress(CLOCK_PAGE + 8 * number);
        u64::from_le(memory.read_obj::<u64>(at).expect("the clock page is RAM"))
    };
    let mut reseed = [0; 32];
    let at = GuestAddress(CLOCK_PAGE + 8 * FIELDS as u64);
    memory.read_slice(&mut reseed, at).expect("the clock page is RAM");
    ClockPage {
        sequence: field(0),
        base_tsc: field(1),
        base_ns: field(2),
        multiplier: field(3),
        wall_offset_ns: field(4),
        reseed_count: field(5),
        reseed,
    }
}

/// Writes the page. The sequence goes up even though the guest is stopped: it may have been stopped
/// between two reads.
fn write(memory: &Memory, page: ClockPage) {
    let sequence = (page.sequence & !1).wrapping_add(2);
    let fields: [u64; FIELDS] = [
        sequence,
        page.base_tsc,
        page.base_ns,
        page.multiplier,
        page.wall_offset_ns,
        page.reseed_count,
    ];
    let mut bytes = [0; FIELDS * 8 + 32];
    for (place, field) in bytes.chunks_exact_mut(8).zip(fields) {
        place.copy_from_slice(&field.to_le_bytes());
    }
    bytes[FIELDS * 8..].copy_from_slice(&page.reseed);
    memory
        .write_slice(&bytes, GuestAddress(CLOCK_PAGE))
        .expect("the clock page is RAM");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{GuestRam, MEMORY_MIN, Mapping};

    #[test]
    fn page_has_the_layout_the_guest_reads() {
        assert_eq!(std::mem::size_of::<ClockPage>(), FIELDS * 8 + 32);
        let ram = GuestRam::new(MEMORY_MIN, Mapping::Shared).unwrap();
        let mut clock = GuestClock {
            tsc_offset: 5,
            multiplier: 1 << 32,
            base_tsc: 0,
            base_ns: 0,
        };
        clock.set(1_000, ram.memory());
        reseed(ram.memory(), [9; 32]);
        let page = read(ram.memory());
        assert_eq!((page.sequence, page.base_ns, page.multiplier), (4, 1_000, 1 << 32));
        assert_eq!((page.reseed_count, page.reseed), (1, [9; 32]));
        assert!(page.wall_offset_ns > 1_600_000_000_000_000_000);
        clock.set(2_000, ram.memory());
        assert_eq!((read(ram.memory()).reseed_count, read(ram.memory()).sequence), (1, 6));
    }

    #[test]
    fn guest_time_starts_where_it_is_set_and_grows() {
        let ram = GuestRam::new(MEMORY_MIN, Mapping::Shared).unwrap();
        let mut clock = GuestClock {
            tsc_offset: 0,
            multiplier: 1 << 31,
            base_tsc: 0,
            base_ns: 0,
        };
        clock.set(77, ram.memory());
        let first = clock.now();
        assert!(first >= 77);
        assert!(clock.now() >= first);
        assert_eq!(clock.until(0), Duration::ZERO);
        assert!(clock.until(u64::MAX) > Duration::from_secs(1_000_000));
    }

    #[test]
    fn ticks_scale_without_overflow() {
        assert_eq!(
            scale(3_000_000_000, (1_000_000_u64 << 32) / 3_000_000),
            1_000_000_000 - 1
        );
        assert_eq!(scale(u64::MAX, 1 << 31), u64::MAX >> 1);
    }
}
