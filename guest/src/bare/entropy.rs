//! The entropy device. A draw waits for the device, so that two guests mix in the same bytes at the same place.

use alloc::boxed::Box;

use guest::random::Seed;
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::Transport;

use super::devices::{self, Direct, Features, Registers};
use super::doorbell;

const QUEUE: usize = 2;

/// The entropy device.
pub(crate) struct Entropy {
    registers: Registers,
    queue: VirtQueue<Direct, QUEUE>,
    buffer: Box<Seed>,
}

impl Entropy {
    /// Sets up the device.
    pub(crate) fn new(mut registers: Registers) -> Self {
        devices::begin(&mut registers, Features::empty());
        let queue = devices::queue(&mut registers, 0);
        registers.finish_init();
        Self {
            registers,
            queue,
            buffer: Box::default(),
        }
    }

    /// Draws a seed.
    pub(crate) fn draw(&mut self) -> Seed {
        let mut seed = Seed::default();
        let mut got = 0;
        // The device may give less than was asked for, but always something.
        while got < seed.len() {
            let bytes = self.draw_some();
            let count = bytes.min(seed.len() - got);
            seed[got..got + count].copy_from_slice(&self.buffer[..count]);
            got += count;
        }
        seed
    }

    fn draw_some(&mut self) -> usize {
        // SAFETY: the buffer lives as long as the queue and is not touched until it has been popped.
        let token = match unsafe { self.queue.add(&[], &mut [&mut self.buffer[..]]) } {
            Ok(token) => token,
            Err(error) => panic!("entropy queue: {error}"),
        };
        devices::kick(&mut self.registers, &self.queue, 0);
        while !self.queue.can_pop() {
            doorbell::wait(0);
        }
        // SAFETY: this is the buffer that the token was given for.
        match unsafe { self.queue.pop_used(token, &[], &mut [&mut self.buffer[..]]) } {
            Ok(0) => panic!("the entropy device gives nothing"),
            Ok(bytes) => usize::try_from(bytes).unwrap_or(0),
            Err(error) => panic!("entropy queue: {error}"),
        }
    }
}
