//! Giving an instance back what a snapshot of it holds.
//!
//! ```text
//!  all parts examined ─► disk copied under the next generation's name ─► device state linked ─► COMMIT ─► old files go
//!     └────────────── failure or crash: as before, new files are swept ──────────────────┘        └─► target state
//! ```
//!
//! Invariants:
//! - The instance's disk and memory are replaced by one commit; until then both old ones are whole.
//! - Nothing is given up for a snapshot that is damaged or does not fit this host.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use hypeman_core::instance::{Command, InstanceState, Lifecycle, permit};
use hypeman_vmm::VmmKind;
use tokio::task::JoinHandle;

use super::boot::kill;
use super::disks::{self, Thoroughness};
use super::driver::Driver;
use super::loadable::{Diligence, Loadable, Parts};
use super::model::{InstanceRecord, StandbyRecord};
use super::request::Operation;
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
        let ready = match self.look_over(snapshot, target).await {
            Ok(ready) => ready,
            Err(error) => {
                self.log.line(&format!("not restored: {error}"));
                return Err(error);
            }
        };
        // What is neither running nor stopped has a machine that cannot be used any more.
        if let Some(run) = &self.run {
            kill(&Arc::clone(&run.machine)).await?;
            self.finish_run(None).await;
        }
        let mut changed = rewound(&self.record, snapshot, target);
        let keeps_memory = target.state != InstanceState::Stopped;
        let taken = self.take_over(&changed, snapshot, keeps_memory).await?;
        changed.standby = taken.standby;
        taken.files.settled().await?;
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
                Lifecycle::Standby => self.restore(ready).await?,
                _ => self.boot(Operation::Start).await?,
            }
        }
        Ok(())
    }

    /// Makes sure of all that the instance is to become, before it gives up what it is.
    async fn look_over(
        &self,
        snapshot: &SnapshotRecord,
        target: Target,
    ) -> Result<Option<Loadable>, EngineError> {
        let keeps_memory = target.state != InstanceState::Stopped;
        let parts = Parts::of_snapshot(&self.shared.layout, snapshot).filter(|_| keeps_memory);
        self.check_disk(snapshot).await?;
        match parts {
            Some(parts) => {
                let wanted = rewound(&self.record, snapshot, target);
                self.examine(&wanted, &parts, Diligence::All).await.map(Some)
            }
            None => Ok(None),
        }
    }

    /// Refuses a snapshot whose disk is not what was captured.
    pub(super) async fn check_disk(&self, snapshot: &SnapshotRecord) -> Result<(), EngineError> {
        let disk = self
            .shared
            .layout
            .snapshot(&snapshot.id)
            .join(disks::SNAPSHOT_DISK);
        let expected = snapshot.disk_digest.clone();
        blocking(move || disks::check(&disk, &expected, Thoroughness::Once, &AtomicBool::new(false))).await
    }

    /// Makes the files of a snapshot, which was checked, this instance's own, under names that no committed record has
    /// yet, nor may have before they are settled.
    pub(super) async fn take_over(
        &self,
        record: &InstanceRecord,
        snapshot: &SnapshotRecord,
        keeps_memory: bool,
    ) -> Result<TakenOver, EngineError> {
        let layout = &self.shared.layout;
        let source = layout.snapshot(&snapshot.id);
        let overlay = layout.overlay(&record.id, record.disk_generation);
        // A former attempt may have left half a copy.
        let stale = overlay.clone();
        blocking(move || {
            durable::remove_tree(&stale).map_err(|error| EngineError::io("remove a former copy", error))
        })
        .await?;
        disks::copy(source.join(disks::SNAPSHOT_DISK), overlay.clone()).await?;
        let Some(memory) = snapshot.memory.as_ref().filter(|_| keeps_memory) else {
            return Ok(TakenOver {
                standby: None,
                files: Settling::begin(overlay, None),
            });
        };
        let name = format!(
            "standby-{}",
            crate::random::hex::<8>().map_err(|error| EngineError::io("random name", error))?
        );
        let directory = layout.standby(&record.id, &name);
        let shared = directory.clone();
        blocking(move || {
            make_private(&shared)?;
            state::share(&source, &shared)
        })
        .await?;
        Ok(TakenOver {
            standby: Some(StandbyRecord {
                directory: name,
                manifest: snapshot.manifest.clone(),
                memory: MemoryRecord { ..memory.clone() },
                foreign: true,
                compress_after: None,
            }),
            files: Settling::begin(overlay, Some(directory)),
        })
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

/// The parts of a snapshot under an instance's own names.
pub(super) struct TakenOver {
    /// What the instance is to go on from, where that is not its disk alone.
    pub(super) standby: Option<StandbyRecord>,
    /// Their way to the disk.
    pub(super) files: Settling,
}

/// Files that are being made durable, beside whatever else is to be done before a record names them.
pub(super) struct Settling(JoinHandle<Result<(), EngineError>>);

impl Settling {
    fn begin(overlay: PathBuf, state: Option<PathBuf>) -> Self {
        Self(tokio::task::spawn_blocking(move || {
            let names = state.as_deref().map_or(Ok(()), durable::sync_directory);
            names.map_err(|error| EngineError::io("store the device state", error))?;
            disks::sync_overlay(&overlay)
        }))
    }

    /// Returns when power loss takes nothing of them any more.
    pub(super) async fn settled(self) -> Result<(), EngineError> {
        let done = self.0.await;
        done.map_err(|error| EngineError::io("work on files", error.into()))?
    }
}

/// What an instance is after it was restored, but for its memory.
fn rewound(present: &InstanceRecord, snapshot: &SnapshotRecord, target: Target) -> InstanceRecord {
    InstanceRecord {
        disk_generation: present.disk_generation + 1,
        hypervisor: target.hypervisor,
        boot_artifacts: snapshot.source.boot_artifacts.clone(),
        entrypoint: snapshot.source.entrypoint.clone(),
        command: snapshot.source.command.clone(),
        origin: Some(snapshot.id.clone()),
        ..present.clone()
    }
}
