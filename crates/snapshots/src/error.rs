//! What can go wrong, and which part of a snapshot it concerns.

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::MemoryId;

/// The result of everything here.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an operation failed. Failed operations leave nothing behind.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The image was never captured here, or was deleted.
    #[error("memory image {0} does not exist")]
    NotFound(MemoryId),
    /// The name is taken.
    #[error("memory image {0} exists already")]
    Exists(MemoryId),
    /// Something else works on the image that cannot go together with this.
    #[error("memory image {0} is in use; try again when that has ended")]
    Busy(MemoryId),
    /// The caller asked for the end.
    #[error("cancelled")]
    Cancelled,
    /// Bytes are not those that were stored. Nothing of the part was handed out.
    #[error("{part} is damaged: {reason}")]
    Damaged {
        /// What is damaged.
        part: Part,
        /// How that showed.
        reason: &'static str,
    },
    /// Written by a release with another format.
    #[error(
        "{part} has format version {found}; this release reads version {known}: use the release that wrote it"
    )]
    Version {
        /// What has the wrong version.
        part: Part,
        /// Its version.
        found: u32,
        /// The version that is known here.
        known: u32,
    },
    /// A request that can never succeed.
    #[error("{0}")]
    Invalid(String),
    /// The guest's memory could not be read.
    #[error("guest memory at {offset:#x} cannot be read: {source}")]
    Source {
        /// Offset in guest RAM, bytes.
        offset: u64,
        /// What the source said.
        source: io::Error,
    },
    /// Memory could not be written into the guest.
    #[error("guest memory at {offset:#x} cannot be written: {source}")]
    Target {
        /// Offset in guest RAM, bytes.
        offset: u64,
        /// What the target said.
        source: io::Error,
    },
    /// An exported snapshot could not be read from or written to where it comes from or goes to.
    #[error("the exported snapshot cannot be transferred: {0}")]
    Stream(#[source] io::Error),
    /// The host's file system refused.
    #[error("cannot {action} {path}: {source}", path = .path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

impl Error {
    /// Whether room on the disk is all that is missing.
    #[must_use]
    pub fn is_no_space(&self) -> bool {
        let Self::Io { source, .. } = self else {
            return false;
        };
        matches!(
            source.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
        )
    }

    /// Whether stored bytes are wrong or of another version, so that trying again cannot help.
    #[must_use]
    pub fn is_damage(&self) -> bool {
        matches!(self, Self::Damaged { .. } | Self::Version { .. })
    }
}

/// Makes an error of the kernel one of ours.
pub(crate) fn at(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { action, path, source }
}

/// One of the two forms of stored memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// A sparse file that machines map.
    Raw,
    /// Compressed frames.
    Framed,
}

/// A part of a snapshot that can be damaged on its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// The index of a memory image.
    Index(MemoryId),
    /// The table of the frames of a memory image.
    FrameTable(MemoryId),
    /// Pages of a memory image.
    Memory {
        /// The image that owns the pages.
        image: MemoryId,
        /// Where they are in guest RAM, bytes.
        range: Range<u64>,
        /// The form that was read.
        form: Form,
    },
    /// The manifest of a snapshot.
    Manifest,
    /// The state of a machine's devices.
    DeviceState,
    /// The digest that belongs to a disk.
    DiskDigest,
    /// Bytes of a disk.
    Disk(Range<u64>),
    /// An exported snapshot, at an offset in bytes.
    Archive(u64),
}

impl fmt::Display for Part {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Manifest => formatter.write_str("the snapshot's manifest"),
            Self::DeviceState => formatter.write_str("the snapshot's device state"),
            Self::DiskDigest => formatter.write_str("the digest of the snapshot's disk"),
            Self::Disk(range) => write!(
                formatter,
                "the snapshot's disk at {:#x} to {:#x}",
                range.start, range.end
            ),
            Self::Archive(offset) => write!(formatter, "the exported snapshot at byte {offset}"),
            Self::Index(image) => write!(formatter, "the index of memory image {image}"),
            Self::FrameTable(image) => write!(formatter, "the frame table of memory image {image}"),
            Self::Memory { image, range, form } => write!(
                formatter,
                "memory image {image} ({form}) at guest memory {:#x} to {:#x}",
                range.start,
                range.end,
                form = match form {
                    Form::Raw => "raw",
                    Form::Framed => "framed",
                },
            ),
        }
    }
}
