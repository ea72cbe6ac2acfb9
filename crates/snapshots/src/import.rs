//! Reading a portable stream into an image of memory and files. Whoever wrote it is not trusted: every length is bounded
//! before anything is reserved, every place is checked, and whatever does not end well leaves nothing behind.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use blake3::{Hash, Hasher};

use crate::archive::{Block, BlockKind, Reader};
use crate::capture::Captured;
use crate::disk::{self, BLOCK, DiskDigest, MAX_DISK};
use crate::draft::Draft;
use crate::error::{Part, at};
use crate::index::Entry;
use crate::layout::{CHUNK_BYTES, PAGE_BYTES, bytes, bytes_of, chunks, is_zero, pages_of, runs};
use crate::{Error, Manifest, MemoryId, MemoryPart, MemoryStore, Result, files};

/// What an imported snapshot may ask for, all in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Memory of the guest, zero pages included.
    pub memory: u64,
    /// Length of the disk, holes included.
    pub disk: u64,
    /// Length of the root disk, holes included.
    pub root_disk: u64,
    /// State of the devices.
    pub device_state: u64,
    /// The description.
    pub description: usize,
}

/// What was imported, durable but for the directory of its files.
pub struct Imported {
    /// The manifest, naming the new image of memory, and no parent.
    pub manifest: Manifest,
    /// What the exporter added. As little to be trusted as everything else.
    pub description: Vec<u8>,
    /// The device state, if there is one.
    pub device_state: Option<PathBuf>,
    /// The disk and its digest, if there is one.
    pub disk: Option<(PathBuf, DiskDigest)>,
    /// The root disk and its digest, if there is one.
    pub root_disk: Option<(PathBuf, DiskDigest)>,
    /// The memory, if there is any: see [`Captured::hold`].
    pub memory: Option<Captured>,
}

/// Imports a snapshot: its memory as image `id`, its files as `device-state`, `disk.raw` and `root-disk.raw` into an
/// existing directory. `progress` is told the bytes of the stream that were read, after each block.
///
/// # Errors
/// [`Error::Damaged`] and [`Error::Version`] for a stream that is not a whole, unchanged snapshot,
/// [`Error::Invalid`] for one that exceeds the bounds, [`Error::Cancelled`], [`Error::Stream`] from `input`, and those
/// of the file system. Nothing is left behind.
pub fn import(
    store: &MemoryStore,
    id: &MemoryId,
    input: &mut dyn Read,
    directory: &Path,
    bounds: &Bounds,
    cancel: &AtomicBool,
    progress: &dyn Fn(u64),
) -> Result<Imported> {
    let mut reader = Reader::begin(input)?;
    let first = reader.next()?;
    if first.kind != BlockKind::Manifest {
        return Err(reader.damaged("it does not begin with a manifest"));
    }
    let manifest = Manifest::open(reader.content())?;
    check(&manifest, bounds)?;
    let mut leftovers = Leftovers(Vec::new());
    let hold = manifest
        .memory
        .map(|_| store.shared.hold(*id, false))
        .transpose()?;
    if hold.is_some() && crate::layout::directory(store.shared.root(), *id).exists() {
        return Err(Error::Exists(*id));
    }
    let mut parts = Parts {
        memory: hold
            .is_some()
            .then(|| Memory::create(store, *id, &manifest))
            .transpose()?,
        devices: manifest
            .device_state
            .map(|_| Devices::create(directory, &mut leftovers))
            .transpose()?,
        disk: None,
        root_disk: None,
        description: None,
    };
    loop {
        if cancel.load(Ordering::Relaxed) {
            return Err(Error::Cancelled);
        }
        let block = reader.next()?;
        progress(reader.position());
        let content = reader.content();
        let taken = match block.kind {
            BlockKind::End => break,
            BlockKind::DiskLength if manifest.disk.is_some() && parts.disk.is_none() => {
                let path = directory.join("disk.raw");
                parts.disk = Disk::create(path, &mut leftovers, content, "disk", bounds.disk)?;
                parts.disk.is_some()
            }
            BlockKind::RootLength if manifest.root_disk.is_some() && parts.root_disk.is_none() => {
                let path = directory.join("root-disk.raw");
                parts.root_disk = Disk::create(path, &mut leftovers, content, "root disk", bounds.root_disk)?;
                parts.root_disk.is_some()
            }
            _ => parts.take(block, content, bounds)?,
        };
        if !taken {
            return Err(reader.damaged("a block does not belong where it is"));
        }
    }
    let missing = || reader.damaged("parts of it are missing");
    let Parts {
        memory,
        devices,
        disk,
        root_disk,
        description,
    } = parts;
    let description = description.ok_or_else(missing)?;
    let device_state = match (devices, &manifest.device_state) {
        (Some(devices), Some(expected)) => Some(devices.finish(expected)?),
        _ => None,
    };
    let finish = |disk: Option<Disk>, expected: &Option<Hash>| match expected {
        Some(expected) => disk.ok_or_else(missing)?.finish(expected).map(Some),
        None => Ok(None),
    };
    let disk = finish(disk, &manifest.disk)?;
    let root_disk = finish(root_disk, &manifest.root_disk)?;
    store.shared.step("import.files");
    let mut manifest = Manifest {
        parent: None,
        ..manifest
    };
    let memory = match (memory, hold) {
        (Some(memory), Some(hold)) => {
            let drawn = memory.draft.finish(&[], memory.entries)?;
            manifest.memory = Some(MemoryPart {
                id: *id,
                digest: drawn.index.seal,
            });
            Some(Captured::of(drawn, hold))
        }
        _ => None,
    };
    store.shared.step("import.done");
    leftovers.0.clear();
    Ok(Imported {
        manifest,
        description,
        device_state,
        disk,
        root_disk,
        memory,
    })
}

