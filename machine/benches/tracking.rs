//! What it costs to know which pages a guest wrote: KVM's dirty log, its dirty ring, and userfaultfd, side by side.
//!
//! A bare VM whose guest writes a given number of pages, in ring 3, and says that it has. For each way: the time to
//! harvest (the pages are known, and are watched again), and what the guest's next write to each of them costs.
//! `cargo bench -p machine --bench tracking`; it says so where this host lacks a way.

#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

use std::arch::global_asm;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_MEM_LOG_DIRTY_PAGES, kvm_clear_dirty_log,
    kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_gfn, kvm_dirty_log, kvm_dirty_log__bindgen_ty_1, kvm_dtable,
    kvm_enable_cap, kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

const PAGE: usize = 4096;
const MIB: usize = 1 << 20;
const ROUNDS: usize = 30;
/// Where the guest's pages to write begin.
const DATA: usize = 16 * MIB;
const CODE: usize = 0x4000;
const ORDERS: usize = 0x5000;
const RING_BYTES: usize = 1 << 20;
const KVMIO: u64 = 0xae;

global_asm!(
    ".pushsection .rodata.writer, \"a\"",
    ".globl writer, writer_end",
    // Writes a word every `step` bytes, `count` times, and says so; again and again.
    "writer:",
    "mov ebx, 0x5000",
    "mov rdi, [rbx]",
    "mov rcx, [rbx + 8]",
    "mov rsi, [rbx + 16]",
    "test rcx, rcx",
    "jz 3f",
    "2: mov [rdi], rcx",
    "add rdi, rsi",
    "dec rcx",
    "jnz 2b",
    "3: mov eax, 0xd0000000",
    "mov [rax], eax",
    "jmp writer",
    "writer_end:",
    ".popsection",
);

unsafe extern "C" {
    static writer: u8;
    static writer_end: u8;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Log,
    Ring,
}

/// Shared memory of the guest, or a private buffer.
struct Memory {
    at: *mut u8,
    bytes: usize,
}

impl Memory {
    fn new(bytes: usize, fd: i32, flags: i32) -> Self {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping where the kernel finds room for it.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, flags, fd, 0) };
        assert_ne!(at, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        Self { at: at.cast(), bytes }
    }

    fn write(&self, offset: usize, data: &[u8]) {
        assert!(offset + data.len() <= self.bytes);
        // SAFETY: within the mapping (checked), which overlaps no Rust value.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), self.at.wrapping_add(offset), data.len()) };
    }

    fn word(&self, offset: usize, word: u64) {
        self.write(offset, &word.to_le_bytes());
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `new`, and nothing uses it any more.
        unsafe { libc::munmap(self.at.cast(), self.bytes) };
    }
}

struct Bench {
    way: Way,
    vcpu: VcpuFd,
    vm: VmFd,
    ring: Option<Memory>,
    /// The next entry of the ring.
    next: usize,
    words: Vec<u64>,
    ram: Memory,
}

fn memory_file(bytes: usize) -> i32 {
    // SAFETY: the name is a constant C string.
    let fd = unsafe { libc::memfd_create(c"bench".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: the descriptor was just made.
    assert_eq!(unsafe { libc::ftruncate(fd, i64::try_from(bytes).unwrap()) }, 0);
    fd
}

fn ioctl<T>(fd: &impl AsRawFd, request: u64, argument: *mut T) -> i32 {
    // SAFETY: each request below is given the structure that it is made for, or null where it has none.
    unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) }
}

