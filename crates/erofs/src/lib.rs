//! A writer of the EROFS read-only file system, for Linux 6.1 and later.
//!
//! File contents go straight to the image while they arrive; only what a directory tree is made of (names,
//! inode numbers, attributes) is kept until [`Builder::finish`].
//!
//! ```text
//!  block 0          block 1 ..                                                        end
//! ┌───────────────┬──────────┬───────────────────┬──────────┬──────────┬─────────────┐
//! │ superblock,   │ inodes   │ contents of files │ inodes   │ contents │ directories │
//! │ root inode    │ + tails  │ in arrival order  │ + tails  │ ...      │             │
//! └───────────────┴──────────┴───────────────────┴──────────┴──────────┴─────────────┘
//! ```
//!
//! An inode number (`nid`) is its byte offset in the image divided by 32, so inodes may lie anywhere. They are
//! packed into regions of up to 64 KiB that are reserved between the contents of two files; that keeps them
//! near one another for the reader, and needs no second pass for the writer. The root inode alone must lie near
//! the front, because the superblock has 16 bits for it.
//!
//! Invariants:
//! - The same calls in the same order give the same bytes. Nothing of the host (clock, ids, umask) gets in.
//! - An inode with its inline tail never crosses a block; the kernel refuses such an image.
//! - Memory grows with the number of nodes, never with the size of a file, save for the chunk map or extent
//!   list of the one file being written (at most a few MiB).

mod builder;
mod chunks;
mod directory;
mod error;
mod extents;
mod format;
mod image;
mod metadata;
mod output;
mod tree;
mod xattr;

pub use builder::{Builder, Compression, FileHandle, FileWriter, Options};
pub use error::Error;
pub use image::Summary;
pub use tree::{Attributes, Content, NodeId, Tree, Xattr};
pub use xattr::{MAXIMUM_XATTR_NAME, MAXIMUM_XATTR_VALUE, is_supported_xattr};

/// Size of a file system block in bytes.
pub const BLOCK_SIZE: usize = 4096;

/// Longest name of a directory entry, in bytes.
pub const MAXIMUM_NAME: usize = 255;

/// Longest target of a symbolic link, in bytes: one less than the kernel's `PATH_MAX`.
pub const MAXIMUM_SYMLINK: usize = 4095;

/// Largest major device number that Linux can represent.
pub const MAXIMUM_DEVICE_MAJOR: u32 = 0xfff;

/// Largest minor device number that Linux can represent.
pub const MAXIMUM_DEVICE_MINOR: u32 = 0xf_ffff;
