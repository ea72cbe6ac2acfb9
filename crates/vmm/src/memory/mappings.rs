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
/// splits them), but they must follow each other in memory and in the file.
pub(super) fn kind_of(maps: File, address: u64, length: u64) -> io::Result<Kind> {
    kind_in(BufReader::new(maps), address, length)
}

fn kind_in(lines: impl BufRead, address: u64, length: u64) -> io::Result<Kind> {
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
    let mut first: Option<Mapping> = None;
    for line in lines.lines() {
        let mapping = parse(&line?).ok_or_else(|| odd("unexpected form of /proc/PID/maps"))?;
        if mapping.addresses.end <= reached || reached >= end {
            continue;
        }
        if mapping.addresses.start > reached || !mapping.private {
            break;
        }
        if let Some(first) = &first
            && !first.goes_on_in(&mapping)
        {
            return Err(odd("it is not one block"));
        }
        reached = mapping.addresses.end;
        first.get_or_insert(mapping);
    }
    match first {
        Some(first) if reached >= end => Ok(match first.file {
            Some(_) => Kind::PrivateFile,
            None => Kind::Anonymous,
        }),
        _ => Err(odd("no private memory of that size lies there")),
    }
}

impl Mapping {
    fn goes_on_in(&self, other: &Self) -> bool {
        match (&self.file, &other.file) {
            (None, None) => true,
            (Some((device, inode, offset)), Some((other_device, other_inode, other_offset))) => {
                device == other_device
                    && inode == other_inode
                    && offset.checked_add(other.addresses.start - self.addresses.start) == Some(*other_offset)
            }
            _ => false,
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
";

    fn kind(address: u64, length: u64) -> Option<Kind> {
        kind_in(MAPS.as_bytes(), address, length).ok()
    }

    #[test]
    fn one_block_may_have_several_lines() {
        assert_eq!(kind(0x4000, 0x5000), Some(Kind::Anonymous));
        assert_eq!(kind(0x5000, 0x1000), Some(Kind::Anonymous));
        assert_eq!(kind(0xa000, 0x3000), Some(Kind::PrivateFile));
    }

    #[test]
    fn what_is_not_one_private_block_is_refused() {
        assert_eq!(kind(0x4000, 0x6000), None, "a hole after it");
        assert_eq!(kind(0x3000, 0x1000), None, "a hole");
        assert_eq!(kind(0xa000, 0x4000), None, "the file does not go on");
        assert_eq!(kind(0xf000, 0x1000), None, "shared");
        assert_eq!(kind(u64::MAX - 1, 0x1000), None);
    }
}
