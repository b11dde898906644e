//! Bytes in pieces of any size to messages.
//!
//! ```text
//!   push(bytes) ──► [header?] ──48 bytes, checked──► [body of a bounded length?] ──► next() = a message
//! ```
//!
//! Holds less than one message once it is drained, and never reserves memory for bytes that a header
//! only promises. After the first error the stream is lost for good: a reader can't find back into it.
//!
//! Driven by a connection's reader. Never does I/O.

use bytes::{Buf, Bytes, BytesMut};

use crate::wire::Message;
use crate::wire::codec::{WireError, decode};
use crate::wire::header::{HEADER_BYTES, Header, Kind};

/// Other bodies than frames of the secondary are copied out of the stream up to this, so that one kept for long does not keep
/// its neighbours.
const COPY_BYTES_MAX: usize = 16 * 1024;

/// Cuts one connection's bytes into messages.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: BytesMut,
    header: Option<Header>,
    failed: Option<WireError>,
}

impl Decoder {
    /// Makes a decoder for the start of a stream.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes of the stream. Call [`next`](Self::next) until it has nothing more before the next piece:
    /// that keeps the memory to one message and one piece.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.failed.is_none() {
            self.buffer.extend_from_slice(bytes);
        }
    }

    /// Returns the next whole message, if there is one.
    ///
    /// # Errors
    /// Says why the stream is not one of messages; the same error comes again at each further call.
    #[expect(
        clippy::should_implement_trait,
        reason = "nothing more yet is not the end of an iterator"
    )]
    pub fn next(&mut self) -> Result<Option<Message>, WireError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        self.cut().inspect_err(|error| {
            self.failed = Some(error.clone());
            self.buffer = BytesMut::new();
        })
    }

    /// Returns whether a message has begun and not ended: a stream that closes here was cut off.
    #[must_use]
    pub fn is_within_message(&self) -> bool {
        self.header.is_some() || !self.buffer.is_empty()
    }

    /// Returns the number of bytes held.
    #[must_use]
    pub fn buffered(&self) -> usize {
        self.buffer.len()
    }

    fn cut(&mut self) -> Result<Option<Message>, WireError> {
        let header = match self.header {
            Some(header) => header,
            None => {
                let Some(bytes) = self.buffer.first_chunk::<HEADER_BYTES>() else {
                    return Ok(None);
                };
                let header = Header::parse(bytes)?;
                self.buffer.advance(HEADER_BYTES);
                self.header = Some(header);
                header
            }
        };
        let length = header.body_len();
        if self.buffer.len() < length {
            return Ok(None);
        }
        self.header = None;
        decode(&header, take_body(&mut self.buffer, &header)).map(Some)
    }
}

/// Cuts the body of a message out of what was read, which holds all of it.
///
/// # Panics
/// Panics if it does not.
pub fn take_body(buffer: &mut BytesMut, header: &Header) -> Bytes {
    let length = header.body_len();
    // A frame of the secondary is compared and dropped, and copied by whoever keeps it.
    if length > COPY_BYTES_MAX || header.kind == Kind::Output {
        return buffer.split_to(length).freeze();
    }
    let copy = Bytes::copy_from_slice(&buffer[..length]);
    buffer.advance(length);
    copy
}
