//! Taking an image of guest memory: only what is not zero, and over a parent only what differs from it.
//!
//! ```text
//! source ──► chunk ──► compare with the parent's content ──► owned pages ──► memory.raw   ─┐
//!            (all cores)                                      digest      ──► index        ─┴► fsync ─► rename
//! ```

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;

use crate::draft::{Draft, Drawn};
use crate::index::{Entry, Index};
use crate::layout::{
    CHUNK_BYTES, MAX_DEPTH, PAGE_BYTES, bytes, check_memory_bytes, chunk_offset, is_zero, mask_of, pages_of,
    runs,
};
use crate::reader::{self, Chain, Layer, Scratch};
use crate::store::Shared;
use crate::{Digest, Error, Hold, MemoryId, MemoryStore, Result, parallel};

/// What a capture reads. Offsets are bytes of guest RAM.
pub trait MemorySource: Sync {
    /// Where there is anything to read: whole pages, in any order.
    fn extents(&self) -> Vec<Range<u64>>;
    /// Reads whole pages within one extent. Called by many threads at once.
    ///
    /// # Errors
    /// Whatever makes reading impossible ends the capture.
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;
}

/// What the pages outside the extents of a source hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Elsewhere {
    /// Zeros.
    Zero,
    /// What the parent holds there.
    Parent,
}

/// A finished, durable image.
pub struct Captured {
    /// Bytes that the image takes: pages and index.
    pub stored_bytes: u64,
    /// Bytes of the guest's memory that are not zero, whichever image of the chain has them.
    pub content_bytes: u64,
    /// Pages that the image owns, zero pages that hide others included.
    pub owned_pages: u64,
    /// Owned pages that are zero. They take no space.
    pub zero_pages: u64,
    /// Images in the chain; 1 for an image that stands alone, though a parent may have been named.
    pub depth: u32,
    /// The parent that the image really has.
    pub parent: Option<MemoryId>,
    /// The seal of the index.
    pub digest: Digest,
    /// Keeps the image until something that sweeps are told of names it.
    pub hold: Hold,
}

/// What a new image is built upon.
enum Below {
    /// Nothing: the image stands alone.
    Nothing,
    /// The image owns what differs from the layers of a chain without the first `skipped` ones.
    Layers { chain: Chain, skipped: usize },
}

impl Below {
    /// The layers of the image's ancestors.
    fn base(&self) -> &[Layer] {
        match self {
            Self::Nothing => &[],
            Self::Layers { chain, skipped } => &chain.layers[*skipped..],
        }
    }

    /// Layers between the ancestors and what the guest had.
    fn between(&self) -> &[Layer] {
        match self {
            Self::Nothing => &[],
            Self::Layers { chain, skipped } => &chain.layers[..*skipped],
        }
    }
}

