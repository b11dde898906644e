//! The ACPI tables, by which the guest learns what the PC has.
//!
//! They are of the hardware-reduced kind: no PM timer, no fixed events, no interrupt of ACPI's own. Everything
//! but processors and the IOAPIC is a device of the DSDT.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, Package, Path,
    ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress};

use super::power::{PANIC_PORT, RESET_PORT, RESET_VALUE, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT, SLEEP_TYPE_OFF};
use super::{
    ACPI_TABLES, CMOS_PORT, CMOS_PORTS, COM1_GSI, COM1_PORT, COM1_PORTS, EVENT_GSI, GENERATION, IOAPIC, LOCAL_APIC,
    Layout, Slot,
};
use crate::memory::GuestRam;

const MAKER: [u8; 6] = *b"TANDEM";
const MODEL: [u8; 8] = *b"TANDEMPC";
const REVISION: u32 = 1;

/// `IAPC_BOOT_ARCH`: no screen. That two more bits are clear says: no old devices that can't be found here, and no
/// keyboard controller; a third that is clear says that there is a CMOS clock.
const BOOT_ARCHITECTURE: u16 = 1 << 2;
/// Where in CMOS the century is.
pub(super) const CENTURY: u8 = 0x32;
/// The tables begin at multiples of this.
const ALIGN: usize = 16;
/// The version of ACPI from which on integers have 64 bits.
const DSDT_REVISION: u8 = 2;

/// Writes the tables for this machine, and says where the root pointer is.
pub(crate) fn write(ram: &GuestRam, layout: &Layout) -> u64 {
    ram.memory()
        .write_slice(&build(layout), GuestAddress(ACPI_TABLES.start))
        .expect("low memory is RAM");
    ACPI_TABLES.start
}

/// Makes the tables one after the other, the root pointer first.
fn build(layout: &Layout) -> Vec<u8> {
    // The root pointer's size is known and that of the others does not depend on addresses, so it goes in last.
    let mut tables = vec![0; Rsdp::len().next_multiple_of(ALIGN)];
    let dsdt = append(&mut tables, &dsdt(layout));
    let fadt = append(&mut tables, &bytes(&fadt(dsdt)));
    let madt = append(&mut tables, &bytes(&madt(layout)));
    let mut xsdt = XSDT::new(MAKER, MODEL, REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = append(&mut tables, &bytes(&xsdt));
    let root = bytes(&Rsdp::new(MAKER, xsdt));
    tables[..root.len()].copy_from_slice(&root);
    assert!(
        ACPI_TABLES.start + tables.len() as u64 <= ACPI_TABLES.end,
        "the tables of the largest machine fit"
    );
    tables
}

/// Appends a table and says at which address it is.
fn append(tables: &mut Vec<u8>, table: &[u8]) -> u64 {
    let offset = tables.len();
    tables.extend_from_slice(table);
    tables.resize(tables.len().next_multiple_of(ALIGN), 0);
    ACPI_TABLES.start + offset as u64
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt: u64) -> impl Aml {
    let port = |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into());
    let flags = [
        Flags::HwReducedAcpi,
        Flags::ResetRegSup,
        Flags::Wbinvd,
        // There are no fixed buttons, and the clock is none of the fixed events.
        Flags::PwrButton,
        Flags::SlpButton,
        Flags::FixRtc,
        Flags::Headless,
    ];
    let mut table = FADTBuilder::new(MAKER, MODEL, REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer);
    for flag in flags {
        table = table.flag(flag);
    }
    table.century = CENTURY;
    table.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    table.reset_reg = port(RESET_PORT);
    table.reset_value = RESET_VALUE;
    table.sleep_control_reg = port(SLEEP_CONTROL_PORT);
    table.sleep_status_reg = port(SLEEP_STATUS_PORT);
    table.hypervisor_vendor_identity = u64::from_le_bytes(*b"Tandem\0\0").into();
    table.finalize()
}

fn madt(layout: &Layout) -> impl Aml {
    let mut table = MADT::new(MAKER, MODEL, REVISION, LocalInterruptController::Address(LOCAL_APIC));
    for number in 0..layout.vcpus {
        table.add_structure(ProcessorLocalApic::new(number, number, EnabledStatus::Enabled));
    }
    table.add_structure(IoApic::new(0, IOAPIC, 0));
    table
}

