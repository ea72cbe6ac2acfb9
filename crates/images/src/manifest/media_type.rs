//! Media types of both families, and what they mean to us.

/// OCI image manifest.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// OCI image index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// OCI image config.
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// OCI layer, not compressed.
pub const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
/// OCI layer, gzip.
pub const OCI_LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
/// OCI layer, zstd.
pub const OCI_LAYER_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
/// Docker schema 2 manifest.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// Docker manifest list.
pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// Docker image config.
pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
/// Docker layer, not compressed.
pub const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";
/// Docker layer, gzip.
pub const DOCKER_LAYER_GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";
/// Docker layer, zstd.
pub const DOCKER_LAYER_ZSTD: &str = "application/vnd.docker.image.rootfs.diff.tar.zstd";

/// The `Accept` header for manifests: everything that we understand, and nothing of schema 1.
pub const ACCEPT_MANIFESTS: &str = "application/vnd.oci.image.manifest.v1+json, \
    application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json, \
    application/vnd.docker.distribution.manifest.list.v2+json";

/// The media type without parameters.
pub fn essence(content_type: &str) -> &str {
    content_type.split(';').next().unwrap_or_default().trim()
}

/// Whether a content type says something about the document; generic ones such as `text/plain` do not.
pub(crate) fn is_document(kind: &str) -> bool {
    kind.starts_with("application/vnd.oci.image.") || kind.starts_with("application/vnd.docker.")
}

/// Docker schema 1, signed or not.
pub(crate) fn is_schema_one(kind: &str) -> bool {
    kind.starts_with("application/vnd.docker.distribution.manifest.v1")
}

/// An index of either family.
pub fn is_index(kind: &str) -> bool {
    matches!(kind, OCI_INDEX | DOCKER_LIST)
}

/// A manifest of either family.
pub fn is_manifest(kind: &str) -> bool {
    matches!(kind, OCI_MANIFEST | DOCKER_MANIFEST)
}

/// An image config of either family.
pub fn is_config(kind: &str) -> bool {
    matches!(kind, OCI_CONFIG | DOCKER_CONFIG)
}

/// A layer that we can apply.
pub fn is_layer(kind: &str) -> bool {
    matches!(
        kind,
        OCI_LAYER | OCI_LAYER_GZIP | OCI_LAYER_ZSTD | DOCKER_LAYER | DOCKER_LAYER_GZIP | DOCKER_LAYER_ZSTD
    )
}

/// A layer whose bytes are somewhere else by licence.
pub(crate) fn is_foreign(kind: &str) -> bool {
    kind.contains(".nondistributable.") || kind.contains(".rootfs.foreign.")
}

/// A layer that needs a key.
pub(crate) fn is_encrypted(kind: &str) -> bool {
    kind.contains("+encrypted") || kind.contains("+enc")
}

/// The OCI name of a Docker media type; other names stay.
pub(crate) fn to_oci(kind: &str) -> &str {
    match kind {
        DOCKER_MANIFEST => OCI_MANIFEST,
        DOCKER_LIST => OCI_INDEX,
        DOCKER_CONFIG => OCI_CONFIG,
        DOCKER_LAYER => OCI_LAYER,
        DOCKER_LAYER_GZIP => OCI_LAYER_GZIP,
        DOCKER_LAYER_ZSTD => OCI_LAYER_ZSTD,
        other => other,
    }
}
