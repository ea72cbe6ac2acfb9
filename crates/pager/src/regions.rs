//! Where the memory of a guest lies in its VMM, as the VMM says it.
//!
//! ```text
//!  guest RAM   0 ────────── region ──────────┬──────── region ────────┐ size of the image
//!                  address = base + (offset − where the region begins)
//! ```
//! What a VMM says is checked once, here: regions lie within the image, do not overlap on either side, and consist of
//! whole pages. Nothing that it says later can lead outside of them.

use std::ops::Range;

use hypeman_snapshots::PAGE_BYTES;
use serde::Deserialize;

use crate::protocol::MemoryRegion;

/// Bytes of the first message of a VMM, at most.
pub(crate) const MAX_MESSAGE: usize = 64 * 1024;
/// Firecracker has at most a few, one for each side of a hole and for each block of hot-plugged memory.
const MAX_REGIONS: usize = 256;
/// No address of a process lies above.
const MAX_ADDRESS: u64 = 1 << 56;

/// One element of Firecracker's message.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Mapping {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    /// Bytes. Newer versions.
    page_size: Option<u64>,
    /// Bytes too, in spite of its name.
    page_size_kib: Option<u64>,
}

/// Why regions were refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RegionError {
    /// None, or too many.
    #[error("it names {0} regions of memory; 1 to {MAX_REGIONS} make sense")]
    Count(usize),
    /// Not whole pages.
    #[error("a region of its memory is not made of whole pages")]
    Pages,
    /// Huge pages, or pages of another architecture.
    #[error("its memory has pages of {0} bytes; only pages of {PAGE_BYTES} bytes are served")]
    PageSize(u64),
    /// An address that no process has.
    #[error("a region of its memory lies where no memory can be")]
    Address,
    /// Beyond the image.
    #[error("a region of its memory lies beyond the end of the image")]
    Outside,
    /// Twice the same.
    #[error("regions of its memory overlap")]
    Overlap,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Region {
    address: u64,
    offset: u64,
    length: u64,
}

/// The checked regions of one machine, by address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Regions(Vec<Region>);

impl Regions {
    /// Checks what a VMM says against the size of its image.
    pub(crate) fn check(mappings: &[Mapping], memory_bytes: u64) -> Result<Self, RegionError> {
        if mappings.is_empty() || mappings.len() > MAX_REGIONS {
            return Err(RegionError::Count(mappings.len()));
        }
        let page = PAGE_BYTES as u64;
        let mut regions = Vec::with_capacity(mappings.len());
        for mapping in mappings {
            for size in [mapping.page_size, mapping.page_size_kib].into_iter().flatten() {
                if size != page {
                    return Err(RegionError::PageSize(size));
                }
            }
            let (address, offset, length) = (mapping.base_host_virt_addr, mapping.offset, mapping.size);
            if length == 0
                || [address, offset, length]
                    .iter()
                    .any(|number| !number.is_multiple_of(page))
            {
                return Err(RegionError::Pages);
            }
            if address == 0 || address.checked_add(length).is_none_or(|end| end > MAX_ADDRESS) {
                return Err(RegionError::Address);
            }
            if offset.checked_add(length).is_none_or(|end| end > memory_bytes) {
                return Err(RegionError::Outside);
            }
            regions.push(Region {
                address,
                offset,
                length,
            });
        }
        let overlap = |start: fn(&Region) -> u64, regions: &mut Vec<Region>| {
            regions.sort_unstable_by_key(start);
            regions
                .windows(2)
                .any(|pair| start(&pair[0]) + pair[0].length > start(&pair[1]))
        };
        if overlap(|region| region.offset, &mut regions) || overlap(|region| region.address, &mut regions) {
            return Err(RegionError::Overlap);
        }
        Ok(Self(regions))
    }

    /// The place in guest RAM of an address.
    pub(crate) fn offset(&self, address: u64) -> Option<u64> {
        let after = self.0.partition_point(|region| region.address <= address);
        let region = self.0.get(after.checked_sub(1)?)?;
        let within = address - region.address;
        (within < region.length).then_some(region.offset + within)
    }

    /// The parts of a range of addresses that are guest RAM, as places there.
    pub(crate) fn offsets(&self, addresses: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        self.0.iter().filter_map(move |region| {
            let start = addresses.start.max(region.address);
            let end = addresses.end.min(region.address + region.length);
            (start < end)
                .then(|| region.offset + (start - region.address)..region.offset + (end - region.address))
        })
    }