fn dsdt(layout: &Layout) -> Vec<u8> {
    let mut devices = Vec::new();
    for (number, slot) in layout.slots.iter().enumerate() {
        virtio(number, slot, &mut devices);
    }
    serial(&mut devices);
    clock(&mut devices);
    panic_notification(&mut devices);
    generation(&mut devices);
    events(&mut devices);
    let mut content = Scope::raw(Path::new("\\_SB_"), devices);
    let sleep = Package::new(vec![&SLEEP_TYPE_OFF, &SLEEP_TYPE_OFF]);
    Name::new(Path::new("_S5_"), &sleep).to_aml_bytes(&mut content);
    let mut table = Sdt::new(*b"DSDT", 36, DSDT_REVISION, MAKER, MODEL, REVISION);
    table.append_slice(&content);
    table.as_slice().to_vec()
}

/// Edge-triggered, active-high, of this device alone.
fn interrupt(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

fn ports(first: u16, count: u16) -> IO {
    IO::new(first, first, 1, u8::try_from(count).expect("a device has few ports"))
}

fn virtio(number: usize, slot: &Slot, to: &mut Vec<u8>) {
    let low = |value: u64| u32::try_from(value).expect("the device window lies below 4 GiB");
    let registers = Memory32Fixed::new(true, low(slot.base), low(slot.bytes));
    Device::new(
        Path::new(&format!("VI{number:02}")),
        vec![
            &Name::new(Path::new("_HID"), &"LNRO0005"),
            &Name::new(Path::new("_UID"), &number),
            // The devices read and write memory coherently; Linux asks on some architectures.
            &Name::new(Path::new("_CCA"), &1_u8),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![&registers, &interrupt(slot.gsi)]),
            ),
        ],
    )
    .to_aml_bytes(to);
}

fn serial(to: &mut Vec<u8>) {
    let resources = (ports(COM1_PORT, COM1_PORTS), interrupt(COM1_GSI));
    Device::new(
        Path::new("COM1"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
            &Name::new(Path::new("_UID"), &1_u8),
            &Name::new(Path::new("_DDN"), &"COM1"),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![&resources.0, &resources.1]),
            ),
        ],
    )
    .to_aml_bytes(to);
}

fn clock(to: &mut Vec<u8>) {
    Device::new(
        Path::new("RTC_"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0B00")),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![&ports(CMOS_PORT, CMOS_PORTS)]),
            ),
        ],
    )
    .to_aml_bytes(to);
}

fn panic_notification(to: &mut Vec<u8>) {
    Device::new(
        Path::new("PEVT"),
        vec![
            &Name::new(Path::new("_HID"), &"QEMU0001"),
            &Name::new(Path::new("_STA"), &0xf_u8),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&ports(PANIC_PORT, 1)])),
        ],
    )
    .to_aml_bytes(to);
}

/// The generation's address is a package of its low and its high half.
fn generation(to: &mut Vec<u8>) {
    let [low, high] = [GENERATION & 0xffff_ffff, GENERATION >> 32];
    Device::new(
        Path::new("VGEN"),
        vec![
            &Name::new(Path::new("_HID"), &"TNDM0001"),
            // The first is the one of the specification, the second the one of eight characters, as ACPI wants it.
            &Name::new(Path::new("_CID"), &Package::new(vec![&"VM_Gen_Counter", &"VMGENCTR"])),
            &Name::new(Path::new("_DDN"), &"VM_Gen_Counter"),
            &Name::new(Path::new("ADDR"), &Package::new(vec![&low, &high])),
        ],
    )
    .to_aml_bytes(to);
}

