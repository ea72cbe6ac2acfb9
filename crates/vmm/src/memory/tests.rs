//! On memory of this very process, where everything is known.
#![allow(unsafe_code)]

use std::os::fd::AsFd;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use super::*;
use crate::ProcessIdentity;

const PAGE: u64 = 4096;

/// A mapping that ends with its test.
struct Mapping {
    address: *mut u8,
    length: usize,
}

impl Mapping {
    fn anonymous(length: u64) -> Self {
        // SAFETY: a fresh mapping, of nothing that exists.
        let address = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                length as usize,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        };
        Self::of(address.unwrap(), length)
    }

    fn of_file(file: &File, length: u64) -> Self {
        // SAFETY: as above; the file is not changed meanwhile.
        let address = unsafe {
            mmap(
                std::ptr::null_mut(),
                length as usize,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
                file.as_fd(),
                0,
            )
        };
        Self::of(address.unwrap(), length)
    }

    /// Puts plain memory in the place of pages, as a VMM does with what its guest gives back.
    fn replace(&mut self, pages: Range<u64>) {
        let length = ((pages.end - pages.start) * PAGE) as usize;
        // SAFETY: within the mapping, which is ours and which nobody borrows.
        let replaced = unsafe {
            mmap_anonymous(
                self.address.add((pages.start * PAGE) as usize).cast(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::FIXED,
            )
        };
        replaced.unwrap();
    }

    fn of(address: *mut std::ffi::c_void, length: u64) -> Self {
        Self {
            address: address.cast(),
            length: length as usize,
        }
    }

    fn page(&mut self, number: u64) -> &mut [u8] {
        let offset = (number * PAGE) as usize;
        assert!(offset < self.length);
        // SAFETY: inside the mapping, and borrowed with it.
        unsafe { std::slice::from_raw_parts_mut(self.address.add(offset), PAGE as usize) }
    }

    fn memory(&self) -> GuestMemory {
        memory_of(vec![self.segment()])
    }

    fn segment(&self) -> Segment {
        Segment {
            address: self.address as u64,
            length: self.length as u64,
        }
    }

    /// Keeps the kernel from making one large page of a small one that is touched.
    fn in_small_pages(self) -> Self {
        // SAFETY: advice about a mapping that is ours.
        unsafe { madvise(self.address.cast(), self.length, Advice::LinuxNoHugepage) }.unwrap();
        self
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: ours alone, and nobody borrows it any more.
        unsafe { munmap(self.address.cast(), self.length) }.unwrap();
    }
}

fn memory_of(segments: Vec<Segment>) -> GuestMemory {
    let identity = ProcessIdentity::read(std::process::id()).unwrap();
    let process = ProcessHandle::of_recorded(&identity).unwrap().unwrap();
    GuestMemory::open(Arc::new(process), segments).unwrap()
}

fn pages(ranges: &[Range<u64>]) -> Vec<Range<u64>> {
    ranges
        .iter()
        .map(|range| range.start / PAGE..range.end / PAGE)
        .collect()
}

#[tokio::test]
async fn only_written_pages_of_anonymous_memory_are_populated() {
    let mut mapping = Mapping::anonymous(64 * PAGE).in_small_pages();
    for page in [0, 1, 2, 10, 63] {
        mapping.page(page)[7] = 1;
    }
    let memory = mapping.memory();
    assert!(!memory.is_private_mapping());
    assert_eq!(pages(&memory.populated().unwrap()), [0..3, 10..11, 63..64]);

    let copy = File::from(memory.copy_to_memfd(&memory.populated().unwrap()).unwrap());
    assert_eq!(copy.metadata().unwrap().len(), 64 * PAGE);
    let mut bytes = vec![0xff; 64 * PAGE as usize];
    copy.read_exact_at(&mut bytes, 0).unwrap();
    for page in 0..64 {
        let written = [0, 1, 2, 10, 63].contains(&page);
        let start = (page * PAGE) as usize;
        let mut expected = vec![0; PAGE as usize];
        expected[7] = u8::from(written);
        assert_eq!(bytes[start..start + PAGE as usize], expected, "page {page}");
    }
}

