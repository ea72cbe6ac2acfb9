//! A snapshot to send, and a place where it arrives.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::AtomicBool;

use hypeman_snapshots::{
    Blob, Bounds, Codec, DiskDigest, Error, Export, Imported, Manifest, MemoryId, MemoryPart, Result,
    SnapshotKind, Vmm, disk, export, import,
};

use super::{Guest, Place, names, page};

pub static NEVER: AtomicBool = AtomicBool::new(false);
pub const DEVICES: &[u8] = b"registers and queues";
pub const BOUNDS: Bounds = Bounds {
    memory: 1 << 20,
    disk: 4 << 20,
    root_disk: 2 << 20,
    device_state: 1 << 20,
    description: 1000,
};
pub const DISK: u64 = (3 << 20) + 100;

/// A snapshot with everything.
pub struct Snapshot {
    pub place: Place,
    pub files: tempfile::TempDir,
    pub guest: Guest,
    pub manifest: Manifest,
    pub digest: DiskDigest,
    pub root_digest: DiskDigest,
}

impl Snapshot {
    /// Its memory is two layers in both forms.
    pub fn standby() -> Self {
        let place = Place::new();
        let files = tempfile::tempdir().unwrap();
        let first = Guest::busy();
        let guest = first.with(&[(1, 150), (2, 0), (199, 40)]);
        let parent = place.capture(&first, None);
        let id = place.capture(&guest, Some(&parent));
        place.compress(parent, Codec::Zstd(1));
        place.store.drop_raw(parent).unwrap();
        std::fs::write(files.path().join("devices"), DEVICES).unwrap();
        let overlay = File::create_new(files.path().join("overlay")).unwrap();
        overlay.set_len(DISK).unwrap();
        overlay.write_all_at(&page(44), 1 << 20).unwrap();
        overlay.write_all_at(b"last", DISK - 4).unwrap();
        let digest = disk::seal(&files.path().join("overlay"), &NEVER).unwrap();
        let root_disk = files.path().join("root");
        std::fs::write(&root_disk, [page(150), page(151)].concat()).unwrap();
        let root_digest = disk::seal(&root_disk, &NEVER).unwrap();
        let manifest = Manifest {
            kind: SnapshotKind::Standby,
            vmm: Vmm {
                name: "qemu".into(),
                version: "7.2.19".into(),
                machine: "pc-q35-7.2".into(),
            },
            kernel: "6.1".into(),
            cpu_features: "sse2".into(),
            memory_bytes: guest.memory_bytes(),
            vcpus: 1,
            disks: 2,
            network: true,
            memory: Some(MemoryPart {
                id,
                digest: place.store.digest(id).unwrap(),
            }),
            device_state: Some(Blob::of(DEVICES)),
            disk: Some(digest.seal()),
            root_disk: Some(root_digest.seal()),
            parent: Some("snapshot-7".into()),
        };
        Self {
            place,
            files,
            guest,
            manifest,
            digest,
            root_digest,
        }
    }

    pub fn stopped() -> Self {
        let mut snapshot = Self::standby();
        snapshot.manifest.kind = SnapshotKind::Stopped;
        snapshot.manifest.memory = None;
        snapshot.manifest.device_state = None;
        snapshot
    }

    pub fn export(&self) -> Result<Vec<u8>> {
        let file = |name| self.files.path().join(name);
        let (devices, overlay, root_disk) = (file("devices"), file("overlay"), file("root"));
        let parts = Export {
            manifest: &self.manifest,
            description: b"a counter",
            device_state: Some(&devices),
            disk: Some((&overlay, &self.digest)),
            root_disk: Some((&root_disk, &self.root_digest)),
        };
        let mut file = Vec::new();
        let length = export(&self.place.store, &parts, &mut file, &NEVER, &|done, total| {
            assert!(done <= total)
        })?;
        assert_eq!(length, file.len() as u64);
        Ok(file)
    }
}

/// Where snapshots arrive.
pub struct Arrival {
    pub place: Place,
    pub files: tempfile::TempDir,
}

impl Arrival {
    pub fn new() -> Self {
        Self {
            place: Place::new(),
            files: tempfile::tempdir().unwrap(),
        }
    }

    pub fn import_within(&self, file: &[u8], bounds: &Bounds) -> Result<Imported> {
        let id = MemoryId::random().unwrap();
        import(
            &self.place.store,
            &id,
            &mut &file[..],
            self.files.path(),
            bounds,
            &NEVER,
            &|_| (),
        )
    }

    pub fn import(&self, file: &[u8]) -> Result<Imported> {
        self.import_within(file, &BOUNDS)
    }

    /// A refused snapshot leaves no trace.
    pub fn refuses(&self, file: &[u8]) -> Error {
        let Err(error) = self.import(file) else {
            panic!("it was accepted")
        };
        assert_eq!(names(self.files.path()), Vec::<String>::new(), "{error}");
        assert_eq!(self.place.names(), Vec::<String>::new(), "{error}");
        error
    }
}