    /// Where a range of guest RAM lies in the VMM: nothing for what the VMM did not name.
    pub(crate) fn spans(&self, offsets: Range<u64>) -> impl Iterator<Item = MemoryRegion> {
        self.0.iter().filter_map(move |region| {
            let start = offsets.start.max(region.offset);
            let end = offsets.end.min(region.offset + region.length);
            (start < end).then(|| MemoryRegion {
                address: region.address + (start - region.offset),
                offset: start,
                length: end - start,
            })
        })
    }

    /// All of it.
    pub(crate) fn all(&self) -> impl Iterator<Item = MemoryRegion> {
        self.spans(0..u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGE: u64 = PAGE_BYTES as u64;

    fn mapping(address: u64, offset: u64, size: u64) -> Mapping {
        Mapping {
            base_host_virt_addr: address,
            size,
            offset,
            page_size: Some(PAGE),
            page_size_kib: None,
        }
    }

    fn check(list: &[(u64, u64, u64)]) -> Result<Regions, RegionError> {
        let list: Vec<Mapping> = list
            .iter()
            .map(|(address, offset, size)| mapping(address * PAGE, offset * PAGE, size * PAGE))
            .collect();
        Regions::check(&list, 100 * PAGE)
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        assert_eq!(check(&[]), Err(RegionError::Count(0)));
        assert_eq!(check(&[(10, 0, 1); 257]), Err(RegionError::Count(257)));
        assert_eq!(check(&[(10, 0, 0)]), Err(RegionError::Pages));
        assert_eq!(check(&[(0, 0, 1)]), Err(RegionError::Address));
        assert_eq!(check(&[(10, 0, 101)]), Err(RegionError::Outside));
        assert_eq!(check(&[(10, 100, 1)]), Err(RegionError::Outside));
        assert_eq!(check(&[(10, 0, 10), (19, 50, 5)]), Err(RegionError::Overlap));
        assert_eq!(check(&[(10, 0, 10), (50, 9, 5)]), Err(RegionError::Overlap));
        let huge = u64::MAX - u64::MAX % PAGE;
        let check_one = |mapping| Regions::check(&[mapping], 100 * PAGE);
        assert_eq!(check_one(mapping(huge, 0, PAGE)), Err(RegionError::Address));
        assert_eq!(check_one(mapping(PAGE, huge, PAGE)), Err(RegionError::Outside));
        assert_eq!(check_one(mapping(PAGE, 0, huge)), Err(RegionError::Address));
        assert_eq!(check_one(mapping(PAGE, 12, PAGE)), Err(RegionError::Pages));
        let mut large = mapping(PAGE, 0, PAGE);
        large.page_size_kib = Some(2 << 20);
        assert_eq!(check_one(large), Err(RegionError::PageSize(2 << 20)));
    }

    #[test]
    fn the_message_of_firecracker_is_understood() {
        let message = r#"[{"base_host_virt_addr":139637976403968,"size":134217728,"offset":0,"page_size":4096,
            "page_size_kib":4096}]"#;
        let mappings: Vec<Mapping> = serde_json::from_str(message).unwrap();
        let regions = Regions::check(&mappings, 128 << 20).unwrap();
        assert_eq!(regions.offset(139_637_976_403_968 + 5), Some(5));
        assert_eq!(regions.offset(139_637_976_403_967), None);
        assert_eq!(regions.offset(139_637_976_403_968 + 134_217_728), None);
    }

    proptest! {
        #[test]
        fn what_passes_never_leads_outside(
            list in prop::collection::vec((0_u64..300, 0_u64..120, 0_u64..60), 1..6),
            address in 0_u64..400,
            range in (0_u64..110, 0_u64..40),
        ) {
            if let Ok(regions) = check(&list) {
                if let Some(offset) = regions.offset(address * PAGE) {
                    prop_assert!(offset < 100 * PAGE);
                    let span = regions.spans(offset..offset + PAGE).next().unwrap();
                    prop_assert_eq!(span, MemoryRegion { address: address * PAGE, offset, length: PAGE });
                }
                let wanted = range.0 * PAGE..(range.0 + range.1) * PAGE;
                for span in regions.spans(wanted.clone()) {
                    prop_assert!(span.offset >= wanted.start && span.offset + span.length <= wanted.end);
                    let back: Vec<_> = regions.offsets(span.address..span.address + span.length).collect();
                    prop_assert_eq!(back, vec![span.offset..span.offset + span.length]);
                }
            }
        }
    }
}
