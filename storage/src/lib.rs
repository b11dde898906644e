//! The pair's disks: which image is true at each moment of an epoch, and how that survives a crash.
//!
//! The primary writes to its own image and mirrors each write, tagged with its epoch. The secondary keeps
//! three things apart until a checkpoint decides between them:
//!
//! ```text
//!   guest of the secondary ──writes──► overlay ─┐
//!                                               ├─ reads see these three, top first
//!                                  committing ──┤◄── commit: the buffers ≤ n come down here, the overlay is dropped
//!                                  base image ──┘◄── take over: the overlay comes down here, the buffers are dropped
//!   primary's writes ──stage──► buffer n, buffer n+1 …   (the guest never sees these)
//! ```
//!
//! What comes down does so through a journal beside the image: a crash at any moment leaves the state
//! before or the state after, never a mixture.
//!
//! The cores here ([`replica`], [`changed`]) hold no thread and no clock. Slow work is a value, the
//! [`replica::CommitJob`], that the shell runs on a thread of its own. Files are touched by [`image`], [`record`]
//! and [`witness`] only. [`sim`] is a disk that loses and tears writes.

#![forbid(unsafe_code)]

mod backed;
mod beside;
pub mod changed;
pub mod image;
pub mod journal;
pub mod record;
pub mod replica;
mod sectors;
pub mod sim;
pub mod verify;
pub mod witness;

pub use changed::ChangedBlocks;
pub use image::{FileImage, Image, ImageError, NewFile, Room, SECTOR_BYTES, put};
pub use journal::{Recovery, recover};
pub use record::Record;
pub use replica::{CommitJob, Done, Replica};
pub use sectors::{RangeError, footprint};
pub use witness::{Claim, DirectoryWitness};
