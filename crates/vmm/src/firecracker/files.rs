//! What lies in the runtime directory of a machine.
//!
//! ```text
//! api.sock             Firecracker's interface
//! v.sock  v.sock_P     the guest's sockets: towards the guest, and from it to port P
//! disk0 disk1 …        links to the disks
//! machine.json         what is to boot
//! state                device state on its way in or out
//! hold                 a pipe at which Firecracker waits (see `hold.rs`)
//! memory.json          where guest memory lies in the process
//! ```

use std::fs::{self, File};
use std::io;
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::files::io_error;
use crate::memory::Segment;
use crate::{MachineSpec, VmmError};
use hypeman_guest_api::LOG_VSOCK_PORT;

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
}

impl Files {
    pub(super) fn of(directory: &Path) -> Self {
        Self {
            directory: directory.to_owned(),
        }
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    pub(super) fn api_socket(&self) -> PathBuf {
        self.directory.join(API_SOCKET)
    }

    pub(super) fn guest_socket(&self) -> PathBuf {
        self.directory.join(GUEST_SOCKET)
    }

    pub(super) fn log_socket(&self) -> PathBuf {
        self.directory.join(format!("{GUEST_SOCKET}_{LOG_VSOCK_PORT}"))
    }

    pub(super) fn state(&self) -> PathBuf {
        self.directory.join(STATE)
    }

    pub(super) fn hold(&self) -> PathBuf {
        self.directory.join(HOLD)
    }

    /// Removes what an earlier machine left and makes the links to the disks. The guard removes all again unless
    /// it is told to forget it.
    pub(super) fn prepare(&self, spec: &MachineSpec) -> Result<Guard, VmmError> {
        let guard = Guard(Some(self.clone()));
        self.remove();
        for (index, disk_of_spec) in spec.disks.iter().enumerate() {
            let link = self.directory.join(disk(index));
            symlink(&disk_of_spec.path, &link).map_err(io_error("cannot make", &link))?;
        }
        Ok(guard)
    }

    /// Removes everything of a machine that is gone.
    pub(super) fn remove(&self) {
        let Ok(entries) = fs::read_dir(&self.directory) else {
            return;
        };
        let ours = |name: &str| {
            name.starts_with("disk")
                || name.starts_with(GUEST_SOCKET)
                || [API_SOCKET, CONFIGURATION, STATE, HOLD, MEMORY].contains(&name)
        };
        for entry in entries.flatten() {
            if entry.file_name().to_str().is_some_and(ours) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    pub(super) fn write_configuration(&self, configuration: &Value) -> Result<(), VmmError> {
        self.write(CONFIGURATION, configuration.to_string().as_bytes())
    }

    pub(super) fn write_state(&self, state: &[u8]) -> Result<(), VmmError> {
        self.write(STATE, state)
    }

    /// The state was loaded, or handed on: nobody needs the file.
    pub(super) fn forget_state(&self) {
        let _ = fs::remove_file(self.state());
    }

    /// For servers to come.
    pub(super) fn remember_memory(&self, segments: &[Segment]) -> Result<(), VmmError> {
        let text = serde_json::to_vec(segments).unwrap_or_default();
        self.write(MEMORY, &text)
    }

    pub(super) fn remembered_memory(&self) -> Option<Vec<Segment>> {
        serde_json::from_slice(&fs::read(self.directory.join(MEMORY)).ok()?).ok()
    }

    /// Lets a machine answer again that a server held when it died.
    pub(super) fn let_go_of_a_hold(&self) {
        super::hold::let_go(&self.hold());
    }

    fn write(&self, name: &str, content: &[u8]) -> Result<(), VmmError> {
        let path = self.directory.join(name);
        let write = || -> io::Result<()> {
            let mut file = File::options()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&path)?;
            file.write_all(content)
        };
        write().map_err(io_error("cannot write", &path))
    }
}

/// Removes the files of a start that failed.
#[derive(Debug)]
pub(super) struct Guard(Option<Files>);

impl Guard {
    /// The start succeeded.
    pub(super) fn forget(mut self) {
        self.0 = None;
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(files) = &self.0 {
            files.remove();
        }
    }
}
