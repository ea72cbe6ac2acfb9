//! Reading all of a snapshot to see that it is what was stored, and what it costs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::mpsc;

use super::leases::Lease;
use super::model::{Snapshot, SnapshotUsage, VerifyProgress};
use super::state;
use crate::blocking::blocking;
use crate::instances::disks::{self, Thoroughness};
use crate::shared::Shared;
use crate::{EngineError, snapshots::vault};

/// Reports that may wait for a slow listener; more are left out.
const PROGRESS: usize = 16;

/// Starts to verify. Ends when the receiver is dropped.
pub(super) fn start(shared: &Arc<Shared>, record: Snapshot, lease: Lease) -> mpsc::Receiver<VerifyProgress> {
    let (reports, receiver) = mpsc::channel(PROGRESS);
    let shared = Arc::clone(shared);
    let tasks = shared.tasks.clone();
    tasks.spawn(async move {
        let cancel = Arc::new(AtomicBool::new(false));
        let total = record.size_bytes;
        let (check, watched, progress) = (Arc::clone(&shared), Arc::clone(&cancel), reports.clone());
        let checked = Arc::clone(&record);
        let working = blocking(move || {
            let tell = |done: u64| {
                let _ = progress.try_send(VerifyProgress {
                    verified_bytes: done.min(total),
                    total_bytes: total,
                    done: false,
                    damage: None,
                });
            };
            verify(&check, &checked, &watched, &tell)
        });
        tokio::pin!(working);
        let outcome = tokio::select! {
            outcome = &mut working => outcome,
            () = reports.closed() => {
                cancel.store(true, Ordering::Release);
                working.await
            }
            () = shared.closing.cancelled() => {
                cancel.store(true, Ordering::Release);
                working.await
            }
        };
        let damage = outcome.err().map(|error| error.to_string());
        let last = VerifyProgress {
            verified_bytes: if damage.is_none() { total } else { 0 },
            total_bytes: total,
            done: true,
            damage,
        };
        let _ = reports.send(last).await;
        drop(lease);
    });
    receiver
}

fn verify(
    shared: &Shared,
    record: &Snapshot,
    cancel: &AtomicBool,
    tell: &(dyn Fn(u64) + Sync),
) -> Result<(), EngineError> {
    let directory = shared.layout.snapshot(&record.id);
    let disk = directory.join(disks::SNAPSHOT_DISK);
    disks::check(&disk, &record.disk_digest, Thoroughness::Always, cancel)?;
    tell(record.disk_bytes);
    let Some(memory) = &record.memory else {
        return Ok(());
    };
    state::read(&directory, &record.manifest)?;
    let disk_bytes = record.disk_bytes;
    let progress = |done: u64, _total: u64| tell(disk_bytes + done);
    let image = vault::parse(&memory.image)?;
    shared.vault.store().verify(&image, cancel, &progress)?;
    Ok(())
}

/// What the snapshot costs, and what of it is shared.
pub(super) async fn usage(shared: &Arc<Shared>, record: &Snapshot) -> Result<SnapshotUsage, EngineError> {
    let (shared, record) = (Arc::clone(shared), Arc::clone(record));
    blocking(move || {
        let directory = shared.layout.snapshot(&record.id);
        let own = disks::stored_bytes(&directory);
        let memory = match &record.memory {
            Some(memory) => shared.vault.usage(&memory.image)?,
            None => SnapshotUsage::default(),
        };
        Ok(SnapshotUsage {
            own_bytes: own + memory.own_bytes,
            shared_bytes: memory.shared_bytes,
            freed_by_delete_bytes: own + memory.freed_by_delete_bytes,
        })
    })
    .await
}
