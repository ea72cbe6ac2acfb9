//! Uncompressed files, whose zero ranges are left out.
//!
//! A file is seen as chunks of a power of two blocks. A chunk that is zero throughout is a hole; any other is
//! written whole. A file without holes is stored flat; one with holes as a table of chunk addresses.
//!
//! The chunk size is chosen before the first byte arrives: one block for a file known to be sparse, 64 KiB for
//! another (a table entry for every block of a binary with a zero page in it would slow every reader down), and
//! always large enough for the table to stay below 1 MiB. At the end it is doubled while the holes allow.

use crate::BLOCK_SIZE;
use crate::builder::Finished;
use crate::error::Error;
use crate::format::NULL_ADDRESS;
use crate::output::Output;

/// Most entries of a chunk table.
const LONGEST_TABLE: u64 = 1 << 18;

/// Binary logarithm of the blocks in a chunk of a file not known to be sparse: 64 KiB.
const ORDINARY_CHUNK: u32 = 4;

/// Largest chunk that a table is folded to: 1 GiB.
const LARGEST_FOLDED_CHUNK: u32 = 18;

/// Consecutive chunks in consecutive blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    first_chunk: u64,
    chunks: u64,
    start: u32,
}

/// Writes the blocks of one file and remembers which chunks it left out.
pub(crate) struct PlainWriter {
    size: u64,
    /// Binary logarithm of the blocks in a chunk.
    chunk_bits: u32,
    /// Index in the file of the next block.
    next_block: u64,
    runs: Vec<Run>,
    /// Whether the current chunk has a block in the image.
    open: bool,
    /// Zero blocks of the current chunk that were not written yet.
    pending_zeros: u64,
    /// Whether a chunk was left out.
    has_holes: bool,
}

impl PlainWriter {
    pub(crate) fn new(size: u64, sparse: bool) -> Self {
        let mut chunk_bits = if sparse { 0 } else { ORDINARY_CHUNK };
        while size.div_ceil((BLOCK_SIZE as u64) << chunk_bits) > LONGEST_TABLE {
            chunk_bits += 1;
        }
        Self {
            size,
            chunk_bits,
            next_block: 0,
            runs: Vec::new(),
            open: false,
            pending_zeros: 0,
            has_holes: false,
        }
    }

    fn chunk_blocks(&self) -> u64 {
        1 << self.chunk_bits
    }

    /// Takes whole blocks.
    pub(crate) fn blocks(&mut self, output: &mut Output<'_>, bytes: &[u8]) -> Result<(), Error> {
        for block in bytes.chunks_exact(BLOCK_SIZE) {
            if is_zero(block) {
                self.zero_blocks(output, 1)?;
            } else {
                self.open_chunk(output)?;
                output.append(block)?;
                self.step(output, 1)?;
            }
        }
        Ok(())
    }

    /// Takes `count` blocks of zeros.
    pub(crate) fn zero_blocks(&mut self, output: &mut Output<'_>, count: u64) -> Result<(), Error> {
        let mut left = count;
        while left > 0 {
            let into_chunk = self.next_block % self.chunk_blocks();
            let whole_chunks = left >> self.chunk_bits;
            if into_chunk == 0 && whole_chunks > 0 {
                self.has_holes = true;
                self.next_block += whole_chunks << self.chunk_bits;
                left -= whole_chunks << self.chunk_bits;
            } else {
                let step = left.min(self.chunk_blocks() - into_chunk);
                self.pending_zeros += step;
                self.step(output, step)?;
                left -= step;
            }
        }
        Ok(())
    }

    /// Makes the current chunk one that is in the image, with its blocks up to here.
    fn open_chunk(&mut self, output: &mut Output<'_>) -> Result<(), Error> {
        if !self.open {
            self.open = true;
            let start = output.block()?;
            let chunk = self.next_block >> self.chunk_bits;
            match self.runs.last_mut() {
                Some(run)
                    if run.first_chunk + run.chunks == chunk
                        && u64::from(run.start) + (run.chunks << self.chunk_bits) == u64::from(start) =>
                {
                    run.chunks += 1;
                }
                _ => self.runs.push(Run {
                    first_chunk: chunk,
                    chunks: 1,
                    start,
                }),
            }
        }
        self.write_pending_zeros(output)
    }

    fn write_pending_zeros(&mut self, output: &mut Output<'_>) -> Result<(), Error> {
        output.skip(self.pending_zeros * BLOCK_SIZE as u64)?;
        self.pending_zeros = 0;
        Ok(())
    }

