//! A raw image that is being written: nothing of it has its name before all of it is durable.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use crate::error::at;
use crate::files::{self, Workspace};
use crate::index::{self, Entry, Index};
use crate::layout::{INDEX, MEMO, RAW, bytes, bytes_of, chunk_offset, directory, runs};
use crate::store::Shared;
use crate::{MemoryId, Result, memo, writeback};

/// Chunks that are given to the disk together, 4 MiB, while later ones are still read.
const BEGUN_AT_ONCE: u32 = 16;

/// An unfinished image. It goes with this value, unless it is finished.
pub(crate) struct Draft<'a> {
    shared: &'a Shared,
    id: MemoryId,
    memory_bytes: u64,
    workspace: Workspace,
    path: PathBuf,
    raw: File,
}

/// A finished image.
pub(crate) struct Drawn {
    pub(crate) index: Index,
    /// Bytes that it takes: pages and index.
    pub(crate) stored_bytes: u64,
    /// Bytes of memory that are not zero, those of its ancestors that show through among them.
    pub(crate) content_bytes: u64,
}

impl<'a> Draft<'a> {
    /// Begins an image. The caller holds it.
    pub(crate) fn create(shared: &'a Shared, id: MemoryId, memory_bytes: u64) -> Result<Self> {
        let workspace = shared.workspace("capture", id)?;
        shared.step("memory.capture.begun");
        let path = workspace.path().join(RAW);
        let raw = File::create_new(&path).map_err(at("create", &path))?;
        raw.set_len(memory_bytes).map_err(at("extend", &path))?;
        Ok(Self {
            shared,
            id,
            memory_bytes,
            workspace,
            path,
            raw,
        })
    }

    /// Writes what the image owns of a chunk. `content` has the pages at their places; `packed` is a buffer.
    pub(crate) fn put(
        &self,
        chunk: u32,
        owned: u64,
        nonzero: u64,
        content: &[u8],
        packed: &mut Vec<u8>,
    ) -> Result<Entry> {
        packed.clear();
        for run in runs(nonzero) {
            let range = bytes(&run);
            packed.extend_from_slice(&content[range.clone()]);
            let offset = chunk_offset(chunk) + range.start as u64;
            self.raw
                .write_all_at(&content[range], offset)
                .map_err(at("write", &self.path))?;
        }
        if chunk % BEGUN_AT_ONCE == BEGUN_AT_ONCE - 1 {
            let first = chunk_offset(chunk + 1 - BEGUN_AT_ONCE);
            writeback::begin(&self.raw, first..chunk_offset(chunk + 1));
        }
        Ok(Entry {
            chunk,
            owned,
            nonzero,
            digest: blake3::hash(packed),
        })
    }

    /// Makes the image durable and gives it its name. Its ancestors are told newest first.
    pub(crate) fn finish(self, ancestors: &[&Index], mut entries: Vec<Entry>) -> Result<Drawn> {
        let Self {
            shared,
            workspace,
            raw,
            ..
        } = &self;
        shared.step("memory.capture.written");
        entries.sort_unstable_by_key(|entry| entry.chunk);
        let pages: u64 = entries.iter().map(|entry| bytes_of(entry.nonzero) as u64).sum();
        let (index, bytes) = Index::build(self.id, ancestors.first().copied(), self.memory_bytes, entries);
        files::write_beside(&workspace.path().join(INDEX), &bytes, raw, &self.path)?;
        // What was written was hashed on its way.
        memo::remember(&workspace.path().join(MEMO), raw, &index.seal);
        shared.step("memory.capture.synced");
        files::rename_directory(workspace.path(), &directory(shared.root(), self.id))?;
        shared.step("memory.capture.renamed");
        let content_bytes = index::content_bytes(std::iter::once(&index).chain(ancestors.iter().copied()));
        Ok(Drawn {
            index,
            stored_bytes: pages + bytes.len() as u64,
            content_bytes,
        })
    }
}
