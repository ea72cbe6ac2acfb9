//! The writer: file contents first, as they come; the tree at the end (see `image`).
//!
//! ```text
//!   Builder::new ──► begin_file ──► FileWriter::write | hole ──► finish ──► FileHandle ──┐
//!        ▲                                                                              │
//!        └──────────────────────── once for each regular file ──────────────────────────┘
//!   Builder::finish(tree) ──► Summary
//! ```

use std::fs::File;

use crate::chunks::PlainWriter;
use crate::error::Error;
use crate::extents::{EXTENT_SIZE, ExtentWriter};
use crate::format::{Inode, Layout, TYPE_REGULAR, Timestamp, nlink_field};
use crate::metadata::Metadata;
use crate::output::Output;
use crate::tree::Attributes;
use crate::{BLOCK_SIZE, xattr};

/// How file contents are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// As they are. Zero ranges still cost nothing.
    #[default]
    None,
    /// LZ4 in units of 64 KiB; a unit that does not shrink is stored as it is.
    Lz4,
}

/// Choices for a whole image.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// How file contents are stored.
    pub compression: Compression,
    /// Identifier of the file system; zero unless set, so that equal content gives equal images.
    pub uuid: [u8; 16],
}

/// A regular file that was written to the image, to be named by the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileHandle(pub(crate) u32);

/// Where a file that was written lies.
pub(crate) struct WrittenFile {
    pub(crate) inode_offset: u64,
    pub(crate) first_block: u32,
    pub(crate) blocks: u32,
    pub(crate) compact: bool,
}

/// Writes one image. See the crate's documentation for the order of calls.
pub struct Builder<'a> {
    pub(crate) output: Output<'a>,
    pub(crate) metadata: Metadata,
    pub(crate) options: Options,
    pub(crate) files: Vec<WrittenFile>,
    /// The time that 32-byte inodes share: that of the first inode written.
    pub(crate) build_time: Option<Timestamp>,
    pub(crate) next_serial: u32,
    /// Incompatible features that the image turned out to use.
    pub(crate) features: u32,
    scratch: Vec<u8>,
}

/// What a layout strategy needs of the builder while a file is written.
pub(crate) struct Sink<'b, 'a> {
    pub(crate) output: &'b mut Output<'a>,
    pub(crate) scratch: &'b mut Vec<u8>,
}

/// What remains to be written of a file once its blocks are: the inode and what follows it.
pub(crate) enum Finished {
    /// Contiguous blocks, of which the last partial one was not written yet.
    Flat {
        first_block: u32,
        tail: Vec<u8>,
    },
    Chunked(crate::chunks::ChunkMap),
    Compressed(crate::extents::ExtentList),
}