fn check(manifest: &Manifest, bounds: &Bounds) -> Result<()> {
    if manifest.memory_bytes > bounds.memory {
        return Err(too_large("memory", manifest.memory_bytes, bounds.memory));
    }
    match &manifest.device_state {
        Some(state) if state.bytes > bounds.device_state => {
            Err(too_large("device state", state.bytes, bounds.device_state))
        }
        _ => Ok(()),
    }
}

fn too_large(what: &str, found: u64, bound: u64) -> Error {
    Error::Invalid(format!(
        "the exported snapshot has {found} bytes of {what}; at most {bound} are accepted"
    ))
}

/// Files that are removed unless everything ends well.
struct Leftovers(Vec<PathBuf>);

impl Drop for Leftovers {
    fn drop(&mut self) {
        for path in &self.0 {
            // The caller's directory is swept as a whole when this fails.
            let _ = files::remove(path);
        }
    }
}

impl Leftovers {
    fn create(&mut self, path: &Path) -> Result<File> {
        let file = File::create_new(path).map_err(at("create", path))?;
        self.0.push(path.to_owned());
        Ok(file)
    }
}

struct Parts<'a> {
    memory: Option<Memory<'a>>,
    devices: Option<Devices>,
    disk: Option<Disk>,
    root_disk: Option<Disk>,
    description: Option<Vec<u8>>,
}

impl Parts<'_> {
    /// Takes a block; says whether it belongs there.
    fn take(&mut self, block: Block, content: &[u8], bounds: &Bounds) -> Result<bool> {
        match (block.kind, self) {
            (
                BlockKind::Description,
                Self {
                    description: description @ None,
                    ..
                },
            ) => {
                if content.len() > bounds.description {
                    return Err(too_large(
                        "description",
                        content.len() as u64,
                        bounds.description as u64,
                    ));
                }
                *description = Some(content.to_vec());
                Ok(true)
            }
            (
                BlockKind::Devices,
                Self {
                    devices: Some(devices),
                    ..
                },
            ) => devices.take(block.offset, content, bounds),
            (
                BlockKind::Memory,
                Self {
                    memory: Some(memory), ..
                },
            ) => memory.take(block.offset, content),
            (BlockKind::Disk, Self { disk: Some(disk), .. })
            | (
                BlockKind::Root,
                Self {
                    root_disk: Some(disk),
                    ..
                },
            ) => disk.take(block.offset, content),
            _ => Ok(false),
        }
    }
}

struct Memory<'a> {
    draft: Draft<'a>,
    memory_bytes: u64,
    entries: Vec<Entry>,
    buffer: Vec<u8>,
    packed: Vec<u8>,
}

impl<'a> Memory<'a> {
    fn create(store: &'a MemoryStore, id: MemoryId, manifest: &Manifest) -> Result<Self> {
        let draft = Draft::create(&store.shared, id, manifest.memory_bytes)?;
        let (buffer, packed) = (vec![0; CHUNK_BYTES], Vec::new());
        Ok(Self {
            draft,
            memory_bytes: manifest.memory_bytes,
            entries: Vec::new(),
            buffer,
            packed,
        })
    }

