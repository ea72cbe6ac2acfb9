//! Uploading an image: what the registry lacks, in parallel, then the manifests that name it.
//!
//! ```text
//!  for each manifest of the image, the deepest first:
//!     for each blob:   HEAD ── there ─► skip
//!                       └─ not ─► POST uploads/ ─► Location ─► PUT ?digest= (streamed)
//!     PUT manifests/<digest>
//!  PUT manifests/<tag>
//! ```
//!
//! Nothing names a blob before it is there, so an interrupted push leaves no broken image behind.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _};
use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderValue};
use reqwest::{Method, Response, StatusCode, Url};

use super::meter::Meter;
use super::progress::TransferObserver;
use super::session::{Access, Call, Session};
use super::{Credentials, RegistryClient};
use crate::blobs::{BlobStore, blocking};
use crate::digest::Digest;
use crate::error::{ImageError, Result};
use crate::manifest::{Descriptor, Document, MAX_DOCUMENT_BYTES};
use crate::platform::Platform;
use crate::reference::Reference;

/// Most indexes inside one another.
const MAX_INDEX_DEPTH: usize = 3;
/// Bytes read from disk at a time.
const READ_BYTES: u64 = 256 << 10;
/// An upload that sends nothing for so long, or is not answered so long after its last byte, is broken.
const UPLOAD_IDLE: Duration = Duration::from_secs(120);

/// Where the bytes of a blob are: a part of a file.
#[derive(Debug)]
pub struct Extent {
    /// The file.
    pub file: std::fs::File,
    /// First byte of the blob in it.
    pub offset: u64,
    /// Size of the blob in bytes.
    pub size: u64,
}

/// Something that holds the blobs of images.
pub trait ContentSource: Send + Sync {
    /// Opens a blob. May block on the file system for the time of an `open`.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`] when the blob is not here.
    fn locate(&self, digest: &Digest) -> io::Result<Extent>;
}

impl ContentSource for BlobStore {
    fn locate(&self, digest: &Digest) -> io::Result<Extent> {
        let file = std::fs::File::open(self.path(digest))?;
        let size = file.metadata()?.len();
        Ok(Extent {
            file,
            offset: 0,
            size,
        })
    }
}

/// How to push.
#[derive(Debug, Clone, Default)]
pub struct PushOptions {
    /// Rewrite Docker schema 2 manifests as OCI manifests. Changes the digest.
    pub convert_to_oci: bool,
    /// Push only this platform of an index, as a plain image.
    pub platform: Option<Platform>,
}

/// What a push did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pushed {
    /// Digest under which the image is at the registry.
    pub digest: Digest,
    /// Layers of all its manifests.
    pub layers: usize,
    /// Bytes that had to be sent, manifests not counted.
    pub bytes: u64,
}

impl RegistryClient {
    /// Pushes the image under `root` (the digest of a manifest or index in `source`) to `target`.
    ///
    /// # Errors
    /// [`ImageError::NotFound`] when the source lacks a blob; [`ImageError::Unauthorized`],
    /// [`ImageError::RateLimited`], [`ImageError::UnsafeServer`], [`ImageError::Network`],
    /// [`ImageError::DigestMismatch`], [`ImageError::Cancelled`].
    pub async fn push<S: ContentSource + 'static>(
        &self,
        source: &Arc<S>,
        root: &Descriptor,
        target: &Reference,
        credentials: Option<&Credentials>,
        options: &PushOptions,
        observer: &dyn TransferObserver,
    ) -> Result<Pushed> {
        let session = Session::open(self, target, Access::Push, credentials, observer.cancellation()).await?;
        let documents = collect(source, root, options).await?;
        let mut blobs: Vec<Descriptor> = Vec::new();
        let mut layers = 0;
        for document in &documents {
            let Document::Manifest(manifest) = document else {
                continue;
            };
            layers += manifest.layers.len();
            for blob in document.references() {
                if !blobs.iter().any(|known| known.digest == blob.digest) {
                    blobs.push(blob.clone());
                }
            }
        }
        let meter = Meter::planned(observer, &blobs);
        let sent: Vec<u64> = futures::stream::iter(&blobs)
            .map(|blob| upload(&session, source, blob, &meter))
            .buffer_unordered(self.shared.options.parallel.max(1))
            .try_collect()
            .await?;
        let last = documents.len() - 1;
        for (index, document) in documents.iter().enumerate() {
            let selector = match (index == last, target.digest(), target.tag()) {
                (true, Some(digest), _) if *digest != document.digest() => {
                    return Err(ImageError::DigestMismatch {
                        expected: *digest,
                        actual: document.digest(),
                    });
                }
                (true, None, Some(tag)) => tag.to_owned(),
                _ => document.digest().to_string(),
            };
            put_manifest(&session, document, &selector).await?;
        }
        Ok(Pushed {
            digest: documents[last].digest(),
            layers,
            bytes: sent.iter().sum(),
        })
    }
}

