//! The generation of the machine: a number that changes when the guest goes on from a copy of its past.
//!
//! A guest with Linux's `vmgenid` driver reads it when it is told of an event, and reseeds its random state if
//! it has changed. Whoever writes a new one raises [`super::EVENT_GSI`] afterwards.

use vm_memory::{Bytes, GuestAddress};

use super::GENERATION;
use crate::memory::GuestRam;

/// Writes the generation `id`, which has never been another's.
pub(crate) fn write(ram: &GuestRam, id: [u8; 16]) {
    ram.memory()
        .write_slice(&id, GuestAddress(GENERATION))
        .expect("low memory is RAM");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PageSet;
    use crate::memory::{MEMORY_MIN, Mapping};

    #[test]
    fn lies_in_its_page_which_becomes_dirty() {
        let ram = GuestRam::new(MEMORY_MIN, Mapping::Shared).unwrap();
        let mut written = PageSet::new(ram.pages());
        ram.take_written(&mut written);
        write(&ram, [7; 16]);
        let id: [u8; 16] = ram.memory().read_obj(GuestAddress(GENERATION)).unwrap();
        assert_eq!(id, [7; 16]);
        let mut written = PageSet::new(ram.pages());
        ram.take_written(&mut written);
        assert_eq!(written.iter().collect::<Vec<_>>(), [GENERATION >> 12]);
    }
}
