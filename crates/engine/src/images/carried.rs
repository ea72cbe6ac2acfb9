//! Root disks that imported snapshots brought along.
//!
//! ```text
//!   image here, same root disk ──► that one
//!   otherwise ───────────────────► images/<seal>/rootfs.erofs, content "rootdisk:<seal>", no reference
//! ```
//!
//! Such a content is used by instances and snapshots alone, and goes with the last of them.

use std::io;
use std::path::PathBuf;

use super::catalog::Catalog;
use super::model::{Content, ImageStatus, RuntimeConfig};
use crate::layout::make_private;
use crate::{EngineError, durable, faults};

/// Begins the name of a root disk that is known by what it holds. Digests of manifests begin otherwise.
const PREFIX: &str = "rootdisk:";

/// A root disk, complete and synced.
#[derive(Debug, Clone)]
pub(crate) struct Carried {
    /// What it holds, 64 hex digits.
    pub(crate) seal: String,
    /// Where it is, on the file system of the data directory.
    pub(crate) path: PathBuf,
    /// Its length.
    pub(crate) bytes: u64,
    /// As in `linux/amd64`.
    pub(crate) platform: String,
    /// What of the image's configuration a guest needs.
    pub(crate) config: RuntimeConfig,
}

/// Whether `name` may be that of a root disk which came along with a snapshot.
pub(crate) fn is_carried_name(name: &str) -> bool {
    name.strip_prefix(PREFIX).is_some_and(|seal| {
        seal.len() == 64
            && seal
                .bytes()
                .all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
    })
}

impl Carried {
    /// The name under which it is stored, in place of a manifest's digest.
    pub(crate) fn name(&self) -> String {
        format!("{PREFIX}{}", self.seal)
    }
}

impl Catalog {
    /// Keeps a root disk under [`Carried::name`], which the caller retains already. Its file is moved, or left where it
    /// is when the same root disk is here.
    pub(crate) async fn keep_carried(&self, carried: Carried) -> Result<(), EngineError> {
        let _changes = self.changes().await;
        let name = carried.name();
        if self.bootable(&name).is_ok() {
            return Ok(());
        }
        self.check_budget(carried.bytes)?;
        let (directory, target) = (self.layout.image(&name), self.layout.root_disk(&name));
        let Carried {
            seal,
            path,
            bytes,
            platform,
            config,
        } = carried;
        let content = Content {
            digest: name,
            platform,
            status: ImageStatus::Ready,
            error: None,
            size_bytes: Some(bytes),
            seal: Some(seal),
            config,
            upstream: None,
            blobs: Vec::new(),
        };
        let moved = tokio::task::spawn_blocking(move || -> Result<(), EngineError> {
            make_private(&directory)?;
            let name = || -> io::Result<()> {
                durable::rename(&path, &target)?;
                directory.parent().map_or(Ok(()), durable::sync_directory)
            };
            name().map_err(|error| EngineError::io("name the root disk", error))
        });
        let moved = moved
            .await
            .map_err(|error| EngineError::io("name the root disk", error.into()));
        faults::point("import.adopted");
        let stored = content.clone();
        let kept = match moved.and_then(|moved| moved) {
            Ok(()) => self
                .store
                .write(move |connection| {
                    hypeman_store::images::put_content(connection, &stored.digest, &stored)
                })
                .await
                .map_err(EngineError::from),
            Err(error) => Err(error),
        };
        if let Err(error) = kept {
            if let Err(left) = durable::remove_tree(&self.layout.image(&content.digest)) {
                tracing::warn!(error = %left, "a root disk that nobody needs is left for the next start");
            }
            return Err(error);
        }
        self.state().contents.insert(content.digest.clone(), content);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_is_that_of_no_manifest_and_of_no_path() {
        let carried = Carried {
            seal: "a0".repeat(32),
            path: PathBuf::new(),
            bytes: 0,
            platform: String::new(),
            config: RuntimeConfig::default(),
        };
        assert!(is_carried_name(&carried.name()));
        assert!(hypeman_images::Digest::parse(&carried.name()).is_err());
        for other in [
            format!("sha256:{}", "a0".repeat(32)),
            format!("rootdisk:{}", "../".repeat(22)),
            "rootdisk:".to_owned(),
        ] {
            assert!(!is_carried_name(&other), "{other}");
        }
    }
}
