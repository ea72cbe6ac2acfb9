//! QEMU.
mod qmp;
