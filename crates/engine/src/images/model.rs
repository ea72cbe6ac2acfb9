//! What an image is for clients.

use std::collections::BTreeMap;

use hypeman_images::Credentials;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// A request to have an image.
#[derive(Debug, Clone)]
pub struct CreateImage {
    /// Reference as given; normalised by the engine.
    pub name: String,
    /// `linux/amd64` or alike; the host's when absent.
    pub platform: Option<String>,
    /// Borrowed for this one pull, kept in memory only.
    pub credentials: Option<Credentials>,
    /// User-defined tags.
    pub tags: BTreeMap<String, String>,
}

/// Where an image is on its way to a root disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum ImageStatus {
    Pending,
    Pulling,
    Converting,
    Ready,
    Failed,
}

/// An image as a client sees it: a reference and what it points to.
#[derive(Debug, Clone, PartialEq)]
pub struct Image {
    /// Canonical reference.
    pub name: String,
    /// Digest of the platform's manifest.
    pub digest: String,
    /// Platform of that manifest.
    pub platform: String,
    /// Progress.
    pub status: ImageStatus,
    /// 1-based place in the queue, while queued.
    pub queue_position: Option<u32>,
    /// Share of the current step that is done, 0 to 1, while pulling or converting.
    pub progress: Option<f64>,
    /// Why it failed.
    pub error: Option<String>,
    /// Size of the root disk in bytes, when ready.
    pub size_bytes: Option<u64>,
    /// Entrypoint of the image's configuration.
    pub entrypoint: Vec<String>,
    /// Command of the image's configuration.
    pub cmd: Vec<String>,
    /// Environment, `NAME=value`.
    pub env: Vec<String>,
    /// Working directory.
    pub working_dir: String,
    /// User-defined tags.
    pub tags: BTreeMap<String, String>,
    /// When the reference was made.
    pub created_at: Timestamp,
}

/// What of the image's configuration a guest needs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RuntimeConfig {
    pub(crate) entrypoint: Vec<String>,
    pub(crate) cmd: Vec<String>,
    pub(crate) env: Vec<String>,
    pub(crate) working_dir: String,
    pub(crate) user: String,
}

impl From<&hypeman_images::ImageConfig> for RuntimeConfig {
    fn from(config: &hypeman_images::ImageConfig) -> Self {
        Self {
            entrypoint: config.entrypoint.clone(),
            cmd: config.cmd.clone(),
            env: config.env.clone(),
            working_dir: config.working_dir.clone(),
            user: config.user.clone(),
        }
    }
}

/// A stored content: a manifest of one platform and the root disk made of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Content {
    /// Digest of the manifest.
    pub(crate) digest: String,
    pub(crate) platform: String,
    /// `Pending`, `Ready` or `Failed`: the steps between are known to the job alone.
    pub(crate) status: ImageStatus,
    pub(crate) error: Option<String>,
    pub(crate) size_bytes: Option<u64>,
    /// What the root disk holds, hex, as it was made; `None` in early records.
    #[serde(default)]
    pub(crate) seal: Option<String>,
    pub(crate) config: RuntimeConfig,
    /// Where missing blobs come from; `None` when the registry endpoints received them.
    pub(crate) upstream: Option<String>,
    /// Manifest, config and layers: what garbage collection must keep.
    pub(crate) blobs: Vec<String>,
}

/// A stored reference.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ReferenceRecord {
    pub(crate) tags: BTreeMap<String, String>,
    pub(crate) created_at: Timestamp,
}