/// The device whose interrupt makes ACPI look at the generation.
fn events(to: &mut Vec<u8>) {
    let (target, changed) = (Path::new("\\_SB_.VGEN"), 0x80_u8);
    let notify = Notify::new(&target, &changed);
    let (number, this) = (Arg(0), EVENT_GSI);
    let is_this = Equal::new(&number, &this);
    Device::new(
        Path::new("GED_"),
        vec![
            &Name::new(Path::new("_HID"), &"ACPI0013"),
            &Name::new(Path::new("_UID"), &0_u8),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&interrupt(EVENT_GSI)])),
            &Method::new(Path::new("_EVT"), 1, true, vec![&If::new(&is_this, vec![&notify])]),
        ],
    )
    .to_aml_bytes(to);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pc::{SLOTS_MAX, VCPUS_MAX};

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn number<const N: usize>(tables: &[u8], address: u64) -> u64 {
        let offset = crate::index(address - ACPI_TABLES.start);
        let mut bytes = [0; 8];
        bytes[..N].copy_from_slice(&tables[offset..offset + N]);
        u64::from_le_bytes(bytes)
    }

    /// The table at `address`, whose checksum is right.
    fn table<'a>(tables: &'a [u8], address: u64, signature: &[u8; 4]) -> &'a [u8] {
        assert!(address.is_multiple_of(ALIGN as u64));
        let length = crate::index(number::<4>(tables, address + 4));
        let table = &tables[crate::index(address - ACPI_TABLES.start)..][..length];
        assert_eq!(&table[..4], signature);
        assert_eq!(sum(table), 0);
        table
    }

    fn holds(table: &[u8], bytes: &[u8]) -> bool {
        table.windows(bytes.len()).any(|window| window == bytes)
    }

    #[test]
    fn the_root_leads_to_every_table() {
        for (vcpus, devices) in [(1, 0), (2, 4), (VCPUS_MAX, SLOTS_MAX)] {
            let tables = build(&Layout::new(vcpus, devices));
            assert_eq!(&tables[..8], b"RSD PTR ");
            assert_eq!(sum(&tables[..20]), 0);
            assert_eq!(sum(&tables[..Rsdp::len()]), 0);
            let root = number::<8>(&tables, ACPI_TABLES.start + 24);
            assert_eq!(table(&tables, root, b"XSDT").len(), 36 + 2 * 8);
            let (fadt, madt) = (number::<8>(&tables, root + 36), number::<8>(&tables, root + 44));
            table(&tables, fadt, b"FACP");
            table(&tables, number::<8>(&tables, fadt + 140), b"DSDT");
            let madt = table(&tables, madt, b"APIC");
            assert_eq!(madt.len(), 44 + usize::from(vcpus) * 8 + 12);
            // Processor, length, number, APIC, enabled.
            for number in 0..vcpus {
                assert!(holds(madt, &[0, 8, number, number, 1, 0, 0, 0]));
            }
            assert!(holds(madt, &[1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]));
        }
    }

    #[test]
    fn the_fixed_table_has_the_ports_of_sleep_and_reset() {
        let fadt = bytes(&fadt(0xe_0030));
        let port = |low| [1, 8, 0, 1, low, 6, 0, 0, 0, 0, 0, 0];
        assert_eq!(fadt[116..128], port(2), "reset register");
        assert_eq!(fadt[128], 1, "reset value");
        assert_eq!(fadt[244..256], port(0), "sleep control");
        assert_eq!(fadt[256..268], port(1), "sleep status");
        assert_eq!(fadt[112..116], [0x71, 0x14, 0x10, 0], "flags");
        assert_eq!(
            fadt[109..111],
            [4, 0],
            "neither old devices nor a keyboard controller, but a clock"
        );
        assert_eq!(fadt[108], 0x32, "century");
    }

    #[test]
    fn devices_have_their_registers_and_interrupts() {
        let layout = Layout::new(1, SLOTS_MAX);
        let dsdt = dsdt(&layout);
        assert_eq!(
            dsdt.windows(8).filter(|window| window == b"LNRO0005").count(),
            SLOTS_MAX
        );
        for slot in &layout.slots {
            let base = u32::try_from(slot.base).unwrap().to_le_bytes();
            let gsi = u8::try_from(slot.gsi).unwrap();
            // Memory32Fixed: read-write, base, length. Interrupt: consumer, edge, active high, exclusive.
            let mut resources = vec![0x86, 9, 0, 1];
            resources.extend(base);
            resources.extend([0, 0x10, 0, 0, 0x89, 6, 0, 3, 1, gsi, 0, 0, 0, 0x79, 0]);
            assert!(holds(&dsdt, &resources), "{slot:?}");
        }
        let serial = [0x47, 1, 0xf8, 3, 0xf8, 3, 1, 8, 0x89, 6, 0, 3, 1, 4, 0, 0, 0];
        assert!(holds(&dsdt, &serial));
        assert!(holds(&dsdt, b"_S5_\x12\x06\x02\x0a\x05\x0a\x05"));
        assert!(holds(&dsdt, b"ADDR\x12\x08\x02\x0c\x00\xf0\x0d\x00\x00"));
        assert!(holds(&dsdt, b"_EVT"));
    }
}
