//! Sizes, masks of pages, and names of files.

use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::{Error, MemoryId, Result};

/// Bytes of a page of guest memory.
pub const PAGE_BYTES: usize = 4096;
/// Pages of a chunk: one bit each in a `u64`.
pub(crate) const PAGES: usize = 64;
/// Bytes of a chunk: the unit of hashing, compression and sharing.
pub const CHUNK_BYTES: usize = PAGE_BYTES * PAGES;
/// How many images a chain may have. A capture over the last one is built upon one in the middle, so that a long line of
/// captures never needs a whole one.
pub const MAX_DEPTH: u32 = 16;
/// The largest guest memory that is accepted, bytes: no index that is read may ask for more.
pub(crate) const MAX_MEMORY: u64 = 16 << 40;

pub(crate) const INDEX: &str = "index";
pub(crate) const RAW: &str = "memory.raw";
pub(crate) const FRAMES: &str = "frames.dat";
pub(crate) const FRAME_TABLE: &str = "frames.index";
pub(crate) const MEMO: &str = "verified";
pub(crate) const WORKING_SET: &str = "touched";
pub(crate) const TEMPORARY: &str = ".tmp-";

/// The directory of an image.
pub(crate) fn directory(root: &Path, id: MemoryId) -> PathBuf {
    root.join(id.to_string())
}

/// A page of zeros.
pub(crate) const ZERO_PAGE: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

/// Whether a page holds nothing but zeros. Comparing is the fastest way that needs no special instructions.
pub(crate) fn is_zero(page: &[u8]) -> bool {
    page == &ZERO_PAGE[..page.len()]
}

/// Whether a guest may have that much memory here.
pub(crate) fn check_memory_bytes(bytes: u64) -> Result<()> {
    if bytes == 0 || bytes > MAX_MEMORY || !bytes.is_multiple_of(PAGE_BYTES as u64) {
        return Err(Error::Invalid(format!(
            "guest memory must be a multiple of {PAGE_BYTES} bytes, at most {MAX_MEMORY}; {bytes} is not"
        )));
    }
    Ok(())
}

/// How many chunks guest memory has; the last one may be partial.
pub(crate) fn chunks(memory_bytes: u64) -> u64 {
    memory_bytes.div_ceil(CHUNK_BYTES as u64)
}

/// Where a chunk begins, bytes of guest memory.
pub(crate) fn chunk_offset(chunk: u32) -> u64 {
    u64::from(chunk) * CHUNK_BYTES as u64
}

/// The pages that a chunk has: all, but for a partial last one.
pub(crate) fn pages_of(memory_bytes: u64, chunk: u32) -> u64 {
    let left = memory_bytes.saturating_sub(chunk_offset(chunk)) / PAGE_BYTES as u64;
    ones(usize::try_from(left).unwrap_or(PAGES))
}

/// The part of guest memory that pages of a chunk span, for messages.
pub(crate) fn span(chunk: u32, mask: u64) -> Range<u64> {
    let page = PAGE_BYTES as u64;
    let start = chunk_offset(chunk);
    if mask == 0 {
        return start..start;
    }
    start + u64::from(mask.trailing_zeros()) * page..start + u64::from(64 - mask.leading_zeros()) * page
}

/// Bytes that the pages of a mask hold.
pub(crate) fn bytes_of(mask: u64) -> usize {
    mask.count_ones() as usize * PAGE_BYTES
}

/// A mask of the first pages.
pub(crate) fn ones(count: usize) -> u64 {
    if count >= PAGES {
        u64::MAX
    } else {
        (1 << count) - 1
    }
}

/// A mask of a range of pages within a chunk.
pub(crate) fn mask_of(pages: Range<usize>) -> u64 {
    ones(pages.end) & !ones(pages.start)
}

/// The runs of neighbouring pages of a mask, as page numbers.
pub(crate) fn runs(mut mask: u64) -> impl Iterator<Item = Range<usize>> {
    std::iter::from_fn(move || {
        if mask == 0 {
            return None;
        }
        let start = mask.trailing_zeros() as usize;
        let length = (mask >> start).trailing_ones() as usize;
        mask &= !mask_of(start..start + length);
        Some(start..start + length)
    })
}

/// The bytes of a range of pages within a chunk.
pub(crate) fn bytes(pages: &Range<usize>) -> Range<usize> {
    pages.start * PAGE_BYTES..pages.end * PAGE_BYTES
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn runs_are_the_mask(mask: u64) {
            let together = runs(mask).fold(0, |sum, run| {
                let part = mask_of(run);
                assert_eq!(sum & part, 0);
                assert_eq!(sum & (part >> 1), 0, "runs that touch are one");
                sum | part
            });
            prop_assert_eq!(together, mask);
        }
    }

    #[test]
    fn the_last_chunk_may_be_partial() {
        let memory = CHUNK_BYTES as u64 + 3 * PAGE_BYTES as u64;
        assert_eq!(chunks(memory), 2);
        assert_eq!(
            (pages_of(memory, 0), pages_of(memory, 1), pages_of(memory, 2)),
            (u64::MAX, 0b111, 0)
        );
    }
}
