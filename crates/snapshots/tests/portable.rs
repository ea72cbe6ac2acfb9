//! Snapshots that travel as one file.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on should panic"
)]

mod support;

use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};

use hypeman_snapshots::{Bounds, Error, Export, Manifest, MemoryId, MemoryPart, disk, export, import};
use support::travel::{Arrival, BOUNDS, DEVICES, DISK, NEVER, Snapshot};
use support::{names, restore};

#[test]
fn a_snapshot_arrives_as_it_left() {
    let snapshot = Snapshot::standby();
    let file = snapshot.export().unwrap();
    let arrival = Arrival::new();
    let imported = arrival.import(&file).unwrap();
    assert_eq!(imported.description, b"a counter");
    assert_eq!(std::fs::read(imported.device_state.unwrap()).unwrap(), DEVICES);

    let (overlay, digest) = imported.disk.unwrap();
    assert_eq!(digest, snapshot.digest);
    disk::check(&overlay, &digest, None, &NEVER).unwrap();
    assert!(
        overlay.metadata().unwrap().blocks() * 512 <= 64 << 10,
        "holes stay holes"
    );

    let (root_disk, digest) = imported.root_disk.unwrap();
    assert_eq!(digest, snapshot.root_digest);
    let sent = snapshot.files.path().join("root");
    assert_eq!(std::fs::read(root_disk).unwrap(), std::fs::read(sent).unwrap());

    let memory = imported.memory.unwrap();
    assert_eq!((memory.depth, memory.parent), (1, None));
    let part = imported.manifest.memory.unwrap();
    assert_eq!(
        part,
        MemoryPart {
            id: memory.hold.id(),
            digest: memory.digest
        }
    );
    assert_eq!(
        restore(&arrival.place.store, part.id).unwrap(),
        snapshot.guest.bytes()
    );
    arrival.place.verify(part.id).unwrap();
    let same = Manifest {
        memory: snapshot.manifest.memory,
        parent: snapshot.manifest.parent.clone(),
        ..imported.manifest
    };
    assert_eq!(same, snapshot.manifest);

    // It is protected until somebody names it.
    arrival.place.sweep(&[]);
    assert!(arrival.place.store.contains(part.id));
    drop(memory);
    arrival.place.sweep(&[]);
    assert_eq!(arrival.place.names(), Vec::<String>::new());
}

#[test]
fn a_stopped_snapshot_travels_without_memory() {
    let snapshot = Snapshot::stopped();
    let arrival = Arrival::new();
    let imported = arrival.import(&snapshot.export().unwrap()).unwrap();
    assert!(imported.memory.is_none() && imported.device_state.is_none());
    assert_eq!(names(arrival.files.path()), ["disk.raw", "root-disk.raw"]);
    assert_eq!(arrival.place.names(), Vec::<String>::new());
}

#[test]
fn a_flipped_bit_or_a_missing_end_is_refused() {
    let file = Snapshot::standby().export().unwrap();
    let arrival = Arrival::new();
    let step = file.len() / 150;
    for at in (0..file.len()).step_by(step).chain([8, file.len() - 1]) {
        let mut flipped = file.clone();
        flipped[at] ^= 1 << (at % 8);
        let error = arrival.refuses(&flipped);
        assert!(
            error.is_damage() && error.to_string().contains("exported snapshot"),
            "{at}: {error}"
        );
    }
    for length in (0..file.len()).step_by(step).chain([file.len() - 1]) {
        assert!(arrival.refuses(&file[..length]).is_damage());
    }
    let mut longer = file.clone();
    longer.push(0);
    assert!(arrival.refuses(&longer).is_damage());
    arrival.import(&file).unwrap();
}

#[test]
fn bounds_are_kept() {
    let file = Snapshot::standby().export().unwrap();
    let arrival = Arrival::new();
    for (bounds, what) in [
        (
            Bounds {
                memory: 4096,
                ..BOUNDS
            },
            "of memory",
        ),
        (
            Bounds {
                disk: DISK - 1,
                ..BOUNDS
            },
            "of disk",
        ),
        (
            Bounds {
                root_disk: 4096,
                ..BOUNDS
            },
            "of root disk",
        ),
        (
            Bounds {
                device_state: 3,
                ..BOUNDS
            },
            "of device state",
        ),
        (
            Bounds {
                description: 3,
                ..BOUNDS
            },
            "of description",
        ),
    ] {
        let Err(error) = arrival.import_within(&file, &bounds) else {
            panic!("{what} was accepted")
        };
        assert!(
            matches!(error, Error::Invalid(_)) && error.to_string().contains(what),
            "{error}"
        );
        assert_eq!(names(arrival.files.path()), Vec::<String>::new());
        assert_eq!(arrival.place.names(), Vec::<String>::new());
    }
}

#[test]
fn what_was_damaged_since_is_not_exported() {
    let snapshot = Snapshot::standby();
    let id = snapshot.manifest.memory.unwrap().id;
    for path in [
        snapshot.place.file(id, "memory.raw"),
        snapshot.files.path().join("devices"),
        snapshot.files.path().join("overlay"),
        snapshot.files.path().join("root"),
    ] {
        let at = if path.ends_with("devices") { 0 } else { 4096 };
        support::flip(&path, at);
        assert!(snapshot.export().unwrap_err().is_damage(), "{}", path.display());
        support::flip(&path, at);
    }
    snapshot.export().unwrap();
}

#[test]
fn both_ways_can_be_cancelled() {
    let snapshot = Snapshot::standby();
    let parts = Export {
        manifest: &snapshot.manifest,
        description: b"",
        device_state: Some(&snapshot.files.path().join("devices")),
        disk: Some((&snapshot.files.path().join("overlay"), &snapshot.digest)),
        root_disk: Some((&snapshot.files.path().join("root"), &snapshot.root_digest)),
    };
    let cancelled = export(
        &snapshot.place.store,
        &parts,
        &mut Vec::new(),
        &AtomicBool::new(true),
        &|_, _| (),
    );
    assert!(matches!(cancelled, Err(Error::Cancelled)));
    let (file, arrival) = (snapshot.export().unwrap(), Arrival::new());
    let (cancel, id) = (AtomicBool::new(false), MemoryId::random().unwrap());
    let late = |position: u64| cancel.store(position > file.len() as u64 / 2, Ordering::Relaxed);
    let cancelled = import(
        &arrival.place.store,
        &id,
        &mut &file[..],
        arrival.files.path(),
        &BOUNDS,
        &cancel,
        &late,
    );
    assert!(matches!(cancelled, Err(Error::Cancelled)));
    assert_eq!(names(arrival.files.path()), Vec::<String>::new());
    assert_eq!(arrival.place.names(), Vec::<String>::new());
}
