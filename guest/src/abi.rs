//! The interface between the machine and the bundled guest: where things lie in guest memory.
//!
//! The guest is entered in ring 3 of 64-bit mode at its ELF entry point, with identity page tables
//! (user-accessible, 2 MiB pages) over all memory and the device window, RSP at `STACK_TOP`, RDI at
//! `BOOT_INFO`, interrupts off, no IDT. It uses MMIO only. All numbers are little endian.

/// Guest-physical address of the [`BootInfo`] page.
pub const BOOT_INFO: u64 = 0x1000;
/// Guest-physical address of the [`ClockPage`].
pub const CLOCK_PAGE: u64 = 0x2000;
/// Guest-physical address of the command line, UTF-8, up to one page.
pub const COMMAND_LINE: u64 = 0x3000;
/// Longest command line in bytes.
pub const COMMAND_LINE_MAX: usize = 4096;
/// Initial stack pointer; the stack grows down towards the page tables.
pub const STACK_TOP: u64 = 0x20_0000;
/// Guest-physical address of the first page table (PML4); the others follow.
pub const PAGE_TABLES: u64 = 0x1_0000;
/// Where the image is linked; everything from its end to the end of low memory is the guest's heap.
pub const IMAGE_BASE: u64 = 0x20_0000;

/// Low memory ends here at the latest; the rest of memory lies from [`HIGH_MEMORY`] on.
pub const LOW_MEMORY_END_MAX: u64 = 0xc000_0000;
/// Start of the memory above the device window.
pub const HIGH_MEMORY: u64 = 0x1_0000_0000;
/// Base of the first virtio-mmio (version 2) device.
pub const VIRTIO_BASE: u64 = 0xd000_0000;
/// Bytes from one virtio-mmio device to the next.
pub const VIRTIO_STRIDE: u64 = 0x1000;
/// Network devices that the guest has addresses for.
pub const NETS_MAX: usize = 8;
/// Base of the doorbell page.
pub const DOORBELL: u64 = 0xd010_0000;
/// Offset, in the doorbell page, of the 64-bit idle register. A write of a deadline in guest
/// nanoseconds (0: none) returns when a device has used a buffer since the last such write returned,
/// or when the deadline has passed. It may return early; the guest polls all queues after it.
pub const DOORBELL_IDLE: u64 = 0x0;
/// Offset, in the doorbell page, of the 32-bit power register; see `POWER_*`.
pub const DOORBELL_POWER: u64 = 0x8;
/// Written to the power register: the guest ends in order.
pub const POWER_OFF: u32 = 1;
/// Written to the power register: the guest wants to start again.
pub const POWER_RESET: u32 = 2;
/// Written to the power register: the guest can't go on; its console says why.
pub const POWER_PANIC: u32 = 3;

/// First field of [`BootInfo`].
pub const BOOT_MAGIC: u64 = 0x6d65_646e_6174_0001;

/// What the machine tells the guest at its start.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct BootInfo {
    /// [`BOOT_MAGIC`].
    pub magic: u64,
    /// End of low memory (exclusive), a multiple of 2 MiB.
    pub low_memory_end: u64,
    /// End of high memory (exclusive), [`HIGH_MEMORY`] if there is none.
    pub high_memory_end: u64,
    /// Length of the command line in bytes.
    pub command_line_bytes: u64,
    /// Number of virtio-mmio devices: their kind is read from their registers.
    pub devices: u64,
}

/// The guest's clock, written by the machine at start, after every load, and at takeover.
///
/// `now = base_ns + ((rdtsc − base_tsc) × multiplier >> 32)`, monotonic across hosts;
/// `wall = now + wall_offset_ns` (nanoseconds since 1970, UTC).
/// The guest reads `sequence` before and after; odd or changed means: read again.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ClockPage {
    /// Even when the page is whole.
    pub sequence: u64,
    /// The guest's TSC at `base_ns`.
    pub base_tsc: u64,
    /// Guest time at `base_tsc`, in nanoseconds since the guest first started.
    pub base_ns: u64,
    /// Nanoseconds per TSC tick, times 2³².
    pub multiplier: u64,
    /// To be added to guest time for the wall clock.
    pub wall_offset_ns: u64,
    /// Raised whenever `reseed` is new: at takeover the guest must mix it into its random state.
    pub reseed_count: u64,
    /// Fresh host entropy.
    pub reseed: [u8; 32],
}
