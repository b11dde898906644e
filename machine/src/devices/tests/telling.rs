//! When a card's guest is interrupted: not before what its frames bring others is sent, and for one sent frame not at once.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::driver::{Bell, DriverQueue, Piece, bell, ram, read32, start, start_with, wait_for, write32};
use super::wire::{CONFIG, Wire};
use crate::devices::Turns;
use crate::devices::net::Net;
use crate::memory::Memory;
use crate::offload::HEADER_BYTES;

const FRAME: [u8; HEADER_BYTES + 60] = [0; HEADER_BYTES + 60];

fn card(ram: &Memory, wire: &Wire, line: &Arc<Bell>) -> Net {
    Net::new("net", CONFIG, Box::new(wire.clone()), ram.clone(), line.clone()).unwrap()
}

fn heard(line: &Bell) -> usize {
    line.0.load(Ordering::SeqCst)
}

/// Says whether a turn has become due since the last call, and forgets it.
pub(super) fn is_due(turns: &Turns) -> bool {
    // SAFETY: the descriptor lives as long as `turns`, which outlives the borrow.
    let kick = unsafe { BorrowedFd::borrow_raw(turns.as_raw_fd()) };
    rustix::io::read(kick, &mut [0; 8]).is_ok()
}

/// Lets the guest send so many frames.
fn send(transmit: &mut DriverQueue<'_>, frames: usize) {
    for _ in 0..frames {
        transmit.offer(&[Piece::Read(0x8000, 12 + 60)]).unwrap();
    }
}

#[test]
fn the_guest_of_lent_turns_is_interrupted_when_the_holder_says_so_and_never_while_frozen() {
    let (ram, wire, line) = (ram(), Wire::new(), bell());
    let net = card(&ram, &wire, &line);
    let (mut receive, transmit) = (DriverQueue::new(&ram, 0), DriverQueue::new(&ram, 1));
    // Without event indexes: the driver wants to know each time.
    start_with(net.mmio(), &[&receive, &transmit], !(1 << 29));
    for place in [0x9000, 0xa000, 0xb000, 0xc000] {
        receive.offer(&[Piece::Write(place, 1526)]);
    }
    let heard = || heard(&line);
    let status = || read32(net.mmio(), 0x60);
    let turns = net.mmio().turns();
    let _ = turns.take();
    let _ = turns.tell();
    assert_eq!((heard(), status()), (0, 0), "there is nothing to tell");

    wire.push(FRAME.to_vec());
    let _ = turns.take();
    receive.wait_used();
    assert_eq!((heard(), status()), (0, 1));
    let _ = turns.tell();
    let _ = turns.tell();
    assert_eq!(heard(), 1, "once");

    wire.push(FRAME.to_vec());
    let _ = turns.take();
    net.mmio().freeze().unwrap();
    let _ = turns.tell();
    assert_eq!(heard(), 1, "a device at rest interrupts nobody");
    let saved = net.mmio().state();
    net.mmio().thaw();
    assert!(is_due(&turns), "a turn is due, after which it is told");
    let _ = turns.take();
    let _ = turns.tell();
    assert_eq!(heard(), 2);

    // What was owed at a save is reported where the state is restored, and forgotten where another state is.
    wire.push(FRAME.to_vec());
    let _ = turns.take();
    net.mmio().freeze().unwrap();
    net.mmio().restore(&saved).unwrap();
    net.mmio().report_again();
    assert_eq!(heard(), 3);
    net.mmio().thaw();
    let _ = turns.tell();
    assert_eq!(heard(), 3, "once");

    wire.push(FRAME.to_vec());
    let _ = turns.take();
    drop(turns);
    wait_for("the interrupt", || (heard() == 4).then_some(()));

    // Given back while the device is frozen: its own thread tells.
    receive.wait_used();
    receive.offer(&[Piece::Write(0x9000, 1526)]);
    let turns = net.mmio().turns();
    let _ = turns.take();
    wire.push(FRAME.to_vec());
    let _ = turns.take();
    net.mmio().freeze().unwrap();
    drop(turns);
    assert_eq!(heard(), 4);
    net.mmio().thaw();
    wait_for("the interrupt", || (heard() == 5).then_some(()));
}

#[test]
fn a_guest_is_told_at_once_of_two_frames_that_it_has_sent_and_of_one_much_later() {
    let (ram, wire, line) = (ram(), Wire::new(), bell());
    let net = card(&ram, &wire, &line);
    let (mut receive, mut transmit) = (DriverQueue::new(&ram, 0), DriverQueue::new(&ram, 1));
    start(net.mmio(), &[&receive, &transmit]);
    let heard = || heard(&line);
    let status = || read32(net.mmio(), 0x60);
    let turns = net.mmio().turns();
    let _ = turns.take();
    // However far the ring has wrapped, and whether the driver has looked meanwhile or not.
    for round in 0..30_000 {
        let before = heard();
        send(&mut transmit, 1);
        let _ = turns.take();
        assert!(turns.tell(), "round {round}");
        assert_eq!((heard(), status()), (before, 0), "round {round}");
        if round % 3 == 0 {
            transmit.wait_used();
            send(&mut transmit, 1);
            let _ = turns.take();
            assert!(turns.tell(), "round {round}");
            assert_eq!((heard(), status()), (before, 0), "it has seen the first: round {round}");
            turns.tell_late();
            turns.tell_late();
        } else {
            // It puts it there without a look at what was used.
            send(&mut transmit, 1);
            let _ = turns.take();
            assert!(!turns.tell(), "round {round}");
            transmit.wait_used();
        }
        assert_eq!((heard(), status()), (before + 1, 1), "round {round}");
        turns.tell_late();
        assert_eq!(heard(), before + 1, "there is nothing left to tell: round {round}");
        transmit.wait_used();
        write32(net.mmio(), 0x64, 1);
    }

    // A frame that comes in brings the news of the one that went out.
    let before = heard();
    receive.offer(&[Piece::Write(0x9000, 1526)]);
    let _ = turns.take();
    send(&mut transmit, 1);
    wire.push(FRAME.to_vec());
    let _ = turns.take();
    assert!(!turns.tell());
    assert_eq!((heard(), status()), (before + 1, 1));
    write32(net.mmio(), 0x64, 1);
    transmit.wait_used();

    // So it does when the guest has acknowledged what came in, and looked, before the other went out.
    receive.offer(&[Piece::Write(0x9000, 1526)]);
    let _ = turns.take();
    wire.push(FRAME.to_vec());
    let _ = turns.take();
    write32(net.mmio(), 0x64, 1);
    receive.wait_used();
    receive.wait_used();
    let before = heard();
    send(&mut transmit, 1);
    let _ = turns.take();
    assert!(!turns.tell());
    assert_eq!((heard(), status()), (before + 1, 1));
    write32(net.mmio(), 0x64, 1);
    transmit.wait_used();

    // What is saved meanwhile says what is to be told; a device at rest tells nobody.
    send(&mut transmit, 1);
    let _ = turns.take();
    net.mmio().freeze().unwrap();
    turns.tell_late();
    assert_eq!((heard(), status()), (before + 1, 0));
    let saved = net.mmio().state();
    net.mmio().restore(&saved).unwrap();
    net.mmio().report_again();
    assert_eq!((heard(), status()), (before + 2, 1));
    net.mmio().thaw();
    assert!(!turns.tell(), "it has been told");
    transmit.wait_used();

    // The card's own thread does as much.
    drop(turns);
    send(&mut transmit, 1);
    transmit.notify(net.mmio());
    transmit.wait_used();
    wait_for("the interrupt", || (heard() == before + 3).then_some(()));
}
