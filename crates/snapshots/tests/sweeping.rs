//! What goes and what stays, and what a crash leaves.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on should panic"
)]

mod support;

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::AtomicBool;

use hypeman_snapshots::{Codec, Elsewhere, MemoryId};
use support::{Guest, Place, at_steps, copy_tree, names, restore};

const ZSTD: Codec = Codec::Zstd(1);

#[test]
fn only_frames_in_use_stay_of_a_dead_donor() {
    let place = Place::new();
    // Noise, so that frames are large enough for whole blocks to come back.
    let guest = Guest((0..192).map(|number| 1000 + number).collect());
    let a = place.capture(&guest, None);
    let blocks = || place.file(a, "frames.dat").metadata().unwrap().blocks() * 512;
    // Shares the first chunk only.
    let partly: Guest = Guest(
        guest
            .0
            .iter()
            .enumerate()
            .map(|(at, seed)| if at < 64 { *seed } else { 0 })
            .collect(),
    );
    let b = place.capture(&partly, None);
    place.compress(a, ZSTD);
    place.compress(b, ZSTD);
    place.store.drop_raw(b).unwrap();
    let before = blocks();
    let usage = place.store.usage(&a, &HashSet::from([a, b])).unwrap();
    let swept = place.sweep(&[b]);
    assert!(blocks() <= before / 2, "{before} to {}", blocks());
    assert!(swept.bytes > before / 2);
    assert!(
        usage.freed.abs_diff(swept.bytes) < 64 << 10,
        "{usage:?} {swept:?}"
    );
    assert_eq!(restore(&place.store, b).unwrap(), partly.bytes());
    // Again, with nothing left to do.
    assert_eq!(place.sweep(&[b]).bytes, 0);
    assert_eq!(restore(&place.store, b).unwrap(), partly.bytes());

    // What was cut out is not offered to others any more.
    let c = place.capture(&guest, None);
    place.compress(c, ZSTD);
    place.store.drop_raw(c).unwrap();
    assert_eq!(restore(&place.store, c).unwrap(), guest.bytes());
}

#[test]
fn ancestors_live_as_long_as_their_descendants() {
    let place = Place::new();
    let first = Guest::busy();
    let second = first.with(&[(1, 150)]);
    let a = place.capture(&first, None);
    let b = place.capture(&second, Some(&a));
    place.sweep(&[b]);
    assert_eq!(restore(&place.store, b).unwrap(), second.bytes());
    let both = place.store.usage(&b, &HashSet::from([a, b])).unwrap();
    let alone = place.store.usage(&b, &HashSet::from([b])).unwrap();
    assert_eq!(both.freed, both.own);
    assert_eq!(alone.freed, alone.own + alone.shared);
    assert_eq!(place.sweep(&[]).bytes, alone.freed);
    assert_eq!(place.names(), Vec::<String>::new());
}

#[test]
fn what_is_held_is_not_swept() {
    let place = Place::new();
    let guest = Guest::busy();
    let id = MemoryId::random().unwrap();
    let captured = place
        .store
        .capture(&id, guest.memory_bytes(), None, &guest.source(), Elsewhere::Zero)
        .unwrap();
    place.sweep(&[]);
    assert!(place.store.contains(id));
    let image = place.store.materialize(&id).unwrap();
    drop(captured);
    place.sweep(&[]);
    assert!(place.store.contains(id));
    drop(image);

    // A capture that is committed while a sweep runs is safe, though the sweep was not told of it.
    let sweep = place.store.begin_sweep().unwrap();
    let other = place.capture(&guest, None);
    let hold = place.store.hold(id).unwrap();
    drop(hold);
    sweep.finish(&HashSet::new()).unwrap();
    assert!(place.store.contains(other) && place.store.contains(id));
    place.sweep(&[other]);
    assert!(place.store.contains(other) && !place.store.contains(id));
}

#[test]
fn a_crash_between_any_two_steps_leaves_every_finished_image_whole() {
    let copies = tempfile::tempdir().unwrap();
    let place = Place::new();
    let guest = Guest::busy();
    let changed = guest.with(&[(1, 150), (70, 0)]);
    let a = place.capture(&guest, None);
    let (root, target) = (place.root(), copies.path().to_owned());
    let mut taken = 0;
    let hook = move |name: &'static str| {
        copy_tree(&root, &target.join(format!("{taken:02} {name}")));
        taken += 1;
    };
    let (b, c) = at_steps(hook, || {
        let b = place.capture(&changed, Some(&a));
        let c = place.capture(&guest, None);
        place.compress(c, ZSTD);
        place.compress(a, ZSTD);
        place.store.drop_raw(a).unwrap();
        // One goes as a whole, the other leaves frames that are needed.
        place.capture(&changed, None);
        place.sweep(&[a, b]);
        (b, c)
    });
    let copies_taken = names(copies.path());
    for step in [
        "memory.capture.begun",
        "memory.capture.written",
        "memory.capture.synced",
        "memory.capture.renamed",
        "memory.compress.begun",
        "memory.compress.written",
        "memory.compress.frames",
        "memory.compress.renamed",
        "memory.raw.dropped",
        "memory.sweep.renamed",
        "memory.sweep.removed",
        "memory.sweep.reduced",
        "memory.sweep.cut",
    ] {
        assert!(
            copies_taken.iter().any(|name| name.ends_with(step)),
            "{step} was not reached"
        );
    }
    for copy in copies_taken {
        let store =
            hypeman_snapshots::MemoryStore::open(&copies.path().join(&copy), Default::default()).unwrap();
        assert_eq!(restore(&store, a).unwrap(), guest.bytes(), "{copy}");
        for (id, guest) in [(b, &changed), (c, &guest)] {
            if store.contains(id) {
                store.verify(&id, &AtomicBool::new(false), &|_, _| ()).unwrap();
                assert_eq!(restore(&store, id).unwrap(), guest.bytes(), "{copy}");
            }
        }
        store.begin_sweep().unwrap().finish(&HashSet::from([a])).unwrap();
        assert_eq!(restore(&store, a).unwrap(), guest.bytes(), "{copy}");
        store.begin_sweep().unwrap().finish(&HashSet::new()).unwrap();
        assert_eq!(names(&copies.path().join(&copy)), Vec::<String>::new(), "{copy}");
    }
}
