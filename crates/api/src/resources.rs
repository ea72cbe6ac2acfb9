//! What the host has and what its instances take.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The host's resources.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Resources {
    /// Virtual CPUs.
    pub cpu: ResourceStatus,
    /// Memory, bytes.
    pub memory: ResourceStatus,
    /// Disk of the data directory, bytes.
    pub disk: ResourceStatus,
    /// Uplink, bytes a second.
    pub network: ResourceStatus,
    /// Where disk space went.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub disk_breakdown: Option<DiskBreakdown>,
    /// What each instance takes.
    pub allocations: Vec<ResourceAllocation>,
}

/// One resource.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ResourceStatus {
    /// Which.
    #[serde(rename = "type")]
    pub kind: String,
    /// What the host has.
    pub capacity: i64,
    /// What may be given out.
    pub effective_limit: i64,
    /// What is given out.
    pub allocated: i64,
    /// What is left.
    pub available: i64,
    /// `effective_limit` over `capacity`.
    pub oversub_ratio: f64,
    /// Where the capacity comes from; `unknown` means that nothing is refused for lack of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub source: Option<ResourceSource>,
}

/// Where a capacity comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ResourceSource {
    /// Read from the host.
    Detected,
    /// Set in the configuration.
    Configured,
    /// Not known.
    Unknown,
}

/// Where disk space went, bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiskBreakdown {
    /// Root disks of images.
    pub images_bytes: i64,
    /// Registry blobs.
    pub oci_cache_bytes: i64,
    /// Volumes.
    pub volumes_bytes: i64,
    /// Writable layers of instances.
    pub overlays_bytes: i64,
}

/// What one instance takes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ResourceAllocation {
    /// Its id.
    pub instance_id: String,
    /// Its name.
    pub instance_name: String,
    /// Virtual CPUs.
    pub cpu: i64,
    /// Memory, bytes.
    pub memory_bytes: i64,
    /// Disk, bytes.
    pub disk_bytes: i64,
    /// Bytes a second towards the instance.
    pub network_download_bps: i64,
    /// Bytes a second from the instance.
    pub network_upload_bps: i64,
    /// Bytes a second of its disks.
    pub disk_io_bps: i64,
}
