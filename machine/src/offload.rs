//! What is left to do on a frame, by whom: the header before each frame, and what each end takes.
//!
//! A guest and a host's kernel hand each other TCP segments of up to 64 KiB, to be cut by whoever puts them on a real
//! wire, and frames whose checksum is still to be filled in. A header of twelve bytes, `virtio_net_hdr_v1`, says so: it
//! stands before each frame here, all zero if nothing is left to do. This file knows which headers an end permits;
//! whether one tells the truth about its frame is for others to see.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_HDR_F_DATA_VALID, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN,
    VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
};

/// Bytes of the header before each frame.
pub const HEADER_BYTES: usize = 12;
/// Where the header says how many buffers a frame takes in the guest; of no meaning elsewhere.
pub(crate) const BUFFERS_AT: usize = 10;

/// All that the network card offers beyond its address.
pub(crate) const FEATURES: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | 1 << VIRTIO_NET_F_MRG_RXBUF;

/// What an end takes that not every end does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Frames whose checksum is not filled in.
    pub checksum: bool,
    /// TCP segments over IPv4 that are longer than any frame.
    pub tcp4: bool,
    /// The same over IPv6.
    pub tcp6: bool,
    /// Such segments that tell of congestion.
    pub congestion: bool,
}

impl Offloads {
    /// Nothing: each frame is complete.
    pub const NONE: Self = Self {
        checksum: false,
        tcp4: false,
        tcp6: false,
        congestion: false,
    };
    /// All there is.
    pub const ALL: Self = Self {
        checksum: true,
        tcp4: true,
        tcp6: true,
        congestion: true,
    };

    /// What the driver that has accepted these features takes.
    pub(crate) fn of_guest(features: u64) -> Self {
        Self::accepted(
            features,
            [
                VIRTIO_NET_F_GUEST_CSUM,
                VIRTIO_NET_F_GUEST_TSO4,
                VIRTIO_NET_F_GUEST_TSO6,
                VIRTIO_NET_F_GUEST_ECN,
            ],
        )
    }

    /// What the driver that has accepted these features may leave to the device.
    pub(crate) fn of_host(features: u64) -> Self {
        Self::accepted(
            features,
            [
                VIRTIO_NET_F_CSUM,
                VIRTIO_NET_F_HOST_TSO4,
                VIRTIO_NET_F_HOST_TSO6,
                VIRTIO_NET_F_HOST_ECN,
            ],
        )
    }

    /// Without the first there is no second and third, without those no fourth, whatever a driver says.
    fn accepted(features: u64, bits: [u32; 4]) -> Self {
        let [checksum, tcp4, tcp6, congestion] = bits.map(|bit| features & 1 << bit != 0);
        Self {
            checksum,
            tcp4: checksum && tcp4,
            tcp6: checksum && tcp6,
            congestion: checksum && (tcp4 || tcp6) && congestion,
        }
    }

    /// Says whether the end takes a frame with its header, and whether that can be true of a frame of its length.
    pub(crate) fn permit(self, frame: &[u8]) -> bool {
        let Some((header, bytes)) = frame.split_first_chunk::<HEADER_BYTES>() else {
            return false;
        };
        let [
            flags,
            segments,
            _,
            _,
            size_low,
            size_high,
            start_low,
            start_high,
            offset_low,
            offset_high,
            _,
            _,
        ] = *header;
        let word = |low: u8, high: u8| usize::from(u16::from_le_bytes([low, high]));
        let needs_checksum = u32::from(flags) & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0;
        if needs_checksum {
            let field = word(start_low, start_high) + word(offset_low, offset_high);
            if !self.checksum || field + 2 > bytes.len() {
                return false;
            }
        }
        let tells_congestion = u32::from(segments) & VIRTIO_NET_HDR_GSO_ECN != 0;
        let is_taken = match u32::from(segments) & !VIRTIO_NET_HDR_GSO_ECN {
            VIRTIO_NET_HDR_GSO_NONE => return !tells_congestion,
            VIRTIO_NET_HDR_GSO_TCPV4 => self.tcp4,
            VIRTIO_NET_HDR_GSO_TCPV6 => self.tcp6,
            _ => false,
        };
        is_taken && needs_checksum && word(size_low, size_high) > 0 && (self.congestion || !tells_congestion)
    }

    /// Clears what means nothing in the header of a frame that comes from a driver with this agreement. One that has agreed to
    /// nothing need not even write it.
    pub(crate) fn clean(self, frame: &mut [u8]) {
        if self == Self::NONE {
            frame[..HEADER_BYTES].fill(0);
        }
        frame[0] &= NEEDS_CHECKSUM;
        frame[BUFFERS_AT..HEADER_BYTES].fill(0);
    }

