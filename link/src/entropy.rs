//! Random bytes of the host, and what is derived from them.

use checkpoint::wire::Session;
use storage::verify::HashKey;

/// Fills `bytes` from the kernel's generator.
///
/// # Panics
/// Panics if the kernel has none to give: nothing here is safe to run without.
pub fn fill(bytes: &mut [u8]) {
    let mut filled = 0;
    while filled < bytes.len() {
        match rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty()) {
            Ok(count) => filled += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => panic!("the kernel gives no random bytes: {error}"),
        }
    }
}

/// Returns a number that nobody else knows.
///
/// # Panics
/// Panics if the kernel has none to give.
#[must_use]
pub fn secret() -> u64 {
    let mut bytes = [0; 8];
    fill(&mut bytes);
    u64::from_ne_bytes(bytes)
}

/// Returns the key of a pairing's disk comparison: both sides know the session's number, and no guest can.
#[must_use]
pub fn hash_key(session: Session) -> HashKey {
    let mut key = [0; 32];
    key[..16].copy_from_slice(&session.0.to_le_bytes());
    HashKey(key)
}
