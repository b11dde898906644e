//! The pcapng format, as far as a capture needs it: a section, its interfaces, packets with comments, and what was lost.
//!
//! Pure: appends blocks to bytes. Each block is whole, so that a file that ends after any of them is valid.
//! The format: <https://www.ietf.org/archive/id/draft-ietf-opsawg-pcapng-02.html>.

/// Ethernet.
const LINK_TYPE: u16 = 1;
/// Times are in nanoseconds.
const NANOSECONDS: u8 = 9;

const SECTION: u32 = 0x0a0d_0d0a;
const INTERFACE: u32 = 1;
const STATISTICS: u32 = 5;
/// The kind of a block that has a packet.
pub const PACKET: u32 = 6;

const END: u16 = 0;
const COMMENT: u16 = 1;

/// The shortest block: its type, and its length twice.
pub const BLOCK_BYTES_MIN: usize = 12;

/// Something captured.
#[derive(Clone, Copy, Debug)]
pub struct Packet<'a> {
    /// The interface, by the order in which they were declared.
    pub interface: u32,
    /// Nanoseconds since 1970.
    pub time: u64,
    /// The frame.
    pub frame: &'a [u8],
    /// What there is to say about it.
    pub comment: &'a str,
    /// How many packets of this interface were lost since the one before.
    pub lost: u64,
}

/// Begins a section; `application` is what writes it.
pub fn section(out: &mut Vec<u8>, application: &str) {
    block(out, SECTION, |out| {
        out.extend(0x1a2b_3c4d_u32.to_le_bytes());
        out.extend(1_u16.to_le_bytes());
        out.extend(0_u16.to_le_bytes());
        // Nobody knows yet how long it will be.
        out.extend(u64::MAX.to_le_bytes());
        option(out, 4, application.as_bytes());
        option(out, END, &[]);
    });
}

/// Declares an interface.
pub fn interface(out: &mut Vec<u8>, name: &str, description: &str) {
    block(out, INTERFACE, |out| {
        out.extend(LINK_TYPE.to_le_bytes());
        out.extend(0_u16.to_le_bytes());
        // No packet is cut.
        out.extend(0_u32.to_le_bytes());
        option(out, 2, name.as_bytes());
        option(out, 3, description.as_bytes());
        option(out, 9, &[NANOSECONDS]);
        option(out, END, &[]);
    });
}

/// Adds a packet.
pub fn packet(out: &mut Vec<u8>, packet: &Packet<'_>) {
    let length = length(packet.frame);
    block(out, PACKET, |out| {
        out.extend(packet.interface.to_le_bytes());
        time(out, packet.time);
        out.extend(length.to_le_bytes());
        out.extend(length.to_le_bytes());
        padded(out, packet.frame);
        option(out, COMMENT, packet.comment.as_bytes());
        if packet.lost > 0 {
            option(out, 4, &packet.lost.to_le_bytes());
        }
        option(out, END, &[]);
    });
}

/// Says, at the end, how many packets of an interface were seen and how many of them were lost.
pub fn statistics(out: &mut Vec<u8>, interface: u32, at: u64, seen: u64, lost: u64, comment: &str) {
    block(out, STATISTICS, |out| {
        out.extend(interface.to_le_bytes());
        time(out, at);
        option(out, COMMENT, comment.as_bytes());
        option(out, 4, &seen.to_le_bytes());
        option(out, 5, &lost.to_le_bytes());
        option(out, END, &[]);
    });
}

fn block(out: &mut Vec<u8>, kind: u32, body: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend(kind.to_le_bytes());
    out.extend([0; 4]);
    body(out);
    let total = u32::try_from(out.len() - start + 4).expect("a block is a frame and a few words");
    out[start + 4..start + 8].copy_from_slice(&total.to_le_bytes());
    out.extend(total.to_le_bytes());
}

