//! Memory whose missing pages somebody else fills, as the kernel knows it: `um` in `/proc/PID/smaps`.
//!
//! A page of such memory that is not there is what the machine was restored from. Once nobody fills its pages any more,
//! the flag is gone, and a page that is not there is zero.

use std::io::{self, BufRead};
use std::ops::Range;

use super::Segment;
use super::mappings::parse;

/// Set while faults are told to somebody.
const TOLD: &str = "um";

/// The served ranges of a process, joined where they touch.
pub(super) fn ranges(lines: impl BufRead) -> io::Result<Vec<Range<u64>>> {
    let mut served: Vec<Range<u64>> = Vec::new();
    let mut current = None;
    for line in lines.lines() {
        let line = line?;
        let Some(flags) = line.strip_prefix("VmFlags:") else {
            if let Some(mapping) = parse(&line) {
                current = Some(mapping.addresses);
            }
            continue;
        };
        let Some(addresses) = current.take() else {
            continue;
        };
        if !flags.split_ascii_whitespace().any(|flag| flag == TOLD) {
            continue;
        }
        match served.last_mut() {
            Some(last) if last.end == addresses.start => last.end = addresses.end,
            _ => served.push(addresses),
        }
    }
    Ok(served)
}

/// Whether all of a block is served.
pub(super) fn covers(served: &[Range<u64>], segment: &Segment) -> bool {
    let end = segment.address + segment.length;
    served
        .iter()
        .any(|range| range.start <= segment.address && end <= range.end)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
1000-3000 rw-p 00000000 00:00 0 
Size:                  8 kB
VmFlags: rd wr mr mw me ac um 
3000-4000 rw-p 00000000 00:00 0 
VmFlags: rd wr um mr
5000-6000 rw-p 00000000 00:00 0 
Rss:                   4 kB
VmFlags: rd wr mr mw
7000-8000 r--p 00000000 08:01 12   /usr/lib/um
VmFlags: rd mr
";

    #[test]
    fn what_is_served_is_told_by_its_flag() {
        let served = ranges(SMAPS.as_bytes()).unwrap();
        assert_eq!(
            served,
            vec![std::ops::Range {
                start: 0x1000,
                end: 0x4000
            }]
        );
        let segment = |address, length| Segment { address, length };
        assert!(covers(&served, &segment(0x2000, 0x2000)));
        assert!(!covers(&served, &segment(0x3000, 0x2000)));
        assert!(!covers(&served, &segment(0x5000, 0x1000)));
    }
}
