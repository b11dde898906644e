//! The bundled guest, built with this program and part of it.

/// The guest's ELF file, as the machine boots it.
pub static GUEST_IMAGE: &[u8] = include_bytes!(env!("TANDEM_GUEST_IMAGE"));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_is_an_elf_program_for_this_machine() {
        assert_eq!(&GUEST_IMAGE[..5], b"\x7fELF\x02");
        let machine = u16::from_le_bytes([GUEST_IMAGE[18], GUEST_IMAGE[19]]);
        assert_eq!(machine, 62, "x86-64");
    }
}
