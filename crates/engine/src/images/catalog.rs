//! The images of the server: an index in memory over what is stored.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hypeman_images::{
    BlobStore, BlobStoreOptions, ClientOptions, Credentials, ImageError, Platform, Reference, RegistryClient,
    RetryPolicy,
};
use hypeman_store::Store;
use jiff::Timestamp;
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::job::Progress;
use super::model::{Content, CreateImage, Image, ImageStatus, ReferenceRecord, RuntimeConfig};
use super::promises::Promises;
use crate::layout::Layout;
use crate::{EngineError, ImageOptions, Limits, faults};

/// Pulls at once; each fetches several blobs in parallel.
const CONCURRENT_PULLS: usize = 3;

/// All images and the jobs that make them.
pub(crate) struct Catalog {
    pub(super) store: Store,
    pub(super) layout: Layout,
    pub(super) blobs: BlobStore,
    pub(super) client: RegistryClient,
    resolver: RegistryClient,
    pub(super) options: ImageOptions,
    pub(super) limits: Limits,
    pub(super) tasks: TaskTracker,
    pub(super) closing: CancellationToken,
    pub(super) pulls: Semaphore,
    pub(super) conversions: Semaphore,
    pub(super) state: Mutex<State>,
    /// Held by whoever changes what exists, from the look at it until store, memory and files agree again. Queries
    /// and transfers do without.
    changes: tokio::sync::Mutex<()>,
    pub(super) promises: Promises,
    /// Fires whenever any image changes.
    pub(super) changed: Notify,
}

impl std::fmt::Debug for Catalog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Catalog").finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) contents: HashMap<String, Content>,
    /// Canonical name → digest and record.
    pub(super) references: BTreeMap<String, (String, ReferenceRecord)>,
    pub(super) jobs: HashMap<String, Arc<Job>>,
    pub(super) next_job: u64,
    /// Digests that instances boot from, with their number.
    pub(super) in_use: HashMap<String, usize>,
}

/// Proof that nobody else changes what exists.
pub(super) type Changes<'a> = tokio::sync::MutexGuard<'a, ()>;

/// A manifest that the registry records along with the image made of it.
#[derive(Debug, Clone)]
pub(super) struct Pushed {
    pub(super) repository: String,
    pub(super) manifest: hypeman_store::registry::Manifest,
    pub(super) tag: Option<String>,
}

/// A content being made.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) number: u64,
    pub(super) credentials: Option<Credentials>,
    pub(super) progress: Progress,
    pub(super) cancel: CancellationToken,
}

impl Catalog {
    pub(crate) async fn open(
        store: Store,
        layout: Layout,
        options: ImageOptions,
        limits: Limits,
        tasks: TaskTracker,
        closing: CancellationToken,
    ) -> Result<Arc<Self>, EngineError> {
        let blob_options = BlobStoreOptions {
            reserve_bytes: limits.min_free_disk,
            ..BlobStoreOptions::default()
        };
        let blobs = BlobStore::open(layout.blobs(), blob_options).await?;
        let client_options = ClientOptions {
            insecure: options.insecure_registries.clone(),
            docker_config: options.docker_config.clone(),
            trusted_realms: options.trusted_realms.clone(),
            extra_roots: options.extra_roots.clone(),
            proxy: options.proxy.clone(),
            ..ClientOptions::default()
        };
        let client = RegistryClient::new(client_options.clone())?;
        // Somebody waits for the answer: a registry that does not exist is told soon.
        let retry = RetryPolicy {
            attempts: 2,
            ..RetryPolicy::default()
        };
        let resolver = RegistryClient::new(ClientOptions {
            retry,
            ..client_options
        })?;
        let contents: Vec<Content> = store.read(hypeman_store::images::contents)?;
        let references: Vec<(String, String, ReferenceRecord)> =
            store.read(hypeman_store::images::references)?;
        let state = State {
            contents: contents
                .into_iter()
                .map(|content| (content.digest.clone(), content))
                .collect(),
            references: references
                .into_iter()
                .map(|(name, digest, record)| (name, (digest, record)))
                .collect(),
            ..State::default()
        };
        Ok(Arc::new(Self {
            store,
            layout,
            blobs,
            client,
            resolver,
            pulls: Semaphore::new(CONCURRENT_PULLS),
            conversions: Semaphore::new(limits.max_concurrent_builds.max(1)),
            options,
            limits,
            tasks,
            closing,
            state: Mutex::new(state),
            changes: tokio::sync::Mutex::default(),
            promises: Promises::default(),
            changed: Notify::new(),
        }))
    }

