//! Where guest memory lies in a VMM that does not say so.
//!
//! ```text
//! restored   the private mapping of a file that we named: found by its inode
//! served     memory whose pages somebody fills: found by a flag of the kernel
//! booted     anonymous memory: found by the kernel's command line, which the VMM wrote at a known place of it
//! ```
//!
//! The kernel joins neighbouring mappings of the same kind, so anonymous guest memory may be a part of a larger one.
//! The command line is looked for right after the start, before the guest could have put something else there; where
//! memory was found is then written down for servers to come.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use super::Segment;
use super::mappings::{Mapping, parse};
use crate::process::ProcessHandle;

const PAGE: u64 = 4096;

/// Bytes at a known place of guest memory that are in no other machine's.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Signature<'a> {
    /// Guest physical address.
    pub(crate) offset: u64,
    pub(crate) bytes: &'a [u8],
}

/// Finds the private mappings of a file, of these lengths, one behind the other in the file.
pub(crate) fn private_file(
    process: &ProcessHandle,
    file: &Path,
    lengths: &[u64],
) -> io::Result<Vec<Segment>> {
    let inode = std::fs::metadata(file)?.ino();
    let mappings = writable(process)?;
    let of_file: Vec<(&Mapping, u64)> = mappings
        .iter()
        .filter_map(|mapping| match &mapping.file {
            Some((_, number, offset)) if *number == inode => Some((mapping, *offset)),
            _ => None,
        })
        .collect();
    let mut begin = 0;
    let mut segments = Vec::with_capacity(lengths.len());
    for length in lengths.iter().copied() {
        let start = of_file
            .iter()
            .find(|(mapping, offset)| {
                let bytes = mapping.addresses.end - mapping.addresses.start;
                (*offset..offset + bytes).contains(&begin)
            })
            .map(|(mapping, offset)| mapping.addresses.start + (begin - offset))
            .ok_or_else(|| not_found("no mapping of its file"))?;
        let whole = joined(&mappings, start).is_some_and(|all| all.end - start >= length);
        if !whole {
            return Err(not_found("its file is mapped in part only"));
        }
        segments.push(Segment {
            address: start,
            length,
        });
        begin += length;
    }
    Ok(segments)
}

/// Finds anonymous memory of these lengths whose first segment has the signature.
pub(crate) fn anonymous(
    process: &ProcessHandle,
    lengths: &[u64],
    signature: &Signature<'_>,
) -> io::Result<Vec<Segment>> {
    let Some((first, others)) = lengths.split_first() else {
        return Err(not_found("it has no length"));
    };
    let blocks: Vec<Range<u64>> = writable(process)?
        .into_iter()
        .filter(|mapping| mapping.file.is_none())
        .map(|mapping| mapping.addresses)
        .collect();
    let memory = File::open(format!("/proc/{}/mem", process.identity().pid))?;
    let mut buffer = vec![0; signature.bytes.len()];
    let mut has_signature = |address: &u64| {
        memory
            .read_exact_at(&mut buffer, address + signature.offset)
            .is_ok()
            && buffer == signature.bytes
    };
    let start = blocks
        .iter()
        .flat_map(|block| starts(block, *first))
        .find(|address| has_signature(address))
        .ok_or_else(|| not_found("nothing there has its kernel's command line"))?;
    if !process.is_alive() {
        return Err(super::gone());
    }
    behind(start, *first, others, &blocks)
}

/// Finds memory of these lengths whose pages somebody fills: nothing else of a VMM is like that.
pub(crate) fn served(process: &ProcessHandle, lengths: &[u64]) -> io::Result<Vec<Segment>> {
    let Some((first, others)) = lengths.split_first() else {
        return Err(not_found("it has no length"));
    };
    let smaps = File::open(format!("/proc/{}/smaps", process.identity().pid))?;
    let blocks = super::served::ranges(BufReader::new(smaps))?;
    if !process.is_alive() {
        return Err(super::gone());
    }
    // The kernel maps downwards, so the first one ends its block.
    let exact = blocks.iter().find(|block| block.end - block.start == *first);
    let largest = || blocks.iter().rfind(|block| block.end - block.start > *first);
    let block = exact
        .or_else(largest)
        .ok_or_else(|| not_found("nobody serves its pages"))?;
    behind(block.end - first, *first, others, &blocks)
}

/// The other segments, when the first one is known.
fn behind(start: u64, first: u64, others: &[u64], blocks: &[Range<u64>]) -> io::Result<Vec<Segment>> {
    let mut segments = vec![Segment {
        address: start,
        length: first,
    }];
    for length in others.iter().copied() {
        let above = segments[segments.len() - 1].address;
        let below = above.checked_sub(length);
        let below = below.filter(|address| {
            blocks
                .iter()
                .any(|block| block.start <= *address && address + length <= block.end)
        });
        // Its own mapping, where it was not joined with that of the first. The kernel maps downwards, so what lies lower
        // came later: memory that may be added is of any length, this one too.
        let alone = || {
            let exact = || blocks.iter().filter(|block| block.end - block.start == length);
            let nearest = exact().rfind(|block| block.end <= above);
            nearest.or_else(|| exact().next()).map(|block| block.start)
        };
        let address = below
            .or_else(alone)
            .ok_or_else(|| not_found("its part above 3 GiB is nowhere"))?;
        segments.push(Segment { address, length });
    }
    Ok(segments)
}

/// Where memory of this length may begin in a block: most likely at one of its ends.
fn starts(block: &Range<u64>, length: u64) -> impl Iterator<Item = u64> + use<> {
    let last = (block.end - block.start)
        .checked_sub(length)
        .map(|room| block.start + room);
    let first = block.start;
    last.into_iter()
        .flat_map(move |last| std::iter::once(last).chain((first..last).step_by(PAGE as usize)))
}

/// The range of addresses around `address` without a gap.
fn joined(mappings: &[Mapping], address: u64) -> Option<Range<u64>> {
    let mut all: Option<Range<u64>> = None;
    for mapping in mappings {
        match &mut all {
            None if mapping.addresses.contains(&address) => all = Some(mapping.addresses.clone()),
            Some(all) if all.end == mapping.addresses.start => all.end = mapping.addresses.end,
            Some(_) => break,
            None => {}
        }
    }
    all
}

/// Private writable mappings of the process, by address.
fn writable(process: &ProcessHandle) -> io::Result<Vec<Mapping>> {
    let maps = File::open(format!("/proc/{}/maps", process.identity().pid))?;
    let mut mappings = Vec::new();
    for line in BufReader::new(maps).lines() {
        let line = line?;
        if line
            .split_ascii_whitespace()
            .nth(1)
            .is_some_and(|rights| rights.starts_with("rw") && rights.ends_with('p'))
        {
            mappings.extend(parse(&line));
        }
    }
    Ok(mappings)
}

fn not_found(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::NotFound,
        format!("guest memory was not found in its VMM: {what}"),
    )
}
