//! Received entries become a tar archive, and entries of a tar archive are read for sending.

use std::io::{self, Write};

use tar::{Builder, EntryType, Header};

use super::path::RelativePath;
use super::{Entry, EntryKind, EntrySink};
use crate::error::CliError;

/// tar works in blocks of this many bytes.
const BLOCK: u64 = 512;

/// Longest name and link target that a plain header holds; longer ones go into an extended header.
const PLAIN_NAME: usize = 100;

/// Writes a received tree as a tar archive.
pub struct Archive<W: Write> {
    builder: Builder<W>,
    /// Bytes of padding after the file that is open.
    padding: u64,
}

impl<W: Write> std::fmt::Debug for Archive<W> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Archive").finish_non_exhaustive()
    }
}

impl<W: Write> Archive<W> {
    /// An archive on `out`.
    pub fn new(out: W) -> Self {
        Self {
            builder: Builder::new(out),
            padding: 0,
        }
    }

    fn header(&mut self, entry: &Entry) -> io::Result<()> {
        let mut header = Header::new_ustar();
        header.set_mode(entry.mode);
        header.set_uid(entry.uid.into());
        header.set_gid(entry.gid.into());
        header.set_mtime(u64::try_from(entry.mtime).unwrap_or(0));
        let mut name = entry.path.to_string();
        let mut long = Vec::new();
        let size = match &entry.kind {
            EntryKind::Directory => {
                header.set_entry_type(EntryType::Directory);
                name.push('/');
                0
            }
            EntryKind::File { size } => {
                header.set_entry_type(EntryType::Regular);
                *size
            }
            EntryKind::Link { target } => {
                header.set_entry_type(EntryType::Symlink);
                if target.len() <= PLAIN_NAME {
                    header.set_link_name_literal(target)?;
                } else {
                    long.push(("linkpath", target.clone()));
                }
                0
            }
        };
        header.set_size(size);
        if name.len() > PLAIN_NAME || !name.is_ascii() {
            long.push(("path", name.clone()));
            let end = (0..=PLAIN_NAME.min(name.len()))
                .rev()
                .find(|end| name.is_char_boundary(*end))
                .unwrap_or(0);
            name.truncate(end);
        }
        // Literal bytes: `set_path` would interpret, and refuses some names that are fine in a guest.
        let field = &mut header.as_old_mut().name;
        field[..name.len()].copy_from_slice(name.as_bytes());
        header.set_cksum();
        if !long.is_empty() {
            self.builder
                .append_pax_extensions(long.iter().map(|(key, value)| (*key, value.as_bytes())))?;
        }
        self.builder.get_mut().write_all(header.as_bytes())?;
        self.padding = size.next_multiple_of(BLOCK) - size;
        Ok(())
    }
}

fn write_failure(failure: io::Error) -> CliError {
    CliError::io("cannot write the archive", failure)
}

impl<W: Write> EntrySink for Archive<W> {
    fn begin(&mut self, entry: &Entry) -> Result<(), CliError> {
        if let EntryKind::File { size } = entry.kind
            && size >= 1 << 33
        {
            return Err(CliError::failed_with(
                format!(
                    "{} is larger than 8 GiB, which a tar stream here does not carry",
                    entry.path
                ),
                "copy it to a file instead of to -",
            ));
        }
        self.header(entry).map_err(write_failure)
    }

    fn data(&mut self, bytes: &[u8]) -> Result<(), CliError> {
        self.builder.get_mut().write_all(bytes).map_err(write_failure)
    }

    fn end(&mut self) -> Result<(), CliError> {
        let zeros = [0; BLOCK as usize];
        let padding = usize::try_from(std::mem::take(&mut self.padding)).unwrap_or(0);
        self.builder
            .get_mut()
            .write_all(&zeros[..padding])
            .map_err(write_failure)
    }

    fn finish(&mut self) -> Result<(), CliError> {
        self.builder
            .finish()
            .and_then(|()| self.builder.get_mut().flush())
            .map_err(write_failure)
    }
}

/// What an entry of a read archive is to the copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ArchiveEntry {
    /// It is sent.
    Send(Entry),
    /// It is the top directory (`.`), which exists already.
    Top,
    /// It cannot be sent, and why.
    Skip(String),
}

