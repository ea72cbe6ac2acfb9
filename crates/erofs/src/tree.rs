//! The tree of nodes that an image is made of, as the writer sees it.
//!
//! The writer does not own the tree: whoever merges layers has a structure of its own, and a second copy of
//! 100,000 names would be waste. It is read through [`Tree`].

use crate::builder::FileHandle;

/// Index of a node in a [`Tree`]; dense from zero.
pub type NodeId = u32;

/// One extended attribute: full name with its namespace (`security.capability`) and value.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Xattr {
    /// Full name, such as `user.comment`.
    pub name: Box<[u8]>,
    /// Value, any bytes.
    pub value: Box<[u8]>,
}

/// What every kind of node has.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Attributes {
    /// Permission bits with set-user-id, set-group-id and sticky (`0o7777`); type bits are ignored.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time in seconds since 1970; negative before.
    pub mtime: i64,
    /// Nanoseconds to add to `mtime`, below 1,000,000,000.
    pub mtime_nanoseconds: u32,
    /// Extended attributes; names unique.
    pub xattrs: Box<[Xattr]>,
}

/// What a node is.
#[derive(Debug, Clone, Copy)]
pub enum Content<'a> {
    /// A directory; its entries come from [`Tree::children`].
    Directory,
    /// A regular file, written before through [`crate::Builder::begin_file`]. Its attributes were given there.
    File(FileHandle),
    /// A symbolic link with its target.
    Symlink(&'a [u8]),
    /// A character device.
    CharacterDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
}

/// A directory tree. Several names may lead to one node that is not a directory: these are hard links.
pub trait Tree {
    /// One more than the largest node id.
    fn node_count(&self) -> usize;
    /// The root directory.
    fn root(&self) -> NodeId;
    /// Attributes of a node.
    fn attributes(&self, node: NodeId) -> &Attributes;
    /// What a node is.
    fn content(&self, node: NodeId) -> Content<'_>;
    /// Entries of a directory in any order, without `.` and `..`; nothing for other nodes.
    fn children<'a>(&'a self, directory: NodeId, visit: &mut dyn FnMut(&'a [u8], NodeId));
}
