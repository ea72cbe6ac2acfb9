//! What is known of the forms of images, so that whoever lists snapshots need not look into the store.
//!
//! Invariants:
//! - Of an image that is known, all ancestors are, unless they cannot be read.
//! - What a sweep removed is forgotten.

use std::collections::HashMap;

use hypeman_snapshots::{Compressor, MAX_DEPTH, MemoryId, Outline};

use super::super::model::{Algorithm, CompressionState};

/// The outlines of images.
#[derive(Debug, Default)]
pub(super) struct Forms(HashMap<MemoryId, Outline>);

impl Forms {
    pub(super) fn insert(&mut self, id: MemoryId, outline: Outline) {
        self.0.insert(id, outline);
    }

    pub(super) fn contains(&self, id: MemoryId) -> bool {
        self.0.contains_key(&id)
    }

    /// Forgets an image; returns what it was built on.
    pub(super) fn remove(&mut self, id: MemoryId) -> Option<MemoryId> {
        self.0.remove(&id).and_then(|outline| outline.parent)
    }

    /// Says of an image with frames what they take, those of its ancestors included. Pages of an ancestor that is not
    /// compressed are none.
    pub(super) fn compressed(&self, id: MemoryId) -> Option<CompressionState> {
        let own = self.0.get(&id)?;
        own.frame_bytes?;
        let chain = std::iter::successors(Some(own), |outline| self.0.get(&outline.parent?));
        Some(CompressionState::Compressed {
            bytes: chain
                .take(MAX_DEPTH as usize)
                .filter_map(|outline| outline.frame_bytes)
                .sum(),
            algorithm: own.compressor.map(|compressor| match compressor {
                Compressor::Zstd => Algorithm::Zstd,
                Compressor::Lz4 => Algorithm::Lz4,
            }),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outline(parent: Option<MemoryId>, frame_bytes: Option<u64>) -> Outline {
        Outline {
            parent,
            raw: frame_bytes.is_none(),
            frame_bytes,
            compressor: frame_bytes.map(|_| Compressor::Zstd),
        }
    }

    #[test]
    fn what_an_image_takes_compressed_is_what_its_chain_does() {
        let [base, top] = [MemoryId::random().unwrap(), MemoryId::random().unwrap()];
        let mut forms = Forms::default();
        forms.insert(base, outline(None, None));
        forms.insert(top, outline(Some(base), Some(4)));
        let done = |bytes| {
            let algorithm = Some(Algorithm::Zstd);
            Some(CompressionState::Compressed { bytes, algorithm })
        };
        assert_eq!(forms.compressed(base), None);
        assert_eq!(forms.compressed(top), done(4));
        forms.insert(base, outline(None, Some(300)));
        assert_eq!(forms.compressed(top), done(304));
        assert_eq!(forms.remove(top), Some(base));
        assert_eq!((forms.compressed(top), forms.contains(base)), (None, true));
    }
}
