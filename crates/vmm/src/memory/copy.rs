//! Memory of another process, copied fast.
//!
//! Most of the cost is not the reading but the pages of the copy. [`CopyRoom`] takes them from the kernel before the
//! machine is paused, and pages of zeros, which fill much of a young guest's large pages, take none.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::fs::{FallocateFlags, MemfdFlags, fallocate};

use super::{GuestMemory, gone};
use crate::process::ProcessHandle;

/// What a thread copies at a time: small enough to stay in its core's cache between reading and writing.
const PIECE: u64 = 256 * 1024;
const PAGE: usize = 4096;
const MOST_THREADS: usize = 16;

static ZEROS: [u8; PAGE] = [0; PAGE];

/// Reads memory of the process, all of `buffer` or an error.
pub(super) fn read_process(process: &ProcessHandle, address: u64, buffer: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < buffer.len() {
        let rest = &mut buffer[done..];
        let local = libc::iovec {
            iov_base: rest.as_mut_ptr().cast(),
            iov_len: rest.len(),
        };
        let remote = libc::iovec {
            iov_base: (address as usize + done) as *mut libc::c_void,
            iov_len: rest.len(),
        };
        // SAFETY: the only local vector is `rest`, which is exclusively ours and as long as it says. The remote
        // one is checked by the kernel.
        let count = unsafe {
            libc::process_vm_readv(
                process.identity().pid as libc::pid_t,
                &raw const local,
                1,
                &raw const remote,
                1,
                0,
            )
        };
        match usize::try_from(count) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => done += count,
            Err(_) => return Err(io::Error::last_os_error()),
        }
    }
    // The number may only have changed hands after the process ended, so what was read before is its own.
    if process.is_alive() { Ok(()) } else { Err(gone()) }
}

/// Room for a copy of guest memory.
#[derive(Debug)]
pub struct CopyRoom {
    file: File,
    /// Where pages are reserved.
    reserved: Vec<Range<u64>>,
}

impl CopyRoom {
    /// An empty memfd of the size of guest memory.
    pub(super) fn empty(length: u64) -> io::Result<Self> {
        let file = File::from(rustix::fs::memfd_create("guest-memory", MemfdFlags::CLOEXEC)?);
        file.set_len(length)?;
        Ok(Self {
            file,
            reserved: Vec::new(),
        })
    }

    /// Takes pages for these ranges from the kernel.
    pub(super) fn reserve(&mut self, ranges: Vec<Range<u64>>) -> io::Result<()> {
        for range in &ranges {
            fallocate(
                &self.file,
                FallocateFlags::empty(),
                range.start,
                range.end - range.start,
            )?;
        }
        self.reserved = ranges;
        Ok(())
    }

    /// Copies the ranges to their own offsets, on all cores. Everything else of the file are holes.
    pub(super) fn fill(self, memory: &GuestMemory, ranges: &[Range<u64>]) -> io::Result<OwnedFd> {
        let pieces: Vec<Range<u64>> = ranges.iter().cloned().flat_map(pieces).collect();
        let next = AtomicUsize::new(0);
        let work = || -> io::Result<()> {
            let mut buffer = vec![0; PIECE as usize];
            while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                let buffer = &mut buffer[..(piece.end - piece.start) as usize];
                memory.read(piece.start, buffer)?;
                self.write(piece.start, buffer)?;
            }
            Ok(())
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = threads.min(MOST_THREADS).min(pieces.len());
        std::thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            let mut outcome = work();
            for other in others {
                let theirs = other
                    .join()
                    .unwrap_or_else(|_| Err(io::Error::other("a copying thread failed")));
                outcome = outcome.and(theirs);
            }
            outcome
        })?;
        for range in without(&self.reserved, ranges) {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(&self.file, flags, range.start, range.end - range.start)?;
        }
        Ok(self.file.into())
    }

    /// Writes what is not zero, a run of pages at a time.
    fn write(&self, start: u64, bytes: &[u8]) -> io::Result<()> {
        let mut run = 0..0;
        for (index, page) in bytes.chunks(PAGE).enumerate() {
            let at = index * PAGE;
            if *page != ZEROS[..page.len()] {
                run = if run.is_empty() { at } else { run.start }..at + page.len();
                continue;
            }
            self.file
                .write_all_at(&bytes[run.clone()], start + run.start as u64)?;
            run = at..at;
        }
        self.file
            .write_all_at(&bytes[run.clone()], start + run.start as u64)
    }
}

fn pieces(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let end = range.end;
    range
        .step_by(PIECE as usize)
        .map(move |start| start..(start + PIECE).min(end))
}

/// The parts of `all` that are in none of `taken`; both ascending and without overlap.
fn without(all: &[Range<u64>], taken: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut left = Vec::new();
    let mut taken = taken.iter().peekable();
    for range in all {
        let mut start = range.start;
        while let Some(other) = taken.peek() {
            if other.start >= range.end {
                break;
            }
            if other.start > start {
                left.push(start..other.start);
            }
            start = start.max(other.end);
            if other.end > range.end {
                break;
            }
            taken.next();
        }
        if start < range.end {
            left.push(start..range.end);
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ranges() -> impl Strategy<Value = Vec<Range<u64>>> {
        proptest::collection::vec((1_u64..9, 1_u64..9), 0..12).prop_map(|steps| {
            let mut at = 0;
            steps
                .into_iter()
                .map(|(gap, length)| {
                    let start = at + gap;
                    at = start + length;
                    start..at
                })
                .collect()
        })
    }

    proptest! {
        #[test]
        fn what_is_left_is_what_was_not_taken(all in ranges(), taken in ranges()) {
            let left = without(&all, &taken);
            let has = |ranges: &[Range<u64>], point| ranges.iter().any(|range| range.contains(&point));
            for point in 0..220 {
                prop_assert_eq!(has(&left, point), has(&all, point) && !has(&taken, point), "{}", point);
            }
        }

        #[test]
        fn pieces_are_the_range(start in 0_u64..10, pages in 0_u64..200) {
            let range = start * 4096..(start + pages) * 4096;
            let mut at = range.start;
            for piece in pieces(range.clone()) {
                prop_assert_eq!(piece.start, at);
                prop_assert!(piece.end > piece.start && piece.end - piece.start <= PIECE);
                at = piece.end;
            }
            prop_assert_eq!(at, range.end);
        }
    }
}
