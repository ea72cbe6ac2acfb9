//! Everything that can go wrong with images, as one typed error with stable codes.
//!
//! Messages name the object and, where one exists, the remedy. They never contain credentials: URLs are printed
//! without user info and query.

use std::time::Duration;

use crate::digest::Digest;

/// Shorthand for results of this crate.
pub type Result<T, E = ImageError> = std::result::Result<T, E>;

/// Why an image operation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The text is not an image reference.
    #[error("invalid image name {name:?}: {reason}")]
    InvalidName {
        /// The text as given, shortened.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The text is not a platform, or one that no guest of this server can run.
    #[error("invalid platform {0:?}: use linux/amd64 or linux/arm64")]
    InvalidPlatform(String),
    /// The text is not a digest that we can verify.
    #[error("invalid digest {0:?}: want sha256: and 64 lower-case hexadecimal digits")]
    InvalidDigest(String),
    /// A document (manifest, index, config, archive listing) breaks its own rules.
    #[error("invalid {what}: {reason}")]
    InvalidDocument {
        /// Which kind of document.
        what: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The image is well-formed but cannot be run: old schema, foreign or encrypted layers, not an image at all.
    #[error("unsupported image: {0}")]
    Unsupported(String),
    /// The manifest, blob, upload or file does not exist.
    #[error("{0} not found")]
    NotFound(String),
    /// The image exists, but not for the wanted platform.
    #[error("no image for platform {wanted}; available: {}", list_or_none(.available))]
    PlatformNotAvailable {
        /// The platform asked for.
        wanted: String,
        /// What the index offers, in its own order.
        available: Vec<String>,
    },
    /// The registry refused the credentials, or wants some.
    #[error("{host} refused access: {reason}")]
    Unauthorized {
        /// The registry or token service.
        host: String,
        /// What it said, and what to try.
        reason: String,
    },
    /// The registry asks us to come back later.
    #[error("{host} limits the request rate{}", retry_hint(.retry_after))]
    RateLimited {
        /// The registry.
        host: String,
        /// How long it asks us to wait.
        retry_after: Option<Duration>,
    },
    /// A server answered in a way that our security rules forbid to follow (redirect, token realm, upload location).
    #[error("{host} is not trusted: {reason}")]
    UnsafeServer {
        /// The server that gave the answer.
        host: String,
        /// Which rule it broke.
        reason: String,
    },
    /// Bytes do not have the digest that they should have.
    #[error("digest mismatch: expected {expected}, got {actual}")]
    DigestMismatch {
        /// The digest asked for.
        expected: Digest,
        /// The digest of what came.
        actual: Digest,
    },
    /// A stream ended early or late, or the server announced another size than the manifest.
    #[error("size mismatch for {what}: expected {expected} bytes, got {actual}")]
    SizeMismatch {
        /// What was transferred.
        what: String,
        /// Bytes expected.
        expected: u64,
        /// Bytes that came or were announced.
        actual: u64,
    },
    /// Something exceeds a configured or built-in limit.
    #[error("{what} is too large: the limit is {limit} bytes")]
    TooLarge {
        /// What was too large.
        what: String,
        /// The limit in bytes.
        limit: u64,
    },
    /// A chunk of an upload does not start where the last one ended.
    #[error("upload continues at byte {offset}")]
    RangeNotSatisfiable {
        /// Bytes that are stored already; the next chunk must start here.
        offset: u64,
    },
    /// Two transfers of one object got in each other's way.
    #[error("{0} is in use by another transfer")]
    Busy(String),
    /// The network or the server failed, also after the retries.
    #[error("{host}: {reason}")]
    Network {
        /// The server.
        host: String,
        /// The failure, without secrets.
        reason: String,
    },
    /// The disk that holds the blobs is full. Nothing of the failed transfer is left on it.
    #[error("no space left on device for {0}")]
    NoSpace(String),
    /// The caller cancelled.
    #[error("cancelled")]
    Cancelled,
    /// Any other failure of the local file system.
    #[error("{context}: {source}")]
    Io {
        /// What was being done.
        context: String,
        /// The operating system's answer.
        source: std::io::Error,
    },
}

impl ImageError {
    /// The stable code of this error, as used in API error bodies.
    pub fn code(&self) -> &'static str {
        match self {
            Self::InvalidName { .. } => "invalid_name",
            Self::InvalidPlatform(_) => "invalid_platform",
            Self::InvalidDigest(_) => "invalid_digest",
            Self::InvalidDocument { .. } => "invalid_manifest",
            Self::Unsupported(_) => "unsupported_image",
            Self::NotFound(_) => "not_found",
            Self::PlatformNotAvailable { .. } => "platform_not_available",
            Self::Unauthorized { .. } => "registry_unauthorized",
            Self::RateLimited { .. } => "rate_limited",
            Self::UnsafeServer { .. } => "registry_untrusted",
            Self::DigestMismatch { .. } => "digest_mismatch",
            Self::SizeMismatch { .. } => "size_mismatch",
            Self::TooLarge { .. } => "too_large",
            Self::RangeNotSatisfiable { .. } => "range_not_satisfiable",
            Self::Busy(_) => "busy",
            Self::Network { .. } => "registry_unreachable",
            Self::NoSpace(_) => "no_space",
            Self::Cancelled => "cancelled",
            Self::Io { .. } => "io_error",
        }
    }

    /// Wraps an I/O error; a full disk or an exhausted quota becomes [`ImageError::NoSpace`].
    pub fn io(context: impl Into<String>, source: std::io::Error) -> Self {
        match source.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                Self::NoSpace(match source.get_ref() {
                    // Not the system's answer, but our own: it says what to do.
                    Some(reason) => format!("{}: {reason}", context.into()),
                    None => context.into(),
                })
            }
            _ => Self::Io {
                context: context.into(),
                source,
            },
        }
    }

    pub(crate) fn document(what: &'static str, reason: impl Into<String>) -> Self {
        Self::InvalidDocument {
            what,
            reason: reason.into(),
        }
    }
}

fn list_or_none(items: &[String]) -> String {
    if items.is_empty() {
        "none".to_owned()
    } else {
        items.join(", ")
    }
}

fn retry_hint(after: &Option<Duration>) -> String {
    match after {
        Some(wait) => format!("; try again in {} s", wait.as_secs().max(1)),
        None => "; try again later, or with credentials".to_owned(),
    }
}
