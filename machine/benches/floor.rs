//! The floor of a stop with the bundled guest, and its parts, by the number of dirty pages.
//!
//! `cargo bench -p machine --bench floor`

#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

#[path = "../tests/bundled/mod.rs"]
mod bundled;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use machine::devices::{block, net};
use machine::floor::{self, Stop};
use machine::{CardConfig, CopyBuffer, KvmVm, MachineConfig, Mapping, PageSet, Platform, Vm, host_check};

const ROUNDS: usize = 100;

struct Nowhere;

impl net::Backend for Nowhere {
    fn transmit(&mut self, _: &[u8]) {}
    fn receive(&mut self) -> Option<Bytes> {
        None
    }
    fn put_back(&mut self, _: Bytes) {}
    fn delivered(&mut self, _: Bytes) {}
    fn readiness(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }
}

struct Blank(Vec<u8>);

impl Blank {
    fn part(&mut self, offset: u64, bytes: usize) -> &mut [u8] {
        let start = usize::try_from(offset).unwrap();
        &mut self.0[start..start + bytes]
    }
}

impl block::Backend for Blank {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }
    fn read(&mut self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        data.copy_from_slice(self.part(offset, data.len()));
        Ok(())
    }
    fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.part(offset, data.len()).copy_from_slice(data);
        Ok(())
    }
    fn zero(&mut self, offset: u64, length: u64, _: bool) -> io::Result<()> {
        self.part(offset, usize::try_from(length).expect("small")).fill(0);
        Ok(())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn machine(mib: u64, command_line: &str) -> KvmVm {
    let config = MachineConfig {
        memory_bytes: mib << 20,
        cpu: machine::CpuModel::host().unwrap(),
        mapping: Mapping::Shared,
        platform: Platform::Bundled,
        cards: vec![CardConfig {
            mac: [2, 0, 0, 0, 0, 1],
            offloads: false,
            queues: 1,
        }],
        console: Box::new(io::sink()),
        on_power: Arc::new(|event| panic!("the guest has ended: {event:?}")),
    };
    let mut vm = KvmVm::new(config, vec![Box::new(Nowhere)], Box::new(Blank(vec![0; 4 << 20]))).unwrap();
    vm.boot(bundled::guest_image(), command_line).unwrap();
    vm.resume().unwrap();
    vm
}

/// Waits until that many pages are dirty.
fn wait_for(vm: &mut KvmVm, pages: u64) -> PageSet {
    loop {
        let dirty = vm.dirty_now().unwrap();
        if dirty.len() >= pages {
            return dirty;
        }
        thread::sleep(Duration::from_micros(500));
    }
}

fn measure(mib: u64, pages: u64) {
    let working_set = pages.div_ceil(256);
    let dirty = match pages {
        0 => "off".to_owned(),
        1..256 => format!("1,{},sparse", pages * 100),
        _ => format!("{working_set},4000000,sparse"),
    };
    let mut vm = machine(mib, &format!("ip=none ip6=none dirty={dirty}"));
    let mut buffer = CopyBuffer::new(usize::try_from(vm.ram().pages()).unwrap());
    // The guest starts up.
    thread::sleep(Duration::from_millis(500));
    wait_for(&mut vm, pages);
    floor::measure(&mut vm, &mut buffer).unwrap();
    let mut totals = Vec::new();
    let stops: Vec<_> = (0..ROUNDS)
        .map(|_| {
            thread::sleep(Duration::from_millis(10));
            wait_for(&mut vm, pages);
            let stop = floor::measure(&mut vm, &mut buffer).unwrap();
            totals.push(stop.total());
            stop
        })
        .collect();
    totals.sort_unstable();
    for percent in [50, 99] {
        let total = totals[(ROUNDS * percent).div_ceil(100) - 1];
        print(mib, percent, total, &floor::percentile(&stops, percent));
    }
}

fn print(mib: u64, percent: usize, total: Duration, part: &Stop) {
    let micros = |time: Duration| time.as_secs_f64() * 1e6;
    println!(
        "{mib:5} MiB p{percent} {:6} pages: pause {:7.1} harvest {:7.1} save {:6.1} copy {:8.1} resume {:6.1}; total {:8.1} µs",
        part.pages,
        micros(part.pause),
        micros(part.harvest),
        micros(part.save),
        micros(part.copy),
        micros(part.resume),
        micros(total),
    );
}

fn main() {
    if let Err(error) = host_check() {
        println!("SKIPPED, needs KVM: {error}");
        return;
    }
    for mib in [512, 1024] {
        for pages in [0, 100, 1_000, 10_000, 50_000] {
            measure(mib, pages);
        }
    }
}
