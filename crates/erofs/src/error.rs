//! What can go wrong while an image is written.

use std::io;

/// Why an image could not be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The output could not be written; a full disk arrives here as `StorageFull`.
    #[error("the image could not be written: {0}")]
    Output(#[from] io::Error),
    /// More or fewer bytes were written to a file than announced.
    #[error("a file announced as {announced} bytes received {received}")]
    SizeMismatch {
        /// Size given to [`crate::Builder::begin_file`], in bytes.
        announced: u64,
        /// Bytes written and holes together.
        received: u64,
    },
    /// The image, or one file in it, is larger than 32-bit block addresses allow (16 TiB).
    #[error("the image is larger than the format allows (16 TiB)")]
    TooLarge,
    /// A directory entry has an empty or over-long name, or one with `/` or NUL.
    #[error("the name of a directory entry is not valid")]
    InvalidName,
    /// A symbolic link has an empty or over-long target, or one with NUL.
    #[error("the target of a symbolic link is not valid")]
    InvalidSymlink,
    /// An extended attribute has a name or namespace the format cannot hold, or too large a value.
    #[error("extended attribute {0:?} cannot be represented")]
    InvalidXattr(String),
    /// The extended attributes of one inode together exceed 256 KiB.
    #[error("the extended attributes of one inode are too large ({0} bytes)")]
    XattrsTooLarge(usize),
    /// The extended attributes of the root directory do not fit beside the superblock.
    #[error("the extended attributes of the root directory are too large ({0} bytes)")]
    RootXattrsTooLarge(usize),
    /// A device number is beyond what Linux can represent.
    #[error("device number {major}:{minor} is out of range")]
    InvalidDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// One file has more names than its inode can count.
    #[error("a file has too many hard links ({0})")]
    TooManyLinks(u32),
    /// The root of the tree is not a directory, or a directory has two parents.
    #[error("the tree is malformed: {0}")]
    MalformedTree(&'static str),
}
