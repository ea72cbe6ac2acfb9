//! Instances: what is answered about them here, what is asked for in `request`.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::policy::{
    AutoStandbyPolicy, HealthCheck, InstanceHealthStatus, RestartPolicy, RestartStatus, SnapshotPolicy,
};

mod request;

pub use request::{
    CreateInstanceGpu, CreateInstanceNetwork, CreateInstanceRequest, CredentialForm, CredentialInjection,
    CredentialPolicy, CredentialSource, EgressEnforcement, EgressMode, EgressPolicy, StartInstanceRequest,
    UpdateInstanceRequest,
};

/// The states of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
pub enum InstanceState {
    /// Its VMM exists, its guest does not run yet.
    Created,
    /// Its guest starts.
    Initializing,
    /// Its program runs and its agent answers.
    Running,
    /// Its VMM holds it still.
    Paused,
    /// Its guest is off, its VMM still exists.
    Shutdown,
    /// It does not run.
    Stopped,
    /// It does not run; its memory is stored.
    Standby,
    /// Its state cannot be told, see `state_error`.
    Unknown,
}

impl InstanceState {
    /// All states.
    pub const ALL: [Self; 8] = [
        Self::Created,
        Self::Initializing,
        Self::Running,
        Self::Paused,
        Self::Shutdown,
        Self::Stopped,
        Self::Standby,
        Self::Unknown,
    ];

    /// The name on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Created => "Created",
            Self::Initializing => "Initializing",
            Self::Running => "Running",
            Self::Paused => "Paused",
            Self::Shutdown => "Shutdown",
            Self::Stopped => "Stopped",
            Self::Standby => "Standby",
            Self::Unknown => "Unknown",
        }
    }
}

impl std::fmt::Display for InstanceState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for InstanceState {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|state| state.as_str() == text)
            .ok_or_else(|| format!("{text:?} is not an instance state"))
    }
}

/// Hypervisors of the contract.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Hypervisor {
    /// Cloud Hypervisor.
    CloudHypervisor,
    /// Firecracker.
    Firecracker,
    /// QEMU with the architecture's standard board.
    Qemu,
    /// QEMU's minimal board.
    QemuMicrovm,
    /// Apple's Virtualization framework.
    Vz,
}

impl Hypervisor {
    /// All hypervisors, by name.
    pub const ALL: [Self; 5] = [
        Self::CloudHypervisor,
        Self::Firecracker,
        Self::Qemu,
        Self::QemuMicrovm,
        Self::Vz,
    ];

    /// The name on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::CloudHypervisor => "cloud-hypervisor",
            Self::Firecracker => "firecracker",
            Self::Qemu => "qemu",
            Self::QemuMicrovm => "qemu-microvm",
            Self::Vz => "vz",
        }
    }
}

impl std::fmt::Display for Hypervisor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for Hypervisor {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.as_str() == text)
            .ok_or_else(|| format!("{text:?} is not a hypervisor"))
    }
}

/// A virtual machine made from an image.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Instance {
    /// Its identifier.
    #[schema(example = "tz4a98xxat96iws9zmbrgj3a")]
    pub id: String,
    /// Its name, unique on this server.
    pub name: String,
    /// Image that it was made from, as it was asked for.
    pub image: String,
    /// Its state, as observed now.
    pub state: InstanceState,
    /// Why the state cannot be told, or why the guest does not get on in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub state_error: Option<String>,
    /// Platform of the image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub platform: Option<String>,
    /// Its hypervisor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub hypervisor: Option<Hypervisor>,
    /// Memory.
    #[schema(example = "1024.0 MB")]
    pub size: String,
    /// Memory that can be added while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub hotplug_size: Option<String>,
    /// Size of the writable layer.
    #[schema(example = "10.0 GB")]
    pub overlay_size: String,
    /// Virtual CPUs.
    pub vcpus: i32,
    /// Limit of its disks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, example = "100.0 MB/s")]
    pub disk_io_bps: Option<String>,
    /// Environment that was asked for.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Its network.
    pub network: InstanceNetwork,
    /// Its data volumes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<VolumeMount>,
    /// Its share of a GPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub gpu: Option<InstanceGpu>,
    /// Its tags.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schema(schema_with = crate::tags::schema)]
    pub tags: BTreeMap<String, String>,
    /// Whether its memory is stored.
    pub has_snapshot: bool,
    /// When it was made.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    /// When it was started last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime, nullable = false)]
    pub started_at: Option<Timestamp>,
    /// When it stopped last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime, nullable = false)]
    pub stopped_at: Option<Timestamp>,
    /// When it is deleted; null is never.
    #[schema(value_type = Option<String>, format = DateTime, required)]
    pub expires_at: Option<Timestamp>,
    /// How its program ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub exit_code: Option<i32>,
    /// How its program ended, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub exit_message: Option<String>,
    /// Phase of its life, the state in lower case.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub current_phase: Option<String>,
    /// Since when.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime, nullable = false)]
    pub current_phase_since: Option<Timestamp>,
    /// Milliseconds spent in each phase, the current one included.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub phase_durations_ms: BTreeMap<String, i64>,
    /// How its snapshots are stored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub snapshot_policy: Option<SnapshotPolicy>,
    /// When it goes to standby.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub auto_standby: Option<AutoStandbyPolicy>,
    /// How it is probed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub health_check: Option<HealthCheck>,
    /// What the probes found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub health_status: Option<InstanceHealthStatus>,
    /// When it is started again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub restart_policy: Option<RestartPolicy>,
    /// What the restart policy did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub restart_status: Option<RestartStatus>,
    /// What its hypervisor's process cannot reach, while there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub jail: Option<InstanceJail>,
}

