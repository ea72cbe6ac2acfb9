//! Guest memory of a live VMM process, read and written from outside.
//!
//! ```text
//! GuestMemory ──► populated()      which pages hold something     (populated.rs: the page tables)
//!             ──► read(), write()  bytes at offsets               (this file)
//!             ──► copy_to_memfd()  many ranges as fast as it goes (copy.rs)
//! ```
//!
//! Offsets are those of the RAM block: guest physical addresses below the hole of 32-bit devices, and from there on
//! without the hole. A VMM may map the parts below and above the hole apart from each other:
//!
//! ```text
//! offsets    0 ─────────────────── 3 GiB ──────────── end
//! process    └ segment 0, anywhere ┘└ segment 1, elsewhere ┘
//! ```
//!
//! Invariant: nothing is read from or written to a process that merely got the same number. `/proc/PID` and the
//! pidfd are opened while the identity is known to hold and stay bound to that process.

mod copy;
pub(crate) mod locate;
mod mappings;
mod populated;
mod served;

use std::fs::File;
use std::io::{self, BufReader};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};

pub use self::copy::CopyRoom;
use self::mappings::Kind;
use crate::process::ProcessHandle;
use crate::ranges::{union, without};

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
    segments: Vec<Segment>,
    length: u64,
    missing: Missing,
}

/// What a page holds that the process does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Missing {
    /// Zeros.
    Zero,
    /// What the file behind the mapping holds.
    File,
    /// What somebody will fill it with once it is asked for.
    Served,
}

/// One block of guest memory in the address space of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Segment {
    pub(crate) address: u64,
    pub(crate) length: u64,
}

impl GuestMemory {
    /// Checks that each segment is one block of private memory, and opens them. Offsets count through them in order.
    pub(crate) fn open(process: Arc<ProcessHandle>, segments: Vec<Segment>) -> io::Result<Self> {
        Self::opened(process, segments, false)
    }

    /// The same for memory whose missing pages somebody may fill.
    pub(crate) fn open_maybe_served(process: Arc<ProcessHandle>, segments: Vec<Segment>) -> io::Result<Self> {
        Self::opened(process, segments, true)
    }

