//! Durable files: written under a temporary name, synced, renamed, and their directory synced.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use rustix::fs::SeekFrom;

use crate::error::at;
use crate::{Error, Result};

/// Writes a small new file beside a large one and syncs both. At the same time: a journal then writes them together.
pub(crate) fn write_beside(path: &Path, bytes: &[u8], large: &File, large_path: &Path) -> Result<()> {
    let mut small = File::create_new(path).map_err(at("create", path))?;
    small.write_all(bytes).map_err(at("write", path))?;
    std::thread::scope(|scope| {
        let other = scope.spawn(|| large.sync_all().map_err(at("sync", large_path)));
        let own = small.sync_all().map_err(at("sync", path));
        own.and(
            other
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
        )
    })
}

/// Writes a new file and syncs it.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = File::create_new(path).map_err(at("create", path))?;
    file.write_all(bytes).map_err(at("write", path))?;
    file.sync_all().map_err(at("sync", path))
}

/// Reads a whole file that must not be larger than `limit` bytes. `None` when it does not exist.
pub(crate) fn read(path: &Path, limit: u64) -> Result<Option<Vec<u8>>> {
    let Some(mut file) = open(path)? else {
        return Ok(None);
    };
    let length = file.metadata().map_err(at("inspect", path))?.len();
    if length > limit {
        return Err(Error::Invalid(format!(
            "{} has {length} bytes; at most {limit} make sense",
            path.display()
        )));
    }
    let mut bytes = Vec::with_capacity(usize::try_from(length).unwrap_or_default());
    (&mut file)
        .take(limit)
        .read_to_end(&mut bytes)
        .map_err(at("read", path))?;
    Ok(Some(bytes))
}

/// Where a file has data, in order; everything else is holes.
pub(crate) fn data_extents(file: &File) -> io::Result<Vec<Range<u64>>> {
    let mut extents = Vec::new();
    let mut position = 0;
    loop {
        let start = match rustix::fs::seek(file, SeekFrom::Data(position)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => return Ok(extents),
            Err(error) => return Err(error.into()),
        };
        position = rustix::fs::seek(file, SeekFrom::Hole(start))?;
        extents.push(start..position);
    }
}

/// Opens a file for reading. `None` when it does not exist.
pub(crate) fn open(path: &Path) -> Result<Option<File>> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(at("open", path)(error)),
    }
}

/// Makes new and removed names of a directory durable.
pub(crate) fn sync_directory(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(at("sync", path))
}

/// Moves a directory of synced files to its final name, durably.
pub(crate) fn rename_directory(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(at("rename", from))?;
    // Its own entries last: until then nobody was told of it, and one that lacks some of them is swept.
    std::thread::scope(|scope| {
        let above = scope.spawn(|| to.parent().map_or(Ok(()), sync_directory));
        let own = sync_directory(to);
        own.and(
            above
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
        )
    })
}

/// Moves a synced file to its final name, durably.
pub(crate) fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(at("rename", from))?;
    to.parent().map_or(Ok(()), sync_directory)
}

/// Removes a file; one that is gone already is as good.
pub(crate) fn remove(path: &Path) -> Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(at("remove", path)(error)),
    }
}

/// Removes a directory with everything in it; one that is gone already is as good.
pub(crate) fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(at("remove", path)(error)),
    }
}

/// A directory for work in progress. It goes with this value, unless it was renamed before.
pub(crate) struct Workspace(PathBuf);

impl Workspace {
    pub(crate) fn create(path: PathBuf) -> Result<Self> {
        remove_tree(&path)?;
        fs::create_dir(&path).map_err(at("create", &path))?;
        Ok(Self(path))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        // What cannot be removed now is removed when the store is opened next.
        let _ = remove_tree(&self.0);
    }
}
