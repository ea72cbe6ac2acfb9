//! Ranges of bytes of large files and memories, worked on by all cores.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What a thread works on at a time: small enough to stay in its core's cache between reading and writing.
pub(crate) const PIECE: u64 = 256 * 1024;
const MOST_THREADS: usize = 16;

/// Cuts ranges into pieces and works on them until one fails. Each thread makes itself a state by `start`.
pub(crate) fn each_piece<State>(
    ranges: &[Range<u64>],
    start: impl Fn() -> State + Sync,
    work: impl Fn(&mut State, &Range<u64>) -> io::Result<()> + Sync,
) -> io::Result<()> {
    let pieces: Vec<Range<u64>> = ranges.iter().cloned().flat_map(pieces).collect();
    let next = AtomicUsize::new(0);
    let run = || -> io::Result<()> {
        let mut state = start();
        while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            work(&mut state, piece)?;
        }
        Ok(())
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = threads.min(MOST_THREADS).min(pieces.len());
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(run)).collect();
        let mut outcome = run();
        for other in others {
            let theirs = other
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("a copying thread failed")));
            outcome = outcome.and(theirs);
        }
        outcome
    })
}

fn pieces(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let end = range.end;
    range
        .step_by(PIECE as usize)
        .map(move |start| start..(start + PIECE).min(end))
}

/// The parts of `all` that are in none of `taken`; both ascending and without overlap.
pub(crate) fn without(all: &[Range<u64>], taken: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut left = Vec::new();
    let mut taken = taken.iter().peekable();
    for range in all {
        let mut start = range.start;
        while let Some(other) = taken.peek() {
            if other.start >= range.end {
                break;
            }
            if other.start > start {
                left.push(start..other.start);
            }
            start = start.max(other.end);
            if other.end > range.end {
                break;
            }
            taken.next();
        }
        if start < range.end {
            left.push(start..range.end);
        }
    }
    left
}

/// What is in either, merged where it touches; both ascending and without overlap.
pub(crate) fn union(some: Vec<Range<u64>>, others: Vec<Range<u64>>) -> Vec<Range<u64>> {
    if others.is_empty() {
        return some;
    }
    let mut all = some;
    all.extend(others);
    all.sort_unstable_by_key(|range| range.start);
    let mut union: Vec<Range<u64>> = Vec::with_capacity(all.len());
    for range in all {
        match union.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => union.push(range),
        }
    }
    union
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ranges() -> impl Strategy<Value = Vec<Range<u64>>> {
        proptest::collection::vec((1_u64..9, 1_u64..9), 0..12).prop_map(|steps| {
            let mut at = 0;
            steps
                .into_iter()
                .map(|(gap, length)| {
                    let start = at + gap;
                    at = start + length;
                    start..at
                })
                .collect()
        })
    }

    proptest! {
        #[test]
        fn what_is_left_is_what_was_not_taken(all in ranges(), taken in ranges()) {
            let left = without(&all, &taken);
            let has = |ranges: &[Range<u64>], point| ranges.iter().any(|range| range.contains(&point));
            for point in 0..220 {
                prop_assert_eq!(has(&left, point), has(&all, point) && !has(&taken, point), "{}", point);
            }
        }

        #[test]
        fn a_union_has_what_either_has(some in ranges(), others in ranges()) {
            let union = union(some.clone(), others.clone());
            let has = |ranges: &[Range<u64>], point| ranges.iter().any(|range| range.contains(&point));
            for point in 0..220 {
                prop_assert_eq!(has(&union, point), has(&some, point) || has(&others, point), "{}", point);
            }
            prop_assert!(others.is_empty() || union.windows(2).all(|pair| pair[0].end < pair[1].start));
        }

        #[test]
        fn pieces_are_the_range(start in 0_u64..10, pages in 0_u64..200) {
            let range = start * 4096..(start + pages) * 4096;
            let mut at = range.start;
            for piece in pieces(range.clone()) {
                prop_assert_eq!(piece.start, at);
                prop_assert!(piece.end > piece.start && piece.end - piece.start <= PIECE);
                at = piece.end;
            }
            prop_assert_eq!(at, range.end);
        }
    }
}
