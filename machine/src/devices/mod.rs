//! The devices of the machine, all behind the virtio-mmio transport.
