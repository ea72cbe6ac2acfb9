//! The guest's kernel and initramfs: found, unpacked, put together, kept.
//!
//! ```text
//! source (vmlinux, vmlinuz, package directory) ──► PVH vmlinux ──► system/kernel/<hash>/vmlinux
//! guest program + modules that the kernel lacks ──► cpio ─────────► system/initramfs/<hash>/initramfs.cpio
//!                                                  both named by ─► system/boot/<id>.json  (BootArtifacts)
//! ```
//!
//! Invariants:
//! - A file under its hash is complete and never changes: written under a temporary name, synced, renamed.
//! - An id names one kernel and one initramfs for ever, so an instance boots again with what it started with.
//! - The initramfs is a pure function of guest program and modules: no times, no host paths, no identity.

mod artifacts;
mod cpio;
mod decompress;
mod elf;
mod error;
mod files;
mod image;
mod modules;
mod source;

pub use artifacts::{BootArtifacts, Kernels};
pub use error::KernelError;
pub use source::{KernelOptions, stored_kernels};
