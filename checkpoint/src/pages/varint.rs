//! Numbers in as few bytes as they need: seven bits in each, the low ones first.
//!
//! Each number has one encoding only. Used by the encoders and decoders of pages.

use bytes::{BufMut, BytesMut};

/// The longest encoding.
pub(crate) const BYTES_MAX: usize = 10;

/// Why bytes are not a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Malformed {
    /// The bytes end in the middle of it.
    Truncated,
    /// It has more than 64 bits, or more bytes than it needs.
    Overlong,
}

/// Appends a number.
pub(crate) fn put(out: &mut BytesMut, mut number: u64) {
    while number >= 0x80 {
        out.put_u8(number.to_le_bytes()[0] | 0x80);
        number >>= 7;
    }
    out.put_u8(number.to_le_bytes()[0]);
}

/// Takes a number off the front of `rest`.
pub(crate) fn take(rest: &mut &[u8]) -> Result<u64, Malformed> {
    let mut number = 0_u64;
    for place in 0..BYTES_MAX {
        let (byte, later) = rest.split_first().ok_or(Malformed::Truncated)?;
        *rest = later;
        let bits = u64::from(byte & 0x7f);
        let shift = 7 * place;
        if bits << shift >> shift != bits {
            return Err(Malformed::Overlong);
        }
        number |= bits << shift;
        if byte & 0x80 == 0 {
            // A last byte of zero adds nothing: the same number would have two encodings.
            return if *byte == 0 && place > 0 {
                Err(Malformed::Overlong)
            } else {
                Ok(number)
            };
        }
    }
    Err(Malformed::Overlong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_back_in_the_fewest_bytes() {
        for shift in 0..64 {
            for number in [1_u64 << shift, (1 << shift) - 1, u64::MAX >> shift] {
                let mut out = BytesMut::new();
                put(&mut out, number);
                let bits = 64 - number.leading_zeros() as usize;
                assert_eq!(out.len(), bits.max(1).div_ceil(7));
                let mut rest = &out[..];
                assert_eq!(take(&mut rest), Ok(number));
                assert!(rest.is_empty());
                assert_eq!(take(&mut &out[..out.len() - 1]), Err(Malformed::Truncated));
            }
        }
    }

    #[test]
    fn a_number_has_one_encoding() {
        assert_eq!(take(&mut &[0x80, 0][..]), Err(Malformed::Overlong));
        assert_eq!(take(&mut &[0xff; 11][..]), Err(Malformed::Overlong));
    }
}
