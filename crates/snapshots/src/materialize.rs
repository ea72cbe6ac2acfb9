//! Making an image something that a VMM can map.
//!
//! ```text
//! last of the chain raw     map its file privately; the pages of the images above it are written over the mapping
//! last of the chain framed  all images are expanded into anonymous shared memory, which is sealed and mapped privately
//! ```
//! The memory that an expansion filled is shared by all that ask for the same image while one of them keeps it.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, PoisonError, Weak};

use rustix::fs::{MemfdFlags, SealFlags};

use crate::error::at;
use crate::layout::{CHUNK_BYTES, MEMO, RAW, bytes, bytes_of, chunk_offset, runs};
use crate::reader::{self, Chain, Content, Scratch};
use crate::store::{Shared, release};
use crate::{Hold, MemoryId, MemoryStore, Patch, Result, memo, parallel, verify};

/// What a VMM maps privately, and nobody writes to.
pub enum Base {
    /// A sparse file. The path stays valid while the [`Materialized`] lives, the open file for ever.
    File {
        /// Where it is.
        path: PathBuf,
        /// The same, opened for reading.
        file: File,
    },
    /// Sealed memory. Keep a clone to let later materializations of the same image share it.
    Memfd(Arc<OwnedFd>),
}

/// An image that can be mapped. Drop it once the VMM has done so and the patch is written.
pub struct Materialized {
    /// What to map.
    pub base: Base,
    /// What to write over it.
    pub patch: Patch,
    /// The size of the guest's memory, and of the base.
    pub memory_bytes: u64,
    _mapping: Option<Mapping>,
    _hold: Hold,
}

/// The raw file of an image must keep its name.
struct Mapping(Arc<Shared>, MemoryId);

impl Drop for Mapping {
    fn drop(&mut self) {
        release(&mut self.0.users().mapped, self.1);
    }
}

impl MemoryStore {
    /// Makes an image ready to be mapped. Every byte was compared with its BLAKE3, now or since the host booted, or
    /// will be before [`Patch::apply`] hands it out.
    ///
    /// # Errors
    /// [`Error::NotFound`](crate::Error::NotFound), [`Error::Damaged`](crate::Error::Damaged) naming image and
    /// range, and those of the file system.
    pub fn materialize(&self, id: &MemoryId) -> Result<Materialized> {
        let hold = self.hold(*id)?;
        loop {
            let mut chain = Chain::open(&self.shared, *id)?;
            let memory_bytes = chain.top().memory_bytes;
            let Some(last) = chain.layers.last() else {
                return Err(Shared::missing(*id));
            };
            let Content::Raw { file, .. } = &last.content else {
                let memory = self.expanded(&chain)?;
                let (base, patch) = (Base::Memfd(memory), Patch::empty());
                return Ok(Materialized {
                    base,
                    patch,
                    memory_bytes,
                    _mapping: None,
                    _hold: hold,
                });
            };
            let path = self.shared.path(last.index.id, RAW);
            let file = file.try_clone().map_err(at("open", &path))?;
            let Some(mapping) = self.mapping(last.index.id, &path) else {
                // The raw form was given up since it was opened; there are frames now.
                continue;
            };
            self.trust(&mut chain)?;
            let base = Base::File { path, file };
            let patch = Patch::over_last(chain);
            return Ok(Materialized {
                base,
                patch,
                memory_bytes,
                _mapping: Some(mapping),
                _hold: hold,
            });
        }
    }

    /// Bytes that [`Self::materialize`] would expand before anybody can map them; `None` where it maps a file.
    ///
    /// # Errors
    /// [`Error::NotFound`](crate::Error::NotFound), and those of damaged files.
    pub fn bytes_to_expand(&self, id: MemoryId) -> Result<Option<u64>> {
        let _hold = self.hold(id)?;
        let chain = Chain::open(&self.shared, id)?;
        if matches!(
            chain.layers.last().map(|layer| &layer.content),
            Some(Content::Raw { .. })
        ) {
            return Ok(None);
        }
        let mut content = BTreeMap::<u32, u64>::new();
        // The oldest first: what a later image owns is as it has it.
        for entry in chain.layers.iter().rev().flat_map(|layer| &layer.index.entries) {
            let pages = content.entry(entry.chunk).or_default();
            *pages = (*pages & !entry.owned) | entry.nonzero;
        }
        Ok(Some(
            content.into_values().map(|pages| bytes_of(pages) as u64).sum(),
        ))
    }

    /// Keeps the name of a raw file, if it still has it.
    fn mapping(&self, id: MemoryId, path: &Path) -> Option<Mapping> {
        let mut users = self.shared.users();
        if !path.exists() {
            return None;
        }
        *users.mapped.entry(id).or_default() += 1;
        Some(Mapping(Arc::clone(&self.shared), id))
    }

    /// Verifies the raw images of a chain that were not verified since the host booted.
    fn trust(&self, chain: &mut Chain) -> Result<()> {
        for layer in &mut chain.layers {
            if matches!(layer.content, Content::Raw { trusted: false, .. }) {
                verify::raw(layer, &AtomicBool::new(false), &|_| ())?;
                if let Content::Raw { file, trusted } = &mut layer.content {
                    *trusted = true;
                    memo::remember(&self.shared.path(layer.index.id, MEMO), file, &layer.index.seal);
                }
            }
        }
        Ok(())
    }

    /// The content of a chain as sealed memory, shared with all that have it.
    fn expanded(&self, chain: &Chain) -> Result<Arc<OwnedFd>> {
        let place = {
            let mut users = self.shared.users();
            // Forget what nobody has any more.
            users.expansions.retain(|_, place| {
                Arc::strong_count(place) > 1
                    || place.try_lock().map_or(true, |memory| memory.strong_count() > 0)
            });
            Arc::clone(users.expansions.entry(chain.top().id).or_default())
        };
        // Whoever comes second waits here for the first one's work.
        let mut memory = place.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(memory) = Weak::upgrade(&memory) {
            return Ok(memory);
        }
        let fresh = Arc::new(expand(chain)?);
        *memory = Arc::downgrade(&fresh);
        Ok(fresh)
    }
}

/// Writes the content of a chain into new memory; zero pages stay holes.
fn expand(chain: &Chain) -> Result<OwnedFd> {
    let path = Path::new("anonymous memory");
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let memory = rustix::fs::memfd_create("hypeman-guest-memory", flags);
    let memory = File::from(memory.map_err(|error| at("create", path)(error.into()))?);
    memory
        .set_len(chain.top().memory_bytes)
        .map_err(at("extend", path))?;
    let chunks = chain.chunks();
    let start = || Ok((vec![0; CHUNK_BYTES], Scratch::new()));
    parallel::each(chunks.len(), start, |(buffer, scratch), number| {
        let chunk = chunks[number];
        let nonzero = reader::fill(&chain.layers, chunk, u64::MAX, buffer, scratch)?;
        for run in runs(nonzero) {
            let range = bytes(&run);
            let offset = chunk_offset(chunk) + range.start as u64;
            memory
                .write_all_at(&buffer[range], offset)
                .map_err(at("write", path))?;
        }
        Ok(())
    })?;
    let memory = OwnedFd::from(memory);
    let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&memory, seals).map_err(|error| at("seal", path)(error.into()))?;
    Ok(memory)
}

impl std::fmt::Debug for Materialized {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Materialized")
            .field("memory_bytes", &self.memory_bytes)
            .finish_non_exhaustive()
    }
}
