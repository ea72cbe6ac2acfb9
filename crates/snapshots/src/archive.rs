//! The portable file: a snapshot as a stream of blocks that check themselves.
//!
//! ```text
//! file    magic    8 bytes "hypemPRT"
//!         version  u32, then a zero u32
//!         block …  each: kind u32, encoding u32, stored u32, content u32, offset u64, digest 32 bytes, stored bytes
//!
//! order   Manifest                 the sealed manifest
//!         Description              what the engine adds; opaque here, may be empty
//!         Devices, ascending       pieces of the device state
//!         Memory, ascending        mask of pages u64, then those pages; offset is the chunk's; other pages are zero
//!         DiskLength               u64, bytes of the disk
//!         Disk, ascending          one block of the disk; offset is its place; other blocks are zero
//!         RootLength, Root         the same for the root disk
//!         End                      the number of blocks before it; nothing follows
//! ```
//! The digest of a block covers the digest of the block before it (the file's head for the first), its own head and its
//! stored bytes: blocks can be neither changed, exchanged, repeated nor left out. Nothing is expanded before it was
//! compared. No name, path or length in the file is used for anything but a bounded copy.

use std::io::{self, Read, Write};

use blake3::{Hash, Hasher};

use crate::codec::{Decoder, Encoding};
use crate::disk::BLOCK;
use crate::error::Part;
use crate::{Error, Result};

const MAGIC: &[u8; 8] = b"hypemPRT";
pub(crate) const VERSION: u32 = 1;
/// The largest content of a block, bytes: a block of a disk. A chunk of memory and its mask are smaller.
pub(crate) const LARGEST: usize = BLOCK;
const HEAD: usize = 4 * 4 + 8;

/// What a block holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum BlockKind {
    Manifest,
    Description,
    Devices,
    Memory,
    DiskLength,
    Disk,
    RootLength,
    Root,
    End,
}

const KINDS: [BlockKind; 9] = [
    BlockKind::Manifest,
    BlockKind::Description,
    BlockKind::Devices,
    BlockKind::Memory,
    BlockKind::DiskLength,
    BlockKind::Disk,
    BlockKind::RootLength,
    BlockKind::Root,
    BlockKind::End,
];

/// An encoded block that has no place in a file yet.
pub(crate) struct Encoded {
    pub(crate) kind: BlockKind,
    pub(crate) encoding: Encoding,
    pub(crate) content: usize,
    pub(crate) offset: u64,
    pub(crate) stored: Vec<u8>,
}

fn head(kind: BlockKind, encoding: Encoding, stored: usize, content: usize, offset: u64) -> [u8; HEAD] {
    let mut head = [0; HEAD];
    let kind = KINDS.iter().position(|known| *known == kind).unwrap_or_default();
    let length = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX);
    let numbers = [
        u32::try_from(kind).unwrap_or_default(),
        encoding.number(),
        length(stored),
        length(content),
    ];
    for (place, number) in head.chunks_exact_mut(4).zip(numbers) {
        place.copy_from_slice(&number.to_le_bytes());
    }
    head[16..].copy_from_slice(&offset.to_le_bytes());
    head
}

fn link(before: &Hash, head: &[u8], stored: &[u8]) -> Hash {
    let mut hasher = Hasher::new();
    hasher.update(before.as_bytes()).update(head).update(stored);
    hasher.finalize()
}

fn beginning() -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes
}

/// Writes blocks.
pub(crate) struct Writer<'a> {
    output: &'a mut dyn Write,
    last: Hash,
    blocks: u64,
    bytes: u64,
}

impl<'a> Writer<'a> {
    pub(crate) fn begin(output: &'a mut dyn Write) -> io::Result<Self> {
        let bytes = beginning();
        output.write_all(&bytes)?;
        Ok(Self {
            output,
            last: blake3::hash(&bytes),
            blocks: 0,
            bytes: bytes.len() as u64,
        })
    }

    pub(crate) fn put(&mut self, block: &Encoded) -> io::Result<()> {
        let head = head(
            block.kind,
            block.encoding,
            block.stored.len(),
            block.content,
            block.offset,
        );
        self.last = link(&self.last, &head, &block.stored);
        self.output.write_all(&head)?;
        self.output.write_all(self.last.as_bytes())?;
        self.output.write_all(&block.stored)?;
        self.blocks += 1;
        self.bytes += (HEAD + blake3::OUT_LEN + block.stored.len()) as u64;
        Ok(())
    }