impl Bench {
    /// Makes the VM; none if this host lacks the way.
    fn new(way: Way, bytes: usize) -> Option<Self> {
        let kvm = Kvm::new().unwrap();
        let vm = kvm.create_vm().unwrap();
        let (cap, argument) = match way {
            Way::Ring => (KVM_CAP_DIRTY_LOG_RING, RING_BYTES as u64),
            Way::Log => (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 1),
        };
        if kvm.check_extension_raw(cap.into()) <= 0 {
            return None;
        }
        let args = [argument, 0, 0, 0];
        vm.enable_cap(&kvm_enable_cap {
            cap,
            args,
            ..Default::default()
        })
        .ok()?;
        let ram = Memory::new(bytes, memory_file(bytes), libc::MAP_SHARED | libc::MAP_NORESERVE);
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: KVM_MEM_LOG_DIRTY_PAGES,
            guest_phys_addr: 0,
            memory_size: bytes as u64,
            userspace_addr: ram.at as u64,
        };
        // SAFETY: the mapping is dropped after the VM.
        unsafe { vm.set_user_memory_region(region) }.unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        vcpu.set_cpuid2(&kvm.get_supported_cpuid(256).unwrap()).unwrap();
        let ring = (way == Way::Ring).then(|| {
            let access = libc::PROT_READ | libc::PROT_WRITE;
            let (none, fd) = (std::ptr::null_mut(), vcpu.as_raw_fd());
            // SAFETY: a new mapping where the kernel finds room for it.
            let at = unsafe { libc::mmap(none, RING_BYTES, access, libc::MAP_SHARED, fd, 64 * PAGE as i64) };
            assert_ne!(at, libc::MAP_FAILED, "{}", io::Error::last_os_error());
            Memory {
                at: at.cast(),
                bytes: RING_BYTES,
            }
        });
        let words = vec![0; bytes / PAGE / 64];
        let bench = Self {
            way,
            vcpu,
            vm,
            ring,
            next: 0,
            words,
            ram,
        };
        bench.boot();
        Some(bench)
    }

    /// Puts the code in place, and a vCPU in ring 3 of 64-bit mode before it.
    fn boot(&self) {
        let (start, end) = (&raw const writer, &raw const writer_end);
        // SAFETY: the two labels bound one stretch of read-only data.
        let code = unsafe { std::slice::from_raw_parts(start, end as usize - start as usize) };
        self.ram.write(CODE, code);
        // Of the first and the fourth GiB, in pieces of 2 MiB.
        self.ram.word(0x1000, 0x2007);
        for (entry, table) in [(0, 0x3000), (3, 0x6000)] {
            self.ram.word(0x2000 + entry * 8, table as u64 | 7);
            for piece in 0..512 {
                self.ram
                    .word(table + piece * 8, ((entry << 30) + piece * 2 * MIB) as u64 | 0x87);
            }
        }
        let mut sregs = self.vcpu.get_sregs().unwrap();
        (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8001_0033, 0x1000, 0x620, 0x500);
        let data = kvm_segment {
            limit: u32::MAX,
            selector: 0x2b,
            type_: 3,
            present: 1,
            dpl: 3,
            s: 1,
            g: 1,
            db: 1,
            ..Default::default()
        };
        sregs.cs = kvm_segment {
            selector: 0x33,
            type_: 0xb,
            l: 1,
            db: 0,
            ..data
        };
        (sregs.ss, sregs.ds, sregs.es, sregs.fs, sregs.gs) = (data, data, data, data, data);
        (sregs.gdt, sregs.idt) = (kvm_dtable::default(), kvm_dtable::default());
        self.vcpu.set_sregs(&sregs).unwrap();
        let mut regs = self.vcpu.get_regs().unwrap();
        (regs.rip, regs.rflags) = (CODE as u64, 2);
        self.vcpu.set_regs(&regs).unwrap();
    }

    /// Has the guest write `count` pages `step` bytes apart, and says how long it took.
    fn write(&mut self, count: usize, step: usize) -> Duration {
        for (place, order) in [DATA, count, step].into_iter().enumerate() {
            self.ram.word(ORDERS + place * 8, order as u64);
        }
        let start = Instant::now();
        match self.vcpu.run().unwrap() {
            VcpuExit::MmioWrite(0xd000_0000, _) => start.elapsed(),
            other => panic!("{other:?}"),
        }
    }

    /// Copies the pages that [`Self::write`] had written, and says how long it took.
    fn copy(&self, count: usize, step: usize, to: &Memory) -> Duration {
        assert!(count * PAGE <= to.bytes && DATA + count.saturating_sub(1) * step + PAGE <= self.ram.bytes);
        let start = Instant::now();
        for number in 0..count {
            let from = self.ram.at.wrapping_add(DATA + number * step);
            // SAFETY: a page within each mapping (checked); the guest is not running.
            unsafe { std::ptr::copy_nonoverlapping(from, to.at.wrapping_add(number * PAGE), PAGE) };
        }
        start.elapsed()
    }

    /// Finds the written pages and watches them again: (their number, the time to find, to watch).
    fn harvest(&mut self) -> (usize, Duration, Duration) {
        let start = Instant::now();
        let count = if self.way == Way::Ring {
            self.collect()
        } else {
            self.read_log()
        };
        let found = start.elapsed();
        match self.way {
            Way::Ring => assert!(ioctl::<u8>(&self.vm, KVMIO << 8 | 0xc7, std::ptr::null_mut()) >= 0),
            Way::Log => self.clear(),
        }
        (count, found, start.elapsed() - found)
    }

    fn read_log(&mut self) -> usize {
        let mut request = kvm_dirty_log {
            slot: 0,
            padding1: 0,
            __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 {
                dirty_bitmap: self.words.as_mut_ptr().cast(),
            },
        };
        assert_eq!(ioctl(&self.vm, 0x4010_ae42, &raw mut request), 0);
        self.words.iter().map(|word| word.count_ones() as usize).sum()
    }

    fn clear(&self) {
        let mut request = kvm_clear_dirty_log {
            slot: 0,
            num_pages: u32::try_from(self.words.len() * 64).unwrap(),
            first_page: 0,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                dirty_bitmap: self.words.as_ptr().cast_mut().cast(),
            },
        };
        assert_eq!(ioctl(&self.vm, 0xc018_aec0, &raw mut request), 0);
    }

    /// Takes what is in the ring.
    fn collect(&mut self) -> usize {
        let entries = self.ring.as_ref().unwrap().at.cast::<kvm_dirty_gfn>();
        let mut count = 0;
        loop {
            let entry = entries.wrapping_add(self.next % (RING_BYTES / size_of::<kvm_dirty_gfn>()));
            // SAFETY: an entry of the ring, whose flags this process and KVM hand to and fro atomically.
            let flags = unsafe { AtomicU32::from_ptr(entry.cast()) };
            if flags.load(Ordering::Acquire) & 1 == 0 {
                return count;
            }
            // SAFETY: KVM does not write the entry until it is given back.
            let page = crate::index(unsafe { (*entry).offset });
            self.words[page / 64] |= 1 << (page % 64);
            flags.store(2, Ordering::Release);
            self.next += 1;
            count += 1;
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "a page number of a small VM")]
fn index(page: u64) -> usize {
    page as usize
}

