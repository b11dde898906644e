//! The console: lines out, nothing in. Usable from everywhere, also while panicking.

use alloc::boxed::Box;
use core::cell::UnsafeCell;

use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::Transport;

use super::devices::{self, Direct, Features, Registers};
use super::doorbell;

const TRANSMIT: u16 = 1;
const QUEUE: usize = 16;
const LINE_MAX: usize = 512;

struct Console {
    registers: Registers,
    /// Part of the device, although nothing is ever received.
    _receive: VirtQueue<Direct, QUEUE>,
    transmit: VirtQueue<Direct, QUEUE>,
    lines: Box<[[u8; LINE_MAX]; QUEUE]>,
    /// By token: the place and the length of its line.
    given: [(usize, usize); QUEUE],
    free: u16,
}

struct Global(UnsafeCell<Option<Console>>);

// SAFETY: the guest has one thread and no interrupts.
unsafe impl Sync for Global {}

static CONSOLE: Global = Global(UnsafeCell::new(None));

/// Sets up the device; what is printed before is lost.
pub(crate) fn install(mut registers: Registers) {
    devices::begin(&mut registers, Features::empty());
    let receive = devices::queue(&mut registers, 0);
    let transmit = devices::queue(&mut registers, TRANSMIT);
    registers.finish_init();
    let console = Console {
        registers,
        _receive: receive,
        transmit,
        lines: Box::new([[0; LINE_MAX]; QUEUE]),
        given: [(0, 0); QUEUE],
        free: u16::MAX,
    };
    // SAFETY: one thread, and `with` lends it only for the time of a call that does not come back here.
    unsafe { *CONSOLE.0.get() = Some(console) };
}

/// Prints a line; a long one is cut. Waits only if sixteen lines are still unprinted.
pub(crate) fn print(line: &str) {
    with(|console| console.print(line));
}

/// Waits until all has been printed.
pub(crate) fn drain() {
    with(|console| {
        while console.free != u16::MAX {
            console.reclaim();
            if console.free != u16::MAX {
                doorbell::wait(0);
            }
        }
    });
}

fn with(act: impl FnOnce(&mut Console)) {
    // SAFETY: one thread; the borrow ends with `act`, which never prints.
    if let Some(console) = unsafe { &mut *CONSOLE.0.get() } {
        act(console);
    }
}

impl Console {
    fn print(&mut self, line: &str) {
        self.reclaim();
        while self.free == 0 {
            doorbell::wait(0);
            self.reclaim();
        }
        let place = usize::try_from(self.free.trailing_zeros()).unwrap_or(0);
        let target = &mut self.lines[place];
        let length = line.len().min(LINE_MAX - 1);
        target[..length].copy_from_slice(&line.as_bytes()[..length]);
        target[length] = b'\n';
        // SAFETY: the line lives as long as the queue and is not touched until it has been popped.
        if let Ok(token) = unsafe { self.transmit.add(&[&self.lines[place][..=length]], &mut []) } {
            self.given[usize::from(token)] = (place, length + 1);
            self.free &= !(1 << place);
            devices::kick(&mut self.registers, &self.transmit, TRANSMIT);
        }
    }

    fn reclaim(&mut self) {
        while let Some(token) = self.transmit.peek_used() {
            let Some((place, length)) = self.given.get(usize::from(token)).copied() else {
                return;
            };
            let line = &self.lines[place][..length];
            // SAFETY: this is the buffer that the token was given for.
            if unsafe { self.transmit.pop_used(token, &[line], &mut []) }.is_err() {
                return;
            }
            self.free |= 1 << place;
        }
    }
}
