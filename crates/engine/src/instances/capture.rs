//! Taking a snapshot's parts from an instance, whatever its state, without changing it.
//!
//! ```text
//!  Running:  journal ─► hold, added memory back
//!                         └─► pause ─► devices, changed pages into RAM, disk copy begun ─► resume, let go
//!                             └──────────── the guest stands still ─────────────────┘         │
//!                     memory image, disk, manifest, while it runs again ─► journal cleared  ◄─┘
//!  Standby:  the memory image is shared, device state linked, disk copied
//!  Stopped:  disk copied
//! ```
//!
//! Invariants:
//! - Whatever fails, the source goes on as before: a paused machine is always resumed, later if not at once (see
//!   [`super::stranded`]).
//! - Memory, devices and disk belong to one instant: nothing runs between the first and the last of them
//!   (see [`super::instant`]).
//! - What is made here counts only once a row names it; a directory without one is swept at the next start.

use std::path::Path;
use std::sync::Arc;

use hypeman_core::instance::Lifecycle;
use hypeman_vmm::{CopyRoom, DiskCopies, DiskCopy, GuestMemory, Machine, StateIdentity};
use jiff::Timestamp;

use super::disks;
use super::driver::Driver;
use super::instant::{Moment, Order};
use super::request::Operation;
use crate::blocking::{blocking, blocking_io};
use crate::layout::make_private;
use crate::snapshots::state::{self, Facts};
use crate::snapshots::vault::{Frozen, Hold, Kept, Lineage};
use crate::snapshots::{CompressionChoice, CompressionState, MemoryRecord, SnapshotKind, SnapshotRecord};
use crate::{EngineError, durable, faults};

/// The overlay's place among the disks of a machine: after the root disk.
const OVERLAY_DISK: usize = 1;

/// What a capture is to become.
#[derive(Debug, Clone)]
pub(crate) struct CapturePlan {
    /// Id of the snapshot, new.
    pub(crate) id: String,
    /// Name, tags, kind and so on of the record.
    pub(crate) name: Option<String>,
    pub(crate) tags: std::collections::BTreeMap<String, String>,
    pub(crate) compression: CompressionChoice,
    pub(crate) scheduled_for: Option<String>,
}

impl CapturePlan {
    /// A capture that no row will name: the source of forks.
    pub(crate) fn hidden(id: String) -> Self {
        Self {
            id,
            name: None,
            tags: std::collections::BTreeMap::new(),
            compression: CompressionChoice::Off,
            scheduled_for: None,
        }
    }
}

/// A finished capture. Its memory stays as long as `hold` does, until a committed row names it.
#[derive(Debug)]
pub(crate) struct Captured {
    pub(crate) record: SnapshotRecord,
    pub(crate) hold: Option<Hold>,
}

/// What makes the pause short.
struct Prepared {
    memory: GuestMemory,
    room: CopyRoom,
    disk: Option<Box<dyn DiskCopies>>,
}

/// What was taken while the guest stood still.
struct Still {
    devices: Vec<u8>,
    memory: Frozen,
    disk: Option<Box<dyn DiskCopies>>,
}

impl Driver {
    /// Captures into the directory of the plan's snapshot.
    pub(super) async fn capture(&mut self, plan: CapturePlan) -> Result<Captured, EngineError> {
        let directory = self.shared.layout.snapshot(&plan.id);
        make_private(&directory)?;
        let outcome = match self.lifecycle {
            Lifecycle::Running => self.capture_running(&directory, &plan).await,
            Lifecycle::Standby => self.capture_standby(&directory, &plan).await,
            _ => self.copy_disk(&directory).await.map(|disk| {
                let record = self.snapshot_record(&plan, SnapshotKind::Stopped, None, disk, String::new());
                Captured { record, hold: None }
            }),
        };
        if outcome.is_err() {
            durable::discard(&directory);
        }
        outcome
    }

