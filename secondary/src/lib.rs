//! The secondary role: a pure protocol core and the shell that runs it.

#![forbid(unsafe_code)]
