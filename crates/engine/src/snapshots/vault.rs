//! The memory images of this server: who stands on which, and what is done with them behind everybody's back.
//!
//! ```text
//!   keep ──► image ──┬─ held by standby records, snapshots, running machines
//!                    ├─ wanted compressed ──► one job at a time, all cores ──► framed, raw form dropped
//!                    └─ held by nobody ──► swept
//! ```
//!
//! Invariants:
//! - Counts of holders live in memory only and are rebuilt from the rows at the start: a crash can't make them wrong.
//! - An image is swept only when no row, machine or operation under way holds it or a descendant of it.
//! - A restore never waits for compression: it takes the form that is there.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hypeman_snapshots::{Base, Codec, Elsewhere, Materialized, MemoryId, MemorySource, MemoryStore};
use hypeman_vmm::{CopyRoom, GuestMemory, Patch};
use jiff::Timestamp;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::model::{Algorithm, CompressionChoice, CompressionState, MemoryRecord, SnapshotUsage};
use crate::blocking::blocking;
use crate::events::{EventKind, Events};
use crate::{EngineError, faults};

/// A compression that failed is tried again this much later: space may be back.
const RETRY: Duration = Duration::from_secs(20);

/// A raw form that a machine is about to map is dropped this much later.
const DROP_RETRY: Duration = Duration::from_secs(1);

/// Guest memory of one instant.
#[derive(Debug)]
pub(crate) struct Frozen {
    /// What may hold something.
    ranges: Vec<Range<u64>>,
    content: Content,
    /// Everything else is what the machine's base has, and not zero.
    over_base: bool,
}

#[derive(Debug)]
enum Content {
    /// A copy: the guest runs again.
    Copied(File),
    /// The memory itself: the guest stands still until it is kept.
    Live(GuestMemory),
}

impl Frozen {
    /// Copies guest memory within RAM, into room made before, so that the guest can go on.
    ///
    /// `served`: it still was when the guest stood still, whatever was so when `memory` was opened.
    pub(crate) fn copied(memory: &GuestMemory, room: CopyRoom, served: bool) -> io::Result<Self> {
        let ranges = memory.populated()?;
        let copy = memory.copy_into(room, &ranges)?;
        Ok(Self {
            ranges,
            content: Content::Copied(File::from(copy)),
            over_base: memory.is_private_mapping() || served,
        })
    }

    /// Reads guest memory where it is.
    pub(crate) fn live(memory: GuestMemory) -> io::Result<Self> {
        Ok(Self {
            ranges: memory.populated()?,
            over_base: memory.misses_what_it_came_from(),
            content: Content::Live(memory),
        })
    }
}

impl MemorySource for Frozen {
    fn extents(&self) -> Vec<Range<u64>> {
        self.ranges.clone()
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        match &self.content {
            Content::Copied(copy) => copy.read_exact_at(into, offset),
            Content::Live(memory) => memory.read(offset, into),
        }
    }
}

/// What new memory is compared with.
#[derive(Debug, Clone, Default)]
pub(crate) struct Lineage {
    /// What the machine maps: its unchanged pages are those of this image.
    pub(crate) base: Option<String>,
    /// What was captured of the machine last: a better guess at what has not changed since.
    pub(crate) last: Option<String>,
}

/// A new memory image.
#[derive(Debug)]
pub(crate) struct Kept {
    pub(crate) image: String,
    /// Commits to each byte of it, hex.
    pub(crate) digest: String,
    /// Bytes that it stores itself.
    pub(crate) stored_bytes: u64,
    pub(crate) hold: Hold,
}

/// Memory laid out for a machine. The base stays reachable until this is dropped.
#[derive(Debug)]
pub(crate) struct LaidOut {
    memory: Arc<Materialized>,
    digest: String,
}

