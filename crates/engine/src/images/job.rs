//! Making a root disk: fetch what is missing, convert, give it its name.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hypeman_images::layers::{self, Compression, ConvertObserver, ConvertOptions};
use hypeman_images::registry::layer_sources;
use hypeman_images::{
    Credentials, Digest, ImageConfig, ImageError, Manifest, Platform, Reference, Resolved, TransferEvent,
    TransferObserver,
};
use tokio_util::sync::CancellationToken;

use super::catalog::{Catalog, Job};
use super::model::{Content, ImageStatus, RuntimeConfig};
use crate::instances::disks;
use crate::layout::make_private;
use crate::{EngineError, durable, faults};

/// How far a job is; read by queries without a lock.
#[derive(Debug, Default)]
pub(super) struct Progress {
    step: AtomicU8,
    done: AtomicU64,
    total: AtomicU64,
}

/// Zero, the default, is pending.
const PULLING: u8 = 1;
const CONVERTING: u8 = 2;

impl Progress {
    pub(super) fn status(&self) -> ImageStatus {
        match self.step.load(Ordering::Relaxed) {
            PULLING => ImageStatus::Pulling,
            CONVERTING => ImageStatus::Converting,
            _ => ImageStatus::Pending,
        }
    }

    /// Share of the present step that is done, 0 to 1.
    pub(super) fn share(&self) -> Option<f64> {
        let total = self.total.load(Ordering::Relaxed);
        #[allow(clippy::cast_precision_loss)]
        let share = self.done.load(Ordering::Relaxed) as f64 / total.max(1) as f64;
        (total > 0).then(|| share.min(1.0))
    }

    fn enter(&self, step: u8) {
        self.total.store(0, Ordering::Relaxed);
        self.done.store(0, Ordering::Relaxed);
        self.step.store(step, Ordering::Relaxed);
    }

    fn set(&self, done: u64, total: u64) {
        self.done.store(done, Ordering::Relaxed);
        self.total.store(total, Ordering::Relaxed);
    }
}

/// Watches a pull.
struct Watcher(Arc<Job>);

impl TransferObserver for Watcher {
    fn event(&self, event: &TransferEvent) {
        if let TransferEvent::Progress {
            total_done, total, ..
        } = event
        {
            self.0.progress.set(*total_done, *total);
        }
    }

    fn cancellation(&self) -> CancellationToken {
        self.0.cancel.clone()
    }
}

/// So many questions whether to stop are answered by one look at the disk: each time that layers have grown by 8 MiB.
const QUESTIONS_A_LOOK: u32 = 64;

/// Watches a conversion, and stops it before it takes what the disk keeps for others.
struct Guard {
    catalog: Arc<Catalog>,
    job: Arc<Job>,
    questions: AtomicU32,
    refusal: Mutex<Option<EngineError>>,
}

impl Guard {
    fn new(catalog: &Arc<Catalog>, job: &Arc<Job>) -> Self {
        Self {
            catalog: Arc::clone(catalog),
            job: Arc::clone(job),
            questions: AtomicU32::new(0),
            refusal: Mutex::default(),
        }
    }

    fn refusal(&self) -> MutexGuard<'_, Option<EngineError>> {
        self.refusal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why the conversion ended: for want of room, or as it says itself.
    fn reason(&self, error: &layers::ConvertError) -> EngineError {
        self.refusal().take().unwrap_or_else(|| refused(error))
    }
}

impl ConvertObserver for Guard {
    fn progress(&self, bytes_read: u64, total: u64) {
        self.job.progress.set(bytes_read, total);
    }

    fn cancelled(&self) -> bool {
        let mut refusal = self.refusal();
        let question = self.questions.fetch_add(1, Ordering::Relaxed);
        if refusal.is_none() && question.is_multiple_of(QUESTIONS_A_LOOK) {
            *refusal = self.catalog.check_room().err();
        }
        refusal.is_some() || self.job.cancel.is_cancelled()
    }
}

impl Catalog {
    /// Starts to make the content of `digest`, unless that is under way.
    pub(super) fn start_job(self: &Arc<Self>, digest: &str, credentials: Option<Credentials>) {
        let job = {
            let mut state = self.state();
            if state.jobs.contains_key(digest) {
                return;
            }
            let number = state.next_job;
            state.next_job += 1;
            let cancel = self.closing.child_token();
            let job = Arc::new(Job {
                number,
                credentials,
                progress: Progress::default(),
                cancel,
            });
            state.jobs.insert(digest.to_owned(), Arc::clone(&job));
            job
        };
        let (catalog, digest) = (Arc::clone(self), digest.to_owned());
        self.tasks
            .spawn(async move { catalog.run_job(&digest, job).await });
    }

