//! The tools that the tests share.
