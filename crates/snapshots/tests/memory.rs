//! Images of guest memory: captured, layered, restored.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on should panic"
)]

mod support;

use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;

use hypeman_snapshots::{Base, Codec, Elsewhere, Error, Forms, MAX_DEPTH, MemoryId, PAGE_BYTES};
use support::{Guest, Place, flip, restore};

const ZSTD: Codec = Codec::Zstd(1);

#[test]
fn a_guest_comes_back_as_it_was() {
    let place = Place::new();
    let guest = Guest::busy();
    let id = place.capture(&guest, None);
    assert_eq!(restore(&place.store, id).unwrap(), guest.bytes());
    assert_eq!(
        place.store.forms(id).unwrap(),
        Forms {
            raw: true,
            framed: None
        }
    );
}

#[test]
fn zero_pages_take_no_space() {
    let place = Place::new();
    let guest = Guest::new().with(&[(70, 150)]);
    let id = MemoryId::random().unwrap();
    let captured = place
        .store
        .capture(&id, guest.memory_bytes(), None, &guest.source(), Elsewhere::Zero)
        .unwrap();
    assert_eq!(
        (captured.owned_pages, captured.zero_pages, captured.depth),
        (1, 0, 1)
    );
    let file = place.file(id, "memory.raw").metadata().unwrap();
    assert_eq!(file.len(), guest.memory_bytes());
    assert!(
        file.blocks() * 512 <= 4 * PAGE_BYTES as u64,
        "{} blocks",
        file.blocks()
    );
}

#[test]
fn over_a_parent_only_what_differs_is_stored() {
    let place = Place::new();
    let first = Guest::busy();
    let parent = place.capture(&first, None);
    // One page changes, one becomes zero, one stops being zero, one is written with what it held.
    let second = first.with(&[(1, 150), (2, 0), (7, 9), (3, first.0[3])]);
    let id = MemoryId::random().unwrap();
    let source = second.source();
    let captured = place
        .store
        .capture(
            &id,
            second.memory_bytes(),
            Some(&parent),
            &source,
            Elsewhere::Zero,
        )
        .unwrap();
    assert_eq!(
        (captured.owned_pages, captured.zero_pages, captured.depth),
        (3, 1, 2)
    );
    assert_eq!(captured.parent, Some(parent));
    assert_eq!(restore(&place.store, id).unwrap(), second.bytes());
    assert_eq!(restore(&place.store, parent).unwrap(), first.bytes());
    let patch = place.store.materialize(&id).unwrap().patch;
    assert_eq!(patch.bytes(), 3 * PAGE_BYTES as u64);
}

#[test]
fn pages_that_are_not_read_are_those_of_the_parent() {
    let place = Place::new();
    let first = Guest::busy();
    let parent = place.capture(&first, None);
    let second = first.with(&[(1, 150), (100, 0)]);
    let id = MemoryId::random().unwrap();
    let source = second.partly(&[1, 2, 100]);
    let captured = place
        .store
        .capture(
            &id,
            second.memory_bytes(),
            Some(&parent),
            &source,
            Elsewhere::Parent,
        )
        .unwrap();
    assert_eq!((captured.owned_pages, captured.zero_pages), (2, 1));
    assert_eq!(restore(&place.store, id).unwrap(), second.bytes());
}

#[test]
fn a_long_line_of_captures_stays_shallow() {
    let place = Place::new();
    let mut guest = Guest::busy();
    let mut images = vec![(place.capture(&guest, None), guest.clone())];
    let mut depths = vec![1];
    for number in 1..130 {
        guest = guest.with(&[(number, 300 + number as u16)]);
        let (id, last) = (MemoryId::random().unwrap(), images.last().unwrap().0);
        let captured = place
            .store
            .capture(
                &id,
                guest.memory_bytes(),
                Some(&last),
                &guest.partly(&[number]),
                Elsewhere::Parent,
            )
            .unwrap();
        // However little of it is new, it is the memory of a whole guest.
        let pages = guest.0.iter().filter(|seed| **seed != 0).count();
        assert_eq!(captured.content_bytes, (pages * PAGE_BYTES) as u64);
        if let Some(parent) = captured.parent {
            let (_, before) = images.iter().find(|(id, _)| *id == parent).unwrap();
            let changed = before
                .0
                .iter()
                .zip(&guest.0)
                .filter(|(old, new)| old != new)
                .count();
            assert_eq!(captured.owned_pages, changed as u64);
        }
        depths.push(captured.depth);
        images.push((id, guest.clone()));
    }
    let half = MAX_DEPTH / 2;
    let line: Vec<u32> = (1..=MAX_DEPTH).chain(half + 1..=MAX_DEPTH).collect();
    assert_eq!(depths[..line.len()], line);
    // In the end so much has changed that a new line begins.
    assert!(depths[line.len()..].contains(&1), "{depths:?}");
    for (id, guest) in &images {
        assert_eq!(restore(&place.store, *id).unwrap(), guest.bytes());
    }
}

#[test]
fn a_missing_or_damaged_parent_is_not_built_upon() {
    let place = Place::new();
    let guest = Guest::busy();
    let missing = MemoryId::random().unwrap();
    let id = place.capture(&guest, Some(&missing));
    assert_eq!(restore(&place.store, id).unwrap(), guest.bytes());

    flip(&place.file(id, "memory.raw"), 4096 + 5);
    let child = MemoryId::random().unwrap();
    let captured = place
        .store
        .capture(
            &child,
            guest.memory_bytes(),
            Some(&id),
            &guest.source(),
            Elsewhere::Zero,
        )
        .unwrap();
    assert_eq!(captured.parent, None);
    assert_eq!(restore(&place.store, child).unwrap(), guest.bytes());

    // Where the parent's content is needed there is no way around it.
    let none = guest.partly(&[]);
    let refused = place.store.capture(
        &MemoryId::random().unwrap(),
        guest.memory_bytes(),
        Some(&missing),
        &none,
        Elsewhere::Parent,
    );
    assert!(matches!(refused, Err(Error::NotFound(id)) if id == missing));
}

