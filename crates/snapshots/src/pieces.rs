//! Reading an image piece by piece, while a machine that was made of it runs.
//!
//! ```text
//!  chunk number ─► the newest layer that owns pages of it ─► verified bytes of all layers ─► its non-zero pages, packed
//!                         origin: the same for every image that shares the chunk
//! ```
//! The reader may live in another process than the store: it writes nothing into the directory but working sets. Its
//! files stay open, so names may go; the image itself must be held in the store's process for as long as it is read,
//! because a sweep cuts frames out of files that nobody needs.

use std::path::Path;

use crate::layout::{CHUNK_BYTES, bytes, bytes_of, chunks, pages_of, runs};
use crate::reader::{self, Chain, Content, Scratch};
use crate::store::Shared;
use crate::{Digest, MemoryId, Result};

/// An image with its ancestors, opened for reading.
pub struct MemoryReader {
    pub(crate) shared: Shared,
    pub(crate) chain: Chain,
}

/// What a guest has in one chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// One bit for each page that is not zero.
    pub nonzero: u64,
    /// Those pages, one after the other.
    pub pages: Vec<u8>,
    /// Bytes that had to be read from files for it.
    pub read: u64,
}

/// Buffers of one thread that reads pieces.
pub struct PieceBuffers {
    chunk: Vec<u8>,
    scratch: Scratch,
}

impl PieceBuffers {
    /// Fresh buffers.
    #[must_use]
    pub fn new() -> Self {
        Self {
            chunk: vec![0; CHUNK_BYTES],
            scratch: Scratch::new(),
        }
    }
}

impl Default for PieceBuffers {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryReader {
    /// Opens the image `id` below the directory of a store. The owner of that store holds the image meanwhile.
    ///
    /// # Errors
    /// [`Error::NotFound`](crate::Error::NotFound), [`Error::Damaged`](crate::Error::Damaged), and those of the file
    /// system.
    pub fn open(root: &Path, id: MemoryId) -> Result<Self> {
        let shared = Shared::beside(root);
        let mut chain = Chain::open(&shared, id)?;
        // Pages are read over hours: what was verified when the file was opened says too little about them.
        for layer in &mut chain.layers {
            if let Content::Raw { trusted, .. } = &mut layer.content {
                *trusted = false;
            }
        }
        Ok(Self { shared, chain })
    }

    /// The image.
    #[must_use]
    pub fn id(&self) -> MemoryId {
        self.chain.top().id
    }

    /// The size of the guest's memory.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.chain.top().memory_bytes
    }

    /// The seal of the image's index.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.chain.top().seal
    }

    /// How many chunks the guest's memory has.
    #[must_use]
    pub fn chunks(&self) -> u32 {
        u32::try_from(chunks(self.memory_bytes())).unwrap_or(u32::MAX)
    }

    /// The pages of a chunk that are not zero. Reads nothing.
    #[must_use]
    pub fn nonzero(&self, chunk: u32) -> u64 {
        reader::nonzero(&self.chain.layers, chunk, pages_of(self.memory_bytes(), chunk))
    }

    /// The image to which a chunk owes its content: two readers for which it is the same read the same bytes there.
    #[must_use]
    pub fn origin(&self, chunk: u32) -> MemoryId {
        let layers = &self.chain.layers;
        let newest = layers.iter().find(|layer| layer.index.find(chunk).is_some());
        // What nobody owns is zero, whoever is asked.
        newest.or(layers.last()).map_or(self.id(), |layer| layer.index.id)
    }

    /// Reads and verifies what the guest has in a chunk.
    ///
    /// # Errors
    /// [`Error::Damaged`](crate::Error::Damaged) naming image and range, and those of the file system.
    pub fn read(&self, chunk: u32, buffers: &mut PieceBuffers) -> Result<Piece> {
        let PieceBuffers { chunk: into, scratch } = buffers;
        let wanted = pages_of(self.memory_bytes(), chunk);
        let nonzero = reader::fill(&self.chain.layers, chunk, wanted, into, scratch)?;
        let mut pages = Vec::with_capacity(bytes_of(nonzero));
        for run in runs(nonzero) {
            pages.extend_from_slice(&into[bytes(&run)]);
        }
        Ok(Piece {
            nonzero,
            pages,
            read: reader::cost(&self.chain.layers, chunk, wanted),
        })
    }
}

impl std::fmt::Debug for MemoryReader {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("MemoryReader")
            .field("id", &self.id())
            .finish_non_exhaustive()
    }
}