#[tokio::test]
async fn only_changed_pages_of_a_private_mapping_are_populated_and_the_file_stays() {
    let file = tempfile::tempfile().unwrap();
    let original: Vec<u8> = (0..64 * PAGE).map(|at| (at / PAGE) as u8).collect();
    file.write_all_at(&original, 0).unwrap();
    let mut mapping = Mapping::of_file(&file, 64 * PAGE);
    let sum: u64 = (0..64).map(|page| u64::from(mapping.page(page)[0])).sum();
    assert_eq!(sum, 63 * 64 / 2, "all pages are read, so all are present");
    let memory = mapping.memory();
    assert!(memory.is_private_mapping());
    assert_eq!(memory.populated().unwrap(), []);

    mapping.page(5)[0] = 200;
    memory.write(40 * PAGE + 100, &[9; 8192]).unwrap();
    assert_eq!(pages(&memory.populated().unwrap()), [5..6, 40..43]);
    assert_eq!(mapping.page(41)[0], 9);
    let mut bytes = [0; 2];
    memory.read(40 * PAGE + 99, &mut bytes).unwrap();
    assert_eq!(bytes, [40, 9]);
    let mut now = vec![0; original.len()];
    file.read_exact_at(&mut now, 0).unwrap();
    assert!(now == original);
}

#[tokio::test]
async fn what_a_guest_gave_back_of_a_private_mapping_is_zero_and_no_longer_of_the_file() {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&[7; 64 * PAGE as usize], 0).unwrap();
    let mut mapping = Mapping::of_file(&file, 64 * PAGE).in_small_pages();
    mapping.page(3)[0] = 1;
    let memory = mapping.memory();
    mapping.replace(0..2);
    mapping.replace(30..40);
    mapping.page(35)[0] = 5;
    mapping.page(50)[0] = 6;
    let populated = memory.populated().unwrap();
    assert_eq!(pages(&populated), [0..2, 3..4, 30..40, 50..51]);
    assert_eq!(pages(&memory.given_back().unwrap()), [0..2, 30..35, 36..40]);

    let copy = File::from(memory.copy_to_memfd(&populated).unwrap());
    for range in populated {
        let mut copied = vec![0xff; (range.end - range.start) as usize];
        let mut read = copied.clone();
        copy.read_exact_at(&mut copied, range.start).unwrap();
        memory.read(range.start, &mut read).unwrap();
        assert!(copied == read, "{range:?}");
        let expected = match range.start / PAGE {
            30 => 0,
            at => u8::from(at == 3) + 6 * u8::from(at == 50),
        };
        assert_eq!(copied[0], expected, "{range:?}");
    }
    // Adopted by another server, it is the same.
    assert!(mapping.memory().is_private_mapping());
}

#[tokio::test]
async fn a_segment_that_a_guest_gave_back_as_a_whole_is_zero_and_no_longer_of_the_file() {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&[7; 8 * PAGE as usize], 0).unwrap();
    let low = Mapping::of_file(&file, 8 * PAGE);
    let mut high = Mapping::of_file(&file, 4 * PAGE);
    high.replace(0..4);
    // Also for a server that has never seen it otherwise.
    let memory = memory_of(vec![low.segment(), high.segment()]);
    assert!(memory.is_private_mapping());
    let populated = memory.populated().unwrap();
    assert_eq!(populated.len(), 1);
    assert_eq!(populated[0], 8 * PAGE..12 * PAGE);
    let copy = File::from(memory.copy_to_memfd(&populated).unwrap());
    let mut copied = [0xff; PAGE as usize];
    copy.read_exact_at(&mut copied, 8 * PAGE).unwrap();
    assert!(copied == [0; PAGE as usize]);
}

#[tokio::test]
async fn both_ways_to_read_page_tables_agree() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(30000 * PAGE).unwrap();
    for private in [false, true] {
        let mapping = match private {
            true => Mapping::of_file(&file, 30000 * PAGE),
            false => Mapping::anonymous(30000 * PAGE),
        };
        let mut mapping = mapping.in_small_pages();
        let mut state = 1_u64;
        for _ in 0..20000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let page = (state >> 33) % 30000;
            mapping.page(page)[0] = 1;
            if private {
                assert_eq!(mapping.page((page * 7) % 30000)[1], 0);
            }
        }
        let memory = mapping.memory();
        let words = populated::by_words(
            &memory.inner.directory,
            memory.inner.segments[0].address,
            memory.len(),
            memory.inner.missing,
        )
        .unwrap();
        assert!(words.len() > 5000);
        assert_eq!(words, memory.populated().unwrap());
    }
}

