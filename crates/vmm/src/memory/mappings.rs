//! What lies behind an address of a process, from `/proc/PID/maps`.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::ops::Range;

/// What backs a block of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Nothing but memory.
    Anonymous,
    /// A file, copied on write.
    PrivateFile,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Mapping {
    pub(super) addresses: Range<u64>,
    private: bool,
    /// Device, inode and offset; `None` without a file.
    pub(super) file: Option<(String, u64, u64)>,
}

/// Finds out what backs `length` bytes from `address` on. The kernel may show one block in several lines (advice
/// splits them), but they must follow each other in memory and in the file. Where a file is copied on write, a VMM may
/// have put plain memory in the place of what its guest gave back.
pub(super) fn kind_of(maps: File, address: u64, length: u64) -> io::Result<Kind> {
    pieces(BufReader::new(maps), address, length).map(|pieces| match pieces.iter().find_map(file_of) {
        Some(_) => Kind::PrivateFile,
        None => Kind::Anonymous,
    })
}

/// Addresses within a block where plain memory is in the place of its file.
pub(super) fn replaced(maps: File, address: u64, length: u64) -> io::Result<Vec<Range<u64>>> {
    let end = address + length;
    let pieces = pieces(BufReader::new(maps), address, length)?;
    Ok(pieces
        .iter()
        .filter(|piece| piece.file.is_none())
        .map(|piece| piece.addresses.start.max(address)..piece.addresses.end.min(end))
        .collect())
}

fn pieces(lines: impl BufRead, address: u64, length: u64) -> io::Result<Vec<Mapping>> {
    let odd = |what: &str| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("guest memory at {address:#x}: {what}"),
        )
    };
    let end = address
        .checked_add(length)
        .ok_or_else(|| odd("beyond the end of memory"))?;
    let mut reached = address;
    let mut pieces: Vec<Mapping> = Vec::new();
    for line in lines.lines() {
        let mapping = parse(&line?).ok_or_else(|| odd("unexpected form of /proc/PID/maps"))?;
        if mapping.addresses.end <= reached || reached >= end {
            continue;
        }
        if mapping.addresses.start > reached || !mapping.private {
            break;
        }
        let of_file = |piece: &&Mapping| piece.file.is_some();
        if let Some(before) = pieces.iter().rfind(of_file)
            && !before.goes_on_in(&mapping)
        {
            return Err(odd("it is not one block"));
        }
        reached = mapping.addresses.end;
        pieces.push(mapping);
    }
    if reached < end {
        return Err(odd("no private memory of that size lies there"));
    }
    Ok(pieces)
}

fn file_of(mapping: &Mapping) -> Option<&(String, u64, u64)> {
    mapping.file.as_ref()
}

impl Mapping {
    /// Whether the other one may follow this one, of a file, in one block.
    fn goes_on_in(&self, other: &Self) -> bool {
        match (&self.file, &other.file) {
            (Some((device, inode, offset)), Some((other_device, other_inode, other_offset))) => {
                device == other_device
                    && inode == other_inode
                    && offset.checked_add(other.addresses.start - self.addresses.start) == Some(*other_offset)
            }
            _ => true,
        }
    }
}

/// `7f00-7f10 rw-p 00001000 08:01 1234   /path`
pub(super) fn parse(line: &str) -> Option<Mapping> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let hexadecimal = |word: &str| u64::from_str_radix(word, 16).ok();
    let private = words.next()?.ends_with('p');
    let offset = hexadecimal(words.next()?)?;
    let device = words.next()?;
    let inode: u64 = words.next()?.parse().ok()?;
    Some(Mapping {
        addresses: hexadecimal(start)?..hexadecimal(end)?,
        private,
        file: (inode != 0 || device != "00:00").then(|| (device.to_owned(), inode, offset)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
1000-2000 r-xp 00000000 08:01 17                         /usr/bin/qemu
4000-8000 rw-p 00000000 00:00 0 \n8000-9000 rw-p 00000000 00:00 0                          [anon: x]
a000-c000 rw-p 00000000 08:01 99                         /data/a file
c000-d000 rw-p 00002000 08:01 99                         /data/a file
d000-e000 rw-p 00007000 08:01 99                         /data/a file
f000-10000 rw-s 00000000 00:01 5                         /memfd:x (deleted)
20000-21000 rw-p 00000000 00:00 0 \n21000-23000 rw-p 00001000 08:01 99                       /data/a file
23000-25000 rw-p 00000000 00:00 0 \n25000-26000 rw-p 00005000 08:01 99                       /data/a file
26000-28000 rw-p 00000000 00:00 0 \n28000-29000 rw-p 00007000 08:01 99                       /data/a file
";

    fn found(address: u64, length: u64) -> Option<(Kind, Vec<Range<u64>>)> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("maps");
        std::fs::write(&path, MAPS).unwrap();
        let maps = || File::open(&path).unwrap();
        let kind = kind_of(maps(), address, length).ok()?;
        Some((kind, replaced(maps(), address, length).unwrap()))
    }

    fn kind(address: u64, length: u64) -> Option<Kind> {
        found(address, length).map(|(kind, _)| kind)
    }

    #[test]
    fn one_block_may_have_several_lines() {
        assert_eq!(kind(0x4000, 0x5000), Some(Kind::Anonymous));
        assert_eq!(kind(0x5000, 0x1000), Some(Kind::Anonymous));
        assert_eq!(found(0xa000, 0x3000), Some((Kind::PrivateFile, vec![])));
    }

    #[test]
    fn plain_memory_may_stand_in_for_parts_of_a_file() {
        let (kind, replaced) = found(0x20000, 0x7000).unwrap();
        assert_eq!(kind, Kind::PrivateFile);
        assert_eq!(replaced, [0x20000..0x21000, 0x23000..0x25000, 0x26000..0x27000]);
    }

    #[test]
    fn what_is_not_one_private_block_is_refused() {
        assert_eq!(kind(0x4000, 0x6000), None, "a hole after it");
        assert_eq!(kind(0x3000, 0x1000), None, "a hole");
        assert_eq!(kind(0xa000, 0x4000), None, "the file does not go on");
        assert_eq!(kind(0x20000, 0x9000), None, "nor does it behind plain memory");
        assert_eq!(kind(0xf000, 0x1000), None, "shared");
        assert_eq!(kind(u64::MAX - 1, 0x1000), None);
    }
}
