//! Compressed files.
//!
//! Content is cut into extents of 64 KiB; each becomes one physical cluster of as many blocks as LZ4 makes of it,
//! padded with zeros *in front* (so that the kernel can decompress in place), or stays as it is. Cutting the
//! input, not the output, needs one compression per extent and keeps extents on logical-cluster borders.
//!
//! The index has 8 bytes for each 4 KiB of content: a head for the first of an extent (or a plain entry for each
//! block of a stored one), and for the others the distances to this head and to the next. The first after a head
//! tells the blocks of the cluster instead.

use lz4_flex::block::{compress_into, get_maximum_output_size};

use crate::BLOCK_SIZE;
use crate::builder::{Finished, Sink};
use crate::error::Error;

/// Content bytes of one extent.
pub(crate) const EXTENT_SIZE: usize = 64 << 10;

/// Blocks of the largest physical cluster, as the superblock announces it.
pub(crate) const LARGEST_CLUSTER: u16 = (EXTENT_SIZE / BLOCK_SIZE) as u16;

const PLAIN: u16 = 0;
const HEAD: u16 = 1;
const NOT_HEAD: u16 = 2;
/// Marks the distance to the head as the count of blocks.
const BLOCK_COUNT: u16 = 1 << 11;
/// The file has clusters of more than one block.
const ADVISE_BIG_CLUSTER: u16 = 1 << 1;

#[derive(Clone, Copy)]
struct Extent {
    start: u32,
    /// Blocks of the compressed cluster; zero if the extent is stored as it is.
    compressed_blocks: u16,
}

/// Compresses one file.
pub(crate) struct ExtentWriter {
    extents: Vec<Extent>,
    stored: u64,
    any_compressed: bool,
}

impl ExtentWriter {
    /// Larger files are not compressed, for the sake of the size of their index.
    pub(crate) const LARGEST_FILE: u64 = 8 << 30;

    pub(crate) fn new() -> Self {
        Self {
            extents: Vec::new(),
            stored: 0,
            any_compressed: false,
        }
    }

    /// Takes the next extent; all but the last are of full size.
    pub(crate) fn extent(&mut self, sink: &mut Sink<'_, '_>, content: &[u8]) -> Result<(), Error> {
        let compressed = compress(sink.scratch, content);
        self.store(sink, content, compressed)
    }

    /// Stores an extent that was compressed into the scratch buffer.
    fn store(&mut self, sink: &mut Sink<'_, '_>, content: &[u8], compressed: usize) -> Result<(), Error> {
        let start = sink.output.block()?;
        let plain_blocks = content.len().div_ceil(BLOCK_SIZE);
        let blocks = compressed.div_ceil(BLOCK_SIZE);
        if blocks < plain_blocks {
            sink.output.skip((blocks * BLOCK_SIZE - compressed) as u64)?;
            sink.output.append(&sink.scratch[..compressed])?;
            self.extents.push(Extent {
                start,
                compressed_blocks: blocks as u16,
            });
            self.stored += blocks as u64;
            self.any_compressed = true;
        } else {
            sink.output.append(content)?;
            sink.output.align()?;
            self.extents.push(Extent {
                start,
                compressed_blocks: 0,
            });
            self.stored += plain_blocks as u64;
        }
        Ok(())
    }

    /// Takes the last extent and decides the layout.
    pub(crate) fn finish(mut self, sink: &mut Sink<'_, '_>, rest: Vec<u8>) -> Result<Finished, Error> {
        if rest.is_empty() {
            // The file ended with a whole extent.
        } else if self.extents.is_empty() {
            // A small file is stored flat unless compression saves more than an inline tail does.
            let compressed = compress(sink.scratch, &rest);
            let clusters = rest.len().div_ceil(BLOCK_SIZE);
            if compressed.next_multiple_of(BLOCK_SIZE) + 16 + 8 * clusters >= rest.len() {
                let first_block = sink.output.block()?;
                let tail = rest.len() - rest.len() % BLOCK_SIZE;
                sink.output.append(&rest[..tail])?;
                return Ok(Finished::Flat {
                    first_block,
                    tail: rest[tail..].to_vec(),
                });
            }
            self.store(sink, &rest, compressed)?;
        } else if self.any_compressed || rest.len() > BLOCK_SIZE {
            self.extent(sink, &rest)?;
        } else {
            // Everything so far is stored as it is and in sequence: a flat file with a tail.
            return Ok(Finished::Flat {
                first_block: self.extents[0].start,
                tail: rest,
            });
        }
        if !self.any_compressed {
            return Ok(Finished::Flat {
                first_block: self.extents[0].start,
                tail: Vec::new(),
            });
        }
        Ok(Finished::Compressed(ExtentList {
            extents: self.extents,
            last_size: if rest.is_empty() { EXTENT_SIZE } else { rest.len() },
            blocks: u32::try_from(self.stored).map_err(|_| Error::TooLarge)?,
        }))
    }
}

/// Compresses into the scratch buffer and returns the size.
fn compress(scratch: &mut Vec<u8>, content: &[u8]) -> usize {
    scratch.resize(get_maximum_output_size(EXTENT_SIZE), 0);
    // The buffer has the size that cannot fail; should it, the extent is stored as it is.
    compress_into(content, scratch).unwrap_or(2 * EXTENT_SIZE)
}

/// The index of a compressed file.
pub(crate) struct ExtentList {
    extents: Vec<Extent>,
    last_size: usize,
    blocks: u32,
}

impl ExtentList {
    /// Blocks that the file takes.
    pub(crate) fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Appends the header and the index to an inode, aligned to 8 bytes.
    pub(crate) fn encode(&self, into: &mut Vec<u8>) {
        into.resize(into.len().next_multiple_of(8), 0);
        into.extend([0; 4]);
        into.extend(ADVISE_BIG_CLUSTER.to_le_bytes());
        // Algorithm 0 is LZ4; logical clusters are of one block. Then comes a gap of historical origin.
        into.extend([0; 2]);
        into.extend([0; 8]);
        let last = self.extents.len() - 1;
        for (index, extent) in self.extents.iter().enumerate() {
            let size = if index == last {
                self.last_size
            } else {
                EXTENT_SIZE
            };
            let clusters = size.div_ceil(BLOCK_SIZE) as u16;
            for cluster in 0..clusters {
                if extent.compressed_blocks == 0 {
                    encode_head(PLAIN, extent.start + u32::from(cluster), into);
                } else if cluster == 0 {
                    encode_head(HEAD, extent.start, into);
                } else {
                    let back = if cluster == 1 {
                        BLOCK_COUNT | extent.compressed_blocks
                    } else {
                        cluster
                    };
                    into.extend(NOT_HEAD.to_le_bytes());
                    into.extend([0; 2]);
                    into.extend(back.to_le_bytes());
                    into.extend((clusters - cluster).to_le_bytes());
                }
            }
        }
    }
}

fn encode_head(kind: u16, address: u32, into: &mut Vec<u8>) {
    into.extend(kind.to_le_bytes());
    // Extents begin at the first byte of their logical cluster.
    into.extend([0; 2]);
    into.extend(address.to_le_bytes());
}
