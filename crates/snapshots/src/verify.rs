//! Reading every byte of an image again.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::error::{Form, Part, at};
use crate::layout::{
    CHUNK_BYTES, MEMO, PAGE_BYTES, RAW, bytes, bytes_of, chunk_offset, is_zero, mask_of, runs, span,
};
use crate::reader::{Content, Layer, Scratch};
use crate::{Error, MemoryId, MemoryStore, Result, files, memo, parallel};

/// What was read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Images: the one that was asked for, and its ancestors.
    pub images: u32,
    /// Bytes of memory that were compared, once for each form.
    pub bytes: u64,
}

impl MemoryStore {
    /// Reads and checks every byte of every form of an image and its ancestors, whatever was verified before.
    /// `progress` is told bytes done and bytes in all, by many threads.
    ///
    /// # Errors
    /// [`Error::Damaged`] naming image and range, [`Error::Cancelled`], and those of the file system.
    pub fn verify(
        &self,
        id: &MemoryId,
        cancel: &AtomicBool,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Verified> {
        let _hold = self.hold(*id)?;
        let layers = self.everything(*id)?;
        let total = page_bytes(&layers);
        let done = AtomicU64::new(0);
        let add = |bytes: u64| progress(done.fetch_add(bytes, Ordering::Relaxed) + bytes, total);
        let mut images = std::collections::HashSet::new();
        for layer in &layers {
            images.insert(layer.index.id);
            if let Content::Raw { file, .. } = &layer.content {
                raw(layer, cancel, &add)?;
                memo::remember(&self.shared.path(layer.index.id, MEMO), file, &layer.index.seal);
            } else {
                owned(layer, cancel, &add)?;
            }
        }
        Ok(Verified {
            images: u32::try_from(images.len()).unwrap_or(u32::MAX),
            bytes: total,
        })
    }

    /// The bytes that [`MemoryStore::verify`] would compare.
    ///
    /// # Errors
    /// [`Error::NotFound`], and when indexes or frame tables are damaged.
    pub fn verify_bytes(&self, id: &MemoryId) -> Result<u64> {
        let _hold = self.hold(*id)?;
        Ok(page_bytes(&self.everything(*id)?))
    }

    /// An image and its ancestors in each of their forms. Opening the chain checks that its indexes belong together.
    fn everything(&self, id: MemoryId) -> Result<Vec<Layer>> {
        let chain = crate::reader::Chain::open(&self.shared, id)?;
        let mut layers = Vec::new();
        for layer in chain.layers {
            let index = layer.index;
            let contents = [
                Layer::raw(&self.shared, &index)?,
                Layer::framed(&self.shared, &index)?,
            ];
            layers.extend(contents.into_iter().flatten().map(|content| Layer {
                index: index.clone(),
                content,
            }));
        }
        Ok(layers)
    }
}

fn page_bytes(layers: &[Layer]) -> u64 {
    let entries = layers.iter().flat_map(|layer| &layer.index.entries);
    entries.map(|entry| bytes_of(entry.nonzero) as u64).sum()
}

/// Checks every page that an image owns, in the form in which it was opened.
fn owned(layer: &Layer, cancel: &AtomicBool, done: &(dyn Fn(u64) + Sync)) -> Result<()> {
    let start = || Ok(Scratch::new());
    parallel::each(layer.index.entries.len(), start, |scratch, number| {
        if cancel.load(Ordering::Relaxed) {
            return Err(Error::Cancelled);
        }
        done(layer.load(number, scratch)?.len() as u64);
        Ok(())
    })?;
    Ok(())
}

/// Checks a raw image: every page that it owns, and that there is nothing else in the file, because all of it is
/// mapped.
pub(crate) fn raw(layer: &Layer, cancel: &AtomicBool, done: &(dyn Fn(u64) + Sync)) -> Result<()> {
    let Content::Raw { file, .. } = &layer.content else {
        return Ok(());
    };
    owned(layer, cancel, done)?;
    let data = data_pages(file).map_err(at("read", &layer.name(RAW)))?;
    let nonzero = |chunk| layer.index.find(chunk).map_or(0, |(_, entry)| entry.nonzero);
    let foreign = data
        .into_iter()
        .map(|(chunk, pages)| (chunk, pages & !nonzero(chunk)));
    let foreign: Vec<(u32, u64)> = foreign.filter(|(_, pages)| *pages != 0).collect();
    parallel::each(
        foreign.len(),
        || Ok(vec![0; CHUNK_BYTES]),
        |buffer, number| {
            let (chunk, pages) = foreign[number];
            for run in runs(pages) {
                let range = bytes(&run);
                let buffer = &mut buffer[..range.len()];
                // The file has the length of the memory, which is whole pages.
                file.read_exact_at(buffer, chunk_offset(chunk) + range.start as u64)
                    .map_err(at("read", &layer.name(RAW)))?;
                if !buffer.chunks(PAGE_BYTES).all(is_zero) {
                    let range = span(chunk, mask_of(run));
                    let part = Part::Memory {
                        image: layer.index.id,
                        range,
                        form: Form::Raw,
                    };
                    return Err(Error::Damaged {
                        part,
                        reason: "there are bytes where nothing was captured",
                    });
                }
            }
            Ok(())
        },
    )?;
    Ok(())
}

/// The pages of a file that are not holes, by chunk.
fn data_pages(file: &File) -> io::Result<BTreeMap<u32, u64>> {
    let mut masks = BTreeMap::new();
    for extent in files::data_extents(file)? {
        let mut at = extent.start - extent.start % PAGE_BYTES as u64;
        while at < extent.end {
            let chunk = at / CHUNK_BYTES as u64;
            let base = chunk * CHUNK_BYTES as u64;
            let until = extent.end.min(base + CHUNK_BYTES as u64);
            let first = (at - base) as usize / PAGE_BYTES;
            let last = ((until - base) as usize).div_ceil(PAGE_BYTES);
            *masks.entry(u32::try_from(chunk).unwrap_or(u32::MAX)).or_default() |= mask_of(first..last);
            at = until;
        }
    }
    Ok(masks)
}