    /// Makes the header of a frame for this end, in so many buffers, of the one that stands before it.
    pub(crate) fn header(self, frame: &[u8; HEADER_BYTES], buffers: u16) -> [u8; HEADER_BYTES] {
        let mut header = *frame;
        if self.checksum {
            // Whatever else is said there is nothing that was agreed on.
            header[0] &= NEEDS_CHECKSUM | VALID;
        } else {
            header = [0; HEADER_BYTES];
        }
        header[BUFFERS_AT..].copy_from_slice(&buffers.to_le_bytes());
        header
    }
}

#[expect(clippy::cast_possible_truncation, reason = "both are flags of one byte")]
const NEEDS_CHECKSUM: u8 = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
#[expect(clippy::cast_possible_truncation, reason = "both are flags of one byte")]
const VALID: u8 = VIRTIO_NET_HDR_F_DATA_VALID as u8;

/// Says whether a driver that has accepted these features takes a frame in several buffers.
pub(crate) fn merges(features: u64) -> bool {
    features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A segment of 60 bytes with this header.
    fn frame(header: [u8; HEADER_BYTES]) -> Vec<u8> {
        [&header[..], &[0; 60]].concat()
    }

    const SEGMENTS: [u8; HEADER_BYTES] = [1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0];

    #[test]
    fn case_p10_an_end_gets_what_it_has_agreed_to_and_nothing_else() {
        let plain = frame([0; HEADER_BYTES]);
        let partial = frame([1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0]);
        let [segments, segments6, congested] = [1, 4, 0x81].map(|kind| {
            let mut header = SEGMENTS;
            header[1] = kind;
            frame(header)
        });
        let checksum = Offloads {
            checksum: true,
            ..Offloads::NONE
        };
        let tcp4 = Offloads { tcp4: true, ..checksum };
        for (offloads, permitted) in [
            (Offloads::NONE, [true, false, false, false, false]),
            (checksum, [true, true, false, false, false]),
            (tcp4, [true, true, true, false, false]),
            (Offloads::ALL, [true; 5]),
        ] {
            let frames = [&plain, &partial, &segments, &segments6, &congested];
            assert_eq!(frames.map(|frame| offloads.permit(frame)), permitted, "{offloads:?}");
        }
    }

    #[test]
    fn case_p10_headers_that_can_not_be_true_are_refused() {
        let bad = |change: &dyn Fn(&mut [u8; HEADER_BYTES])| {
            let mut header = SEGMENTS;
            change(&mut header);
            assert!(!Offloads::ALL.permit(&frame(header)), "{header:?}");
        };
        bad(&|header| header[0] = 0);
        bad(&|header| header[1] = 3);
        bad(&|header| header[1] = 5);
        bad(&|header| header[1] = 0x80);
        bad(&|header| header[4..6].fill(0));
        bad(&|header| header[6..8].copy_from_slice(&43_u16.to_le_bytes()));
        bad(&|header| header[6..10].fill(0xff));
        assert!(!Offloads::ALL.permit(&SEGMENTS[..11]));
        let mut last = SEGMENTS;
        last[6] = 42;
        assert!(Offloads::ALL.permit(&frame(last)));
    }

    #[test]
    fn a_driver_that_accepts_segments_without_checksums_gets_neither() {
        let tcp = 1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_ECN;
        assert_eq!(Offloads::of_guest(tcp), Offloads::NONE);
        assert_eq!(Offloads::of_guest(FEATURES), Offloads::ALL);
        assert_eq!(Offloads::of_host(FEATURES), Offloads::ALL);
        let guest = Offloads::of_guest(tcp | 1 << VIRTIO_NET_F_GUEST_CSUM);
        assert!(guest.tcp4 && guest.congestion && !guest.tcp6);
        assert_eq!(Offloads::of_host(tcp | 1 << VIRTIO_NET_F_GUEST_CSUM), Offloads::NONE);
    }

    #[test]
    fn only_who_leaves_checksums_out_is_told_that_one_was_verified() {
        let verified = [2 | 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9, 9];
        assert_eq!(Offloads::ALL.header(&verified, 1)[0], 2);
        assert_eq!(
            Offloads::NONE.header(&verified, 3),
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0]
        );
        assert_eq!(Offloads::ALL.header(&SEGMENTS, 0x1234)[BUFFERS_AT..], [0x34, 0x12]);
    }

    proptest! {
        #[test]
        fn what_is_permitted_lies_within_the_frame(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            if Offloads::ALL.permit(&bytes) && bytes[0] & 1 != 0 {
                let at = |at: usize| usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
                prop_assert!(HEADER_BYTES + at(6) + at(8) + 2 <= bytes.len());
            }
        }
    }
}
