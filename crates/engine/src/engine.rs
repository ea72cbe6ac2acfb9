//! The engine as the server sees it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hypeman_core::instance::InstanceState;
use hypeman_guest_api::host::GuestClient;
use hypeman_images::{BlobStore, Digest};
use tokio::sync::oneshot;

use crate::capabilities::{self, HostCapabilities};
use crate::images::{CreateImage, Image, RegistryManifest};
use crate::instances::{
    self, CreateInstance, Instance, InstanceFilter, InstanceStats, InstanceUpdate, LogFollower, LogSource,
    Request, Slot, StartOverrides, WaitOutcome,
};
use crate::pagers::{self, PagerReport};
use crate::resources::{self, ResourceReport};
use crate::shared::Shared;
use crate::{EngineError, EngineOptions};

/// How often blobs and uploads that nobody needs are looked for.
const COLLECTION_INTERVAL: Duration = Duration::from_secs(3600);

/// One server's instances and images. All methods may be called concurrently.
#[derive(Debug)]
pub struct Engine {
    shared: Arc<Shared>,
}

impl Engine {
    /// Takes the data directory, finishes what a crash cut, and adopts what still runs. The API may answer when
    /// this returns.
    ///
    /// # Errors
    /// Another server holds the directory, or it can't be read or written.
    pub async fn open(options: EngineOptions) -> Result<Arc<Self>, EngineError> {
        let shared = Shared::open(options).await?;
        crate::snapshots::rows::recover(&shared)?;
        instances::recover(&shared).await?;
        shared.images.recover().await?;
        let engine = Arc::new(Self { shared });
        engine.start_housekeeping();
        let schedules = crate::snapshots::schedules::run_forever(Arc::clone(&engine));
        engine.shared.tasks.spawn(schedules);
        Ok(engine)
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    fn start_housekeeping(&self) {
        self.shared
            .tasks
            .spawn(crate::paging::watch(Arc::clone(&self.shared)));
        let shared = Arc::clone(&self.shared);
        self.shared.tasks.spawn(async move {
            // The first instance should not wait for this; what fails here is told to whoever creates one.
            if let Err(error) = shared.current_artifacts().await {
                tracing::warn!(%error, "no guest kernel yet");
            }
        });
        let shared = Arc::clone(&self.shared);
        self.shared
            .tasks
            .spawn(async move { shared.vault.sweep_forever().await });
        let shared = Arc::clone(&self.shared);
        self.shared
            .tasks
            .spawn(async move { shared.vault.compress_forever(&shared.events, &shared.table).await });
        let shared = Arc::clone(&self.shared);
        self.shared.tasks.spawn(async move {
            let closing = shared.closing.clone();
            let mut rotation = tokio::time::interval(shared.options.logs.rotate_interval);
            let mut growth = tokio::time::interval(instances::GROWTH_CHECK);
            growth.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            let mut collection = tokio::time::interval(COLLECTION_INTERVAL);
            loop {
                tokio::select! {
                    () = closing.cancelled() => return,
                    _ = rotation.tick() => {
                        for slot in shared.table.slots() {
                            // A driver that is busy looks at the next turn.
                            let _ = slot.requests.try_send(Request::RotateLogs);
                        }
                    }
                    _ = growth.tick() => {
                        for slot in instances::overgrown(&shared).await {
                            let _ = slot.requests.try_send(Request::RotateLogs);
                        }
                    }
                    _ = collection.tick() => if let Err(error) = shared.images.collect_blobs().await {
                        tracing::warn!(%error, "blob collection");
                    },
                }
            }
        });
    }

    /// Stops all tasks. Virtual machines run on and are adopted by the next server.
    pub async fn close(&self) {
        self.shared.closing.cancel();
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
    }

    /// What this host can do now.
    pub async fn capabilities(&self) -> HostCapabilities {
        capabilities::probe(&self.shared).await
    }

    /// How full this host is.
    ///
    /// # Errors
    /// The data disk can't be inspected.
    pub async fn resources(&self) -> Result<ResourceReport, EngineError> {
        resources::report(&self.shared).await
    }

    /// What the pagers do that serve memory of machines. One that does not answer is waited for only briefly.
    pub async fn pagers(&self) -> Vec<PagerReport> {
        pagers::report(&self.shared).await
    }

    /// Asks for an image; its digest is known when this returns, the rest happens in the background.
    ///
    /// # Errors
    /// The reference is bad, or the registry does not know it.
    pub async fn create_image(&self, request: CreateImage) -> Result<Image, EngineError> {
        let images = Arc::clone(&self.shared.images);
        self.detached(async move { images.create(request).await }).await
    }

    /// All images with these tags, by name.
    pub fn list_images(&self, tags: &BTreeMap<String, String>) -> Vec<Image> {
        self.shared.images.list(tags)
    }

    /// Finds an image by any form of its reference.
    ///
    /// # Errors
    /// Not a reference, or not here.
    pub fn get_image(&self, name: &str) -> Result<Image, EngineError> {
        self.shared.images.get(name)
    }

    /// Removes a reference; the content goes with the last one that nothing boots from.
    ///
    /// # Errors
    /// Not a reference, or not here.
    pub async fn delete_image(&self, name: &str) -> Result<(), EngineError> {
        let (images, name) = (Arc::clone(&self.shared.images), name.to_owned());
        self.detached(async move { images.delete(&name).await }).await
    }

    /// Gives an image that is ready another name.
    ///
    /// # Errors
    /// Not here, not ready, or the target is no reference with a tag.
    pub async fn tag_image(&self, name: &str, target: &str) -> Result<Image, EngineError> {
        let images = Arc::clone(&self.shared.images);
        let (name, target) = (name.to_owned(), target.to_owned());
        self.detached(async move { images.tag(&name, &target).await })
            .await
    }

    /// The blobs behind images and registry.
    pub fn blobs(&self) -> &BlobStore {
        self.shared.images.blobs()
    }

    /// Finds a manifest of the registry by tag or digest.
    ///
    /// # Errors
    /// The store fails.
    pub fn registry_manifest(
        &self,
        repository: &str,
        reference: &str,
    ) -> Result<Option<RegistryManifest>, EngineError> {
        self.shared.images.manifest(repository, reference)
    }

    /// Bytes of a blob, for a client that does not store it again when it is here: it then stays until a manifest names
    /// it, or for an hour. `None` when it is not here.
    ///
    /// # Errors
    /// The blob can't be looked at.
    pub async fn registry_promise_blob(&self, digest: &Digest) -> Result<Option<u64>, EngineError> {
        self.shared.images.promise_blob(digest).await
    }

    /// Accepts a manifest and starts to make an image of it, named `<host>/<repository>:<tag>`.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] with the registry's code `MANIFEST_INVALID` or `MANIFEST_BLOB_UNKNOWN`, with
    /// `invalid_name` when `host` is another registry's, or what parsing it says.
    pub async fn registry_put_manifest(
        &self,
        host: &str,
        repository: &str,
        reference: &str,
        media_type: &str,
        bytes: Bytes,
    ) -> Result<Digest, EngineError> {
        let images = Arc::clone(&self.shared.images);
        let [host, repository, reference, media_type] =
            [host, repository, reference, media_type].map(str::to_owned);
        self.detached(async move {
            images
                .put_manifest(&host, &repository, &reference, &media_type, bytes)
                .await
        })
        .await
    }

    /// Removes a tag, or a manifest with all its tags. `false` when there was none.
    ///
    /// # Errors
    /// The store fails.
    pub async fn registry_delete_manifest(
        &self,
        repository: &str,
        reference: &str,
    ) -> Result<bool, EngineError> {
        self.shared.images.delete_manifest(repository, reference).await
    }

    /// Tags of a repository, sorted; `None` for one that is unknown.
    ///
    /// # Errors
    /// The store fails.
    pub fn registry_tags(&self, repository: &str) -> Result<Option<Vec<String>>, EngineError> {
        self.shared.images.repository_tags(repository)
    }

    /// Id of the instance that `text` means: id, then name, then prefix of an id.
    ///
    /// # Errors
    /// None, or several.
    pub fn resolve_instance(&self, text: &str) -> Result<String, EngineError> {
        self.shared.table.resolve(text)
    }

    /// Instances as last published, by id.
    pub fn list_instances(&self, filter: &InstanceFilter) -> Vec<Arc<Instance>> {
        self.shared.table.list(filter)
    }

    /// Grows with each change of any published instance.
    pub fn instances_version(&self) -> u64 {
        self.shared.table.version()
    }

    /// An instance as last published.
    ///
    /// # Errors
    /// No such id.
    pub fn get_instance(&self, id: &str) -> Result<Arc<Instance>, EngineError> {
        Ok(self.shared.table.get(id)?.published.borrow().clone())
    }

    /// Creates an instance and boots it; returns when its VMM runs, usually while the guest still starts.
    ///
    /// # Errors
    /// The request, the image or the host does not allow it. Nothing is left behind.
    pub async fn create_instance(&self, request: CreateInstance) -> Result<Arc<Instance>, EngineError> {
        let shared = Arc::clone(&self.shared);
        self.detached(async move { instances::create(&shared, request).await })
            .await
    }

    /// Boots a stopped instance.
    ///
    /// # Errors
    /// It is not stopped, or the host does not allow it.
    pub async fn start_instance(
        &self,
        id: &str,
        overrides: StartOverrides,
    ) -> Result<Arc<Instance>, EngineError> {
        self.ask(id, |reply| Request::Start(overrides, reply)).await
    }

    /// Powers an instance off: politely, then by force.
    ///
    /// # Errors
    /// Nothing runs.
    pub async fn stop_instance(&self, id: &str) -> Result<Arc<Instance>, EngineError> {
        self.ask(id, Request::Stop).await
    }

    /// Changes what may change.
    ///
    /// # Errors
    /// The value is bad, or its time is over.
    pub async fn update_instance(
        &self,
        id: &str,
        update: InstanceUpdate,
    ) -> Result<Arc<Instance>, EngineError> {
        self.ask(id, |reply| Request::Update(update, reply)).await
    }

    /// Removes an instance for good.
    ///
    /// # Errors
    /// A step failed; the rest is finished by another call or the next start.
    pub async fn delete_instance(&self, id: &str, graceful: bool) -> Result<(), EngineError> {
        if !graceful {
            self.shared.table.get(id)?.hurry.notify_waiters();
        }
        self.ask(id, |reply| Request::Delete { graceful, reply }).await
    }

    /// Waits until the instance is in `target`, is settled in another state, or `timeout` is over.
    ///
    /// # Errors
    /// No such instance, also when it is deleted meanwhile.
    pub async fn wait_instance(
        &self,
        id: &str,
        target: InstanceState,
        timeout: Duration,
    ) -> Result<WaitOutcome, EngineError> {
        let mut published = self.shared.table.get(id)?.published.clone();
        let waiting = async {
            let settled = |instance: &Arc<Instance>| instance.state == target || instance.state.is_settled();
            published
                .wait_for(settled)
                .await
                .map(|instance| Arc::clone(&instance))
        };
        let (instance, timed_out) = match tokio::time::timeout(timeout, waiting).await {
            Ok(Ok(instance)) => (instance, false),
            Ok(Err(_)) if self.shared.closing.is_cancelled() => return Err(EngineError::ShuttingDown),
            Ok(Err(_)) => return Err(not_found(id)),
            Err(_) => (self.get_instance(id)?, true),
        };
        Ok(WaitOutcome {
            state: instance.state,
            state_error: instance.state_error.clone(),
            timed_out,
        })
    }

    /// The agent of a running instance.
    ///
    /// # Errors
    /// It is not running, or has no agent.
    pub fn guest(&self, id: &str) -> Result<GuestClient, EngineError> {
        let slot = self.shared.table.get(id)?;
        let instance = slot.published.borrow().clone();
        if instance.state != InstanceState::Running {
            let message = format!("instance must be running (current state: {})", instance.state);
            return Err(EngineError::InvalidState(message));
        }
        if instance.record.skip_guest_agent {
            return Err(EngineError::InvalidState(
                "the instance was created with skip_guest_agent".into(),
            ));
        }
        slot.live.client().ok_or_else(|| {
            EngineError::InvalidState("the guest agent is not connected; retry in a moment".into())
        })
    }

    /// Usage of an instance; zeros when nothing runs.
    ///
    /// # Errors
    /// No such instance.
    pub async fn instance_stats(&self, id: &str) -> Result<InstanceStats, EngineError> {
        let slot = self.shared.table.get(id)?;
        let record = Arc::clone(&slot.published.borrow().record);
        let mut stats = InstanceStats {
            allocated_vcpus: record.vcpus,
            allocated_memory_bytes: record.memory_bytes + record.hotplug_bytes,
            ..InstanceStats::default()
        };
        let Some(machine) = slot.live.machine() else {
            return Ok(stats);
        };
        // A process that ends meanwhile uses nothing.
        if let Ok(usage) = machine.stats() {
            stats.cpu_seconds = usage.cpu_seconds;
            stats.memory_rss_bytes = usage.memory_rss_bytes;
            stats.memory_vms_bytes = usage.memory_vms_bytes;
        }
        if let Some(network) = &record.network
            && let Ok(traffic) = self.shared.network().await?.stats(&network.tap)
        {
            stats.network_rx_bytes = traffic.rx_bytes;
            stats.network_tx_bytes = traffic.tx_bytes;
        }
        Ok(stats)
    }

    /// A log of an instance from its last `tail` lines on.
    ///
    /// # Errors
    /// No such instance, or the log was never written.
    pub async fn instance_logs(
        &self,
        id: &str,
        source: LogSource,
        tail: usize,
        follow: bool,
    ) -> Result<LogFollower, EngineError> {
        let slot = self.shared.table.get(id)?;
        let path = self.shared.layout.logs(&slot.id).join(source.file_name());
        let max_files = self.shared.options.logs.max_files;
        if !follow {
            return LogFollower::open(&path, max_files, tail, None).await;
        }
        let (mut published, closing) = (slot.published.clone(), self.shared.closing.clone());
        let gone = async move {
            while published.changed().await.is_ok() {}
            if closing.is_cancelled() {
                // The instance is still there, and another server will go on.
                std::future::pending().await
            }
        };
        LogFollower::open(
            &path,
            max_files,
            tail,
            Some((&self.shared.log_watcher, Box::pin(gone))),
        )
        .await
    }

    /// Carries work out to its end, also when the caller is dropped: a client that goes away must not leave
    /// anything half done.
    pub(crate) async fn detached<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, EngineError>> + Send + 'static,
    ) -> Result<T, EngineError> {
        let done = self.shared.tasks.spawn(work).await;
        done.map_err(|error| EngineError::io("carry out the request", error.into()))?
    }

    pub(crate) async fn ask<T>(
        &self,
        id: &str,
        request: impl FnOnce(oneshot::Sender<Result<T, EngineError>>) -> Request,
    ) -> Result<T, EngineError> {
        let slot: Arc<Slot> = self.shared.table.get(id)?;
        let (reply, answer) = oneshot::channel();
        let gone = || {
            if self.shared.closing.is_cancelled() {
                EngineError::ShuttingDown
            } else {
                not_found(id)
            }
        };
        slot.requests.send(request(reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

fn not_found(id: &str) -> EngineError {
    EngineError::NotFound {
        kind: "instance",
        name: id.to_owned(),
    }
}