    pub(crate) fn blobs(&self) -> &BlobStore {
        &self.blobs
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) async fn changes(&self) -> Changes<'_> {
        self.changes.lock().await
    }

    /// Asks for an image. The digest is known when this returns, so a bad reference fails here.
    pub(crate) async fn create(self: &Arc<Self>, request: CreateImage) -> Result<Image, EngineError> {
        let reference = Reference::parse(&request.name)?;
        let platform = match &request.platform {
            Some(text) => Platform::parse_supported(text)?,
            None => Platform::host(),
        };
        let name = reference.to_string();
        // What was pushed here has no upstream to ask.
        if let Some(image) = self.pushed(&name) {
            return if runs_on(&image, &platform) {
                Ok(image)
            } else {
                Err(ImageError::PlatformNotAvailable {
                    wanted: platform.to_string(),
                    available: vec![image.platform],
                }
                .into())
            };
        }
        let resolving = self
            .resolver
            .resolve(&reference, &platform, request.credentials.as_ref());
        let resolved = tokio::select! {
            resolved = resolving => resolved,
            () = self.closing.cancelled() => return Err(EngineError::ShuttingDown),
        };
        let resolved = match resolved {
            Ok(resolved) => resolved,
            Err(error @ ImageError::Network { .. }) => {
                return self.ready(&name).ok_or_else(|| error.into());
            }
            Err(error) => return Err(error.into()),
        };
        let digest = resolved.digest.to_string();
        self.check_disk(resolved.manifest.layer_bytes(), &digest)?;
        let mut blobs = vec![digest.clone(), resolved.manifest.config.digest.to_string()];
        blobs.extend(
            resolved
                .manifest
                .layers
                .iter()
                .map(|layer| layer.digest.to_string()),
        );
        let content = Content {
            digest: digest.clone(),
            platform: platform.to_string(),
            status: ImageStatus::Pending,
            error: None,
            size_bytes: None,
            seal: None,
            config: RuntimeConfig::default(),
            upstream: Some(reference.with_digest(resolved.digest).to_string()),
            blobs,
        };
        let changes = self.changes().await;
        self.blobs.put_bytes(resolved.manifest.raw.clone()).await?;
        self.adopt(&changes, name, content, request.tags, request.credentials, None)
            .await
    }

    /// Makes `name` point to `content` and sees to it that the content gets made.
    pub(super) async fn adopt(
        self: &Arc<Self>,
        changes: &Changes<'_>,
        name: String,
        content: Content,
        tags: BTreeMap<String, String>,
        credentials: Option<Credentials>,
        pushed: Option<Pushed>,
    ) -> Result<Image, EngineError> {
        let digest = content.digest.clone();
        let (content, fresh, previous) = {
            let state = self.state();
            if let Some(job) = state.jobs.get(&digest)
                && job.credentials != credentials
            {
                return Err(EngineError::CredentialConflict);
            }
            let known = state
                .contents
                .get(&digest)
                .filter(|known| known.status != ImageStatus::Failed);
            let previous = state.references.get(&name).cloned();
            (known.cloned().unwrap_or(content), known.is_none(), previous)
        };
        let record = match &previous {
            Some((_, record)) if tags.is_empty() => record.clone(),
            Some((_, record)) => ReferenceRecord {
                tags,
                created_at: record.created_at,
            },
            None => ReferenceRecord {
                tags,
                created_at: Timestamp::now(),
            },
        };
        let (stored, stored_name, stored_record) = (content.clone(), name.clone(), record.clone());
        self.store
            .write(move |connection| {
                if fresh {
                    hypeman_store::images::put_content(connection, &stored.digest, &stored)?;
                }
                hypeman_store::images::put_reference(
                    connection,
                    &stored_name,
                    &stored.digest,
                    &stored_record,
                )?;
                match pushed {
                    Some(pushed) => pushed.record(connection),
                    None => Ok(()),
                }
            })
            .await?;
        faults::point("image.recorded");
        {
            let mut state = self.state();
            if fresh {
                state.contents.insert(digest.clone(), content);
            }
            state.references.insert(name.clone(), (digest.clone(), record));
        }
        if fresh {
            self.start_job(&digest, credentials);
        }
        self.changed.notify_waiters();
        if let Some((old, _)) = previous
            && old != digest
        {
            self.collect(changes, &old).await;
        }
        self.get(&name)
    }

    /// Resumes what a crash cut and removes what belongs to nothing.
    pub(crate) async fn recover(self: &Arc<Self>) -> Result<(), EngineError> {
        self.sweep_files()?;
        let pending: Vec<String> = self
            .state()
            .contents
            .values()
            .filter(|content| content.status == ImageStatus::Pending)
            .map(|content| content.digest.clone())
            .collect();
        for digest in pending {
            self.start_job(&digest, None);
        }
        let unused: Vec<String> = {
            let state = self.state();
            let referenced: BTreeSet<&String> = state.references.values().map(|(digest, _)| digest).collect();
            let lonely =
                |digest: &&String| !referenced.contains(digest) && !state.in_use.contains_key(*digest);
            state.contents.keys().filter(lonely).cloned().collect()
        };
        for digest in unused {
            self.collect_unused(&digest).await;
        }
        Ok(())
    }

    pub(crate) fn list(&self, tags: &BTreeMap<String, String>) -> Vec<Image> {
        let state = self.state();
        state
            .references
            .iter()
            .filter(|(_, (_, record))| hypeman_core::tags::matches(tags, &record.tags))
            .filter_map(|(name, (digest, record))| state.view(name, digest, record))
            .collect()
    }

    /// Finds an image by any form of its reference.
    pub(crate) fn get(&self, name: &str) -> Result<Image, EngineError> {
        let reference = Reference::parse(name)?;
        let canonical = reference.to_string();
        let state = self.state();
        if let Some((digest, record)) = state.references.get(&canonical)
            && let Some(image) = state.view(&canonical, digest, record)
        {
            return Ok(image);
        }
        // `name@sha256:…` finds whatever tag of that repository has the digest.
        let by_digest = reference.digest().and_then(|digest| {
            let (wanted, prefix) = (digest.to_string(), reference.name());
            state.references.iter().find_map(|(name, (digest, record))| {
                let same =
                    *digest == wanted && Reference::parse(name).is_ok_and(|other| other.name() == prefix);
                same.then(|| state.view(&canonical, digest, record)).flatten()
            })
        });
        by_digest.ok_or_else(|| not_found(name))
    }

    /// The image, if it can be booted now.
    fn ready(&self, name: &str) -> Option<Image> {
        self.get(name)
            .ok()
            .filter(|image| image.status == ImageStatus::Ready)
    }

    fn pushed(&self, name: &str) -> Option<Image> {
        let image = self.get(name).ok()?;
        let state = self.state();
        let content = state.contents.get(&image.digest)?;
        (content.upstream.is_none() && content.status != ImageStatus::Failed).then_some(image)
    }

    /// Makes `target` another name of an image that is ready.
    pub(crate) async fn tag(self: &Arc<Self>, name: &str, target: &str) -> Result<Image, EngineError> {
        let target = Reference::parse(target)?;
        if target.tag().is_none() || target.digest().is_some() {
            return Err(EngineError::invalid(
                "invalid_name",
                "the target must be a reference with a tag, not a digest",
            ));
        }
        let changes = self.changes().await;
        let image = self.get(name)?;
        if image.status != ImageStatus::Ready {
            return Err(EngineError::ImageNotReady(format!(
                "image {} is not ready",
                image.name
            )));
        }
        let content = self
            .state()
            .contents
            .get(&image.digest)
            .cloned()
            .ok_or_else(|| not_found(name))?;
        self.adopt(&changes, target.to_string(), content, image.tags, None, None)
            .await
    }

    /// Removes a reference, and the content with its last one.
    pub(crate) async fn delete(self: &Arc<Self>, name: &str) -> Result<(), EngineError> {
        let changes = self.changes().await;
        let image = self.get(name)?;
        let canonical = image.name.clone();
        let names: Vec<String> = {
            let state = self.state();
            if state.references.contains_key(&canonical) {
                vec![canonical]
            } else {
                // Named by digest: every reference of that repository which points to it.
                let prefix = Reference::parse(&canonical)?.name();
                let same = |other: &str| Reference::parse(other).is_ok_and(|other| other.name() == prefix);
                let of_digest = state
                    .references
                    .iter()
                    .filter(|(_, (digest, _))| *digest == image.digest);
                of_digest
                    .map(|(name, _)| name.clone())
                    .filter(|name| same(name))
                    .collect()
            }
        };
        let removed = names.clone();
        let pushed = self
            .state()
            .contents
            .get(&image.digest)
            .is_some_and(|content| content.upstream.is_none());
        self.store
            .write(move |connection| {
                removed.iter().try_for_each(|name| {
                    hypeman_store::images::delete_reference(connection, name)?;
                    if pushed {
                        super::registry::forget_tag(connection, name)
                    } else {
                        Ok(())
                    }
                })
            })
            .await?;
        faults::point("image.delete.unrecorded");
        {
            let mut state = self.state();
            for name in &names {
                state.references.remove(name);
            }
        }
        self.changed.notify_waiters();
        self.collect(&changes, &image.digest).await;
        Ok(())
    }
}

