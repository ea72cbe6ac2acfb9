//! Writable layers: one formatted template per size, of which each instance gets a sparse copy.
//!
//! Formatting takes tens of milliseconds and the same bytes result each time, so it is done once per size; the
//! copy moves only the template's data extents (a few hundred KiB), or nothing at all where the file system can
//! share blocks.

use std::collections::HashSet;
use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::AtomicBool;

use hypeman_snapshots::{Digest, disk};
use rustix::fs::{SeekFrom, ioctl_ficlone, seek};

use crate::EngineError;
use crate::blocking::{blocking, blocking_io};
use crate::durable;

/// Smallest layer that ext4 can be made on with room to write.
pub(crate) const MIN_OVERLAY_BYTES: u64 = 16 << 20;

/// Name of the writable layer in a snapshot.
pub(crate) const SNAPSHOT_DISK: &str = "overlay.raw";
/// Beside it, the note that it was compared with its digest since the host booted.
const VERIFIED: &str = "verified";

/// Copies a writable layer that nobody writes to; holes stay holes. `target` must not exist, and survives power loss only
/// after [`settle`] or [`sync_overlay`].
pub(crate) async fn copy(source: PathBuf, target: PathBuf) -> Result<(), EngineError> {
    blocking_io("copy the writable layer", move || {
        let from = File::open(&source)?;
        let bytes = from.metadata()?.len();
        let to = create_new(&target)?;
        let copied = sparse_copy(&from, &to, bytes);
        if copied.is_err() {
            let _ = std::fs::remove_file(&target);
        }
        copied
    })
    .await
}

/// Whether files of this directory's file system can share blocks.
pub(crate) async fn shares_blocks(directory: &Path) -> Result<bool, EngineError> {
    let name = crate::random::hex::<8>().map_err(|error| EngineError::io("random name", error))?;
    let probe = [".probe-a-", ".probe-b-"].map(|prefix| directory.join(format!("{prefix}{name}")));
    blocking_io("look at the file system", move || {
        let try_it = || -> io::Result<bool> {
            create_new(&probe[0])?;
            // Blocks are shared with who may read them, not with who may only write.
            let from = File::open(&probe[0])?;
            Ok(ioctl_ficlone(create_new(&probe[1])?, from).is_ok())
        };
        let able = try_it();
        for path in &probe {
            let _ = std::fs::remove_file(path);
        }
        able
    })
    .await
}

/// Shares the blocks of `source` with a fresh `target`: a copy of one instant that costs nothing.
pub(crate) async fn reflink(source: PathBuf, target: PathBuf) -> Result<(), EngineError> {
    blocking_io("copy the writable layer", move || {
        Ok(ioctl_ficlone(create_new(&target)?, File::open(&source)?)?)
    })
    .await
}

/// Writes back what the page cache holds of a file.
pub(crate) async fn flush(path: PathBuf) -> Result<(), EngineError> {
    blocking_io("flush the writable layer", move || File::open(path)?.sync_data()).await
}

/// A finished copy.
#[derive(Debug, Clone)]
pub(crate) struct Settled {
    /// Bytes that it takes.
    pub(crate) bytes: u64,
    /// [`hypeman_snapshots::DiskDigest::seal`], hex.
    pub(crate) digest: String,
}

/// Makes a finished copy durable and says what it is.
pub(crate) async fn settle(path: PathBuf) -> Result<Settled, EngineError> {
    let bytes = {
        let path = path.clone();
        blocking_io("settle the copied layer", move || {
            let file = File::open(&path)?;
            file.sync_all()?;
            path.parent().map_or(Ok(()), durable::sync_directory)?;
            Ok(file.metadata()?.blocks() * 512)
        })
        .await?
    };
    let digest = blocking(move || seal(&path)).await?;
    Ok(Settled { bytes, digest })
}

/// Says what a disk is that nobody writes to any more, hex, and notes that it was looked at. Reads, so it blocks.
pub(crate) fn seal(path: &Path) -> Result<String, EngineError> {
    let memo = path.with_file_name(VERIFIED);
    let sealed = disk::seal_and_remember(path, &memo, &AtomicBool::new(false))?;
    Ok(sealed.to_hex().to_string())
}

/// How thoroughly a captured disk is compared with its digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Thoroughness {
    /// Not again, if it was since the host booted and nobody wrote to it.
    Once,
    /// Every byte is read.
    Always,
}

/// Refuses a disk that is not what was sealed. Reads, so it blocks.
pub(crate) fn check(
    path: &Path,
    digest: &str,
    thoroughness: Thoroughness,
    cancel: &AtomicBool,
) -> Result<(), EngineError> {
    let expected = Digest::from_hex(digest).map_err(|_| EngineError::damaged("the digest of the disk"))?;
    let memo = path.with_file_name(VERIFIED);
    let memo = (thoroughness == Thoroughness::Once).then_some(memo.as_path());
    Ok(disk::check_seal(path, &expected, memo, cancel)?)
}

/// Bytes that files take on disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Stored {
    /// That nobody else has: they come back with the last name of the files.
    pub(crate) own: u64,
    /// Blocks, or whole files under other names, that others have as well.
    pub(crate) shared: u64,
}

