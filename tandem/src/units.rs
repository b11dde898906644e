//! Sizes and spans of time as people write them: `256M`, `1.5s`.
//!
//! Used for options and for the configuration file alike. Parsing is total: whatever it does not
//! understand is an error that shows how it should look.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

/// A span of time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub Duration);

/// Why a text is no size or span.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// Not a size at all.
    #[error("'{0}' is no size: write a whole number and K, M or G, as in 256M")]
    Size(String),
    /// Not a span at all.
    #[error("'{0}' is no span of time: write a number and us, ms, s or min, as in 300ms")]
    Span(String),
    /// Too big for the number that holds it.
    #[error("'{0}' is too big")]
    TooBig(String),
}

impl ByteSize {
    /// Returns that many MiB.
    #[must_use]
    pub const fn mib(count: u64) -> Self {
        Self(count << 20)
    }
}

impl Span {
    /// Returns that many milliseconds.
    #[must_use]
    pub const fn ms(count: u64) -> Self {
        Self(Duration::from_millis(count))
    }
}

impl FromStr for ByteSize {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let (number, unit) = split(text);
        let shift = match unit.to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kb" | "kib" => 10,
            "m" | "mb" | "mib" => 20,
            "g" | "gb" | "gib" => 30,
            _ => return Err(UnitError::Size(text.to_owned())),
        };
        if number.is_empty() || number.contains('.') {
            return Err(UnitError::Size(text.to_owned()));
        }
        let number: u64 = number.parse().map_err(|_| UnitError::TooBig(text.to_owned()))?;
        number
            .checked_mul(1 << shift)
            .map(Self)
            .ok_or_else(|| UnitError::TooBig(text.to_owned()))
    }
}

impl FromStr for Span {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let wrong = || UnitError::Span(text.to_owned());
        let (number, unit) = split(text);
        let nanoseconds: u64 = match unit {
            "us" | "µs" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "min" => 60_000_000_000,
            _ => return Err(wrong()),
        };
        let (whole, part) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() || part.contains('.') || number.ends_with('.') || part.len() > 9 {
            return Err(wrong());
        }
        let whole: u64 = whole.parse().map_err(|_| UnitError::TooBig(text.to_owned()))?;
        let mut total = whole
            .checked_mul(nanoseconds)
            .ok_or_else(|| UnitError::TooBig(text.to_owned()))?;
        let mut unit = nanoseconds;
        for digit in part.bytes() {
            unit /= 10;
            total = total.saturating_add(u64::from(digit - b'0') * unit);
        }
        Ok(Self(Duration::from_nanos(total)))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [("G", 30), ("M", 20), ("K", 10)];
        match units
            .iter()
            .find(|(_, shift)| self.0 > 0 && self.0.is_multiple_of(1 << shift))
        {
            Some((unit, shift)) => write!(f, "{}{unit}", self.0 >> shift),
            None => write!(f, "{}", self.0),
        }
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanoseconds = self.0.as_nanos();
        match nanoseconds {
            0 => f.write_str("0ms"),
            _ if nanoseconds.is_multiple_of(1_000_000_000) => write!(f, "{}s", nanoseconds / 1_000_000_000),
            _ if nanoseconds.is_multiple_of(1_000_000) => write!(f, "{}ms", nanoseconds / 1_000_000),
            _ => write!(f, "{}us", nanoseconds / 1_000),
        }
    }
}

/// Splits a number from the unit behind it.
fn split(text: &str) -> (&str, &str) {
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    (number, unit.trim_start())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_written() {
        for (text, bytes, written) in [
            ("256M", 256 << 20, "256M"),
            ("1G", 1 << 30, "1G"),
            ("1024 KiB", 1 << 20, "1M"),
            ("4097", 4097, "4097"),
            ("0", 0, "0"),
            ("2mib", 2 << 20, "2M"),
        ] {
            let size: ByteSize = text.parse().unwrap();
            assert_eq!(size, ByteSize(bytes), "{text}");
            assert_eq!(size.to_string(), written);
        }
        for text in ["", "M", "1.5G", "256X", "-1M", "256MM", " 1M", "١M"] {
            let error = text.parse::<ByteSize>().unwrap_err();
            assert_eq!(error, UnitError::Size(text.into()), "{text}");
            assert!(error.to_string().contains("as in 256M"));
        }
        for text in ["99999999999999999999", "18446744073709551615K"] {
            assert_eq!(text.parse::<ByteSize>(), Err(UnitError::TooBig(text.into())));
        }
    }

    #[test]
    fn spans_are_read_and_written() {
        for (text, micros, written) in [
            ("300ms", 300_000, "300ms"),
            ("1s", 1_000_000, "1s"),
            ("1.5s", 1_500_000, "1500ms"),
            ("0.25ms", 250, "250us"),
            ("2min", 120_000_000, "120s"),
            ("10 us", 10, "10us"),
        ] {
            let span: Span = text.parse().unwrap();
            assert_eq!(span, Span(Duration::from_micros(micros)), "{text}");
            assert_eq!(span.to_string(), written);
        }
        for text in [
            "",
            "300",
            "s",
            "1.2.3s",
            "1.s",
            ".5s",
            "1h",
            "-1s",
            "0.0000000001s",
            "1 e s",
        ] {
            assert_eq!(text.parse::<Span>(), Err(UnitError::Span(text.into())), "{text}");
        }
        assert_eq!(
            "99999999999999min".parse::<Span>(),
            Err(UnitError::TooBig("99999999999999min".into()))
        );
    }
}
