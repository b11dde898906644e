//! The bundled guest as a freestanding program: entered in ring 3, alone on its virtual machine.
//!
//! Start-up, the loop, and the end. What is served lives in the library; what touches the machine lives in
//! [`bare`]. The loop is: the disk's completion, one round of the server, the disk's next request, one kick of each
//! network device; when none of them had anything to do, the doorbell with the next deadline. It never spins while idle.

#![no_std]
#![no_main]
#![no_builtins]

extern crate alloc;

mod bare;

use alloc::vec::Vec;

use guest::abi::{BOOT_MAGIC, BootInfo, POWER_OFF, POWER_RESET};
use guest::kv::{DiskError, Kv, Status};
use guest::server::Server;
use guest::settings::Settings;
use guest::world::{Limits, Power, World};

use bare::block::{Block, Polled};
use bare::clock::Clock;
use bare::console::print;
use bare::devices::Devices;
use bare::doorbell;
use bare::entropy::Entropy;
use bare::memory;
use bare::net::Net;

/// How long an orderly end waits for the last answers to leave.
const FAREWELL_NS: u64 = 50_000_000;
/// A deadline when only the device can help: it should report by itself long before.
const STALL_NS: u64 = 10_000_000;

/// Called by the entry code with what the machine put into RDI.
#[unsafe(no_mangle)]
extern "C" fn rust_main(boot: *const BootInfo) -> ! {
    // SAFETY: the machine passes the address of a boot information that lives as long as the guest.
    let boot = unsafe { boot.read() };
    if boot.magic != BOOT_MAGIC {
        panic!(
            "the machine's boot information has magic {:#x}, expected {BOOT_MAGIC:#x}",
            boot.magic
        );
    }
    let layout = memory::take(&boot);
    let mut clock = Clock::new();
    let devices = Devices::find(&boot);
    if let Some(transport) = devices.console {
        bare::console::install(transport);
    }
    let settings = match Settings::parse(memory::command_line(&boot)) {
        Ok(settings) => settings,
        Err(error) => give_up(&error),
    };
    let mut entropy = devices.entropy.map(Entropy::new);
    let mut nets: Vec<Net> = devices.nets.into_iter().map(Net::new).collect();
    if nets.is_empty() {
        give_up(&"there is no network device: give the machine one")
    }
    for net in nets.iter().filter(|net| net.pairs() > 1) {
        print(&alloc::format!("tandem guest: {} pairs of queues", net.pairs()));
    }
    let mut block = devices.block.map(Block::new);
    let limits = Limits::new(&settings, nets.len(), layout.heap_bytes).unwrap_or_else(|error| give_up(&error));
    let kv = load(block.as_mut(), limits.store);
    print(&alloc::format!(
        "tandem guest: {} MiB heap, {} MiB to write on",
        layout.heap_bytes >> 20,
        layout.arena.pages() >> 8
    ));
    let seed = entropy.as_mut().map_or_else(|| clock.reseed(), Entropy::draw);
    let now = clock.now();
    let macs: Vec<[u8; 6]> = nets.iter().map(Net::mac).collect();
    let server = World::new(settings, limits, kv, layout.arena, now.ns)
        .and_then(|world| Server::new(world, &macs, &seed, &mut nets, now))
        .unwrap_or_else(|error| give_up(&error));
    print("tandem guest: ready");
    run(server, nets, block, entropy, clock)
}

/// Ends a guest that can't do what it is asked to.
fn give_up(why: &dyn core::fmt::Display) -> ! {
    bare::end_in_panic(&alloc::format!("tandem guest: {why}"))
}

/// Reads the store from the disk before anything is served.
fn load(block: Option<&mut Block>, memory: usize) -> Kv {
    let Some(block) = block else {
        print("tandem guest: no block device; the key-value store refuses writes");
        return Kv::without_disk();
    };
    if !block.can_flush() {
        print("tandem guest: the block device can't flush; a written value may be lost with its host");
    }
    let mut kv = Kv::on_disk(block.capacity(), block.is_read_only(), memory);
    while *kv.status() == Status::Loading {
        if !serve_disk(&mut kv, block) {
            doorbell::wait(0);
        }
    }
    report(&mut kv);
    kv
}

fn run(
    mut server: Server,
    mut nets: Vec<Net>,
    mut block: Option<Block>,
    mut entropy: Option<Entropy>,
    mut clock: Clock,
) -> ! {
    let mut farewell = None;
    loop {
        let now = clock.now();
        if let Some(fresh) = clock.take_reseed() {
            server.mix(&fresh);
        }
        let mut busy = false;
        if let Some(block) = &mut block {
            busy |= serve_disk(&mut server.world_mut().kv, block);
        }
        busy |= server.round(now, &mut nets);
        if let Some(block) = &mut block {
            busy |= serve_disk(&mut server.world_mut().kv, block);
        }
        nets.iter_mut().for_each(Net::kick);
        report(&mut server.world_mut().kv);
        if server.wants_seed() {
            let seed = entropy.as_mut().map_or([0; 32], Entropy::draw);
            server.mix(&seed);
        }
        if let Some(power) = server.world().power {
            let at = *farewell.get_or_insert(now.ns + FAREWELL_NS);
            if now.ns >= at {
                end(power);
            }
        }
        if busy || (nets.iter().any(Net::has_frame) && !server.is_stalled()) {
            continue;
        }
        let deadline = if server.is_stalled() {
            Some(now.ns + STALL_NS)
        } else {
            server.deadline(now)
        };
        let deadline = deadline.into_iter().chain(farewell).min();
        // A deadline of 0 means none, so one in the past is told as 1.
        doorbell::wait(deadline.map_or(0, |at| at.max(1)));
    }
}

/// Hands a completion to the store and its next request to the disk; returns whether there was either.
fn serve_disk(kv: &mut Kv, block: &mut Block) -> bool {
    let mut moved = false;
    loop {
        match block.poll() {
            Polled::Busy => return moved,
            Polled::Idle => {}
            Polled::Done(data) => {
                kv.completed(Ok(data));
                moved = true;
            }
            Polled::Failed => {
                kv.completed(Err(DiskError));
                moved = true;
            }
        }
        let Some(request) = kv.next_request() else { return moved };
        block.start(&request);
        moved = true;
    }
}

fn report(kv: &mut Kv) {
    for line in kv.take_messages() {
        print(&line);
    }
}

fn end(power: Power) -> ! {
    let (what, code) = match power {
        Power::Off => ("power off", POWER_OFF),
        Power::Reset => ("reset", POWER_RESET),
    };
    print(&alloc::format!("tandem guest: {what}"));
    bare::console::drain();
    doorbell::power(code)
}

/// Says why on the console and tells the machine.
#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    bare::end_in_panic(&alloc::format!(
        "tandem guest: {} ({:?})",
        info.message(),
        info.location()
    ))
}
