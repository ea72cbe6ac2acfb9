//! What is known of an image without reading any memory: its forms, and what they take.

use crate::codec::Encoding;
use crate::frames::{Frame, FrameTable};
use crate::layout::RAW;
use crate::{MemoryId, MemoryStore, Result};

/// What made the frames of an image small.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compressor {
    /// Zstandard.
    Zstd,
    /// LZ4.
    Lz4,
}

/// An image in a few numbers. It says nothing of its ancestors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outline {
    /// What the image builds on.
    pub parent: Option<MemoryId>,
    /// Whether there is a raw form.
    pub raw: bool,
    /// Bytes that the frames of those pages take, shared ones included, when there is a framed form.
    pub frame_bytes: Option<u64>,
    /// How those frames were compressed; `None` when that made none of them smaller.
    pub compressor: Option<Compressor>,
}

impl MemoryStore {
    /// What is known of an image without reading its memory.
    ///
    /// # Errors
    /// [`Error::NotFound`](crate::Error::NotFound), or when its index or frame table is damaged.
    pub fn outline(&self, id: MemoryId) -> Result<Outline> {
        let index = self.shared.index(id)?;
        let table = self.shared.frame_table(id)?;
        let table = table.filter(|table| table.index_seal.is_some());
        let frame_bytes = |table: &FrameTable| table.frames.iter().map(|frame| u64::from(frame.stored)).sum();
        Ok(Outline {
            parent: index.parent.map(|(parent, _)| parent),
            raw: self.shared.path(id, RAW).exists(),
            frame_bytes: table.as_ref().map(frame_bytes),
            compressor: table.as_ref().and_then(compressor),
        })
    }
}

/// How the frames of a table were compressed: its own ones, or, where all are others', those.
fn compressor(table: &FrameTable) -> Option<Compressor> {
    let of = |frame: &Frame| match frame.encoding {
        Encoding::Plain => None,
        Encoding::Zstd => Some(Compressor::Zstd),
        Encoding::Lz4 => Some(Compressor::Lz4),
    };
    let is_own = |frame: &&Frame| table.donors.get(frame.donor as usize) == Some(&table.image);
    let own = table.frames.iter().filter(is_own).find_map(of);
    own.or_else(|| table.frames.iter().find_map(of))
}
