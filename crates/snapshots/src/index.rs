//! The index of a memory image: which pages it owns, and what they must hash to.
//!
//! ```text
//! body   id            16 bytes
//!        parent        16 bytes, zero when there is none
//!        parent seal   32 bytes: the parent's index, exactly; zero when there is none
//!        depth         u32: 1 for an image without a parent, else the parent's plus one
//!        zero          u32
//!        memory        u64, bytes of guest memory
//!        entries       u64, then as many of
//!            chunk     u32, strictly ascending; chunk n covers guest memory from n × 256 KiB
//!            owned     u64, one bit a page, never zero
//!            non-zero  u64, a subset of owned
//!            digest    BLAKE3 of the owned non-zero pages, one after the other
//! ```
//! A page that no image of a chain owns is zero. An image without a parent therefore owns only pages that are not.

use std::collections::HashMap;

use blake3::Hash;

use crate::error::Part;
use crate::layout::{MAX_DEPTH, bytes_of, check_memory_bytes, chunks, pages_of};
use crate::sealed::{self, Fields, Kind, Refusal};
use crate::{Error, MemoryId, Result};

const KIND: Kind = Kind {
    magic: b"hypemIDX",
    version: 1,
};
const HEADER: usize = 16 + 16 + 32 + 4 + 4 + 8 + 8;
const ENTRY: usize = 4 + 8 + 8 + 32;

/// What an image owns of one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) chunk: u32,
    pub(crate) owned: u64,
    pub(crate) nonzero: u64,
    pub(crate) digest: Hash,
}

/// The decoded index of one image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Index {
    pub(crate) id: MemoryId,
    pub(crate) parent: Option<(MemoryId, Hash)>,
    pub(crate) depth: u32,
    pub(crate) memory_bytes: u64,
    pub(crate) entries: Vec<Entry>,
    /// The BLAKE3 of the whole index: whoever knows it knows every byte of the image and its ancestors.
    pub(crate) seal: Hash,
}

impl Index {
    /// Makes the index of a new image, and its bytes.
    pub(crate) fn build(
        id: MemoryId,
        parent: Option<&Index>,
        memory_bytes: u64,
        entries: Vec<Entry>,
    ) -> (Self, Vec<u8>) {
        let depth = parent.map_or(1, |parent| parent.depth + 1);
        let parent = parent.map(|parent| (parent.id, parent.seal));
        let mut body = Vec::with_capacity(HEADER + entries.len() * ENTRY);
        let (parent_id, parent_seal) = parent.unwrap_or((MemoryId([0; 16]), Hash::from_bytes([0; 32])));
        body.extend_from_slice(&id.0);
        body.extend_from_slice(&parent_id.0);
        body.extend_from_slice(parent_seal.as_bytes());
        body.extend_from_slice(&depth.to_le_bytes());
        body.extend_from_slice(&[0; 4]);
        body.extend_from_slice(&memory_bytes.to_le_bytes());
        body.extend_from_slice(&(entries.len() as u64).to_le_bytes());
        for entry in &entries {
            body.extend_from_slice(&entry.chunk.to_le_bytes());
            body.extend_from_slice(&entry.owned.to_le_bytes());
            body.extend_from_slice(&entry.nonzero.to_le_bytes());
            body.extend_from_slice(entry.digest.as_bytes());
        }
        let (bytes, seal) = sealed::seal(&KIND, &body);
        (
            Self {
                id,
                parent,
                depth,
                memory_bytes,
                entries,
                seal,
            },
            bytes,
        )
    }

    /// Reads the index of the image `id`. Every property that the rest relies on is checked, sealed or not.
    pub(crate) fn parse(id: MemoryId, bytes: &[u8]) -> Result<Self> {
        let damaged = |reason| Error::Damaged {
            part: Part::Index(id),
            reason,
        };
        let (body, seal) = sealed::open(&KIND, bytes).map_err(|refusal| match refusal {
            Refusal::Damaged(reason) => damaged(reason),
            Refusal::Version(found) => Error::Version {
                part: Part::Index(id),
                found,
                known: KIND.version,
            },
        })?;
        let index = Self::decode(body, seal).ok_or_else(|| damaged("its fields contradict each other"))?;
        if index.id != id {
            return Err(damaged("it belongs to another image"));
        }
        Ok(index)
    }

