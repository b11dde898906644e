//! The header before each frame, which says what is left to do on it.
//!
//! Guests and kernels leave the last work on a frame to the network: to fill in the checksum, which then holds the sum of
//! the pseudo header only, and to cut a TCP segment of up to 64 KiB into such as fit onto a wire. The header, twelve
//! bytes of `virtio_net_hdr_v1`, tells; it is all zero if nothing is left to do. It goes with the frame from where
//! it enters to where it leaves. Which guest is promised what is for the machine and the TAP; here a header is only
//! read, made right for a frame that was cut, and carried out for those who want the frame as it is on a wire.

use bytes::Bytes;
use checkpoint::limits::FRAME_HEADER_BYTES;

use crate::checksum;

const NEEDS_CHECKSUM: u8 = 1;
const VALID: u8 = 2;
const SEGMENTS_V4: u8 = 1;
const SEGMENTS_V6: u8 = 4;
const TELLS_CONGESTION: u8 = 0x80;
const KIND_AT: usize = 1;
const SIZE_AT: usize = 4;
const START_AT: usize = 6;
const FIELD_AT: usize = 8;

/// What a header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Offload {
    /// Where the bytes to be summed up begin, and where the sum belongs, both in the frame with its header.
    checksum: Option<(usize, usize)>,
    /// How a segment is to be cut: the version of IP, and the bytes of each piece.
    cut: Option<(u8, u16)>,
    /// It says nothing that is not known here.
    is_known: bool,
}

impl Offload {
    /// Reads the header of a frame.
    pub(crate) fn of(frame: &[u8]) -> Option<Self> {
        let header = frame.first_chunk::<FRAME_HEADER_BYTES>()?;
        let word = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        let kind = header[KIND_AT] & !TELLS_CONGESTION;
        let start = FRAME_HEADER_BYTES + usize::from(word(START_AT));
        let needs_checksum = header[0] & NEEDS_CHECKSUM != 0;
        let version = match kind {
            SEGMENTS_V4 => Some(4),
            SEGMENTS_V6 => Some(6),
            _ => None,
        };
        let is_cut_rightly = version.is_some() && needs_checksum && word(SIZE_AT) > 0;
        Some(Self {
            checksum: needs_checksum.then(|| (start, start + usize::from(word(FIELD_AT)))),
            cut: version.map(|version| (version, word(SIZE_AT))),
            is_known: header[0] & !(NEEDS_CHECKSUM | VALID) == 0 && (header[KIND_AT] == 0 || is_cut_rightly),
        })
    }

    /// Says whether it is true of a TCP segment over this version of IP whose header starts there.
    pub(crate) fn fits_tcp(&self, version: u8, tcp: usize, checksum_at: usize) -> bool {
        self.is_known
            && self.checksum.is_none_or(|place| place == (tcp, tcp + checksum_at))
            && self.cut.is_none_or(|(cut, _)| cut == version)
    }

    /// Says whether it leaves nothing to do but, perhaps, the checksum of the datagram that starts there.
    pub(crate) fn fits(&self, datagram: Option<(usize, usize)>) -> bool {
        let place = datagram.map(|(start, checksum_at)| (start, start + checksum_at));
        self.is_known && self.cut.is_none() && (self.checksum.is_none() || self.checksum == place)
    }

    /// Says whether the checksum is still to be filled in.
    pub(crate) fn needs_checksum(&self) -> bool {
        self.checksum.is_some()
    }
}

/// Makes the header right of a segment that was made of a longer one and carries so many bytes.
pub(crate) fn shortened(frame: &mut [u8], payload: usize) {
    let size = usize::from(u16::from_le_bytes([frame[SIZE_AT], frame[SIZE_AT + 1]]));
    if payload <= size {
        frame[KIND_AT] = 0;
        frame[SIZE_AT..START_AT].fill(0);
    }
}

/// Returns a frame without its header, with its checksum filled in, as on a wire that takes frames of any length.
#[must_use]
pub fn on_wire(frame: &Bytes) -> Bytes {
    let Some(offload) = Offload::of(frame) else {
        return Bytes::new();
    };
    // A copy: what it is cut out of may be much longer.
    let mut wire = frame[FRAME_HEADER_BYTES..].to_vec();
    if let (Some((start, field)), true) = (offload.checksum, offload.is_known)
        && field + 2 <= frame.len()
    {
        let sum = checksum::header(&frame[start..]);
        // Zero would say that there is none.
        let sum = if sum == 0 { 0xffff } else { sum };
        wire[field - FRAME_HEADER_BYTES..][..2].copy_from_slice(&sum.to_be_bytes());
    }
    wire.into()
}

/// Returns a frame as on a wire with the header that says that nothing is left to do.
#[must_use]
pub fn complete(wire: &[u8]) -> Bytes {
    [&[0; FRAME_HEADER_BYTES][..], wire].concat().into()
}

#[cfg(test)]
mod tests;
