//! Bytes that are not those that were stored.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on should panic"
)]

mod support;

use std::sync::atomic::AtomicBool;

use hypeman_snapshots::{Codec, Error, Forms};
use support::{Guest, Place, flip, restore};

const ZSTD: Codec = Codec::Zstd(1);

#[test]
fn a_flipped_bit_anywhere_is_refused_by_name() {
    let guest = Guest::busy();
    let changed = guest.with(&[(1, 150), (2, 0)]);
    for file in ["index", "memory.raw", "frames.index", "frames.dat"] {
        for damage_parent in [false, true] {
            let place = Place::new();
            let parent = place.capture(&guest, None);
            let id = place.capture(&changed, Some(&parent));
            let victim = if damage_parent { parent } else { id };
            if file.starts_with("frames") {
                for id in [parent, id] {
                    place.compress(id, ZSTD);
                    place.store.drop_raw(id).unwrap();
                }
            }
            let path = place.file(victim, file);
            // The first page of each guest is zero, or not its own.
            let length = if file == "memory.raw" {
                8192
            } else {
                path.metadata().unwrap().len()
            };
            for at in [0, length / 3, length / 2, length - 1] {
                flip(&path, at);
                for error in [
                    restore(&place.store, id).unwrap_err(),
                    place.verify(id).unwrap_err(),
                ] {
                    assert!(error.is_damage(), "{file} {at}: {error}");
                    assert!(
                        error.to_string().contains(&victim.to_string()),
                        "{file} {at}: {error}"
                    );
                }
                flip(&path, at);
            }
            assert_eq!(restore(&place.store, id).unwrap(), changed.bytes());
        }
    }
}

#[test]
fn bytes_where_nothing_was_captured_are_refused() {
    let place = Place::new();
    let guest = Guest::new().with(&[(5, 5)]);
    let id = place.capture(&guest, None);
    flip(&place.file(id, "memory.raw"), 150 * 4096 + 7);
    let error = restore(&place.store, id).unwrap_err().to_string();
    assert!(error.contains("0x96000 to 0x97000"), "{error}");
}

#[test]
fn a_verified_file_is_not_read_again_until_it_changes() {
    let place = Place::new();
    let id = place.capture(&Guest::busy(), None);
    let raw = place.file(id, "memory.raw");
    let memo = std::fs::read(place.file(id, "verified")).unwrap();
    restore(&place.store, id).unwrap();
    assert_eq!(std::fs::read(place.file(id, "verified")).unwrap(), memo);
    // A touched file is read again, and remembered again.
    std::fs::File::open(&raw)
        .unwrap()
        .set_modified(std::time::SystemTime::UNIX_EPOCH)
        .unwrap();
    restore(&place.store, id).unwrap();
    assert_ne!(std::fs::read(place.file(id, "verified")).unwrap(), memo);
}

#[test]
fn damage_is_not_compressed_away() {
    let place = Place::new();
    let id = place.capture(&Guest::busy(), None);
    flip(&place.file(id, "memory.raw"), 5000);
    let refused = place
        .store
        .compress(&id, ZSTD, &AtomicBool::new(false), &|_, _| ());
    assert!(matches!(refused, Err(Error::Damaged { .. })));
    assert_eq!(
        place.store.forms(id).unwrap(),
        Forms {
            raw: true,
            framed: None
        }
    );
}

#[test]
fn a_damaged_donor_is_not_used() {
    let place = Place::new();
    let guest = Guest::busy();
    let a = place.capture(&guest, None);
    let b = place.capture(&guest, None);
    place.compress(a, ZSTD);
    flip(&place.file(a, "frames.dat"), 100);
    place.compress(b, ZSTD);
    place.store.drop_raw(b).unwrap();
    assert_eq!(restore(&place.store, b).unwrap(), guest.bytes());
}
