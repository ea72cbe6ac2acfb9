//! The registry's repositories: what was pushed here, and how it becomes an image.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use hypeman_images::manifest::{Document, choose};
use hypeman_images::{Digest, ImageConfig, ImageError, Manifest, Platform, Reference};
use hypeman_store::{Connection, StoreError, registry};

use super::catalog::{Catalog, Pushed};
use super::model::{Content, ImageStatus, RuntimeConfig};
use super::own_name::own_registry;
use crate::{EngineError, faults};

/// Repositories below this hold build caches: kept, never made into images.
const CACHE_PREFIX: &str = "cache/";

/// A manifest that the registry serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegistryManifest {
    /// `sha256:…`; the bytes are a blob of that digest.
    pub digest: Digest,
    /// Media type under which it was pushed.
    pub media_type: String,
    /// Bytes.
    pub size: u64,
}

impl Catalog {
    /// Finds a manifest by tag or digest.
    pub(crate) fn manifest(
        &self,
        repository: &str,
        reference: &str,
    ) -> Result<Option<RegistryManifest>, EngineError> {
        let found = self.store.read(|connection| {
            if reference.contains(':') {
                registry::by_digest(connection, repository, reference)
            } else {
                registry::by_tag(connection, repository, reference)
            }
        })?;
        found
            .map(|manifest| {
                let digest = Digest::parse(&manifest.digest)?;
                Ok(RegistryManifest {
                    digest,
                    media_type: manifest.media_type,
                    size: manifest.size,
                })
            })
            .transpose()
    }

    /// Tags of a repository, sorted; `None` for one that is unknown.
    pub(crate) fn repository_tags(&self, repository: &str) -> Result<Option<Vec<String>>, EngineError> {
        Ok(self
            .store
            .read(|connection| registry::tags(connection, repository))?)
    }

    /// Accepts a manifest whose blobs are all here, and starts to make an image of it.
    pub(crate) async fn put_manifest(
        self: &Arc<Self>,
        host: &str,
        repository: &str,
        reference: &str,
        media_type: &str,
        bytes: Bytes,
    ) -> Result<Digest, EngineError> {
        let size = bytes.len() as u64;
        let document = Document::parse(bytes.clone(), Some(media_type))?;
        let digest = document.digest();
        let tag = if reference.contains(':') {
            let expected = Digest::parse(reference)?;
            if expected != digest {
                return Err(ImageError::DigestMismatch {
                    expected,
                    actual: digest,
                }
                .into());
            }
            None
        } else {
            Some(reference.to_owned())
        };
        let row = registry::Manifest {
            digest: digest.to_string(),
            media_type: document.media_type().to_owned(),
            size,
        };
        let pushed = Pushed {
            repository: repository.to_owned(),
            manifest: row,
            tag: tag.clone(),
        };
        let registry = own_registry(host, &self.foreign_registries())?;
        let changes = self.changes().await;
        self.check_complete(&document).await?;
        self.blobs.put_bytes(bytes).await?;
        faults::point("push.manifest.stored");
        let image = if repository.starts_with(CACHE_PREFIX) {
            None
        } else {
            self.runnable(document.clone(), tag.is_some()).await?
        };
        // Manifest and image appear together or not at all.
        match image {
            Some(content) => {
                let name = Reference::from_parts(&registry, repository, reference)?.to_string();
                self.adopt(&changes, name, content, BTreeMap::new(), None, Some(pushed))
                    .await?;
            }
            None => {
                self.store
                    .write(move |connection| pushed.record(connection))
                    .await?;
            }
        }
        faults::point("push.manifest.recorded");
        self.promises_kept(&document).await;
        Ok(digest)
    }

    /// Registries that images here were pulled from, as far as those are still here.
    fn foreign_registries(&self) -> BTreeSet<String> {
        let state = self.state();
        let upstreams = state
            .contents
            .values()
            .filter_map(|content| content.upstream.as_deref());
        upstreams
            .filter_map(|upstream| Reference::parse(upstream).ok())
            .map(|reference| reference.registry().to_owned())
            .collect()
    }

    /// Removes a tag, or a manifest with all its tags.
    pub(crate) async fn delete_manifest(
        self: &Arc<Self>,
        repository: &str,
        reference: &str,
    ) -> Result<bool, EngineError> {
        let (repository, reference) = (repository.to_owned(), reference.to_owned());
        Ok(self
            .store
            .write(move |connection| {
                if reference.contains(':') {
                    registry::delete_manifest(connection, &repository, &reference)
                } else {
                    registry::delete_tag(connection, &repository, &reference)
                }
            })
            .await?)
    }

    async fn check_complete(&self, document: &Document) -> Result<(), EngineError> {
        for blob in document.references() {
            match self.blobs.touch(&blob.digest).await? {
                Some(size) if size == blob.size => {}
                Some(_) => {
                    let message = format!("{} has another size than the manifest says", blob.digest);
                    return Err(EngineError::invalid("MANIFEST_INVALID", message));
                }
                None => {
                    let message = format!("{} was not uploaded", blob.digest);
                    return Err(EngineError::invalid("MANIFEST_BLOB_UNKNOWN", message));
                }
            }
        }
        Ok(())
    }

    /// The content that was pushed, if it is one that a guest here can run.
    async fn runnable(&self, document: Document, tagged: bool) -> Result<Option<Content>, EngineError> {
        let manifest = match document {
            Document::Manifest(manifest) => manifest,
            Document::Index(index) => {
                let Ok(entry) = choose(&index, &Platform::host()) else {
                    return Ok(None);
                };
                match Manifest::parse(self.blobs.read_document(&entry.digest).await?, None) {
                    Ok(manifest) => manifest,
                    Err(_) => return Ok(None),
                }
            }
        };
        if manifest.check_runnable().is_err() {
            return Ok(None);
        }
        let config = ImageConfig::parse(self.blobs.read_document(&manifest.config.digest).await?)?;
        // Members of an index are pushed by digest first; those of other platforms are of no use here.
        if !tagged && config.check_platform(&Platform::host()).is_err() {
            return Ok(None);
        }
        let digest = manifest.digest.to_string();
        let mut blobs = vec![digest.clone(), manifest.config.digest.to_string()];
        blobs.extend(manifest.layers.iter().map(|layer| layer.digest.to_string()));
        Ok(Some(Content {
            digest,
            platform: config.platform.to_string(),
            status: ImageStatus::Pending,
            error: None,
            size_bytes: None,
            seal: None,
            config: RuntimeConfig::from(&config),
            upstream: None,
            blobs,
        }))
    }
}

impl Pushed {
    pub(super) fn record(&self, connection: &Connection) -> Result<(), StoreError> {
        registry::put(connection, &self.repository, &self.manifest, self.tag.as_deref())
    }
}

/// Takes the tag behind an image's name out of the registry, when the name came from there.
pub(super) fn forget_tag(connection: &Connection, name: &str) -> Result<(), StoreError> {
    let Ok(reference) = Reference::parse(name) else {
        return Ok(());
    };
    let repository = reference.repository();
    match (reference.tag(), reference.digest()) {
        (_, Some(digest)) => registry::delete_manifest(connection, repository, &digest.to_string())?,
        (Some(tag), None) => {
            let Some(manifest) = registry::by_tag(connection, repository, tag)? else {
                return Ok(());
            };
            registry::delete_tag(connection, repository, tag)?;
            !registry::has_tags(connection, repository, &manifest.digest)?
                && registry::delete_manifest(connection, repository, &manifest.digest)?
        }
        (None, None) => false,
    };
    Ok(())
}
