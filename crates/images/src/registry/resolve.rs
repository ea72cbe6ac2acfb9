//! From a reference to the manifest of one platform.

use bytes::Bytes;
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderValue};
use reqwest::{Method, StatusCode};
use tokio_util::sync::CancellationToken;

use super::session::{Access, Session};
use super::{Credentials, RegistryClient, read_limited};
use crate::digest::Digest;
use crate::error::{ImageError, Result};
use crate::manifest::{self, Document, ImageConfig, MAX_DOCUMENT_BYTES, Manifest, media_type};
use crate::platform::Platform;
use crate::reference::Reference;

/// Indexes inside indexes that are looked into.
const MAX_INDEX_DEPTH: usize = 3;
const DIGEST_HEADER: &str = "docker-content-digest";

/// A reference, resolved.
#[derive(Debug, Clone)]
pub struct Resolved {
    /// Digest of the chosen platform's manifest.
    pub digest: Digest,
    /// Digest of the index that it was chosen from, if there was one.
    pub index_digest: Option<Digest>,
    /// The manifest; it can be run.
    pub manifest: Manifest,
    /// The platform asked for.
    pub platform: Platform,
}

impl RegistryClient {
    /// Finds the manifest of a reference for a platform, verified down to its digest.
    ///
    /// # Errors
    /// [`ImageError::NotFound`], [`ImageError::PlatformNotAvailable`], [`ImageError::Unauthorized`],
    /// [`ImageError::RateLimited`], [`ImageError::DigestMismatch`], [`ImageError::InvalidDocument`],
    /// [`ImageError::Unsupported`], [`ImageError::TooLarge`], [`ImageError::UnsafeServer`], [`ImageError::Network`].
    pub async fn resolve(
        &self,
        reference: &Reference,
        platform: &Platform,
        credentials: Option<&Credentials>,
    ) -> Result<Resolved> {
        let session = self.reading(reference, credentials).await?;
        let mut document = fetch(&session, reference, &reference.manifest_selector(), None).await?;
        let mut index_digest = None;
        for _ in 0..MAX_INDEX_DEPTH {
            let index = match document {
                Document::Index(index) => index,
                Document::Manifest(manifest) => {
                    manifest.check_runnable()?;
                    if index_digest.is_none() {
                        let config = fetch_config(&session, &manifest).await?;
                        config.check_platform(platform)?;
                    }
                    let (digest, platform) = (manifest.digest, platform.clone());
                    return Ok(Resolved {
                        digest,
                        index_digest,
                        manifest,
                        platform,
                    });
                }
            };
            index_digest.get_or_insert(index.digest);
            let entry = manifest::choose(&index, platform)?;
            if entry.size > MAX_DOCUMENT_BYTES {
                return Err(ImageError::TooLarge {
                    what: "manifest".to_owned(),
                    limit: MAX_DOCUMENT_BYTES,
                });
            }
            let selector = entry.digest.to_string();
            document = fetch(&session, reference, &selector, Some((entry.digest, entry.size))).await?;
        }
        Err(ImageError::document("index", "it nests too deeply"))
    }

    /// A session in which documents are read; nobody can cancel it but by dropping its future.
    async fn reading(&self, reference: &Reference, credentials: Option<&Credentials>) -> Result<Session> {
        let cancel = CancellationToken::new();
        Session::open(self, reference, Access::Pull, credentials, cancel).await
    }

    /// The digest that a reference has at the registry now, without fetching the manifest where the registry tells it.
    ///
    /// # Errors
    /// As [`RegistryClient::resolve`].
    pub async fn head(&self, reference: &Reference, credentials: Option<&Credentials>) -> Result<Digest> {
        let session = self.reading(reference, credentials).await?;
        let mut call = session.get(
            Method::HEAD,
            &format!("manifests/{}", reference.manifest_selector()),
        )?;
        call.headers
            .insert(ACCEPT, HeaderValue::from_static(media_type::ACCEPT_MANIFESTS));
        let response = session.call(&call).await?;
        match response.status() {
            StatusCode::OK => {}
            StatusCode::NOT_FOUND => return Err(ImageError::NotFound(format!("image {reference}"))),
            _ => return Err(session.status_error(response, "the registry").await),
        }
        let stated = response
            .headers()
            .get(DIGEST_HEADER)
            .and_then(|value| value.to_str().ok());
        match stated.map(Digest::parse) {
            Some(Ok(digest)) => match reference.digest() {
                Some(expected) if *expected != digest => Err(ImageError::DigestMismatch {
                    expected: *expected,
                    actual: digest,
                }),
                _ => Ok(digest),
            },
            _ => Ok(fetch(&session, reference, &reference.manifest_selector(), None)
                .await?
                .digest()),
        }
    }
}

/// Fetches and verifies a manifest or index.
async fn fetch(
    session: &Session,
    reference: &Reference,
    selector: &str,
    expected: Option<(Digest, u64)>,
) -> Result<Document> {
    let mut call = session.get(Method::GET, &format!("manifests/{selector}"))?;
    call.headers
        .insert(ACCEPT, HeaderValue::from_static(media_type::ACCEPT_MANIFESTS));
    let response = session.call(&call).await?;
    match response.status() {
        StatusCode::OK => {}
        StatusCode::NOT_FOUND => return Err(ImageError::NotFound(format!("image {reference}"))),
        _ => return Err(session.status_error(response, "the registry").await),
    }
    let header = |name: &str| {
        response
            .headers()
            .get(name)
            .and_then(|value| value.to_str().ok())
            .map(str::to_owned)
    };
    let content_type = header(CONTENT_TYPE.as_str());
    let stated = header(DIGEST_HEADER);
    let raw = read_limited(
        response,
        MAX_DOCUMENT_BYTES,
        session.client.shared.options.idle_timeout,
        "manifest",
    )
    .await?;
    let actual = Digest::of(&raw);
    let asked = Digest::parse(selector).ok();
    let stated = stated.as_deref().and_then(|text| Digest::parse(text).ok());
    for expected in [asked, stated].into_iter().flatten() {
        if expected != actual {
            return Err(ImageError::DigestMismatch { expected, actual });
        }
    }
    if let Some((_, size)) = expected
        && size != raw.len() as u64
    {
        let what = format!("manifest {selector}");
        return Err(ImageError::SizeMismatch {
            what,
            expected: size,
            actual: raw.len() as u64,
        });
    }
    Document::parse(raw, content_type.as_deref())
}

/// Fetches and verifies an image config, into memory.
async fn fetch_config(session: &Session, manifest: &Manifest) -> Result<ImageConfig> {
    let config = &manifest.config;
    let call = session.get(Method::GET, &format!("blobs/{}", config.digest))?;
    let response = session.call(&call).await?;
    match response.status() {
        StatusCode::OK => {}
        StatusCode::NOT_FOUND => return Err(ImageError::NotFound(format!("image config {}", config.digest))),
        _ => return Err(session.status_error(response, "the registry").await),
    }
    let idle = session.client.shared.options.idle_timeout;
    let raw: Bytes = read_limited(
        response,
        config.size.min(MAX_DOCUMENT_BYTES),
        idle,
        "image config",
    )
    .await?;
    match Digest::of(&raw) {
        actual if actual == config.digest => ImageConfig::parse(raw),
        actual => Err(ImageError::DigestMismatch {
            expected: config.digest,
            actual,
        }),
    }
}
