//! The error envelope and its stable codes.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What every failed request answers with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(as = Error)]
pub struct ErrorBody {
    /// Stable, machine-readable code.
    #[schema(example = "not_found")]
    pub code: String,
    /// What happened and what to do, for people.
    #[schema(example = "resource not found")]
    pub message: String,
    /// Further errors, one for each offending part of the request.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub details: Vec<ErrorDetail>,
    /// The cause, where it can be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub inner_error: Option<ErrorDetail>,
}

impl ErrorBody {
    /// An error of a code and a message.
    pub fn new(code: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            code: code.into(),
            message: message.into(),
            details: Vec::new(),
            inner_error: None,
        }
    }
}

/// One part of an error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorDetail {
    /// Stable code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub code: Option<String>,
    /// For people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub message: Option<String>,
}

/// Codes of handlers: lower-case words. The layers in front of them use the HTTP status text instead
/// (`Bad Request`, `Unauthorized`, `Forbidden`).
pub mod code {
    #![allow(missing_docs)]
    pub const ALREADY_EXISTS: &str = "already_exists";
    pub const AMBIGUOUS: &str = "ambiguous";
    pub const CONFLICT: &str = "conflict";
    pub const CREDENTIAL_CONFLICT: &str = "credential_conflict";
    pub const CURSOR_GONE: &str = "cursor_gone";
    pub const IMAGE_NOT_READY: &str = "image_not_ready";
    pub const INCOMPATIBLE: &str = "incompatible";
    pub const INSTANCE_EXPIRED: &str = "instance_expired";
    pub const INSUFFICIENT_RESOURCES: &str = "insufficient_resources";
    pub const INTERNAL_ERROR: &str = "internal_error";
    pub const INVALID_AUTO_STANDBY: &str = "invalid_auto_standby";
    pub const INVALID_BANDWIDTH_DOWNLOAD: &str = "invalid_bandwidth_download";
    pub const INVALID_BANDWIDTH_UPLOAD: &str = "invalid_bandwidth_upload";
    pub const INVALID_COMPRESSION_DELAY: &str = "invalid_compression_delay";
    pub const INVALID_CURSOR: &str = "invalid_cursor";
    pub const INVALID_DISK_IO_BPS: &str = "invalid_disk_io_bps";
    pub const INVALID_EXPIRES_AT: &str = "invalid_expires_at";
    pub const INVALID_HEALTH_CHECK: &str = "invalid_health_check";
    pub const INVALID_HOTPLUG_SIZE: &str = "invalid_hotplug_size";
    pub const INVALID_NAME: &str = "invalid_name";
    pub const INVALID_OVERLAY_SIZE: &str = "invalid_overlay_size";
    pub const INVALID_PLATFORM: &str = "invalid_platform";
    pub const INVALID_REQUEST: &str = "invalid_request";
    pub const INVALID_RESTART_POLICY: &str = "invalid_restart_policy";
    pub const INVALID_SIZE: &str = "invalid_size";
    pub const INVALID_SNAPSHOT_COMPRESSION: &str = "invalid_snapshot_compression";
    pub const INVALID_SNAPSHOT_POLICY: &str = "invalid_snapshot_policy";
    pub const INVALID_STATE: &str = "invalid_state";
    pub const INVALID_TIMEOUT: &str = "invalid_timeout";
    pub const INVALID_TTL: &str = "invalid_ttl";
    pub const LOG_NOT_FOUND: &str = "log_not_found";
    pub const MEMORY_IN_USE: &str = "memory_in_use";
    pub const NAME_CONFLICT: &str = "name_conflict";
    pub const NOT_FOUND: &str = "not_found";
    pub const NOT_SUPPORTED: &str = "not_supported";
    pub const PLATFORM_NOT_AVAILABLE: &str = "platform_not_available";
    pub const RATE_LIMITED: &str = "rate_limited";
    pub const RESTORE_FAILED: &str = "restore_failed";
    pub const SNAPSHOT_DAMAGED: &str = "snapshot_damaged";
}
