//! Every bound of the protocol in one place.

use crate::time::Duration;

/// Bytes in a page of guest memory.
pub const PAGE_BYTES: usize = 4096;
/// Bytes in a block of the disk comparison and of the changed-block map.
pub const BLOCK_BYTES: usize = 64 * 1024;
/// Largest message body on the wire, in bytes.
pub const BODY_BYTES_MAX: usize = 1024 * 1024;
/// Largest device or network state on the wire, in bytes: registers of every vCPU, addresses of every flow.
pub const STATE_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Longest name of a pair or node, in bytes.
pub const NAME_BYTES_MAX: usize = 64;
/// Longest text that explains a refusal or a goodbye, in bytes.
pub const TEXT_BYTES_MAX: usize = 1024;
/// Devices of a machine.
pub const DEVICES_MAX: usize = 64;
/// Longest device description in a machine's shape, in bytes.
pub const DEVICE_NAME_BYTES_MAX: usize = 256;
/// Sections of a machine's saved state.
pub const SECTIONS_MAX: usize = 1024;
/// Longest name of a section, in bytes.
pub const SECTION_NAME_BYTES_MAX: usize = 64;
/// Page streams of a pairing.
pub const STREAMS_MAX: usize = 8;
/// Network cards of a machine.
pub const NICS_MAX: usize = 8;
/// Leaves of a CPU's description.
pub const CPU_LEAVES_MAX: usize = 128;
/// Model-specific registers of a CPU's description; hosts have between 40 and 200.
pub const CPU_MSRS_MAX: usize = 1024;
/// Virtual CPUs of a machine.
pub const VCPUS_MAX: u32 = 1024;
/// Largest guest memory, in bytes.
pub const MEMORY_BYTES_MAX: u64 = 16 << 40;
/// The header before each Ethernet frame, which says what is left to do on it, in bytes (`virtio_net_hdr_v1`).
pub const FRAME_HEADER_BYTES: usize = 12;
/// Largest frame taken from a guest, a TAP or a peer, in bytes: header, Ethernet with two VLAN tags, and the longest IPv6
/// packet, since guests leave the cutting of TCP segments to the network.
pub const FRAME_BYTES_MAX: usize = FRAME_HEADER_BYTES + 14 + 2 * 4 + 40 + 0xffff;
/// Frames that the primary's guest sent and that wait for release, in bytes.
pub const HELD_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Frames that the secondary's guest sent and that wait for the primary's, in bytes.
pub const PENDING_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Flows that the comparator and the sequence translator know at a time.
pub const FLOWS_MAX: usize = 65_536;
/// Inputs forwarded to the secondary and not yet confirmed; more make the primary stop reading its TAP.
pub const INPUTS_UNCONFIRMED_MAX: u64 = 4_096;
/// The same in bytes.
pub const INPUT_BYTES_UNCONFIRMED_MAX: u64 = 8 * 1024 * 1024;
/// Frames that the secondary's guest sent and that wait to be sent to the primary, in bytes; more make its network card stop.
pub const UNSENT_BYTES_MAX: usize = 8 * 1024 * 1024;
/// The secondary's own disk writes since the last commit, in bytes; near it, it asks for a checkpoint.
pub const OVERLAY_BYTES_MAX: u64 = 256 * 1024 * 1024;
/// The primary's disk writes of one epoch, in bytes; near it, a checkpoint is taken.
pub const EPOCH_WRITES_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// Zeros in one disk write, in bytes. They cost next to nothing to send and to keep; but where they can't be written, what is there
/// instead is read and sent.
pub const ZEROS_BYTES_MAX: u64 = 32 * 1024 * 1024;

/// A frame of either side that waits longer than this for its equal triggers a checkpoint.
pub const UNMATCHED_MAX: Duration = Duration::from_millis(200);
/// A frame of the primary may wait so long, however soon the secondary's came lately: an ordinary scheduling delay is no divergence.
pub const UNMATCHED_MIN: Duration = Duration::from_millis(20);
/// Time between two checkpoints that output waits for, unless the user sets another.
pub const CHECKPOINT_EVERY: Duration = Duration::from_millis(5);
/// An epoch is never older than this.
pub const EPOCH_AGE_MAX: Duration = Duration::from_millis(1_000);
/// A silent peer is declared lost after this, unless the user sets another limit.
pub const TAKEOVER_LIMIT_DEFAULT: Duration = Duration::from_millis(300);

/// The shortest takeover limit that can be set; below it, an ordinary scheduling delay is a death.
pub const TAKEOVER_LIMIT_MIN: Duration = Duration::from_millis(20);
/// The longest takeover limit that can be set.
pub const TAKEOVER_LIMIT_MAX: Duration = Duration::from_millis(600_000);
/// Share of the takeover limit after which a side that hears nothing releases nothing more (numerator, denominator).
pub const FENCE_SHARE: (u64, u64) = (2, 3);
/// Heartbeats sent within one takeover limit.
pub const HEARTBEATS_PER_LIMIT: u64 = 8;

const _: () = assert!(
    FENCE_SHARE.0 < FENCE_SHARE.1,
    "the fence must close before the other side may take over"
);
const _: () = assert!(FRAME_BYTES_MAX < BODY_BYTES_MAX);
const _: () = assert!(BLOCK_BYTES.is_multiple_of(PAGE_BYTES));
const _: () = assert!(BLOCK_BYTES < BODY_BYTES_MAX);
const _: () = assert!(BLOCK_BYTES as u64 <= ZEROS_BYTES_MAX);

/// Blocks of a disk whose hashes travel in one message: 2 MiB of it, so that the primary hears in time that the secondary does not hang,
/// also where a slow disk and a slow processor share the work.
pub const HASHED_BLOCKS_PER_MESSAGE: usize = 32;
