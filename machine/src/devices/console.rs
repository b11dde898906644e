//! The console: what the guest prints goes to a writer, line by line. Input is not supported.
//!
//! A line is written when it ends or when it reaches [`LINE_BYTES_MAX`]. The part of a line that was
//! not written yet is machine state, so that a line begun on one host ends on the other.

use std::io::Write;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use super::virtio::mmio::VirtioMmio;
use super::virtio::queue::{QueueError, Ring};
use super::virtio::{Complaints, Device, DeviceError, Turn, Work};
use crate::devices::Interrupt;
use crate::memory::Memory;

/// The longest line that is written in one piece.
pub const LINE_BYTES_MAX: usize = 1024;

const TRANSMIT: usize = 1;
/// Of a longer buffer the rest is not printed.
const BUFFER_BYTES_MAX: u32 = 64 * 1024;
const CHUNK_BYTES: u32 = 4096;
const BATCH: usize = 64;

/// A handle on the console.
#[derive(Clone)]
pub struct Console {
    mmio: Arc<VirtioMmio>,
}

impl Console {
    /// Makes a console that prints to `output`, which should not block for long.
    pub fn new(
        name: &str,
        output: Box<dyn Write + Send>,
        ram: Memory,
        line: Arc<dyn Interrupt>,
    ) -> Result<Self, DeviceError> {
        let terminal = Terminal {
            output,
            line: Vec::new(),
            complaints: Complaints::default(),
        };
        Ok(Self {
            mmio: Arc::new(VirtioMmio::new(name, Box::new(terminal), ram, line)?),
        })
    }

    /// The console's transport.
    #[must_use]
    pub fn mmio(&self) -> &Arc<VirtioMmio> {
        &self.mmio
    }

    /// Prints to `output` from now on.
    pub fn set_output(&self, output: Box<dyn Write + Send>) {
        self.mmio.change(|terminal: &mut Terminal| terminal.output = output);
    }
}

struct Terminal {
    output: Box<dyn Write + Send>,
    line: Vec<u8>,
    complaints: Complaints,
}

impl Device for Terminal {
    fn kind(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn queues(&self) -> usize {
        2
    }

    fn config(&self) -> Vec<u8> {
        // struct virtio_console_config: cols, rows, max_nr_ports, emerg_wr; none of them offered.
        vec![0; 12]
    }

    fn turn(&mut self, rings: &mut [Ring], work: &Work<'_>) -> Result<Turn, QueueError> {
        let ring = &mut rings[TRANSMIT];
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
            if chain.writable() != 0 {
                return Err(QueueError::Layout("a console buffer to be printed is writable"));
            }
            let length = chain.readable().min(BUFFER_BYTES_MAX);
            let mut buffer = [0; CHUNK_BYTES as usize];
            let mut done = 0;
            while done < length {
                let chunk = CHUNK_BYTES.min(length - done);
                let buffer = &mut buffer[..crate::index(chunk.into())];
                chain.read(work.ram, done, buffer)?;
                self.print(buffer);
                done += chunk;
            }
            ring.complete(work.ram, &chain, 0)?;
            ring.tell(work)?;
        }
        Ok(Turn {
            more: true,
            watch: false,
        })
    }

    fn state(&self) -> Vec<u8> {
        self.line.clone()
    }

    fn check(&self, _accepted: u64, state: &[u8]) -> Result<(), &'static str> {
        if state.len() < LINE_BYTES_MAX && !state.contains(&b'\n') {
            Ok(())
        } else {
            Err("the console's unfinished line")
        }
    }

    fn restore(&mut self, state: &[u8]) {
        state.clone_into(&mut self.line);
    }
}

impl Terminal {
    fn print(&mut self, text: &[u8]) {
        for &byte in text {
            self.line.push(byte);
            if byte == b'\n' || self.line.len() == LINE_BYTES_MAX {
                let written = self.output.write_all(&self.line).and_then(|()| self.output.flush());
                if let Err(error) = written
                    && let Some(count) = self.complaints.due()
                {
                    tracing::warn!(%error, count, "the guest's console output can't be written");
                }
                self.line.clear();
            }
        }
    }
}
