//! Fuzzes the translator and the address book; see `../src/lib.rs`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tandem_fuzz::picture(data));