    /// Moves on within the current chunk, and closes it at its end.
    fn step(&mut self, output: &mut Output<'_>, blocks: u64) -> Result<(), Error> {
        self.next_block += blocks;
        if self.next_block.is_multiple_of(self.chunk_blocks()) {
            if self.open {
                self.write_pending_zeros(output)?;
            } else {
                self.has_holes = true;
            }
            self.open = false;
            self.pending_zeros = 0;
        }
        Ok(())
    }

    /// Takes the last, partial block and decides the layout.
    pub(crate) fn finish(mut self, output: &mut Output<'_>, tail: Vec<u8>) -> Result<Finished, Error> {
        let tail_is_zero = is_zero(&tail);
        if !self.open && self.pending_zeros > 0 && tail_is_zero {
            self.has_holes = true;
        }
        if !self.has_holes {
            if self.pending_zeros > 0 {
                self.open_chunk(output)?;
            }
            let first_block = self
                .runs
                .first()
                .map_or_else(|| output.block(), |run| Ok(run.start))?;
            let first_block = if self.size == 0 { NULL_ADDRESS } else { first_block };
            return Ok(Finished::Flat { first_block, tail });
        }
        if !tail.is_empty() && !tail_is_zero {
            self.open_chunk(output)?;
            output.append(&tail)?;
            output.align()?;
        } else if self.open {
            self.pending_zeros += u64::from(!tail.is_empty());
            self.write_pending_zeros(output)?;
        }
        Ok(Finished::Chunked(ChunkMap::folded(
            self.size,
            self.chunk_bits,
            self.runs,
        )))
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<64>();
    words
        .iter()
        .all(|word| word.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

/// The chunk table of a file with holes.
pub(crate) struct ChunkMap {
    chunk_bits: u32,
    chunks: u64,
    runs: Vec<Run>,
}

impl ChunkMap {
    /// Doubles the chunk size while every run still consists of whole chunks.
    fn folded(size: u64, mut chunk_bits: u32, mut runs: Vec<Run>) -> Self {
        let count = |bits: u32| size.div_ceil((BLOCK_SIZE as u64) << bits);
        while chunk_bits < LARGEST_FOLDED_CHUNK && count(chunk_bits) > 1 {
            let total = count(chunk_bits);
            let folds = |run: &Run| {
                let end = run.first_chunk + run.chunks;
                run.first_chunk.is_multiple_of(2) && (end.is_multiple_of(2) || end == total)
            };
            if !runs.iter().all(folds) {
                break;
            }
            for run in &mut runs {
                run.first_chunk /= 2;
                run.chunks = run.chunks.div_ceil(2);
            }
            chunk_bits += 1;
        }
        Self {
            chunk_bits,
            chunks: count(chunk_bits),
            runs,
        }
    }

    /// The word of the inode that tells the chunk size.
    pub(crate) fn format(&self) -> u32 {
        self.chunk_bits
    }

    /// Appends the table: a 4-byte block address for each chunk.
    pub(crate) fn encode(&self, into: &mut Vec<u8>) {
        let mut next = 0;
        for run in &self.runs {
            into.extend(std::iter::repeat_n(0xff, 4 * (run.first_chunk - next) as usize));
            for index in 0..run.chunks {
                let address = run.start + (index << self.chunk_bits) as u32;
                into.extend(address.to_le_bytes());
            }
            next = run.first_chunk + run.chunks;
        }
        into.extend(std::iter::repeat_n(0xff, 4 * (self.chunks - next) as usize));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_one_hole_needs_one_entry() {
        let map = ChunkMap::folded(1 << 30, 4, Vec::new());
        assert_eq!((map.chunk_bits, map.chunks), (18, 1));
    }

    #[test]
    fn folding_stops_where_a_run_would_be_cut() {
        let run = |first_chunk, chunks, start| Run {
            first_chunk,
            chunks,
            start,
        };
        let map = ChunkMap::folded(16 * 4096, 0, vec![run(0, 4, 10), run(8, 2, 14)]);
        assert_eq!(map.chunk_bits, 1);
        assert_eq!(map.runs, [run(0, 2, 10), run(4, 1, 14)]);
        let mut bytes = Vec::new();
        map.encode(&mut bytes);
        let addresses: Vec<u32> = bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|word| u32::from_le_bytes(*word))
            .collect();
        let none = NULL_ADDRESS;
        assert_eq!(addresses, [10, 12, none, none, 14, none, none, none]);
    }
}
