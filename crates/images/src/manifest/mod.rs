//! Manifests and indexes of both families (OCI and Docker schema 2), parsed within bounds.
//!
//! ```text
//!  Document ─┬─ Index ── entries (platform → descriptor of a manifest)
//!            └─ Manifest ─┬─ config descriptor ── ImageConfig
//!                         └─ layer descriptors
//! ```
//!
//! Invariants:
//! * `raw` is what was parsed and `digest` its hash, so a document can be passed on byte for byte.
//! * A document is either an index or a manifest; one that could be read as both is refused, because another reader
//!   might choose differently.

mod choice;
mod config;
pub mod media_type;

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

pub use choice::choose;
pub use config::ImageConfig;

use crate::digest::Digest;
use crate::error::{ImageError, Result};
use crate::platform::Platform;

/// Largest manifest, index or config, in bytes.
pub const MAX_DOCUMENT_BYTES: u64 = 4 << 20;
/// Most layers in a runnable image.
pub const MAX_LAYERS: usize = 127;
/// Largest single blob that a manifest may name, in bytes.
pub const MAX_BLOB_BYTES: u64 = 256 << 30;
/// Most entries in an index, and most blobs in any manifest that we merely store.
const MAX_ENTRIES: usize = 4096;

/// Points to content: what it is, its digest and its size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// Media type of the content.
    pub media_type: String,
    /// Digest of the content.
    pub digest: Digest,
    /// Size of the content in bytes.
    pub size: u64,
    /// Platform, in entries of an index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// Places outside the registry that hold the content (foreign layers).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub urls: Vec<String>,
    /// Free annotations.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

impl Descriptor {
    /// A descriptor of bytes that are in memory.
    pub fn of(media_type: &str, bytes: &[u8]) -> Self {
        Self::new(media_type, Digest::of(bytes), bytes.len() as u64)
    }

    /// A descriptor without optional parts.
    pub fn new(media_type: &str, digest: Digest, size: u64) -> Self {
        Self {
            media_type: media_type.to_owned(),
            digest,
            size,
            platform: None,
            urls: Vec::new(),
            annotations: BTreeMap::new(),
        }
    }
}

/// An image manifest: one config and an ordered list of layers, the lowest first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// Media type of the document itself.
    pub media_type: String,
    /// Digest of `raw`.
    pub digest: Digest,
    /// The document as it came.
    pub raw: Bytes,
    /// The image config.
    pub config: Descriptor,
    /// The layers, the lowest first.
    pub layers: Vec<Descriptor>,
}

/// An image index (OCI) or manifest list (Docker): manifests by platform.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    /// Media type of the document itself.
    pub media_type: String,
    /// Digest of `raw`.
    pub digest: Digest,
    /// The document as it came.
    pub raw: Bytes,
    /// The entries in their order.
    pub manifests: Vec<Descriptor>,
}

/// What a `/manifests/` URL can answer with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Document {
    /// A manifest.
    Manifest(Manifest),
    /// An index.
    Index(Index),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Wire {
    schema_version: Option<u64>,
    media_type: Option<String>,
    #[serde(default)]
    config: Option<LooseDescriptor>,
    #[serde(default)]
    layers: Option<Vec<LooseDescriptor>>,
    #[serde(default)]
    manifests: Option<Vec<LooseDescriptor>>,
    #[serde(default)]
    fs_layers: Option<serde::de::IgnoredAny>,
}

/// A descriptor as registries write it: fields may be null, and a platform may be incomplete.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct LooseDescriptor {
    media_type: Option<String>,
    digest: Digest,
    size: u64,
    platform: Option<LoosePlatform>,
    urls: Option<Vec<String>>,
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
struct LoosePlatform {
    os: Option<String>,
    architecture: Option<String>,
    variant: Option<String>,
}

impl LooseDescriptor {
    fn tighten(self, what: &'static str, default_type: &str) -> Result<Descriptor> {
        if self.size > MAX_BLOB_BYTES {
            return Err(ImageError::TooLarge {
                what: format!("blob {}", self.digest),
                limit: MAX_BLOB_BYTES,
            });
        }
        let media_type = self.media_type.unwrap_or_else(|| default_type.to_owned());
        if media_type.len() > 255
            || !media_type
                .bytes()
                .all(|byte| byte.is_ascii_graphic() || byte == b' ')
        {
            return Err(ImageError::document(what, "a media type is not printable text"));
        }
        let platform = self.platform.map(|loose| Platform {
            os: loose.os.unwrap_or_default(),
            architecture: loose.architecture.unwrap_or_default(),
            variant: loose.variant.filter(|variant| !variant.is_empty()),
        });
        Ok(Descriptor {
            media_type,
            digest: self.digest,
            size: self.size,
            platform,
            urls: self.urls.unwrap_or_default(),
            annotations: self.annotations.unwrap_or_default(),
        })
    }
}

