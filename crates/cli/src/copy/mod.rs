//! Copying between this machine and a guest, with the rules of `docker cp`.
//!
//! - [`endpoint`]: reading `web:/etc/hosts`, `./file` and `-`.
//! - [`rules`]: where a copy lands, as a pure function.
//! - [`path`]: which names and link targets from a guest are believed.
//! - [`receive`]: the protocol of a copy out of a guest, as a checked sequence of entries.
//! - [`local`] and [`archive`]: where received entries go: a directory, or a tar stream.
//! - [`send`]: entries of this machine, or of a tar stream, to a guest.
//!
//! Invariant: nothing a guest sends can make this side write outside the destination, through a link, or more
//! bytes than were announced.

pub mod archive;
pub mod endpoint;
pub mod local;
pub mod path;
pub mod receive;
pub mod rules;
pub mod send;

use crate::error::CliError;

/// One entry of a tree, with what belongs to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Where it stands.
    pub path: path::RelativePath,
    /// What it is.
    pub kind: EntryKind,
    /// Permission bits.
    pub mode: u32,
    /// Modification time, seconds since 1970.
    pub mtime: i64,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    /// A directory.
    Directory,
    /// A regular file.
    File {
        /// Bytes.
        size: u64,
    },
    /// A symbolic link.
    Link {
        /// What it says.
        target: String,
    },
}

/// Where received entries go.
pub trait EntrySink {
    /// An entry begins.
    ///
    /// # Errors
    /// When it cannot be made.
    fn begin(&mut self, entry: &Entry) -> Result<(), CliError>;

    /// Content of the file that began last.
    ///
    /// # Errors
    /// When it cannot be written.
    fn data(&mut self, bytes: &[u8]) -> Result<(), CliError>;

    /// The entry that began last is whole.
    ///
    /// # Errors
    /// When it cannot be completed.
    fn end(&mut self) -> Result<(), CliError>;

    /// All entries are there.
    ///
    /// # Errors
    /// When something that waits for the end cannot be done.
    fn finish(&mut self) -> Result<(), CliError>;
}
