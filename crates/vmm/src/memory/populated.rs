//! Which pages of a block hold something, from the page tables of the process.
//!
//! `PAGEMAP_SCAN` (Linux 6.7) gives ranges; older kernels give a word for each page of `/proc/PID/pagemap`.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{Mode, OFlags};

use super::Missing;

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;
/// Ranges that one call may return.
const SCAN_REGIONS: usize = 4096;

/// Bits of a word of `/proc/PID/pagemap`.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const FILE: u64 = 1 << 61;
/// Words that are read at once: those of 256 MiB.
const READ_WORDS: usize = 65536;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

#[repr(C)]
#[derive(Default)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    regions: u64,
    regions_length: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// Ranges of bytes from `address` on; what `missing` says of the others.
pub(super) fn scan(
    directory: &OwnedFd,
    address: u64,
    length: u64,
    missing: Missing,
) -> io::Result<Vec<Range<u64>>> {
    match by_scan(directory, address, length, missing) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
            by_words(directory, address, length, missing)
        }
        outcome => outcome,
    }
}

fn by_scan(directory: &OwnedFd, address: u64, length: u64, missing: Missing) -> io::Result<Vec<Range<u64>>> {
    let pagemap = open(directory)?;
    let mut regions = vec![Region::default(); SCAN_REGIONS];
    let mut ranges = Ranges::default();
    let end = address + length;
    // What anonymous memory shows as the shared page of zeros was only read. In a private mapping such a page
    // stands in place of one of the file, and where pages are served in place of what would be filled in.
    let excluded = match missing {
        Missing::Zero => PAGE_IS_PFNZERO,
        Missing::File => PAGE_IS_FILE,
        Missing::Served => 0,
    };
    let mut start = address;
    while start < end {
        let mut scan = Scan {
            size: size_of::<Scan>() as u64,
            start,
            end,
            regions: regions.as_mut_ptr() as u64,
            regions_length: regions.len() as u64,
            category_inverted: excluded,
            category_mask: excluded,
            category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            return_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            ..Scan::default()
        };
        // SAFETY: `scan` is a live pm_scan_arg of the size that it names, and its vector is `regions`, which is
        // as long as it says and outlives the call.
        let count = unsafe { libc::ioctl(pagemap.as_fd().as_raw_fd(), PAGEMAP_SCAN as _, &raw mut scan) };
        let Ok(count) = usize::try_from(count) else {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(error);
        };
        for region in regions.iter().take(count) {
            ranges.add(region.start.max(address) - address..region.end.min(end) - address);
        }
        // Where the walk ended is not to be relied on: kernels leave there where their own, smaller buffer was full
        // last. A list that is not full is complete, and a full one is complete up to its last entry.
        match regions.get(..count).and_then(<[Region]>::last) {
            Some(last) if count == regions.len() && last.end > start => start = last.end,
            _ => break,
        }
    }
    Ok(ranges.0)
}

pub(super) fn by_words(
    directory: &OwnedFd,
    address: u64,
    length: u64,
    missing: Missing,
) -> io::Result<Vec<Range<u64>>> {
    let pagemap = open(directory)?;
    let page = rustix::param::page_size() as u64;
    let pages = length.div_ceil(page);
    let mut buffer = vec![0_u8; READ_WORDS * 8];
    let mut ranges = Ranges::default();
    let mut index = 0;
    while index < pages {
        let count = (pages - index).min(READ_WORDS as u64);
        let bytes = &mut buffer[..count as usize * 8];
        pagemap.read_exact_at(bytes, (address / page + index) * 8)?;
        for (word, number) in bytes.as_chunks::<8>().0.iter().zip(index..) {
            if is_populated(u64::from_ne_bytes(*word), missing) {
                ranges.add(number * page..((number + 1) * page).min(length));
            }
        }
        index += count;
    }
    Ok(ranges.0)
}

fn open(directory: &OwnedFd) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    Ok(File::from(rustix::fs::openat(
        directory,
        "pagemap",
        flags,
        Mode::empty(),
    )?))
}

fn is_populated(word: u64, missing: Missing) -> bool {
    word & (PRESENT | SWAPPED) != 0 && !(missing == Missing::File && word & FILE != 0)
}

/// Ascending ranges, merged where they touch.
#[derive(Default)]
struct Ranges(Vec<Range<u64>>);

impl Ranges {
    fn add(&mut self, range: Range<u64>) {
        match self.0.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => self.0.push(range),
        }
    }
}
