//! The Redis protocol (RESP 2): reading commands, writing replies.
//!
//! Reading is total and bounded: any bytes give a command, the need for more bytes, or an error after which the
//! connection is to be closed.

use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;

use crate::kv::log::VALUE_MAX;

/// Most bytes of a command.
pub const COMMAND_MAX: usize = 256 * 1024;
/// Most words of a command.
pub const WORDS_MAX: usize = 1024;
const INLINE_MAX: usize = 8 * 1024;
const NUMBER_MAX: usize = 24;

/// A command: where its words are, and how many bytes it takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    /// The words; there may be none.
    pub words: Vec<Range<usize>>,
    /// Bytes of the command.
    pub bytes: usize,
}

/// Bytes that are no command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProtocolError {
    /// An array's length is no number, or too great.
    ArrayLength,
    /// A word's length is no number, or too great.
    WordLength,
    /// A word does not begin with its length.
    NoLength,
    /// A word is not followed by an end of line.
    NoLineEnd,
    /// The command is too long.
    TooLong,
}

impl fmt::Display for ProtocolError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ArrayLength => "invalid multibulk length",
            Self::WordLength => "invalid bulk length",
            Self::NoLength => "expected '$'",
            Self::NoLineEnd => "expected an end of line",
            Self::TooLong => "too big request",
        })
    }
}

impl core::error::Error for ProtocolError {}

/// Reads the command at the beginning of `bytes`; `None` if it is not complete.
///
/// # Errors
/// See [`ProtocolError`].
pub fn parse(bytes: &[u8]) -> Result<Option<Command>, ProtocolError> {
    let command = match bytes.first() {
        None => None,
        Some(b'*') => parse_array(bytes)?,
        Some(_) => parse_inline(bytes)?,
    };
    if command.is_none() && bytes.len() >= COMMAND_MAX {
        return Err(ProtocolError::TooLong);
    }
    Ok(command)
}

fn parse_array(bytes: &[u8]) -> Result<Option<Command>, ProtocolError> {
    let Some((count, mut at)) = number(bytes, 1, ProtocolError::ArrayLength)? else {
        return Ok(None);
    };
    let count = usize::try_from(count.max(0)).unwrap_or(usize::MAX);
    if count > WORDS_MAX {
        return Err(ProtocolError::ArrayLength);
    }
    let mut words = Vec::with_capacity(count);
    for _ in 0..count {
        match bytes.get(at) {
            None => return Ok(None),
            Some(b'$') => {}
            Some(_) => return Err(ProtocolError::NoLength),
        }
        let Some((length, start)) = number(bytes, at + 1, ProtocolError::WordLength)? else {
            return Ok(None);
        };
        let length = usize::try_from(length).map_err(|_| ProtocolError::WordLength)?;
        if length > VALUE_MAX {
            return Err(ProtocolError::WordLength);
        }
        let end = start + length;
        if let Some(rest) = bytes.get(end..)
            && !b"\r\n".starts_with(&rest[..rest.len().min(2)])
        {
            return Err(ProtocolError::NoLineEnd);
        }
        if bytes.len() < end + 2 {
            return Ok(None);
        }
        words.push(start..end);
        at = end + 2;
    }
    Ok(Some(Command { words, bytes: at }))
}

fn parse_inline(bytes: &[u8]) -> Result<Option<Command>, ProtocolError> {
    let searched = &bytes[..bytes.len().min(INLINE_MAX)];
    let Some(end) = searched.iter().position(|byte| *byte == b'\n') else {
        return if bytes.len() < INLINE_MAX {
            Ok(None)
        } else {
            Err(ProtocolError::TooLong)
        };
    };
    let mut words = Vec::new();
    let mut start = None;
    for (at, byte) in bytes[..=end].iter().enumerate() {
        match (byte.is_ascii_whitespace(), start) {
            (true, Some(from)) => {
                words.push(from..at);
                start = None;
            }
            (false, None) => start = Some(at),
            _ => {}
        }
    }
    if words.len() > WORDS_MAX {
        return Err(ProtocolError::TooLong);
    }
    Ok(Some(Command { words, bytes: end + 1 }))
}

/// Reads the number from `at` to the end of the line, and says where the next line begins.
fn number(bytes: &[u8], at: usize, error: ProtocolError) -> Result<Option<(i64, usize)>, ProtocolError> {
    let rest = &bytes[at..];
    let window = &rest[..rest.len().min(NUMBER_MAX)];
    let Some(end) = window.iter().position(|byte| *byte == b'\n') else {
        return if window.len() < NUMBER_MAX {
            Ok(None)
        } else {
            Err(error)
        };
    };
    let line = window[..end].strip_suffix(b"\r").ok_or(error)?;
    let value = integer(line).ok_or(error)?;
    Ok(Some((value, at + end + 1)))
}

/// Reads a decimal integer the way Redis does: no sign but `-`, no leading zeroes, no blanks.
#[must_use]
pub fn integer(text: &[u8]) -> Option<i64> {
    let digits = text.strip_prefix(b"-").unwrap_or(text);
    let canonical =
        digits == b"0" && text.len() == 1 || digits.first().is_some_and(|digit| (b'1'..=b'9').contains(digit));
    if !canonical {
        return None;
    }
    core::str::from_utf8(text).ok()?.parse().ok()
}

