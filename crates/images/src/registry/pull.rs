//! Downloading an image's blobs: in parallel, verified while streaming, continued where they broke.

use std::time::Duration;

use futures::{StreamExt as _, TryStreamExt as _};
use reqwest::header::{ACCEPT_ENCODING, CONTENT_RANGE, HeaderValue, RANGE};
use reqwest::{Method, Response, StatusCode};

use super::meter::Meter;
use super::progress::TransferObserver;
use super::session::{Access, Session};
use super::{Credentials, RegistryClient, Resolved, transport};
use crate::blobs::{BlobStore, BlobWriter};
use crate::digest::Digest;
use crate::error::{ImageError, Result};
use crate::layers::LayerSource;
use crate::manifest::{Descriptor, ImageConfig, Manifest};
use crate::reference::Reference;

/// Most continuations of one download, however much progress each made.
const MAX_CONTINUATIONS: u32 = 100;
/// A connection that brings less than this in [`SLOW_WINDOW`] is given up and continued on another.
const SLOW_BYTES: u64 = 16 << 10;
const SLOW_WINDOW: Duration = Duration::from_secs(60);

/// An image whose blobs are all in the store.
#[derive(Debug, Clone)]
pub struct PulledImage {
    /// The manifest, which is in the store too.
    pub manifest: Manifest,
    /// The config.
    pub config: ImageConfig,
    /// The layers, the lowest first.
    pub layers: Vec<PulledLayer>,
}

/// One layer of a [`PulledImage`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PulledLayer {
    /// The layer as stored, compressed or not.
    pub descriptor: Descriptor,
    /// Digest of its uncompressed content, as the config states it.
    pub diff_id: Digest,
}

impl RegistryClient {
    /// Brings all blobs of a resolved image into the store, and the manifest itself.
    ///
    /// # Errors
    /// As [`RegistryClient::resolve`], and [`ImageError::SizeMismatch`], [`ImageError::NoSpace`],
    /// [`ImageError::Cancelled`], [`ImageError::Io`]. Complete blobs stay in the store after an error.
    pub async fn pull(
        &self,
        reference: &Reference,
        resolved: &Resolved,
        credentials: Option<&Credentials>,
        store: &BlobStore,
        observer: &dyn TransferObserver,
    ) -> Result<PulledImage> {
        let manifest = &resolved.manifest;
        manifest.check_runnable()?;
        let session = Session::open(
            self,
            reference,
            Access::Pull,
            credentials,
            observer.cancellation(),
        )
        .await?;
        let mut blobs: Vec<Descriptor> = vec![manifest.config.clone()];
        for layer in &manifest.layers {
            match blobs.iter().find(|blob| blob.digest == layer.digest) {
                Some(blob) if blob.size == layer.size => {}
                Some(_) => return Err(ImageError::document("manifest", "it gives one blob two sizes")),
                None => blobs.push(layer.clone()),
            }
        }
        let meter = Meter::planned(observer, &blobs);
        // The config first: if it does not fit, no layer need be fetched.
        download(&session, store, &blobs[0], &meter).await?;
        let config = ImageConfig::parse(store.read_document(&manifest.config.digest).await?)?;
        config.check_matches(manifest)?;
        if resolved.index_digest.is_none() {
            config.check_platform(&resolved.platform)?;
        }
        let (session, meter) = (&session, &meter);
        futures::stream::iter(blobs.split_off(1))
            .map(|blob| async move { download(session, store, &blob, meter).await })
            .buffer_unordered(self.shared.options.parallel.max(1))
            .try_collect::<()>()
            .await?;
        store.put_bytes(manifest.raw.clone()).await?;
        let layers = manifest.layers.iter().zip(&config.diff_ids);
        let layers = layers.map(|(layer, diff_id)| PulledLayer {
            descriptor: layer.clone(),
            diff_id: *diff_id,
        });
        Ok(PulledImage {
            layers: layers.collect(),
            manifest: manifest.clone(),
            config,
        })
    }
}