fn percentile(times: &mut [Duration], percent: usize) -> f64 {
    times.sort_unstable();
    times[(times.len() - 1) * percent / 100].as_secs_f64() * 1e6
}

/// Makes room for copies, all of it in memory.
fn room(pages: usize) -> Memory {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
    Memory::new(pages.max(1) * PAGE, -1, flags)
}

/// Returns how many GB of pages a second that is.
fn speed(pages: usize, micros: f64) -> f64 {
    (pages * PAGE) as f64 / micros / 1e3
}

fn track(way: Way, mib: usize, count: usize, spread: bool) {
    let Some(mut bench) = Bench::new(way, mib * MIB) else {
        println!("{way:?}: not on this host");
        return;
    };
    let step = if spread && count > 0 {
        (mib * MIB - DATA) / count / PAGE * PAGE
    } else {
        PAGE
    };
    // Once to have memory, once to have no page that only the machine wrote.
    for _ in 0..2 {
        bench.write(count, step);
        bench.harvest();
    }
    let (mut find, mut watch, mut both) = (Vec::new(), Vec::new(), Vec::new());
    let (mut watched, mut unwatched, mut copies) = (Vec::new(), Vec::new(), Vec::new());
    let buffer = room(count);
    for _ in 0..ROUNDS {
        watched.push(bench.write(count, step));
        unwatched.push(bench.write(count, step));
        let (found, finding, watching) = bench.harvest();
        assert!((count..count + 4).contains(&found), "{found} of {count}");
        find.push(finding);
        watch.push(watching);
        both.push(finding + watching);
        copies.push(bench.copy(count, step, &buffer));
    }
    let fault = (percentile(&mut watched, 50) - percentile(&mut unwatched, 50)) / count.max(1) as f64;
    println!(
        "{way:11?} {mib:5} MiB {count:6} pages {:7}  find {:8.1}  watch {:8.1}  both p50 {:8.1} p99 {:8.1} µs  {:6.1} GB/s, memcpy {:5.1}   first write {fault:5.2} µs",
        if spread { "spread" } else { "run" },
        percentile(&mut find, 50),
        percentile(&mut watch, 50),
        percentile(&mut both, 50),
        percentile(&mut both, 99),
        speed(count, percentile(&mut both, 50)),
        speed(count, percentile(&mut copies, 50)),
    );
}