/// Appends a status line.
pub fn status(out: &mut Vec<u8>, text: &str) {
    line(out, b'+', text.as_bytes());
}

/// Appends an error line; line ends in `text` become blanks.
pub fn error(out: &mut Vec<u8>, text: &str) {
    let start = out.len() + 1;
    line(out, b'-', text.as_bytes());
    let end = out.len() - 2;
    for byte in &mut out[start..end] {
        if byte.is_ascii_control() {
            *byte = b' ';
        }
    }
}

/// Appends a number.
pub fn number_reply(out: &mut Vec<u8>, value: i64) {
    line(out, b':', alloc::format!("{value}").as_bytes());
}

/// Appends a string, or nil.
pub fn bulk(out: &mut Vec<u8>, value: Option<&[u8]>) {
    match value {
        None => out.extend_from_slice(b"$-1\r\n"),
        Some(value) => {
            line(out, b'$', alloc::format!("{}", value.len()).as_bytes());
            out.extend_from_slice(value);
            out.extend_from_slice(b"\r\n");
        }
    }
}

/// Appends the beginning of an array of `count` replies.
pub fn array(out: &mut Vec<u8>, count: usize) {
    line(out, b'*', alloc::format!("{count}").as_bytes());
}

fn line(out: &mut Vec<u8>, kind: u8, text: &[u8]) {
    out.push(kind);
    out.extend_from_slice(text);
    out.extend_from_slice(b"\r\n");
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn words(bytes: &[u8]) -> Option<Vec<Vec<u8>>> {
        let command = parse(bytes).unwrap()?;
        Some(command.words.into_iter().map(|word| bytes[word].to_vec()).collect())
    }

    #[test]
    fn both_forms_are_read() {
        let expected = Some(vec![b"SET".to_vec(), b"a".to_vec(), b"b\r\n".to_vec()]);
        assert_eq!(words(b"*3\r\n$3\r\nSET\r\n$1\r\na\r\n$3\r\nb\r\n\r\n"), expected);
        assert_eq!(words(b"  GET   key \r\n"), Some(vec![b"GET".to_vec(), b"key".to_vec()]));
        assert_eq!(words(b"\r\n"), Some(vec![]));
        assert_eq!(words(b"*0\r\n"), Some(vec![]));
        assert_eq!(words(b"*-1\r\n"), Some(vec![]));
    }

    #[test]
    fn bad_bytes_are_errors() {
        assert_eq!(parse(b"*x\r\n"), Err(ProtocolError::ArrayLength));
        assert_eq!(parse(b"*1025\r\n"), Err(ProtocolError::ArrayLength));
        assert_eq!(parse(b"*1\r\n+PING\r\n"), Err(ProtocolError::NoLength));
        assert_eq!(parse(b"*1\r\n$-1\r\n"), Err(ProtocolError::WordLength));
        assert_eq!(parse(b"*1\r\n$65537\r\n"), Err(ProtocolError::WordLength));
        assert_eq!(parse(b"*1\r\n$1\r\nab\r\n"), Err(ProtocolError::NoLineEnd));
        assert_eq!(parse(&[b'a'; INLINE_MAX]), Err(ProtocolError::TooLong));
        assert_eq!(parse(&[b'*'; NUMBER_MAX + 1]), Err(ProtocolError::ArrayLength));
    }

    #[test]
    fn integers_are_canonical() {
        assert_eq!(integer(b"-12"), Some(-12));
        assert_eq!(integer(b"0"), Some(0));
        assert_eq!(integer(i64::MIN.to_string().as_bytes()), Some(i64::MIN));
        for text in ["", "-", "-0", "01", "+1", " 1", "1 ", "9223372036854775808", "1.0"] {
            assert_eq!(integer(text.as_bytes()), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_was_written_is_read_whole_or_not_at_all(args in vec(vec(any::<u8>(), 0..50), 1..10), rest in vec(any::<u8>(), 0..10)) {
            let mut bytes = Vec::new();
            array(&mut bytes, args.len());
            for arg in &args {
                bulk(&mut bytes, Some(arg));
            }
            for cut in 0..bytes.len() {
                prop_assert_eq!(parse(&bytes[..cut]), Ok(None), "cut at {}", cut);
            }
            let whole = bytes.len();
            bytes.extend_from_slice(&rest);
            let command = parse(&bytes).unwrap().unwrap();
            prop_assert_eq!(command.bytes, whole);
            prop_assert_eq!(words(&bytes).unwrap(), args);
        }

        #[test]
        fn any_bytes_get_an_answer(bytes in vec(any::<u8>(), 0..100)) {
            let _ = parse(&bytes);
        }

        #[test]
        fn near_misses_get_an_answer(bytes in "[*$0-9\\-\r\nab]{0,60}") {
            if let Ok(Some(command)) = parse(bytes.as_bytes()) {
                prop_assert!(command.bytes <= bytes.len());
                prop_assert!(command.words.iter().all(|word| word.end <= bytes.len()));
            }
        }
    }
}