    async fn capture_running(
        &mut self,
        directory: &Path,
        plan: &CapturePlan,
    ) -> Result<Captured, EngineError> {
        let machine = match &self.run {
            Some(run) => Arc::clone(&run.machine),
            None => return Err(EngineError::InvalidState("the instance has no machine".into())),
        };
        let identity = self.state_identity(&machine).await?;
        let overlay = self
            .shared
            .layout
            .overlay(&self.record.id, self.record.disk_generation);
        let target = directory.join(disks::SNAPSHOT_DISK);
        self.begin(Operation::Capture).await?;
        faults::point("capture.recorded");
        let prepared = self.prepare(&machine, &overlay, &target).await;
        let began = std::time::Instant::now();
        let held = self.hold_still().await;
        faults::point("capture.held");
        let still = match prepared {
            Ok(prepared) => self.take(&machine, prepared, &overlay, &target).await,
            Err(error) => Err(error),
        };
        let held = self.note_cut(&machine, held);
        let resumed = machine.resume().await;
        faults::point("capture.resumed");
        match &resumed {
            Ok(()) => {
                self.give_memory().await;
                self.let_go(held).await;
            }
            Err(error) => {
                tracing::error!(instance = %self.record.id, %error, "not resumed");
                self.leave_still(held);
            }
        }
        let pause = began.elapsed();
        faults::point("capture.let_go");
        let finished = match (still, resumed) {
            (Ok(still), Ok(())) => {
                self.log.line(&format!(
                    "captured; the guest stood still for {:.1} ms",
                    pause.as_secs_f64() * 1e3
                ));
                self.keep(directory, plan, still, identity).await
            }
            (Err(error), _) => Err(error),
            (Ok(still), Err(error)) => {
                if let Some(copies) = still.disk {
                    copies.cancel().await;
                }
                Err(error.into())
            }
        };
        faults::point("capture.kept");
        self.clear_journal().await;
        finished
    }

    /// Whatever can be done before the guest stands still: room in RAM, and what a copy of the disk needs before its
    /// instant. Where blocks can be shared, that none of them is still to be written; else a copy that the VMM makes
    /// beside the guest's writes.
    async fn prepare(
        &self,
        machine: &Arc<dyn Machine>,
        overlay: &Path,
        target: &Path,
    ) -> Result<Prepared, EngineError> {
        let memory = machine.guest_memory().await?;
        let measured = memory.clone();
        let room = blocking_io("make room for guest memory", move || measured.room_for_copy()).await?;
        let disk = if disks::shares_blocks(&self.shared.layout.snapshots()).await? {
            disks::flush(overlay.to_owned()).await?;
            None
        } else {
            let copies = [DiskCopy {
                disk: OVERLAY_DISK,
                target: target.to_owned(),
            }];
            Some(machine.prepare_disk_copies(&copies).await?)
        };
        Ok(Prepared { memory, room, disk })
    }

    /// Takes back what memory was added, stops the guest and takes what must belong to one instant. The caller lets it go
    /// on, whatever comes of it.
    async fn take(
        &mut self,
        machine: &Arc<dyn Machine>,
        prepared: Prepared,
        overlay: &Path,
        target: &Path,
    ) -> Result<Still, EngineError> {
        let Prepared {
            memory,
            mut room,
            mut disk,
        } = prepared;
        if self.take_memory_back(machine).await? > 0 {
            // What the guest had in there is now in memory that is copied, and had no room yet.
            let measured = memory.clone();
            let widen = move || measured.widen_room(&mut room).map(|()| room);
            room = blocking_io("make room for guest memory", widen).await?;
        }
        faults::point("capture.given_back");
        machine.pause().await?;
        faults::point("capture.paused");
        let name = self.record.run.as_ref().and_then(|run| run.served.as_deref());
        let moment = Moment {
            save: async { machine.save_devices().await.map_err(EngineError::from) },
            keep: |devices: Vec<u8>| std::future::ready(Ok(devices)),
            settle: self.shared.paging.settle(name),
            memory: |served: bool| {
                blocking_io("copy guest memory", move || Frozen::copied(&memory, room, served))
            },
            disk: async {
                match disk.as_mut() {
                    Some(copies) => copies.begin().await.map_err(EngineError::from),
                    None => disks::reflink(overlay.to_owned(), target.to_owned()).await,
                }
            },
        };
        let taken = moment.take(Order::of(&**machine)).await;
        faults::point("capture.taken");
        let (devices, memory) = taken?;
        Ok(Still {
            devices,
            memory,
            disk,
        })
    }