/// Times are two halves, the upper first.
fn time(out: &mut Vec<u8>, nanoseconds: u64) {
    let [a, b, c, d, e, f, g, h] = nanoseconds.to_le_bytes();
    out.extend([e, f, g, h, a, b, c, d]);
}

fn option(out: &mut Vec<u8>, code: u16, value: &[u8]) {
    let value = &value[..value.len().min(usize::from(u16::MAX))];
    if value.is_empty() && code != END {
        return;
    }
    out.extend(code.to_le_bytes());
    out.extend(u16::try_from(value.len()).unwrap_or(u16::MAX).to_le_bytes());
    padded(out, value);
}

fn padded(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend(bytes);
    out.resize(out.len() + (4 - bytes.len() % 4) % 4, 0);
}

fn length(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    type Options = Vec<(u16, Vec<u8>)>;

    fn word(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    /// Reads a file by the format's own rules: kind, body and options of each block.
    fn read(mut bytes: &[u8]) -> Vec<(u32, Vec<u8>, Options)> {
        let mut blocks = Vec::new();
        while !bytes.is_empty() {
            let total = word(bytes, 4) as usize;
            assert!(total.is_multiple_of(4) && total >= BLOCK_BYTES_MIN);
            assert_eq!(word(bytes, total - 4) as usize, total, "a block says its length twice");
            let (kind, body) = (word(bytes, 0), &bytes[8..total - 4]);
            let fixed = match kind {
                SECTION => 16,
                INTERFACE => 8,
                STATISTICS => 12,
                PACKET => 20 + (word(body, 12) as usize).next_multiple_of(4),
                other => panic!("block {other}"),
            };
            let (fixed, mut rest) = body.split_at(fixed);
            let mut options = Vec::new();
            loop {
                let code = u16::from_le_bytes([rest[0], rest[1]]);
                let length = usize::from(u16::from_le_bytes([rest[2], rest[3]]));
                if code == END {
                    assert_eq!((length, rest.len()), (0, 4), "the options end the block");
                    break;
                }
                options.push((code, rest[4..4 + length].to_vec()));
                rest = &rest[4 + length.next_multiple_of(4)..];
            }
            blocks.push((kind, fixed.to_vec(), options));
            bytes = &bytes[total..];
        }
        blocks
    }

    #[test]
    fn a_file_is_read_back_as_it_was_written() {
        let mut out = Vec::new();
        section(&mut out, "tandem 1");
        interface(&mut out, "primary", "what the primary's guest sent");
        for length in 60..70 {
            packet(
                &mut out,
                &Packet {
                    interface: 0,
                    time: 1_700_000_000_123_456_789,
                    frame: &vec![7; length],
                    comment: "equal on both sides",
                    lost: length as u64 - 60,
                },
            );
        }
        statistics(&mut out, 0, 5, 55, 45, "too slow");
        let blocks = read(&out);
        assert_eq!(blocks.len(), 13);
        assert_eq!(word(&blocks[0].1, 0), 0x1a2b_3c4d);
        assert_eq!(blocks[1].1[..2], [1, 0]);
        let names: Vec<u16> = blocks[1].2.iter().map(|(code, _)| *code).collect();
        assert_eq!(names, [2, 3, 9]);
        for (length, (kind, fixed, options)) in (60..).zip(&blocks[2..12]) {
            assert_eq!((*kind, word(fixed, 12), word(fixed, 16)), (PACKET, length, length));
            let time = u64::from(word(fixed, 4)) << 32 | u64::from(word(fixed, 8));
            assert_eq!(time, 1_700_000_000_123_456_789);
            assert_eq!(options[0], (COMMENT, b"equal on both sides".to_vec()));
            assert_eq!(options.len(), if length == 60 { 1 } else { 2 });
        }
        let lost = |options: &Options| options.iter().find(|(code, _)| *code == 5).map(|(_, value)| value[0]);
        assert_eq!(lost(&blocks[12].2), Some(45));
    }
}
