//! What the vault reads: guest memory of one instant, as a copy or where it is.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use hypeman_snapshots::MemorySource;
use hypeman_vmm::{CopyRoom, GuestMemory};

/// Guest memory of one instant.
#[derive(Debug)]
pub(crate) struct Frozen {
    /// What may hold something.
    pub(super) ranges: Vec<Range<u64>>,
    pub(super) content: Content,
    /// Everything else is what the machine's base has, and not zero.
    pub(super) over_base: bool,
}

#[derive(Debug)]
pub(super) enum Content {
    /// A copy: the guest runs again.
    Copied(File),
    /// The memory itself: the guest stands still until it is kept.
    Live(GuestMemory),
}

impl Frozen {
    /// Copies guest memory within RAM, into room made before, so that the guest can go on.
    ///
    /// `served`: it still was when the guest stood still, whatever was so when `memory` was opened.
    pub(crate) fn copied(memory: &GuestMemory, room: CopyRoom, served: bool) -> io::Result<Self> {
        let ranges = memory.populated()?;
        let copy = memory.copy_into(room, &ranges)?;
        Ok(Self {
            ranges,
            content: Content::Copied(File::from(copy)),
            over_base: memory.is_private_mapping() || served,
        })
    }

    /// Reads guest memory where it is.
    pub(crate) fn live(memory: GuestMemory) -> io::Result<Self> {
        Ok(Self {
            ranges: memory.populated()?,
            over_base: memory.misses_what_it_came_from(),
            content: Content::Live(memory),
        })
    }
}

impl MemorySource for Frozen {
    fn extents(&self) -> Vec<Range<u64>> {
        self.ranges.clone()
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        match &self.content {
            Content::Copied(copy) => copy.read_exact_at(into, offset),
            Content::Live(memory) => memory.read(offset, into),
        }
    }
}