    async fn run_job(self: Arc<Self>, digest: &str, job: Arc<Job>) {
        let Some(content) = self.state().contents.get(digest).cloned() else {
            // Deleted before the job began, and the job forgotten with it.
            return;
        };
        let outcome = self.make(content.clone(), &job).await;
        // A server that closes leaves the content pending: the next one goes on.
        if self.closing.is_cancelled() {
            return;
        }
        let finished = match outcome {
            Ok(content) => content,
            Err(error) => {
                tracing::warn!(%digest, %error, "image failed");
                Content {
                    status: ImageStatus::Failed,
                    error: Some(error.to_string()),
                    ..content
                }
            }
        };
        let _changes = self.changes().await;
        let (wanted, known) = {
            let mut state = self.state();
            let known = state.contents.contains_key(digest);
            // Deleted and asked for again meanwhile: then the content belongs to another job.
            let mine = |other: &Arc<Job>| other.number == job.number;
            let wanted = known && state.jobs.get(digest).is_some_and(mine);
            if wanted {
                state.jobs.remove(digest);
                state.contents.insert(digest.to_owned(), finished.clone());
            }
            (wanted, known)
        };
        if wanted {
            let stored = finished;
            let saved = self
                .store
                .write(move |connection| {
                    hypeman_store::images::put_content(connection, &stored.digest, &stored)
                })
                .await;
            if let Err(error) = saved {
                // Still pending in the store: made again after the next start.
                tracing::warn!(%digest, %error, "state of the image not saved");
            }
            faults::point("image.ready");
        } else if !known {
            // Deleted while it was being made.
            let _ = durable::remove_tree(&self.layout.image(digest));
        }
        self.changed.notify_waiters();
    }

    async fn make(self: &Arc<Self>, content: Content, job: &Arc<Job>) -> Result<Content, EngineError> {
        let digest: Digest = Digest::parse(&content.digest)?;
        let manifest = Manifest::parse(self.blobs.read_document(&digest).await?, None)?;
        let config = match &content.upstream {
            Some(upstream) => self.pull(&content, upstream, manifest.clone(), job).await?,
            None => ImageConfig::parse(self.blobs.read_document(&manifest.config.digest).await?)?,
        };
        config.check_matches(&manifest)?;
        let _turn = self
            .conversions
            .acquire()
            .await
            .map_err(|_| EngineError::ShuttingDown)?;
        job.progress.enter(CONVERTING);
        let (size_bytes, seal) = self.convert(&content.digest, &manifest, &config, job).await?;
        Ok(Content {
            status: ImageStatus::Ready,
            error: None,
            size_bytes: Some(size_bytes),
            seal: Some(seal),
            config: RuntimeConfig::from(&config),
            ..content
        })
    }

    async fn pull(
        &self,
        content: &Content,
        upstream: &str,
        manifest: Manifest,
        job: &Arc<Job>,
    ) -> Result<ImageConfig, EngineError> {
        let reference = Reference::parse(upstream)?;
        let _turn = self
            .pulls
            .acquire()
            .await
            .map_err(|_| EngineError::ShuttingDown)?;
        job.progress.enter(PULLING);
        let resolved = Resolved {
            digest: manifest.digest,
            // The platform was checked when the reference was resolved.
            index_digest: Some(manifest.digest),
            manifest,
            platform: Platform::parse(&content.platform)?,
        };
        let observer = Watcher(Arc::clone(job));
        let pulled = self
            .client
            .pull(
                &reference,
                &resolved,
                job.credentials.as_ref(),
                &self.blobs,
                &observer,
            )
            .await?;
        faults::point("image.pulled");
        Ok(pulled.config)
    }

    async fn convert(
        self: &Arc<Self>,
        digest: &str,
        manifest: &Manifest,
        config: &ImageConfig,
        job: &Arc<Job>,
    ) -> Result<(u64, String), EngineError> {
        let sources = layer_sources(&self.blobs, manifest, config);
        let hex = digest.rsplit(':').next().unwrap_or(digest);
        let unique = crate::random::hex::<8>().map_err(|error| EngineError::io("random name", error))?;
        let work = self.layout.image_work().join(format!("{hex}-{unique}"));
        let (target_directory, target) = (self.layout.image(digest), self.layout.root_disk(digest));
        let options = ConvertOptions {
            compression: if self.options.compress {
                Compression::Lz4
            } else {
                Compression::None
            },
            ..ConvertOptions::default()
        };
        let guard = Guard::new(self, job);
        let path = work.clone();
        let converted = tokio::task::spawn_blocking(move || -> Result<(u64, String), EngineError> {
            let output = File::options()
                .read(true)
                .write(true)
                .create_new(true)
                .open(&path)
                .map_err(|error| EngineError::io("create the root disk", error))?;
            let converted =
                layers::convert(&sources, &output, &options, &guard).map_err(|error| guard.reason(&error))?;
            // The end of a root disk is written after the last question.
            guard.catalog.check_room()?;
            output
                .sync_all()
                .map_err(|error| EngineError::io("sync the root disk", error))?;
            faults::point("image.converted");
            make_private(&target_directory)?;
            let name = || -> io::Result<()> {
                durable::rename(&path, &target)?;
                target_directory.parent().map_or(Ok(()), durable::sync_directory)
            };
            name().map_err(|error| EngineError::io("name the root disk", error))?;
            faults::point("image.renamed");
            // Under its name: what is noted of a file is void when that changes.
            Ok((converted.size_bytes, disks::seal(&target)?))
        })
        .await
        .map_err(|error| EngineError::io("convert", error.into()))?;
        if converted.is_err() {
            let _ = std::fs::remove_file(&work);
        }
        converted
    }
}

/// Layers that can't become a root disk: the reason goes to the client as it is.
fn refused(error: &layers::ConvertError) -> EngineError {
    EngineError::Image(ImageError::Unsupported(error.to_string()))
}
