//! The source of random bytes for the guest.
//!
//! While the machine is one of a pair, both sides must give their guests the same bytes: then they come
//! from a seed, as one endless stream whose position is machine state. Else they come from the host.
//! The stream is BLAKE3's extendable output, keyed with the seed: without the seed it can't be told
//! from random, and its position can be set at once. Requests are filled in their order.

use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::virtio::mmio::VirtioMmio;
use super::virtio::queue::{QueueError, Ring};
use super::virtio::{Complaints, Device, DeviceError, Turn, Work};
use crate::devices::Interrupt;
use crate::memory::Memory;

/// Of a longer request no more is filled.
pub const REQUEST_BYTES_MAX: u32 = 64 * 1024;

const CHUNK_BYTES: u32 = 4096;
const BATCH: usize = 16;
const FROM_HOST: u8 = 0;
const FROM_SEED: u8 = 1;

/// Where the random bytes come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EntropySource {
    /// The host's random generator.
    #[default]
    Host,
    /// A stream that depends on the seed alone.
    Seeded {
        /// Names the stream; a secret.
        seed: [u8; 32],
        /// The next byte of it.
        position: u64,
    },
}

/// A handle on the entropy device.
#[derive(Clone)]
pub struct Entropy {
    mmio: Arc<VirtioMmio>,
}

impl Entropy {
    /// Makes an entropy device that draws from `source`.
    pub fn new(name: &str, source: EntropySource, ram: Memory, line: Arc<dyn Interrupt>) -> Result<Self, DeviceError> {
        let generator = Generator {
            source,
            complaints: Complaints::default(),
        };
        Ok(Self {
            mmio: Arc::new(VirtioMmio::new(name, Box::new(generator), ram, line)?),
        })
    }

    /// The device's transport.
    #[must_use]
    pub fn mmio(&self) -> &Arc<VirtioMmio> {
        &self.mmio
    }

    /// Draws from the start of this seed's stream from now on, or, with `None`, from the host.
    pub fn set_seed(&self, seed: Option<[u8; 32]>) {
        let source = seed.map_or(EntropySource::Host, |seed| EntropySource::Seeded { seed, position: 0 });
        self.mmio.change(|generator: &mut Generator| generator.source = source);
    }
}

struct Generator {
    source: EntropySource,
    complaints: Complaints,
}

impl Device for Generator {
    fn kind(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queues(&self) -> usize {
        1
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn turn(&mut self, rings: &mut [Ring], work: &Work<'_>) -> Result<Turn, QueueError> {
        let ring = &mut rings[0];
        for _ in 0..BATCH {
            if work.stopping() {
                break;
            }
            let Some(chain) = ring.pop(work.ram)? else {
                return Ok(Turn {
                    more: ring.listen(work.ram)?,
                    watch: false,
                });
            };
            if chain.readable() != 0 || chain.writable() == 0 {
                return Err(QueueError::Layout("a buffer for random bytes is not writable"));
            }
            let length = chain.writable().min(REQUEST_BYTES_MAX);
            let mut buffer = [0; CHUNK_BYTES as usize];
            let mut done = 0;
            while done < length {
                let chunk = CHUNK_BYTES.min(length - done);
                let buffer = &mut buffer[..crate::index(chunk.into())];
                if !self.fill(buffer) {
                    break;
                }
                chain.write(work.ram, done, buffer)?;
                done += chunk;
            }
            ring.complete(work.ram, &chain, done)?;
            ring.tell(work)?;
        }
        Ok(Turn {
            more: true,
            watch: false,
        })
    }

    fn state(&self) -> Vec<u8> {
        match self.source {
            EntropySource::Host => vec![FROM_HOST],
            EntropySource::Seeded { seed, position } => {
                let mut state = vec![FROM_SEED];
                state.extend_from_slice(&seed);
                state.extend_from_slice(&position.to_le_bytes());
                state
            }
        }
    }

    fn check(&self, _accepted: u64, state: &[u8]) -> Result<(), &'static str> {
        parse(state).map(|_| ()).ok_or("the entropy source")
    }

    fn restore(&mut self, state: &[u8]) {
        self.source = parse(state).expect("the state was checked");
    }
}

impl Generator {
    /// Fills `buffer`; `false` if the host has nothing to fill it with.
    fn fill(&mut self, buffer: &mut [u8]) -> bool {
        match &mut self.source {
            EntropySource::Seeded { seed, position } => {
                let mut stream = blake3::Hasher::new_keyed(seed).finalize_xof();
                stream.set_position(*position);
                stream.fill(buffer);
                *position = position.wrapping_add(buffer.len() as u64);
                true
            }
            EntropySource::Host => fill_from_host(buffer, &mut self.complaints),
        }
    }
}

fn fill_from_host(mut buffer: &mut [u8], complaints: &mut Complaints) -> bool {
    while !buffer.is_empty() {
        match rustix::rand::getrandom(&mut *buffer, rustix::rand::GetRandomFlags::empty()) {
            Ok(count) => buffer = &mut buffer[count..],
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                if let Some(count) = complaints.due() {
                    tracing::error!(%error, count, "the host gives no random bytes");
                }
                return false;
            }
        }
    }
    true
}

fn parse(state: &[u8]) -> Option<EntropySource> {
    match state {
        [FROM_HOST] => Some(EntropySource::Host),
        [FROM_SEED, rest @ ..] => {
            let (seed, position) = rest.split_first_chunk::<32>()?;
            let position = u64::from_le_bytes(position.try_into().ok()?);
            Some(EntropySource::Seeded { seed: *seed, position })
        }
        _ => None,
    }
}
