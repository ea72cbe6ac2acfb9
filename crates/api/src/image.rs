//! Images.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// An OCI image, on its way to become a root disk or ready as one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Image {
    /// Normalised reference.
    #[schema(example = "docker.io/library/alpine:latest")]
    pub name: String,
    /// Digest of the manifest.
    pub digest: String,
    /// Platform that was chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub platform: Option<String>,
    /// How far it is.
    pub status: ImageStatus,
    /// Place in the queue, from 1; null when it does not wait.
    #[schema(required, minimum = 1)]
    pub queue_position: Option<u32>,
    /// Share of the present step (`pulling` or `converting`) that is done; absent where nobody knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, minimum = 0, maximum = 1)]
    pub progress: Option<f64>,
    /// Why it failed; null unless it did.
    #[schema(required)]
    pub error: Option<String>,
    /// Size of the root disk in bytes; null until ready.
    #[schema(required, minimum = 0)]
    pub size_bytes: Option<i64>,
    /// Entrypoint of the image.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub entrypoint: Vec<String>,
    /// Default arguments of the image.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cmd: Vec<String>,
    /// Environment of the image.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Working directory of the image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub working_dir: Option<String>,
    /// Tags of the user.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schema(schema_with = crate::tags::schema)]
    pub tags: BTreeMap<String, String>,
    /// When it was made.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
}

/// How far an image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ImageStatus {
    /// It waits.
    Pending,
    /// Its layers are being fetched.
    Pulling,
    /// Its root disk is being written.
    Converting,
    /// It can be run.
    Ready,
    /// It cannot, see `error`.
    Failed,
}

/// Asks for an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CreateImageRequest {
    /// OCI reference.
    #[schema(example = "docker.io/library/alpine:latest", min_length = 1)]
    pub name: String,
    /// `os/arch[/variant]`; the host's when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(pattern = "^[a-z0-9]+/[a-z0-9]+(/[a-z0-9.]+)?$", example = "linux/amd64")]
    pub platform: Option<String>,
    /// Credentials for this pull alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials: Option<RegistryCredentials>,
    /// Tags.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schema(schema_with = crate::tags::schema)]
    pub tags: BTreeMap<String, String>,
}

/// Credentials of a registry: used once, kept in memory, never stored or logged.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RegistryCredentials {
    /// User of basic authentication.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub username: Option<String>,
    /// Password of basic authentication.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password: Option<String>,
    /// Bearer token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub registry_token: Option<String>,
}

impl std::fmt::Debug for RegistryCredentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RegistryCredentials(..)")
    }
}

/// Points a local tag at an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TagImageRequest {
    /// Reference with a tag.
    #[schema(example = "docker.io/library/alpine:mine", min_length = 1)]
    pub target: String,
}