impl<'a> Builder<'a> {
    /// Starts an image in a file, whose previous content is dropped. The file need not be at offset zero.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn new(output: &'a File, options: Options) -> Result<Self, Error> {
        let mut output = Output::new(output)?;
        // Block 0 is written last: superblock and root inode.
        output.skip(BLOCK_SIZE as u64)?;
        Ok(Self {
            output,
            metadata: Metadata::new(),
            options,
            files: Vec::new(),
            build_time: None,
            next_serial: 1,
            features: 0,
            scratch: Vec::new(),
        })
    }

    /// Starts a regular file of `size` bytes. `sparse` says that the file is known to have holes: they are then
    /// kept at the finest granularity, and the file is not compressed.
    ///
    /// # Errors
    /// When an extended attribute cannot be represented.
    pub fn begin_file(
        &mut self,
        attributes: &Attributes,
        size: u64,
        sparse: bool,
    ) -> Result<FileWriter<'_, 'a>, Error> {
        let xattrs = xattr::encode(&attributes.xattrs)?;
        let compress = self.options.compression == Compression::Lz4
            && !sparse
            && size > BLOCK_SIZE as u64
            && size <= ExtentWriter::LARGEST_FILE;
        let first_block = self.output.block()?;
        let strategy = if compress {
            Strategy::Compressed(ExtentWriter::new())
        } else {
            Strategy::Plain(PlainWriter::new(size, sparse))
        };
        let unit = if compress { EXTENT_SIZE } else { BLOCK_SIZE };
        Ok(FileWriter {
            builder: self,
            attributes: attributes.clone(),
            xattrs,
            size,
            received: 0,
            first_block,
            pending: Vec::with_capacity(unit.min(size as usize)),
            unit,
            strategy,
        })
    }

    pub(crate) fn take_serial(&mut self) -> u32 {
        let serial = self.next_serial;
        self.next_serial = self.next_serial.wrapping_add(1).max(1);
        serial
    }

    pub(crate) fn build_time_or(&mut self, attributes: &Attributes) -> Timestamp {
        *self.build_time.get_or_insert(Timestamp::of(attributes))
    }

    /// Writes an inode and what follows it where the unit does not cross a block, or, if it is larger than one,
    /// at the end of the image. Returns its offset.
    pub(crate) fn place_unit(&mut self, unit: &[u8]) -> Result<u64, Error> {
        if unit.len() <= BLOCK_SIZE {
            return Ok(self.metadata.place(&mut self.output, unit)?);
        }
        let offset = self.output.position();
        self.output.append(unit)?;
        Ok(offset)
    }

    /// Records how many names a file has.
    pub(crate) fn set_link_count(&mut self, file: FileHandle, count: u32) -> Result<(), Error> {
        let written = &self.files[file.0 as usize];
        let (field, width) = nlink_field(written.compact);
        if width == 2 && count > u32::from(u16::MAX) {
            return Err(Error::TooManyLinks(count));
        }
        let offset = written.inode_offset + field;
        Ok(self
            .metadata
            .write_at(&mut self.output, &count.to_le_bytes()[..width], offset)?)
    }
}

enum Strategy {
    Plain(PlainWriter),
    Compressed(ExtentWriter),
}

/// Takes the content of one regular file.
pub struct FileWriter<'b, 'a> {
    builder: &'b mut Builder<'a>,
    attributes: Attributes,
    xattrs: Vec<u8>,
    size: u64,
    received: u64,
    first_block: u32,
    /// Bytes that do not fill a unit yet.
    pending: Vec<u8>,
    /// Bytes that the strategy takes at a time.
    unit: usize,
    strategy: Strategy,
}

impl FileWriter<'_, '_> {
    /// Appends bytes to the file.
    ///
    /// # Errors
    /// When the file gets larger than announced, or the output cannot be written.
    pub fn write(&mut self, mut bytes: &[u8]) -> Result<(), Error> {
        self.advance(bytes.len() as u64)?;
        if !self.pending.is_empty() {
            let taken = bytes.len().min(self.unit - self.pending.len());
            self.pending.extend_from_slice(&bytes[..taken]);
            bytes = &bytes[taken..];
            if self.pending.len() == self.unit {
                let pending = std::mem::take(&mut self.pending);
                self.put(&pending)?;
                self.pending = pending;
                self.pending.clear();
            }
        }
        let whole = bytes.len() - bytes.len() % self.unit;
        if whole > 0 {
            self.put(&bytes[..whole])?;
        }
        self.pending.extend_from_slice(&bytes[whole..]);
        Ok(())
    }

    /// Appends `length` zero bytes without their being written where the layout allows.
    ///
    /// # Errors
    /// When the file gets larger than announced, or the output cannot be written.
    pub fn hole(&mut self, length: u64) -> Result<(), Error> {
        static ZEROS: [u8; EXTENT_SIZE] = [0; EXTENT_SIZE];
        let mut left = length;
        while left > 0 {
            if let (true, Strategy::Plain(plain)) = (
                self.pending.is_empty() && left >= BLOCK_SIZE as u64,
                &mut self.strategy,
            ) {
                let blocks = left / BLOCK_SIZE as u64;
                plain.zero_blocks(&mut self.builder.output, blocks)?;
                self.received = self.checked_total(blocks * BLOCK_SIZE as u64)?;
                left -= blocks * BLOCK_SIZE as u64;
                continue;
            }
            let step = left.min((self.unit - self.pending.len()) as u64);
            self.write(&ZEROS[..step as usize])?;
            left -= step;
        }
        Ok(())
    }

