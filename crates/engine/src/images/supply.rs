//! Images for instances: ready when one boots, kept while one needs them, refused when the disk is too small.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use hypeman_images::Platform;

use super::catalog::{Catalog, not_found};
use super::model::{CreateImage, Image, ImageStatus, RuntimeConfig};
use crate::EngineError;

impl Catalog {
    /// Has an image ready for an instance: pulls it when it is not here, within `patience`.
    pub(crate) async fn ensure_ready(
        self: &Arc<Self>,
        name: &str,
        platform: Option<&str>,
        patience: Duration,
    ) -> Result<Image, EngineError> {
        let wanted = match platform {
            Some(text) => Platform::parse_supported(text)?,
            None => Platform::host(),
        };
        if Platform::host().rank(&wanted).is_none() {
            let message = format!(
                "instances here run images for {}, not for {wanted}",
                Platform::host()
            );
            return Err(EngineError::invalid("invalid_platform", message));
        }
        let known = self.get(name);
        let image = match known {
            Ok(image) if image.status != ImageStatus::Failed && image.platform == wanted.to_string() => image,
            Ok(image) if image.platform == wanted.to_string() => {
                let reason = image.error.unwrap_or_default();
                return Err(EngineError::ImageNotReady(format!(
                    "image {} failed: {reason}; pull it again after the cause is removed",
                    image.name
                )));
            }
            Ok(_) | Err(EngineError::NotFound { .. }) => {
                let platform = platform.map(str::to_owned);
                let request = CreateImage {
                    name: name.to_owned(),
                    platform,
                    credentials: None,
                    tags: BTreeMap::new(),
                };
                self.create(request).await?
            }
            Err(error) => return Err(error),
        };
        let settled = async {
            loop {
                let changed = self.changed.notified();
                let now = self.get(&image.name)?;
                match now.status {
                    ImageStatus::Ready => return Ok(now),
                    ImageStatus::Failed => {
                        let reason = now.error.unwrap_or_default();
                        return Err(EngineError::ImageNotReady(format!(
                            "image {} failed: {reason}",
                            now.name
                        )));
                    }
                    _ => tokio::select! {
                        () = changed => {}
                        () = self.closing.cancelled() => return Err(EngineError::ShuttingDown),
                    },
                }
            }
        };
        tokio::time::timeout(patience, settled).await.unwrap_or_else(|_| {
            Err(EngineError::ImageNotReady(format!(
                "image {} is still being prepared; wait until GET /images shows it ready, then retry",
                image.name
            )))
        })
    }

    /// The configuration of a root disk that exists.
    pub(crate) fn bootable(&self, digest: &str) -> Result<RuntimeConfig, EngineError> {
        let state = self.state();
        match state.contents.get(digest) {
            Some(content) if content.status == ImageStatus::Ready => Ok(content.config.clone()),
            _ => Err(not_found(digest)),
        }
    }

    /// Counts an instance that boots from `digest`.
    pub(crate) fn retain(&self, digest: &str) {
        *self.state().in_use.entry(digest.to_owned()).or_default() += 1;
    }

    /// The reverse of [`Catalog::retain`].
    pub(crate) fn release(&self, digest: &str) {
        let mut state = self.state();
        if let Some(count) = state.in_use.get_mut(digest) {
            *count -= 1;
            if *count == 0 {
                state.in_use.remove(digest);
            }
        }
    }

    /// Bytes of all root disks.
    pub(crate) fn root_disk_bytes(&self) -> u64 {
        self.state()
            .contents
            .values()
            .filter_map(|content| content.size_bytes)
            .sum()
    }

    /// Refuses a pull that the data disk has no room for.
    pub(super) fn check_disk(&self, layer_bytes: u64, digest: &str) -> Result<(), EngineError> {
        if self
            .state()
            .contents
            .get(digest)
            .is_some_and(|content| content.status == ImageStatus::Ready)
        {
            return Ok(());
        }
        let (free, _) = self.data_disk()?;
        if free < self.limits.min_free_disk.saturating_add(layer_bytes) {
            return Err(EngineError::InsufficientResources(format!(
                "the data disk has {} MiB free; pulling this image needs {} MiB plus a reserve of {} MiB",
                free >> 20,
                layer_bytes >> 20,
                self.limits.min_free_disk >> 20
            )));
        }
        self.check_budget(layer_bytes)
    }

    /// Refuses more root disks than this server may hold.
    pub(super) fn check_budget(&self, more_bytes: u64) -> Result<(), EngineError> {
        let (_, whole) = self.data_disk()?;
        let held = self.root_disk_bytes();
        #[allow(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss
        )]
        let budget = (whole as f64 * self.limits.max_image_storage) as u64;
        if held.saturating_add(more_bytes) > budget {
            return Err(EngineError::InsufficientResources(format!(
                "images take {} MiB of a budget of {} MiB; delete unused ones or raise limits.max_image_storage",
                held >> 20,
                budget >> 20
            )));
        }
        Ok(())
    }

    /// Refuses conversions that take more than there is for them.
    pub(super) fn check_room(&self) -> Result<(), EngineError> {
        self.check_reserve()?;
        self.check_budget(self.unfinished_bytes()?)
    }

    /// Bytes of the root disks that are being written.
    fn unfinished_bytes(&self) -> Result<u64, EngineError> {
        let failed = |error| EngineError::io("inspect the conversions under way", error);
        let mut bytes = 0;
        for entry in std::fs::read_dir(self.layout.image_work()).map_err(failed)? {
            // One that has just ended counts as what it became.
            bytes += entry
                .map_err(failed)?
                .metadata()
                .map_or(0, |metadata| metadata.len());
        }
        Ok(bytes)
    }

    /// Free and all bytes of the disk that holds the data directory.
    fn data_disk(&self) -> Result<(u64, u64), EngineError> {
        let disk = rustix::fs::statvfs(self.layout.root())
            .map_err(|error| EngineError::io("inspect the data disk", error.into()))?;
        Ok((disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize))
    }

    /// Refuses to go on writing into the reserve of the data disk.
    pub(crate) fn check_reserve(&self) -> Result<(), EngineError> {
        let (free, _) = self.data_disk()?;
        if free >= self.limits.min_free_disk {
            return Ok(());
        }
        Err(EngineError::InsufficientResources(format!(
            "no space: the data disk has {} MiB free and keeps a reserve of {} MiB; delete something first",
            free >> 20,
            self.limits.min_free_disk >> 20
        )))
    }
}