impl MemoryStore {
    /// Captures guest memory as image `id`; durable when this returns. See [`Captured::hold`].
    ///
    /// A parent that is missing, damaged, or of another size is not built upon, if `elsewhere` allows that. Instead of
    /// one that is as deep as chains may be, an ancestor in the middle of the chain becomes the parent, or none when
    /// too much has changed since.
    ///
    /// # Errors
    /// [`Error::Exists`], [`Error::Invalid`] for sizes and extents that make no sense, [`Error::Source`], and those
    /// of the file system. Nothing is left behind.
    pub fn capture(
        &self,
        id: &MemoryId,
        memory_bytes: u64,
        parent: Option<&MemoryId>,
        source: &dyn MemorySource,
        elsewhere: Elsewhere,
    ) -> Result<Captured> {
        check_memory_bytes(memory_bytes)?;
        let hold = self.shared.hold(*id, false)?;
        if crate::layout::directory(self.shared.root(), *id).exists() {
            return Err(Error::Exists(*id));
        }
        let wanted = page_masks(&source.extents(), memory_bytes)?;
        if elsewhere == Elsewhere::Parent && parent.is_none() {
            return Err(Error::Invalid(
                "pages cannot be taken from a parent that is not named".into(),
            ));
        }
        let job = |below| Job {
            shared: &self.shared,
            id: *id,
            memory_bytes,
            source,
            elsewhere,
            below,
        };
        let parent_hold = parent.map(|parent| self.hold(*parent)).transpose();
        let opened = parent_hold.and_then(|hold| {
            let chain = hold
                .as_ref()
                .map(|hold| Chain::open(&self.shared, hold.id()))
                .transpose()?;
            Ok((hold, chain))
        });
        let alone = |error: &Error| {
            elsewhere == Elsewhere::Zero && (error.is_damage() || matches!(error, Error::NotFound(_)))
        };
        let done = match opened {
            Ok((_hold, Some(chain))) => {
                let below = if chain.top().memory_bytes != memory_bytes {
                    if elsewhere == Elsewhere::Parent {
                        return Err(Error::Invalid("the parent has another amount of memory".into()));
                    }
                    Below::Nothing
                } else if chain.top().depth < MAX_DEPTH {
                    Below::Layers { chain, skipped: 0 }
                } else {
                    let skipped = skipped(&chain.layers);
                    Below::Layers { chain, skipped }
                };
                match job(below).run(wanted.clone()) {
                    // The parent turned out to be damaged, and is not needed.
                    Err(error) if alone(&error) => job(Below::Nothing).run(wanted),
                    other => other,
                }
            }
            Ok((_, None)) => job(Below::Nothing).run(wanted),
            Err(error) if alone(&error) => job(Below::Nothing).run(wanted),
            Err(error) => Err(error),
        }?;
        Ok(Captured::of(done, hold))
    }
}

impl Captured {
    pub(crate) fn of(drawn: Drawn, hold: Hold) -> Self {
        let Drawn {
            index,
            stored_bytes,
            content_bytes,
        } = drawn;
        let count = |mask: fn(&Entry) -> u64| -> u64 {
            index
                .entries
                .iter()
                .map(|entry| u64::from(mask(entry).count_ones()))
                .sum()
        };
        Self {
            stored_bytes,
            content_bytes,
            owned_pages: count(|entry| entry.owned),
            zero_pages: count(|entry| entry.owned & !entry.nonzero),
            depth: index.depth,
            parent: index.parent.map(|(parent, _)| parent),
            digest: index.seal,
            hold,
        }
    }
}

/// How many layers of the deepest possible chain a new image does without: half of them, or all when the others
/// would save less than half of the space.
fn skipped(layers: &[Layer]) -> usize {
    let half = layers.len() / 2;
    let pages = |layers: &[Layer], mask: fn(&Entry) -> u64| -> u64 {
        let entries = layers.iter().flat_map(|layer| &layer.index.entries);
        let mut chunks = BTreeMap::<u32, u64>::new();
        entries.for_each(|entry| *chunks.entry(entry.chunk).or_default() |= mask(entry));
        chunks.values().map(|pages| u64::from(pages.count_ones())).sum()
    };
    let changed = pages(&layers[..half], |entry| entry.owned);
    let all = pages(layers, |entry| entry.nonzero);
    if changed * 2 < all { half } else { layers.len() }
}

/// For each chunk the pages that the extents cover.
fn page_masks(extents: &[Range<u64>], memory_bytes: u64) -> Result<BTreeMap<u32, u64>> {
    let page = PAGE_BYTES as u64;
    let mut masks = BTreeMap::new();
    for extent in extents {
        let whole = extent.start.is_multiple_of(page) && extent.end.is_multiple_of(page);
        if !whole || extent.start > extent.end || extent.end > memory_bytes {
            let Range { start, end } = extent;
            return Err(Error::Invalid(format!(
                "{start:#x} to {end:#x} are not whole pages of the guest's memory"
            )));
        }
        let mut start = extent.start;
        while start < extent.end {
            let chunk = start / CHUNK_BYTES as u64;
            let base = chunk * CHUNK_BYTES as u64;
            let end = extent.end.min(base + CHUNK_BYTES as u64);
            let pages = ((start - base) / page) as usize..((end - base) / page) as usize;
            let chunk = u32::try_from(chunk).map_err(|_| Error::Invalid("the guest is too large".into()))?;
            *masks.entry(chunk).or_default() |= mask_of(pages);
            start = end;
        }
    }
    Ok(masks)
}