    /// Takes a chunk; says whether it can be one.
    fn take(&mut self, offset: u64, content: &[u8]) -> Result<bool> {
        let Some((mask, pages)) = content.split_first_chunk() else {
            return Ok(false);
        };
        let mask = u64::from_le_bytes(*mask);
        let number = offset / CHUNK_BYTES as u64;
        let Ok(chunk) = u32::try_from(number) else {
            return Ok(false);
        };
        let sound = offset.is_multiple_of(CHUNK_BYTES as u64)
            && number < chunks(self.memory_bytes)
            && mask & !pages_of(self.memory_bytes, chunk) == 0
            && bytes_of(mask) == pages.len()
            && self.entries.last().is_none_or(|last| last.chunk < chunk);
        if !sound {
            return Ok(false);
        }
        let (mut nonzero, mut rest) = (0, pages);
        for page in runs(mask).flatten() {
            let (content, after) = rest.split_at(PAGE_BYTES);
            if !is_zero(content) {
                self.buffer[bytes(&(page..page + 1))].copy_from_slice(content);
                nonzero |= 1 << page;
            }
            rest = after;
        }
        if nonzero != 0 {
            self.entries.push(
                self.draft
                    .put(chunk, nonzero, nonzero, &self.buffer, &mut self.packed)?,
            );
        }
        Ok(true)
    }
}

struct Devices {
    path: PathBuf,
    file: File,
    length: u64,
    hasher: Hasher,
}

impl Devices {
    fn create(directory: &Path, leftovers: &mut Leftovers) -> Result<Self> {
        let path = directory.join("device-state");
        let file = leftovers.create(&path)?;
        Ok(Self {
            path,
            file,
            length: 0,
            hasher: Hasher::new(),
        })
    }

    fn take(&mut self, offset: u64, content: &[u8], bounds: &Bounds) -> Result<bool> {
        if offset != self.length || offset + content.len() as u64 > bounds.device_state {
            return Ok(false);
        }
        self.hasher.update(content);
        self.file.write_all(content).map_err(at("write", &self.path))?;
        self.length += content.len() as u64;
        Ok(true)
    }

    fn finish(self, expected: &crate::Blob) -> Result<PathBuf> {
        if self.length != expected.bytes || self.hasher.finalize() != expected.digest {
            return Err(Error::Damaged {
                part: Part::DeviceState,
                reason: "it is not the one that the manifest names",
            });
        }
        self.file.sync_all().map_err(at("sync", &self.path))?;
        Ok(self.path)
    }
}

struct Disk {
    path: PathBuf,
    file: File,
    length: u64,
    blocks: Vec<(u64, Hash)>,
}

impl Disk {
    /// Takes the length of the disk, which comes before its content.
    fn create(
        path: PathBuf,
        leftovers: &mut Leftovers,
        length: &[u8],
        what: &str,
        bound: u64,
    ) -> Result<Option<Self>> {
        let Ok(length) = length.try_into().map(u64::from_le_bytes) else {
            return Ok(None);
        };
        let bound = bound.min(MAX_DISK);
        if length > bound {
            return Err(too_large(what, length, bound));
        }
        let file = leftovers.create(&path)?;
        file.set_len(length).map_err(at("extend", &path))?;
        Ok(Some(Self {
            path,
            file,
            length,
            blocks: Vec::new(),
        }))
    }

    fn take(&mut self, offset: u64, content: &[u8]) -> Result<bool> {
        let number = offset / BLOCK as u64;
        let sound = offset.is_multiple_of(BLOCK as u64)
            && offset < self.length
            && self.length.min(offset + BLOCK as u64) - offset == content.len() as u64
            && self.blocks.last().is_none_or(|(last, _)| *last < number);
        if !sound {
            return Ok(false);
        }
        let parts = disk::parts_with_data(content);
        for part in &parts {
            self.file
                .write_all_at(&content[part.clone()], offset + part.start as u64)
                .map_err(at("write", &self.path))?;
        }
        if !parts.is_empty() {
            self.blocks.push((number, blake3::hash(content)));
        }
        Ok(true)
    }

    fn finish(self, expected: &Hash) -> Result<(PathBuf, DiskDigest)> {
        let digest = DiskDigest::new(self.length, self.blocks);
        if digest.seal() != *expected {
            let part = Part::Disk(0..self.length);
            return Err(Error::Damaged {
                part,
                reason: "it is not the one that the manifest names",
            });
        }
        self.file.sync_all().map_err(at("sync", &self.path))?;
        Ok((self.path, digest))
    }
}
