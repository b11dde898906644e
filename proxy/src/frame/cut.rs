//! Frames that are made of a segment: its acknowledgement alone, or a part of it.

use std::ops::Range;

use super::{IPV6_HEADER, Segment, TCP_ACK, TCP_ACK_AT, TCP_CHECKSUM_AT, TCP_FIN, TCP_FLAGS_AT, TCP_PSH, TCP_SEQ_AT};
use crate::seq::Seq;
use crate::{checksum, offload};

impl Segment {
    /// Makes the pure acknowledgement that would follow this segment: its headers without payload and SACK. Nothing if it is
    /// signed. A checksum that was wrong stays wrong.
    pub(crate) fn acknowledgement(&self, frame: &[u8], ack: Seq) -> Option<Vec<u8>> {
        if self.options.signed {
            return None;
        }
        let mut reply = frame[..self.payload].to_vec();
        reply[self.tcp + TCP_SEQ_AT..][..4].copy_from_slice(&self.end_seq().0.to_be_bytes());
        reply[self.tcp + TCP_ACK_AT..][..4].copy_from_slice(&ack.0.to_be_bytes());
        reply[self.tcp + TCP_FLAGS_AT] = TCP_ACK;
        reply[self.tcp + 18..self.tcp + 20].fill(0);
        self.mend(frame, &mut reply);
        self.blank_sack(&mut reply);
        Some(reply)
    }

    /// Makes a segment of a part of this one, from a number within it until another. It pushes and ends only if it goes on to
    /// the end. A checksum that was wrong stays wrong.
    ///
    /// # Panics
    /// If this is a SYN.
    pub(crate) fn part(&self, frame: &[u8], part: Range<Seq>) -> Vec<u8> {
        assert!(!self.syn, "a SYN is not cut");
        let at = |number: Seq| {
            let bytes = usize::try_from(number.after(self.seq)).unwrap_or(0);
            self.end.min(self.payload + bytes)
        };
        let mut cut = frame[..self.payload].to_vec();
        cut.extend_from_slice(&frame[at(part.start)..at(part.end)]);
        cut[self.tcp + TCP_SEQ_AT..][..4].copy_from_slice(&part.start.0.to_be_bytes());
        if part.end != self.end_seq() {
            cut[self.tcp + TCP_FLAGS_AT] &= !(TCP_PSH | TCP_FIN);
        }
        self.mend(frame, &mut cut);
        cut
    }

    /// Mends lengths and checksums of a frame that was made of this one and is shorter.
    fn mend(&self, frame: &[u8], shorter: &mut [u8]) {
        let length = |from: usize| u16::try_from(shorter.len() - from).unwrap_or(u16::MAX).to_be_bytes();
        if frame[self.ip] >> 4 == 4 {
            let header = self.ip..self.ip + usize::from(frame[self.ip] & 0xf) * 4;
            let total = length(self.ip);
            shorter[self.ip + 2..self.ip + 4].copy_from_slice(&total);
            shorter[self.ip + 10..self.ip + 12].fill(0);
            let sum = checksum::header(&shorter[header]);
            shorter[self.ip + 10..self.ip + 12].copy_from_slice(&sum.to_be_bytes());
        } else {
            let payload = length(self.ip + IPV6_HEADER);
            shorter[self.ip + 4..self.ip + 6].copy_from_slice(&payload);
        }
        let payload = shorter.len() - self.payload;
        offload::shortened(shorter, payload);
        let (before, after) = (&frame[self.tcp..self.end], &mut shorter[self.tcp..]);
        if self.partial {
            checksum::shortened_pseudo(before.len(), after, TCP_CHECKSUM_AT);
        } else {
            checksum::shortened(before, after, TCP_CHECKSUM_AT);
        }
    }
}
