//! Guests whose memory is known, and stores in directories that go away.

#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test file uses a part, and panics when it cannot go on"
)]

pub mod travel;

use std::cell::RefCell;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use hypeman_snapshots::{
    Base, Codec, Elsewhere, MemoryId, MemorySource, MemoryStore, Options, PAGE_BYTES, Result,
};

/// Three chunks and a bit.
pub const GUEST_PAGES: usize = 200;

/// The content of a page: zeros for 0, then text that compresses, then noise that does not.
pub fn page(seed: u16) -> Vec<u8> {
    match seed {
        0 => vec![0; PAGE_BYTES],
        1..=99 => format!("page {seed} says the same again and again. ")
            .into_bytes()
            .into_iter()
            .cycle()
            .take(PAGE_BYTES)
            .collect(),
        _ => {
            let mut noise = vec![0; PAGE_BYTES];
            blake3::Hasher::new()
                .update(&seed.to_le_bytes())
                .finalize_xof()
                .fill(&mut noise);
            noise
        }
    }
}

/// The memory of a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guest(pub Vec<u16>);

impl Guest {
    pub fn new() -> Self {
        Self(vec![0; GUEST_PAGES])
    }

    /// A guest with something in most places.
    pub fn busy() -> Self {
        Self(
            (0..GUEST_PAGES as u16)
                .map(|number| if number % 7 == 0 { 0 } else { number + 1 })
                .collect(),
        )
    }

    pub fn with(&self, changes: &[(usize, u16)]) -> Self {
        let mut changed = self.clone();
        for (number, seed) in changes {
            changed.0[*number] = *seed;
        }
        changed
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.0.iter().flat_map(|seed| page(*seed)).collect()
    }

    pub fn memory_bytes(&self) -> u64 {
        (self.0.len() * PAGE_BYTES) as u64
    }

    pub fn source(&self) -> Source {
        Source {
            bytes: self.bytes(),
            extents: std::iter::once(0..self.memory_bytes()).collect(),
        }
    }

    /// Only some pages can be read.
    pub fn partly(&self, pages: &[usize]) -> Source {
        let extent = |page: &usize| (page * PAGE_BYTES) as u64..((page + 1) * PAGE_BYTES) as u64;
        Source {
            bytes: self.bytes(),
            extents: pages.iter().map(extent).collect(),
        }
    }
}

pub struct Source {
    pub bytes: Vec<u8>,
    pub extents: Vec<Range<u64>>,
}

impl MemorySource for Source {
    fn extents(&self) -> Vec<Range<u64>> {
        self.extents.clone()
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let offset = offset as usize;
        assert!(
            self.extents
                .iter()
                .any(|extent| extent.start as usize <= offset && offset + into.len() <= extent.end as usize)
                || into.len().is_multiple_of(PAGE_BYTES),
            "only what the source has is read"
        );
        into.copy_from_slice(&self.bytes[offset..offset + into.len()]);
        Ok(())
    }
}

/// A store in a directory of its own.
pub struct Place {
    directory: tempfile::TempDir,
    pub store: MemoryStore,
}

impl Place {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = MemoryStore::open(&directory.path().join("memory"), Options { step }).unwrap();
        Self { directory, store }
    }

    pub fn root(&self) -> PathBuf {
        self.directory.path().join("memory")
    }

    pub fn file(&self, id: MemoryId, name: &str) -> PathBuf {
        self.root().join(id.to_string()).join(name)
    }

    /// As after a crash of the process.
    pub fn reopen(&mut self) {
        self.store = MemoryStore::open(&self.root(), Options { step }).unwrap();
    }

    pub fn capture(&self, guest: &Guest, parent: Option<&MemoryId>) -> MemoryId {
        let id = MemoryId::random().unwrap();
        self.store
            .capture(
                &id,
                guest.memory_bytes(),
                parent,
                &guest.source(),
                Elsewhere::Zero,
            )
            .unwrap();
        id
    }

    pub fn compress(&self, id: MemoryId, codec: Codec) -> hypeman_snapshots::Compressed {
        self.store
            .compress(&id, codec, &AtomicBool::new(false), &|_, _| ())
            .unwrap()
    }

    pub fn verify(&self, id: MemoryId) -> Result<hypeman_snapshots::Verified> {
        self.store.verify(&id, &AtomicBool::new(false), &|_, _| ())
    }

    pub fn sweep(&self, live: &[MemoryId]) -> hypeman_snapshots::Swept {
        self.store
            .begin_sweep()
            .unwrap()
            .finish(&live.iter().copied().collect())
            .unwrap()
    }

    /// Names in the store's directory.
    pub fn names(&self) -> Vec<String> {
        names(&self.root())
    }
}

pub fn names(path: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(path)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// The memory that a machine would have after mapping and patching.
pub fn restore(store: &MemoryStore, id: MemoryId) -> Result<Vec<u8>> {
    let image = store.materialize(&id)?;
    let bytes = match &image.base {
        Base::File { path, .. } => std::fs::read(path).unwrap(),
        Base::Memfd(memory) => std::fs::read(format!("/proc/self/fd/{}", memory.as_raw_fd())).unwrap(),
    };
    assert_eq!(bytes.len() as u64, image.memory_bytes);
    let memory = Mutex::new(bytes);
    image.patch.apply(&|offset, bytes| {
        memory.lock().unwrap()[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    })?;
    Ok(memory.into_inner().unwrap())
}

type Hook = Box<dyn FnMut(&'static str)>;

thread_local! {
    static AT_STEP: RefCell<Option<Hook>> = const { RefCell::new(None) };
}

fn step(name: &'static str) {
    AT_STEP.with_borrow_mut(|hook| {
        if let Some(hook) = hook {
            hook(name);
        }
    });
}

/// Calls `hook` between the steps of what this thread does in `work`.
pub fn at_steps<T>(hook: impl FnMut(&'static str) + 'static, work: impl FnOnce() -> T) -> T {
    AT_STEP.set(Some(Box::new(hook)));
    let result = work();
    AT_STEP.set(None);
    result
}

/// Copies a directory as it is now: what a process would find that begins after a crash at this instant.
pub fn copy_tree(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_tree(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// Changes one bit of a file.
pub fn flip(path: &Path, at: u64) {
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 4], at).unwrap();
    // The clock of file times is coarse; a change that follows a capture at once must not hide behind it.
    file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
}
