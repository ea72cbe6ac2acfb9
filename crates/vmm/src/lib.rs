//! Virtual machine monitors behind one small trait.
//!
//! A driver translates a [`MachineSpec`] (plain data) into one VMM's command line and talks to that VMM's own
//! socket. Drivers know nothing of instances, images or networks. What a VMM lacks is a typed
//! [`VmmError::Unsupported`], never a silent skip.
//!
//! Invariants:
//! - A VMM process is its own session leader and survives the server; [`Vmm::adopt`] takes it back.
//! - A process is never signalled by number alone: [`ProcessIdentity`] pins pid, start time and boot.

mod binaries;
mod blocking;
mod cloud_hypervisor;
mod console;
mod disk_copies;
mod error;
mod files;
mod firecracker;
mod gate;
mod kernel_arguments;
mod machine;
mod memory;
mod own_directory;
mod probe;
mod process;
mod qemu;
mod ranges;
mod registry;
mod rest;
mod socket;
mod spec;
mod tap;
mod tree;
mod turn;
mod workload_log;

pub use error::VmmError;
pub use hypeman_jail::{Item as JailItem, Jail, JailOptions, Mode as JailMode, Report as JailReport};
pub use machine::{
    Adjust, Capabilities, DiskCopies, DiskCopy, ExitCause, ExitKind, Feature, Machine, MachineStats, Patch,
    Restore, RunState, StateIdentity, Vmm, VmmKind,
};
pub use memory::{CopyRoom, GuestMemory};
pub use process::{ProcessIdentity, boot_id};
pub use registry::{VmmOptions, Vmms};
pub use spec::{Accelerator, AgentChannel, Disk, IoLimit, MachineSpec, MemoryBacking, Nic};
pub use tree::remove_tree;
pub use workload_log::WorkloadLog;
