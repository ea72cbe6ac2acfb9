//! A QEMU in the jail.
//!
//! ```text
//!  disks, logs ─► opened by us ─► sets of descriptors     kernel, initramfs ─► shown, read-only
//!  TAP         ─► opened by us                            pid file          ─► shown, its own
//!  memory      ─► opened by us when it asks, for reading
//! ```
//!
//! So it sees nothing of the data directory but the files that it boots from, and none of them changes its owner. What
//! comes later, copies of disks and fresh logs, comes as descriptors too (see [`super::control::Lent`]).

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hypeman_jail::{Jail, JailSpec, Lent, Memory, Show};

use super::arguments::{Handed, PID_FILE};
use crate::files::{append_only, io_error};
use crate::process::{Confinement, limits, program_files};
use crate::{Accelerator, MachineSpec, MemoryBacking, VmmError, tap};

/// Device states and the like.
pub(super) const OTHER_FILES: u64 = 64 << 20;

/// What a start needs instead of the names of files.
pub(super) struct Confined {
    /// The machine, with the names that things have for this QEMU.
    pub(super) spec: MachineSpec,
    pub(super) handed: Handed,
    /// To be kept open for it.
    pub(super) keep: Vec<OwnedFd>,
    pub(super) confinement: Confinement,
}

/// Opens everything. `boots`: it reads kernel and initramfs.
pub(super) fn prepare(
    jail: &Arc<Jail>,
    program: &Path,
    machine: &MachineSpec,
    accelerator: Accelerator,
    boots: bool,
) -> Result<Confined, VmmError> {
    let mut spec = machine.clone();
    let mut keep: Vec<OwnedFd> = Vec::new();
    let mut handed = Handed::default();
    let mut hand_over = |file: File, path: &mut PathBuf| {
        handed.files.push(file.as_raw_fd());
        *path = PathBuf::from(format!("/dev/fdset/{}", handed.files.len()));
        keep.push(file.into());
    };
    for disk in &mut spec.disks {
        let file = File::options()
            .read(true)
            .write(!disk.read_only)
            .open(&disk.path)
            .map_err(|error| {
                // What QEMU itself would say of it.
                VmmError::StartFailed(format!("cannot open {}: {error}", disk.path.display()))
            })?;
        hand_over(file, &mut disk.path);
    }
    hand_over(append_only(&machine.workload_log)?, &mut spec.workload_log);
    hand_over(append_only(&machine.vmm_log)?, &mut spec.vmm_log);
    if let Some(nic) = &machine.nic {
        let tap = tap::open(&nic.tap)?;
        handed.tap = Some(tap.as_raw_fd());
        keep.push(tap);
    }
    let lent = match &machine.memory {
        MemoryBacking::Private(path) => Some(Lent::Memory(Memory {
            file: File::open(path).map_err(io_error("cannot open", path))?,
            path: path.clone(),
        })),
        MemoryBacking::Anonymous | MemoryBacking::Served(_) => None,
    };

    let pid_file = machine.runtime_directory.join(PID_FILE);
    append_only(&pid_file)?;
    let mut show = vec![Show::own(pid_file)];
    show.extend(program_files(program));
    if boots {
        show.extend([&machine.kernel, &machine.initramfs].map(Show::shared));
    }
    let devices = match accelerator {
        Accelerator::Kvm => vec![PathBuf::from("/dev/kvm")],
        Accelerator::Tcg => Vec::new(),
    };
    let spec_of_jail = JailSpec {
        show,
        devices,
        limits: limits(jail.options(), machine, OTHER_FILES),
    };
    Ok(Confined {
        spec,
        handed,
        keep,
        confinement: Confinement {
            jail: Arc::clone(jail),
            spec: spec_of_jail,
            lent,
        },
    })
}
