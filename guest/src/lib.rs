//! The bundled freestanding guest: its interface to the machine and its services.

#![cfg_attr(not(test), no_std)]

pub mod abi;
