//! What a stopped machine is, apart from its memory: a list of named, versioned byte strings.
//!
//! Each part of the machine writes one [`Section`] with a [`Writer`] and reads it again with a
//! [`Reader`]; nobody else looks inside. Sections come from a peer or a file: a [`Reader`] never
//! reads past the end, never allocates by a length it has not checked, and never panics.

use thiserror::Error;

/// The saved state of one part of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// Which part, for instance `vcpu` or `block`.
    pub name: String,
    /// The layout of `bytes`.
    pub version: u32,
    /// The state itself, in that part's own layout.
    pub bytes: Vec<u8>,
}

/// The saved state of the whole machine except its memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MachineState(pub Vec<Section>);

impl MachineState {
    /// Finds the section `name`, or says that it is missing.
    pub fn section(&self, name: &str) -> Result<&Section, StateError> {
        self.0
            .iter()
            .find(|section| section.name == name)
            .ok_or_else(|| StateError::Missing {
                section: name.to_owned(),
            })
    }

    /// Returns the size of all sections together, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.0.iter().map(|section| section.bytes.len()).sum()
    }
}

/// Why saved state can't be read.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum StateError {
    /// A part of the machine has no section.
    #[error("the saved state has no section `{section}`: it was made by a machine of another shape")]
    Missing {
        /// The part.
        section: String,
    },
    /// A section that no part of this machine reads, or one that is there twice.
    #[error("the saved state has an unexpected section `{section}`: it was made by a machine of another shape")]
    Unexpected {
        /// The part.
        section: String,
    },
    /// The section is written in another layout.
    #[error("section `{section}` has layout {found}, this program reads {known}: run the same version on both hosts")]
    Version {
        /// The part.
        section: String,
        /// The layout it has.
        found: u32,
        /// The layout that can be read.
        known: u32,
    },
    /// The section ends too early, or goes on after its end.
    #[error("section `{section}` is damaged: {field} has the wrong length")]
    Length {
        /// The part.
        section: String,
        /// What was being read.
        field: &'static str,
    },
    /// A value that this machine never writes.
    #[error("section `{section}` is damaged: {field} has an impossible value")]
    Value {
        /// The part.
        section: String,
        /// What was being read.
        field: &'static str,
    },
}

/// Writes the fields of a [`Section`] one after the other, little endian.
#[derive(Debug, Default)]
pub struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    /// Starts an empty section.
    #[must_use]
    pub const fn new() -> Self {
        Self { bytes: Vec::new() }
    }

    /// Appends a byte.
    pub fn u8(&mut self, value: u8) -> &mut Self {
        self.bytes.push(value);
        self
    }

    /// Appends two bytes.
    pub fn u16(&mut self, value: u16) -> &mut Self {
        self.fixed(&value.to_le_bytes())
    }

    /// Appends four bytes.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.fixed(&value.to_le_bytes())
    }

    /// Appends eight bytes.
    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.fixed(&value.to_le_bytes())
    }

    /// Appends bytes whose number the reader knows.
    pub fn fixed(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// Appends a length and that many bytes.
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        let length = u32::try_from(bytes.len()).expect("a section's field is far below 4 GiB");
        self.u32(length).fixed(bytes)
    }

    /// Ends the section.
    #[must_use]
    pub fn finish(self, name: impl Into<String>, version: u32) -> Section {
        Section {
            name: name.into(),
            version,
            bytes: self.bytes,
        }
    }
}

/// Reads a [`Section`] in the order in which it was written.
#[derive(Debug)]
pub struct Reader<'a> {
    section: &'a str,
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Starts to read `section`, which must have the layout `version`.
    pub fn new(section: &'a Section, version: u32) -> Result<Self, StateError> {
        if section.version != version {
            return Err(StateError::Version {
                section: section.name.clone(),
                found: section.version,
                known: version,
            });
        }
        Ok(Self {
            section: &section.name,
            rest: &section.bytes,
        })
    }

    /// Reads a byte.
    pub fn u8(&mut self, field: &'static str) -> Result<u8, StateError> {
        self.array::<1>(field).map(|[byte]| byte)
    }

    /// Reads two bytes.
    pub fn u16(&mut self, field: &'static str) -> Result<u16, StateError> {
        self.array(field).map(u16::from_le_bytes)
    }

    /// Reads four bytes.
    pub fn u32(&mut self, field: &'static str) -> Result<u32, StateError> {
        self.array(field).map(u32::from_le_bytes)
    }

    /// Reads eight bytes.
    pub fn u64(&mut self, field: &'static str) -> Result<u64, StateError> {
        self.array(field).map(u64::from_le_bytes)
    }

    /// Reads a byte that must be 0 or 1.
    pub fn bool(&mut self, field: &'static str) -> Result<bool, StateError> {
        match self.u8(field)? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(self.value(field)),
        }
    }

    /// Reads exactly `N` bytes.
    pub fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], StateError> {
        let (head, rest) = self.rest.split_first_chunk::<N>().ok_or_else(|| self.length(field))?;
        self.rest = rest;
        Ok(*head)
    }

    /// Reads exactly `count` bytes.
    pub fn fixed(&mut self, field: &'static str, count: usize) -> Result<&'a [u8], StateError> {
        let (head, rest) = self.rest.split_at_checked(count).ok_or_else(|| self.length(field))?;
        self.rest = rest;
        Ok(head)
    }

    /// Reads a length, at most `limit`, and that many bytes.
    pub fn bytes(&mut self, field: &'static str, limit: usize) -> Result<&'a [u8], StateError> {
        let count = crate::index(self.u32(field)?.into());
        if count > limit {
            Err(self.length(field))
        } else {
            self.fixed(field, count)
        }
    }

    /// Says that nothing must be left.
    pub fn end(self) -> Result<(), StateError> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(self.length("its end"))
        }
    }

    /// Makes the error for a value of `field` that the machine never writes.
    #[must_use]
    pub fn value(&self, field: &'static str) -> StateError {
        StateError::Value {
            section: self.section.to_owned(),
            field,
        }
    }

    fn length(&self, field: &'static str) -> StateError {
        StateError::Length {
            section: self.section.to_owned(),
            field,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Section {
        let mut writer = Writer::new();
        writer.u8(1).u16(2).u32(3).u64(4).bytes(b"five").fixed(&[6; 6]);
        writer.finish("sample", 7)
    }

    fn read(section: &Section) -> Result<(), StateError> {
        let mut reader = Reader::new(section, 7)?;
        reader.bool("a")?;
        reader.u16("b")?;
        reader.u32("c")?;
        reader.u64("d")?;
        reader.bytes("e", 16)?;
        reader.array::<6>("f")?;
        reader.end()
    }

    #[test]
    fn reads_back_what_was_written() {
        assert_eq!(read(&sample()), Ok(()));
    }

    #[test]
    fn refuses_every_other_length() {
        let whole = sample();
        for length in 0..whole.bytes.len() {
            let cut = Section {
                bytes: whole.bytes[..length].to_vec(),
                ..whole.clone()
            };
            assert!(matches!(read(&cut), Err(StateError::Length { .. })), "cut to {length}");
        }
        let mut longer = whole;
        longer.bytes.push(0);
        assert!(matches!(
            read(&longer),
            Err(StateError::Length { field: "its end", .. })
        ));
    }

    #[test]
    fn refuses_another_layout() {
        assert_eq!(
            Reader::new(&sample(), 8).map(|_| ()),
            Err(StateError::Version {
                section: "sample".into(),
                found: 7,
                known: 8
            })
        );
    }

    proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let section = Section { name: "sample".into(), version: 7, bytes };
            let _ = read(&section);
        }
    }
}
