//! What the bytes of `/file/N` are, so that a client can check every one of them.
//!
//! Byte `i` is byte `i % 8` (little endian) of `word(i / 8)`; see [`word`]. The content of a shorter file is
//! the beginning of every longer one.

/// Computes the 64-bit word at `index` of the endless content.
#[must_use]
pub const fn word(index: u64) -> u64 {
    let mixed = index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ (mixed >> 32)
}

/// Computes the content byte at `offset`.
#[must_use]
pub const fn byte(offset: u64) -> u8 {
    word(offset / 8).to_le_bytes()[(offset % 8) as usize]
}

/// Fills `buffer` with the content from `offset` on.
pub fn fill(offset: u64, buffer: &mut [u8]) {
    let mut at = offset;
    let mut rest = buffer;
    while !rest.is_empty() {
        let bytes = word(at / 8).to_le_bytes();
        let from = (at % 8) as usize;
        let count = rest.len().min(8 - from);
        let (now, later) = rest.split_at_mut(count);
        now.copy_from_slice(&bytes[from..from + count]);
        at += count as u64;
        rest = later;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filling_from_any_offset_gives_the_bytes_of_the_definition() {
        for offset in [0, 1, 7, 8, 13, u64::from(u32::MAX)] {
            let mut buffer = [0; 37];
            fill(offset, &mut buffer);
            for (index, value) in buffer.iter().enumerate() {
                assert_eq!(*value, byte(offset + index as u64));
            }
        }
    }

    #[test]
    fn the_definition_does_not_change() {
        let mut buffer = [0; 12];
        fill(0, &mut buffer);
        assert_eq!(
            buffer,
            [0xac, 0x05, 0x7d, 0xe1, 0xb9, 0x79, 0x37, 0x9e, 0x58, 0x0b, 0xfa, 0xc2]
        );
    }
}
