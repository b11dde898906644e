//! One virtual machine on KVM that can be paused, saved and restored.
