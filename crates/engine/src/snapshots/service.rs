//! The engine's calls about snapshots.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use bytes::Bytes;
use futures::Stream;
use hypeman_core::id::{Id, RANDOM_BYTES};
use hypeman_core::instance::{Command, InstanceState};
use hypeman_core::snapshot;
use hypeman_store::StoreError;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::export::SnapshotExport;
use super::model::{
    ForkOutcome, ForkRequest, RestoreRequest, ScheduleRecord, ScheduleRequest, Snapshot, SnapshotFilter,
    SnapshotRecord, SnapshotRequest, SnapshotUsage, StandbyRequest, VerifyProgress,
};
use super::summary::ListedSnapshot;
use crate::blocking::blocking;
use crate::instances::capture::{CapturePlan, Captured};
use crate::instances::disks::Thoroughness;
use crate::instances::rewind::Target;
use crate::instances::{Request, check_hypervisor, fork};
use crate::shared::Shared;
use crate::{Engine, EngineError, EventKind, Instance, clock, faults};

/// Forks that are made at the same time; each of them copies a disk and starts a VMM.
const FORKS_AT_ONCE: usize = 8;

impl Engine {
    /// Puts a running instance to standby; its state is durable when this returns.
    ///
    /// # Errors
    /// It does not run, or its state can't be kept; then it runs on.
    pub async fn standby_instance(
        &self,
        id: &str,
        request: StandbyRequest,
    ) -> Result<Arc<Instance>, EngineError> {
        self.ask(id, |reply| Request::Standby(request, reply)).await
    }

    /// Brings an instance back from standby.
    ///
    /// # Errors
    /// It is not in standby, or this host can't load its state; then it stays there.
    pub async fn restore_instance(&self, id: &str) -> Result<Arc<Instance>, EngineError> {
        let image = self.get_instance(id)?.record.image_digest.clone();
        check_root_disk(self.shared(), &image).await?;
        self.ask(id, Request::Restore).await
    }

    /// Forks an instance. One outcome for each fork, in order.
    ///
    /// # Errors
    /// The source or its state does not allow it; no fork was tried.
    pub async fn fork_instance(
        &self,
        id: &str,
        request: ForkRequest,
    ) -> Result<Vec<ForkOutcome>, EngineError> {
        let state = self.get_instance(id)?.state;
        let plan = CapturePlan::hidden(new_id()?);
        let command = Command::Fork {
            from_running: request.from_running,
        };
        // A bad target must not cost a capture; a state that cannot be forked is for the driver to refuse.
        let wanted = match snapshot::fork_target(state, request.target_state) {
            Ok(wanted) => Some(wanted.into()),
            Err(snapshot::TargetRefusal::NotATarget(refused)) if refused == state => None,
            Err(refusal) => return Err(refusal.into()),
        };
        snapshot::fork_names(&request.name, request.count)?;
        let captured = self.capture(id, command, plan).await?;
        let lease = self.shared().leases.take(&captured.record.id);
        // No row names it: its files go with the last reader.
        self.shared().leases.doom(&captured.record.id);
        let shared = Arc::clone(self.shared());
        self.detached(async move {
            let Captured { record, hold } = captured;
            let origin = record.parent.clone();
            let outcome = match target(&shared, &record, wanted, request.target_hypervisor).await {
                Ok(target) => fork_all(&shared, Arc::new(record), &request, target, origin).await,
                Err(error) => Err(error),
            };
            drop((lease, hold));
            outcome
        })
        .await
    }

    /// Captures an instance. A running one goes on.
    ///
    /// # Errors
    /// Its state does not allow this kind, the name is taken, or it can't be captured; it is as before.
    pub async fn create_snapshot(&self, id: &str, request: SnapshotRequest) -> Result<Snapshot, EngineError> {
        self.capture_snapshot(id, request, None).await
    }