    pub(crate) fn plain(&mut self, kind: BlockKind, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let (content, stored) = (bytes.len(), bytes.to_vec());
        self.put(&Encoded {
            kind,
            encoding: Encoding::Plain,
            content,
            offset,
            stored,
        })
    }

    /// Ends the file; returns its length.
    pub(crate) fn end(mut self) -> io::Result<u64> {
        let blocks = self.blocks;
        self.plain(BlockKind::End, 0, &blocks.to_le_bytes())?;
        self.output.flush()?;
        Ok(self.bytes)
    }
}

/// Reads blocks, in order and compared.
pub(crate) struct Reader<'a> {
    input: &'a mut dyn Read,
    last: Hash,
    blocks: u64,
    position: u64,
    kind: BlockKind,
    stored: Vec<u8>,
    content: Vec<u8>,
    decoder: Decoder,
}

/// One block that was compared. Its content is in [`Reader::content`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block {
    pub(crate) kind: BlockKind,
    pub(crate) offset: u64,
}

impl<'a> Reader<'a> {
    pub(crate) fn begin(input: &'a mut dyn Read) -> Result<Self> {
        let mut reader = Self {
            input,
            last: Hash::from_bytes([0; 32]),
            blocks: 0,
            position: 0,
            kind: BlockKind::Manifest,
            stored: Vec::new(),
            content: Vec::new(),
            decoder: Decoder::new(),
        };
        let mut bytes = [0; 16];
        reader.fill(&mut bytes)?;
        if bytes[..8] != *MAGIC || bytes[12..] != [0; 4] {
            return Err(reader.damaged("it is not an exported snapshot"));
        }
        let found = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
        if found != VERSION {
            return Err(Error::Version {
                part: Part::Archive(0),
                found,
                known: VERSION,
            });
        }
        reader.last = blake3::hash(&bytes);
        Ok(reader)
    }

    pub(crate) fn damaged(&self, reason: &'static str) -> Error {
        Error::Damaged {
            part: Part::Archive(self.position),
            reason,
        }
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        match self.input.read_exact(bytes) {
            Ok(()) => {
                self.position += bytes.len() as u64;
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Err(self.damaged("it is cut short"))
            }
            Err(source) => Err(Error::Stream(source)),
        }
    }

    /// The content of the last block.
    pub(crate) fn content(&self) -> &[u8] {
        &self.content
    }

    /// Bytes that were read.
    pub(crate) fn position(&self) -> u64 {
        self.position
    }

    /// The next block. After the last one of kind `End` there is nothing.
    pub(crate) fn next(&mut self) -> Result<Block> {
        let mut head = [0; HEAD];
        self.fill(&mut head)?;
        let number = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let (kind, encoding) = (KINDS.get(number(0) as usize).copied(), Encoding::of(number(4)));
        let (stored, content) = (number(8) as usize, number(12) as usize);
        let mut fields = crate::sealed::Fields(&head[16..]);
        let (Some(kind), Some(encoding), Some(offset)) = (kind, encoding, fields.u64()) else {
            return Err(self.damaged("a block is of no known kind"));
        };
        if content > LARGEST || stored > content || (encoding == Encoding::Plain && stored != content) {
            return Err(self.damaged("a block has an impossible length"));
        }
        let mut digest = [0; blake3::OUT_LEN];
        self.fill(&mut digest)?;
        let mut bytes = std::mem::take(&mut self.stored);
        bytes.resize(stored, 0);
        let filled = self.fill(&mut bytes);
        self.stored = bytes;
        filled?;
        let link = link(&self.last, &head, &self.stored);
        if link != Hash::from_bytes(digest) {
            return Err(self.damaged("a block differs from what was exported"));
        }
        self.last = link;
        if kind < self.kind {
            return Err(self.damaged("its blocks are out of order"));
        }
        self.kind = kind;
        self.content.resize(content, 0);
        if !self.decoder.decode(encoding, &self.stored, &mut self.content) {
            return Err(self.damaged("a block cannot be expanded"));
        }
        if kind == BlockKind::End {
            self.finish()?;
        }
        self.blocks += 1;
        Ok(Block { kind, offset })
    }

    fn finish(&mut self) -> Result<()> {
        if self.content != self.blocks.to_le_bytes() {
            return Err(self.damaged("blocks are missing"));
        }
        let mut more = [0];
        loop {
            match self.input.read(&mut more) {
                Ok(0) => return Ok(()),
                Ok(_) => return Err(self.damaged("something follows its end")),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(Error::Stream(source)),
            }
        }
    }
}
