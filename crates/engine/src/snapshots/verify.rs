//! Reading all of a snapshot to see that it is what was stored, and what it costs.
//!
//! Damage is only what was read and is wrong, or is not there at all. What the host could not read, or was kept from
//! reading, says nothing of the snapshot.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use hypeman_snapshots::Error as StoreError;
use tokio::sync::mpsc;

use super::leases::Lease;
use super::model::{Snapshot, SnapshotUsage, VerifyOutcome, VerifyProgress};
use super::state;
use crate::blocking::blocking;
use crate::instances::disks::{self, Thoroughness};
use crate::shared::Shared;
use crate::{EngineError, snapshots::vault};

/// Reports that may wait for a slow listener; more are left out.
const PROGRESS: usize = 16;

/// Said of a root disk that was made before its seal was recorded.
const UNSEALED: &str =
    "the root disk: nothing says what its image was when it was made; pull the image again";

/// Starts to verify. Ends when the receiver is dropped.
pub(super) fn start(shared: &Arc<Shared>, record: Snapshot, lease: Lease) -> mpsc::Receiver<VerifyProgress> {
    let (reports, receiver) = mpsc::channel(PROGRESS);
    let tasks = shared.tasks.clone();
    let check = Arc::new(Check {
        shared: Arc::clone(shared),
        record,
        reports,
        cancel: AtomicBool::new(false),
        done: AtomicU64::new(0),
        total: AtomicU64::new(0),
    });
    tasks.spawn(async move {
        let working = Arc::clone(&check);
        let work = blocking(move || working.verify());
        tokio::pin!(work);
        let outcome = tokio::select! {
            outcome = &mut work => outcome,
            () = check.reports.closed() => check.called_off(work).await,
            () = check.shared.closing.cancelled() => check.called_off(work).await,
        };
        let last = check.progress(Some(outcome.unwrap_or_else(|error| judge(&error))));
        let _ = check.reports.send(last).await;
        drop(lease);
    });
    receiver
}

/// What an error says of the snapshot.
fn judge(error: &EngineError) -> VerifyOutcome {
    let missing = |source: &io::Error| source.kind() == io::ErrorKind::NotFound;
    match error {
        EngineError::Memory(StoreError::Cancelled) | EngineError::ShuttingDown => VerifyOutcome::Cancelled,
        EngineError::Damaged(_) | EngineError::Memory(StoreError::NotFound(_)) => {
            VerifyOutcome::Damaged(error.to_string())
        }
        EngineError::Memory(StoreError::Io { source, .. }) | EngineError::Io { source, .. }
            if missing(source) =>
        {
            VerifyOutcome::Damaged(error.to_string())
        }
        _ => VerifyOutcome::Unreadable(error.to_string()),
    }
}

/// One verification.
struct Check {
    shared: Arc<Shared>,
    record: Snapshot,
    reports: mpsc::Sender<VerifyProgress>,
    cancel: AtomicBool,
    done: AtomicU64,
    total: AtomicU64,
}

impl Check {
    /// Ends the work early.
    async fn called_off(
        &self,
        work: impl Future<Output = Result<VerifyOutcome, EngineError>>,
    ) -> Result<VerifyOutcome, EngineError> {
        self.cancel.store(true, Ordering::Release);
        work.await
    }

    fn progress(&self, outcome: Option<VerifyOutcome>) -> VerifyProgress {
        let total = self.total.load(Ordering::Relaxed);
        VerifyProgress {
            verified_bytes: self.done.load(Ordering::Relaxed).min(total),
            total_bytes: total,
            outcome,
        }
    }

    /// Notes bytes that are right, in all, and tells whoever listens.
    fn tell(&self, done: u64) {
        self.done.fetch_max(done, Ordering::Relaxed);
        let _ = self.reports.try_send(self.progress(None));
    }

    fn verify(&self) -> Result<VerifyOutcome, EngineError> {
        let (shared, record) = (&self.shared, &self.record);
        let image = record
            .memory
            .as_ref()
            .map(|memory| vault::parse(&memory.image))
            .transpose()?;
        let store = shared.vault.store();
        let root_disk = shared.layout.root_disk(&record.source.image_digest);
        // Of what is not there, its check says so.
        let root_bytes = std::fs::metadata(&root_disk).map_or(0, |metadata| metadata.len());
        let memory_bytes = image.map_or(0, |image| store.verify_bytes(&image).unwrap_or(0));
        let mut done = record.disk_bytes + root_bytes;
        self.total.store(done + memory_bytes, Ordering::Relaxed);

        let directory = shared.layout.snapshot(&record.id);
        let disk = directory.join(disks::SNAPSHOT_DISK);
        disks::check(&disk, &record.disk_digest, Thoroughness::Always, &self.cancel)?;
        self.tell(record.disk_bytes);
        let sealed =
            shared
                .images
                .check_root_disk(&record.source.image_digest, Thoroughness::Always, &self.cancel)?;
        if !sealed {
            done -= root_bytes;
            self.total.store(done + memory_bytes, Ordering::Relaxed);
        }
        self.tell(done);
        if let Some(image) = image {
            state::read(&directory, &record.manifest)?;
            let progress = |bytes: u64, _total: u64| self.tell(done + bytes);
            let verified = store.verify(&image, &self.cancel, &progress)?;
            done += verified.bytes;
            // A form may have come or gone since they were counted.
            self.total.store(done, Ordering::Relaxed);
            self.done.store(done, Ordering::Relaxed);
        }
        Ok(VerifyOutcome::Intact {
            unchecked: (!sealed).then(|| UNSEALED.to_owned()),
        })
    }
}

/// What the snapshot costs, and what of it is shared.
pub(super) async fn usage(shared: &Arc<Shared>, record: &Snapshot) -> Result<SnapshotUsage, EngineError> {
    let (shared, record) = (Arc::clone(shared), Arc::clone(record));
    blocking(move || {
        let files = disks::stored_bytes(&shared.layout.snapshot(&record.id));
        let memory = match &record.memory {
            Some(memory) => shared.vault.usage(&memory.image)?,
            None => SnapshotUsage::default(),
        };
        Ok(SnapshotUsage {
            own_bytes: files.own + memory.own_bytes,
            shared_bytes: files.shared + memory.shared_bytes,
            freed_by_delete_bytes: files.own + memory.freed_by_delete_bytes,
        })
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_wrong_or_missing_is_damage() {
        let store = |kind: io::ErrorKind| {
            EngineError::Memory(StoreError::Io {
                action: "read",
                path: "memory.raw".into(),
                source: kind.into(),
            })
        };
        let damaged = [
            EngineError::damaged("the disk"),
            store(io::ErrorKind::NotFound),
            EngineError::io("read the manifest", io::ErrorKind::NotFound.into()),
        ];
        for error in &damaged {
            assert_eq!(judge(error), VerifyOutcome::Damaged(error.to_string()));
        }
        let unreadable = [
            store(io::ErrorKind::PermissionDenied),
            EngineError::io("read the manifest", io::Error::from_raw_os_error(5)),
            EngineError::Incompatible("another format".into()),
        ];
        for error in &unreadable {
            assert_eq!(judge(error), VerifyOutcome::Unreadable(error.to_string()));
        }
        let cancelled = EngineError::Memory(StoreError::Cancelled);
        assert_eq!(judge(&cancelled), VerifyOutcome::Cancelled);
    }
}
