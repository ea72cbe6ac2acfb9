//! Giving an instance back what a snapshot of it holds.
//!
//! ```text
//!  disk copied under the next generation's name ─► device state linked ─► COMMIT ─► old files go ─► target state
//!     └──────── failure or crash: as before, new files are swept ─────────┘
//! ```
//!
//! Invariant: the instance's disk and memory are replaced by one commit; until then both old ones are whole.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use hypeman_core::instance::{Command, InstanceState, Lifecycle, permit};
use hypeman_vmm::VmmKind;

use super::boot::kill;
use super::disks::{self, Thoroughness};
use super::driver::{Driver, Operation};
use super::model::{InstanceRecord, StandbyRecord};
use crate::blocking::blocking;
use crate::layout::make_private;
use crate::snapshots::state;
use crate::snapshots::{MemoryRecord, SnapshotRecord};
use crate::{EngineError, durable, faults};

/// Where a restored or forked instance is to end up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Target {
    /// `Running`, `Standby` or `Stopped`.
    pub(crate) state: InstanceState,
    /// The captured one, or, without memory, another.
    pub(crate) hypervisor: VmmKind,
}

impl Driver {
    /// Becomes what the snapshot holds, then goes to the target state.
    pub(super) async fn rewind(
        &mut self,
        snapshot: &SnapshotRecord,
        target: Target,
    ) -> Result<(), EngineError> {
        permit(&self.lifecycle, Command::RestoreSnapshot)?;
        self.log.line(&format!("restoring snapshot {}", snapshot.id));
        // What is neither running nor stopped has a machine that cannot be used any more.
        if let Some(run) = &self.run {
            kill(&Arc::clone(&run.machine)).await?;
            self.finish_run(None).await;
        }
        let mut changed = self.record.clone();
        changed.disk_generation += 1;
        changed.hypervisor = target.hypervisor;
        changed.boot_artifacts.clone_from(&snapshot.source.boot_artifacts);
        changed.entrypoint.clone_from(&snapshot.source.entrypoint);
        changed.command.clone_from(&snapshot.source.command);
        changed.origin = Some(snapshot.id.clone());
        let keeps_memory = target.state != InstanceState::Stopped;
        changed.standby = self.take_over(&changed, snapshot, keeps_memory).await?;
        faults::point("rewind.copied");
        let lifecycle = match changed.standby {
            Some(_) => Lifecycle::Standby,
            None => Lifecycle::Stopped,
        };
        let hold = changed
            .standby
            .as_ref()
            .map(|standby| self.shared.vault.hold(&standby.memory.image));
        changed.exit = None;
        changed.phases.enter(lifecycle.state(), jiff::Timestamp::now());
        let former = self.record.clone();
        self.commit(changed).await?;
        faults::point("rewind.committed");
        self.lifecycle = lifecycle;
        self.memory = hold;
        self.publish();
        self.remove_former(&former).await;
        if target.state == InstanceState::Running {
            match self.lifecycle {
                Lifecycle::Standby => self.restore().await?,
                _ => self.boot(Operation::Start).await?,
            }
        }
        Ok(())
    }

    /// Makes the files of a snapshot this instance's own, under names that no committed record has yet.
    pub(super) async fn take_over(
        &self,
        record: &InstanceRecord,
        snapshot: &SnapshotRecord,
        keeps_memory: bool,
    ) -> Result<Option<StandbyRecord>, EngineError> {
        let layout = &self.shared.layout;
        let source = layout.snapshot(&snapshot.id);
        let overlay = layout.overlay(&record.id, record.disk_generation);
        // A former attempt may have left half a copy.
        let stale = overlay.clone();
        blocking(move || {
            durable::remove_tree(&stale).map_err(|error| EngineError::io("remove a former copy", error))
        })
        .await?;
        let disk = source.join(disks::SNAPSHOT_DISK);
        let (captured, expected) = (disk.clone(), snapshot.disk_digest.clone());
        blocking(move || disks::check(&captured, &expected, Thoroughness::Once, &AtomicBool::new(false)))
            .await?;
        disks::copy(disk, overlay).await?;
        let Some(memory) = snapshot.memory.as_ref().filter(|_| keeps_memory) else {
            return Ok(None);
        };
        let name = format!(
            "standby-{}",
            crate::random::hex::<8>().map_err(|error| EngineError::io("random name", error))?
        );
        let directory = layout.standby(&record.id, &name);
        blocking(move || {
            make_private(&directory)?;
            state::share(&source, &directory)
        })
        .await?;
        Ok(Some(StandbyRecord {
            directory: name,
            manifest: snapshot.manifest.clone(),
            memory: MemoryRecord { ..memory.clone() },
            foreign: true,
            compress_after: None,
        }))
    }

    /// Removes the files that only the former record named. What fails is swept at the next start.
    async fn remove_former(&self, former: &InstanceRecord) {
        let layout = &self.shared.layout;
        let mut paths = vec![layout.overlay(&former.id, former.disk_generation)];
        if let Some(standby) = &former.standby {
            paths.push(layout.standby(&former.id, &standby.directory));
        }
        let removed = blocking(move || {
            for path in paths {
                durable::remove_tree(&path).map_err(|error| EngineError::io("remove former files", error))?;
            }
            Ok(())
        });
        if let Err(error) = removed.await {
            tracing::warn!(instance = former.id, %error, "left for the next start");
        }
    }
}
