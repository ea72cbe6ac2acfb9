//! The table of contents of a tar: which range of the file each member is.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Seek as _};

use super::WHAT;
use crate::error::{ImageError, Result};
use crate::registry::Extent;

/// Most members of an archive; images have at most a few hundred.
const MAX_MEMBERS: usize = 65_536;
/// Longest name that is kept, in bytes.
const MAX_NAME_BYTES: usize = 4096;
/// Most links from one name to another that are followed.
const MAX_LINKS: usize = 8;

/// Members by their normalised names.
#[derive(Debug, Default)]
pub(super) struct Table {
    members: HashMap<String, Member>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Member {
    File {
        offset: u64,
        size: u64,
    },
    /// Another member's normalised name; old `docker save` shares layers so.
    Link(String),
}

impl Table {
    /// Offset and size of a regular member, through links inside the archive.
    pub(super) fn find(&self, name: &str) -> Option<(u64, u64)> {
        let mut name = normalise("", name)?;
        for _ in 0..MAX_LINKS {
            match self.members.get(&name)? {
                Member::File { offset, size } => return Some((*offset, *size)),
                Member::Link(target) => name.clone_from(target),
            }
        }
        None
    }

    /// All regular members.
    pub(super) fn files(&self) -> impl Iterator<Item = (&str, u64, u64)> {
        self.members.iter().filter_map(|(name, member)| match member {
            Member::File { offset, size } => Some((name.as_str(), *offset, *size)),
            Member::Link(_) => None,
        })
    }

    /// A member as a range of its archive.
    pub(super) fn extent(&self, tar: &File, name: &str) -> Result<Extent> {
        let (offset, size) = self
            .find(name)
            .ok_or_else(|| ImageError::NotFound(format!("{name} in the image archive")))?;
        let file = tar
            .try_clone()
            .map_err(|error| ImageError::io("read an archive", error))?;
        Ok(Extent { file, offset, size })
    }
}

/// Reads the table of contents. Only headers are read; contents are skipped.
pub(super) fn index(file: &File) -> Result<Table> {
    let broken = |error: io::Error| ImageError::document(WHAT, format!("it is not a sound tar: {error}"));
    let invalid = |reason: &str| ImageError::document(WHAT, reason);
    let length = file
        .metadata()
        .map_err(|error| ImageError::io("read an archive", error))?
        .len();
    let mut reader = file;
    reader
        .rewind()
        .map_err(|error| ImageError::io("read an archive", error))?;
    let mut archive = tar::Archive::new(reader);
    let mut table = Table::default();
    for (count, entry) in archive.entries_with_seek().map_err(broken)?.enumerate() {
        let entry = entry.map_err(broken)?;
        if count >= MAX_MEMBERS {
            return Err(invalid("it has too many members"));
        }
        let name_bytes = entry.path_bytes();
        if name_bytes.len() > MAX_NAME_BYTES {
            return Err(invalid("a member's name is too long"));
        }
        let kind = entry.header().entry_type();
        // Names that are no text or lead outside are not ours to look up; nothing refers to them.
        let Some(name) = std::str::from_utf8(&name_bytes)
            .ok()
            .and_then(|name| normalise("", name))
        else {
            continue;
        };
        let member = if kind.is_file() || kind.is_contiguous() {
            let (offset, size) = (entry.raw_file_position(), entry.size());
            if offset.checked_add(size).is_none_or(|end| end > length) {
                return Err(invalid("it is cut off"));
            }
            Member::File { offset, size }
        } else if kind.is_symlink() || kind.is_hard_link() {
            let target = entry.link_name_bytes().unwrap_or_default();
            let base = if kind.is_symlink() { parent(&name) } else { "" };
            match std::str::from_utf8(&target)
                .ok()
                .and_then(|target| normalise(base, target))
            {
                Some(target) => Member::Link(target),
                None => continue,
            }
        } else {
            continue;
        };
        let known = table.members.insert(name, member.clone());
        if known.is_some_and(|known| known != member) {
            return Err(invalid("two members have one name"));
        }
    }
    Ok(table)
}

fn parent(name: &str) -> &str {
    name.rsplit_once('/').map_or("", |(parent, _)| parent)
}

/// A name without `.`, `..` and doubled slashes; `None` when it leads outside.
fn normalise(base: &str, name: &str) -> Option<String> {
    if name.starts_with('/') || name.contains('\0') {
        return None;
    }
    let mut parts: Vec<&str> = base.split('/').filter(|part| !part.is_empty()).collect();
    for part in name.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            part => parts.push(part),
        }
    }
    (!parts.is_empty()).then(|| parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_never_lead_outside() {
        assert_eq!(normalise("", "./a//b/./c").as_deref(), Some("a/b/c"));
        assert_eq!(
            normalise("x/y", "../z/layer.tar").as_deref(),
            Some("x/z/layer.tar")
        );
        assert_eq!(normalise("x", "../../etc/passwd"), None);
        assert_eq!(normalise("", "/etc/passwd"), None);
        assert_eq!(normalise("", "."), None);
    }
}
