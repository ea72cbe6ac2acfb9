//! Blobs that a client was told are here, so that it does not store them again, until its manifest names them.
//!
//! Invariant: between the answer to the client and the end of the promise, no collection removes the blob, whatever
//! else is deleted meanwhile. Answer and removal take turns by one lock.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use hypeman_images::Digest;
use hypeman_images::manifest::Document;

use super::catalog::Catalog;
use crate::EngineError;

/// How long a client may take from finding a blob to naming it.
pub(super) const PROMISE: Duration = Duration::from_secs(3600);

/// When each promise was given. Lost with the process, as are the uploads of its clients.
#[derive(Debug, Default)]
pub(super) struct Promises(tokio::sync::Mutex<HashMap<Digest, Instant>>);

impl Catalog {
    /// Bytes of a blob, if it is here; it stays until a manifest names it, or for an hour.
    pub(crate) async fn promise_blob(&self, digest: &Digest) -> Result<Option<u64>, EngineError> {
        let mut promised = self.promises.0.lock().await;
        let size = self.blobs.touch(digest).await?;
        if size.is_some() {
            promised.insert(*digest, Instant::now());
        }
        Ok(size)
    }

    /// A manifest has come: what it names is needed for its sake from now on.
    pub(super) async fn promises_kept(&self, document: &Document) {
        let mut promised = self.promises.0.lock().await;
        for blob in document.references() {
            promised.remove(&blob.digest);
        }
    }

    /// Removes those of `blobs`, which nothing needs, that were not promised to anybody.
    pub(super) async fn delete_blobs(&self, blobs: impl Iterator<Item = Digest>) -> Result<(), EngineError> {
        for digest in blobs {
            let mut promised = self.promises.0.lock().await;
            promised.retain(|_, given| given.elapsed() < PROMISE);
            if !promised.contains_key(&digest) {
                self.blobs.delete(&digest).await?;
            }
        }
        Ok(())
    }
}