impl Document {
    /// Parses a manifest or an index. `content_type` is the media type that the transport announced, if any; it must
    /// not contradict the document.
    ///
    /// This accepts whatever a registry may store, artifacts and build caches included; ask
    /// [`Manifest::check_runnable`] before running one.
    ///
    /// # Errors
    /// [`ImageError::TooLarge`], [`ImageError::Unsupported`] for schema 1, [`ImageError::InvalidDocument`].
    pub fn parse(raw: Bytes, content_type: Option<&str>) -> Result<Self> {
        const WHAT: &str = "manifest";
        if raw.len() as u64 > MAX_DOCUMENT_BYTES {
            return Err(ImageError::TooLarge {
                what: WHAT.to_owned(),
                limit: MAX_DOCUMENT_BYTES,
            });
        }
        let announced = content_type
            .map(media_type::essence)
            .filter(|kind| media_type::is_document(kind));
        if announced.is_some_and(media_type::is_schema_one) {
            return Err(schema_one());
        }
        let wire: Wire =
            serde_json::from_slice(&raw).map_err(|error| ImageError::document(WHAT, error.to_string()))?;
        if wire.schema_version == Some(1) || wire.fs_layers.is_some() {
            return Err(schema_one());
        }
        if wire.schema_version != Some(2) {
            return Err(ImageError::document(WHAT, "schemaVersion is not 2"));
        }
        if let (Some(announced), Some(stated)) = (announced, wire.media_type.as_deref())
            && announced != stated
        {
            let reason = format!("it says it is {stated:?} but was served as {announced:?}");
            return Err(ImageError::document(WHAT, reason));
        }
        let stated = wire.media_type.as_deref().or(announced).map(str::to_owned);
        let digest = Digest::of(&raw);
        match (wire.manifests, wire.config, wire.layers) {
            (Some(entries), None, None) => {
                let media_type = stated.unwrap_or_else(|| media_type::OCI_INDEX.to_owned());
                if !media_type::is_index(&media_type) {
                    return Err(ImageError::document(
                        WHAT,
                        format!("an index cannot be {media_type:?}"),
                    ));
                }
                let manifests = tighten_all(entries, "index", media_type::OCI_MANIFEST)?;
                Ok(Self::Index(Index {
                    media_type,
                    digest,
                    raw,
                    manifests,
                }))
            }
            (None, Some(config), layers) => {
                let media_type = stated.unwrap_or_else(|| media_type::OCI_MANIFEST.to_owned());
                if media_type::is_index(&media_type) || media_type.len() > 255 {
                    return Err(ImageError::document(
                        WHAT,
                        format!("a manifest cannot be {media_type:?}"),
                    ));
                }
                let config = config.tighten(WHAT, media_type::OCI_CONFIG)?;
                let layers = tighten_all(layers.unwrap_or_default(), WHAT, "application/octet-stream")?;
                Ok(Self::Manifest(Manifest {
                    media_type,
                    digest,
                    raw,
                    config,
                    layers,
                }))
            }
            (Some(_), _, _) => Err(ImageError::document(
                WHAT,
                "it is an index and a manifest at once",
            )),
            (None, None, _) => Err(ImageError::document(
                WHAT,
                "it has neither a config nor manifests",
            )),
        }
    }

    /// Digest of the document.
    pub fn digest(&self) -> Digest {
        match self {
            Self::Manifest(manifest) => manifest.digest,
            Self::Index(index) => index.digest,
        }
    }

    /// Media type of the document.
    pub fn media_type(&self) -> &str {
        match self {
            Self::Manifest(manifest) => &manifest.media_type,
            Self::Index(index) => &index.media_type,
        }
    }

    /// The document as it came.
    pub fn raw(&self) -> &Bytes {
        match self {
            Self::Manifest(manifest) => &manifest.raw,
            Self::Index(index) => &index.raw,
        }
    }

    /// Everything that the document points to: entries of an index, or config and layers of a manifest.
    pub fn references(&self) -> Vec<&Descriptor> {
        match self {
            Self::Manifest(manifest) => std::iter::once(&manifest.config)
                .chain(&manifest.layers)
                .collect(),
            Self::Index(index) => index.manifests.iter().collect(),
        }
    }
}

