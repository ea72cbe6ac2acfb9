//! What a reader of an archive hands out: entries, pieces of their content, and why it cannot go on.

use std::io;

use hypeman_erofs::Xattr;

use super::super::error::EntryProblem;

/// What kind of node an entry describes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    HardLink,
    Symlink,
    CharacterDevice { major: u64, minor: u64 },
    BlockDevice { major: u64, minor: u64 },
    Directory,
    Fifo,
}

/// One entry of an archive, its names as they are written there.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) name: Vec<u8>,
    pub(crate) kind: Kind,
    /// Target of a link.
    pub(crate) link: Vec<u8>,
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: i64,
    pub(crate) mtime_nanoseconds: u32,
    /// Size of the file, holes included.
    pub(crate) size: u64,
    /// Whether the archive has it as a sparse file.
    pub(crate) sparse: bool,
    pub(crate) xattrs: Vec<Xattr>,
}

/// A part of a file's content.
#[derive(Debug)]
pub(crate) enum Piece<'a> {
    Data(&'a [u8]),
    Hole(u64),
}

/// Why an archive could not be read on.
#[derive(Debug)]
pub(crate) enum TarError {
    /// The stream below failed.
    Stream(io::Error),
    /// The stream ends between the headers of one entry.
    Truncated,
    /// Something follows the end of the archive.
    TrailingData,
    /// An entry, as far as it could be named.
    Entry { name: Vec<u8>, problem: EntryProblem },
}

impl From<io::Error> for TarError {
    fn from(error: io::Error) -> Self {
        Self::Stream(error)
    }
}
