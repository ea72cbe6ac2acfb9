//! A disk that fills up: what fails leaves nothing, and what was there stays whole.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test that cannot go on should panic"
)]

mod support;

use std::path::Path;
use std::process::Command;
use std::sync::atomic::AtomicBool;

use hypeman_snapshots::{
    Blob, Bounds, Codec, Elsewhere, Error, Export, Forms, Manifest, MemoryId, MemoryPart, MemoryStore,
    Options, SnapshotKind, Vmm, export, import,
};
use support::{Guest, names, restore};

/// A small file system of its own.
struct Mounted(tempfile::TempDir);

impl Mounted {
    /// `None` for those who may not mount.
    fn new(size: &str) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(directory.path())
            .stderr(std::process::Stdio::null())
            .status();
        if !status.is_ok_and(|status| status.success()) {
            eprintln!("skipped: mounting a small tmpfs needs root");
            return None;
        }
        Some(Self(directory))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

/// A guest whose pages do not compress.
fn noise() -> Guest {
    Guest((0..192).map(|number| 1000 + number).collect())
}

#[test]
fn a_capture_that_does_not_fit_leaves_nothing() {
    let Some(disk) = Mounted::new("600k") else { return };
    let store = MemoryStore::open(disk.path(), Options::default()).unwrap();
    let small = Guest::new().with(&[(3, 1000)]);
    let first = MemoryId::random().unwrap();
    store
        .capture(
            &first,
            small.memory_bytes(),
            None,
            &small.source(),
            Elsewhere::Zero,
        )
        .unwrap();
    let (id, guest) = (MemoryId::random().unwrap(), noise());
    for _ in 0..3 {
        let refused = store
            .capture(&id, guest.memory_bytes(), None, &guest.source(), Elsewhere::Zero)
            .map(|_| ());
        assert!(refused.as_ref().is_err_and(Error::is_no_space), "{refused:?}");
        assert_eq!(names(disk.path()), [first.to_string()]);
    }
    assert_eq!(restore(&store, first).unwrap(), small.bytes());
}

#[test]
fn a_compression_that_does_not_fit_leaves_the_raw_form_as_it_was() {
    let Some(disk) = Mounted::new("1200k") else { return };
    let store = MemoryStore::open(disk.path(), Options::default()).unwrap();
    let (id, guest) = (MemoryId::random().unwrap(), noise());
    store
        .capture(&id, guest.memory_bytes(), None, &guest.source(), Elsewhere::Zero)
        .unwrap();
    let compress = || store.compress(&id, Codec::Zstd(1), &AtomicBool::new(false), &|_, _| ());
    let refused = compress();
    assert!(refused.as_ref().is_err_and(Error::is_no_space), "{refused:?}");
    assert_eq!(names(disk.path()), [id.to_string()]);
    assert_eq!(
        store.forms(id).unwrap(),
        Forms {
            raw: true,
            framed: None
        }
    );
    assert_eq!(restore(&store, id).unwrap(), guest.bytes());

    // With room again it succeeds.
    let status = Command::new("mount")
        .args(["-o", "remount,size=4m"])
        .arg(disk.path())
        .status()
        .unwrap();
    assert!(status.success());
    compress().unwrap();
    store.drop_raw(id).unwrap();
    assert_eq!(restore(&store, id).unwrap(), guest.bytes());
}

#[test]
fn an_import_that_does_not_fit_leaves_nothing() {
    let Some(disk) = Mounted::new("900k") else { return };
    let place = support::Place::new();
    let guest = noise();
    let id = place.capture(&guest, None);
    let manifest = Manifest {
        kind: SnapshotKind::Standby,
        vmm: Vmm {
            name: "qemu".into(),
            version: "1".into(),
            machine: "q35".into(),
        },
        kernel: "6".into(),
        cpu_features: String::new(),
        memory_bytes: guest.memory_bytes(),
        vcpus: 1,
        disks: 0,
        network: false,
        memory: Some(MemoryPart {
            id,
            digest: place.store.digest(id).unwrap(),
        }),
        device_state: Some(Blob::of(&[9; 300_000])),
        disk: None,
        root_disk: None,
        parent: None,
    };
    let devices = place.root().join("devices");
    std::fs::write(&devices, [9; 300_000]).unwrap();
    let parts = Export {
        manifest: &manifest,
        description: b"",
        device_state: Some(&devices),
        disk: None,
        root_disk: None,
    };
    let never = AtomicBool::new(false);
    let mut file = Vec::new();
    export(&place.store, &parts, &mut file, &never, &|_, _| ()).unwrap();

    let store = MemoryStore::open(&disk.path().join("memory"), Options::default()).unwrap();
    let files = disk.path().join("files");
    std::fs::create_dir(&files).unwrap();
    let bounds = Bounds {
        memory: 1 << 20,
        disk: 0,
        root_disk: 0,
        device_state: 1 << 20,
        description: 0,
    };
    let refused = import(&store, &id, &mut &file[..], &files, &bounds, &never, &|_| ()).map(|_| ());
    assert!(refused.as_ref().is_err_and(Error::is_no_space), "{refused:?}");
    assert_eq!(
        (names(&files), names(&disk.path().join("memory"))),
        (Vec::new(), Vec::new())
    );
}
