//! The framed form: smaller, shared, and the same memory.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on should panic"
)]

mod support;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use hypeman_snapshots::{Codec, Compressor, Error, Forms};
use support::{Guest, Place, names, restore};

const ZSTD: Codec = Codec::Zstd(1);

#[test]
fn compressed_memory_expands_to_what_it_was() {
    for codec in [
        Codec::Zstd(1),
        Codec::Zstd(19),
        Codec::Lz4(0),
        Codec::Lz4(1),
        Codec::Lz4(9),
    ] {
        let place = Place::new();
        let guest = Guest::busy();
        let id = place.capture(&guest, None);
        let seen = AtomicU64::new(0);
        let compressed = place
            .store
            .compress(&id, codec, &AtomicBool::new(false), &|done, total| {
                assert!(done <= total);
                seen.fetch_max(done, Ordering::Relaxed);
            })
            .unwrap();
        assert_eq!(seen.into_inner(), compressed.content_bytes);
        assert!(compressed.bytes < compressed.content_bytes);
        assert_eq!(
            place.store.forms(id).unwrap(),
            Forms {
                raw: true,
                framed: Some(compressed.bytes)
            }
        );
        let outline = place.store.outline(id).unwrap();
        assert_eq!((outline.raw, outline.frame_bytes), (true, Some(compressed.bytes)));
        assert_eq!(
            outline.compressor,
            Some(match codec {
                Codec::Zstd(_) => Compressor::Zstd,
                Codec::Lz4(_) => Compressor::Lz4,
            })
        );
        assert_eq!(restore(&place.store, id).unwrap(), guest.bytes());
        place.verify(id).unwrap();

        place.store.drop_raw(id).unwrap();
        assert_eq!(
            place.store.forms(id).unwrap(),
            Forms {
                raw: false,
                framed: Some(compressed.bytes)
            }
        );
        assert_eq!(restore(&place.store, id).unwrap(), guest.bytes());
        place.verify(id).unwrap();
    }
}

#[test]
fn layers_may_be_in_any_form() {
    for forms in 0..8_u32 {
        let place = Place::new();
        let first = Guest::busy();
        let second = first.with(&[(1, 150), (2, 0), (7, 9)]);
        let third = second.with(&[(2, 77), (190, 500), (191, 0)]);
        let a = place.capture(&first, None);
        let b = place.capture(&second, Some(&a));
        let c = place.capture(&third, Some(&b));
        for (number, id) in [a, b, c].into_iter().enumerate() {
            if forms >> number & 1 == 1 {
                place.compress(id, ZSTD);
                place.store.drop_raw(id).unwrap();
            }
        }
        for (id, guest) in [(a, &first), (b, &second), (c, &third)] {
            assert_eq!(restore(&place.store, id).unwrap(), guest.bytes(), "{forms}");
        }
        // A further image over them.
        let fourth = third.with(&[(1, 151), (2, 0)]);
        let d = place.capture(&fourth, Some(&c));
        assert_eq!(restore(&place.store, d).unwrap(), fourth.bytes());
    }
}

#[test]
fn equal_frames_are_stored_once() {
    let place = Place::new();
    let guest = Guest::busy();
    let a = place.capture(&guest, None);
    let b = place.capture(&guest, None);
    let c = place.capture(&guest.with(&[(0, 33)]), None);
    let first = place.compress(a, ZSTD);
    let second = place.compress(b, Codec::Lz4(1));
    let third = place.compress(c, ZSTD);
    assert_eq!(second.bytes, first.bytes);
    assert_eq!(place.file(b, "frames.dat").metadata().unwrap().len(), 0);
    let own = place.file(c, "frames.dat").metadata().unwrap().len();
    assert!(0 < own && own < third.bytes, "only the chunk that differs");

    // The donor goes, and what others use of it stays.
    for id in [a, b, c] {
        place.store.drop_raw(id).unwrap();
    }
    place.sweep(&[b, c]);
    assert!(!place.store.contains(a));
    assert_eq!(
        names(&place.root().join(a.to_string())),
        ["frames.dat", "frames.index"]
    );
    place.verify(b).unwrap();
    assert_eq!(restore(&place.store, b).unwrap(), guest.bytes());
    assert_eq!(restore(&place.store, c).unwrap(), guest.with(&[(0, 33)]).bytes());
    place.sweep(&[]);
    assert_eq!(place.names(), Vec::<String>::new());
}

#[test]
fn equal_chunks_of_one_image_are_stored_once() {
    let place = Place::new();
    let guest = Guest((0..192).map(|number| number % 64 + 1).collect());
    let id = place.capture(&guest, None);
    let compressed = place.compress(id, ZSTD);
    let stored = place.file(id, "frames.dat").metadata().unwrap().len();
    assert_eq!(compressed.bytes, 3 * stored);
    place.store.drop_raw(id).unwrap();
    assert_eq!(restore(&place.store, id).unwrap(), guest.bytes());
}

#[test]
fn a_cancelled_compression_leaves_nothing() {
    let place = Place::new();
    let guest = Guest::busy();
    let id = place.capture(&guest, None);
    let cancel = AtomicBool::new(false);
    let refused = place
        .store
        .compress(&id, ZSTD, &cancel, &|_, _| cancel.store(true, Ordering::Relaxed));
    assert!(matches!(refused, Err(Error::Cancelled)));
    assert_eq!(place.names(), [id.to_string()]);
    assert_eq!(
        names(&place.root().join(id.to_string())),
        ["index", "memory.raw", "verified"]
    );
    place.compress(id, ZSTD);
    assert!(matches!(
        place.store.verify(&id, &AtomicBool::new(true), &|_, _| ()),
        Err(Error::Cancelled)
    ));
}
