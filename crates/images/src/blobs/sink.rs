//! Where bytes of an unfinished blob go: a locked file, hashed as it grows.
//!
//! A sink does blocking work and is moved into blocking tasks; async code never touches the file itself.

use std::fs;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use sha2::Digest as _;

use super::{private_options, sync_directory};
use crate::digest::Digest;

/// An open, locked file and the hash of everything in it.
pub(super) struct Sink {
    file: fs::File,
    hasher: sha2::Sha256,
    written: u64,
    /// Bytes of the disk that writes leave free.
    reserve: u64,
}

impl Sink {
    /// Creates a file that must not exist.
    pub(super) fn create(path: &Path, reserve: u64) -> io::Result<Self> {
        let file = private_options().create_new(true).open(path)?;
        rustix::fs::flock(&file, FlockOperation::LockExclusive)?;
        Ok(Self {
            file,
            hasher: sha2::Sha256::new(),
            written: 0,
            reserve,
        })
    }

    /// Continues a file, hashing what it holds; creates it when asked and missing. Content beyond `limit` is cut.
    pub(super) fn resume(path: &Path, create: bool, limit: u64, reserve: u64) -> io::Result<Self> {
        let file = private_options().create(create).truncate(false).open(path)?;
        // Waits for a write that a cancelled task may still be doing.
        rustix::fs::flock(&file, FlockOperation::LockExclusive)?;
        if file.metadata()?.len() > limit {
            file.set_len(0)?;
        }
        let mut sink = Self {
            file,
            hasher: sha2::Sha256::new(),
            written: 0,
            reserve,
        };
        let mut buffer = vec![0; 256 << 10];
        loop {
            match sink.file.read(&mut buffer) {
                Ok(0) => return Ok(sink),
                Ok(count) => {
                    sink.hasher.update(&buffer[..count]);
                    sink.written += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    pub(super) fn written(&self) -> u64 {
        self.written
    }

    /// Appends bytes, unless that would take what the disk keeps for others.
    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.reserve > 0 && !bytes.is_empty() {
            let disk = rustix::fs::fstatvfs(&self.file)?;
            let free = disk.f_bavail.saturating_mul(disk.f_frsize);
            if free < self.reserve.saturating_add(bytes.len() as u64) {
                let kept = format!(
                    "the disk keeps a reserve of {} MiB (limits.min_free_disk)",
                    self.reserve >> 20
                );
                return Err(io::Error::new(io::ErrorKind::StorageFull, kept));
            }
        }
        self.file.write_all(bytes)?;
        self.hasher.update(bytes);
        self.written += bytes.len() as u64;
        Ok(())
    }

    /// Forgets everything written so far.
    pub(super) fn restart(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        self.hasher = sha2::Sha256::new();
        self.written = 0;
        Ok(())
    }

    /// The digest of the content so far.
    pub(super) fn digest(&self) -> Digest {
        Digest::from_hasher(self.hasher.clone())
    }

    /// Syncs the file, gives it its final name, and syncs the directory.
    pub(super) fn commit(self, from: &Path, to: &PathBuf) -> io::Result<()> {
        self.file.sync_all()?;
        fs::rename(from, to)?;
        match to.parent() {
            Some(parent) => sync_directory(parent),
            None => Ok(()),
        }
    }
}
