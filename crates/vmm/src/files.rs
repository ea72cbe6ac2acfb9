//! Files that drivers make on the host.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::VmmError;

/// Makes the directory of a file, for us alone.
pub(crate) fn make_directory_of(path: &Path) -> Result<(), VmmError> {
    let Some(parent) = path.parent() else {
        return Ok(());
    };
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(parent)
        .map_err(io_error("cannot make", parent))
}

/// Opens a log that only we can read, and makes it where there is none.
pub(crate) fn append_only(path: &Path) -> Result<File, VmmError> {
    make_directory_of(path)?;
    File::options()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
        .map_err(io_error("cannot open", path))
}

/// The name of a file that belongs to another: that file's, and a suffix.
pub(crate) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Removes a file, if it is there.
pub(crate) fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Says what was being done when the host failed.
pub(crate) fn io_error(context: &str, path: &Path) -> impl FnOnce(io::Error) -> VmmError {
    VmmError::io(format!("{context} {}", path.display()))
}
