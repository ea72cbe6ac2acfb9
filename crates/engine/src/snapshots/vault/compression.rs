//! The work behind everybody's back: images are compressed as somebody wishes, then their raw form is dropped.
//!
//! Invariants:
//! - An image that has both forms is on its way to have only frames, also after a crash between the two steps.
//! - What nobody wants any more is not begun, and called off when it runs.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hypeman_snapshots::{Codec, Error, MemoryId, MemoryStore};
use jiff::Timestamp;

use super::super::model::{Algorithm, CompressionChoice, CompressionState, MemoryRecord};
use super::jobs::{Due, Wisher};
use super::{State, Vault, lock, parse, release};
use crate::blocking::blocking;
use crate::events::{EventKind, Events};
use crate::instances::Table;
use crate::{EngineError, clock, faults};

/// A compression that failed is tried again this much later: space may be back.
const RETRY: Duration = Duration::from_secs(20);

/// A raw form that a machine is about to map is dropped this much later.
const DROP_RETRY: Duration = Duration::from_secs(1);

/// How long nothing to do is believed.
const IDLE: Duration = Duration::from_secs(3600);

/// What to do now.
enum Next {
    Compress(Due),
    Drop(MemoryId),
    Wait(Duration),
}

fn later(delay: Duration) -> Option<Timestamp> {
    clock::now().checked_add(delay).ok()
}

impl Vault {
    /// Asks for an image to be compressed, as its record says; `snapshot` is the one that says so, else an instance in
    /// standby does.
    pub(crate) fn want(&self, memory: &MemoryRecord, not_before: Option<Timestamp>, snapshot: Option<&str>) {
        let CompressionChoice::On { algorithm, level } = memory.compression else {
            return;
        };
        let codec = match algorithm {
            Algorithm::Zstd => Codec::Zstd(level.into()),
            Algorithm::Lz4 => Codec::Lz4(level.into()),
        };
        let by = match snapshot {
            Some(id) => Wisher::Snapshot(id.to_owned()),
            None => Wisher::Standby,
        };
        let mut state = self.locked();
        let framed = parse(&memory.image).is_ok_and(|id| state.forms.compressed(id).is_some());
        if framed {
            return;
        }
        state.jobs.wish(&memory.image, by, codec, not_before);
        drop(state);
        self.wanted.notify_one();
    }

    /// Gives back what [`Hold::keep`](super::Hold::keep) kept: the snapshot is gone, and with it what it wanted.
    pub(crate) fn forget(&self, image: &str, snapshot: &str) {
        let mut state = self.locked();
        if state.jobs.withdraw(image, &Wisher::Snapshot(snapshot.to_owned())) {
            state.call_off(image);
        }
        drop(state);
        release(&self.state, &self.released, image);
    }

    /// Which forms of an image there are now.
    pub(crate) fn state(&self, image: &str) -> CompressionState {
        let state = self.locked();
        let framed = parse(image).ok().and_then(|id| state.forms.compressed(id));
        framed.unwrap_or_else(|| state.jobs.state(image, clock::now()))
    }

    /// Learns which images are framed already, and which of those a crash left their raw form. Part of the start.
    pub(crate) fn learn(&self, image: &str) {
        let learned = parse(image).and_then(|id| {
            if self.locked().forms.contains(id) {
                return Ok(());
            }
            learn(&self.store, &self.state, id)
        });
        if let Err(error) = learned {
            // Whoever restores from it is told; the others must not suffer for it.
            tracing::error!(image, %error, "a memory image can't be read");
        }
    }

    /// Compresses what is wanted, one image at a time, until the server closes. `table` tells which instances are
    /// still in standby.
    pub(crate) async fn compress_forever(&self, events: &Events, table: &Table) {
        while !self.closing.is_cancelled() {
            match self.next(table) {
                Next::Compress(due) => self.compress(due, events).await,
                Next::Drop(id) => self.drop_raw(id).await,
                Next::Wait(wait) => tokio::select! {
                    () = self.closing.cancelled() => return,
                    () = self.wanted.notified() => {}
                    () = tokio::time::sleep(wait) => {}
                },
            }
        }
    }

