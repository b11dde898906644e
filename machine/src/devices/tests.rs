//! Tests of the devices with a driver's view of their queues.
