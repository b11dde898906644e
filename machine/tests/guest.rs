//! The bundled guest on the host's KVM: it boots, answers, and goes on answering across stops and copies.
//!
//! The guest is built by a nested cargo call with its own target folder, as the program does; with
//! `TANDEM_GUEST_ELF` it is read from there.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bundled;

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bundled::guest_image;
use bytes::Bytes;
use machine::devices::{block, net};
use machine::offload::HEADER_BYTES;
use machine::{CardConfig, KvmVm, MachineConfig, Mapping, PAGE_BYTES, Platform, PowerEvent, Vm, host_check};

const MEMORY: u64 = 64 << 20;
const DISK: usize = 4 << 20;
const PATIENCE: Duration = Duration::from_secs(20);
const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 0x7a, 0, 1];
const OUR_MAC: [u8; 6] = [0x52, 0x54, 0, 0x7a, 0, 2];
const GUEST_IP: [u8; 4] = [10, 77, 0, 10];
const OUR_IP: [u8; 4] = [10, 77, 0, 1];

/// A cable: frames for the guest, and frames of it.
struct Cable {
    to_guest: Receiver<Bytes>,
    ready: Arc<OwnedFd>,
    from_guest: Sender<Vec<u8>>,
    /// A frame that the guest had no room for.
    kept: Option<Bytes>,
}

impl net::Backend for Cable {
    fn transmit(&mut self, frame: &[u8]) {
        let _ = self.from_guest.send(frame[HEADER_BYTES..].to_vec());
    }

    fn receive(&mut self) -> Option<Bytes> {
        self.kept.take().or_else(|| self.to_guest.try_recv().ok()).or_else(|| {
            let _ = rustix::io::read(&*self.ready, &mut [0; 8]);
            self.to_guest.try_recv().ok()
        })
    }

    fn put_back(&mut self, frame: Bytes) {
        self.kept = Some(frame);
    }

    fn delivered(&mut self, _: Bytes) {}

    fn readiness(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.ready.as_fd()]
    }
}

/// The other end of it.
struct Peer {
    to_guest: Sender<Bytes>,
    ready: Arc<OwnedFd>,
    from_guest: Receiver<Vec<u8>>,
}

fn cable() -> (Cable, Peer) {
    let flags = rustix::event::EventfdFlags::NONBLOCK | rustix::event::EventfdFlags::CLOEXEC;
    let ready = Arc::new(rustix::event::eventfd(0, flags).unwrap());
    let (to_guest, for_guest) = mpsc::channel();
    let (of_guest, from_guest) = mpsc::channel();
    let end = Cable {
        to_guest: for_guest,
        ready: Arc::clone(&ready),
        from_guest: of_guest,
        kept: None,
    };
    (
        end,
        Peer {
            to_guest,
            ready,
            from_guest,
        },
    )
}

struct MemoryDisk(Vec<u8>);