    /// The same for a schedule.
    pub(crate) async fn capture_snapshot(
        &self,
        id: &str,
        request: SnapshotRequest,
        scheduled_for: Option<String>,
    ) -> Result<Snapshot, EngineError> {
        let instance = self.get_instance(id)?;
        let policy = instance.record.snapshot_policy.as_ref();
        let compression = snapshot::choose_compression(
            request.kind,
            request.compression,
            policy.and_then(|policy| policy.compression),
            self.shared().options.snapshots.compression_default,
        )?;
        let plan = CapturePlan {
            id: new_id()?,
            name: request.name,
            tags: request.tags,
            compression,
            scheduled_for,
        };
        let command = Command::Snapshot { kind: request.kind };
        let mut captured = self.capture(id, command, plan).await?;
        // By the clock that judges how old it is.
        captured.record.created_at = clock::now();
        let shared = Arc::clone(self.shared());
        self.detached(async move { commit(&shared, captured).await })
            .await
    }

    async fn capture(&self, id: &str, command: Command, plan: CapturePlan) -> Result<Captured, EngineError> {
        self.ask(id, |reply| Request::Capture {
            command,
            plan: Box::new(plan),
            reply,
        })
        .await
    }

    /// Gives an instance back what a snapshot of it holds.
    ///
    /// # Errors
    /// It runs, the snapshot is another instance's, or the host can't load it; then nothing has changed, or the
    /// instance is left short of the target state.
    pub async fn restore_snapshot(
        &self,
        instance: &str,
        snapshot: &str,
        request: RestoreRequest,
    ) -> Result<Arc<Instance>, EngineError> {
        let (record, lease) = self.leased(snapshot)?;
        if record.source.id != instance {
            return Err(EngineError::NotFound {
                kind: "snapshot of this instance",
                name: snapshot.to_owned(),
            });
        }
        let (state, hypervisor) = (request.target_state, request.target_hypervisor);
        let target = target(self.shared(), &record, state, hypervisor).await?;
        self.ask(instance, |reply| Request::Rewind {
            snapshot: record,
            lease,
            target,
            reply,
        })
        .await
    }

    /// Forks a snapshot. One outcome for each fork, in order.
    ///
    /// # Errors
    /// No such snapshot, or the target does not fit it; no fork was tried.
    pub async fn fork_snapshot(
        &self,
        id: &str,
        request: ForkRequest,
    ) -> Result<Vec<ForkOutcome>, EngineError> {
        let (record, lease) = self.leased(id)?;
        let shared = Arc::clone(self.shared());
        self.detached(async move {
            let (state, hypervisor) = (request.target_state, request.target_hypervisor);
            let target = target(&shared, &record, state, hypervisor).await?;
            let origin = Some(lease.id().to_owned());
            let outcome = fork_all(&shared, record, &request, target, origin).await;
            drop(lease);
            outcome
        })
        .await
    }

    /// Snapshots, newest first.
    ///
    /// # Errors
    /// The cursor is of no snapshot, or the store fails.
    pub async fn list_snapshots(&self, filter: SnapshotFilter) -> Result<Vec<ListedSnapshot>, EngineError> {
        let shared = Arc::clone(self.shared());
        let listed = tokio::task::spawn_blocking(move || super::rows::list(&shared, &filter)).await;
        listed.map_err(|error| EngineError::io("list snapshots", error.into()))?
    }

    /// One snapshot.
    ///
    /// # Errors
    /// No such id.
    pub async fn get_snapshot(&self, id: &str) -> Result<Snapshot, EngineError> {
        super::rows::get(self.shared(), id)
    }

    /// Removes a snapshot. What others share of it stays, as does what a machine still maps.
    ///
    /// # Errors
    /// No such id, or the store fails.
    pub async fn delete_snapshot(&self, id: &str) -> Result<(), EngineError> {
        let (shared, id) = (Arc::clone(self.shared()), id.to_owned());
        self.detached(async move { delete(&shared, &id).await }).await
    }

    /// Reads and checks all of a snapshot. Progress arrives until one with `done`; dropping the receiver ends it.
    ///
    /// # Errors
    /// No such id.
    pub async fn verify_snapshot(&self, id: &str) -> Result<mpsc::Receiver<VerifyProgress>, EngineError> {
        let (record, lease) = self.leased(id)?;
        Ok(super::verify::start(self.shared(), record, lease))
    }