#[tokio::test]
async fn nothing_beyond_the_end_is_touched() {
    let mapping = Mapping::anonymous(4 * PAGE);
    let memory = mapping.memory();
    let mut page = vec![0; PAGE as usize];
    assert!(memory.read(3 * PAGE, &mut page).is_ok());
    for offset in [3 * PAGE + 1, 4 * PAGE, u64::MAX] {
        assert!(memory.read(offset, &mut page).is_err());
        assert!(memory.write(offset, &page).is_err());
    }
}

#[tokio::test]
async fn memory_of_a_process_that_ended_is_an_error() {
    let mut child = std::process::Command::new("/bin/sleep")
        .arg("600")
        .spawn()
        .unwrap();
    // It has no block of the size that is asked for, but it may be asked.
    let identity = ProcessIdentity::read(child.id()).unwrap();
    let process = Arc::new(ProcessHandle::of_recorded(&identity).unwrap().unwrap());
    let nowhere = Segment {
        address: 4096,
        length: 4096,
    };
    assert!(GuestMemory::open(Arc::clone(&process), vec![nowhere]).is_err());
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(GuestMemory::open(process, vec![nowhere]).is_err());
}

#[tokio::test]
async fn memory_in_two_segments_reads_as_one_block() {
    let mut low = Mapping::anonymous(8 * PAGE).in_small_pages();
    let mut high = Mapping::anonymous(4 * PAGE).in_small_pages();
    low.page(7)[4095] = 1;
    high.page(0)[0] = 2;
    high.page(3)[0] = 3;
    let memory = memory_of(vec![low.segment(), high.segment()]);
    assert_eq!(memory.len(), 12 * PAGE);
    assert_eq!(pages(&memory.populated().unwrap()), [7..8, 8..9, 11..12]);

    let mut seam = [0; 2];
    memory.read(8 * PAGE - 1, &mut seam).unwrap();
    assert_eq!(seam, [1, 2]);
    memory.write(8 * PAGE - 2, &[7, 8, 9, 10]).unwrap();
    assert_eq!((low.page(7)[4094], low.page(7)[4095]), (7, 8));
    assert_eq!((high.page(0)[0], high.page(0)[1]), (9, 10));
    assert!(memory.read(12 * PAGE - 1, &mut seam).is_err());
}

#[tokio::test]
async fn memory_is_found_by_the_file_behind_it_and_by_what_it_holds() {
    let identity = ProcessIdentity::read(std::process::id()).unwrap();
    let process = ProcessHandle::of_recorded(&identity).unwrap().unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(48 * PAGE).unwrap();
    let mapping = Mapping::of_file(file.as_file(), 48 * PAGE);
    let found = locate::private_file(&process, file.path(), &[48 * PAGE]).unwrap();
    assert_eq!(found, [mapping.segment()]);
    let halves = locate::private_file(&process, file.path(), &[32 * PAGE, 16 * PAGE]).unwrap();
    assert_eq!(halves[1].address, mapping.address as u64 + 32 * PAGE);
    assert!(locate::private_file(&process, file.path(), &[49 * PAGE]).is_err());

    // Its neighbours may have become one mapping with it.
    let mut all = Mapping::anonymous(1000 * PAGE).in_small_pages();
    let words = *b"console=ttyS0 quiet no.other=7c1e";
    all.page(300 + 32)[..words.len()].copy_from_slice(&words);
    let signature = locate::Signature {
        offset: 32 * PAGE,
        bytes: &words,
    };
    let found = locate::anonymous(&process, &[500 * PAGE], &signature).unwrap();
    assert_eq!(found[0].address, all.address as u64 + 300 * PAGE);
    // The part above the hole lies just below the other one, or by itself.
    let found = locate::anonymous(&process, &[500 * PAGE, 300 * PAGE], &signature).unwrap();
    assert_eq!(found[1].address, all.address as u64);
    assert!(locate::anonymous(&process, &[500 * PAGE, 301 * PAGE], &signature).is_err());
    let other = locate::Signature {
        offset: 32 * PAGE,
        bytes: b"no machine of this process has these words",
    };
    assert!(locate::anonymous(&process, &[500 * PAGE], &other).is_err());
}