/// How the process of an instance's hypervisor is confined.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InstanceJail {
    /// Whether it is confined at all.
    pub enabled: bool,
    /// User id of the process, where it has one of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, example = 200_001)]
    pub user: Option<i64>,
    /// What is in force.
    #[schema(example = json!(["user", "mount-namespace", "capabilities"]))]
    pub active: Vec<String>,
    /// What this host refuses, and why.
    pub missing: Vec<MissingConfinement>,
}

/// Something that does not confine the process of a hypervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MissingConfinement {
    /// What it is.
    #[schema(example = "memory")]
    pub item: String,
    /// Why it is missing.
    pub reason: String,
}

/// How an instance is connected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InstanceNetwork {
    /// Whether it is.
    pub enabled: bool,
    /// `default` when it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub name: Option<String>,
    /// Its address; null when it has none.
    #[schema(required)]
    pub ip: Option<String>,
    /// Its hardware address; null when it has none.
    #[schema(required)]
    pub mac: Option<String>,
    /// Limit towards the instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub bandwidth_download: Option<String>,
    /// Limit from the instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub bandwidth_upload: Option<String>,
}

/// A share of a GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InstanceGpu {
    /// Profile of the share.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub profile: Option<String>,
    /// The mediated device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub mdev_uuid: Option<String>,
}

/// A data volume of an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VolumeMount {
    /// The volume.
    pub volume_id: String,
    /// Where the guest sees it.
    pub mount_path: String,
    /// Whether the guest may not write.
    #[serde(default)]
    pub readonly: bool,
    /// Whether writes go to a private layer; needs `readonly`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub overlay: bool,
    /// Size of the private layer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay_size: Option<String>,
}

/// What waiting ended with. Callers compare `state` with what they wanted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(as = WaitForStateResponse)]
pub struct WaitResponse {
    /// The state at the end.
    pub state: InstanceState,
    /// Why the state cannot be told, or why the guest does not get on in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub state_error: Option<String>,
    /// Whether the time ran out first.
    pub timed_out: bool,
}

/// What an instance uses.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct InstanceStats {
    /// Its id.
    pub instance_id: String,
    /// Its name.
    pub instance_name: String,
    /// Processor time of its VMM, seconds.
    pub cpu_seconds: f64,
    /// Resident memory of its VMM, bytes.
    pub memory_rss_bytes: i64,
    /// Address space of its VMM, bytes.
    pub memory_vms_bytes: i64,
    /// Bytes that it received.
    pub network_rx_bytes: i64,
    /// Bytes that it sent.
    pub network_tx_bytes: i64,
    /// Virtual CPUs.
    pub allocated_vcpus: i32,
    /// Memory, bytes.
    pub allocated_memory_bytes: i64,
    /// Resident over allocated memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub memory_utilization_ratio: Option<f64>,
}

/// A path in a guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PathInfo {
    /// Whether it exists.
    pub exists: bool,
    /// Why that cannot be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub error: Option<String>,
    /// A directory.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_dir: bool,
    /// A regular file.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_file: bool,
    /// A symbolic link, when links are not followed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_symlink: bool,
    /// Target of the link.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub link_target: Option<String>,
    /// Permission bits.
    #[serde(default)]
    pub mode: u32,
    /// Bytes.
    #[serde(default)]
    pub size: i64,
}