    /// A snapshot as one file that another server can import. Returns with its first bytes; dropping it ends it.
    ///
    /// # Errors
    /// No such id, or a part is damaged.
    pub async fn export_snapshot(&self, id: &str) -> Result<SnapshotExport, EngineError> {
        let (record, lease) = self.leased(id)?;
        super::export::start(self.shared(), record, lease).await
    }

    /// Makes a snapshot of a file that [`Engine::export_snapshot`] wrote, here or elsewhere. `name` replaces the one
    /// in it. A body that ends early, or with an error, leaves nothing.
    ///
    /// # Errors
    /// The file is damaged or asks for more than this server allows or has room for, or the name is taken.
    pub async fn import_snapshot(
        &self,
        name: Option<String>,
        body: &mut (dyn Stream<Item = io::Result<Bytes>> + Send + Unpin),
    ) -> Result<Snapshot, EngineError> {
        let id = new_id()?;
        let (sender, pieces) = super::import::pipe();
        let shared = Arc::clone(self.shared());
        let work = self.detached(async move { super::import::import(&shared, id, name, pieces).await });
        // Whoever goes away takes the sender along, and the file is cut short.
        let (imported, ()) = tokio::join!(work, super::import::feed(body, sender));
        imported
    }

    /// What a snapshot costs.
    ///
    /// # Errors
    /// No such id, or its files can't be looked at.
    pub async fn snapshot_usage(&self, id: &str) -> Result<SnapshotUsage, EngineError> {
        let (record, _lease) = self.leased(id)?;
        super::verify::usage(self.shared(), &record).await
    }

    /// The schedule of an instance, also of one that is gone while its snapshots are not.
    ///
    /// # Errors
    /// There is none.
    pub async fn get_schedule(&self, instance: &str) -> Result<ScheduleRecord, EngineError> {
        super::schedules::get(self.shared(), instance)
    }

    /// Sets or changes the schedule of an instance.
    ///
    /// # Errors
    /// No such instance, or the store fails.
    pub async fn set_schedule(
        &self,
        instance: &str,
        request: ScheduleRequest,
    ) -> Result<ScheduleRecord, EngineError> {
        self.get_instance(instance)?;
        super::schedules::set(self.shared(), instance, request).await
    }

    /// Ends a schedule. Its snapshots stay.
    ///
    /// # Errors
    /// There is none.
    pub async fn delete_schedule(&self, instance: &str) -> Result<(), EngineError> {
        super::schedules::delete(self.shared(), instance).await
    }

    /// A snapshot and the right to read its files.
    fn leased(&self, id: &str) -> Result<(Snapshot, super::leases::Lease), EngineError> {
        let shared = self.shared();
        let mut lease = shared.leases.take(id);
        let record = super::rows::get(shared, id)?;
        let memory = record.memory.as_ref();
        lease.keep(memory.map(|memory| shared.vault.hold(&memory.image)));
        // A deletion gives the memory back only after the row is gone: held while there was a row, it stays.
        Ok((super::rows::get(shared, id)?, lease))
    }
}

fn new_id() -> Result<String, EngineError> {
    let random =
        crate::random::bytes::<RANDOM_BYTES>().map_err(|error| EngineError::io("random id", error))?;
    Ok(Id::from_random(&random).into_string())
}

/// What a snapshot is to become, if it can.
async fn target(
    shared: &Arc<Shared>,
    record: &SnapshotRecord,
    state: Option<InstanceState>,
    hypervisor: Option<hypeman_vmm::VmmKind>,
) -> Result<Target, EngineError> {
    let source = &record.source;
    let target = Target {
        state: snapshot::snapshot_target(record.kind, state)?.into(),
        hypervisor: snapshot::hypervisor_of(record.kind, source.hypervisor, hypervisor)?,
    };
    // Whether memory goes on here is found out with the memory. A disk is given to whatever was asked for.
    let boots = target.state == InstanceState::Running && !record.kind.has_memory();
    if hypervisor.is_some() || boots {
        let disk_io = source.disk_io_bytes_per_second;
        check_hypervisor(shared, target.hypervisor, source.hotplug_bytes, disk_io).await?;
    }
    check_root_disk(shared, &source.image_digest).await?;
    Ok(target)
}

