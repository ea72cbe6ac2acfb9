//! OCI images: references, registries, verified blobs, and layers turned into a root disk.
//!
//! ```text
//!  Reference ──► RegistryClient::resolve ──► Resolved (manifest of one platform)
//!                       │
//!                RegistryClient::pull ─────► BlobStore  ◄── /v2 uploads
//!                                               │
//!  Archive (docker save, OCI layout) ──push──►  │ layer_sources
//!                                               ▼
//!                                       layers: streams ──► root disk
//! ```
//!
//! Invariants:
//! * A file under `blobs/` always holds exactly the bytes its name says: digests are computed while the bytes
//!   stream in, and the name is given only after they matched and were synced.
//! * No layer or blob is ever held in memory whole; documents (manifests, configs) are bounded by
//!   [`manifest::MAX_DOCUMENT_BYTES`].
//! * Credentials live in memory only, never appear in logs or errors, and are sent to no host but the registry they
//!   belong to and its token service.

pub mod archive;
pub mod blobs;
pub mod digest;
pub mod error;
pub mod layers;
pub mod manifest;
pub mod platform;
pub mod reference;
pub mod registry;

pub use archive::{Archive, ArchiveOptions, ArchivedImage};
pub use blobs::{BlobStore, BlobStoreOptions};
pub use digest::Digest;
pub use error::{ImageError, Result};
pub use manifest::{Descriptor, ImageConfig, Index, Manifest};
pub use platform::Platform;
pub use reference::Reference;
pub use registry::{
    ClientOptions, ContentSource, Credentials, Extent, PulledImage, PulledLayer, PushOptions, Pushed,
    RegistryClient, Resolved, RetryPolicy, TransferEvent, TransferObserver, layer_sources,
};
