//! Files that are either whole or not there.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::KernelError;

/// Ending of a file that is being written; one that is found at start is left over from a crash.
pub(crate) const TEMPORARY: &str = "tmp";

/// Writes a file so that it appears under its name only when it is whole and on the disk.
pub(crate) fn write_durably(path: &Path, bytes: &[u8]) -> Result<(), KernelError> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(directory).map_err(KernelError::io("make", directory))?;
    let temporary = path.with_extension(format!("{}.{TEMPORARY}", std::process::id()));
    let write = || -> std::io::Result<()> {
        let mut file = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o644)
            .open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        File::open(directory)?.sync_all()?;
        if let Some(parent) = directory.parent() {
            File::open(parent)?.sync_all()?;
        }
        Ok(())
    };
    write().map_err(|error| {
        let _ = fs::remove_file(&temporary);
        KernelError::io("write", path)(error)
    })
}