#[repr(C)]
struct WriteProtect {
    start: u64,
    len: u64,
    mode: u64,
}

/// Takes the write access of pages away with userfaultfd, beside a copy of the same pages.
fn protect_or_copy(mib: usize, count: usize, spread: bool) {
    let Some(mut bench) = Bench::new(Way::Log, mib * MIB) else {
        return;
    };
    // SAFETY: a system call without memory arguments.
    let raw = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | 1) };
    let Ok(fd @ 0..) = i32::try_from(raw) else {
        println!("userfaultfd: {}", io::Error::last_os_error());
        return;
    };
    let mut api = [0xaa_u64, 1, 0];
    let mut register = [bench.ram.at as u64, bench.ram.bytes as u64, 2, 0];
    if ioctl(&fd, 0xc018_aa3f, api.as_mut_ptr()) < 0 || ioctl(&fd, 0xc020_aa00, register.as_mut_ptr()) < 0 {
        println!("userfaultfd write protection: {}", io::Error::last_os_error());
        return;
    }
    let step = if spread {
        (mib * MIB - DATA) / count / PAGE * PAGE
    } else {
        PAGE
    };
    let buffer = room(count);
    let (mut protects, mut copies) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        bench.write(count, step);
        copies.push(bench.copy(count, step, &buffer));
        let ranges = if spread { count } else { 1 };
        let protect = |mode: u64| {
            for number in 0..ranges {
                let start = bench.ram.at as u64 + (DATA + number * step) as u64;
                let mut range = WriteProtect {
                    start,
                    len: (count / ranges * PAGE) as u64,
                    mode,
                };
                assert_eq!(
                    ioctl(&fd, 0xc018_aa06, &raw mut range),
                    0,
                    "{}",
                    io::Error::last_os_error()
                );
            }
        };
        let start = Instant::now();
        protect(1);
        protects.push(start.elapsed());
        protect(2);
    }
    println!(
        "userfaultfd {mib:5} MiB {count:6} pages {:7}  protect p50 {:8.1} µs   memcpy p50 {:8.1} µs",
        if spread { "spread" } else { "run" },
        percentile(&mut protects, 50),
        percentile(&mut copies, 50),
    );
}

fn main() {
    if Kvm::new().is_err() {
        println!("SKIPPED, needs KVM");
        return;
    }
    for mib in [256, 1024] {
        for count in [0, 100, 1_000, 10_000, 50_000] {
            for spread in [false, true] {
                for way in [Way::Log, Way::Ring] {
                    track(way, mib, count, spread);
                }
            }
        }
    }
    for spread in [false, true] {
        for count in [1_000, 10_000] {
            protect_or_copy(1024, count, spread);
        }
    }
}
