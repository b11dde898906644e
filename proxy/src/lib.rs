//! Compares what two machines send, holds and releases it, translates TCP sequence numbers; pure.

#![forbid(unsafe_code)]
