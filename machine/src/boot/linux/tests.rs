//! What of a kernel file is taken, what is refused, and what the guest finds.

use linux_loader::bootparam::{boot_params, setup_header};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use proptest::prelude::*;
use vm_memory::ByteValued;

use super::*;
use crate::memory::{MEMORY_MIN, Mapping};
use crate::pc::{ACPI_TABLES, START_INFO, ZERO_PAGE};

const LOADED_AT: u64 = 16 * MIB;
const ENTRY_32: u64 = 0x40;
/// Where the code of [`elf`] lies.
pub(crate) const CODE: u64 = LOADED_AT + ENTRY_32;

fn ram(bytes: u64) -> GuestRam {
    GuestRam::new(bytes, Mapping::Shared).unwrap()
}

fn layout() -> Layout {
    Layout::new(2, 4)
}

fn read<T: ByteValued>(ram: &GuestRam, address: u64) -> T {
    ram.memory().read_obj(GuestAddress(address)).unwrap()
}

fn bytes(ram: &GuestRam, address: u64, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    ram.memory().read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

fn header() -> setup_header {
    setup_header {
        setup_sects: 1,
        boot_flag: 0xaa55,
        jump: 0x6aeb,
        header: u32::from_le_bytes(*b"HdrS"),
        version: 0x20f,
        loadflags: 1,
        initrd_addr_max: 0x7fff_ffff,
        kernel_alignment: 0x20_0000,
        relocatable_kernel: 1,
        xloadflags: 1,
        cmdline_size: 2047,
        pref_address: LOADED_AT,
        init_size: 0x20_0000,
        ..Default::default()
    }
}

/// A bzImage with this header, and a payload of 5000 bytes.
fn image(header: setup_header) -> Vec<u8> {
    let mut file = vec![0; 1024];
    file[bzimage::HEADER..][..size_of::<setup_header>()].copy_from_slice(header.as_slice());
    file.extend((0..5000_u32).map(|at| at.to_le_bytes()[0]));
    file
}

/// An ELF file with a PVH note, which is loaded at [`LOADED_AT`] and has this 32-bit code at its entry.
pub(crate) fn elf(code: &[u8]) -> Vec<u8> {
    let mut payload = [0xf4; 600];
    payload[crate::index(ENTRY_32)..][..code.len()].copy_from_slice(code);
    let note = [
        &4_u32.to_le_bytes()[..],
        &8_u32.to_le_bytes(),
        &18_u32.to_le_bytes(),
        b"Xen\0",
    ]
    .concat();
    let note = [&note[..], &CODE.to_le_bytes()].concat();
    let (payload_at, note_at) = (64 + 2 * 56, 64 + 2 * 56 + payload.len() as u64);
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    for field in [LOADED_AT, 64, 0] {
        file.extend(field.to_le_bytes());
    }
    for field in [0_u16, 0, 64, 56, 2, 0, 0, 0] {
        file.extend(field.to_le_bytes());
    }
    for (kind, at, size, memory) in [
        (1_u32, payload_at, payload.len() as u64, 0x10_0000),
        (4, note_at, note.len() as u64, note.len() as u64),
    ] {
        file.extend(kind.to_le_bytes());
        file.extend(7_u32.to_le_bytes());
        for field in [at, LOADED_AT, LOADED_AT, size, memory, 4096] {
            file.extend(field.to_le_bytes());
        }
    }
    file.extend(payload);
    file.extend(note);
    file
}

#[test]
fn refuses_what_is_no_kernel() {
    let ram = ram(MEMORY_MIN);
    for file in [&b""[..], b"#!/bin/sh", &[0; 4096], &[0xff; 0x300]] {
        assert!(matches!(
            load(&ram, file, None, "", &layout()),
            Err(LinuxError::Unknown)
        ));
    }
}

#[test]
fn loads_a_bzimage_and_tells_it_where_things_are() {
    let ram = ram(64 * MIB);
    let initrd = [7; 5000];
    let entry = load(&ram, &image(header()), Some(&initrd), "console=ttyS0", &layout()).unwrap();
    assert_eq!(entry, Entry::Long(LOADED_AT + 0x200));
    assert_eq!(bytes(&ram, LOADED_AT, 5000), image(header())[1024..]);
    let page: boot_params = read(&ram, ZERO_PAGE);
    let told = page.hdr;
    assert_eq!({ told.type_of_loader }, 0xff);
    assert_eq!({ told.init_size }, 0x20_0000, "what the kernel says of itself is kept");
    assert_eq!({ page.acpi_rsdp_addr }, ACPI_TABLES.start);
    assert_eq!(bytes(&ram, ACPI_TABLES.start, 8), b"RSD PTR ");
    assert_eq!(u64::from(told.ramdisk_image), 64 * MIB - 8192, "as high as it may lie");
    assert_eq!(bytes(&ram, told.ramdisk_image.into(), 5000), initrd);
    assert_eq!({ told.ramdisk_size }, 5000);
    assert_eq!(bytes(&ram, told.cmd_line_ptr.into(), 14), b"console=ttyS0\0");
}

#[test]
fn tells_a_bzimage_what_is_memory() {
    let ram = ram(4096 * MIB);
    load(&ram, &image(header()), None, "", &layout()).unwrap();
    let page: boot_params = read(&ram, ZERO_PAGE);
    let table = page.e820_table;
    let told = table[..usize::from(page.e820_entries)]
        .iter()
        .map(|entry| (entry.addr, entry.addr + entry.size, entry.r#type));
    assert_eq!(
        told.collect::<Vec<_>>(),
        [
            (0, 0x9_fc00, 1),
            (0x9_fc00, 0x10_0000, 2),
            (0x10_0000, 0xc000_0000, 1),
            (0x1_0000_0000, 0x1_4000_0000, 1),
        ]
    );
}

#[test]
fn a_header_ends_where_it_says() {
    let mut file = image(header());
    // Up to `xloadflags`; what follows is code in older kernels.
    file[0x201] = 0x38 - 2;
    let ram = ram(64 * MIB);
    assert!(matches!(
        load(&ram, &file, None, "", &layout()),
        Err(LinuxError::TooLarge { start: 0, .. })
    ));
}

#[test]
fn refuses_kernels_that_are_too_old_or_cut_off() {
    let ram = ram(64 * MIB);
    let load = |file: &[u8]| load(&ram, file, None, "", &layout());
    for header in [
        setup_header {
            version: 0x20b,
            ..header()
        },
        setup_header {
            xloadflags: 0,
            ..header()
        },
        setup_header {
            loadflags: 0,
            ..header()
        },
    ] {
        assert!(matches!(
            load(&image(header)),
            Err(LinuxError::Protocol { major: 2, .. })
        ));
    }
    let whole = image(header());
    for length in [0x206, 0x220, 1024, 1024 + 0x200] {
        assert!(
            matches!(load(&whole[..length]), Err(LinuxError::Damaged { .. })),
            "{length}"
        );
    }
}

#[test]
fn refuses_kernels_that_do_not_fit() {
    for (memory, pref_address, init_size) in [
        (MEMORY_MIN, LOADED_AT, 0),
        (MEMORY_MIN, 6 * MIB, 3 << 20),
        (MEMORY_MIN, 0x8_0000, 0),
        (MEMORY_MIN, u64::MAX - 100, 0),
        (4096 * MIB, 0x1_0000_0000, 0),
    ] {
        let file = image(setup_header {
            pref_address,
            init_size,
            ..header()
        });
        assert!(
            matches!(
                load(&ram(memory), &file, None, "", &layout()),
                Err(LinuxError::TooLarge { .. })
            ),
            "{pref_address:#x}"
        );
    }
}

#[test]
fn an_initrd_goes_where_the_kernel_can_reach_it() {
    let low = image(setup_header {
        initrd_addr_max: 0x1fff_ffff,
        ..header()
    });
    let ram = ram(1024 * MIB);
    load(&ram, &low, Some(&[1; 4096]), "", &layout()).unwrap();
    let page: boot_params = read(&ram, ZERO_PAGE);
    assert_eq!({ page.hdr.ramdisk_image }, 0x1fff_f000);
    let none = image(setup_header {
        initrd_addr_max: 0x100_0000,
        ..header()
    });
    assert!(matches!(
        load(&ram, &none, Some(&[1; 4096]), "", &layout()),
        Err(LinuxError::InitrdTooLarge { room: 0, .. })
    ));
    assert!(matches!(
        load(&ram, &none, Some(&[]), "", &layout()),
        Err(LinuxError::InitrdEmpty)
    ));
}

#[test]
fn refuses_an_initrd_that_does_not_fit() {
    let ram = ram(20 * MIB);
    let room = 20 * MIB - LOADED_AT - 2 * MIB;
    let initrd = vec![1; crate::index(room) + 1];
    assert!(load(&ram, &image(header()), Some(&initrd[1..]), "", &layout()).is_ok());
    let Err(error) = load(&ram, &image(header()), Some(&initrd), "", &layout()) else {
        panic!("there is a byte too much");
    };
    assert!(matches!(error, LinuxError::InitrdTooLarge { bytes, room: r } if bytes == room + 1 && r == room));
}

#[test]
fn the_kernel_says_how_long_its_command_line_is() {
    let ram = ram(64 * MIB);
    let line = "x".repeat(0x1_0000);
    let load = |max: u32, length: usize| {
        let header = setup_header {
            cmdline_size: max,
            ..header()
        };
        load(&ram, &image(header), None, &line[..length], &layout())
    };
    assert!(load(2047, 2047).is_ok());
    assert!(matches!(
        load(2047, 2048),
        Err(LinuxError::CommandLine { bytes: 2048, max: 2047 })
    ));
    assert!(matches!(
        load(u32::MAX, 0x1_0000),
        Err(LinuxError::CommandLine { max: 0xffff, .. })
    ));
    assert!(load(u32::MAX, 0xffff).is_ok());
}

#[test]
fn loads_a_pvh_kernel_and_tells_it_where_things_are() {
    let ram = ram(4096 * MIB);
    let entry = load(&ram, &elf(&[]), Some(&[7; 5000]), "quiet", &layout()).unwrap();
    assert_eq!(entry, Entry::Pvh(CODE));
    assert_eq!(bytes(&ram, LOADED_AT, 600), [0xf4; 600]);
    let info: hvm_start_info = read(&ram, START_INFO);
    assert_eq!((info.magic, info.version, info.nr_modules), (0x336e_c578, 1, 1));
    assert_eq!(info.rsdp_paddr, ACPI_TABLES.start);
    assert_eq!(bytes(&ram, info.cmdline_paddr, 6), b"quiet\0");
    let module: hvm_modlist_entry = read(&ram, info.modlist_paddr);
    assert_eq!((module.paddr, module.size), (0xc000_0000 - 8192, 5000));
    assert_eq!(bytes(&ram, module.paddr, 5000), [7; 5000]);
    let map = (0..info.memmap_entries).map(|number| {
        let entry: hvm_memmap_table_entry = read(&ram, info.memmap_paddr + u64::from(number) * 24);
        (entry.addr, entry.size, entry.type_)
    });
    let told: Vec<_> = memory_map(&ram)
        .iter()
        .map(|part| (part.start, part.end - part.start, part.kind))
        .collect();
    assert_eq!(map.collect::<Vec<_>>(), told);
}

#[test]
fn refuses_elf_files_without_an_entry_or_room() {
    let load = |memory, file: &[u8], line: &str| load(&ram(memory), file, None, line, &layout());
    let mut other = elf(&[]);
    let note = other.len() - 12;
    other[note..note + 4].copy_from_slice(b"GNU\0");
    assert!(matches!(load(64 * MIB, &other, ""), Err(LinuxError::NoPvhEntry)));
    assert!(matches!(load(MEMORY_MIN, &elf(&[]), ""), Err(LinuxError::Elf(_))));
    // The file's part fits, the memory that it asks for does not.
    let mut large = elf(&[]);
    large[64 + 40..64 + 48].copy_from_slice(&(64 * MIB).to_le_bytes());
    assert!(matches!(load(64 * MIB, &large, ""), Err(LinuxError::TooLarge { .. })));
    assert!(matches!(
        load(64 * MIB, &elf(&[]), &"x".repeat(2048)),
        Err(LinuxError::CommandLine { max: 2047, .. })
    ));
    for length in 4..elf(&[]).len() - 4 {
        assert!(load(64 * MIB, &elf(&[])[..length], "").is_err(), "{length}");
    }
}

proptest! {
    #[test]
    fn never_panics_on_a_damaged_bzimage(changes in proptest::collection::vec((0x1f1..0x280_usize, any::<u8>()), 1..8)) {
        let mut file = image(header());
        for (at, value) in changes {
            file[at] = value;
        }
        let _ = load(&ram(20 * MIB), &file, Some(&[1; 100]), "quiet", &layout());
    }

    #[test]
    fn never_panics_on_a_damaged_elf_file(changes in proptest::collection::vec((4..176_usize, any::<u8>()), 1..8)) {
        let mut file = elf(&[]);
        for (at, value) in changes {
            file[at] = value;
        }
        let _ = load(&ram(20 * MIB), &file, Some(&[1; 100]), "quiet", &layout());
    }
}
