//! Layers of an OCI image, turned into a read-only root disk.
//!
//! A layer is never unpacked onto the host's file system: its entries go from the stream into the image writer
//! (`hypeman-erofs`). So owners, devices and links need no privilege, and no name in an archive can ever become
//! a path of the host.
//!
//! | module    | what it decides                                                        |
//! |-----------|------------------------------------------------------------------------|
//! | `stream`  | bytes: length, digests, decompression, growth                          |
//! | `tar`     | entries: numbers, names, attributes, sparse maps                       |
//! | `path`    | names: escapes, lengths, whiteouts                                     |
//! | `record`  | entries that are acceptable, and what is kept of them                  |
//! | `shadow`  | contents that need not be written (a guess)                            |
//! | `merge`   | what the stack of layers means (the truth)                             |
//! | `convert` | the order of it all                                                    |
//!
//! Memory: a few hundred bytes for each entry, a few hundred kilobytes for each layer under way, nothing that grows
//! with the size of a file.

mod convert;
mod error;
mod limits;
mod merge;
mod path;
mod record;
mod shadow;
mod stream;
mod tar;

use std::io::{self, Read};

pub use convert::convert;
pub use error::{ConvertError, EntryProblem, LayerProblem};
pub use hypeman_erofs::Compression;
pub use limits::Limits;

/// Opens a layer's compressed bytes; may be called more than once.
pub type OpenLayer = Box<dyn Fn() -> io::Result<Box<dyn Read + Send>> + Send + Sync>;

/// One layer, as its descriptor and the image configuration tell of it.
pub struct LayerSource {
    /// Media type of the descriptor. What decides is how the stream begins; media types of other things than
    /// layers are refused.
    pub media_type: String,
    /// Digest of the compressed bytes (`sha256:…`), checked if given.
    pub digest: Option<String>,
    /// Compressed bytes, exactly.
    pub size: u64,
    /// Digest of the uncompressed bytes (`sha256:…`), checked if given.
    pub diff_id: Option<String>,
    /// Opens the compressed bytes. Nearly always called once.
    pub open: OpenLayer,
}

/// How to convert.
#[derive(Debug, Clone, Default)]
pub struct ConvertOptions {
    /// How file contents are stored.
    pub compression: Compression,
    /// What the layers may be.
    pub limits: Limits,
    /// How many layers are decompressed at a time; 0 for as many as the host has processors. The image does not
    /// depend on it.
    pub threads: usize,
}

/// Watches a conversion.
pub trait ConvertObserver: Send + Sync {
    /// `bytes_read` compressed bytes of `total` have been read. Called often; must not block.
    fn progress(&self, bytes_read: u64, total: u64);
    /// Whether to stop; asked often.
    fn cancelled(&self) -> bool;
}

/// What a conversion came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Converted {
    /// Length of the image in bytes.
    pub size_bytes: u64,
    /// Inodes in the image.
    pub inodes: u64,
    /// Uncompressed bytes of all layers together.
    pub uncompressed_bytes: u64,
}
