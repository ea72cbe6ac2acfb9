//! Has the kernel begin to write what a file has in the page cache, without waiting for it.
//!
//! What is synced in the end is then mostly on its way already: the disk works while the processors still read, compare
//! and hash. Only a hint; what it did not do, or did wrong, the sync does and tells.
//!
//! `unsafe` is for the system call, which takes numbers alone.
#![allow(unsafe_code)]

use std::fs::File;
use std::ops::Range;

/// Begins to write a range of bytes.
#[cfg(target_os = "linux")]
pub(crate) fn begin(file: &File, range: Range<u64>) {
    use std::os::fd::AsRawFd;

    let (Ok(start), Ok(length)) = (
        i64::try_from(range.start),
        i64::try_from(range.end.saturating_sub(range.start)),
    ) else {
        return;
    };
    // SAFETY: the descriptor is open as long as `file` is borrowed; no memory is passed.
    unsafe { libc::sync_file_range(file.as_raw_fd(), start, length, libc::SYNC_FILE_RANGE_WRITE) };
}

/// Elsewhere nothing is begun.
#[cfg(not(target_os = "linux"))]
pub(crate) fn begin(_file: &File, _range: Range<u64>) {}