#[test]
fn what_makes_no_sense_is_refused() {
    let place = Place::new();
    let guest = Guest::busy();
    let id = MemoryId::random().unwrap();
    let capture = |bytes, source: &support::Source, elsewhere| {
        place
            .store
            .capture(&id, bytes, None, source, elsewhere)
            .map(|_| ())
    };
    let mut crooked = guest.source();
    for (start, end) in [(1, 4096), (0, guest.memory_bytes() + 4096), (8192, 4096)] {
        crooked.extents = std::iter::once(start..end).collect();
        assert!(matches!(
            capture(guest.memory_bytes(), &crooked, Elsewhere::Zero),
            Err(Error::Invalid(_))
        ));
    }
    for bytes in [0, 100, u64::MAX - 4095] {
        assert!(matches!(
            capture(bytes, &guest.source(), Elsewhere::Zero),
            Err(Error::Invalid(_))
        ));
    }
    assert!(matches!(
        capture(guest.memory_bytes(), &guest.source(), Elsewhere::Parent),
        Err(Error::Invalid(_))
    ));
    assert_eq!(place.names(), Vec::<String>::new());

    place.capture(&guest, None);
    let taken: MemoryId = place.names()[0].parse().unwrap();
    let again = place
        .store
        .capture(
            &taken,
            guest.memory_bytes(),
            None,
            &guest.source(),
            Elsewhere::Zero,
        )
        .map(|_| ());
    assert!(matches!(again, Err(Error::Exists(id)) if id == taken));
}

#[test]
fn a_guest_that_cannot_be_read_leaves_nothing() {
    struct Broken;
    impl hypeman_snapshots::MemorySource for Broken {
        fn extents(&self) -> Vec<std::ops::Range<u64>> {
            std::iter::once(0..1 << 20).collect()
        }
        fn read(&self, offset: u64, into: &mut [u8]) -> std::io::Result<()> {
            into.fill(1);
            if offset > 1 << 19 {
                Err(std::io::Error::other("gone"))
            } else {
                Ok(())
            }
        }
    }
    let place = Place::new();
    let id = MemoryId::random().unwrap();
    let refused = place
        .store
        .capture(&id, 1 << 20, None, &Broken, Elsewhere::Zero)
        .map(|_| ());
    assert!(matches!(refused, Err(Error::Source { .. })));
    assert_eq!(place.names(), Vec::<String>::new());
}

#[test]
fn what_has_no_raw_form_says_how_much_of_it_must_be_expanded() {
    let place = Place::new();
    let guest = Guest::busy();
    let base = place.capture(&guest, None);
    // It has given back two pages, and has one that it had not.
    let guest = guest.with(&[(1, 0), (2, 0), (7, 1)]);
    let id = place.capture(&guest, Some(&base));
    assert_eq!(place.store.bytes_to_expand(id).unwrap(), None, "a file is mapped");
    for image in [base, id] {
        place.compress(image, ZSTD);
        place.store.drop_raw(image).unwrap();
    }
    let bytes = guest.bytes();
    let pages = bytes
        .chunks(4096)
        .filter(|page| page.iter().any(|byte| *byte != 0));
    let content = pages.count() as u64 * 4096;
    assert!(content > 0 && content < bytes.len() as u64);
    assert_eq!(place.store.bytes_to_expand(id).unwrap(), Some(content));
}

#[test]
fn forks_share_one_expansion() {
    let place = Place::new();
    let guest = Guest::busy();
    let id = place.capture(&guest, None);
    place.compress(id, ZSTD);
    place.store.drop_raw(id).unwrap();
    let image = place.store.materialize(&id).unwrap();
    let Base::Memfd(first) = &image.base else {
        panic!("there is no file")
    };
    let others: Vec<_> = std::thread::scope(|scope| {
        let forks: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| place.store.materialize(&id).unwrap()))
            .collect();
        forks.into_iter().map(|fork| fork.join().unwrap()).collect()
    });
    for other in &others {
        let Base::Memfd(memory) = &other.base else {
            panic!("there is no file")
        };
        assert!(Arc::ptr_eq(memory, first));
    }
    // Nobody can write to what they share.
    let path = format!("/proc/self/fd/{}", first.as_raw_fd());
    let writable = std::fs::OpenOptions::new().write(true).open(path);
    assert!(writable.and_then(|file| file.write_all_at(b"x", 0)).is_err());
}

#[test]
fn a_mapped_raw_form_stays_until_it_is_mapped() {
    let place = Place::new();
    let guest = Guest::busy();
    let id = place.capture(&guest, None);
    place.compress(id, ZSTD);
    let image = place.store.materialize(&id).unwrap();
    assert!(matches!(place.store.drop_raw(id), Err(Error::Busy(_))));
    drop(image);
    place.store.drop_raw(id).unwrap();
    assert!(matches!(
        place.store.drop_raw(MemoryId::random().unwrap()),
        Err(Error::NotFound(_))
    ));
    let other = place.capture(&guest, None);
    assert!(matches!(place.store.drop_raw(other), Err(Error::Invalid(_))));
}
