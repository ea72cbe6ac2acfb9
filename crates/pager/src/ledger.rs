//! What is known about the pages of one machine, and what a fault brings along.
//!
//! ```text
//!            filled by us            given back by the guest
//!  missing ────────────────► filled ─────────────────────────► removed: zero for ever, whoever asks
//!     └──────────────────────────────────────────────────────────▲
//! ```
//! A fault is answered with its page and some of its neighbours: with more of them the longer the guest reads on
//! where it was, because each answer costs more than copying a page, and each page that nobody needs costs memory.

use std::collections::HashMap;
use std::ops::Range;

use hypeman_snapshots::{CHUNK_BYTES, PAGE_BYTES};

/// Pages of a chunk.
pub(crate) const PAGES: usize = CHUNK_BYTES / PAGE_BYTES;
/// Pages that the first fault somewhere brings along.
const FIRST_WINDOW: usize = 8;

/// Chunk and page of a place in guest RAM.
pub(crate) fn locate(offset: u64) -> (u32, usize) {
    let chunk = offset / CHUNK_BYTES as u64;
    let page = offset % CHUNK_BYTES as u64 / PAGE_BYTES as u64;
    (u32::try_from(chunk).unwrap_or(u32::MAX), page as usize)
}

/// A mask of a range of pages within a chunk.
pub(crate) fn mask_of(pages: &Range<usize>) -> u64 {
    let ones = |count: usize| {
        if count >= PAGES {
            u64::MAX
        } else {
            (1 << count) - 1
        }
    };
    ones(pages.end) & !ones(pages.start)
}

/// The runs of neighbouring pages of a mask.
pub(crate) fn runs(mut mask: u64) -> impl Iterator<Item = Range<usize>> {
    std::iter::from_fn(move || {
        if mask == 0 {
            return None;
        }
        let start = mask.trailing_zeros() as usize;
        let end = start + (mask >> start).trailing_ones() as usize;
        mask &= !mask_of(&(start..end));
        Some(start..end)
    })
}

/// The neighbours of a page that are in the mask, within a window around it. The page is, whatever the mask says.
pub(crate) fn around(page: usize, mask: u64, window: usize) -> Range<usize> {
    let first = page - page % window.clamp(1, PAGES);
    let last = (first + window).min(PAGES);
    let wanted = |page: &usize| mask & (1 << page) != 0;
    let start = (first..page).rev().take_while(wanted).last().unwrap_or(page);
    let end = (page + 1..last).take_while(wanted).last().unwrap_or(page);
    start..end + 1
}

/// The pages of one machine.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    filled: HashMap<u32, u64>,
    removed: HashMap<u32, u64>,
    /// How many pages are filled.
    populated: u64,
    /// The page after the last answer, counted through all of memory, and how many that one brought.
    next: u64,
    window: usize,
}

impl Ledger {
    fn get(map: &HashMap<u32, u64>, chunk: u32) -> u64 {
        map.get(&chunk).copied().unwrap_or(0)
    }

    /// Pages of a chunk that the guest gave back.
    pub(crate) fn removed(&self, chunk: u32) -> u64 {
        Self::get(&self.removed, chunk)
    }

    /// Pages of a chunk that we filled and that were not given back since.
    pub(crate) fn filled(&self, chunk: u32) -> u64 {
        Self::get(&self.filled, chunk)
    }

    /// How many pages we filled that were not given back since.
    pub(crate) fn populated(&self) -> u64 {
        self.populated
    }

    pub(crate) fn fill(&mut self, chunk: u32, pages: &Range<usize>) {
        let (filled, pages) = (self.filled.entry(chunk).or_default(), mask_of(pages));
        self.populated += u64::from((pages & !*filled).count_ones());
        *filled |= pages;
    }

