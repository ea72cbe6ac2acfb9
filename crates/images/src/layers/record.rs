//! What is kept of a layer's entries between reading and merging.

use hypeman_erofs::{
    Attributes, FileHandle, MAXIMUM_DEVICE_MAJOR, MAXIMUM_DEVICE_MINOR, MAXIMUM_SYMLINK, MAXIMUM_XATTR_NAME,
    MAXIMUM_XATTR_VALUE, Xattr, is_supported_xattr,
};

use super::error::EntryProblem;
use super::limits::Limits;
use super::path::{self, Name};
use super::tar::{Entry, Kind};

/// The content of a file: in the image already, or to be fetched if the merge turns out to need it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FileContent {
    Written(FileHandle),
    Skipped { layer: u32, ordinal: u32 },
}

/// What an entry puts at its path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Item {
    File(FileContent),
    /// Plain path of the target.
    HardLink(Box<[u8]>),
    Symlink(Box<[u8]>),
    CharacterDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
    Directory,
    Fifo,
}

/// One entry of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) name: Name,
    pub(crate) attributes: Attributes,
    pub(crate) item: Item,
}

impl Record {
    /// Checks an entry and makes a record of it. A file's content is `content`, to be replaced when written.
    pub(crate) fn new(entry: Entry, content: FileContent, limits: &Limits) -> Result<Self, EntryProblem> {
        let name = path::classify(path::plain(&entry.name, limits)?)?;
        let item = match name {
            Name::Entry(_) => item(&entry, content, limits)?,
            // A whiteout is its name, whatever its type.
            _ => Item::Fifo,
        };
        if item != Item::Directory && matches!(&name, Name::Entry(path) if path.is_empty()) {
            return Err(EntryProblem::ReplacesRoot);
        }
        let attributes = Attributes {
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime,
            mtime_nanoseconds: entry.mtime_nanoseconds,
            xattrs: xattrs(entry.xattrs, limits)?,
        };
        Ok(Self {
            name,
            attributes,
            item,
        })
    }

    /// About how much memory it takes.
    pub(crate) fn memory(&self) -> u64 {
        let name = match &self.name {
            Name::Entry(path) | Name::Whiteout(path) | Name::Opaque(path) => path.len(),
            Name::Ignored => 0,
        };
        let target = match &self.item {
            Item::HardLink(target) | Item::Symlink(target) => target.len(),
            _ => 0,
        };
        let xattrs = self
            .attributes
            .xattrs
            .iter()
            .map(|xattr| 64 + xattr.name.len() + xattr.value.len());
        (256 + name + target + xattrs.sum::<usize>()) as u64
    }
}

fn item(entry: &Entry, content: FileContent, limits: &Limits) -> Result<Item, EntryProblem> {
    Ok(match entry.kind {
        Kind::File => Item::File(content),
        Kind::HardLink => {
            if entry.link.is_empty() {
                return Err(EntryProblem::LinkTarget);
            }
            Item::HardLink(path::plain(&entry.link, limits)?.into())
        }
        Kind::Symlink => {
            if entry.link.contains(&0) {
                return Err(EntryProblem::Nul);
            }
            if entry.link.is_empty() || entry.link.len() > MAXIMUM_SYMLINK {
                return Err(EntryProblem::LinkTarget);
            }
            Item::Symlink(entry.link.clone().into())
        }
        Kind::CharacterDevice { major, minor } => {
            let (major, minor) = device(major, minor)?;
            Item::CharacterDevice { major, minor }
        }
        Kind::BlockDevice { major, minor } => {
            let (major, minor) = device(major, minor)?;
            Item::BlockDevice { major, minor }
        }
        Kind::Directory => Item::Directory,
        Kind::Fifo => Item::Fifo,
    })
}

fn device(major: u64, minor: u64) -> Result<(u32, u32), EntryProblem> {
    if major > u64::from(MAXIMUM_DEVICE_MAJOR) || minor > u64::from(MAXIMUM_DEVICE_MINOR) {
        return Err(EntryProblem::Device(major, minor));
    }
    Ok((major as u32, minor as u32))
}

/// Keeps the attributes that Linux has a place for. Those of overlayfs are dropped: they describe the layers of
/// the machine where the archive was made, and would steer the overlay that the guest lays over this disk.
fn xattrs(list: Vec<Xattr>, limits: &Limits) -> Result<Box<[Xattr]>, EntryProblem> {
    let mut kept = Vec::with_capacity(list.len());
    let mut total = 0;
    for xattr in list {
        let too_large = || EntryProblem::XattrTooLarge(shorten(&xattr.name));
        let in_namespace = [&b"user."[..], b"trusted.", b"security."];
        let rest = in_namespace
            .iter()
            .find_map(|prefix| xattr.name.strip_prefix(*prefix));
        if rest.is_some_and(|rest| rest.len() > MAXIMUM_XATTR_NAME)
            || xattr.value.len() > limits.xattr_bytes.min(MAXIMUM_XATTR_VALUE)
        {
            return Err(too_large());
        }
        total += xattr.name.len() + xattr.value.len();
        if total > limits.xattrs_bytes {
            return Err(too_large());
        }
        if !is_supported_xattr(&xattr.name) || xattr.name.starts_with(b"trusted.overlay.") {
            continue;
        }
        if xattr.name.starts_with(b"system.posix_acl_") && !is_access_control_list(&xattr.value) {
            return Err(EntryProblem::AccessControlList(shorten(&xattr.name)));
        }
        kept.push(xattr);
    }
    Ok(kept.into())
}

/// Version 2 and entries of 8 bytes: tag, permissions, id.
fn is_access_control_list(value: &[u8]) -> bool {
    const TAGS: [u16; 6] = [0x01, 0x02, 0x04, 0x08, 0x10, 0x20];
    value.strip_prefix(&2u32.to_le_bytes()).is_some_and(|entries| {
        entries.len().is_multiple_of(8)
            && entries.as_chunks::<8>().0.iter().all(|entry| {
                TAGS.contains(&u16::from_le_bytes([entry[0], entry[1]])) && entry[2] <= 7 && entry[3] == 0
            })
    })
}

/// A name for an error message.
pub(crate) fn shorten(name: &[u8]) -> String {
    const LONGEST: usize = 300;
    let text = String::from_utf8_lossy(&name[..name.len().min(LONGEST)]).into_owned();
    if name.len() > LONGEST { text + "…" } else { text }
}
