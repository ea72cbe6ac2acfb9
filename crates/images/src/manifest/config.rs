//! The image config: how to run the image, and which layer contents it is made of.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::Deserialize;

use super::{MAX_DOCUMENT_BYTES, Manifest};
use crate::digest::Digest;
use crate::error::{ImageError, Result};
use crate::platform::Platform;

const WHAT: &str = "image config";

/// The parts of an image config that matter to run it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageConfig {
    /// The config as it came.
    pub raw: Bytes,
    /// Platform that the image was made for; parts that the config leaves out are empty.
    pub platform: Platform,
    /// Program and fixed arguments.
    pub entrypoint: Vec<String>,
    /// Arguments, or program and arguments when there is no entrypoint.
    pub cmd: Vec<String>,
    /// `NAME=value` lines in their order.
    pub env: Vec<String>,
    /// Directory to start in; empty means `/`.
    pub working_dir: String,
    /// `user[:group]`, names or numbers; empty means root.
    pub user: String,
    /// Signal that asks the program to stop, as `SIGTERM` or `15`.
    pub stop_signal: Option<String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Ports that the program listens on: `80/tcp`.
    pub exposed_ports: Vec<String>,
    /// Directories meant to be volumes.
    pub volumes: Vec<String>,
    /// When the image was made, as the config says it.
    pub created: Option<String>,
    /// Digests of the uncompressed layers, the lowest first.
    pub diff_ids: Vec<Digest>,
}

#[derive(Deserialize)]
struct Wire {
    os: Option<String>,
    architecture: Option<String>,
    variant: Option<String>,
    created: Option<String>,
    config: Option<WireRun>,
    rootfs: Option<WireRootfs>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase")]
struct WireRun {
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    env: Option<Vec<String>>,
    working_dir: Option<String>,
    user: Option<String>,
    stop_signal: Option<String>,
    labels: Option<BTreeMap<String, String>>,
    exposed_ports: Option<BTreeMap<String, serde::de::IgnoredAny>>,
    volumes: Option<BTreeMap<String, serde::de::IgnoredAny>>,
}

#[derive(Deserialize)]
struct WireRootfs {
    #[serde(rename = "type")]
    kind: Option<String>,
    diff_ids: Option<Vec<Digest>>,
}

impl ImageConfig {
    /// Parses a config.
    ///
    /// # Errors
    /// [`ImageError::TooLarge`], [`ImageError::InvalidDocument`].
    pub fn parse(raw: Bytes) -> Result<Self> {
        if raw.len() as u64 > MAX_DOCUMENT_BYTES {
            return Err(ImageError::TooLarge {
                what: WHAT.to_owned(),
                limit: MAX_DOCUMENT_BYTES,
            });
        }
        let wire: Wire =
            serde_json::from_slice(&raw).map_err(|error| ImageError::document(WHAT, error.to_string()))?;
        let run = wire.config.unwrap_or_default();
        let rootfs = wire
            .rootfs
            .ok_or_else(|| ImageError::document(WHAT, "it has no rootfs"))?;
        if rootfs.kind.is_some_and(|kind| kind != "layers") {
            return Err(ImageError::document(WHAT, "its rootfs is not made of layers"));
        }
        let config = Self {
            raw,
            platform: Platform {
                os: wire.os.unwrap_or_default(),
                architecture: wire.architecture.unwrap_or_default(),
                variant: wire.variant.filter(|variant| !variant.is_empty()),
            },
            entrypoint: run.entrypoint.unwrap_or_default(),
            cmd: run.cmd.unwrap_or_default(),
            env: run.env.unwrap_or_default(),
            working_dir: run.working_dir.unwrap_or_default(),
            user: run.user.unwrap_or_default(),
            stop_signal: run.stop_signal.filter(|signal| !signal.is_empty()),
            labels: run.labels.unwrap_or_default(),
            exposed_ports: run.exposed_ports.unwrap_or_default().into_keys().collect(),
            volumes: run.volumes.unwrap_or_default().into_keys().collect(),
            created: wire.created,
            diff_ids: rootfs.diff_ids.unwrap_or_default(),
        };
        config.check_text()?;
        Ok(config)
    }

    /// Refuses what no process could be started with: NUL bytes anywhere, environment lines without a name.
    fn check_text(&self) -> Result<()> {
        let run = [&self.working_dir, &self.user];
        let texts = self
            .entrypoint
            .iter()
            .chain(&self.cmd)
            .chain(&self.env)
            .chain(run)
            .chain(&self.stop_signal);
        if texts.into_iter().any(|text| text.contains('\0')) {
            return Err(ImageError::document(
                WHAT,
                "it has a NUL byte in its command, environment, user or directory",
            ));
        }
        if self
            .env
            .iter()
            .any(|line| line.is_empty() || line.starts_with('='))
        {
            return Err(ImageError::document(WHAT, "an environment variable has no name"));
        }
        Ok(())
    }

    /// Checks that the config belongs to a manifest: one uncompressed digest for each layer.
    ///
    /// # Errors
    /// [`ImageError::InvalidDocument`].
    pub fn check_matches(&self, manifest: &Manifest) -> Result<()> {
        let (named, present) = (self.diff_ids.len(), manifest.layers.len());
        if named == present {
            return Ok(());
        }
        Err(ImageError::document(
            WHAT,
            format!("it names {named} layers but the manifest has {present}"),
        ))
    }

    /// Checks the platform of an image that came without an index. Parts that the config leaves out match anything.
    ///
    /// # Errors
    /// [`ImageError::PlatformNotAvailable`].
    pub fn check_platform(&self, wanted: &Platform) -> Result<()> {
        let mut stated = self.platform.clone();
        if stated.os.is_empty() {
            stated.os.clone_from(&wanted.os);
        }
        if stated.architecture.is_empty() {
            stated.architecture.clone_from(&wanted.architecture);
        }
        match wanted.rank(&stated) {
            Some(_) => Ok(()),
            None => Err(ImageError::PlatformNotAvailable {
                wanted: wanted.to_string(),
                available: vec![stated.to_string().chars().take(64).collect()],
            }),
        }
    }
}