/// All documents of an image, those that are named before those that name them.
async fn collect<S: ContentSource + 'static>(
    source: &Arc<S>,
    root: &Descriptor,
    options: &PushOptions,
) -> Result<Vec<Document>> {
    let mut root = read_document(source, root).await?;
    if let Some(platform) = &options.platform {
        for _ in 0..MAX_INDEX_DEPTH {
            let Document::Index(index) = &root else { break };
            root = read_document(source, crate::manifest::choose(index, platform)?).await?;
        }
    }
    if options.convert_to_oci
        && let Document::Manifest(manifest) = &root
    {
        root = Document::Manifest(manifest.to_oci()?);
    }
    let mut documents = vec![root];
    let mut level = vec![0];
    for depth in 0.. {
        let mut next = Vec::new();
        for position in level {
            let Document::Index(index) = &documents[position] else {
                continue;
            };
            if depth >= MAX_INDEX_DEPTH {
                return Err(ImageError::document("index", "it nests too deeply"));
            }
            for entry in index.manifests.clone() {
                next.push(documents.len());
                documents.push(read_document(source, &entry).await?);
            }
        }
        if next.is_empty() {
            break;
        }
        level = next;
    }
    documents.reverse();
    Ok(documents)
}

async fn read_document<S: ContentSource + 'static>(
    source: &Arc<S>,
    descriptor: &Descriptor,
) -> Result<Document> {
    use std::os::unix::fs::FileExt as _;
    let limit = MAX_DOCUMENT_BYTES;
    if descriptor.size > limit {
        return Err(ImageError::TooLarge {
            what: format!("manifest {}", descriptor.digest),
            limit,
        });
    }
    let (source, expected) = (source.clone(), descriptor.digest);
    let raw: Bytes = blocking(move || {
        let read = || {
            let extent = source.locate(&expected)?;
            let mut bytes = vec![0; extent.size.min(limit) as usize];
            extent.file.read_exact_at(&mut bytes, extent.offset)?;
            Ok(bytes.into())
        };
        read().map_err(|error| local_error(&expected, error))
    })
    .await?;
    match Digest::of(&raw) {
        actual if actual == expected => Document::parse(raw, Some(&descriptor.media_type)),
        actual => Err(ImageError::DigestMismatch { expected, actual }),
    }
}

fn local_error(digest: &Digest, error: io::Error) -> ImageError {
    match error.kind() {
        io::ErrorKind::NotFound => ImageError::NotFound(format!("blob {digest} in the image to push")),
        _ => ImageError::io(format!("read blob {digest}"), error),
    }
}

/// Brings one blob to the registry; the answer is the bytes that had to be sent.
async fn upload<S: ContentSource + 'static>(
    session: &Session,
    source: &Arc<S>,
    blob: &Descriptor,
    meter: &Meter<'_>,
) -> Result<u64> {
    let head = session
        .call(&session.get(Method::HEAD, &format!("blobs/{}", blob.digest))?)
        .await?;
    match head.status() {
        StatusCode::OK => {
            meter.advance(blob, 0, blob.size);
            meter.finish(blob, true);
            return Ok(0);
        }
        StatusCode::NOT_FOUND => {}
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            return Err(session.status_error(head, "the registry").await);
        }
        // Some registries answer nonsense here; the upload will show.
        _ => {}
    }
    let (opened, digest) = (source.clone(), blob.digest);
    let extent = blocking(move || {
        opened
            .locate(&digest)
            .map_err(|error| local_error(&digest, error))
    })
    .await?;
    if extent.size != blob.size {
        let what = format!("blob {digest}");
        return Err(ImageError::SizeMismatch {
            what,
            expected: blob.size,
            actual: extent.size,
        });
    }
    let extent = Arc::new(extent);
    let attempts = session.client.shared.options.retry.attempts;
    let mut attempt = 1;
    loop {
        let counter = Arc::new(AtomicU64::new(0));
        let outcome = send(session, blob, &extent, &counter, meter).await;
        match outcome {
            Ok(()) => break,
            Err(error @ ImageError::Network { .. }) if attempt < attempts => {
                tracing::debug!(%digest, %error, "upload will be repeated");
                meter.advance(blob, counter.load(Ordering::Relaxed), 0);
                session.pause(attempt, None).await?;
                attempt += 1;
            }
            Err(error) => return Err(error),
        }
    }
    meter.finish(blob, false);
    Ok(blob.size)
}

