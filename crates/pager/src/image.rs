//! Images that are open, each once for all machines that are made of it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use hypeman_snapshots::{Error, MemoryId, MemoryReader, Piece};

use crate::cache::Cache;

/// An open image, read through the cache.
#[derive(Debug)]
pub(crate) struct Image {
    reader: MemoryReader,
}

impl Image {
    pub(crate) fn reader(&self) -> &MemoryReader {
        &self.reader
    }

    /// The pages of a chunk that are not zero.
    pub(crate) fn nonzero(&self, chunk: u32) -> u64 {
        self.reader.nonzero(chunk)
    }

    /// What the image has in a chunk, verified.
    pub(crate) fn piece(&self, cache: &Cache, chunk: u32) -> Result<Arc<Piece>, Error> {
        let key = (self.reader.origin(chunk), chunk);
        cache.get(key, |buffers| self.reader.read(chunk, buffers))
    }

    /// The same, without a place in the cache.
    pub(crate) fn passing_piece(&self, cache: &Cache, chunk: u32) -> Result<Arc<Piece>, Error> {
        let key = (self.reader.origin(chunk), chunk);
        cache.pass(key, |buffers| self.reader.read(chunk, buffers))
    }
}

/// Which images are open.
#[derive(Debug, Default)]
pub(crate) struct Images(Mutex<HashMap<(PathBuf, MemoryId), Weak<Image>>>);

impl Images {
    /// The image `id` below the directory of a store.
    pub(crate) fn open(&self, store: &Path, id: MemoryId) -> Result<Arc<Image>, Error> {
        let key = (store.to_owned(), id);
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|_, image| image.strong_count() > 0);
        if let Some(image) = open.get(&key).and_then(Weak::upgrade) {
            return Ok(image);
        }
        drop(open);
        // Two that come at once both read it; one of them is kept.
        let image = Arc::new(Image {
            reader: MemoryReader::open(store, id)?,
        });
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        open.insert(key, Arc::downgrade(&image));
        Ok(image)
    }
}
