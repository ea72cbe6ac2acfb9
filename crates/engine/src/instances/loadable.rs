//! Whether a captured state can go on here: all that can be known before anything is started of it, or given up for it.
//!
//! ```text
//!  manifest, devices ─┐
//!  VMM, processor    ─┼─ does it fit? ─┐
//!  kernel            ─┘                ├──► Loadable ──► a machine
//!  memory ─────────────── is it whole? ┘
//!               no: damaged or incompatible, and nothing has changed
//! ```
//!
//! Invariant: machines are made of what was examined here, and nothing is given up for a state before it was.

use std::path::PathBuf;

use hypeman_kernel::{BootArtifacts, KernelError};
use hypeman_vmm::{MemoryBacking, Patch, StateIdentity, VmmError};

use super::driver::Driver;
use super::model::{InstanceRecord, StandbyRecord};
use crate::EngineError;
use crate::blocking::blocking;
use crate::layout::{Layout, make_private};
use crate::paging::Serving;
use crate::shared::Shared;
use crate::snapshots::SnapshotRecord;
use crate::snapshots::state::{self, Present};
use crate::snapshots::vault::{self, LaidOut};

/// Where a captured state is, and what is recorded of it.
pub(super) struct Parts {
    /// Holds manifest and devices.
    directory: PathBuf,
    /// Digest of the manifest.
    manifest: String,
    /// Memory image.
    image: String,
}

impl Parts {
    /// Those of a snapshot; `None` without memory.
    pub(super) fn of_snapshot(layout: &Layout, snapshot: &SnapshotRecord) -> Option<Self> {
        let memory = snapshot.memory.as_ref()?;
        Some(Self {
            directory: layout.snapshot(&snapshot.id),
            manifest: snapshot.manifest.clone(),
            image: memory.image.clone(),
        })
    }

    /// Those of an instance in standby.
    pub(super) fn of_standby(layout: &Layout, instance: &str, standby: &StandbyRecord) -> Self {
        Self {
            directory: layout.standby(instance, &standby.directory),
            manifest: standby.manifest.clone(),
            image: standby.memory.image.clone(),
        }
    }
}

/// How much of the memory is read before it counts as whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Diligence {
    /// What has to be laid out; pages that come later are checked when they do.
    AsItComes,
    /// Each byte that was not since the host booted.
    All,
}

/// Manifest and devices that belong to this host.
pub(super) struct Fitting {
    identity: StateIdentity,
    devices: Vec<u8>,
    artifacts: BootArtifacts,
    memory_digest: String,
}

/// A captured state that is whole and fits. It keeps its memory in place.
pub(super) struct Loadable {
    pub(super) identity: StateIdentity,
    pub(super) devices: Vec<u8>,
    pub(super) artifacts: BootArtifacts,
    pub(super) memory: Memory,
}

impl Driver {
    /// Whether `record` could go on from a captured state. Has no effect.
    ///
    /// # Errors
    /// A part is damaged, or this host or the instance is another one than the state needs.
    pub(super) async fn examine(
        &self,
        record: &InstanceRecord,
        parts: &Parts,
        diligence: Diligence,
    ) -> Result<Loadable, EngineError> {
        // Together they take as long as the longest. Both to their end: memory that is being expanded would be there a
        // little longer than the refusal, for whoever asks next.
        let (fitting, memory) = tokio::join!(
            self.fitting(record, parts),
            self.memory_of(record, &parts.image, diligence),
        );
        let (fitting, (memory, digest)) = (fitting?, memory?);
        if fitting.memory_digest != digest {
            return Err(EngineError::damaged("the memory image"));
        }
        Ok(Loadable {
            identity: fitting.identity,
            devices: fitting.devices,
            artifacts: fitting.artifacts,
            memory,
        })
    }