    fn decode(body: &[u8], seal: Hash) -> Option<Self> {
        let mut fields = Fields(body);
        let id = MemoryId(fields.take()?);
        let (parent_id, parent_seal) = (MemoryId(fields.take()?), fields.hash()?);
        let (depth, zero) = (fields.u32()?, fields.u32()?);
        let (memory_bytes, count) = (fields.u64()?, fields.u64()?);
        let parent = (depth > 1).then_some((parent_id, parent_seal));
        let orphan = parent_id.0 == [0; 16] && *parent_seal.as_bytes() == [0; 32];
        check_memory_bytes(memory_bytes).ok()?;
        let plausible = zero == 0
            && (1..=MAX_DEPTH).contains(&depth)
            && (depth == 1) == orphan
            && count <= chunks(memory_bytes)
            && fields.0.len() as u64 == count * ENTRY as u64;
        if !plausible {
            return None;
        }
        let mut entries: Vec<Entry> = Vec::with_capacity(usize::try_from(count).ok()?);
        for _ in 0..count {
            let entry = Entry {
                chunk: fields.u32()?,
                owned: fields.u64()?,
                nonzero: fields.u64()?,
                digest: fields.hash()?,
            };
            let ascending = entries.last().is_none_or(|last| last.chunk < entry.chunk);
            let inside = entry.owned != 0
                && entry.owned & !pages_of(memory_bytes, entry.chunk) == 0
                && entry.nonzero & !entry.owned == 0
                && (parent.is_some() || entry.owned == entry.nonzero);
            if !ascending || !inside {
                return None;
            }
            entries.push(entry);
        }
        Some(Self {
            id,
            parent,
            depth,
            memory_bytes,
            entries,
            seal,
        })
    }

    /// What the image owns of a chunk, and the number of that entry.
    pub(crate) fn find(&self, chunk: u32) -> Option<(usize, &Entry)> {
        let number = self
            .entries
            .binary_search_by_key(&chunk, |entry| entry.chunk)
            .ok()?;
        Some((number, &self.entries[number]))
    }
}

/// Bytes of memory that are not zero, seen through an image and its ancestors, newest first.
pub(crate) fn content_bytes<'a>(indexes: impl Iterator<Item = &'a Index>) -> u64 {
    let mut hidden = HashMap::<u32, u64>::new();
    let mut bytes = 0;
    for entry in indexes.flat_map(|index| &index.entries) {
        let above = hidden.entry(entry.chunk).or_default();
        bytes += bytes_of(entry.nonzero & !*above) as u64;
        *above |= entry.owned;
    }
    bytes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entries() -> impl Strategy<Value = Vec<Entry>> {
        prop::collection::btree_map(0_u32..64, (1_u64.., any::<u64>(), any::<[u8; 32]>()), 0..20).prop_map(
            |chunks| {
                let entry = |(chunk, (owned, mask, digest))| Entry {
                    chunk,
                    owned,
                    nonzero: owned & mask,
                    digest: Hash::from_bytes(digest),
                };
                chunks.into_iter().map(entry).collect()
            },
        )
    }

    #[test]
    fn each_page_of_the_guest_is_counted_once() {
        let memory = 8 * crate::CHUNK_BYTES as u64;
        let entry = |chunk, owned, nonzero| Entry {
            chunk,
            owned,
            nonzero,
            digest: blake3::hash(b""),
        };
        let base = vec![entry(0, 0b1111, 0b1111), entry(3, 1, 1)];
        let (base, _) = Index::build(MemoryId([1; 16]), None, memory, base);
        // One page is other than before, one is zero now, two are new, and all others are as they were.
        let changes = vec![entry(0, 0b0011, 0b0001), entry(5, 0b110, 0b110)];
        let (top, _) = Index::build(MemoryId([2; 16]), Some(&base), memory, changes);
        assert_eq!(content_bytes(std::iter::once(&base)), 5 * 4096);
        assert_eq!(content_bytes([&top, &base].into_iter()), 6 * 4096);
    }

    proptest! {
        #[test]
        fn an_index_is_read_as_it_was_written(entries in entries()) {
            let memory = 64 * crate::CHUNK_BYTES as u64;
            let (parent, _) = Index::build(MemoryId([1; 16]), None, memory, Vec::new());
            let (index, bytes) = Index::build(MemoryId([2; 16]), Some(&parent), memory, entries);
            prop_assert_eq!(Index::parse(index.id, &bytes).unwrap(), index);
        }

        #[test]
        fn sealed_nonsense_is_refused_without_harm(body in prop::collection::vec(any::<u8>(), 0..400)) {
            let (bytes, _) = sealed::seal(&KIND, &body);
            prop_assert!(Index::parse(MemoryId([2; 16]), &bytes).is_err());
        }

        #[test]
        fn a_well_sealed_lie_is_refused_or_means_what_it_says(entries in entries(), at: prop::sample::Index, value: u8) {
            let memory = 50 * crate::CHUNK_BYTES as u64;
            let (parent, _) = Index::build(MemoryId([1; 16]), None, memory, Vec::new());
            let (index, bytes) = Index::build(MemoryId([2; 16]), Some(&parent), memory, entries);
            let mut body = bytes[56..].to_vec();
            let at = at.index(body.len());
            body[at] = value;
            let (bytes, _) = sealed::seal(&KIND, &body);
            if let Ok(index) = Index::parse(index.id, &bytes) {
                for entry in &index.entries {
                    prop_assert_eq!(entry.owned & !pages_of(index.memory_bytes, entry.chunk), 0);
                }
            }
        }
    }
}