/// What the files of a directory take on disk.
pub(crate) fn stored_bytes(directory: &Path) -> Stored {
    let mut stored = Stored::default();
    let Ok(entries) = std::fs::read_dir(directory) else {
        return stored;
    };
    for entry in entries.flatten() {
        let Ok(metadata) = entry.metadata() else { continue };
        let bytes = metadata.blocks() * 512;
        let shared = if !metadata.is_file() {
            0
        } else if metadata.nlink() > 1 {
            bytes
        } else {
            // What the file system does not tell counts as the file's own.
            let asked = File::open(entry.path()).and_then(|file| hypeman_snapshots::shared_bytes(&file));
            asked.unwrap_or(0).min(bytes)
        };
        stored.shared += shared;
        stored.own += bytes - shared;
    }
    stored
}

fn create_new(target: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(target)
}

/// Removes the templates of sizes that are not `in_use`, and what a crash left half made.
pub(crate) fn sweep_templates(templates: &Path, in_use: &HashSet<u64>) -> io::Result<()> {
    for entry in std::fs::read_dir(templates)? {
        let entry = entry?;
        let name = entry.file_name();
        let size = name
            .to_str()
            .and_then(|name| name.strip_suffix(".ext4")?.parse().ok());
        if entry.file_type()?.is_dir() {
            std::fs::remove_dir_all(entry.path())?;
        } else if size.is_none_or(|size| !in_use.contains(&size)) {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Makes a layer survive power loss: its content, and its name up to the directory of all instances.
pub(crate) fn sync_overlay(overlay: &Path) -> Result<(), EngineError> {
    let sync = || -> io::Result<()> {
        File::open(overlay)?.sync_all()?;
        for directory in overlay.ancestors().skip(1).take(2) {
            durable::sync_directory(directory)?;
        }
        Ok(())
    };
    sync().map_err(|error| EngineError::io("store the writable layer", error))
}

/// Makes the writable layer of an instance at `target`, which must not exist. It survives power loss only after
/// [`sync_overlay`].
pub(crate) fn create_overlay(templates: &Path, bytes: u64, target: &Path) -> Result<(), EngineError> {
    let template = template(templates, bytes)?;
    let copy = || -> io::Result<()> {
        let source = File::open(&template)?;
        let destination = create_new(target)?;
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
    let content = work.with_extension("content");
    let format = || -> io::Result<()> {
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&work)?;
        file.set_len(bytes)?;
        prepare_content(&content)?;
        let output = make_file_system(&work, &content)?;
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
    let made = format();
    let _ = std::fs::remove_dir_all(&content);
    made.map_err(|error| {
        let _ = std::fs::remove_file(&work);
        EngineError::io("format the writable layer", error)
    })?;
    Ok(path)
}

/// The directories that an overlay in a guest wants on its writable layer. The guest's root directory takes owner and
/// mode from the first, and a guest makes what is missing itself: so they are made only where they come out right.
fn prepare_content(content: &Path) -> io::Result<()> {
    std::fs::create_dir(content)?;
    if rustix::process::geteuid().is_root() {
        for directory in ["upper", "work"].map(|name| content.join(name)) {
            std::fs::create_dir(&directory)?;
            std::fs::set_permissions(&directory, Permissions::from_mode(0o755))?;
        }
    }
    Ok(())
}

/// Runs `mkfs.ext4` on a sparse file, with `content` in it.
///
/// What was never written reads as zeroes, so nothing is left for guests to clear: with an old e2fsprogs, which
/// cannot be told so, each would write its inode tables in the background, 1.5 % of the disk.
fn make_file_system(file: &Path, content: &Path) -> io::Result<Output> {
    let make = |extended: &str| {
        Command::new("mkfs.ext4")
            .args(["-q", "-F", "-m", "0", "-E", extended])
            .args(["-J", "size=4", "-L", "overlay", "-d"])
            .args([content, file])
            .stdin(Stdio::null())
            .output()
            .map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => {
                    io::Error::new(error.kind(), "mkfs.ext4 not found: install e2fsprogs")
                }
                _ => error,
            })
    };
    let output = make("assume_storage_prezeroed=1,nodiscard,root_owner=0:0")?;
    if !output.status.success() && String::from_utf8_lossy(&output.stderr).contains("Bad option") {
        return make("lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0");
    }
    Ok(output)
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

    #[tokio::test]
    async fn blocks_are_shared_where_cp_shares_them() {
        let directory = tempfile::tempdir().unwrap();
        let [source, target] = ["source", "target"].map(|name| directory.path().join(name));
        std::fs::write(&source, [1; 8192]).unwrap();
        let copied = Command::new("cp")
            .arg("--reflink=always")
            .args([&source, &target])
            .output()
            .unwrap();
        let able = shares_blocks(directory.path()).await.unwrap();
        assert_eq!(able, copied.status.success());
        assert_eq!(
            reflink(source, directory.path().join("other")).await.is_ok(),
            able
        );
    }

    #[test]
    fn templates_stay_while_an_instance_has_their_size() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("instance/overlay");
        std::fs::create_dir(target.parent().unwrap()).unwrap();
        let templates = directory.path().join("templates");
        std::fs::create_dir(&templates).unwrap();
        for bytes in [32 << 20, 64 << 20] {
            template(&templates, bytes).unwrap();
        }
        std::fs::write(templates.join(".33554432-cut"), "half").unwrap();
        std::fs::create_dir_all(templates.join(".33554432-cut.content/upper")).unwrap();
        create_overlay(&templates, 64 << 20, &target).unwrap();
        sync_overlay(&target).unwrap();
        sweep_templates(&templates, &HashSet::from([64 << 20])).unwrap();
        let left: Vec<_> = std::fs::read_dir(&templates)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(left, ["67108864.ext4"]);
        sweep_templates(&templates, &HashSet::new()).unwrap();
        assert_eq!(std::fs::read_dir(&templates).unwrap().count(), 0);
    }

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