    /// The part of it that costs next to nothing: all but the memory.
    ///
    /// # Errors
    /// As [`Driver::examine`].
    pub(super) async fn fitting(
        &self,
        record: &InstanceRecord,
        parts: &Parts,
    ) -> Result<Fitting, EngineError> {
        let shared = &self.shared;
        let vmm = shared.vmm(record.hypervisor)?;
        let (directory, digest) = (parts.directory.clone(), parts.manifest.clone());
        let identities = async {
            vmm.state_identities().await.map_err(|error| match error {
                VmmError::Unavailable(reason) => {
                    EngineError::Incompatible(state::without_vmm(record.hypervisor, &reason))
                }
                other => other.into(),
            })
        };
        let ((manifest, devices), identities, artifacts) = tokio::try_join!(
            blocking(move || state::read(&directory, &digest)),
            identities,
            kept_kernel(shared, &record.boot_artifacts),
        )?;
        let present = Present {
            hypervisor: record.hypervisor,
            identities: &identities,
            boot_artifacts: &record.boot_artifacts,
            memory_bytes: record.memory_bytes,
            vcpus: record.vcpus,
            networked: record.network.is_some(),
        };
        if let Some(reason) = state::mismatch(&manifest.facts, &present) {
            return Err(EngineError::Incompatible(reason));
        }
        Ok(Fitting {
            identity: manifest.facts.identity,
            devices,
            artifacts,
            memory_digest: manifest.facts.memory_digest,
        })
    }

    /// Lays out the memory of a machine, or has it served where that is better; with the digest that commits to it.
    async fn memory_of(
        &self,
        record: &InstanceRecord,
        image: &str,
        diligence: Diligence,
    ) -> Result<(Memory, String), EngineError> {
        let shared = &self.shared;
        // Served pages are checked one by one while the guest runs. That is too late for whoever has nothing else.
        if diligence == Diligence::AsItComes && shared.paging.can_serve(record.hypervisor) {
            let (to_expand, digest) = shared.vault.look_at(image).await?;
            if shared.paging.wants(to_expand) {
                let runtime = shared.layout.instance_runtime(&record.id);
                make_private(&runtime)?;
                let (id, bytes) = (vault::parse(image)?, record.memory_bytes);
                if let Some(served) = shared.paging.serve(&record.id, id, bytes, &runtime).await? {
                    return Ok((Memory::Served(served), digest));
                }
            }
        }
        let laid_out = shared.vault.materialize(image).await?;
        if diligence == Diligence::All {
            laid_out.read_patch().await?;
        }
        let digest = laid_out.digest().to_owned();
        Ok((Memory::LaidOut(laid_out), digest))
    }
}

/// Where the memory of a machine comes from while it starts.
pub(super) enum Memory {
    LaidOut(LaidOut),
    Served(Serving),
}

impl Memory {
    pub(super) fn backing(&self) -> MemoryBacking {
        match self {
            Self::LaidOut(memory) => MemoryBacking::Private(memory.base_path()),
            Self::Served(serving) => MemoryBacking::Served(serving.socket.clone()),
        }
    }

    pub(super) fn patch(&self) -> Option<Patch> {
        match self {
            Self::LaidOut(memory) => memory.patch(),
            Self::Served(_) => None,
        }
    }

    /// Completes with the reason when the machine waits for memory that nobody gives.
    pub(super) async fn failed(&self) -> String {
        match self {
            Self::LaidOut(_) => std::future::pending().await,
            Self::Served(serving) => serving.failed().await,
        }
    }

    /// Its name at the pager.
    pub(super) fn name(&self) -> Option<String> {
        match self {
            Self::LaidOut(_) => None,
            Self::Served(serving) => Some(serving.name.clone()),
        }
    }

    /// The machine has it.
    pub(super) fn keep(self) {
        if let Self::Served(serving) = self {
            serving.keep();
        }
    }
}

/// The kernel that runs in captured memory: no other will do.
async fn kept_kernel(shared: &Shared, id: &str) -> Result<BootArtifacts, EngineError> {
    match shared.boot_artifacts(id).await {
        // What was captured elsewhere may need the one that is not yet prepared here.
        Err(EngineError::Kernel(KernelError::UnknownId(_))) => {}
        artifacts => return artifacts,
    }
    match shared.current_artifacts().await {
        Ok(current) if current.id == id => Ok(current),
        _ => Err(EngineError::Incompatible(
            "it was captured with a guest kernel that this host does not have; restore it on one that has it, or \
             use a Stopped snapshot"
                .to_owned(),
        )),
    }
}