    fn opened(process: Arc<ProcessHandle>, segments: Vec<Segment>, maybe_served: bool) -> io::Result<Self> {
        let path = format!("/proc/{}", process.identity().pid);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(path, flags, Mode::empty())?;
        let memory = rustix::fs::openat(&directory, "mem", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        // Looked at after both are open: what they are bound to is then the process that was meant.
        if !process.is_alive() {
            return Err(gone());
        }
        if segments.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "no machine has no memory",
            ));
        }
        let mut of_file = false;
        for segment in &segments {
            let maps = open_maps(&directory)?;
            of_file |= mappings::kind_of(maps, segment.address, segment.length)? == Kind::PrivateFile;
        }
        let missing = match of_file {
            // Of any of them. One that is plain memory altogether was given back as a whole.
            true => Missing::File,
            // Reading the flags costs a walk through all of the process's tables.
            false if maybe_served => {
                let flags = OFlags::RDONLY | OFlags::CLOEXEC;
                let smaps = rustix::fs::openat(&directory, "smaps", flags, Mode::empty())?;
                let ranges = served::ranges(BufReader::new(File::from(smaps)))?;
                match segments.iter().all(|segment| served::covers(&ranges, segment)) {
                    true => Missing::Served,
                    false => Missing::Zero,
                }
            }
            false => Missing::Zero,
        };
        Ok(Self {
            inner: Arc::new(Inner {
                process,
                directory,
                memory: File::from(memory),
                length: segments.iter().map(|segment| segment.length).sum(),
                segments,
                missing,
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
        self.inner.missing == Missing::File
    }

    /// True when pages that [`GuestMemory::populated`] does not name are those that the machine was restored from, and
    /// false when they are zero.
    pub fn misses_what_it_came_from(&self) -> bool {
        self.inner.missing != Missing::Zero
    }

    /// Pages that may hold something, as merged ascending ranges of bytes. Anonymous memory: pages that are
    /// present or swapped; all others read as zeros. A private mapping: pages that the guest or the VMM wrote
    /// since the start, and those that it gave back; all others are those of the file. Memory that somebody serves:
    /// pages that are there, zeros included; all others are what they would be filled with.
    pub fn populated(&self) -> io::Result<Vec<Range<u64>>> {
        let missing = self.inner.missing;
        let found = self.each_segment(|segment| self.scan(segment.address..segment.end(), missing))?;
        let replaced = self.each_segment(|segment| self.replaced(segment))?;
        Ok(union(found, replaced))
    }

    /// Populated pages of which it is known without reading them that they are zero: those that the guest of a private
    /// mapping gave back and has not asked for since.
    fn given_back(&self) -> io::Result<Vec<Range<u64>>> {
        self.each_segment(|segment| {
            let replaced = self.replaced(segment)?;
            let mut there = Vec::new();
            for range in replaced.iter().cloned() {
                there.extend(self.scan(range, Missing::Zero)?);
            }
            Ok(without(&replaced, &there))
        })
    }

    /// Addresses at which plain memory is in the place of the file that a segment maps.
    fn replaced(&self, segment: &Segment) -> io::Result<Vec<Range<u64>>> {
        if self.inner.missing != Missing::File {
            return Ok(Vec::new());
        }
        mappings::replaced(open_maps(&self.inner.directory)?, segment.address, segment.length)
    }

    /// Addresses of what is populated.
    fn scan(&self, addresses: Range<u64>, missing: Missing) -> io::Result<Vec<Range<u64>>> {
        let (start, length) = (addresses.start, addresses.end - addresses.start);
        let found = populated::scan(&self.inner.directory, start, length, missing)?;
        let found = found.into_iter();
        Ok(found
            .map(|range| start + range.start..start + range.end)
            .collect())
    }

    /// Finds addresses in each segment; tells them as offsets.
    fn each_segment(
        &self,
        find: impl Fn(&Segment) -> io::Result<Vec<Range<u64>>>,
    ) -> io::Result<Vec<Range<u64>>> {
        let mut all = Vec::new();
        let mut offset = 0;
        for segment in &self.inner.segments {
            let begin = segment.address;
            let found = find(segment)?.into_iter();
            all.extend(found.map(|range| range.start - begin + offset..range.end - begin + offset));
            offset += segment.length;
        }
        Ok(all)
    }

    /// Fills `buffer` from `offset` on.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let mut rest = buffer;
        for (address, count) in self.places(offset, rest.len())? {
            let (now, later) = rest.split_at_mut(count);
            copy::read_process(&self.inner.process, address, now)?;
            rest = later;
        }
        Ok(())
    }

    /// Writes `bytes` at `offset`.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut rest = bytes;
        for (address, count) in self.places(offset, rest.len())? {
            let (now, later) = rest.split_at(count);
            self.inner.memory.write_all_at(now, address)?;
            rest = later;
        }
        Ok(())
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
        self.widen_room(&mut room)?;
        Ok(room)
    }

    /// Adds room for what was populated since the room was made.
    pub fn widen_room(&self, room: &mut CopyRoom) -> io::Result<()> {
        room.reserve(&self.populated()?)
    }

    /// As [`GuestMemory::copy_to_memfd`], into room that was made before.
    pub fn copy_into(&self, room: CopyRoom, ranges: &[Range<u64>]) -> io::Result<OwnedFd> {
        room.fill(self, ranges)
    }

    /// Addresses and lengths of the pieces that `length` bytes from `offset` on lie in.
    fn places(&self, offset: u64, length: usize) -> io::Result<Vec<(u64, usize)>> {
        let end = offset.checked_add(length as u64);
        let Some(end) = end.filter(|end| *end <= self.inner.length) else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "beyond the end of guest memory",
            ));
        };
        let mut places = Vec::with_capacity(1);
        let mut begin = 0;
        for segment in &self.inner.segments {
            let from = offset.max(begin);
            let to = end.min(begin + segment.length);
            if from < to {
                places.push((segment.address + (from - begin), (to - from) as usize));
            }
            begin += segment.length;
        }
        Ok(places)
    }
}

impl Segment {
    fn end(&self) -> u64 {
        self.address + self.length
    }
}

fn open_maps(directory: &OwnedFd) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(directory, "maps", flags, Mode::empty())?.into())
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, "the VMM process is gone")
}

#[cfg(test)]
mod tests;
