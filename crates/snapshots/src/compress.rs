//! Writing the framed form of an image beside its raw form.
//!
//! ```text
//! raw chunk ─► BLAKE3 ─► the same frame somewhere in the store? ── yes ─► expand it, compare ─► refer to it
//!                                                               └─ no ──► compress ─► expand, compare ─► frames.dat
//! then: fsync ─► frames.dat takes its name ─► frames.index takes its name: from now on the form exists
//! ```
//! The raw form is only read. Until the last rename nothing refers to the frames, and a failure removes them.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use blake3::Hash;

use crate::codec::{Decoder, Encoder};
use crate::error::at;
use crate::frames::{self, Frame, FrameTable};
use crate::layout::{CHUNK_BYTES, FRAME_TABLE, FRAMES, bytes_of};
use crate::reader::{Layer, Scratch};
use crate::store::{Needs, Shared};
use crate::{Codec, Error, Hold, MemoryId, MemoryStore, Result, files, parallel};

/// What compression made of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compressed {
    /// Bytes of all frames of the image, shared ones included.
    pub bytes: u64,
    /// Bytes that were added to the disk: frames that no image had before, and the table.
    pub stored_bytes: u64,
    /// Bytes of memory that the frames hold.
    pub content_bytes: u64,
}

/// Lets others compress the image again.
struct Turn<'a>(&'a Shared, MemoryId);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.users().compressing.remove(&self.1);
    }
}

/// Removes frames that were named and then did not get their table.
struct Unfinished<'a>(&'a Shared, MemoryId, bool);

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if self.2 {
            // What cannot be removed now is removed when the store is opened next.
            let _ = files::remove(&self.0.path(self.1, FRAMES));
        }
    }
}

/// A frame that another image has already.
struct Known {
    donor: MemoryId,
    file: File,
    frame: Frame,
}

/// A frame of the new table; its donor has no number yet.
struct Found {
    donor: MemoryId,
    frame: Frame,
}

impl MemoryStore {
    /// Writes the framed form of an image by all cores. The raw form stays: see [`MemoryStore::drop_raw`].
    /// An image that has its framed form already is left as it is, whatever its codec was.
    ///
    /// `progress` is told bytes done and bytes in all, by many threads.
    ///
    /// # Errors
    /// [`Error::Cancelled`], [`Error::Busy`] when the image is being compressed, [`Error::Damaged`] when the raw
    /// form is, and those of the file system. Nothing is left behind, and the image is as it was.
    pub fn compress(
        &self,
        id: &MemoryId,
        codec: Codec,
        cancel: &AtomicBool,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Compressed> {
        codec.check()?;
        let shared = &*self.shared;
        let _hold = self.hold(*id)?;
        if !shared.users().compressing.insert(*id) {
            return Err(Error::Busy(*id));
        }
        let _turn = Turn(shared, *id);
        let index = shared.index(*id)?;
        let content_bytes: u64 = index
            .entries
            .iter()
            .map(|entry| bytes_of(entry.nonzero) as u64)
            .sum();
        if Layer::framed(shared, &index)?.is_some() {
            let bytes = self.forms(*id)?.framed.unwrap_or_default();
            return Ok(Compressed {
                bytes,
                stored_bytes: 0,
                content_bytes,
            });
        }
        let raw = Layer::raw(shared, &index)?
            .ok_or_else(|| Error::Invalid(format!("memory image {id} has no raw form")))?;
        let layer = Layer { index, content: raw };
        let (known, _donor_holds) = self.known_frames(&layer)?;

        let workspace = shared.workspace("compress", *id)?;
        shared.step("memory.compress.begun");
        let path = workspace.path().join(FRAMES);
        let file = File::create_new(&path).map_err(at("create", &path))?;
        let job = Job {
            layer: &layer,
            known,
            file: &file,
            path: &path,
            codec,
            end: AtomicU64::new(0),
            done: AtomicU64::new(0),
            claimed: Mutex::default(),
            total: content_bytes,
        };
        let workers = parallel::each(
            layer.index.entries.len(),
            || Worker::new(codec),
            |worker, number| {
                if cancel.load(Ordering::Relaxed) {
                    return Err(Error::Cancelled);
                }
                job.frame(worker, number, progress)
            },
        )?;
        let found = workers.into_iter().flat_map(|worker| worker.found);
        let found: HashMap<Hash, Found> = found.map(|found| (found.frame.digest, found)).collect();
        let table = table(&layer, &found);
        let bytes = table.to_bytes();
        files::write_beside(&workspace.path().join(FRAME_TABLE), &bytes, &file, &path)?;
        shared.step("memory.compress.written");
        if cancel.load(Ordering::Relaxed) {
            return Err(Error::Cancelled);
        }

        // Sweeps must know of the donors before anybody can rely on them.
        let needs = Needs {
            parent: layer.index.parent.map(|(parent, _)| parent),
            donors: table.donors.iter().copied().filter(|donor| donor != id).collect(),
        };
        shared.users().needs.insert(*id, Arc::new(needs));
        let mut unfinished = Unfinished(shared, *id, true);
        files::rename(&path, &shared.path(*id, FRAMES))?;
        shared.step("memory.compress.frames");
        files::rename(
            &workspace.path().join(FRAME_TABLE),
            &shared.path(*id, FRAME_TABLE),
        )?;
        unfinished.2 = false;
        shared.step("memory.compress.renamed");
        Ok(Compressed {
            bytes: table.frames.iter().map(|frame| u64::from(frame.stored)).sum(),
            stored_bytes: job.end.into_inner() + bytes.len() as u64,
            content_bytes,
        })
    }

    /// Frames of other images that the image needs, and holds on those images.
    fn known_frames(&self, layer: &Layer) -> Result<(HashMap<Hash, Known>, Vec<Hold>)> {
        let entries = layer.index.entries.iter().filter(|entry| entry.nonzero != 0);
        let wanted: HashSet<Hash> = entries.map(|entry| entry.digest).collect();
        let mut known = HashMap::new();
        let mut holds = Vec::new();
        for other in self.shared.list()? {
            if other == layer.index.id {
                continue;
            }
            // Held before it is read: from then on no sweep cuts frames out of it.
            let Ok(hold) = self.shared.hold(other, false) else {
                continue;
            };
            // A damaged image is of no use to others, and not their fault.
            let Ok(Some(table)) = self.shared.frame_table(other) else {
                continue;
            };
            let own = |frame: &&Frame| table.donors.get(frame.donor as usize) == Some(&other);
            let mut useful = table
                .frames
                .iter()
                .filter(own)
                .filter(|frame| wanted.contains(&frame.digest))
                .peekable();
            if useful.peek().is_none() {
                continue;
            }
            let Some(file) = files::open(&self.shared.path(other, FRAMES))? else {
                continue;
            };
            for frame in useful {
                let file = file
                    .try_clone()
                    .map_err(at("open", &self.shared.path(other, FRAMES)))?;
                known.entry(frame.digest).or_insert(Known {
                    donor: other,
                    file,
                    frame: *frame,
                });
            }
            holds.push(hold);
        }
        Ok((known, holds))
    }
}

/// The table of the image, with all donors numbered.
fn table(layer: &Layer, found: &HashMap<Hash, Found>) -> FrameTable {
    let id = layer.index.id;
    let mut donors = vec![id];
    let mut numbers = HashMap::from([(id, 0)]);
    let mut frames = Vec::with_capacity(layer.index.entries.len());
    for entry in layer.index.entries.iter().filter(|entry| entry.nonzero != 0) {
        let Some(found) = found.get(&entry.digest) else {
            continue;
        };
        let donor = *numbers.entry(found.donor).or_insert_with(|| {
            donors.push(found.donor);
            u32::try_from(donors.len() - 1).unwrap_or(u32::MAX)
        });
        frames.push(Frame { donor, ..found.frame });
    }
    FrameTable {
        image: id,
        index_seal: Some(layer.index.seal),
        donors,
        frames,
    }
}

/// Tools and findings of one thread.
struct Worker {
    encoder: Encoder,
    decoder: Decoder,
    scratch: Scratch,
    stored: Vec<u8>,
    check: Vec<u8>,
    found: Vec<Found>,
}

impl Worker {
    fn new(codec: Codec) -> Result<Self> {
        Ok(Self {
            encoder: Encoder::new(codec, CHUNK_BYTES)?,
            decoder: Decoder::new(),
            scratch: Scratch::new(),
            stored: Vec::new(),
            check: vec![0; CHUNK_BYTES],
            found: Vec::new(),
        })
    }
}

struct Job<'a> {
    layer: &'a Layer,
    known: HashMap<Hash, Known>,
    file: &'a File,
    path: &'a std::path::Path,
    codec: Codec,
    end: AtomicU64,
    done: AtomicU64,
    total: u64,
    /// Frames that some thread takes care of: equal chunks of one image become one frame.
    claimed: Mutex<HashSet<Hash>>,
}

