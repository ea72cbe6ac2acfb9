//! Guest memory of a live VMM process, read and written from outside.
//!
//! ```text
//! GuestMemory ──► populated()      which pages hold something     (populated.rs: the page tables)
//!             ──► read(), write()  bytes at offsets               (this file)
//!             ──► copy_to_memfd()  many ranges as fast as it goes (copy.rs)
//! ```
//!
//! Offsets are those of the RAM block: guest physical addresses below the hole of 32-bit devices, and from there on
//! without the hole.
//!
//! Invariant: nothing is read from or written to a process that merely got the same number. `/proc/PID` and the
//! pidfd are opened while the identity is known to hold and stay bound to that process.

mod copy;
mod mappings;
mod populated;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};

pub use self::copy::CopyRoom;
use crate::process::ProcessHandle;

/// Where the RAM of one machine lies in its VMM's process. Cheap to clone; threads may share it.
#[derive(Debug, Clone)]
pub struct GuestMemory {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    process: Arc<ProcessHandle>,
    /// `/proc/PID`, bound to the process and not to its number.
    directory: OwnedFd,
    /// `/proc/PID/mem`, bound to the memory of the process.
    memory: File,
    address: u64,
    length: u64,
    private: bool,
}

impl GuestMemory {
    /// Checks that `length` bytes from `address` on are one block of private memory, and opens it.
    pub(crate) fn open(process: Arc<ProcessHandle>, address: u64, length: u64) -> io::Result<Self> {
        let path = format!("/proc/{}", process.identity().pid);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(path, flags, Mode::empty())?;
        let memory = rustix::fs::openat(&directory, "mem", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        // Looked at after both are open: what they are bound to is then the process that was meant.
        if !process.is_alive() {
            return Err(gone());
        }
        let maps = rustix::fs::openat(
            &directory,
            "maps",
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let kind = mappings::kind_of(File::from(maps), address, length)?;
        Ok(Self {
            inner: Arc::new(Inner {
                process,
                directory,
                memory: File::from(memory),
                address,
                length,
                private: kind == mappings::Kind::PrivateFile,
            }),
        })
    }

    /// Size of guest memory in bytes.
    #[allow(clippy::len_without_is_empty, reason = "no machine has no memory")]
    pub fn len(&self) -> u64 {
        self.inner.length
    }

    /// True when memory is a copy-on-write mapping of a file, so that [`GuestMemory::populated`] tells what
    /// differs from it.
    pub fn is_private_mapping(&self) -> bool {
        self.inner.private
    }

    /// Pages that may hold something, as merged ascending ranges of bytes. Anonymous memory: pages that are
    /// present or swapped; all others read as zeros. A private mapping: pages that the guest or the VMM wrote
    /// since the start; all others are those of the file.
    pub fn populated(&self) -> io::Result<Vec<Range<u64>>> {
        populated::scan(
            &self.inner.directory,
            self.inner.address,
            self.inner.length,
            self.inner.private,
        )
    }

    /// Fills `buffer` from `offset` on.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let address = self.address_of(offset, buffer.len())?;
        copy::read_process(&self.inner.process, address, buffer)
    }

    /// Writes `bytes` at `offset`.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let address = self.address_of(offset, bytes.len())?;
        self.inner.memory.write_all_at(bytes, address)
    }

    /// Copies ranges (as [`GuestMemory::populated`] gives them) to the same offsets of a fresh memfd of the size
    /// of guest memory, on all cores. The rest of the memfd are holes, and so may be pages of zeros.
    pub fn copy_to_memfd(&self, ranges: &[Range<u64>]) -> io::Result<OwnedFd> {
        CopyRoom::empty(self.len())?.fill(self, ranges)
    }

    /// Room for a copy of what is populated now. Called before the pause it takes more than a third off the time
    /// of the copy; ranges that are populated only later are copied all the same.
    pub fn room_for_copy(&self) -> io::Result<CopyRoom> {
        let mut room = CopyRoom::empty(self.len())?;
        room.reserve(self.populated()?)?;
        Ok(room)
    }

    /// As [`GuestMemory::copy_to_memfd`], into room that was made before.
    pub fn copy_into(&self, room: CopyRoom, ranges: &[Range<u64>]) -> io::Result<OwnedFd> {
        room.fill(self, ranges)
    }

    fn address_of(&self, offset: u64, length: usize) -> io::Result<u64> {
        let end = offset.checked_add(length as u64);
        match end {
            Some(end) if end <= self.inner.length => Ok(self.inner.address + offset),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "beyond the end of guest memory",
            )),
        }
    }
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, "the VMM process is gone")
}

#[cfg(test)]
mod tests;
