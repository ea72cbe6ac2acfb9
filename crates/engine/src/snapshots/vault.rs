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

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hypeman_snapshots::{Base, Elsewhere, Materialized, MemoryId, MemoryStore};
use hypeman_vmm::{GuestMemory, Patch};
use jiff::Timestamp;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use self::forms::Forms;
pub(crate) use self::frozen::Frozen;
use self::jobs::Jobs;
use super::model::SnapshotUsage;
use crate::blocking::blocking;
use crate::{EngineError, faults};

mod compression;
mod forms;
mod frozen;
mod jobs;

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
    /// Bytes of the guest's memory that are not zero, wherever they are stored.
    pub(crate) content_bytes: u64,
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

    /// Reads what is to be written over it: laying it out leaves its check to the writing.
    pub(crate) async fn read_patch(&self) -> Result<(), EngineError> {
        let laid_out = Arc::clone(&self.memory);
        blocking(move || Ok(laid_out.patch.apply(&|_, _| Ok(()))?)).await
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

#[derive(Debug, Default)]
struct State {
    holders: HashMap<String, usize>,
    jobs: Jobs,
    forms: Forms,
    /// Images that have frames, whose raw form goes: each from its time on.
    drops: HashMap<MemoryId, Option<Timestamp>>,
    /// What is being compressed, which also holds it, and how to call that off.
    running: Option<(String, Arc<AtomicBool>)>,
    /// Images that nobody holds any more, until they are swept.
    released: HashSet<MemoryId>,
}

impl State {
    /// Who holds an image, but for whoever compresses it.
    fn owners(&self, image: &str) -> usize {
        let holders = self.holders.get(image).copied().unwrap_or_default();
        let compressing = self.running.as_ref().is_some_and(|(running, _)| running == image);
        holders.saturating_sub(usize::from(compressing))
    }

    /// Ends the compression of an image, if it runs.
    fn call_off(&self, image: &str) {
        if let Some((running, cancel)) = &self.running
            && running == image
        {
            cancel.store(true, Ordering::Release);
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
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
    /// Leaves the image held: a row does now, and [`Vault::forget`] will say when it does no more.
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
    let mut state = lock(state);
    let Some(count) = state.holders.get_mut(image) else {
        return;
    };
    *count -= 1;
    match *count {
        0 => {
            state.holders.remove(image);
            state.jobs.remove(image);
            state.released.extend(parse(image).ok());
            released.notify_one();
        }
        // It may be that only whoever compresses it is left.
        1 => state.call_off(image),
        _ => {}
    }
}

/// Images that somebody holds.
fn live(state: &Mutex<State>) -> Result<HashSet<MemoryId>, EngineError> {
    let state = lock(state);
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

    fn locked(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
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
            content_bytes: captured.content_bytes,
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

    /// Bytes of an image that would have to be expanded first, `None` where it lies there as it would be mapped, and the
    /// digest that commits to it, hex.
    pub(crate) async fn look_at(&self, image: &str) -> Result<(Option<u64>, String), EngineError> {
        let (store, id) = (self.store.clone(), parse(image)?);
        blocking(move || Ok((store.bytes_to_expand(id)?, store.digest(id)?.to_hex().to_string()))).await
    }

    /// The store itself, for reading.
    pub(crate) fn store(&self) -> &MemoryStore {
        &self.store
    }

    /// What an image costs, and what would come back if one holder less had it.
    pub(crate) fn usage(&self, image: &str) -> Result<SnapshotUsage, EngineError> {
        let id = parse(image)?;
        let usage = self.store.usage(&id, &live(&self.state)?)?;
        let held_by_others = self.locked().owners(image) > 1;
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
            forget_swept(&store, &state);
            Ok(())
        })
        .await
    }
}

/// Forgets what is gone of what nobody holds, and of what that was built on.
fn forget_swept(store: &MemoryStore, state: &Mutex<State>) {
    let mut open: Vec<MemoryId> = lock(state).released.drain().collect();
    while let Some(id) = open.pop() {
        let there = store.contains(id);
        let mut state = lock(state);
        if there {
            // Others are built on it.
            state.released.insert(id);
        } else {
            state.drops.remove(&id);
            open.extend(state.forms.remove(id));
        }
    }
}

#[cfg(test)]
mod tests;