/// The layers of an image in the store, for the conversion into a root disk.
pub fn layer_sources(store: &BlobStore, manifest: &Manifest, config: &ImageConfig) -> Vec<LayerSource> {
    let source = |(index, layer): (usize, &Descriptor)| {
        let path = store.path(&layer.digest);
        LayerSource {
            media_type: layer.media_type.clone(),
            digest: Some(layer.digest.to_string()),
            size: layer.size,
            diff_id: config.diff_ids.get(index).map(ToString::to_string),
            open: Box::new(move || Ok(Box::new(std::fs::File::open(&path)?))),
        }
    };
    manifest.layers.iter().enumerate().map(source).collect()
}

async fn download(session: &Session, store: &BlobStore, blob: &Descriptor, meter: &Meter<'_>) -> Result<()> {
    let limit = store.options().max_blob_bytes;
    if blob.size > limit {
        return Err(ImageError::TooLarge {
            what: format!("blob {}", blob.digest),
            limit,
        });
    }
    let turn = tokio::select! {
        () = session.cancel.cancelled() => return Err(ImageError::Cancelled),
        turn = store.lock_transfer(&blob.digest) => turn,
    };
    if let Some(actual) = store.touch(&blob.digest).await? {
        if actual != blob.size {
            return Err(ImageError::SizeMismatch {
                what: format!("blob {}", blob.digest),
                expected: blob.size,
                actual,
            });
        }
        meter.advance(blob, 0, blob.size);
        meter.finish(blob, true);
        return Ok(());
    }
    let writer = store.download_writer(&blob.digest, blob.size).await?;
    let continued = writer.offset() > 0;
    let outcome = fill(session, blob, writer, meter).await;
    let outcome = match outcome {
        // The prefix that an earlier attempt left may have been the wrong part: once more from the start.
        Err(ImageError::DigestMismatch { .. }) if continued => {
            meter.advance(blob, blob.size, 0);
            let writer = store.download_writer(&blob.digest, blob.size).await?;
            fill(session, blob, writer, meter).await
        }
        outcome => outcome,
    };
    drop(turn);
    outcome?;
    meter.finish(blob, false);
    Ok(())
}

/// Fetches the rest of a blob, over as many connections as it takes, and commits it.
async fn fill(session: &Session, blob: &Descriptor, mut writer: BlobWriter, meter: &Meter<'_>) -> Result<()> {
    let attempts = session.client.shared.options.retry.attempts;
    let (mut fruitless, mut continuations) = (0, 0);
    meter.advance(blob, 0, writer.offset());
    while writer.offset() < blob.size {
        let before = writer.offset();
        let broken = match fetch_some(session, blob, &mut writer, meter).await {
            Ok(()) => break,
            Err(Interrupted::Broken(error)) => error,
            Err(Interrupted::Final(
                error @ (ImageError::SizeMismatch { .. } | ImageError::UnsafeServer { .. }),
            )) => {
                writer.discard();
                return Err(error);
            }
            Err(Interrupted::Final(error)) => return Err(error),
        };
        continuations += 1;
        fruitless = if writer.offset() > before {
            1
        } else {
            fruitless + 1
        };
        if fruitless >= attempts || continuations >= MAX_CONTINUATIONS {
            return Err(broken);
        }
        tracing::debug!(digest = %blob.digest, offset = writer.offset(), error = %broken, "download will be continued");
        session.pause(fruitless, None).await?;
    }
    writer.finish(&blob.digest).await
}

/// Why a connection brought no more.
enum Interrupted {
    /// Another connection may bring the rest.
    Broken(ImageError),
    /// Nothing will.
    Final(ImageError),
}

impl From<ImageError> for Interrupted {
    fn from(error: ImageError) -> Self {
        Self::Final(error)
    }
}

