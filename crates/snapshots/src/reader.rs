//! Reading stored memory: one image in one of its forms, and a chain of images as the guest saw it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::codec::Decoder;
use crate::error::{Form, Part, at};
use crate::frames::{self, FrameTable};
use crate::index::{Entry, Index};
use crate::layout::{
    CHUNK_BYTES, FRAMES, MAX_DEPTH, MEMO, RAW, bytes, bytes_of, chunk_offset, directory, ones, runs, span,
};
use crate::store::Shared;
use crate::{Error, MemoryId, Result, memo};

/// Buffers of one thread.
pub(crate) struct Scratch {
    stored: Vec<u8>,
    pages: Vec<u8>,
    decoder: Decoder,
}

impl Scratch {
    pub(crate) fn new() -> Self {
        Self {
            stored: Vec::new(),
            pages: vec![0; CHUNK_BYTES],
            decoder: Decoder::new(),
        }
    }
}

/// Reads the pages of a mask of a chunk, one after the other. `false` when the file ends before.
pub(crate) fn read_pages(file: &File, chunk: u32, mask: u64, into: &mut [u8]) -> io::Result<bool> {
    let mut rest = into;
    for run in runs(mask) {
        let range = bytes(&run);
        let (part, after) = rest.split_at_mut(range.len());
        match file.read_exact_at(part, chunk_offset(chunk) + range.start as u64) {
            Ok(()) => rest = after,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

/// One image, opened in one form. Keeps its files open: removing their names does not disturb it.
pub(crate) struct Layer {
    pub(crate) index: Index,
    pub(crate) content: Content,
}

pub(crate) enum Content {
    Raw {
        file: File,
        /// Verified since the host booted: pages may be read on their own.
        trusted: bool,
    },
    Framed {
        table: FrameTable,
        /// For each entry of the index the number of its frame.
        numbers: Vec<u32>,
        /// `frames.dat` of each donor.
        files: Vec<File>,
    },
}

impl Layer {
    /// Opens an image, in its raw form when it has one.
    pub(crate) fn open(shared: &Shared, id: MemoryId) -> Result<Self> {
        let index = shared.index(id)?;
        // The raw form goes only after frames exist; looking for it first therefore misses neither.
        if let Some(content) = Self::raw(shared, &index)? {
            return Ok(Self { index, content });
        }
        let missing = Error::Damaged {
            part: Part::FrameTable(id),
            reason: "it is missing",
        };
        let content = Self::framed(shared, &index)?.ok_or(missing)?;
        Ok(Self { index, content })
    }

    /// The raw form of an image, if it has one.
    pub(crate) fn raw(shared: &Shared, index: &Index) -> Result<Option<Content>> {
        let path = shared.path(index.id, RAW);
        let Some(file) = crate::files::open(&path)? else {
            return Ok(None);
        };
        if file.metadata().map_err(at("inspect", &path))?.len() != index.memory_bytes {
            let range = 0..index.memory_bytes;
            let part = Part::Memory {
                image: index.id,
                range,
                form: Form::Raw,
            };
            return Err(Error::Damaged {
                part,
                reason: "the file has another length than the guest's memory",
            });
        }
        let trusted = memo::recalls(&shared.path(index.id, MEMO), &file, &index.seal);
        Ok(Some(Content::Raw { file, trusted }))
    }

    /// The framed form of an image, if it has one.
    pub(crate) fn framed(shared: &Shared, index: &Index) -> Result<Option<Content>> {
        let damaged = |reason| Error::Damaged {
            part: Part::FrameTable(index.id),
            reason,
        };
        let Some(table) = shared.frame_table(index.id)? else {
            return Ok(None);
        };
        if table.index_seal != Some(index.seal) {
            return Err(damaged("it belongs to another index"));
        }
        let mut numbers = Vec::with_capacity(index.entries.len());
        let mut next = 0;
        for entry in &index.entries {
            numbers.push(next);
            if entry.nonzero != 0 {
                let frame = table
                    .frames
                    .get(next as usize)
                    .ok_or_else(|| damaged("frames are missing"))?;
                if frame.digest != entry.digest || frame.content as usize != bytes_of(entry.nonzero) {
                    return Err(damaged("a frame is not the one that the index names"));
                }
                next += 1;
            }
        }
        if next as usize != table.frames.len() {
            return Err(damaged("it has more frames than the index"));
        }
        let mut files = Vec::with_capacity(table.donors.len());
        for donor in &table.donors {
            let file = crate::files::open(&shared.path(*donor, FRAMES))?;
            files.push(file.ok_or_else(|| damaged("an image whose frames it uses is missing"))?);
        }
        Ok(Some(Content::Framed {
            table,
            numbers,
            files,
        }))
    }

    /// One of the image's files, for messages.
    pub(crate) fn name(&self, file: &str) -> PathBuf {
        directory(Path::new(""), self.index.id).join(file)
    }

    /// What was read is not what was stored.
    fn damaged(&self, entry: &Entry) -> Error {
        let form = if matches!(self.content, Content::Raw { .. }) {
            Form::Raw
        } else {
            Form::Framed
        };
        let part = Part::Memory {
            image: self.index.id,
            range: span(entry.chunk, entry.nonzero),
            form,
        };
        Error::Damaged {
            part,
            reason: "it differs from what was captured",
        }
    }

    /// All non-zero pages of an entry, one after the other, verified.
    pub(crate) fn load<'a>(&self, number: usize, scratch: &'a mut Scratch) -> Result<&'a [u8]> {
        let entry = &self.index.entries[number];
        let pages = &mut scratch.pages[..bytes_of(entry.nonzero)];
        if pages.is_empty() {
            return Ok(pages);
        }
        let intact = match &self.content {
            Content::Raw { file, .. } => {
                read_pages(file, entry.chunk, entry.nonzero, pages).map_err(at("read", &self.name(RAW)))?
                    && blake3::hash(pages) == entry.digest
            }
            Content::Framed {
                table,
                numbers,
                files,
            } => {
                let frame = &table.frames[numbers[number] as usize];
                frames::read(
                    &files[frame.donor as usize],
                    frame,
                    &mut scratch.stored,
                    pages,
                    &mut scratch.decoder,
                )
                .map_err(at("read", &self.name(FRAMES)))?
            }
        };
        if intact {
            Ok(pages)
        } else {
            Err(self.damaged(entry))
        }
    }

    /// Bytes that the non-zero pages of an entry take in a file.
    fn stored(&self, number: usize) -> u64 {
        match &self.content {
            Content::Raw { .. } => bytes_of(self.index.entries[number].nonzero) as u64,
            Content::Framed { table, numbers, .. } => {
                u64::from(table.frames[numbers[number] as usize].stored)
            }
        }
    }

    /// Puts the wanted non-zero pages of an entry to their places in a chunk. Others are left alone.
    pub(crate) fn fill(
        &self,
        number: usize,
        wanted: u64,
        chunk: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let entry = self.index.entries[number];
        let wanted = wanted & entry.nonzero;
        if wanted == 0 {
            return Ok(());
        }
        if let Content::Raw { file, trusted: true } = &self.content {
            for run in runs(wanted) {
                let range = bytes(&run);
                file.read_exact_at(
                    &mut chunk[range.clone()],
                    chunk_offset(entry.chunk) + range.start as u64,
                )
                .map_err(at("read", &self.name(RAW)))?;
            }
            return Ok(());
        }
        let pages = self.load(number, scratch)?;
        for run in runs(wanted) {
            // Neighbours in the chunk are neighbours here: pages in between would be in the mask.
            let from = bytes_of(entry.nonzero & ones(run.start));
            let range = bytes(&run);
            let length = range.len();
            chunk[range].copy_from_slice(&pages[from..from + length]);
        }
        Ok(())
    }
}

/// An image with its ancestors, newest first.
pub(crate) struct Chain {
    pub(crate) layers: Vec<Layer>,
}

impl Chain {
    /// Opens an image and its ancestors. The caller holds the image.
    pub(crate) fn open(shared: &Shared, id: MemoryId) -> Result<Self> {
        let mut layers = vec![Layer::open(shared, id)?];
        while let Some((parent, seal)) = layers.last().and_then(|layer: &Layer| layer.index.parent) {
            let damaged = |reason| Error::Damaged {
                part: Part::Index(parent),
                reason,
            };
            let layer = match Layer::open(shared, parent) {
                Err(Error::NotFound(_)) => Err(damaged("it is missing, and other images build on it")),
                other => other,
            }?;
            let child = layers
                .last()
                .map(|layer| (layer.index.depth, layer.index.memory_bytes));
            if layer.index.seal != seal
                || child != Some((layer.index.depth + 1, layer.index.memory_bytes))
                || layers.len() >= MAX_DEPTH as usize
            {
                return Err(damaged("it is not the image that others build on"));
            }
            layers.push(layer);
        }
        Ok(Self { layers })
    }

    /// The newest image.
    pub(crate) fn top(&self) -> &Index {
        &self.layers[0].index
    }

    /// Chunks of which some image owns pages, ascending.
    pub(crate) fn chunks(&self) -> Vec<u32> {
        let entries = self.layers.iter().flat_map(|layer| &layer.index.entries);
        let mut chunks: Vec<u32> = entries.map(|entry| entry.chunk).collect();
        chunks.sort_unstable();
        chunks.dedup();
        chunks
    }
}

/// The pages of a chunk that some layer owns.
pub(crate) fn owned(layers: &[Layer], chunk: u32) -> u64 {
    let entries = layers.iter().filter_map(|layer| layer.index.find(chunk));
    entries.fold(0, |mask, (_, entry)| mask | entry.owned)
}

/// Which wanted pages of a chunk are not zero, seen through layers, newest first.
pub(crate) fn nonzero(layers: &[Layer], chunk: u32, wanted: u64) -> u64 {
    let (mut left, mut nonzero) = (wanted, 0);
    for (_, entry) in layers.iter().filter_map(|layer| layer.index.find(chunk)) {
        nonzero |= entry.nonzero & left;
        left &= !entry.owned;
    }
    nonzero
}

/// Puts the wanted pages that are not zero to their places in a chunk; returns which they are.
pub(crate) fn fill(
    layers: &[Layer],
    chunk: u32,
    wanted: u64,
    into: &mut [u8],
    scratch: &mut Scratch,
) -> Result<u64> {
    let (mut left, mut nonzero) = (wanted, 0);
    for layer in layers {
        if left == 0 {
            break;
        }
        if let Some((number, entry)) = layer.index.find(chunk) {
            layer.fill(number, left, into, scratch)?;
            nonzero |= entry.nonzero & left;
            left &= !entry.owned;
        }
    }
    Ok(nonzero)
}

/// Bytes that [`fill`] reads from files for the same pages, where nothing is trusted.
pub(crate) fn cost(layers: &[Layer], chunk: u32, wanted: u64) -> u64 {
    let (mut left, mut bytes) = (wanted, 0);
    for layer in layers {
        let Some((number, entry)) = layer.index.find(chunk) else {
            continue;
        };
        if left & entry.nonzero != 0 {
            bytes += layer.stored(number);
        }
        left &= !entry.owned;
    }
    bytes
}