impl LaidOut {
    /// What the machine maps.
    pub(crate) fn base_path(&self) -> PathBuf {
        match &self.memory.base {
            Base::File { path, .. } => path.clone(),
            // Named through this process: the descriptor is open as long as this value lives.
            Base::Memfd(memory) => {
                PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), memory.as_raw_fd()))
            }
        }
    }

    /// What it holds, hex: the same as when it was kept, or it is another's.
    pub(crate) fn digest(&self) -> &str {
        &self.digest
    }

    /// What is written over it.
    pub(crate) fn patch(&self) -> Option<Patch> {
        if self.memory.patch.is_empty() {
            return None;
        }
        let laid_out = Arc::clone(&self.memory);
        Some(Box::new(move |memory: &GuestMemory| {
            laid_out
                .patch
                .apply(&|offset, bytes| memory.write(offset, bytes))
                .map_err(io::Error::other)
        }))
    }
}

#[derive(Debug, Clone)]
struct Job {
    codec: Codec,
    not_before: Option<Timestamp>,
    failure: Option<String>,
    /// Snapshots to speak of when it is done.
    snapshots: Vec<String>,
}

#[derive(Debug, Default)]
struct State {
    holders: HashMap<String, usize>,
    jobs: BTreeMap<String, Job>,
    /// Stored bytes of the images that are framed.
    framed: HashMap<String, u64>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Vault {
    store: MemoryStore,
    state: Arc<Mutex<State>>,
    released: Arc<Notify>,
    wanted: Arc<Notify>,
    closing: CancellationToken,
}

/// Keeps one image from being swept.
#[derive(Debug)]
pub(crate) struct Hold {
    state: Arc<Mutex<State>>,
    released: Arc<Notify>,
    image: String,
    kept: bool,
}

impl Hold {
    /// Leaves the image held: a row does now, and [`Vault::release`] will say when it does no more.
    pub(crate) fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if !self.kept {
            release(&self.state, &self.released, &self.image);
        }
    }
}

fn release(state: &Mutex<State>, released: &Notify, image: &str) {
    let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(count) = state.holders.get_mut(image) {
        *count -= 1;
        if *count == 0 {
            state.holders.remove(image);
            state.jobs.remove(image);
            released.notify_one();
        }
    }
}

/// Images that somebody holds.
fn live(state: &Mutex<State>) -> Result<HashSet<MemoryId>, EngineError> {
    let state = state.lock().unwrap_or_else(PoisonError::into_inner);
    state.holders.keys().map(|image| parse(image)).collect()
}

/// The id of an image as the store knows it.
pub(crate) fn parse(image: &str) -> Result<MemoryId, EngineError> {
    image
        .parse()
        .map_err(|_| EngineError::damaged("the record of a memory image"))
}