    /// Ends the file and writes its inode.
    ///
    /// # Errors
    /// When fewer bytes were written than announced, or the output cannot be written.
    pub fn finish(self) -> Result<FileHandle, Error> {
        if self.received != self.size {
            return Err(Error::SizeMismatch {
                announced: self.size,
                received: self.received,
            });
        }
        let Self {
            builder,
            attributes,
            xattrs,
            size,
            first_block,
            pending,
            strategy,
            ..
        } = self;
        let mut sink = Sink {
            output: &mut builder.output,
            scratch: &mut builder.scratch,
        };
        let finished = match strategy {
            Strategy::Plain(plain) => plain.finish(sink.output, pending)?,
            Strategy::Compressed(extents) => extents.finish(&mut sink, pending)?,
        };
        let build_time = builder.build_time_or(&attributes);
        let serial = builder.take_serial();
        let inode = |layout, union_word| Inode {
            attributes: &attributes,
            file_type: TYPE_REGULAR,
            layout,
            size,
            nlink: 1,
            union_word,
            serial,
            xattrs: &xattrs,
        };
        let compact = inode(Layout::FlatPlain, 0).is_compact(build_time);
        let mut unit = Vec::with_capacity(256);
        let (inode_offset, last_block);
        match finished {
            Finished::Flat { first_block, tail } => {
                let fits = inode(Layout::FlatPlain, 0).encoded_size(build_time) + tail.len() <= BLOCK_SIZE;
                let inline = fits && !tail.is_empty();
                if !inline {
                    builder.output.append(&tail)?;
                    builder.output.align()?;
                }
                last_block = builder.output.block()?;
                let layout = if inline {
                    Layout::FlatInline
                } else {
                    Layout::FlatPlain
                };
                inode(layout, first_block).encode(build_time, &mut unit);
                if inline {
                    unit.extend_from_slice(&tail);
                }
                inode_offset = builder.place_unit(&unit)?;
                builder.output.align()?;
            }
            Finished::Chunked(map) => {
                builder.features |= crate::format::FEATURE_CHUNKED_FILE;
                last_block = builder.output.block()?;
                inode(Layout::ChunkBased, map.format()).encode(build_time, &mut unit);
                map.encode(&mut unit);
                inode_offset = builder.place_unit(&unit)?;
                builder.output.align()?;
            }
            Finished::Compressed(list) => {
                last_block = builder.output.block()?;
                inode(Layout::CompressedFull, list.blocks()).encode(build_time, &mut unit);
                // The index is aligned relative to the image; inode slots are, so relative to the unit is enough.
                list.encode(&mut unit);
                inode_offset = builder.place_unit(&unit)?;
                builder.output.align()?;
            }
        }
        let handle = FileHandle(u32::try_from(builder.files.len()).map_err(|_| Error::TooLarge)?);
        builder.files.push(WrittenFile {
            inode_offset,
            first_block,
            blocks: last_block - first_block,
            compact,
        });
        Ok(handle)
    }

    fn checked_total(&self, more: u64) -> Result<u64, Error> {
        match self.received.checked_add(more) {
            Some(total) if total <= self.size => Ok(total),
            total => Err(Error::SizeMismatch {
                announced: self.size,
                received: total.unwrap_or(u64::MAX),
            }),
        }
    }

    fn advance(&mut self, more: u64) -> Result<(), Error> {
        self.received = self.checked_total(more)?;
        Ok(())
    }

    /// Hands whole units to the strategy.
    fn put(&mut self, units: &[u8]) -> Result<(), Error> {
        let mut sink = Sink {
            output: &mut self.builder.output,
            scratch: &mut self.builder.scratch,
        };
        match &mut self.strategy {
            Strategy::Plain(plain) => plain.blocks(sink.output, units),
            Strategy::Compressed(extents) => units
                .chunks_exact(EXTENT_SIZE)
                .try_for_each(|unit| extents.extent(&mut sink, unit)),
        }
    }
}
