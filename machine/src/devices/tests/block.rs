//! The disk.

use std::io;
use std::sync::{Arc, Mutex};

use super::driver::{DriverQueue, Piece, bell, get, put, ram, read32, start, start_with, wait_for, written_pages};
use crate::devices::DeviceError;
use crate::devices::block::{Backend, Block, REQUEST_BYTES_MAX, ZEROS_RANGES_MAX, ZEROS_SECTORS_MAX};
use crate::memory::Memory;

const SECTORS: u64 = 2048;
const DISK_BYTES: usize = 512 * 2048;
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
const HEADER: u64 = 0x20_000;
const DATA: u64 = 0x21_000;
const STATUS: u64 = 0x60_000;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Call {
    Read(u64, usize),
    Write(u64, usize),
    Zero(u64, u64, bool),
    Flush,
}

#[derive(Clone, Default)]
struct Ram(Arc<Mutex<Content>>);

#[derive(Default)]
struct Content {
    bytes: Vec<u8>,
    calls: Vec<Call>,
    /// Calls that have begun.
    begun: usize,
    failing: bool,
    /// Every call waits for this lock.
    gate: Arc<Mutex<()>>,
}

impl Ram {
    fn new(bytes: usize) -> Self {
        let disk = Self::default();
        disk.0.lock().unwrap().bytes = vec![0; bytes];
        disk
    }

    fn call(&self, call: Call) -> io::Result<()> {
        let gate = {
            let mut content = self.0.lock().unwrap();
            content.begun += 1;
            Arc::clone(&content.gate)
        };
        drop(gate.lock().unwrap());
        let mut content = self.0.lock().unwrap();
        content.calls.push(call);
        if content.failing {
            Err(io::Error::other("the disk is on fire"))
        } else {
            Ok(())
        }
    }

    fn calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.0.lock().unwrap().calls)
    }
}

