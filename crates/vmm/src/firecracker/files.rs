//! What lies in the runtime directory of a machine.
//!
//! ```text
//! memory.json            where guest memory lies in the process
//! vmm/                   Firecracker's own, in which it works
//!   api.sock             its interface
//!   v.sock  v.sock_P     the guest's sockets: towards the guest, and from it to port P
//!   disk0 disk1 …        links to the disks
//!   machine.json         what is to boot
//!   state                device state on its way in or out
//!   hold                 a pipe at which Firecracker waits (see `hold.rs`)
//! ```

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use hypeman_guest_api::LOG_VSOCK_PORT;
use serde_json::Value;

use crate::files::io_error;
use crate::memory::Segment;
use crate::own_directory::OwnDirectory;
use crate::{MachineSpec, VmmError};

const API_SOCKET: &str = "api.sock";
pub(super) const GUEST_SOCKET: &str = "v.sock";
pub(super) const CONFIGURATION: &str = "machine.json";
pub(super) const STATE: &str = "state";
pub(super) const HOLD: &str = "hold";
const MEMORY: &str = "memory.json";

/// Name of a disk as Firecracker knows it.
pub(super) fn disk(index: usize) -> String {
    format!("disk{index}")
}

/// The files of one machine.
#[derive(Debug, Clone)]
pub(super) struct Files {
    directory: PathBuf,
    own: OwnDirectory,
}

impl Files {
    pub(super) fn of(directory: &Path) -> Self {
        Self {
            directory: directory.to_owned(),
            own: OwnDirectory::of(directory),
        }
    }

    /// Where Firecracker works.
    pub(super) fn own(&self) -> &OwnDirectory {
        &self.own
    }

    pub(super) fn api_socket(&self) -> PathBuf {
        self.own.join(API_SOCKET)
    }

    pub(super) fn guest_socket(&self) -> PathBuf {
        self.own.join(GUEST_SOCKET)
    }

    pub(super) fn log_socket(&self) -> PathBuf {
        self.own.join(&format!("{GUEST_SOCKET}_{LOG_VSOCK_PORT}"))
    }

    pub(super) fn hold(&self) -> PathBuf {
        self.own.join(HOLD)
    }

    /// Removes what an earlier machine left and makes the links to the disks.
    pub(super) fn prepare(&self, spec: &MachineSpec) -> Result<(), VmmError> {
        self.own.make()?;
        for (index, disk_of_spec) in spec.disks.iter().enumerate() {
            let link = self.own.join(&disk(index));
            symlink(&disk_of_spec.path, &link).map_err(io_error("cannot make", &link))?;
        }
        Ok(())
    }

    /// Removes everything of a machine that is gone.
    pub(super) fn remove(&self) {
        let _ = self.own.remove();
        let _ = fs::remove_file(self.directory.join(MEMORY));
    }

    pub(super) fn write_configuration(&self, configuration: &Value) -> Result<(), VmmError> {
        self.own
            .write(CONFIGURATION, configuration.to_string().as_bytes())
    }

    pub(super) fn write_state(&self, state: &[u8]) -> Result<(), VmmError> {
        self.own.write(STATE, state)
    }

    /// The state was loaded, or handed on: nobody needs the file.
    pub(super) fn forget_state(&self) {
        let _ = self.own.forget(STATE);
    }

    /// For servers to come.
    pub(super) fn remember_memory(&self, segments: &[Segment]) -> Result<(), VmmError> {
        let path = self.directory.join(MEMORY);
        let text = serde_json::to_vec(segments).unwrap_or_default();
        fs::write(&path, text).map_err(io_error("cannot write", &path))
    }

    pub(super) fn remembered_memory(&self) -> Option<Vec<Segment>> {
        serde_json::from_slice(&fs::read(self.directory.join(MEMORY)).ok()?).ok()
    }

    /// Lets a machine answer again that a server held when it died.
    pub(super) fn let_go_of_a_hold(&self) {
        super::hold::let_go(&self.hold());
    }
}
