//! Internet checksums: changed in place after an edit (RFC 1624), or computed over a whole packet.
//!
//! The incremental form keeps a checksum that was wrong wrong, so a corrupt segment stays corrupt.

use std::net::IpAddr;

/// Replaces the four bytes at `at` and mends the checksum at `checksum_at`, both counted from the start of the
/// checksummed header, which is at `header` in `frame`. Offsets must be within the frame.
pub(crate) fn replace_u32(frame: &mut [u8], header: usize, at: usize, checksum_at: usize, new: [u8; 4]) {
    let field = header + at;
    let mut old = [0; 4];
    old.copy_from_slice(&frame[field..field + 4]);
    if old == new {
        return;
    }
    let checksum = header + checksum_at;
    let before = u16::from_be_bytes([frame[checksum], frame[checksum + 1]]);
    let odd = at % 2 == 1;
    let sum = u32::from(!before) + complement_words(old, odd) + words(new, odd);
    frame[field..field + 4].copy_from_slice(&new);
    frame[checksum..checksum + 2].copy_from_slice(&(!fold(sum)).to_be_bytes());
}

/// Mends the checksum of a transport packet that was made of another, `before`. The addresses of the pseudo
/// header are the same, whatever they are.
pub(crate) fn shortened(before: &[u8], after: &mut [u8], checksum_at: usize) {
    let checksum = u16::from_be_bytes([before[checksum_at], before[checksum_at + 1]]);
    after[checksum_at..checksum_at + 2].fill(0);
    let length = |packet: &[u8]| u32::try_from(packet.len()).unwrap_or(u32::MAX) % 0xffff;
    // What was summed up is the complement of the checksum, which is itself part of `before`.
    let old = u32::from(fold(sum_of(before) + length(before))) + u32::from(!checksum);
    let new = u32::from(fold(sum_of(after) + length(after)));
    let sum = u32::from(!checksum) + u32::from(!fold(old)) + new;
    after[checksum_at..checksum_at + 2].copy_from_slice(&(!fold(sum)).to_be_bytes());
}

/// The same where the checksum is still to be filled in and holds the sum of the pseudo header, of which only the packet's
/// length has changed.
pub(crate) fn shortened_pseudo(before: usize, after: &mut [u8], checksum_at: usize) {
    let word = |length: usize| u16::try_from(length).unwrap_or(u16::MAX);
    let field = u16::from_be_bytes([after[checksum_at], after[checksum_at + 1]]);
    let sum = u32::from(field) + u32::from(!word(before)) + u32::from(word(after.len()));
    after[checksum_at..checksum_at + 2].copy_from_slice(&fold(sum).to_be_bytes());
}

/// Returns the checksum of a transport packet over its pseudo header; its own checksum field must be zero.
pub(crate) fn transport(source: IpAddr, destination: IpAddr, protocol: u8, packet: &[u8]) -> u16 {
    let mut sum = u32::from(protocol) + u32::try_from(packet.len()).unwrap_or(u32::MAX) % 0xffff;
    for address in [source, destination] {
        sum += match address {
            IpAddr::V4(v4) => sum_of(&v4.octets()),
            IpAddr::V6(v6) => sum_of(&v6.octets()),
        };
    }
    !fold(sum + u32::from(fold(sum_of(packet))))
}

/// Returns the checksum of an IPv4 header whose own checksum field is zero.
pub(crate) fn header(bytes: &[u8]) -> u16 {
    !fold(sum_of(bytes))
}

fn sum_of(bytes: &[u8]) -> u32 {
    let mut sum = 0;
    let mut words = bytes.chunks_exact(2);
    for word in &mut words {
        sum += u32::from(u16::from_be_bytes([word[0], word[1]]));
    }
    if let [last] = words.remainder() {
        sum += u32::from(*last) << 8;
    }
    sum
}

fn words([a, b, c, d]: [u8; 4], odd: bool) -> u32 {
    let (a, b, c, d) = (u32::from(a), u32::from(b), u32::from(c), u32::from(d));
    if odd {
        a + (b << 8) + c + (d << 8)
    } else {
        (a << 8) + b + (c << 8) + d
    }
}

fn complement_words(bytes: [u8; 4], odd: bool) -> u32 {
    words(bytes.map(|byte| !byte), odd)
}

fn fold(sum: u32) -> u16 {
    let once = (sum & 0xffff) + (sum >> 16);
    let twice = (once & 0xffff) + (once >> 16);
    u16::try_from(twice & 0xffff).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::Ipv4Addr;

    proptest! {
        #[test]
        fn case_p10_an_incremental_change_equals_a_fresh_checksum(
            mut packet in proptest::collection::vec(any::<u8>(), 40..200), at in 20usize..36, new: [u8; 4],
        ) {
            let (source, destination) = (IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1)), IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2)));
            packet[16..18].fill(0);
            let sum = transport(source, destination, 6, &packet);
            packet[16..18].copy_from_slice(&sum.to_be_bytes());
            replace_u32(&mut packet, 0, at, 16, new);
            let changed = u16::from_be_bytes([packet[16], packet[17]]);
            packet[16..18].fill(0);
            let fresh = transport(source, destination, 6, &packet);
            prop_assert_eq!(changed % 0xffff, fresh % 0xffff);
        }
    }

    proptest! {
        #[test]
        fn case_p10_the_checksum_of_a_shortened_packet_equals_a_fresh_one_and_a_wrong_one_stays_wrong(
            mut packet in proptest::collection::vec(any::<u8>(), 20..200), to in 10usize..30, wrong: u16,
        ) {
            let (source, destination) = (IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1)), IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2)));
            packet[16..18].fill(0);
            let sum = transport(source, destination, 6, &packet);
            packet[16..18].copy_from_slice(&sum.wrapping_add(wrong).to_be_bytes());
            let mut short = packet[..(to * 2).min(packet.len() / 2 * 2)].to_vec();
            short[4..8].copy_from_slice(&[9, 8, 7, 6]);
            shortened(&packet, &mut short, 16);
            let mended = u16::from_be_bytes([short[16], short[17]]);
            short[16..18].fill(0);
            let fresh = transport(source, destination, 6, &short);
            let is_wrong = sum.wrapping_add(wrong) % 0xffff != sum % 0xffff;
            prop_assert_eq!(mended % 0xffff != fresh % 0xffff, is_wrong);
        }
    }
}