struct Job<'a> {
    shared: &'a Shared,
    id: MemoryId,
    memory_bytes: u64,
    source: &'a dyn MemorySource,
    elsewhere: Elsewhere,
    below: Below,
}

/// Buffers and findings of one thread.
struct Worker {
    fresh: Vec<u8>,
    old: Vec<u8>,
    packed: Vec<u8>,
    scratch: Scratch,
    entries: Vec<Entry>,
}

impl Job<'_> {
    /// Writes the image.
    fn run(&self, mut wanted: BTreeMap<u32, u64>) -> Result<Drawn> {
        // Without a word of the source, a page is zero or what layers between made of it.
        let silent = match self.elsewhere {
            Elsewhere::Zero => self.below.base(),
            Elsewhere::Parent => self.below.between(),
        };
        let more = silent
            .iter()
            .flat_map(|layer| &layer.index.entries)
            .map(|entry| entry.chunk);
        for chunk in more {
            wanted.entry(chunk).or_default();
        }
        let wanted: Vec<(u32, u64)> = wanted.into_iter().collect();

        let draft = Draft::create(self.shared, self.id, self.memory_bytes)?;
        let start = || {
            Ok(Worker {
                fresh: vec![0; CHUNK_BYTES],
                old: vec![0; CHUNK_BYTES],
                packed: Vec::with_capacity(CHUNK_BYTES),
                scratch: Scratch::new(),
                entries: Vec::new(),
            })
        };
        let workers = parallel::each(wanted.len(), start, |worker, number| {
            let (chunk, pages) = wanted[number];
            self.chunk(worker, chunk, pages, &draft)
        })?;
        let ancestors: Vec<&Index> = self.below.base().iter().map(|layer| &layer.index).collect();
        draft.finish(
            &ancestors,
            workers.into_iter().flat_map(|worker| worker.entries).collect(),
        )
    }

    /// Decides what the image owns of one chunk, and writes it.
    fn chunk(&self, worker: &mut Worker, chunk: u32, pages: u64, draft: &Draft<'_>) -> Result<()> {
        let Worker {
            fresh,
            old,
            packed,
            scratch,
            entries,
        } = worker;
        let start = chunk_offset(chunk);
        let mut nonzero = 0;
        for run in runs(pages) {
            let range = bytes(&run);
            let offset = start + range.start as u64;
            let read = self.source.read(offset, &mut fresh[range]);
            read.map_err(|source| Error::Source { offset, source })?;
            for page in run {
                if !is_zero(&fresh[bytes(&(page..page + 1))]) {
                    nonzero |= 1 << page;
                }
            }
        }
        let all = pages_of(self.memory_bytes, chunk);
        let base = self.below.base();
        let compared = match self.elsewhere {
            Elsewhere::Zero => all,
            Elsewhere::Parent => {
                let between = self.below.between();
                let skipped = reader::owned(between, chunk) & !pages;
                nonzero |= reader::fill(between, chunk, skipped, fresh, scratch)?;
                pages | skipped
            }
        };
        let owned = if base.is_empty() {
            nonzero
        } else {
            let before = reader::nonzero(base, chunk, compared);
            let both = before & nonzero;
            reader::fill(base, chunk, both, old, scratch)?;
            let differs = |page: &usize| {
                let range = bytes(&(*page..page + 1));
                fresh[range.clone()] != old[range]
            };
            let changed = runs(both)
                .flatten()
                .filter(differs)
                .fold(0, |mask, page| mask | 1 << page);
            (before ^ nonzero) | changed
        };
        if owned == 0 {
            return Ok(());
        }
        entries.push(draft.put(chunk, owned, nonzero & owned, fresh, packed)?);
        Ok(())
    }
}
