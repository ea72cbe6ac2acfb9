//! File operations that survive power loss, and the lock of the data directory.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{FlockOperation, flock};

use crate::EngineError;

/// Makes the entries of `directory` durable.
pub(crate) fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

/// Renames within one file system so that the new name survives power loss. The content must be synced already.
pub(crate) fn rename(from: &Path, to: &Path) -> io::Result<()> {
    std::fs::rename(from, to)?;
    to.parent().map_or(Ok(()), sync_directory)
}

/// Removes a tree, or a file, that may not exist. A VMM may have shaped it.
pub(crate) fn remove_tree(path: &Path) -> io::Result<()> {
    hypeman_vmm::remove_tree(path)
}

/// Removes a tree that no record names. What cannot be removed now is left for the next start.
pub(crate) fn discard(path: &Path) {
    if let Err(error) = remove_tree(path) {
        tracing::warn!(path = %path.display(), %error, "left for the next start");
    }
}

/// Holds the data directory for this process until dropped.
#[derive(Debug)]
pub(crate) struct DirectoryLock(#[allow(dead_code)] File);

/// Takes the lock, or says who can't share.
pub(crate) fn lock_directory(path: &Path) -> Result<DirectoryLock, EngineError> {
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(path)
        .map_err(|error| EngineError::io(format!("open {}", path.display()), error))?;
    flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|error| {
        let message = format!(
            "another server uses this data directory ({} is locked)",
            path.display()
        );
        EngineError::Io {
            context: message,
            source: error.into(),
        }
    })?;
    Ok(DirectoryLock(file))
}

#[cfg(test)]
mod tests {
    use hypeman_core::Undo;

    use super::*;

    /// A state as a standby makes it: a directory with a file, which goes unless a record names it in the end.
    fn state_is_kept(is_committed: bool) -> bool {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("standby-0");
        let made = Undo::by(|| discard(&directory));
        std::fs::create_dir(&directory).unwrap();
        std::fs::write(directory.join("devices.state"), "devices").unwrap();
        match is_committed {
            true => made.forget(),
            false => drop(made),
        }
        directory.exists()
    }

    #[test]
    fn a_state_goes_with_what_failed_and_stays_with_its_record() {
        assert!(!state_is_kept(false));
        assert!(state_is_kept(true));
    }

    #[test]
    fn what_was_never_made_is_discarded_in_silence() {
        let parent = tempfile::tempdir().unwrap();
        discard(&parent.path().join("standby-0"));
        assert!(parent.path().exists());
    }
}
