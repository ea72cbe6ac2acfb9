//! The error envelope of the OCI registry endpoints below `/v2/`.

use serde::{Deserialize, Serialize};

/// What a failed registry request answers with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegistryErrors {
    /// One or more errors.
    pub errors: Vec<RegistryError>,
}

/// One error in the terms of the distribution specification.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegistryError {
    /// `BLOB_UNKNOWN`, `MANIFEST_INVALID`, …
    pub code: String,
    /// For people.
    pub message: String,
}

/// Tags of a repository.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TagList {
    /// The repository.
    pub name: String,
    /// Its tags, in lexical order.
    pub tags: Vec<String>,
}