impl block::Backend for MemoryDisk {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap();
        data.copy_from_slice(&self.0[start..start + data.len()]);
        Ok(())
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap();
        self.0[start..start + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn zero(&mut self, offset: u64, length: u64, _: bool) -> io::Result<()> {
        let [start, length] = [offset, length].map(|number| usize::try_from(number).unwrap());
        self.0[start..start + length].fill(0);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What the guest prints.
#[derive(Clone, Default)]
struct Paper(Arc<Mutex<Vec<u8>>>);

impl Write for Paper {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(text);
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Host {
    vm: KvmVm,
    peer: Peer,
    paper: Paper,
    ends: Receiver<PowerEvent>,
    echoes: u16,
}

fn host(mapping: Mapping) -> Host {
    let (cable, peer) = cable();
    let (report, ends) = mpsc::channel();
    let paper = Paper::default();
    let config = MachineConfig {
        memory_bytes: MEMORY,
        cpu: machine::CpuModel::host().unwrap(),
        mapping,
        platform: Platform::Bundled,
        cards: vec![CardConfig {
            mac: GUEST_MAC,
            offloads: false,
            queues: 1,
        }],
        console: Box::new(paper.clone()),
        on_power: Arc::new(move |event| drop(report.send(event))),
    };
    let vm = KvmVm::new(config, vec![Box::new(cable)], Box::new(MemoryDisk(vec![0; DISK]))).unwrap();
    Host {
        vm,
        peer,
        paper,
        ends,
        echoes: 0,
    }
}

impl Host {
    fn send(&self, frame: Vec<u8>) {
        let frame = [&[0; HEADER_BYTES][..], &frame].concat();
        self.peer.to_guest.send(frame.into()).unwrap();
        rustix::io::write(&*self.peer.ready, &1_u64.to_ne_bytes()).unwrap();
    }

    fn printed(&self) -> String {
        String::from_utf8_lossy(&self.paper.0.lock().unwrap()).into_owned()
    }

    /// Sends an echo request until it is answered, and says how long the last one took. Asked for our
    /// hardware address, it answers.
    fn ping(&mut self) -> Duration {
        self.echoes += 1;
        let number = self.echoes;
        let (start, mut sent) = (Instant::now(), Instant::now());
        self.send(echo_request(number));
        loop {
            match self.peer.from_guest.recv_timeout(Duration::from_millis(200)) {
                Ok(frame) if is_arp_request(&frame) => self.send(arp(2)),
                Ok(frame) if is_echo_reply(&frame, number) => return sent.elapsed(),
                Ok(_) => {}
                Err(_) => {
                    let end = self.ends.try_recv().ok();
                    let printed = self.printed();
                    assert!(end.is_none(), "the guest has ended: {end:?}\n{printed}");
                    assert!(
                        start.elapsed() < PATIENCE,
                        "the guest does not answer; it printed:\n{printed}"
                    );
                    sent = Instant::now();
                    self.send(arp(1));
                    self.send(echo_request(number));
                }
            }
        }
    }
}

fn ethernet(kind: u16, body: &[u8]) -> Vec<u8> {
    let mut frame = [GUEST_MAC, OUR_MAC].concat();
    frame.extend(kind.to_be_bytes());
    frame.extend(body);
    frame
}

fn arp(operation: u8) -> Vec<u8> {
    let mut body = vec![0, 1, 8, 0, 6, 4, 0, operation];
    body.extend(OUR_MAC);
    body.extend(OUR_IP);
    body.extend(GUEST_MAC);
    body.extend(GUEST_IP);
    ethernet(0x0806, &body)
}

fn is_arp_request(frame: &[u8]) -> bool {
    frame.get(12..14) == Some(&[8, 6]) && frame.get(21) == Some(&1) && frame.get(38..42) == Some(&OUR_IP)
}

fn checksum(data: &[u8]) -> [u8; 2] {
    let sum: u32 = data
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    (!u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap()).to_be_bytes()
}

fn echo_request(number: u16) -> Vec<u8> {
    let mut icmp = vec![8, 0, 0, 0, 0x7a, 0x7a];
    icmp.extend(number.to_be_bytes());
    icmp.extend(b"tandem");
    let sum = checksum(&icmp);
    icmp[2..4].copy_from_slice(&sum);
    let mut ip = vec![
        0x45,
        0,
        0,
        20 + u8::try_from(icmp.len()).unwrap(),
        0,
        0,
        0,
        0,
        64,
        1,
        0,
        0,
    ];
    ip.extend(OUR_IP);
    ip.extend(GUEST_IP);
    let sum = checksum(&ip);
    ip[10..12].copy_from_slice(&sum);
    ip.extend(icmp);
    ethernet(0x0800, &ip)
}

fn is_echo_reply(frame: &[u8], number: u16) -> bool {
    frame.get(12..14) == Some(&[8, 0])
        && frame.get(23) == Some(&1)
        && frame.get(34) == Some(&0)
        && frame.get(40..42) == Some(&number.to_be_bytes())
        && frame.get(42..48) == Some(b"tandem")
}

/// Says loudly that there is no KVM to test on, or panics where it must be there.
fn kvm_is_missing() -> bool {
    let Err(error) = host_check() else { return false };
    assert!(
        std::env::var_os("TANDEM_REQUIRE_KVM").is_none(),
        "TANDEM_REQUIRE_KVM is set, but: {error}"
    );
    println!("SKIPPED, needs KVM: {error}");
    true
}

/// CPU time of this process.
fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(
        u64::try_from(time.tv_sec).unwrap(),
        u32::try_from(time.tv_nsec).unwrap(),
    )
}

#[test]
fn guest_answers_across_stops_and_copies() {
    if kvm_is_missing() {
        return;
    }
    let image = guest_image();
    let mut primary = host(Mapping::Shared);
    primary.vm.boot(image, "ip=10.77.0.10/24").unwrap();
    let start = Instant::now();
    primary.vm.resume().unwrap();
    primary.ping();
    println!(
        "first answer after {:?}; it printed:\n{}",
        start.elapsed(),
        primary.printed()
    );
    assert!(!primary.printed().is_empty(), "the guest says that it is there");

    let mut times: VecDeque<_> = (0..200).map(|_| primary.ping()).collect();
    times.make_contiguous().sort_unstable();
    println!("ping: median {:?}, longest {:?}", times[100], times[199]);

    let before = cpu_time();
    std::thread::sleep(Duration::from_secs(1));
    let idle = cpu_time() - before;
    println!("CPU time of an idle machine: {idle:?} in a second");
    assert!(idle < Duration::from_millis(100), "an idle guest sleeps");

    let mut stops = Vec::new();
    for _ in 0..100 {
        let start = Instant::now();
        primary.vm.pause().unwrap();
        primary.vm.save().unwrap();
        primary.vm.take_dirty().unwrap();
        primary.vm.resume().unwrap();
        stops.push(start.elapsed());
        primary.ping();
    }
    stops.sort_unstable();
    println!("stop, save and go on: median {:?}, longest {:?}", stops[50], stops[99]);

    // A first copy of what there is, then a checkpoint of what has changed since.
    let mut secondary = host(Mapping::Private);
    primary.vm.take_dirty().unwrap();
    let mut page = [0; PAGE_BYTES];
    let (from, to) = (primary.vm.ram(), secondary.vm.ram());
    let populated = from.populated().unwrap();
    for number in populated.iter() {
        from.read_page(number, &mut page).unwrap();
        to.write_committed(number, &page).unwrap();
    }
    for round in 0..20 {
        primary.ping();
        primary.vm.pause().unwrap();
        let dirty = primary.vm.take_dirty().unwrap();
        let state = primary.vm.save().unwrap();
        secondary.vm.check(&state).unwrap();
        secondary.vm.pause().unwrap();
        for number in dirty.iter() {
            from.read_page(number, &mut page).unwrap();
            to.write_committed(number, &page).unwrap();
        }
        let own = secondary.vm.take_dirty().unwrap();
        to.revert(&own).unwrap();
        let mut other = [0; PAGE_BYTES];
        for number in 0..from.pages() {
            from.read_page(number, &mut page).unwrap();
            to.read_page(number, &mut other).unwrap();
            assert!(page == other, "page {number} differs in round {round}");
        }
        secondary.vm.restore(&state).unwrap();
        primary.vm.resume().unwrap();
        secondary.vm.resume().unwrap();
        secondary.echoes = primary.echoes;
        secondary.ping();
        if round == 0 {
            println!(
                "{} of {} pages shipped at first, {} then",
                populated.len(),
                from.pages(),
                dirty.len()
            );
        }
    }
    drop(primary);
    secondary.vm.pause().unwrap();
    secondary.vm.reseed([7; 32]);
    secondary.vm.resume().unwrap();
    let given_back = to.give_back_image(0..to.pages()).unwrap();
    println!("{given_back} pages of the image given back");
    for _ in 0..50 {
        secondary.ping();
    }
}