    /// Makes what was taken durable, beside the guest that runs again.
    async fn keep(
        &mut self,
        directory: &Path,
        plan: &CapturePlan,
        still: Still,
        identity: StateIdentity,
    ) -> Result<Captured, EngineError> {
        let kept = self
            .shared
            .vault
            .keep(self.record.memory_bytes, self.lineage(), still.memory)
            .await;
        let kept = match (kept, still.disk) {
            (Ok(kept), Some(copies)) => copies.finish().await.map(|()| kept)?,
            (Ok(kept), None) => kept,
            (Err(error), copies) => {
                if let Some(copies) = copies {
                    copies.cancel().await;
                }
                return Err(error);
            }
        };
        self.last_image = Some(kept.image.clone());
        faults::point("capture.memory");
        let disk = disks::settle(directory.join(disks::SNAPSHOT_DISK)).await?;
        let facts = self.facts(identity, &kept);
        let (target, devices) = (directory.to_owned(), still.devices);
        let devices_bytes = devices.len() as u64;
        let manifest = blocking(move || state::write(&target, facts, &devices)).await?;
        let agent_key = self.record.run.as_ref().map(|run| run.agent_key.clone());
        let memory = MemoryRecord {
            image: kept.image.clone(),
            bytes: kept.content_bytes,
            compression: plan.compression,
            state: CompressionState::None,
            agent_key: agent_key.unwrap_or_default(),
        };
        let mut record = self.snapshot_record(plan, SnapshotKind::Standby, Some(memory), disk, manifest);
        record.size_bytes += devices_bytes;
        Ok(Captured {
            record,
            hold: Some(kept.hold),
        })
    }

    async fn capture_standby(
        &mut self,
        directory: &Path,
        plan: &CapturePlan,
    ) -> Result<Captured, EngineError> {
        let standby = self
            .record
            .standby
            .clone()
            .ok_or_else(|| EngineError::InvalidState("the instance has no kept memory".into()))?;
        let hold = self.shared.vault.hold(&standby.memory.image);
        let disk = self.copy_disk(directory).await?;
        let from = self.shared.layout.standby(&self.record.id, &standby.directory);
        let to = directory.to_owned();
        let devices_bytes = blocking(move || {
            state::share(&from, &to)?;
            state::sync_names(&to).map_err(|error| EngineError::io("store the device state", error))?;
            Ok(state::devices_bytes(&to))
        })
        .await?;
        let memory = MemoryRecord {
            compression: plan.compression,
            ..standby.memory
        };
        let kind = SnapshotKind::Standby;
        let mut record = self.snapshot_record(plan, kind, Some(memory), disk, standby.manifest);
        record.size_bytes += devices_bytes;
        Ok(Captured {
            record,
            hold: Some(hold),
        })
    }

    /// Copies the writable layer of an instance that does not run.
    async fn copy_disk(&self, directory: &Path) -> Result<disks::Settled, EngineError> {
        let overlay = self
            .shared
            .layout
            .overlay(&self.record.id, self.record.disk_generation);
        let target = directory.join(disks::SNAPSHOT_DISK);
        disks::copy(overlay, target.clone()).await?;
        disks::settle(target).await
    }

    /// What the memory of this machine is compared with.
    pub(super) fn lineage(&self) -> Lineage {
        Lineage {
            base: self.record.run.as_ref().and_then(|run| run.base.clone()),
            last: self.last_image.clone(),
        }
    }

    /// What a device state of this machine needs to be loaded again.
    pub(super) async fn state_identity(
        &self,
        machine: &Arc<dyn Machine>,
    ) -> Result<StateIdentity, EngineError> {
        if let Some(identity) = machine.state_identity() {
            return Ok(identity.clone());
        }
        // An earlier server did not write it down.
        let identities = self
            .shared
            .vmm(self.record.hypervisor)?
            .state_identities()
            .await?;
        identities
            .into_iter()
            .next()
            .ok_or_else(|| EngineError::InvalidState("its hypervisor cannot keep memory".into()))
    }

    /// What the manifest says of this machine.
    pub(super) fn facts(&self, identity: StateIdentity, kept: &Kept) -> Facts {
        Facts {
            hypervisor: self.record.hypervisor,
            identity,
            boot_artifacts: self.record.boot_artifacts.clone(),
            memory_bytes: self.record.memory_bytes,
            vcpus: self.record.vcpus,
            networked: self.record.network.is_some(),
            memory_image: kept.image.clone(),
            memory_digest: kept.digest.clone(),
        }
    }

    fn snapshot_record(
        &self,
        plan: &CapturePlan,
        kind: SnapshotKind,
        memory: Option<MemoryRecord>,
        disk: disks::Settled,
        manifest: String,
    ) -> SnapshotRecord {
        let mut source = self.record.clone();
        source.run = None;
        source.standby = None;
        SnapshotRecord {
            id: plan.id.clone(),
            name: plan.name.clone(),
            kind,
            tags: plan.tags.clone(),
            created_at: Timestamp::now(),
            parent: source.origin.clone(),
            source,
            scheduled_for: plan.scheduled_for.clone(),
            size_bytes: disk.bytes + memory.as_ref().map_or(0, |memory| memory.bytes),
            memory,
            disk_bytes: disk.bytes,
            disk_digest: disk.digest,
            manifest,
        }
    }
}