async fn send(
    session: &Session,
    blob: &Descriptor,
    extent: &Arc<Extent>,
    reported: &AtomicU64,
    meter: &Meter<'_>,
) -> Result<()> {
    let mut begin = session.get(Method::POST, "blobs/uploads/")?;
    begin
        .headers
        .insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
    let begun = session.call(&begin).await?;
    if begun.status() != StatusCode::ACCEPTED {
        return Err(session.status_error(begun, "the registry").await);
    }
    let mut url: Url = session.location(&begin.url, begun.headers(), "upload location")?;
    url.set_fragment(None);
    url.query_pairs_mut()
        .append_pair("digest", &blob.digest.to_string());

    let read = Arc::new(AtomicU64::new(0));
    let (counter, source) = (read.clone(), extent.clone());
    let body = move || body_of(&source, &counter);
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(CONTENT_LENGTH, HeaderValue::from(blob.size));
    let call = Call {
        method: Method::PUT,
        url,
        headers,
        body: Some(&body),
        deadline: Duration::MAX,
    };
    let response = watch(session, blob, &call, &read, reported, meter).await?;
    match response.status() {
        StatusCode::CREATED | StatusCode::NO_CONTENT | StatusCode::ACCEPTED | StatusCode::OK => Ok(()),
        _ => Err(session.status_error(response, "the registry").await),
    }
}

/// Sends once, reports progress, and gives up when nothing moves.
async fn watch(
    session: &Session,
    blob: &Descriptor,
    call: &Call<'_>,
    read: &AtomicU64,
    reported: &AtomicU64,
    meter: &Meter<'_>,
) -> Result<Response> {
    let mut sending = std::pin::pin!(session.once(call));
    let mut ticks = tokio::time::interval(Duration::from_millis(100));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut moved = tokio::time::Instant::now();
    loop {
        let outcome = tokio::select! {
            () = session.cancel.cancelled() => return Err(ImageError::Cancelled),
            outcome = &mut sending => Some(outcome),
            _ = ticks.tick() => None,
        };
        let now = match &outcome {
            Some(Ok(response)) if response.status().is_success() => blob.size,
            _ => read.load(Ordering::Relaxed).min(blob.size),
        };
        let before = reported.swap(now, Ordering::Relaxed);
        if now != before {
            meter.advance(blob, before, now);
            moved = tokio::time::Instant::now();
        }
        if let Some(outcome) = outcome {
            return outcome;
        }
        if moved.elapsed() > UPLOAD_IDLE {
            let host = session.host().to_owned();
            return Err(ImageError::Network {
                host,
                reason: "the upload stalled".to_owned(),
            });
        }
    }
}

/// A body that reads the extent as it is sent. Reads name their position, so sendings do not disturb each other.
fn body_of(extent: &Arc<Extent>, counter: &Arc<AtomicU64>) -> reqwest::Body {
    use std::os::unix::fs::FileExt as _;
    counter.store(0, Ordering::Relaxed);
    let (extent, counter) = (extent.clone(), counter.clone());
    let chunks = futures::stream::try_unfold(0, move |position: u64| {
        let (extent, counter) = (extent.clone(), counter.clone());
        async move {
            let want = (extent.size - position).min(READ_BYTES);
            if want == 0 {
                return Ok(None);
            }
            let read = tokio::task::spawn_blocking(move || {
                let mut chunk = vec![0; want as usize];
                extent
                    .file
                    .read_exact_at(&mut chunk, extent.offset + position)
                    .map(|()| chunk)
            });
            let chunk = read.await.map_err(io::Error::other)??;
            counter.fetch_add(want, Ordering::Relaxed);
            Ok::<_, io::Error>(Some((Bytes::from(chunk), position + want)))
        }
    });
    reqwest::Body::wrap_stream(chunks)
}

async fn put_manifest(session: &Session, document: &Document, selector: &str) -> Result<()> {
    let raw = document.raw().clone();
    let mut call = session.get(Method::PUT, &format!("manifests/{selector}"))?;
    let kind = HeaderValue::from_str(document.media_type())
        .map_err(|_| ImageError::document("manifest", "its media type is no text"))?;
    call.headers.insert(CONTENT_TYPE, kind);
    let body = move || reqwest::Body::from(raw.clone());
    let call = Call {
        body: Some(&body),
        ..call
    };
    let response = session.call(&call).await?;
    if !response.status().is_success() {
        return Err(session.status_error(response, "the registry").await);
    }
    let stored = response
        .headers()
        .get("docker-content-digest")
        .and_then(|value| value.to_str().ok());
    match stored.map(Digest::parse) {
        Some(Ok(actual)) if actual != document.digest() => Err(ImageError::DigestMismatch {
            expected: document.digest(),
            actual,
        }),
        _ => Ok(()),
    }
}