impl Vault {
    pub(crate) fn open(directory: PathBuf, closing: CancellationToken) -> Result<Self, EngineError> {
        let store = MemoryStore::open(&directory, hypeman_snapshots::Options { step: faults::point })?;
        Ok(Self {
            store,
            state: Arc::default(),
            released: Arc::default(),
            wanted: Arc::default(),
            closing,
        })
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps an image as long as the hold lives.
    pub(crate) fn hold(&self, image: &str) -> Hold {
        *self.locked().holders.entry(image.to_owned()).or_default() += 1;
        Hold {
            state: Arc::clone(&self.state),
            released: Arc::clone(&self.released),
            image: image.to_owned(),
            kept: false,
        }
    }

    /// Gives back what [`Hold::keep`] kept.
    pub(crate) fn release(&self, image: &str) {
        release(&self.state, &self.released, image);
    }

    /// Makes an image of guest memory: of what differs from its lineage, where that is still there.
    pub(crate) async fn keep(
        &self,
        memory_bytes: u64,
        lineage: Lineage,
        memory: Frozen,
    ) -> Result<Kept, EngineError> {
        let id = MemoryId::random()?;
        let base = lineage.base.as_deref().map(parse).transpose()?;
        let last = lineage.last.as_deref().map(parse).transpose()?;
        let store = self.store.clone();
        let captured = blocking(move || {
            // Nobody may need the last one any more. A sweep takes it before we have it, or not at all.
            let last = last.and_then(|last| store.hold(last).ok());
            let parent = last.as_ref().map(hypeman_snapshots::Hold::id).or(base);
            let elsewhere = if base.is_some() && memory.over_base {
                Elsewhere::Parent
            } else {
                Elsewhere::Zero
            };
            Ok(store.capture(&id, memory_bytes, parent.as_ref(), &memory, elsewhere)?)
        })
        .await?;
        // Held by us before the store lets go.
        let hold = self.hold(&id.to_string());
        Ok(Kept {
            image: id.to_string(),
            digest: captured.digest.to_hex().to_string(),
            stored_bytes: captured.stored_bytes,
            hold,
        })
    }

    /// Lays an image out for a machine; everything in it is checked first.
    pub(crate) async fn materialize(&self, image: &str) -> Result<LaidOut, EngineError> {
        let (store, id) = (self.store.clone(), parse(image)?);
        blocking(move || {
            let digest = store.digest(id)?.to_hex().to_string();
            let memory = Arc::new(store.materialize(&id)?);
            Ok(LaidOut { memory, digest })
        })
        .await
    }

    /// Whether an image lies there as it would be mapped, and the digest that commits to it, hex.
    pub(crate) async fn look_at(&self, image: &str) -> Result<(bool, String), EngineError> {
        let (store, id) = (self.store.clone(), parse(image)?);
        blocking(move || Ok((store.can_be_mapped(id)?, store.digest(id)?.to_hex().to_string()))).await
    }

    /// Asks for an image to be compressed, as its record says; `snapshot` is the one that says so.
    pub(crate) fn want(&self, memory: &MemoryRecord, not_before: Option<Timestamp>, snapshot: Option<&str>) {
        let CompressionChoice::On { algorithm, level } = memory.compression else {
            return;
        };
        let mut state = self.locked();
        if state.framed.contains_key(&memory.image) {
            return;
        }
        let codec = match algorithm {
            Algorithm::Zstd => Codec::Zstd(level.into()),
            Algorithm::Lz4 => Codec::Lz4(level.into()),
        };
        let mut snapshots = match state.jobs.remove(&memory.image) {
            Some(former) => former.snapshots,
            None => Vec::new(),
        };
        snapshots.extend(snapshot.map(str::to_owned));
        state.jobs.insert(
            memory.image.clone(),
            Job {
                codec,
                not_before,
                failure: None,
                snapshots,
            },
        );
        self.wanted.notify_one();
    }

    /// Which forms of an image there are now.
    pub(crate) fn state(&self, image: &str) -> CompressionState {
        let state = self.locked();
        if let Some(bytes) = state.framed.get(image) {
            return CompressionState::Compressed { bytes: *bytes };
        }
        match state.jobs.get(image) {
            None => CompressionState::None,
            Some(Job {
                failure: Some(reason),
                ..
            }) => CompressionState::Error {
                reason: reason.clone(),
            },
            Some(job) if job.not_before.is_some_and(|start| start > Timestamp::now()) => {
                CompressionState::None
            }
            Some(_) => CompressionState::Compressing,
        }
    }

    /// Learns which images are framed already. Part of the start.
    pub(crate) fn learn(&self, image: &str) {
        let forms = parse(image).and_then(|id| Ok(self.store.forms(id)?));
        match forms {
            Ok(forms) => {
                if let Some(bytes) = forms.framed {
                    self.locked().framed.insert(image.to_owned(), bytes);
                }
            }
            // Whoever restores from it is told; the others must not suffer for it.
            Err(error) => tracing::error!(image, %error, "a memory image can't be read"),
        }
    }

    /// The store itself, for reading.
    pub(crate) fn store(&self) -> &MemoryStore {
        &self.store
    }

    /// What an image costs, and what would come back if one holder less had it.
    pub(crate) fn usage(&self, image: &str) -> Result<SnapshotUsage, EngineError> {
        let id = parse(image)?;
        let usage = self.store.usage(&id, &live(&self.state)?)?;
        let held_by_others = self.locked().holders.get(image).copied().unwrap_or_default() > 1;
        Ok(SnapshotUsage {
            own_bytes: if held_by_others { 0 } else { usage.own },
            shared_bytes: usage.shared + if held_by_others { usage.own } else { 0 },
            freed_by_delete_bytes: if held_by_others { 0 } else { usage.freed },
        })
    }

    /// Sweeps at the start, for what a crash left, and whenever something was released, until the server closes.
    pub(crate) async fn sweep_forever(&self) {
        self.released.notify_one();
        loop {
            tokio::select! {
                () = self.closing.cancelled() => return,
                () = self.released.notified() => {}
            }
            if let Err(error) = self.sweep().await {
                tracing::warn!(%error, "memory images that nobody needs are left for the next sweep");
            }
        }
    }

    async fn sweep(&self) -> Result<(), EngineError> {
        let store = self.store.clone();
        let state = Arc::clone(&self.state);
        blocking(move || {
            // What is captured from here on is spared until we hold it.
            let sweep = store.begin_sweep()?;
            sweep.finish(&live(&state)?)?;
            Ok(())
        })
        .await
    }

    /// Compresses what is wanted, one image at a time, until the server closes.
    pub(crate) async fn compress_forever(&self, events: &Events) {
        let cancel = Arc::new(AtomicBool::new(false));
        loop {
            let (next, wait) = self.next_job();
            let Some((image, job)) = next else {
                tokio::select! {
                    () = self.closing.cancelled() => return,
                    () = self.wanted.notified() => {}
                    () = tokio::time::sleep(wait) => {}
                }
                continue;
            };
            let working = self.compress(&image, job.codec, Arc::clone(&cancel));
            tokio::pin!(working);
            tokio::select! {
                () = self.closing.cancelled() => {
                    cancel.store(true, Ordering::Release);
                    working.await;
                    return;
                }
                () = &mut working => {}
            }
            let outcome = match self.state(&image) {
                CompressionState::Compressed { .. } => "compressed",
                _ => "error",
            };
            for snapshot in &job.snapshots {
                events.publish(EventKind::Snapshot, snapshot, outcome);
            }
        }
    }

    /// A job that is due, or how long until one may be.
    fn next_job(&self) -> (Option<(String, Job)>, Duration) {
        let now = Timestamp::now();
        let state = self.locked();
        let due = |job: &Job| job.not_before.is_none_or(|start| start <= now);
        if let Some((image, job)) = state.jobs.iter().find(|(_, job)| due(job)) {
            return (Some((image.clone(), job.clone())), Duration::ZERO);
        }
        let soonest = state.jobs.values().filter_map(|job| job.not_before).min();
        let wait = soonest.map_or(Duration::from_secs(3600), |start| {
            let milliseconds = start.as_millisecond() - now.as_millisecond();
            Duration::from_millis(u64::try_from(milliseconds).unwrap_or(0) + 1)
        });
        (None, wait)
    }

    async fn compress(&self, image: &str, codec: Codec, cancel: Arc<AtomicBool>) {
        // Not swept from under the job.
        let _hold = self.hold(image);
        let (store, watched) = (self.store.clone(), Arc::clone(&cancel));
        let outcome = match parse(image) {
            Ok(id) => {
                blocking(move || {
                    let compressed = store.compress(&id, codec, &watched, &|_, _| {})?;
                    faults::point("compress.framed");
                    // Machines that map the raw form keep it through the kernel; one that is about to needs its name.
                    let dropped = match store.drop_raw(id) {
                        Ok(()) => true,
                        Err(hypeman_snapshots::Error::Busy(_)) => false,
                        Err(error) => return Err(error.into()),
                    };
                    faults::point("compress.dropped");
                    Ok((compressed.bytes, dropped))
                })
                .await
            }
            Err(error) => Err(error),
        };
        let mut state = self.locked();
        match outcome {
            Ok((bytes, dropped)) => {
                state.framed.insert(image.to_owned(), bytes);
                if dropped {
                    state.jobs.remove(image);
                } else if let Some(job) = state.jobs.get_mut(image) {
                    job.snapshots.clear();
                    job.not_before = Timestamp::now().checked_add(DROP_RETRY).ok();
                }
            }
            Err(_) if cancel.load(Ordering::Acquire) => {}
            Err(error) => {
                tracing::warn!(image, %error, "not compressed; tried again later");
                if let Some(job) = state.jobs.get_mut(image) {
                    job.failure = Some(error.to_string());
                    job.not_before = Timestamp::now().checked_add(RETRY).ok();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
