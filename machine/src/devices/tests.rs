//! Tests of the devices, seen by a driver that works through registers and rings.

mod block;
mod driver;
mod hostile;
mod net;
mod queues;
mod streams;
mod suppression;
mod telling;
mod transport;
mod wire;
