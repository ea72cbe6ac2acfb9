//! Which pages guests touch first: recorded at a restore, fetched ahead of the next one.
//!
//! ```text
//! body   image    16 bytes
//!        seal     32 bytes: of the image's index
//!        count    u64, then as many of
//!            chunk   u32, in the order in which guests asked; none twice
//!            zero    u32
//!            pages   u64, one bit a page, never zero
//! ```
//! It is a hint: guests get right pages without it. A damaged one, or one for other bytes, counts as none.

use std::collections::HashSet;

use crate::index::Index;
use crate::layout::{TEMPORARY, WORKING_SET, chunks, directory, pages_of};
use crate::sealed::{self, Fields, Kind};
use crate::{MemoryReader, Result, files};

const KIND: Kind = Kind {
    magic: b"hypemWSF",
    version: 1,
};
const ENTRY: usize = 4 + 4 + 8;
/// The largest file that is read: four times what a guest of a tebibyte could need.
const LIMIT: u64 = 256 << 20;

/// Chunks in the order of their first use, each with the pages that were used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkingSet {
    /// Chunk and pages.
    pub chunks: Vec<(u32, u64)>,
}

impl WorkingSet {
    fn to_bytes(&self, index: &Index) -> Vec<u8> {
        let mut body = Vec::with_capacity(16 + 32 + 8 + self.chunks.len() * ENTRY);
        body.extend_from_slice(&index.id.0);
        body.extend_from_slice(index.seal.as_bytes());
        body.extend_from_slice(&(self.chunks.len() as u64).to_le_bytes());
        for (chunk, pages) in &self.chunks {
            body.extend_from_slice(&chunk.to_le_bytes());
            body.extend_from_slice(&[0; 4]);
            body.extend_from_slice(&pages.to_le_bytes());
        }
        sealed::seal(&KIND, &body).0
    }

    fn parse(index: &Index, bytes: &[u8]) -> Option<Self> {
        let (body, _) = sealed::open(&KIND, bytes).ok()?;
        let mut fields = Fields(body);
        let of = (fields.take::<16>()?, fields.hash()?);
        let count = fields.u64()?;
        let possible = chunks(index.memory_bytes);
        let whole = count <= possible && fields.0.len() as u64 == count * ENTRY as u64;
        if of != (index.id.0, index.seal) || !whole {
            return None;
        }
        let mut seen = HashSet::new();
        let mut chunks = Vec::with_capacity(usize::try_from(count).ok()?);
        for _ in 0..count {
            let (chunk, zero, pages) = (fields.u32()?, fields.u32()?, fields.u64()?);
            let inside = pages != 0 && pages & !pages_of(index.memory_bytes, chunk) == 0;
            if zero != 0 || !inside || !seen.insert(chunk) {
                return None;
            }
            chunks.push((chunk, pages));
        }
        Some(Self { chunks })
    }
}

impl MemoryReader {
    /// The recorded working set, if there is one that belongs to these bytes.
    #[must_use]
    pub fn working_set(&self) -> Option<WorkingSet> {
        let index = self.chain.top();
        let path = self.shared.path(index.id, WORKING_SET);
        let bytes = files::read(&path, LIMIT).ok().flatten()?;
        WorkingSet::parse(index, &bytes)
    }

    /// Keeps a working set beside the image, durably, in place of an earlier one. It goes with the image.
    ///
    /// # Errors
    /// Those of the file system; also when the image is gone.
    pub fn keep_working_set(&self, set: &WorkingSet) -> Result<()> {
        let index = self.chain.top();
        let name = format!("{TEMPORARY}touched-{}-{}", index.id, std::process::id());
        let temporary = self.shared.root().join(name);
        files::remove(&temporary)?;
        let kept = files::write(&temporary, &set.to_bytes(index)).and_then(|()| {
            files::rename(
                &temporary,
                &directory(self.shared.root(), index.id).join(WORKING_SET),
            )
        });
        if kept.is_err() {
            files::remove(&temporary)?;
        }
        kept
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::MemoryId;

    fn index() -> Index {
        Index::build(
            MemoryId([1; 16]),
            None,
            64 * crate::CHUNK_BYTES as u64,
            Vec::new(),
        )
        .0
    }

    proptest! {
        #[test]
        fn a_set_is_read_as_it_was_written(chunks in prop::collection::hash_map(0_u32..64, 1_u64.., 0..40)) {
            let set = WorkingSet { chunks: chunks.into_iter().collect() };
            prop_assert_eq!(WorkingSet::parse(&index(), &set.to_bytes(&index())), Some(set));
        }

        #[test]
        fn a_well_sealed_lie_counts_as_none(chunks in prop::collection::vec((0_u32..70, any::<u64>()), 0..40)) {
            let set = WorkingSet { chunks };
            if let Some(read) = WorkingSet::parse(&index(), &set.to_bytes(&index())) {
                prop_assert!(read.chunks.iter().all(|(chunk, pages)| *chunk < 64 && *pages != 0));
            }
        }
    }

    #[test]
    fn a_set_of_another_image_counts_as_none() {
        let set = WorkingSet { chunks: vec![(1, 1)] };
        let other = Index::build(
            MemoryId([2; 16]),
            None,
            64 * crate::CHUNK_BYTES as u64,
            Vec::new(),
        )
        .0;
        assert_eq!(WorkingSet::parse(&other, &set.to_bytes(&index())), None);
    }
}