impl State {
    fn view(&self, name: &str, digest: &str, record: &ReferenceRecord) -> Option<Image> {
        let content = self.contents.get(digest)?;
        let job = self.jobs.get(digest);
        let status = match (content.status, job) {
            (ImageStatus::Pending, Some(job)) => job.progress.status(),
            (status, _) => status,
        };
        let queue_position = job.filter(|_| status == ImageStatus::Pending).map(|job| {
            let ahead = self
                .jobs
                .values()
                .filter(|other| other.number < job.number && other.progress.status() == ImageStatus::Pending);
            u32::try_from(ahead.count()).unwrap_or(u32::MAX).saturating_add(1)
        });
        Some(Image {
            name: name.to_owned(),
            digest: digest.to_owned(),
            platform: content.platform.clone(),
            status,
            queue_position,
            progress: job.and_then(|job| job.progress.share()),
            error: content.error.clone(),
            size_bytes: content.size_bytes,
            entrypoint: content.config.entrypoint.clone(),
            cmd: content.config.cmd.clone(),
            env: content.config.env.clone(),
            working_dir: content.config.working_dir.clone(),
            tags: record.tags.clone(),
            created_at: record.created_at,
        })
    }
}

/// Whether the image's programs are made for the processor of `platform`.
fn runs_on(image: &Image, platform: &Platform) -> bool {
    Platform::parse(&image.platform).is_ok_and(|offered| {
        let (wanted, offered) = (platform.normalized(), offered.normalized());
        (wanted.os, wanted.architecture) == (offered.os, offered.architecture)
    })
}

pub(super) fn not_found(name: &str) -> EngineError {
    EngineError::NotFound {
        kind: "image",
        name: name.to_owned(),
    }
}