/// Reads as much of the blob as one connection brings.
async fn fetch_some(
    session: &Session,
    blob: &Descriptor,
    writer: &mut BlobWriter,
    meter: &Meter<'_>,
) -> Result<(), Interrupted> {
    let what = || format!("blob {}", blob.digest);
    let mut call = session.get(Method::GET, &format!("blobs/{}", blob.digest))?;
    // Transparent compression would make lengths and ranges mean something else.
    call.headers
        .insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    let offset = writer.offset();
    if offset > 0 {
        let range = HeaderValue::from_str(&format!("bytes={offset}-"))
            .map_err(|_| session.policy.refusal("range"))?;
        call.headers.insert(RANGE, range);
    }
    let response = session.call(&call).await?;
    match response.status() {
        StatusCode::OK => restart(blob, writer, meter).await?,
        StatusCode::PARTIAL_CONTENT if offset > 0 => {
            if range_start(&response) != Some((offset, blob.size)) {
                restart(blob, writer, meter).await?;
                let reason = "it continued a download at the wrong place".to_owned();
                return Err(Interrupted::Broken(ImageError::Network {
                    host: session.host().to_owned(),
                    reason,
                }));
            }
        }
        StatusCode::RANGE_NOT_SATISFIABLE => {
            restart(blob, writer, meter).await?;
            let reason = "it cannot continue the download".to_owned();
            return Err(Interrupted::Broken(ImageError::Network {
                host: session.host().to_owned(),
                reason,
            }));
        }
        StatusCode::NOT_FOUND => return Err(ImageError::NotFound(what()).into()),
        _ => return Err(session.status_error(response, "the registry").await.into()),
    }
    let rest = blob.size - writer.offset();
    if let Some(announced) = response.content_length()
        && announced != rest
    {
        let actual = writer.offset() + announced;
        return Err(ImageError::SizeMismatch {
            what: what(),
            expected: blob.size,
            actual,
        }
        .into());
    }
    receive(session, blob, writer, meter, response).await
}

async fn receive(
    session: &Session,
    blob: &Descriptor,
    writer: &mut BlobWriter,
    meter: &Meter<'_>,
    mut response: Response,
) -> Result<(), Interrupted> {
    let host = response.url().host_str().unwrap_or_default().to_owned();
    let idle = session.client.shared.options.idle_timeout;
    let mut window = (tokio::time::Instant::now(), writer.offset());
    loop {
        let chunk = tokio::select! {
            () = session.cancel.cancelled() => return Err(ImageError::Cancelled.into()),
            chunk = tokio::time::timeout(idle, response.chunk()) => chunk,
        };
        let broken = |reason: &str| {
            Interrupted::Broken(ImageError::Network {
                host: host.clone(),
                reason: reason.to_owned(),
            })
        };
        let chunk = match chunk {
            Ok(Ok(Some(chunk))) => chunk,
            Ok(Ok(None)) if writer.offset() == blob.size => return Ok(()),
            Ok(Ok(None)) => {
                let (what, actual) = (format!("blob {}", blob.digest), writer.offset());
                return Err(Interrupted::Broken(ImageError::SizeMismatch {
                    what,
                    expected: blob.size,
                    actual,
                }));
            }
            Ok(Err(error)) => return Err(Interrupted::Broken(transport::network(&host, error))),
            Err(_) => return Err(broken("the download stalled")),
        };
        let before = writer.offset();
        let after = before + chunk.len() as u64;
        if after > blob.size {
            let what = format!("blob {}", blob.digest);
            return Err(ImageError::SizeMismatch {
                what,
                expected: blob.size,
                actual: after,
            }
            .into());
        }
        writer.write(chunk).await?;
        meter.advance(blob, before, after);
        if window.0.elapsed() >= SLOW_WINDOW {
            if after - window.1 < SLOW_BYTES && after < blob.size {
                return Err(broken("the download is too slow"));
            }
            window = (tokio::time::Instant::now(), after);
        }
    }
}

async fn restart(blob: &Descriptor, writer: &mut BlobWriter, meter: &Meter<'_>) -> Result<()> {
    let offset = writer.offset();
    if offset > 0 {
        writer.restart().await?;
        meter.advance(blob, offset, 0);
    }
    Ok(())
}

/// First byte and total of a `Content-Range: bytes start-end/total`.
fn range_start(response: &Response) -> Option<(u64, u64)> {
    let text = response.headers().get(CONTENT_RANGE)?.to_str().ok()?;
    let (range, total) = text.trim().strip_prefix("bytes")?.trim_start().split_once('/')?;
    let (start, end) = range.split_once('-')?;
    let (start, end): (u64, u64) = (start.trim().parse().ok()?, end.trim().parse().ok()?);
    let total = total.trim().parse().ok()?;
    (end.checked_add(1)? == total).then_some((start, total))
}
