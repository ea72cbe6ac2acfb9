//! The pages that the images above the mapped one changed.

use std::io;

use crate::layout::{CHUNK_BYTES, ZERO_PAGE, bytes, bytes_of, chunk_offset, runs};
use crate::reader::{self, Chain, Scratch};
use crate::{Error, Result, parallel};

/// Pages to write over a [`Base`](crate::Base) that was mapped privately, before anything reads the memory.
pub struct Patch {
    /// With the base at its end, which is never read from here.
    chain: Option<Chain>,
    chunks: Vec<(u32, u64)>,
}

impl Patch {
    /// A patch for a base that has everything.
    pub(crate) fn empty() -> Self {
        Self {
            chain: None,
            chunks: Vec::new(),
        }
    }

    /// What all images of a chain but the last one own, unless it is zero there and in the last one.
    pub(crate) fn over_last(chain: Chain) -> Self {
        let Some((base, upper)) = chain.layers.split_last() else {
            return Self::empty();
        };
        let mut owned = std::collections::BTreeMap::<u32, u64>::new();
        for entry in upper.iter().flat_map(|layer| &layer.index.entries) {
            *owned.entry(entry.chunk).or_default() |= entry.owned;
        }
        let visible = |(chunk, owned): (u32, u64)| {
            let below = base.index.find(chunk).map_or(0, |(_, entry)| entry.nonzero);
            (chunk, owned & (below | reader::nonzero(upper, chunk, owned)))
        };
        let chunks = owned
            .into_iter()
            .map(visible)
            .filter(|(_, pages)| *pages != 0)
            .collect();
        Self {
            chain: Some(chain),
            chunks,
        }
    }

    /// Whether there is nothing to write.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// How much there is to write.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.chunks.iter().map(|(_, pages)| bytes_of(*pages) as u64).sum()
    }

    /// Calls `write` with each run of pages and its offset in guest RAM, by all cores and in no order. Pages that
    /// became zero come as zeros. Bytes that `write` sees were verified; after an error some are missing.
    ///
    /// # Errors
    /// [`Error::Damaged`], [`Error::Target`] with what `write` returned, and those of the file system.
    pub fn apply(&self, write: &(dyn Fn(u64, &[u8]) -> io::Result<()> + Sync)) -> Result<()> {
        let Some(chain) = &self.chain else {
            return Ok(());
        };
        let start = || Ok((vec![0; CHUNK_BYTES], Scratch::new()));
        parallel::each(self.chunks.len(), start, |(buffer, scratch), number| {
            let (chunk, pages) = self.chunks[number];
            let nonzero = reader::fill(&chain.layers, chunk, pages, buffer, scratch)?;
            for page in runs(pages & !nonzero).flatten() {
                buffer[bytes(&(page..page + 1))].copy_from_slice(&ZERO_PAGE);
            }
            for run in runs(pages) {
                let range = bytes(&run);
                let offset = chunk_offset(chunk) + range.start as u64;
                write(offset, &buffer[range]).map_err(|source| Error::Target { offset, source })?;
            }
            Ok(())
        })?;
        Ok(())
    }
}