    /// The guest gives back a range of its RAM.
    pub(crate) fn remove(&mut self, range: Range<u64>) {
        let mut at = range.start - range.start % PAGE_BYTES as u64;
        while at < range.end {
            let (chunk, first) = locate(at);
            let base = at - first as u64 * PAGE_BYTES as u64;
            let end = range.end.min(base + CHUNK_BYTES as u64);
            let last = ((end - base) as usize).div_ceil(PAGE_BYTES);
            let mask = mask_of(&(first..last));
            *self.removed.entry(chunk).or_default() |= mask;
            if let Some(filled) = self.filled.get_mut(&chunk) {
                self.populated -= u64::from((*filled & mask).count_ones());
                *filled &= !mask;
            }
            at = base + CHUNK_BYTES as u64;
        }
    }

    /// Chunks of which pages were given back and not filled since, with those pages.
    pub(crate) fn holes(&self) -> Vec<(u32, u64)> {
        let hole = |(chunk, removed): (&u32, &u64)| (*chunk, removed & !self.filled(*chunk));
        let mut holes: Vec<_> = self
            .removed
            .iter()
            .map(hole)
            .filter(|(_, pages)| *pages != 0)
            .collect();
        holes.sort_unstable();
        holes
    }

    /// How many pages a fault may bring: more while the guest goes on where the last answer ended.
    pub(crate) fn window(&mut self, chunk: u32, page: usize) -> usize {
        let at = u64::from(chunk) * PAGES as u64 + page as u64;
        self.window = if at == self.next {
            (self.window * 2).clamp(FIRST_WINDOW, PAGES)
        } else {
            FIRST_WINDOW
        };
        self.window
    }

    /// A fault was answered with these pages.
    pub(crate) fn answered(&mut self, chunk: u32, pages: &Range<usize>) {
        self.next = u64::from(chunk) * PAGES as u64 + pages.end as u64;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_fault_brings_its_page_and_wanted_neighbours_only(page in 0_usize..64, mask: u64, power in 0_u32..7) {
            let window = 1 << power;
            let pages = around(page, mask, window);
            prop_assert!(pages.contains(&page) && pages.len() <= window && pages.end <= PAGES);
            prop_assert_eq!(mask_of(&pages) & !(mask | 1 << page), 0);
        }

        #[test]
        fn runs_are_the_mask(mask: u64) {
            prop_assert_eq!(runs(mask).fold(0, |sum, run| sum | mask_of(&run)), mask);
        }

        #[test]
        fn what_was_removed_stays_removed_and_is_a_hole_until_filled(
            steps in prop::collection::vec((any::<bool>(), 0_u64..200, 1_u64..80), 1..20),
        ) {
            let mut ledger = Ledger::default();
            let mut model = vec![(false, false); 300];
            for (fill, start, length) in steps {
                let pages = start..start + length;
                if fill {
                    for page in pages {
                        let (chunk, page_in_chunk) = locate(page * PAGE_BYTES as u64);
                        ledger.fill(chunk, &(page_in_chunk..page_in_chunk + 1));
                        model[page as usize].1 = true;
                    }
                } else {
                    ledger.remove(pages.start * PAGE_BYTES as u64..pages.end * PAGE_BYTES as u64);
                    pages.for_each(|page| model[page as usize] = (true, false));
                }
            }
            let filled = model.iter().filter(|(_, filled)| *filled).count();
            prop_assert_eq!(ledger.populated(), filled as u64);
            let holes: HashMap<u32, u64> = ledger.holes().into_iter().collect();
            for (number, (removed, filled)) in model.into_iter().enumerate() {
                let (chunk, page) = locate((number * PAGE_BYTES) as u64);
                let bit = |mask: u64| mask & (1 << page) != 0;
                prop_assert_eq!(bit(ledger.removed(chunk)), removed);
                prop_assert_eq!(bit(ledger.filled(chunk)), filled);
                prop_assert_eq!(bit(holes.get(&chunk).copied().unwrap_or(0)), removed && !filled);
            }
        }
    }

    #[test]
    fn windows_grow_while_the_guest_reads_on() {
        let mut ledger = Ledger::default();
        let mut sizes = Vec::new();
        for page in [8, 16, 32] {
            let window = ledger.window(0, page);
            sizes.push(window);
            ledger.answered(0, &around(page, u64::MAX, window));
        }
        assert_eq!(sizes, [8, 16, 32]);
        assert_eq!(ledger.window(1, 0), 64);
        assert_eq!(ledger.window(9, 0), 8);
    }
}
