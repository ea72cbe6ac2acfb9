//! A new instance out of captured parts: another identity on the same memory and disk.
//!
//! ```text
//!  record + journal ─► parts examined ─► disk copied, device state linked ─► target state ─► confirmed ─► COMMIT
//!     └──────────────────────── failure or crash: all of it goes, as if it had never been ──────────┘
//! ```
//!
//! Invariant: a fork counts only once its guest has confirmed who it is. Before that nobody can use it, the bridge
//! drops whatever it sends under its former address, and every end but success removes it.

use std::sync::Arc;

use hypeman_core::id::{Id, RANDOM_BYTES};
use hypeman_core::instance::{InstanceState, Lifecycle, PhaseClock};
use jiff::Timestamp;
use tokio::sync::oneshot;

use super::create;
use super::driver::{self, Driver};
use super::loadable::{Diligence, Parts};
use super::model::{Instance, InstanceRecord, NetworkRequest};
use super::request::{Operation, Request};
use super::rewind::Target;
use super::standby::Intent;
use crate::layout::make_private;
use crate::shared::Shared;
use crate::snapshots::Snapshot;
use crate::{EngineError, faults};

/// Makes one fork of `parts` and brings it to the target state. `origin` is the snapshot that it descends from.
pub(crate) async fn fork(
    shared: &Arc<Shared>,
    parts: Snapshot,
    origin: Option<String>,
    name: String,
    target: Target,
) -> Result<Arc<Instance>, EngineError> {
    if shared.table.has_name(&name) {
        return Err(EngineError::ForkNameConflict(name));
    }
    let random =
        crate::random::bytes::<RANDOM_BYTES>().map_err(|error| EngineError::io("random id", error))?;
    let id = Id::from_random(&random).into_string();
    let now = Timestamp::now();
    let network = match &parts.source.network {
        Some(network) => {
            let like = NetworkRequest {
                enabled: true,
                bandwidth_download: network.bandwidth_download,
                bandwidth_upload: network.bandwidth_upload,
            };
            Some(create::network_record(shared, &id, like).await?)
        }
        None => None,
    };
    let record = InstanceRecord {
        id,
        name,
        network,
        hypervisor: target.hypervisor,
        created_at: now,
        expires_at: None,
        started_at: None,
        stopped_at: None,
        exit: None,
        phases: PhaseClock::start(InstanceState::Created, now),
        run: None,
        standby: None,
        disk_generation: 0,
        origin,
        ..parts.source.clone()
    };
    shared.images.retain(&record.image_digest);
    if let Err(error) = create::commit(shared, record.clone(), EngineError::ForkNameConflict).await {
        shared.release(&record).await;
        return Err(error);
    }
    faults::point("fork.recorded");
    let (driver, requests) = driver::prepare(shared, record.clone(), Lifecycle::Created);
    let slot = Arc::clone(&driver.slot);
    if let Err(error) = shared.table.insert(Arc::clone(&slot)) {
        create::uncommit(shared, &record).await?;
        shared.release(&record).await;
        return Err(error);
    }
    driver.spawn(requests);
    let (reply, answer) = oneshot::channel();
    slot.requests
        .send(Request::Hatch {
            parts,
            target: target.state,
            reply,
        })
        .await
        .map_err(|_| EngineError::ShuttingDown)?;
    answer.await.map_err(|_| EngineError::ShuttingDown)?
}

impl Driver {
    /// The first steps of a fork, up to its target state. A failure removes it.
    pub(super) async fn hatch(&mut self, parts: &Snapshot, target: InstanceState) -> Result<(), EngineError> {
        let outcome = self.become_copy(parts, target).await;
        if let Err(error) = &outcome {
            tracing::warn!(instance = %self.record.id, %error, "fork failed: removing it");
            // The intent is still in the journal, or it would not be removed after a crash either.
            if let Err(left) = self.remove_hatched().await {
                tracing::error!(instance = %self.record.id, error = %left, "left for recovery");
            }
        }
        outcome
    }

    async fn become_copy(&mut self, parts: &Snapshot, target: InstanceState) -> Result<(), EngineError> {
        make_private(&self.shared.layout.instance(&self.record.id))?;
        make_private(&self.shared.layout.logs(&self.record.id))?;
        self.log.line(&format!("fork of {}", parts.source.name));
        let mut changed = self.record.clone();
        let keeps_memory = target != InstanceState::Stopped;
        self.check_disk(parts).await?;
        let state = Parts::of_snapshot(&self.shared.layout, parts).filter(|_| keeps_memory);
        let ready = match (&state, target) {
            (Some(state), InstanceState::Running) => {
                Some(self.examine(&self.record, state, Diligence::AsItComes).await?)
            }
            // Its memory is read when it goes on.
            (Some(state), _) => {
                self.fitting(&self.record, state).await?;
                None
            }
            (None, _) => None,
        };
        let taken = self.take_over(&changed, parts, keeps_memory).await?;
        changed.standby = taken.standby;
        faults::point("fork.copied");
        let lifecycle = match changed.standby {
            Some(_) => Lifecycle::Standby,
            None => Lifecycle::Stopped,
        };
        self.memory = changed
            .standby
            .as_ref()
            .map(|standby| self.shared.vault.hold(&standby.memory.image));
        changed.phases.enter(lifecycle.state(), Timestamp::now());
        self.record = changed;
        self.lifecycle = lifecycle;
        self.publish();
        let wakes = matches!(self.lifecycle, Lifecycle::Standby);
        match target {
            InstanceState::Running if !wakes => {
                taken.files.settled().await?;
                // Commits by itself.
                self.boot(Operation::Create).await?;
            }
            _ => {
                if target == InstanceState::Running {
                    self.wake(Intent::Creation, ready).await?;
                }
                // Power loss before the commit takes all of the fork: until here its files need be no safer.
                taken.files.settled().await?;
                self.store_outcome().await?;
            }
        }
        faults::point("fork.committed");
        Ok(())
    }

    async fn remove_hatched(&mut self) -> Result<(), EngineError> {
        if self.shared.table.get(&self.record.id).is_err() {
            return Ok(());
        }
        // Ended by the server itself, the run may have cleared the intent: it is recorded again.
        self.begin(Operation::Delete).await?;
        self.take_down(None).await?;
        self.run = None;
        self.slot.live.set_client(None);
        self.slot.live.set_machine(None);
        self.detach().await;
        self.forget().await
    }
}