impl Backend for Ram {
    fn size(&self) -> u64 {
        self.0.lock().unwrap().bytes.len() as u64
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.call(Call::Read(offset, data.len()))?;
        let start = crate::index(offset);
        data.copy_from_slice(&self.0.lock().unwrap().bytes[start..start + data.len()]);
        Ok(())
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.call(Call::Write(offset, data.len()))?;
        let start = crate::index(offset);
        self.0.lock().unwrap().bytes[start..start + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn zero(&mut self, offset: u64, length: u64, give_back: bool) -> io::Result<()> {
        self.call(Call::Zero(offset, length, give_back))?;
        let [start, length] = [offset, length].map(crate::index);
        self.0.lock().unwrap().bytes[start..start + length].fill(0);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.call(Call::Flush)
    }
}

fn disk(ram: &Memory, content: &Ram) -> Block {
    Block::new(
        "block",
        "tandem-0123456789-too-long",
        Box::new(content.clone()),
        ram.clone(),
        bell(),
    )
    .unwrap()
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

/// Sends one request and returns its status and the bytes written.
fn request(ram: &Memory, block: &Block, queue: &mut DriverQueue<'_>, head: &[u8], data: &[Piece]) -> (u8, u32) {
    put(ram, HEADER, head);
    put(ram, STATUS, &[0xee]);
    let pieces = [&[Piece::Read(HEADER, 16)], data, &[Piece::Write(STATUS, 1)]].concat();
    queue.offer(&pieces);
    queue.notify(block.mmio());
    let (_, written) = queue.wait_used();
    (get(ram, STATUS, 1)[0], written)
}

#[test]
fn shows_its_capacity_and_identity() {
    let ram = ram();
    let block = disk(&ram, &Ram::new(DISK_BYTES + 100));
    let mut queue = DriverQueue::new(&ram, 0);
    start(block.mmio(), &[&queue]);
    let mut config = [0xee; 64];
    block.mmio().read(0x100, &mut config);
    assert_eq!(config[..8], SECTORS.to_le_bytes());
    assert_eq!(config[12..16], 254u32.to_le_bytes());
    assert_eq!(config[16..36], [0; 20]);
    let limits: Vec<u8> = [128 * 1024, 4, 8, 128 * 1024, 4, 1_u32].map(u32::to_le_bytes).concat();
    assert_eq!(config[36..60], limits);
    assert_eq!(config[60..], [0; 4], "beyond the structure");
    assert_eq!(read32(block.mmio(), 8), 2);
    assert_eq!(
        request(&ram, &block, &mut queue, &header(GET_ID, 0), &[Piece::Write(DATA, 20)]),
        (OK, 21)
    );
    assert_eq!(get(&ram, DATA, 20), b"tandem-0123456789-to");
    assert_eq!(
        request(&ram, &block, &mut queue, &header(GET_ID, 0), &[Piece::Write(DATA, 4)]),
        (OK, 5)
    );
}

#[test]
fn reads_what_was_written_in_any_pieces() {
    let ram = ram();
    let content = Ram::new(DISK_BYTES);
    let block = disk(&ram, &content);
    let mut queue = DriverQueue::new(&ram, 0);
    start(block.mmio(), &[&queue]);
    let pattern: Vec<u8> = (0..=250u8).cycle().take(4096).collect();
    put(&ram, DATA, &pattern);
    let pieces = [Piece::Read(DATA, 100), Piece::Read(DATA + 100, 3996)];
    assert_eq!(request(&ram, &block, &mut queue, &header(OUT, 5), &pieces), (OK, 1));
    assert_eq!(request(&ram, &block, &mut queue, &header(FLUSH, 0), &[]), (OK, 1));
    let pieces = [Piece::Write(DATA + 0x8000, 4000), Piece::Write(DATA + 0x10_000, 96)];
    assert_eq!(request(&ram, &block, &mut queue, &header(IN, 5), &pieces), (OK, 4097));
    assert_eq!(
        [get(&ram, DATA + 0x8000, 4000), get(&ram, DATA + 0x10_000, 96)].concat(),
        pattern
    );
    assert_eq!(
        content.calls(),
        [Call::Write(2560, 4096), Call::Flush, Call::Read(2560, 4096)]
    );
    // Header, data and status may share descriptors in any way.
    put(&ram, HEADER, &header(IN, 5));
    queue.offer(&[
        Piece::Read(HEADER, 7),
        Piece::Read(HEADER + 7, 9),
        Piece::Write(DATA, 513),
    ]);
    queue.notify(block.mmio());
    assert_eq!(queue.wait_used().1, 513);
    assert_eq!(get(&ram, DATA, 513), [&pattern[..512], &[OK]].concat());
}

#[test]
fn refuses_what_is_not_whole_sectors_inside() {
    let ram = ram();
    let content = Ram::new(DISK_BYTES);
    let block = disk(&ram, &content);
    let mut queue = DriverQueue::new(&ram, 0);
    start(block.mmio(), &[&queue]);
    for (sector, bytes) in [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (0, 511),
        (u64::MAX, 512),
        (1 << 55, 512),
    ] {
        assert_eq!(
            request(
                &ram,
                &block,
                &mut queue,
                &header(IN, sector),
                &[Piece::Write(DATA, bytes)]
            ),
            (IOERR, 1)
        );
        assert_eq!(
            request(
                &ram,
                &block,
                &mut queue,
                &header(OUT, sector),
                &[Piece::Read(DATA, bytes)]
            ),
            (IOERR, 1)
        );
    }
    for kind in [2, 10, 12, 14, 99, u32::MAX] {
        assert_eq!(
            request(&ram, &block, &mut queue, &header(kind, 0), &[Piece::Write(DATA, 512)]),
            (UNSUPP, 1)
        );
    }
    assert_eq!(content.calls(), []);
    assert_eq!(
        request(
            &ram,
            &block,
            &mut queue,
            &header(IN, SECTORS - 1),
            &[Piece::Write(DATA, 512)]
        ),
        (OK, 513)
    );
}

#[test]
fn refuses_a_request_that_would_hold_up_a_checkpoint() {
    let ram = ram();
    let content = Ram::new(2 * crate::index(REQUEST_BYTES_MAX.into()));
    let block = disk(&ram, &content);
    let mut queue = DriverQueue::new(&ram, 0);
    start(block.mmio(), &[&queue]);
    // One piece of 512 KiB, many times over.
    let piece = Piece::Write(0x70_000, 0x80_000);
    let pieces: Vec<Piece> = std::iter::repeat_n(piece, 10).collect();
    assert_eq!(request(&ram, &block, &mut queue, &header(IN, 0), &pieces).0, OK);
    assert!(
        content
            .calls()
            .iter()
            .all(|call| matches!(call, Call::Read(_, bytes) if *bytes <= 0x4_0000))
    );
    queue = fresh(&ram, &block);
    put(&ram, 0x70_000, &header(IN, 0));
    let big = Memory::from_ranges(&[(vm_memory::GuestAddress(0), 1 << 26)]).unwrap();
    let block = disk(&big, &content);
    let mut big_queue = DriverQueue::new(&big, 0);
    start(block.mmio(), &[&big_queue]);
    let answer = request(
        &big,
        &block,
        &mut big_queue,
        &header(IN, 0),
        &[Piece::Write(0x100_000, REQUEST_BYTES_MAX + 512)],
    );
    assert_eq!(answer, (IOERR, 1));
    drop(queue);
}

fn fresh<'a>(ram: &'a Memory, block: &Block) -> DriverQueue<'a> {
    let queue = DriverQueue::new(ram, 0);
    start(block.mmio(), &[&queue]);
    queue
}

#[test]
fn a_failing_disk_is_the_guests_error() {
    let ram = ram();
    let content = Ram::new(DISK_BYTES);
    let block = disk(&ram, &content);
    let mut queue = DriverQueue::new(&ram, 0);
    start(block.mmio(), &[&queue]);
    content.0.lock().unwrap().failing = true;
    assert_eq!(
        request(&ram, &block, &mut queue, &header(IN, 0), &[Piece::Write(DATA, 512)]),
        (IOERR, 1)
    );
    assert_eq!(
        request(&ram, &block, &mut queue, &header(OUT, 0), &[Piece::Read(DATA, 512)]),
        (IOERR, 1)
    );
    assert_eq!(request(&ram, &block, &mut queue, &header(FLUSH, 0), &[]), (IOERR, 1));
    content.0.lock().unwrap().failing = false;
    assert_eq!(request(&ram, &block, &mut queue, &header(FLUSH, 0), &[]), (OK, 1));
}

/// Ranges as the driver writes them: sector, sectors, flags.
fn ranges(ranges: &[(u64, u32, u32)]) -> Vec<u8> {
    let range = |(sector, count, flags): &(u64, u32, u32)| {
        [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
    };
    ranges.iter().flat_map(range).collect()
}

fn zero(ram: &Memory, block: &Block, queue: &mut DriverQueue<'_>, kind: u32, wanted: &[(u64, u32, u32)]) -> (u8, u32) {
    let bytes = ranges(wanted);
    put(ram, DATA, &bytes);
    let length = u32::try_from(bytes.len()).unwrap();
    request(ram, block, queue, &header(kind, 0), &[Piece::Read(DATA, length)])
}

#[test]
fn what_is_discarded_reads_as_zeros() {
    let ram = ram();
    let content = Ram::new(DISK_BYTES);
    content.0.lock().unwrap().bytes.fill(7);
    let block = disk(&ram, &content);
    let mut queue = DriverQueue::new(&ram, 0);
    start(block.mmio(), &[&queue]);
    let pieces = [(8, 16, 0), (SECTORS - 1, 1, 0), (3, 0, 0)];
    assert_eq!(zero(&ram, &block, &mut queue, DISCARD, &pieces), (OK, 1));
    let expected = [(8 * 512, 16 * 512), ((SECTORS - 1) * 512, 512), (3 * 512, 0)];
    assert_eq!(
        content.calls(),
        expected.map(|(offset, length)| Call::Zero(offset, length, true))
    );
    assert_eq!(
        zero(&ram, &block, &mut queue, WRITE_ZEROES, &[(0, 8, 0), (24, 1, 1)]),
        (OK, 1)
    );
    assert_eq!(
        content.calls(),
        [Call::Zero(0, 4096, false), Call::Zero(24 * 512, 512, true)]
    );
    let bytes = content.0.lock().unwrap().bytes.clone();
    assert!(bytes[..25 * 512].iter().all(|byte| *byte == 0));
    assert_eq!(
        (bytes[25 * 512], bytes[DISK_BYTES - 513], bytes[DISK_BYTES - 1]),
        (7, 7, 0)
    );
    // The ranges may lie in any pieces of memory.
    put(&ram, DATA, &ranges(&[(100, 1, 0)]));
    let pieces = [Piece::Read(DATA, 3), Piece::Read(DATA + 3, 13)];
    assert_eq!(request(&ram, &block, &mut queue, &header(DISCARD, 0), &pieces), (OK, 1));
    assert_eq!(content.calls(), [Call::Zero(100 * 512, 512, true)]);
    content.0.lock().unwrap().failing = true;
    assert_eq!(zero(&ram, &block, &mut queue, DISCARD, &[(0, 1, 0)]), (IOERR, 1));
}

#[test]
fn hostile_discards_do_nothing() {
    let ram = ram();
    let most = ZEROS_SECTORS_MAX;
    let content = Ram::new(512 * (crate::index(most.into()) + 1));
    let block = disk(&ram, &content);
    let mut queue = DriverQueue::new(&ram, 0);
    start(block.mmio(), &[&queue]);
    let last = u64::from(most);
    for kind in [DISCARD, WRITE_ZEROES] {
        for (bad, status) in [
            ((last + 1, 1, 0), IOERR),
            ((last, 2, 0), IOERR),
            ((u64::MAX, 1, 0), IOERR),
            ((u64::MAX, u32::MAX, 0), IOERR),
            ((1 << 55, 1, 0), IOERR),
            ((0, most + 1, 0), IOERR),
            ((0, u32::MAX, 0), IOERR),
            ((0, 1, 2), UNSUPP),
            ((0, 1, u32::MAX), UNSUPP),
            ((u64::MAX, 1, 4), UNSUPP),
        ] {
            assert_eq!(
                zero(&ram, &block, &mut queue, kind, &[(0, 1, 0), bad]),
                (status, 1),
                "{kind} {bad:?}"
            );
        }
        let too_many = vec![(0, 1, 0); crate::index(ZEROS_RANGES_MAX.into()) + 1];
        for wanted in [&too_many[..], &[]] {
            assert_eq!(zero(&ram, &block, &mut queue, kind, wanted), (IOERR, 1));
        }
        for length in [1, 15, 17] {
            let pieces = [Piece::Read(DATA, length)];
            assert_eq!(request(&ram, &block, &mut queue, &header(kind, 0), &pieces), (IOERR, 1));
        }
    }
    assert_eq!(zero(&ram, &block, &mut queue, DISCARD, &[(0, 1, 1)]), (UNSUPP, 1));
    assert_eq!(
        content.calls(),
        [],
        "all of a request is checked before any of it is done"
    );
    let mut wanted = vec![(0, 1, 0); crate::index(ZEROS_RANGES_MAX.into())];
    wanted[3] = (1, most, 0);
    assert_eq!(zero(&ram, &block, &mut queue, DISCARD, &wanted), (OK, 1));
}

#[test]
fn a_driver_that_did_not_ask_for_discards_has_none() {
    let ram = ram();
    let content = Ram::new(DISK_BYTES);
    let block = disk(&ram, &content);
    let mut queue = DriverQueue::new(&ram, 0);
    start_with(block.mmio(), &[&queue], 1 << 32);
    for kind in [DISCARD, WRITE_ZEROES] {
        assert_eq!(zero(&ram, &block, &mut queue, kind, &[(0, 1, 0)]), (UNSUPP, 1));
    }
    assert_eq!(content.calls(), []);
    let mut queue = DriverQueue::new(&ram, 0);
    start_with(block.mmio(), &[&queue], 1 << 32 | 1 << 13);
    assert_eq!(zero(&ram, &block, &mut queue, DISCARD, &[(0, 1, 0)]), (OK, 1));
    assert_eq!(
        content.calls(),
        [Call::Zero(0, 512, true), Call::Flush],
        "as after a write"
    );
}

#[test]
fn a_driver_without_flushes_gets_one_after_each_write() {
    let ram = ram();
    let content = Ram::new(DISK_BYTES);
    let block = disk(&ram, &content);
    let mut queue = DriverQueue::new(&ram, 0);
    start_with(block.mmio(), &[&queue], 1 << 32);
    assert_eq!(
        request(&ram, &block, &mut queue, &header(OUT, 0), &[Piece::Read(DATA, 512)]),
        (OK, 1)
    );
    assert_eq!(content.calls(), [Call::Write(0, 512), Call::Flush]);
}

#[test]
fn pages_that_only_the_disk_wrote_are_marked() {
    let ram = ram();
    let block = disk(&ram, &Ram::new(DISK_BYTES));
    let mut queue = DriverQueue::new(&ram, 0);
    start(block.mmio(), &[&queue]);
    put(&ram, HEADER, &header(IN, 0));
    queue.offer(&[
        Piece::Read(HEADER, 16),
        Piece::Write(DATA + 0xe00, 1024),
        Piece::Write(STATUS, 1),
    ]);
    written_pages(&ram);
    queue.notify(block.mmio());
    queue.wait_used();
    block.mmio().freeze().unwrap();
    assert_eq!(written_pages(&ram), [queue.used_page(), 0x21, 0x22, 0x60]);
}

#[test]
fn freezing_waits_for_the_request_in_flight_and_leaves_the_others() {
    let ram = ram();
    let content = Ram::new(DISK_BYTES);
    let block = disk(&ram, &content);
    let mut queue = DriverQueue::new(&ram, 0);
    start(block.mmio(), &[&queue]);
    let gate = Arc::clone(&content.0.lock().unwrap().gate);
    let held = gate.lock().unwrap();
    put(&ram, HEADER, &header(OUT, 0));
    for _ in 0..3 {
        queue.offer(&[Piece::Read(HEADER, 16), Piece::Read(DATA, 512), Piece::Write(STATUS, 1)]);
    }
    queue.notify(block.mmio());
    wait_for("a request in flight", || {
        (content.0.lock().unwrap().begun > 0).then_some(())
    });
    std::thread::scope(|scope| {
        let freezer = scope.spawn(|| block.mmio().freeze());
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert!(!freezer.is_finished(), "a request is in flight");
        drop(held);
        freezer.join().unwrap().unwrap();
    });
    assert_eq!((content.calls().len(), queue.used_idx()), (1, 1), "done and answered");
    block.mmio().thaw();
    wait_for("the others", || (queue.used_idx() == 3).then_some(()));
    assert_eq!(content.calls().len(), 2);
}

#[test]
fn a_hanging_disk_can_not_be_frozen_and_the_attempt_ends() {
    let ram = ram();
    let content = Ram::new(DISK_BYTES);
    let block = disk(&ram, &content);
    let mut queue = DriverQueue::new(&ram, 0);
    start(block.mmio(), &[&queue]);
    let gate = Arc::clone(&content.0.lock().unwrap().gate);
    let held = gate.lock().unwrap();
    put(&ram, HEADER, &header(FLUSH, 0));
    for _ in 0..2 {
        queue.offer(&[Piece::Read(HEADER, 16), Piece::Write(STATUS, 1)]);
    }
    queue.notify(block.mmio());
    wait_for("a request in flight", || {
        (content.0.lock().unwrap().begun > 0).then_some(())
    });
    let attempt = block.mmio().freeze_within(std::time::Duration::from_millis(20));
    assert!(matches!(attempt, Err(DeviceError::Stuck { .. })));
    drop(held);
    block.mmio().freeze().unwrap();
    assert_eq!(queue.used_idx(), 1);
}

#[test]
fn only_a_disk_of_the_same_size_can_take_its_place() {
    let ram = ram();
    let block = disk(&ram, &Ram::new(DISK_BYTES));
    let other = Ram::new(DISK_BYTES);
    other.0.lock().unwrap().bytes[0] = 42;
    assert!(matches!(
        block.set_backend(Box::new(Ram::new(512))),
        Err(DeviceError::Size { offered: 512, .. })
    ));
    block.mmio().freeze().unwrap();
    assert!(block.set_backend(Box::new(other)).is_ok());
    block.mmio().thaw();
    let mut queue = fresh(&ram, &block);
    assert_eq!(
        request(&ram, &block, &mut queue, &header(IN, 0), &[Piece::Write(DATA, 512)]),
        (OK, 513)
    );
    assert_eq!(get(&ram, DATA, 1), [42]);
}
