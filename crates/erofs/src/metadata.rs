//! Packs inodes, with their inline tails, into metadata blocks.
//!
//! A few blocks stay open at a time; a unit goes where the least room is left over, so that a large tail does
//! not close a block that ten small inodes would still fit into. When none has room the fullest is written out.

use std::io;

use crate::BLOCK_SIZE;
use crate::format::SLOT;
use crate::output::Output;

const OPEN_BLOCKS: usize = 16;
const LARGEST_REGION: u64 = 16;

struct OpenBlock {
    offset: u64,
    used: usize,
    bytes: Box<[u8; BLOCK_SIZE]>,
}

/// The metadata blocks of an image.
pub(crate) struct Metadata {
    open: Vec<OpenBlock>,
    /// The part of the current region that no block was taken from yet.
    region: std::ops::Range<u64>,
    /// Blocks of the next region; regions grow, so that a small image stays small.
    next_region: u64,
}

impl Metadata {
    pub(crate) fn new() -> Self {
        Self {
            open: Vec::with_capacity(OPEN_BLOCKS),
            region: 0..0,
            next_region: 1,
        }
    }

    /// Takes room for a unit of at most one block that must not cross a block; returns its offset.
    pub(crate) fn reserve(&mut self, output: &mut Output<'_>, size: usize) -> io::Result<u64> {
        debug_assert!(size <= BLOCK_SIZE);
        let fitting = self
            .open
            .iter_mut()
            .filter(|block| block.used + size <= BLOCK_SIZE)
            .max_by_key(|block| (block.used, block.offset));
        let block = match fitting {
            Some(block) => block,
            None => self.open_block(output)?,
        };
        let offset = block.offset + block.used as u64;
        block.used = (block.used + size).next_multiple_of(SLOT);
        Ok(offset)
    }

    /// Takes room for a unit and fills it.
    pub(crate) fn place(&mut self, output: &mut Output<'_>, unit: &[u8]) -> io::Result<u64> {
        let offset = self.reserve(output, unit.len())?;
        self.write_at(output, unit, offset)?;
        Ok(offset)
    }

    /// Writes into room taken before, in an open block or one already written. The range lies in one block.
    pub(crate) fn write_at(&mut self, output: &mut Output<'_>, bytes: &[u8], offset: u64) -> io::Result<()> {
        let block_offset = offset - offset % BLOCK_SIZE as u64;
        match self.open.iter_mut().find(|block| block.offset == block_offset) {
            Some(block) => {
                let start = (offset - block_offset) as usize;
                block.bytes[start..start + bytes.len()].copy_from_slice(bytes);
                Ok(())
            }
            None => output.write_at(bytes, offset),
        }
    }

    fn open_block(&mut self, output: &mut Output<'_>) -> io::Result<&mut OpenBlock> {
        if self.region.is_empty() {
            let start = output.position();
            output.skip(self.next_region * BLOCK_SIZE as u64)?;
            self.region = start..output.position();
            self.next_region = (self.next_region * 2).min(LARGEST_REGION);
        }
        let offset = self.region.start;
        self.region.start += BLOCK_SIZE as u64;
        let fresh = OpenBlock {
            offset,
            used: 0,
            bytes: Box::new([0; BLOCK_SIZE]),
        };
        let fullest = (0..self.open.len()).max_by_key(|index| self.open[*index].used);
        let index = match fullest {
            Some(index) if self.open.len() == OPEN_BLOCKS => {
                let full = std::mem::replace(&mut self.open[index], fresh);
                output.write_at(&full.bytes[..], full.offset)?;
                index
            }
            _ => {
                self.open.push(fresh);
                self.open.len() - 1
            }
        };
        Ok(&mut self.open[index])
    }

    /// Writes the open blocks, and gives back the rest of the region if it is the end of the image.
    pub(crate) fn finish(&mut self, output: &mut Output<'_>) -> io::Result<()> {
        for block in self.open.drain(..) {
            output.write_at(&block.bytes[..], block.offset)?;
        }
        if !self.region.is_empty() && self.region.end == output.position() {
            output.shrink_to(self.region.start)?;
            self.region = 0..0;
        }
        Ok(())
    }
}