impl Job<'_> {
    fn frame(&self, worker: &mut Worker, number: usize, progress: &(dyn Fn(u64, u64) + Sync)) -> Result<()> {
        let entry = self.layer.index.entries[number];
        let length = bytes_of(entry.nonzero);
        if length == 0 {
            return Ok(());
        }
        let fresh = self
            .claimed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(entry.digest);
        if fresh && !self.refer(worker, &entry.digest, length)? {
            self.store(worker, number, &entry.digest)?;
        }
        let done = self.done.fetch_add(length as u64, Ordering::Relaxed) + length as u64;
        progress(done, self.total);
        Ok(())
    }

    /// Uses a frame of another image, if there is one and it is intact.
    fn refer(&self, worker: &mut Worker, digest: &Hash, length: usize) -> Result<bool> {
        let Some(Known { donor, file, frame }) = self.known.get(digest) else {
            return Ok(false);
        };
        if frame.content as usize != length {
            return Ok(false);
        }
        let Worker {
            stored,
            check,
            decoder,
            found,
            ..
        } = worker;
        // A frame that cannot be read is as good as none.
        let intact = frames::read(file, frame, stored, &mut check[..length], decoder).unwrap_or(false);
        if intact {
            found.push(Found {
                donor: *donor,
                frame: *frame,
            });
        }
        Ok(intact)
    }

    /// Compresses a chunk and appends it.
    fn store(&self, worker: &mut Worker, number: usize, digest: &Hash) -> Result<()> {
        let Worker {
            encoder,
            decoder,
            scratch,
            check,
            found,
            ..
        } = worker;
        let pages = self.layer.load(number, scratch)?;
        let (encoding, stored) = encoder.encode(pages)?;
        let check = &mut check[..pages.len()];
        if !decoder.decode(encoding, stored, check) || check != pages {
            return Err(Error::Invalid(format!(
                "{:?} does not give back what it was given",
                self.codec
            )));
        }
        let offset = self.end.fetch_add(stored.len() as u64, Ordering::Relaxed);
        self.file
            .write_all_at(stored, offset)
            .map_err(at("write", self.path))?;
        let (Ok(stored), Ok(content)) = (u32::try_from(stored.len()), u32::try_from(pages.len())) else {
            return Err(Error::Invalid("a frame is too large".into()));
        };
        let frame = Frame {
            donor: 0,
            encoding,
            stored,
            content,
            offset,
            digest: *digest,
        };
        found.push(Found {
            donor: self.layer.index.id,
            frame,
        });
        Ok(())
    }
}
