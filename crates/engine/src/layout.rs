//! Where everything lies below the data directory.
//!
//! ```text
//!  data_directory/
//!    lock                         held by the one server
//!    metadata.db                  what exists and what was intended
//!    blobs/                       OCI blobs by digest, upload sessions
//!    images/<hex>/rootfs.erofs    root disks by manifest digest, or by their own where a snapshot brought them
//!    images/.work/                conversions under way; emptied at start
//!    instances/<id>/overlay.raw   writable layer      logs/{app,vmm,hypeman}.log[.N]
//!    instances/<id>/standby-*/    device state and manifest of an instance in standby
//!    snapshots/<id>/              device state, manifest and writable layer of a snapshot
//!    memory/                      memory images, shared by snapshots and instances in standby
//!    system/{kernel,initramfs}/   boot artifacts      system/overlays/<bytes>.ext4 templates
//!  runtime directory/<id>/        sockets of a VMM; below the data directory where paths are short enough
//! ```

use std::fs::DirBuilder;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::EngineError;

/// Longest runtime root that leaves room for `/<24 characters>/<socket name>` in a socket address.
const MAX_RUNTIME_ROOT: usize = 60;

/// Paths of one server.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    root: PathBuf,
    runtime: PathBuf,
}

impl Layout {
    /// Makes the directories that must exist, private to the server's user.
    pub(crate) fn create(root: &Path) -> Result<Self, EngineError> {
        make_private(root)?;
        let root = root
            .canonicalize()
            .map_err(|error| EngineError::io("data directory", error))?;
        let runtime = runtime_of(&root);
        let layout = Self { root, runtime };
        for directory in [
            layout.runtime.clone(),
            layout.root.join("blobs"),
            layout.images(),
            layout.image_work(),
            layout.instances(),
            layout.snapshots(),
            layout.memory(),
            layout.system(),
            layout.overlay_templates(),
        ] {
            make_private(&directory)?;
        }
        Ok(layout)
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn database(&self) -> PathBuf {
        self.root.join("metadata.db")
    }

    pub(crate) fn blobs(&self) -> PathBuf {
        self.root.join("blobs")
    }

    pub(crate) fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    pub(crate) fn image_work(&self) -> PathBuf {
        self.images().join(".work")
    }

    /// Directory of the root disk for `digest` (`sha256:<hex>`).
    pub(crate) fn image(&self, digest: &str) -> PathBuf {
        self.images().join(digest.rsplit(':').next().unwrap_or(digest))
    }

    pub(crate) fn root_disk(&self, digest: &str) -> PathBuf {
        self.image(digest).join("rootfs.erofs")
    }

    pub(crate) fn instances(&self) -> PathBuf {
        self.root.join("instances")
    }

    pub(crate) fn instance(&self, id: &str) -> PathBuf {
        self.instances().join(id)
    }

    /// Writable layer of an instance.
    pub(crate) fn overlay(&self, id: &str, generation: u32) -> PathBuf {
        let name = match generation {
            0 => "overlay.raw".to_owned(),
            later => format!("overlay.{later}.raw"),
        };
        self.instance(id).join(name)
    }

    /// Device state and manifest of an instance in standby.
    pub(crate) fn standby(&self, id: &str, directory: &str) -> PathBuf {
        self.instance(id).join(directory)
    }

    pub(crate) fn snapshots(&self) -> PathBuf {
        self.root.join("snapshots")
    }

    pub(crate) fn snapshot(&self, id: &str) -> PathBuf {
        self.snapshots().join(id)
    }

    /// Memory images of snapshots and of instances in standby.
    pub(crate) fn memory(&self) -> PathBuf {
        self.root.join("memory")
    }

    pub(crate) fn logs(&self, id: &str) -> PathBuf {
        self.instance(id).join("logs")
    }

    pub(crate) fn runtime(&self) -> &Path {
        &self.runtime
    }

    pub(crate) fn instance_runtime(&self, id: &str) -> PathBuf {
        self.runtime.join(id)
    }

    pub(crate) fn system(&self) -> PathBuf {
        self.root.join("system")
    }

    pub(crate) fn overlay_templates(&self) -> PathBuf {
        self.system().join("overlays")
    }
}

/// The runtime directory of a data directory, whether that exists yet or not.
pub(crate) fn runtime_of(root: &Path) -> PathBuf {
    let root = root.canonicalize().unwrap_or_else(|_| root.to_owned());
    let below = root.join("run");
    match below.as_os_str().len() <= MAX_RUNTIME_ROOT {
        true => below,
        false => short_runtime(&root),
    }
}

/// A short directory that two servers with different data never share.
fn short_runtime(root: &Path) -> PathBuf {
    let digest = blake3::hash(root.as_os_str().as_encoded_bytes()).to_hex();
    let user = rustix::process::geteuid().as_raw();
    let base = if user == 0 {
        PathBuf::from("/run")
    } else {
        std::env::temp_dir()
    };
    base.join(format!("hypeman-{user}-{}", &digest[..12]))
}

/// Makes `directory` with mode 0700; an existing one must be ours.
pub(crate) fn make_private(directory: &Path) -> Result<(), EngineError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(|error| match error.kind() {
            // Clients hear of a full disk, and not where on the host it lies.
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                EngineError::io("create a directory", error)
            }
            _ => EngineError::io(format!("create {}", directory.display()), error),
        })?;
    let metadata = std::fs::symlink_metadata(directory)
        .map_err(|error| EngineError::io(format!("inspect {}", directory.display()), error))?;
    let ours = metadata.is_dir() && metadata.uid() == rustix::process::geteuid().as_raw();
    if ours || metadata.is_symlink() && !directory.starts_with(std::env::temp_dir()) {
        Ok(())
    } else {
        Err(EngineError::io(
            format!("{} belongs to another user", directory.display()),
            std::io::ErrorKind::PermissionDenied.into(),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_fit_however_deep_the_data_directory_lies() {
        let base = tempfile::tempdir().unwrap();
        let deep = base
            .path()
            .join("a-rather-long-name".repeat(3))
            .join("another-long-name".repeat(3));
        let layout = Layout::create(&deep).unwrap();
        let socket = layout
            .instance_runtime("abcdefghijklmnopqrstuvwx")
            .join("monitor.sock");
        assert_eq!(
            runtime_of(&deep),
            layout.runtime(),
            "it is found from outside too"
        );
        assert!(socket.as_os_str().len() < 108, "{}", socket.display());
        std::fs::remove_dir_all(layout.runtime()).unwrap();
    }
}