/// Reads the header of an archive's entry.
///
/// # Errors
/// When the name is unsafe or the header damaged.
pub fn read_entry<R: io::Read>(entry: &tar::Entry<'_, R>) -> Result<ArchiveEntry, CliError> {
    let damaged = |failure: io::Error| CliError::io("the archive is damaged", failure);
    let raw = entry.path_bytes();
    let text = std::str::from_utf8(&raw).map_err(|_| {
        CliError::failed(format!(
            "{}: the name is not UTF-8",
            String::from_utf8_lossy(&raw)
        ))
    })?;
    let name = text.trim_start_matches("./").trim_end_matches('/');
    if matches!(name, "" | ".") && !text.starts_with('/') {
        return Ok(ArchiveEntry::Top);
    }
    let path = RelativePath::parse(name)
        .map_err(|failure| CliError::failed(format!("the archive has an {failure}")))?;
    let header = entry.header();
    let kind = match header.entry_type() {
        EntryType::Directory => EntryKind::Directory,
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
            EntryKind::File { size: entry.size() }
        }
        EntryType::Symlink => {
            let target = entry
                .link_name_bytes()
                .map(std::borrow::Cow::into_owned)
                .unwrap_or_default();
            match String::from_utf8(target) {
                Ok(target) if !target.is_empty() => EntryKind::Link { target },
                _ => return Ok(ArchiveEntry::Skip(format!("{path}: the link target is not text"))),
            }
        }
        EntryType::Link => return Ok(ArchiveEntry::Skip(format!("{path}: hard links cannot be copied"))),
        _ => {
            return Ok(ArchiveEntry::Skip(format!(
                "{path}: devices and other special files cannot be copied"
            )));
        }
    };
    Ok(ArchiveEntry::Send(Entry {
        path,
        kind,
        mode: header.mode().map_err(damaged)? & 0o7777,
        mtime: i64::try_from(header.mtime().map_err(damaged)?).unwrap_or(0),
        uid: u32::try_from(header.uid().map_err(damaged)?).unwrap_or(0),
        gid: u32::try_from(header.gid().map_err(damaged)?).unwrap_or(0),
    }))
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    fn entry(path: &str, kind: EntryKind) -> Entry {
        Entry {
            path: RelativePath::parse(path).unwrap(),
            kind,
            mode: 0o640,
            mtime: 1_700_000_000,
            uid: 1000,
            gid: 70_000,
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let long = format!("base/{}/{}é", "d".repeat(120), "f".repeat(90));
        let entries = [
            (entry("base", EntryKind::Directory), &b""[..]),
            (entry("base/file", EntryKind::File { size: 5 }), &b"hello"[..]),
            (entry(&long, EntryKind::File { size: 512 }), &[7; 512][..]),
            (
                entry(
                    "base/link",
                    EntryKind::Link {
                        target: "x/".repeat(80),
                    },
                ),
                &b""[..],
            ),
            (entry("base/empty", EntryKind::File { size: 0 }), &b""[..]),
        ];
        let mut bytes = Vec::new();
        let mut archive = Archive::new(&mut bytes);
        for (entry, content) in &entries {
            archive.begin(entry).unwrap();
            archive.data(content).unwrap();
            archive.end().unwrap();
        }
        archive.finish().unwrap();
        drop(archive);

        let mut archive = tar::Archive::new(bytes.as_slice());
        let mut seen = Vec::new();
        for read in archive.entries().unwrap() {
            let mut read = read.unwrap();
            let ArchiveEntry::Send(entry) = read_entry(&read).unwrap() else {
                panic!("not an entry to send")
            };
            let mut content = Vec::new();
            read.read_to_end(&mut content).unwrap();
            seen.push((entry, content));
        }
        let expected: Vec<_> = entries
            .iter()
            .map(|(entry, content)| (entry.clone(), content.to_vec()))
            .collect();
        assert_eq!(seen, expected);
    }

    #[test]
    fn hostile_archives_are_refused() {
        for name in ["/etc/passwd", "../x", "a/../../b"] {
            let mut header = Header::new_ustar();
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_size(0);
            header.set_entry_type(EntryType::Regular);
            header.set_cksum();
            let mut bytes = header.as_bytes().to_vec();
            bytes.extend([0; 1024]);
            let mut archive = tar::Archive::new(bytes.as_slice());
            let read = archive.entries().unwrap().next().unwrap().unwrap();
            assert!(read_entry(&read).is_err(), "{name}");
        }
    }
}
