//! The console and the source of random bytes.

use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use super::driver::{DriverQueue, Piece, bell, get, put, ram, start, wait_for, written_pages};
use crate::devices::console::Console;
use crate::devices::entropy::{Entropy, EntropySource};
use crate::memory::Memory;
use crate::state::Section;

/// Keeps each write apart.
#[derive(Clone, Default)]
struct Paper(Arc<Mutex<Vec<Vec<u8>>>>);

impl Write for Paper {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().push(data.to_vec());
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn console(ram: &Memory, paper: &Paper) -> Console {
    Console::new("console", Box::new(paper.clone()), ram.clone(), bell()).unwrap()
}

fn print(ram: &Memory, console: &Console, queue: &mut DriverQueue<'_>, text: &[u8]) {
    put(ram, 0x20_000, text);
    queue.offer(&[Piece::Read(0x20_000, u32::try_from(text.len()).unwrap())]);
    queue.notify(console.mmio());
    queue.wait_used();
}

#[test]
fn prints_whole_lines_and_bounds_endless_ones() {
    let ram = ram();
    let paper = Paper::default();
    let console = console(&ram, &paper);
    let (receive, mut transmit) = (DriverQueue::new(&ram, 0), DriverQueue::new(&ram, 1));
    start(console.mmio(), &[&receive, &transmit]);
    print(&ram, &console, &mut transmit, b"one\ntw");
    print(&ram, &console, &mut transmit, b"o\n");
    print(&ram, &console, &mut transmit, &[b'x'; 5000]);
    wait_for("the lines", || (paper.0.lock().unwrap().len() == 6).then_some(()));
    let lines = paper.0.lock().unwrap();
    assert_eq!(lines[..2], [b"one\n".to_vec(), b"two\n".to_vec()]);
    assert!(lines[2..].iter().all(|line| line.len() == 1024));
}

#[test]
fn a_line_begun_on_one_host_ends_on_the_other() {
    let ram = ram();
    let papers = [Paper::default(), Paper::default()];
    let (first, second) = (console(&ram, &papers[0]), console(&ram, &papers[1]));
    let (receive, mut transmit) = (DriverQueue::new(&ram, 0), DriverQueue::new(&ram, 1));
    start(first.mmio(), &[&receive, &transmit]);
    print(&ram, &first, &mut transmit, b"begun here, ");
    first.mmio().freeze().unwrap();
    second.mmio().freeze().unwrap();
    second.mmio().restore(&first.mmio().state()).unwrap();
    second.mmio().thaw();
    print(&ram, &second, &mut transmit, b"ended there\n");
    assert_eq!(papers[0].0.lock().unwrap().len(), 0);
    wait_for("the line", || {
        (*papers[1].0.lock().unwrap() == [b"begun here, ended there\n".to_vec()]).then_some(())
    });
}

fn entropy(ram: &Memory, source: EntropySource) -> Entropy {
    Entropy::new("entropy", source, ram.clone(), bell()).unwrap()
}

fn draw(ram: &Memory, entropy: &Entropy, queue: &mut DriverQueue<'_>, bytes: u32) -> Vec<u8> {
    queue.offer(&[Piece::Write(0x20_000, bytes)]);
    queue.notify(entropy.mmio());
    let (_, written) = queue.wait_used();
    get(ram, 0x20_000, crate::index(written.into()))
}

/// Draws `sizes` from a new device; moves to another one through `section` after `cut` of them.
fn stream(seed: [u8; 32], sizes: &[u32], cut: usize) -> Vec<u8> {
    let ram = ram();
    let source = EntropySource::Seeded { seed, position: 0 };
    let (first, second) = (entropy(&ram, source), entropy(&ram, EntropySource::Host));
    let mut queue = DriverQueue::new(&ram, 0);
    start(first.mmio(), &[&queue]);
    let (before, after) = sizes.split_at(cut);
    let mut drawn: Vec<u8> = before
        .iter()
        .flat_map(|bytes| draw(&ram, &first, &mut queue, *bytes))
        .collect();
    first.mmio().freeze().unwrap();
    second.mmio().freeze().unwrap();
    let section: Section = first.mmio().state();
    second.mmio().restore(&section).unwrap();
    second.mmio().thaw();
    drawn.extend(after.iter().flat_map(|bytes| draw(&ram, &second, &mut queue, *bytes)));
    drawn
}

#[test]
fn the_same_seed_gives_the_same_bytes_wherever_the_machine_moves() {
    let sizes = [1, 31, 64, 5000, 7, 4096, 100];
    let whole = stream([1; 32], &sizes, 0);
    assert_eq!(whole.len(), 9299);
    for cut in 1..sizes.len() {
        assert_eq!(stream([1; 32], &sizes, cut), whole);
    }
    assert_eq!(
        stream([1; 32], &[9299], 1),
        whole,
        "the sizes of the requests do not matter"
    );
    assert_ne!(stream([2; 32], &sizes, 0)[..32], whole[..32]);
    // The stream is part of what is saved: it must not change from version to version.
    assert_eq!(whole[..8], [93, 199, 108, 189, 71, 78, 145, 183]);
}

#[test]
fn a_new_seed_begins_a_new_stream_and_none_is_the_hosts() {
    let ram = ram();
    let entropy = entropy(&ram, EntropySource::Host);
    let mut queue = DriverQueue::new(&ram, 0);
    start(entropy.mmio(), &[&queue]);
    assert_ne!(
        draw(&ram, &entropy, &mut queue, 32),
        draw(&ram, &entropy, &mut queue, 32)
    );
    entropy.set_seed(Some([3; 32]));
    let first = draw(&ram, &entropy, &mut queue, 32);
    entropy.set_seed(Some([3; 32]));
    assert_eq!(draw(&ram, &entropy, &mut queue, 32), first);
    entropy.set_seed(None);
    assert_ne!(draw(&ram, &entropy, &mut queue, 32), first);
}

#[test]
fn a_long_request_is_filled_in_part_and_its_pages_are_marked() {
    let ram = ram();
    let entropy = entropy(&ram, EntropySource::Host);
    let mut queue = DriverQueue::new(&ram, 0);
    start(entropy.mmio(), &[&queue]);
    queue.offer(&[Piece::Write(0x20_000, 0x40_000)]);
    written_pages(&ram);
    queue.notify(entropy.mmio());
    assert_eq!(queue.wait_used().1, 0x10_000);
    entropy.mmio().freeze().unwrap();
    let expected: Vec<u64> = std::iter::once(queue.used_page()).chain(0x20..0x30).collect();
    assert_eq!(written_pages(&ram), expected);
}
