//! Garbage collection: contents that nothing points to, files that belong to no content, blobs that nobody needs.

use std::collections::HashSet;

use hypeman_images::manifest::Document;
use hypeman_images::{Digest, ImageError};

use super::catalog::{Catalog, Changes};
use super::promises::PROMISE;
use crate::EngineError;
use crate::durable;
use crate::layout::Layout;

impl Catalog {
    /// Removes a content when neither a reference nor an instance needs it.
    pub(crate) async fn collect_unused(&self, digest: &str) {
        let changes = self.changes().await;
        self.collect(&changes, digest).await;
    }

    /// As [`Catalog::collect_unused`], for whoever changes something already.
    pub(super) async fn collect(&self, _: &Changes<'_>, digest: &str) {
        let content = {
            let mut state = self.state();
            let referenced = state.references.values().any(|(other, _)| other == digest);
            if referenced || state.in_use.contains_key(digest) {
                return;
            }
            // Who asks for the digest again gets a job of its own.
            if let Some(job) = state.jobs.remove(digest) {
                job.cancel.cancel();
            }
            state.contents.remove(digest)
        };
        let Some(content) = content else { return };
        let key = content.digest.clone();
        let removed = self
            .store
            .write(move |connection| hypeman_store::images::delete_content(connection, &key))
            .await;
        if let Err(error) = removed {
            tracing::warn!(%digest, %error, "content not removed; the next start tries again");
            return;
        }
        if let Err(error) = durable::remove_tree(&self.layout.image(digest)) {
            tracing::warn!(%digest, %error, "root disk not removed; the next start tries again");
        }
        if let Err(error) = self.remove_blobs(content.blobs).await {
            tracing::warn!(%digest, %error, "blobs not removed; the periodic collection tries again");
        }
    }

    /// Removes those of `candidates` that nothing needs.
    async fn remove_blobs(&self, candidates: Vec<String>) -> Result<(), EngineError> {
        let needed = self.needed_blobs().await?;
        let unneeded = candidates.iter().filter(|blob| !needed.contains(*blob));
        self.delete_blobs(unneeded.filter_map(|blob| Digest::parse(blob).ok()))
            .await
    }

    /// Blobs that a content or a repository of the registry refers to, directly or through an index.
    ///
    /// # Errors
    /// A document could not be read: what it refers to must not be taken for unneeded.
    pub(super) async fn needed_blobs(&self) -> Result<HashSet<String>, EngineError> {
        let mut needed: HashSet<String> = self
            .state()
            .contents
            .values()
            .flat_map(|content| content.blobs.iter().cloned())
            .collect();
        let mut documents = Vec::new();
        for manifest in self.store.read(hypeman_store::registry::all_digests)? {
            documents.push(Digest::parse(&manifest)?);
        }
        let mut seen = HashSet::new();
        while let Some(digest) = documents.pop() {
            needed.insert(digest.to_string());
            if !seen.insert(digest.to_string()) {
                continue;
            }
            let raw = match self.blobs.read_document(&digest).await {
                Ok(raw) => raw,
                Err(
                    ImageError::NotFound(_) | ImageError::DigestMismatch { .. } | ImageError::TooLarge { .. },
                ) => {
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let Ok(document) = Document::parse(raw, None) else {
                continue;
            };
            needed.extend(document.references().iter().map(|blob| blob.digest.to_string()));
            if let Document::Index(index) = &document {
                documents.extend(index.manifests.iter().map(|entry| entry.digest));
            }
        }
        Ok(needed)
    }

    /// The periodic collection: uploads that nobody goes on with, blobs that nobody needs.
    pub(crate) async fn collect_blobs(&self) -> Result<(), EngineError> {
        self.blobs.sweep().await?;
        let _changes = self.changes().await;
        let needed = self.needed_blobs().await?;
        // A younger one may belong to a push or a pull that goes on.
        let old =
            |blob: &hypeman_images::blobs::BlobInfo| blob.modified.elapsed().is_ok_and(|age| age >= PROMISE);
        let listed = self.blobs.list().await?;
        let unneeded = listed
            .iter()
            .filter(|blob| old(blob) && !needed.contains(&blob.digest.to_string()));
        self.delete_blobs(unneeded.map(|blob| blob.digest)).await
    }

    /// At the start: conversions that were cut and root disks without a content.
    pub(super) fn sweep_files(&self) -> Result<(), EngineError> {
        let known: HashSet<_> = self
            .state()
            .contents
            .keys()
            .map(|digest| self.layout.image(digest))
            .collect();
        sweep(&self.layout, &known).map_err(|error| EngineError::io("sweep unfinished images", error))
    }
}

fn sweep(layout: &Layout, known: &HashSet<std::path::PathBuf>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(layout.image_work())? {
        std::fs::remove_file(entry?.path())?;
    }
    for entry in std::fs::read_dir(layout.images())? {
        let path = entry?.path();
        if path != layout.image_work() && !known.contains(&path) {
            durable::remove_tree(&path)?;
        }
    }
    Ok(())
}