    fn next(&self, table: &Table) -> Next {
        let now = clock::now();
        loop {
            let state = self.locked();
            let mut drops = state.drops.iter();
            if let Some((id, _)) = drops.find(|(_, start)| start.is_none_or(|start| start <= now)) {
                return Next::Drop(*id);
            }
            let Some(due) = state.jobs.due(now) else {
                let soonest = state.drops.values().copied().flatten().min();
                let soonest = [soonest, state.jobs.soonest()].into_iter().flatten().min();
                return Next::Wait(soonest.map_or(IDLE, |start| {
                    let milliseconds = start.as_millisecond() - now.as_millisecond();
                    let wait = Duration::from_millis(u64::try_from(milliseconds).unwrap_or(0) + 1);
                    // The clock may be set meanwhile.
                    wait.min(clock::look_again())
                }));
            };
            drop(state);
            if !due.for_standby || table.stands_on(&due.image) {
                return Next::Compress(due);
            }
            // It woke up: its machine has the memory, and will leave another image behind.
            self.locked().jobs.withdraw(&due.image, &Wisher::Standby);
        }
    }

    async fn compress(&self, due: Due, events: &Events) {
        // Not swept from under the job.
        let _hold = self.hold(&due.image);
        let cancel = Arc::new(AtomicBool::new(false));
        {
            let mut state = self.locked();
            if !state.jobs.contains(&due.image) {
                return;
            }
            state.running = Some((due.image.clone(), Arc::clone(&cancel)));
        }
        let (store, state) = (self.store.clone(), Arc::clone(&self.state));
        let (image, codec, watched) = (due.image.clone(), due.codec, Arc::clone(&cancel));
        let working = blocking(move || frame(&store, &state, &image, codec, &watched));
        tokio::pin!(working);
        let outcome = tokio::select! {
            outcome = &mut working => outcome,
            () = self.closing.cancelled() => {
                cancel.store(true, Ordering::Release);
                working.await
            }
        };
        let mut state = self.locked();
        state.running = None;
        let (told, said) = match outcome {
            Ok(()) => (state.jobs.done(&due.image), "compressed"),
            // As if it had not begun: who wants it since gets it.
            Err(_) if cancel.load(Ordering::Acquire) => return,
            Err(error) => {
                tracing::warn!(image = due.image, %error, "not compressed; tried again later");
                let told = state.jobs.failed(&due.image, error.to_string(), later(RETRY));
                (told, "error")
            }
        };
        drop(state);
        for snapshot in &told {
            events.publish(EventKind::Snapshot, snapshot, said);
        }
    }

    /// Drops the raw form of an image that has both.
    async fn drop_raw(&self, id: MemoryId) {
        let store = self.store.clone();
        let dropped = blocking(move || Ok(store.drop_raw(id)?)).await;
        let retry = match dropped {
            Err(EngineError::Memory(Error::Busy(_))) => later(DROP_RETRY),
            // It is gone altogether, or damaged: whoever restores from it is told.
            Ok(()) | Err(EngineError::Memory(Error::NotFound(_)) | EngineError::Damaged(_)) => None,
            Err(error) => {
                tracing::warn!(image = %id, %error, "its raw form stays for now");
                later(RETRY)
            }
        };
        let mut state = self.locked();
        if retry.is_some() {
            state.drops.insert(id, retry);
        } else {
            state.drops.remove(&id);
        }
    }
}

/// Compresses an image and drops its raw form, unless a machine is about to map that.
fn frame(
    store: &MemoryStore,
    state: &Mutex<State>,
    image: &str,
    codec: Codec,
    cancel: &AtomicBool,
) -> Result<(), EngineError> {
    let id = parse(image)?;
    store.compress(&id, codec, cancel, &|_, _| {})?;
    faults::point("compress.framed");
    // Machines that map the raw form keep it through the kernel; one that is about to needs its name.
    if let Err(error) = store.drop_raw(id) {
        tracing::debug!(image, %error, "its raw form is dropped later");
    }
    faults::point("compress.dropped");
    learn(store, state, id)
}

/// Learns what is there of an image, and of those among its ancestors that are not known yet.
fn learn(store: &MemoryStore, state: &Mutex<State>, id: MemoryId) -> Result<(), EngineError> {
    let mut next = Some(id);
    while let Some(image) = next {
        let outline = match store.outline(image) {
            Ok(outline) => outline,
            // Whoever restores from it is told.
            Err(_) if image != id => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let mut state = lock(state);
        state.forms.insert(image, outline);
        if outline.raw && outline.frame_bytes.is_some() {
            state.drops.entry(image).or_default();
        }
        next = outline.parent.filter(|parent| !state.forms.contains(*parent));
    }
    Ok(())
}
