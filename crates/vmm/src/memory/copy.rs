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

use rustix::fs::{FallocateFlags, MemfdFlags, fallocate};

use super::{GuestMemory, gone};
use crate::process::ProcessHandle;
use crate::ranges::{PIECE, each_piece, union, without};

const PAGE: usize = 4096;

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

    /// Takes pages for these ranges from the kernel, beside those that it took before.
    pub(super) fn reserve(&mut self, ranges: &[Range<u64>]) -> io::Result<()> {
        let more = without(ranges, &self.reserved);
        for range in &more {
            fallocate(
                &self.file,
                FallocateFlags::empty(),
                range.start,
                range.end - range.start,
            )?;
        }
        self.reserved = union(std::mem::take(&mut self.reserved), more);
        Ok(())
    }

    /// Copies the ranges to their own offsets, on all cores. Everything else of the file are holes.
    pub(super) fn fill(self, memory: &GuestMemory, ranges: &[Range<u64>]) -> io::Result<OwnedFd> {
        let ranges = without(ranges, &memory.given_back()?);
        each_piece(
            &ranges,
            || vec![0; PIECE as usize],
            |buffer, piece| {
                let buffer = &mut buffer[..(piece.end - piece.start) as usize];
                memory.read(piece.start, buffer)?;
                self.write(piece.start, buffer)
            },
        )?;
        for range in without(&self.reserved, &ranges) {
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn room_grows_by_what_it_does_not_have_yet() {
        let mut room = CopyRoom::empty(8 * MIB).unwrap();
        room.reserve(&[MIB..2 * MIB, 4 * MIB..5 * MIB]).unwrap();
        room.reserve(&[0..MIB, 4 * MIB..6 * MIB]).unwrap();
        let total: u64 = room.reserved.iter().map(|range| range.end - range.start).sum();
        assert_eq!(total, 4 * MIB);
        assert!(without(&[0..2 * MIB, 4 * MIB..6 * MIB], &room.reserved).is_empty());
        assert!(room.file.metadata().unwrap().blocks() * 512 >= 4 * MIB);
    }
}
