//! The pair's disks: epoch buffers, overlay, journalled commit, image files, durable records, the witness directory.

#![forbid(unsafe_code)]