fn tighten_all(
    loose: Vec<LooseDescriptor>,
    what: &'static str,
    default_type: &str,
) -> Result<Vec<Descriptor>> {
    if loose.len() > MAX_ENTRIES {
        return Err(ImageError::document(
            what,
            format!("it has more than {MAX_ENTRIES} entries"),
        ));
    }
    loose
        .into_iter()
        .map(|descriptor| descriptor.tighten(what, default_type))
        .collect()
}

fn schema_one() -> ImageError {
    ImageError::Unsupported(
        "the manifest has schema version 1, which cannot be verified; push the image again with a current tool"
            .to_owned(),
    )
}

impl Manifest {
    /// Parses a document that must be a manifest.
    ///
    /// # Errors
    /// As [`Document::parse`]; [`ImageError::InvalidDocument`] for an index.
    pub fn parse(raw: Bytes, content_type: Option<&str>) -> Result<Self> {
        match Document::parse(raw, content_type)? {
            Document::Manifest(manifest) => Ok(manifest),
            Document::Index(_) => Err(ImageError::document("manifest", "it is an index, not a manifest")),
        }
    }

    /// Sum of the layers' sizes as transferred, in bytes.
    pub fn layer_bytes(&self) -> u64 {
        self.layers
            .iter()
            .fold(0, |total, layer| total.saturating_add(layer.size))
    }

    /// Whether a guest can be made of this manifest.
    ///
    /// # Errors
    /// [`ImageError::Unsupported`] for anything but an image of ordinary layers: artifacts, foreign
    /// (non-distributable) and encrypted layers, too many layers. [`ImageError::TooLarge`] for an oversized config.
    pub fn check_runnable(&self) -> Result<()> {
        let refuse = |reason: String| Err(ImageError::Unsupported(reason));
        if !media_type::is_config(&self.config.media_type) {
            return refuse(format!(
                "{} is not a container image (config {:?})",
                self.digest, self.config.media_type
            ));
        }
        if self.config.size > MAX_DOCUMENT_BYTES {
            return Err(ImageError::TooLarge {
                what: "image config".to_owned(),
                limit: MAX_DOCUMENT_BYTES,
            });
        }
        if self.layers.len() > MAX_LAYERS {
            return refuse(format!(
                "it has {} layers; the limit is {MAX_LAYERS}",
                self.layers.len()
            ));
        }
        for layer in &self.layers {
            let kind = layer.media_type.as_str();
            if media_type::is_encrypted(kind) {
                return refuse(format!("layer {} is encrypted", layer.digest));
            }
            if media_type::is_foreign(kind) || !layer.urls.is_empty() {
                return refuse(format!(
                    "layer {} is foreign: it is not in the registry",
                    layer.digest
                ));
            }
            if !media_type::is_layer(kind) {
                return refuse(format!(
                    "layer {} has the unknown media type {kind:?}",
                    layer.digest
                ));
            }
        }
        Ok(())
    }

    /// The same image as an OCI manifest. Only media types change, so config and layers keep their digests; the
    /// manifest's own digest changes unless it is OCI already.
    ///
    /// # Errors
    /// [`ImageError::InvalidDocument`] when it cannot be written as JSON.
    pub fn to_oci(&self) -> Result<Self> {
        if self.media_type == media_type::OCI_MANIFEST {
            return Ok(self.clone());
        }
        let convert = |descriptor: &Descriptor| Descriptor {
            media_type: media_type::to_oci(&descriptor.media_type).to_owned(),
            ..descriptor.clone()
        };
        Self::assemble(
            media_type::OCI_MANIFEST,
            convert(&self.config),
            self.layers.iter().map(convert).collect::<Vec<_>>(),
        )
    }

    /// Writes a new manifest.
    ///
    /// # Errors
    /// [`ImageError::InvalidDocument`] when it cannot be written as JSON.
    pub fn assemble(media_type: &str, config: Descriptor, layers: Vec<Descriptor>) -> Result<Self> {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Out<'a> {
            schema_version: u32,
            media_type: &'a str,
            config: &'a Descriptor,
            layers: &'a [Descriptor],
        }
        let out = Out {
            schema_version: 2,
            media_type,
            config: &config,
            layers: &layers,
        };
        let raw =
            serde_json::to_vec(&out).map_err(|error| ImageError::document("manifest", error.to_string()))?;
        let digest = Digest::of(&raw);
        Ok(Self {
            media_type: media_type.to_owned(),
            digest,
            raw: raw.into(),
            config,
            layers,
        })
    }
}
