//! Writable layers: one formatted template per size, of which each instance gets a sparse copy.
//!
//! Formatting takes tens of milliseconds and the same bytes result each time, so it is done once per size; the
//! copy moves only the template's data extents (a few hundred KiB), or nothing at all where the file system can
//! share blocks.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{SeekFrom, ioctl_ficlone, seek};

use crate::EngineError;
use crate::durable;

/// Smallest layer that ext4 can be made on with room to write.
pub(crate) const MIN_OVERLAY_BYTES: u64 = 16 << 20;

/// Makes the writable layer of an instance at `target`, which must not exist.
pub(crate) fn create_overlay(templates: &Path, bytes: u64, target: &Path) -> Result<(), EngineError> {
    let template = template(templates, bytes)?;
    let copy = || -> io::Result<()> {
        let source = File::open(&template)?;
        let destination = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(target)?;
        sparse_copy(&source, &destination, bytes)
    };
    copy().map_err(|error| {
        // Half a copy under this name would be taken for the layer by the next start.
        if error.kind() != io::ErrorKind::AlreadyExists {
            let _ = std::fs::remove_file(target);
        }
        EngineError::io("create the writable layer", error)
    })
}

fn template(templates: &Path, bytes: u64) -> Result<PathBuf, EngineError> {
    let path = templates.join(format!("{bytes}.ext4"));
    if path.exists() {
        return Ok(path);
    }
    // Several creates may race; each formats its own file and the last rename wins with equal content.
    let work = tempfile_in(templates, bytes)?;
    let format = || -> io::Result<()> {
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&work)?;
        file.set_len(bytes)?;
        let output = Command::new("mkfs.ext4")
            .args([
                "-q",
                "-F",
                "-m",
                "0",
                "-E",
                "lazy_itable_init=1,lazy_journal_init=1,nodiscard",
            ])
            .args(["-J", "size=4", "-L", "overlay"])
            .arg(&work)
            .stdin(Stdio::null())
            .output()
            .map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => {
                    io::Error::new(error.kind(), "mkfs.ext4 not found: install e2fsprogs")
                }
                _ => error,
            })?;
        if !output.status.success() {
            let message = String::from_utf8_lossy(&output.stderr).into_owned();
            let kind = if message.contains("No space") {
                io::ErrorKind::StorageFull
            } else {
                io::ErrorKind::Other
            };
            return Err(io::Error::new(kind, format!("mkfs.ext4: {}", message.trim())));
        }
        file.sync_all()?;
        durable::rename(&work, &path)
    };
    format().map_err(|error| {
        let _ = std::fs::remove_file(&work);
        EngineError::io("format the writable layer", error)
    })?;
    Ok(path)
}

fn tempfile_in(templates: &Path, bytes: u64) -> Result<PathBuf, EngineError> {
    let unique = crate::random::hex::<8>().map_err(|error| EngineError::io("random name", error))?;
    Ok(templates.join(format!(".{bytes}-{unique}")))
}

/// Copies data extents only; holes stay holes. `copy_file_range` over a whole file would fill them.
fn sparse_copy(source: &File, destination: &File, bytes: u64) -> io::Result<()> {
    if ioctl_ficlone(destination, source).is_ok() {
        return Ok(());
    }
    destination.set_len(bytes)?;
    let mut position = 0;
    while position < bytes {
        let start = match seek(source, SeekFrom::Data(position)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = seek(source, SeekFrom::Hole(start))?;
        let (mut from, mut to) = (start, start);
        while from < end {
            let length = usize::try_from(end - from).unwrap_or(usize::MAX);
            match rustix::fs::copy_file_range(source, Some(&mut from), destination, Some(&mut to), length) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(error) => return Err(error.into()),
            }
        }
        position = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_large_layer_costs_little_and_is_a_clean_file_system() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["a", "b"] {
            let target = directory.path().join(name);
            create_overlay(directory.path(), 10 << 30, &target).unwrap();
            let metadata = std::fs::metadata(&target).unwrap();
            assert_eq!(metadata.len(), 10 << 30);
            assert!(metadata.blocks() * 512 < 32 << 20, "{} blocks", metadata.blocks());
            let check = Command::new("e2fsck")
                .args(["-fn"])
                .arg(&target)
                .output()
                .unwrap();
            assert!(
                check.status.success(),
                "{}",
                String::from_utf8_lossy(&check.stdout)
            );
        }
        let leftovers = std::fs::read_dir(directory.path()).unwrap().count();
        assert_eq!(leftovers, 3, "two copies and one template");
    }
}