/// Refuses to go on above a root disk that is not what was made of its image. It is read once since the host booted.
async fn check_root_disk(shared: &Arc<Shared>, image: &str) -> Result<(), EngineError> {
    let (shared, image) = (Arc::clone(shared), image.to_owned());
    blocking(move || {
        let never = AtomicBool::new(false);
        shared
            .images
            .check_root_disk(&image, Thoroughness::Once, &never)?;
        Ok(())
    })
    .await
}

async fn fork_all(
    shared: &Arc<Shared>,
    parts: Snapshot,
    request: &ForkRequest,
    target: Target,
    origin: Option<String>,
) -> Result<Vec<ForkOutcome>, EngineError> {
    let names = snapshot::fork_names(&request.name, request.count)?;
    let turns = Arc::new(tokio::sync::Semaphore::new(FORKS_AT_ONCE));
    let mut work = JoinSet::new();
    for (place, name) in names.iter().cloned().enumerate() {
        let (shared, parts, turns) = (Arc::clone(shared), Arc::clone(&parts), Arc::clone(&turns));
        let origin = origin.clone();
        work.spawn(async move {
            let _turn = turns.acquire().await;
            (place, fork::fork(&shared, parts, origin, name, target).await)
        });
    }
    let mut results: Vec<Option<Result<Arc<Instance>, EngineError>>> = names.iter().map(|_| None).collect();
    while let Some(done) = work.join_next().await {
        let (place, result) = done.map_err(|error| EngineError::io("fork", error.into()))?;
        if let Some(slot) = results.get_mut(place) {
            *slot = Some(result);
        }
    }
    Ok(names
        .into_iter()
        .zip(results)
        .map(|(name, result)| ForkOutcome {
            name,
            result: result.unwrap_or(Err(EngineError::ShuttingDown)),
        })
        .collect())
}

/// Names a capture by a row: from here on it is a snapshot.
pub(super) async fn commit(shared: &Arc<Shared>, captured: Captured) -> Result<Snapshot, EngineError> {
    let Captured { record, hold } = captured;
    let (id, name) = (record.id.clone(), record.name.clone());
    let committed = super::rows::insert(shared, record.clone()).await;
    if let Err(error) = committed {
        if let Some(files) = shared.leases.doom(&id) {
            let _ = tokio::task::spawn_blocking(move || crate::durable::remove_tree(&files)).await;
        }
        return Err(match (error, name) {
            (StoreError::Conflict(_), Some(name)) => EngineError::Conflict(format!(
                "a snapshot of this instance is already named {name:?}; choose another name or delete it first"
            )),
            (other, _) => other.into(),
        });
    }
    faults::point("snapshot.committed");
    shared.events.publish(EventKind::Snapshot, &id, "Created");
    shared.images.retain(&record.source.image_digest);
    if let Some(hold) = hold {
        hold.keep();
    }
    if let Some(memory) = &record.memory {
        shared.vault.want(memory, None, Some(&id));
    }
    super::rows::get(shared, &id)
}

async fn delete(shared: &Arc<Shared>, id: &str) -> Result<(), EngineError> {
    let record = super::rows::get(shared, id)?;
    faults::point("snapshot.delete.begun");
    if !super::rows::delete(shared, id).await? {
        return Err(EngineError::NotFound {
            kind: "snapshot",
            name: id.to_owned(),
        });
    }
    faults::point("snapshot.delete.unrecorded");
    shared.events.publish(EventKind::Snapshot, id, "Deleted");
    if let Some(memory) = &record.memory {
        shared.vault.forget(&memory.image, id);
    }
    if let Some(files) = shared.leases.doom(id) {
        let removed = tokio::task::spawn_blocking(move || crate::durable::remove_tree(&files)).await;
        if let Ok(Err(error)) = removed {
            tracing::warn!(snapshot = id, %error, "left for the next start");
        }
    }
    shared.images.release(&record.source.image_digest);
    shared.images.collect_unused(&record.source.image_digest).await;
    super::schedules::forget_orphan(shared, &record.source.id).await;
    Ok(())
}
