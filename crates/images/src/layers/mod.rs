//! Layers as streams.

use std::io::Read;

/// Opens a layer's bytes as stored.
pub type OpenLayer = Box<dyn Fn() -> std::io::Result<Box<dyn Read + Send>> + Send + Sync>;

/// One layer of an image, ready to be read.
pub struct LayerSource {
    /// Media type, which names the compression.
    pub media_type: String,
    /// Digest of the bytes as stored, `sha256:…`.
    pub digest: Option<String>,
    /// Size of the bytes as stored.
    pub size: u64,
    /// Digest of the uncompressed bytes, `sha256:…`.
    pub diff_id: Option<String>,
    /// Opens the bytes as stored.
    pub open: OpenLayer,
}
