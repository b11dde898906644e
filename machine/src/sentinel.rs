//! A process without guest memory that holds connections, so that a death is seen at once.
