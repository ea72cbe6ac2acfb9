//! What all parts of the engine share: options, paths, stores, drivers, and the resources that instances hold.

use std::collections::{BTreeSet, HashMap};
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, PoisonError};

use hypeman_core::snapshot::choose_memory_compression;
use hypeman_kernel::{BootArtifacts, Kernels};
use hypeman_network::{Address, Network, NetworkError};
use hypeman_store::Store;
use hypeman_vmm::{Vmm, VmmKind, Vmms};
use tokio::sync::{OnceCell, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::durable::{DirectoryLock, lock_directory};
use crate::events::Events;
use crate::images::Catalog;
use crate::instances::{InstanceRecord, LogWatcher, Table};
use crate::layout::{Layout, make_private};
use crate::paging::Paging;
use crate::snapshots::CompressionChoice;
use crate::snapshots::leases::Leases;
use crate::snapshots::table::SnapshotTable;
use crate::snapshots::vault::Vault;
use crate::{EngineError, EngineOptions};

/// See [`Shared::transfers`].
const TRANSFERS: usize = 16;

/// What all parts of the engine share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) options: EngineOptions,
    pub(crate) layout: Layout,
    pub(crate) store: Store,
    pub(crate) table: Table,
    pub(crate) snapshots: SnapshotTable,
    pub(crate) log_watcher: LogWatcher,
    pub(crate) images: Arc<Catalog>,
    pub(crate) vmms: Vmms,
    pub(crate) vault: Vault,
    pub(crate) paging: Paging,
    pub(crate) leases: Leases,
    pub(crate) events: Events,
    pub(crate) tasks: TaskTracker,
    pub(crate) closing: CancellationToken,
    kernels: Kernels,
    artifacts: OnceCell<BootArtifacts>,
    known_artifacts: Mutex<HashMap<String, BootArtifacts>>,
    network: OnceCell<Network>,
    addresses: Mutex<BTreeSet<Ipv4Addr>>,
    /// VMMs that may start at the same time. Each takes one processor for some ten milliseconds: a little more than one
    /// for each keeps all busy, and more would all be late.
    pub(crate) launches: Semaphore,
    /// Restored guests that may find their way at the same time. Each needs a whole processor for it; where several
    /// share one they are so slow that timers take all that they get, and none arrives.
    pub(crate) welcomes: Semaphore,
    /// Exports and imports at the same time: each has a thread that waits for a client.
    pub(crate) transfers: Semaphore,
    _lock: DirectoryLock,
}

impl Shared {
    /// Takes the data directory and opens everything in it; nothing is recovered yet.
    ///
    /// # Errors
    /// Another server holds the directory, or it can't be read or written.
    pub(crate) async fn open(options: EngineOptions) -> Result<Arc<Self>, EngineError> {
        make_private(&options.data_directory)?;
        let lock = lock_directory(&options.data_directory.join("lock"))?;
        let layout = Layout::create(&options.data_directory)?;
        let store = Store::open(&layout.database())?;
        let (tasks, closing) = (TaskTracker::new(), CancellationToken::new());
        let images = Catalog::open(
            store.clone(),
            layout.clone(),
            options.images.clone(),
            options.limits,
            tasks.clone(),
            closing.clone(),
        )
        .await?;
        let kernels = Kernels::open(&layout.system(), options.kernel.clone())?;
        let vmms = Vmms::detect(options.vmm.clone());
        let vault = Vault::open(layout.memory(), closing.clone())?;
        let paging = Paging::open(&options.paging, &layout);
        let leases = Leases::new(layout.clone());
        Ok(Arc::new(Self {
            options,
            layout,
            store,
            table: Table::default(),
            snapshots: SnapshotTable::default(),
            log_watcher: LogWatcher::default(),
            images,
            vmms,
            vault,
            paging,
            leases,
            events: Events::new(closing.clone())?,
            tasks,
            closing,
            kernels,
            artifacts: OnceCell::new(),
            known_artifacts: Mutex::default(),
            network: OnceCell::new(),
            addresses: Mutex::default(),
            launches: Semaphore::new(2 + processors()),
            welcomes: Semaphore::new(processors()),
            transfers: Semaphore::new(TRANSFERS),
            _lock: lock,
        }))
    }

    /// What is decided about the compression of memory captured of this instance.
    pub(crate) fn compression(
        &self,
        record: &InstanceRecord,
        request: Option<CompressionChoice>,
    ) -> CompressionChoice {
        let policy = record.snapshot_policy.as_ref();
        let instance = policy.and_then(|policy| policy.compression);
        choose_memory_compression(request, instance, self.options.snapshots.compression_default)
    }

    pub(crate) fn vmm(&self, kind: VmmKind) -> Result<Arc<dyn Vmm>, EngineError> {
        self.vmms.get(kind).ok_or_else(|| {
            EngineError::invalid(
                "invalid_request",
                "this server does not drive this hypervisor; GET /capabilities lists what is available",
            )
        })
    }

    /// The bridge, set up at the first use.
    pub(crate) async fn network(&self) -> Result<&Network, EngineError> {
        Ok(self
            .network
            .get_or_try_init(|| Network::open(self.options.network.clone()))
            .await?)
    }

    /// Kernel and initramfs of new instances.
    pub(crate) async fn current_artifacts(&self) -> Result<BootArtifacts, EngineError> {
        let made = self.artifacts.get_or_try_init(|| async {
            let (kernels, program) = (self.kernels.clone(), self.options.guest_program.clone());
            tokio::task::spawn_blocking(move || kernels.prepare(&program))
                .await
                .map_err(|error| EngineError::io("prepare the guest kernel", error.into()))?
                .map_err(EngineError::from)
        });
        Ok(made.await?.clone())
    }

    /// Kernel and initramfs that an instance started with.
    pub(crate) async fn boot_artifacts(&self, id: &str) -> Result<BootArtifacts, EngineError> {
        match self.known_artifacts(id) {
            Some(artifacts) => Ok(artifacts),
            None => Ok(self.kernels.load(id)?),
        }
    }

    /// The same without an error: for cleaning up.
    pub(crate) fn known_artifacts(&self, id: &str) -> Option<BootArtifacts> {
        let mut known = self
            .known_artifacts
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(artifacts) = known.get(id) {
            return Some(artifacts.clone());
        }
        let artifacts = self.kernels.load(id).ok()?;
        known.insert(id.to_owned(), artifacts.clone());
        Some(artifacts)
    }

    /// Chooses an address and holds it, in one step.
    pub(crate) fn reserve_address(
        &self,
        choose: impl FnOnce(&BTreeSet<Ipv4Addr>) -> Result<Address, NetworkError>,
    ) -> Result<Address, EngineError> {
        let mut held = self.addresses.lock().unwrap_or_else(PoisonError::into_inner);
        let address = choose(&held)?;
        held.insert(address.ip);
        Ok(address)
    }

    pub(crate) fn hold_address(&self, record: &InstanceRecord) {
        if let Some(network) = &record.network {
            self.addresses
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(network.ip);
        }
    }

    /// Gives back what an instance holds besides its files: the address and its claim on the image.
    pub(crate) async fn release(&self, record: &InstanceRecord) {
        if let Some(network) = &record.network {
            self.addresses
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .remove(&network.ip);
        }
        self.images.release(&record.image_digest);
        self.images.collect_unused(&record.image_digest).await;
    }
}

fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get)
}
